"""hpcinfer inspect FILE: what is in a model, or in a file of results or activations; or the
machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction
from typing import TYPE_CHECKING

from hpcinfer.errors import UsageError
from hpcinfer.launcher import launcher_rank

if TYPE_CHECKING:
    from hpcinfer.io.checkpoint import Checkpoint


def add(commands: _SubParsersAction) -> ArgumentParser:
    """The command's parser."""
    parser = commands.add_parser(
        "inspect", help="show what is in a model or an output, or what the machine offers"
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="model directory, .h5 of any command, or .jsonl"
    )

    # Add what is wanted of the file, and what is wanted without one.
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all weights of a model or all activations, and refuse wrong checksums, and in "
        "weights NaN and infinity",
    )
    parser.add_argument(
        "--machine",
        action="store_true",
        help="show processor, memory, GPUs and MPI of this machine, which kernels run "
        "on it and what is missing, and with how many ranks to start",
    )
    return parser


def run(arguments: Namespace) -> None:
    """Run the command, on the first rank alone."""
    if arguments.file is None and not arguments.machine:
        raise UsageError("inspect: got nothing, need a FILE or --machine")
    if arguments.file is None and arguments.check:
        raise UsageError("inspect: got --check alone, need a FILE to check")
    if launcher_rank() != 0:
        return

    # Show the machine before the file, which may be large.
    if arguments.machine:
        from hpcinfer.job.machine import describe as describe_machine

        print(describe_machine())
    if arguments.file is not None:
        from hpcinfer.io.inspect import describe

        print(describe(arguments.file, arguments.check, _verdict))


def _verdict(checkpoint: Checkpoint) -> str:
    """Whether a model can run here, or why not."""
    from hpcinfer.model.families import read_architecture
    from hpcinfer.model.weights.check import check

    try:
        arch = read_architecture(checkpoint.config)
        check(arch, checkpoint.tensors)
    except ValueError as error:
        return f"no: {error}"
    if arch.dtype is None:
        return "yes, with a --dtype; its own is none to compute in"
    return "yes"
