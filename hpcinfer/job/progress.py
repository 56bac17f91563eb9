"""What people see of a job while it runs: a bar on the terminal, and the results as they finish."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

from hpcinfer.errors import one_line

if TYPE_CHECKING:
    from hpcinfer.engine.stats import RunStats
    from hpcinfer.text.text import Text

# Seconds between two lines of progress: on a terminal, and in the log of a job.
_TERMINAL_S, _LOG_S = 0.2, 10.0

# Characters of a prompt that are shown whole; of longer ones the beginning and the end.
_WHOLE, _BEGINNING, _END = 200, 60, 130


class Progress:
    """The bar of progress of a job, on the root; a context manager.

    Parameters
    ----------
    kind : "generate", "score" or "extract"
    n_lines : requests in all
    before : those of them that earlier runs have finished
    stats : counters of the engine, for tokens per second
    text : turns tokens into text, where results are shown; None to show none
    """

    def __init__(
        self, kind: str, n_lines: int, before: int, stats: RunStats, text: Text | None = None
    ):
        self._stats, self._text, self._began_s = stats, text, time.perf_counter()
        self._bar = tqdm(
            total=n_lines,
            initial=before,
            desc=kind,
            unit=" requests",
            mininterval=_TERMINAL_S if sys.stderr.isatty() else _LOG_S,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *details) -> None:
        self._bar.close()

    def finished(self, record: dict) -> None:
        """Count a request, and show its record where results are shown."""
        tokens = self._stats.prefill.tokens + self._stats.decode.tokens
        rate = tokens / (time.perf_counter() - self._began_s)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._text is not None:
            with ornament("show"):
                text, self._text = self._text, None  # show no more after a failure
                self._bar.write(_shown(record, text), file=sys.stdout)
                self._text = text


def say(line: str) -> None:
    """Print a line on standard error, above the bar of progress."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def ornament(what: str) -> Iterator[None]:
    """Let nothing that fails in the body end a job, whose results do not depend on it: say it."""
    try:
        yield
    except Exception as error:
        say(f"hpcinfer: {what}: {one_line(error)}; the results are in their files")


def _shown(record: dict, text: Text) -> str:
    """A prompt with its text, or a refusal, for human eyes."""
    name = record["custom_id"]
    if record["error"] is not None:
        return f"[{name}] line {record['line']}: {record['error']}"

    # Tell the kind of record by what it holds: activations, a score, answers.
    if "n_rows" in record:
        return f"[{name}] {len(record['token_ids'])} tokens, {record['n_rows']} rows"
    if "choices" not in record:
        return (
            f"[{name}] {len(record['token_ids'])} tokens, log-probability "
            f"{record['sum_logprob']:.3f}, perplexity {record['perplexity']:.3f}"
        )
    prompt = text.decode(record["prompt_token_ids"])
    if len(prompt) > _WHOLE:
        prompt = f"{prompt[:_BEGINNING]} ... {prompt[-_END:]}"
    answers = "\n".join(f"    > {choice['text']!r}" for choice in record["choices"])
    return f"[{name}] {prompt!r}\n{answers}"
