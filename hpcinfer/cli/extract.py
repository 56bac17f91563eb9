"""hpcinfer extract MODEL --input F --output F.h5: activations of given texts."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace, _SubParsersAction

from hpcinfer.cli import common

_POINTS = "residual, attention, ffn, q, k, v, router, logits, lse"


def add(commands: _SubParsersAction) -> ArgumentParser:
    """The command's parser."""
    parser = commands.add_parser(
        "extract",
        help="activations of the texts of a file: hidden states, keys, router scores",
        description="Activations of every token of every text, at any point of any layer. Every "
        "rank writes files of its own, which the output joins.",
    )
    common.add_model_options(parser)

    # Add what is taken from the model, and how it is stored.
    group = parser.add_argument_group("activations")
    group.add_argument(
        "--what",
        type=_names,
        default=("residual",),
        metavar="POINTS",
        help=f"some of {_POINTS} (default residual: the input of a layer)",
    )
    group.add_argument(
        "--layers",
        type=_layers,
        metavar="LAYERS",
        help="all or numbers such as 0,5,-1, negative ones counted from the end (default all); "
        "residual has one more, the output after the final norm",
    )
    group.add_argument(
        "--pool",
        metavar="HOW",
        help="last or mean: one row for each text, not for each token",
    )
    group.add_argument(
        "--store",
        default="float32",
        metavar="TYPE",
        help="float32, float16 or bfloat16, the type on disk (default float32)",
    )
    group.add_argument(
        "--compress", action="store_true", help="compress the files: smaller, and slower to write"
    )
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from hpcinfer.engine.activations.selection import Selection
    from hpcinfer.job.start import run_job

    selection = Selection(
        arguments.what, arguments.layers, arguments.pool, arguments.store, arguments.compress
    )
    run_job(common.settings_of("extract", arguments, selection=selection))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _layers(text: str) -> tuple[int, ...] | None:
    """Numbers of layers, None for all."""
    if text == "all":
        return None
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"got {text!r}, need all or whole numbers such as 0,5,-1") from None
