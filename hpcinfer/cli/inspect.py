"""hpcinfer inspect FILE: what is in a model, or in a file of results or activations."""

from hpcinfer.grid import launcher_rank


def add(commands):
    """The command's parser."""
    parser = commands.add_parser("inspect", help="show what is in a model or an output")
    parser.add_argument("file", metavar="FILE", help="model directory, or .h5 of any command")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all weights of a model or all activations, and refuse wrong checksums, and in "
        "weights NaN and infinity",
    )
    return parser


def run(arguments):
    """Run the command, on the first rank alone."""
    if launcher_rank() == 0:
        from hpcinfer.io.inspect import describe

        print(describe(arguments.file, arguments.check))
