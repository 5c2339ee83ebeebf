"""Arrays of frameworks that are made up: DLPack tensors as a test wants them, their deleters counted."""

import ctypes

import numpy as np

INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
READ_ONLY, IS_COPIED = 1, 2


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
)
capsule_name = ctypes.pythonapi.PyCapsule_GetName
capsule_name.restype, capsule_name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype = ctypes.c_void_p
capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def read(capsule):
    """The struct in a capsule that nobody has taken."""
    name = capsule_name(capsule)
    kind = {b"dltensor": Legacy, b"dltensor_versioned": Versioned}[name]
    return kind.from_address(capsule_pointer(capsule, name))


class Producer:
    """An array over the memory of a NumPy array, and what it says of it.

    Fields of its DLTensor may be given, ``null`` for no shape; ``keywords=False``: ``__dlpack__`` is one from
    before version 1.
    """

    def __init__(self, x, *, version=(1, 0), flags=0, legacy=False, keywords=True, deleter=True, **fields):
        self.x, self.version, self.flags = x, version, flags
        self.legacy, self.keywords, self.deleter, self.fields = legacy, keywords, deleter, fields
        self.given = self.deleted = 0
        self.capsules, self.alive = [], {}

    def __dlpack_device__(self):
        return tuple(self.fields.get("device", (CPU, 0)))

    def __dlpack__(self, **keywords):
        if keywords and not self.keywords:
            raise TypeError("__dlpack__() takes no keyword arguments")
        managed = Legacy() if self.legacy else Versioned()
        if not self.legacy:
            managed.version[:] = self.version
            managed.flags = self.flags
        managed.tensor = self.tensor()
        if self.deleter:
            managed.deleter = Deleter(self.delete)
        address = ctypes.addressof(managed)
        self.alive[address] = managed
        self.given += 1
        name = b"dltensor" if self.legacy else b"dltensor_versioned"
        self.capsules.append(new_capsule(address, name, None))
        return self.capsules[-1]

    def delete(self, address):
        self.deleted += 1
        if not self.alive.pop(address, None):
            self.deleted += 1000

    def tensor(self):
        x, fields = self.x, self.fields
        item = x.dtype.itemsize
        shape = fields.get("shape", x.shape)
        strides = fields.get("strides", [stride // item for stride in x.strides])
        code = {"f": FLOAT, "i": INT, "u": UINT, "V": BFLOAT, "c": COMPLEX, "b": BOOL}[x.dtype.kind]
        self.sizes = (ctypes.c_int64 * len(shape))(*shape)
        self.steps = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
        offset = fields.get("byte_offset", 0)
        return Tensor(
            fields.get("data", x.ctypes.data - offset),
            (ctypes.c_int32 * 2)(*fields.get("device", (CPU, 0))),
            fields.get("ndim", len(shape)),
            fields.get("code", code),
            fields.get("bits", 8 * item),
            fields.get("lanes", 1),
            ctypes.cast(None if fields.get("null") else self.sizes, ctypes.POINTER(ctypes.c_int64)),
            ctypes.cast(self.steps, ctypes.POINTER(ctypes.c_int64)),
            offset,
        )

    def check(self):
        """Every tensor that was given was deleted, once."""
        assert self.deleted == (self.given if self.deleter else 0)
        names = {capsule_name(capsule) for capsule in self.capsules}
        assert names <= {b"used_dltensor", b"used_dltensor_versioned"}


def address(x):
    """Where the memory of an array of any framework starts."""
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    if hasattr(x, "data_ptr"):
        return x.data_ptr()
    if hasattr(x, "unsafe_buffer_pointer"):
        return x.unsafe_buffer_pointer()
    return np.from_dlpack(x).ctypes.data if hasattr(x, "__array_namespace__") else np.asarray(x).ctypes.data
