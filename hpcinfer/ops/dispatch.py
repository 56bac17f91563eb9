"""Which function runs: the plain one, or the one of the same name in cpu/ or cuda/, with kernels.

The plain function is array code that NumPy and CuPy both run, and the oracle. `ops/cpu/` and
`ops/cuda/` hold files of the same names, in which some of its functions have kernels. They take the
same arguments, give the same results, within rounding, and return NotImplemented for what they do
not serve: the plain function then does.
"""

import functools
import importlib

from hpcinfer import array

CHOICES = ("auto", "plain")

_found = []  # of every function, the one that runs for each type of array, as far as it is known
_choice = "auto"


def dispatch(plain):
    """A function that others with kernels stand in for, by the namespace of its first argument.

    Returns
    -------
    function with the attribute `plain`
    """
    found = {}
    _found.append(found)
    place = plain.__module__.rpartition(".")[2]

    @functools.wraps(plain)
    def call(x, *args, **options):
        function = found.get(type(x))
        if function is None:
            name = array.namespace(x).__name__
            function = found[type(x)] = _find(name, place, plain)
        result = function(x, *args, **options)
        return plain(x, *args, **options) if result is NotImplemented else result

    call.plain = plain
    return call


def use(choice):
    """Let kernels run ("auto"), or the plain functions alone ("plain"), from now on.

    Raises
    ------
    ValueError
        If the choice is neither.
    """
    global _choice
    refuse_unknown(choice)
    if choice == _choice:
        return
    _choice = choice
    for found in _found:
        found.clear()


def refuse_unknown(choice):
    """Refuse what `use` cannot choose.

    Raises
    ------
    ValueError
    """
    if choice not in CHOICES:
        raise ValueError(f"kernels: got {choice!r}, need one of {', '.join(CHOICES)}")


def choice():
    """What `use` chose last."""
    return _choice


def backend(name):
    """The package of kernels for a namespace ("numpy" or "cupy"); None where it cannot run."""
    package = importlib.import_module(f"hpcinfer.ops.{'cpu' if name == 'numpy' else 'cuda'}")
    return package if package.missing() is None else None


def chosen(name):
    """As `backend`; None too where the plain functions are to run."""
    return backend(name) if _choice == "auto" else None


def notice():
    """A line for the user where kernels must be compiled first, which takes a while; or None."""
    package = chosen("numpy")
    return None if package is None else package.notice()


def _find(name, place, plain):
    """The function with kernels for a plain one; that itself if there is none, or it cannot run."""
    package = chosen(name)
    if package is None or place not in package.FILES:
        return plain
    module = importlib.import_module(f"{package.__name__}.{place}")
    return getattr(module, plain.__name__, plain)
