"""The loading of a model over the ranks of a grid: shards, what ranks of a node share, a cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from hpcinfer.array import Device
from hpcinfer.engine.alike import refuse_different
from hpcinfer.engine.block_manager import pages_for
from hpcinfer.engine.expert_load import ExpertLoad
from hpcinfer.engine.placement import take_device, take_sums, take_threads
from hpcinfer.engine.process import ProcessState
from hpcinfer.engine.scheduler import StepLimits
from hpcinfer.engine.stats import RunStats
from hpcinfer.errors import agreed, shown
from hpcinfer.grid import Grid, agree_all
from hpcinfer.heartbeat import waiting
from hpcinfer.io.atomic import AnyPath
from hpcinfer.io.checkpoint import Checkpoint
from hpcinfer.io.models import open_checkpoint
from hpcinfer.ledger import Ledger
from hpcinfer.model.architecture import Architecture
from hpcinfer.model.families import read_architecture
from hpcinfer.model.ffn_rank import FfnRank
from hpcinfer.model.forward import Model
from hpcinfer.model.layout_check import refuse_unfit
from hpcinfer.model.weights.check import check
from hpcinfer.text.text import Text
from hpcinfer.text.worker import shared_worker

# Share of the free memory that the cache takes where --kv-memory does not say.
_KV_SHARE = 0.5


@dataclass
class Loaded:
    """A model in memory, before it has a cache.

    Attributes
    ----------
    path : where it was read from
    model : Model, or FfnRank on the ranks that have FFNs only
    text : Text
    context : positions that a sequence may have
    generation_config : dict, what the model recommends
    checksum : of the checkpoint
    stats : RunStats
    shares_weights : False on a rank that has read weights alone which others share
    """

    path: AnyPath
    model: Model | FfnRank
    text: Text
    context: int
    generation_config: dict
    checksum: str
    stats: RunStats
    shares_weights: bool = True


def load_parts(
    path: AnyPath,
    grid: Grid,
    process: ProcessState,
    limits: StepLimits,
    dtype: np.dtype | None,
    device: str,
    context: int | None,
    kv_memory: int | None,
) -> tuple[Loaded, int]:
    """A model with a cache: (Loaded, pages of the cache), its state of the process found."""
    with process.in_use():
        # Begin with the process that encodes, which takes a moment to be there.
        if grid.is_leader:
            shared_worker().start()

        # Take this rank's part of the node.
        process.threads = take_threads(grid.node)
        own, process.direct = take_device(grid.comm, grid.node, device)
        process.reducers = take_sums(grid, own)

        # Read the own shard, then share what others of the node have too.
        start_s = time.perf_counter()
        with agree_all(grid.comm, open_checkpoint, path) as checkpoint:
            refuse_different(grid.comm, "model", checkpoint.config, checkpoint.checksum)
            text = _text(checkpoint, grid)
            read = partial(_read, path, checkpoint, text, grid, dtype, own, context, process.ledger)
            loaded = agree_all(grid.comm, read)
        loaded.stats.load_s = time.perf_counter() - start_s
        _share_weights(loaded, grid)

        # Give every rank the same number of pages, and forget what loading has sent.
        pages = _pages(loaded, grid, limits, kv_memory)
        loaded.model.allocate_cache(pages)
        process.ledger.clear()
    return loaded, pages


def _text(checkpoint: Checkpoint, grid: Grid) -> Text:
    """The checkpoint's text: leaders, which encode, read the tokenizer; others take its tables."""
    text = agree_all(grid.comm, lambda: Text(checkpoint) if grid.is_leader else None)
    with waiting("bcast", grid.comm, "text"):
        tables = grid.comm.bcast(text and text.tables)
    return text or Text(checkpoint, tables)


def _read(
    path: AnyPath,
    checkpoint: Checkpoint,
    text: Text,
    grid: Grid,
    dtype: np.dtype | None,
    device: Device,
    context: int | None,
    ledger: Ledger,
) -> Loaded:
    """This rank's shard of a model, as Loaded."""
    # Refuse what cannot be loaded before the first weight is read.
    arch = read_architecture(checkpoint.config)
    refuse_unfit(arch, grid.layout)
    check(arch, checkpoint.tensors)
    dtype = _dtype(arch, checkpoint) if dtype is None else dtype
    context = _context(arch, context)

    # Read the weights.
    part = FfnRank if grid.role == "ffn" else Model
    model = part(arch, checkpoint, grid, device, dtype, ExpertLoad(arch))
    stats = RunStats(grid, ledger, checkpoint.bytes_read, checkpoint.file_bytes)
    documents = checkpoint.generation_config, checkpoint.checksum
    return Loaded(path, model, text, context, *documents, stats)


def _dtype(arch: Architecture, checkpoint: Checkpoint) -> np.dtype:
    """Element type that the model's config names."""
    if arch.dtype is None:
        names = [checkpoint.config.get(word) for word in ("dtype", "torch_dtype")]
        raise ValueError(
            f"config: got dtype {shown(names[0] or names[1])}, need float32, bfloat16 or float16; "
            "say with --dtype in which of them to compute"
        )
    return arch.dtype


def _context(arch: Architecture, context: int | None) -> int:
    """Positions to allow: the model's, or what the user asks for where the model can take it."""
    if context is None:
        return arch.context
    if arch.learned_positions and context > arch.learned_positions:
        raise ValueError(
            f"context: got {context}, need at most {arch.learned_positions}, the positions that "
            "this model has learned"
        )
    return context


def _share_weights(loaded: Loaded, grid: Grid) -> None:
    """Let the ranks of a node have one copy of equal weights; read those that cannot be shared."""
    loaded.shares_weights = loaded.model.share_weights()
    loaded.model.device.trim()

    def read_alone() -> None:
        if not loaded.shares_weights:
            with open_checkpoint(loaded.path) as checkpoint:
                loaded.model.read(checkpoint, alone=True)
                loaded.stats.bytes_read += checkpoint.bytes_read

    agree_all(grid.comm, read_alone)


def _pages(loaded: Loaded, grid: Grid, limits: StepLimits, kv_memory: int | None) -> int:
    """Pages of every rank's cache, the most that all can hold.

    Raises
    ------
    ValueError
        On every rank, if one cannot hold a single page.
    """
    # Find the memory of this rank's cache.
    model, comm = loaded.model, grid.comm
    local_bytes = kv_memory
    if local_bytes is None:
        sharers = grid.node.size if model.device.name == "cpu" else 1
        local_bytes = int(_KV_SHARE * model.device.free_bytes()) // sharers

    # A rank without a cache takes what the others have.
    most = -(-pages_for(loaded.context) * limits.sequences // model.pools)
    pages = min(most, local_bytes // model.page_bytes) if model.page_bytes else None
    pages = min((n for n in comm.allgather(pages) if n is not None), default=most)
    if pages < 1:
        page_bytes = max(comm.allgather(model.page_bytes))
        raise agreed(
            ValueError(
                f"kv-memory: got {local_bytes} bytes, need {page_bytes} or more, one page; "
                "raise --kv-memory or use more ranks"
            )
        )
    return pages
