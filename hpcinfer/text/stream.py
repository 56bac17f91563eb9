"""The text of an answer as its tokens arrive, up to where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

from hpcinfer.text.text import Text


class TextStream:
    """Text of a growing sequence, and the first place where a stop string stands in it.

    A stop string counts from the token with which the text so far contains it. One that holds a
    special token, which is no part of the text, is looked for in the text as it is written with
    them. A character that is still incomplete is not looked at. Without stop strings a push costs
    one list append.

    Parameters
    ----------
    text : tokenizer
    stop : strings that end the text
    after_text : as in `Text.decode`
    """

    def __init__(self, text: Text, stop: Sequence[str] = (), after_text: bool = False) -> None:
        self._text = text
        self._stop = tuple(stop) if text.available else ()
        self._after_text = after_text
        self._ids: list[int] = []
        self._joiner = text.joiner(after_text) if self._stop else None
        self._end: int | None = None

        # Look in the text, and where a stop asks for it in the text with its special tokens
        reach = max(map(len, self._stop), default=1) - 1
        self._tails = [_Tail(reach)]
        self._with_special = any(map(text.holds_special, self._stop))
        if self._with_special:
            self._tails.append(_Tail(reach))

    def push(self, token_id: int, may_stop: bool = True) -> bool:
        """Take the next token; True if a stop string now stands in the text.

        With may_stop=False (below min_tokens) the text up to here is not searched, now or later.
        """
        self._ids.append(token_id)
        if self._joiner is None or self._end is not None:
            return self._end is not None
        token, special = self._text.token(token_id), ""
        if token is None:
            if not self._with_special:
                return False
            special = self._text.token(token_id, skip_special_tokens=False) or ""

        # Add what the token settles, and the special token where it counts
        settled = "" if token is None else self._joiner.feed(token)
        pending, ends = self._joiner.pending(), []
        for tail, written in zip(self._tails, ("", special), strict=False):
            tail.add(settled)
            if may_stop:
                ends.append(tail.find(self._stop, pending, written))
            tail.add(written, in_text=False)
            tail.shorten(keep=may_stop)
        self._end = min((end for end in ends if end is not None), default=None)
        return self._end is not None

    def text(self) -> str:
        """Text of all tokens so far, up to the stop string if there is one."""
        whole = self._text.decode(self._ids, after_text=self._after_text)
        return whole if self._end is None else whole[: self._end]


class _Tail:
    """The end of a text, in which a stop string may begin or stand.

    Parameters
    ----------
    reach : characters before the newest ones that a stop string may begin in
    """

    def __init__(self, reach: int) -> None:
        self._reach, self._before = reach, 0
        self._written, self._in_text = "", b""  # with 1 for a character of the text, else 0

    def add(self, written: str, in_text: bool = True) -> None:
        """Take what the next token wrote, which is part of the text or not."""
        self._written += written
        self._in_text += bytes([in_text]) * len(written)

    def find(self, stops: Sequence[str], pending: str, special: str) -> int | None:
        """Characters of the text before the first stop string, with what is not settled yet."""
        searched = self._written + pending + special
        found = [at for at in map(searched.find, stops) if at >= 0]
        if not found:
            return None
        in_text = self._in_text + b"\1" * len(pending) + bytes(len(special))
        return self._before + sum(in_text[: min(found)])

    def shorten(self, keep: bool) -> None:
        """Forget all but what may be the beginning of a stop string; all of it unless `keep`."""
        drop = len(self._written) - (min(self._reach, len(self._written)) if keep else 0)
        self._before += sum(self._in_text[:drop])
        self._written, self._in_text = self._written[drop:], self._in_text[drop:]
