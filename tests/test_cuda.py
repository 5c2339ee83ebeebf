"""Arrays of a CUDA device through every door that opens without a GPU: the emulator's device, host memory."""

import contextlib
import copy
import ctypes
import gc
import itertools
import os
import random
import sys
import types

import numpy as np
import pytest
from cases import (
    BACKWARD,
    DECAYS,
    DTYPES,
    MAPS,
    RULES,
    SCAN,
    STEP,
    exact_gradients,
    exact_map,
    exact_scan,
    gradients,
    is_favor,
    make_case,
    scan,
    state_dtype,
    steps,
    vjp,
)
from device import DEVICE, STREAM, DeviceArray, ExchangeArray, Namespace
from processes import run_python
from producers import CPU, CUDA, CUDA_MANAGED, IS_COPIED, READ_ONLY, capsule_name, read
from strategies import LAYOUTS, strided_last_axis
from tolerances import DEVICE as TOLERANCE
from tolerances import KEYS_ALIKE, TENSOR_CORES, assert_bits_equal, relative_error
from xla_frames import Runtime

import fwp_core as fwp
from fwp_core import _core

pytestmark = pytest.mark.usefixtures("emulated")

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
EVERY_RULE = pytest.mark.parametrize("rule", RULES)
SMALL = {"T": 5, "K": 8, "V": 8}
HALF = DTYPES[2:]


@pytest.fixture(autouse=True)
def no_leak():
    """Every tensor is given back, whatever a test does; and no fault is left for the next one."""
    before = _core.live_tensors()
    yield
    gc.collect()
    assert _core.live_tensors() <= before


@pytest.fixture(params=[DeviceArray, ExchangeArray], ids=["capsules", "exchange"])
def framework(request):
    return request.param


def moved(case, framework=DeviceArray):
    """The case with its arrays on the device, the projection of its feature map, too."""
    there = case.map(framework)
    if is_favor(case.feature_map):
        name, projection, *more = case.feature_map
        there = there.but(feature_map=(name, framework(projection), *more))
    return there


def close(x, exact, name="", tolerance=0.0, floor=1.0):
    """Within the tolerance of the dtype, or a greater one, of an array of the device."""
    error = relative_error(x.x, exact, floor=floor)
    assert error <= max(tolerance, TOLERANCE[x.x.dtype.name]), f"{name}: error {error:.3g}"


def same(x, y, name=""):
    """Bit for bit, of two arrays of the device."""
    assert (x is None) == (y is None), name
    if x is not None:
        assert_bits_equal(x.x, y.x, name)


def tensor_cores(dtype):
    """The tolerance of what float16 operands make of float32 results."""
    return TENSOR_CORES if dtype in HALF else 0.0


def are_the_oracles(case, framework, there=None, tolerance=None):
    tolerance = tensor_cores(case.v.dtype) if tolerance is None else tolerance
    there = there or moved(case, framework)
    o, final_state = scan(there)
    assert type(o) is type(final_state) is framework
    assert (o.x.dtype, final_state.x.dtype) == (case.v.dtype, case.state_dtype)
    exact_o, exact_state = exact_scan(case)
    close(o, exact_o, "o")
    close(final_state, exact_state, "final_state", tolerance)
    exact = exact_gradients(case)
    for name, x, y in zip(exact._fields, gradients(there), exact, strict=True):
        assert (x is None) == (y is None), name
        if y is not None:
            assert type(x) is framework
            # One number, a sum of K V products of about 1, may be small by luck; its error is not.
            lucky = case.v.dtype in HALF and name in ("dbeta", "dg") and y.size == 1
            close(x, y, name, tolerance, np.sqrt(case.q.shape[-1] * case.v.shape[-1]) if lucky else 1.0)


# ---- what the oracle computes ----


@EVERY_DTYPE
@EVERY_RULE
def test_scans_and_gradients(framework, rule, dtype):
    are_the_oracles(make_case(rule, "scalar", dtype=dtype, heads=(1, 2, 2), T=7, K=8, V=12), framework)


@pytest.mark.parametrize("decay", DECAYS)
@EVERY_RULE
def test_decays_and_grouped_heads(rule, decay):
    case = make_case(rule, decay, heads=(4, 2, 1), gate="mixed", gate_dtype=np.float32, B=1, **SMALL)
    are_the_oracles(case, DeviceArray)


@pytest.mark.parametrize("feature_map", MAPS, ids=lambda phi: "-".join(map(str, phi)))
def test_feature_maps_in_scans(framework, feature_map):
    are_the_oracles(make_case("delta", feature_map=feature_map, B=1, T=4, K=4, V=5), framework)


