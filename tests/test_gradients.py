"""Backward scans: against the oracle, against differences, and through identities that need no reference."""

import numpy as np
import pytest
from cases import DECAYS, PRECISE, RULES, exact_gradients, gradients, make_case, scan
from checks import (
    INPUTS,
    gradients_are_central_differences,
    gradients_are_the_adjoint,
    gradients_are_the_oracles,
)
from hypothesis import given
from strategies import cases
from tolerances import (
    TOLERANCE,
    assert_bits_equal,
    assert_gradients_bits_equal,
    assert_gradients_close,
    relative_error,
)

import fwp_core as fwp
from fwp_core import reference

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])


@given(case=cases())
def test_match_oracle(isa, case):
    gradients_are_the_oracles(case)


@pytest.mark.slow
@given(case=cases(sizes=(2, 7, 63, 65, 127, 128, 129, 255, 257)))
def test_match_oracle_at_large_sizes(isa, case):
    gradients_are_the_oracles(case)


@all_scans
def test_every_value_size_and_remainder_of_time(isa, rule, decay):
    for V in range(1, 70, 2):
        gradients_are_the_oracles(make_case(rule, decay, B=1, T=V % 14, heads=(1, 1, 1), K=1 + V % 9, V=V))


@all_scans
def test_every_key_size(isa, rule, decay):
    for K in range(2, 70, 3):
        gradients_are_the_oracles(make_case(rule, decay, B=1, T=7, heads=(1, 1, 1), K=K, V=1 + K % 5))


@all_scans
def test_long_sequence(isa, rule, decay):
    """Past any spacing of checkpoints, a block's remainder at the end."""
    gradients_are_the_oracles(make_case(rule, decay, B=1, T=1030, heads=(1, 1, 1), K=20, V=18))


@pytest.mark.parametrize("gate", ["reset", "strong", "mixed"])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_long_sequence_with_strong_gates(isa, rule, decay, gate):
    """Resets at any token of a block and of a segment between checkpoints, one after the other too."""
    case = make_case(rule, decay, lengths=(400, 1, 0, 230), heads=(1, 2, 1), K=20, V=18, gate=gate)
    if gate == "reset":
        case.g[:, 100:130] = -np.inf
    gradients_are_the_oracles(case)


@all_scans
def test_float64_to_the_promised_digits(isa, rule, decay):
    """Relative to the gradient alone."""
    case = make_case(rule, decay, T=50, heads=(4, 2, 1), K=17, V=33, dtype=np.float64)
    for x, y in zip(gradients(case), exact_gradients(case), strict=True):
        if y is not None:
            assert relative_error(x, y) < 1e-12


@all_scans
def test_match_central_differences_of_the_library(isa, rule, decay):
    case = make_case(rule, decay, B=1, heads=(2, 1, 2), T=8, K=4, V=3, dtype=np.float64, scale=0.5)
    gradients_are_central_differences(case)


@all_scans
def test_match_the_gradient_of_the_attention_form(rule, decay):
    """The O(T^2) form has a gradient of its own; complex steps give it in random directions."""
    scan_as_attention = {"linear": reference.linear_attention, "delta": reference.delta_rule}[rule]
    case = make_case(rule, decay, T=20, heads=(2, 2, 1), K=6, V=5, dtype=np.float64)
    rng = np.random.default_rng(2)
    for name, gradient in zip(INPUTS, gradients(case), strict=True):
        x = getattr(case, name)
        if x is None:
            continue
        direction = rng.standard_normal(x.shape)
        moved = case.but(**{name: x + 1e-30j * direction})
        o, final_state = scan_as_attention(*moved.inputs, **moved.options, form="attention")
        slope = (np.sum(o * case.do) + np.sum(final_state * case.dfinal_state)).imag / 1e-30
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.sum(gradient * direction) - slope) < 1e-12 * size, name


