"""Profiles of the property tests, and the fixture that runs a test at every instruction set level."""

import os

import pytest
from hypothesis import HealthCheck, settings

import fwp_core as fwp

# The only fixture used with @given chooses the level, which need not be reset for each example.
_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("dev", max_examples=40, **_COMMON)
settings.register_profile("nightly", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(params=fwp.available_isas())
def isa(request):
    """Run the test at each level; fail if the code asked for is not the code that ran."""
    level = request.param
    before = fwp._core.isa_calls(level)
    with fwp.use_isa(level):
        yield level
    assert fwp._core.isa_calls(level) > before, f"no call ran at {level}"