@pytest.mark.parametrize("qk_norm", ["sum", "l2"])
@pytest.mark.parametrize("attention_norm", [False, True])
@EVERY_RULE
def test_norms(rule, qk_norm, attention_norm):
    case = make_case(rule, "scalar", qk_norm=qk_norm, attention_norm=attention_norm, B=1, **SMALL)
    are_the_oracles(case, DeviceArray)


@pytest.mark.parametrize("sizes", [{"T": 0}, {"B": 0}, {"heads": (0, 0, 0)}, {"K": 0}, {"V": 0}], ids=str)
@EVERY_RULE
def test_sizes_of_zero(framework, rule, sizes):
    are_the_oracles(make_case(rule, "scalar", **{**SMALL, **sizes}), framework)


def test_what_is_optional():
    are_the_oracles(make_case("linear", beta=False, state=False, scale=0.5, **SMALL), DeviceArray)


@EVERY_RULE
def test_vjp_is_scan_and_backward(framework, rule):
    there = moved(make_case(rule, "channel", **SMALL), framework)
    results, pullback = vjp(there)
    for x, y in zip(results, scan(there), strict=True):
        same(x, y)
    for _ in range(2):
        for x, y in zip(pullback(there.do, there.dfinal_state), gradients(there), strict=True):
            same(x, y)


@EVERY_DTYPE
@EVERY_RULE
def test_steps(framework, rule, dtype):
    case = make_case(rule, "scalar", dtype=dtype, heads=(1, 2, 2), state=True, B=2, **SMALL)
    there = moved(case, framework)
    exact_o, exact_state = exact_scan(case)
    state = framework(case.first_state())
    memory = state.x
    for t in range(SMALL["T"]):
        at = there.map(lambda x: x)  # the same arrays
        token = {name: framework(x.x[:, t]) for name, x in per_token(at).items()}
        o = STEP[rule](*(token.get(name) for name in ("q", "k", "v", "beta", "g")), state=state)
        close(o, exact_o[:, t], f"o {t}")
    assert state.x is memory
    close(state, exact_state, "state")


def per_token(case):
    return {name: x for name in ("q", "k", "v", "beta", "g") if (x := getattr(case, name)) is not None}


@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("where", ["list", "host", "device"])
def test_slots(framework, where, integer):
    case = make_case("delta", B=3, T=2, K=8, V=8)
    slots = np.array([4, -1, 1], integer)
    pool = np.random.default_rng(0).standard_normal((5, 2, 8, 8)).astype(np.float32)
    given = {"list": slots.tolist(), "host": slots, "device": framework(slots)}[where]
    state, expected = framework(pool.copy()), pool.copy()
    o = STEP["delta"](*moved(case, framework).inputs, state=state, state_indices=given)
    exact = STEP["delta"](*case.inputs, state=expected, state_indices=slots)
    close(o, exact)
    close(state, expected)
    assert not o.x[1].any()
    for untouched in (0, 2, 3):
        assert_bits_equal(state.x[untouched], pool[untouched])


@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("where", ["host", "device", "strided"])
@EVERY_RULE
def test_packed_sequences(framework, rule, where, integer):
    case = make_case(rule, "scalar", lengths=(0, 3, 1, 0, 2), K=8, V=8)
    there = moved(case, framework)
    lengths = case.cu_seqlens.astype(integer)
    if where == "device":
        there = there.but(cu_seqlens=framework(lengths))
    elif where == "strided":
        there = there.but(cu_seqlens=framework(np.repeat(lengths, 3)[::3]))
    for x, exact in zip(scan(there), exact_scan(case), strict=True):
        close(x, exact)
    for x, exact in zip(gradients(there), exact_gradients(case), strict=True):
        close(x, exact)
    (o, _), pullback = vjp(there)
    same(o, scan(there)[0])
    if where != "host":
        there.cu_seqlens.x[...] = 0  # a pullback has a copy
    close(pullback(there.do, there.dfinal_state).dk, exact_gradients(case).dk)


# Sequences that are cut into segments.


@pytest.fixture
def unchecked(monkeypatch):
    """Several times as fast, without what the emulator looks for; not where every case is wanted."""
    monkeypatch.setenv("FWP_SIMT_CHECK", os.environ.get("FWP_EVERY_CASE", "0"))


