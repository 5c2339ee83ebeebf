"""What the documentation promises, without a build of it: every public name, equations from their source."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import fwp_core as fwp

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DIRECTIVE = re.compile(r"^(`{3,})\{(include|literalinclude|image)\} (\S+)\n((?::.*\n)*)", re.MULTILINE)
EQUATION = re.compile(r"^//.*\w = ", re.MULTILINE)
OBJECT = re.compile(r"^\.\. \w+:: (fwp_core\.\S+)$", re.MULTILINE)

if not (ROOT / ".git").exists():
    pytest.skip("not a git checkout: the sdist has no measured results", allow_module_level=True)


def public_names(module=fwp):
    """Dotted names of what the package and its public modules export."""
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            yield from public_names(value)
        else:
            yield f"{module.__name__}.{name}"


def documented_names(text):
    """Dotted names that a page documents; of a module, with its members, what it exports."""
    for name in OBJECT.findall(text):
        if name in (f"fwp_core.{module}" for module in fwp.__all__ if module in vars(fwp)):
            value = getattr(fwp, name.removeprefix("fwp_core."))
            if isinstance(value, ModuleType):
                yield from public_names(importlib.import_module(name))
                continue
        yield name


def inclusions():
    """(page, file, options) of every file that a page includes."""
    for page in PAGES:
        for _, _, file, options in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            pairs = (line[1:].split(":", 1) for line in options.splitlines())
            yield page, (DOCS / file).resolve(), {key: value.strip().strip('"') for key, value in pairs}


def test_every_public_name_is_in_the_reference():
    documented = list(documented_names((DOCS / "api.md").read_text(encoding="utf-8")))
    assert sorted(documented) == sorted(public_names())


def test_the_names_are_those_of_the_package():
    names = list(public_names())
    assert "fwp_core.delta_rule" in names
    assert "fwp_core.reference.softmax_attention" in names
    assert list(documented_names(".. autofunction:: fwp_core.vjp\n")) == ["fwp_core.vjp"]
    assert set(documented_names(".. automodule:: fwp_core.reference\n")) < set(names)


def test_what_is_included_is_there():
    found = list(inclusions())
    assert found
    for page, file, options in found:
        assert file.is_file(), (page.name, file)
        assert file.is_relative_to(ROOT)
        for key in ("start-after", "start-at", "end-before"):
            if key in options:
                marker = options[key].encode().decode("unicode_escape")
                assert marker in file.read_text(encoding="utf-8"), (page.name, key, marker)


@pytest.mark.parametrize("folder", ["rules", "features"])
def test_every_equation_of_the_sources_is_shown(folder):
    shown = {file for _, file, _ in inclusions()}
    files = (ROOT / "cpp" / folder).glob("*.hpp")
    sources = {file for file in files if EQUATION.search(file.read_text(encoding="utf-8"))}
    assert len(sources) > 2
    assert sources <= shown, sources - shown


def test_no_page_has_a_second_copy_of_an_equation():
    equation = re.compile(r"S_\{?t|k_t|u_t|\$\$|\{math\}")
    for page in PAGES:
        assert not equation.search(page.read_text(encoding="utf-8")), page.name


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.search(r"```\{toctree\}\n.*?\n\n(.*?)```", index, re.DOTALL).group(1)
    assert sorted([*listed.split(), "index"]) == sorted(page.stem for page in PAGES)
