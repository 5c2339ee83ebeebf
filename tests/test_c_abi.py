"""The C interface called as a C program would, with descriptors that NumPy cannot make."""

import ctypes as c
from pathlib import Path

import numpy as np
import pytest

import fwp_core as fwp
from fwp_core import _core

ERRORS = {name: code for code, name, _, _ in _core.ERRORS}
LIBRARY = next(path for root in fwp.__path__ for path in Path(root, "lib").glob("libfwp_core.*"))


class Device(c.Structure):
    _fields_ = [("device_type", c.c_int32), ("device_id", c.c_int32)]


class DataType(c.Structure):
    _fields_ = [("code", c.c_uint8), ("bits", c.c_uint8), ("lanes", c.c_uint16)]


class Tensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("device", Device),
        ("ndim", c.c_int32),
        ("dtype", DataType),
        ("shape", c.POINTER(c.c_int64)),
        ("strides", c.POINTER(c.c_int64)),
        ("byte_offset", c.c_uint64),
    ]


def struct(name, *fields):
    pointers = [(field, c.POINTER(Tensor)) for field in fields]
    return type(name, (c.Structure,), {"_fields_": [("struct_size", c.c_size_t), *pointers]})


Inputs = struct("Inputs", "q", "k", "v", "beta", "g", "h0", "cu_seqlens", "state_indices")
Outputs = struct("Outputs", "o", "hT", "checkpoints")
Gradients = struct("Gradients", "dq", "dk", "dv", "dbeta", "dg", "dh0")
Cotangents = struct("Cotangents", "d_o", "d_hT", "checkpoints")


class Options(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("scale", c.c_double),
        ("interrupt", c.c_void_p),
        ("interrupt_data", c.c_void_p),
        ("feature_map", c.c_void_p),
        ("qk_norm", c.c_int),
        ("attention_norm", c.c_int),
        ("eps", c.c_double),
        ("check_only", c.c_int),
        ("reserved", c.c_int),
    ]


def integers(*values):
    return (c.c_int64 * max(len(values), 1))(*values)


