"""The command `hpcinfer`, which is `python -m hpcinfer` too."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Import the command line and run it; a Ctrl-C meanwhile ends the process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hpcinfer.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
