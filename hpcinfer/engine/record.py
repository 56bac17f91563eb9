"""What a run has cost: tokens, seconds, memory and messages, gathered into a short report."""

from dataclasses import dataclass

from hpcinfer import array, collectives


@dataclass
class Phase:
    """Steps of one kind."""

    tokens: int = 0
    steps: int = 0
    time_s: float = 0.0

    @property
    def tokens_per_s(self):
        return self.tokens / self.time_s if self.time_s else 0.0


class Record:
    """Counters of one rank.

    A step that computes any prompt token counts as prefill with all its tokens and time; the others
    are decode steps.

    Attributes
    ----------
    load_s : seconds from opening the checkpoint to weights in memory
    bytes_read, file_bytes : tensor bytes read by this rank, and in the whole checkpoint
    kv_bytes : size of this rank's cache
    prefill, decode : Phase
    """

    def __init__(self, grid, bytes_read, file_bytes):
        self.grid, self.bytes_read, self.file_bytes = grid, bytes_read, file_bytes
        self.load_s, self.kv_bytes = 0.0, 0
        self.most_pages = 0
        self.prefill, self.decode = Phase(), Phase()

    def step(self, step, n_prompt, time_s, pages_held):
        """Count one step of `n_prompt` prompt tokens and others, which took `time_s` seconds."""
        phase = self.prefill if n_prompt else self.decode
        phase.tokens += step.n_tokens
        phase.steps += 1
        phase.time_s += time_s
        self.most_pages = max(self.most_pages, pages_held)

    def report(self, engine):
        """The report's lines, on the root; every rank must call this. None elsewhere."""
        mine = {
            "bytes_read": self.bytes_read,
            "load_s": self.load_s,
            "peak_bytes": array.peak_memory_bytes(),
            "page_bytes": engine.model.page_bytes,
        }
        ranks = self.grid.comm.gather(mine, 0)
        if ranks is None:
            return None
        threads = array.threads_per_rank()
        lines = [
            f"layout    {self.grid.layout} on {engine.model.device}, "
            f"{engine.model.dtype}, threads per rank {threads or 'not set'}",
            f"load      {max(r['load_s'] for r in ranks):.2f} s; read per rank "
            + _span([r["bytes_read"] for r in ranks])
            + f"; sum {sum(r['bytes_read'] for r in ranks) / max(1, self.file_bytes):.2f} x the "
            f"weights' {_size(self.file_bytes)}",
        ]
        for name, phase in (("prefill", self.prefill), ("decode", self.decode)):
            lines.append(
                f"{name:9} {phase.tokens} tokens in {phase.time_s:.2f} s and {phase.steps} steps: "
                f"{phase.tokens_per_s:.1f} tokens/s"
            )
        scheduler = engine.scheduler
        cache = _span([scheduler.pages.n * r["page_bytes"] for r in ranks])
        lines.append(
            f"cache     {cache} per rank, "
            f"used at most {self.most_pages} of {scheduler.pages.total} pages; "
            f"{scheduler.reused_tokens} prompt tokens reused, {scheduler.preemptions} preemptions"
        )
        lines.append(f"memory    peak per rank {_span([r['peak_bytes'] for r in ranks])}")
        return lines + _ledger_lines()


def _ledger_lines():
    """One line per collective of the root's ledger; groups of one rank send nothing."""
    rows = sorted(item for item in collectives.ledger.entries.items() if item[1].sent_bytes)
    lines = []
    for (verb, axis, purpose), entry in rows:
        lines.append(
            f"mpi       {verb:16} {axis:7} {purpose:17} {entry.calls:8} calls "
            f"{_size(entry.sent_bytes):>10} sent {entry.time_s:8.3f} s"
        )
    return lines


def _span(sizes):
    """Least and largest of some sizes; one of them if they are equal."""
    low, high = _size(min(sizes)), _size(max(sizes))
    return low if low == high else f"{low} to {high}"


def _size(n_bytes):
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"
