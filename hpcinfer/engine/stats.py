"""What a run has cost: tokens, seconds, memory and messages, gathered into a short report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcinfer import node
from hpcinfer.ledger import Ledger

if TYPE_CHECKING:
    from hpcinfer.engine.api import Engine
    from hpcinfer.grid import Grid
    from hpcinfer.layout import Layout
    from hpcinfer.model.architecture import Architecture
    from hpcinfer.model.step import Step

# What every rank has counted, by name; see `RunStats._counted`.
Counts = list[dict[str, Any]]


@dataclass
class PhaseStats:
    """Steps of one kind."""

    tokens: int = 0
    steps: int = 0
    time_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.time_s if self.time_s else 0.0


class RunStats:
    """Counters of one rank.

    A step that computes any prompt token counts as prefill with all its tokens and time; the others
    are decode steps.

    Attributes
    ----------
    ledger : what the engine has sent
    load_s : seconds from opening the checkpoint to weights in memory
    bytes_read, file_bytes : tensor bytes read by this rank, and in the whole checkpoint
    kv_bytes : size of this rank's cache
    prefill, decode : PhaseStats
    loop_s : seconds in the loop of steps
    empty_s : those of them in steps that this replica took for the others' sake
    answered : requests that this replica finished
    written_bytes, write_s : activations that this rank wrote, and seconds in which it did nothing
        else
    """

    def __init__(self, grid: Grid, ledger: Ledger, bytes_read: int, file_bytes: int):
        self.grid, self.ledger = grid, ledger
        self.bytes_read, self.file_bytes = bytes_read, file_bytes
        self.load_s, self.kv_bytes = 0.0, 0
        self.most_pages = 0
        self.prefill, self.decode = PhaseStats(), PhaseStats()
        self.loop_s, self.empty_s, self.answered = 0.0, 0.0, 0
        self.written_bytes, self.write_s = 0, 0.0

    def step(self, step: Step, n_prompt: int, time_s: float, pages_held: int) -> None:
        """Count one step of `n_prompt` prompt tokens and others, which took `time_s` seconds."""
        if not step.n_tokens:
            self.empty_s += time_s
            return
        phase = self.prefill if n_prompt else self.decode
        phase.tokens += step.n_tokens
        phase.steps += 1
        phase.time_s += time_s
        self.most_pages = max(self.most_pages, pages_held)

    def report(self, engine: Engine) -> list[str] | None:
        """The report's lines, on the root; every rank must call this. None elsewhere."""
        # Gather what each rank has counted.
        load, grid = engine.expert_load(), self.grid
        ranks = grid.comm.gather(self._counted(engine), 0)
        if ranks is None:
            return None

        # Say what belongs to every run, then what belongs to this one's layout and model.
        lines = [
            f"layout    {grid.layout} on {engine.model.device}, "
            f"{engine.model.dtype}, threads per rank {engine.threads}",
            f"load      {max(r['load_s'] for r in ranks):.2f} s; read per rank "
            + _span([r["bytes_read"] for r in ranks])
            + f"; sum {sum(r['bytes_read'] for r in ranks) / max(1, self.file_bytes):.2f} x the "
            f"weights' {_size(self.file_bytes)}",
            *_speed_lines(ranks),
            _cache_line(ranks, engine.scheduler.pages.total),
        ]
        lines += _memory_lines(grid, ranks) + _balance_lines(grid.layout, ranks)
        lines += _written_lines(ranks)
        return lines + _expert_lines(load, engine.model.arch) + _ledger_lines(self.ledger)

    def _counted(self, engine: Engine) -> dict[str, Any]:
        """What this rank has counted, as it is sent to the root."""
        # Take the rank's place, its memory, its time, then its work.
        model, scheduler = engine.model, engine.scheduler
        return {
            "bytes_read": self.bytes_read,
            "load_s": self.load_s,
            "peak_bytes": node.peak_memory_bytes(),
            "device_bytes": model.device.peak_bytes(),
            "cache_bytes": self.kv_bytes,
            "weight_bytes": model.weights.nbytes,
            "side": self.grid.role,
            "stage": self.grid.pp.rank,
            "replica": self.grid.dp.rank,
            "is_leader": self.grid.is_leader,
            "loop_s": self.loop_s,
            "idle_s": _waited_s(self.ledger),
            "empty_s": self.empty_s,
            "answered": self.answered,
            "written": (self.written_bytes, self.write_s),
            "cache": (self.most_pages, scheduler.reused_tokens, scheduler.preemptions),
            "tokens": [(p.tokens, p.steps, p.time_s) for p in (self.prefill, self.decode)],
        }


def _cache_line(ranks: Counts, total: int) -> str:
    """Pages that any replica used, and what all replicas together reused and computed again."""
    pages, reused, preemptions = zip(*(r["cache"] for r in ranks if r["is_leader"]), strict=True)
    return (
        f"cache     used at most {max(pages)} of {total} pages; "
        f"{sum(reused)} prompt tokens reused, {sum(preemptions)} preemptions"
    )


