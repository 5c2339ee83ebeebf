"""Probes of the fast weight: each by its definition in float64, and the identities between them."""

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
from cases import DECAYS, DTYPES, RULES, SCAN, make_case, state_dtype
from tolerances import ROUNDING, assert_bits_equal

import fwp_core as fwp
from fwp_core.feature_maps import DPFP, ELU1

# Sums of a few hundred terms in the dtype of states; what is rounded to halves is rounded before.
PROBE_TOLERANCE = {np.float32: 2e-4, np.float64: 1e-11}
rules = pytest.mark.parametrize("rule", RULES)


def normalised(x, qk_norm):
    if qk_norm is None:
        return x
    size = x.sum(-1) if qk_norm == "sum" else np.linalg.norm(x, axis=-1)
    return x / size[..., None]


def expected(case, phi=None, qk_norm=None, attention_norm=False, eps=1e-6):
    """Every probe by its definition, token by token; equal heads, one sequence per batch."""
    q, k, v = (x.astype(np.float64) for x in (case.q, case.k, case.v))
    if phi is not None:
        q, k = phi(q), phi(k)
    q, k = normalised(q, qk_norm), normalised(k, qk_norm)
    (B, T, H, K), V = k.shape, v.shape[-1]
    beta = np.ones((B, T, H)) if case.beta is None else case.beta.astype(np.float64)
    g = np.zeros((B, T, H, 1)) if case.g is None else case.g.astype(np.float64).reshape(B, T, H, -1)
    state = np.zeros((B, H, K, V + 1))
    if case.initial_state is not None:
        state[..., : case.initial_state.shape[-1]] = case.initial_state
    rows = {field.name: np.zeros((B, T, H)) for field in fields(fwp.Diagnostics)[:-1]}
    norm = np.linalg.norm
    for t in range(T):
        state *= np.exp(g[:, t])[..., None]
        S, z, kt, qt, vt = state[..., :-1], state[..., -1], k[:, t], q[:, t], v[:, t]
        s, n = (z * kt).sum(-1), (kt * kt).sum(-1)
        before, after = (s + eps, s + n + eps) if attention_norm else (1.0, 1.0)
        read = np.einsum("bhkv,bhk->bhv", S, kt) / np.reshape(before, np.shape(before) + (1,))
        e = vt - read if case.rule == "delta" else vt
        S += kt[..., None] * (beta[:, t, :, None] * e)[..., None, :]
        stalled = ((z + kt == z) & (kt != 0)).sum(-1)
        z += kt
        left = vt - np.einsum("bhkv,bhk->bhv", S, kt) / np.reshape(after, np.shape(after) + (1,))
        size = norm(vt, axis=-1)
        values = {
            "contrast": norm(vt - read, axis=-1) / size,
            "retrieved": norm(read, axis=-1) / size,
            "cosine": (vt * read).sum(-1) / (size * norm(read, axis=-1)),
            "residual": norm(left, axis=-1) / size,
            "write_strength": beta[:, t] * n / (s + n if attention_norm else 1),
            "balance": kt.sum(-1) / (s if attention_norm else 1),
            "accumulator": s,
            "query_accumulator": (z * qt).sum(-1),
            "z_sum": np.abs(z).sum(-1),
            "z_max": z.max(-1),
            "state_norm": norm(S, axis=(-2, -1)),
            "stalled": stalled,
        }
        for name, value in values.items():
            rows[name][:, t] = value
    return rows


def positive(case):
    """The case with keys and queries whose products with z are far from zero."""
    return case.but(q=np.abs(case.q), k=np.abs(case.k))


