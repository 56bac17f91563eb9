"""How much slower than the reference this machine is now: a factor on the limits of the suite.

`python tests/helpers/speed.py` measures it, in one to two seconds, as two processes that do some of
what tests do: Python, array code, files, the start of an interpreter. Tests read the result from
HPCINFER_TEST_SLOWDOWN.
"""

import os
import subprocess
import sys
import tempfile
import time

REFERENCE_S = 1.5  # what it takes on two quiet cores of 2.5 GHz
PROCESSES = 2

SLOWDOWN = max(1.0, float(os.environ.get("HPCINFER_TEST_SLOWDOWN") or 1))


def scaled(seconds):
    """A limit in seconds, as this machine needs it."""
    return seconds * SLOWDOWN


def work():
    """A fixed piece of work."""
    import numpy as np

    subprocess.run([sys.executable, "-c", "import json"], check=True)
    assert sum(i * i for i in range(10_000_000)) > 0
    x = np.full((1 << 20,), 0.5, np.float32)
    for _ in range(200):
        np.tanh(x, out=x)
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1 << 24))


def measure():
    """Factor, 1 or more, by which the work takes longer than on the reference."""
    start_s = time.perf_counter()
    others = [subprocess.Popen([sys.executable, __file__, "work"]) for _ in range(PROCESSES)]
    for other in others:
        other.wait()
    return max(1.0, (time.perf_counter() - start_s) / REFERENCE_S)


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    else:
        print(f"{measure():.1f}")
