"""The border to XLA: the layout of its structs, frames that are wrong, and the order of imports."""

import ctypes as c
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

import fwp_core as fwp
from fwp_core import _core

HEADER = Path(__file__).parents[1] / "python" / "xla_ffi.hpp"

# Our struct, the real one, and the real names of our fields.
STRUCTS = {
    "ApiVersion": ("XLA_FFI_Api_Version", "struct_size extension_start major_version minor_version"),
    "ErrorCreateArgs": ("XLA_FFI_Error_Create_Args", "struct_size extension_start message code=errc"),
    "ErrorDestroyArgs": ("XLA_FFI_Error_Destroy_Args", "struct_size extension_start error"),
    "StreamGetArgs": ("XLA_FFI_Stream_Get_Args", "struct_size extension_start context=ctx stream"),
    "MemoryAllocateArgs": (
        "XLA_FFI_DeviceMemory_Allocate_Args",
        "struct_size extension_start context=ctx size alignment data",
    ),
    "MemoryFreeArgs": ("XLA_FFI_DeviceMemory_Free_Args", "struct_size extension_start context=ctx size data"),
    "DeviceGetArgs": (
        "XLA_FFI_DeviceOrdinal_Get_Args",
        "struct_size extension_start context=ctx device=device_ordinal",
    ),
    "Buffer": ("XLA_FFI_Buffer", "struct_size extension_start dtype data rank dims"),
    "ByteSpan": ("XLA_FFI_ByteSpan", "data=ptr size=len"),
    "Scalar": ("XLA_FFI_Scalar", "dtype value"),
    "Buffers": ("XLA_FFI_Args", "struct_size extension_start size kinds=types buffers=args"),
    "Attributes": ("XLA_FFI_Attrs", "struct_size extension_start size kinds=types names values=attrs"),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        "struct_size extension_start api context=ctx stage operands=args results=rets attributes=attrs",
    ),
    "Metadata": ("XLA_FFI_Metadata", "struct_size version=api_version traits"),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", "base=extension_base metadata"),
    "Api": (
        "XLA_FFI_Api",
        "struct_size extension_start version=api_version internal=internal_api "
        "error_create=XLA_FFI_Error_Create error_destroy=XLA_FFI_Error_Destroy "
        "stream_get=XLA_FFI_Stream_Get memory_allocate=XLA_FFI_DeviceMemory_Allocate "
        "memory_free=XLA_FFI_DeviceMemory_Free device_get=XLA_FFI_DeviceOrdinal_Get",
    ),
}
# Those that later versions may make longer, at their end.
GROWING = ("CallFrame", "Metadata", "Api")
VALUES = {
    "Extension::metadata": "XLA_FFI_Extension_Metadata",
    "Stage::execute": "XLA_FFI_ExecutionStage_EXECUTE",
    "BufferKind::buffer": "XLA_FFI_ArgType_BUFFER",
    "AttributeKind::scalar": "XLA_FFI_AttrType_SCALAR",
    **{
        f"DataType::{ours}": f"XLA_FFI_DataType_{real}"
        for ours, real in zip(
            ("boolean", "s32", "s64", "f16", "f32", "f64", "bf16"),
            ("PRED", "S32", "S64", "F16", "F32", "F64", "BF16"),
            strict=True,
        )
    },
    **{
        f"ErrorCode::{name}": f"XLA_FFI_Error_Code_{name.upper()}"
        for name in ("cancelled", "invalid_argument", "resource_exhausted", "unimplemented", "internal")
    },
}


def assertions():
    yield '#include "xla/ffi/api/c_api.h"'
    yield f'#include "{HEADER}"'
    for ours, (real, fields) in STRUCTS.items():
        relation = "<=" if ours in GROWING else "=="
        yield f'static_assert(sizeof(fwp::xla::{ours}) {relation} sizeof({real}), "{ours}");'
        for field in fields.split():
            name, _, other = field.partition("=")
            places = f"offsetof(fwp::xla::{ours}, {name}) == offsetof({real}, {other or name})"
            yield f'static_assert({places}, "{ours}.{name}");'
    for ours, real in VALUES.items():
        yield f'static_assert(static_cast<int>(fwp::xla::{ours}) == {real}, "{ours}");'


