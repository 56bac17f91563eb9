"""hpcinfer bench NAME: measure a part of the program beside the limit of the machine."""

from argparse import ArgumentTypeError
from importlib import import_module

from hpcinfer.cli import bench_model, common
from hpcinfer.cli.bench_model import add_numbers
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
    _add_sequence(names)
    _add_zero(names)
    _add_pipeline(names)
    _add_expert(names)
    _add_disagg(names)
    for bench in names.choices.values():
        common.add_device_option(bench)
    bench_model.add(names)
    for bench in names.choices.values():
        bench.add_argument("--json", metavar="FILE", help="write the rows as a JSON list too")
        bench.add_argument(
            "--plot",
            type=_picture,
            metavar="FILE",
            help="draw the rows too, as .png, .svg or .pdf; needs the extra plot",
        )
        bench.add_argument("--debug", action="store_true", help="show the traceback of an error")
        common.add_watch_options(bench)
    return parser


def run(arguments):
    """Run the bench, and print its table on the first rank."""
    from hpcinfer.grid import agree
    from hpcinfer.io.rows import write_json
    from hpcinfer.job.watchdog import Watchdog
    from hpcinfer.launcher import world

    comm = world()
    if arguments.plot:
        from hpcinfer.bench.plot import draw, refuse_missing

        refuse_missing()
    with Watchdog(comm, arguments.hang_timeout):
        bench = import_module(f"hpcinfer.bench.{arguments.bench.replace('-', '_')}")
        rows = arguments.measure(bench, comm, arguments)
    if comm.rank == 0:
        print(bench.table(rows))
    if arguments.json:
        agree(comm, write_json, arguments.json, rows)
    if arguments.plot:
        agree(comm, draw, arguments.plot, rows)


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
    add_numbers(
        parser,
        ("cached", "32768,131072", "tokens in the cache of all sequences"),
        ("queries", "1,8", "sequences that share the cache, with a query each"),
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
    add_numbers(
        parser,
        ("width", 1024, "columns of a dataset"),
        ("layers", 8, "datasets"),
        ("tokens", 512, "rows of a step"),
        ("steps", 64, "steps"),
        _REPEAT,
    )
    parser.add_argument("--store", choices=common.DTYPES, default="float32")
    parser.set_defaults(measure=_extract)


def _add_sequence(names):
    parser = names.add_parser(
        "sequence",
        help="sequence parallelism beside tensor parallelism",
        description="FFN halves with norm and residual, by one rank, with tensor parallelism, and "
        "with tokens cut between the halves: activations held, bytes sent, time.",
    )
    add_numbers(parser, ("tokens", 1024, "tokens of a step"), ("layers", 4, "layers"), *_FFN)
    parser.set_defaults(measure=_halves)


def _add_zero(names):
    parser = names.add_parser(
        "zero",
        help="parameters kept in parts, gathered or broadcast, ahead or when used",
        description="FFN halves on tokens of every rank's own, with parameters kept whole and "
        "in parts: share of the gathering that the computation hides, bytes of parameters held.",
    )
    add_numbers(parser, ("tokens", 512, "tokens of every rank"), ("layers", 8, "layers"), *_FFN)
    parser.set_defaults(measure=_halves)


def _add_pipeline(names):
    parser = names.add_parser(
        "pipeline",
        help="share of the time that the stages of a pipeline wait",
        description="Micro-batches through stages of equal work, one on each rank: time that the "
        "ranks wait in receives, beside (P-1)/(m+P-1).",
    )
    sizes = ("tokens", 128, "tokens of a micro-batch"), ("layers", 2, "layers of a stage")
    add_numbers(parser, *sizes, *_FFN)
    _add_micro(parser, "1,2,4,8")
    parser.set_defaults(measure=_pipeline)


def _add_expert(names):
    parser = names.add_parser(
        "expert",
        help="dispatch and combine of a mixture of experts, and the balance of the ranks",
        description="Tokens of every rank to experts on all ranks and back, for even and for "
        "skewed routing: exchange beside the copy limit of the machine, balance of the ranks.",
    )
    add_numbers(
        parser,
        ("tokens", 512, "tokens of every rank"),
        ("experts", 16, "experts"),
        ("top", 2, "experts that a token chooses"),
        ("width", 768, "width of the model"),
        ("ffn", 512, "columns of an expert"),
        _REPEAT,
    )
    parser.add_argument(
        "--zipf",
        type=_exponents,
        default="0,1",
        metavar="S,...",
        help="chance of expert e falls as 1/(e+1)^S, 0 for even routing (default 0,1)",
    )
    parser.set_defaults(measure=_expert)


def _add_disagg(names):
    parser = names.add_parser(
        "disagg",
        help="attention and FFN on different ranks: share of the time that each side waits",
        description="Layers on M attention ranks and N FFN ranks, in one or more micro-batches: "
        "time that the ranks of each side wait in receives. Needs 2 ranks.",
    )
    sizes = ("tokens", 512, "tokens of a step"), ("layers", 4, "layers"), ("heads", 12, "heads")
    add_numbers(parser, *sizes, *_FFN)
    parser.add_argument("--split", type=_split, metavar="M:N", help="default: half the ranks")
    parser.add_argument(
        "--context",
        type=common.positive,
        metavar="N",
        help="cached tokens (default: as many as make attention take the time of the FFN)",
    )
    _add_micro(parser, "1,2,3")
    parser.set_defaults(measure=_disagg)


_REPEAT = ("repeat", 5, "repetitions; their median counts")
_FFN = ("width", 768, "width of the model"), ("ffn", 3072, "width of the FFN"), _REPEAT


def _add_micro(parser, default):
    """Options of the benches with micro-batches."""
    add_numbers(parser, ("micro", default, "numbers of micro-batches"))
    parser.add_argument(
        "--work",
        choices=("compute", "sleep"),
        default="compute",
        help="sleep shows the schedule where ranks are more than cores, and computing ranks would "
        "take turns on them (default compute)",
    )


def _add_shape(parser):
    """Options of every attention bench."""
    add_numbers(
        parser,
        ("heads", 16, "query heads"),
        ("kv-heads", 8, "key/value heads"),
        ("width", 64, "width of a head"),
        _REPEAT,
    )
    parser.add_argument(
        "--dtype",
        choices=common.DTYPES,
        default="float32",
        help="of keys and values (default float32)",
    )


def _attention(bench, comm, arguments):
    shape = _shape(arguments)
    device = common.device_of(comm, arguments)
    return bench.run(comm, device, shape, arguments.tokens, arguments.cuts, arguments.repeat)


def _decode_attention(bench, comm, arguments):
    shape = _shape(arguments)
    device = common.device_of(comm, arguments)
    return bench.run(comm, device, shape, arguments.cached, arguments.queries, arguments.repeat)


def _extract(bench, comm, arguments):
    device = common.device_of(comm, arguments)
    return bench.run(
        comm,
        device,
        arguments.folder,
        arguments.width,
        arguments.layers,
        arguments.tokens,
        arguments.steps,
        arguments.store,
        arguments.repeat,
    )


def _halves(bench, comm, arguments):
    device = common.device_of(comm, arguments)
    return bench.run(
        comm, device, _ffn(arguments), arguments.tokens, arguments.layers, arguments.repeat
    )


def _pipeline(bench, comm, arguments):
    device = common.device_of(comm, arguments)
    return bench.run(
        comm, device, _ffn(arguments), arguments.tokens, arguments.layers, arguments.micro,
        arguments.work, arguments.repeat,
    )  # fmt: skip


def _expert(bench, comm, arguments):
    E, top = arguments.experts, arguments.top
    if top > E:
        raise UsageError(f"bench: got --top {top} of --experts {E}, need experts enough")
    device = common.device_of(comm, arguments)
    return bench.run(
        comm, device, _ffn(arguments), arguments.tokens, E, top, arguments.zipf, arguments.repeat
    )


def _disagg(bench, comm, arguments):
    from hpcinfer.bench.shape import AttentionShape

    D, H = arguments.width, arguments.heads
    split = arguments.split or (-(-comm.size // 2), comm.size // 2)
    if D % H:
        raise UsageError(f"bench: got --width {D} --heads {H}, need a multiple of the heads")
    if min(split) < 1 or sum(split) != comm.size:
        raise UsageError(
            f"bench: got {split[0]}:{split[1]} attention and FFN ranks of {comm.size}, need all "
            "ranks on one side or the other, and 1 or more on each"
        )
    device = common.device_of(comm, arguments)
    return bench.run(
        comm, device, AttentionShape(H, H, D // H, "float32"), _ffn(arguments), arguments.tokens,
        arguments.layers, split, arguments.micro, arguments.context, arguments.work,
        arguments.repeat,
    )  # fmt: skip


def _ffn(arguments):
    """Widths of the FFN that is measured."""
    from hpcinfer.bench.shape import Ffn

    return Ffn(arguments.width, arguments.ffn)


def _shape(arguments):
    """AttentionShape of the attention; every rank refuses heads that cannot share keys evenly."""
    from hpcinfer.bench.shape import AttentionShape

    H, G = arguments.heads, arguments.kv_heads
    if H % G:
        raise UsageError(f"bench: got --heads {H} --kv-heads {G}, need a multiple of the KV heads")
    return AttentionShape(H, G, arguments.width, arguments.dtype)


def _cuts(text):
    """Names of cuts, as `partition.CUTS` has them."""
    from hpcinfer.partition import CUTS

    names = [name.strip().replace("-", "_") for name in text.split(",")]
    unknown = [name for name in names if name not in CUTS]
    if unknown:
        known = ", ".join(name.replace("_", "-") for name in CUTS)
        raise ArgumentTypeError(f"got cut {unknown[0]!r}, need some of {known}")
    return names


def _exponents(text):
    """Numbers of 0 or more, separated by commas."""
    values = [float(item) for item in text.split(",")]
    if not all(0 <= value < 100 for value in values):
        raise ArgumentTypeError(f"got {text!r}, need numbers from 0 to 100")
    return values


def _picture(text):
    """Name of a picture, of a kind that can be drawn."""
    if not text.endswith((".png", ".svg", ".pdf")):
        raise ArgumentTypeError(f"got {text!r}, need a name that ends in .png, .svg or .pdf")
    return text


def _split(text):
    """Ranks of two sides, written M:N."""
    values = [common.positive(item.strip()) for item in text.split(":")]
    if len(values) != 2:
        raise ArgumentTypeError(f"got {text!r}, need M:N")
    return tuple(values)
