"""Gates of any size: what the recurrence can compute, the blocks must compute as well.

Inside a block decays are multiplied up before they meet a state. These tests take gates whose products over a
block leave the range of the arithmetic although no state ever does.
"""

import numpy as np
import pytest
from cases import PRECISE, RULES, exact_gradients, exact_scan, gradients, make_case, scan, step
from tolerances import relative_error

import fwp_core as fwp

# For float32; float64 takes ten times as much.
UP_AND_DOWN = [
    [16.0] * 5,
    [50.0, 50.0, -50.0, -50.0, 0.0, 0.0, 0.0],
    [-80.0, 80.0, -80.0, 80.0, -80.0, 80.0, -1.0],
    [-17.5] * 8,
    [-29.0, -29.0, -29.0, 40.0, 40.0, -30.0, -30.0, -30.0, -30.0],
    [-np.inf, 70.0, -np.inf, -70.0, 70.0, 10.0],
    [-61.0, -1.0, 59.0, 2.0, -120.0, 3.0, 3.0, 3.0],
]


def with_gates(rule, decay, dtype, gates, **sizes):
    """A case of one head whose gates are given, with channels that take them in another order."""
    gates = np.array(gates, dtype) * (10 if dtype == np.float64 else 1)
    sizes = {"K": 7, "V": 20, "heads": (1, 1, 1)} | sizes
    case = make_case(rule, decay, B=1, T=len(gates), dtype=dtype, **sizes)
    if decay == "scalar":
        g = gates.reshape(1, -1, 1)
    else:
        g = np.zeros(case.g.shape, dtype)
        for channel in range(g.shape[-1]):
            g[0, :, 0, channel] = gates if channel % 2 else 0
    return case.but(g=g, initial_state=None, dfinal_state=None)


def token_by_token(case):
    state = case.first_state()
    return np.stack([step(case, t, state) for t in range(case.v.shape[1])], axis=1), state


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("dtype", PRECISE)
@pytest.mark.parametrize("attention_norm", [False, True])
@pytest.mark.parametrize("gates", UP_AND_DOWN, ids=str)
def test_blocks_keep_what_steps_keep(isa, rule, decay, dtype, gates, attention_norm):
    case = with_gates(rule, decay, dtype, gates, attention_norm=attention_norm)
    case.k[:, :2] = 0  # nothing is stored while the first gates would let it grow
    for blocks, steps in zip(scan(case), token_by_token(case), strict=True):
        assert np.array_equal(np.isfinite(blocks), np.isfinite(steps))
        finite = np.isfinite(steps)
        assert relative_error(blocks[finite], steps[finite]) < (1e-13 if dtype == np.float64 else 1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("gates", UP_AND_DOWN[3:5], ids=str)
def test_gradients_under_such_gates(isa, rule, decay, gates):
    case = with_gates(rule, decay, np.float32, gates)
    exact = exact_gradients(case)
    for name, x, y in zip(exact._fields, gradients(case), exact, strict=True):
        if y is not None:
            assert relative_error(x, y) < 1e-4, name


@pytest.mark.parametrize("gate", [-10.0, -16.7, -17.5, -19.0])
def test_a_large_state_that_only_decays(isa, gate):
    """beta = 0: the state is multiplied by exp(g) at every token and by nothing else."""
    shape = (1, 6, 1, 5)
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    start = np.full((1, 1, 5, 5), 1e20, np.float32)
    g = np.full(shape[:3], gate, np.float32)
    beta = np.zeros(shape[:3], np.float32)
    _, final = fwp.delta_rule(q, k, v, beta, g, initial_state=start)
    exact = 1e20 * np.exp(6 * np.float64(gate))
    assert np.all(np.abs(final / exact - 1) < 1e-5)
    dfinal = np.ones_like(start)
    grads = fwp.delta_rule_backward(
        np.zeros_like(v), q, k, v, beta, g, initial_state=start, dfinal_state=dfinal
    )
    assert np.all(np.abs(grads.dg / (25 * exact) - 1) < 1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("K", [5, 16])
@pytest.mark.parametrize(("reset", "t"), [(0, 2), (4, 2), (6, 2), (4, 5), (6, 6)])
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g", "initial_state", "do", "dfinal_state"])
@pytest.mark.parametrize("attention_norm", [False, True])
def test_nan_and_resets_together(isa, rule, decay, K, reset, t, name, attention_norm):
    """One NaN on either side of a reset reaches exactly the results that the oracle says."""
    case = make_case(rule, decay, T=10, heads=(1, 1, 1), K=K, V=5, attention_norm=attention_norm)
    case.g[:, reset] = -np.inf
    x = getattr(case, name)
    if x is None:
        pytest.skip("absent")
    states = name in ("initial_state", "dfinal_state")
    index = (0, 0, 0, 0) if states else (0, t) + (0,) * (x.ndim - 2)
    x[index] = np.nan
    results = (*scan(case), *gradients(case))
    exact = (*exact_scan(case), *exact_gradients(case))
    for i, (actual, expected) in enumerate(zip(results, exact, strict=True)):
        if expected is not None:
            assert np.array_equal(np.isnan(actual), np.isnan(expected)), i


@pytest.mark.parametrize("decay", ["none", "channel"])
@pytest.mark.parametrize("T", [1, 2, 7])
def test_large_states_of_short_sequences_cost_little(decay, T):
    """What backward needs is bounded by the length of the sequence, not by the size of the state alone."""
    case = make_case("delta", decay, B=1, T=T, heads=(1, 1, 1), K=1024, V=600)
    exact = exact_gradients(case)
    for name, x, y in zip(exact._fields, gradients(case), exact, strict=True):
        if y is not None:
            assert relative_error(x, y) < 1e-5, name


@pytest.mark.parametrize("rule", RULES)
def test_endless_time_without_anything_in_it(rule):
    """Arrays of no bytes: a huge T is no work."""
    T = 1 << 40
    x = np.zeros((1, T, 0, 4), np.float32)
    row = np.zeros((1, T, 0), np.float32)
    grads = gradients(
        make_case(rule).but(q=x, k=x, v=x, beta=row, do=x, initial_state=None, dfinal_state=None)
    )
    assert grads.dq.shape == x.shape
    if rule == "linear":
        x = np.zeros((1, T, 1, 0), np.float32)
        grads = fwp.linear_attention_backward(x, x, x, x)
        assert grads.dv.shape == x.shape


@pytest.mark.parametrize("rule", RULES)
def test_more_value_tiles_than_shares(isa, rule):
    """Very wide values: partial sums are added in one fixed order, whatever the threads."""
    case = make_case(rule, "scalar", B=1, T=9, heads=(2, 1, 2), K=5, V=1100)
    exact = exact_gradients(case)
    results = []
    for threads in (1, 2, 8):
        with fwp.threads(threads):
            results.append(gradients(case))
    for name, x, y in zip(exact._fields, results[0], exact, strict=True):
        assert relative_error(x, y) < 1e-5, name
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert x.tobytes() == y.tobytes()
