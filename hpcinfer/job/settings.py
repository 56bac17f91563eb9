"""What a job is to do, as its command line says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hpcinfer.io.claims import target_of

if TYPE_CHECKING:
    from hpcinfer.engine.activations.selection import Selection


@dataclass(frozen=True)
class JobSettings:
    """Settings of a job, named as the options of the commands, and equal on every rank.

    Attributes
    ----------
    kind : "generate", "score" or "extract"
    model : Hugging Face directory or converted .h5
    input : path of the requests, .jsonl or .txt
    output : paths of the results, .h5 or .jsonl
    sampling : defaults for requests that do not say; None values are left out
    selection : what is extracted, None for the other kinds
    layout, dtype, device, kv_memory, step_tokens, sequences, context, seed, micro_batches : see
        `hpcinfer.engine.api.load`
    check : True to read all weights first, and to refuse wrong checksums, NaN and infinity
    kernels : "auto" or "plain", see `hpcinfer.ops.dispatch`
    show : True to print each result as it finishes
    checkpoint_every : seconds from one snapshot of the state to the next
    checkpoint_kv : True to keep the keys and values of what is under way too
    strict : True to end with an error if a request was refused
    restart : True to begin anew, and to keep what an earlier run has left under other names
    overwrite : True to replace finished outputs of another run
    shard : (i, n), which of n parts of the input's lines, from 1; None for all
    time_limit : seconds after which the job stops in order, None for none
    hang_timeout : seconds in one call after which a missing rank ends the job, 0 for never
    trace : folder for the timeline of every rank, or None
    command_line : words of the command, kept in .h5 results
    """

    kind: str
    model: str
    input: str
    output: Sequence[str]
    sampling: dict = field(default_factory=dict)
    selection: Selection | None = None
    layout: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    kv_memory: int | None = None
    step_tokens: int = 2048
    sequences: int = 256
    context: int | None = None
    seed: int = 0
    micro_batches: int | None = None
    check: bool = False
    kernels: str = "auto"
    show: bool = False
    checkpoint_every: float = 60.0
    checkpoint_kv: bool = False
    strict: bool = False
    restart: bool = False
    overwrite: bool = False
    shard: tuple[int, int] | None = None
    time_limit: float | None = None
    hang_timeout: float = 600.0
    trace: str | None = None
    command_line: Sequence[str] = ()

    @property
    def targets(self) -> list[str]:
        """The files that the outputs lead to, which are links perhaps."""
        return [target_of(path) for path in self.output]
