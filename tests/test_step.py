"""One token at a time, for decoding: the state is updated in place."""

import numpy as np
import pytest
from cases import DECAYS, DTYPES, RULES, STEP, exact_scan, make_case, scan
from hypothesis import given
from strategies import LAYOUTS, cases, every_other, reversed_axes, strided_last_axis
from tolerances import REORDERED, assert_bits_equal, assert_close, relative_error

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])


def step(case, t, state, **options):
    """Token t of the case."""
    token = [None if x is None else x[:, t] for x in case.inputs]
    return STEP[case.rule](*token, state=state, scale=case.scale, **options)


def first_state(case):
    n, _, H, K, V = case.sizes
    return (
        np.zeros((n, H, K, V), case.state_dtype) if case.initial_state is None else case.initial_state.copy()
    )


@given(case=cases(times=(1, 2, 7), lengths=None))
def test_step_by_step_is_the_scan(isa, case):
    state = first_state(case)
    o = np.stack([step(case, t, state) for t in range(case.v.shape[1])], axis=1)
    exact_o, exact_state = exact_scan(case)
    assert o.dtype == case.v.dtype
    assert_close(o, exact_o, "forward", "o")
    assert_close(state, exact_state, "forward", "state")


@all_scans
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_is_a_scan_of_one_token(isa, rule, decay, dtype):
    case = make_case(rule, decay, T=1, heads=(4, 2, 1), K=17, V=33, dtype=dtype)
    state = first_state(case)
    o = step(case, 0, state)
    for x, y in zip((o[:, None], state), scan(case), strict=True):
        assert relative_error(x, y) < REORDERED[x.dtype]


def test_many_steps_stay_close(isa):
    case = make_case("delta", "scalar", B=1, T=500, heads=(1, 1, 1), K=32, V=32)
    state = first_state(case)
    for t in range(500):
        o = step(case, t, state)
    exact_o, exact_state = exact_scan(case)
    assert relative_error(o, exact_o[:, -1]) < REORDERED[o.dtype]
    assert relative_error(state, exact_state) < REORDERED[o.dtype]


@all_scans
def test_out_and_state_are_the_given_arrays(isa, rule, decay):
    case = make_case(rule, decay, K=9, V=21)
    state, other = first_state(case), first_state(case)
    out = np.full((2, 2, 21), np.nan, np.float32)
    assert step(case, 0, state, out=out) is out
    assert_bits_equal(out, step(case, 0, other))
    assert_bits_equal(state, other)
    assert not np.array_equal(state, case.initial_state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_in_any_layout(isa, layout):
    """The state is written where it lies, also when its last axis is not contiguous."""
    case = make_case("delta", "channel", heads=(4, 2, 1), K=9, V=21)
    state, strided = first_state(case), layout(first_state(case))
    assert_bits_equal(step(case, 0, strided), step(case, 0, state))
    assert_bits_equal(strided, state)


@pytest.mark.parametrize("layout", [every_other, reversed_axes, strided_last_axis])
def test_tokens_in_any_layout(isa, layout):
    case = make_case("delta", "channel", heads=(4, 2, 1), K=9, V=21)
    moved = case.map(layout)
    state, other = first_state(case), first_state(case)
    out = layout(np.full((2, 1, 4, 21), np.nan, np.float32))[:, 0]
    step(moved, 0, other, out=out)
    assert_bits_equal(out, step(case, 0, state))
    assert_bits_equal(other, state)


@all_scans
def test_threads_and_batch_do_not_matter(isa, rule, decay):
    case = make_case(rule, decay, B=6, heads=(8, 4, 8), K=64, V=130)
    states, outputs = [], []
    for threads in range(1, 9):
        with fwp.threads(threads):
            states.append(first_state(case))
            outputs.append(step(case, 0, states[-1]))
    for state, o in zip(states[1:], outputs[1:], strict=True):
        assert_bits_equal(state, states[0])
        assert_bits_equal(o, outputs[0])
    alone = case.map(lambda x: x[4:5])
    state = first_state(alone)
    assert_bits_equal(step(alone, 0, state), outputs[0][4:5])
    assert_bits_equal(state, states[0][4:5])


def test_beta_zero_keeps_the_state(isa):
    case = make_case("delta")
    case.beta[...] = 0
    state = first_state(case)
    step(case, 0, state)
    assert_bits_equal(state, case.initial_state)


def test_a_reset_clears_the_state(isa):
    case = make_case("delta", "scalar")
    case.g[...] = -np.inf
    case.beta[...] = 0
    state = first_state(case)
    assert not np.any(step(case, 0, state))
    assert not np.any(state)


@pytest.mark.parametrize("name", ["B", "heads", "K", "V"])
@all_scans
def test_zero_sizes(rule, decay, name):
    case = make_case(rule, decay, **{name: (0, 0, 0) if name == "heads" else 0})
    state = first_state(case)
    o = step(case, 0, state)
    assert o.shape == case.do[:, 0].shape
    assert not np.any(o)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_not_changed(isa, rule):
    case = make_case(rule, "channel")
    frozen = case.map(np.copy)
    for x in frozen.arrays.values():
        x.flags.writeable = False
    step(frozen, 3, first_state(case))
    for name, x in frozen.arrays.items():
        assert_bits_equal(x, getattr(case, name), name)
