"""The Python interface: load a model over the ranks of a communicator, then generate and score.

    import hpcinfer

    model = hpcinfer.load("data/model", layout="tp=2")
    for result in model.generate(["Once there was a shy hare"], max_tokens=32, temperature=0):
        print(result.choices[0].text)
    print(model.score(["Once there was a shy hare"])[0].perplexity)

Every rank makes the same calls and gets the same answers; calls that differ are refused. Ranks that
have no items of their own pass None, and get the answers to the first rank's. Where each rank has
prompts of its own, each loads a model for itself: comm=MPI.COMM_SELF.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcinfer import array
from hpcinfer.engine import nonfinite
from hpcinfer.engine.activations.extract import ExtractTask, activations_of, gathered
from hpcinfer.engine.activations.selection import Selection
from hpcinfer.engine.ahead import Ahead
from hpcinfer.engine.alike import compare, digest, refuse_different
from hpcinfer.engine.block_manager import BlockManager
from hpcinfer.engine.build_step import build_step
from hpcinfer.engine.feed import Feed
from hpcinfer.engine.generate import GenerateTask
from hpcinfer.engine.loading import Loaded, load_parts
from hpcinfer.engine.loop import MicroBatch
from hpcinfer.engine.loop import run as run_loop
from hpcinfer.engine.process import ProcessState
from hpcinfer.engine.scheduler import Scheduler, StepLimits
from hpcinfer.engine.score import ScoreTask
from hpcinfer.engine.task import Outcome, Plan, Task
from hpcinfer.engine.uncaught import end_all_ranks
from hpcinfer.errors import UsageError, agreed, is_agreed
from hpcinfer.grid import Grid, agree, grid_of
from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.models import open_checkpoint
from hpcinfer.launcher import world
from hpcinfer.layout import Layout, parse_layout
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.families import read_architecture
from hpcinfer.model.layout_check import fault_of
from hpcinfer.model.step import Step
from hpcinfer.ops import dispatch
from hpcinfer.requests.defaults import defaults_from
from hpcinfer.requests.fields import PromptLimits
from hpcinfer.requests.reader import RequestReader
from hpcinfer.requests.request import BadRequest, Result, Score
from hpcinfer.requests.sampling import Sampling

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

# A text, its token ids, or a dict as in a line of JSONL input.
Item = str | Sequence[int] | dict[str, Any]
Items = str | dict[str, Any] | Iterable[Item] | None

# Micro-batches of the two sides' turns, and of prompts for each stage of a pipeline.
_MICRO_BATCHES, _CHUNKS_PER_STAGE = 2, 4


def load(
    path: AnyPath,
    comm: Intracomm | None = None,
    layout: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    kv_memory: int | None = None,
    step_tokens: int = 2048,
    sequences: int = 256,
    context: int | None = None,
    seed: int = 0,
    micro_batches: int | None = None,
    check_weights: bool = False,
    kernels: str | None = None,
) -> Engine:
    """Load a model; every rank of the communicator calls this and reads its own shard.

    Parameters
    ----------
    path : Hugging Face directory or converted .h5
    comm : communicator, COMM_WORLD by default
    layout : such as "tp=2"; all ranks along tp by default
    dtype : "float32", "bfloat16" or "float16"; as the checkpoint's config says by default
    device : "cpu", "cuda" or "auto"
    kv_memory : bytes of the cache per rank, which need not be equal; by default half of what is
        free, shared by the node's ranks
    step_tokens, sequences : bounds of one step of the engine
    context : positions to allow, instead of the model's own number
    seed : of requests that do not give their own
    micro_batches : parts of the work that are under way at a time: with attention and FFN on ranks
        of their own, those that take turns (2 by default); in a pipeline, those that the prompts at
        hand are spread over (4 for each stage by default)
    check_weights : True to read all weights first, shared out over the ranks, and to refuse wrong
        checksums, NaN and infinity
    kernels : "auto" or "plain", as `hpcinfer.ops.dispatch` knows them; by default what its `use`
        chose last, "auto" at first

    Returns
    -------
    Engine

    Raises
    ------
    ValueError
        On every rank, in one line, if the model or an argument cannot be used.
    """
    # Refuse wrong arguments before there is anything to give back.
    comm = world() if comm is None else comm
    if comm.size > 1:
        end_all_ranks()
    choices = (layout, None if dtype is None else str(dtype), kernels, check_weights)
    bounds = (step_tokens, sequences, context, seed, micro_batches)
    refuse_different(comm, "arguments of load", choices, bounds)
    parsed_layout = _parsed(layout, comm, path)
    try:
        process = ProcessState(dispatch.choice() if kernels is None else kernels)
        of_weights = None if dtype is None else array.parse_dtype(dtype)
        seed = Sampling(seed=seed).seed
    except ValueError as error:
        raise agreed(error) from None
    limits = _limits(parsed_layout, step_tokens, sequences, micro_batches)

    # Load; where all ranks fail alike, give the communicators back.
    grid = grid_of(comm, parsed_layout)
    try:
        if check_weights:
            nonfinite.check_weights(comm, path, of_weights)
        loaded, pages = load_parts(
            path, grid, process, limits, of_weights, device, context, kv_memory
        )
    except BaseException as error:
        if is_agreed(error):
            grid.release()
        raise
    return Engine(loaded, grid, process, limits, pages, seed)


class Engine:
    """A loaded model with its cache and queue, on one rank.

    `close` gives back what it holds, as leaving a `with` block does.

    Attributes
    ----------
    model : hpcinfer.model.forward.Model, or FfnRank on a rank that has FFNs only
    text : Text
    grid : Grid
    path : where the model was read from
    context : positions that a sequence may have
    shares_weights : False on a rank that has read weights alone which others share
    scheduler : Scheduler
    stats : RunStats, what the run has cost so far
    ledger : Ledger, what it has sent
    threads : of this rank's own kernels and of its libraries
    seed : of requests that do not give their own
    observers : functions (MicroBatch, seconds), called on ranks with sequences after each step
    depth : rounds of micro-batches under way at a time, one for each stage of the pipeline
    width : micro-batches of a round
    """

    model: Any
    scheduler: Scheduler
    ahead: Ahead

    def __init__(
        self,
        loaded: Loaded,
        grid: Grid,
        process: ProcessState,
        limits: StepLimits,
        pages: int,
        seed: int,
    ):
        # Take the model and what is known of it.
        self.path, self.context, self.stats = loaded.path, loaded.context, loaded.stats
        self.model, self.text, self.checksum = loaded.model, loaded.text, loaded.checksum
        self.generation_config = loaded.generation_config
        self.shares_weights = loaded.shares_weights

        # Take the ranks, and how many rounds they have under way.
        self.grid, self.limits, self.seed = grid, limits, seed
        self.depth = grid.layout.pp
        self.width = limits.parts // self.depth

        # Begin with nothing sent, found or cached.
        self.ledger, self.threads, self._process = process.ledger, process.threads, process
        self.ahead = Ahead(self)
        self.observers: list[Callable[[MicroBatch, float], None]] = []
        self.stats.kv_bytes = pages * self.model.page_bytes
        self._forget(pages)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type | None, *details: object) -> None:
        # After an error others may be elsewhere: what is collective would wait for them.
        if kind is None:
            self.close()

    def in_use(self) -> AbstractContextManager[None]:
        """Context in which the process has the engine's threads, kernels and ledger.

        Raises
        ------
        RuntimeError
            If the engine is closed.
        """
        self._refuse_closed()
        return self._process.in_use()

    def close(self) -> None:
        """Give back weights, cache and communicators; every rank calls this, once or more often."""
        if self.model is None:
            return
        self.model = None
        del self.scheduler, self.ahead
        self._process.reducers.clear()
        self.grid.release()

    def build_step(self, plan: Plan) -> Step:
        """Arrays of the step that the scheduler has planned, for this rank."""
        context = self.model.attention
        return build_step(
            plan,
            self.scheduler.pages,
            context.kv.rank,
            self.grid.cp.size,
            context.by_columns,
            self.model.arch.rope,
            self.grid.tp.size if self.grid.layout.sp == "on" else 1,
        )

    def stops(self, sampling: Sampling) -> frozenset[int]:
        """Token ids that end a sequence with this sampling."""
        eos = () if sampling.ignore_eos else self.text.eos_ids
        return frozenset(eos) | frozenset(sampling.stop_token_ids)

    def generate(self, items: Items, **sampling: Any) -> list[Result]:
        """Answer prompts.

        Parameters
        ----------
        items : str, or list of str, of lists of token ids, or of dicts as in a line of JSONL
            input; None on ranks that leave them to the first one
        sampling : fields of `hpcinfer.requests.sampling.Sampling`, for items that do not say

        Returns
        -------
        list of Result in the order of `items`, on every rank

        Raises
        ------
        ValueError
            On every rank, if an item cannot be used, or differs from rank to rank.
        """
        items = self._alike(items, sampling)
        return self._run(GenerateTask, self.reader(sampling), items)

    def score(self, items: Items) -> list[Score]:
        """Log-probabilities of texts.

        Parameters
        ----------
        items : str, or list of str, of lists of token ids, or of dicts as in a line of JSONL
            input; None on ranks that leave them to the first one

        Returns
        -------
        list of Score in the order of `items`, on every rank
        """
        items = self._alike(items)
        return self._run(ScoreTask, self.reader({}, score=True), items)

    def extract(
        self,
        items: Items,
        layers: Iterable[int] | None = None,
        what: str | Iterable[str] = ("residual",),
        pool: str | None = None,
    ) -> list[dict[str, Any]]:
        """Activations of texts, in memory: for a few; `hpcinfer extract` writes those of many.

        Parameters
        ----------
        items : str, or list of str, of lists of token ids, or of dicts as in a line of JSONL
            input; None on ranks that leave them to the first one
        layers : numbers of layers, negative ones counted from the end; None for all
        what : some of `hpcinfer.engine.activations.selection.POINTS`
        pool : "last" or "mean" for one row for each text; None for one for each token

        Returns
        -------
        list in the order of `items`, on every rank, of dicts: custom_id, token_ids (T,), for each
        point a dict of layer -> (T, ...), and for logits the array (T, V)

        Raises
        ------
        ValueError
            If an item cannot be used, or this model has no such point or layer.
        """
        layers = None if layers is None else tuple(layers)
        what = (what,) if isinstance(what, str) else tuple(what)
        items = self._alike(items, layers, what, pool)
        work = ExtractTask(self, Selection(what, layers, pool))
        with work.into_memory() as memory:
            outcomes = self._run(lambda engine: work, self.reader({}, score=True), items)
        replicas = gathered(self.grid, memory)
        return [activations_of(outcome, replicas) for outcome in outcomes]

    def reader(
        self, sampling: dict[str, Any], plain: bool = False, score: bool = False
    ) -> RequestReader:
        """Reader of requests for this model.

        Parameters
        ----------
        sampling : dict, defaults for the requests' sampling; None values are left out
        plain : True if the input is one prompt a line
        score : True if the texts are scored as they stand
        """
        self._refuse_closed()
        limits = PromptLimits(self.model.arch.V, self.context)
        return RequestReader(self.text, self.defaults(sampling), limits, plain, score)

    def defaults(self, sampling: dict[str, Any]) -> Sampling:
        """Sampling of requests that do not say: `sampling`, else what the model recommends.

        Raises
        ------
        ValueError
            On every rank, for values out of range.
        """
        try:
            return defaults_from(self.generation_config, sampling)
        except ValueError as error:
            raise agreed(error) from None

    def expert_load(self) -> np.ndarray:
        """How many tokens chose each expert so far: (N, E) int64; every rank must call this.

        E is 0 for a model without experts, and a layer that has none is a row of zeros.
        """
        self._refuse_closed()
        return self.grid.comm.allreduce(self.model.expert_load.counts)

    def _refuse_closed(self) -> None:
        """Refuse a call of an engine that has given back its model."""
        if self.model is None:
            raise RuntimeError(
                "engine: got a call after close(), need an open engine; load the model again"
            )

    def _forget(self, pages: int) -> None:
        """Start with an empty queue and a cache of `pages` pages per rank that hold nothing."""
        block_table = BlockManager(pages, self.model.pools)
        self.scheduler = Scheduler(block_table, self.limits, self.model.arch.rope)

    def _alike(self, items: Items, *options: Any) -> list[Item]:
        """Items on the first rank, [] elsewhere, once all ranks are known to be called alike."""
        self._refuse_closed()
        comm = self.grid.comm
        refuse_different(comm, "options", *options)
        if isinstance(items, str | dict):
            items = [items]

        # Only the first rank keeps them: there may be many.
        kept = list(items) if items is not None and self.grid.is_root else []
        given = kept if self.grid.is_root else items
        compare(comm, "items", None if items is None or given is None else digest(given))
        return kept

    def _run(
        self, make: Callable[[Engine], Task], reader: RequestReader, items: list[Item]
    ) -> list:
        """Outcomes of all items, in their order, on every rank."""
        with self.in_use():
            return self._outcomes(make, reader, items)

    def _outcomes(
        self, make: Callable[[Engine], Task], reader: RequestReader, items: list[Item]
    ) -> list:
        finished: dict[int, Outcome] = {}
        grid = self.grid

        def deliver(outcome: Outcome) -> None:
            index = outcome.index if isinstance(outcome, BadRequest) else outcome.request.index
            finished[index] = outcome
            self.stats.answered += 1

        # Every replica reads what the first rank was given.
        n = grid.comm.bcast(len(items))
        if grid.is_leader and grid.layout.dp > 1:
            items = grid.dp.bcast(items)

        # Run them; after an error the queue holds nothing that goes on.
        try:
            with Feed(grid, reader.read_items(items), n) as feed:
                run_loop(self, feed, deliver, make(self))
        except BaseException:
            self._forget(self.scheduler.pages.n)
            raise

        # Put those of all replicas together, in order, and refuse what could not be used.
        if grid.replica.size < grid.comm.size:
            for part in grid.comm.allgather(finished if grid.is_leader else {}):
                finished |= part
        outcomes = [finished[index] for index in sorted(finished)]
        for outcome in outcomes:
            if isinstance(outcome, BadRequest):
                raise agreed(ValueError(f"item {outcome.index}: {outcome.message}"))
        return outcomes


def _parsed(layout: str | None, comm: Intracomm, path: AnyPath) -> Layout:
    """The layout that a text means; one that makes no sense is refused with one for this model."""
    try:
        return parse_layout(layout, comm.size)
    except UsageError as error:
        try:
            arch = agree(comm, _architecture, path)
        except ValueError:
            raise error from None
        return parse_layout(layout, comm.size, fault_of(arch))


def _architecture(path: AnyPath) -> Architecture:
    with open_checkpoint(path) as checkpoint:
        return read_architecture(checkpoint.config)


def _limits(
    layout: Layout, step_tokens: int, sequences: int, micro_batches: int | None
) -> StepLimits:
    """Bounds of a step, and in how many steps the work is spread."""
    if layout.afd:
        micro_batches = micro_batches or _MICRO_BATCHES
        return StepLimits(step_tokens, sequences, parts=micro_batches, chunks=micro_batches)
    chunks = layout.pp * (_CHUNKS_PER_STAGE if layout.pp > 1 else 1)
    return StepLimits(step_tokens, sequences, parts=layout.pp, chunks=micro_batches or chunks)
