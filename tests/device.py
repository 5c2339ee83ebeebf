"""Arrays of made-up frameworks on the emulator's CUDA device, whose memory is the host's, NumPy's here."""

import ctypes

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from producers import BFLOAT, CUDA, FLOAT, INT, UINT, Deleter, Producer, Tensor, Versioned, new_capsule, read

DEVICE = (CUDA, 0)
STREAM = 0x5EED  # that the work of the frameworks is put on, where they have a say


def memory(tensor, owner):
    """The NumPy array over the memory of a DLTensor, which this owner keeps."""
    dtypes = {INT: f"i{tensor.bits // 8}", UINT: f"u{tensor.bits // 8}", FLOAT: f"f{tensor.bits // 8}"}
    dtype = np.dtype(ml_dtypes.bfloat16 if tensor.code == BFLOAT else dtypes[tensor.code])
    shape = tensor.shape[: tensor.ndim]
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = [dtype.itemsize * stride for stride in tensor.strides[: tensor.ndim]]
    size = dtype.itemsize + sum(stride * (n - 1) for n, stride in zip(shape, strides, strict=True))
    data = (ctypes.c_uint8 * size).from_address(tensor.data + tensor.byte_offset)
    data.owner = owner
    return as_strided(np.frombuffer(data, dtype, 1), shape, strides)


class _Array(Producer):
    def __init__(self, x, **fields):
        super().__init__(x, **{"device": DEVICE, **fields})
        self.shape, self.dtype = x.shape, x.dtype

    def __setitem__(self, place, value):
        self.x[place] = value.x


class DeviceArray(_Array):
    """An array that speaks DLPack, and whose namespace takes arrays over."""

    def __init__(self, x, **fields):
        super().__init__(x, **fields)
        self.streams = []  # that consumers have asked for

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.streams.append(stream)
        return super().__dlpack__()

    def __array_namespace__(self):
        return Namespace


class Namespace:
    """What an array API namespace offers that the library calls."""

    @staticmethod
    def from_dlpack(x):
        assert x.__dlpack_device__() == DEVICE
        capsule = x.__dlpack__(stream=STREAM, max_version=(1, 0))
        return DeviceArray(memory(read(capsule).tensor, capsule))

    @staticmethod
    def asarray(x, copy):
        assert copy
        return DeviceArray(x.x.copy(order="C"))


class Exchange(ctypes.Structure):
    """The C exchange API."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", ctypes.c_void_p),
        ("object_from_managed", ctypes.c_void_p),
        ("borrow_from_object", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    )


_ADDRESS = ctypes.POINTER(ctypes.c_void_p)
_alive = {}  # managed tensors by address, and what they keep


def _managed(x, keeps):
    managed = Versioned()
    managed.version[:] = (1, 3)
    managed.tensor = keeps.tensor()
    managed.deleter = _forget
    _alive[ctypes.addressof(managed)] = managed, keeps
    return ctypes.addressof(managed)


@Deleter
def _forget(address):
    del _alive[address]


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Tensor), _ADDRESS, ctypes.c_void_p, ctypes.c_void_p)
def _allocate(prototype, out, context, set_error):
    tensor = prototype.contents
    dtype = np.dtype(f"u{tensor.bits // 8}")
    compact = np.full(tensor.shape[: tensor.ndim], np.iinfo(dtype).max, dtype)  # NaN, of floats
    made = ExchangeArray(compact, code=tensor.code, device=tuple(tensor.device))
    ExchangeArray.allocated.append(made)
    out[0] = _managed(compact, made)
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, _ADDRESS)
def _managed_from_object(x, out):
    out[0] = _managed(x.x, x)
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Versioned), _ADDRESS)
def _object_from_managed(managed, out):
    tensor = managed.contents.tensor
    owner = _alive.pop(ctypes.addressof(managed.contents))
    made = ExchangeArray(memory(tensor, owner), device=tuple(tensor.device))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    out[0] = id(made)
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
def _borrow_from_object(x, out):
    out[0] = x.tensor()
    return 0


@ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, _ADDRESS)
def _current_work_stream(kind, number, out):
    ExchangeArray.asked.append((kind, number))
    out[0] = STREAM
    return 0


_functions = (
    _allocate,
    _managed_from_object,
    _object_from_managed,
    _borrow_from_object,
    _current_work_stream,
)
_NAME = b"dlpack_exchange_api"  # which capsules do not copy
_exchange = Exchange((1, 3), None, *(ctypes.cast(function, ctypes.c_void_p) for function in _functions))


class ExchangeArray(_Array):
    """An array of a framework with the C exchange API, which works as torch does."""

    __dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(_exchange), _NAME, None)
    allocated, asked = [], []  # arrays that were made for others, devices whose stream was asked for

    def __dlpack__(self, **keywords):
        raise AssertionError("the exchange API is there")

    def contiguous(self):
        return self if self.x.flags.c_contiguous else ExchangeArray(self.x.copy(order="C"))

    def clone(self):
        return ExchangeArray(self.x.copy())