@EVERY_RULE
def test_long_sequences_of_few_heads(unchecked, rule):
    are_the_oracles(make_case(rule, "channel", B=1, T=1030, heads=(1, 1, 1), K=4, V=3), DeviceArray)


def test_long_packed_sequences(unchecked):
    case = make_case("delta", "scalar", lengths=(1, 2100), heads=(1, 1, 1), K=4, V=3)
    there = moved(case)
    o, final_state = scan(there.but(cu_seqlens=DeviceArray(case.cu_seqlens)))
    for x, y, exact in zip((o, final_state), scan(there), exact_scan(case), strict=True):
        same(x, y)
        close(x, exact)


@EVERY_DTYPE
@pytest.mark.parametrize("feature_map", MAPS, ids=lambda phi: "-".join(map(str, phi)))
def test_feature_maps(framework, feature_map, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4)).astype(dtype)
    here = there = feature_map
    if is_favor(feature_map):
        name, m, *more = feature_map
        projection = rng.standard_normal((m, 4)).astype(state_dtype(dtype))
        here, there = (name, projection, *more), (name, framework(projection), *more)
    phi, exact = library(there), exact_map(here)
    y = phi(framework(x))
    assert type(y) is framework
    wide = x.astype(np.float64)
    close(y, exact.value(wide), "y")
    dy = rng.standard_normal(y.x.shape).astype(dtype)
    close(phi.backward(framework(dy), framework(x)), exact.vjp(dy.astype(np.float64), wide), "dx")


def library(feature_map):
    name, *arguments = feature_map
    return getattr(fwp.feature_maps, name)(*arguments)


def test_diagnose(framework):
    case = make_case("delta", "scalar", lengths=(2, 3), K=8, V=8)
    there = moved(case, framework)
    expected = fwp.diagnose(fwp.delta_rule, *case.inputs, cu_seqlens=case.cu_seqlens)
    for lengths in (case.cu_seqlens, framework(case.cu_seqlens)):
        found = fwp.diagnose(fwp.delta_rule, *there.inputs, cu_seqlens=lengths)
        assert found.positions.tolist() == [1, 2, 1, 2, 3]
        for name, probe in found.probes().items():
            assert type(probe) is np.ndarray
            assert relative_error(probe, expected.probes()[name], floor=1.0) < TOLERANCE["float32"], name


# ---- lengths that chunks serve, of halves ----

LONG = {"B": 1, "T": 70, "K": 20, "V": 12}
HALVES = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: np.dtype(dtype).name)


@HALVES
@pytest.mark.parametrize("decay", DECAYS)
@EVERY_RULE
def test_chunks(rule, decay, dtype):
    case = make_case(rule, decay, gate_dtype=np.float32, dtype=dtype, heads=(1, 2, 2), **LONG)
    are_the_oracles(case, ExchangeArray)


@pytest.mark.parametrize("options", [{"qk_norm": "l2"}, {"feature_map": ("ELU1",)}, {"V": 140}], ids=str)
@EVERY_RULE
def test_chunks_of_grouped_heads_with_partial_sums(rule, options):
    case = make_case(rule, "scalar", dtype=DTYPES[-1], heads=(1, 2, 2), **{**LONG, **options})
    are_the_oracles(case, ExchangeArray)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("lengths", [(128,), (3, 70, 0, 45)], ids=str)
@EVERY_RULE
def test_chunks_of_packed_sequences(rule, lengths, where):
    case = make_case(rule, "scalar", dtype=DTYPES[-1], lengths=lengths, K=20, V=12)
    there = moved(case, ExchangeArray)
    if where == "device":
        there = there.but(cu_seqlens=ExchangeArray(case.cu_seqlens))
    are_the_oracles(case, ExchangeArray, there)


@EVERY_RULE
def test_heads_that_chunks_give_up(rule):
    """With numbers out of range, which another form computes as well; others are as they were."""
    case = make_case(rule, "scalar", dtype=DTYPES[-1], **LONG)
    case.v[0, 40, 1] = np.inf
    there, plain = (
        moved(case, ExchangeArray),
        moved(make_case(rule, "scalar", dtype=DTYPES[-1], **LONG), ExchangeArray),
    )
    found, others = ([*scan(x), *gradients(x)] for x in (there, plain))
    for x, y, axis in zip(found, others, (2, 1, 2, 2, 2, 2, 2, 1), strict=True):
        assert np.isfinite(x.x.take(0, axis).astype(np.float32)).all()
        assert_bits_equal(x.x.take(0, axis), y.x.take(0, axis))
    o = scan(there)[0].x[0, :, 1].astype(np.float32)
    assert np.isfinite(o[:40]).all()
    assert not np.isfinite(o[40:]).any(-1).all()


