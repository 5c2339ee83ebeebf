"""Arrays of every framework: the results of NumPy arrays, in their own kind, from and in their own memory."""

import copy
import ctypes
import gc
import importlib
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from arguments import FUNCTIONS, get, good, put
from cases import DTYPES
from numpy.lib.stride_tricks import as_strided
from producers import (
    CPU,
    CUDA,
    CUDA_HOST,
    CUDA_MANAGED,
    IS_COPIED,
    READ_ONLY,
    Producer,
    address,
    capsule_name,
    read,
)

import fwp_core as fwp
from fwp_core import _core

ROOT = Path(__file__).parents[1]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
OPTIONAL = ("out", "final_state_out")


@pytest.fixture(autouse=True)
def no_leak():
    """Whatever a test does, errors included, every tensor is given back."""
    before = _core.live_tensors()  # what a failed test holds
    yield
    if _core.live_tensors() > before:
        gc.collect()
    assert _core.live_tensors() <= before


class Torch:
    writable = True
    dtypes = DTYPES

    def __init__(self):
        self.torch = pytest.importorskip("torch")

    def array(self, x):
        if x.dtype == BFLOAT16:
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)

    def numpy(self, x):
        assert type(x) is self.torch.Tensor
        if x.dtype == self.torch.bfloat16:
            return x.view(self.torch.int16).numpy().view(BFLOAT16)
        return x.numpy()


class Jax:
    writable = False
    dtypes = tuple(dtype for dtype in DTYPES if dtype != np.float64)  # which is a switch of the whole process

    def __init__(self):
        self.jax = pytest.importorskip("jax")

    def array(self, x):
        return self.jax.numpy.asarray(x)

    def numpy(self, x):
        assert isinstance(x, self.jax.Array)
        return np.asarray(x)


class Strict:
    writable = True
    dtypes = (np.float32, np.float64)

    def __init__(self):
        self.namespace = pytest.importorskip("array_api_strict")

    def array(self, x):
        return self.namespace.asarray(x, copy=False)

    def numpy(self, x):
        assert type(x) is type(self.namespace.ones(1))
        return np.from_dlpack(x)


class Made:
    """A framework without a namespace: it gets fwp_core.Array back."""

    writable = True
    dtypes = DTYPES

    def array(self, x):
        return Producer(x)

    def numpy(self, x):
        if type(x) is Producer:
            x.check()
            return x.x
        assert type(x) is fwp.Array
        return np.asarray(x)


class MadeLegacy(Made):
    writable = False

    def array(self, x):
        return Producer(x, legacy=True, keywords=False)


