"""Call frames of XLA's foreign function interface, as the runtime of a CUDA device fills them."""

import ctypes as c

import ml_dtypes
import numpy as np

from fwp_core import _core

TYPES = {"bool": 1, "int32": 4, "int64": 5, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}


class Buffer(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("dtype", c.c_int),
        ("data", c.c_void_p),
        ("rank", c.c_int64),
        ("dims", c.POINTER(c.c_int64)),
    )


class Buffers(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("size", c.c_int64),
        ("kinds", c.POINTER(c.c_int)),
        ("buffers", c.POINTER(c.POINTER(Buffer))),
    )


class ByteSpan(c.Structure):
    _fields_ = (("data", c.c_char_p), ("size", c.c_size_t))


class Scalar(c.Structure):
    _fields_ = (("dtype", c.c_int), ("value", c.c_void_p))


class Attributes(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("size", c.c_int64),
        ("kinds", c.POINTER(c.c_int)),
        ("names", c.POINTER(c.POINTER(ByteSpan))),
        ("values", c.POINTER(c.c_void_p)),
    )


class ErrorArgs(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("message", c.c_char_p),
        ("code", c.c_int),
    )


class StreamArgs(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("context", c.c_void_p),
        ("stream", c.c_void_p),
    )


class AllocateArgs(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("context", c.c_void_p),
        ("size", c.c_size_t),
        ("alignment", c.c_size_t),
        ("data", c.c_void_p),
    )


class FreeArgs(c.Structure):
    _fields_ = (*AllocateArgs._fields_[:4], ("data", c.c_void_p))


class DeviceArgs(c.Structure):
    _fields_ = (*AllocateArgs._fields_[:3], ("device", c.c_int32))


class Api(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("version", c.c_size_t * 3),
        ("internal", c.c_void_p),
        *(
            (name, c.c_void_p)
            for name in ("error_create", "error_message", "error_destroy", "register", "stream")
        ),
        *((name, c.c_void_p) for name in ("type", "context", "state_set", "state_get", "allocate", "free")),
        *(
            (name, c.c_void_p)
            for name in ("schedule", "threads", "future", "available", "failed", "run", "device")
        ),
    )


class Frame(c.Structure):
    _fields_ = (
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("api", c.POINTER(Api)),
        ("context", c.c_void_p),
        ("stage", c.c_int),
        ("operands", Buffers),
        ("results", Buffers),
        ("attributes", Attributes),
    )


class Runtime:
    """Device 0, a stream, and memory that is misaligned as far as the interface allows."""

    def __init__(self, stream=0x5EED, device=0, out_of_memory=False, older=False):
        self.stream, self.device, self.out_of_memory = stream, device, out_of_memory
        self.memory, self.most, self.error = {}, 0, None
        functions = {
            "error_create": (self._error, ErrorArgs, c.c_void_p),
            "stream": (self._stream, StreamArgs, c.c_void_p),
            "allocate": (self._allocate, AllocateArgs, c.c_void_p),
            "free": (self._free, FreeArgs, c.c_void_p),
            "device": (self._device, DeviceArgs, c.c_void_p),
        }
        self.functions = {
            name: c.CFUNCTYPE(result, c.POINTER(arguments))(function)
            for name, (function, arguments, result) in functions.items()
        }
        pointers = {name: c.cast(function, c.c_void_p) for name, function in self.functions.items()}
        self.api = Api(**pointers)
        self.api.struct_size = Api.device.offset if older else c.sizeof(Api)

    def _error(self, args):
        self.error = args.contents.message.decode()
        return 1

    def _stream(self, args):
        args.contents.stream = self.stream

    def _device(self, args):
        args.contents.device = self.device

    def _allocate(self, args):
        assert args.contents.alignment <= 16
        if self.out_of_memory:
            self.error = "none left"
            return 1
        data = c.create_string_buffer(args.contents.size + 64)
        start = -c.addressof(data) % 64 + 16 + c.addressof(data)
        self.memory[start] = data, args.contents.size
        self.most = max(self.most, len(self.memory))
        args.contents.data = start
        return None

    def _free(self, args):
        assert self.memory.pop(args.contents.data)[1] == args.contents.size

    def call(self, name, operands, results, attributes):
        """Run a handler of ours; arrays by position. Returns its error's message, None without one."""
        frame = Frame(c.sizeof(Frame), None, c.pointer(self.api), None, 3)
        frame.operands, frame.results = _buffers(operands), _buffers(results)
        frame.attributes, scalars = _attributes(attributes)
        pointer = c.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
        handler = pointer(_core.xla_targets("CUDA")[f"fwp_core.{name}"], None)
        self.error = None
        failed = c.CFUNCTYPE(c.c_void_p, c.POINTER(Frame))(handler)(c.pointer(frame))
        del scalars  # not earlier
        assert bool(failed) == (self.error is not None)
        assert not self.memory, "scratch memory is given back"
        return self.error


def _buffers(arrays):
    buffers = (c.POINTER(Buffer) * len(arrays))()
    for i, x in enumerate(arrays):
        dims = (c.c_int64 * x.ndim)(*x.shape)
        dtype = "bfloat16" if x.dtype == ml_dtypes.bfloat16 else x.dtype.name
        buffer = Buffer(c.sizeof(Buffer), None, TYPES[dtype], x.ctypes.data, x.ndim, dims)
        buffers[i] = c.pointer(buffer)
    kinds = (c.c_int * len(arrays))(*[1] * len(arrays))
    return Buffers(c.sizeof(Buffers), None, len(arrays), kinds, buffers)


def _attributes(attributes):
    names = (c.POINTER(ByteSpan) * len(attributes))()
    values = (c.c_void_p * len(attributes))()
    scalars = []
    for i, (name, value) in enumerate(sorted(attributes.items())):
        number = np.asarray(value)
        names[i] = c.pointer(ByteSpan(name.encode(), len(name)))
        scalars.append((Scalar(TYPES[number.dtype.name], number.ctypes.data), number))
        values[i] = c.addressof(scalars[-1][0])
    kinds = (c.c_int * len(attributes))(*[3] * len(attributes))
    return Attributes(c.sizeof(Attributes), None, len(attributes), kinds, names, values), scalars
