"""Loading a model: opening it, reading every rank's shard, and the time to the first token.

Beside it plain reading of the files, by all ranks at a time, each its part, in large blocks to
memory that is at hand already. Both take turns in every repetition, with the files in the page
cache, or dropped from it before each turn.
"""

import gc
import os
import time
from statistics import median

from hpcinfer import partition
from hpcinfer.bench import decode, measure
from hpcinfer.bench.drive import Bench
from hpcinfer.bench.random_checkpoint import has_weights
from hpcinfer.bench.table import BenchColumn, percent, text_of
from hpcinfer.errors import UsageError
from hpcinfer.grid import agree_all
from hpcinfer.io.checkpoint import BLOCK_BYTES
from hpcinfer.io.models import open_checkpoint

_PROMPT = 16  # tokens before the first one that is generated


COLUMNS = (
    BenchColumn("reads", "reads"),
    BenchColumn("bytes", "bytes"),
    BenchColumn("s", "time_s", ".3f"),
    BenchColumn("GB/s", "byte_per_s", ".2f", 1e-9),
    percent("of plain %", "share_of_limit"),
)


def run(comm, setting, repeat, cold=False):
    """Measure loading.

    Parameters
    ----------
    setting : drive.Setting of a model with weights
    repeat : repetitions, of which the median counts
    cold : True to drop the files from the page cache before each reading

    Returns
    -------
    list of rows, the same on every rank
    """
    if not has_weights(setting.model):
        raise UsageError(f"bench: got {setting.model} without weights, need a model to load")

    # Time the first token, then reading and loading in turns.
    files, open_s = agree_all(comm, lambda: _files(setting.model))
    first_token_s, facts = _first_token(comm, setting, cold, files)
    spent = {"plain": [], "load": []}
    for _ in range(repeat):
        _prepare(comm, files, cold)
        spent["plain"].append(measure.together_s(comm, lambda: _read(comm, files)))
        _prepare(comm, files, cold)
        bench = Bench(comm, setting, 1, _PROMPT + 2)
        spent["load"].append(max(comm.allgather(bench.load_s)))
        read_bytes = sum(comm.allgather(bench.bytes_read))
        del bench
        gc.collect()

    # Plain reading of as many bytes is the limit.
    nbytes = {"plain": sum(files.values()), "load": read_bytes}
    limit = nbytes["plain"] / median(spent["plain"])
    return [
        {
            "bench": "load",
            **facts,
            "reads": name,
            "cold": cold,
            "bytes": nbytes[name],
            "time_s": median(spent[name]),
            "byte_per_s": nbytes[name] / median(spent[name]),
            "limit_byte_per_s": limit,
            "share_of_limit": nbytes[name] / median(spent[name]) / limit,
            "open_s": max(comm.allgather(open_s)),
            "first_token_s": first_token_s,
        }
        for name in ("plain", "load")
    ]


def table(rows):
    """The rows as text."""
    first = rows[0]
    head = (
        f"load: {first['model']}, {decode.model_words(first)}, {first['layout']} on "
        f"{first['device']}, files {'dropped from' if first['cold'] else 'in'} the page cache\n"
        f"opened in {1e3 * first['open_s']:.1f} ms; from the start of the process to the first "
        f"token {first['first_token_s']:.2f} s; weights of a rank "
        f"{first['weight_bytes'] / 1e6:.1f} MB, peak of all {first['peak_bytes'] / 1e6:.1f} MB\n"
    )
    return text_of(head, COLUMNS, rows)


def _files(path):
    """Size of every file of the weights, and the seconds that opening took."""
    start_s = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        open_s = time.perf_counter() - start_s
        names = sorted({info.file for info in checkpoint.tensors.values()})
    return {name: os.path.getsize(name) for name in names}, open_s


def _first_token(comm, setting, cold, files):
    """Seconds from the start of the slowest process to its first token; facts of the model."""
    import psutil

    _prepare(comm, files, cold)
    bench = Bench(comm, setting, 1, _PROMPT + 2)
    bench.allocate(bench.pages(1, _PROMPT + 1))
    bench.prefill(1, _PROMPT)
    facts = bench.facts()
    return max(comm.allgather(time.time() - psutil.Process().create_time())), facts


def _prepare(comm, files, cold):
    """Drop the files from the page cache, or have them in it."""
    if cold and comm.rank == 0:
        for name in files:
            with open(name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    comm.Barrier()


def _read(comm, files):
    """Read this rank's part of all files' bytes."""
    block = memoryview(bytearray(BLOCK_BYTES))
    start, stop = partition.block(sum(files.values()), comm.size)[comm.rank]
    begin = 0
    for name, size in files.items():
        at, end = max(start, begin) - begin, min(stop, begin + size) - begin
        begin += size
        if at >= end:
            continue
        with open(name, "rb", buffering=0) as file:
            while at < end:
                at += max(1, os.preadv(file.fileno(), [block[: end - at]], at))