KINDS = (Torch, Jax, Strict, Made, MadeLegacy)
EVERY_KIND_AND_DTYPE = pytest.mark.parametrize(
    ("framework", "dtype"),
    [
        pytest.param(kind, dtype, id=f"{kind.__name__}-{np.dtype(dtype).name}")
        for kind in KINDS
        for dtype in kind.dtypes
    ],
    indirect=["framework"],
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def framework(request):
    return request.param()


def each(convert, arguments):
    """The arguments with every array converted."""

    def one(value):
        if isinstance(value, fwp.Gradients):
            return fwp.Gradients(*map(one, value))
        return convert(value) if isinstance(value, np.ndarray) else value

    return {name: one(value) for name, value in arguments.items()}


def plainly(function, arguments):
    """The call as the compiled module sees it, whatever adapter there is for its arrays."""
    result = function.call.__wrapped__(**arguments)
    return result if isinstance(result, tuple) else (result,)


def same_bits(x, y):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert x.tobytes() == y.tobytes()


def arguments_of(function, dtype, framework):
    """Good arguments; without arrays to write to where the framework has none."""
    arguments = good(function, dtype)
    if not framework.writable:
        arguments = {name: None if name in OPTIONAL else x for name, x in arguments.items()}
    return arguments


@EVERY_KIND_AND_DTYPE
@EVERY_FUNCTION
def test_results_are_those_of_numpy(framework, name, dtype):
    function = FUNCTIONS[name]
    arguments = arguments_of(function, dtype, framework)
    theirs = each(framework.array, good(function, dtype) if framework.writable else arguments)
    if not framework.writable and function.kind == "backward":
        theirs["out"] = None
    if not framework.writable and function.kind == "step":
        with pytest.raises(fwp.ReadOnlyError, match=r"^state: expected a writable array, got .* not say"):
            plainly(function, theirs)
        return
    expected = plainly(function, arguments)
    results = plainly(function, theirs)
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        same_bits(framework.numpy(result), value)
    if framework.writable:
        for position in function.outputs:
            assert any(get(theirs, position) is x for x in (*results, theirs.get("state")))
            same_bits(framework.numpy(get(theirs, position)), get(arguments, position))
    else:
        for x in theirs.values():
            if x is not None:
                framework.numpy(x)


@EVERY_FUNCTION
def test_results_are_new_arrays_of_the_framework(framework, name):
    function = FUNCTIONS[name]
    if function.kind == "step" and not framework.writable:
        return  # no state can be written
    arguments = good(function) | dict.fromkeys(OPTIONAL)
    if function.kind == "backward":
        arguments = good(function) | {"out": None}
    elif function.kind == "step":
        del arguments["final_state_out"]
    theirs = each(framework.array, {n: None if x is None else x.copy() for n, x in arguments.items()})
    results = plainly(function, theirs)
    for result, expected in zip(results, plainly(function, arguments), strict=True):
        same_bits(framework.numpy(result), expected)
        assert address(result) % 64 == 0 or isinstance(framework, Torch)


def test_results_go_into_the_next_call(framework):
    arguments = {n: x for n, x in good(FUNCTIONS["delta_rule"]).items() if n not in OPTIONAL}
    theirs = each(framework.array, arguments)
    run = fwp.delta_rule.__wrapped__
    _, expected = run(**arguments | {"initial_state": run(**arguments)[1]})
    _, state = run(**theirs | {"initial_state": run(**theirs)[1]})
    same_bits(framework.numpy(state), expected)


def test_vjp(framework):
    arguments = {n: x for n, x in good(FUNCTIONS["delta_rule"]).items() if n not in OPTIONAL}
    do = np.ones_like(arguments["v"])
    (_, _), pullback = fwp.vjp.__wrapped__(fwp.delta_rule, **arguments)
    (_, _), theirs = fwp.vjp.__wrapped__(fwp.delta_rule, **each(framework.array, arguments))
    for x, y in zip(theirs(framework.array(do)), pullback(do), strict=True):
        same_bits(framework.numpy(x), y)


@EVERY_KIND_AND_DTYPE
def test_feature_maps(framework, dtype):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(dtype)
    x = x[:, :, ::-1] if isinstance(framework, (Strict, Made)) else x
    phi = fwp.feature_maps.DPFP(2)
    y = _core.feature_forward(phi, x)
    theirs = framework.array(x)
    same_bits(framework.numpy(_core.feature_forward(phi, theirs)), y)
    dx = _core.feature_backward(phi, framework.array(y), theirs)
    same_bits(framework.numpy(dx), _core.feature_backward(phi, y, x))


@EVERY_KIND_AND_DTYPE
def test_projections(framework, dtype):
    if dtype not in (np.float32, np.float64):
        with pytest.raises(fwp.DTypeError, match="^projection: expected dtype float32 or float64"):
            fwp.feature_maps.FAVOR(framework.array(np.ones((8, 4), dtype)))
        return
    projection = fwp.feature_maps.orthogonal_gaussian(8, 4, 0, dtype)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(dtype)
    for rows in (projection, projection[::-1], np.asfortranarray(projection)):
        theirs = framework.array(rows) if rows.strides[0] > 0 else Producer(rows)
        phi = fwp.feature_maps.FAVOR(theirs)
        same_bits(phi.projection, np.ascontiguousarray(rows))
        if isinstance(framework, Jax) and not isinstance(theirs, Producer):  # which is for arrays of JAX
            same_bits(framework.numpy(phi(framework.array(x))), fwp.feature_maps.FAVOR(rows)(x))
        else:
            same_bits(phi(x), fwp.feature_maps.FAVOR(rows)(x))


def test_diagnose(framework):
    arguments = {n: x for n, x in good(FUNCTIONS["delta_rule"]).items() if n not in OPTIONAL}
    expected = fwp.diagnose(fwp.delta_rule, **arguments).probes()
    theirs = fwp.diagnose.__wrapped__(fwp.delta_rule, **each(framework.array, arguments))
    for name, probe in theirs.probes().items():
        assert type(probe) is np.ndarray
        np.testing.assert_array_equal(probe, expected[name])


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("kind", ["torch", "jax", "array_api_strict", "made", "legacy"])
def test_lengths_of_any_framework(kind, dtype):
    lengths = np.array([0, 2, 2, 6], dtype)
    if kind in ("made", "legacy"):
        given = Producer(lengths, legacy=kind == "legacy")
    else:
        namespace = importlib.import_module("jax.numpy") if kind == "jax" else pytest.importorskip(kind)
        given = namespace.asarray(lengths)
    q = np.random.default_rng(0).standard_normal((1, 6, 2, 3)).astype(np.float32)
    _, expected = fwp.linear_attention(q, q, q, cu_seqlens=[0, 2, 2, 6])
    _, state = fwp.linear_attention(q, q, q, cu_seqlens=given)
    same_bits(state, expected)
    assert fwp.diagnose(fwp.linear_attention, q, q, q, cu_seqlens=given).positions.tolist() == [
        1,
        2,
        1,
        2,
        3,
        4,
    ]
    (_, _), pullback = fwp.vjp(fwp.linear_attention, q, q, q, cu_seqlens=given)
    same_bits(pullback(q).dq, fwp.linear_attention_backward(q, q, q, q, cu_seqlens=lengths).dq)
    with pytest.raises(fwp.ArgumentError, match="cu_seqlens"):
        fwp.linear_attention(q[:, :5], q[:, :5], q[:, :5], cu_seqlens=given)


def test_lengths_are_integers():
    q = np.zeros((1, 6, 2, 3), np.float32)
    for bad in (np.zeros(2, np.float32), np.zeros(2, bool), np.zeros(2, np.complex64)):
        with pytest.raises(fwp.DTypeError, match=r"^cu_seqlens: expected integers, got dtype"):
            fwp.linear_attention(q, q, q, cu_seqlens=Producer(bad))
    with pytest.raises(fwp.ArgumentError, match=r"^cu_seqlens: expected integers of at most 64 bits"):
        fwp.linear_attention(q, q, q, cu_seqlens=Producer(np.array([0, 2**63], np.uint64)))
    with pytest.raises(fwp.DeviceError, match=r"^cu_seqlens: .* got one on cuda:1"):
        fwp.linear_attention(q, q, q, cu_seqlens=Producer(np.zeros(2, np.int64), device=(CUDA, 1)))


# ---- memory ----


def test_torch_memory_is_read_and_written_in_place():
    torch = pytest.importorskip("torch")
    q = torch.ones(1, 2, 3)
    state = torch.zeros(4, 2, 3, 6)[::2, :, :, ::2]  # strided, the last axis too
    base, where = state._base, state.data_ptr()
    o = torch.full((1, 2, 3), torch.nan)
    assert (
        _core.linear_attention_step(*(q, q, q, None, None, state, [1], None, None, False, 1e-6, 1.0, o)) is o
    )
    assert state.data_ptr() == where
    assert base[2, :, :, ::2].eq(1).all()
    assert base.sum() == 18
    assert o.eq(3).all()


@pytest.mark.parametrize("kind", ["numpy", "torch", "made"])
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g", "initial_state"])
def test_inputs_are_read_where_they_lie(kind, name):
    """A call sees the addresses of the caller's memory: an output may lie right behind it, and not within."""
    convert = {"numpy": np.asarray, "made": Producer}.get(kind) or pytest.importorskip("torch").from_numpy
    x, heads = np.ones((1, 3, 2, 4), np.float32), np.full((1, 3, 2), 0.5, np.float32)
    inputs = {"q": x, "k": x, "v": x, "beta": heads, "g": -heads, "initial_state": np.ones((1, 2, 4, 4))}
    inputs["initial_state"] = inputs["initial_state"].astype(np.float32)
    size = inputs[name].size
    memory = np.zeros(24 + size + 24, np.float32)
    before, place, behind = memory[:24], memory[24 : 24 + size], memory[24 + size :]
    place[:] = inputs[name].ravel()
    expected, _ = fwp.delta_rule(**inputs)
    given = {key: convert(value) for key, value in inputs.items()}
    given[name] = convert(place.reshape(inputs[name].shape))
    for out in (before, behind):
        out = out.reshape(x.shape)
        fwp.delta_rule(**given, out=convert(out))
        same_bits(out, expected)
    for start in (1, 24 + size - 1):
        out = memory[start : start + 24].reshape(x.shape)
        with pytest.raises(fwp.ArgumentError, match=f"^out: .* shares memory with {name}$"):
            fwp.delta_rule(**given, out=convert(out))


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax.numpy"])
def test_our_memory_is_taken_over_in_place(framework):
    pytest.importorskip(framework.partition(".")[0])
    q = Producer(np.ones((1, 3, 2, 4), np.float32))
    o, _ = fwp.linear_attention(q, q, q)
    where = np.asarray(o).ctypes.data
    assert where % 64 == 0
    theirs = importlib.import_module(framework).from_dlpack(o)
    assert address(theirs) == where
    expected = np.asarray(o).copy()
    del o
    gc.collect()  # the memory lives as long as theirs
    np.testing.assert_array_equal(np.asarray(theirs), expected)
    assert _core.live_tensors() == 1
    del theirs
    gc.collect()
    assert _core.live_tensors() == 0


def test_jax_takes_results_over_in_place():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((1, 3, 2, 64))
    before = _core.live_tensors()
    o, state, _ = _core.linear_attention(
        x, x, x, *[None] * 4, False, 1e-6, 1.0, None, None, None, None, False
    )
    assert _core.live_tensors() == before + 2  # a copy would have given ours back
    assert o.unsafe_buffer_pointer() % 64 == state.unsafe_buffer_pointer() % 64 == 0


# ---- what tensors may be ----

X = np.random.default_rng(0).standard_normal((2, 6, 4, 8)).astype(np.float32)
LAYOUTS = {
    "broadcast": np.broadcast_to(X[:1, :1], X.shape),
    "read-only": np.frombuffer(X.tobytes(), np.float32).reshape(X.shape),
    "negative": X[::-1, ::-1, ::-1],
    "negative last": X[..., ::-1],
    "transposed": np.ascontiguousarray(X.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "strided last": np.repeat(X, 2, -1)[..., ::2],
    "no rows": X[:, :0],
    "no channels": X[..., :0],
    "one": X[:1, :1, :1, :1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_layout(layout, legacy):
    x = LAYOUTS[layout]
    given = Producer(x, legacy=legacy, flags=0 if x.flags.writeable else READ_ONLY)
    for result, expected in zip(
        fwp.linear_attention(*[given] * 3), fwp.linear_attention(x, x, x), strict=True
    ):
        same_bits(np.asarray(result), expected)
    given.check()


@pytest.mark.parametrize("layout", [name for name, x in LAYOUTS.items() if x.flags.writeable])
def test_every_layout_of_array_api_strict(layout):
    namespace = pytest.importorskip("array_api_strict")
    x = LAYOUTS[layout]
    given = namespace.asarray(x, copy=False)
    for result, expected in zip(
        fwp.linear_attention(*[given] * 3), fwp.linear_attention(x, x, x), strict=True
    ):
        same_bits(np.from_dlpack(result), expected)


def test_every_layout_of_torch():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X)
    run = fwp.linear_attention.__wrapped__
    for given in (
        x[:1, :1].expand(x.shape),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.repeat_interleave(2, -1)[..., ::2],
        x[:, :0],
        x[..., :0],
        x.unfold(1, 2, 1)[:, :, 0],
    ):
        for result, expected in zip(run(*[given] * 3), run(*[given.numpy()] * 3), strict=True):
            same_bits(result.numpy(), expected)


def test_fields_of_a_tensor():
    expected = fwp.linear_attention(X, X, X)[0]
    host = np.empty(X.nbytes + 4, np.uint8)[4:].view(np.float32).reshape(X.shape)
    host[...] = X
    for producer in (
        Producer(X, byte_offset=64),
        Producer(X, strides=None),
        Producer(X, strides=None, legacy=True),
        Producer(X, device=(CUDA_HOST, 0)),
        Producer(X, version=(1, 99)),
        Producer(X, deleter=False),
        Producer(X, keywords=False),
        Producer(X, flags=READ_ONLY),
        Producer(X, flags=IS_COPIED),
        Producer(host),
        Producer(np.expand_dims(X, 0)[0]),
    ):
        same_bits(np.asarray(fwp.linear_attention(producer, producer, producer)[0]), expected)
        assert producer.given == 3
        producer.check()
    empty = Producer(X[:, :0], data=None, strides=None)
    assert np.asarray(fwp.linear_attention(empty, empty, empty)[0]).shape == (2, 0, 4, 8)


REFUSED = {
    "cuda": (fwp.DeviceError, "the CPU, .* got (one on )?cuda:3", {"device": (CUDA, 3)}),
    "managed": (fwp.DeviceError, "the CPU, .* got (one on )?cuda:3", {"device": (CUDA_MANAGED, 3)}),
    "another device": (fwp.DeviceError, "the CPU or of a CUDA device, got rocm:1", {"device": (10, 1)}),
    "unknown device": (fwp.DeviceError, "got device type 77:0", {"device": (77, 0)}),
    "another version": (fwp.UnsupportedError, "DLPack 1, got one of version 2", {"version": (2, 0)}),
    "fake": (fwp.ArgumentError, "a tensor with memory, got one without", {"data": None}),
    "misaligned": (fwp.ArgumentError, "", {"data": X.ctypes.data + 1}),
    "complex": (fwp.DTypeError, "got complex64", {"code": 5, "bits": 64}),
    "integers": (fwp.DTypeError, "got int32", {"code": 0}),
    "truth": (fwp.DTypeError, "got bool", {"code": 6, "bits": 8}),
    "vectors": (fwp.DTypeError, "got float32x4", {"lanes": 4}),
    "float128": (fwp.DTypeError, "got float128", {"bits": 128}),
    "fp8": (fwp.DTypeError, "got DLPack's type code 10 of size 8", {"code": 10, "bits": 8}),
    "bfloat32": (fwp.DTypeError, "got bfloat32", {"code": 4}),
    "axes": (fwp.ShapeError, "at most 64 axes, got 65", {"ndim": 65}),
    "negative axes": (fwp.ShapeError, "at most 64 axes, got -1", {"ndim": -1}),
    "negative size": (fwp.ShapeError, "sizes of 0 or more, got -6", {"shape": (2, -6, 4, 8)}),
    "no shape": (fwp.ShapeError, "a tensor with a shape, got one of 4 axes without", {"null": True}),
    "scalar": (fwp.ShapeError, "", {"shape": (), "strides": ()}),
}


@pytest.mark.parametrize(
    ("reason", "legacy"),
    [(r, old) for r in REFUSED for old in (False, True) if not old or r != "another version"],
)
def test_tensors_that_are_refused(reason, legacy):
    error, words, fields = REFUSED[reason]
    plain, bad = Producer(X), Producer(X, legacy=legacy, **fields)
    with pytest.raises(error, match=rf"^k: expected .*{words}"):
        fwp.linear_attention(plain, bad, plain)
    with pytest.raises(error, match=rf"^q: expected .*{words}"):
        fwp.linear_attention(bad, plain, plain)
    plain.check()
    bad.check()
    assert bad.given == 2


@EVERY_FUNCTION
def test_read_only_tensors_are_not_written(name):
    function = FUNCTIONS[name]
    for position in function.outputs:
        for legacy, words in ((False, "got a read-only one"), (True, "which does not say that it is one")):
            arguments = good(function)
            target = get(arguments, position)
            before = target.tobytes()
            theirs = each(Producer, arguments)
            kept = Producer(target, legacy=legacy, flags=READ_ONLY)
            with pytest.raises(fwp.ReadOnlyError, match=rf"^{position}: expected a writable array.*{words}"):
                plainly(function, put(theirs, position, kept))
            assert target.tobytes() == before
            kept.check()


@EVERY_FUNCTION
def test_copies_are_not_written(name):
    function = FUNCTIONS[name]
    for position in function.outputs:
        arguments = each(Producer, good(function))
        kept = Producer(get(good(function), position), flags=IS_COPIED)
        with pytest.raises(fwp.ArgumentError, match=rf"^{position}: expected memory to write to, got a copy"):
            plainly(function, put(arguments, position, kept))
        kept.check()


@EVERY_FUNCTION
def test_overlaps_are_seen_through_every_door(name):
    function = FUNCTIONS[name]
    arguments = good(function)
    for position in function.outputs:
        x = get(arguments, position)
        wide = as_strided(x, x.shape, (0, *x.strides[1:]))
        with pytest.raises(fwp.ArgumentError, match=rf"^{position}"):
            plainly(function, put(each(Producer, arguments), position, Producer(wide)))


@EVERY_FUNCTION
def test_frameworks_are_not_mixed(name):
    torch = pytest.importorskip("torch")
    function = FUNCTIONS[name]
    for position in function.positions:
        if position == "q":
            continue
        arguments = good(function)
        for convert, kind in ((torch.from_numpy, "torch.Tensor"), (Producer, "producers.Producer")):
            with pytest.raises(
                fwp.DTypeError,
                match=rf"^{position}: expected an array of type numpy.ndarray, as q is, got {kind}$",
            ):
                plainly(function, put(arguments, position, convert(get(arguments, position))))
        theirs = put(each(torch.from_numpy, arguments), position, get(arguments, position))
        with pytest.raises(
            fwp.DTypeError, match=rf"^{position}: .* torch.Tensor, as q is, got numpy.ndarray$"
        ):
            plainly(function, theirs)


def test_arguments_of_a_feature_map_are_of_one_framework():
    phi, x = fwp.feature_maps.ReLU(), np.ones((2, 3), np.float32)
    with pytest.raises(fwp.DTypeError, match=r"^dy: expected an array of type numpy.ndarray, as x is, got"):
        phi.backward(Producer(x), x)
    for bad in (np.float32(1), 3.0):
        with pytest.raises(fwp.DTypeError, match="^x: expected an array"):
            phi(bad)
    with pytest.raises(fwp.ShapeError, match=r"^x: expected at least one axis, got none"):
        phi(Producer(np.ones((), np.float32)))


# ---- producers that refuse, lie or are none ----


class Raises:
    def __init__(self, error):
        self.error = error

    def __dlpack__(self, **keywords):
        raise self.error


@pytest.mark.parametrize(
    "error", [BufferError("no"), RuntimeError("no\nstack"), TypeError("no"), ValueError("no")]
)
def test_a_refusal_becomes_the_cause(error):
    with pytest.raises(fwp.UnsupportedError) as caught:
        fwp.linear_attention(Raises(error), X, X)
    assert caught.value.__cause__ is error
    assert str(caught.value) == (
        "q: expected an array that hands out its memory, got test_dlpack.Raises, which does not: no"
    )


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit()])
def test_no_framework_is_blamed_for_these(error):
    with pytest.raises(type(error)) as caught:
        fwp.linear_attention(Raises(error), X, X)
    assert caught.value is error


class Gives:
    def __init__(self, what):
        self.what = what

    def __dlpack__(self, **keywords):
        return self.what


def test_what_is_no_capsule_is_refused():
    used = Producer(X).__dlpack__()
    fwp.linear_attention(Gives(used), *[Gives(Producer(X).__dlpack__()) for _ in "kv"])
    for what in (None, 3, used, np.zeros(3), _core.Array):
        with pytest.raises(fwp.DTypeError, match=r"^q: expected a DLPack capsule that nobody has taken"):
            fwp.linear_attention(Gives(what), X, X)


@pytest.mark.parametrize(
    "bad", [[1.0], 1.0, None, "q", X.tolist(), Producer(X).__dlpack__(), Producer, np.float32(1)]
)
def test_what_is_no_array_is_refused(bad):
    for q, k in ((bad, X), (X, bad), (Producer(X), bad)):
        with pytest.raises(fwp.DTypeError, match=r"^[qk]: expected an array, got "):
            fwp.linear_attention(q, k, X)


def torch_tensors():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X)
    with importlib.import_module("torch._subclasses").FakeTensorMode():
        fake = torch.empty(2, 6, 4, 8)
    return {
        "fake": (fake, fwp.ArgumentError),
        "meta": (x.to("meta"), fwp.UnsupportedError),
        "sparse": (x.to_sparse(), fwp.UnsupportedError),
        "complex": (torch.complex(x, x).conj(), fwp.DTypeError),
        "integers": (x.int(), fwp.DTypeError),
        "quantized": (x.to(torch.float8_e5m2), fwp.DTypeError),
        "scalar": (x[0, 0, 0, 0], fwp.ShapeError),
    }


