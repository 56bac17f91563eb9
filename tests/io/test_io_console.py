"""Standard streams that cannot take what is printed raise nothing."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.single

PRINTS = """
import os, sys
from hpcinfer.io.console import take_streams, trouble_of_output
take_streams()
for _ in range(3):
    print("\\u2603" * 5000, flush=True)
    print("error \\udcff", file=sys.stderr, flush=True)
trouble = trouble_of_output()
number = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(number, f"{number} {trouble and trouble.errno}".encode())
"""


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        (">out", "3 None"),
        (">/dev/full 2>/dev/full", "3 28"),
        (">&- 2>&- <&-", "3 None"),
        ("2>&-", "3 None"),
        ("| head -c 9", "3 None"),
    ],
)
def test_nothing_is_raised_and_no_file_takes_a_streams_number(tmp_path, redirection, said):
    words = f"set -o pipefail; {sys.executable} -c '{PRINTS}' said {redirection}"
    done = subprocess.run(
        ["bash", "-c", words],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (tmp_path / "said").read_text() == said
    if redirection == ">out":
        assert (tmp_path / "out").read_text().startswith("\\u2603\\u2603")
        assert "error \\udcff" in done.stderr
