"""Input lines: numbers, line ends and marks are right, and memory stays bounded."""

import bz2
import gzip
import lzma

import pytest

from hpcinfer.io.lines import LongLine, read_lines

pytestmark = pytest.mark.single


def lines_of(path, content, **options):
    path.write_bytes(content)
    return list(read_lines(path, **options))


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \t\n\n{"b": 2}\n{"c": 3}'
    expected = [(1, b'{"a": 1}'), (5, b'{"b": 2}'), (6, b'{"c": 3}')]
    assert lines_of(tmp_path / "x.jsonl", content) == expected
    assert lines_of(tmp_path / "x.jsonl", b"\xef\xbb\xbf\n1\n") == [(2, b"1")]


def test_text_keeps_blank_lines(tmp_path):
    content = b"one\n\n two \r\n\r\n"
    assert lines_of(tmp_path / "x.txt", content) == [(1, b"one"), (2, b""), (3, b" two "), (4, b"")]
    assert lines_of(tmp_path / "x.txt", b"") == []
    assert lines_of(tmp_path / "x.txt", b"a\rb\xe2\x80\xa8c\x00\n") == [
        (1, b"a\rb\xe2\x80\xa8c\x00")
    ]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("length", range(1, 40))
def test_long_lines(tmp_path, length, end):
    """Exactly the lines above the limit are replaced, whatever their ends; the next one stands."""
    limit, line = 10, b"x" * length
    content = line + end + (b"next\n" if end else b"")
    found = lines_of(tmp_path / "x.jsonl", content, limit=limit)
    first = line if length <= limit else LongLine(length + len(end))
    assert found == [(1, first)] + ([(2, b"next")] if end else [])


def test_unreadable_input(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        list(read_lines(tmp_path / "absent"))
    with pytest.raises(ValueError, match="directory"):
        list(read_lines(tmp_path))
    with pytest.raises(ValueError, match="UTF-16"):
        lines_of(tmp_path / "x.jsonl", "{}".encode("utf-16"))


@pytest.mark.parametrize(
    ("pack", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_packed_files_are_named_as_what_they_are(tmp_path, pack, kind):
    with pytest.raises(ValueError, match=f"packed by {kind}, need plain text; unpack it by "):
        lines_of(tmp_path / "x.jsonl", pack(b'{"prompt": "a"}\n'))
