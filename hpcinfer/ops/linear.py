"""Matrix products of activations with weights stored (out, in)."""

from hpcinfer import array
from hpcinfer.ops.fastest import fastest

# Rows of a 16-bit weight that are widened at a time, in bytes of float32.
_BLOCK_BYTES = 8 << 20


@fastest
def linear(x, weight, bias=None):
    """x · weightᵀ + bias, accumulated in float32.

    A 16-bit weight meets an x rounded to the same type, as matrix units compute it, and every
    product is summed in float32.

    Parameters
    ----------
    x : (T, I) float32
    weight : (O, I) float32, float16 or bfloat16
    bias : (O,) float32, or None

    Returns
    -------
    (T, O) float32
    """
    if weight.dtype == x.dtype:
        y = x @ weight.T
    else:
        y = _widened(array.widen(array.narrow(x, weight.dtype)), weight)
    if bias is not None:
        y += bias
    return y


def _widened(x, weight):
    """x · weightᵀ with the weight widened in blocks of rows that stay in cache."""
    xp = array.namespace(x)
    n_out, n_in = weight.shape
    y = xp.empty((x.shape[0], n_out), xp.float32)
    rows = max(1, _BLOCK_BYTES // (4 * max(1, n_in)))
    for start in range(0, n_out, rows):
        y[:, start : start + rows] = x @ array.widen(weight[start : start + rows]).T
    return y
