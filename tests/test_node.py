"""Folders of the node: where compiled kernels are kept, and where they are not."""

import os
import tempfile

import pytest

from hpcinfer import node

pytestmark = pytest.mark.single


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """A folder of the user's, and one for temporary files."""
    monkeypatch.setenv("HPCINFER_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_the_users_folder_comes_first(homes):
    assert node.cache_folder("kernels-1") == homes / "home" / "hpcinfer" / "kernels-1"
    assert list((homes / "home" / "hpcinfer" / "kernels-1").iterdir()) == []


def test_a_private_temporary_folder_serves_where_that_cannot_be_written(homes):
    (homes / "home").write_text("no folder")
    found = node.cache_folder("kernels-1")
    assert found == homes / "tmp" / f"hpcinfer-{os.getuid()}" / "kernels-1"
    assert found.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trouble", ["others write", "link", "file"])
def test_no_folder_is_taken_that_others_can_fill(homes, trouble):
    (homes / "home").write_text("no folder")
    private = homes / "tmp" / f"hpcinfer-{os.getuid()}"
    if trouble == "others write":
        private.mkdir()
        private.chmod(0o777)
    elif trouble == "link":
        (homes / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(homes / "elsewhere")
    else:
        private.write_text("")
    assert node.cache_folder("kernels-1") is None
