"""What must hold whatever the numbers: time, batch, algebra, exact small cases, and where NaN may go."""

import ml_dtypes
import numpy as np
import pytest
from cases import (
    DECAYS,
    DTYPES,
    PER_TOKEN,
    PRECISE,
    RULES,
    exact_gradients,
    exact_scan,
    gradients,
    make_case,
    scan,
)
from hypothesis import given
from strategies import cases
from tolerances import REORDERED, assert_bits_equal, assert_gradients_bits_equal, relative_error

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])


def per_token(case):
    return {name: x for name, x in case.arrays.items() if name in PER_TOKEN}


# Time.


@all_scans
@pytest.mark.parametrize("poison", [None, np.nan, np.inf, -np.inf])
def test_the_past_does_not_see_the_future(isa, rule, decay, poison):
    """Outputs up to t keep their bits whatever comes after t; -inf makes resets of the gates."""
    case = make_case(rule, decay, T=27, V=35, heads=(2, 1, 2))
    other = make_case(rule, decay, T=27, V=35, heads=(2, 1, 2), seed=1)
    o, _ = scan(case)
    for t in (0, 1, 4, 5, 6, 7, 11, 12, 13, 18, 25, 26):
        changed = case.map(np.copy)
        for name, x in per_token(changed).items():
            x[:, t + 1 :] = getattr(other, name)[:, t + 1 :] if poison is None else poison
        assert_bits_equal(scan(changed)[0][:, : t + 1], o[:, : t + 1], f"t={t}")


@all_scans
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_longer_sequence_begins_like_the_shorter(isa, rule, decay, dtype):
    case = make_case(rule, decay, T=50, V=19, dtype=dtype)
    o, _ = scan(case)
    for T in range(50):
        assert_bits_equal(scan(case.at(slice(T)))[0], o[:, :T], f"T={T}")


