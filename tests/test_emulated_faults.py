"""What only kernels can find wrong is reported later, in the name of the call that it was found in."""

import re

import numpy as np
import pytest
from cases import RULES, gradients, make_case, scan, steps
from device import DeviceArray, ExchangeArray
from tolerances import assert_bits_equal

import fwp_core as fwp

pytestmark = pytest.mark.usefixtures("emulated")

NAME = {"linear": "linear_attention", "delta": "delta_rule"}
OFFSETS = (
    ", an earlier call: cu_seqlens: expected offsets that start with 0, never fall and end with T; "
    "others were clamped"
)
SLOTS = (
    ", an earlier call: state_indices: expected slots from 0 to S-1, or -1 for none; "
    "sequences with others were left out"
)
every_rule = pytest.mark.parametrize("rule", RULES)
every_framework = pytest.mark.parametrize(
    "framework", [DeviceArray, ExchangeArray], ids=["capsules", "exchange"]
)
# What kernels make of offsets that cannot be those of five tokens.
CLAMPED = {
    (0, 3, 2, 5): (0, 3, 3, 5),
    (1, 2, 3, 5): (0, 2, 3, 5),
    (0, 2, 9, 5): (0, 2, 5, 5),
    (0, 2, 3, 4): (0, 2, 3, 5),
    (-1, -7, 3, 6): (0, 0, 3, 5),
    (7, 9, -1, 0): (0, 5, 5, 5),
}


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    fwp.check_device()


def packed(rule, offsets, framework=DeviceArray):
    """A case of five tokens, with offsets on the device."""
    there = make_case(rule, "scalar", lengths=(2, 1, 2), K=8, V=8).map(framework)
    return there.but(cu_seqlens=framework(np.array(offsets)))


def reported(message):
    """Once."""
    with pytest.raises(fwp.CudaError, match=f"^{re.escape(message)}$"):
        fwp.check_device(np.int64(0))
    fwp.check_device()


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            assert_bits_equal(x.x, y.x)


@pytest.mark.parametrize("wrong", CLAMPED, ids=str)
@every_framework
@every_rule
def test_offsets_are_clamped(rule, framework, wrong):
    found = scan(packed(rule, wrong, framework))
    reported(NAME[rule] + OFFSETS)
    assert_same(found, scan(packed(rule, CLAMPED[wrong], framework)))


def test_those_of_gradients():
    wrong, clamped = next(iter(CLAMPED.items()))
    found = gradients(packed("delta", wrong))
    reported("delta_rule_backward" + OFFSETS)
    assert_same(found, gradients(packed("delta", clamped)))


def test_those_of_a_diagnosis():
    wrong, clamped = next(iter(CLAMPED.items()))

    def probes(offsets):
        x = packed("delta", offsets)
        return fwp.diagnose(fwp.delta_rule, x.q, x.k, x.v, x.beta, cu_seqlens=x.cu_seqlens).probes()

    found = probes(wrong)
    reported("diagnose" + OFFSETS)
    for name, probe in probes(clamped).items():
        np.testing.assert_array_equal(found[name], probe, name)


def test_those_of_many_sequences():
    offsets = np.arange(0, 1001, 2)
    wrong = offsets.copy()
    wrong[300] = 0
    case = make_case("linear", lengths=(2,) * 500, K=3, V=1).map(DeviceArray)
    found = scan(case.but(cu_seqlens=DeviceArray(wrong)))
    reported("linear_attention" + OFFSETS)
    offsets[300] = offsets[299]
    assert_same(found, scan(case.but(cu_seqlens=DeviceArray(offsets))))


@every_rule
def test_an_offset_without_sequences(rule):
    with pytest.raises(fwp.ArgumentError, match="^cu_seqlens: expected it to end with T=5, got one offset$"):
        scan(packed(rule, [0]))
    empty = make_case(rule, lengths=(), K=8, V=8).map(DeviceArray)
    o, state = scan(empty.but(cu_seqlens=DeviceArray(np.array([3]))))
    reported(NAME[rule] + OFFSETS)
    assert o.x.size == state.x.size == 0


@every_framework
@every_rule
def test_slots_leave_their_sequences_out(rule, framework):
    there = make_case(rule, B=2, T=2, K=8, V=8).map(framework)
    pool = framework(np.zeros((3, 2, 8, 8), np.float32))
    o = steps(there, pool, state_indices=framework(np.array([0, 3])))
    reported(f"{NAME[rule]}_step" + SLOTS)
    assert o.x[0].any()
    assert not o.x[1].any()
    assert pool.x[0].any()
    assert not pool.x[1:].any()


@every_rule
def test_the_next_call_reports_as_well(rule):
    scan(packed(rule, (0, 3, 2, 5)))
    with pytest.raises(fwp.CudaError, match=f"^{re.escape(NAME[rule] + OFFSETS)}$"):
        fwp.feature_maps.ReLU()(DeviceArray(np.ones((2, 3), np.float32)))


def test_which_device_is_asked():
    for device, error, message in [
        (-1, fwp.ArgumentError, "device: expected a number from 0 on, got -1"),
        (-(10**30), fwp.ArgumentError, f"device: expected a number from 0 on, got -1{30 * '0'}"),
        (10**30, fwp.CudaError, "cuda:65536: the emulator has the device cuda:0 only"),
        (0.0, fwp.DTypeError, "device: expected an integer, got float"),
    ]:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            fwp.check_device(device)
