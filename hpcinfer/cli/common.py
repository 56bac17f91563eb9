"""Options that commands share, their types, and what a job gets of them."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import fields
from typing import TYPE_CHECKING

from hpcinfer.errors import is_digits

if TYPE_CHECKING:
    from argparse import _ArgumentGroup as Group

    from mpi4py.MPI import Comm

    from hpcinfer.array import Device
    from hpcinfer.job.settings import JobSettings

DTYPES = ("float32", "bfloat16", "float16")

_DURATION = re.compile(r"((?P<days>[0-9]+)-)?(?P<clock>([0-9]+:){0,2}[0-9]+(\.[0-9]*)?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_model_options(parser: ArgumentParser) -> None:
    """Options of every command that runs a file through a model."""
    # Add what is read and written.
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or converted .h5")
    parser.add_argument("--input", required=True, metavar="FILE", help="requests: .jsonl or .txt")
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do part I of N of the input's lines; ids and random numbers stay those of the whole",
    )
    parser.add_argument(
        "--output",
        required=True,
        action="append",
        metavar="FILE",
        help="results: .h5 or .jsonl; may be given more than once",
    )

    # Add how it is done.
    group = parser.add_argument_group("layout and machine")
    _add_layout_options(group)
    _add_step_options(group)
    _add_run_options(group)


def _add_layout_options(group: Group) -> None:
    """Options that say how the model is laid out over ranks and memory."""
    group.add_argument(
        "--layout",
        metavar="AXES",
        help='such as "tp=2" or "dp=2,pp=2,cp=2,tp=2,ep=4,sp=on,zero=allgather" or "afd=3:1"; '
        "default: all ranks in tp",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, help="type to compute in (default: as the model's config says)"
    )
    add_device_options(group)
    group.add_argument(
        "--kv-memory",
        type=size,
        metavar="SIZE",
        help="cache per rank, such as 500M or 8GiB; default: half of the free memory of the node, "
        "shared by its ranks",
    )


def _add_step_options(group: Group) -> None:
    """Options that say what a step holds, and what every request goes by."""
    # Add the bounds of a step.
    group.add_argument(
        "--step-tokens",
        type=positive,
        default=2048,
        metavar="N",
        help="tokens of one step at most; longer prompts go in chunks",
    )
    group.add_argument(
        "--sequences",
        type=positive,
        default=256,
        metavar="N",
        help="sequences that run at a time at most",
    )
    group.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="positions to allow (default: the model's own number)",
    )
    group.add_argument(
        "--micro-batches",
        type=positive,
        metavar="N",
        help="with afd: micro-batches that the two sides work on in turn (default 2); with pp: "
        "steps that the prompts at hand are spread over (default 4 a stage)",
    )

    # Add what requests go by that do not say.
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of requests that do not give their own (default 0)",
    )


def _add_run_options(group: Group) -> None:
    """Options that say how a run shows itself, ends, and goes on."""
    # Add what is shown, how often the state is saved, and when a run stops.
    group.add_argument("--show", action="store_true", help="print each result as it finishes")
    group.add_argument(
        "--checkpoint-every",
        type=duration,
        default=60.0,
        metavar="TIME",
        help="how often OUTPUT.state is written, with which the same command goes on after it was "
        "stopped or killed: seconds or HH:MM:SS (default 60)",
    )
    group.add_argument(
        "--time-limit",
        type=duration,
        metavar="TIME",
        help="stop in order after this time, with exit code 75; the end of a SLURM job is a limit "
        "too",
    )

    # Add what counts as a failure, and what becomes of files that are there.
    group.add_argument(
        "--strict",
        action="store_true",
        help="end with exit code 1 if any request was refused; results are written all the same",
    )
    group.add_argument(
        "--restart",
        action="store_true",
        help="begin anew; what an earlier run has left is kept as FILE.old-1, ...",
    )
    add_overwrite_option(group)
    _add_check_options(group)


def _add_check_options(group: Group) -> None:
    """Options that say what is looked at beside the work."""
    group.add_argument(
        "--check",
        action="store_true",
        help="read all weights first, and refuse wrong checksums, NaN and infinity",
    )
    add_watch_options(group)
    group.add_argument(
        "--trace",
        metavar="FOLDER",
        help="write every MPI call of every rank as a timeline (Chrome, Perfetto)",
    )


def add_device_options(parser: ArgumentParser | Group) -> None:
    """Options of every command and bench that loads a model."""
    add_device_option(parser)
    parser.add_argument(
        "--kernels",
        choices=("auto", "plain"),
        default="auto",
        help="kernels where there are any, or the plain functions alone (default auto)",
    )


def add_device_option(parser: ArgumentParser | Group) -> None:
    """Option of every command and bench that computes on several ranks."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "auto"),
        default="cpu",
        help="compute on processors, on GPUs, or on GPUs where there are any (default cpu)",
    )


