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
from hpcinfer.io.checkpoint import Checkpoint, TensorInfo
from hpcinfer.model.families import read_architecture
from hpcinfer.model.weights import table

_NUMBERS = 1048573
_SCALE = 0.02
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
    """

    def __init__(self, path, dtype):
        path = os.fspath(path)
        if os.path.isdir(path):
            path = os.path.join(path, "config.json")
        text = metadata.read_text(path)
        if text is None:
            raise ValueError(f"checkpoint: got {path}, need an existing config.json")
        config = metadata.parse_object(text, path)
        tensors, self._keys = {}, {}
        for row in table(read_architecture(config)):
            nbytes = int(np.prod(row.shape)) * dtype.itemsize
            tensors[row.name] = TensorInfo(row.name, row.shape, dtype, nbytes, path, 0)
            self._keys[row.name] = row.key
        documents = metadata.Metadata(config, {}, {}, {}, None, None)
        super().__init__(path, "random", documents, tensors)

    def __fspath__(self):
        return self.path

    def _read_block(self, info, start, block):
        """Fill `block`; the same block of a tensor is always the same."""
        xs = _few(info.dtype, self._keys[info.name] in _NORMS)
        place, flat = zlib.crc32(repr((info.name, start)).encode()) % len(xs), block.reshape(-1)
        done = 0
        while done < len(flat):
            part = xs[place : place + len(flat) - done]
            flat[done : done + len(part)] = part
            done, place = done + len(part), 0


@cache
def _few(dtype, norm):
    """Random numbers near 0, or near 1 for norms: (_NUMBERS,)."""
    x = np.random.default_rng(0).standard_normal(_NUMBERS, np.float32) * np.float32(_SCALE)
    return array.narrow(x + np.float32(1) if norm else x, dtype)
