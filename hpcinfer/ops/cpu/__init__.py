"""Fast forms for processors: Numba for what no library has, oneDNN for 16-bit matrix products."""

import importlib.util

FILES = ("activation", "attention", "linear", "norm", "rope", "store")


def missing():
    """Why nothing here can run: a line that says what is needed; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install hpcinfer[cpu]"
    return None
