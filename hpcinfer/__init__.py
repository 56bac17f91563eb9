"""hpcinfer: large-language-model inference as an MPI program.

Every MPI rank owns one device and one shard of the model. The parallel strategies are short
algorithms made of explicit MPI calls on NumPy or CuPy arrays (package `hpcinfer.parallel`).

Letters used for shapes throughout::

    B  batch (sequences)          H  query heads            N  layers
    S  query positions            G  key/value heads        V  vocabulary
    L  key positions              K  width of one head      E  experts
    D  model width                F  FFN width              k  experts that a token chooses
    I  inputs of a product        O  outputs of a product   R  rows of logits, of wanted tokens
    C  columns behind the first product of a half layer     M  columns before its second one
    T  tokens of one step, all sequences laid end to end    A  attention ranks, if FFNs have others
    P  ranks of the communicator at hand

``/P`` marks the axis that is cut: ``(T/P, D)`` is one rank's part of ``(T, D)``; ``{sum}`` after a
shape marks a partial sum that is still to be reduced over the ranks.

The command line is ``hpcinfer --help``; from Python::

    import hpcinfer
    model = hpcinfer.load("data/model", layout="tp=2")        # on every rank
    for result in model.generate(["The code of the river is 4821. "], max_tokens=16):
        print(result.choices[0].text)

Importing this package starts neither MPI nor a GPU nor threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(
    path: Any,
    comm: Any = None,
    layout: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    **options: Any,
) -> Engine:
    """Load a model over the ranks of a communicator; see `hpcinfer.engine.api.load`."""
    from hpcinfer.engine.api import load as load_model

    return load_model(path, comm=comm, layout=layout, dtype=dtype, device=device, **options)
