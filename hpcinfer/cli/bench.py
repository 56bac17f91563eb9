"""hpcinfer bench NAME: measure a part of the program beside the limit of the machine."""

from argparse import ArgumentTypeError

from hpcinfer.cli import common
from hpcinfer.errors import UsageError


def add(commands):
    """The command's parser, with one below it for each bench."""
    parser = commands.add_parser(
        "bench",
        help="measure speed beside the machine's limit",
        description="Measure speed over the ranks at hand. The machine's limit is measured in the "
        "same run; other load spoils both.",
    )
    names = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    _add_attention(names)
    _add_decode_attention(names)
    _add_extract(names)
    for bench in names.choices.values():
        bench.add_argument("--json", metavar="FILE", help="write the rows as a JSON list too")
        bench.add_argument("--debug", action="store_true", help="show the traceback of an error")
        common.add_watch_options(bench)
    return parser


def run(arguments):
    """Run the bench, and print its table on the first rank."""
    from hpcinfer.engine.watchdog import Watchdog
    from hpcinfer.grid import agree, world
    from hpcinfer.io.rows import write_json

    comm = world()
    with Watchdog(comm, arguments.hang_timeout):
        rows, table = arguments.measure(comm, arguments)
    if comm.rank == 0:
        print(table(rows))
    if arguments.json:
        agree(comm, write_json, arguments.json, rows)


def _add_attention(names):
    parser = names.add_parser(
        "attention",
        help="prefill attention: one rank against the ring over all ranks",
        description="Causal attention of one sequence by one rank, and by ring attention over all "
        "ranks for each cut: speed-up, balance, and the share of the exchange hidden behind the "
        "computation.",
    )
    parser.add_argument(
        "--tokens", type=common.positive, default=32768, metavar="N", help="default 32768"
    )
    parser.add_argument(
        "--cuts",
        type=_cuts,
        default="zigzag,block-cyclic,contiguous",
        metavar="NAMES",
        help="contiguous, striped, zigzag, block-cyclic (default: all but striped)",
    )
    _add_shape(parser)
    parser.set_defaults(measure=_attention)


def _add_decode_attention(names):
    parser = names.add_parser(
        "decode-attention",
        help="decode attention over a cut cache: ring, gather, tree",
        description="Attention of one query per sequence to a cache that is cut over the ranks, "
        "completed by a ring, a gather, a tree of two Allreduces, and one of a single Allreduce.",
    )
    parser.add_argument(
        "--cached",
        type=_numbers,
        default="32768,131072",
        metavar="N,...",
        help="tokens in the cache of all sequences (default 32768,131072)",
    )
    parser.add_argument(
        "--queries",
        type=_numbers,
        default="1,8",
        metavar="N,...",
        help="sequences that share the cache, with a query each (default 1,8)",
    )
    _add_shape(parser)
    parser.set_defaults(measure=_decode_attention)


def _add_extract(names):
    parser = names.add_parser(
        "extract",
        help="writing activations beside plain sequential writes",
        description="The parts that `hpcinfer extract` writes, with checksums, beside plain "
        "sequential writes of as many bytes, by all ranks at a time.",
    )
    parser.add_argument(
        "--folder", default=".", help="where to write; nothing is left there (default .)"
    )
    for name, default, what in (
        ("width", 1024, "columns of a dataset"),
        ("layers", 8, "datasets"),
        ("tokens", 512, "rows of a step"),
        ("steps", 16, "steps"),
        ("repeat", 5, "repetitions; their median counts"),
    ):
        parser.add_argument(
            f"--{name}", type=common.positive, default=default, metavar="N",
            help=f"{what} (default {default})",
        )  # fmt: skip
    parser.add_argument("--store", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.set_defaults(measure=_extract)


def _add_shape(parser):
    """Options of every attention bench."""
    for name, default, what in (
        ("heads", 16, "query heads"),
        ("kv-heads", 8, "key/value heads"),
        ("width", 64, "width of a head"),
        ("repeat", 5, "repetitions; their median counts"),
    ):
        parser.add_argument(
            f"--{name}", type=common.positive, default=default, metavar="N",
            help=f"{what} (default {default})",
        )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of keys and values (default float32)",
    )


def _attention(comm, arguments):
    from hpcinfer.bench import attention

    shape = _shape(arguments)
    rows = attention.run(comm, shape, arguments.tokens, arguments.cuts, arguments.repeat)
    return rows, attention.table


def _decode_attention(comm, arguments):
    from hpcinfer.bench import decode_attention

    shape = _shape(arguments)
    rows = decode_attention.run(comm, shape, arguments.cached, arguments.queries, arguments.repeat)
    return rows, decode_attention.table


def _extract(comm, arguments):
    from hpcinfer.bench import extract

    rows = extract.run(
        comm,
        arguments.folder,
        arguments.width,
        arguments.layers,
        arguments.tokens,
        arguments.steps,
        arguments.store,
        arguments.repeat,
    )
    return rows, extract.table


def _shape(arguments):
    """Shape of the attention; every rank refuses heads that cannot share keys evenly."""
    from hpcinfer.bench.shape import Shape

    H, G = arguments.heads, arguments.kv_heads
    if H % G:
        raise UsageError(f"bench: got --heads {H} --kv-heads {G}, need a multiple of the KV heads")
    return Shape(H, G, arguments.width, arguments.dtype)


def _cuts(text):
    """Names of cuts, as `partition.CUTS` has them."""
    from hpcinfer.partition import CUTS

    names = [name.strip().replace("-", "_") for name in text.split(",")]
    unknown = [name for name in names if name not in CUTS]
    if unknown:
        known = ", ".join(name.replace("_", "-") for name in CUTS)
        raise ArgumentTypeError(f"got cut {unknown[0]!r}, need some of {known}")
    return names


def _numbers(text):
    """Whole numbers of 1 or more, separated by commas."""
    return [common.positive(item.strip()) for item in text.split(",")]
