"""The sdist, the wheel, an editable install: complete, small, usable from C, CMake, Cython and an old JAX."""

import ast
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
    """An environment with what pyproject.toml says that a build needs, CMake and Ninja, and no more."""
    settings = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = (\[.+\])$", settings, re.MULTILINE).group(1)
    environment = Environment(tmp_path_factory.mktemp("tools") / "venv")
    environment.install("build", "cmake", "ninja", *ast.literal_eval(requires))
    return environment


@pytest.fixture(scope="session")
def sdist(tools, tmp_path_factory):
    """The sdist of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    tools.python("-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def source(sdist):
    """The tree that the sdist unpacks to."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    tree = sdist.with_name(sdist.name.removesuffix(".tar.gz"))
    with pytest.MonkeyPatch.context() as patch:
        # A cache of compilers, where there is one, takes paths below this folder as relative.
        patch.setenv("CCACHE_BASEDIR", str(tree))
        yield tree


@pytest.fixture(scope="session")
def build_options(source):
    """One build folder for all that is built from the sdist, and one level: kernels are compiled once."""
    folder = source / "build" / "all"
    defines = {"FWP_WERROR": "ON", "FWP_ISA_LEVELS": "base", "FWP_CUDA": "OFF"}
    return [
        "--no-build-isolation",
        f"-Cbuild-dir={folder}",
        *(f"-Ccmake.define.{name}={value}" for name, value in defines.items()),
    ]


@pytest.fixture(scope="session")
def wheel(tools, source, build_options, tmp_path_factory):
    """The wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    tools.python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *build_options, source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(tools, wheel):
    """The wheel, installed beside the build tools."""
    tools.install(wheel)
    return tools


@pytest.fixture
def editable(installed, wheel, source, build_options):
    """An editable install as CONTRIBUTING.md has it, in place of the wheel for one test."""
    installed.install("--no-deps", *build_options, "-Ceditable.rebuild=true", "--editable", source)
    yield installed
    installed.install("--no-deps", "--force-reinstall", wheel)


def project_files():
    git = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    return {name for name in run(*git).splitlines() if (ROOT / name).is_file()}


def test_sdist_is_the_tree(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    left_out = re.compile(r"\.ci/|\.gitignore|(benchmarks|examples/\w+)/results/")
    assert {name for name in project_files() - names if not left_out.match(name)} == set()
    assert sdist.stat().st_size < MEGABYTE


def test_wheel_holds_what_users_need_and_no_sources(wheel):
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


def test_oldest_jax(wheel, tmp_path):
    """The oldest JAX that pyproject.toml allows passes the tests of the installed wheel."""
    settings = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^jax = \["jax>=([\d.]+)"\]$', settings, re.MULTILINE).group(1)
    environment = Environment(tmp_path / "venv")
    environment.install(f"{wheel}[test]", f"jax=={version}", "absl-py")  # absl is what jax.export imports
    assert version in environment.python("-c", "import jax; print(jax.__version__)")
    tests = (ROOT / "tests" / name for name in ("test_xla_ffi.py", "test_jax.py"))
    print(environment.python("-m", "pytest", "-q", "--interop", "-p", "no:cacheprovider", *tests))


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_editable_install_follows_the_tree(editable, source):
    code = """if True:
        import numpy as np, fwp_core as fwp
        one = np.ones((1, 1, 1, 1))
        o, final_state = fwp.delta_rule(one, one, 3 * one, one[..., 0])
        print(fwp.__file__, fwp.get_include(), float(o[0, 0, 0, 0]))
    """
    package, include, o = editable.python("-I", "-c", code).split()
    assert Path(package).is_relative_to(source)
    assert (Path(include) / "fwp" / "fwp.h").is_file()
    assert float(o) == 3

    replace(source / "src/fwp_core/ops.py", "class Gradients(", "edited = True\n\n\nclass Gradients(")
    replace(source / "cpp/core/error.cpp", "memory ran out", "memory went out")
    code = "import fwp_core as fwp; print(fwp.ops.edited, fwp._core.ERRORS)"
    assert re.fullmatch("True .*memory went out.*", editable.python("-I", "-c", code))
