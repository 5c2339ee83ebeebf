"""torch tensors on a GPU, where there is one: what torch does with calls; test_gpu.py looks at values."""

import gc

import numpy as np
import pytest
from cases import (
    DTYPES,
    MAPS,
    RULES,
    exact_gradients,
    exact_map,
    exact_scan,
    is_favor,
    library_map,
    make_case,
    state_dtype,
)
from tolerances import DEVICE as TOLERANCE
from tolerances import relative_error
from torch_cases import BACKWARD, SCAN, STEP, options, tensor

import fwp_core as fwp

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and fwp.has_cuda()), reason="no GPU that torch and this library can use"
)

DEVICE = "cuda"
NAMES = ("q", "k", "v", "beta", "g", "initial_state")
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


def there(x, requires_grad=False):
    """The tensor of an array on the device; None of None."""
    return None if x is None else tensor(x).to(DEVICE).requires_grad_(requires_grad)


def inputs(case, requires_grad=False):
    return [there(getattr(case, name), requires_grad) for name in NAMES]


def settings(case):
    """The options of a scan but for its initial state, the projection of a feature map on the device."""
    if is_favor(case.feature_map):
        name, projection, *more = case.feature_map
        case = case.but(feature_map=(name, there(projection), *more))
    return options(case)


def scan(case, given, **more):
    return SCAN[case.rule](*given[:5], initial_state=given[5], **settings(case) | more)


def close(x, exact, name=""):
    if exact is None:
        assert x is None, name
        return
    assert x.device.type == DEVICE
    dtype = str(x.dtype).removeprefix("torch.")
    error = relative_error(x.detach().double().cpu().numpy(), exact, floor=1.0)
    assert error <= TOLERANCE[dtype], f"{name}: error {error:.3g}"


def is_the_oracles(case):
    given = inputs(case, requires_grad=True)
    o, final_state = scan(case, given)
    assert o.dtype == given[2].dtype
    for name, x, exact in zip(("o", "final_state"), (o, final_state), exact_scan(case), strict=True):
        close(x, exact, name)
    incoming = [(o, there(case.do))]
    if case.dfinal_state is not None:
        incoming.append((final_state, there(case.dfinal_state)))
    torch.autograd.backward(*zip(*incoming, strict=True))
    for name, x, exact in zip(NAMES, given, exact_gradients(case), strict=True):
        close(None if x is None else x.grad, exact, name)


# ---- values ----


@EVERY_RULE
def test_odd_sizes_and_packed_sequences(rule):
    is_the_oracles(make_case(rule, "scalar", heads=(1, 4, 2), K=33, V=17, lengths=(0, 70, 1, 0, 129)))
    is_the_oracles(make_case(rule, "channel", T=5, K=200, V=130, gate="mixed"))
    for sizes in ({"T": 0}, {"B": 0}, {"K": 0}, {"V": 0}):
        is_the_oracles(make_case(rule, "scalar", **sizes))


@pytest.mark.parametrize("feature_map", MAPS, ids=lambda phi: "-".join(map(str, phi)))
def test_features(feature_map):
    is_the_oracles(make_case("delta", feature_map=feature_map, qk_norm="sum", T=70, K=8, V=16))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 70, 8)).astype(np.float32)
    here = on_device = feature_map
    if is_favor(feature_map):
        name, m, *more = feature_map
        projection = rng.standard_normal((m, 8)).astype(state_dtype(np.float32))
        here, on_device = (name, projection, *more), (name, there(projection), *more)
    phi, exact = library_map(on_device), exact_map(here)
    y = phi(there(x))
    close(y, exact.value(x.astype(np.float64)))
    close(phi.backward(torch.ones_like(y), there(x)), exact.vjp(np.ones(y.shape), x.astype(np.float64)))


@EVERY_RULE
def test_steps_and_slots(rule):
    case = make_case(rule, "scalar", B=3, T=4, K=64, V=64)
    q, k, v, beta, g, _ = inputs(case)
    exact_o, exact_state = exact_scan(case)
    pool = torch.randn(5, *exact_state.shape[1:], device=DEVICE)
    slots, before = torch.tensor([4, 0, 3], device=DEVICE), pool.clone()
    pool[slots] = there(case.first_state())
    pointer = pool.data_ptr()
    for t in range(4):
        at = [None if x is None else x[:, t] for x in (q, k, v, beta, g)]
        close(STEP[rule](*at, state=pool, state_indices=slots if t % 2 else slots.tolist()), exact_o[:, t])
    assert pool.data_ptr() == pointer
    close(pool[slots], exact_state)
    assert torch.equal(pool[1:3], before[1:3])


