"""Activations of given texts, written by every rank as they are computed.

Outside, rows are tokens in the order in which a replica computes them. Each rank writes some
columns of all of them, so that a file needs no table of which rows are whose: where a point of the
forward pass leaves tokens cut over ranks, one Alltoall per step makes columns cut of them.

    point       of layer n                                     columns, cut over
    residual    its input; n = N: after the final norm         D, tp and cp
    attention   what its attention half adds                   D, tp and cp
    ffn         what its FFN half adds                         D, tp and cp
    q           queries as they meet the keys: rotated, normed H, as the heads are; then cp
    k, v        keys and values as they are cached             G, as the heads are; then cp
    lse         log-sum-exp of the scores of each query        H, as the heads are; then cp
    router      the router's scores; `experts`: those chosen   E and k, tp and cp
    logits      of the whole model                             V, tp and cp

With latent attention a key is what is cached, the latent and the rotated key that all heads share;
queries are in the same form, so that their product is a score; a value is a part of the key.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from hpcinfer import array, partition
from hpcinfer.engine.request import Extracted
from hpcinfer.engine.scheduler import Sequence
from hpcinfer.errors import UsageError, is_agreed
from hpcinfer.grid import agree, agree_all
from hpcinfer.io.activations import ActivationsWriter
from hpcinfer.io.checkpoint import open_checkpoint
from hpcinfer.io.parts import Field, Parts, Share, next_generation
from hpcinfer.model.families import read_architecture
from hpcinfer.model.step import holders, in_parts
from hpcinfer.parallel.ulysses import to_heads

POINTS = ("residual", "attention", "ffn", "q", "k", "v", "router", "logits", "lse")
POOLS = ("last", "mean")

# Logits in memory at a time, in bytes.
_LOGITS_BYTES = 64 << 20

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

    what: tuple = ("residual",)
    layers: tuple | None = None
    pool: str | None = None
    store: str = "float32"
    compress: bool = False

    def __post_init__(self):
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
    def rows(self):
        """What a row is."""
        return "tokens" if self.pool is None else "requests"

    @property
    def facts(self):
        """What a file says of it."""
        return {
            "what": ",".join(self.what),
            "layers": "all" if self.layers is None else ",".join(map(str, self.layers)),
            "pool": self.pool or "",
            "store": self.store,
        }

    def fields(self, arch):
        """Every dataset, in the order of the points: list of Field.

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
        shapes, fields = self._shapes(arch), []
        for point in dict.fromkeys(self.what):
            for n in self._layers_of(point, arch):
                for name in ("router", "experts") if point == "router" else (point,):
                    shape, labels, of_type = shapes[name]
                    full = name if point == "logits" else f"{name}/{n}"
                    fields.append(Field(full, shape, of_type, labels, _DESCRIPTIONS[name]))
        return fields

    def _shapes(self, arch):
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
        for point in ("residual", "attention", "ffn"):
            shapes[point] = (arch.D,), ("features",), dtype
        if arch.mla is not None:
            shapes["k"] = (arch.K,), ("latent",), dtype
        if arch.E:
            shapes["router"] = (arch.E,), ("experts",), exact
            shapes["experts"] = (arch.router.k,), ("choices",), np.dtype(np.int32)
        return shapes

    def _layers_of(self, point, arch):
        """Numbers of the layers of a point, ascending."""
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


