"""The sdist and the wheel: complete, small, and usable from C, CMake, pkg-config and Cython."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOWNSTREAM = Path(__file__).parent / "downstream"
BUILD_TOOLS = ["build", "cmake", "cython", "cython-cmake", "ninja", "pybind11", "scikit-build-core"]
MEGABYTE = 2**20


def run(*command, **environment):
    """Run a program outside the source tree's influence; its output, or a failure that shows it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FWP_"))}
    done = subprocess.run(
        [str(word) for word in command], env=env | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Environment:
    """A virtual environment of its own."""

    def __init__(self, folder):
        self.bin = folder / "bin"
        run(sys.executable, "-m", "venv", folder)

    def python(self, *arguments):
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return run(self.bin / "python", *arguments, PATH=path).strip()

    def install(self, *packages):
        self.python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("tools") / "venv")
    environment.install(*BUILD_TOOLS)
    return environment


@pytest.fixture(scope="session")
def distributions(tools, tmp_path_factory):
    """The sdist of this tree, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    tools.python("-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def installed(tools, distributions):
    """The wheel, installed beside the build tools."""
    tools.install(distributions[1])
    return tools


def project_files():
    git = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    return {name for name in run(*git).splitlines() if (ROOT / name).is_file()}


def test_sdist_is_the_tree(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in project_files() - names if not name.startswith((".ci/", ".gitignore"))} == set()
    assert sdist.stat().st_size < MEGABYTE


def test_wheel_holds_what_users_need_and_no_sources(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {name.removeprefix("fwp_core/") for name in names if name.startswith("fwp_core/")}
    sources = {
        path.relative_to(ROOT / "src/fwp_core").as_posix()
        for pattern in ("*.py", "*.pyi", "*.pxd", "py.typed")
        for path in (ROOT / "src/fwp_core").rglob(pattern)
    }
    library = {
        "include/fwp/fwp.h",
        "include/fwp/fwp.hpp",
        "lib/libfwp_core.so",
        "lib/cmake/fwp_core/fwp_core-config.cmake",
        "lib/cmake/fwp_core/fwp_core-config-version.cmake",
        "lib/cmake/fwp_core/fwp_core-targets.cmake",
        "lib/cmake/fwp_core/fwp_core-targets-release.cmake",
        "lib/pkgconfig/fwp_core.pc",
    }
    modules = {name for name in package if re.fullmatch(r"(_core|cython_api)\..+\.so", name)}
    assert len(modules) == 2
    assert package == sources | library | modules
    assert wheel.stat().st_size < 2 * MEGABYTE


def test_wheel_runs_where_it_is_installed(installed):
    code = """if True:
        import numpy as np, fwp_core as fwp
        one = np.ones((1, 1, 1, 1))
        o, final_state = fwp.delta_rule(one, one, 3 * one, one[..., 0])
        print(fwp.__file__, float(o[0, 0, 0, 0]))
    """
    path, o = installed.python("-I", "-c", code).split()
    assert Path(path).is_relative_to(installed.bin.parent)
    assert float(o) == 3


def test_library_has_no_link_and_exports_only_its_interface(installed):
    library = Path(installed.python("-c", "import fwp_core as f; print(f.get_include())")).parent / "lib"
    assert not any(path.is_symlink() for path in library.rglob("*"))
    listing = run("nm", "--dynamic", "--defined-only", "--extern-only", library / "libfwp_core.so")
    names = {line.split()[-1] for line in listing.splitlines()}
    assert names
    assert all(name.startswith("fwp_") for name in names), names


def check_program(path):
    assert run(path).split()[2:] == ["read", "3.000", "5.000"]


def test_c_program_by_cmake(installed, tmp_path):
    cmake_dir = installed.python("-m", "fwp_core", "--cmakedir")
    cmake = installed.bin / "cmake"
    run(cmake, "-S", DOWNSTREAM / "c_cmake", "-B", tmp_path, f"-Dfwp_core_DIR={cmake_dir}")
    run(cmake, "--build", tmp_path)
    check_program(tmp_path / "program")


def test_c_program_by_pkg_config(installed, tmp_path):
    cmake_dir = Path(installed.python("-m", "fwp_core", "--cmakedir"))
    makefile = DOWNSTREAM / "c_pkgconfig" / "Makefile"
    program = tmp_path / "program"
    pkg_config = str(cmake_dir.parents[1] / "pkgconfig")
    run("make", "-C", makefile.parent, f"PROGRAM={program}", PKG_CONFIG_PATH=pkg_config)
    check_program(program)


def test_cython_module(installed):
    installed.install("--no-build-isolation", DOWNSTREAM / "cython")
    code = """if True:
        import numpy as np, fwp_downstream
        print(fwp_downstream.remember(np.array([0.6, 0.8]), np.array([3.0, 5.0])))
    """
    assert installed.python("-I", "-c", code) == "[3.0, 5.0]"
