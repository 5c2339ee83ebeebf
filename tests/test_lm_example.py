"""The language model of examples/lm: its gradients, its states, its text, and that it learns."""

import json
import sys
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tqdm")
sys.path.append(str(Path(__file__).parents[1]))

import torch
from tolerances import NETWORK, relative_error

from examples.lm import report, text, training
from examples.lm.__main__ import main
from examples.lm.model import MEMORIES, TAPS, ByteModel, State, generate, rotate

ROOT = Path(__file__).parents[1]
WITH_STATE = ("linear", "delta")
TINY = training.Settings(steps=8, streams=2, length=12, width=16, layers=2, heads=2, validation_bytes=200)


@pytest.fixture
def float64():
    """Make float64 the dtype of all models and states of a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# the model and its states


def model_and_text(rule, length=10, **sizes):
    torch.manual_seed(0)
    model = ByteModel(rule, **{"width": 16, "layers": 2, "heads": 2} | sizes)
    return model, torch.randint(256, (3, length))


def assert_states_close(after, expected):
    for one, other in zip(after, expected, strict=True):
        for name, x, y in zip(State._fields, one, other, strict=True):
            assert (x is None) == (y is None), name
            if x is not None:
                assert relative_error(x.detach(), y.detach()) <= NETWORK, name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", WITH_STATE)
def test_steps_equal_the_scan(rule):
    model, bytes_in = model_and_text(rule)
    with torch.no_grad():
        logits, expected = model(bytes_in, model.initial(3))
        states, steps = model.initial(3), []
        for t in range(bytes_in.shape[1]):
            step, states = model(bytes_in[:, t : t + 1], states, decode=True)
            steps.append(step)
    assert relative_error(torch.cat(steps, dim=1), logits) <= NETWORK
    assert_states_close(states, expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", WITH_STATE)
@pytest.mark.parametrize("border", [1, TAPS - 2, 6])
def test_the_state_carries_a_text_across_a_border(rule, border):
    model, bytes_in = model_and_text(rule)
    logits, expected = model(bytes_in, model.initial(3))
    first, states = model(bytes_in[:, :border], model.initial(3))
    second, states = model(bytes_in[:, border:], states)
    assert relative_error(torch.cat([first, second], dim=1).detach(), logits.detach()) <= NETWORK
    assert_states_close(states, expected)
    fresh, _ = model(bytes_in[:, border:], model.initial(3))
    assert relative_error(fresh.detach(), logits[:, border:].detach()) > 1e-3


@pytest.mark.parametrize("rule", MEMORIES)
def test_a_byte_does_not_see_the_next_ones(rule):
    model, bytes_in = model_and_text(rule)
    other = bytes_in.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 256
    logits, changed = (model(x, model.initial(3))[0].detach() for x in (bytes_in, other))
    assert torch.equal(logits[:, :6], changed[:, :6])
    assert not torch.equal(logits[:, 6:], changed[:, 6:])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", WITH_STATE)
@pytest.mark.parametrize("byte", [0, 1])
def test_a_zero_byte_empties_the_memory(rule, byte):
    model, bytes_in = model_and_text(rule, layers=1)
    bytes_in = 1 + bytes_in % 255
    bytes_in[:, 6] = byte
    other = bytes_in.clone()
    other[:, : 6 - TAPS + 1] += 1  # before all that the convolution still sees at the zero byte
    logits, changed = (model(x % 256, model.initial(3))[0].detach() for x in (bytes_in, other))
    assert (relative_error(changed[:, 6:], logits[:, 6:]) <= NETWORK) == (byte == 0)


@pytest.mark.parametrize("rule", MEMORIES)
def test_no_gradient_passes_a_detached_border(rule):
    model, bytes_in = model_and_text(rule)
    _, states = model(bytes_in, model.initial(3))
    assert all(x.requires_grad for state in states for x in state if x is not None)
    detached = [state.detach() for state in states]
    assert not any(x.requires_grad for state in detached for x in state if x is not None)
    assert_states_close(detached, states)


@pytest.mark.usefixtures("float64")
def test_rotation_makes_scores_depend_on_distance():
    x, y = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    rotated_x, rotated_y = (rotate(z.expand(1, 9, 1, 8)) for z in (x, y))
    scores = (rotated_x[0, :, 0] @ rotated_y[0, :, 0].T).numpy()
    for distance in range(5):
        assert np.ptp(np.diagonal(scores, distance)) < NETWORK
    assert np.ptp(scores) > 0.1


def test_rules_differ_in_nothing_but_the_memory():
    counts = {rule: sum(x.numel() for x in ByteModel(rule).parameters()) for rule in MEMORIES}
    assert len(set(counts.values())) == 1, counts


# generating


@pytest.mark.parametrize("rule", WITH_STATE)
def test_generation_repeats_and_follows_the_model(rule):
    model, _ = model_and_text(rule)
    one = generate(model, b"def", 20, seed=1)
    assert len(one) == 20
    assert one == generate(model, b"def", 20, seed=1) != generate(model, b"def", 20, seed=2)
    cold = generate(model, b"def", 5, temperature=1e-6)
    logits, _ = model(torch.tensor([list(b"def" + cold)]), model.initial(1))
    assert cold == bytes(logits[0, 2:-1].argmax(dim=-1).tolist())


def test_what_cannot_be_generated_is_refused():
    with pytest.raises(ValueError, match="prompt: expected at least one byte"):
        generate(ByteModel("delta", 16, 1), b"", 3)
    with pytest.raises(ValueError, match="softmax attention has no state"):
        generate(ByteModel("softmax", 16, 1), b"a", 3)


# text


def test_segments_continue_each_other_and_close_the_ring():
    source = np.arange(100, dtype=np.uint8)
    pieces = list(islice(text.segments(source, streams=3, length=10, offset=95), 12))
    for piece in pieces:
        assert piece.shape == (3, 11)
        assert piece.dtype == torch.int64
        assert ((piece[:, 1:] - piece[:, :-1]) % 100 == 1).all()
    assert pieces[0][:, 0].tolist() == [95, 28, 61]
    for one, following in pairwise(pieces):
        assert torch.equal(one[:, -1], following[:, 0])


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="text: expected at least 33 bytes, got 32"):
        next(text.segments(np.zeros(32, np.uint8), streams=3, length=10))


def test_files_are_read_in_order_and_split(tmp_path):
    files = [tmp_path / name for name in ("b", "a")]
    for file, content in zip(files, (b"x" * 60, b"y" * 39), strict=True):
        file.write_bytes(content)
    learn, validate = text.read(files)
    assert learn.tobytes() + validate.tobytes() == b"x" * 60 + b"\0" + b"y" * 39
    assert len(validate) == 5


@pytest.mark.parametrize("streams", [1, 4])
def test_a_text_too_short_to_validate_is_refused_before_training(tmp_path, capsys, streams):
    """One byte more is enough, and what comes out is a number."""
    file, least = tmp_path / "short.txt", 20 * streams * 9
    sizes = f"--seeds 0 --steps 1 --streams {streams} --length 8 --width 16 --layers 1 --generate 0".split()
    file.write_bytes(b"x" * (least - 1))
    with pytest.raises(ValueError, match=rf"^text: expected at least {least} bytes, .*; got {least - 1}$"):
        main([str(file), *sizes])
    assert capsys.readouterr().out == ""
    file.write_bytes(b"x" * least)
    assert main([str(file), *sizes, "--rules", "delta"]) == 0
    assert "nan" not in capsys.readouterr().out


def test_too_little_validation_is_refused():
    with pytest.raises(ValueError, match=r"^validation_bytes: expected at least 1028, .* got 1027$"):
        training.Settings(validation_bytes=1027)
    assert training.Settings(validation_bytes=1028).least_bytes == 1028
    with pytest.raises(ValueError, match="^text: expected at least 26 bytes, got 25$"):
        training.validate(ByteModel("delta", 16), np.zeros(25, np.uint8), TINY)


def test_the_standard_library_comes_without_its_tests():
    files = text.standard_library()
    assert files == text.standard_library()
    assert len(files) > 100
    names = {path.name for path in files}
    assert {"ast.py", "random.py"} <= names
    assert not any({"test", "site-packages"} & set(path.parts[-3:]) for path in files)
    assert files != sorted(files)


# training


@pytest.mark.usefixtures("float64")
def test_the_loss_is_that_of_the_next_bytes():
    model, piece = model_and_text("delta")
    loss, _ = training.loss_of(model, piece, model.initial(3))
    odds = torch.softmax(model(piece, model.initial(3))[0].detach(), dim=-1)
    nats = [-np.log(float(odds[b, t, piece[b, t + 1]])) for b in range(3) for t in range(piece.shape[1] - 1)]
    assert loss.item() == pytest.approx(np.mean(nats), rel=NETWORK)


@pytest.mark.usefixtures("float64")
def test_validation_reads_the_whole_text_once_with_its_state_carried():
    model, _ = model_and_text("delta")
    source = np.random.default_rng(0).integers(1, 256, 2 * 49).astype(np.uint8)
    settings = replace(TINY, streams=2, length=12, validation_bytes=len(source))
    streams = torch.from_numpy(source.reshape(2, 49).astype(np.int64))
    loss, _ = training.loss_of(model, streams, model.initial(2))
    assert training.validate(model, source, settings) == pytest.approx(loss.item() / np.log(2), rel=NETWORK)


@pytest.mark.parametrize("rule", MEMORIES)
def test_training_lowers_the_loss(rule):
    source = np.frombuffer(b"the fast weight is written and read. " * 20, np.uint8)
    settings = replace(TINY, steps=60, rate=0.02)
    torch.manual_seed(0)
    model = ByteModel(rule, settings.width, settings.layers, settings.heads)
    before = training.validate(model, source, settings)
    losses = training.train(model, text.segments(source, settings.streams, settings.length), settings)
    assert len(losses) == settings.steps
    assert before == pytest.approx(8, abs=1.5)
    assert training.validate(model, source, settings) < before / 2


def test_the_learning_rate_rises_and_falls():
    factors = [training.warm_cosine(step, 100) for step in range(100)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert training.warm_cosine(0, 1) == 1


def test_a_run_repeats_with_its_seed():
    source = np.random.default_rng(0).integers(97, 123, 2000).astype(np.uint8)
    runs = [training.run("delta", seed, (source, source[:300]), TINY)[1] for seed in (0, 0, 1)]
    bits = [run.bits_per_byte for run in runs]
    assert bits[0] == bits[1] != bits[2]
    assert runs[0].training == runs[1].training
    assert runs[0].parameters == sum(x.numel() for x in ByteModel("delta", 16).parameters())


# results


def results_of(**bits):
    runs = [
        asdict(training.Run(rule, seed, 7, value, tokens_per_second=100.0, training=[]))
        for rule, values in bits.items()
        for seed, value in enumerate(values)
    ]
    return {"runs": runs, "settings": {}}


def test_the_table_has_means_and_spreads():
    lines = report.table(results_of(linear=[2.0, 2.2], delta=[1.5])).splitlines()
    assert lines[2:] == ["| linear | 7 | 2 | 2.100 ± 0.141 | 100 |", "| delta | 7 | 1 | 1.500 | 100 |"]


def test_the_advantage_is_counted_seed_by_seed():
    said = report.advantage(results_of(linear=[2.0, 3.0, 2.0], delta=[1.5, 2.0, 2.5]))
    assert said.startswith("delta takes 0.333 ± 0.764 bits per byte less than linear")
    assert said.endswith("2 of 3 times")
    assert report.advantage(results_of(linear=[2.0], delta=[1.0])) is None
    assert report.advantage(results_of(delta=[1.0, 2.0])) is None


def test_the_command_line_trains_and_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "some.txt"
    file.write_bytes(b"fast weights are written and read. " * 60)
    sizes = "--seeds 0 1 --steps 2 --streams 2 --length 8 --width 16 --layers 1".split()
    outputs = [tmp_path / "results.json", tmp_path / "results.png"]
    options = ["--json", str(outputs[0]), "--plot", str(outputs[1]), "--generate", "5", "--prompt", "fast"]
    assert main([str(file), *sizes, *options]) == 0
    results = json.loads(outputs[0].read_text())
    assert [(run["seed"], run["rule"]) for run in results["runs"]] == [
        (s, r) for s in (0, 1) for r in MEMORIES
    ]
    assert outputs[1].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert report.table(results) in printed
    assert "\nfast" in printed


def test_the_readme_shows_the_results_that_are_kept():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the sdist has no measured results")
    folder = ROOT / "examples/lm"
    results = json.loads((folder / "results/standard_library.json").read_text())
    readme = (folder / "README.md").read_text()
    assert report.table(results) in readme
    assert report.advantage(results) in readme.replace("\n", " ")
