"""Arrays in memory that betrays wrong addresses: between forbidden pages, and spread over huge offsets."""

import ctypes
import mmap

import numpy as np
from numpy.lib.stride_tricks import as_strided

# In the mmap module from Python 3.11 on; the number is the same on x86-64 and aarch64.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_PROT_NONE = 0


def guarded(x, side):
    """A copy whose first (side "front") or last ("back") byte touches a page that must not be touched."""
    if x.size == 0:
        return x.copy()
    page = mmap.PAGESIZE
    body = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, body + 2 * page)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + page + body):
        if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = page if side == "front" else page + body - x.nbytes
    copy = np.frombuffer(memory, x.dtype, x.size, offset).reshape(x.shape)
    copy[...] = x
    return copy


def peak():
    """The most bytes that this program has held; getrusage counts the one that started it as well."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def spread(x, axis, stride):
    """A copy with a stride of so many elements on one axis, in memory that is reserved but hardly used.

    A negative stride walks backward. Raises OSError where the system does not reserve without backing.
    """
    if x.size == 0:
        return x.copy()
    strides = [0] * x.ndim
    extent = 1
    for other in reversed([i for i in range(x.ndim) if i != axis]):
        strides[other] = extent * x.itemsize
        extent *= x.shape[other]
    assert abs(stride) >= extent
    strides[axis] = abs(stride) * x.itemsize
    elements = (x.shape[axis] - 1) * abs(stride) + extent
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    memory = mmap.mmap(-1, elements * x.itemsize, flags=flags)
    copy = as_strided(np.frombuffer(memory, x.dtype), x.shape, strides)
    if stride < 0:
        copy = np.flip(copy, axis)
    copy[...] = x
    return copy