def add_overwrite_option(parser: ArgumentParser | Group) -> None:
    """Option of every command that writes a file."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what has the name of an output; without, it is refused",
    )


def add_kv_option(parser: ArgumentParser) -> None:
    """Option of the commands whose sequences go on from their keys and values."""
    parser.add_argument(
        "--checkpoint-kv",
        action="store_true",
        help="keep keys and values beside OUTPUT.state too, so that a start in the same layout "
        "computes no prompt again; they take the bytes of the cache in use, twice while written",
    )


def add_watch_options(parser: ArgumentParser | Group) -> None:
    """Options of every command that runs on several ranks."""
    parser.add_argument(
        "--hang-timeout",
        type=patience,
        default=600.0,
        metavar="TIME",
        help="end the job, and say which rank is missing, when others have waited for it for so "
        "long: seconds or HH:MM:SS (default 600), 0 for never",
    )


def claim_reports(comm: Comm, arguments: Namespace) -> None:
    """Refuse files of `--json` and `--plot` that could not be written; every rank calls this."""
    from hpcinfer.grid import agree

    given = [getattr(arguments, name, None) for name in ("json", "plot", "model")]
    agree(comm, _claim_reports, list(filter(None, given[:2])), given[2], arguments.overwrite)


def _claim_reports(paths: list[str], model: str | None, overwrite: bool) -> None:
    from hpcinfer.io.atomic import try_to_write
    from hpcinfer.io.claims import claim, refuse_existing

    for path, target in zip(paths, claim(paths, models=[model] if model else []), strict=True):
        refuse_existing(path, overwrite)
        try_to_write(target)


def device_of(comm: Comm, arguments: Namespace) -> Device:
    """The device of this rank for a command without a model; see `hpcinfer.job.start.device_of`."""
    from hpcinfer.job.start import device_of as device_of_rank

    return device_of_rank(comm, arguments.device)


def settings_of(kind: str, arguments: Namespace, **others) -> JobSettings:
    """Settings of a job, from the options of that name and from `others`."""
    from hpcinfer.job.settings import JobSettings

    names = {field.name for field in fields(JobSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return JobSettings(kind, **given, **others)


def duration(text: str) -> float:
    """Seconds written as 90, 1.5, HH:MM:SS, or as SLURM has it D-HH, D-HH:MM or D-HH:MM:SS.

    Raises
    ------
    ArgumentTypeError
        Here and in the functions below, for any other text.
    """
    found = _DURATION.fullmatch(text)
    value = 0.0
    if found and found["days"]:
        hours, minutes, seconds = [*found["clock"].split(":"), "0", "0"][:3]
        value = 86400 * int(found["days"]) + 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    elif found:
        for number in found["clock"].split(":"):
            value = 60 * value + float(number)
    if not 0 < value < 1e9:
        raise ArgumentTypeError(
            f"got {text!r}, need seconds, HH:MM:SS or D-HH:MM:SS, more than none"
        )
    return value


def whole(text: str) -> int:
    """Whole number of the command line, which may be negative."""
    if not is_digits(text.removeprefix("-")):
        raise ArgumentTypeError(f"got {text!r}, need a whole number")
    return int(text)


def real(text: str) -> float:
    """Number of the command line; what it may be is the field's own business."""
    try:
        return float(text if text.isascii() and "_" not in text else "")
    except ValueError:
        raise ArgumentTypeError(f"got {text!r}, need a number") from None


def patience(text: str) -> float:
    """Seconds as in `duration`, or 0 for never."""
    return 0.0 if text == "0" else duration(text)


def positive(text: str) -> int:
    """Positive whole number of the command line."""
    if not is_digits(text) or int(text) < 1:
        raise ArgumentTypeError(f"got {text!r}, need a whole number of 1 or more")
    return int(text)


def seed(text: str) -> int:
    """Seed of the random numbers: any 64-bit number."""
    if not is_digits(text.removeprefix("-")) or not -(2**63) <= int(text) < 2**64:
        raise ArgumentTypeError(f"got seed {text!r}, need a whole number of 64 bits")
    return int(text) % 2**64


def shard(text: str) -> tuple[int, int]:
    """Which part of how many, written I/N."""
    i, _, n = text.partition("/")
    if not is_digits(i) or not is_digits(n) or not 1 <= int(i) <= int(n):
        raise ArgumentTypeError(f"got shard {text!r}, need I/N such as 1/4, I from 1 to N")
    return int(i), int(n)


def size(text: str) -> int:
    """Bytes written as 500M, 8GB or 8GiB."""
    number = text.rstrip("bBkKmMgGtTi") if text.isascii() and "_" not in text else ""
    unit = text[len(number) :].lower()
    binary = unit.endswith("ib") or unit.endswith("i")
    letter = unit.rstrip("b").rstrip("i")

    # Read the number, and what its unit stands for.
    try:
        value = float(number)
        factor = _UNITS[letter]
    except (ValueError, KeyError):
        raise ArgumentTypeError(
            f"got size {text!r}, need a number with unit, such as 500M or 8GiB"
        ) from None
    if not 0 < value < 1e18:
        raise ArgumentTypeError(f"got size {text!r}, need more than nothing")
    if binary:
        factor = 1024 ** {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}[letter]
    return int(value * factor)
