"""Profiles of property tests, fixtures for instruction sets and for an emulated device, needed packages."""

import gc
import os
import re

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


@pytest.fixture(scope="session")
def emulated():
    """Skip the test where the CUDA back end is not the emulator, whose device memory is the host's."""
    state = fwp.show_config("dict")["cuda"]
    if state not in ("emulated", "available") and os.environ.get("FWP_CUDA_PLUGIN"):
        pytest.fail(f"FWP_CUDA_PLUGIN: expected a plugin that works, got one that is {state}")
    if state != "emulated":
        pytest.skip(f"CUDA is not emulated but {state}; FWP_CUDA_PLUGIN can name a plugin that is")


# What tests say that skip because a package is absent, or too old.
ABSENT = re.compile(r"could not import '|has __version__ |fla is not installed|no package here")


def pytest_addoption(parser):
    parser.addoption("--interop", action="store_true", help="skips for want of a package are errors")


def pytest_collection_finish():
    """Many tests collect garbage; there is none among the tests and the frameworks that they call."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--interop") or reporter is None:
        return
    skipped = [report for report in reporter.getreports("skipped") if ABSENT.search(str(report.longrepr))]
    if skipped:
        reporter.ensure_newline()
        for report in skipped:
            reporter.write_line(f"ERROR --interop: skipped {report.nodeid}: {report.longrepr[2]}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