class Extract:
    """What `loop.run` does with texts whose activations are extracted.

    Parameters
    ----------
    engine : Engine
    selection : Selection

    Attributes
    ----------
    fields : list of Field, all datasets
    """

    def __init__(self, engine, selection):
        self.engine, self.selection, self._generation = engine, selection, 0
        self.fields = selection.fields(engine.model.arch)
        self._row, self._first = 0, {}

    def open(self, path, facts, resume=False, least=0):
        """The file that joins the parts, on the root: an ActivationsWriter."""
        facts = facts | self.selection.facts
        return ActivationsWriter(path, self.fields, facts, self.selection.rows, resume, least)

    @contextmanager
    def into_parts(self, path):
        """While entered, every rank writes parts of the joined file `path`; collective."""
        grid = self.engine.grid
        self._generation = agree(grid.comm, next_generation, path)

        def open_parts(shares):
            numbers = self._generation, grid.dp.rank, grid.comm.rank
            return Parts(path, *numbers, shares, self.selection.compress)

        with self._tapped(open_parts) as parts:
            yield
        if parts is not None:
            record = self.engine.record
            record.written_bytes, record.write_s = parts.written_bytes, parts.time_s

    @contextmanager
    def into_memory(self):
        """While entered, every rank keeps its rows; yields a Memory."""
        with self._tapped(Memory) as memory:
            yield memory

    @contextmanager
    def _tapped(self, open_sink):
        """While entered, the model hands what is selected to a sink; yields it, None without one.

        Parameters
        ----------
        open_sink : function (list of Share) -> object with `append(name, rows)`, `close()` and
            `abandon()`
        """
        model, grid, sink = self.engine.model, self.engine.grid, None
        if grid.side != "ffn":
            spreads = _spreads(model, self.fields)
            sink = open_sink([s.share for s in spreads.values() if s.share.stop > s.share.start])
            model.tap = Tap(model, self.selection, spreads, sink)
        try:
            yield sink
        except BaseException as error:
            # Close the files together, unless the error is this rank's alone.
            if is_agreed(error):
                agree_all(grid.comm, lambda: sink and sink.close())
            elif sink:
                sink.abandon()
            raise
        else:
            agree_all(grid.comm, lambda: sink and sink.close())
        finally:
            model.tap = None

    def tokens_of(self, request):
        """Tokens of a text, all of which are computed."""
        return len(request.token_ids)

    def sequences_of(self, request, deliver):
        """The text as one sequence."""
        tokens = list(request.token_ids)
        return [Sequence(request, 0, tokens, len(tokens), all_rows=True, whole=True)]

    def job(self, plan):
        """The step's sequences that are then complete, each with the first of its rows."""
        complete = []
        for sequence, n in sorted(plan, key=lambda entry: entry[0].number):
            if sequence.computed == n:
                self._first[sequence.number] = self._row
            if self.selection.pool is None:
                self._row += n
            if sequence.computed == sequence.target:
                first = self._first.pop(sequence.number)
                if self.selection.pool is not None:
                    first, self._row = self._row, self._row + 1
                complete.append((sequence, first))
        return complete

    def find(self, job, hidden):
        """Nothing: what is wanted was taken on the way."""

    def use(self, job, found, deliver):
        """End the texts that are complete."""
        for sequence, first in job:
            self.engine.scheduler.finish(sequence)
            n_rows = len(sequence.tokens) if self.selection.pool is None else 1
            replica = self.engine.grid.dp.rank
            deliver(Extracted(sequence.request, self._generation, replica, first, n_rows))


class Memory:
    """Keeps the rows of one rank.

    Parameters
    ----------
    shares : list of Share
    """

    def __init__(self, shares):
        self._shares = {share.field.name: share for share in shares}
        self._rows = {name: [] for name in self._shares}

    def append(self, name, rows):
        """Keep the next rows of a dataset: (n, own columns, ...)."""
        self._rows[name].append(rows.copy())

    def close(self):
        """Nothing is left to do."""

    abandon = close

    def own(self):
        """dict name -> (first own column, rows)"""
        return {
            name: (share.start, np.concatenate(self._rows[name]))
            for name, share in self._shares.items()
            if self._rows[name]
        }


def gathered(grid, memory):
    """Activations of all ranks, on every rank.

    Returns
    -------
    list of dict name -> (rows, columns, ...), one per replica
    """
    own = {} if memory is None else memory.own()
    of_ranks = grid.comm.allgather((grid.dp.rank, own))
    replicas = []
    for replica in range(grid.layout.dp):
        parts = {}
        for _, of_rank in filter(lambda entry: entry[0] == replica, of_ranks):
            for name, (start, rows) in of_rank.items():
                parts.setdefault(name, []).append((start, rows))
        replicas.append(
            {
                name: np.concatenate([rows for _, rows in sorted(of_name, key=_first)], axis=1)
                for name, of_name in parts.items()
            }
        )
    return replicas


