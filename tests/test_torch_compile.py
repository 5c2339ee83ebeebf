"""The scans as operators: torch.compile without graph breaks, torch.export, torch's own checks."""

import subprocess
import sys

import numpy as np
import pytest
import torch_cases
from cases import RULES, make_case
from torch_cases import SCAN, STEP, array, loss, options, parameters, present, scan, scan_of, tensor, tensors

import fwp_core as fwp

torch = pytest.importorskip("torch")

VARIANTS = {
    "linear": {"rule": "linear", "beta": False, "state": False},
    "linear, grouped": {"rule": "linear", "decay": "channel", "heads": (1, 2, 4)},
    "delta, packed": {"rule": "delta", "decay": "scalar", "lengths": (2, 0, 3), "qk_norm": "l2"},
    "delta, halves": {"rule": "delta", "decay": "scalar", "dtype": np.float16, "gate_dtype": np.float32},
    "DPFP": {"rule": "delta", "feature_map": ("DPFP", 2), "qk_norm": "sum"},
    "FAVOR": {"rule": "delta", "feature_map": ("FAVOR", 3, 1e-2), "heads": (1, 1, 1)},
    "attention_norm": {"rule": "linear", "feature_map": ("ELU1",), "attention_norm": True},
    "empty": {"rule": "delta", "B": 0, "T": 0},
}
QUICK = ("linear", "delta, packed", "FAVOR")
variants = pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
all_rules = pytest.mark.parametrize("rule", RULES)
ignore_jit = pytest.mark.filterwarnings("ignore:`torch.jit.script.*is deprecated")  # torch itself uses it


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def small(rule, decay="none", **more):
    return make_case(rule, decay, **{"B": 2, "T": 5, "K": 4, "V": 3} | more)


def compiled(fn, backend="aot_eager", **more):
    return torch.compile(fn, fullgraph=True, backend=backend, **more)


def operator_arguments(case, requires_grad=False):
    """The arguments of torch.ops.fwp_core.scan."""
    phi = parameters(case.options.get("feature_map")) or (0, 0, 0.0, None)
    lengths = None if case.cu_seqlens is None else torch.from_numpy(case.cu_seqlens)
    name = {"linear": "linear_attention", "delta": "delta_rule"}[case.rule]
    more = (case.qk_norm, case.attention_norm, case.eps, case.scale)
    return *tensors(case, requires_grad), lengths, name, *phi, *more


# Torch's own checks: schema, autograd registration, fake shapes and strides, ahead of time dispatch.