@pytest.mark.parametrize("kind", ["fake", "meta", "sparse", "complex", "integers", "quantized", "scalar"])
def test_torch_tensors_that_are_refused(kind):
    tensor, error = torch_tensors()[kind]
    with pytest.raises(error, match="^q: expected ") as caught:
        fwp.linear_attention.__wrapped__(tensor, tensor, tensor)
    assert "\n" not in str(caught.value)


def test_a_jax_tracer_is_refused():
    jax = pytest.importorskip("jax")
    phi = fwp.feature_maps.ReLU()
    with pytest.raises(
        fwp.UnsupportedError, match=r"^x: expected an array that hands out its memory, got jax"
    ):
        jax.jit(lambda x: _core.feature_forward(phi, x))(X)


@pytest.mark.parametrize("x", [X.astype(">f4"), np.ma.array(X)])
def test_arrays_of_numpy_are_not_read_through_dlpack(x):
    with pytest.raises(fwp.DTypeError, match=r"^q: expected "):
        fwp.linear_attention(x, x, x)


# ---- fwp_core.Array ----


def own(x=X):
    """The array as an fwp_core.Array: ReLU of what is positive."""
    return fwp.feature_maps.ReLU()(Producer(abs(x)))


def test_array_face():
    array = own()
    assert (array.shape, array.ndim, array.dtype) == (X.shape, 4, "float32")
    assert repr(array) == "fwp_core.Array(float32 (2, 6, 4, 8))"
    assert array.__dlpack_device__() == (1, 0)
    with pytest.raises(TypeError):
        fwp.Array()


