"""The functions of the library on torch tensors: the values that NumPy arrays get, and what is refused."""

import gc
import importlib.util
import weakref
from itertools import pairwise
from pathlib import Path

import cases as numpy_cases
import numpy as np
import pytest
import torch_cases
from cases import DTYPES, RULES, make_case, step, steps
from hypothesis import given
from strategies import LAYOUTS, cases, feature_cases, reversed_axes
from tolerances import assert_bits_equal, assert_gradients_bits_equal
from torch_cases import BACKWARD, SCAN, STEP, array, options, scan, tensor, tensors

import fwp_core as fwp

torch = pytest.importorskip("torch")


all_rules = pytest.mark.parametrize("rule", RULES)
halves = pytest.mark.parametrize("dtype", DTYPES[2:], ids=["float16", "bfloat16"])


def assert_bits(tensors, arrays):
    for i, (x, y) in enumerate(zip(tensors, arrays, strict=True)):
        assert (x is None) == (y is None), i
        if y is not None:
            assert_bits_equal(array(x), y, str(i))


def is_numpys(case):
    """Scan and gradients, through autograd and not, have the bits that arrays get."""
    with torch.no_grad():
        results = scan(case, tensors(case))
    expected = numpy_cases.scan(case)
    assert_bits(results, expected)
    assert_bits(scan(case, tensors(case, requires_grad=True)), expected)
    assert_bits(torch_cases.gradients(case), numpy_cases.gradients(case))


# Values.


@given(case=cases())
def test_scan_and_gradients_are_numpys(case):
    is_numpys(case)


@given(case=feature_cases())
def test_features_are_numpys(case):
    is_numpys(case)


@all_rules
def test_attention_norm_is_numpys(rule):
    is_numpys(make_case(rule, "scalar", attention_norm=True, feature_map=("DPFP", 2), eps=1e-3, K=5))
    is_numpys(make_case(rule, lengths=(3, 0, 9), attention_norm=True, qk_norm="sum", V=7))


@all_rules
def test_every_level(isa, rule):
    is_numpys(make_case(rule, "channel", T=70, V=40))


@all_rules
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not reversed_axes])
def test_layout_does_not_matter(rule, layout):
    case = make_case(rule, "channel", lengths=(5, 8), heads=(4, 1, 2))
    strided = case.map(layout)
    assert_bits(scan(case, tensors(strided)), numpy_cases.scan(case))
    assert_bits(torch_cases.gradients(strided), numpy_cases.gradients(case))


def test_expanded_and_transposed_tensors():
    case = make_case("delta", T=6, K=4, V=4, heads=(2, 2, 2))
    q, k, v, beta, *_ = tensors(case)
    one = q[:, :1].expand_as(q)
    assert torch.equal(SCAN["delta"](one, k, v, beta)[0], SCAN["delta"](one.clone(), k, v, beta)[0])
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(SCAN["delta"](*heads_first, beta)[0], SCAN["delta"](q, k, v, beta)[0])


@all_rules
@halves
def test_float32_gates_of_halves(rule, dtype):
    is_numpys(make_case(rule, "scalar", dtype=dtype, gate_dtype=np.float32))


def test_inputs_are_not_changed():
    case = make_case("delta", "scalar")
    inputs = tensors(case, requires_grad=True)
    before = [x.detach().clone() for x in inputs]
    torch_cases.loss(scan(case, inputs), case).backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_parameters_and_inference_tensors():
    case = make_case("delta")
    q, k, v, beta, _, _ = tensors(case)
    expected = SCAN["delta"](q, k, v, beta)[0]
    assert torch.equal(SCAN["delta"](torch.nn.Parameter(q), k, v, beta)[0], expected)
    with torch.inference_mode():
        state = torch.zeros(2, 2, 16, 16)
        assert torch.equal(SCAN["delta"](q, k, v, beta)[0], expected)
        STEP["delta"](q, k, v, beta, state=state)


