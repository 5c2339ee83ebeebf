"""What kernels find wrong is reported by a later call, in the name of the one that it was found in."""

import re

import numpy as np
import pytest
from cases import gradients, make_case, scan, steps
from device import DeviceArray

import fwp_core as fwp

pytestmark = pytest.mark.usefixtures("emulated")

OFFSETS = "an earlier call: cu_seqlens: expected offsets that start with 0, never fall and end with T; "
SLOTS = "an earlier call: state_indices: expected slots from 0 to S-1, or -1 for none; "


def packed(rule, *, offsets=None):
    case = make_case(rule, lengths=(2, 1, 2), K=8, V=8)
    there = case.map(DeviceArray)
    return there if offsets is None else there.but(cu_seqlens=DeviceArray(np.array(offsets)))


def reported(message):
    """The next call, whichever it is, says so, and the one after it knows nothing of it."""
    with pytest.raises(fwp.CudaError, match=re.escape(message) + "$"):
        scan(packed("linear"))
    scan(packed("linear"))


@pytest.mark.parametrize(("rule", "name"), [("linear", "linear_attention"), ("delta", "delta_rule")])
def test_a_scan(rule, name):
    scan(packed(rule, offsets=[0, 3, 2, 5]))
    reported(f"{OFFSETS}{name} computed nothing")


def test_its_gradients():
    gradients(packed("delta", offsets=[1, 2, 3, 5]))
    reported(f"{OFFSETS}delta_rule_backward computed nothing")


def test_a_diagnosis():
    wrong = packed("delta", offsets=[0, 2, 9, 5])
    fwp.diagnose(fwp.delta_rule, wrong.q, wrong.k, wrong.v, wrong.beta, cu_seqlens=wrong.cu_seqlens)
    reported(f"{OFFSETS}diagnose computed nothing")


@pytest.mark.parametrize(("rule", "name"), [("linear", "linear_attention"), ("delta", "delta_rule")])
def test_a_step(rule, name):
    there = make_case(rule, B=2, T=2, K=8, V=8).map(DeviceArray)
    pool = DeviceArray(np.zeros((3, 2, 8, 8), np.float32))
    steps(there, pool, state_indices=DeviceArray(np.array([0, 3])))
    reported(f"{SLOTS}{name}_step left sequences with others out")