# ---- the matrix of shapes and dtypes, of which a part is for every day ----

SIZES = (1, 3, 31, 64, 100, 257)
TIMES = (0, 1, 2, 15, 33, 64, 65, 130)
EVERY_DAY = 29  # one of so many, which meets every value
MATRIX = [
    pytest.param(i, *values, marks=[pytest.mark.slow] * (i % EVERY_DAY > 0))
    for i, values in enumerate(itertools.product(SIZES, SIZES, DTYPES, RULES, DECAYS))
]


@pytest.mark.parametrize(("seed", "K", "V", "dtype", "rule", "decay"), MATRIX)
def test_any_shape(unchecked, seed, K, V, dtype, rule, decay):
    draw = random.Random(seed).choice
    T = draw([T for T in TIMES if T * K * V < 1e6])
    heads = draw([(1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 1, 1)] if K * V < 5000 else [(1, 1, 1)])
    half = dtype in HALF
    more = {
        "lengths": draw([None, (T, 0, 3)]),
        "gate_dtype": np.float32 if half else None,
        "state": draw([False, True]),
    }
    case = make_case(rule, decay, B=1, T=T, heads=heads, K=K, V=V, dtype=dtype, **more)
    there = moved(case.map(draw(LAYOUTS)))
    are_the_oracles(case, DeviceArray, there, KEYS_ALIKE if half and K < 8 else None)


# ---- memory ----


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@EVERY_RULE
def test_layouts_do_not_matter(framework, rule, layout):
    case = make_case(rule, "channel", B=2, T=5, heads=(2, 4, 4), K=8, V=8)
    there, plain = moved(case.map(layout), framework), moved(case, framework)
    for x, y in zip([*scan(there), *gradients(there)], [*scan(plain), *gradients(plain)], strict=True):
        same(x, y)


def test_rows_of_any_layout_go_through_a_feature_map(framework):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
    phi = fwp.feature_maps.DPFP(2)
    for rows in (x[::-1], x.transpose(0, 2, 1, 3), x[..., ::2], x[:, ::2, 1:]):
        same(phi(framework(rows)), phi(framework(rows.copy())))


@EVERY_RULE
def test_outputs_are_overwritten_in_place(framework, rule):
    there = moved(make_case(rule, "scalar", **SMALL), framework)
    results = scan(there)
    grads = gradients(there)
    for layout in (lambda x: x, LAYOUTS[0], strided_last_axis):
        out, final, *more = (framework(layout(np.full_like(x.x, np.nan))) for x in (*results, *grads))
        memory = [x.x for x in (out, final, *more)]
        assert scan(there, out=out, final_state_out=final) == (out, final)
        assert gradients(there, out=fwp.Gradients(*more)) == tuple(more)
        for x, y, kept in zip((out, final, *more), (*results, *grads), memory, strict=True):
            assert x.x is kept
            same(x, y)


def test_a_strided_state_is_written_in_place(framework):
    case = make_case("delta", B=2, T=3, K=8, V=8)
    there = moved(case, framework)
    plain, strided = framework(case.first_state()), framework(strided_last_axis(case.first_state()))
    memory = strided.x
    same(steps(there, plain), steps(there, strided))
    assert strided.x is memory
    same(plain, strided)


def test_the_framework_is_asked_for_results_and_work_memory_on_its_device():
    there = moved(make_case("delta", "scalar", **SMALL), ExchangeArray)
    ExchangeArray.allocated.clear()
    ExchangeArray.asked.clear()
    o, final_state = scan(there)
    assert {x.fields["device"] for x in ExchangeArray.allocated} == {DEVICE}
    made = {x.x.ctypes.data for x in ExchangeArray.allocated}
    assert {o.x.ctypes.data, final_state.x.ctypes.data} <= made
    work = [x for x in ExchangeArray.allocated if x.x.dtype == np.uint8 and x.x.ndim == 1]
    assert len(work) <= 1
    assert set(ExchangeArray.asked) == {DEVICE}


class Unable(DeviceArray):
    """A framework that copies nothing and takes nothing over."""

    __array_namespace__ = None

    def __getattribute__(self, name):
        if name == "__array_namespace__":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_framework_that_cannot_copy():
    case = make_case("linear", **SMALL)
    strided = case.but(k=strided_last_axis(case.k)).map(Unable)
    with pytest.raises(
        fwp.UnsupportedError, match="^k: expected an array that need not be copied, got one of type"
    ):
        scan(strided)


