"""FastWeightAttention: one recurrence however it is cut into calls, and a module like any other."""

import copy
import doctest
import gc
import importlib.util
import pickle
import re
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tolerances import NETWORK, relative_error

import fwp_core as fwp

torch = pytest.importorskip("torch")

FastWeightAttention, FastWeightState = fwp.torch.FastWeightAttention, fwp.torch.FastWeightState

ROOT = Path(__file__).parents[1]
D = 16
KINDS = {
    "delta": {},
    "gated delta": {"gate": "scalar", "taps": 4, "output_gate": True},
    "channel gates, grouped": {"gate": "channel", "taps": 3, "key_heads": 1, "key_size": 4, "value_size": 6},
    "linear": {"rule": "linear", "qk_norm": None, "output_norm": False},
    "linear transformer": {
        "rule": "linear",
        "feature_map": fwp.feature_maps.ELU1(),
        "qk_norm": None,
        "attention_norm": True,
    },
    "gated linear": {"rule": "linear", "gate": "channel", "key_size": 4, "taps": 2},
    "DPFP": {"feature_map": fwp.feature_maps.DPFP(2), "qk_norm": "sum", "taps": 1},
    "FAVOR": {
        "feature_map": fwp.feature_maps.FAVOR(fwp.feature_maps.orthogonal_gaussian(6, 8, 0)),
        "qk_norm": "sum",
    },
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, dtype=torch.float64, **more):
    torch.manual_seed(0)
    return FastWeightAttention(D, 2, dtype=dtype, **KINDS[kind] | more).to(dtype)


def text(B=2, T=9, dtype=torch.float64, seed=0):
    return torch.randn(B, T, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def same(*pairs):
    for x, y in pairs:
        if x is not None or y is not None:
            assert relative_error(x.detach().numpy(), y.detach().numpy(), floor=1.0) < NETWORK


# However it is cut.


@kinds
def test_segments_are_one_call(kind):
    layer, x = make(kind), text()
    y, state = layer(x)
    assert y.shape == x.shape
    assert state.memory.shape == layer.initial_state(2).memory.shape
    after, parts = None, []
    for t in (slice(0, 1), slice(1, 1), slice(1, 6), slice(6, 9)):
        part, after = layer(x[:, t], after)
        parts.append(part)
    same((torch.cat(parts, dim=1), y), *zip(after, state, strict=True))


@kinds
def test_steps_are_one_call(kind):
    layer, x = make(kind), text()
    y, state = layer(x)
    carried = layer.initial_state(2)
    parts = [
        layer.step(x[:, t], carried)
        for t in (slice(0, 1), slice(1, 4), *(slice(t, t + 1) for t in range(4, 9)))
    ]
    same((torch.cat(parts, dim=1), y), *zip(carried, state, strict=True))
    assert not parts[0].requires_grad


@kinds
def test_packed_sequences_are_calls_of_their_own(kind):
    layer, x = make(kind), text(B=1, T=12)
    lengths = [0, 0, 1, 3, 12]
    _, before = layer(text(B=4, T=5, seed=1))
    y, state = layer(x, before, cu_seqlens=lengths)
    again, _ = layer(x, before, cu_seqlens=torch.tensor(lengths))
    assert torch.equal(y, again)
    for n, (start, end) in enumerate(pairwise(lengths)):
        one = FastWeightState(*(None if part is None else part[n : n + 1] for part in before))
        y_n, state_n = layer(x[:, start:end], one)
        parts = (None if part is None else part[n : n + 1] for part in state)
        same((y[:, start:end], y_n), *zip(parts, state_n, strict=True))


@kinds
def test_gradients_do_not_depend_on_the_cut(kind):
    layer, x = make(kind), text()
    found = []
    for cuts in ([9], [2, 3, 4]):
        state, total = None, 0.0
        for part in x.split(cuts, dim=1):
            y, state = layer(part, state)
            total = total + y.square().sum()
        layer.zero_grad()
        (total + state.memory.square().sum()).backward()
        found.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.any(), name
        same((found[1][name], gradient))


def test_gradcheck():
    layer = make("gated delta")
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def output(x, **some):
        return torch.func.functional_call(layer, {**parameters, **some}, (x,))[0]

    x = text(B=1, T=3).requires_grad_()
    assert torch.autograd.gradcheck(output, x)
    for name in ("decay_rate", "decay.bias", "convolution", "strength.weight"):
        p = parameters[name].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda p, name=name: output(x.detach(), **{name: p}), p)