def test_diagnose():
    case = make_case("delta", "scalar", T=9)
    expected = fwp.diagnose(fwp.delta_rule, *case.inputs).probes()
    for name, probe in fwp.torch.diagnose(fwp.delta_rule, *inputs(case)[:5]).probes().items():
        assert relative_error(probe, expected[name], floor=1.0) < TOLERANCE["float32"], name


def test_outputs_are_overwritten():
    case = make_case("delta", "scalar", T=70)
    given = inputs(case)
    expected = scan(case, given)
    o, state = (torch.full_like(x, torch.nan) for x in expected)
    assert scan(case, given, out=o, final_state_out=state) == (o, state)
    assert torch.equal(o, expected[0])
    assert torch.equal(state, expected[1])
    do = there(case.do)
    grads = BACKWARD["delta"](do, *given[:5], initial_state=given[5])
    out = fwp.Gradients(*(torch.full_like(x, torch.nan) for x in grads))
    BACKWARD["delta"](do, *given[:5], initial_state=given[5], out=out)
    assert all(map(torch.equal, out, grads))


# ---- derivatives ----


@EVERY_RULE
def test_gradcheck(rule):
    case = make_case(rule, "scalar", dtype=np.float64, B=1, T=4, K=3, V=2)
    given = inputs(case, requires_grad=True)

    def function(*x):
        return SCAN[rule](*x[:5], initial_state=x[5])

    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@EVERY_RULE
@pytest.mark.parametrize("lengths", [None, (2, 3)])
def test_vmap_and_jacrev(rule, lengths):
    case = make_case(rule, "scalar", B=1 if lengths else 2, T=5, K=4, V=3, lengths=lengths, state=False)
    given = [torch.stack([x, 2 * x]) for x in inputs(case)[:5]]
    cu_seqlens = None if lengths is None else torch.tensor([0, 2, 5], device=DEVICE)

    def o_of(*x):
        return SCAN[rule](*x, cu_seqlens=cu_seqlens)[0]

    together = torch.func.vmap(o_of)(*given)
    for n in range(2):
        torch.testing.assert_close(together[n], o_of(*(x[n] for x in given)))
    jacobian = torch.func.jacrev(o_of, argnums=2)(*(x[0] for x in given))
    assert jacobian.device.type == DEVICE


# ---- streams, memory, graphs ----


def test_calls_do_not_wait():
    case = make_case("delta", "scalar", T=100, K=64, V=64)
    given, lengths = inputs(case.but(initial_state=None)), torch.tensor([0, 40, 100], device=DEVICE)
    one = [None if x is None else x[:1] for x in given]
    for _ in range(2):  # what is done at the first call may wait
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        with torch.no_grad():
            SCAN["delta"](*one[:5], cu_seqlens=lengths)
        waited = torch.cuda.current_stream().query()
    assert not waited
    torch.cuda.synchronize()


