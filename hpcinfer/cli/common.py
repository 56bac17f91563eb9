"""Options that the commands on a loaded model share."""

import shlex
import sys
import time
from argparse import ArgumentTypeError

DTYPES = ("float32", "bfloat16", "float16")

# Seconds before the end of the job at which a run stops.
_JOB_END_S = 30.0

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_model_options(parser):
    """Options of every command that loads a model."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or converted .h5")
    parser.add_argument("--input", required=True, metavar="FILE", help="requests: .jsonl or .txt")
    parser.add_argument(
        "--output",
        required=True,
        action="append",
        metavar="FILE",
        help="results: .h5 or .jsonl; may be given more than once",
    )
    group = parser.add_argument_group("layout and machine")
    group.add_argument(
        "--layout",
        metavar="AXES",
        help='such as "tp=2" or "dp=2,pp=2,cp=2,tp=2,ep=4,sp=on,zero=allgather" or "afd=3:1"; '
        "default: all ranks in tp",
    )
    group.add_argument("--dtype", choices=DTYPES)
    add_device_options(group)
    group.add_argument(
        "--kv-memory",
        type=size,
        metavar="SIZE",
        help="cache per rank, such as 500M or 8GiB; default: half of the free memory of the node, "
        "shared by its ranks",
    )
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
        help="positions to allow instead of the model's own number",
    )
    group.add_argument(
        "--micro-batches",
        type=positive,
        metavar="N",
        help="with afd: micro-batches that the two sides work on in turn (default 2); with pp: "
        "steps that the prompts at hand are spread over (default 4 a stage)",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="of requests that do not give their own (default 0)",
    )
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
    group.add_argument(
        "--restart",
        action="store_true",
        help="begin anew; what an earlier run has left is kept as FILE.old-1, ...",
    )
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


def add_device_options(parser):
    """Options of every command and bench that loads a model."""
    add_device_option(parser)
    parser.add_argument(
        "--kernels",
        choices=("auto", "plain"),
        default="auto",
        help="the fast forms of functions where there are any, or the plain ones (default auto)",
    )


def add_device_option(parser):
    """Option of every command and bench that computes on several ranks."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "auto"),
        default="cpu",
        help="compute on processors, on GPUs, or on GPUs where there are any (default cpu)",
    )


def device_of(comm, arguments):
    """The device of this rank for a command without a model; every rank calls this.

    What the user should hear of the choice is printed on the first rank.
    """
    from mpi4py import MPI

    from hpcinfer import array
    from hpcinfer.engine.placement import take_device

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    node.Set_name("node")
    device, _ = take_device(comm, node, arguments.device)
    node.Free()
    warning = array.auto_warning(device) if arguments.device == "auto" else None
    if comm.rank == 0 and warning is not None:
        print(warning, file=sys.stderr, flush=True)
    return device


def add_kv_option(parser):
    """Option of the commands whose sequences go on from their keys and values."""
    parser.add_argument(
        "--checkpoint-kv",
        action="store_true",
        help="keep keys and values beside OUTPUT.state too, so that a start in the same layout "
        "computes no prompt again; they take the bytes of the cache in use, twice while written",
    )


def add_watch_options(parser):
    """Options of every command that runs on several ranks."""
    parser.add_argument(
        "--hang-timeout",
        type=patience,
        default=600.0,
        metavar="TIME",
        help="end the job, and say which rank is missing, when others have waited for it for so "
        "long: seconds or HH:MM:SS (default 600), 0 for never",
    )


def run_batch(kind, arguments, sampling, selection=None):
    """Load the model, run the input through it, and print the report on the first rank."""
    from hpcinfer.job.stop import Stop

    with Stop(_end_s(arguments.time_limit)) as stop:
        _run_batch(kind, arguments, sampling, selection, stop)


def _run_batch(kind, arguments, sampling, selection, stop):
    from hpcinfer.job import run
    from hpcinfer.job.state import RunState
    from hpcinfer.job.watchdog import Watchdog
    from hpcinfer.launcher import world

    comm, outputs = world(), arguments.output
    with Watchdog(comm, arguments.hang_timeout, lambda: stop.last_resort and stop.last_resort()):
        n_lines = run.check_files(comm, arguments.input, outputs)
        keeps_kv = getattr(arguments, "checkpoint_kv", False)
        every_s, restart = arguments.checkpoint_every, arguments.restart
        with RunState(comm, outputs, every_s, restart, keeps_kv) as state:
            _run_on(comm, kind, arguments, sampling, selection, n_lines, state, stop)