@given(case=cases(dtypes=(np.float64,), sizes=(1, 3, 8, 17), gate_dtype=np.float64))
def test_adjoint_identity(isa, case):
    gradients_are_the_adjoint(case)


# Gates that forget almost everything in one token. dg = q.dq - k.dk would cancel here.


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("g", [-5.0, -20.0, -60.0])
@pytest.mark.parametrize("dtype", PRECISE)
def test_dg_is_exact_where_gates_are_strong(isa, rule, decay, g, dtype):
    """Relative to dg itself, which is about exp(g)."""
    case = make_case(rule, decay, T=25, K=12, V=9, dtype=dtype)
    case.g[...] = g
    dg, exact = gradients(case).dg, exact_gradients(case).dg
    assert np.linalg.norm(exact) < 1e3 * np.exp(g)
    assert relative_error(dg, exact) < TOLERANCE["gradient", dg.dtype.name]


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", PRECISE)
def test_dg_is_exact_for_each_gate_among_mixed_ones(isa, rule, decay, dtype):
    """The gates of each strength are compared among themselves: large entries must not hide small ones."""
    case = make_case(rule, decay, T=60, K=12, V=9, dtype=dtype, gate="mixed", seed=4)
    gates = np.where(case.g == -1e4, -10, case.g)  # exp(-1e4) is 0 in either precision
    case = case.but(g=gates.astype(dtype))
    dg, exact = gradients(case).dg, exact_gradients(case).dg
    for strength in (-5.0, -10.0, -20.0, None):
        chosen = case.g == strength if strength else case.g > -5
        assert chosen.sum() > 5
        assert relative_error(dg[chosen], exact[chosen]) < TOLERANCE["gradient", dg.dtype.name], strength
    assert not np.any(dg[np.isneginf(case.g)])


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("rule", RULES)
def test_reset_passes_nothing_back(isa, rule, decay):
    """g = -inf at one token: gradients before it are exactly 0 if the loss is after it."""
    case = make_case(rule, decay, T=20, V=20)
    case.g[:, 11] = -np.inf
    case.do[:, :11] = 0
    result = gradients(case)
    for name in ("dq", "dk", "dv", "dbeta"):
        assert not np.any(getattr(result, name)[:, :11]), name
    assert not np.any(result.dg[:, :12])
    assert not np.any(result.dinitial_state)
    assert_gradients_close(result, exact_gradients(case))


# Splitting, options, and what is left out.


@all_scans
@pytest.mark.parametrize("cut", [0, 1, 6, 7, 19, 20])
def test_gradient_of_the_parts_is_the_gradient_of_the_whole(isa, rule, decay, cut):
    """The state goes forward from part to part, its gradient comes back."""
    case = make_case(rule, decay, T=20, V=20, dtype=np.float64)
    first, second = (case.at(span) for span in (slice(None, cut), slice(cut, None)))
    second = second.but(initial_state=scan(first)[1])
    after = gradients(second)
    before = gradients(first.but(dfinal_state=after.dinitial_state))
    whole = gradients(case)
    for name in ("dq", "dk", "dv", "dbeta", "dg"):
        x, y, z = (getattr(part, name) for part in (before, after, whole))
        assert (z is None) == (x is None)
        if z is not None:
            assert relative_error(np.concatenate([x, y], axis=1), z) < 1e-12, name
    assert relative_error(before.dinitial_state, whole.dinitial_state) < 1e-12


@all_scans
def test_finite_future_does_not_reach_back(isa, rule, decay):
    """With a loss on the first 9 outputs only, later tokens change no gradient and have none."""
    case = make_case(rule, decay, T=20, V=20)
    case.do[:, 9:] = 0
    case.dfinal_state[...] = 0
    other = make_case(rule, decay, T=20, V=20, seed=1)
    changed = case.but(
        **{
            name: np.concatenate([x[:, :9], getattr(other, name)[:, 9:]], axis=1)
            for name, x in case.arrays.items()
            if name in ("q", "k", "v", "beta", "g")
        }
    )
    x, y = gradients(case), gradients(changed)
    for name in ("dq", "dk", "dv", "dbeta", "dg"):
        if getattr(x, name) is not None:
            assert not np.any(getattr(x, name)[:, 9:]), name
            assert relative_error(getattr(y, name)[:, :9], getattr(x, name)[:, :9]) < 1e-6, name


