"""The functions of fla: signatures, what they compute beside a recurrence in float64, what they refuse."""

import ast
import importlib.util
import inspect
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import REORDERED, ROUNDING, TOLERANCE, relative_error

import fwp_core as fwp

torch = pytest.importorskip("torch")

from fwp_core.compat import fla  # noqa: E402

RULES = ("delta_rule", "gated_delta_rule", "kda", "linear_attn", "simple_gla", "retention", "gla")
NAMES = [f"{form}_{rule}" for form in ("chunk", "fused_recurrent") for rule in RULES]
every_function = pytest.mark.parametrize("name", NAMES)
EXACT = REORDERED[np.dtype(np.float64)]
DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: "bfloat16"}


# Signatures


@cache
def installed_functions():
    """Signatures of the installed fla from its sources: it may only be imported where there is Triton."""
    spec = importlib.util.find_spec("fla")
    if spec is None:
        pytest.skip("fla is not installed")
    functions = {}
    for path in Path(spec.submodule_search_locations[0], "ops").glob("*/*.py"):
        if path.parent.name in RULES:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            functions |= {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    return functions


@every_function
def test_signatures_are_those_of_the_installed_fla(name):
    expected = installed_functions()[name]
    parameters = inspect.signature(getattr(fla, name)).parameters
    assert not expected.posonlyargs + expected.kwonlyargs
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [argument.arg for argument in expected.args]
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    assert defaults == [ast.literal_eval(default) for default in expected.defaults]
    assert [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD] == (
        [expected.kwarg.arg] if expected.kwarg else []
    )


def test_the_short_names_of_the_gated_delta_rule():
    assert fla.chunk_gdn is fla.chunk_gated_delta_rule
    assert fla.fused_recurrent_gdn is fla.fused_recurrent_gated_delta_rule
    assert set(fla.__all__) == {*NAMES, "chunk_gdn", "fused_recurrent_gdn"}


# What the arguments mean, and a recurrence over it that torch differentiates.


def log_decay(name, x):
    """The sum of all gates [B,T,H,K or 1,V or 1]."""
    B, T, H = x["v"].shape[:3]
    total = torch.zeros(B, T, H, 1, 1, dtype=torch.float64)
    g = x.get("g")
    if x.get("use_gate_in_kernel"):
        rate = x["A_log"].exp().reshape(H, *[1] * (g.ndim - 3))
        g = g + x["dt_bias"].reshape(g.shape[2:])
        bound = x.get("lower_bound")
        g = bound / (1 + (-rate * g).exp()) if bound is not None else -rate * (1 + g.exp()).log()
    if g is not None:
        total = total + (g[..., None, None] if g.ndim == 3 else g[..., None])
    if x.get("gk") is not None:
        total = total + x["gk"][..., None]
    if x.get("gv") is not None:
        total = total + x["gv"][..., None, :]
    if x.get("g_gamma") is not None:
        total = total + x["g_gamma"][:, None, None]
    if "retention" in name:
        total = total + torch.tensor([np.log(1 - 2.0 ** (-5 - h)) for h in range(H)])[:, None, None]
    return total


def strength(x):
    """[B,T,H,V or 1]."""
    beta = x.get("beta")
    if beta is None:
        beta = torch.ones(x["v"].shape[:3], dtype=torch.float64)
    if x.get("use_beta_sigmoid_in_kernel"):
        beta = (1 + x.get("allow_neg_eigval", False)) / (1 + (-beta).exp())
    return beta if beta.ndim == 4 else beta[..., None]


def reference(name, x):
    """Everything that the function named computes of arguments x, token by token: o, S, z."""
    x = {"normalize": name == "chunk_linear_attn", **x}
    q, k, v = x["q"], x["k"], x["v"]
    if x.get("use_qk_l2norm_in_kernel"):
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    group = v.shape[2] // k.shape[2]
    q, k = (t.repeat_interleave(group, 2) for t in (q, k))
    scale = k.shape[3] ** -0.5 if x.get("scale") is None else x["scale"]
    decay, beta = log_decay(name, x).exp(), strength(x)
    delta = "delta" in name or "kda" in name
    S0, z0 = first_states(x, q, v)
    o, states, sums = torch.zeros_like(v), [], []
    for n, (b, tokens) in enumerate(sequences(x, v)):
        S, z = S0[n], z0[n]
        for t in tokens:
            S = decay[b, t] * S
            read = torch.einsum("hk,hkv->hv", k[b, t], S)
            write = beta[b, t] * (v[b, t] - read) if delta else v[b, t]
            S = S + k[b, t, :, :, None] * write[:, None]
            z = z + k[b, t]
            y = scale * torch.einsum("hk,hkv->hv", q[b, t], S)
            if x["normalize"]:
                y = y / (scale * (q[b, t] * z).sum(-1, keepdim=True) + 1e-10)
            o = o.index_put((torch.tensor(b), torch.tensor(t)), y)
        states.append(S)
        sums.append(z)
    S = torch.stack(states) if states else S0
    return o, S.mT if x.get("state_v_first") else S, torch.stack(sums)[:, None] if sums else z0[:, None]


def first_states(x, q, v):
    cu_seqlens, state = x.get("cu_seqlens"), x.get("initial_state")
    N = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    H, K, V = *q.shape[2:], v.shape[3]
    state, z = state if isinstance(state, tuple) else (state, None)
    if state is not None and x.get("state_v_first"):
        state = state.mT
    zeros = torch.zeros(N, H, K, V, dtype=torch.float64)
    return zeros if state is None else state, zeros[..., 0] if z is None else z[:, 0]


def sequences(x, v):
    """Which tokens of which row, in the order in which they are taken."""
    cu_seqlens = x.get("cu_seqlens")
    spans = [(b, 0, v.shape[1]) for b in range(len(v))]
    if cu_seqlens is not None:
        spans = [(0, start, end) for start, end in pairwise(cu_seqlens)]
    return [(b, range(start, end)[:: -1 if x.get("reverse") else 1]) for b, start, end in spans]


@pytest.mark.parametrize("rule", oracle.RULES)
def test_the_recurrence_is_the_oracles(rule):
    name = "fused_recurrent_gated_delta_rule" if rule == "delta" else "fused_recurrent_simple_gla"
    x = arguments(np.random.default_rng(0), name, {"g", "beta"}, T=9, H=2, HV=4)
    exact = oracle.forward(
        rule,
        *(x[n].numpy() for n in ("q", "k", "v")),
        x["beta"].numpy() if rule == "delta" else None,
        x["g"].numpy(),
        scale=x["q"].shape[3] ** -0.5,
        initial_state=x["initial_state"].numpy(),
    )
    for actual, expected in zip(reference(name, x), exact, strict=False):
        assert relative_error(actual.numpy(), expected) <= EXACT


# Arguments


def arguments(
    rng, name, given_, *, B=2, T=5, H=2, HV=2, K=4, V=3, lengths=None, state=True, size=1.0, **options
):
    """Float64 tensors for a function; given_: those of its gates and strengths that are there."""
    if lengths is not None:
        B, T, options["cu_seqlens"] = 1, sum(lengths), torch.tensor(np.cumsum([0, *lengths]))
    N = B if lengths is None else len(lengths)
    channels = "kda" in name or "chunk_gla" in name
    shapes = {
        "g": (B, T, HV, K) if channels else (B, T, HV),
        "gk": (B, T, HV, K),
        "gv": (B, T, HV, V),
        "g_gamma": (HV,),
        "beta": (B, T, HV),
        "beta of channels": (B, T, HV, V),
    }
    x = {"q": rng.standard_normal((B, T, H, K)), "k": rng.standard_normal((B, T, H, K))}
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    x = {key: size * value for key, value in x.items()} | {"v": rng.standard_normal((B, T, HV, V))}
    for key in given_:
        beta = key.startswith("beta")
        value = rng.uniform(size=shapes[key]) if beta else -rng.exponential(0.3, shapes[key])
        x["beta" if beta else key] = value
    if options.get("use_gate_in_kernel"):
        x["A_log"], x["dt_bias"] = rng.normal(size=HV), rng.normal(size=(K if channels else 1) * HV)
    if options.get("normalize", name == "chunk_linear_attn"):
        x["q"], x["k"] = 0.5 + np.abs(x["q"]), 0.5 + np.abs(x["k"])
    if state:
        shape = (V, K) if options.get("state_v_first") else (K, V)
        x["initial_state"] = rng.standard_normal((N, HV, *shape))
    x = {key: torch.from_numpy(value) for key, value in x.items()}
    if state == "pair":
        x["initial_state"] = x["initial_state"], torch.from_numpy(rng.uniform(size=(N, 1, HV, K)))
    return x | options


GATES = {
    "delta_rule": (("beta",), ("beta of channels",), ()),
    "gated_delta_rule": (
        ("g", "beta"),
        ("g",),
        ("beta",),
        ("gk", "beta"),
        ("gv", "beta of channels"),
        ("g", "gk", "gv"),
    ),
    "kda": (("g", "beta"), ("g", "beta of channels")),
    "linear_attn": ((),),
    "simple_gla": ((), ("g",), ("g_gamma",), ("g", "g_gamma")),
    "retention": ((),),
    "gla": ((), ("gk",), ("gv",), ("gk", "gv")),
}
CHUNK_GATES = GATES | {
    "delta_rule": (("beta",),),
    "gated_delta_rule": (("g", "beta"),),
    "kda": (("g", "beta"),),
    "gla": (("g",),),
}
# Options that a function may have, beside those of gates and strengths.
SWITCHES = ("use_qk_l2norm_in_kernel", "state_v_first", "reverse", "normalize", "use_beta_sigmoid_in_kernel")


@st.composite
def calls(draw, name):
    """Arguments of a function, in float64."""
    rule = name.removeprefix("chunk_").removeprefix("fused_recurrent_")
    gates = draw(st.sampled_from((CHUNK_GATES if name.startswith("chunk") else GATES)[rule]))
    parameters = inspect.signature(getattr(fla, name)).parameters
    options = {switch: draw(st.booleans()) for switch in SWITCHES if switch in parameters}
    if options.get("use_beta_sigmoid_in_kernel"):
        options["allow_neg_eigval"] = draw(st.booleans())
    if rule in ("kda", "gated_delta_rule") and "g" in gates and draw(st.booleans()):
        options["use_gate_in_kernel"] = True
        if rule == "kda":
            options["lower_bound"] = draw(st.sampled_from((None, -5.0)))
    normalize, delta = options.get("normalize", False), "beta" in parameters
    H = draw(st.integers(1, 2))
    return arguments(
        np.random.default_rng(draw(st.integers(0, 2**16))),
        name,
        gates,
        B=draw(st.integers(0, 3)),
        T=draw(st.sampled_from((0, 1, 2, 5, 7))),
        H=H,
        HV=H * draw(st.integers(1, 2)) if delta else H,
        K=draw(st.sampled_from((1, 3, 8))),
        V=draw(st.sampled_from((1, 2, 5))),
        lengths=draw(st.sampled_from((None, (3,), (2, 0, 4), (1, 5)))),
        state=draw(st.sampled_from((False, True, "pair") if normalize else (False, True))),
        size=draw(st.sampled_from((1.0, 1e-3, 0.0))),
        scale=draw(st.sampled_from((None, 0.5))),
        output_final_state=draw(st.booleans()),
        **options,
    )


def leaves(x):
    """The tensors among arguments that can be differentiated."""
    flat = [t for value in x.values() for t in (value if isinstance(value, tuple) else (value,))]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]