@EVERY_DTYPE
def test_array_as_numpy(dtype):
    x = abs(X).astype(dtype)
    array = own(x)
    view = np.asarray(array)
    same_bits(view, x)
    assert view.flags.writeable
    assert np.asarray(array).ctypes.data == view.ctypes.data
    assert np.array(array, copy=True).ctypes.data != view.ctypes.data
    assert np.asarray(array, copy=False).ctypes.data == view.ctypes.data
    assert np.asarray(array, np.float64).dtype == np.float64
    if dtype != np.float64:
        with pytest.raises(ValueError, match="copy"):
            np.asarray(array, np.float64, copy=False)
    del array
    gc.collect()
    same_bits(view, x)


@pytest.mark.parametrize(
    ("max_version", "name"),
    [
        (None, b"dltensor"),
        ((0, 8), b"dltensor"),
        ((1, 0), b"dltensor_versioned"),
        ((1, 3), b"dltensor_versioned"),
        ((2, 0), b"dltensor_versioned"),
    ],
)
@pytest.mark.parametrize("copy", [None, False, True])
def test_array_exports(max_version, name, copy):
    array = own()
    capsule = array.__dlpack__(max_version=max_version, copy=copy, stream=None, dl_device=(CPU, 0))
    assert capsule_name(capsule) == name
    struct = read(capsule)
    tensor = struct.tensor
    assert (tensor.data == np.asarray(array).ctypes.data) == (not copy)
    assert ctypes.string_at(tensor.data, X.nbytes) == abs(X).tobytes()
    assert tuple(tensor.device) == (CPU, 0)
    assert tensor.shape[: tensor.ndim] == list(X.shape)
    assert tensor.strides[: tensor.ndim] == [192, 32, 8, 1]
    assert (tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset) == (2, 32, 1, 0)
    if name == b"dltensor_versioned":
        assert tuple(struct.version) == (1, 0)
        assert struct.flags == (IS_COPIED if copy else 0)
    assert _core.live_tensors() == 1
    del array  # before what was exported
    gc.collect()
    assert ctypes.string_at(tensor.data, X.nbytes) == abs(X).tobytes()