@all_scans
def test_results_land_in_the_given_gradients(isa, rule, decay):
    """Prefilled with NaN: an element that is not written, or added to, shows."""
    case = make_case(rule, decay, T=17, V=21, heads=(4, 2, 1))
    expected = gradients(case)
    out = fwp.Gradients(*(None if x is None else np.full_like(x, np.nan) for x in expected))
    result = gradients(case, out=out)
    for x, y in zip(result, out, strict=True):
        assert x is y
    assert_gradients_bits_equal(out, expected)


@pytest.mark.parametrize("rule", RULES)
def test_absent_inputs_have_no_gradient(isa, rule):
    case = make_case(rule, state=False, beta=False)
    result = gradients(case)
    assert result._fields == ("dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
    assert result.dg is None
    assert result.dinitial_state is None
    assert (result.dbeta is None) == (rule == "linear")
    gradients_are_the_oracles(case)


@all_scans
def test_no_final_gradient_is_a_zero_one(isa, rule, decay):
    case = make_case(rule, decay, T=20)
    zeros = case.but(dfinal_state=np.zeros_like(case.dfinal_state))
    assert_gradients_bits_equal(gradients(case.but(dfinal_state=None)), gradients(zeros))


@all_scans
def test_only_the_final_state_is_used(isa, rule, decay):
    case = make_case(rule, decay, T=14, V=9)
    gradients_are_the_oracles(case.but(do=np.zeros_like(case.do)))


def test_gradient_at_beta_zero(isa):
    """dbeta needs the error, which cannot be got back from what was written when beta is 0."""
    case = make_case("delta", "scalar", T=20, dtype=np.float64)
    case.beta[:, ::2] = 0
    gradients_are_the_oracles(case)
    assert np.all(gradients(case).dbeta[:, ::2] != 0)


@pytest.mark.parametrize("name", ["B", "T", "heads", "K", "V"])
@all_scans
def test_zero_sizes(rule, decay, name):
    case = make_case(rule, decay, **{name: (0, 0, 0) if name == "heads" else 0})
    result, exact = gradients(case), exact_gradients(case)
    for x, y in zip(result, exact, strict=True):
        if y is not None:
            assert_bits_equal(x + np.float32(0), y.astype(np.float32) + np.float32(0))
    if name == "T":
        assert_bits_equal(result.dinitial_state, case.dfinal_state)


@all_scans
def test_packed_sequences_are_a_loop_over_sequences(isa, rule, decay):
    case = make_case(rule, decay, lengths=(7, 0, 1, 13, 6), heads=(2, 1, 2), V=40)
    whole = gradients(case)
    for n, (start, end) in enumerate(zip(case.cu_seqlens[:-1], case.cu_seqlens[1:], strict=True)):
        alone = case.at(slice(start, end)).but(
            initial_state=case.initial_state[n : n + 1],
            dfinal_state=case.dfinal_state[n : n + 1],
            cu_seqlens=None,
        )
        part = fwp.Gradients(
            *(None if x is None else x[:, start:end] for x in whole[:5]),
            whole.dinitial_state[n : n + 1],
        )
        assert_gradients_bits_equal(gradients(alone), part)


@all_scans
def test_inputs_are_not_changed(isa, rule, decay):
    case = make_case(rule, decay, T=20)
    frozen = case.map(np.copy)
    for x in frozen.arrays.values():
        x.flags.writeable = False
    scan(frozen)
    gradients(frozen)
    for name, x in frozen.arrays.items():
        assert_bits_equal(x, getattr(case, name), name)
