"""The options of every bench, declared once.

A bench's file measures, and imports MPI; so its options stand here, where `--help` finds them at
once. `run` of a bench takes the options by their names.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import Any

from hpcinfer.cli import common
from hpcinfer.cli.convert import CODES, GROUPS


class BenchOption:
    """An option of the command line, in argparse's words."""

    def __init__(self, name: str, **words: Any):
        self.name, self.words = name, words


@dataclass(frozen=True)
class BenchCommand:
    """What `hpcinfer bench NAME` says of itself, and takes.

    Attributes
    ----------
    help, description : for the list of benches, and for the bench's own help
    options : list of BenchOption
    loads_model : True if it takes what every command on a model does
    """

    help: str
    description: str
    options: list[BenchOption]
    loads_model: bool = False


def numbers(text: str) -> list[int]:
    """Whole numbers of 1 or more, separated by commas."""
    return [common.positive(item.strip()) for item in text.split(",")]


def number(name: str, default: int | str, meaning: str) -> BenchOption:
    """A whole number, or several where the default is text."""
    kind, metavar = (numbers, "N,...") if isinstance(default, str) else (common.positive, "N")
    return BenchOption(
        f"--{name}", type=kind, default=default, metavar=metavar,
        help=f"{meaning} (default {default})",
    )  # fmt: skip


def cuts(text: str) -> list[str]:
    """Names of cuts, as `partition.CUTS` has them."""
    from hpcinfer.partition import CUTS

    names = [name.strip().replace("-", "_") for name in text.split(",")]
    unknown = [name for name in names if name not in CUTS]
    if unknown:
        known = ", ".join(name.replace("_", "-") for name in CUTS)
        raise ArgumentTypeError(f"got cut {unknown[0]!r}, need some of {known}")
    return names


def exponents(text: str) -> list[float]:
    """Numbers of 0 or more, separated by commas."""
    values = [float(item) for item in text.split(",")]
    if not all(0 <= value < 100 for value in values):
        raise ArgumentTypeError(f"got {text!r}, need numbers from 0 to 100")
    return values


def split(text: str) -> tuple[int, ...]:
    """Ranks of two sides, written A:F."""
    values = [common.positive(item.strip()) for item in text.split(":")]
    if len(values) != 2:
        raise ArgumentTypeError(f"got {text!r}, need A:F")
    return tuple(values)


def sizes(text: str) -> list[int]:
    """Sizes in bytes, separated by commas, each of four or more."""
    values = [common.size(item.strip()) for item in text.split(",")]
    if min(values) < 4:
        raise ArgumentTypeError(f"got {text!r}, need sizes of 4 bytes or more")
    return values


_REPEAT = number("repeat", 5, "repetitions; their median counts")
_NEW = number("new", 16, "steps of a repetition")
_FFN = [
    number("width", 768, "width of the model"),
    number("ffn", 3072, "width of the FFN"),
    _REPEAT,
]
_WORK = BenchOption(
    "--work",
    choices=("compute", "sleep"),
    default="compute",
    help="sleep shows the schedule where ranks are more than cores, and computing ranks would "
    "take turns on them (default compute)",
)
_SHAPE = [
    number("heads", 16, "query heads"),
    number("kv-heads", 8, "key/value heads"),
    number("width", 64, "width of a head"),
    _REPEAT,
    BenchOption(
        "--dtype",
        choices=common.DTYPES,
        default="float32",
        help="of keys and values (default float32)",
    ),
]
_LAYOUT = BenchOption("--layout", metavar="AXES", help='such as "tp=2"; default: all ranks in tp')
_RANDOM = [
    BenchOption(
        "model",
        metavar="MODEL",
        help="Hugging Face directory, converted .h5, or config.json (or a folder with nothing "
        "else), whose weights are then random and made in memory",
    ),
    BenchOption(
        "--dtype",
        choices=common.DTYPES,
        default="bfloat16",
        help="of weights and cache (default bfloat16)",
    ),
    BenchOption(
        "--quantize",
        choices=CODES,
        help="random weights as integers with a scale for every group of inputs; for others "
        "give a model that `hpcinfer convert --quantize` has made",
    ),
    BenchOption(
        "--group",
        type=int,
        choices=GROUPS,
        help="inputs that share a scale, with --quantize (default 32)",
    ),
]
_STEP = number("step-tokens", 2048, "tokens of one step at most")
_MODEL = [*_RANDOM, _LAYOUT, _STEP]