def negative(x):
    """-x, with x in memory."""
    y = torch.complex(torch.zeros_like(x), x).conj().imag
    assert y.is_neg()
    return y


def test_negative_bit():
    """A tensor may carry a minus sign that its memory does not have."""
    q, k, v, beta, *_ = tensors(make_case("delta"))
    results = []
    for x in (negative(q), -q):
        x.requires_grad_()
        o, _ = SCAN["delta"](x, k, v, beta)
        o.square().sum().backward()
        results.append((o, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    state = torch.complex(torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)).conj().imag
    with pytest.raises(fwp.UnsupportedError, match="state: expected a tensor without the negative bit"):
        STEP["delta"](q, k, v, beta, state=state)


@pytest.mark.parametrize("result", [0, 1], ids=["do", "dfinal_state"])
def test_negative_bit_of_a_gradient(result):
    """In eager code, with create_graph, and under torch.func."""
    q, k, v, beta, *_ = tensors(make_case("delta"))
    given = torch.randn(SCAN["delta"](q, k, v, beta)[result].shape)

    def gradient(sign, **more):
        x = v.clone().requires_grad_()
        return torch.autograd.grad(SCAN["delta"](q, k, x, beta)[result], x, sign(given), **more)[0]

    def func_gradient(sign):
        pullback = torch.func.vjp(lambda x: SCAN["delta"](q, k, x, beta)[result], v)[1]
        return pullback(sign(given))[0]

    expected = gradient(torch.neg)
    assert expected.abs().max() > 0
    assert torch.equal(gradient(negative), expected)
    assert torch.equal(gradient(negative, create_graph=True), gradient(torch.neg, create_graph=True))
    assert torch.equal(func_gradient(negative), func_gradient(torch.neg))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp uses it
@pytest.mark.parametrize("name", ["scale", "eps"])
def test_options_with_tangents(name):
    q, k, v, beta, *_ = good().values()
    x = torch.tensor(0.5)
    with pytest.raises(fwp.UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda x: fwp.delta_rule(q, k, v, beta, **{name: x})[0], (x,), (x,))


def test_gradient_through_a_conjugate():
    """What a complex loss hands back has the negative bit, with nobody asking for it."""
    q, k, v, beta, *_ = tensors(make_case("delta"))
    grads = []
    for own in (lambda o: o, lambda o: o * 1):  # the gradient of a product has its own memory
        x = v.clone().requires_grad_()
        o = own(SCAN["delta"](q, k, x, beta)[0])
        weights = torch.complex(torch.arange(o.numel()).view(o.shape) % 7 - 3.0, torch.ones_like(o))
        (torch.complex(torch.ones_like(o), o).conj() * weights).abs().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_negative_bit_of_a_projection():
    projection, x = torch.randn(6, 4), torch.randn(3, 4)
    phi, expected = (fwp.feature_maps.FAVOR(sign(projection)) for sign in (negative, torch.neg))
    np.testing.assert_array_equal(phi.projection, -projection.numpy())
    assert torch.equal(phi(x), expected(x))


@pytest.mark.parametrize("make", [torch.clone, lambda x: x.T.contiguous().T, lambda x: x.numpy().T.copy().T])
def test_a_copied_projection_may_change(make):
    """Eager code, a compiler and second derivatives see the copy."""
    projection = make(torch.randn(6, 4))
    phi = fwp.feature_maps.FAVOR(projection)
    before = torch.from_numpy(phi.projection.copy())
    projection[:] = 0
    assert torch.equal(torch_cases.parameters(phi).projection, before)
    assert np.shares_memory(torch_cases.parameters(phi).projection.numpy(), phi.projection)
    np.testing.assert_array_equal(phi.projection, before)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)]
)
def test_lengths_of_any_kind(kind):
    case = make_case("delta", lengths=(3, 0, 4))
    lengths = kind([0, 3, 3, 7])
    o, final_state = SCAN["delta"](*tensors(case)[:4], cu_seqlens=lengths)
    expected = fwp.delta_rule(case.q, case.k, case.v, case.beta, cu_seqlens=case.cu_seqlens)
    assert_bits((o, final_state), expected)