# ---- fwp_core.Array ----


def own(case=None):
    """A result for a framework that takes nothing over."""
    o, _ = scan((case or make_case("linear", **SMALL)).map(Unable))
    assert type(o) is fwp.Array
    return o


def test_array_face():
    o = own()
    assert repr(o) == "fwp_core.Array(float32 (2, 5, 2, 8) cuda:0)"
    assert (o.device, o.__dlpack_device__()) == ("cuda:0", (2, 0))
    assert own(make_case("linear", **SMALL)).shape == (2, 5, 2, 8)


def test_array_is_not_read_by_numpy():
    o = own()
    for convert in (np.asarray, np.array):
        with pytest.raises(
            fwp.DeviceError, match="^array: expected memory of the CPU, .* got memory of cuda:0"
        ):
            convert(o)
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(o)


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("stream", [None, -1, 1, 2, STREAM])
@pytest.mark.parametrize(("version", "name"), [(None, b"dltensor"), ((1, 3), b"dltensor_versioned")])
def test_array_exports(stream, version, name, copy):
    case = make_case("linear", **SMALL)
    o = own(case)
    capsule = o.__dlpack__(stream=stream, max_version=version, copy=copy, dl_device=DEVICE)
    assert capsule_name(capsule) == name
    tensor = read(capsule).tensor
    assert tuple(tensor.device) == DEVICE
    if version:
        assert read(capsule).flags == (IS_COPIED if copy else 0)
    del o
    gc.collect()
    values = np.frombuffer(ctypes.string_at(tensor.data, 4 * 2 * 5 * 2 * 8), np.float32)
    assert relative_error(values, exact_scan(case)[0].ravel(), floor=1.0) < TOLERANCE["float32"]


def test_array_refuses_other_devices_and_streams():
    o = own()
    for stream in (0, -2):
        with pytest.raises(
            ValueError, match="^stream: expected None, -1, 1, 2 or the address of a CUDA stream, got"
        ):
            o.__dlpack__(stream=stream)
    for device, words in (((CPU, 0), "cpu:0"), ((CUDA, 1), "cuda:1")):
        with pytest.raises(BufferError, match=rf"^dl_device: expected cuda:0, \(2, 0\), got {words}"):
            o.__dlpack__(dl_device=device)


def test_copies_of_an_array():
    o = own()
    shallow, deep = copy.copy(o), copy.deepcopy(o)
    capsules = [x.__dlpack__() for x in (o, shallow, deep)]
    at = [read(capsule).tensor.data for capsule in capsules]
    assert at[0] == at[1] != at[2]
    assert_bits_equal(_core.to_numpy("x", deep), _core.to_numpy("x", o))


def test_results_go_into_the_next_call():
    case = make_case("delta", state=False, **SMALL)
    there = case.map(Unable)
    state = scan(there)[1]
    assert type(state) is fwp.Array
    expected = exact_scan(case.but(initial_state=exact_scan(case)[1]))[0]
    o = _core.to_numpy("o", scan(there.but(initial_state=state))[0])
    assert relative_error(o, expected, floor=1.0) < TOLERANCE["float32"]


# ---- streams ----


def test_consumers_say_which_stream_they_use():
    there = moved(make_case("delta", "scalar", **SMALL))
    scan(there)
    for name in ("q", "k", "v", "beta", "g", "initial_state"):
        assert getattr(there, name).streams == [1]  # the default stream


def cupy(monkeypatch, **functions):
    """A module of that name whose module cuda has these functions; returns its type of arrays."""
    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(**functions)
    module.from_dlpack = lambda x: ndarray(Namespace.from_dlpack(x).x)
    monkeypatch.setitem(sys.modules, "cupy", module)

    class ndarray(Unable):
        __module__ = "cupy"

    return ndarray


def test_the_current_stream_of_cupy(monkeypatch):
    stream = types.SimpleNamespace(ptr=STREAM, is_capturing=lambda: False)
    ndarray = cupy(monkeypatch, get_current_stream=[stream].__getitem__)
    case = make_case("linear", **SMALL)
    there = case.map(ndarray)
    o, state = scan(there)
    assert type(o) is type(state) is ndarray
    close(o, exact_scan(case)[0])
    assert there.q.streams == there.k.streams == [STREAM]
    before = sys.getrefcount(stream)
    del o, state
    gc.collect()
    assert sys.getrefcount(stream) < before  # memory keeps its stream
    stream.ptr = 0
    there = case.map(ndarray)
    scan(there)
    assert there.q.streams == [1]  # 0 is no stream of DLPack's


