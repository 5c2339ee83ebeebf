"""CuPy arrays, which are of a GPU, where there is one."""

import gc

import numpy as np
import pytest
from cases import RULES, STEP, exact_gradients, exact_scan, gradients, make_case, scan, vjp
from tolerances import DEVICE as TOLERANCE
from tolerances import relative_error

import fwp_core as fwp

try:
    import cupy
except ImportError:
    pytest.skip("CuPy is not installed", allow_module_level=True)
try:
    cupy.ones(1)
except Exception:
    pytest.skip("no GPU that CuPy finds", allow_module_level=True)

on_device = pytest.mark.skipif(not fwp.has_cuda(), reason="no CUDA back end here")
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


def close(x, exact):
    assert type(x) is cupy.ndarray
    assert relative_error(x.get(), exact, floor=1.0) <= TOLERANCE[x.dtype.name]


@pytest.mark.skipif(fwp.has_cuda(), reason="there is a CUDA back end")
def test_without_a_back_end():
    x = cupy.ones((1, 2, 1, 3), cupy.float32)
    with pytest.raises(fwp.DeviceError, match="^q: expected memory of the CPU, since CUDA is .* got cuda:"):
        fwp.linear_attention(x, x, x)


@on_device
@EVERY_RULE
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_scans_and_gradients(rule, dtype):
    case = make_case(rule, "scalar", dtype=dtype, T=70, K=64, V=64)
    there = case.map(cupy.asarray)
    for x, exact in zip(
        [*scan(there), *gradients(there)], [*exact_scan(case), *exact_gradients(case)], strict=True
    ):
        close(x, exact)
    (o, _), pullback = vjp(there)
    close(o, exact_scan(case)[0])
    close(pullback(there.do, there.dfinal_state).dk, exact_gradients(case).dk)


@on_device
def test_strides_lengths_and_steps():
    case = make_case("delta", lengths=(3, 0, 5), K=16, V=16)
    there = case.map(cupy.asarray).but(cu_seqlens=cupy.asarray(case.cu_seqlens))
    wide = there.but(k=cupy.repeat(there.k, 2, axis=-1)[..., ::2], v=cupy.asfortranarray(there.v))
    for x, exact in zip(scan(wide), exact_scan(case), strict=True):
        close(x, exact)
    state, q = cupy.zeros((1, 2, 16, 16), cupy.float32), there.q[:, 0]
    pointer = state.data.ptr
    STEP["delta"](q, there.k[:, 0], there.v[:, 0], there.beta[:, 0], state=state)
    assert state.data.ptr == pointer
    assert state.any()


@on_device
@pytest.mark.parametrize("non_blocking", [False, True])
def test_streams(non_blocking):
    """The work waits for what is on the current stream, whose end its results do not outlive."""
    case = make_case("delta", "scalar", T=100, K=64, V=64)
    there = case.map(cupy.asarray)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=non_blocking)
    with stream:
        late = there.map(cupy.copy)
        o, _ = scan(late)
    other = cupy.cuda.Stream(non_blocking=non_blocking)
    stream.synchronize()
    del stream, late
    gc.collect()
    with other:
        copied = o.copy()
    other.synchronize()
    close(copied, exact_scan(case)[0])
    del o
    cupy.cuda.Device().synchronize()


@on_device
def test_probes_come_to_the_host():
    case = make_case("delta", "scalar", T=9)
    expected = fwp.diagnose(fwp.delta_rule, *case.inputs).probes()
    for name, probe in fwp.diagnose(fwp.delta_rule, *case.map(cupy.asarray).inputs).probes().items():
        assert type(probe) is np.ndarray
        assert relative_error(probe, expected[name], floor=1.0) < TOLERANCE["float32"], name


@on_device
def test_a_graph_repeats():
    case = make_case("delta", "scalar", dtype=np.float16, T=70, K=64, V=64)
    there = case.map(cupy.asarray)
    expected = scan(there)[0]
    stream = cupy.cuda.Stream(non_blocking=True)
    o, final_state = cupy.empty_like(expected), cupy.empty_like(scan(there)[1])
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        scan(there, out=o, final_state_out=final_state)
        graph = stream.end_capture()
        kept = [cupy.full(1 << 20, cupy.nan, cupy.float32) for _ in range(8)]  # of what the call gave back
        graph.launch(stream)
        stream.synchronize()
    assert len(kept) == 8
    np.testing.assert_array_equal(o.get(), expected.get())
