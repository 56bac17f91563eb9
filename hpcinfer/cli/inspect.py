"""hpcinfer inspect FILE: what is in a model or in a file of results."""

from hpcinfer.grid import launcher_rank


def add(commands):
    """The command's parser."""
    parser = commands.add_parser("inspect", help="show what is in a model or a file of results")
    parser.add_argument("file", metavar="FILE", help="model directory, model .h5 or results .h5")
    return parser


def run(arguments):
    """Run the command, on the first rank alone."""
    if launcher_rank() == 0:
        from hpcinfer.io.inspect import describe

        print(describe(arguments.file))
