"""hpcinfer bench NAME: measure a part of the program beside the limit of the machine."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace, _SubParsersAction
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpcinfer.cli import common
from hpcinfer.cli.bench_options import BENCHES

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


def add(commands: _SubParsersAction) -> ArgumentParser:
    """The command's parser, with one below it for each bench."""
    parser = commands.add_parser(
        "bench",
        help="measure speed beside the machine's limit",
        description="Measure speed over the ranks at hand. The machine's limit is measured in the "
        "same run; other load spoils both.",
    )
    names = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name, bench in BENCHES.items():
        one = names.add_parser(name, help=bench.help, description=bench.description)
        for option in bench.options:
            one.add_argument(option.name, **option.words)

        # Add what all have, and those of a model.
        add_device = common.add_device_options if bench.loads_model else common.add_device_option
        add_device(one)
        one.add_argument("--json", metavar="FILE", help="write the rows as a JSON list too")
        one.add_argument(
            "--plot",
            type=_picture,
            metavar="FILE",
            help="draw the rows too, as .png, .svg or .pdf; needs matplotlib",
        )
        common.add_overwrite_option(one)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        common.add_watch_options(one)
    return parser


def run(arguments: Namespace) -> None:
    """Run the bench, and print its table on the first rank."""
    from hpcinfer.bench.plot import draw, refuse_missing
    from hpcinfer.grid import agree
    from hpcinfer.io.rows import write_json
    from hpcinfer.job.watchdog import Watchdog
    from hpcinfer.launcher import world

    # Refuse what could not be drawn or written before anything is measured.
    comm = world()
    if arguments.plot:
        agree(comm, refuse_missing)
    common.claim_reports(comm, arguments)

    # Measure, and show what was found.
    with Watchdog(comm, arguments.hang_timeout):
        bench = import_module(f"hpcinfer.bench.{arguments.bench.replace('-', '_')}")
        rows = bench.run(comm, **_taken_by(bench.run, comm, arguments))
    if comm.rank == 0:
        print(bench.table(rows))
    if arguments.json:
        agree(comm, write_json, arguments.json, rows)
    if arguments.plot:
        agree(comm, draw, arguments.plot, rows)


def _taken_by(function: Callable, comm: Comm, arguments: Namespace) -> dict[str, Any]:
    """What `run` of a bench takes: options of that name, and what is made of several."""
    from inspect import signature

    from hpcinfer.bench.drive import Setting
    from hpcinfer.bench.shape import AttentionShape, Ffn

    # What options cannot be refuse themselves, before a device is taken.
    made = {"setting": Setting.of, "shape": AttentionShape.of, "ffn": Ffn.of}
    names = list(signature(function).parameters)[1:]
    taken = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    taken |= {name: made[name](arguments) for name in names if name in made}
    if "device" in names:
        taken["device"] = common.device_of(comm, arguments)
    return taken


def _picture(text: str) -> str:
    """Name of a picture, of a kind that can be drawn."""
    if not text.endswith((".png", ".svg", ".pdf")):
        raise ArgumentTypeError(f"got {text!r}, need a name that ends in .png, .svg or .pdf")
    return text
