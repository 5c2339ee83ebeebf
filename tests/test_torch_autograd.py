"""Derivatives of the scans on torch tensors: of any order in reverse mode, never in forward mode."""

import numpy as np
import pytest
from cases import DECAYS, RULES, make_case
from tolerances import NETWORK, relative_error
from torch_cases import array, gradients, loss, present, scan, scan_of, tensor, tensors

import fwp_core as fwp

torch = pytest.importorskip("torch")


# Everything that has a second derivative of its own.
VARIANTS = {
    "linear": {"rule": "linear", "beta": False},
    "linear, grouped": {"rule": "linear", "decay": "channel", "heads": (1, 2, 4)},
    "delta": {"rule": "delta"},
    "delta, scalar": {"rule": "delta", "decay": "scalar", "scale": 0.5},
    "delta, channel, packed": {"rule": "delta", "decay": "channel", "lengths": (2, 0, 3), "heads": (2, 1, 2)},
    "no state": {"rule": "delta", "state": False},
    "l2": {"rule": "delta", "qk_norm": "l2"},
    "ELU1, sum": {"rule": "delta", "feature_map": ("ELU1",), "qk_norm": "sum"},
    "Softmax": {"rule": "delta", "feature_map": ("Softmax",)},
    "DPFP": {"rule": "linear", "feature_map": ("DPFP", 2), "qk_norm": "sum"},
    "FAVOR": {"rule": "delta", "feature_map": ("FAVOR", 2), "qk_norm": "sum", "heads": (1, 1, 1)},
    "FAVOR, eps": {"rule": "delta", "feature_map": ("FAVOR", 2, 1e-2), "heads": (1, 1, 1)},
    "attention_norm": {"rule": "delta", "decay": "scalar", "attention_norm": True, "eps": 1e-2},
    "attention_norm, linear": {"rule": "linear", "feature_map": ("ELU1",), "attention_norm": True},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
all_rules = pytest.mark.parametrize("rule", RULES)
ignore_jit = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp uses it


def small(rule, decay="none", **more):
    sizes = {"B": 1, "T": 3, "K": 2, "V": 2, "heads": (1, 1, 2), "dtype": np.float64}
    return make_case(rule, decay, **sizes | more)


def same(actual, expected):
    """The same derivative by two ways, in float64."""
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(array(x), array(y), floor=1.0) < NETWORK


# By finite differences.


@variants
def test_gradcheck(variant):
    case = small(**VARIANTS[variant])
    assert torch.autograd.gradcheck(scan_of(case), present(tensors(case, True)))


# By one direction of each input, or by all of them.
@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)])
@variants
def test_gradgradcheck(variant, fast_mode):
    case = small(**VARIANTS[variant])
    assert torch.autograd.gradgradcheck(scan_of(case), present(tensors(case, True)), fast_mode=fast_mode)


def test_third_derivatives():
    case = small("delta", "scalar", T=2)
    inputs = present(tensors(case, True))

    def slopes(*inputs):
        return torch.autograd.grad(loss(scan_of(case)(*inputs), case), inputs[0], create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slopes, inputs)


# What comes in and goes out.


@pytest.mark.parametrize("used", ["o", "final_state", "none"])
def test_an_unused_output_has_no_gradient(used):
    case = small("delta", "scalar", lengths=(2, 3))
    inputs = tensors(case, True)
    o, final_state = scan(case, inputs)
    zero = case.but(
        do=case.do if used == "o" else 0 * case.do,
        dfinal_state=case.dfinal_state if used == "final_state" else 0 * case.dfinal_state,
    )
    if used == "none":
        found = torch.autograd.grad(loss((o, final_state), zero), inputs)
    else:
        incoming = (o, tensor(case.do)) if used == "o" else (final_state, tensor(case.dfinal_state))
        found = torch.autograd.grad(incoming[0], inputs, incoming[1], create_graph=True)
        sum(x.square().sum() for x in found).backward()
    same(found, gradients(zero))