def test_the_structs_are_those_of_the_real_header(tmp_path):
    jax = pytest.importorskip("jax")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not HEADER.exists():
        pytest.skip("no compiler, or no sources")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(assertions()) + "\n")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-I", jax.ffi.include_dir(), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    source.write_text(
        source.read_text().replace("DataType::f32) == XLA_FFI_DataType_F32", "DataType::f32) == 12")
    )
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


# Handlers called as the runtime calls them.


class Base(c.Structure):
    _fields_ = [("struct_size", c.c_size_t), ("type", c.c_int), ("next", c.c_void_p)]


class Version(c.Structure):
    _fields_ = [
        ("struct_size", c.c_size_t),
        ("extension_start", c.c_void_p),
        ("major", c.c_int),
        ("minor", c.c_int),
    ]


class Metadata(c.Structure):
    _fields_ = [("struct_size", c.c_size_t), ("version", Version), ("traits", c.c_uint32)]


class MetadataExtension(c.Structure):
    _fields_ = [("base", Base), ("metadata", c.POINTER(Metadata))]


class Frame(c.Structure):
    _fields_ = [("struct_size", c.c_size_t), ("extension_start", c.POINTER(Base)), ("rest", c.c_void_p * 32)]


def handler(capsule):
    pointer = c.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
    return c.CFUNCTYPE(c.c_void_p, c.POINTER(Frame))(pointer(capsule, None))


@pytest.mark.parametrize("platform", ["cpu", "CUDA"])
@pytest.mark.parametrize("name", _core.xla_targets("cpu"))
def test_handlers_say_that_they_are_of_version_0_1(name, platform):
    metadata = Metadata(c.sizeof(Metadata), Version(c.sizeof(Version), None, -1, -1), 99)
    extension = MetadataExtension(Base(c.sizeof(Base), 1, None), c.pointer(metadata))
    frame = Frame(c.sizeof(Frame), c.cast(c.pointer(extension), c.POINTER(Base)))
    assert handler(_core.xla_targets(platform)[name])(c.pointer(frame)) is None
    assert (metadata.version.major, metadata.version.minor, metadata.traits) == (0, 1, 0)


def test_every_function_has_a_handler():
    names = [
        f"{rule}{kind}" for rule in ("linear_attention", "delta_rule") for kind in ("", "_backward", "_step")
    ]
    names += ["feature_forward", "feature_backward"]
    for platform in ("cpu", "CUDA"):
        assert sorted(_core.xla_targets(platform)) == sorted(f"fwp_core.{name}" for name in names)


ATTRIBUTES = {
    "operands": np.int64(7),
    "results": np.int64(3),
    "rank": np.int64(4),
    "map": np.int64(0),
    "nu": np.int64(0),
    "qk_norm": np.int64(0),
    "map_eps": 0.0,
    "eps": 1e-6,
    "scale": 1.0,
    "attention_norm": False,
}


def call(shape=(1, 2, 1, 3), **changes):
    """The handler of linear_attention with attributes of our choice, all arrays of one shape."""
    jax = pytest.importorskip("jax")
    jax.numpy.ones(1).block_until_ready()
    jnp = jax.numpy
    x = jnp.ones((1, 1, 1, 1))
    fwp.linear_attention(x, x, x)  # registers the handlers
    q = jnp.ones(shape)
    attributes = {name: value for name, value in (ATTRIBUTES | changes).items() if value is not None}
    specs = [jax.ShapeDtypeStruct(shape, q.dtype), jax.ShapeDtypeStruct((1, 1, 3, 3), q.dtype)]
    target = jax.ffi.ffi_call("fwp_core.linear_attention", specs, vmap_method="broadcast_all")
    return jax.block_until_ready(jax.jit(lambda q: target(q, q, q, **attributes))(q))


