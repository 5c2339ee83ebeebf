"""Rules of the house: who includes whom, one version, stubs that tell the truth, no paths of one machine."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fwp_core as fwp
from fwp_core import _core

ROOT = Path(__file__).parents[1]

# Folder of a file -> folders it may include from.
ARROWS = {
    "cpp/include/fwp": {"cpp/include/fwp"},
    "cpp/rules": set(),
    "cpp/features": set(),
    "cpp/scan": {"cpp/scan", "cpp/rules", "cpp/features"},
    "cpp/cpu": {"cpp/cpu", "cpp/scan"},
    "cpp/core": {"cpp/core", "cpp/include/fwp"},
    "cuda": {"cuda", "cuda/recurrent", "cuda/chunk", "cuda/features", "cuda/primitives", "cpp/rules"},
    "cuda/recurrent": {"cuda/recurrent", "cuda", "cuda/primitives", "cpp/features"},
    "cuda/chunk": {"cuda/chunk", "cuda", "cuda/primitives"},
    "cuda/features": {"cuda/features", "cuda", "cuda/primitives", "cpp/features"},
    "cuda/simt": {"cuda/simt"},
    "cuda/primitives": {"cuda/primitives", "cuda/simt"},
    "python": {"python", "cpp/include/fwp"},
}
# What cpp/core sees of the back ends: their entry points and the problem handed to them.
EXTRA = {
    "cpp/core": {"cpp/cpu/dispatch.hpp", "cpp/scan/backend.hpp", "cpp/scan/problem.hpp"},
    "cuda": {"cpp/scan/backend.hpp", "cpp/scan/problem.hpp", "cpp/scan/arena.hpp"},
    "cuda/recurrent": {"cpp/scan/problem.hpp", "cpp/scan/arena.hpp"},
    "cuda/chunk": {"cpp/scan/problem.hpp", "cpp/scan/arena.hpp"},
    "cuda/features": {"cpp/scan/problem.hpp"},
}
# System headers of one folder only.
PRIVATE_HEADERS = {
    r"immintrin\.h|arm_neon\.h": "cpp/cpu/pack",
    r"Python\.h|pybind11/.*|numpy/.*": "python/",
    r"cuda.*|mma\.h|cub/.*": "cuda/",
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
CPP = {".c", ".h", ".cpp", ".hpp", ".cu", ".cuh"}
SOURCE = CPP | {".py", ".pyi", ".pyx", ".pxd"}


def project_files():
    """Paths of all files of the project, relative to its root, without what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [path for path in map(Path, filter(None, names)) if (ROOT / path).is_file()]


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def violations(path, text):
    """Includes of a file that the arrows or the private headers forbid."""
    folder = path.parent.as_posix()
    for kind, name in INCLUDE.findall(text):
        own = kind == '"'
        base = "cpp/include" if name.startswith("fwp/") else folder
        target = (ROOT / base / name).resolve()
        if own and target.is_relative_to(ROOT):
            target = target.relative_to(ROOT)
            allowed = target.parent.as_posix() in ARROWS[folder] or target.as_posix() in EXTRA.get(folder, ())
            if not allowed:
                yield f"{path} includes {target}"
        for pattern, home in PRIVATE_HEADERS.items():
            if re.fullmatch(pattern, name) and not path.as_posix().startswith(home):
                yield f"{path} includes {name}"
        if folder in ("cpp/rules", "cpp/features"):
            yield f"{path} includes {name}"


def test_includes_follow_the_arrows():
    files = [p for p in project_files() if p.suffix in CPP and p.parts[0] in ("cpp", "cuda", "python")]
    assert files
    assert {p.parent.as_posix() for p in files} <= set(ARROWS), "a folder without a rule"
    assert [v for p in files for v in violations(p, read(p))] == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("cpp/rules/delta.hpp", "#include <cmath>"),
        ("cpp/scan/forward.hpp", '#include "../cpu/pack.hpp"'),
        ("cpp/cpu/tiles.hpp", '#include "../core/error.hpp"'),
        ("cpp/core/capi.cpp", '#include "../cpu/kernels.hpp"'),
        ("cpp/core/capi.cpp", "#include <Python.h>"),
        ("cpp/scan/forward.hpp", "#  include <immintrin.h>"),
        ("python/bind_scan.cpp", '#include "../cpp/core/error.hpp"'),
        ("cpp/include/fwp/fwp.hpp", '#include "../../core/error.hpp"'),
    ],
)
def test_the_include_check_sees(path, line):
    assert list(violations(Path(path), f"int x;\n{line}\n"))