@pytest.mark.parametrize("name", range(6))
def test_one_input_at_a_time(name):
    case = small("delta", "scalar")
    inputs = tensors(case)
    inputs[name].requires_grad_()
    (found,) = torch.autograd.grad(loss(scan(case, inputs), case), inputs[name])
    same([found], [gradients(case)[name]])


def test_an_expanded_gradient():
    """A sum sends back one number in all places, without memory for each."""
    case = small("delta")
    inputs = tensors(case, True)
    o, final_state = scan(case, inputs)
    (o.sum() + final_state.sum()).backward()
    ones = case.but(do=np.ones_like(case.do), dfinal_state=np.ones_like(case.dfinal_state))
    same([x.grad for x in present(inputs)], present(gradients(ones)))


def test_a_chain_of_segments():
    """Gradients flow from segment to segment through the state."""
    case = small("delta", "scalar", T=6)
    whole = tensors(case, True)
    loss(scan(case, whole), case).backward()
    q, k, v, beta, g, state = parts = tensors(case, True)
    rows = []
    for t in (slice(0, 1), slice(1, 4), slice(4, 6)):
        o, state = fwp.torch.delta_rule(*(x[:, t] for x in (q, k, v, beta, g)), initial_state=state)
        rows.append(o)
    loss((torch.cat(rows, dim=1), state), case).backward()
    same([x.grad for x in parts], [x.grad for x in whole])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_of_halves(dtype):
    case = small("delta", "scalar", T=4, dtype=np.float32)
    wide = [x.requires_grad_() for x in tensors(case)]
    half = [x.to(dtype).requires_grad_() for x in tensors(case)[:5]] + [tensors(case)[5].requires_grad_()]
    for inputs in (wide, half):
        o, final_state = scan(case, inputs)
        grads = torch.autograd.grad((o.sum() + final_state.sum()), inputs, create_graph=True)
        sum(x.float().square().sum() for x in grads).backward()
    for x, y in zip(half, wide, strict=True):
        assert x.grad.dtype == x.dtype
        # Rounded inputs, results and first derivatives: a few units in the last place of a half.
        assert relative_error(x.grad.float().numpy(), y.grad.numpy(), floor=1.0) < 16 * torch.finfo(dtype).eps


# torch.func.


@all_rules
@pytest.mark.parametrize("decay", DECAYS)
def test_func_grad(rule, decay):
    case = small(rule, decay)
    inputs = present(tensors(case))
    found = torch.func.grad(lambda *x: loss(scan_of(case)(*x), case), tuple(range(len(inputs))))(*inputs)
    same(found, present(gradients(case)))


@pytest.mark.parametrize("lengths", [None, (2, 0, 3)])
@pytest.mark.parametrize("unbatched", [(), (1, 3), (5,), (0, 2, 4)])
def test_vmap(lengths, unbatched):
    """Over axes here and there; inputs that have no such axis are shared. One call of the kernel."""
    case = small("delta", "scalar", lengths=lengths, heads=(1, 2, 2))
    inputs = tensors(case)
    stacked = [
        x if i in unbatched else torch.stack([x, 0.5 * x, -x], dim=i % 3) for i, x in enumerate(inputs)
    ]
    dims = tuple(None if i in unbatched else i % 3 for i in range(6))
    each = [
        [x if d is None else x.select(d, n) for x, d in zip(stacked, dims, strict=True)] for n in range(3)
    ]

    o, final_state = torch.func.vmap(scan_of(case), in_dims=dims)(*stacked)
    for n, inputs in enumerate(each):
        same((o[n], final_state[n]), scan_of(case)(*inputs))

    slopes = torch.func.grad(lambda *x: loss(scan_of(case)(*x), case), tuple(range(6)))
    found = torch.func.vmap(slopes, in_dims=dims)(*stacked)
    for n, inputs in enumerate(each):
        same([x[n] for x in found], slopes(*inputs))