WRONG_FRAMES = [
    *[({name: None}, f"{name}: expected an attribute") for name in ATTRIBUTES],
    ({"scale": np.int64(1)}, "scale: expected an attribute"),
    ({"attention_norm": np.int64(0)}, "attention_norm: expected an attribute"),
    *[({"operands": np.int64(n)}, "expected the buffers") for n in (0, 3, 6, 15, 7 + (1 << 20), -1)],
    *[({"results": np.int64(n)}, "expected the buffers") for n in (0, 1, 7, 3 + (1 << 40))],
    *[({"rank": np.int64(n)}, "expected the buffers") for n in (5, 1, -3)],
    ({"map": np.int64(9)}, "ArgumentError: feature_map: expected a kind from 1 to 5, got 9"),
    ({"qk_norm": np.int64(7)}, "ArgumentError: qk_norm: expected a norm"),
    ({"shape": (2, 1, 3)}, "expected the buffers"),
    ({"shape": (1, 2, 1, 4)}, "ShapeError: hT: expected shape"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_FRAMES, ids=str)
def test_frames_that_are_wrong(changes, words):
    with pytest.raises((RuntimeError, ValueError), match=words):
        call(**changes)


def test_a_frame_that_is_right():
    o, final_state = call()
    assert np.array_equal(np.ravel(o), [3, 3, 3, 6, 6, 6])
    assert np.array_equal(np.ravel(final_state), [2] * 9)


# In processes of their own.

SCAN = """
import numpy as np
x = jnp.ones((1, 3, 1, 2))
o, _ = jax.jit(fwp.linear_attention)(x, x, x)
assert o.ravel().tolist() == [2, 2, 4, 4, 6, 6], o
assert float(jnp.sum(x)) == 6
print("right")
"""
ORDERS = {
    "the library first": "import fwp_core.jax, fwp_core as fwp, jax, jax.numpy as jnp",
    "jax first": "import jax, jax.numpy as jnp, fwp_core as fwp, fwp_core.jax",
    "arrays first": "import jax, jax.numpy as jnp; jnp.ones(3).sum(); import fwp_core as fwp",
    "traced before any array": """
import fwp_core as fwp, jax, jax.numpy as jnp
x = jax.ShapeDtypeStruct((1, 3, 1, 2), "float32")
jax.jit(fwp.linear_attention).lower(x, x, x)""",
    "a backend of its own choice": """
import fwp_core.jax, fwp_core as fwp, jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(order):
    pytest.importorskip("jax")
    done = run_python(ORDERS[order] + SCAN)
    assert done.stdout == "right\n", done.stderr


def test_the_library_imports_no_jax():
    done = run_python("import sys, fwp_core as fwp; fwp.feature_maps.ReLU(); print('jax' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_registration_waits_for_the_first_call():
    """An import starts no backend and registers nothing; a call does, in this order.

    A target that JAX refuses is an error of the call then, and the backend works on.
    """
    pytest.importorskip("jax")
    code = """
import jax, jax.numpy as jnp, fwp_core as fwp, fwp_core.jax
from jax._src import xla_bridge
def refuse(*arguments, **more):
    assert xla_bridge._backends
    raise RuntimeError("refused")
assert not xla_bridge._backends
register, jax.ffi.register_ffi_target = jax.ffi.register_ffi_target, refuse
x = jax.ShapeDtypeStruct((1, 3, 1, 2), "float32")
lower = lambda: jax.jit(fwp.linear_attention).lower(x, x, x)
try:
    lower()
except RuntimeError as error:
    assert str(error) == "refused"
else:
    raise AssertionError("registered by an import")
assert jnp.ones(3).sum() == 3
jax.ffi.register_ffi_target = register
lower()
print("right")
"""
    done = run_python(code)
    assert done.stdout == "right\n", done.stderr


SHARDED = """
import warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np, fwp_core as fwp
from jax.sharding import Mesh, PartitionSpec as P
if hasattr(jax, "shard_map"):
    shard_map = jax.shard_map
else:
    from jax.experimental.shard_map import shard_map
assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("x",))
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((4, 6, 2, 3))) for _ in range(3))
beta, R = jnp.asarray(rng.uniform(size=(2, 6, 2))), jnp.asarray(rng.standard_normal((5, 3)))
assert q.dtype == jnp.float64

