"""A scan of a few tokens works in the memory of its last states, with the bits of a step."""

import numpy as np
import pytest

import fwp_core as fwp
from fwp_core.feature_maps import DPFP, ELU1

SCANS = {
    fwp.linear_attention: fwp.linear_attention_step,
    fwp.delta_rule: fwp.delta_rule_step,
}


def problem(T, H=3, K=20, V=40, B=2, dtype=np.float32, gate="none", seed=0):
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, T, H, K)).astype(dtype)
    v = rng.standard_normal((B, T, H, V)).astype(dtype)
    beta = rng.uniform(0.1, 1.9, (B, T, H)).astype(dtype)
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, K)}[gate]
    g = None if shape is None else -rng.exponential(0.3, shape).astype(dtype)
    if g is not None:
        g[0, T // 2, 0] = -np.inf
    return q, k, v, beta, g


@pytest.mark.parametrize(
    "V", [1, 31, 64, 100, 1024]
)  # rows of 1024 are whole pages, whose tiles pass through scratch
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 24])
@pytest.mark.parametrize("scan", SCANS)
def test_a_short_scan_is_a_step(isa, scan, T, V):
    q, k, v, beta, _ = inputs = problem(T, V=V)
    state = np.random.default_rng(1).standard_normal((2, 3, 20, V)).astype(np.float32)
    before = state.copy()
    last = np.full_like(state, np.nan)
    o, final_state = scan(*inputs, initial_state=state, final_state_out=last)
    assert final_state is last
    np.testing.assert_array_equal(state, before)
    stepped = SCANS[scan](q, k, v, beta, state=state)
    np.testing.assert_array_equal(o, stepped)
    np.testing.assert_array_equal(last, state)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
@pytest.mark.parametrize("scan", SCANS)
def test_options_and_gates(isa, scan, gate, dtype):
    q, k, v, beta, g = problem(4, dtype=dtype, gate=gate)
    wide = np.float64 if dtype == np.float64 else np.float32
    for options, channels, columns in (
        ({}, 20, 40),
        ({"feature_map": ELU1(), "attention_norm": True}, 20, 41),
        ({"feature_map": DPFP(nu=1), "qk_norm": "sum"}, 40, 40),
    ):
        if gate == "channel" and channels != 20:
            continue
        state = np.random.default_rng(2).uniform(0.1, 1, (2, 3, channels, columns)).astype(wide)
        o, last = scan(q, k, v, beta, g, initial_state=state, **options)
        np.testing.assert_array_equal(o, SCANS[scan](q, k, v, beta, g, state=state, **options))
        np.testing.assert_array_equal(last, state)


@pytest.mark.parametrize("scan", SCANS)
def test_last_states_of_any_strides_and_no_first_ones(isa, scan):
    inputs = problem(3)
    expected = scan(*inputs)
    pool = np.full((3, 2, 20, 2, 80), np.nan, np.float32)
    last = pool.transpose(1, 0, 2, 3, 4)[:, :, :, 1, 20:60]
    o, _ = scan(*inputs, final_state_out=last)
    np.testing.assert_array_equal(o, expected[0])
    np.testing.assert_array_equal(last, expected[1])
    assert np.isnan(pool).sum() == pool.size - last.size


@pytest.mark.parametrize("scan", SCANS)
def test_a_token_beside_longer_sequences(isa, scan):
    q, k, v, beta, _ = problem(70, B=1)
    first = np.random.default_rng(3).standard_normal((3, 3, 20, 40)).astype(np.float32)
    o, last = scan(q, k, v, beta, initial_state=first, cu_seqlens=[0, 1, 68, 70])
    for n, (begin, end) in enumerate([(0, 1), (1, 68), (68, 70)]):
        part = [x[:, begin:end] for x in (q, k, v, beta)]
        alone, state = scan(*part, initial_state=first[n : n + 1])
        np.testing.assert_array_equal(o[:, begin:end], alone)
        np.testing.assert_array_equal(last[n : n + 1], state)


@pytest.mark.parametrize("scan", SCANS)
def test_gradients_of_short_scans(scan):
    """vjp keeps checkpoints, and so works apart from its last states."""
    inputs = problem(3, dtype=np.float64, gate="scalar")
    (o, last), pullback = fwp.vjp(scan, *inputs)
    expected = scan(*inputs)
    np.testing.assert_array_equal(o, expected[0])
    np.testing.assert_array_equal(last, expected[1])
    backward = {fwp.linear_attention: fwp.linear_attention_backward, fwp.delta_rule: fwp.delta_rule_backward}
    for ours, theirs in zip(pullback(o, last), backward[scan](o, *inputs, dfinal_state=last), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scan", SCANS)
def test_first_and_last_states_still_may_not_overlap(scan):
    inputs = problem(1)
    state = np.ones((2, 3, 20, 40), np.float32)
    with pytest.raises(fwp.ArgumentError, match="overlap"):
        scan(*inputs, initial_state=state, final_state_out=state)
    np.testing.assert_array_equal(state, 1)