def tensor(x):
    kinds = {"f": 2, "i": 0, "V": 4}  # bfloat16 is "V" to NumPy
    return Tensor(
        x.ctypes.data,
        Device(1, 0),
        x.ndim,
        DataType(kinds[x.dtype.kind], 8 * x.itemsize, 1),
        integers(*x.shape),
        integers(*(stride // x.itemsize for stride in x.strides)),
        0,
    )


class Program:
    """A delta rule forward call of float32 arrays, whose descriptors a test may spoil."""

    def __init__(self):
        self.library = c.CDLL(str(LIBRARY))
        self.library.fwp_last_error.restype = c.c_char_p
        rng = np.random.default_rng(0)
        self.arrays = {name: rng.random((1, 4, 2, 3), np.float32) for name in ("q", "k", "v", "o")}
        self.arrays["beta"] = rng.random((1, 4, 2), np.float32)
        self.arrays["h0"] = rng.random((1, 2, 3, 3), np.float32)
        self.tensors = {name: tensor(x) for name, x in self.arrays.items()}
        self.options = Options(c.sizeof(Options), 1.0, None, None)
        self.inputs = Inputs(c.sizeof(Inputs))
        for name in ("q", "k", "v", "beta", "h0"):
            setattr(self.inputs, name, c.pointer(self.tensors[name]))
        self.outputs = Outputs(c.sizeof(Outputs), c.pointer(self.tensors["o"]))
        self.workspace, self.bytes, self.stream = None, 0, None

    def call(self):
        return self.library.fwp_delta_fwd(
            c.byref(self.options),
            c.byref(self.inputs),
            c.byref(self.outputs),
            c.c_void_p(self.workspace),
            c.c_size_t(self.bytes),
            c.c_void_p(self.stream),
        )

    def result(self):
        assert self.call() == 0, self.message()
        return self.arrays["o"].copy()

    def message(self):
        return self.library.fwp_last_error().decode()

    def refused(self, error, start):
        before = {name: x.tobytes() for name, x in self.arrays.items()}
        assert self.call() == ERRORS[error], self.message()
        assert self.message().startswith(start)
        assert {name: x.tobytes() for name, x in self.arrays.items()} == before


@pytest.fixture
def program():
    return Program()


def change(path, value):
    """A change of one field of the descriptor of q."""

    def apply(q):
        *parents, last = path.split(".")
        for name in parents:
            q = getattr(q, name)
        setattr(q, last, value)

    return apply


MALFORMED = {
    "no data": ("ArgumentError", change("data", None)),
    "byte_offset off the item": ("ArgumentError", change("byte_offset", 2)),
    "CUDA": ("DeviceError", change("device.device_type", 2)),
    "unknown device": ("DeviceError", change("device.device_type", -7)),
    "ndim below 0": ("ArgumentError", change("ndim", -1)),
    "huge ndim": ("ArgumentError", change("ndim", 1 << 30)),
    "ndim 0": ("ShapeError", change("ndim", 0)),
    "no shape": ("ArgumentError", change("shape", None)),
    "size below 0": ("ArgumentError", change("shape", integers(1, -4, 2, 3))),
    "huge sizes": ("ArgumentError", change("shape", integers(1 << 62, 1 << 62, 2, 3))),
    "huge stride": ("ArgumentError", change("strides", integers(24, 1 << 62, 3, 1))),
    "stride at the limit": ("ArgumentError", change("strides", integers(24, -(1 << 63), 3, 1))),
    "strided last axis": ("UnsupportedError", change("strides", integers(24, 6, 3, 0))),
    "lanes": ("DTypeError", change("dtype.lanes", 2)),
    "float8": ("DTypeError", change("dtype.bits", 8)),
    "integers": ("DTypeError", change("dtype.code", 0)),
    "bfloat32": ("DTypeError", change("dtype.code", 4)),
    "unknown dtype": ("DTypeError", change("dtype.code", 255)),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_tensors(program, kind):
    error, apply = MALFORMED[kind]
    apply(program.tensors["q"])
    program.refused(error, "q: expected ")
    # Last error is per thread and stays until the next one.
    assert program.message().startswith("q: expected ")


@pytest.mark.parametrize(("code", "name"), [(2, "float16"), (4, "bfloat16")])
def test_halves_share_one_dtype(program, code, name):
    expected = (f"k: expected dtype {name}, got float32", f"v: expected dtype {name}, got float32")
    for array, message in zip("qk", expected, strict=True):
        program.tensors[array].dtype = DataType(code, 16, 1)
        program.refused("DTypeError", message)
    program.tensors["v"].dtype = DataType(code, 16, 1)
    program.refused("DTypeError", f"o: expected dtype {name}, got float32")


def test_strides_may_be_null_and_offsets_count_bytes(program):
    expected = program.result()
    q = program.tensors["q"]
    q.strides = None
    assert np.array_equal(program.result(), expected)
    q.data, q.byte_offset = q.data - 64, 64
    assert np.array_equal(program.result(), expected)


def test_strides_of_axes_of_size_1_do_not_matter(program):
    expected = program.result()
    program.tensors["q"].strides = integers(-(1 << 63), 6, 3, 1)
    assert np.array_equal(program.result(), expected)


def test_empty_tensors_need_no_data(program):
    for name in ("q", "k", "v", "o", "beta"):
        program.tensors[name].shape[1] = 0
        program.tensors[name].data = None
    assert program.call() == 0, program.message()


@pytest.mark.parametrize("name", ["options", "inputs", "outputs"])
def test_struct_sizes(program, name):
    expected = program.result()
    given = getattr(program, name)
    size = given.struct_size
    for wrong in (0, 1, 7, 4097, (1 << 64) - 1):
        given.struct_size = wrong
        program.refused("ArgumentError", f"{name}: expected struct_size")
    # A caller with a newer header: fields unknown here must be zero.
    newer = type("Newer", (c.Structure,), {"_fields_": [("known", type(given)), ("more", c.c_uint64 * 2)]})()
    newer.known = given
    newer.known.struct_size = size + 16
    setattr(program, name, newer)
    assert np.array_equal(program.result(), expected)
    newer.more[1] = 1
    program.refused("UnsupportedError", f"{name}: expected no fields beyond")


def test_fields_beyond_struct_size_are_absent(program):
    program.options.scale = 3.0
    program.options.struct_size = 8  # ends before scale, which is then 1
    one = program.result()
    program.options.struct_size = 16
    assert np.allclose(program.result(), 3 * one)

    with_state = program.result()
    program.inputs.struct_size = Inputs.h0.offset
    without = program.result()
    assert not np.allclose(with_state, without)
    program.inputs.h0 = None
    program.inputs.struct_size = c.sizeof(Inputs)
    assert np.array_equal(program.result(), without)

    # A program built before there were slots does not know the field, and what lies there is not read.
    program.inputs.state_indices = c.cast(c.c_void_p(1), c.POINTER(Tensor))
    program.inputs.struct_size = Inputs.state_indices.offset
    assert np.array_equal(program.result(), without)


def test_check_only_computes_nothing_and_needs_no_memory(program):
    program.options.check_only = 1
    program.arrays["o"][...] = np.nan
    assert np.isnan(program.result()).all()
    for x in program.tensors.values():  # all at one address, where there is nothing
        x.data = 64
    program.result()
    program.tensors["v"].dtype.bits = 64
    program.refused("DTypeError", "v: expected dtype float32, got float64")
    program.tensors["v"].dtype.bits = 32
    program.tensors["o"].shape[1] = 5
    program.refused("ShapeError", "o: expected shape (B=1, T=4, H=2, V=3), got (1, 5, 2, 3)")
    program.options.check_only = 2
    program.refused("ArgumentError", "check_only: expected 0 or 1, got 2")
    program.options.check_only = 0
    program.options.reserved = 1
    program.refused("ArgumentError", "reserved: expected 0, got 1")


def test_slots_are_for_steps(program):
    program.inputs.state_indices = c.pointer(tensor(np.array([0])))
    program.refused("ArgumentError", "state_indices: expected NULL outside of a step")


@pytest.mark.parametrize("name", ["q", "k", "v", "beta"])
def test_required_tensors(program, name):
    setattr(program.inputs, name, None)
    program.refused("ArgumentError", f"{name}: expected a tensor, got NULL")


def test_required_structs_and_results(program):
    assert (
        program.library.fwp_delta_fwd(None, None, None, None, c.c_size_t(0), None) == ERRORS["ArgumentError"]
    )
    assert program.message() == "options: expected a struct, got NULL"
    program.outputs.o = None
    program.refused("ArgumentError", "o: expected a tensor, got NULL")
    for name in ("fwp_checkpoints", "fwp_linear_fwd_workspace", "fwp_delta_bwd_workspace"):
        query = getattr(program.library, name)
        assert query(c.byref(program.options), c.byref(program.inputs), None) == ERRORS["ArgumentError"]
        assert "expected a place for the result" in program.message()


def test_a_stream_is_for_cuda(program):
    program.stream = 1
    program.refused("ArgumentError", "stream: ")


def test_a_workspace_may_overlap_nothing(program):
    needed = c.c_size_t()
    query = program.library.fwp_delta_fwd_workspace
    assert query(c.byref(program.options), c.byref(program.inputs), c.byref(needed)) == 0
    memory = np.zeros(needed.value + 256, np.uint8)
    start = -memory.ctypes.data % 64
    program.workspace, program.bytes = memory.ctypes.data + start, needed.value
    expected = program.result()
    # q now lies in the workspace, in its last bytes.
    q = program.arrays["q"]
    inside = memory[start + needed.value - q.nbytes :][: q.nbytes].view(np.float32).reshape(q.shape)
    inside[...] = q
    program.tensors["q"].data = inside.ctypes.data
    program.refused("ArgumentError", "workspace: ")
    program.workspace = None
    assert np.array_equal(program.result(), expected)


def test_checkpoints_must_have_their_number(program):
    elements = c.c_int64()
    query = program.library.fwp_checkpoints
    assert query(c.byref(program.options), c.byref(program.inputs), c.byref(elements)) == 0
    for count, dtype, error in (
        (elements.value + 1, np.float32, "ShapeError"),
        (elements.value - 1, np.float32, "ShapeError"),
        (elements.value, np.float64, "DTypeError"),
    ):
        checkpoints = np.zeros(count, dtype)
        program.outputs.checkpoints = c.pointer(tensor(checkpoints))
        program.refused(error, "checkpoints: ")
    strided = np.zeros(2 * elements.value, np.float32)[::2]
    program.outputs.checkpoints = c.pointer(tensor(strided))
    program.refused("UnsupportedError", "checkpoints: ")
    checkpoints = np.zeros(elements.value, np.float32)
    program.outputs.checkpoints = c.pointer(tensor(checkpoints))
    program.result()


def test_gradients_of_absent_inputs(program):
    gradients = Gradients(c.sizeof(Gradients))
    cotangents = Cotangents(c.sizeof(Cotangents), c.pointer(program.tensors["o"]))
    dg = np.zeros((1, 4, 2), np.float32)
    gradients.dg = c.pointer(tensor(dg))
    status = program.library.fwp_delta_bwd(
        c.byref(program.options),
        c.byref(program.inputs),
        c.byref(cotangents),
        c.byref(gradients),
        None,
        c.c_size_t(0),
        None,
    )
    assert status == ERRORS["ArgumentError"]
    assert program.message() == "dg: expected NULL because g is absent, got a tensor"


def test_a_step_takes_no_state_among_its_inputs(program):
    for name in ("q", "k", "v", "o", "beta"):
        program.tensors[name] = tensor(program.arrays[name][:, 0])
        if name != "o":
            setattr(program.inputs, name, c.pointer(program.tensors[name]))
    state = tensor(np.zeros((1, 2, 3, 3), np.float32))

    def step():
        return program.library.fwp_delta_step(
            c.byref(program.options),
            c.byref(program.inputs),
            c.byref(state),
            c.byref(program.tensors["o"]),
            None,
            c.c_size_t(0),
            None,
        )

    assert step() == ERRORS["ArgumentError"]
    assert program.message().startswith("h0: expected NULL in a step")
    program.inputs.h0 = None
    program.inputs.cu_seqlens = c.pointer(tensor(np.array([0, 4])))
    assert step() == ERRORS["ArgumentError"]
    assert program.message().startswith("cu_seqlens: expected NULL in a step")
    program.inputs.cu_seqlens = None
    assert step() == 0, program.message()


def test_long_messages_are_cut(program):
    program.tensors["q"].ndim = 64
    program.tensors["q"].shape = integers(*[1 << 62] * 64)
    program.refused("ShapeError", "q: expected shape (B, T, Hq, K), got (4611686018427387904, ")
    assert len(program.message()) == 1023
