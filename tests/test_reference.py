"""fwp.reference, the specification: two forms of each scan, its options, other rules, softmax attention."""

import numpy as np
import pytest
from cases import DECAYS, RULES, exact_scan, make_case, scan
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, feature_cases
from tolerances import relative_error

import fwp_core as fwp
from fwp_core import reference

SCANS = {"linear": reference.linear_attention, "delta": reference.delta_rule}
FORMS = ("recurrence", "attention")
NORMS = (None, "sum", "l2")


def elu1(x):
    """ELU + 1, and its continuation to complex numbers."""
    return np.where(x.real > 0, x + 1, np.exp(np.where(x.real > 0, 0, x)))


def quadrants(x):
    """The products of neighbours among r(x) and r(-x), twice as many as x has numbers; many are 0."""
    y = np.concatenate([np.where(x.real > 0, x, 0), np.where(x.real < 0, -x, 0)], axis=-1)
    return y * np.roll(y, 1, axis=-1)


MAPS = {"elu1": elu1, "quadrants": quadrants}


@given(case=cases(dtypes=(np.float64,), times=(0, 1, 2, 7, 20), sizes=(0, 1, 3, 8)))
def test_both_forms_are_the_recurrence(case):
    exact = exact_scan(case)
    for form in ("recurrence", "attention"):
        result = SCANS[case.rule](*case.inputs, **case.options, form=form)
        for x, y in zip(result, exact, strict=True):
            assert x.dtype == np.float64
            assert relative_error(x, y, floor=1.0) < 1e-13, form


