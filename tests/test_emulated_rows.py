"""Rows of features that are too large for a block's shared memory: the device has the results of the CPU."""

import numpy as np
import pytest
from device import DeviceArray
from tolerances import relative_error

import fwp_core as fwp

pytestmark = pytest.mark.usefixtures("emulated")

INPUTS = 4500  # and twice as many features


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_map_and_its_gradient(rng):
    phi = fwp.feature_maps.DPFP(nu=1)
    x, dy = (rng.standard_normal((3, n)).astype(np.float32) for n in (INPUTS, 2 * INPUTS))
    assert relative_error(phi(DeviceArray(x)).x, phi(x)) < 1e-6
    assert relative_error(phi.backward(DeviceArray(dy), DeviceArray(x)).x, phi.backward(dy, x)) < 1e-6


def test_a_scan_and_its_gradients(rng, monkeypatch):
    monkeypatch.setenv("FWP_SIMT_CHECK", "0")  # other tests look for faults in smaller scans
    options = {"feature_map": fwp.feature_maps.DPFP(nu=1), "qk_norm": "l2"}
    q, k = (rng.standard_normal((1, 1, 1, INPUTS)).astype(np.float32) for _ in "qk")
    v, do = (rng.standard_normal((1, 1, 1, 1)).astype(np.float32) for _ in "vo")
    there = [DeviceArray(x) for x in (do, q, k, v)]
    assert (
        relative_error(
            fwp.linear_attention(*there[1:], **options)[0].x, fwp.linear_attention(q, k, v, **options)[0]
        )
        < 1e-5
    )
    here = fwp.linear_attention_backward(do, q, k, v, **options)
    found = fwp.linear_attention_backward(*there, **options)
    for name in ("dq", "dk", "dv"):
        assert relative_error(getattr(found, name).x, getattr(here, name)) < 1e-5
