"""The example and the benchmark of the drop-in for transformers, at sizes that take no time."""

import importlib.util
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.20")

ROOT = Path(__file__).parents[1]
TINY = ["--tokens", "70", "--hidden", "32", "--heads", "2", "--size", "8"]


def script(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text):
    """The numbers of every row that begins with a name, without the head of the table."""
    found = re.findall(r"^([a-z][a-z +]*?) {2,}([\d.e +-]+)$", text, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in found}


@pytest.fixture(autouse=True)
def the_same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_example_shows_times_and_no_difference(capsys):
    script("examples/qwen3_next.py").main(TINY)
    table = rows(capsys.readouterr().out)
    assert list(table) == ["forward", "training step", "decoded token"]
    for name, (before, after, difference) in table.items():
        assert before > 0, name
        assert after > 0, name
        assert 0 < difference <= 1e-5, name


def test_the_example_measures_what_is_patched_and_what_is_not():
    """Its layer calls the function that the module has at that time."""
    example = script("examples/qwen3_next.py")
    layer, x = example.make_layer(32, 2, 8), torch.randn(1, 70, 32)
    ours = example.train(layer, x)
    assert example.difference(ours, ours) == 0
    wrong = [y + 1 for y in ours]
    assert example.difference(wrong, ours) > 0.1


def test_the_benchmark_shows_the_calls_and_the_layer(capsys):
    script("benchmarks/drop_in.py").main(["--quick", "--rounds", "1", "--threads", "1"])
    table = rows(capsys.readouterr().out)
    parts = ("forward", "forward+backward", "decode")
    assert list(table) == [f"{what} {part}" for what in ("call", "block") for part in parts]
    for name, (before, after, ratio, least, most, difference) in table.items():
        assert min(before, after) > 0, name
        assert least <= ratio <= most, name
        assert 0 < difference <= 1e-5, name


def test_the_benchmark_measures_the_rows_asked_for(capsys, tmp_path):
    """And writes what it prints."""
    output = tmp_path / "table.txt"
    script("benchmarks/drop_in.py").main(
        ["--quick", "--rounds", "1", "--threads", "1", "--rows", "*decode", "--output", str(output)]
    )
    printed = capsys.readouterr().out
    assert list(rows(printed)) == ["call decode", "block decode"]
    assert output.read_text(encoding="utf-8") == printed


def test_the_benchmark_ends_where_results_differ(monkeypatch):
    benchmark = script("benchmarks/drop_in.py")
    monkeypatch.setattr(benchmark.example, "difference", lambda actual, expected: float("nan"))
    with pytest.raises(SystemExit, match="call forward: results differ by nan"):
        benchmark.main(["--quick", "--rounds", "1", "--threads", "1"])