def test_array_refuses_other_devices_and_streams():
    array = own()
    with pytest.raises(BufferError, match=r"^dl_device: expected the CPU, \(1, 0\), got cuda:0"):
        array.__dlpack__(dl_device=(CUDA, 0))
    with pytest.raises(BufferError, match=r"^stream: expected None for memory of the CPU, got 7"):
        array.__dlpack__(stream=7)
    for name, wrong in [("stream", "no"), ("max_version", 1), ("dl_device", (1,)), ("copy", "no")]:
        with pytest.raises(fwp.DTypeError, match=f"^{name}: expected .*, got "):
            array.__dlpack__(**{name: wrong})


def test_copies_of_an_array():
    array = own()
    shallow, deep = np.asarray(copy.copy(array)), np.asarray(copy.deepcopy(array))
    assert shallow.ctypes.data == np.asarray(array).ctypes.data != deep.ctypes.data
    same_bits(deep, abs(X))


def test_an_array_is_written_in_place():
    k = Producer(np.ones((1, 2, 3), np.float32))
    state = own(np.zeros((1, 2, 3, 3), np.float32))
    fwp.linear_attention_step(k, k, k, state=state)
    assert (np.asarray(state) == 1).all()
    assert type(fwp.linear_attention_step(own(k.x), own(k.x), own(k.x), state=state)) is fwp.Array