def test_is_part_of_the_package():
    assert fwp.reference is reference
    names = ["delta_rule", "fwm_rule", "fwp_1991", "linear_attention", "softmax_attention"]
    assert reference.__all__ == names


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_widened_not_changed(rule):
    case = make_case(rule, "scalar", dtype=np.float32)
    before = [x.copy() for x in case.arrays.values()]
    o, final_state = SCANS[rule](*case.inputs, **case.options)
    assert o.dtype == final_state.dtype == np.float64
    assert all(np.array_equal(x, y) for x, y in zip(case.arrays.values(), before, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", DECAYS)
def test_complex_steps_pass_through_both_forms(rule, decay):
    """The attention form's own gradient, in the direction of all inputs at once."""
    case = make_case(rule, decay, T=7, heads=(2, 1, 2), K=4, V=3, dtype=np.float64)
    rng = np.random.default_rng(1)
    moved = case.map(lambda x: x + 1e-30j * rng.standard_normal(x.shape))
    recurrence, attention = (
        np.concatenate([x.ravel().imag for x in SCANS[rule](*moved.inputs, **moved.options, form=form)])
        for form in ("recurrence", "attention")
    )
    assert np.any(recurrence)
    assert relative_error(attention, recurrence) < 1e-13


def test_lists_are_fine():
    o, final_state = reference.delta_rule([[[[1.0]]]], [[[[1.0]]]], [[[[3.0]]]], [[[0.5]]])
    assert o.item() == final_state.item() == 1.5


def test_bad_form_and_missing_beta():
    case = make_case("delta")
    with pytest.raises(ValueError, match="form: expected 'recurrence' or 'attention', got 'chunk'"):
        reference.delta_rule(*case.inputs, form="chunk")
    with pytest.raises(TypeError, match="beta"):
        reference.delta_rule(case.q, case.k, case.v, None)


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_attention_token_by_token(causal):
    case = make_case("linear", T=9, heads=(4, 2, 1), K=5, V=3, dtype=np.float64)
    o = reference.softmax_attention(case.q, case.k, case.v, scale=0.3, causal=causal)
    assert o.shape == (2, 9, 4, 3)
    for b, t, h in np.ndindex(o.shape[:3]):
        seen = slice(0, t + 1 if causal else None)
        weights = np.exp(0.3 * case.k[b, seen, h // 2] @ case.q[b, t, h])
        np.testing.assert_allclose(o[b, t, h], weights @ case.v[b, seen, 0] / weights.sum(), rtol=1e-13)


def test_softmax_attention_default_scale_and_large_scores():
    case = make_case("linear", T=4, K=16, dtype=np.float64)
    assert np.array_equal(
        reference.softmax_attention(case.q, case.k, case.v),
        reference.softmax_attention(case.q, case.k, case.v, scale=0.25),
    )
    assert np.isfinite(reference.softmax_attention(1e6 * case.q, case.k, case.v)).all()
    assert reference.softmax_attention(case.q[:, :0], case.k[:, :0], case.v[:, :0]).shape == (2, 0, 2, 16)


@pytest.mark.parametrize("name", ["linear_attention", "delta_rule"])
def test_a_reset_clears_even_nan(name):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 5, 1, 3))
    v[0, 1] = np.nan
    g = np.zeros((1, 5, 1))
    g[0, 3] = -np.inf
    o, state = getattr(reference, name)(q, k, v, np.ones((1, 5, 1)), g)
    assert np.isnan(o[0, 1:3]).all()
    assert np.isfinite(o[0, [0, 3, 4]]).all()
    assert np.isfinite(state).all()


def test_packed_sequences_need_one_batch():
    x = np.zeros((2, 3, 1, 1))
    with pytest.raises(ValueError, match="^cu_seqlens: expected B=1 for packed sequences, got B=2$"):
        reference.linear_attention(x, x, x, cu_seqlens=[0, 3])


# Options: feature maps and normalisations.


def normalised_by_hand(x, qk_norm):
    if qk_norm is None:
        return x
    size = x.sum(axis=-1, keepdims=True) if qk_norm == "sum" else np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, size, where=size != 0, out=np.zeros_like(x))


def scan_by_hand(rule, q, k, v, beta, a, S, z, eps):
    """One head, eqs. 26 to 28 with the paper's W = S^T: q, k [T,K], v [T,V], beta [T], a [T,n]."""
    W, outputs = S.T, []
    for t in range(len(v)):
        W, z = W * a[t], z * a[t]
        total = z @ k[t]
        stored = W @ k[t] / (total + eps) if total != 0 else np.zeros(len(W))
        W = W + np.outer(beta[t] * (v[t] - stored if rule == "delta" else v[t]), k[t])
        z = z + k[t]
        outputs.append(W @ q[t] / (z @ q[t] + eps) if z @ q[t] != 0 else np.zeros(len(W)))
    return np.array(outputs), W.T, z


def with_z(case, phi, seed=0):
    """The case with room for z in its states: random positive accumulators, sized for the feature map."""
    rng = np.random.default_rng(seed)
    N, H = case.do.shape[0] if case.cu_seqlens is None else len(case.cu_seqlens) - 1, case.do.shape[2]
    K, V = phi(case.k).shape[-1], case.v.shape[-1]
    state = rng.standard_normal((N, H, K, V + 1))
    state[..., -1] = rng.uniform(0, 2, (N, H, K))
    g = case.g
    if g is not None and g.ndim == 4:
        g = np.repeat(g, K // max(g.shape[-1], 1), axis=-1)
    return case.but(initial_state=None if case.initial_state is None else state, g=g)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("qk_norm", NORMS)
@pytest.mark.parametrize("state", [True, False])
def test_attention_norm_is_that_of_the_paper(rule, decay, name, qk_norm, state):
    phi = MAPS[name]
    case = with_z(make_case(rule, decay, T=9, heads=(4, 2, 1), K=4, V=3, dtype=np.float64, state=state), phi)
    q, k = (normalised_by_hand(phi(x), qk_norm) for x in (case.q, case.k))
    a = np.ones((2, 9, 4, 1)) if case.g is None else np.exp(case.g if case.g.ndim == 4 else case.g[..., None])
    initial = np.zeros((2, 4, q.shape[-1], 4)) if case.initial_state is None else case.initial_state
    options = {"feature_map": phi, "qk_norm": qk_norm, "attention_norm": True, "eps": 1e-3}
    for form in FORMS:
        o, final = SCANS[rule](*case.inputs, **options, initial_state=case.initial_state, form=form)
        for b, h in np.ndindex(2, 4):
            S, z = initial[b, h, :, :-1], initial[b, h, :, -1]
            inputs = q[b, :, h], k[b, :, h // 2], case.v[b, :, 0], case.beta[b, :, h], a[b, :, h]
            exact_o, exact_S, exact_z = scan_by_hand(rule, *inputs, S, z, 1e-3)
            assert relative_error(o[b, :, h], exact_o, floor=1.0) < 1e-13
            assert relative_error(final[b, h, :, :-1], exact_S, floor=1.0) < 1e-13
            assert relative_error(final[b, h, :, -1], exact_z, floor=1.0) < 1e-13


@given(
    case=st.booleans().flatmap(
        lambda attention_norm: feature_cases(
            dtypes=(np.float64,),
            times=(0, 1, 2, 7, 13),
            gates=("mild", "reset"),
            attention_norm=attention_norm,
        )
    )
)
def test_both_forms_are_the_recurrence_under_all_options(case):
    """With the library's own feature maps."""
    exact = exact_scan(case)
    for form in FORMS:
        result = SCANS[case.rule](*case.inputs, **case.options, form=form)
        for x, y in zip(result, exact, strict=True):
            assert x.dtype == np.float64
            assert relative_error(x, y, floor=1.0) < 1e-12, form


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("qk_norm", NORMS)
def test_complex_steps_pass_through_the_options(rule, name, qk_norm):
    case = with_z(make_case(rule, "channel", T=7, heads=(2, 1, 2), K=4, V=3, dtype=np.float64), MAPS[name])
    rng = np.random.default_rng(1)
    moved = case.map(lambda x: x + 1e-30j * rng.standard_normal(x.shape))
    options = {"feature_map": MAPS[name], "qk_norm": qk_norm, "attention_norm": True, **moved.options}
    recurrence, attention = (
        np.concatenate([x.ravel().imag for x in SCANS[rule](*moved.inputs, **options, form=form)])
        for form in FORMS
    )
    assert np.any(recurrence)
    assert relative_error(attention, recurrence) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_size_become_zero(form):
    x = np.array([[1.0, -1.0], [0.0, 0.0], [3e200, 4e200], [3e-200, 4e-200]]).reshape(1, 4, 1, 2)
    v = np.ones((1, 4, 1, 1))
    _, state = reference.linear_attention(x, x, v, qk_norm="l2", form=form)
    np.testing.assert_allclose(state.ravel(), [0.5**0.5 + 1.2, -(0.5**0.5) + 1.6], rtol=1e-15)
    _, state = reference.linear_attention(x, x, v, qk_norm="sum", form=form)
    np.testing.assert_allclose(state.ravel(), [6 / 7, 8 / 7], rtol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_nothing_was_written_under_reads_zero(form):
    """The second key is new (z'.k = 0) and is stored whole; the last query is new as well, and reads 0."""
    k = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]]).reshape(1, 3, 1, 3)
    q = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]).reshape(1, 3, 1, 3)
    v = np.array([2.0, 3.0, 7.0]).reshape(1, 3, 1, 1)
    o, state = reference.delta_rule(q, k, v, np.ones((1, 3, 1)), attention_norm=True, eps=0.0, form=form)
    np.testing.assert_allclose(o.ravel(), [2, 3, 0], rtol=1e-15)
    np.testing.assert_allclose(state[0, 0], [[2, 1], [7, 2], [0, 0]], rtol=1e-15)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("qk_norm", ["sum", "l2"])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("length", [1.0, 45.0])