def flat_results(results):
    """o, S and z as far as they are there."""
    o, state = results
    states = state if isinstance(state, tuple) else (state,)
    return [t for t in (o, *states) if t is not None]


def gradients(results, x, seed=0):
    generator = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in results]
    differentiable = [(t, d) for t, d in zip(results, incoming, strict=True) if t.requires_grad]
    if not differentiable:
        return [torch.zeros_like(t) for t in leaves(x)]
    results, incoming = zip(*differentiable, strict=True)
    found = torch.autograd.grad(results, leaves(x), incoming, allow_unused=True)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(leaves(x), found, strict=True)]


@every_function
@given(data=st.data())
def test_results_and_gradients_are_the_recurrences(name, data):
    x = data.draw(calls(name))
    for t in leaves(x):
        t.requires_grad_()
    actual = getattr(fla, name)(**x)
    o, S, z = reference(name, x)
    expected = [o, *([S] if x["output_final_state"] else []), *([z] if isinstance(actual[1], tuple) else [])]
    found = flat_results(actual)
    for t, exact in zip(found, expected, strict=True):
        assert t.dtype == torch.float64
        assert t.is_contiguous()
        assert relative_error(t.detach().numpy(), exact.detach().numpy(), floor=1.0) <= EXACT
    for t, d, exact in zip(leaves(x), gradients(found, x), gradients(expected, x), strict=True):
        error = relative_error(d.numpy(), exact.numpy(), floor=1.0)
        assert error <= TOLERANCE["gradient", "float64"], (t.shape, error)