@variants
def test_opcheck_scan(variant):
    case = small(**VARIANTS[variant])
    for requires_grad in (False, True):
        torch.library.opcheck(torch.ops.fwp_core.scan.default, operator_arguments(case, requires_grad))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fake_results_are_like_real_ones(variant):
    case = small(**VARIANTS[variant])
    arguments = operator_arguments(case)
    incoming = tensor(case.do), tensor(case.dfinal_state)
    mode = torch._subclasses.FakeTensorMode()
    for operator, given in (
        (torch.ops.fwp_core.scan, arguments),
        (torch.ops.fwp_core.scan_backward, (*incoming, *arguments)),
    ):
        real = operator(*given)
        with mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given))
        for x, y in zip(fake, real, strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@variants
def test_opcheck_backward(variant):
    case = small(**VARIANTS[variant])
    dfinal_state = tensor(case.dfinal_state)
    for do in (tensor(case.do), None):
        arguments = (do, dfinal_state, *operator_arguments(case))
        torch.library.opcheck(torch.ops.fwp_core.scan_backward.default, arguments)


@all_rules
def test_opcheck_step(rule):
    case = small(rule, "scalar")
    *inputs, state, _, name, kind, nu, eps, projection, qk_norm, norm, eps, scale = operator_arguments(case)
    for indices in (None, torch.tensor([1, -1])):
        arguments = (*inputs, state, indices, name, kind, nu, eps, projection, qk_norm, norm, eps, scale)
        torch.library.opcheck(torch.ops.fwp_core.step.default, arguments)
    one = (*(x[:, 0] for x in inputs), state, None, *arguments[7:])
    torch.library.opcheck(torch.ops.fwp_core.step.default, one)


# torch.compile.


def same_when_compiled(case, backend):
    results, grads = [], []
    for function in (scan_of(case), compiled(scan_of(case), backend)):
        inputs = present(tensors(case, requires_grad=True))
        results.append(function(*inputs))
        grads.append(torch.autograd.grad(loss(results[-1], case), inputs))
    for x, y in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert x.stride() == y.stride()
        assert torch.equal(x, y)


@variants
def test_compiled_forward_and_backward(variant):
    same_when_compiled(small(**VARIANTS[variant]), "aot_eager")


@ignore_jit
@all_rules
def test_inductor(rule):
    same_when_compiled(small(rule, "scalar"), "inductor")


def test_public_functions_are_compiled():
    """Before anything of torch is imported in the package, too."""
    code = """if True:
        import sys, torch, fwp_core as fwp
        q, k, v = torch.ones(3, 1, 2, 1, 4).unbind()
        assert "fwp_core.adapters.torch" not in sys.modules
        scan = torch.compile(lambda *x: fwp.linear_attention(*x)[0], fullgraph=True, backend="eager")
        assert torch.equal(scan(q, k, v), fwp.linear_attention(q, k, v)[0])
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_map_is_another_graph():
    case = small("delta", K=4)
    function = compiled(lambda q, k, v, beta, phi: SCAN["delta"](q, k, v, beta, feature_map=phi))
    q, k, v, beta, *_ = tensors(case)
    maps = [
        None,
        *(fwp.feature_maps.DPFP(nu) for nu in (1, 2, 3)),
        fwp.feature_maps.ELU1(),
        *(fwp.feature_maps.FAVOR(s * np.ones((2, 4), np.float32)) for s in (1, 2)),
        fwp.feature_maps.FAVOR(np.ones((2, 4), np.float32), eps=0.5),
    ]
    for phi in maps:
        found = function(q, k, v, beta, phi)
        for x, y in zip(found, SCAN["delta"](q, k, v, beta, feature_map=phi), strict=True):
            assert torch.equal(x, y)
    with pytest.raises(Exception, match="feature_map: expected None or an object"):
        function(q, k, v, beta, "elu")


def test_one_graph_for_all_lengths():
    """T and the lengths of packed sequences are data where T is marked as dynamic."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda q, k, v, beta, lengths: SCAN["delta"](q, k, v, beta, cu_seqlens=lengths),
        fullgraph=True,
        backend=counter,
    )
    for lengths in ((3, 4), (6, 0), (2, 9)):
        case = small("delta", lengths=lengths, state=False)
        inputs = tensors(case)[:4]
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 1)
        found = function(*inputs, torch.from_numpy(case.cu_seqlens))
        for x, y in zip(found, scan(case, tensors(case)), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 1


def test_arguments_of_other_kinds():
    """Lengths as integers or an array; a layer around; autocast inside."""
    case = small("delta", lengths=(2, 3))
    q, k, v, beta, _, state = tensors(case)
    expected = scan(case, tensors(case))
    for lengths in ([0, 2, 5], (0, 2, 5), np.array([0, 2, 5])):
        function = compiled(lambda *x, n=lengths: SCAN["delta"](*x, initial_state=state, cu_seqlens=n))
        for x, y in zip(function(q, k, v, beta), expected, strict=True):
            assert torch.equal(x, y)

    def low(*x):
        with torch.autocast("cpu", torch.bfloat16):
            return SCAN["delta"](*x, initial_state=state, cu_seqlens=[0, 2, 5])

    for x, y in zip(compiled(low)(q, k, v, beta), low(q, k, v, beta), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@all_rules
def test_compiled_step(rule):
    """The operator writes into the state, and the graph knows it."""
    case = small(rule, "scalar", T=1)
    inputs = [None if x is None else x[:, 0] for x in tensors(case)[:5]]

    def twice(state):
        before = state.sum()
        o = STEP[rule](*inputs, state=state)
        return before, o + STEP[rule](*inputs, state=state), state.sum()

    states = [tensor(case.first_state()) for _ in range(2)]
    for x, y in zip(twice(states[0]), compiled(twice)(states[1]), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(*states)


def test_compiled_vmap():
    case = small("delta", "scalar", lengths=(2, 3))
    many = [torch.stack([x, 0.5 * x]) for x in present(tensors(case))]
    expected = torch.func.vmap(scan_of(case))(*many)
    for x, y in zip(compiled(torch.func.vmap(scan_of(case)))(*many), expected, strict=True):
        assert torch.equal(x, y)
    arguments = operator_arguments(case)
    backward = torch.ops.fwp_core.scan_backward
    found = torch.func.vmap(lambda do: backward(do, None, *arguments))(torch.stack([tensor(case.do)] * 2))
    for x, y in zip(found, backward(tensor(case.do), None, *arguments), strict=True):
        assert torch.equal(x[1], y)


@ignore_jit
def test_forward_mode_raises_when_compiled():
    case = small("delta")
    q, *rest = present(tensors(case))

    def o(q):
        return scan_of(case)(q, *rest)[0]

    with pytest.raises(Exception, match="forward-mode"):
        compiled(lambda q: torch.func.jvp(o, (q,), (q,)))(q)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Exception, match="forward-mode"):
        compiled(o)(torch.autograd.forward_ad.make_dual(q, q))


def test_second_derivatives_raise_when_compiled():
    case = small("delta")
    inputs = present(tensors(case, requires_grad=True))
    o, _ = compiled(scan_of(case))(*inputs)
    (dq,) = torch.autograd.grad(o.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not (currently )?support double backward"):
        dq.sum().backward()


def test_outputs_are_refused_when_compiled():
    q, k, v, beta, *_ = tensors(small("delta"))
    with pytest.raises(Exception, match="out: expected None under torch.compile"):
        compiled(lambda q: SCAN["delta"](q, k, v, beta, out=torch.empty_like(v)))(q)


def test_bad_shapes_are_refused_when_compiled():
    q, k, v, beta, *_ = tensors(small("delta"))
    with pytest.raises(fwp.ShapeError, match="beta: expected shape"):
        compiled(lambda *x: SCAN["delta"](*x))(q, k, v, beta[:, :3])


@pytest.mark.parametrize("lengths", [5, {0, 5}, torch.tensor(5)], ids=str)
def test_bad_lengths_are_refused_when_compiled(lengths):
    q, k, v, beta, *_ = tensors(small("delta", lengths=(2, 3)))
    with pytest.raises(Exception, match=r"cu_seqlens: expected (a sequence of integers|shape \(N\+1,\))"):
        compiled(lambda *x: SCAN["delta"](*x, cu_seqlens=lengths))(q, k, v, beta)


# torch.export, and modes that look at operators.


class Scan(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case, self.options = case, options(case)

    def forward(self, q, k, v, beta):
        return fwp.delta_rule(q, k, v, beta, **self.options)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    case = small("delta", feature_map=("DPFP", 2), qk_norm="sum", state=False)
    inputs = tuple(tensors(case)[:4])
    T = {1: torch.export.Dim("T", min=2, max=64)}
    program = torch.export.export(Scan(case), inputs, dynamic_shapes=(T, T, T, T), strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    assert "fwp_core.scan.default" in names
    torch.export.save(program, tmp_path / "scan.pt2")
    again = torch.export.load(tmp_path / "scan.pt2").module()
    other = small("delta", T=9, feature_map=("DPFP", 2), qk_norm="sum", state=False, seed=1)
    for x, y in zip(again(*tensors(other)[:4]), scan(other, tensors(other)), strict=True):
        assert torch.equal(x, y)


def test_modes_see_the_operator():
    """A mode that records or replaces operators gets ours, so that checkpointing by operator works."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    case = small("delta")
    expected = scan(case, tensors(case))
    with Recorder():
        found = scan(case, tensors(case))
    assert "fwp_core.scan.default" in seen
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_activation_checkpointing():
    case = small("delta", "scalar")
    inputs = tensors(case, requires_grad=True)
    results = torch.utils.checkpoint.checkpoint(scan, case, inputs, use_reentrant=False)
    grads = torch.autograd.grad(loss(results, case), inputs)
    for x, y in zip(grads, torch_cases.gradients(case), strict=True):
        assert np.array_equal(array(x), array(y))