def test_memory_is_that_of_torch():
    case = make_case("delta", "scalar", T=64, K=64, V=64)
    given = inputs(case)
    scan(case, given)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, state = scan(case, given)
    held = torch.cuda.memory_allocated() - before
    rounded = sum(-(-x.numel() * x.element_size() // 512) * 512 for x in (o, state))
    assert held == rounded
    assert torch.cuda.max_memory_allocated() - before >= held
    del o, state
    assert torch.cuda.memory_allocated() == before


@EVERY_DTYPE
def test_graphs(dtype):
    case = make_case("delta", "scalar", B=1, T=130, K=64, V=64, dtype=dtype, state=False, lengths=(70, 60))
    given, do = inputs(case, requires_grad=True), there(case.do)
    lengths = torch.tensor([0, 70, 130], device=DEVICE)

    def run(cu_seqlens):
        o, state = SCAN["delta"](*given[:5], cu_seqlens=cu_seqlens)
        return o, state, *torch.autograd.grad((o * do).sum() + state.sum(), given[:5])

    for cu_seqlens in (lengths, [0, 70, 130]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run(cu_seqlens)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(cu_seqlens)
        with torch.no_grad():
            given[2].copy_(torch.randn_like(given[2]))
        expected = run(cu_seqlens)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected))


def test_graphs_of_steps():
    case = make_case("delta", "scalar", B=4, T=1, K=64, V=64, state=False)
    token = [None if x is None else x[:, 0] for x in inputs(case)[:5]]
    state, slots = torch.zeros(6, 2, 64, 64, device=DEVICE), torch.tensor([5, 1, -1, 0], device=DEVICE)
    STEP["delta"](*token, state=state.clone(), state_indices=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = STEP["delta"](*token, state=state, state_indices=slots)
    expected = torch.zeros_like(state)
    for order in ([5, 1, -1, 0], [2, -1, 3, 0], [0, 1, 2, 3]):
        slots.copy_(torch.tensor(order))
        graph.replay()
        exact = STEP["delta"](*token, state=expected, state_indices=order)
        assert torch.equal(o, exact)
        assert torch.equal(state, expected)


def test_wrong_integers_are_reported_by_the_next_call():
    case = make_case("delta", B=1, T=5)
    given = inputs(case.but(initial_state=None))
    SCAN["delta"](*given[:5], cu_seqlens=torch.tensor([0, 4, 3], device=DEVICE))
    torch.cuda.synchronize()
    with pytest.raises(fwp.CudaError, match="cu_seqlens"):
        SCAN["delta"](*given[:5])
    SCAN["delta"](*given[:5])


# ---- the compiler, autocast, layers ----


@pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated")  # torch itself uses it
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    case = make_case("delta", "scalar", B=1, T=20, K=16, V=16, state=False)
    lengths = torch.tensor([0, 5, 20], device=DEVICE)

    def gradients(f):
        given = inputs(case, requires_grad=True)
        o, state = f(*given[:5], cu_seqlens=lengths)
        return o, state, *torch.autograd.grad(o.sin().sum() + state.sum(), given[:5])

    torch.compiler.reset()
    compiled = torch.compile(fwp.torch.delta_rule, fullgraph=True, backend=backend)
    for x, y in zip(gradients(compiled), gradients(fwp.torch.delta_rule), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    case = make_case("delta", "scalar", T=70, K=64, V=64)
    given = inputs(case)
    with torch.autocast(DEVICE, dtype=dtype):
        o, state = scan(case, given)
    assert (o.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(o, scan(case, [x.to(dtype) for x in given[:3]] + given[3:])[0])


def test_the_layer():
    torch.manual_seed(0)
    layer = fwp.torch.FastWeightAttention(
        64, heads=4, gate="channel", taps=4, feature_map=fwp.feature_maps.DPFP(1), output_gate=True
    )
    x = torch.randn(2, 33, 64)
    expected, _ = layer(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer.to(DEVICE)
    y, state = layer(x.to(DEVICE))
    y.sum().backward()
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
    for p, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad.cpu(), grad, rtol=1e-3, atol=1e-3)
    assert layer.step(x[:, :1].to(DEVICE), state).device.type == DEVICE


# ---- errors ----


def test_arrays_of_two_devices_are_refused():
    case = make_case("delta", "scalar", T=5)
    given = inputs(case)
    for i, name in enumerate(NAMES):
        mixed = [x.cpu() if j == i else x for j, x in enumerate(given)]
        argument, place, other = (name, "cuda:0", "the CPU") if i else ("k", "the CPU", "cuda:0")
        with pytest.raises(
            fwp.DeviceError,
            match=f"^{argument}: expected a tensor on {place}, as q is, got one on {other}",
        ):
            scan(case, mixed)
    with pytest.raises(fwp.DTypeError, match="as q is, got numpy.ndarray|expected a torch.Tensor"):
        scan(case, [given[0], case.k, *given[2:]])


def test_no_memory_left():
    case = make_case("linear", beta=False, state=False, T=5)
    q = inputs(case)[0][:1, :1].expand(1, 1 << 36, *inputs(case)[0].shape[2:])
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):
        SCAN["linear"](q, q, q)
    torch.cuda.empty_cache()
    is_the_oracles(case)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one():
    case = make_case("delta", "scalar", T=70)
    given = [x.to("cuda:1") for x in inputs(case)]
    o, _ = scan(case, given)
    assert o.device.index == 1
    assert torch.cuda.current_device() == 0
    close(o, exact_scan(case)[0])