def test_rows_of_favor_of_any_length(rule, qk_norm, eps, length):
    """As in the library: relative to the largest feature before a norm, unless eps keeps them above 0."""
    options = {"feature_map": ("FAVOR", 5, eps), "qk_norm": qk_norm}
    case = make_case(rule, "scalar", B=1, T=6, K=4, V=3, dtype=np.float64, **options)
    case = case.but(q=length * case.q, k=length * case.k)
    for form in FORMS:
        result = SCANS[rule](*case.inputs, **case.options, form=form)
        for name, exact in {"oracle": exact_scan(case), "library": scan(case)}.items():
            for x, y in zip(result, exact, strict=True):
                assert relative_error(x, y, floor=1.0) < 1e-15 * max(100, length**2), (name, form)
    assert result[0].any(axis=-1).all()


def test_options_that_are_none_of_them():
    case = make_case("delta")
    for one in SCANS.values():
        with pytest.raises(ValueError, match="^qk_norm: expected None, 'sum' or 'l2', got 'max'$"):
            one(*case.inputs, qk_norm="max")
        with pytest.raises(TypeError, match="^feature_map: expected a callable or None, got 'elu1'$"):
            one(*case.inputs, feature_map="elu1")


def test_attention_norm_of_linear_attention_is_a_weighted_mean():
    case = make_case("linear", T=30, K=4, V=3, dtype=np.float64, beta=False, state=False)
    o, _ = reference.linear_attention(*case.inputs, feature_map=elu1, attention_norm=True, eps=0.0)
    lowest, highest = (f.accumulate(case.v, axis=1) for f in (np.minimum, np.maximum))
    assert (lowest <= o + 1e-12).all()
    assert (o <= highest + 1e-12).all()
    unmapped, _ = reference.linear_attention(elu1(case.q), elu1(case.k), case.v)
    ones = np.ones((2, 30, 2, 1))
    total, _ = reference.linear_attention(elu1(case.q), elu1(case.k), ones)
    assert relative_error(o, unmapped / total) < 1e-13


