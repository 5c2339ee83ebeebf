"""The functions of the library on torch tensors: the values that NumPy arrays get, and what is refused."""

import gc
import weakref
from itertools import pairwise

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


def test_negative_bit():
    """A tensor may carry a minus sign that its memory does not have."""
    case = make_case("delta")
    q, k, v, beta, *_ = tensors(case)
    negative = torch.complex(torch.zeros_like(q), q).conj().imag
    assert negative.is_neg()
    negative.requires_grad_()
    o, _ = SCAN["delta"](negative, k, v, beta)
    assert torch.equal(o, -SCAN["delta"](q, k, v, beta)[0])
    o.sum().backward()
    assert torch.isfinite(negative.grad).all()
    state = torch.complex(torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)).conj().imag
    with pytest.raises(fwp.UnsupportedError, match="state: expected a tensor without the negative bit"):
        STEP["delta"](q, k, v, beta, state=state)


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
    phi = fwp.feature_maps.FAVOR(projection.detach().numpy())
    object.__setattr__(phi, "_parameters", phi._parameters._replace(projection=projection))
    q, k, v, beta, *_ = good().values()
    with pytest.raises(fwp.UnsupportedError, match="projection: expected a tensor that requires no gradient"):
        fwp.torch.delta_rule(q, k, v, beta, feature_map=phi)