def test_the_future_does_not_reach_the_past():
    layer, x = make("gated delta"), text()
    changed = x.clone()
    changed[:, 5:] += 1
    y, other = layer(x)[0], layer(changed)[0]
    assert torch.equal(y[:, :5], other[:, :5])
    assert (y[:, 5:] != other[:, 5:]).any()


def test_a_state_is_not_changed_by_forward():
    layer, x = make("gated delta"), text()
    _, state = layer(x)
    before = [part.clone() for part in state]
    layer(x, state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert state.memory.requires_grad
    assert not any(part.requires_grad for part in state.detach())


# The equations.


def test_is_the_delta_rule():
    """The docstring's equations, written out without any of the layer's own code."""
    layer, x = make("gated delta"), text(T=5)
    w = dict(layer.named_parameters())
    mixed = x @ w["project.weight"].T
    padded = torch.nn.functional.pad(mixed, (0, 0, 3, 0))
    convolved = sum(w["convolution"][i] * padded[:, i : i + 5] for i in range(4))
    q, k, v = (y.unflatten(-1, (2, 8)) for y in torch.nn.functional.silu(convolved).chunk(3, dim=-1))
    beta = torch.sigmoid(x @ w["strength.weight"].T + w["strength.bias"])
    step = torch.nn.functional.softplus(x @ w["decay.weight"].T + w["decay.bias"])
    g = -w["decay_rate"].exp() * step
    o, final_state = fwp.reference.delta_rule(*(y.detach().numpy() for y in (q, k, v, beta, g)), qk_norm="l2")
    o = torch.from_numpy(o)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"]
    y = (o.flatten(2) * torch.nn.functional.silu(x @ w["output_gate.weight"].T)) @ w["out.weight"].T
    found, state = layer(x)
    same((found, y), (state.memory, torch.from_numpy(final_state)), (state.recent, mixed[:, 2:]))


def test_channel_gates_are_per_channel():
    layer, x = make("channel gates, grouped"), text(T=3)
    beta, g = layer._strengths(x)
    assert beta.shape == (2, 3, 2)
    assert g.shape == (2, 3, 2, 4)
    assert (g < 0).all()
    assert torch.unique(g[0, 0, 0]).numel() == 4


def test_initial_decays_forget_within_1_to_1000_tokens():
    layer = FastWeightAttention(D, 64, key_size=4, value_size=4, gate="scalar")
    _, g = layer._strengths(torch.zeros(1, 1, D))
    assert g.max() < -0.9e-3
    assert g.min() > -16 * 0.11
    assert g.max() / g.min() < 0.1
    before = layer.project.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.project.weight, before)


def test_outputs_have_the_size_of_inputs():
    layer = FastWeightAttention(64, 4, gate="scalar", taps=4)
    y, _ = layer(torch.randn(4, 100, 64))
    assert 0.5 < y.std() < 2


# A module like any other.


@kinds
def test_copies_and_state_dict(kind):
    layer, x = make(kind), text()
    y, _ = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x)[0], y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], y)
    torch.manual_seed(1)
    more = KINDS[kind] | (
        {"feature_map": fwp.feature_maps.FAVOR(np.ones((6, 8), np.float32))} if kind == "FAVOR" else {}
    )
    other = FastWeightAttention(D, 2, **more).double()
    assert not torch.equal(other(x)[0], y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], y)
    assert "heads=2" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gated delta", "FAVOR", "linear transformer"])
def test_precisions(kind, dtype):
    layer, x = make(kind), text()
    y, _ = layer(x)
    low, state_low = make(kind).to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert state_low.memory.dtype == torch.float32
    error = relative_error(low.detach().double().numpy(), y.detach().numpy(), floor=1.0)
    assert error < 32 * torch.finfo(dtype).eps


def test_autocast():
    layer, x = make("gated delta", torch.float32), text(dtype=torch.float32)
    y, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low, state = layer(x)
        carried = layer.initial_state(2)
        stepped = layer.step(x, carried)
    assert low.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    low.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    for found in (low, stepped):
        assert relative_error(found.detach().float().numpy(), y.detach().numpy(), floor=1.0) < 32 * 2.0**-8


@pytest.mark.parametrize("kind", ["gated delta", "FAVOR"])
def test_compiled(kind):
    torch.compiler.reset()
    layer, x = make(kind), text()
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, state = layer(x)
    found, after = function(x)
    assert torch.equal(found, y)
    same((function(x, after.detach())[0], layer(x, state)[0]))
    gradients = torch.autograd.grad(y.sum(), layer.project.weight)
    assert torch.equal(torch.autograd.grad(found.sum(), layer.project.weight)[0], gradients[0])
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    carried, expected = layer.initial_state(2), layer.initial_state(2)
    same((step(x[:, :1], carried), layer.step(x[:, :1], expected)), *zip(carried, expected, strict=True))


