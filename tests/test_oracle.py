"""The oracle itself: its hand-derived gradients against complex steps, its forward against other texts."""

import numpy as np
import pytest
from cases import DECAYS, MAPS, NORMS, RULES, exact_gradients, exact_map, exact_scan, make_case
from oracle_features import features
from tolerances import CENTRAL_DIFFERENCE, CENTRAL_STEP, COMPLEX_STEP, relative_error

from fwp_core import reference

REFERENCE = {"linear": reference.linear_attention, "delta": reference.delta_rule}
# Incoming gradients, and the gradient each input gets.
INPUTS = ("q", "k", "v", "beta", "g", "initial_state")

variants = pytest.mark.parametrize(
    ("rule", "decay", "options"),
    [
        (rule, decay, options)
        for rule in RULES
        for decay in DECAYS
        for options in (
            {"heads": (4, 2, 1), "T": 5, "scale": 0.5},
            {"heads": (1, 1, 3), "lengths": (0, 4, 1, 0, 3), "gate": "positive"},
            {"heads": (2, 2, 2), "T": 6, "gate": "reset", "K": 1},
            {"heads": (1, 1, 1), "T": 4, "gate": "strong", "V": 1},
        )
    ],
)


def small_case(rule, decay, options):
    return make_case(rule, decay, **{"K": 4, "V": 3, "dtype": np.float64, **options})


def loss(case):
    """What the gradients are gradients of."""
    o, final_state = exact_scan(case)
    return np.sum(o * case.do) + np.sum(final_state * case.dfinal_state)


@variants
def test_gradients_match_complex_steps(rule, decay, options):
    case = small_case(rule, decay, options)
    exact = exact_gradients(case)
    for name, gradient in zip(INPUTS, exact, strict=True):
        x = getattr(case, name)
        if x is None:
            assert gradient is None
            continue
        steps = np.empty(x.shape)
        for index in np.ndindex(x.shape):
            moved = x.astype(complex)
            moved[index] += 1e-30j
            steps[index] = loss(case.but(**{name: moved})).imag / 1e-30
        assert relative_error(gradient, steps, floor=1.0) < COMPLEX_STEP, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("attention_norm", [False, True])
@pytest.mark.parametrize("qk_norm", NORMS)
@pytest.mark.parametrize("feature_map", [None, *MAPS])
def test_gradients_through_features_match_complex_steps(rule, attention_norm, qk_norm, feature_map):
    """In one direction of each input that moves all its entries."""
    options = {"heads": (2, 1, 4), "lengths": (3, 0, 5), "gate": "reset", "eps": 0.25}
    features = {"feature_map": feature_map, "qk_norm": qk_norm, "attention_norm": attention_norm}
    case = small_case(rule, "channel", options | features)
    rng = np.random.default_rng(1)
    for name, gradient in zip(INPUTS, exact_gradients(case), strict=True):
        x = getattr(case, name)
        direction = rng.standard_normal(x.shape)
        direction[np.isneginf(x)] = 0
        slope = loss(case.but(**{name: x + 1e-30j * direction})).imag / 1e-30
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.sum(gradient * direction) - slope) <= COMPLEX_STEP * size, name


def test_gradients_match_central_differences():
    """Once, so that nothing rests on complex arithmetic alone."""
    case = small_case("delta", "channel", {"T": 5, "heads": (2, 1, 2)})
    for name, gradient in zip(INPUTS, exact_gradients(case), strict=True):
        x = getattr(case, name)
        step = CENTRAL_STEP * np.random.default_rng(1).standard_normal(x.shape)
        ahead, behind = (loss(case.but(**{name: moved})) for moved in (x + step, x - step))
        difference = (ahead - behind) / 2
        size = np.linalg.norm(gradient) * np.linalg.norm(step)
        assert abs(difference - np.sum(gradient * step)) < CENTRAL_DIFFERENCE * size, name


@variants
@pytest.mark.parametrize("form", ["recurrence", "attention"])
def test_forward_matches_reference(rule, decay, options, form):
    case = small_case(rule, decay, options)
    for x, y in zip(REFERENCE[rule](*case.inputs, **case.options, form=form), exact_scan(case), strict=True):
        assert relative_error(x, y) < 1e-14


def test_linear_is_cumulative_sums():
    """The linear rule without beta and decay, from the textbook formula: o_t = sum_{s<=t} (q_t.k_s) v_s."""
    case = make_case("linear", T=9, beta=False, state=False, dtype=np.float64)
    o, final_state = exact_scan(case)
    scores = np.einsum("bthk,bshk->bhts", case.q, case.k) * np.tri(9)
    assert relative_error(o, np.einsum("bhts,bshv->bthv", scores, case.v)) < 1e-14
    assert relative_error(final_state, np.einsum("bthk,bthv->bhkv", case.k, case.v)) < 1e-14


def test_delta_replaces_what_a_key_stores():
    """Eq. 24 by hand: with beta = 1 the second value stored under a key replaces the first."""
    k = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).reshape(1, 3, 1, 2)
    v = np.array([[1.0], [2.0], [5.0]]).reshape(1, 3, 1, 1)
    case = make_case("delta", B=1, T=3, heads=(1, 1, 1), K=2, V=1, dtype=np.float64, state=False)
    case = case.but(q=k, k=k, v=v, beta=np.ones((1, 3, 1)))
    o, final_state = exact_scan(case)
    assert o.ravel().tolist() == [1, 2, 5]
    assert final_state.ravel().tolist() == [5, 2]