def _memory_lines(grid: Grid, ranks: Counts) -> list[str]:
    """Weights and cache of a rank, on each side where there are two; and the peak of all memory."""
    # Add up neither: what one rank needs is what its memory must hold.
    lines = []
    for side in ("attention", "ffn") if grid.role else ("",):
        own = [r for r in ranks if r["side"] == side]
        of_side = f" on the {side.replace('ffn', 'FFN')} side" if side else ""
        lines.append(
            f"memory    weights per rank {_span([r['weight_bytes'] for r in own])}, cache "
            f"{_span([r['cache_bytes'] for r in own])}{of_side}"
        )

    # Say what is had together, and the peak of host and device.
    if grid.same_weights.size > 1 and grid.layout.zero == "off":
        lines.append(f"memory    ranks of a node that hold equal weights: {grid.same_weights.size}")
    if any(r["device_bytes"] for r in ranks):
        lines.append(f"memory    peak of the GPU {_span([r['device_bytes'] for r in ranks])}")
    return [*lines, f"memory    peak per rank {_span([r['peak_bytes'] for r in ranks])}"]


def _speed_lines(ranks: Counts) -> list[str]:
    """Tokens per second in prefill and in decode, where there was any: of all replicas together."""
    leaders = [r["tokens"] for r in ranks if r["is_leader"]]
    lines = []
    for name, phases in zip(("prefill", "decode"), zip(*leaders, strict=True), strict=True):
        tokens, steps = (sum(p[i] for p in phases) for i in range(2))
        if not steps:
            continue
        time_s = max(p[2] for p in phases)
        rate = sum(p[0] / p[2] for p in phases if p[2])
        lines.append(
            f"{name:9} {tokens} tokens in {time_s:.2f} s and {steps} steps: {rate:.1f} tokens/s"
        )
    return lines


def _balance_lines(layout: Layout, ranks: Counts) -> list[str]:
    """How busy replicas, stages and sides were."""
    # Compare the replicas with the one that took longest.
    lines = []
    if layout.dp > 1:
        leaders = [r for r in ranks if r["is_leader"]]
        longest_s = max(max(r["loop_s"] for r in leaders), 1e-9)
        busy = [(r["loop_s"] - r["empty_s"]) / longest_s for r in leaders]
        lines.append(
            f"replicas  busy {_percent(busy)} of the time with "
            + ", ".join(str(r["answered"]) for r in leaders)
            + " requests"
        )

    # Say how long stages, or sides, waited for each other.
    groups: list[tuple[str, Callable]] = []
    if layout.pp > 1:
        groups = [(f"stage {i}", lambda r, i=i: r["stage"] == i) for i in range(layout.pp)]
    elif layout.afd:
        names = (("attention", "attention"), ("FFN", "ffn"))
        groups = [(name, lambda r, side=side: r["side"] == side) for name, side in names]
    for name, belongs in groups:
        idle = [r["idle_s"] / max(r["loop_s"], 1e-9) for r in ranks if belongs(r)]
        lines.append(f"idle      {name}: {_percent(idle)} of the time")
    return lines


def _written_lines(ranks: Counts) -> list[str]:
    """Activations that went to disk, and how fast each rank wrote its part."""
    written = [r["written"] for r in ranks if r["written"][0]]
    if not written:
        return []
    rates = [int(nbytes / max(time_s, 1e-9)) for nbytes, time_s in written]
    return [
        f"written   {_size(sum(nbytes for nbytes, _ in written))} by {len(written)} ranks, "
        f"{_span(rates)} a second each, in {max(s for _, s in written):.2f} s of the loop"
    ]


def _expert_lines(load: np.ndarray, arch: Architecture) -> list[str]:
    """The busiest expert of a layer beside the mean, and experts that no token chose."""
    if not load.size or not load.sum():
        return []
    layers = [n for n in range(arch.N) if load[n].sum()]
    shares = load[layers] / load[layers].mean(axis=1, keepdims=True)
    row, expert = np.unravel_index(shares.argmax(), shares.shape)
    return [
        f"experts   the busiest, {expert} of layer {layers[row]}, has {shares.max():.2f} x the "
        f"mean of its layer; {np.mean(shares.max(axis=1)):.2f} x in the mean of layers; "
        f"{int((load[layers] == 0).sum())} of {shares.size} without a token"
    ]


def _waited_s(ledger: Ledger) -> float:
    """Seconds that this rank waited for another stage or side."""
    purposes = ("pipeline", "pipeline result", "disagg", "round")
    return sum(
        entry.time_s
        for (verb, _, purpose), entry in ledger.entries.items()
        if purpose in purposes and verb in ("Recv", "Bcast")
    )


def _percent(shares: Iterable[float]) -> str:
    """Shares of 1 in whole percent."""
    return ", ".join(f"{100 * share:.0f} %" for share in shares)


def _ledger_lines(ledger: Ledger) -> list[str]:
    """One line per collective of the root's ledger; groups of one rank send nothing."""
    rows = sorted(item for item in ledger.entries.items() if item[1].sent_bytes)
    lines = []
    for (verb, axis, purpose), entry in rows:
        lines.append(
            f"mpi       {verb:16} {axis:7} {purpose:17} {entry.calls:8} calls "
            f"{_size(entry.sent_bytes):>10} sent {entry.time_s:8.3f} s"
        )
    return lines


def _span(sizes: Sequence[float]) -> str:
    """Least and largest of some sizes; one of them if they are equal."""
    low, high = _size(min(sizes)), _size(max(sizes))
    return low if low == high else f"{low} to {high}"


def _size(n_bytes: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"