def test_the_allocator_of_cupy(monkeypatch):
    current, taken = [], []

    class Device(contextlib.AbstractContextManager):
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            current.append(self.number)

        def __exit__(self, *error):
            current.pop()

    def alloc(size):
        assert current == [0]
        taken.append(np.zeros(size, np.uint8))
        return types.SimpleNamespace(ptr=taken[-1].ctypes.data)

    stream = types.SimpleNamespace(ptr=STREAM, is_capturing=lambda: False)
    ndarray = cupy(monkeypatch, get_current_stream=[stream].__getitem__, Device=Device, alloc=alloc)
    case = make_case("delta", lengths=(2, 3), dtype=np.float16, K=8, V=8)
    are_the_oracles(case, ndarray)
    assert len(taken) == 2
    assert all(memory.any() for memory in taken)
    assert current == []

    # What a graph uses is not of a pool that does not know of graphs.
    stream.is_capturing = lambda: True
    are_the_oracles(case, ndarray)
    assert len(taken) == 2
    stream.is_capturing = lambda: False

    def none_left(size):
        raise MemoryError("none left")

    sys.modules["cupy"].cuda.alloc = none_left
    with pytest.raises(MemoryError, match="^none left$"):
        scan(case.map(ndarray))
    assert current == []


def test_torch_that_does_not_tell_its_stream():
    class Tensor(DeviceArray):
        __module__ = "torch"

    with pytest.raises(fwp.UnsupportedError, match=r"^q: expected a tensor of torch 2\.10 or newer"):
        scan(make_case("linear", **SMALL).map(Tensor))


def test_integers_of_another_framework():
    case = make_case("linear", lengths=(2, 3), K=8, V=8)
    lengths = DeviceArray(case.cu_seqlens)
    for framework in (ExchangeArray, DeviceArray):
        o, _ = scan(moved(case, framework).but(cu_seqlens=lengths))
        close(o, exact_scan(case)[0])
    assert lengths.streams == [STREAM, 1]
    o, _ = scan(moved(case).but(cu_seqlens=ExchangeArray(case.cu_seqlens)))
    close(o, exact_scan(case)[0])


# ---- errors ----

FUNCTIONS = {**{SCAN[rule]: "q" for rule in RULES}, **{BACKWARD[rule]: "do" for rule in RULES}}


def test_arrays_of_two_devices_are_refused(framework):
    case = make_case("delta", "scalar", **SMALL)
    there = moved(case, framework)
    for name in ("k", "v", "beta", "g", "initial_state"):
        x = getattr(case, name)
        for device, words in (((CPU, 0), "the CPU"), ((CUDA, 1), "cuda:1")):
            mixed = there.but(**{name: framework(x, device=device)})
            with pytest.raises(
                fwp.DeviceError,
                match=rf"^{name}: expected a tensor on cuda:0, as q is, got one on {words}$",
            ):
                scan(mixed)
    here = case.map(lambda x: framework(x, device=(CPU, 0)))
    with pytest.raises(
        fwp.DeviceError, match=r"^k: expected a tensor on the CPU, as q is, got one on cuda:0$"
    ):
        scan(here.but(k=there.k))
    with pytest.raises(
        fwp.DeviceError, match=r"^out: expected a tensor on cuda:0, as q is, got one on the CPU$"
    ):
        scan(there, out=framework(np.empty_like(case.v), device=(CPU, 0)))


def test_integers_of_a_device_are_for_arrays_there(framework):
    case = make_case("linear", lengths=(2, 3), K=8, V=8)
    with pytest.raises(
        fwp.DeviceError, match=r"^cu_seqlens: expected a tensor on the CPU, as q is, got one on cuda:0$"
    ):
        scan(case.but(cu_seqlens=framework(case.cu_seqlens)))
    for dtype in (np.int16, np.uint64):
        with pytest.raises(
            fwp.DTypeError, match="^cu_seqlens: expected int32 or int64 on a device, got u?int"
        ):
            scan(moved(case, framework).but(cu_seqlens=framework(case.cu_seqlens.astype(dtype))))


def test_frameworks_are_not_mixed(framework):
    case = make_case("linear", **SMALL)
    there = moved(case, framework)
    with pytest.raises(
        fwp.DTypeError, match=r"^k: expected an array of type device\..*, as q is, got numpy.ndarray"
    ):
        scan(there.but(k=case.k))
    with pytest.raises(
        fwp.DTypeError, match=r"^k: expected an array of type numpy.ndarray, as q is, got device"
    ):
        scan(case.but(k=there.k))


