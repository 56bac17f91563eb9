"""hpcinfer generate MODEL --input F --output F: answer prompts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from hpcinfer.cli import common
from hpcinfer.errors import UsageError

# Options that stand in for what a request leaves out: name, type, help.
_SAMPLING = (
    ("max_tokens", common.whole, "new tokens at most (default: the model's, else 16)"),
    ("min_tokens", common.whole, "new tokens at least (default: the model's, else 0)"),
    ("temperature", common.real, "0 is greedy (default: the model's, else 1)"),
    ("top_k", common.whole, "keep the k most probable; 0 is off (default: the model's, else 0)"),
    (
        "top_p",
        common.real,
        "keep the smallest set of this probability (default: the model's, else 1)",
    ),
    (
        "min_p",
        common.real,
        "keep this share of the largest and more (default: the model's, else 0)",
    ),
    ("repetition_penalty", common.real, "over all; 1 is off (default: the model's, else 1)"),
    ("presence_penalty", common.real, "over the answer; 0 is off (default 0)"),
    ("frequency_penalty", common.real, "over the answer; 0 is off (default 0)"),
    ("n", common.whole, "samples per prompt (default 1)"),
    (
        "logprobs",
        common.whole,
        "report log-probabilities of the chosen token and of this many others",
    ),
)


def add(commands: _SubParsersAction) -> ArgumentParser:
    """The command's parser."""
    parser = commands.add_parser(
        "generate",
        help="answer the prompts of a file",
        description="Answer the prompts of a file. Sampling options hold for requests that do not "
        "say otherwise; what neither says comes from the model's generation_config.json.",
    )
    common.add_model_options(parser)
    common.add_kv_option(parser)

    # Add the options that stand in for what a request leaves out.
    group = parser.add_argument_group("sampling")
    for name, kind, text in _SAMPLING:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text, metavar="X")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; repeatable")
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="generate past the end-of-text token",
    )
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from hpcinfer.job.start import run_job

    sampling = {name: getattr(arguments, name) for name, _, _ in _SAMPLING}
    sampling["stop"] = tuple(arguments.stop) if arguments.stop else None
    sampling["ignore_eos"] = arguments.ignore_eos
    _check(sampling)
    run_job(common.settings_of("generate", arguments, sampling=sampling))


def _check(sampling: dict) -> None:
    """Refuse options out of range before a model is loaded, whose config may know more tokens."""
    from hpcinfer.requests.sampling import Sampling

    given = {name: value for name, value in sampling.items() if value is not None}
    try:
        Sampling(**{"max_tokens": 2**31 - 1} | given)
    except ValueError as error:
        raise UsageError(str(error)) from None
