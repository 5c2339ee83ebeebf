"""float16 and bfloat16: float32 inside, widened exactly where they are read, rounded once where written.

NumPy's own float16 and ml_dtypes' bfloat16 say what exactly and once mean, bit by bit. The conversions of
packs have tests of their own in tests/cpp/test_dtypes.cpp.
"""

import ml_dtypes
import numpy as np
import pytest
from cases import DECAYS, HALVES, RULES, STEP, gradients, make_case, scan
from checks import converted, is_float32_rounded_once
from hypothesis import given
from processes import run_python
from strategies import cases
from tolerances import assert_bits_equal, assert_gradients_bits_equal
from workspace import backward_workspace

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])
halves = pytest.mark.parametrize("dtype", HALVES)


def widened(case):
    return case.map(lambda x: converted(x, np.float32))


@given(case=cases(dtypes=HALVES))
def test_every_result_is_float32_rounded_once(isa, case):
    is_float32_rounded_once(case)


@halves
@all_scans
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_over_tiles_heads_and_threads_are_rounded_once(isa, rule, decay, dtype, threads):
    """Many value tiles, grouped heads, several checkpoints, and tiles shared out among threads."""
    with fwp.threads(threads):
        for heads in ((1, 1, 1), (4, 2, 1), (6, 6, 6)):
            case = make_case(rule, decay, B=1, T=170, heads=heads, K=33, V=150, dtype=dtype)
            is_float32_rounded_once(case)


@halves
@pytest.mark.parametrize("gate", ["strong", "reset", "mixed"])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_gates_in_half_precision(isa, decay, gate, dtype):
    """Resets and the lengths of blocks are those of the widened gates."""
    for K in (5, 16, 37):
        case = make_case("delta", decay, T=50, K=K, V=20, dtype=dtype, gate=gate)
        is_float32_rounded_once(case)


@halves
@all_scans
def test_a_step_is_float32_rounded_once(isa, rule, decay, dtype):
    case = make_case(rule, decay, heads=(4, 2, 1), K=17, V=33, dtype=dtype)
    results = []
    for one in (case, widened(case)):
        state = case.initial_state.copy()
        token = [None if x is None else x[:, 3] for x in one.inputs]
        results.append((STEP[rule](*token, state=state), state))
    (o, state), (wide_o, wide_state) = results
    assert o.dtype == dtype
    assert_bits_equal(o, converted(wide_o, dtype))
    assert_bits_equal(state, wide_state)


@halves
def test_vjp_of_halves(isa, dtype):
    case = make_case("delta", "scalar", T=200, heads=(4, 2, 1), K=40, V=70, dtype=dtype)
    (o, final_state), pullback = fwp.vjp(fwp.delta_rule, *case.inputs, **case.options)
    assert (o.dtype, final_state.dtype) == (dtype, np.float32)
    assert_gradients_bits_equal(pullback(case.do, case.dfinal_state), gradients(case))


# Every number there is.


def every_half(dtype):
    return np.arange(65536, dtype=np.uint16).view(dtype)


def plus_zero(x, dtype=np.float32):
    """-0 becomes +0, as in a sum with +0, and nothing else changes."""
    x = converted(x, np.float32)
    return converted(np.where(x == 0, np.float32(0), x), dtype)