def test_a_projection_is_where_the_arrays_are(framework):
    x, projection = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    with pytest.raises(
        fwp.DeviceError, match="^projection: expected a tensor on cuda:0, as x is, got one on the CPU"
    ):
        fwp.feature_maps.FAVOR(projection)(framework(x))
    with pytest.raises(
        fwp.DeviceError, match="^projection: expected a tensor on the CPU, as x is, got one on cuda:0"
    ):
        fwp.feature_maps.FAVOR(framework(projection))(x)
    with pytest.raises(fwp.DTypeError, match="^projection: expected dtype float32 or float64, got"):
        fwp.feature_maps.FAVOR(framework(projection.astype(np.float16)))


def test_a_projection_is_kept_as_it_was(framework):
    projection = framework(np.ones((5, 4), np.float32))
    phi, x = fwp.feature_maps.FAVOR(projection), framework(np.ones((3, 4), np.float32))
    before = phi(x).x.copy()
    projection.x[...] = 0
    assert_bits_equal(phi(x).x, before)


def test_read_only_memory_is_not_written(framework):
    case = make_case("linear", **SMALL)
    there = moved(case, framework)
    if framework is ExchangeArray:
        pytest.skip("the exchange API of this framework knows no flags")
    with pytest.raises(fwp.ReadOnlyError, match="^out: expected a writable array, got a read-only one"):
        scan(there, out=framework(np.empty_like(case.v), flags=READ_ONLY))


def test_managed_memory_is_of_the_device():
    case = make_case("linear", **SMALL)
    there = case.map(lambda x: DeviceArray(x, device=(CUDA_MANAGED, 0)))
    close(scan(there.but(k=DeviceArray(case.k)))[0], exact_scan(case)[0])


def test_devices_that_are_not_there():
    case = make_case("linear", **SMALL).map(lambda x: DeviceArray(x, device=(CUDA, 1)))
    with pytest.raises((fwp.CudaError, MemoryError), match="cuda:1: the emulator has the device cuda:0 only"):
        scan(case)


NOT_THERE = """
import numpy as np, fwp_core as fwp
from device import DeviceArray
q = DeviceArray(np.ones((1, 2, 1, 3), np.float32))
try:
    fwp.linear_attention(q, q, q)
except fwp.DeviceError as error:
    print(error)
print(fwp.has_cuda())
"""


def test_without_a_back_end(tmp_path):
    done = run_python(NOT_THERE, FWP_CUDA_PLUGIN=str(tmp_path / "none.so"))
    expected = f"since CUDA is {tmp_path / 'none.so'} not found, got cuda:0\nFalse\n"
    assert done.stdout == f"q: expected memory of the CPU, {expected}", done.stderr
    (tmp_path / "bad.so").write_bytes(b"no library")
    done = run_python(NOT_THERE, FWP_CUDA_PLUGIN=str(tmp_path / "bad.so"))
    assert "since CUDA is " in done.stdout, done.stderr
    assert "got cuda:0" in done.stdout


def test_the_state_of_an_emulated_device():
    assert fwp.show_config("dict")["cuda"] == "emulated"
    assert fwp.has_cuda() is False


# ---- XLA's custom calls ----

# Positions in the masks of python/xla.cpp.
OPERAND = {"q": 0, "k": 1, "v": 2, "beta": 3, "g": 4, "initial_state": 5, "cu_seqlens": 6, "state_indices": 7}
OPERAND |= {"projection": 8, "state": 9, "do": 10, "dfinal_state": 11}
RESULT = {"o": 0, "final_state": 1} | {
    name: 4 + i for i, name in enumerate(("dq", "dk", "dv", "dbeta", "dg"))
}


def xla(runtime, function, operands, results, **options):
    """Call a handler with arrays by name; returns its error."""
    settings = {"map": 0, "nu": 0, "qk_norm": 0, "map_eps": 0.0, "eps": 1e-6, "scale": 1.0}
    settings |= {"attention_norm": False, "rank": operands["q"].ndim}
    settings["operands"] = sum(1 << OPERAND[name] for name in operands)
    settings["results"] = sum(1 << RESULT[name] for name in results)
    ordered = [
        [arrays[name] for name in places if name in arrays]
        for arrays, places in ((operands, OPERAND), (results, RESULT))
    ]
    return runtime.call(function, *ordered, settings | options)


