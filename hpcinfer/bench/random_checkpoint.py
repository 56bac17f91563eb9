"""A checkpoint of random weights, made in memory for a config: any shape can be measured, no file.

It has the interface of `hpcinfer.io.checkpoint`, and fills what is asked for from one small block
of random numbers. The block's length is prime, so that the rows of a matrix differ.
"""

import os
import zlib
from functools import cache

import numpy as np

from hpcinfer import array
from hpcinfer.io import metadata
from hpcinfer.io.checkpoint import SCALES, Checkpoint, Coding, TensorInfo
from hpcinfer.model.families import read_architecture
from hpcinfer.model.weights.table import QUANTISED, table

_NUMBERS = 1048573
_SCALE = 0.02
_SCALES = np.dtype(np.float16)
_NORMS = frozenset(("norm1", "norm2", "final_norm", "q_norm", "k_norm", "kv_norm"))


def has_weights(path):
    """True unless `path` is a bare config.json, or a folder that holds one and no weights."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return not os.path.exists(os.path.join(path, "config.json")) or any(
            name.endswith((".safetensors", ".safetensors.index.json")) for name in os.listdir(path)
        )
    return not path.endswith(".json")


class RandomCheckpoint(Checkpoint):
    """Random weights of the model that a config describes.

    Parameters
    ----------
    path : config.json, or the folder that holds it
    dtype : element type of the weights
    bits, group : 4 or 8 for codes with a scale for so many inputs, in the matrices that `hpcinfer
        convert --quantize` makes such; None for none
    """

    def __init__(self, path, dtype, bits=None, group=32):
        # Read the config.
        path = os.fspath(path)
        if os.path.isdir(path):
            path = os.path.join(path, "config.json")
        text = metadata.read_text(path)
        if text is None:
            raise ValueError(f"checkpoint: got {path}, need an existing config.json")
        config = metadata.parse_object(text, path)
        if bits is not None:
            config |= {"tie_word_embeddings": False}

        # Name every tensor with its shape, and the scales of those that are quantised.
        tensors, self._values = {}, {}
        for row in table(read_architecture(config)):
            coding = None
            if bits is not None and row.key in QUANTISED:
                n_out, n_in = row.shape[:: -1 if row.transposed else 1]
                coding = Coding(bits, group, n_in)
                scales = _info(row.name + SCALES, (n_out, coding.row_scales), _SCALES, path)
                tensors[scales.name], self._values[scales.name] = scales, _step(bits)
            shape = row.shape if coding is None else (n_out, coding.row_bytes)
            of_row = dtype if coding is None else coding.dtype
            tensors[row.name] = _info(row.name, shape, of_row, path, coding)
            self._values[row.name] = 1.0 if row.key in _NORMS else 0.0
        documents = metadata.Metadata(config, {}, {}, {}, None, None)
        super().__init__(path, "random", documents, tensors)

    def __fspath__(self):
        return self.path

    def _read_block(self, info, start, block):
        """Fill `block`; the same block of a tensor is always the same."""
        xs = _few(info.dtype, self._values[info.name])
        place, flat = zlib.crc32(repr((info.name, start)).encode()) % len(xs), block.reshape(-1)
        done = 0
        while done < len(flat):
            part = xs[place : place + len(flat) - done]
            flat[done : done + len(part)] = part
            done, place = done + len(part), 0


def _info(name, shape, dtype, path, coding=None):
    """TensorInfo of a tensor that is in no file."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return TensorInfo(name, tuple(shape), dtype, nbytes, path, 0, coding=coding)


def _step(bits):
    """Scale by which codes of every value become numbers of the size of other weights."""
    return _SCALE * 12**0.5 / 2**bits


@cache
def _few(dtype, centre):
    """Random numbers about a centre, or codes of every value: (_NUMBERS,)."""
    rng = np.random.default_rng(0)
    if dtype.itemsize == 1:
        return rng.integers(0, 256, _NUMBERS, np.uint8).view(dtype)
    spread = np.float32(_SCALE * (centre or 1.0))
    return array.narrow(rng.standard_normal(_NUMBERS, np.float32) * spread + centre, dtype)