@every_function
@given(data=st.data())
def test_results_without_gradients_are_the_recurrences(name, data):
    """By steps, where they are few tokens with a state, which stays as it is."""
    x = data.draw(calls(name))
    before = [t.clone() for t in leaves(x)]
    with torch.no_grad():
        o, S = getattr(fla, name)(**x)
        exact_o, exact_S, _ = reference(name, x)
    assert relative_error(o.numpy(), exact_o.numpy(), floor=1.0) <= EXACT
    S = S[0] if isinstance(S, tuple) else S
    if x["output_final_state"]:
        assert relative_error(S.numpy(), exact_S.numpy(), floor=1.0) <= EXACT
    for t, expected in zip(leaves(x), before, strict=True):
        assert torch.equal(t, expected)


def test_what_is_returned():
    x = arguments(np.random.default_rng(0), "kda", {"g", "beta"})
    assert fla.chunk_kda(**x)[1] is None
    assert fla.chunk_kda(**x, output_final_state=True)[1].shape == (2, 2, 4, 3)
    x = arguments(np.random.default_rng(0), "chunk_linear_attn", ())
    assert fla.fused_recurrent_linear_attn(**x)[1] is None
    state, z = fla.chunk_linear_attn(**x)[1]
    assert state is None
    assert z.shape == (2, 1, 2, 4)
    state, z = fla.chunk_linear_attn(**x, output_final_state=True)[1]
    assert state.shape == (2, 2, 4, 3)


def usual_gates(name):
    """g, or gk where there is none, and beta, as far as the function has them."""
    gate = {"gla": "gk"}.get(name.removeprefix("fused_recurrent_"), "g")
    return {gate, "beta"} & inspect.signature(getattr(fla, name)).parameters.keys()


@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(name, dtype):
    """Results of q's dtype, states float32, whatever gates and states come in."""
    given_ = usual_gates(name)
    x = arguments(np.random.default_rng(0), name, given_, T=33, K=16, V=16)
    low = {key: t.to(dtype) for key, t in x.items()}
    exact = reference(name, {key: t.double() for key, t in low.items()})
    for change in ({}, {key: low[key].double() for key in (*given_, "initial_state")}):
        o, state = getattr(fla, name)(**(low | change), output_final_state=True)
        state = state[0] if isinstance(state, tuple) else state
        assert o.dtype == dtype
        assert state.dtype == torch.float32
        rounding = ROUNDING.get(np.dtype(DTYPES[dtype]), 0.0)
        for actual, expected, tolerance in ((o, exact[0], rounding + 2e-6), (state, exact[1], 2e-6)):
            assert relative_error(actual.double().numpy(), expected.numpy(), floor=1.0) <= tolerance


