"""The language model of examples/lm: its gradients, its states, its text, and that it learns."""

import json
import sys
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

import fwp_core as fwp
from fwp_core.feature_maps import ELU1

pytest.importorskip("torch")
pytest.importorskip("tqdm")
sys.path.append(str(Path(__file__).parents[1]))

import torch
from tolerances import CENTRAL_DIFFERENCE, CENTRAL_STEP, NETWORK, assert_bits_equal, relative_error
from torch.autograd.gradcheck import GradcheckError

from examples.lm import report, text, training
from examples.lm.__main__ import main
from examples.lm.fast_weight import fast_weight
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


def tensors(rng, names, B=2, T=5, H=2, K=3, V=4):
    """Inputs of a scan with gradients, by name; the absent ones are None."""
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V)}
    shapes |= {"beta": (B, T, H), "g": (B, T, H), "channel_g": (B, T, H, K), "initial_state": (B, H, K, V)}
    made = {}
    for name in names:
        x = rng.uniform(0, 1, shapes[name]) if name == "beta" else rng.standard_normal(shapes[name])
        x = -abs(x) if name.endswith("g") else x
        made[name.removeprefix("channel_")] = torch.tensor(x, requires_grad=True)
    return made


# the differentiable scan


@pytest.mark.parametrize(
    ("scan", "names", "options"),
    [
        (fwp.delta_rule, ("q", "k", "v", "beta"), {}),
        (fwp.delta_rule, ("q", "k", "v", "beta", "g", "initial_state"), {"qk_norm": "l2"}),
        (fwp.delta_rule, ("q", "k", "v", "beta", "channel_g"), {"scale": 0.7}),
        (fwp.linear_attention, ("q", "k", "v"), {"feature_map": ELU1(), "attention_norm": True}),
        (fwp.linear_attention, ("q", "k", "v", "initial_state"), {"qk_norm": "l2"}),
        (fwp.linear_attention, ("q", "k", "v", "beta", "channel_g", "initial_state"), {}),
    ],
)
def test_gradients_are_the_slopes(scan, names, options):
    inputs = tensors(np.random.default_rng(1), names)

    def outputs(*values):
        return fast_weight(scan, **dict(zip(inputs, values, strict=True)), **options)

    torch.autograd.gradcheck(
        outputs, tuple(inputs.values()), eps=CENTRAL_STEP, atol=CENTRAL_DIFFERENCE, rtol=CENTRAL_DIFFERENCE
    )


def test_gradcheck_sees_a_wrong_gradient(monkeypatch):
    exact = fwp.vjp

    def wrong(*args, **options):
        results, pullback = exact(*args, **options)
        return results, lambda *cotangents: pullback(*cotangents)._replace(dk=None)

    inputs = tuple(tensors(np.random.default_rng(1), ("q", "k", "v", "beta")).values())
    monkeypatch.setattr(fwp, "vjp", wrong)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *x: fast_weight(fwp.delta_rule, *x), inputs)


def test_results_are_those_of_the_scan_on_any_layout():
    rng = np.random.default_rng(2)
    q, k, v = torch.tensor(rng.standard_normal((3, 2, 2, 7, 3))).transpose(2, 3)  # [B,H,T,K] in memory
    beta = torch.tensor(rng.uniform(size=(2, 7, 1))).expand(2, 7, 2)
    o, final_state = fast_weight(fwp.delta_rule, q, k, v, beta)
    expected = fwp.delta_rule(q.numpy(), k.numpy(), v.numpy(), beta.numpy())
    assert_bits_equal(o.numpy(), expected[0])
    assert_bits_equal(final_state.numpy(), expected[1])


def test_gradient_of_a_sum_and_of_one_output_only():
    inputs = tensors(np.random.default_rng(3), ("q", "k", "v", "beta"))
    o, final_state = fast_weight(fwp.delta_rule, **inputs)
    arrays = [x.detach().numpy() for x in inputs.values()]
    only_o, only_state = (
        torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True, materialize_grads=True)
        for y in (o, final_state)
    )
    zero, one = np.zeros_like, np.ones_like
    for (y, dy), given in (((one, zero), only_o), ((zero, one), only_state)):
        expected = fwp.delta_rule_backward(
            y(o.detach().numpy()), *arrays, dfinal_state=dy(final_state.detach().numpy())
        )
        for name, gradient in zip(inputs, given, strict=True):
            assert relative_error(gradient, getattr(expected, f"d{name}")) <= NETWORK, name


def test_an_input_changed_before_the_backward_pass_is_an_error():
    inputs = tensors(np.random.default_rng(4), ("q", "k", "v", "beta"))
    k = inputs["k"] * 1
    o, _ = fast_weight(fwp.delta_rule, **inputs | {"k": k})
    k += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_second_derivatives_and_wrong_shapes_are_errors():
    inputs = tensors(np.random.default_rng(5), ("q", "k", "v", "beta"))
    o, _ = fast_weight(fwp.delta_rule, **inputs)
    (gradient,) = torch.autograd.grad((o**2).sum(), inputs["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(fwp.ShapeError, match="beta"):
        fast_weight(fwp.delta_rule, **inputs | {"beta": inputs["beta"][:, :-1]})


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
