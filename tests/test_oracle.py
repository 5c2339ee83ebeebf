"""The oracle itself: its hand-derived gradients against complex steps, its forward against other texts."""

import numpy as np
import pytest
from cases import DECAYS, RULES, exact_gradients, exact_scan, make_case
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
