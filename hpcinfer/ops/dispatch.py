"""Which form of a function runs: the plain one, or the fast one of the same name in cpu/ or cuda/.

The plain form is array code that NumPy and CuPy both run, and the oracle. `ops/cpu/` and
`ops/cuda/` hold files of the same names with fast forms of some of its functions. They have the
same arguments and results, within rounding, and return NotImplemented for what they do not serve:
the plain form then does.
"""

import functools
import importlib

from hpcinfer import array

CHOICES = ("auto", "plain")

_forms = []  # of every function, its fast form for each type of array, as far as they are found
_choice = "auto"


def dispatch(plain):
    """A function with fast forms elsewhere; chosen by the namespace of its first argument.

    Returns
    -------
    function with the attribute `plain`
    """
    forms = {}
    _forms.append(forms)
    place = plain.__module__.rpartition(".")[2]

    @functools.wraps(plain)
    def call(x, *args, **options):
        form = forms.get(type(x))
        if form is None:
            name = array.namespace(x).__name__
            form = forms[type(x)] = _find(name, place, plain)
        result = form(x, *args, **options)
        return plain(x, *args, **options) if result is NotImplemented else result

    call.plain = plain
    return call


def use(choice):
    """Let the fast forms run ("auto"), or the plain ones alone ("plain"), from now on.

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
    for forms in _forms:
        forms.clear()


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
    """The package of fast forms for a namespace ("numpy" or "cupy"); None where it cannot run."""
    package = importlib.import_module(f"hpcinfer.ops.{'cpu' if name == 'numpy' else 'cuda'}")
    return package if package.missing() is None else None


def chosen(name):
    """As `backend`; None too where the plain forms are to run."""
    return backend(name) if _choice == "auto" else None


def notice():
    """A line for the user where fast forms must be compiled first, which takes a while; or None."""
    package = chosen("numpy")
    return None if package is None else package.notice()


def _find(name, place, plain):
    """The fast form of a plain function; the plain one if there is none, or it cannot run."""
    package = chosen(name)
    if package is None or place not in package.FILES:
        return plain
    module = importlib.import_module(f"{package.__name__}.{place}")
    return getattr(module, plain.__name__, plain)
