"""What is extracted from a model: points of the forward pass, layers, and how rows are stored.

    point       of layer n                                       columns, cut over
    residual    its input; n = N: after the final norm           D, tp and cp
    attention   what its attention half adds                     D, tp and cp
    ffn         what its FFN half adds                           D, tp and cp
    q           queries as they meet the keys: normed, rotated   H, as the heads are, then cp
    k, v        keys and values as they are cached               G, as the heads are, then cp
    lse         log-sum-exp of the scores of each query          H, as the heads are, then cp
    router      the router's scores; `experts`: those chosen     E and k, tp and cp
    logits      of the whole model                               V, tp and cp

With latent attention a key is what is cached, the latent and the rotated key that all heads share;
queries are in the same form, so that their product is a score; a value is a part of the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcinfer import array
from hpcinfer.errors import UsageError
from hpcinfer.io.parts import Field
from hpcinfer.model.architecture import Architecture

POINTS = ("residual", "attention", "ffn", "q", "k", "v", "router", "logits", "lse")
POOLS = ("last", "mean")

_DESCRIPTIONS = {
    "residual": "input of the layer; behind the last one, the output after the final norm",
    "attention": "what the attention half adds to the residual",
    "ffn": "what the FFN half adds to the residual",
    "q": "queries as they meet the keys",
    "k": "keys as they are cached",
    "v": "values as they are cached",
    "lse": "log-sum-exp of the attention scores",
    "router": "scores of the experts, before they become weights",
    "experts": "experts that the token takes",
    "logits": "scores of the vocabulary for the next token",
}


@dataclass(frozen=True)
class Selection:
    """What is extracted.

    Attributes
    ----------
    what : tuple of POINTS
    layers : tuple of layers, negative ones counted from the end; None for all
    pool : "last" or "mean", one row for each request; None for one for each token
    store : element type on disk, by name; that of router and lse is always float32
    compress : True to compress the files

    Raises
    ------
    UsageError
        For a point, pooling or type that there is not.
    """

    what: tuple[str, ...] = ("residual",)
    layers: tuple[int, ...] | None = None
    pool: str | None = None
    store: str = "float32"
    compress: bool = False

    def __post_init__(self) -> None:
        unknown = [point for point in self.what if point not in POINTS]
        if unknown or not self.what:
            got = unknown[0] if unknown else "nothing"
            raise UsageError(f"extract: got what={got}, need some of {', '.join(POINTS)}")
        if self.pool not in (None, *POOLS):
            raise UsageError(f"extract: got pool={self.pool}, need {' or '.join(POOLS)}")
        if self.pool == "mean" and "router" in self.what:
            raise UsageError(
                "extract: got pool=mean for router, need pool=last: numbers of experts have no mean"
            )
        if self.store not in array.DTYPES:
            raise UsageError(f"extract: got store={self.store}, need {', '.join(array.DTYPES)}")

    @property
    def rows(self) -> str:
        """What a row is."""
        return "tokens" if self.pool is None else "requests"

    @property
    def facts(self) -> dict[str, str]:
        """What a file says of it."""
        return {
            "what": ",".join(self.what),
            "layers": "all" if self.layers is None else ",".join(map(str, self.layers)),
            "pool": self.pool or "",
            "store": self.store,
        }

    def fields(self, arch: Architecture) -> list[Field]:
        """Every dataset, in the order of the points.

        Raises
        ------
        UsageError
            For a layer or a point that this model does not have.
        """
        if arch.mla is not None and "v" in self.what:
            raise UsageError(
                f"extract: got what=v for {arch.family}, need k: with latent attention the values "
                f"are its first {arch.mla.kv_rank} columns"
            )

        # List the points in the order asked for, and the layers of each ascending.
        shapes, fields = self._shapes(arch), []
        for point in dict.fromkeys(self.what):
            for n in self._layers_of(point, arch):
                for name in ("router", "experts") if point == "router" else (point,):
                    shape, labels, of_type = shapes[name]
                    full = name if point == "logits" else f"{name}/{n}"
                    fields.append(Field(full, shape, of_type, labels, _DESCRIPTIONS[name]))
        return fields

    def _shapes(self, arch: Architecture) -> dict[str, tuple]:
        """Shape of a row, labels of its axes and element type, by the first part of a name."""
        dtype, exact = array.parse_dtype(self.store), np.dtype(np.float32)
        per_head = ("heads", "width"), dtype
        shapes = {
            "q": ((arch.H, arch.K), *per_head),
            "k": ((arch.G, arch.K), *per_head),
            "v": ((arch.G, arch.K), *per_head),
            "lse": ((arch.H,), ("heads",), exact),
            "logits": ((arch.V,), ("vocabulary",), dtype),
        }

        # Add the points whose shape the family decides.
        for point in ("residual", "attention", "ffn"):
            shapes[point] = (arch.D,), ("features",), dtype
        if arch.mla is not None:
            shapes["k"] = (arch.K,), ("latent",), dtype
        if arch.E:
            shapes["router"] = (arch.E,), ("experts",), exact
            shapes["experts"] = (arch.router.k,), ("choices",), np.dtype(np.int32)
        return shapes

    def _layers_of(self, point: str, arch: Architecture) -> list[int]:
        """Numbers of the layers of a point, ascending."""
        # Find the layers that have it.
        if point == "logits":
            return [arch.N]
        known = list(range(arch.N + (point == "residual")))
        if point == "router":
            known = [n for n in known if arch.sparse[n]]
            if not known:
                raise UsageError(
                    f"extract: got what=router for {arch.family}, need a model with experts"
                )
        if self.layers is None:
            return known

        # Count negative numbers from the end, and refuse layers that there are not.
        end = arch.N + (point == "residual")
        layers = [n + end if n < 0 else n for n in self.layers]
        other = [n for n, at in zip(self.layers, layers, strict=True) if at not in known]
        if other:
            kind = " with experts" if point == "router" else ""
            raise UsageError(
                f"extract: got layer {other[0]} for {point}, need layers{kind} from "
                f"{known[0]} to {known[-1]}, or from the end, -1 for the last"
            )
        return sorted(set(layers))