def test_a_consumer_may_outlive_the_interpreter():
    code = textwrap.dedent("""
        import atexit, builtins, sys
        import numpy as np
        import fwp_core as fwp

        class Gives:
            def __init__(self, x): self.x = x
            def __dlpack__(self, **keywords): return self.x.__dlpack__(**keywords)

        q = Gives(np.ones((1, 3, 2, 4), np.float32))
        o, state = fwp.linear_attention(q, q, q)
        builtins.kept = (np.from_dlpack(o), state.__dlpack__(), state.__dlpack__(max_version=(1, 0)), o)
        sys.modules["kept"] = builtins.kept
        atexit.register(lambda: print(fwp._core.live_tensors()))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_tensors_die_on_any_thread():
    import threading

    kept = [own().__dlpack__(max_version=(1, 0)) for _ in range(8)]
    threads = [threading.Thread(target=kept.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _core.live_tensors() == 0


# ---- the ABI ----

HEADERS = ("torch/include/ATen/dlpack.h", "tvm_ffi/include/dlpack/dlpack.h")
SAME = {
    "DLTensor": ("::DLTensor", "data device ndim dtype shape strides byte_offset"),
    "DLDevice": ("::DLDevice", "device_type device_id"),
    "DLDataType": ("::DLDataType", "code bits lanes"),
    "DLPackVersion": ("fwp::dlpack::Version", "major minor"),
    "DLManagedTensor": ("fwp::dlpack::LegacyTensor", "dl_tensor:tensor manager_ctx:context deleter"),
    "DLManagedTensorVersioned": (
        "fwp::dlpack::ManagedTensor",
        "version manager_ctx:context deleter flags dl_tensor:tensor",
    ),
    "DLPackExchangeAPIHeader": ("fwp::dlpack::ExchangeHeader", "version prev_api:previous"),
    "DLPackExchangeAPI": (
        "fwp::dlpack::ExchangeApi",
        "header managed_tensor_allocator:allocate managed_tensor_from_py_object_no_sync:managed_from_object "
        "managed_tensor_to_py_object_no_sync:object_from_managed "
        "dltensor_from_py_object_no_sync:borrow_from_object current_work_stream",
    ),
}
VALUES = {
    "kDLCPU": "fwp::dlpack::kCPU",
    "kDLCUDA": "fwp::dlpack::kCUDA",
    "kDLCUDAHost": "fwp::dlpack::kCUDAHost",
    "kDLCUDAManaged": "fwp::dlpack::kCUDAManaged",
    "kDLInt": "::kDLInt",
    "kDLUInt": "::kDLUInt",
    "kDLFloat": "::kDLFloat",
    "kDLBfloat": "::kDLBfloat",
    "kDLComplex": "fwp::dlpack::kComplex",
    "kDLBool": "fwp::dlpack::kBool",
}


def header():
    for name in HEADERS:
        package = importlib.util.find_spec(name.partition("/")[0])
        if package is not None:
            path = Path(package.origin).parents[1] / name
            if path.is_file():
                return path
    pytest.skip("no package here has DLPack's header")


def abi_checks():
    for theirs, (ours, fields) in SAME.items():
        yield f"sizeof(real::{theirs}) == sizeof({ours})"
        for field in fields.split():
            their, _, our = field.partition(":")
            our = our or their
            yield f"offsetof(real::{theirs}, {their}) == offsetof({ours}, {our})"
            yield f"sizeof(real::{theirs}::{their}) == sizeof({ours}::{our})"
    for theirs, ours in VALUES.items():
        yield f"int(real::{theirs}) == int({ours})"
    yield "DLPACK_FLAG_BITMASK_READ_ONLY == fwp::dlpack::kReadOnly"
    yield "DLPACK_FLAG_BITMASK_IS_COPIED == fwp::dlpack::kIsCopied"
    yield "DLPACK_MAJOR_VERSION == fwp::dlpack::kMajor"


@pytest.mark.parametrize("wrong", [False, True])
def test_our_structs_are_those_of_dlpack(tmp_path, wrong):
    if not (ROOT / "python" / "dlpack.hpp").is_file():
        pytest.skip("needs the sources")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler")
    checks = [*abi_checks(), *(["sizeof(real::DLTensor) == sizeof(real::DLDevice)"] if wrong else [])]
    assert len(checks) > 60
    source = tmp_path / "abi.cpp"
    asserts = "\n".join(f"static_assert({check});" for check in checks)
    source.write_text(
        "#include <cstddef>\n#include <stddef.h>\n#include <stdint.h>\n"
        f'namespace real {{\n#include "{header()}"\n}}\n#undef DLPACK_DLPACK_H_\n'
        f'#include "dlpack.hpp"\n{asserts}\n'
    )
    include = [f"-I{ROOT / 'python'}", f"-I{ROOT / 'cpp' / 'include'}"]
    command = [compiler, "-std=c++17", "-fsyntax-only", *include, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == wrong, done.stderr