BENCHES = {
    "attention": BenchCommand(
        "prefill attention: one rank against the ring over all ranks",
        "Causal attention of one sequence by one rank, and by ring attention over all "
        "ranks for each cut: speed-up, balance, and the share of the exchange hidden behind the "
        "computation.",
        [
            BenchOption(
                "--tokens", type=common.positive, default=32768, metavar="N", help="default 32768"
            ),
            BenchOption(
                "--cuts",
                type=cuts,
                default="zigzag,block-cyclic,contiguous",
                metavar="NAMES",
                help="contiguous, striped, zigzag, block-cyclic (default: all but striped)",
            ),
            *_SHAPE,
        ],
    ),
    "decode-attention": BenchCommand(
        "decode attention over a cut cache: ring, gather, tree",
        "Attention of one query per sequence to a cache that is cut over the ranks, "
        "completed by a ring, a gather, a tree of two Allreduces, and one of a single Allreduce.",
        [
            number("cached", "32768,131072", "tokens in the cache of all sequences"),
            number("queries", "1,8", "sequences that share the cache, with a query each"),
            *_SHAPE,
        ],
    ),
    "extract": BenchCommand(
        "writing activations beside plain sequential writes",
        "The parts that `hpcinfer extract` writes, with checksums, beside plain "
        "sequential writes of as many bytes, by all ranks at a time.",
        [
            BenchOption(
                "--folder", default=".", help="where to write; nothing is left there (default .)"
            ),
            number("width", 1024, "columns of a dataset"),
            number("layers", 8, "datasets"),
            number("tokens", 512, "rows of a step"),
            number("steps", 64, "steps"),
            _REPEAT,
            BenchOption(
                "--store", choices=common.DTYPES, default="float32", help="type of what is written"
            ),
        ],
    ),
    "sequence": BenchCommand(
        "sequence parallelism beside tensor parallelism",
        "FFN halves with norm and residual, by one rank, with tensor parallelism, and "
        "with tokens cut between the halves: activations held, bytes sent, time.",
        [number("tokens", 1024, "tokens of a step"), number("layers", 4, "layers"), *_FFN],
    ),
    "zero": BenchCommand(
        "parameters kept in parts, gathered or broadcast, ahead or when used",
        "FFN halves on tokens of every rank's own, with parameters kept whole and "
        "in parts: share of the gathering that the computation hides, bytes of parameters held.",
        [number("tokens", 512, "tokens of every rank"), number("layers", 8, "layers"), *_FFN],
    ),
    "pipeline": BenchCommand(
        "share of the time that the stages of a pipeline wait",
        "Micro-batches through stages of equal work, one on each rank: time that the "
        "ranks wait in receives, beside (P-1)/(m+P-1).",
        [
            number("tokens", 128, "tokens of a micro-batch"),
            number("layers", 2, "layers of a stage"),
            *_FFN,
            number("micro", "1,2,4,8", "numbers of micro-batches"),
            _WORK,
        ],
    ),
    "expert": BenchCommand(
        "dispatch and combine of a mixture of experts, and the balance of the ranks",
        "Tokens of every rank to experts on all ranks and back, for even and for "
        "skewed routing: exchange beside the copy limit of the machine, balance of the ranks.",
        [
            number("tokens", 512, "tokens of every rank"),
            number("experts", 16, "experts"),
            number("top", 2, "experts that a token chooses"),
            number("width", 768, "width of the model"),
            number("ffn", 512, "columns of an expert"),
            _REPEAT,
            BenchOption(
                "--zipf",
                type=exponents,
                default="0,1",
                metavar="S,...",
                help="chance of expert e falls as 1/(e+1)^S, 0 for even routing (default 0,1)",
            ),
        ],
    ),
    "disagg": BenchCommand(
        "attention and FFN on different ranks: share of the time that each side waits",
        "Layers on A attention ranks and F FFN ranks, in one or more micro-batches: "
        "time that the ranks of each side wait in receives. Needs 2 ranks.",
        [
            number("tokens", 512, "tokens of a step"),
            number("layers", 4, "layers"),
            number("heads", 12, "heads"),
            *_FFN,
            BenchOption("--split", type=split, metavar="A:F", help="default: half the ranks"),
            BenchOption(
                "--context",
                type=common.positive,
                metavar="N",
                help="cached tokens (default: as many as make attention take the time of the FFN)",
            ),
            number("micro", "1,2,3", "numbers of micro-batches"),
            _WORK,
        ],
    ),
    "decode": BenchCommand(
        "decoding of a model beside the machine's memory bandwidth and matrix products",
        "Tokens per second of decoding, by the engine's own steps, for every number of "
        "sequences at every context. The cache is filled with random keys and values in the place "
        "of a prompt's. Beside it the limit: every weight read once a step and the cache of all "
        "sequences, or the products, whichever takes longer.",
        [
            *_MODEL,
            number("batch", "1,8,32", "sequences that are decoded together"),
            number("context", "512,4096", "tokens of each"),
            _REPEAT,
            _NEW,
            BenchOption(
                "--sweep",
                action="store_true",
                help="1 to 256 sequences at contexts of 1024 to 131072 tokens, for a picture of "
                "the cost of a step; cases whose cache does not fit are left out",
            ),
        ],
        loads_model=True,
    ),
    "prefill": BenchCommand(
        "prompts of a model beside the machine's matrix products",
        "Prompt tokens per second, by the engine's own steps, for every number of "
        "prompts of every length. Beside it the limit: the matrix products of all tokens.",
        [
            *_MODEL,
            number("batch", "1", "prompts that are computed together"),
            number("context", "512,4096", "tokens of each"),
            _REPEAT,
        ],
        loads_model=True,
    ),
    "load": BenchCommand(
        "loading a model beside plain reading of its files, and the time to the first token",
        "Opening a model and reading every rank's shard, beside plain reading of as "
        "many bytes by all ranks; and the time from the start of the process to the first token.",
        [
            BenchOption("model", metavar="MODEL", help="Hugging Face directory or converted .h5"),
            _LAYOUT,
            BenchOption(
                "--dtype",
                choices=common.DTYPES,
                help="of weights and cache (default as the model says)",
            ),
            _STEP,
            _REPEAT,
            BenchOption(
                "--cold",
                action="store_true",
                help="drop the files from the page cache before each reading",
            ),
        ],
        loads_model=True,
    ),
    "scaling": BenchCommand(
        "decoding by 1 rank to all: speed-up and efficiency",
        "Decoding by growing numbers of ranks in one job: the same sequences on all "
        "ranks, cut in tp (strong), and as many more sequences as ranks (weak).",
        [
            *_RANDOM,
            _STEP,
            BenchOption(
                "--ranks",
                type=numbers,
                metavar="N,...",
                help="numbers of ranks (default: 1 to all)",
            ),
            BenchOption(
                "--weak",
                choices=("dp", "tp"),
                default="dp",
                help="in weak scaling, ranks are replicas (dp) or cut the model (tp) (default dp)",
            ),
            number("batch", 1, "sequences, of each rank in weak scaling"),
            number("context", 512, "tokens of each"),
            _NEW,
            _REPEAT,
        ],
        loads_model=True,
    ),
    "collectives": BenchCommand(
        "collectives by message size beside the copying that the node can do",
        "Latency and bytes per second of the collectives that the program calls, and "
        "of an Allreduce through memory that the ranks share, beside the copy limit of the node.",
        [
            BenchOption(
                "--sizes",
                type=sizes,
                default="4KiB,64KiB,1MiB,16MiB,64MiB",
                metavar="SIZE,...",
                help="bytes of the whole array, such as 4KiB or 1MB (default "
                "4KiB,64KiB,1MiB,16MiB,64MiB)",
            ),
            _REPEAT,
        ],
    ),
}