def test_reset_forgets_and_passes_nothing_back():
    case = make_case("delta", "scalar", T=6, dtype=np.float64)
    case.g[:, 3] = -np.inf
    fresh = case.but(
        **{name: getattr(case, name)[:, 3:] for name in ("q", "k", "v", "beta", "g", "do")},
        initial_state=np.full_like(case.initial_state, np.nan),
    )
    for x, y in zip(exact_scan(case), exact_scan(fresh), strict=True):
        np.testing.assert_array_equal(x[:, -3:] if x.shape[1] == 6 else x, y)
    late_only = case.but(do=np.where(np.arange(6)[:, None, None] >= 3, case.do, 0))
    exact = exact_gradients(late_only)
    assert not np.any(exact.dinitial_state)
    assert not np.any(exact.dg[:, :4])
    assert not any(np.any(x[:, :3]) for x in exact[:4])


# Features and norms, from the formulas of the paper.


@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("feature_map", MAPS)
def test_normalised_linear_attention_is_a_weighted_mean(feature_map, eps):
    """Eq. 19, in O(T^2): o_t = sum_{s<=t} w_ts v_s / (sum_{s<=t} w_ts + eps), w_ts = phi(q_t).phi(k_s)."""
    options = {"feature_map": feature_map, "attention_norm": True, "eps": eps}
    case = make_case("linear", T=9, beta=False, state=False, dtype=np.float64, **options)
    phi = features(exact_map(case.feature_map)).value
    weights = np.einsum("bthk,bshk->bhts", phi(case.q), phi(case.k)) * np.tri(9)
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.where(total == 0, 0, weights / np.where(total == 0, 1, total + eps))
    o, final_state = exact_scan(case)
    assert relative_error(o, np.einsum("bhts,bshv->bthv", weights, case.v)) < 1e-14
    assert relative_error(final_state[..., -1], phi(case.k).sum(axis=1)) < 1e-14


def one_write(attention_norm, **options):
    """One token that reads what it wrote, with phi(k), the normaliser s = z.phi(k) and the prediction."""
    options = {"feature_map": ("ELU1",), "attention_norm": attention_norm, "eps": 0.0} | options
    case = make_case("delta", B=3, T=1, heads=(1, 1, 1), K=5, V=4, dtype=np.float64, **options)
    case = case.but(q=case.k)
    phi = features(exact_map(case.feature_map), case.qk_norm).value(case.k)
    sums = np.einsum("bthk,bhkv->bthv", phi, case.initial_state)
    s = sums[..., 4:]
    return case, phi, s, sums[..., :4] / (s if attention_norm else 1)


@pytest.mark.parametrize("qk_norm", NORMS)
def test_error_after_a_write(qk_norm):
    """Without attention_norm: v - S^T phi(k) = (1 - beta |phi(k)|^2) (v - v~)."""
    case, phi, _, predicted = one_write(False, qk_norm=qk_norm)
    left = 1 - case.beta[..., None] * np.sum(phi**2, axis=-1, keepdims=True)
    np.testing.assert_allclose(case.v - exact_scan(case)[0], left * (case.v - predicted), rtol=1e-12)


@pytest.mark.parametrize("qk_norm", NORMS)
def test_reading_after_a_normalised_write(qk_norm):
    """With attention_norm: ((s - beta n) v~ + beta n v) / (s + n), n = |phi(k)|^2."""
    case, phi, s, predicted = one_write(True, qk_norm=qk_norm)
    n = np.sum(phi**2, axis=-1, keepdims=True)
    new = case.beta[..., None] * n
    expected = ((s - new) * predicted + new * case.v) / (s + n)
    np.testing.assert_allclose(exact_scan(case)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_the_accumulator_counts_tokens_under_the_sum_norm(feature_map):
    """|z|_1 grows by 1 with each key that has features at all."""
    options = {"feature_map": feature_map, "qk_norm": "sum", "attention_norm": True}
    case = make_case("delta", T=20, K=4, state=False, dtype=np.float64, **options)
    counted = np.any(features(exact_map(case.feature_map)).value(case.k) != 0, axis=-1).sum(axis=1)
    _, state = exact_scan(case)
    np.testing.assert_allclose(np.sum(state[..., -1], axis=-1), counted, rtol=1e-13)


@pytest.mark.parametrize("feature_map", [("ELU1",), ("DPFP", 1)])
def test_normalised_delta_rule_by_plain_delta_rule(feature_map):
    """Keys phi / (s + eps) and strengths beta (s + eps) write and predict the same, also where s = 0."""
    options = {"feature_map": feature_map, "attention_norm": True, "eps": 1e-3}
    case = make_case("delta", T=12, K=3, state=False, dtype=np.float64, **options)
    phi = features(exact_map(case.feature_map)).value
    s = np.einsum("bthk,bthk->bth", np.cumsum(phi(case.k), axis=1) - phi(case.k), phi(case.k)) + case.eps
    plain = case.but(k=phi(case.k) / s[..., None], beta=case.beta * s, q=phi(case.q), feature_map=None)
    _, state = exact_scan(plain.but(attention_norm=False))
    _, normalised = exact_scan(case)
    assert relative_error(state, normalised[..., :-1]) < 1e-12


def test_sparse_features_of_two_dimensions():
    """DPFP with nu = 1 tells the quadrants apart: one product of |x_0| and |x_1| each."""
    x = np.array([[2.0, 3.0], [-2.0, 3.0], [-2.0, -3.0], [2.0, -3.0]])
    y = features(exact_map(("DPFP", 1))).value(x)
    assert y.tolist() == [[0, 6, 0, 0], [0, 0, 6, 0], [0, 0, 0, 6], [6, 0, 0, 0]]


def test_rows_without_a_norm():
    for norm, x in (("sum", [[1.0, -1.0, 0.0]]), ("sum", [[0.0] * 3]), ("l2", [[0.0] * 3])):
        phi = features(None, norm)
        assert not np.any(phi.value(np.array(x)))
        assert not np.any(phi.vjp(np.ones((1, 3)), np.array(x)))