def _run_on(comm, kind, arguments, sampling, selection, n_lines, state, stop):
    from hpcinfer import array
    from hpcinfer.engine.api import load
    from hpcinfer.engine.placement import advice
    from hpcinfer.io.trace import write_trace
    from hpcinfer.job import run
    from hpcinfer.job.state import identity_of_input
    from hpcinfer.ops import dispatch

    state.refuse_changed(
        lambda: identity_of_input(kind, arguments.input, arguments.output, arguments.seed)
    )
    if state.kept:
        print(f"restart   what was there is kept as {', '.join(state.kept)}", flush=True)
    engine = load(
        arguments.model,
        comm,
        arguments.layout,
        arguments.dtype,
        arguments.device,
        kv_memory=arguments.kv_memory,
        step_tokens=arguments.step_tokens,
        sequences=arguments.sequences,
        context=arguments.context,
        seed=arguments.seed,
        micro_batches=arguments.micro_batches,
        check_weights=arguments.check,
        kernels=arguments.kernels,
    )
    engine.ledger.tracing = arguments.trace is not None
    device = engine.model.device
    for line in (
        advice(engine.grid.node, device),
        array.auto_warning(device) if arguments.device == "auto" else None,
        dispatch.notice() if device.name == "cpu" and arguments.kernels == "auto" else None,
    ):
        if comm.rank == 0 and line is not None:
            print(line, file=sys.stderr, flush=True)
    facts = {
        "command": shlex.join(arguments.command_line),
        "model": arguments.model,
        "model_checksum": engine.checksum,
        "layout": str(engine.grid.layout),
        "dtype": str(engine.model.dtype),
        "seed": arguments.seed,
    }
    finished, refused, before = run.run(
        engine,
        kind,
        arguments.input,
        n_lines,
        sampling,
        facts,
        state,
        stop,
        arguments.show,
        selection,
    )
    report = engine.stats.report(engine)
    if arguments.trace:
        write_trace(arguments.trace, comm.rank, engine.ledger.events)
    if report is not None:
        print(*report, sep="\n")
        print(
            f"done      {finished} requests finished, {refused} refused"
            + (f", {before} before" if before else "")
            + " -> "
            + ", ".join(arguments.output)
        )


def _end_s(time_limit_s):
    """When to stop, in seconds since 1970: after the time limit, or before the job's end."""
    from hpcinfer.launcher import job_end_s

    ends_s = []
    if time_limit_s is not None:
        ends_s.append(time.time() + time_limit_s)
    if job_end_s() is not None:
        ends_s.append(job_end_s() - _JOB_END_S)
    return min(ends_s, default=None)


def duration(text):
    """Seconds written as 90, 1.5 or HH:MM:SS."""
    parts = text.split(":")
    try:
        numbers = [*map(int, parts[:-1]), float(parts[-1])]
    except ValueError:
        numbers = []
    value = 0.0
    for number in numbers:
        value = 60 * value + number
    if not 0 < value < 1e9 or len(numbers) > 3 or min(numbers) < 0:
        raise ArgumentTypeError(f"got {text!r}, need seconds, or HH:MM:SS, more than none")
    return value


def patience(text):
    """Seconds as in `duration`, or 0 for never."""
    return 0.0 if text == "0" else duration(text)


def positive(text):
    """Positive whole number of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"got {text!r}, need a whole number of 1 or more")
    return int(text)


def seed(text):
    """Seed of the random numbers: any 64-bit number."""
    if not text.removeprefix("-").isdecimal() or not -(2**63) <= int(text) < 2**64:
        raise ArgumentTypeError(f"got seed {text!r}, need a whole number of 64 bits")
    return int(text) % 2**64


def size(text):
    """Bytes written as 500M, 8GB or 8GiB."""
    number = text.rstrip("bBkKmMgGtTi")
    unit = text[len(number) :].lower()
    binary = unit.endswith("ib") or unit.endswith("i")
    letter = unit.rstrip("b").rstrip("i")
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