def test_compiled_packed_sequences():
    torch.compiler.reset()
    layer, x = make("gated delta"), text(B=1)
    lengths = torch.tensor([0, 4, 9])
    function = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same((function(x, cu_seqlens=lengths)[0], layer(x, cu_seqlens=lengths)[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projection_follows_the_factory(dtype):
    layer = FastWeightAttention(D, 2, dtype=dtype, **KINDS["FAVOR"])
    assert layer.projection.dtype == dtype
    assert layer(text(dtype=dtype))[0].dtype == dtype
    assert FastWeightAttention(D, 2, device="meta", **KINDS["FAVOR"]).projection.is_meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("buffers", [False, True])
def test_func_grad(dtype, buffers):
    layer, x = make("FAVOR", dtype), text(dtype=dtype)
    given = dict(layer.named_buffers()) if buffers else {}

    def loss(parameters, buffers):
        return torch.func.functional_call(layer, (parameters, buffers), (x,))[0].sum()

    gradients = torch.func.grad(loss)(dict(layer.named_parameters()), given)
    layer(x)[0].sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_meta_device_and_training_flag():
    layer = FastWeightAttention(D, 2, gate="scalar", taps=4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(text(dtype=torch.float32))[0]).all()
    assert torch.equal(
        layer.eval()(text(dtype=torch.float32))[0], layer.train()(text(dtype=torch.float32))[0]
    )


def test_nothing_outlives_the_graph():
    layer, x = make("gated delta"), text()
    layer(x)
    gc.collect()
    gc.disable()
    try:
        y, state = layer(x)
        alive = [weakref.ref(z) for z in (y, *state)]
        y.sum().backward()
        del y, state
        assert [z for z in alive if z() is not None] == []
    finally:
        gc.enable()


def test_several_layers_learn():
    """A few steps of Adam on a fixed batch lower the loss."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(FastWeightAttention(D, 2, gate="scalar", taps=2) for _ in range(2))
    optimiser = torch.optim.Adam(layers.parameters(), 1e-2)
    x, target = text(dtype=torch.float32), text(dtype=torch.float32, seed=1)
    losses = []
    for _ in range(30):
        y = x
        for layer in layers:
            y = y + layer(y)[0]
        loss = (y - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# What is written about it.


def test_the_page_of_the_documentation():
    """Its code runs, in order, and its assertions hold."""
    torch.compiler.reset()
    torch.manual_seed(0)
    page = ROOT / "docs" / "torch.md"
    if not page.exists():
        pytest.skip("not a checkout")
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    exec(compile("".join(blocks), str(page), "exec"), {})


def test_the_docstring():
    module = importlib.import_module("fwp_core.adapters.torch_layer")
    assert doctest.testmod(module) == (0, 5)


def test_the_example_learns():
    spec = importlib.util.spec_from_file_location("torch_training", ROOT / "examples" / "torch_training.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    right = example.train(120)
    assert np.mean(right[:5]) < 0.3
    assert np.mean(right[-10:]) > 0.9


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0, "heads": 2}, "hidden_size: expected an integer from 1 to .*, got 0"),
        ({"hidden_size": 16, "heads": 0}, "heads: expected an integer from 1 to .*, got 0"),
        ({"hidden_size": 16, "heads": 2, "key_heads": 3}, "key_heads: expected a divisor of 2 heads, got 3"),
        ({"hidden_size": 16, "heads": 2, "rule": "sum"}, "rule: expected 'delta' or 'linear', got 'sum'"),
        (
            {"hidden_size": 16, "heads": 2, "gate": "head"},
            "gate: expected None, 'scalar' or 'channel', got 'head'",
        ),
        ({"hidden_size": 16, "heads": 2, "taps": -1}, "taps: expected an integer from 0 to .*, got -1"),
        (
            {"hidden_size": 16, "heads": 2, "key_size": -4},
            "key_size: expected an integer from 1 to .*, got -4",
        ),
        (
            {"hidden_size": 16, "heads": 2, "key_heads": 0},
            "key_heads: expected an integer from 1 to .*, got 0",
        ),
        ({"hidden_size": 16, "heads": 2, "key_size": 0}, "key_size: expected an integer from 1 to .*, got 0"),
        (
            {"hidden_size": 16, "heads": 2, "rule": ["delta"]},
            r"rule: expected 'delta' or 'linear', got \['delta'\]",
        ),
        ({"hidden_size": 16, "heads": 2, "eps": -1.0}, "eps: expected a finite number of 0 or more, got -1"),
        ({"hidden_size": 16, "heads": 2, "qk_norm": "l3"}, "qk_norm: expected None, 'sum' or 'l2', got 'l3'"),
    ],
)
def test_bad_parameters(arguments, message):
    with pytest.raises(fwp.ArgumentError, match=message):
        FastWeightAttention(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 2.0}, "heads: expected an integer, got float"),
        ({"heads": 2, "attention_norm": "yes"}, "attention_norm: expected True or False, got str"),
        ({"heads": 2, "output_norm": "yes"}, "output_norm: expected True or False, got str"),
        ({"heads": 2, "output_gate": None}, "output_gate: expected True or False, got NoneType"),
        ({"heads": 2, "eps": "a"}, "eps: expected a number, got str"),
        ({"heads": 2, "scale": "a"}, "scale: expected a number, got str"),
        ({"heads": 2, "feature_map": "elu"}, "feature_map: expected None or an object of .*, got str"),
    ],
)
def test_parameters_of_a_wrong_type(arguments, message):
    with pytest.raises(fwp.DTypeError, match=message):
        FastWeightAttention(16, **arguments)


def test_states_of_other_layers():
    short, x = make("gated delta"), text()
    for kind, more in (("delta", {}), ("gated delta", {"key_size": 4}), ("gated delta", {"taps": 3})):
        state = make(kind, **more).initial_state(2)
        for call in (short, short.step):
            with pytest.raises(fwp.ShapeError, match=r"state: expected (memory|recent) of shape \(2, "):
                call(x, state)
    with pytest.raises(fwp.ShapeError, match=r"state: expected recent of shape None, got \(2, 3, 48\)"):
        make("delta")(x, short.initial_state(2))
    with pytest.raises(fwp.DTypeError, match="state: expected a FastWeightState, got Tensor"):
        short(x, short.initial_state(2).memory)


def test_bad_inputs():
    layer, x = make("delta"), text()
    with pytest.raises(fwp.ShapeError, match=r"x: expected shape \(B, T, D=16\), got \(2, 9, 15\)"):
        layer(x[..., :15])
    with pytest.raises(fwp.ShapeError, match="x: expected B=1 for packed sequences, got 2"):
        layer(x, cu_seqlens=[0, 9])
    with pytest.raises(fwp.ShapeError, match="state: expected that of 2 sequences, got 3"):
        layer(x, layer.initial_state(3))
    with pytest.raises(fwp.ShapeError, match="state: expected that of 2 sequences, got 1"):
        layer.step(x, layer.initial_state(1))
    with pytest.raises(fwp.DTypeError, match="state: expected a FastWeightState, got NoneType"):
        layer.step(x, None)
    for call in (layer, lambda x: layer.step(x, layer.initial_state(2))):
        with pytest.raises(fwp.DTypeError, match="x: expected a torch.Tensor, got ndarray"):
            call(x.numpy())


@pytest.mark.parametrize("make_offsets", [list, torch.tensor])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ((1, 9), "expected it to start with 0, got 1"),
        ((0, 8), "expected it to end with T=9, got 8"),
        ((0, 12), "expected it to end with T=9, got 12"),
        ((0, 7, 3, 9), "expected offsets that never fall, got 7 before 3"),
        ((0, -100, 9), "expected offsets that never fall, got 0 before -100"),
    ],
)
def test_bad_offsets(offsets, message, make_offsets):
    for kind in ("delta", "gated delta"):
        with pytest.raises(fwp.ArgumentError, match=f"cu_seqlens: {message}"):
            make(kind)(text(B=1), cu_seqlens=make_offsets(offsets))


@pytest.mark.parametrize("offsets", [(0, 99), (3, 9), (-7, 9, 4), (0, 4), (0, 2**40, 9)])
def test_offsets_that_cannot_be_checked_read_no_other_memory(offsets):
    """Those on a device: the scan finds them later, and a wrong index before it would end the process."""
    module = importlib.import_module("fwp_core.adapters.torch_layer")
    x, recent = text(B=1), torch.ones(len(offsets) - 1, 3, D, dtype=torch.float64)
    taps = torch.ones(4, D, dtype=torch.float64)
    y, after = module._convolve_packed(x, recent, taps, torch.tensor(offsets))
    assert (y.shape, after.shape) == (x.shape, recent.shape)


class Residual(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + self.layer(x)[0]


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit.*is (deprecated|not supported)"
)
@kinds
def test_traced(kind):
    block = Residual(make(kind))
    traced = torch.jit.trace(block, text())
    for x in (text(seed=1), text(B=3, T=5, seed=2)):
        assert torch.equal(traced(x), block(x))
