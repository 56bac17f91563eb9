"""What became of the requests of a job, in a few lines at its end; on the root."""

from __future__ import annotations

import math
from typing import Any

from hpcinfer.text.text import Text

# Refusals that are shown, of which there may be as many as lines.
_SHOWN = 3


class Tally:
    """Counts the records of this run: refusals, answers that were cut, the sums of scores.

    Parameters
    ----------
    text : for the bytes that scored texts have
    context : tokens of the context window
    """

    def __init__(self, text: Text, context: int) -> None:
        self._text, self._context = text, context
        self._refused, self._first_refused = 0, list[str]()
        self._at_length = self._at_context = 0
        self._texts = self._tokens = self._bytes = 0
        self._logprob = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Count a finished record."""
        if record["error"] is not None:
            self._refused += 1
            if len(self._first_refused) < _SHOWN:
                self._first_refused.append(f"line {record['line']}: {record['error']}")
        elif "choices" in record:
            self._count_cut(record)
        elif "sum_logprob" in record and len(record["token_ids"]) > 1:
            self._count_score(record)

    def lines(self) -> list[str]:
        """Lines of the report, of what there is to say."""
        lines = []
        if self._refused:
            lines.append(f"refused   {self._refused} requests; the first of them")
            lines += [f"          {line}" for line in self._first_refused]
        if self._at_length or self._at_context:
            lines.append(
                f"cut       {self._at_length} answers at their max_tokens, {self._at_context} at "
                f"the end of the context window of {self._context}"
            )
        if self._texts:
            lines.append(self._score_line())
        return lines

    def _count_cut(self, record: dict[str, Any]) -> None:
        """Count the answers that ended at a length, by which one."""
        for choice in record["choices"]:
            if choice["finish_reason"] == "length":
                tokens = len(record["prompt_token_ids"]) + len(choice["token_ids"])
                self._at_context += tokens >= self._context
                self._at_length += tokens < self._context

    def _count_score(self, record: dict[str, Any]) -> None:
        """Add a scored text, whose first token has no probability."""
        self._texts += 1
        self._tokens += len(record["token_ids"]) - 1
        self._logprob += record["sum_logprob"]
        self._bytes += len(self._text.decode(record["token_ids"][1:], after_text=True).encode())

    def _score_line(self) -> str:
        """Perplexity of all texts together, and what does not depend on the tokenizer."""
        mean = -self._logprob / self._tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        line = f"score     {self._texts} texts, {self._tokens} tokens: perplexity {perplexity:.4g}"
        if self._bytes:
            line += f", {-self._logprob / math.log(2) / self._bytes:.4g} bits a byte of text"
        return line
