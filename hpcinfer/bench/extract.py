"""Writing activations to the parts of an output, beside plain sequential writes of as many bytes.

Every rank writes its columns of the same rows, dataset after dataset and step after step, as
`hpcinfer extract` does, with checksums and the room that is given back; beside it the same blocks
to one file. Both end when the bytes are on the disk. From a GPU the parts are brought to the host
step by step, the plain blocks once, before.
"""

import os
from contextlib import suppress
from functools import partial
from statistics import median

import numpy as np

from hpcinfer import array, partition
from hpcinfer.bench import measure
from hpcinfer.bench.table import BenchColumn, percent, text_of
from hpcinfer.grid import agree_all
from hpcinfer.io.atomic import open_own, writing
from hpcinfer.io.parts import ColumnShare, Field, PartFiles, clear_parts, parts_folder

COLUMNS = (
    BenchColumn("writes", "writes"),
    BenchColumn("bytes", "bytes"),
    BenchColumn("s", "time_s", ".3f"),
    BenchColumn("MB/s", "byte_per_s", ".0f", 1e-6),
    percent("of plain %", "share_of_limit"),
)

_ANEW = os.O_WRONLY | os.O_TRUNC


def run(comm, device, folder, width, layers, tokens, steps, store, repeat):
    """Measure both.

    Parameters
    ----------
    device : array.Device of this rank
    folder : where to write; nothing is left there
    width : columns of a dataset, cut over the ranks
    layers : datasets
    tokens, steps : rows of a step, and how many steps
    store : element type on disk, by name
    repeat : repetitions, of which the median counts

    Returns
    -------
    list of rows, the same on every rank
    """
    path = os.path.join(folder, f"bench-{comm.bcast(os.getpid())}.h5")
    own, dtype = partition.block(width, comm.size)[comm.rank], array.parse_dtype(store)
    fields = [Field(f"residual/{n}", (width,), dtype, ("features",), "") for n in range(layers)]
    rng = np.random.default_rng(comm.rank)
    block = rng.normal(size=(tokens, own[1] - own[0])).astype(np.float32)
    block = device.put(array.narrow(block, dtype))
    shares = [ColumnShare(field, *own) for field in fields] if block.size else []

    def parts():
        writer = PartFiles(path, 1, 0, comm.rank, shares)
        for _ in range(steps):
            for share in shares:
                writer.append(share.field.name, array.host(block))
        writer.close()

    # Take turns, so that what else the disk does counts for both.
    plain = partial(_plain, f"{path}-{comm.rank}", array.host(block), steps * len(shares))
    agree_all(comm, partial(_make, parts_folder(path)))
    times_s = _timed(comm, path, {"plain": plain, "parts": parts}, repeat)

    facts = {
        "dtype": store,
        "device": device.name,
        "width": width,
        "layers": layers,
        "tokens": tokens * steps,
        "ranks": comm.size,
        "bytes": tokens * steps * layers * width * dtype.itemsize,
    }
    limit_s = median(times_s["plain"])
    return [_row(name, facts, median(times_s[name]), limit_s) for name in ("plain", "parts")]


def _timed(comm, path, ways, repeat):
    """Seconds of every turn of every way of writing; nothing is left on the disk."""
    times_s = {name: [] for name in ways}
    try:
        for _ in range(repeat):
            for name, function in ways.items():
                times_s[name].append(measure.together_s(comm, function))
                _remove(path, [comm.rank])
        comm.Barrier()
    finally:
        # After an error the others may be at anything, so that no rank waits for them.
        _remove(path, range(comm.size))
        with suppress(OSError):
            os.rmdir(parts_folder(path))
    return times_s


def _row(name, facts, time_s, limit_s):
    """Row of one way of writing."""
    return {
        "bench": "extract",
        "writes": name,
        **facts,
        "time_s": time_s,
        "byte_per_s": facts["bytes"] / time_s,
        "share_of_limit": limit_s / time_s,
    }


def table(rows):
    """The rows as text."""
    first = rows[0]
    head = (
        f"extract: {first['tokens']} tokens, {first['layers']} datasets of {first['width']} "
        f"columns in {first['dtype']}, by {first['ranks']} ranks "
        f"from device {first['device']}, brought to the disk\n"
    )
    return text_of(head, COLUMNS, rows)


def _plain(path, block, n):
    """Write a block n times to a new file, to the disk."""
    data = memoryview(block.view(np.uint8)).cast("B") if block.size else b""
    with writing(path), os.fdopen(open_own(path, _ANEW), "wb", buffering=0) as file:
        for _ in range(n):
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        os.fsync(file.fileno())


def _make(folder):
    with writing(folder):
        os.makedirs(folder, exist_ok=True)


def _remove(path, ranks):
    """Remove what some ranks have written."""
    for rank in ranks:
        with suppress(FileNotFoundError):
            os.unlink(f"{path}-{rank}")
    clear_parts(path, ranks)