def activations_of(outcome, replicas):
    """What `Engine.extract` returns for one text."""
    rows = slice(outcome.first_row, outcome.first_row + outcome.n_rows)
    found = {
        "custom_id": outcome.request.custom_id,
        "token_ids": np.array(outcome.request.token_ids, np.int32),
    }
    for name, x in replicas[outcome.replica].items():
        point, _, n = name.partition("/")
        if n:
            found.setdefault(point, {})[int(n)] = x[rows]
        else:
            found[point] = x[rows]
    return found


def check(comm, path, outputs, selection):
    """Refuse, before a model is loaded, what cannot be extracted from it, or not to these files.

    Raises
    ------
    UsageError
        On every rank.
    """
    if len(outputs) != 1 or not outputs[0].lower().endswith(".h5"):
        raise UsageError(
            f"output: got {', '.join(outputs)}, need one name that ends in .h5 for activations"
        )
    agree(comm, lambda: selection.fields(_architecture(path)))


def _architecture(path):
    with open_checkpoint(path) as checkpoint:
        return read_architecture(checkpoint.config)


def _first(part):
    return part[0]


@dataclass
class Spread:
    """How the columns of a dataset are spread over ranks, along its first axis.

    Attributes
    ----------
    share : Share, the own columns
    held : (start, stop) among the columns at hand on this rank, those of which it answers for
        together with other ranks
    over_cp, over_all : (start, stop) of every rank of cp, and of tp x cp, among the columns at hand
    """

    share: Share
    held: slice
    over_cp: list
    over_all: list | None = None


def _spreads(model, fields):
    """dict name -> Spread of the datasets that this rank has a part in."""
    layers, last = model.layers, model.arch.N if model.pipeline.is_last else None
    spreads = {}
    for spec in fields:
        point, _, n = spec.name.partition("/")
        if point == "logits" and last is not None:
            share = Share(spec, *model.head_range)
            spreads[spec.name] = Spread(share, slice(None), [])
        elif point != "logits" and (int(n) in layers or int(n) == last):
            spreads[spec.name] = _spread(model, spec, point)
    return spreads


def _spread(model, spec, point):
    """Spread of one dataset of a layer."""
    tp, cp, heads = model.grid.tp, model.grid.cp, model.heads
    if point in ("q", "lse"):
        held, first = slice(None), heads.query[0]
        n = heads.n_query
    elif point in ("k", "v") and spec.labels[0] == "heads":
        # A head that several ranks have is written by the first of them.
        start, stop = model.context.first_kv
        held, first, n = slice(start, stop), heads.kv[0] + start, max(0, stop - start)
    else:
        ranges = partition.block(spec.shape[0], tp.size * cp.size)
        of_cp = ranges[tp.rank * cp.size : (tp.rank + 1) * cp.size]
        return Spread(Share(spec, *of_cp[cp.rank]), slice(None), of_cp, ranges)
    of_cp = partition.block(n, cp.size)
    own = of_cp[cp.rank]
    return Spread(Share(spec, first + own[0], first + own[1]), held, of_cp)


