"""One token at a time, or a few, for decoding: the state is updated in place."""

import numpy as np
import pytest
from cases import DECAYS, DTYPES, RULES, exact_scan, make_case, scan, step, steps
from hypothesis import given
from strategies import LAYOUTS, cases, every_other, reversed_axes, strided_last_axis
from tolerances import REORDERED, assert_bits_equal, assert_close, relative_error

import fwp_core as fwp

# Fewer than a block, whole blocks and more, up to what is done in place, and beyond.
TOKENS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 24, 25, 60)

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])


@given(case=cases(times=(1, 2, 7), lengths=None))
def test_step_by_step_is_the_scan(isa, case):
    state = case.first_state()
    o = np.stack([step(case, t, state) for t in range(case.v.shape[1])], axis=1)
    exact_o, exact_state = exact_scan(case)
    assert o.dtype == case.v.dtype
    assert_close(o, exact_o, "forward", "o")
    assert_close(state, exact_state, "forward", "state")


@given(case=cases(times=TOKENS, lengths=None))
def test_steps_of_several_tokens_are_the_scan(isa, case):
    state = case.first_state()
    o = steps(case, state)
    exact_o, exact_state = exact_scan(case)
    assert o.dtype == case.v.dtype
    assert_close(o, exact_o, "forward", "o")
    assert_close(state, exact_state, "forward", "state")


@all_scans
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(isa, rule, decay, dtype, tokens):
    case = make_case(rule, decay, T=tokens, heads=(4, 2, 1), K=17, V=100, dtype=dtype, gate="mixed")
    state, out = case.first_state(), np.full_like(case.do, np.nan)
    assert steps(case, state, out=out) is out
    for x, y in zip((out, state), scan(case), strict=True):
        assert relative_error(x, y) < REORDERED[np.dtype(dtype)]


@all_scans
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_time_axis_of_one_changes_no_bit(isa, rule, decay, dtype):
    case = make_case(rule, decay, T=1, heads=(4, 2, 1), K=17, V=65, dtype=dtype)
    state, other = case.first_state(), case.first_state()
    assert_bits_equal(steps(case, state), step(case, 0, other)[:, None])
    assert_bits_equal(state, other)


@all_scans
def test_no_tokens_leave_the_state_alone(isa, rule, decay):
    case = make_case(rule, decay, T=0, K=9, V=21)
    state = case.first_state()
    assert steps(case, state).shape == (2, 0, 2, 21)
    assert_bits_equal(state, case.initial_state)


@all_scans
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_is_a_scan_of_one_token(isa, rule, decay, dtype):
    case = make_case(rule, decay, T=1, heads=(4, 2, 1), K=17, V=33, dtype=dtype)
    state = case.first_state()
    o = step(case, 0, state)
    for x, y in zip((o[:, None], state), scan(case), strict=True):
        assert relative_error(x, y) < REORDERED[x.dtype]


def test_many_steps_stay_close(isa):
    case = make_case("delta", "scalar", B=1, T=500, heads=(1, 1, 1), K=32, V=32)
    state = case.first_state()
    for t in range(500):
        o = step(case, t, state)
    exact_o, exact_state = exact_scan(case)
    assert relative_error(o, exact_o[:, -1]) < REORDERED[o.dtype]
    assert relative_error(state, exact_state) < REORDERED[o.dtype]


@all_scans
def test_out_and_state_are_the_given_arrays(isa, rule, decay):
    case = make_case(rule, decay, K=9, V=21)
    state, other = case.first_state(), case.first_state()
    out = np.full((2, 2, 21), np.nan, np.float32)
    assert step(case, 0, state, out=out) is out
    assert_bits_equal(out, step(case, 0, other))
    assert_bits_equal(state, other)
    assert not np.array_equal(state, case.initial_state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 30])
@pytest.mark.parametrize("V", [21, 64, 100])
def test_states_in_any_layout(isa, layout, tokens, V):
    """The state is written where it lies, whatever its last axis, and gaps are left alone."""
    case = make_case("delta", "channel", T=tokens, heads=(4, 2, 1), K=9, V=V, gate="reset")
    state, strided = case.first_state(), layout(case.first_state())
    memory = strided if strided.base is None else strided.base
    gaps = np.isnan(memory).sum()
    assert_bits_equal(steps(case, strided), steps(case, state))
    assert_bits_equal(strided, state)
    assert np.isnan(memory).sum() == gaps


