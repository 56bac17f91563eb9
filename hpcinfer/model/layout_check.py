"""Layouts that make no sense for a model, refused with the reason and the nearest one that does."""

from __future__ import annotations

from dataclasses import replace

from hpcinfer.layout import Fault, Layout, refuse, senseless
from hpcinfer.model.architecture import Architecture


def key_sharers(arch: Architecture, layout: Layout) -> int:
    """Ranks of tp that read one key/value head, and with cp share its keys out; 1 as a rule."""
    P, G = layout.tp, arch.G
    return P // G if layout.cp > 1 and P > G and P % G == 0 else 1


def refuse_unfit(arch: Architecture, layout: Layout) -> None:
    """Refuse a layout that asks for what this model does not have.

    Raises
    ------
    UsageError
        On every rank, as it follows from the config and the command line alone.
    """
    refuse(layout, fault_of(arch))


def fault_of(arch: Architecture) -> Fault:
    """Function that finds what a layout has that makes no sense at all, or none for this model."""
    return lambda layout: senseless(layout) or _unfit(arch, layout)


def _unfit(arch: Architecture, layout: Layout) -> tuple[str, Layout] | None:
    """Why a layout is none for this model, and one that is better; None if it is one."""
    sharers = key_sharers(arch, layout)
    if layout.ep > 1 and not arch.E and not layout.afd:
        reason = f"ep spreads experts, and {arch.family} has none"
        return reason, replace(layout, ep=1)
    if layout.prefill == "ulysses" and sharers > 1:
        reason = (
            f"ulysses divides heads, and with tp={layout.tp} ranks already share the {arch.G} "
            "key/value heads"
        )
        return reason, replace(layout, prefill="ring")
    if sharers > arch.H // arch.G:
        reason = (
            f"with cp the ranks of tp share the keys of {arch.G} heads, but there are {arch.H} "
            f"query heads for tp={layout.tp}"
        )
        return reason, replace(layout, cp=1, dp=layout.dp * layout.cp)
    return None
