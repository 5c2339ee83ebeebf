"""The Python packages that scripts/gpu_check.sh needs: are all here? And wheels of them for elsewhere.

    gpu_packages.py check [NAME ...]          # of those named nothing is asked
    gpu_packages.py collect FOLDER [PYTHON]   # PYTHON: the other machine's, 3.12 say

It needs pip and nothing else. A folder of wheels has all that is needed on Linux on x86-64, but for what a
machine with a GPU has: torch, triton, numpy.
"""

from __future__ import annotations

import email
import email.message
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
ON_THE_MACHINE = ("torch", "triton", "numpy")
DOCTEST = Path("/usr/include/doctest/doctest.h")
LINUX = {
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
}
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in (28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]


def wanted() -> Iterator[Requirement]:
    """What builds the package, what tests it, the peer it is measured against, and what is there anyway."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    extras = settings["project"]["optional-dependencies"]
    peers = [line for line in extras["bench"] if Requirement(line).name in ("fla-core", "einops")]
    for line in [*settings["build-system"]["requires"], *extras["test"], *peers, "ninja", *ON_THE_MACHINE]:
        yield Requirement(line)


def every(
    requirements: Iterable[Requirement], needs: Callable[[list[Requirement]], Iterable[str]], **machine: str
) -> None:
    """Call needs() with the requirements, then with those that it answers, until there are no new ones."""
    level, seen = list(requirements), set[str]()
    while level:
        new = {}
        for requirement in level:
            name = canonicalize_name(requirement.name)
            here = requirement.marker is None or requirement.marker.evaluate({"extra": "", **machine})
            if here and name not in seen:
                new[name] = requirement
        seen |= new.keys()
        level = [Requirement(line) for line in needs(list(new.values()))] if new else []


# here


def check(without: Iterable[str]) -> int:
    missing: list[str] = []

    def needs(requirements: list[Requirement]) -> Iterator[str]:
        for requirement in requirements:
            if requirement.name in without:
                continue
            try:
                found = metadata.distribution(requirement.name)
            except metadata.PackageNotFoundError:
                missing.append(str(requirement))
                continue
            if not requirement.specifier.contains(found.version, prereleases=True):
                missing.append(f"{requirement} (here: {found.version})")
            if requirement.name not in ON_THE_MACHINE:  # what these need came with them
                yield from found.requires or []

    every(wanted(), needs)
    print("missing:", ", ".join(missing) or "nothing")
    return bool(missing)


# for elsewhere


def collect(folder: Path, python: str) -> int:
    if any(folder.glob("*.whl")):
        print(f"{folder} has wheels already, and one version of each is what can be installed")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip += ["--implementation", "cp", "--python-version", python]
    pip += [word for platform in PLATFORMS for word in ("--platform", platform)]

    def needs(requirements: list[Requirement]) -> Iterator[str]:
        lines = [f"{x.name}{x.specifier}" for x in requirements if x.name not in ON_THE_MACHINE]
        if not lines:
            return
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run([*pip, "--dest", scratch, *lines], check=True)
            for wheel in sorted(Path(scratch).glob("*.whl")):
                print(wheel.name)
                shutil.copy(wheel, folder)
                yield from metadata_of(wheel).get_all("Requires-Dist", [])

    try:
        every(wanted(), needs, python_version=python, python_full_version=f"{python}.0", **LINUX)
    except subprocess.CalledProcessError as error:
        return error.returncode
    if DOCTEST.exists():
        shutil.copy(DOCTEST, folder)
    else:
        print(f"no {DOCTEST}, without which the step goldens does not replay what it records")
    return 0


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def main(command: str, *words: str) -> int:
    if command == "check":
        return check(words)
    folder, python = [*words, f"{sys.version_info.major}.{sys.version_info.minor}"][:2]
    return collect(Path(folder), python)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