@rules
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("attention_norm", [False, True])
@pytest.mark.parametrize(("phi", "qk_norm"), [(None, None), (ELU1(), "sum"), (DPFP(2), "l2")])
def test_every_probe_by_its_definition(isa, rule, decay, attention_norm, phi, qk_norm):
    K = 5 if phi is None else phi.dim(5)
    for dtype, V in ((np.float64, 3), (np.float64, 70), (np.float32, 33)):
        case = positive(make_case(rule, decay, B=2, T=9, heads=(2, 2, 2), K=5, V=V, dtype=dtype, state=False))
        if decay == "channel":
            case = case.but(g=make_case(rule, decay, B=2, T=9, heads=(2, 2, 2), K=K, V=1, dtype=dtype).g)
        rng = np.random.default_rng(3)
        state = rng.random((2, 2, K, V + attention_norm)).astype(dtype)
        case = case.but(initial_state=state)
        options = {"qk_norm": qk_norm, "attention_norm": attention_norm}
        d = fwp.diagnose(SCAN[rule], *case.inputs, feature_map=phi, initial_state=state, **options)
        for name, value in expected(case, phi, **options).items():
            got = getattr(d, name)
            assert got.shape == (2, 9, 2)
            assert got.dtype == dtype
            np.testing.assert_allclose(
                got, value, rtol=PROBE_TOLERANCE[dtype], atol=PROBE_TOLERANCE[dtype], err_msg=name
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_are_float32_inside(dtype):
    case = positive(make_case(T=20, K=7, V=40, dtype=dtype, state=False))
    d = fwp.diagnose(fwp.delta_rule, *case.inputs)
    wide = fwp.diagnose(fwp.delta_rule, *case.map(lambda x: x.astype(state_dtype(dtype))).inputs)
    for name, value in d.probes().items():
        assert_bits_equal(value, wide.probes()[name], name)
    assert np.dtype(dtype) not in ROUNDING or d.contrast.dtype == np.float32


@pytest.mark.parametrize("qk_norm", [None, "sum", "l2"])
def test_without_attention_norm_a_write_leaves_one_minus_its_strength(isa, qk_norm):
    """v - S^T k = (1 - beta |k|^2) (v - v~)"""
    case = positive(make_case(T=60, K=8, V=6, dtype=np.float64, state=False))
    d = fwp.diagnose(fwp.delta_rule, *case.inputs, qk_norm=qk_norm)
    np.testing.assert_allclose(d.residual, np.abs(1 - d.write_strength) * d.contrast, rtol=1e-9)
    if qk_norm == "sum":
        np.testing.assert_allclose(d.balance, 1, rtol=1e-12)
        np.testing.assert_allclose(d.z_sum, np.broadcast_to(d.positions[None, :, None], d.z_sum.shape))
        assert abs(d.summary()["z_sum"]["slope"] - 1) < 1e-9
    if qk_norm == "l2":
        np.testing.assert_allclose(d.write_strength, case.beta, rtol=1e-12)


def test_with_attention_norm_the_new_value_fades(isa):
    """w~ = ((s - beta n) v~ + beta n v) / (s + n): weights that add up to less than 1."""
    T = 512
    case = positive(make_case(T=T, K=8, V=6, dtype=np.float64, state=False))
    d = fwp.diagnose(fwp.delta_rule, *case.inputs, attention_norm=True, eps=0.0)
    n = (case.k**2).sum(-1)
    s, beta = d.accumulator[:, 1:], case.beta[:, 1:]
    old, new = (s - beta * n[:, 1:]) / (s + n[:, 1:]), beta * n[:, 1:] / (s + n[:, 1:])
    np.testing.assert_allclose(d.write_strength[:, 1:], new, rtol=1e-10)
    # |v - w~|^2 from |v|, |v~| and the angle between them.
    r, cosine = d.retrieved[:, 1:], d.cosine[:, 1:]
    squares = (1 - new) ** 2 + (old * r) ** 2 - 2 * (1 - new) * old * r * cosine
    np.testing.assert_allclose(d.residual[:, 1:], np.sqrt(squares), rtol=1e-6)
    summary = d.summary()
    assert 0.9 < summary["accumulator"]["slope"] < 1.1
    assert summary["write_strength"]["slope"] < -0.8


@pytest.mark.parametrize("phi", [ELU1(), DPFP(1)], ids=str)
def test_sum_norm_lets_the_divisor_grow_as_steps_over_features(isa, phi):
    """E s_i = (i - 1) / d_dot: sum normalisation alone does not tame the accumulator.

    Keys are independent and no feature is preferred, so that each feature of a normalised phi has the mean
    1 / d_dot, and z_{i-1}.phi(k_i) the mean (i - 1) / d_dot whatever phi(k_i), whose sum is 1. Sequences are
    independent: by chance, their mean is off by five standard errors once in a million times.
    """
    rng = np.random.default_rng(0)
    sequences, T, K = 400, 129, 16
    k = rng.standard_normal((sequences, T, 1, K))
    v, beta = np.zeros((sequences, T, 1, 1)), np.full((sequences, T, 1), 0.5)
    d = fwp.diagnose(fwp.delta_rule, k, k, v, beta, feature_map=phi, qk_norm="sum", attention_norm=True)
    for i in (2, 5, 17, 65, 129):
        s, expected = d.accumulator[:, i - 1, 0], (i - 1) / phi.dim(K)
        error = s.std(ddof=1) / sequences**0.5
        assert abs(s.mean() - expected) < 5 * error, i
        assert 5 * error < expected * (0.5 if i < 17 else 0.2), "so that another law would be seen"


def test_a_known_pair_has_no_contrast_under_the_delta_rule_only(isa):
    rng = np.random.default_rng(0)
    pairs, sweeps = 16, 8
    k = np.linalg.qr(rng.standard_normal((pairs, pairs)))[0]
    v = rng.standard_normal((pairs, 5))
    k, v = (np.tile(x, (sweeps, 1))[None, :, None] for x in (k, v))
    beta = np.ones(k.shape[:3])
    delta, linear = fwp.diagnose(fwp.delta_rule, k, k, v, beta), fwp.diagnose(fwp.linear_attention, k, k, v)
    np.testing.assert_allclose(delta.contrast[0, :pairs], 1, rtol=1e-12)
    assert delta.contrast[0, pairs:].max() < 1e-12
    np.testing.assert_allclose(linear.contrast[0, -pairs:], sweeps - 2, rtol=1e-10)


def test_the_accumulator_stalls_in_float32_where_the_state_says_so():
    state = np.full((1, 1, 2, 2), 2.0**25, np.float32)
    k = np.array([1.0, 8.0], np.float32).reshape(1, 1, 1, 2)
    v = np.ones((1, 1, 1, 1), np.float32)
    d = fwp.diagnose(fwp.linear_attention, k, k, v, attention_norm=True, initial_state=state)
    assert d.stalled.item() == 1


def test_gates_and_packed_sequences():
    lengths = [5, 0, 7]
    packed = make_case("delta", "scalar", gate="mixed", T=12, K=4, V=3, lengths=lengths, dtype=np.float64)
    offsets = np.cumsum([0, *lengths])
    d = fwp.diagnose(
        fwp.delta_rule, *packed.inputs, initial_state=packed.initial_state, cu_seqlens=packed.cu_seqlens
    )
    np.testing.assert_array_equal(d.positions, [*range(1, 6), *range(1, 8)])
    for n, (start, end) in enumerate(pairwise(offsets)):
        part = [x[:, start:end] for x in packed.inputs]
        alone = fwp.diagnose(fwp.delta_rule, *part, initial_state=packed.initial_state[n : n + 1])
        for name, value in alone.probes().items():
            assert_bits_equal(d.probes()[name][:, start:end], value, name)


def test_a_reset_forgets_even_nan():
    case = make_case("delta", "scalar", B=1, T=6, K=3, V=2, dtype=np.float64, state=False)
    g, v = case.g.copy(), case.v.copy()
    g[:, 3], v[:, 1] = -np.inf, np.nan
    d = fwp.diagnose(fwp.delta_rule, *case.but(g=g, v=v).inputs)
    assert np.isnan(d.state_norm[:, 1:3]).all()
    assert np.isfinite(d.state_norm[:, 3:]).all()
    assert (d.retrieved[:, 3] == 0).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (0, 3, 2, 2), (2, 0, 2, 2), (1, 3, 0, 2), (1, 3, 2, 0)])