class Tap:
    """Takes what a model shows, and hands every rank's columns on in the order of the texts.

    Parameters
    ----------
    model : Model
    selection : Selection
    spreads : dict name -> Spread
    sink : see `Extract`
    """

    def __init__(self, model, selection, spreads, sink):
        self._model, self._spreads, self._sink = model, spreads, sink
        self._pool, self._sums, self._tokens = selection.pool, {}, (None, None)
        self._points = {name.partition("/")[0] for name in spreads}

    def wants(self, point):
        """True if a point is wanted in any layer."""
        return point in self._points

    def take(self, point, n, x, step, rows):
        """Take what the model shows; see `Model.show`."""
        if not step.n_tokens:
            return
        if point == "final":
            self._take(f"residual/{n}", x, step, rows)
            self._take_logits(x, step)
        elif point == "router":
            self._take(f"router/{n}", x[0], step, rows)
            self._take(f"experts/{n}", x[1], step, rows)
        else:
            self._take(f"{point}/{n}", x, step, rows)

    def _take(self, name, x, step, rows):
        """Take the activations of some tokens: (T/P, columns, ...)."""
        spread = self._spreads.get(name)
        if spread is None:
            return
        if self._pool != "mean":
            x = _rounded(x, spread.share.field)
        if x.ndim > 1 + len(spread.share.field.shape):  # a key that all heads share
            x = x[:, 0]
        own = self._own_columns(x[:, spread.held], spread, step, rows)
        self._put(name, self._pooled(name, own, step))

    def _take_logits(self, hidden, step):
        """Scores of the own part of the vocabulary, a bounded number of rows at a time."""
        spread = self._spreads.get("logits")
        if spread is None:
            return
        xp = array.namespace(hidden)
        hidden = self._pooled("logits", hidden[xp.asarray(self._wanted(step))], step)
        V, ranks = self._model.arch.V, self._model.grid.tp_cp.size
        block = max(1, _LOGITS_BYTES // (4 * max(partition.counts(partition.block(V, ranks)))))
        for start in range(0, len(hidden), block):
            self._put("logits", self._model.logits(hidden[start : start + block]))

    def _own_columns(self, x, spread, step, rows):
        """The own columns of all wanted tokens, texts in the order in which they came.

        (T/P, columns at hand, ...) -> (wanted, own columns, ...)
        """
        grid, xp, wanted = self._model.grid, array.namespace(x), self._wanted(step)
        comm, held, owner = holders(step, rows, grid)
        if comm is None:
            ranges = spread.over_all or spread.over_cp
            rank = grid.tp_cp.rank if spread.over_all else grid.cp.rank
            return x[xp.asarray(wanted)][:, slice(*ranges[rank])]

        # Send every rank its columns of the own tokens.
        ranges = spread.over_all if comm is grid.tp_cp else spread.over_cp
        tokens = np.sort(wanted)
        owner = owner[tokens]
        mine = np.searchsorted(held, tokens[owner == comm.rank])
        counts = np.bincount(owner, minlength=comm.size).tolist()
        sent = x[xp.asarray(mine)]
        sent = sent if x.ndim == 3 else sent[..., None]
        received = to_heads(comm, sent, counts, ranges, purpose="extract")
        received = received if x.ndim == 3 else received[..., 0]
        return received[xp.asarray(in_parts(owner)[np.searchsorted(tokens, wanted)])]

    def _wanted(self, step):
        """Tokens of a step that are wanted, texts in the order in which they came: (n,) int64."""
        if self._tokens[0] is not step:
            number = step.numbers[step.tokens[:, 0]]
            tokens = np.argsort(number, kind="stable")
            if self._pool == "last":
                ends = step.lengths[step.tokens[:, 0]] - 1 == step.positions
                tokens = tokens[(ends & step.complete[step.tokens[:, 0]])[tokens]]
            self._tokens = step, tokens
        return self._tokens[1]

    def _pooled(self, name, x, step):
        """Rows of the wanted tokens, or the means of the texts that are complete."""
        if self._pool != "mean":
            return x
        means = []
        for b in np.argsort(step.numbers, kind="stable"):
            of_text = step.tokens[self._wanted(step), 0] == b
            key, total = (name, int(step.numbers[b])), 0.0
            if step.positions[step.tokens[:, 0] == b][0] > 0:
                total = self._sums.pop(key)
            total = total + x[of_text].sum(axis=0, dtype=np.float64)
            if step.complete[b]:
                means.append(total / int(step.lengths[b]))
            else:
                self._sums[key] = total
        xp = array.namespace(x)
        return xp.stack(means).astype(np.float32) if means else x[:0]

    def _put(self, name, rows):
        """Hand own columns on, rounded to the type in which they are stored."""
        field = self._spreads[name].share.field
        if rows.size:
            self._sink.append(name, array.host(_rounded(rows, field)))


def _rounded(x, field):
    """`x` in the element type of a field.

    Raises
    ------
    ValueError
        If a value is too large for it.
    """
    if x.dtype == field.dtype or field.dtype != np.float16:
        return array.narrow(x, field.dtype)
    xp = array.namespace(x)
    with np.errstate(over="ignore"):
        rounded = array.narrow(x, field.dtype)
    if bool(xp.isinf(rounded).any()):
        raise ValueError(
            f"extract: got {float(abs(x).max()):.3g} in {field.name}, need at most 65504 for "
            "float16; use --store bfloat16 or float32"
        )
    return rounded
