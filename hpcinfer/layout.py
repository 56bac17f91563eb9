"""The words of `--layout`: how the ranks are divided among the strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hpcinfer.errors import UsageError, is_digits

AXES = ("pp", "dp", "cp", "tp")

STRATEGIES = {
    "prefill": ("ring", "ulysses", "split-q"),
    "decode": ("tree", "gather", "ring"),
    "sp": ("off", "on"),
    "zero": ("off", "broadcast", "allgather"),
    "stages": ("layers", "memory", "time"),
}

_WORDS = (*AXES, "ep", "afd", *STRATEGIES)


@dataclass(frozen=True)
class Layout:
    """Length of every axis of the grid, and the strategies over it.

    Attributes
    ----------
    pp, dp, cp, tp : lengths; of the attention side where there is one
    ep : ranks over which experts are spread, a divisor of cp · tp, of dp · cp · tp, or of the ranks
        of the FFN side, which are all of them where nothing is said
    afd : (attention ranks, FFN ranks); None if every rank does both
    prefill : ring, ulysses or split-q, how several new tokens meet keys that are cut over cp
    decode : tree, gather or ring, how one new token of a sequence does
    sp : on or off, whether tokens are cut over tp outside the products
    zero : off, broadcast or allgather, how parameters that dp and cp hold alike are kept once
    stages : layers, memory or time, what is equal in the stages of the pipeline
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    afd: tuple[int, int] | None = None
    prefill: str = "ring"
    decode: str = "tree"
    sp: str = "off"
    zero: str = "off"
    stages: str = "layers"

    @property
    def size(self) -> int:
        """Number of ranks that the layout needs."""
        return self.pp * self.dp * self.cp * self.tp + (self.afd[1] if self.afd else 0)

    @property
    def lockstep(self) -> bool:
        """True if the replicas meet inside a step, so that they must take their steps together."""
        return self.dp > 1 and (self.zero != "off" or self.afd is not None or self.experts_over_dp)

    @property
    def experts_over_dp(self) -> bool:
        """True if experts are spread over the replicas too."""
        return self.afd is None and (self.cp * self.tp) % self.ep != 0

    def __str__(self) -> str:
        # Show the axes, and what else is not as it is where nothing is said.
        shown = dict.fromkeys(("dp", "pp", "cp", "tp"), True)
        shown |= {"ep": self.ep > 1 or self.afd is not None, "afd": self.afd is not None}
        shown |= {"prefill": self.cp > 1, "decode": self.cp > 1}
        shown |= {
            word: getattr(self, word) != STRATEGIES[word][0] for word in ("sp", "zero", "stages")
        }

        # Write it as it is parsed.
        values = {word: getattr(self, word) for word in shown} | {
            "afd": "{}:{}".format(*self.afd or "--")
        }
        return ",".join(f"{word}={values[word]}" for word, show in shown.items() if show)


def parse_layout(text: str | None, size: int, fault: Fault | None = None) -> Layout:
    """Layout written as ``dp=1,pp=1,cp=1,tp=2`` for `size` ranks.

    Axes that are left out are 1; where none is named all ranks (of the attention side) are along
    tp.

    Raises
    ------
    UsageError
        For an unknown word, a length that is no positive integer, a product other than `size`, or a
        combination that makes no sense; with the nearest one that does.
    """
    # Read the words.
    values: dict[str, Any] = {}
    for item in (text or "").split(",") if text else ():
        word, _, value = item.strip().partition("=")
        if word not in _WORDS:
            known = ", ".join(_WORDS)
            raise UsageError(f"layout: got {item.strip()!r}, need WORD=VALUE, WORD one of {known}")
        if word in values:
            raise UsageError(f"layout: got {word} twice in {text!r}, need each word once")
        values[word] = _value(word, value, item.strip())

    # Add what nothing is said of.
    afd = values.get("afd")
    if not values.keys() & set(AXES):
        values["tp"] = afd[0] if afd else size
    if afd:
        values.setdefault("ep", afd[1])

    # Refuse what is not for the ranks at hand, or makes no sense.
    layout = Layout(**values)
    if layout.size != size and not afd:
        raise UsageError(
            f"layout: got {text!r}, which is {layout.size} ranks, need {size} as launched; "
            f"start {layout.size} ranks or write --layout tp={size}"
        )
    if layout.afd:
        _refuse_sides(layout, *layout.afd, text, size, fault or senseless)
    refuse(layout, fault or senseless)
    return layout


