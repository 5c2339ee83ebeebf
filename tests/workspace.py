"""What the library asks for beside the arrays of a call, by its own workspace query."""

import ctypes as c

import numpy as np
from test_c_abi import LIBRARY, Inputs, Options, tensor


def backward_workspace(heads, T, K, V, dtype):
    """Bytes that gradients of the delta rule take beside arrays, and bytes of all those arrays."""
    H = max(heads)
    arrays = {name: np.zeros((1, 1, h, n), dtype) for name, h, n in zip("qkv", heads, (K, K, V), strict=True)}
    arrays["beta"] = np.zeros((1, 1, H), dtype)
    tensors = {name: tensor(np.broadcast_to(x, (1, T, *x.shape[2:]))) for name, x in arrays.items()}
    inputs = Inputs(c.sizeof(Inputs), **{name: c.pointer(x) for name, x in tensors.items()})
    needed = c.c_size_t()
    query = c.CDLL(str(LIBRARY)).fwp_delta_bwd_workspace
    assert query(c.byref(Options(c.sizeof(Options), 1.0)), c.byref(inputs), c.byref(needed)) == 0
    with_gradients = 2 * T * sum(x.nbytes for x in arrays.values())
    return needed.value, with_gradients + 2 * T * H * V * np.dtype(dtype).itemsize  # o and do
