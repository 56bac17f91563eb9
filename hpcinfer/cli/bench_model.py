"""hpcinfer bench decode, prefill: a loaded model beside the limit of the machine."""

from hpcinfer.cli import common

# What is measured with --sweep: one sequence to 256, contexts of 1k to 128k tokens.
_SWEEP = [1 << n for n in range(9)], [1 << n for n in (10, 12, 14, 16, 17)]


def add(names):
    """The parsers of these benches."""
    _add_decode(names)
    _add_prefill(names)


def numbers(text):
    """Whole numbers of 1 or more, separated by commas."""
    return [common.positive(item.strip()) for item in text.split(",")]


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
    _add_steps(parser)
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


def _add_model(parser, batch, context, what):
    """Options of every bench that loads a model."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hugging Face directory, converted .h5, or config.json (or a folder with nothing "
        "else), whose weights are then random and made in memory",
    )
    for name, default, help_text in (
        ("batch", batch, what),
        ("context", context, "tokens of each"),
    ):
        parser.add_argument(
            f"--{name}", type=numbers, default=default, metavar="N,...",
            help=f"{help_text} (default {default})",
        )  # fmt: skip
    parser.add_argument("--layout", metavar="AXES", help='such as "tp=2"; default: all ranks in tp')
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of weights and cache (default bfloat16)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="cpu")
    parser.add_argument(
        "--kernels",
        choices=("auto", "plain"),
        default="auto",
        help="the fast forms of functions where there are any, or the plain ones (default auto)",
    )
    parser.add_argument(
        "--step-tokens", type=common.positive, default=2048, metavar="N",
        help="tokens of one step at most (default 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--repeat", type=common.positive, default=5, metavar="N",
        help="repetitions; the median counts (default 5)",
    )  # fmt: skip


def _add_steps(parser):
    parser.add_argument(
        "--new", type=common.positive, default=16, metavar="N",
        help="steps of a repetition (default 16)",
    )  # fmt: skip


def _decode(comm, arguments):
    from hpcinfer.bench import decode

    batches, contexts = _SWEEP if arguments.sweep else (arguments.batch, arguments.context)
    setting, new = _setting(arguments), arguments.new
    return decode.run(comm, setting, batches, contexts, new, arguments.repeat), decode.table


def _prefill(comm, arguments):
    from hpcinfer.bench import prefill

    rows = prefill.run(
        comm, _setting(arguments), arguments.batch, arguments.context, arguments.repeat
    )
    return rows, prefill.table


def _setting(arguments):
    """How the model is loaded."""
    from hpcinfer.bench.drive import Setting

    return Setting(
        arguments.model, arguments.layout, arguments.dtype, arguments.device,
        arguments.step_tokens, arguments.kernels,
    )  # fmt: skip
