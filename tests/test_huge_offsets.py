"""Offsets beyond 2^31 and 2^32 elements, in memory that is reserved and hardly used.

A wrong offset reads zeros or dies, hence another process.
"""

import numpy as np
import pytest
from cases import DECAYS, RULES, STEP, gradients, make_case, scan
from memory import spread
from processes import run_python
from tolerances import assert_bits_equal, assert_gradients_bits_equal

import fwp_core as fwp

STRIDES = (2**31 + 64, 2**32 + 192, -(2**31) - 64)
AXES = {"B": 0, "T": 1, "H": 2}


def check_case(case, axis, stride):
    """Every tensor spread on one axis: inputs, states, outputs and gradients."""

    def far(x):
        return None if x is None else spread(x, axis, stride)

    expected, expected_gradients = scan(case), gradients(case)
    inputs = case.map(far)
    out, final = (far(np.full_like(x, np.nan)) for x in expected)
    scan(inputs, out=out, final_state_out=final)
    for x, y in zip((out, final), expected, strict=True):
        assert_bits_equal(x, y)
    grads = fwp.Gradients(*(None if x is None else far(np.full_like(x, np.nan)) for x in expected_gradients))
    gradients(inputs, out=grads)
    assert_gradients_bits_equal(grads, expected_gradients)


def check_step(case, axis, stride, tokens):
    token = [None if x is None else np.ascontiguousarray(x[:, tokens]) for x in case.inputs]
    state, o = case.initial_state.copy(), np.empty_like(case.do[:, tokens])
    STEP[case.rule](*token, state=state, out=o)
    # States have no time axis: their axis 1 are the heads.
    far_state = spread(case.initial_state, min(axis, 1), stride)
    far_o = spread(np.full_like(o, np.nan), axis, stride)
    token = [None if x is None else spread(x, axis, stride) for x in token]
    STEP[case.rule](*token, state=far_state, out=far_o)
    assert_bits_equal(far_o, o)
    assert_bits_equal(far_state, state)


def sweep(level, axis_name):
    axis = AXES[axis_name]
    with fwp.use_isa(level), fwp.threads(2):
        for stride in STRIDES:
            for rule in RULES:
                for decay in DECAYS:
                    case = make_case(rule, decay, B=3, T=3, heads=(3, 3, 3), K=5, V=18)
                    check_case(case, axis, stride)
            check_step(case, min(axis, 1), stride, tokens=0)
            check_step(case, axis, stride, tokens=slice(None))
    print("all found")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("level", fwp.available_isas())
def test_every_tensor_spread_over_reserved_memory(level, axis):
    try:
        spread(np.ones(3), 0, 2**34)
    except OSError:
        pytest.skip("this system does not reserve memory without backing it")
    done = run_python(f"import test_huge_offsets; test_huge_offsets.sweep({level!r}, {axis!r})")
    assert done.stdout.strip() == "all found", done.stderr


def test_packed_sequences_far_apart():
    """Offsets from cu_seqlens times a stride beyond 2^32."""
    try:
        spread(np.ones(3), 0, 2**34)
    except OSError:
        pytest.skip("this system does not reserve memory without backing it")
    case = make_case("delta", "scalar", lengths=(1, 0, 2), heads=(2, 2, 2), K=4, V=6)
    far = {name: spread(getattr(case, name), 1, 2**32 + 64) for name in ("q", "k", "v", "beta", "g", "do")}
    for x, y in zip(scan(case.but(**far)), scan(case), strict=True):
        assert_bits_equal(x, y)
    assert_gradients_bits_equal(gradients(case.but(**far)), gradients(case))