def inputs_of(case):
    names = ("q", "k", "v", "beta", "g", "initial_state")
    return {name: x for name in names if (x := getattr(case, name)) is not None}


@EVERY_DTYPE
@EVERY_RULE
def test_xla_scans_and_gradients(rule, dtype):
    case = make_case(rule, "scalar", dtype=dtype, state=False, **SMALL)
    name, runtime = SCAN[rule].__name__, Runtime()
    exact = exact_scan(case)
    o, state = np.full(exact[0].shape, np.nan, dtype), np.full(exact[1].shape, np.nan, case.state_dtype)
    assert xla(runtime, name, inputs_of(case), {"o": o, "final_state": state}) is None
    assert runtime.most <= 1
    for x, y in zip((o, state), exact, strict=True):
        assert relative_error(x, y, floor=1.0) < max(TOLERANCE[x.dtype.name], tensor_cores(dtype))
    exact = exact_gradients(case)
    names = ("q", "k", "v", "beta", "g")
    made = {f"d{name}": np.full_like(getattr(case, name), np.nan) for name in names}
    assert xla(runtime, f"{name}_backward", inputs_of(case) | {"do": case.do}, made) is None
    for name, x in made.items():
        assert relative_error(x, getattr(exact, name), floor=1.0) < TOLERANCE[x.dtype.name], name


@pytest.mark.parametrize("in_place", [False, True])
def test_xla_steps(in_place):
    case = make_case("delta", B=2, T=2, K=8, V=8)
    before, o = case.first_state(), np.full_like(case.do, np.nan)
    after = before if in_place else np.full_like(before, np.nan)
    exact = exact_scan(case)
    operands = {name: x for name, x in inputs_of(case).items() if name != "initial_state"} | {"state": before}
    assert xla(Runtime(), "delta_rule_step", operands, {"o": o, "final_state": after}) is None
    for x, y in zip((o, after), exact, strict=True):
        assert relative_error(x, y, floor=1.0) < TOLERANCE["float32"]
    assert in_place or np.array_equal(before, case.first_state())


def test_xla_vmap_and_packed_sequences():
    """Samples of packed sequences are calls of their own, each with its lengths on the device."""
    case = make_case("linear", lengths=(2, 3), beta=False, state=False, K=8, V=8)
    lengths = [np.array([0, 2, 5]), np.array([0, 4, 5])]
    operands = {name: np.stack([x, x]) for name, x in inputs_of(case).items()}
    operands["cu_seqlens"] = np.stack(lengths)
    results = {
        "o": np.empty((2, *case.do.shape), np.float32),
        "final_state": np.empty((2, 2, 2, 8, 8), np.float32),
    }
    assert xla(Runtime(), "linear_attention", operands, results, rank=4) is None
    for sample in range(2):
        exact = exact_scan(case.but(cu_seqlens=lengths[sample]))
        for x, y in zip(results.values(), exact, strict=True):
            assert relative_error(x[sample], y, floor=1.0) < TOLERANCE["float32"]


def test_xla_feature_maps():
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    y, dx = np.full((5, 16), np.nan, np.float32), np.full((5, 4), np.nan, np.float32)
    phi = exact_map(("DPFP", 2))
    options = {"map": 4, "nu": 2}
    assert xla(Runtime(), "feature_forward", {"q": x}, {"o": y}, **options) is None
    assert relative_error(y, phi.value(x), floor=1.0) < TOLERANCE["float32"]
    assert xla(Runtime(), "feature_backward", {"q": x, "do": y}, {"dq": dx}, **options) is None
    assert relative_error(dx, phi.vjp(y, x), floor=1.0) < TOLERANCE["float32"]


def test_xla_errors():
    case = make_case("linear", beta=False, state=False, **SMALL)
    results = {"o": np.empty_like(case.do), "final_state": np.empty((2, 2, 8, 8), np.float32)}
    call = inputs_of(case), results
    assert "jaxlib that tells on which device" in xla(Runtime(older=True), "linear_attention", *call)
    assert "cuda:1" in xla(Runtime(device=1), "linear_attention", *call)
    wrong = case.but(k=case.k[..., :4].copy())
    assert xla(Runtime(), "linear_attention", inputs_of(wrong), results).startswith("ShapeError: k: expected")
    scratch = Runtime()
    xla(scratch, "linear_attention", *call)
    if scratch.most:
        assert xla(Runtime(out_of_memory=True), "linear_attention", *call) == "none left"
