"""hpcinfer score MODEL --input F --output F: log-probabilities of given texts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from hpcinfer.cli import common


def add(commands: _SubParsersAction) -> ArgumentParser:
    """The command's parser."""
    parser = commands.add_parser(
        "score",
        help="log-probabilities and perplexity of the texts of a file",
        description="Log-probability of every token of every text, given the tokens before it.",
    )
    common.add_model_options(parser)
    common.add_kv_option(parser)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from hpcinfer.job.start import run_job

    run_job(common.settings_of("score", arguments))
