"""Layouts that make no sense for a model, refused with the reason and the nearest one that does."""

from dataclasses import replace

from hpcinfer.errors import UsageError


def key_sharers(arch, layout):
    """Ranks of tp that read one key/value head, and with cp share its keys out; 1 as a rule."""
    P, G = layout.tp, arch.G
    return P // G if layout.cp > 1 and P > G and P % G == 0 else 1


def refuse_unfit(arch, layout):
    """Refuse a layout that asks for what this model does not have.

    Raises
    ------
    UsageError
        On every rank, as it follows from the config and the command line alone.
    """
    nearest = None
    if layout.ep > 1 and not arch.E and not layout.afd:
        reason = f"ep spreads experts, and {arch.family} has none"
        nearest = replace(layout, ep=1)
    elif layout.prefill == "ulysses" and key_sharers(arch, layout) > 1:
        reason = (
            f"ulysses divides heads, and with tp={layout.tp} ranks already share the {arch.G} "
            "key/value heads"
        )
        nearest = replace(layout, prefill="ring")
    elif key_sharers(arch, layout) > arch.H // arch.G:
        reason = (
            f"with cp the ranks of tp share the keys of {arch.G} heads, but there are {arch.H} "
            f"query heads for tp={layout.tp}"
        )
        nearest = replace(layout, cp=1, dp=layout.dp * layout.cp)
    if nearest is not None:
        raise UsageError(f"layout: got {layout}, need another: {reason}; try --layout {nearest}")