def test_lengths_may_change_after_the_call():
    case = make_case("delta", lengths=(3, 4), state=False)
    lengths = np.array([0, 3, 7])
    inputs = tensors(case, requires_grad=True)
    o, _ = SCAN["delta"](*inputs[:5], cu_seqlens=lengths)
    lengths[1] = 6
    o.backward(tensor(case.do))
    assert_gradients_bits_equal(
        [x if x is None else array(x.grad) for x in inputs], numpy_cases.gradients(case)
    )


# Plain calls.


@all_rules
def test_backward_and_vjp(rule):
    case = make_case(rule, "channel", lengths=(40, 0, 33))
    *inputs, initial_state = tensors(case)
    more = {"initial_state": initial_state, **options(case)}
    do, dfinal_state = tensor(case.do), tensor(case.dfinal_state)
    found = BACKWARD[rule](do, *inputs, dfinal_state=dfinal_state, **more)
    assert isinstance(found, fwp.Gradients)
    assert_bits(found, numpy_cases.gradients(case))
    for fn in (SCAN[rule], numpy_cases.SCAN[rule]):
        results, pullback = fwp.torch.vjp(fn, *inputs, **more)
        assert_bits(results, numpy_cases.scan(case))
        for _ in range(2):
            assert_bits(pullback(do, dfinal_state), numpy_cases.gradients(case))
    with pytest.raises(fwp.ArgumentError, match="fn: expected fwp_core.delta_rule or"):
        fwp.torch.vjp(torch.matmul, *inputs)


@all_rules
def test_out(rule):
    case = make_case(rule, "scalar")
    *inputs, initial_state = tensors(case)
    more = {"initial_state": initial_state, **options(case)}
    expected_o, expected_state = numpy_cases.scan(case)
    out = {
        "out": torch.full(expected_o.shape, torch.nan),
        "final_state_out": torch.full(expected_state.shape, torch.nan),
    }
    versions = [x._version for x in out.values()]
    o, final_state = SCAN[rule](*inputs, **more, **out)
    assert o is out["out"]
    assert final_state is out["final_state_out"]
    assert all(x._version > version for x, version in zip(out.values(), versions, strict=True))
    assert_bits((o, final_state), (expected_o, expected_state))
    (o, _), _ = fwp.torch.vjp(SCAN[rule], *inputs, **more, **out)
    assert o is out["out"]
    grads = fwp.Gradients(
        *(None if x is None else torch.full_like(x, torch.nan) for x in (*inputs, initial_state))
    )
    found = BACKWARD[rule](
        tensor(case.do), *inputs, dfinal_state=tensor(case.dfinal_state), out=grads, **more
    )
    assert all(x is y for x, y in zip(found, grads, strict=True))
    assert_bits(found, numpy_cases.gradients(case))


@all_rules
@pytest.mark.parametrize("attention_norm", [False, True])
def test_steps(rule, attention_norm):
    case = make_case(rule, "channel", T=4, attention_norm=attention_norm, qk_norm="sum")
    inputs, state, expected_state = tensors(case)[:5], tensor(case.first_state()), case.first_state()
    version = state._version
    for t in range(2):
        token = [None if x is None else x[:, t] for x in inputs]
        o = STEP[rule](*token, state=state, **case.step_options)
        assert_bits((o,), (step(case, t, expected_state),))
    rest = [None if x is None else x[:, 2:] for x in inputs]
    out = torch.full((2, 2, 2, 16), torch.nan)
    assert STEP[rule](*rest, state=state, out=out, **case.step_options) is out
    assert_bits((out, state), (steps(case.at(slice(2, None)), expected_state), expected_state))
    assert state._version >= version + 3


def test_step_with_a_pool_of_states():
    case = make_case("delta", T=1)
    inputs = [x[:, 0] for x in tensors(case)[:4]]
    for indices in ([2, -1], torch.tensor([2, -1]), np.array([2, -1])):
        pool = torch.zeros(3, 2, 16, 16)
        o = STEP["delta"](*inputs, state=pool, state_indices=indices)
        assert not o[1].any()
        assert pool[2].any()
        assert not pool[:2].any()


