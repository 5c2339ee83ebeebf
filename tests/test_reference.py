"""fwp.reference, the specification: two forms of each scan, and softmax attention."""

import numpy as np
import pytest
from cases import DECAYS, RULES, exact_scan, make_case
from hypothesis import given
from strategies import cases
from tolerances import relative_error

import fwp_core as fwp
from fwp_core import reference

SCANS = {"linear": reference.linear_attention, "delta": reference.delta_rule}


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
    assert reference.__all__ == ["delta_rule", "linear_attention", "softmax_attention"]


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