def test_a_row_is_divided_before_it_is_rounded():
    x = arguments(
        np.random.default_rng(0), "chunk_delta_rule", {"beta"}, size=1e-3, use_qk_l2norm_in_kernel=True
    )
    low = {key: t.to(torch.bfloat16) if isinstance(t, torch.Tensor) else t for key, t in x.items()}
    o, _ = fla.chunk_delta_rule(**low)
    wide = {key: t.double() if isinstance(t, torch.Tensor) else t for key, t in low.items()}
    exact, _, _ = reference("chunk_delta_rule", wide)
    assert relative_error(o.double().numpy(), exact.numpy(), floor=1.0) <= 4 * ROUNDING[np.dtype("bfloat16")]


# Beside the references that fla has in torch.


def naive(folder):
    spec = importlib.util.find_spec("fla")
    if spec is None:
        pytest.skip("fla is not installed")
    path = Path(spec.submodule_search_locations[0], "ops", folder, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heads_first(function):
    """A naive function of [B,H,T,...] tensors, called with [B,T,H,...]."""

    def call(q, k, v, beta, initial_state):
        o, state = function(*(t.transpose(1, 2) for t in (q, k, v, beta)), initial_state)
        return o.transpose(1, 2), state

    return call


NAIVE = {
    "delta_rule": lambda m: heads_first(m.delta_rule_recurrence),
    "gated_delta_rule": lambda m: m.naive_recurrent_gated_delta_rule,
    "kda": lambda m: m.naive_recurrent_kda,
    "linear_attn": lambda m: m.naive_recurrent_linear_attn,
    "simple_gla": lambda m: m.naive_recurrent_simple_gla,
    "gla": lambda m: m.naive_recurrent_gla,
}


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
@pytest.mark.parametrize("rule", NAIVE)
def test_results_are_those_of_flas_references(rule, form):
    name = f"{form}_{rule}"
    parameters = inspect.signature(getattr(fla, name)).parameters
    given_ = {key for key in ("g", "gk", "beta") if key in parameters} - (
        {"gk"} if "g" in parameters else set()
    )
    options = {"normalize": True} if rule == "linear_attn" else {}
    x = arguments(np.random.default_rng(0), name, given_, T=20, K=16, V=16, **options)
    x = {key: t.float() if isinstance(t, torch.Tensor) else t for key, t in x.items()}
    theirs = dict(x)
    if rule == "gla":
        theirs["gk"] = theirs.pop("g", theirs.get("gk"))
    function = NAIVE[rule](naive(rule))
    keep = {} if rule == "delta_rule" else {"output_final_state": True}
    expected = flat_results(function(**theirs, **keep))
    actual = flat_results(getattr(fla, name)(**x, output_final_state=True))
    for t, exact in zip(actual, expected, strict=True):
        assert relative_error(t.numpy(), exact.numpy(), floor=1.0) <= REORDERED[np.dtype(np.float32)]


def test_results_are_those_of_flas_reference_of_retention():
    x = arguments(np.random.default_rng(0), "chunk_retention", (), T=20, state=False)
    x = {key: t.float() for key, t in x.items()}
    expected = naive("retention").naive_retention(*(t.transpose(1, 2) for t in x.values())).transpose(1, 2)
    o, _ = fla.chunk_retention(**x)
    assert relative_error(o.numpy(), expected.numpy(), floor=1.0) <= REORDERED[np.dtype(np.float32)]


# Keywords, names of old, and refusals

# What fla's functions read of their **kwargs.
KNOWN = {
    "chunk_delta_rule": {"head_first", "chunk_size"},
    "chunk_gated_delta_rule": {
        *("transpose_state_layout", "head_first", "chunk_size"),
        *("use_gate_in_kernel", "A_log", "dt_bias"),
    },
    "fused_recurrent_gated_delta_rule": {"transpose_state_layout"},
    "chunk_kda": {"transpose_state_layout", "chunk_size", "A_log", "dt_bias"},
    "fused_recurrent_kda": {"transpose_state_layout"},
    "chunk_simple_gla": {"head_first", "chunk_size"},
    "fused_recurrent_simple_gla": {"transpose_state_layout"},
    "chunk_retention": {"head_first", "chunk_size"},
    "fused_recurrent_retention": {"transpose_state_layout"},
    "fused_recurrent_gla": {"transpose_state_layout"},
}
KNOWN_SIZES = {
    "chunk_delta_rule": ((16, 32, 64), (8, 128, 0)),
    "chunk_gated_delta_rule": ((16, 32, 64), (8, 128, 0)),
    "chunk_kda": ((32, 64), (16, 128, 0)),
    "chunk_simple_gla": ((None, 1, 16, 128), (3, 0)),
    "chunk_retention": ((None, 1, 16, 128), (3, 0)),
}


def keywords_of_others(name):
    """Values, which would change results, for what only other functions take."""
    parameters = inspect.signature(getattr(fla, name)).parameters
    B, T, H, K = 1, 5, 2, 4
    others = {
        "head_first": True,
        "transpose_state_layout": True,
        "state_v_first": True,
        "reverse": True,
        "normalize": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "A_log": torch.zeros(H),
        "dt_bias": torch.zeros(H),
        "gk": -torch.ones(B, T, H, K),
        "gv": -torch.ones(B, T, H, K),
        "g_gamma": -torch.ones(H),
        "chunk_size": 7,
        "lower_bound": -1.0,
    }
    return {key: value for key, value in others.items() if key not in parameters}


def installed_keywords(name):
    """The keys of kwargs that the installed function names."""
    installed_functions()
    folder = next(rule for rule in RULES if name in (f"chunk_{rule}", f"fused_recurrent_{rule}"))
    root = Path(importlib.util.find_spec("fla").submodule_search_locations[0], "ops", folder)
    source = (root / f"{name.removesuffix(folder).removesuffix('_')}.py").read_text(encoding="utf-8")
    found = set()
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and function.name == name:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("kwargs.get", "kwargs.pop"):
                    found.add(node.args[0].value)
                if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "kwargs":
                    found.add(node.left.value)
    return found


@pytest.mark.parametrize("name", [name for name in KNOWN if "transpose_state_layout" in KNOWN[name]])
def test_the_older_name_of_state_v_first(name):
    x = arguments(np.random.default_rng(0), name, usual_gates(name), V=4)
    function, keep = getattr(fla, name), {"output_final_state": True}
    expected = function(**x, **keep, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="renamed to state_v_first") as caught:
        actual = function(**x, **keep, transpose_state_layout=True)
    assert [warning.filename for warning in caught] == [__file__]
    for t, exact in zip(actual, expected, strict=True):
        assert torch.equal(t, exact)
    with pytest.raises(ValueError, match="transpose_state_layout: expected it or state_v_first"):
        function(**x, state_v_first=True, transpose_state_layout=True)


@pytest.mark.parametrize("name", KNOWN)
def test_keywords_that_fla_does_not_read_have_no_effect(name):
    """Those of the other functions among them."""
    others = keywords_of_others(name)
    x = arguments(np.random.default_rng(0), name, usual_gates(name), V=4, lengths=(2, 3))
    expected = getattr(fla, name)(**x, output_final_state=True)
    unknown = {key: value for key, value in others.items() if key not in KNOWN[name]}
    actual = getattr(fla, name)(**x, output_final_state=True, **unknown, any_other=3)
    for t, exact in zip(actual, expected, strict=True):
        assert torch.equal(t, exact)


@pytest.mark.parametrize("name", NAMES)
def test_keywords_known_here_are_those_that_the_installed_fla_reads(name):
    assert installed_keywords(name) == KNOWN.get(name, set())


@pytest.mark.parametrize("name", KNOWN_SIZES)
def test_chunk_sizes_are_those_of_fla(name):
    x = arguments(np.random.default_rng(0), name, usual_gates(name))
    good, bad = KNOWN_SIZES[name]
    o, _ = getattr(fla, name)(**x)
    for size in good:
        assert torch.equal(getattr(fla, name)(**x, chunk_size=size)[0], o)
    for size in bad:
        with pytest.raises(fwp.ArgumentError, match=f"chunk_size: expected .*, got {size}"):
            getattr(fla, name)(**x, chunk_size=size)


@pytest.mark.parametrize("lower_bound", [None, 0.0, -5.1, 1.0])
def test_safe_gates_have_a_bound(lower_bound):
    x = arguments(np.random.default_rng(0), "chunk_kda", {"g", "beta"}, use_gate_in_kernel=True)
    with pytest.raises(fwp.ArgumentError, match=rf"lower_bound: expected .* got {lower_bound}"):
        fla.chunk_kda(**x, safe_gate=True, lower_bound=lower_bound)
    assert torch.equal(
        fla.chunk_kda(**x, safe_gate=True, lower_bound=-5.0)[0], fla.chunk_kda(**x, lower_bound=-5.0)[0]
    )


def test_what_concerns_gpus_has_no_effect():
    x = arguments(np.random.default_rng(0), "chunk_kda", {"g", "beta"}, lengths=(2, 3))
    o, _ = fla.chunk_kda(**x)
    options = {
        "safe_gate": True,
        "disable_recompute": True,
        "cu_seqlens_cpu": x["cu_seqlens"],
        "chunk_size": 32,
    }
    assert torch.equal(fla.chunk_kda(**x, **options, use_graph=True, max_num_seqs=2)[0], o)


def test_time_can_be_cut():
    """What a first call leaves is where a second one goes on, with z where there is one."""
    x = arguments(np.random.default_rng(0), "chunk_linear_attn", (), T=7, state="pair")
    whole, last = fla.chunk_linear_attn(**x, output_final_state=True)
    state, pieces = x.pop("initial_state"), []
    for span in (slice(0, 3), slice(3, 7)):
        piece = {key: t[:, span] for key, t in x.items()}
        o, state = fla.chunk_linear_attn(**piece, initial_state=state, output_final_state=True)
        pieces.append(o)
    for actual, expected in ((torch.cat(pieces, 1), whole), *zip(state, last, strict=True)):
        assert relative_error(actual.numpy(), expected.numpy(), floor=1.0) <= EXACT


REFUSED = {
    "batches of packed sequences": (
        "delta_rule",
        {"cu_seqlens": [0, 5]},
        ValueError,
        "cu_seqlens: expected B=1 for packed sequences, got B=2",
    ),
    "states that do not fit": (
        "delta_rule",
        {"initial_state": torch.zeros(3, 2, 4, 3)},
        ValueError,
        r"initial_state: expected shape \(2, 2, 4, 3\), got \(3, 2, 4, 3\)",
    ),
    "states of the other layout": (
        "gated_delta_rule",
        {"initial_state": torch.zeros(2, 2, 4, 3), "state_v_first": True},
        ValueError,
        r"initial_state: expected shape \(2, 2, 3, 4\), got \(2, 2, 4, 3\)",
    ),
    "heads first": ("delta_rule", {"head_first": True}, DeprecationWarning, "head_first"),
    "a raw gate without A_log": (
        "gated_delta_rule",
        {"use_gate_in_kernel": True},
        ValueError,
        "A_log: expected a tensor with use_gate_in_kernel=True, got None",
    ),
    "doubled strengths without sigmoid": (
        "gated_delta_rule",
        {"allow_neg_eigval": True},
        ValueError,
        "allow_neg_eigval: expected use_beta_sigmoid_in_kernel=True",
    ),
    "context parallelism": (
        "gated_delta_rule",
        {"cp_context": "a context"},
        NotImplementedError,
        "cp_context: expected None",
    ),
    "states of chunks": (
        "kda",
        {"return_intermediate_states": True},
        NotImplementedError,
        "return_intermediate_states: expected .* got True",
    ),
    "a pair of states without normalize": (
        "linear_attn",
        {"normalize": False, "initial_state": (None, None)},
        ValueError,
        "initial_state: expected a tensor with normalize=False",
    ),
    "a scale that is not positive": (
        "linear_attn",
        {"scale": 0.0},
        ValueError,
        "scale: expected a positive number with normalize=True, got 0.0",
    ),
    "arrays of NumPy": (
        "delta_rule",
        {"q": np.zeros((2, 5, 2, 4), np.float32)},
        TypeError,
        "q: expected a torch.Tensor, got ndarray",
    ),
    "no keys": ("kda", {"k": None}, TypeError, "k: expected a torch.Tensor, got NoneType"),
    "no values": ("retention", {"v": None}, TypeError, "v: expected a torch.Tensor, got NoneType"),
    "queries without heads": (
        "linear_attn",
        {"q": torch.zeros(2, 5, 4)},
        ValueError,
        r"q: expected shape \(B, T, H, size\), got \(2, 5, 4\)",
    ),
    "a NumPy gate": ("simple_gla", {"g": np.zeros((2, 5, 2))}, TypeError, "g: expected a torch.Tensor"),
    "a NumPy gate of channels": ("gla", {"g": np.zeros((2, 5, 2, 4))}, TypeError, "gk?: expected a torch"),
    "a NumPy raw gate": (
        "gated_delta_rule",
        {"g": np.zeros((2, 5, 2)), "use_gate_in_kernel": True, "A_log": torch.zeros(2)},
        TypeError,
        "g: expected a torch.Tensor, got ndarray",
    ),
    "a list as strength": ("gated_delta_rule", {"beta": [1.0]}, TypeError, "beta: expected a torch.Tensor"),
    "a list as state": ("gla", {"initial_state": [0.0]}, TypeError, "initial_state: expected a torch.Tensor"),
    "a list as state of normalised attention": (
        "linear_attn",
        {"initial_state": [None, None]},
        TypeError,
        "initial_state: expected a torch.Tensor, got list",
    ),
    "three states": (
        "linear_attn",
        {"initial_state": (None, None, None)},
        ValueError,
        "initial_state: expected a tensor or two in a tuple, got 3",
    ),
    "words as cu_seqlens": (
        "delta_rule",
        {"cu_seqlens": "0, 5"},
        TypeError,
        "cu_seqlens: expected a sequence of",
    ),
    "a number as cu_seqlens": ("delta_rule", {"cu_seqlens": 5}, TypeError, "cu_seqlens: expected a sequence"),
    "too many rates": (
        "gated_delta_rule",
        {"use_gate_in_kernel": True, "A_log": torch.zeros(3)},
        ValueError,
        r"A_log: expected 2 elements, got shape \(3,\)",
    ),
    "biases of heads for channels": (
        "kda",
        {"use_gate_in_kernel": True, "A_log": torch.zeros(2), "dt_bias": torch.zeros(2)},
        ValueError,
        r"dt_bias: expected 8 elements, got shape \(2,\)",
    ),
    "a sum of keys without its axis": (
        "linear_attn",
        {"initial_state": (None, torch.zeros(2, 2, 4))},
        ValueError,
        r"initial_state\[1\]: expected shape \(2, 1, 2, 4\), got \(2, 2, 4\)",
    ),
    "a first state of normalised attention that does not fit": (
        "linear_attn",
        {"initial_state": torch.zeros(2, 2, 4, 4)},
        ValueError,
        r"initial_state: expected shape \(2, 2, 4, 3\), got \(2, 2, 4, 4\)",
    ),
    "decays of too few heads": (
        "simple_gla",
        {"g_gamma": torch.zeros(1)},
        ValueError,
        r"g_gamma: expected shape \(2,\), got \(1,\)",
    ),
    "other heads of keys": (
        "gated_delta_rule",
        {"k": torch.zeros(2, 5, 1, 4, dtype=torch.float64)},
        ValueError,
        r"k: expected shape \(2, 5, 2, 4\), as q has, got \(2, 5, 1, 4\)",
    ),
    "more heads of queries than of values": (
        "delta_rule",
        {"v": torch.zeros(2, 5, 1, 3, dtype=torch.float64)},
        ValueError,
        r"v: expected shape \(2, 5, HV, V\), HV a multiple of H=2, got \(2, 5, 1, 3\)",
    ),
    "a scale that wants a gradient": (
        "linear_attn",
        {"scale": torch.ones((), requires_grad=True)},
        NotImplementedError,
        "scale: expected a number, got a tensor that requires a gradient",
    ),
    "a word as scale": ("linear_attn", {"scale": "1"}, TypeError, "scale: expected a number, got str"),
    "no strengths": (
        "gated_delta_rule",
        {"beta": None},
        TypeError,
        "beta: expected a torch.Tensor, got None",
    ),
    "no decay": ("gated_delta_rule", {"g": None}, TypeError, "g: expected a torch.Tensor, got None"),
    "no strengths of DeltaNet": ("delta_rule", {"beta": None}, TypeError, "beta: expected a torch.Tensor"),
    "no decay of channels": ("kda", {"g": None}, TypeError, "g: expected a torch.Tensor, got NoneType"),
    "no gates": ("gla", {"g": None}, TypeError, "g: expected a torch.Tensor, got NoneType"),
    "a gate of channels": (
        "gated_delta_rule",
        {"g": torch.zeros(2, 5, 2, 4)},
        ValueError,
        r"g: expected shape \(2, 5, 2\), got \(2, 5, 2, 4\)",
    ),
    "a gate of heads": (
        "kda",
        {"g": torch.zeros(2, 5, 2)},
        ValueError,
        r"g: expected shape \(2, 5, 2, 4\), got \(2, 5, 2\)",
    ),
    "strengths of channels": (
        "gated_delta_rule",
        {"beta": torch.zeros(2, 5, 2, 3)},
        ValueError,
        r"beta: expected shape \(2, 5, 2\), got \(2, 5, 2, 3\)",
    ),
    "strengths of DeltaNet's channels": (
        "delta_rule",
        {"beta": torch.zeros(2, 5, 2, 3)},
        ValueError,
        r"beta: expected shape \(2, 5, 2\), got \(2, 5, 2, 3\)",
    ),
    "integers as strengths": (
        "delta_rule",
        {"beta": torch.ones(2, 5, 2, dtype=torch.int64)},
        TypeError,
        "beta: expected dtype float32, float64, float16 or bfloat16, got torch.int64",
    ),
    "truths as gate": (
        "simple_gla",
        {"g": torch.ones(2, 5, 2, dtype=torch.bool)},
        TypeError,
        "g: expected dtype float32, .* got torch.bool",
    ),
    "integers as state": (
        "gla",
        {"initial_state": torch.zeros(2, 2, 4, 3, dtype=torch.int32)},
        TypeError,
        "initial_state: expected dtype float32, .* got torch.int32",
    ),
    "mixed dtypes": ("delta_rule", {"v": torch.zeros(2, 5, 2, 3).half()}, TypeError, "v: expected"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    rule, changes, error, message = REFUSED[what]
    gates = {"g", "beta"} & set(inspect.signature(getattr(fla, f"chunk_{rule}")).parameters)
    x = arguments(np.random.default_rng(0), f"chunk_{rule}", gates, state=False)
    with pytest.raises(error, match=message) as caught:
        getattr(fla, f"chunk_{rule}")(**(x | changes))
    assert error is DeprecationWarning or isinstance(caught.value, fwp.FwpError)


REFUSED_BY_FUSED = {
    "value gates of keys": (
        "gated_delta_rule",
        {"gv": torch.zeros(2, 5, 2, 4)},
        ValueError,
        r"gv: expected shape \(2, 5, 2, 3\), got \(2, 5, 2, 4\)",
    ),
    "strengths of keys": (
        "delta_rule",
        {"beta": torch.zeros(2, 5, 2, 4)},
        ValueError,
        r"beta: expected shape \(2, 5, 2\) or \(2, 5, 2, 3\), got \(2, 5, 2, 4\)",
    ),
    "gates of other lengths": (
        "gated_delta_rule",
        {"g": torch.zeros(2, 5, 2), "gk": torch.zeros(2, 4, 2, 4)},
        ValueError,
        r"gk: expected shape \(2, 5, 2, 4\), got \(2, 4, 2, 4\)",
    ),
    "a gate of heads": (
        "gla",
        {"gk": torch.zeros(2, 5, 2)},
        ValueError,
        r"gk: expected shape \(2, 5, 2, 4\)",
    ),
    "a gate of heads in KDA": ("kda", {"g": torch.zeros(2, 5, 2)}, ValueError, "g: expected shape"),
    "no strengths": ("kda", {"beta": None}, TypeError, "beta: expected a torch.Tensor, got NoneType"),
}


@pytest.mark.parametrize("what", REFUSED_BY_FUSED)
def test_what_recurrent_functions_refuse(what):
    rule, changes, error, message = REFUSED_BY_FUSED[what]
    name = f"fused_recurrent_{rule}"
    gates = {"g", "beta"} & set(inspect.signature(getattr(fla, name)).parameters)
    x = arguments(np.random.default_rng(0), name, gates, state=False)
    with pytest.raises(error, match=message) as caught:
        getattr(fla, name)(**(x | changes))
    assert isinstance(caught.value, fwp.FwpError)


@pytest.mark.parametrize("rule", ["delta_rule", "gated_delta_rule", "gla", "kda", "simple_gla"])
def test_arguments_on_another_device_have_the_names_that_they_were_given_by(rule):
    function = getattr(fla, f"fused_recurrent_{rule}")
    channels = rule == "kda"
    sizes = {
        "q": (2, 5, 2, 4),
        "k": (2, 5, 2, 4),
        "v": (2, 5, 2, 3),
        "g": (2, 5, 2, 4) if channels else (2, 5, 2),
        "gk": (2, 5, 2, 4),
        "gv": (2, 5, 2, 3),
        "g_gamma": (2,),
        "beta": (2, 5, 2),
        "A_log": (2,),
        "dt_bias": (8,) if channels else (2,),
        "initial_state": (2, 2, 4, 3),
    }
    names = sizes.keys() & inspect.signature(function).parameters.keys()
    x = {name: torch.zeros(sizes[name]) for name in names}
    options = {"use_gate_in_kernel": True} if "A_log" in names else {}
    function(**x, **options)
    for name in names - {"q"}:
        message = f"^{name}: expected a tensor on cpu, as q is, got one on meta$"
        with pytest.raises(fwp.DeviceError, match=message):
            function(**x | {name: x[name].to("meta")}, **options)


@pytest.mark.parametrize("offsets", [(1, 5), (0, 4), (0, 3, 2, 5)])
def test_wrong_offsets_are_shown_as_they_were_given(offsets):
    q = torch.ones(1, 5, 2, 4)
    messages = []
    for reverse in (False, True):
        with pytest.raises(fwp.ArgumentError, match="cu_seqlens: expected ") as caught:
            fla.fused_recurrent_linear_attn(q, q, q, reverse=reverse, cu_seqlens=torch.tensor(offsets))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_no_channels_of_keys():
    q, v, heads = torch.ones(2, 5, 2, 0), torch.ones(2, 5, 2, 3), torch.zeros(2, 5, 2)
    for o, _ in (
        fla.chunk_gated_delta_rule(q, q, v, heads, heads, use_qk_l2norm_in_kernel=True),
        fla.fused_recurrent_simple_gla(q, q, v, heads),
        fla.chunk_linear_attn(q, q, v),
    ):
        assert torch.equal(o, torch.zeros_like(v))


@every_function
def test_values_may_have_more_heads(name):
    given_ = usual_gates(name)
    x = arguments(np.random.default_rng(0), name, given_ | ({"g_gamma"} if "simple" in name else set()), HV=4)
    o, S = getattr(fla, name)(**x, output_final_state=True)
    exact_o, exact_S, _ = reference(name, x)
    assert relative_error(o.numpy(), exact_o.numpy(), floor=1.0) <= EXACT
    assert relative_error((S[0] if isinstance(S, tuple) else S).numpy(), exact_S.numpy(), floor=1.0) <= EXACT


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(name, dtype):
    given_ = usual_gates(name)
    x = arguments(np.random.default_rng(0), name, given_)
    x = {key: t.to(dtype) for key, t in x.items()}
    expected = flat_results(getattr(fla, name)(**x, output_final_state=True))
    with torch.autocast("cpu", torch.bfloat16):
        actual = flat_results(getattr(fla, name)(**x, output_final_state=True))
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    for t, exact in zip(actual, expected, strict=True):
        assert torch.equal(t, exact)
    assert actual[0].dtype == dtype


@pytest.mark.parametrize("name", ["fused_recurrent_gated_delta_rule", "fused_recurrent_kda"])
def test_recurrent_functions_do_not_round_normalised_rows(name):
    x = arguments(np.random.default_rng(0), name, {"g", "beta"}, T=30, K=16, V=16, state=False)
    low = {key: t.to(torch.bfloat16) for key, t in x.items()}
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    o, S = getattr(fla, name)(**low, **options)
    assert (o.dtype, S.dtype) == (torch.bfloat16, torch.float32)
    _, exact, _ = reference(name, {key: t.double() for key, t in low.items()} | options)
    assert relative_error(S.double().numpy(), exact.numpy()) < 1e-5
    rounded = getattr(fla, name.replace("fused_recurrent", "chunk"))(**low, **options)[1]
    assert relative_error(rounded.double().numpy(), exact.numpy()) > 1e-4


@every_function
def test_under_another_default_device(name):
    given_ = usual_gates(name)
    x = arguments(np.random.default_rng(0), name, given_, lengths=(2, 3)) | {"cu_seqlens": [0, 2, 5]}
    expected, _ = getattr(fla, name)(**x)
    with torch.device("meta"):
        assert torch.equal(getattr(fla, name)(**x)[0], expected)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, np.uint64])
@pytest.mark.parametrize("reverse", [False, True])
def test_cu_seqlens_of_every_kind(kind, reverse):
    q, v = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 3)
    options = {"initial_state": torch.randn(2, 2, 4, 3), "output_final_state": True, "reverse": reverse}
    expected = fla.fused_recurrent_linear_attn(q, q, v, **options, cu_seqlens=torch.tensor([0, 4, 9]))
    actual = fla.fused_recurrent_linear_attn(q, q, v, **options, cu_seqlens=kind([0, 4, 9]))
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_a_raw_gate_without_g():
    x = arguments(np.random.default_rng(0), "fused_recurrent_gated_delta_rule", {"beta"})
    with pytest.raises(fwp.ArgumentError, match="g: expected a tensor"):
        fla.fused_recurrent_gated_delta_rule(**x, use_gate_in_kernel=True, A_log=torch.zeros(2))


def test_the_package_gives_its_modules_by_name():
    import fwp_core.compat as compat

    assert compat.fla is fla
    with pytest.raises(AttributeError, match="has no attribute 'mamba'"):
        compat.mamba  # noqa: B018
