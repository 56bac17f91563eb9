"""hpcinfer bench decode, prefill, load, scaling, collectives: what users get of the machine."""

from argparse import ArgumentTypeError

from hpcinfer.cli import common
from hpcinfer.cli.convert import CODES, GROUPS
from hpcinfer.errors import UsageError

# What is measured with --sweep: one sequence to 256, contexts of 1k to 128k tokens.
_SWEEP = [1 << n for n in range(9)], [1 << n for n in (10, 12, 14, 16, 17)]


def add(names):
    """The parsers of these benches."""
    _add_decode(names)
    _add_prefill(names)
    _add_load(names)
    _add_scaling(names)
    _add_collectives(names)


def numbers(text):
    """Whole numbers of 1 or more, separated by commas."""
    return [common.positive(item.strip()) for item in text.split(",")]


def add_numbers(parser, *options):
    """Options (name, default, meaning): a whole number, or several where the default is text."""
    for name, default, what in options:
        kind, metavar = (numbers, "N,...") if isinstance(default, str) else (common.positive, "N")
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar=metavar,
            help=f"{what} (default {default})",
        )  # fmt: skip


def _add_decode(names):
    parser = names.add_parser(
        "decode",
        help="decoding of a model beside the machine's memory bandwidth and matrix products",
        description="Tokens per second of decoding, by the engine's own steps, for every number of "
        "sequences at every context. The cache is filled with random keys and values in the place "
        "of a prompt's. Beside it the limit: every weight read once a step and the cache of all "
        "sequences, or the products, whichever takes longer.",
    )
    _add_model(parser, "1,8,32", "512,4096", "sequences that are decoded together")
    add_numbers(parser, _NEW)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="1 to 256 sequences at contexts of 1024 to 131072 tokens, for a picture of the cost "
        "of a step; cases whose cache does not fit are left out",
    )
    parser.set_defaults(measure=_decode)


def _add_prefill(names):
    parser = names.add_parser(
        "prefill",
        help="prompts of a model beside the machine's matrix products",
        description="Prompt tokens per second, by the engine's own steps, for every number of "
        "prompts of every length. Beside it the limit: the matrix products of all tokens.",
    )
    _add_model(parser, "1", "512,4096", "prompts that are computed together")
    parser.set_defaults(measure=_prefill)


def _add_load(names):
    parser = names.add_parser(
        "load",
        help="loading a model beside plain reading of its files, and the time to the first token",
        description="Opening a model and reading every rank's shard, beside plain reading of as "
        "many bytes by all ranks; and the time from the start of the process to the first token.",
    )
    _add_source(parser, "Hugging Face directory or converted .h5", None)
    add_numbers(parser, _REPEAT)
    parser.add_argument(
        "--cold",
        action="store_true",
        help="drop the files from the page cache before each reading",
    )
    parser.set_defaults(measure=_load)


def _add_scaling(names):
    parser = names.add_parser(
        "scaling",
        help="decoding by 1 rank to all: speed-up and efficiency",
        description="Decoding by growing numbers of ranks in one job: the same sequences on all "
        "ranks, cut in tp (strong), and as many more sequences as ranks (weak).",
    )
    _add_source(parser, _MODEL, "bfloat16", layout=False)
    parser.add_argument(
        "--ranks", type=numbers, metavar="N,...", help="numbers of ranks (default: 1 to all)"
    )
    parser.add_argument(
        "--weak",
        choices=("dp", "tp"),
        default="dp",
        help="in weak scaling, ranks are replicas (dp) or cut the model (tp) (default dp)",
    )
    add_numbers(
        parser,
        ("batch", 1, "sequences, of each rank in weak scaling"),
        ("context", 512, "tokens of each"),
        _NEW,
        _REPEAT,
    )
    parser.set_defaults(measure=_scaling)


def _add_collectives(names):
    parser = names.add_parser(
        "collectives",
        help="collectives by message size beside the copying that the node can do",
        description="Latency and bytes per second of the collectives that the program calls, and "
        "of an Allreduce through memory that the ranks share, beside the copy limit of the node.",
    )
    default = "4KiB,64KiB,1MiB,16MiB,64MiB"
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=default,
        metavar="SIZE,...",
        help=f"bytes of the whole array, such as 4KiB or 1MB (default {default})",
    )
    common.add_device_option(parser)
    add_numbers(parser, _REPEAT)
    parser.set_defaults(measure=_collectives)