@given(case=cases(times=(2, 5, 6, 7, 12, 13, 31, 65), sizes=(1, 8, 17, 33), lengths=None, state=True))
def test_a_cut_sequence_continues_from_its_state(isa, case):
    T = case.v.shape[1]
    o, final_state = scan(case)
    for cut in sorted({0, 1, T // 2, T - 1, T}):
        first_o, state = scan(case.at(slice(cut)))
        second_o, end = scan(case.at(slice(cut, None)).but(initial_state=state))
        joined = np.concatenate([first_o, second_o], axis=1)
        assert relative_error(joined, o, floor=1.0) < REORDERED[o.dtype]
        assert relative_error(end, final_state, floor=1.0) < REORDERED[end.dtype]


# Batch and heads: a sequence has the same bits wherever it sits.


@all_scans
def test_permuted_batch_and_heads(isa, rule, decay):
    case = make_case(rule, decay, B=3, T=20, heads=(4, 4, 4), V=37)
    batch, heads = np.array([2, 0, 1]), np.array([3, 1, 0, 2])
    # The head axis is 2 in arrays per token and 1 in states.
    moved = case.but(
        **{
            name: x[batch][:, :, heads] if name in PER_TOKEN else x[batch][:, heads]
            for name, x in case.arrays.items()
        }
    )
    (o, state), (moved_o, moved_state) = scan(case), scan(moved)
    assert_bits_equal(moved_o, o[batch][:, :, heads])
    assert_bits_equal(moved_state, state[batch][:, heads])
    whole, permuted = gradients(case), gradients(moved)
    expected = [None if x is None else x[batch][:, :, heads] for x in whole[:5]]
    assert_gradients_bits_equal(permuted, fwp.Gradients(*expected, whole.dinitial_state[batch][:, heads]))


@all_scans
def test_one_sequence_alone_and_in_a_batch(isa, rule, decay):
    case = make_case(rule, decay, B=5, T=33, heads=(3, 3, 3), K=24, V=70)
    (o, state), whole = scan(case), gradients(case)
    b, h = 3, 1
    alone = case.but(
        **{
            name: x[b : b + 1, :, h : h + 1] if name in PER_TOKEN else x[b : b + 1, h : h + 1]
            for name, x in case.arrays.items()
        }
    )
    alone_o, alone_state = scan(alone)
    assert_bits_equal(alone_o, o[b : b + 1, :, h : h + 1])
    assert_bits_equal(alone_state, state[b : b + 1, h : h + 1])
    expected = [None if x is None else x[b : b + 1, :, h : h + 1] for x in whole[:5]]
    assert_gradients_bits_equal(
        gradients(alone), fwp.Gradients(*expected, whole.dinitial_state[b : b + 1, h : h + 1])
    )


@all_scans
@pytest.mark.parametrize("heads", [(6, 2, 3), (2, 2, 6), (1, 1, 4)], ids=str)
def test_grouped_heads_are_repeated_heads(isa, rule, decay, heads):
    """Forward bitwise; a gradient sums over its group. Heads with the same queries and keys share staging."""
    case = make_case(rule, decay, T=20, heads=heads, V=18)
    groups = {name: max(heads) // n for name, n in zip("qkv", heads, strict=True)}
    repeated = case.but(**{name: np.repeat(getattr(case, name), n, axis=2) for name, n in groups.items()})
    for x, y in zip(scan(case), scan(repeated), strict=True):
        assert_bits_equal(x, y)
    grouped, single = gradients(case), gradients(repeated)
    for name, n in groups.items():
        x, y = getattr(grouped, "d" + name), getattr(single, "d" + name)
        if n == 1:
            assert_bits_equal(x, y)
        else:
            summed = y.reshape(*x.shape[:3], n, -1).sum(axis=3)
            assert relative_error(x, summed) < REORDERED[x.dtype]


# Algebra.


def test_beta_zero_keeps_the_state(isa):
    for rule in RULES:
        case = make_case(rule, T=20, V=33)
        case.beta[...] = 0
        assert_bits_equal(scan(case)[1], case.initial_state)


def test_padding_by_beta_zero_and_gate_zero(isa):
    """The recipe for padded batches: the padding leaves the state as it is."""
    case = make_case("delta", "channel", T=20, V=33)
    case.beta[:, 12:] = 0
    case.g[:, 12:] = 0
    state, short = scan(case)[1], scan(case.at(slice(12)))[1]
    assert relative_error(state, short) < REORDERED[state.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_one_hot_keys_store_values_exactly(isa, rule, dtype):
    case = make_case(rule, B=1, T=16, heads=(1, 1, 1), K=16, V=37, state=False, dtype=dtype)
    keys = np.eye(16)[np.random.default_rng(0).permutation(16)].reshape(1, 16, 1, 16).astype(dtype)
    case = case.but(k=keys, q=keys, beta=np.ones((1, 16, 1), dtype))
    o, final_state = scan(case)
    assert_bits_equal(o, case.v)
    stored = case.v[0, keys[0, :, 0].astype(int).argmax(axis=0), 0]
    assert_bits_equal(final_state[0, 0], stored.astype(final_state.dtype))


def orthonormal_keys(case):
    """Keys of which no two within a head overlap (T <= K)."""
    B, T, H, K = case.k.shape
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((B, H, K, K)))[0][:, :, :T]
    return np.ascontiguousarray(basis.swapaxes(1, 2), case.k.dtype)


@pytest.mark.parametrize("dtype", PRECISE)
def test_delta_with_orthonormal_keys_is_linear(isa, dtype):
    case = make_case("delta", T=16, K=16, V=33, state=False, dtype=dtype)
    case = case.but(k=orthonormal_keys(case))
    for x, y in zip(scan(case), scan(case.but(rule="linear")), strict=True):
        assert relative_error(x, y) < REORDERED[x.dtype]


def test_rewriting_one_key_leaves_the_others(isa):
    """Appendix B of the paper: k1 and k2 orthonormal, then k3 = k2 is written with strength beta.

    The delta rule keeps v1 and mixes (1 - beta) v2 + beta v3 under k2. The gated rule
    W = (1 - beta) W + beta v k^T does the same for k2, and lets v1 fade to (1 - beta) v1.
    """
    beta = 0.25
    k = np.eye(4)[[0, 1, 1]].reshape(1, 3, 1, 4)
    v = np.random.default_rng(0).standard_normal((1, 3, 1, 5))
    strengths = np.array([1.0, 1.0, beta]).reshape(1, 3, 1)
    mixed = (1 - beta) * v[0, 1, 0] + beta * v[0, 2, 0]

    state = fwp.delta_rule(k, k, v, strengths)[1][0, 0]
    assert_bits_equal(state[0], v[0, 0, 0])
    np.testing.assert_allclose(state[1], mixed, rtol=1e-15)

    gate = np.array([0.0, 0.0, np.log1p(-beta)]).reshape(1, 3, 1)
    state = fwp.linear_attention(k, k, v, strengths, gate)[1][0, 0]
    np.testing.assert_allclose(state[0], (1 - beta) * v[0, 0, 0], rtol=1e-15)
    np.testing.assert_allclose(state[1], mixed, rtol=1e-15)


def test_error_after_the_write(isa):
    """Reading a key right after its write leaves the part 1 - beta |k|^2 of the error."""
    case = make_case("delta", B=1, T=1, heads=(1, 1, 1), K=16, V=20, dtype=np.float64)
    case = case.but(q=case.k)
    stored = np.einsum("nhkv,bthk->bthv", case.initial_state, case.k)
    left = case.v - scan(case)[0]
    np.testing.assert_allclose(left, (1 - case.beta[..., None]) * (case.v - stored), rtol=1e-12, atol=1e-14)


def test_writing_the_same_pair_twice(isa):
    """The delta rule stores it once, the linear rule adds it twice."""
    case = make_case("delta", B=1, T=1, heads=(1, 1, 1), K=8, V=8, state=False, dtype=np.float64)
    twice = case.map(lambda x: np.repeat(x, 2, axis=1)).but(beta=np.ones((1, 2, 1)))
    once = twice.at(slice(1))
    assert relative_error(scan(twice)[1], scan(once)[1]) < 1e-14
    linear = twice.but(rule="linear")
    assert_bits_equal(scan(linear)[1], 2 * scan(linear.at(slice(1)))[1])


@all_scans
def test_linear_in_values_and_state(isa, rule, decay):
    x = make_case(rule, decay, T=40, V=33, dtype=np.float64)
    y = make_case(rule, decay, T=40, V=33, dtype=np.float64, seed=1)
    other = x.but(v=y.v, initial_state=y.initial_state)
    both = x.but(v=x.v + 3 * y.v, initial_state=x.initial_state + 3 * y.initial_state)
    for a, b, c in zip(scan(x), scan(other), scan(both), strict=True):
        assert relative_error(a + 3 * b, c) < REORDERED[c.dtype]


@all_scans
@pytest.mark.parametrize("dtype", [*PRECISE, ml_dtypes.bfloat16])
@pytest.mark.parametrize("power", [-7, 9])
def test_scaled_by_powers_of_two(isa, rule, decay, dtype, power):
    """Values and state together, and queries, scale the result without rounding."""
    case = make_case(rule, decay, T=30, V=20, dtype=dtype)
    factor = dtype(2.0**power)
    o, state = scan(case)
    values = case.but(v=case.v * factor, initial_state=case.initial_state * factor)
    for x, y in zip(scan(values), (o * factor, state * factor), strict=True):
        assert_bits_equal(x, y)
    queries = scan(case.but(q=case.q * factor))
    assert_bits_equal(queries[0], o * factor)
    assert_bits_equal(queries[1], state)
    assert_bits_equal(scan(case.but(scale=float(factor)))[0], o * factor)


def test_distance_of_two_states_never_grows(isa):
    """I - beta k k^T contracts for unit keys and beta in [0, 2]."""
    case = make_case("delta", B=1, T=60, K=16, V=8)
    case.beta[...] *= 2
    other = case.but(initial_state=-case.initial_state)
    distance = np.inf
    for T in range(0, 61, 3):
        x, y = (scan(c.at(slice(T)))[1] for c in (case, other))
        now = np.linalg.norm(x - y)
        assert now <= distance * (1 + REORDERED[x.dtype])
        distance = now


# Small integers, where every intermediate is exact: no tolerance at all. Halves are rounded once.


def integer_case(rule, decay, dtype, *, T, K, V, seed, heads=(2, 1, 2)):
    """Keys with one or two entries of +-1 and beta such that I - beta k k^T never grows; gates 0 or -inf."""
    rng = np.random.default_rng(seed)
    case = make_case(rule, decay, B=1, T=T, heads=heads, K=K, V=V, dtype=dtype)
    case = case.map(lambda x: rng.integers(-3, 4, x.shape).astype(x.dtype))
    k = np.zeros(case.k.shape, dtype)
    for row in k.reshape(-1, K):
        row[rng.choice(K, min(K, 2), replace=False)] = rng.choice([-1, 1], min(K, 2))
    beta = rng.integers(0, 2, case.beta.shape).astype(dtype)
    g = None if case.g is None else rng.choice([0.0, 0.0, 0.0, -np.inf], case.g.shape).astype(dtype)
    return case.but(k=k, beta=beta, g=g)


@all_scans
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(isa, rule, decay, dtype):
    for T, K, V in ((1, 1, 1), (5, 3, 16), (6, 16, 17), (7, 5, 31), (13, 17, 65), (40, 33, 48)):
        case = integer_case(rule, decay, dtype, T=T, K=K, V=V, seed=T)
        for x, y in zip(scan(case), exact_scan(case), strict=True):
            assert np.max(np.abs(y), initial=0) < 2**20
            with np.errstate(over="ignore"):
                assert np.array_equal(x, y.astype(x.dtype)), (T, K, V)


# NaN and Inf are data: they reach what depends on them, and nothing else.


@all_scans
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "initial_state"])
def test_one_poisoned_element_reaches_what_the_oracle_says(isa, rule, decay, poison, name):
    case = make_case(rule, decay, T=20, heads=(2, 1, 2), K=9, V=21)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        poisoned = case.map(np.copy)
        x = getattr(poisoned, name)
        x[tuple(rng.integers(0, n) for n in x.shape)] = poison
        for actual, exact in zip(scan(poisoned), exact_scan(poisoned), strict=True):
            assert np.array_equal(np.isfinite(actual), np.isfinite(exact)), seed
            finite = np.isfinite(exact)
            assert relative_error(actual[finite], exact[finite]) < 2e-6, seed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_gate(isa, rule, decay, poison):
    case = make_case(rule, decay, T=20, heads=(2, 1, 2), K=9, V=21)
    case.g[(1, 8, 1) if decay == "scalar" else (1, 8, 1, 3)] = poison
    for actual, exact in zip(scan(case), exact_scan(case), strict=True):
        assert np.array_equal(np.isfinite(actual), np.isfinite(exact))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_a_reset_clears_even_nan(isa, rule, decay):
    """g = -inf: the state is 0 whatever it was."""
    case = make_case(rule, decay, T=20, V=21)
    case.g[:, 8] = -np.inf
    poisoned = case.map(np.copy)
    poisoned.v[:, 5] = np.nan
    o, state = scan(poisoned)
    clean_o, clean_state = scan(case)
    assert np.isnan(o[:, 5:8]).all()
    assert relative_error(o[:, 8:], clean_o[:, 8:]) < 2e-6
    assert relative_error(state, clean_state) < 2e-6


@all_scans
@pytest.mark.parametrize("name", ["do", "v"])
def test_nan_flows_back_in_time_only_and_stays_in_its_head(isa, rule, decay, name):
    case = make_case(rule, decay, B=2, T=20, heads=(2, 2, 2), K=9, V=21)
    poisoned = case.map(np.copy)
    getattr(poisoned, name)[1, 8, 0, 4] = np.nan
    result, clean = gradients(poisoned), gradients(case)
    for field in ("dq", "dk", "dv", "dbeta", "dg"):
        x, y = getattr(result, field), getattr(clean, field)
        if x is None:
            continue
        assert np.isfinite(x[0]).all(), field
        assert np.isfinite(x[1, :, 1]).all(), field
        if name == "do":
            assert np.isfinite(x[1, 9:]).all(), field
            assert relative_error(x[1, 9:], y[1, 9:]) < 8e-6, field
    if name == "do":
        assert np.isnan(result.dq[1, 8, 0]).all()
        assert np.isnan(result.dv[1, :9, 0, 4]).all()
        assert np.isnan(result.dinitial_state[1, 0, :, 4]).all()
        assert np.isfinite(np.delete(result.dinitial_state[1, 0], 4, axis=1)).all()


@all_scans
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g", "initial_state", "do", "dfinal_state"])
def test_one_nan_reaches_the_gradients_that_the_oracle_says(isa, rule, decay, name):
    case = make_case(rule, decay, T=20, heads=(2, 1, 2), K=9, V=21)
    if getattr(case, name) is None:
        name = "q"
    for seed in range(3):
        rng = np.random.default_rng(seed)
        poisoned = case.map(np.copy)
        x = getattr(poisoned, name)
        x[tuple(rng.integers(0, n) for n in x.shape)] = np.nan
        exact = exact_gradients(poisoned)
        for field, x, y in zip(exact._fields, gradients(poisoned), exact, strict=True):
            if y is not None:
                wrong = np.count_nonzero(np.isnan(x) != np.isnan(y))
                assert wrong == 0, f"{field}, seed {seed}: {wrong} of {y.size}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_kept(isa, dtype):
    """Nothing flushes to zero, in results or in the state of the processor after the call."""
    case = make_case("linear", beta=False, state=False, dtype=dtype)
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    v = np.full_like(case.v, 4 * tiny)
    k = np.zeros_like(case.k)
    k[..., 0] = 1
    o, _ = scan(case.but(v=v, k=k, q=k))
    steps = np.arange(1, 14).reshape(1, 13, 1, 1).astype(dtype)
    assert_bits_equal(o, np.broadcast_to(steps * (4 * tiny), o.shape))
    assert np.all(dtype(tiny) * dtype(1) > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_not_unit_diverge_as_the_recurrence_does(isa, dtype):
    """Gaussian keys, beta 0.5: overflow comes at the oracle's step, give or take one token."""
    K, T = 64, 1000 if dtype is np.float64 else 120
    case = make_case("delta", B=1, T=T, heads=(1, 1, 1), K=K, V=8, dtype=dtype, state=False)
    keys = np.random.default_rng(0).standard_normal(case.k.shape).astype(dtype)
    case = case.but(k=keys, beta=np.full_like(case.beta, 0.5))
    o = scan(case)[0][0, :, 0]
    exact = exact_scan(case)[0][0, :, 0]
    largest = float(ml_dtypes.finfo(dtype).max)
    finite, exactly = (np.argmin((np.abs(x) < largest).all(axis=-1)) for x in (o, exact))
    assert 0 < exactly < T
    assert abs(int(finite) - int(exactly)) <= 1