@halves
@pytest.mark.parametrize("V", [65536, 1, 7, 19])
def test_every_half_goes_through_unchanged(isa, dtype, V):
    """One key of size 1 stores the value and reads it; V makes whole tiles or rows with an odd rest."""
    v = every_half(dtype)[: 65536 // V * V].reshape(-1, 1, 1, V)
    ones = np.ones((len(v), 1, 1, 1), dtype)
    o, final_state = fwp.linear_attention(ones, ones, v)
    assert_bits_equal(final_state, plus_zero(v))
    assert_bits_equal(o, plus_zero(v, dtype))


@halves
def test_every_half_as_key_and_query_and_strength_and_gate(isa, dtype):
    x = every_half(dtype)
    x = x[np.isfinite(converted(x, np.float32))].reshape(-1, 1, 1, 1)
    ones = np.ones_like(x)
    row, one_row = x[..., 0], ones[..., 0]
    assert_bits_equal(fwp.linear_attention(x, ones, ones)[0], plus_zero(x, dtype))
    assert_bits_equal(fwp.linear_attention(ones, x, ones)[0], plus_zero(x, dtype))
    assert_bits_equal(fwp.linear_attention(ones, ones, ones, row)[0], plus_zero(x, dtype))
    state = np.ones(x.shape, np.float32)
    o, _ = fwp.linear_attention(ones, ones, ones, one_row, row, initial_state=state)
    wide = [converted(y, np.float32) for y in (ones, ones, ones, one_row, row)]
    assert_bits_equal(o, converted(fwp.linear_attention(*wide, initial_state=state)[0], dtype))


def floats_worth_rounding(dtype):
    """Every half, the middle to the next one, the floats beside both, all float32 exponents, NaN payloads."""
    exact = converted(every_half(dtype), np.float32)
    exact = np.sort(exact[np.isfinite(exact)]).astype(np.float64)
    beyond = exact[-1] * (1 + np.array([2.0**-12, 2.0**-11, 2.0**-9, 2.0**-8]))
    near = converted(np.concatenate([exact, (exact[1:] + exact[:-1]) / 2, beyond]), np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    payloads = np.array([1, 0x1000, 0x1FFF, 0x2000, 0x3FFFFF, 0x400000, 0x7FFFFF], np.uint32)
    nan = np.concatenate([payloads | 0x7F800000, payloads | 0xFF800000]).view(np.float32)
    with np.errstate(all="ignore"):
        beside = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([near, *beside, random, nan])


@halves
def test_floats_are_rounded_as_numpy_does(isa, dtype):
    """A query of size 1 reads the initial state: o is the state, rounded."""
    state = floats_worth_rounding(dtype)
    v = np.zeros((1, 1, 1, state.size), dtype)
    one, zero = np.ones((1, 1, 1, 1), dtype), np.zeros((1, 1, 1, 1), dtype)
    o, final_state = fwp.linear_attention(one, zero, v, initial_state=state.reshape(v.shape))
    o, final_state = o.ravel(), final_state.ravel()
    assert_bits_equal(final_state, plus_zero(state))
    assert_bits_equal(o, plus_zero(state, dtype))
    nan = np.isnan(state)
    assert nan.any()
    assert np.array_equal(np.isnan(o), nan)
    assert np.array_equal(np.signbit(o[nan]), np.signbit(state[nan]))


# The types themselves.

WITHOUT_ML_DTYPES = """
import sys
import numpy as np
import fwp_core as fwp
x = np.ones((1, 3, 1, 4), np.float16)
o, _ = fwp.linear_attention(x, x, x)
fwp.reference.linear_attention(x, x, x)
print(o.dtype, "ml_dtypes" in sys.modules)
"""


def test_ml_dtypes_is_not_needed():
    assert run_python(WITHOUT_ML_DTYPES).stdout.split() == ["float16", "False"]


@pytest.mark.parametrize("other", ["V2", "u2", [("bfloat16", "u2")], ml_dtypes.float8_e5m2])
def test_two_bytes_are_not_enough_to_be_bfloat16(other):
    x = np.zeros((1, 3, 1, 4), other)
    with pytest.raises(fwp.DTypeError, match="^q: expected dtype .* float16 or bfloat16, got "):
        fwp.linear_attention(x, x, x)


def test_the_two_halves_do_not_mix():
    case = make_case("delta", dtype=np.float16)
    with pytest.raises(fwp.DTypeError, match="^k: expected dtype float16, got bfloat16$"):
        scan(case.but(k=case.k.astype(ml_dtypes.bfloat16)))
    with pytest.raises(fwp.DTypeError, match="^beta: expected dtype float16 or float32, got bfloat16$"):
        scan(case.but(beta=case.beta.astype(ml_dtypes.bfloat16)))
    with pytest.raises(fwp.DTypeError, match="^initial_state: expected dtype float32, got float16$"):
        scan(case.but(initial_state=case.initial_state.astype(np.float16)))


@halves
def test_the_reference_computes_in_float64(dtype):
    case = make_case("delta", "channel", dtype=dtype)
    wide = case.map(lambda x: x.astype(np.float64))
    for form in ("recurrence", "attention"):
        results = fwp.reference.delta_rule(*case.inputs, **case.options, form=form)
        expected = fwp.reference.delta_rule(*wide.inputs, **wide.options, form=form)
        for x, y in zip(results, expected, strict=True):
            assert_bits_equal(x, y)


# Memory: checkpoints and scratch are float32, so they weigh twice as much beside halves.


@halves
@pytest.mark.parametrize("heads", [(8, 8, 8), (8, 2, 2), (1, 1, 1)])
def test_extra_memory_of_long_scans_stays_below_30_percent(isa, heads, dtype):
    with fwp.threads(2):
        extra, arrays = backward_workspace(heads, 65536, 64, 64, dtype)
        scan(make_case("delta", T=1))  # the fixture wants a call
    assert extra < 0.3 * arrays