def test_a_state_saved_for_backward_may_not_be_stepped():
    """Torch has to notice that a step writes."""
    case = make_case("delta", T=1)
    state = torch.ones(2, 2, 16, 16)
    weight = torch.ones(2, 2, 16, 16, requires_grad=True)
    y = (state * weight).sum()
    STEP["delta"](*(x[:, 0] for x in tensors(case)[:4]), state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_input_may_not_change_before_backward():
    case = make_case("delta")
    q, k, v, beta, *_ = tensors(case)
    k.requires_grad_()
    o, _ = SCAN["delta"](q, k, v, beta)
    v.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_feature_maps_and_diagnose():
    case = make_case("delta", "scalar", feature_map=("DPFP", 2), qk_norm="sum", K=4)
    x, dy = tensor(case.q), torch.ones(2, 13, 2, 16)
    phi = fwp.feature_maps.DPFP(2)
    from fwp_core.adapters import torch as adapter

    assert_bits((adapter.feature_forward(phi, x),), (phi(case.q),))
    assert_bits((adapter.feature_backward(phi, dy, x),), (phi.backward(dy.numpy(), case.q),))
    *inputs, initial_state = tensors(case)
    found = fwp.torch.diagnose(SCAN["delta"], *inputs, initial_state=initial_state, **options(case))
    expected = fwp.diagnose(fwp.delta_rule, *case.inputs, **case.options)
    for name, probe in expected.probes().items():
        assert_bits_equal(found.probes()[name], probe, name)


@halves
def test_diagnose_of_halves(dtype):
    case = make_case("delta", dtype=dtype, gate_dtype=np.float32)
    q, k, v, beta, *_ = tensors(case)
    found = fwp.torch.diagnose(fwp.delta_rule, q, k, v, beta)
    expected = fwp.diagnose(fwp.delta_rule, case.q, case.k, case.v, case.beta)
    assert_bits_equal(found.contrast, expected.contrast)


# Levels of instruction sets.


def test_a_switch_between_forward_and_backward():
    """Checkpoints belong to one level; another makes its own and gives its own bits."""
    levels = fwp.available_isas()
    case = make_case("delta", "scalar", T=300, K=32, V=32)
    for before, after in pairwise(levels):
        with fwp.use_isa(before):
            inputs = tensors(case, requires_grad=True)
            o, final_state = scan(case, inputs)
        with fwp.use_isa(after):
            torch.autograd.backward((o, final_state), (tensor(case.do), tensor(case.dfinal_state)))
            assert_bits([x if x is None else x.grad for x in inputs], numpy_cases.gradients(case))


# Memory.


def test_nothing_outlives_the_graph():
    """No cycle of references: without the garbage collector, activations go when the graph goes."""
    gc.collect()
    gc.disable()
    try:
        for again in (False, True):
            case = make_case("delta", "channel", T=100)
            inputs = [x.clone().requires_grad_() for x in tensors(case)]
            o, final_state = scan(case, inputs)
            alive = [weakref.ref(x) for x in (o, final_state, *inputs)]
            if again:
                grads = torch.autograd.grad(o.sum(), inputs, create_graph=True)
                alive += [weakref.ref(x) for x in grads]
                del grads
            del o, final_state, inputs
            assert [x for x in alive if x() is not None] == []
    finally:
        gc.enable()


def test_no_checkpoints_without_gradients(monkeypatch):
    kept = []
    from fwp_core.adapters.torch_call import Call

    forward = Call.forward
    monkeypatch.setattr(Call, "forward", lambda call, *a: kept.append(call.level) or forward(call, *a))
    case = make_case("delta")
    inputs = tensors(case, requires_grad=True)
    with torch.no_grad():
        scan(case, inputs)
    scan(case, tensors(case))
    assert kept == [None, None]
    scan(case, inputs)
    assert kept[2] == fwp.isa()


# What a call costs is measured, not asserted.


def test_the_benchmark_of_calls(capsys):
    path = Path(__file__).parents[1] / "benchmarks" / "torch_call.py"
    spec = importlib.util.spec_from_file_location("torch_call", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    threads = torch.get_num_threads()
    benchmark.main(["--calls", "10"])
    torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 12
    assert all(float(row.split()[-2]) > 0 for row in rows)


# Errors.


def good():
    case = make_case("delta", "scalar", T=3, K=4, V=4)
    return dict(zip(torch_cases.INPUTS, tensors(case), strict=True))


class Subclass(torch.Tensor):
    pass


BAD = {
    "a list": (lambda x: x.tolist(), fwp.DTypeError, "expected a torch.Tensor, as q, got list"),
    "an array": (lambda x: x.numpy(), fwp.DTypeError, "expected a torch.Tensor, as q, got ndarray"),
    "a subclass": (lambda x: x.as_subclass(Subclass), fwp.DTypeError, "no subclass, got Subclass"),
    "meta": (
        lambda x: x.to("meta"),
        fwp.DeviceError,
        "expected a tensor that has memory, got one on device meta",
    ),
    "sparse": (
        lambda x: x.to_sparse(),
        fwp.UnsupportedError,
        "expected a strided tensor, got layout torch.sparse_coo",
    ),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        fwp.DTypeError,
        "expected dtype",
    ),
    "eight bits": (
        lambda x: x.to(torch.float8_e5m2),
        fwp.DTypeError,
        "expected dtype float32, float64, float16 or bfloat16, got torch.float8_e5m2",
    ),
    "integers": (lambda x: x.long(), fwp.DTypeError, "expected dtype"),
    "complex": (lambda x: x.to(torch.complex64), fwp.DTypeError, "expected dtype"),
    "another precision": (lambda x: x.double(), fwp.DTypeError, "expected"),
    "another shape": (lambda x: x[:1], fwp.ShapeError, "expected shape"),
}


@pytest.mark.parametrize("name", torch_cases.INPUTS)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_bad_tensors(name, kind):
    change, error, message = BAD[kind]
    arguments = good()
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message) as caught:
        fwp.torch.delta_rule(**arguments)
    if name != "q":  # whose dtype and shape the others are compared with
        assert str(caught.value).startswith(f"{name}:")


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(x) for name, x in good().items()}
    with pytest.raises(fwp.DTypeError, match="q: expected a torch.Tensor, no subclass, got FakeTensor"):
        fwp.torch.delta_rule(**fake)
    with mode:
        o, final_state = fwp.torch.delta_rule(**fake)
    assert (o.shape, final_state.shape) == ((2, 3, 2, 4), (2, 2, 4, 4))


