"""fwp.vjp: the scan now, its gradients later."""

import gc
import weakref

import numpy as np
import pytest
from cases import DECAYS, RULES, exact_gradients, gradients, make_case, vjp
from checks import vjp_is_scan_and_backward
from hypothesis import given
from strategies import cases
from tolerances import assert_gradients_bits_equal, assert_gradients_close

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])


@given(case=cases())
def test_is_the_scan_and_its_backward(isa, case):
    vjp_is_scan_and_backward(case)


@all_scans
def test_long_sequence(isa, rule, decay):
    case = make_case(rule, decay, lengths=(300, 0, 1, 77), heads=(2, 1, 1), K=20, V=40)
    _, pullback = vjp(case)
    grads = pullback(case.do, dfinal_state=case.dfinal_state)
    assert_gradients_bits_equal(grads, gradients(case))
    assert_gradients_close(grads, exact_gradients(case))


@all_scans
def test_pullback_is_called_again(isa, rule, decay):
    case = make_case(rule, decay, T=30, V=20)
    other = make_case(rule, decay, T=30, V=20, seed=1)
    _, pullback = vjp(case)
    first = pullback(case.do, case.dfinal_state)
    second = case.but(do=other.do, dfinal_state=None)
    assert_gradients_bits_equal(pullback(second.do), gradients(second))
    assert_gradients_bits_equal(pullback(case.do, case.dfinal_state), first)


def test_inputs_live_as_long_as_the_pullback():
    case = make_case("delta", "channel", T=200, K=64, V=64)
    expected = gradients(case)
    # Views, so that nothing else keeps them; weakrefs go to their bases.
    inputs = [x.copy() for x in case.inputs]
    state = case.initial_state.copy()
    alive = [weakref.ref(x) for x in (*inputs, state)]
    (o, final_state), pullback = fwp.vjp(fwp.delta_rule, *inputs, initial_state=state)
    del inputs, state, o, final_state
    gc.collect()
    noise = [np.full((2, 200, 2, 64), np.nan, np.float32) for _ in range(20)]  # over what was freed
    assert_gradients_bits_equal(pullback(case.do, case.dfinal_state), expected)
    del pullback, noise
    gc.collect()
    assert all(reference() is None for reference in alive)


@all_scans
def test_after_a_switch_of_level(rule, decay):
    """Checkpoints belong to a level: a pullback at another one gives that level's gradients."""
    case = make_case(rule, decay, T=50, K=20, V=40)
    levels = fwp.available_isas()
    with fwp.use_isa(levels[-1]):
        _, pullback = vjp(case)
    with fwp.use_isa(levels[0]):
        assert_gradients_bits_equal(pullback(case.do, case.dfinal_state), gradients(case))
    with fwp.use_isa(levels[-1]):
        assert_gradients_bits_equal(pullback(case.do, case.dfinal_state), gradients(case))


def test_results_land_in_the_given_arrays(isa):
    case = make_case("delta", "scalar", T=20)
    out, final = np.full_like(case.do, np.nan), np.full_like(case.initial_state, np.nan)
    (o, final_state), pullback = vjp(case, out=out, final_state_out=final)
    assert o is out
    assert final_state is final
    expected = gradients(case)
    grads = fwp.Gradients(*(np.full_like(x, np.nan) for x in expected))
    result = pullback(case.do, case.dfinal_state, out=grads)
    assert all(x is y for x, y in zip(result, grads, strict=True))
    assert_gradients_bits_equal(grads, expected)


def test_threads_may_change_in_between(isa):
    case = make_case("delta", "channel", B=1, T=60, heads=(4, 2, 1), K=32, V=100)
    expected = gradients(case)
    for before, after in ((1, 4), (3, 2)):
        with fwp.threads(before):
            _, pullback = vjp(case)
        with fwp.threads(after):
            assert_gradients_bits_equal(pullback(case.do, case.dfinal_state), expected)


@pytest.mark.parametrize("function", [np.sin, fwp.delta_rule_step, fwp.linear_attention_backward, None, "x"])
def test_only_scans_have_a_vjp(function):
    case = make_case("delta")
    with pytest.raises((TypeError, ValueError), match="delta_rule"):
        fwp.vjp(function, *case.inputs)


def test_do_is_checked():
    case = make_case("delta")
    _, pullback = vjp(case)
    with pytest.raises(ValueError, match="do"):
        pullback(case.do[:, 1:])


def test_the_offsets_are_the_pullbacks_own():
    case = make_case("delta", B=1, T=9)
    for offsets in ([0, 4, 9], np.array([0, 4, 9])):
        options = case.options | {"cu_seqlens": offsets, "initial_state": None}
        _, pullback = fwp.vjp(fwp.delta_rule, *case.inputs, **options)
        before = pullback(case.do)
        offsets[1] = 7
        for x, y in zip(before, pullback(case.do), strict=True):
            assert (x is None and y is None) or x.tobytes() == y.tobytes()
