"""The text of an answer as its tokens arrive, up to where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

from hpcinfer.text.text import Text


class TextStream:
    """Text of a growing sequence, and the first place where a stop string stands in it.

    A stop string counts from the token with which the text so far contains it. A character that is
    still incomplete is not looked at. Without stop strings a push costs one list append.

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
        self._reach = max(map(len, self._stop), default=1) - 1
        self._window = ""
        self._before = 0
        self._end: int | None = None

    def push(self, token_id: int, may_stop: bool = True) -> bool:
        """Take the next token; True if a stop string now stands in the text.

        With may_stop=False (below min_tokens) the text up to here is not searched, now or later.
        """
        self._ids.append(token_id)
        if self._joiner is None or self._end is not None:
            return self._end is not None
        token = self._text.token(token_id)
        if token is None:
            return False

        # Search the new text and the few characters before it that a stop string may begin in
        self._window += self._joiner.feed(token)
        visible = self._window + self._joiner.pending()
        found = [at for at in map(visible.find, self._stop) if at >= 0] if may_stop else []
        if found:
            self._end = self._before + min(found)
            return True

        # Keep what may be the beginning of a stop string
        keep = min(self._reach, len(self._window)) if may_stop else 0
        self._before += len(self._window) - keep
        self._window = self._window[len(self._window) - keep :]
        return False

    def text(self) -> str:
        """Text of all tokens so far, up to the stop string if there is one."""
        whole = self._text.decode(self._ids, after_text=self._after_text)
        return whole if self._end is None else whole[: self._end]
