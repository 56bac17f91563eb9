"""Which tensors of a model become codes in a quantised file.

Each step of decoding reads the matrices of all layers and the head, so these are quantised. The
embedding is read by row and stays; a head that is tied to it becomes a tensor of its own, and the
config of the new file says so.
"""

from functools import partial

from hpcinfer.io.convert import Coded, Recoding
from hpcinfer.model.families import read_architecture
from hpcinfer.model.weights.check import check
from hpcinfer.model.weights.table import QUANTISED, find, table
from hpcinfer.ops import quantize


def recoding(checkpoint, bits, group):
    """What to quantise of a checkpoint.

    Parameters
    ----------
    checkpoint : open Checkpoint
    bits : 4 or 8
    group : inputs that share a scale

    Returns
    -------
    Recoding

    Raises
    ------
    ValueError
        If it is no model that this program knows whole, or is quantised already.
    """
    arch, tensors = read_architecture(checkpoint.config), checkpoint.tensors
    done = [info.name for info in tensors.values() if info.coding is not None]
    if done:
        raise ValueError(
            f"convert: got {checkpoint.path} with {done[0]} quantised already, need float32, "
            "float16 or bfloat16 weights; quantise the model it came from"
        )
    names = check(arch, tensors)
    coded = {
        names[row.name]: Coded(names[row.name], row.transposed)
        for row in table(arch)
        if row.key in QUANTISED
    }
    copied, config = {}, {}
    if arch.tied:
        # The file may hold the head under its own name, beside the embedding or in its place.
        embed, head = names[arch.names["embed"]], arch.names["head"]
        head = find(head, tensors) or head
        coded[head] = Coded(head if head in tensors else embed, False)
        copied = {arch.names["embed"]: embed} if embed == head else {}
        config = {"tie_word_embeddings": False, "untied_by_quantisation": True}
    return Recoding(coded, copied, config, bits, group, partial(_encode, bits, group))


def _encode(bits, group, weight):
    codes, scales = quantize.quantize(weight, bits, group)
    return quantize.to_bytes(codes, bits), scales
