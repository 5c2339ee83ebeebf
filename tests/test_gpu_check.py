"""scripts/gpu_check.sh without a GPU: steps run, fail, are stopped and skipped, and the rest goes on."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import gpu_packages

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="a script for Linux")


def run(*arguments, script=SCRIPT, cwd=None, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


def check(folder, *arguments, **options):
    """Status, and the summary's words by step."""
    result = run("--dry", "--output", folder, *arguments, **options)
    lines = (folder / "summary.txt").read_text().splitlines()
    assert result.stdout.endswith("\n".join(["== summary", *lines, ""]))
    return result.returncode, {line.split()[0]: line.split(" s  ")[1] for line in lines}


def test_it_is_a_script_of_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_steps_that_can_run_do(tmp_path):
    status, said = check(tmp_path, "--only", "machine,sanitizers")
    assert said["machine"] == "ok"
    if shutil.which("compute-sanitizer") is None:
        assert (status, said["sanitizers"]) == (0, "skipped: no compute-sanitizer here")
    assert "== machine\n" in (tmp_path / "log.txt").read_text()


def test_paths_are_the_callers(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    (tmp_path / "python").symlink_to(sys.executable)
    script = os.path.relpath(SCRIPT, tmp_path)
    only = ["--output", "report", "--only", "machine,packages"]
    result = run("--dry", *only, "wheels", script=script, cwd=tmp_path, PYTHON="./python")
    assert "FAILED with status 127" not in result.stdout
    assert re.search(r"^machine +\d+ s  ok$", result.stdout, re.MULTILINE)
    assert "broken" in (tmp_path / "report" / "log.txt").read_text()
    result = run("--dry", *only, "nowhere", script=script, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, f"no folder {tmp_path / 'nowhere'}\n")


# One that says and does what it is told for each tool, and takes note of its options.
SANITIZER = """#!/bin/bash
echo "$@" >>"$NOTES"
while [ $# -gt 1 ] && [ "$1" != --tool ]; do shift; done
declare -n said=SAYS_$2
[ "$said" != slow ] || exec sleep 60
[ "$said" != unsupported ] || { echo "Error: Device not supported" && exit 1; }
[ "$said" != error ] || exit 9
"""


@pytest.fixture
def sanitizers(tmp_path):
    """Run that step with a compute-sanitizer in which each tool does as it is told; what is said of it."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(0o755)

    def sanitizers(*more, **says):
        environment = {f"SAYS_{name}": word for name, word in says.items()}
        environment |= {"NOTES": str(tmp_path / "notes"), "PATH": f"{tool.parent}:{os.environ['PATH']}"}
        status, said = check(tmp_path / "report", *more, "--only", "sanitizers", **environment)
        return status, said["sanitizers"]

    return sanitizers


def test_each_sanitizer_is_reported(sanitizers, tmp_path):
    every = "memcheck ok, initcheck ok, synccheck ok, racecheck ok"
    assert sanitizers() == (0, f"ok: {every}")
    notes = (tmp_path / "notes").read_text()
    assert "--tool memcheck --leak-check full" in notes
    status, said = sanitizers(initcheck="error")
    assert (status, said) == (
        1,
        f"FAILED with status 1: {every.replace('initcheck ok', 'initcheck failed')}",
    )


def test_a_device_that_sanitizers_do_not_support_hides_no_failure(sanitizers):
    names = ("memcheck", "initcheck", "synccheck", "racecheck")
    every = dict.fromkeys(names, "unsupported")
    assert sanitizers(**every) == (0, "skipped: compute-sanitizer does not support this device")
    said = "memcheck failed, initcheck not supported, synccheck not supported, racecheck not supported"
    assert sanitizers(**every | {"memcheck": "error"}) == (1, f"FAILED with status 1: {said}")
    assert sanitizers(synccheck="unsupported") == (
        0,
        "ok: memcheck ok, initcheck ok, synccheck not supported, racecheck ok",
    )


def test_sanitizers_that_do_not_end_leave_time_to_the_others(sanitizers):
    # A step's seconds are shares of 530, so that this one has 11.
    status, said = sanitizers("--seconds", 85, memcheck="slow", synccheck="slow")
    assert status == 1
    pattern = "memcheck timed out after 2 s, initcheck ok, synccheck timed out after [23] s, racecheck ok"
    assert re.fullmatch(f"FAILED with status 1: {pattern}", said), said


# ---- packages ----


def wheel(folder, name, *requires, version="99.0"):
    """An empty one."""
    stem = f"{name.replace('-', '_')}-{version}"
    words = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    words += [f"Requires-Dist: {line}" for line in requires]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(words))
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")


NEEDED = {"cython", "cython-cmake", "hypothesis", "ninja", "pybind11", "scikit-build-core"}
PINNED = {"einops": "0.8.1", "fla-core": "0.6.0"}
NEEDS = {
    "fla-core": ["einops", "torch>=2.7; extra == 'cuda'"],
    "ml_dtypes": ["numpy>=1"],
    "pytest": ["colorama; sys_platform == 'win32'", "Pluggy>=1", "tomli; python_version < '3.11'"],
    "pluggy": ["deep>=2"],
    "deep": ["pytest"],
}


def test_wheels_are_collected_with_what_they_need(tmp_path):
    network = tmp_path / "network"
    network.mkdir()
    for name in {*NEEDED, *PINNED, *NEEDS}:
        wheel(network, name, *NEEDS.get(name, ()), version=PINNED.get(name, "99.0"))
    there = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(network)}
    result = run("--collect", "wheels", "3.12", cwd=tmp_path, **there)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {path.name for path in (tmp_path / "wheels").glob("*.whl")}
    assert found == {path.name for path in network.iterdir()}  # all, and torch and numpy were not asked for
    assert (tmp_path / "wheels" / "doctest.h").exists() == Path("/usr/include/doctest/doctest.h").exists()
    again = run("--collect", "wheels", "3.12", cwd=tmp_path, **there)
    assert again.returncode == 2
    assert "has wheels already" in again.stdout
    (network / "ninja-99.0-py3-none-any.whl").unlink()
    assert run("--collect", "others", cwd=tmp_path, **there).returncode != 0


def test_collecting_needs_a_folder():
    result = run("--collect")
    assert result.returncode == 2
    assert "scripts/gpu_check.sh --collect WHEELS" in result.stderr


def test_missing_packages_are_named(monkeypatch, capsys):
    asked = [gpu_packages.Requirement(line) for line in ("pytest>=8", "pybind99", "numpy>=99", "torch-free")]
    monkeypatch.setattr(gpu_packages, "wanted", lambda: asked)
    distribution = gpu_packages.metadata.distribution

    def without_pluggy(name):
        return distribution("no-" + name if name == "pluggy" else name)

    monkeypatch.setattr(gpu_packages.metadata, "distribution", without_pluggy)
    assert gpu_packages.check(["torch-free"]) == 1
    (said,) = capsys.readouterr().out.splitlines()
    here = distribution("numpy").version
    assert re.fullmatch(rf"missing: pybind99, numpy>=99 \(here: {re.escape(here)}\), pluggy\S+", said)
    monkeypatch.setattr(gpu_packages, "wanted", lambda: asked[:1])
    monkeypatch.setattr(gpu_packages.metadata, "distribution", distribution)
    assert gpu_packages.check([]) == 0
    assert capsys.readouterr().out == "missing: nothing\n"


def test_what_is_needed_of_packages():
    names = {requirement.name: str(requirement.specifier) for requirement in gpu_packages.wanted()}
    assert names.keys() == {*NEEDED, *PINNED, "pytest", "ml_dtypes", "torch", "triton", "numpy"}
    assert {name: names[name] for name in PINNED} == {k: f"=={v}" for k, v in PINNED.items()}


def test_every_test_of_a_gpu_is_run():
    (names,) = re.findall(r"tests/test_\{(.+?)\}\.py", SCRIPT.read_text())
    devices = {path.name for path in (ROOT / "tests").glob("test_cuda_*.py")} - {"test_cuda_build.py"}
    assert {f"test_{name}.py" for name in names.split(",")} == devices | {"test_gpu.py"}


@pytest.mark.parametrize(("seconds", "words"), [(0, "NOT RUN: no time left"), (5, "STOPPED after")])
def test_the_time_is_kept(tmp_path, seconds, words, monkeypatch):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    status, said = check(tmp_path / "report", "--seconds", seconds, "--only", "benchmark")
    assert status == 1
    assert said["benchmark"].startswith(words)


def test_an_unknown_option_shows_the_usage():
    result = run("--wet")
    assert result.returncode == 2
    assert result.stderr.startswith("usage: scripts/gpu_check.sh [--dry]")


@pytest.mark.slow
def test_every_step_in_a_dry_run(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("fla")
    status, said = check(tmp_path, "--seconds", 1800)
    assert status == 0
    steps = ("machine", "packages", "build", "goldens", "cases", "tests", "sanitizers", "benchmark")
    assert tuple(said) == steps
    for step in ("machine", "packages", "build", "tests", "benchmark"):
        assert said[step] == "ok"
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".json"}