def test_the_arrows_and_folders_are_those_of_the_documents():
    """The table of CONTRIBUTING.md and the layout of README.md, for every folder that there is."""
    folders = [folder for folder in ARROWS if (ROOT / folder).is_dir()]
    rows = re.findall(r"^\| `(.+?)` \|.*\| (.*) \|$", read(Path("CONTRIBUTING.md")), re.MULTILINE)
    told = {folder: set(re.findall(r"`(.+?)`", cell)) for folder, cell in rows if folder in ARROWS}
    assert told == {folder: ARROWS[folder] - {folder} | EXTRA.get(folder, set()) for folder in folders}
    layout = read(Path("README.md")).split("## Layout")[1].split("```")[1]
    assert set(folders) <= set(re.findall(r"^(\S+)/ ", layout, re.MULTILINE))


def test_only_two_headers_are_public():
    public = sorted(p.name for p in project_files() if p.parts[:2] == ("cpp", "include"))
    assert public == ["fwp.h", "fwp.hpp"]


def test_no_flag_breaks_ieee_arithmetic():
    forbidden = re.compile(r"^[^#]*(-f(fast|unsafe|finite|associative)-math|-Ofast)", re.MULTILINE)
    for path in project_files():
        if path.suffix == ".cmake" or path.name in ("CMakeLists.txt", "CMakePresets.json", "pyproject.toml"):
            assert not forbidden.search(read(path)), path


def imports(path):
    """Top-level names of the packages that a Python file imports."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_the_package_needs_numpy_only():
    for path in project_files():
        if path.parts[:2] == ("src", "fwp_core") and path.suffix == ".py":
            allowed = {"numpy", "fwp_core", *sys.stdlib_module_names}
            folder = path.relative_to("src/fwp_core").parts[0]
            if folder == "cli":
                allowed |= {"tqdm", "matplotlib"}
            if folder in ("adapters", "compat", "torch.py", "jax.py") and path.name != "__init__.py":
                allowed |= {"torch", "jax", "transformers"}
            assert set(imports(path)) <= allowed, path


def test_import_is_light():
    code = "import sys, fwp_core; print({'torch', 'jax', 'matplotlib', 'tqdm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("set()\n", "")


def test_one_version():
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE).group(1)
    assert fwp.__version__ == version
    assert importlib.metadata.version("fwp_core") == version
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE).group(1) == version


def test_the_package_is_typed():
    package = Path(fwp.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_core.pyi").is_file()


def parameters_of_compiled(function):
    """How many arguments a compiled function takes, from its complaint about a call with far too many."""
    with pytest.raises(TypeError) as refused:
        function(*[None] * 40)
    (signature,) = re.findall(r"^\s+\d+\. \((.*)\) -> ", str(refused.value), re.MULTILINE)
    return len(re.findall(r"\w+: ", signature))


def stub():
    return ast.parse((Path(fwp.__file__).parent / "_core.pyi").read_text())


def test_stub_has_every_name_of_the_module():
    declared = {node.name for node in stub().body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    declared |= {node.target.id for node in stub().body if isinstance(node, ast.AnnAssign)}
    present = {name for name in vars(_core) if not name.startswith("__") or name == "__version__"}
    assert declared == present


def test_stub_functions_take_what_the_compiled_ones_take():
    functions = [node for node in stub().body if isinstance(node, ast.FunctionDef)]
    assert functions
    for node in functions:
        expected = len(node.args.posonlyargs) + len(node.args.args)
        assert parameters_of_compiled(getattr(_core, node.name)) == expected, node.name


def test_stub_errors_have_the_bases_of_the_compiled_ones():
    for node in stub().body:
        if isinstance(node, ast.ClassDef) and issubclass(getattr(_core, node.name), Exception):
            bases = [base.__name__ for base in getattr(_core, node.name).__bases__]
            assert [base.id for base in node.bases] == bases, node.name


def test_no_paths_of_one_machine():
    pattern = re.compile(r"(^|[^A-Za-z0-9_./$}-])/(work|farm|root|home|Users)/", re.MULTILINE)
    binary = {".png"}
    offenders = [p for p in project_files() if p.suffix not in binary and pattern.search(read(p))]
    assert offenders == []


def test_at_least_as_many_lines_of_test_as_of_source():
    lines = {"test": 0, "source": 0}
    for path in project_files():
        if path.suffix in SOURCE and path.parts[0] in ("cpp", "cuda", "python", "src", "tests"):
            lines["test" if path.parts[0] == "tests" else "source"] += len(read(path).splitlines())
    assert lines["test"] >= lines["source"], lines