@pytest.mark.parametrize("name", torch_cases.INPUTS)
@pytest.mark.parametrize("kind", ["integers", "another shape"])
def test_fake_tensors_are_checked(name, kind):
    from torch._subclasses import FakeTensorMode

    change, error, message = BAD[kind]
    arguments = good()
    arguments[name] = change(arguments[name])
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(x) for name, x in arguments.items()}
    state = fake.pop("initial_state")
    for key, call in (
        ("initial_state", lambda: fwp.torch.delta_rule(**fake, initial_state=state)),
        ("state", lambda: fwp.torch.delta_rule_step(**fake, state=state)),
    ):
        with mode, pytest.raises(error, match=message) as caught:
            call()
        if name != "q":
            assert str(caught.value).startswith(f"{key if name == 'initial_state' else name}:")


def test_fake_tensors_of_gradients_are_checked():
    from torch._subclasses import FakeTensorMode

    options = ("delta_rule", 0, 0, 0.0, None, None, False, 1e-6, 1.0)

    def call(do, dfinal_state, initial_state=None):
        q, beta = torch.ones(2, 3, 2, 4), torch.ones(2, 3, 2)
        inputs = (q, q, q, beta, None, initial_state, None)
        return torch.ops.fwp_core.scan_backward(do, dfinal_state, *inputs, *options)

    do, state = (2, 3, 2, 4), (2, 2, 4, 4)
    with FakeTensorMode():
        for given in ((do, None), (None, state), (do, state)):
            gradients = call(*(None if shape is None else torch.ones(shape) for shape in given))
            assert [x.shape for x in gradients] == [do, do, do, do[:3]]
        for name, arguments in (
            ("do", (torch.ones(2, 3, 2, 5), None)),
            ("dfinal_state", (None, torch.ones(2, 2, 4))),
            ("initial_state", (torch.ones(do), None, torch.ones(1, 2, 4, 4))),
        ):
            with pytest.raises(fwp.ShapeError, match=f"^{name}: expected shape"):
                call(*arguments)


