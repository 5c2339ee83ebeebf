"""The command line, run as users run it, and the pieces of the demo and the benchmark that can be wrong."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fwp_core as fwp
from fwp_core.cli import bench, demo, retrieval

README = Path(__file__).parents[1] / "README.md"


def run_cli(*arguments, timeout=300):
    command = [sys.executable, "-m", "fwp_core", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def succeeds(*arguments, timeout=300):
    result = run_cli(*arguments, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# info and the plain options


def test_info_shows_what_the_library_runs_on():
    text = succeeds("info")
    assert fwp.__version__ in text
    assert ", ".join(fwp.available_isas()) in text
    for name in ("compiler", "block size", "threads", "cuda", "isa"):
        assert re.search(rf"^{name} ", text, re.MULTILINE), (name, text)


def test_plain_options_print_one_line():
    assert succeeds("--cmakedir").strip() == str(fwp.get_cmake_dir())
    assert succeeds("--includedir").strip() == str(fwp.get_include())
    assert succeeds("--version").strip() == fwp.__version__


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("bench", "--rounds", "0"), ("demo", "--steps", "-1"), ("info", "--quick")],
)
def test_wrong_arguments_exit_with_2_and_usage(arguments):
    result = run_cli(*arguments)
    assert result.returncode == 2
    assert "usage: python -m fwp_core" in result.stdout + result.stderr


# bench


def test_bench_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "bench.json"
    text = succeeds("bench", "--quick", "--threads", 1, 2, "--json", path)
    assert max(map(len, text.splitlines())) <= 100
    result = json.loads(path.read_text())
    assert set(result) == {"config", "settings", "load", "peak", "scans", "softmax"}
    assert all(peak > 0 for peak in result["peak"].values())
    cases = {tuple(record[name] for name in (*bench.Case._fields, "threads")) for record in result["scans"]}
    assert cases == {
        (rule, decay, size, direction, threads)
        for rule in ("linear", "delta")
        for decay in ("none", "scalar", "channel")
        for size in (64, 128)
        for direction in ("forward", "backward", "vjp")
        for threads in (1, 2)
    }
    for record in result["scans"]:
        assert 0 < record["best_ms"] <= record["median_ms"]
        assert record["of_peak"] == pytest.approx(record["gflops"] / result["peak"][str(record["threads"])])
    assert [record["tokens"] for record in result["softmax"]] == [256]


def test_bench_credits_the_sequential_flops():
    tokens = 10
    entries = 64 * 64 * tokens
    assert bench.Case("delta", "none", 64, "forward").flops(tokens) == 6 * entries
    assert bench.Case("delta", "channel", 64, "backward").flops(tokens) == 16 * entries
    assert bench.Case("linear", "none", 64, "vjp").flops(tokens) == 14 * entries


def test_bench_runs_calls_in_turn_and_times_each():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "ab"}
    seconds = bench.interleave(calls, 3, between=lambda: order.append("|"))
    assert "".join(order) == "ab|ab|ab|ab"
    assert all(len(values) == 3 and min(values) >= 0.002 for values in seconds.values())


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_bench_softmax_is_softmax_attention(tokens):
    rng = np.random.default_rng(tokens)
    q, k, v = (3 * rng.standard_normal((3, tokens, 16))).astype(np.float32)
    out = bench.softmax_attention(q, k, v, np.full_like(v, np.nan))
    expected = fwp.reference.softmax_attention(*(x[None, :, None] for x in (q, k, v)))[0, :, 0]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


# the retrieval task


def test_answers_are_the_last_values():
    episodes = retrieval.draw_episodes(np.random.default_rng(0), 50, 5)
    assert episodes.keys.shape == episodes.values.shape == (50, 10)
    for keys, values, answers in zip(*episodes, strict=True):
        last = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert answers.tolist() == [last.get(key, -1) for key in range(5)]
    assert (episodes.answers == -1).any()


def test_loss_counts_shown_keys_only():
    episodes = retrieval.Episodes(np.array([[0]]), np.array([[1]]), np.array([[1, -1]]))
    o = np.array([[[9.0, 9.0]], [[0.5, 0.75]], [[7.0, 8.0]]])[None]  # one write, then two reads
    loss, recall, do = retrieval.retrieval_loss(o, episodes)
    assert loss == 0.5 * (0.5**2 + 0.25**2)
    assert recall == 1.0
    np.testing.assert_array_equal(do[0, :, 0], [[0, 0], [0.5, -0.25], [0, 0]])


def test_answering_zero_costs_one_half():
    episodes = retrieval.draw_episodes(np.random.default_rng(0), 20, 20)
    assert retrieval.retrieval_loss(np.zeros((20, 60, 1, 20)), episodes)[0] == pytest.approx(0.5)


def test_adam_first_steps_have_the_size_of_the_rate():
    x = np.array([3.0, -2.0])
    adam = retrieval.Adam({"x": x})
    adam.step({"x": np.array([10.0, -1e-3])}, 0.1)
    np.testing.assert_allclose(x, [2.9, -1.9], rtol=1e-5)
    for _ in range(2000):
        adam.step({"x": 2 * x}, 0.01)
    np.testing.assert_allclose(x, 0, atol=1e-3)


@pytest.mark.parametrize("rule", demo.rules(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", ["embedding", "w_k", "w_q", "w_beta"])
def test_network_gradient_of_each_parameter(rule, name):
    rng = np.random.default_rng(5)
    network = retrieval.SlowNetwork(rng, 4, 6, np.float64)
    episodes = retrieval.draw_episodes(rng, 3, 4)
    _, gradients = demo.loss_and_gradients(rule, network, episodes)
    centre, h = network.parameters[name].copy(), 1e-5
    direction = rng.standard_normal(centre.shape)
    losses = []
    for sign in (1, -1):
        network.parameters[name] = centre + sign * h * direction
        losses.append(demo.loss_and_gradients(rule, network, episodes)[0])
    difference = (losses[0] - losses[1]) / (2 * h)
    assert np.vdot(gradients[name], direction) == pytest.approx(difference, rel=1e-7, abs=1e-9)


# the demo's checks have to notice a wrong library


@pytest.fixture
def trained():
    delta = demo.rules()[1]
    network = retrieval.SlowNetwork(np.random.default_rng(0), demo.SYMBOLS, demo.KEY_SIZE, np.float32)
    return demo.Trained(delta, network, [], 0.5, 0.05)


def test_checks_pass_for_the_library(trained):
    assert all(check.passed for check in demo.check_library(trained, seed=1))


@pytest.mark.parametrize("wrong", ["dq", "dk", "dbeta"])
def test_check_notices_a_wrong_gradient(trained, monkeypatch, wrong):
    exact = fwp.vjp

    def vjp(*args):
        outputs, pullback = exact(*args)

        def wrong_pullback(do):
            gradients = pullback(do)
            return gradients._replace(**{wrong: 1.001 * getattr(gradients, wrong)})

        return outputs, wrong_pullback

    monkeypatch.setattr(fwp, "vjp", vjp)
    output, gradient = demo.check_library(trained, seed=1)
    assert output.passed
    assert not gradient.passed


def test_check_notices_a_wrong_output(trained):
    def scan(q, k, v, beta):
        return fwp.delta_rule(q, k, v, beta * np.float32(1.001))

    trained.rule = demo.Rule("delta", scan, fwp.delta_rule_step, fwp.reference.delta_rule)
    episodes = retrieval.draw_episodes(np.random.default_rng(0), 8, demo.SYMBOLS)
    assert demo.output_error(trained, episodes) > demo.OUTPUT_TOLERANCE


def test_rewrite_is_a_rank_one_change_of_a_key_that_had_another_value(trained):
    write = demo.rewrite(trained, seed=1)
    assert len(write.held) > 1
    assert write.held[-1] != write.held[-2]
    assert demo.rank_one_error(write) < demo.RANK_TOLERANCE
    higher = write._replace(after=write.after + np.eye(*write.after.shape, dtype=np.float32))
    assert demo.rank_one_error(higher) > demo.RANK_TOLERANCE


# the demo as a whole


@pytest.mark.parametrize("missing", ["tqdm", "matplotlib"])
def test_demo_says_what_to_install(missing):
    script = (
        "import sys; from fwp_core.__main__ import main\n"
        f"sys.modules['{missing}'] = None\n"
        "sys.exit(main(['demo', '--quick']))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 2
    assert re.search(rf"pip install .*{missing}", result.stdout)
    assert "Traceback" not in result.stderr


def needs_demo_extra():
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")


def failures(text):
    return re.findall(r"^FAIL.*$", text, re.MULTILINE)


def test_demo_quick_draws_and_repeats(tmp_path):
    needs_demo_extra()
    texts = []
    for name in ("a.png", "b.png"):
        texts.append(succeeds("demo", "--quick", "--output", tmp_path / name))
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 20_000
    assert failures(texts[0]) == []
    assert "targets" not in texts[0]
    rows = [re.findall(r"^(?:linear|delta) .*$", text, re.MULTILINE) for text in texts]
    assert len(rows[0]) == 2
    assert rows[0] == rows[1]


def test_demo_fails_if_the_targets_are_missed(tmp_path):
    needs_demo_extra()
    result = run_cli("demo", "--steps", 2, "--output", tmp_path / "demo.png")
    assert result.returncode == 1
    assert "FAIL  delta loss below 0.01" in failures(result.stdout)


@pytest.mark.slow
def test_demo_reaches_its_targets(tmp_path):
    needs_demo_extra()
    start = time.perf_counter()
    text = succeeds("demo", "--output", tmp_path / "demo.png")
    assert time.perf_counter() - start < 60
    assert failures(text) == []
    assert len(re.findall("^pass", text, re.MULTILINE)) == 8


# README


def test_readme_example_runs_and_its_gradient_is_right(tmp_path):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 16
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    numbers = [float(word) for word in re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", result.stdout)]
    assert numbers[-2] == pytest.approx(numbers[-1], rel=1e-6)


def test_all_of_the_readme_runs(tmp_path):
    for package in ("torch", "jax", "transformers"):
        pytest.importorskip(package)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
    code += "\nassert q.shape == gradient.shape and type(gradient) is type(q) and y.shape == (2, 100, 256)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_readme_paths_exist():
    text = README.read_text(encoding="utf-8")
    root = README.parent
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (root / link).exists(), link
