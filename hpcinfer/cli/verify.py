"""hpcinfer verify: every strategy against one rank, and its bytes against its formula."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from hpcinfer.cli import common
from hpcinfer.errors import agreed


def add(commands: _SubParsersAction) -> ArgumentParser:
    """The command's parser."""
    parser = commands.add_parser(
        "verify",
        help="hold every strategy to one rank's answer and to its cost formula",
        description="Run every strategy on random data over the ranks at hand, and compare its "
        "result with the definition on one rank and its bytes with its formula. Bytes are those "
        "that all ranks send together. A * marks a teaching form: the engine runs another one, "
        "which docs/layouts.md names. Exit code 0 only if every row is as it must be.",
    )
    parser.add_argument(
        "--seed", type=common.seed, default=0, help="of the random data (default 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the table as a JSON list too")
    common.add_overwrite_option(parser)
    common.add_device_option(parser)
    common.add_watch_options(parser)
    return parser


def run(arguments: Namespace) -> None:
    """Run the command."""
    from hpcinfer import verify
    from hpcinfer.grid import agree
    from hpcinfer.io.rows import text_table, write_json
    from hpcinfer.job.watchdog import Watchdog
    from hpcinfer.launcher import world

    # Try every row, on all ranks.
    comm = world()
    common.claim_reports(comm, arguments)
    with Watchdog(comm, arguments.hang_timeout):
        device = common.device_of(comm, arguments)
        outcomes = verify.run(comm, verify.ROWS, arguments.seed, device.put)
    tried = [outcome for outcome in outcomes if outcome.tried]
    failed = [outcome.row.name for outcome in tried if not outcome.passed]

    # Show the table, and what went wrong.
    if comm.rank == 0:
        print(f"verify: {comm.size} ranks on {device.name}, seed {arguments.seed}, float32")
        print(text_table(verify.HEADINGS, [outcome.cells() for outcome in outcomes]))
        print(*(f"{x.row.name}: {x.error}\n" for x in outcomes if x.error), sep="", end="")
        if not all(outcome.row.engine for outcome in outcomes):
            print("* a teaching form; docs/layouts.md says what the engine runs instead")
        rest = f", {len(outcomes) - len(tried)} need more ranks" if tried != outcomes else ""
        print(f"{len(tried) - len(failed)} of {len(tried)} rows are as they must be{rest}")
    if arguments.json:
        agree(comm, write_json, arguments.json, [outcome.facts() for outcome in outcomes])

    # End with an error if any row has failed.
    if failed:
        raise agreed(
            RuntimeError(
                f"verify: got {len(failed)} rows that fail, need none; see {'; '.join(failed)} in "
                "the table"
            )
        )