def _value(word: str, value: str, item: str) -> str | int | tuple[int, int]:
    """Value of one word of a layout."""
    # Take a strategy, the two numbers of sides, or a length.
    if word in STRATEGIES:
        if value not in STRATEGIES[word]:
            known = ", ".join(STRATEGIES[word])
            raise UsageError(f"layout: got {item!r}, need {word} one of {known}")
        return value
    if word == "afd":
        sides = value.split(":")
        if len(sides) != 2 or not all(_is_length(n) for n in sides):
            raise UsageError(f"layout: got {item!r}, need afd=A:F, A attention and F FFN ranks")
        return int(sides[0]), int(sides[1])
    if not _is_length(value):
        raise UsageError(f"layout: got {item!r}, need a length of 1 or more")
    return int(value)


def _is_length(text: str) -> bool:
    """True for a whole number of 1 or more."""
    return is_digits(text) and int(text) > 0


def _refuse_sides(
    layout: Layout, attention: int, ffn: int, text: str | None, size: int, fault: Fault
) -> None:
    """Refuse sides that are not the ranks launched and the axes' product."""
    if attention + ffn != size:
        raise UsageError(
            f"layout: got {text!r}, which is {attention + ffn} ranks, need {size} as launched; "
            f"start {attention + ffn} ranks or write --layout tp={size}"
        )

    # The axes are of the attention side alone.
    axes = layout.pp * layout.dp * layout.cp * layout.tp
    if axes != attention:
        nearest = nearest_without(fault, replace(layout, pp=1, dp=1, cp=1, tp=attention))
        raise UsageError(
            f"layout: got {text!r}, whose axes make {axes} ranks, need {attention}, the attention "
            f"side of afd={attention}:{ffn}; try --layout {nearest}"
        )


# Why a layout cannot be had, and one that is better; None if it can.
Fault = Callable[[Layout], tuple[str, Layout] | None]


def senseless(layout: Layout) -> tuple[str, Layout] | None:
    """Why a combination makes no sense for any model, and one that is better; None if it does."""
    # Sides leave nothing to stages, nor to cut beside each other.
    if layout.afd and layout.pp > 1:
        reason = "afd gives every layer to both sides, pp gives layers to stages"
        return reason, replace(layout, pp=1, tp=layout.tp * layout.pp)
    if layout.afd and layout.zero != "off":
        reason = "with afd no rank holds weights that zero could cut beside another's"
        return reason, replace(layout, zero="off")

    # A strategy over one rank does nothing.
    if layout.sp == "on" and layout.tp == 1:
        return "sp cuts tokens over tp, which is 1", replace(layout, sp="off")
    if layout.zero != "off" and layout.dp * layout.cp == 1:
        reason = "zero cuts what the ranks of dp and cp hold alike, and both are 1"
        return reason, replace(layout, zero="off")

    # Experts are spread over equal groups.
    over = layout.afd[1] if layout.afd else layout.dp * layout.cp * layout.tp
    if over % layout.ep:
        reason = f"experts are spread over {over} ranks, which ep={layout.ep} does not divide"
        divisors = [n for n in range(1, over + 1) if over % n == 0 and n <= layout.ep]
        return reason, replace(layout, ep=max(divisors))
    return None


def refuse(layout: Layout, fault: Fault) -> None:
    """Refuse a layout that has a fault, with the reason and the nearest one that has none.

    Parameters
    ----------
    fault : function of a layout: the reason and a better layout, or None

    Raises
    ------
    UsageError
    """
    found = fault(layout)
    if found is not None:
        reason, better = found
        raise UsageError(
            f"layout: got {layout}, need another: {reason}; "
            f"try --layout {nearest_without(fault, better)}"
        )


def nearest_without(fault: Fault, layout: Layout) -> Layout:
    """A layout bettered until `fault` finds nothing more in it."""
    while (found := fault(layout)) is not None:
        layout = found[1]
    return layout
