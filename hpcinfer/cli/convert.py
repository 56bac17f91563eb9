"""hpcinfer convert SOURCE OUT.h5: a Hugging Face directory as one HDF5 file."""

from contextlib import ExitStack

from hpcinfer.grid import launcher_rank


def add(commands):
    """The command's parser."""
    parser = commands.add_parser(
        "convert",
        help="turn a Hugging Face directory into one .h5 file",
        description="Write weights, config, tokenizer and chat template into one HDF5 file with "
        "checksums. Streams: memory does not grow with the model.",
    )
    parser.add_argument("source", metavar="SOURCE", help="Hugging Face directory")
    parser.add_argument("target", metavar="OUT.h5")
    return parser


def run(arguments):
    """Run the command, on the first rank alone."""
    if launcher_rank() != 0:
        return
    from tqdm import tqdm

    from hpcinfer.io.convert import convert

    with ExitStack() as stack:
        bars = []

        def progress(done_bytes, total_bytes):
            if not bars:
                options = {"desc": "convert", "unit": "B", "unit_scale": True}
                bars.append(stack.enter_context(tqdm(total=total_bytes, **options)))
            bars[0].update(done_bytes - bars[0].n)

        summary = convert(arguments.source, arguments.target, progress)
    print(
        f"{arguments.target}: {summary.tensors} tensors, {summary.bytes / 1e6:.1f} MB in "
        f"{summary.time_s:.2f} s"
    )
