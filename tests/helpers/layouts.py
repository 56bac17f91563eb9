"""All layouts of a number of ranks that make sense, and some of them drawn at random."""

import itertools
import math
import random

from reference import models

from hpcinfer.errors import UsageError
from hpcinfer.layout import AXES, STRATEGIES, parse_layout
from hpcinfer.model.families import read_architecture
from hpcinfer.model.layout_check import refuse_unfit

_PREFILL, _DECODE = STRATEGIES["prefill"], STRATEGIES["decode"]

# Pairs (prefill, decode) that have every mode of both.
MODES = [
    (_PREFILL[i % len(_PREFILL)], _DECODE[i % len(_DECODE)])
    for i in range(max(len(_PREFILL), len(_DECODE)))
]


def axes_of(size):
    """Words of the axes of `size` ranks."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    for lengths in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(lengths) == size:
            yield dict(zip(AXES, map(str, lengths), strict=True))


def legal(size, experts):
    """Every layout of `size` ranks that is not refused, as text.

    Parameters
    ----------
    experts : True for a model with experts, which alone have ep
    """
    grids = list(axes_of(size))
    for M in range(1, size):
        grids += [words | {"afd": f"{M}:{size - M}"} for words in axes_of(M)]
    for words in grids:
        choices = [(name, STRATEGIES[name]) for name in STRATEGIES if _matters(name, words)]
        choices += [("ep", map(str, range(1, size + 1)))] if experts else []
        names = [name for name, _ in choices]
        for values in itertools.product(*(values for _, values in choices)):
            layout = words | dict(zip(names, values, strict=True))
            text = ",".join(f"{word}={value}" for word, value in layout.items())
            if is_legal(text, size):
                yield text


def is_legal(text, size, arch=None):
    """True if a layout is refused neither as such nor, where one is given, for a model."""
    try:
        layout = parse_layout(text, size)
        if arch is not None:
            refuse_unfit(arch, layout)
    except UsageError:
        return False
    return True


def architecture(case):
    """Architecture of a case of `reference.models`."""
    return read_architecture(models.CASES[case])


def draw(size, case, n, seed):
    """`n` layouts of `size` ranks that a case can take, no two alike.

    Each kind of grid is as likely as any other, however many strategies it has to choose from.
    """
    arch, by_grid = architecture(case), {}
    rng = random.Random(f"{seed} {size} {case}")
    for text in legal(size, bool(arch.E)):
        if is_legal(text, size, arch):
            grid = tuple(text.split(",")[: len(AXES) + ("afd" in text)])
            by_grid.setdefault(grid, []).append(text)
    pools, drawn = [rng.sample(pool, len(pool)) for _, pool in sorted(by_grid.items())], []
    while pools and len(drawn) < n:
        pool = rng.choice(pools)
        drawn.append(pool.pop())
        pools = [pool for pool in pools if pool]
    return drawn


def _matters(name, words):
    """True if a strategy makes a difference on these axes."""
    return {
        "prefill": int(words["cp"]) > 1,
        "decode": int(words["cp"]) > 1,
        "sp": int(words["tp"]) > 1,
        "zero": int(words["dp"]) * int(words["cp"]) > 1,
        "stages": int(words["pp"]) > 1,
    }[name]