@pytest.mark.parametrize("attention_norm", [False, True])
def test_read_back_after_a_write(attention_norm):
    """What a token's own key reads after the write, as a mixture of its value and of what was stored."""
    rng = np.random.default_rng(0)
    k, v = elu1(rng.standard_normal((1, 40, 1, 6))), rng.standard_normal((1, 40, 1, 4))
    k = k if attention_norm else k / k.sum(axis=-1, keepdims=True)
    beta = rng.uniform(size=(1, 40, 1))
    options = {"attention_norm": attention_norm, "eps": 0.0}
    _, state = reference.delta_rule(k[:, :-1], k[:, :-1], v[:, :-1], beta[:, :-1], **options)
    read = k[0, -1, 0] @ state[0, 0]
    after, _ = reference.delta_rule(k, k, v, beta, **options)

    length = np.sum(k[0, -1] ** 2)
    strength = beta[0, -1, 0] * length
    if attention_norm:
        stored, s = read[:-1] / read[-1], read[-1]
        expected = ((s - strength) * stored + strength * v[0, -1, 0]) / (s + length)
    else:
        expected = v[0, -1, 0] - (1 - strength) * (v[0, -1, 0] - read)
    assert relative_error(after[0, -1, 0], expected) < 1e-13


def test_sum_norm_lets_the_accumulator_grow_by_one_each_step():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((1, 50, 1, 6)), rng.standard_normal((1, 50, 1, 4))
    for steps in (1, 7, 50):
        inputs = k[:, :steps], k[:, :steps], v[:, :steps], np.full((1, steps, 1), 0.5)
        _, state = reference.delta_rule(*inputs, feature_map=elu1, qk_norm="sum", attention_norm=True)
        assert abs(state[..., -1].sum() - steps) < 1e-12


# Other rules.


def test_delta_leaves_what_is_stored_under_other_keys_and_the_gate_does_not():
    """Appendix B of the paper: k1 and k2 are orthonormal and stored, then k3 = k2 is written with beta."""
    k = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0][[0, 1, 1]].reshape(1, 3, 1, 5)
    v = np.random.default_rng(1).standard_normal((1, 3, 1, 4))
    v1, v2, v3 = v[0, :, 0]
    beta = np.array([1.0, 1.0, 0.3]).reshape(1, 3, 1)
    keep = np.array([1.0, 1.0, 0.7]).reshape(1, 3, 1)
    _, delta = reference.delta_rule(k, k, v, beta)
    _, gated = reference.linear_attention(k, k, v, beta, np.log(keep))
    for state, kept in ((delta, 1.0), (gated, 0.7)):
        np.testing.assert_allclose(k[0, 0] @ state[0, 0], kept * v1[None], rtol=1e-12)
        np.testing.assert_allclose(k[0, 1] @ state[0, 0], (0.7 * v2 + 0.3 * v3)[None], rtol=1e-12)


