"""hpcinfer convert SOURCE OUT.h5: a Hugging Face directory as one HDF5 file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction
from contextlib import ExitStack
from functools import partial

from hpcinfer.cli import common
from hpcinfer.errors import UsageError
from hpcinfer.launcher import launcher_rank

CODES, GROUPS = {"int8": 8, "int4": 4}, (32, 64, 128)


def add(commands: _SubParsersAction) -> ArgumentParser:
    """The command's parser."""
    parser = commands.add_parser(
        "convert",
        help="turn a Hugging Face directory into one .h5 file",
        description="Write weights, config, tokenizer and chat template into one HDF5 file with "
        "checksums. Streams: memory does not grow with the model. With --quantize the matrices of "
        "the layers and the head become integers of 8 or 4 bits.",
    )
    parser.add_argument("source", metavar="SOURCE", help="Hugging Face directory")
    parser.add_argument("target", metavar="OUT.h5")

    # Add how matrices are stored; without, they stay as they are.
    parser.add_argument(
        "--quantize",
        choices=CODES,
        help="store matrices as integers with a scale for every group of inputs; embedding, norms, "
        "biases and routers stay as they are",
    )
    parser.add_argument(
        "--group",
        type=int,
        choices=GROUPS,
        help="inputs that share a scale (default: 32)",
    )
    common.add_overwrite_option(parser)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command, on the first rank alone."""
    if arguments.group and not arguments.quantize:
        raise UsageError(
            f"convert: got --group {arguments.group} alone, need --quantize int8 or int4 with it"
        )
    if launcher_rank() != 0:
        return
    from tqdm import tqdm

    from hpcinfer.io.convert import convert
    from hpcinfer.model.weights.quantize import recoding

    # Recode matrices on their way, if asked to.
    recode = None
    if arguments.quantize:
        recode = partial(recoding, bits=CODES[arguments.quantize], group=arguments.group or 32)

    # Show how far it is; the bar appears when the size is known.
    with ExitStack() as stack:
        bars = []

        def progress(done_bytes: int, total_bytes: int) -> None:
            if not bars:
                options = {"desc": "convert", "unit": "B", "unit_scale": True}
                bars.append(stack.enter_context(tqdm(total=total_bytes, **options)))
            bars[0].update(done_bytes - bars[0].n)

        summary = convert(
            arguments.source, arguments.target, progress, arguments.overwrite, recode=recode
        )
    print(
        f"{arguments.target}: {summary.tensors} tensors, {summary.bytes / 1e6:.1f} MB in "
        f"{summary.time_s:.2f} s"
    )