def test_fake_offsets_and_projections_are_checked():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, offsets = torch.ones(1, 3, 2, 4), torch.zeros(3, dtype=torch.int64)
        assert fwp.torch.linear_attention(q, q, q, cu_seqlens=offsets)[1].shape == (2, 2, 4, 4)
        for bad, message in ((offsets[:0], "expected at least one offset"), (offsets[:1], "to end with T=3")):
            with pytest.raises(fwp.FwpError, match=f"cu_seqlens: .*{message}"):
                fwp.torch.linear_attention(q, q, q, cu_seqlens=bad)
        phi = fwp.feature_maps.FAVOR(np.ones((5, 3), np.float32))
        with pytest.raises(fwp.ShapeError, match="projection: expected shape"):
            fwp.torch.linear_attention(q, q, q, feature_map=phi)


def test_outputs_are_not_differentiable():
    arguments = good()
    arguments["k"].requires_grad_()
    out = torch.empty(2, 3, 2, 4)
    with pytest.raises(fwp.UnsupportedError, match="k: expected a tensor that requires no gradient"):
        fwp.torch.delta_rule(**arguments, out=out)
    with torch.no_grad():
        assert fwp.torch.delta_rule(**arguments, out=out)[0] is out


def plain_calls(arguments):
    q, k, v, beta, g, state = arguments.values()
    do = torch.ones(2, 3, 2, 4)
    phi = fwp.feature_maps.ReLU()
    from fwp_core.adapters import torch as adapter

    return {
        "backward": lambda: fwp.torch.delta_rule_backward(do, q, k, v, beta, g, initial_state=state),
        "vjp": lambda: fwp.torch.vjp(fwp.delta_rule, q, k, v, beta, g, initial_state=state),
        "step": lambda: fwp.torch.delta_rule_step(q, k, v, beta, g, state=state.detach().clone()),
        "diagnose": lambda: fwp.torch.diagnose(fwp.delta_rule, q, k, v, beta, g),
        "map": lambda: adapter.feature_forward(phi, k),
    }


@pytest.mark.parametrize("name", plain_calls(good()))
def test_plain_calls_refuse_gradients(name):
    arguments = good()
    arguments["k"].requires_grad_()
    with pytest.raises(
        fwp.UnsupportedError, match=r"(k|x): expected a tensor that requires no gradient.*detach\(\)"
    ):
        plain_calls(arguments)[name]()
    with torch.no_grad():
        plain_calls(arguments)[name]()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp uses it