@pytest.mark.parametrize("attention_norm", [False, True])
def test_sizes_of_zero_and_one(sizes, attention_norm):
    B, T, K, V = sizes
    case = make_case("delta", B=B, T=T, K=max(K, 1), V=V, state=False)
    case = case.but(q=case.q[..., :K], k=case.k[..., :K])
    d = fwp.diagnose(fwp.delta_rule, *case.inputs, attention_norm=attention_norm)
    assert d.contrast.shape == (B, T, 2)
    assert (d.state_norm == 0).all() or K * V > 0
    assert set(d.summary()) == set(d.probes())


def test_grouped_heads_layouts_and_threads():
    case = make_case("delta", "channel", T=40, heads=(2, 1, 6), K=9, V=35, state=False)
    one = fwp.diagnose(fwp.delta_rule, *case.inputs)
    q, k = (np.repeat(x, 6 // x.shape[2], axis=2) for x in (case.q, case.k))
    strided = [np.asfortranarray(x) for x in (q, k, case.v, case.beta, case.g)]
    with fwp.threads(5):
        many = fwp.diagnose(fwp.delta_rule, *strided)
    for name, value in one.probes().items():
        assert_bits_equal(many.probes()[name], value, name)


def test_nothing_is_changed():
    case = make_case("delta", "scalar", T=10)
    copies = [x.copy() for x in case.inputs]
    fwp.diagnose(fwp.delta_rule, *case.inputs, initial_state=case.initial_state)
    for x, copy in zip(case.inputs, copies, strict=True):
        assert_bits_equal(x, copy)


def test_bad_input():
    case = make_case("delta", T=4)
    with pytest.raises(fwp.ArgumentError, match="^fn: expected fwp_core.delta_rule or"):
        fwp.diagnose(np.dot, *case.inputs)
    with pytest.raises(fwp.DTypeError, match="^beta: "):
        fwp.diagnose(fwp.delta_rule, *case.inputs[:3])
    with pytest.raises(fwp.ShapeError, match="^k: expected shape"):
        fwp.diagnose(fwp.delta_rule, case.q, case.k[..., :3], case.v, case.beta)
    with pytest.raises(fwp.ShapeError, match=r"^initial_state: expected shape .*V\+1=17"):
        fwp.diagnose(
            fwp.delta_rule, *case.inputs, attention_norm=True, initial_state=np.zeros((2, 2, 16, 16), "f4")
        )
    with pytest.raises(TypeError):
        fwp.diagnose(fwp.delta_rule, *case.inputs, out=case.v)


def test_summary_and_picture():
    case = make_case("delta", T=30, state=False)
    d = fwp.diagnose(fwp.delta_rule, *case.inputs)
    summary = d.summary()
    assert summary["contrast"]["min"] <= summary["contrast"]["mean"] <= summary["contrast"]["max"]
    # A first token retrieves nothing, and nothing has no angle.
    assert summary["cosine"]["not_finite"] == 2 * 2
    assert repr(d) == "Diagnostics(12 probes [2, 30, 2])"
    pytest.importorskip("matplotlib")
    figure = d.plot()
    assert figure.axes[0].get_title() == "contrast"
    figure.canvas.draw()


def test_padding_of_values_is_no_value(isa):
    """Infinite keys make NaN of the padding beside a few value columns; whole tiles have none."""
    k = np.array([np.inf, 1.0]).reshape(1, 2, 1, 1)
    few, many = (fwp.diagnose(fwp.linear_attention, k, k, np.ones((1, 2, 1, V))) for V in (3, 64))
    for name, value in few.probes().items():
        np.testing.assert_array_equal(np.isnan(value), np.isnan(many.probes()[name]), err_msg=name)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_a_picture_of_nothing(sizes):
    pytest.importorskip("matplotlib")
    x = np.ones((*sizes, 1))
    fwp.diagnose(fwp.delta_rule, x, x, x, np.ones(sizes)).plot().canvas.draw()