@pytest.mark.parametrize("V", [511, 512, 1024, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(isa, V, dtype):
    """Among them rows of whole pages, which pass through other memory."""
    for tokens in (1, 5):
        case = make_case("delta", "scalar", T=tokens, heads=(4, 2, 2), K=9, V=V, dtype=dtype)
        state = case.first_state()
        o = steps(case, state)
        exact_o, exact_state = exact_scan(case)
        assert_close(o, exact_o, "forward", "o")
        assert_close(state, exact_state, "forward", "state")


@pytest.mark.parametrize("offset", range(1, 17, 3))
@pytest.mark.parametrize("tokens", [1, 6])
def test_states_at_any_address(isa, offset, tokens):
    case = make_case("delta", "scalar", T=tokens, K=9, V=100)
    state, memory = case.first_state(), np.full(case.initial_state.size + 32, np.nan, np.float32)
    shifted = memory[offset : offset + state.size].reshape(state.shape)
    shifted[...] = state
    assert_bits_equal(steps(case, shifted), steps(case, state))
    assert_bits_equal(shifted, state)
    assert np.isnan(memory).sum() == 32


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_states_that_lie_apart_between_others(isa, axis):
    """Every other state, head or row of a larger array; the others keep their bits."""
    case = make_case("delta", "scalar", T=5, K=9, V=100)
    state = case.first_state()
    larger = np.random.default_rng(1).standard_normal(np.insert(state.shape, axis, 2)).astype(np.float32)
    kept = larger.take(0, axis).copy()
    view = np.moveaxis(larger, axis, 0)[1][(slice(None),) * axis + (slice(None, None, -1),)]
    view[...] = state
    assert_bits_equal(steps(case, view), steps(case, state))
    assert_bits_equal(view, state)
    assert_bits_equal(larger.take(0, axis), kept)


@pytest.mark.parametrize("layout", [every_other, reversed_axes, strided_last_axis])
def test_tokens_in_any_layout(isa, layout):
    case = make_case("delta", "channel", heads=(4, 2, 1), K=9, V=21)
    moved = case.map(layout)
    state, other = case.first_state(), case.first_state()
    out = layout(np.full((2, 1, 4, 21), np.nan, np.float32))[:, 0]
    step(moved, 0, other, out=out)
    assert_bits_equal(out, step(case, 0, state))
    assert_bits_equal(other, state)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@all_scans
def test_threads_and_batch_do_not_matter(isa, rule, decay, tokens):
    case = make_case(rule, decay, B=6, T=tokens, heads=(8, 4, 8), K=64, V=130)
    states, outputs = [], []
    for threads in range(1, 9):
        with fwp.threads(threads):
            states.append(case.first_state())
            outputs.append(steps(case, states[-1]))
    for state, o in zip(states[1:], outputs[1:], strict=True):
        assert_bits_equal(state, states[0])
        assert_bits_equal(o, outputs[0])
    alone = case.map(lambda x: x[4:5])
    state = alone.first_state()
    assert_bits_equal(steps(alone, state), outputs[0][4:5])
    assert_bits_equal(state, states[0][4:5])


def test_beta_zero_keeps_the_state(isa):
    case = make_case("delta")
    case.beta[...] = 0
    state = case.first_state()
    step(case, 0, state)
    assert_bits_equal(state, case.initial_state)


def test_a_reset_clears_the_state(isa):
    case = make_case("delta", "scalar")
    case.g[...] = -np.inf
    case.beta[...] = 0
    state = case.first_state()
    assert not np.any(step(case, 0, state))
    assert not np.any(state)


@pytest.mark.parametrize("name", ["B", "heads", "K", "V"])
@all_scans
def test_zero_sizes(rule, decay, name):
    case = make_case(rule, decay, **{name: (0, 0, 0) if name == "heads" else 0})
    for o, like in (
        (step(case, 0, case.first_state()), case.do[:, 0]),
        (steps(case, case.first_state()), case.do),
    ):
        assert o.shape == like.shape
        assert not np.any(o)


@pytest.mark.parametrize("rule", RULES)
def test_inputs_are_not_changed(isa, rule):
    case = make_case(rule, "channel")
    frozen = case.map(np.copy)
    for x in frozen.arrays.values():
        x.flags.writeable = False
    step(frozen, 3, case.first_state())
    for name, x in frozen.arrays.items():
        assert_bits_equal(x, getattr(case, name), name)
