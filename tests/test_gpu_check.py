"""scripts/gpu_check.sh without a GPU: steps run, fail, are stopped and skipped, and the rest goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="a script for Linux")


def check(folder, *arguments):
    """Status, and the summary's words by step."""
    command = ["bash", SCRIPT, "--dry", "--output", folder, *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
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


def test_a_step_that_fails_does_not_stop_the_next(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    status, said = check(tmp_path / "report", "--only", "packages,machine", wheels)
    assert status == 1
    assert list(said) == ["machine", "packages"]
    assert said["packages"].startswith("FAILED with status")
    assert "broken" in (tmp_path / "report" / "log.txt").read_text()


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
    result = subprocess.run(["bash", SCRIPT, "--wet"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: scripts/gpu_check.sh [--dry]")


@pytest.mark.slow
def test_every_step_in_a_dry_run(tmp_path):
    pytest.importorskip("torch")
    status, said = check(tmp_path, "--seconds", 1800)
    assert status == 0
    steps = ("machine", "packages", "build", "goldens", "cases", "tests", "sanitizers", "benchmark")
    assert tuple(said) == steps
    for step in ("machine", "packages", "build", "tests", "benchmark"):
        assert said[step] == "ok"
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".json"}
