"""Entry point of the command: parse, run, and end every rank with the right exit code."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from hpcinfer import __version__
from hpcinfer.cli import bench, convert, extract, generate, inspect, score, verify
from hpcinfer.errors import (
    DONE,
    USAGE,
    UsageError,
    agreed,
    exit_code,
    is_agreed,
    is_reported,
    meant,
    one_line,
)
from hpcinfer.io.console import take_streams, trouble_of_output
from hpcinfer.launcher import abort, launcher_rank, raise_on_signals

COMMANDS = (generate, score, extract, convert, inspect, verify, bench)

# Seconds that other ranks leave the first one to report an error that all may have, and that a rank
# waits whose error another one reports, which ends this one meanwhile.
_GRACE_S, _REPORTED_S = 1.0, 5.0


class HelpWithDefaults(argparse.HelpFormatter):
    """Help that says of every option with a value what holds without it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        optional = bool(action.option_strings) and action.nargs != 0 and not action.required
        if not optional or "default" in text:
            return text
        return f"{text} (default {'none' if action.default is None else '%(default)s'})"


class Parser(argparse.ArgumentParser):
    """Parser of whole names, whose errors are exceptions; it speaks on the first rank only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(
            *args, **{"allow_abbrev": False, "formatter_class": HelpWithDefaults} | options
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it; an option that the command does not have is the first mistake."""
        words = itertools.takewhile(lambda word: word != "--", args or ())
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            if self._subparsers is None and option not in self._option_string_actions:
                near = meant(option, self._option_string_actions)
                self.error(f"got the unknown option {option}, need one of {self.prog}{near}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            near = meant(value, map(str, action.choices))
            message = f"got {value!r}, need one of {known}{near}"
            raise argparse.ArgumentError(action, message)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: IO | None = None) -> None:
        if launcher_rank() == 0:
            super()._print_message(message, file)


def parser() -> Parser:
    """Parser of the whole command line."""
    top = Parser(
        prog="hpcinfer",
        description="Large-language-model inference as an MPI program: mpirun -n 4 hpcinfer ...",
    )
    top.add_argument("--version", action="version", version=f"hpcinfer {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        sub = module.add(commands)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 failed, 2 usage, 75 stopped and to be started again,
    130 or 143 ended by a signal with nothing to go on with."""
    take_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        raise_on_signals()
        if not argv:
            parser().print_help()
            sys.exit(USAGE)
        arguments = parser().parse_args(argv)
        arguments.command_line = ["hpcinfer", *argv]
        arguments.run(arguments)
        _end_output(arguments)
    except BaseException as error:
        # Whatever its kind, as others may wait for this rank; --help ends by itself.
        if isinstance(error, SystemExit) and not _in_parallel():
            raise
        _end(error, "--debug" in argv)
    sys.exit(DONE)


def _end_output(arguments: argparse.Namespace) -> None:
    """Say what could not be printed; it is an error where nothing else was asked for."""
    trouble = trouble_of_output()
    if trouble is None:
        return
    line = f"output: cannot write standard output: {trouble.strerror}"
    if arguments.command in ("inspect", "verify", "bench") and not getattr(arguments, "json", None):
        raise agreed(RuntimeError(f"{line}; free space, or send it elsewhere"))
    print(f"hpcinfer: {line}; the results are in their files", file=sys.stderr)


def _end(error: BaseException, debug: bool) -> None:
    """Report an error once and end the whole job with its code."""
    # Let the first rank speak where it may, or another one that reports this very error.
    alone = is_agreed(error) or not _in_parallel()
    if alone and launcher_rank() != 0:
        sys.exit(exit_code(error))
    if not alone and launcher_rank() != 0:
        time.sleep(_GRACE_S)
    if not alone and is_reported(error):
        time.sleep(_REPORTED_S)

    # Print it in one line.
    where = "" if alone or launcher_rank() == 0 else f" (rank {launcher_rank()})"
    start = "\n" if where else ""  # the first rank's progress may stand at the end of a line
    if debug:
        traceback.print_exception(error)
    sys.stdout.flush()
    print(f"{start}hpcinfer{where}: {one_line(error)}", file=sys.stderr, flush=True)
    if alone:
        sys.exit(exit_code(error))

    # Leave without the exit handlers, which would wait.
    abort(exit_code(error))


def _in_parallel() -> bool:
    """True if MPI runs with other ranks, which an error here would leave waiting."""
    MPI = sys.modules.get("mpi4py.MPI")
    return (
        MPI is not None
        and MPI.Is_initialized()
        and not MPI.Is_finalized()
        and MPI.COMM_WORLD.size > 1
    )