_MODEL = (
    "Hugging Face directory, converted .h5, or config.json (or a folder with nothing else), whose "
    "weights are then random and made in memory"
)
_NEW = "new", 16, "steps of a repetition"
_REPEAT = "repeat", 5, "repetitions; the median counts"


def _add_model(parser, batch, context, what):
    """Options of the benches with numbers of sequences and contexts."""
    _add_source(parser, _MODEL, "bfloat16")
    add_numbers(parser, ("batch", batch, what), ("context", context, "tokens of each"), _REPEAT)


def _add_source(parser, model, dtype, layout=True):
    """Options of every bench that loads a model."""
    parser.add_argument("model", metavar="MODEL", help=model)
    if layout:
        parser.add_argument(
            "--layout", metavar="AXES", help='such as "tp=2"; default: all ranks in tp'
        )
    parser.add_argument(
        "--dtype",
        choices=common.DTYPES,
        default=dtype,
        help=f"of weights and cache (default {dtype or 'as the model says'})",
    )
    if dtype:
        parser.add_argument(
            "--quantize",
            choices=CODES,
            help="random weights as integers with a scale for every group of inputs; for others "
            "give a model that `hpcinfer convert --quantize` has made",
        )
        parser.add_argument(
            "--group", type=int, choices=GROUPS,
            help="inputs that share a scale, with --quantize (default 32)",
        )  # fmt: skip
    common.add_device_options(parser)
    add_numbers(parser, ("step-tokens", 2048, "tokens of one step at most"))


def _decode(bench, comm, arguments):
    batches, contexts = _SWEEP if arguments.sweep else (arguments.batch, arguments.context)
    return bench.run(comm, _setting(arguments), batches, contexts, arguments.new, arguments.repeat)


def _prefill(bench, comm, arguments):
    return bench.run(
        comm, _setting(arguments), arguments.batch, arguments.context, arguments.repeat
    )


def _load(bench, comm, arguments):
    from hpcinfer.bench.random_checkpoint import has_weights

    if not has_weights(arguments.model):
        raise UsageError(f"bench: got {arguments.model} without weights, need a model to load")
    return bench.run(comm, _setting(arguments), arguments.repeat, arguments.cold)


def _scaling(bench, comm, arguments):
    ranks = sorted(set(arguments.ranks or range(1, comm.size + 1)))
    if ranks[-1] > comm.size:
        raise UsageError(f"bench: got --ranks {ranks[-1]}, need at most {comm.size} as launched")
    return bench.run(
        comm, _setting(arguments), ranks, arguments.batch, arguments.context, arguments.new,
        arguments.repeat, arguments.weak,
    )  # fmt: skip


def _collectives(bench, comm, arguments):
    return bench.run(comm, common.device_of(comm, arguments), arguments.sizes, arguments.repeat)


def _setting(arguments):
    """How the model is loaded."""
    from hpcinfer.bench.drive import Setting
    from hpcinfer.bench.random_checkpoint import has_weights

    codes, group = (getattr(arguments, name, None) for name in ("quantize", "group"))
    bits = CODES.get(codes)
    if group and not bits:
        raise UsageError(f"bench: got --group {group} alone, need --quantize int8 or int4 with it")
    if bits and has_weights(arguments.model):
        raise UsageError(
            f"bench: got --quantize for {arguments.model}, which has weights, need a bare "
            "config.json; or give a model made by hpcinfer convert --quantize"
        )
    return Setting(
        arguments.model, getattr(arguments, "layout", None), arguments.dtype, arguments.device,
        arguments.step_tokens, arguments.kernels, bits, group or 32,
    )  # fmt: skip


def _sizes(text):
    """Sizes in bytes, separated by commas, each of four or more."""
    sizes = [common.size(item.strip()) for item in text.split(",")]
    if min(sizes) < 4:
        raise ArgumentTypeError(f"got {text!r}, need sizes of 4 bytes or more")
    return sizes