def test_the_programmer_of_1991_with_the_identity_is_linear_attention():
    case = make_case("linear", T=9, heads=(4, 2, 1), dtype=np.float64, beta=False, lengths=(4, 0, 5))
    expected = reference.linear_attention(*case.inputs, **case.options)
    options = {"initial_state": case.initial_state, "cu_seqlens": case.cu_seqlens}
    result = reference.fwp_1991(case.q, case.k, case.v, activation=lambda w: w, **options)
    for x, y in zip(result, expected, strict=True):
        assert np.array_equal(x, y)


def test_the_programmer_of_1991_squashes_after_each_write():
    case = make_case("linear", B=1, T=6, heads=(1, 1, 1), K=5, V=3, dtype=np.float64, state=False)
    o, state = reference.fwp_1991(case.q, case.k, case.v)
    W = np.zeros((3, 5))
    for t in range(6):
        W = np.tanh(W + np.outer(case.v[0, t, 0], case.k[0, t, 0]))
        np.testing.assert_allclose(o[0, t, 0], W @ case.q[0, t, 0], rtol=1e-13)
    np.testing.assert_allclose(state[0, 0], W.T, rtol=1e-13)
    assert np.abs(state).max() < 1


@pytest.mark.parametrize("name", ["tanh", "quadrants"])
def test_fast_weight_memory_by_hand(name):
    case = make_case("delta", B=1, T=12, heads=(1, 1, 1), K=5, V=3, dtype=np.float64, state=False)
    phi = {"tanh": np.tanh, **MAPS}[name]
    chosen = {} if name == "tanh" else {"feature_map": phi}
    o, state = reference.fwm_rule(case.q, case.k, 3 * case.v, case.beta, **chosen)
    q, k, v, beta = phi(case.q[0, :, 0]), phi(case.k[0, :, 0]), 3 * case.v[0, :, 0], case.beta[0, :, 0]
    W, clamped = np.zeros((3, k.shape[1])), 0
    for t in range(12):
        W = W + beta[t] * np.outer(v[t] - W @ k[t], k[t])
        size = np.sqrt(np.sum(W**2))
        clamped += size > 1
        W = W / max(1.0, size)
        y = W @ q[t]
        expected = (y - y.mean()) / np.sqrt(y.var() + 1e-5)
        np.testing.assert_allclose(o[0, t, 0], expected, rtol=1e-10, atol=1e-13)
    assert 0 < clamped < 12
    np.testing.assert_allclose(state[0, 0], W.T, rtol=1e-12, atol=1e-15)


def test_fast_weight_memory_over_packed_sequences_and_grouped_heads():
    case = make_case("delta", T=9, heads=(4, 2, 1), dtype=np.float64, lengths=(4, 0, 5))
    o, state = reference.fwm_rule(
        case.q, case.k, case.v, case.beta, initial_state=case.initial_state, cu_seqlens=case.cu_seqlens
    )
    for n, (start, end) in enumerate([(0, 4), (4, 4), (4, 9)]):
        inputs = (x[:, start:end] for x in (case.q, case.k, case.v, case.beta))
        own_o, own_state = reference.fwm_rule(*inputs, initial_state=case.initial_state[n : n + 1])
        assert np.array_equal(o[:, start:end], own_o)
        assert np.array_equal(state[n : n + 1], own_state)
    with pytest.raises(TypeError, match="^beta: the delta rule needs a write strength, got None$"):
        reference.fwm_rule(case.q, case.k, case.v, None)