def test_vmap_out_of_grad():
    case = small("delta")
    inputs = present(tensors(case))
    many = [torch.stack([x, 0.5 * x]) for x in inputs]

    def total(*x):
        return sum(y.sum() for y in torch.func.vmap(scan_of(case))(*x))

    found = torch.func.grad(total, tuple(range(len(many))))(*many)
    for n in range(2):
        one = [x[n].clone().requires_grad_() for x in many]
        expected = torch.autograd.grad(sum(y.sum() for y in scan_of(case)(*one)), one)
        same([x[n] for x in found], expected)


def test_vmap_of_nothing():
    q, k, v, beta, *_ = tensors(small("delta"))
    with pytest.raises(fwp.UnsupportedError, match=r"q: expected an axis of torch.func.vmap of size 1"):
        torch.func.vmap(lambda q: fwp.delta_rule(q, k, v, beta)[0])(q[None][:0])


def test_nested_vmap():
    case = small("linear", "scalar")
    inputs = present(tensors(case))
    many = [torch.stack([torch.stack([x, 2 * x]), torch.stack([-x, x])]) for x in inputs]
    o, _ = torch.func.vmap(torch.func.vmap(scan_of(case)))(*many)
    same([o[1, 0]], [scan_of(case)(*(x[1, 0] for x in many))[0]])


@pytest.mark.parametrize("lengths", [None, (1, 2)])
def test_jacrev(lengths):
    case = small("delta", "scalar", lengths=lengths)
    inputs = present(tensors(case, True))
    for argument in range(6):
        found = torch.func.jacrev(scan_of(case), argument)(*(x.detach() for x in inputs))
        for jacobian, output in zip(found, scan_of(case)(*inputs), strict=True):
            expected = [
                torch.autograd.grad(y, inputs[argument], retain_graph=True, allow_unused=True)[0]
                for y in output.flatten()
            ]
            expected = [torch.zeros_like(inputs[argument]) if x is None else x for x in expected]
            same([jacobian.flatten(0, output.ndim - 1)], [torch.stack(expected)])


def test_jacrev_of_jacrev():
    case = small("delta", "scalar")
    _, *rest = present(tensors(case))

    def total(k):
        return loss(scan_of(case)(tensor(case.q), k, *rest[1:]), case)

    found = torch.func.jacrev(torch.func.jacrev(total))(tensor(case.k))
    same([found], [torch.autograd.functional.hessian(total, tensor(case.k))])
    flat = found.reshape(case.k.size, case.k.size)
    same([flat], [flat.T])