def scan(q, k, v, beta, R):
    return fwp.delta_rule(q, k, v, beta, feature_map=fwp.feature_maps.FAVOR(R), qk_norm="sum")

def whole(q, k, v, beta, R):
    return scan(q, k, v, jnp.concatenate([beta, beta]), R)

parts = (P("x"), P("x"), P("x"), P(), P())
sharded = shard_map(scan, mesh=mesh, in_specs=parts, out_specs=(P("x"), P("x")))
for wrap in (lambda f: f, jax.jit):
    for x, y in zip(wrap(sharded)(q, k, v, beta, R), scan(q, k, v, jnp.concatenate([beta, beta]), R)):
        assert np.array_equal(x, y)
for used in (0, 1):
    def gradients(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x, R)[used])), argnums=(0, 1, 2, 3)))
    for x, y in zip(gradients(sharded)(q, k, v, beta), gradients(whole)(q, k, v, beta)):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() < 1e-14 * max(1, np.abs(y).max())

# By jax.vjp: jax.grad of any function fails inside of shard_map in JAX 0.6.0.
def inside(q, k, v, beta):
    results, pullback = jax.vjp(lambda q: fwp.delta_rule(q, k, v, beta), q)
    return pullback(results)[0]
part = shard_map(inside, mesh=mesh, in_specs=parts[:4], out_specs=P("x"))(q, k, v, beta)
assert np.array_equal(part, inside(q, k, v, jnp.concatenate([beta, beta])))

try:
    q, k = (jax.device_put(x, jax.devices()[i]) for i, x in enumerate((q, k)))
    fwp.delta_rule(q, k, v, jnp.concatenate([beta, beta]))
except fwp.DeviceError as error:
    assert "k: expected an array on" in str(error) and "as others are" in str(error), error
else:
    raise AssertionError("two devices")
print("right")
"""


def test_shard_map_over_two_devices():
    """Forward and gradient, some operands replicated; and arrays of two devices are refused."""
    pytest.importorskip("jax")
    flags = "--xla_force_host_platform_device_count=2"
    done = run_python(SHARDED, XLA_FLAGS=flags, JAX_ENABLE_X64="1")
    assert done.stdout == "right\n", done.stderr


def test_without_float64_there_is_none():
    pytest.importorskip("jax")
    code = """
import jax.numpy as jnp, numpy as np, fwp_core as fwp
R = fwp.feature_maps.orthogonal_gaussian(4, 2, 0)
x = jnp.ones((1, 3, 1, 2))
o, state = fwp.linear_attention(x, x, x, feature_map=fwp.feature_maps.FAVOR(R), cu_seqlens=[0, 1, 3])
assert state.dtype == o.dtype == jnp.float32 and state.shape == (2, 1, 8, 2)
print("right")
"""
    done = run_python(code, JAX_ENABLE_X64="0")
    assert done.stdout == "right\n", done.stderr


def test_a_step_leaves_a_state_that_it_may_not_take():
    """A program that does not let the new state have the memory of the old one gets a copy."""
    jax = pytest.importorskip("jax")
    call()
    q, state = jax.numpy.ones((1, 1, 2)), jax.numpy.ones((1, 1, 2, 2))
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, state)]
    target = jax.ffi.ffi_call("fwp_core.linear_attention_step", specs, vmap_method="broadcast_all")
    attributes = ATTRIBUTES | {"operands": np.int64(7 + (1 << 9)), "rank": np.int64(3)}
    o, after = target(q, q, q, state, **attributes)
    assert np.array_equal(np.ravel(o), [4, 4])
    assert np.array_equal(np.ravel(after), [2] * 4)
    assert np.array_equal(np.ravel(state), [1] * 4)