@pytest.mark.parametrize("name", plain_calls(good()))
def test_plain_calls_refuse_transformations(name):
    arguments = good()

    def call(k):
        plain_calls(arguments | {"k": k})[name]()
        return k.sum()

    with pytest.raises(fwp.UnsupportedError, match="expected a tensor outside torch.func"):
        torch.func.vmap(call)(arguments["k"][None])
    with pytest.raises(fwp.UnsupportedError, match="expected a tensor outside torch.func"):
        torch.func.grad(call)(arguments["k"])
    with pytest.raises(fwp.UnsupportedError, match="expected a tensor outside torch.func"):
        torch.func.jvp(call, (arguments["k"],), (arguments["k"],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(fwp.UnsupportedError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(arguments["k"], arguments["k"]))


# torch.jit.trace.

tracing = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit.*is (deprecated|not supported)"
)


@tracing
@pytest.mark.parametrize("name", plain_calls(good()))
def test_plain_calls_are_not_traced(name):
    arguments = good()

    def call(k):
        plain_calls(arguments | {"k": k})[name]()
        return k

    if name.startswith("step"):
        torch.jit.trace(call, arguments["k"])
        return
    message = "expected (a tensor outside|None under .*) torch.jit.trace"
    with pytest.raises(fwp.UnsupportedError, match=message):
        torch.jit.trace(call, arguments["k"])


@tracing
@all_rules
def test_traced_scans_compute_with_other_inputs(rule):
    def arrays(T, seed):
        case = make_case(rule, "scalar", T=T, seed=seed, attention_norm=True, feature_map=("DPFP", 2))
        return case, tensors(case)

    case, first = arrays(3, 0)
    traced = torch.jit.trace(lambda *x: scan(case, x), tuple(first))
    for T in (3, 7):
        other, inputs = arrays(T, 1)
        for x, y in zip(traced(*inputs), scan(other, inputs), strict=True):
            assert torch.equal(x, y)


@tracing
def test_traced_steps_compute_with_other_inputs():
    def run(q, k, v, beta, g, state):
        return fwp.delta_rule_step(q, k, v, beta, g, state=state)

    traced = torch.jit.trace(run, tuple(good().values()), check_trace=False)
    case = make_case("delta", "scalar", T=3, K=4, V=4, seed=1)
    *inputs, state = tensors(case)
    mine = state.clone()
    assert torch.equal(traced(*inputs, mine), run(*inputs, state))
    assert torch.equal(mine, state)


def test_integers_under_another_default_device():
    q = torch.randn(1, 5, 2, 4)
    lengths = [0, 2, 5]
    expected = fwp.linear_attention(q, q, q, cu_seqlens=lengths)
    states = torch.zeros(2, 3, 2, 4, 4)
    compiled = torch.compile(
        lambda q: fwp.linear_attention(q, q, q, cu_seqlens=lengths), backend="eager", fullgraph=True
    )
    torch.compiler.reset()
    with torch.device("meta"):
        for found in (fwp.linear_attention(q, q, q, cu_seqlens=lengths), compiled(q)):
            for x, y in zip(found, expected, strict=True):
                assert torch.equal(x, y)
        fwp.linear_attention_step(q[:, 0], q[:, 0], q[:, 0], state=states[0], state_indices=[2])
    fwp.linear_attention_step(q[:, 0], q[:, 0], q[:, 0], state=states[1], state_indices=[2])
    assert torch.equal(states[0], states[1])


def test_a_state_that_requires_grad_is_not_stepped():
    arguments = good()
    state = arguments.pop("initial_state").requires_grad_()
    with pytest.raises(fwp.UnsupportedError, match="state: expected a tensor that requires no gradient"):
        fwp.torch.delta_rule_step(**arguments, state=state)


def test_bad_outputs():
    arguments = good()
    before = arguments["q"].clone()
    with pytest.raises(fwp.FwpError, match="out"):
        fwp.torch.delta_rule(**arguments, out=arguments["v"])
    with pytest.raises(fwp.FwpError, match="out"):
        fwp.torch.delta_rule(**arguments, out=torch.empty(1).expand(2, 3, 2, 4))
    with pytest.raises(fwp.ShapeError, match="out"):
        fwp.torch.delta_rule(**arguments, out=torch.empty(2, 3, 2, 5))
    assert torch.equal(arguments["q"], before)


def test_missing_arguments():
    q, k, v, beta, g, _ = good().values()
    with pytest.raises(fwp.DTypeError, match="beta: expected"):
        fwp.torch.delta_rule(q, k, v, None, g)
    with pytest.raises(fwp.DTypeError, match="do: expected"):
        fwp.torch.delta_rule_backward(None, q, k, v, beta)
    with pytest.raises(fwp.DTypeError, match="state: expected"):
        fwp.torch.delta_rule_step(q, k, v, beta, state=None)
    with pytest.raises(fwp.DTypeError, match="feature_map: expected None or an object"):
        fwp.torch.delta_rule(q, k, v, beta, feature_map="elu")


def test_a_projection_that_requires_grad():
    projection = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(fwp.UnsupportedError, match="projection: expected a tensor that requires no gradient"):
        fwp.feature_maps.FAVOR(projection)
    with torch.no_grad():
        assert fwp.feature_maps.FAVOR(projection).projection.shape == (2, 4)


def test_a_projection_under_transformations():
    x, projection = torch.randn(3, 4), torch.randn(2, 4)
    q, k, v, beta, *_ = good().values()

    def loss(q, projection):
        phi = fwp.feature_maps.FAVOR(projection * 1)
        return fwp.torch.delta_rule(q, k, v, beta, feature_map=phi)[0].sum()

    assert torch.func.grad(loss)(q, projection).abs().max() > 0
    for transformed in (
        lambda: torch.func.grad(loss, argnums=1)(q, projection),
        lambda: torch.func.vmap(lambda r: fwp.feature_maps.FAVOR(r)(x))(projection[None]),
    ):
        with pytest.raises(fwp.UnsupportedError, match="projection: expected a tensor"):
            transformed()


@pytest.mark.parametrize("name", ["scale", "eps"])
@pytest.mark.parametrize("call", ["scan", "out", "backward", "vjp", "step", "diagnose"])
def test_options_that_require_grad(name, call):
    q, k, v, beta, *_ = good().values()
    given = {name: torch.tensor(0.5, requires_grad=True)}
    state, do = torch.zeros(2, 2, 4, 4), torch.ones(2, 3, 2, 4)
    calls = {
        "scan": lambda: fwp.delta_rule(q, k, v, beta, **given),
        "out": lambda: fwp.delta_rule(q, k, v, beta, out=do, **given),
        "backward": lambda: fwp.delta_rule_backward(do, q, k, v, beta, **given),
        "vjp": lambda: fwp.vjp(fwp.delta_rule, q, k, v, beta, **given),
        "step": lambda: fwp.delta_rule_step(q, k, v, beta, state=state, **given),
        "diagnose": lambda: fwp.diagnose(fwp.delta_rule, q, k, v, beta, **given),
    }
    with pytest.raises(fwp.UnsupportedError, match=f"{name}: expected a number, got a tensor that requires"):
        calls[call]()
    with torch.no_grad():
        calls[call]()


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (5, fwp.DTypeError, "expected a sequence of integers, got int"),
        ({0, 3}, fwp.DTypeError, "expected a sequence of integers, got set"),
        ({0: 1, 3: 1}, fwp.DTypeError, "expected a sequence of integers, got dict"),
        (iter([0, 3]), fwp.DTypeError, "expected a sequence of integers, got list_iterator"),
        (torch.tensor(3), fwp.ShapeError, r"expected shape \(N\+1,\), got \(\)"),
        (torch.tensor([[0, 3]]), fwp.ShapeError, r"expected shape \(N\+1,\), got \(1, 2\)"),
        (torch.tensor([0.0, 3.0]), fwp.DTypeError, "expected integers, got dtype float32"),
    ],
)
def test_bad_lengths(lengths, error, message):
    q, k, v, beta, *_ = (None if x is None else x[:1] for x in good().values())
    for call in (
        lambda: fwp.delta_rule(q, k, v, beta, cu_seqlens=lengths),
        lambda: fwp.vjp(fwp.delta_rule, q, k, v, beta, cu_seqlens=lengths),
        lambda: fwp.torch.FastWeightAttention(4, 1)(torch.zeros(1, 3, 4), cu_seqlens=lengths),
    ):
        with pytest.raises(error, match=f"cu_seqlens: {message}"):
            call()