def test_legacy_batches_are_refused():
    """torch.autograd.grad has a vmap of its own, older than torch.func's, that knows no Function."""
    case = small("delta")
    inputs = tensors(case, True)
    o, _ = scan(case, inputs)
    with pytest.raises(
        fwp.UnsupportedError, match="do: expected a tensor without a batch axis .* is_grads_batched"
    ):
        torch.autograd.grad(o, inputs[0], torch.stack([tensor(case.do)] * 2), is_grads_batched=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_of_offsets_are_refused(compiled):
    q, offsets = torch.ones(1, 4, 2, 3), torch.tensor([[0, 1, 4], [0, 2, 4]])

    def batched(offsets):
        return torch.func.vmap(lambda x: fwp.linear_attention(q, q, q, cu_seqlens=x)[0])(offsets)

    if compiled:
        torch.compiler.reset()
        batched = torch.compile(batched, backend="aot_eager")
    with pytest.raises(Exception, match="cu_seqlens: expected a tensor without a batch axis"):
        batched(offsets)


# Forward mode.


def transformations():
    case = small("delta")
    q, *rest = present(tensors(case))

    def o(q):
        return scan_of(case)(q, *rest)[0]

    def dual():
        with torch.autograd.forward_ad.dual_level():
            return o(torch.autograd.forward_ad.make_dual(q, q))

    def operator(q):
        k, v, beta, state = rest
        arguments = (None, state, None, "delta_rule", 0, 0, 0.0, None, None, False, 0.0, 1.0)
        return torch.ops.fwp_core.scan(q, k, v, beta, *arguments)[0]

    return {
        "jvp": lambda: torch.func.jvp(o, (q,), (q,)),
        "jacfwd": lambda: torch.func.jacfwd(o)(q),
        "hessian": lambda: torch.func.hessian(lambda q: o(q).sum())(q),
        "dual": dual,
        "backward": lambda: torch.func.jvp(torch.func.grad(lambda q: o(q).square().sum()), (q,), (q,)),
        "operator": lambda: torch.func.jvp(operator, (q,), (q,)),
    }


@ignore_jit
@pytest.mark.parametrize("name", transformations())
def test_forward_mode_raises(name):
    """It never gives zeros."""
    with pytest.raises(fwp.UnsupportedError, match="forward-mode"):
        transformations()[name]()


@ignore_jit
def test_forward_mode_around_a_constant():
    """A scan that does not depend on what moves is no obstacle."""
    case = small("delta")
    o, _ = scan(case, tensors(case))

    def shifted(x):
        return x + scan(case, tensors(case))[0]

    value, tangent = torch.func.jvp(shifted, (o,), (o,))
    assert torch.equal(value, 2 * o)
    assert torch.equal(tangent, o)


# Autocast.


def test_autocast_is_a_cast():
    """q, k and v in the dtype of autocast, gates and state in float32, whatever they come in."""
    case = make_case("delta", "scalar", T=9, K=8, V=8)
    q, k, v, beta, g, state = tensors(case)
    mixed = [q, k.bfloat16(), v.half(), beta.bfloat16(), g.half(), state.bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        found = scan(case, mixed)
    low, wide = [x.bfloat16() for x in mixed[:3]], [x.float() for x in mixed[3:]]
    for x, y in zip(found, scan(case, low + wide), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    assert found[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises(fwp.DTypeError):
        scan(case, mixed)


def test_autocast_gives_gradients_in_the_inputs_dtypes():
    case = make_case("delta", "scalar", T=9, K=8, V=8)
    inputs = tensors(case, True)
    with torch.autocast("cpu", torch.bfloat16):
        o, final_state = scan(case, inputs)
        grads = torch.autograd.grad(o.float().sum() + final_state.sum(), inputs, create_graph=True)
        total = sum(x.float().square().sum() for x in grads)
        second = torch.autograd.grad(total, inputs, retain_graph=True)
    outside = torch.autograd.grad(total, inputs)
    assert all(torch.equal(x, y) for x, y in zip(second, outside, strict=True))
    assert [x.dtype for x in (*grads, *second)] == [torch.float32] * 12
    cast = [x.detach().bfloat16().requires_grad_() for x in inputs[:3]] + inputs[3:]
    o, final_state = scan(case, cast)
    grads = torch.autograd.grad(o.float().sum() + final_state.sum(), cast, create_graph=True)
    expected = torch.autograd.grad(sum(x.float().square().sum() for x in grads), cast)
    for x, y in zip(second, expected, strict=True):
        # The second of them passes through bfloat16 once more.
        assert relative_error(x.numpy(), y.float().numpy(), floor=1.0) < torch.finfo(torch.bfloat16).eps


def test_autocast_leaves_float64_and_steps_in_its_dtype():
    case = make_case("delta", T=1, dtype=np.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert scan(case, tensors(case))[0].dtype == torch.float64
    case = make_case("delta", T=1)
    state = torch.zeros(2, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        o = fwp.torch.delta_rule_step(*(x[:, 0] for x in tensors(case)[:4]), state=state)
    assert o.dtype == torch.bfloat16
