"""Forward scans against the oracle: every rule, decay, size and option, at every instruction set level."""

import numpy as np
import pytest
from cases import DECAYS, DTYPES, RULES, exact_scan, make_case, scan
from checks import scan_is_the_oracles
from hypothesis import given
from strategies import cases
from tolerances import TOLERANCE, assert_bits_equal, relative_error


@given(case=cases())
def test_matches_oracle(isa, case):
    scan_is_the_oracles(case)


@pytest.mark.slow
@given(case=cases(sizes=(2, 7, 63, 65, 127, 128, 129, 255, 257)))
def test_matches_oracle_at_large_sizes(isa, case):
    scan_is_the_oracles(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_value_size_and_remainder_of_time(isa, rule, dtype):
    """V through every width of a tile and its tail, T through every remainder of a block."""
    for V in range(1, 70):
        scan_is_the_oracles(
            make_case(rule, "scalar", B=1, T=V % 14, heads=(1, 1, 1), K=1 + V % 9, V=V, dtype=dtype)
        )


@pytest.mark.parametrize("decay", DECAYS)
def test_every_key_size(isa, decay):
    for K in range(1, 70):
        scan_is_the_oracles(make_case("delta", decay, B=1, T=7, heads=(1, 1, 1), K=K, V=1 + K % 5))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_float32_error_at_length_4096(isa, rule, decay):
    """The promise: 2e-6 relative, nothing added to the denominator."""
    case = make_case(rule, decay, B=1, T=4096, heads=(2, 2, 2), K=64, V=64, seed=3)
    for x, y in zip(scan(case), exact_scan(case), strict=True):
        assert relative_error(x, y) < TOLERANCE["forward", "float32"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("decay", "gate"), [("scalar", "strong"), ("channel", "mixed"), ("channel", "reset")]
)
def test_strong_gates_over_many_tokens(isa, rule, decay, gate):
    """Prefix sums of log decays would lose the mild gates beside those of -1e4."""
    case = make_case(rule, decay, B=1, T=700, heads=(1, 1, 1), K=24, V=20, gate=gate)
    for x, y in zip(scan(case), exact_scan(case), strict=True):
        assert relative_error(x, y) < TOLERANCE["forward", "float32"]


@pytest.mark.parametrize("name", ["B", "T", "heads", "K", "V"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rule", RULES)
def test_zero_sizes(rule, decay, name):
    case = make_case(rule, decay, **{name: (0, 0, 0) if name == "heads" else 0})
    o, final_state = scan(case)
    exact_o, exact_state = exact_scan(case)
    assert_bits_equal(o, exact_o.astype(np.float32))
    assert_bits_equal(final_state, exact_state.astype(np.float32))
    if name == "T":
        assert_bits_equal(final_state, case.initial_state)


@pytest.mark.parametrize("name", ["B", "T", "heads", "K", "V"])
def test_zero_sizes_without_state(name):
    case = make_case("delta", **{name: (0, 0, 0) if name == "heads" else 0}, state=False)
    o, final_state = scan(case)
    assert not np.any(o)
    assert not np.any(final_state)


def test_no_packed_sequence_at_all():
    case = make_case("delta", lengths=(), heads=(1, 1, 1))
    o, final_state = scan(case)
    assert o.shape == (1, 0, 1, 16)
    assert final_state.shape == (0, 1, 16, 16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", DECAYS)
def test_no_state_is_a_zero_state(isa, rule, decay):
    case = make_case(rule, decay, T=20, V=33, state=False)
    zeros = case.but(initial_state=np.zeros((2, 2, 16, 33), np.float32))
    for x, y in zip(scan(case), scan(zeros), strict=True):
        assert_bits_equal(x, y)


@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_are_a_loop_over_sequences(isa, rule):
    lengths = (7, 0, 1, 13, 6)
    case = make_case(rule, "channel", lengths=lengths, heads=(2, 1, 2), V=40)
    o, final_state = scan(case)
    for n, (start, end) in enumerate(zip(case.cu_seqlens[:-1], case.cu_seqlens[1:], strict=True)):
        part = {name: getattr(case, name)[:, start:end] for name in ("q", "k", "v", "beta", "g", "do")}
        alone = case.but(**part, initial_state=case.initial_state[n : n + 1], cu_seqlens=None)
        alone_o, alone_state = scan(alone)
        assert_bits_equal(o[:, start:end], alone_o)
        assert_bits_equal(final_state[n : n + 1], alone_state)


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint8])
def test_any_integers_are_cu_seqlens(kind):
    case = make_case("delta", lengths=(3, 0, 4))
    cu_seqlens = case.cu_seqlens.tolist()
    cu_seqlens = kind(cu_seqlens) if kind in (list, tuple) else np.array(cu_seqlens, kind)
    for x, y in zip(scan(case.but(cu_seqlens=cu_seqlens)), scan(case), strict=True):
        assert_bits_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_land_in_the_given_arrays(isa, dtype):
    """Prefilled with NaN: an element that is not written shows."""
    case = make_case("delta", "scalar", T=17, V=21, dtype=dtype)
    out, final = np.full_like(case.do, np.nan), np.full_like(case.initial_state, np.nan)
    o, final_state = scan(case, out=out, final_state_out=final)
    assert o is out
    assert final_state is final
    for x, y in zip((out, final), scan(case), strict=True):
        assert_bits_equal(x, y)


def test_beta_of_ones_is_no_beta(isa):
    case = make_case("linear", beta=False, T=15, V=20)
    ones = case.but(beta=np.ones((2, 15, 2), np.float32))
    for x, y in zip(scan(case), scan(ones), strict=True):
        assert_bits_equal(x, y)


def test_same_array_as_query_and_key(isa):
    case = make_case("delta", T=9)
    for x, y in zip(scan(case.but(q=case.k)), scan(case.but(q=case.k.copy())), strict=True):
        assert_bits_equal(x, y)
