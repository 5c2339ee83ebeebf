"""The examples: gradients of their networks, their protocol, and their quick modes at tiny sizes."""

import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tolerances import CENTRAL_DIFFERENCE, relative_error

import fwp_core as fwp

sys.path.append(str(Path(__file__).parents[1] / "examples" / "paper"))

import retrieval
from memories import FastWeightMemory
from slow_network import Adam, SlowNetwork

# These need matplotlib or tqdm, of the extra "demo".
figures, normalisation, setting1, setting2, sweep, tables = map(
    pytest.importorskip, ("figures", "normalisation", "setting1", "setting2", "sweep", "tables")
)

PAPER = Path(retrieval.__file__).parent
SETTINGS = {"setting1": setting1, "setting2": setting2}
EVERY_RULE = [(name, rule) for name, setting in SETTINGS.items() for rule in setting.rules()]
every_rule = pytest.mark.parametrize(("setting", "rule"), EVERY_RULE)


def tiny_run(setting, rule, **changes):
    """A run over 6 keys of size 8, in batches of 5."""
    rule = replace(SETTINGS[setting].rules()[rule], batch=5)
    return sweep.Run(rule, 6, 1, replace(SETTINGS[setting].PROTOCOL, **{"key_size": 8, **changes}))


def tiny_network(run, dtype=np.float64):
    return SlowNetwork(np.random.default_rng(0), 6, 8, run.rule.with_beta, run.rule.glorot, dtype)


# The task.


@pytest.mark.parametrize("replacement", [False, True])
def test_answers_are_the_last_values_shown(replacement):
    episodes = retrieval.draw_episodes(np.random.default_rng(0), 20, 7, 7, replacement)
    for keys, values, answers in zip(*episodes, strict=True):
        last = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert answers.tolist() == [last.get(key, -1) for key in range(7)]
    repeats = any(len(set(keys)) < 7 for keys in episodes.keys.tolist())
    assert repeats == replacement
    assert (episodes.answers.min() == -1) == replacement


def test_questions_are_about_keys_that_were_shown():
    rng = np.random.default_rng(0)
    episodes = retrieval.draw_episodes(rng, 400, 4, 9, True)
    asked = retrieval.draw_questions(rng, episodes)
    assert all(key in keys for key, keys in zip(asked, episodes.keys, strict=True))
    places = np.argmax(episodes.keys == asked[:, None], axis=1)
    assert set(places.tolist()) == {0, 1, 2, 3}


def test_answering_zero_has_the_loss_one_half():
    losses, error = retrieval.squared_error(np.zeros((3, 5)), np.array([0, 4, 2]))
    assert losses.tolist() == [0.5] * 3
    assert np.array_equal(error, -np.eye(5)[[0, 4, 2]])


# Gradients.


@every_rule
def test_gradients_are_the_slopes_of_the_loss(setting, rule):
    """The whole chain from the loss to each parameter, in a random direction, by central differences."""
    run = tiny_run(setting, rule)
    network = tiny_network(run)

    def loss_and_gradients():
        return sweep.loss_and_gradients(np.random.default_rng(5), network, run, np.float64)

    _, gradients = loss_and_gradients()
    assert set(gradients) == set(network.parameters)
    for name, parameter in network.parameters.items():
        assert gradients[name].dtype == np.float64
        direction = np.random.default_rng(1).standard_normal(parameter.shape)
        start, losses = parameter.copy(), []
        for h in (1e-6, -1e-6):
            parameter[...] = start + h * direction
            losses.append(loss_and_gradients()[0])
        parameter[...] = start
        slope = (losses[0] - losses[1]) / 2e-6
        assert abs(slope - np.vdot(gradients[name], direction)) < CENTRAL_DIFFERENCE, name
        assert np.any(gradients[name]), name


def test_every_step_of_adam_is_that_of_its_paper():
    rng = np.random.default_rng(0)
    x = {"w": rng.standard_normal(4)}
    adam, expected, mean, square = Adam(x, 0.1), x["w"].copy(), np.zeros(4), np.zeros(4)
    for t in range(1, 6):
        g = rng.standard_normal(4)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        expected -= 0.1 * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        adam.step({"w": g})
        assert relative_error(x["w"], expected) < 1e-13


# Memories.


def tokens_of(run, dtype=np.float64):
    length = list(run.protocol.lengths(6).values())[-1]
    rng = np.random.default_rng(3)
    episodes = retrieval.draw_episodes(rng, 5, length, 6, run.protocol.replacement)
    tokens, _ = tiny_network(run, dtype).forward(episodes.keys, episodes.values, np.arange(6))
    return run.rule.memory(np.random.default_rng(4), 8, dtype), tokens


@every_rule
def test_recall_answers_every_question_as_answer_does(setting, rule):
    memory, (q, k, v, beta) = tokens_of(tiny_run(setting, rule))
    every = memory.recall(q, k, v, beta)
    assert every.shape == (5, 6, 6)
    for key in range(6):
        one, _ = memory.answer(np.tile(q[key], (5, 1)), k, v, beta)
        assert relative_error(every[:, key], one, floor=1.0) < 1e-12


@pytest.mark.parametrize("rule", ["elu1", "dpfp2", "favor128"])
def test_one_question_in_attention_form_is_one_question_of_the_fast_weight(rule):
    run = tiny_run("setting1", rule)
    rules = [run.rule, replace(setting1.rules("attention")[rule], batch=5)]
    fast_weight, attention = (
        sweep.loss_and_gradients(
            np.random.default_rng(5), tiny_network(run), replace(run, rule=rule), np.float64
        )
        for rule in rules
    )
    assert abs(fast_weight[0] - attention[0]) < 1e-13
    for name, gradient in fast_weight[1].items():
        assert relative_error(attention[1][name], gradient) < 1e-12, name


def test_the_attention_form_knows_that_nothing_was_stored():
    """Where no key has a feature in common with the query, the answer is 0, and so are the gradients."""
    memory = setting1.rules("attention")["dpfp1"].memory(None, 2, np.float64)
    q, k, v = np.array([[1.0, 1.0]]), -np.ones((1, 3, 2)), np.ones((1, 3, 4))
    answer, pullback = memory.answer(q, k, v, None)
    assert not answer.any()
    assert not any(x.any() for x in pullback(np.ones((1, 4)))[:2])


@pytest.mark.parametrize("rule", ["fwm-dpfp1", "fwm-tanh"])
@pytest.mark.parametrize("segment", [1, 5, 32])
def test_the_fast_weight_memory_is_that_of_the_reference(rule, segment):
    memory, (q, k, v, beta) = tokens_of(tiny_run("setting2", rule))
    memory, k = FastWeightMemory(memory.feature_map, segment=segment), 3 * k
    queries = np.zeros_like(k)
    queries[:, -1] = q[0]
    chosen = {} if memory.feature_map is None else {"feature_map": memory.feature_map}
    inputs = (x[:, :, None] for x in (queries, k, v, beta))
    o, state = fwp.reference.fwm_rule(*inputs, **chosen)
    answer, pullback = memory.answer(np.tile(q[0], (5, 1)), k, v, beta)
    assert relative_error(answer, o[:, -1, 0], floor=1.0) < 1e-12
    assert np.linalg.norm(state, axis=(2, 3)).max() <= 1 + 1e-12

    whole = FastWeightMemory(memory.feature_map).answer(np.tile(q[0], (5, 1)), k, v, beta)[1]
    do = np.random.default_rng(0).standard_normal(answer.shape)
    for x, y in zip(pullback(do), whole(do), strict=True):
        assert np.array_equal(x, y)


def test_random_features_are_drawn_anew_for_each_batch():
    rule, rng = setting1.rules()["favor64"], np.random.default_rng(0)
    first, second = (
        rule.memory(rng, 8, np.float32).feature_map(np.ones((1, 8), np.float32)) for _ in range(2)
    )
    assert first.shape == (1, 16)
    assert not np.array_equal(first, second)
    assert setting1.rules()["favor512"].memory(rng, 64, np.float32).feature_map.dim(64) == 1024


# The protocol.


def scripted_training(monkeypatch, losses, **changes):
    """Train while the evaluations report these losses; the record."""
    script = iter(losses)
    monkeypatch.setattr(sweep, "evaluate", lambda *_: {"S": next(script)})
    return sweep.train(tiny_run("setting1", "elu1", evaluate_every=2, **changes))


@pytest.mark.parametrize(
    ("losses", "evaluations"),
    [
        ([0.5, 0.2, 0.001, 0.5], 3),  # the target is reached
        ([0.3] * 30, 12),  # one, and eleven that are no better
        ([0.3] * 5 + [0.2] * 30, 17),  # a better one starts the count again
        ([np.nan] * 30, 11),
        ([0.5 - 0.001 * i for i in range(100)], 20),  # max_steps
    ],
)
def test_training_stops(monkeypatch, losses, evaluations):
    record = scripted_training(monkeypatch, losses, max_steps=40)
    assert record["steps"] == 2 * evaluations
    rows = record["history"]["rows"]
    assert [row[0] for row in rows] == list(range(2, 2 * evaluations + 1, 2))
    assert [row[1] for row in rows] == losses[:evaluations] or np.isnan(losses[0])
    assert record["best"]["S"] == min(losses[:evaluations]) or np.isnan(losses[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_learns(setting):
    rule = {"setting1": "elu1", "setting2": "delta-dpfp1"}[setting]
    run = tiny_run(setting, rule, key_size=32, max_steps=300)
    run = replace(run, rule=replace(run.rule, rate=3e-3, batch=20))
    record = sweep.train(run)
    first, best = record["history"]["rows"][0][-1], record["best"][record["history"]["columns"][-1]]
    assert best < 0.01
    assert best < first
    assert sweep.train(run)["history"] == record["history"]


def test_the_paper_s_protocol():
    for setting in SETTINGS.values():
        p = setting.PROTOCOL
        assert (p.key_size, p.max_steps, p.evaluate_every, p.sequences) == (64, 100_000, 100, 20)
        assert (p.target, p.patience) == (1e-3, 10)
    assert setting1.PROTOCOL.lengths(20) == {"S": 20}
    assert setting2.PROTOCOL.lengths(20) == {"S": 20, "2S": 40}
    assert setting2.PROTOCOL.stop_on == "2S"
    network = SlowNetwork(np.random.default_rng(0), 20, 64, True)
    assert network.parameters["embedding"].shape == (20, 44)
    assert network.parameters["write"].shape == (64, 65)
    others = {name: rule for s in SETTINGS.values() for name, rule in s.rules().items() if name != "fwm-tanh"}
    assert {(rule.rate, rule.batch) for rule in others.values()} == {(1e-3, 32)}
    tanh = setting2.rules()["fwm-tanh"]
    assert (tanh.rate, tanh.batch) == (1e-4, 128)


# Figures and command lines.


@pytest.mark.parametrize("setting", SETTINGS)
def test_official_losses_are_those_of_the_rules(setting):
    official = figures.OFFICIAL[setting]
    assert set(official["loss"]) == set(SETTINGS[setting].rules())
    assert set(official["symbols"]) <= set(SETTINGS[setting].SYMBOLS)
    assert {len(row) for row in official["loss"].values()} == {len(official["symbols"])}
    if setting == "setting1":
        losses = figures.by_size(official)
        for name, size in official["first_above_0.01"].items():
            assert max(loss for s, loss in losses[name].items() if s < size) <= figures.FAILED
            assert min(loss for s, loss in losses[name].items() if s >= size) > figures.FAILED


def test_first_failure():
    assert figures.first_failure({20: 0.001, 40: 0.01, 60: 0.011}) == 60
    assert figures.first_failure({20: 0.001, 40: np.nan}) == 40
    assert figures.first_failure({20: 0.001}) is None


@pytest.mark.parametrize("setting", SETTINGS)
def test_quick_mode_writes_records_and_a_figure_and_can_be_resumed(setting, tmp_path, capsys):
    rules = {"setting1": ["softmax", "dpfp2"], "setting2": ["sum-dpfp1", "fwm-dpfp1"]}[setting]
    arguments = ["--quick", "--symbols", "4", "5", "--max-steps", "100", "--results", str(tmp_path)]
    main = SETTINGS[setting].main
    main([*arguments, "--rules", rules[0]])
    main([*arguments, "--rules", *rules])
    folder = tmp_path / f"{setting}-quick"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"{rule}-S00{size}-seed1.json" for rule in rules for size in (4, 5)
    )
    for record in sweep.load(folder):
        assert record["steps"] == 100
        assert record["best"].keys() == ({"S"} if setting == "setting1" else {"S", "2S"})
        assert all(0 < loss < 10 for loss in record["best"].values())
    assert "100%" in capsys.readouterr().err

    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (tmp_path / f"{setting}-quick.png").unlink()
    main([*arguments, "--rules", *rules])
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert (tmp_path / f"{setting}-quick.png").read_bytes().startswith(b"\x89PNG")
    assert SETTINGS[setting].rules()[rules[1]].label in capsys.readouterr().out


# The records that are kept.

checkout = pytest.mark.skipif(
    not (PAPER.parents[1] / ".git").exists(), reason="not a git checkout: the sdist has no measured results"
)
FOLDERS = {"setting1": ["setting1", "setting1-attention"], "setting2": ["setting2"]}


def committed(setting):
    """(path, record) of every run of a setting."""
    paths = [path for folder in FOLDERS[setting] for path in (PAPER / "results" / folder).glob("*.json")]
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(paths)]


def departures(setting, path, record):
    """What of a record is not the paper's protocol, or does not follow from the rest of the record."""
    protocol, rule = SETTINGS[setting].PROTOCOL, SETTINGS[setting].rules()[record["rule"]]
    run = sweep.Run(rule, record["symbols"], record["seed"], protocol)
    steps, *losses = zip(*record["history"]["rows"], strict=True)
    columns = list(protocol.lengths(record["symbols"]))
    deciding = losses[columns.index(protocol.stop_on)]
    expected = {
        "protocol": asdict(protocol),
        "rate": rule.rate,
        "batch": rule.batch,
        "steps": steps[-1],
        "best": {name: np.fmin.reduce(column) for name, column in zip(columns, losses, strict=True)},
        "history": {"columns": ["step", *columns], "rows": record["history"]["rows"]},
    }
    found = [name for name, value in expected.items() if record[name] != value]
    found += ["file name"] * (path.name != run.file_name)
    found += ["symbols"] * (record["symbols"] not in SETTINGS[setting].SYMBOLS)
    found += ["steps of history"] * (list(steps) != list(range(100, steps[-1] + 1, 100)))
    ends = [n for n in range(1, len(steps) + 1) if ended(protocol, steps[:n], deciding[:n])]
    return found + ["end"] * (ends != [len(steps)])


def ended(protocol, steps, losses):
    """Whether a run with these losses is over: good enough, long enough, or none of the last was a best."""
    recent, before = losses[-protocol.patience - 1 :], losses[: -protocol.patience - 1]
    best = np.fmin.reduce(before, initial=np.inf)
    hopeless = len(recent) > protocol.patience and not any(loss < best for loss in recent)
    return losses[-1] <= protocol.target or steps[-1] >= protocol.max_steps or hopeless


@checkout
@pytest.mark.parametrize("setting", SETTINGS)
def test_committed_records_are_of_this_protocol(setting):
    records = committed(setting)
    assert records
    for path, record in records:
        assert departures(setting, path, record) == [], path


def falsified(record):
    """(what, record) for every single lie that a record could tell."""
    for name, value in {"max_steps": 500, "key_size": 32, "evaluate_every": 50, "stop_on": "L"}.items():
        yield name, record | {"protocol": record["protocol"] | {name: value}}
    for name, value in {"rate": 3e-3, "batch": 64, "symbols": 100, "seed": 2, "steps": 50}.items():
        yield name, record | {name: value}
    yield "best", record | {"best": {name: loss / 2 for name, loss in record["best"].items()}}
    columns, rows = record["history"].values()
    cut = rows[:-1]
    best = {name: min(row[i] for row in cut) for i, name in enumerate(columns) if i}
    history = {"columns": columns, "rows": cut}
    yield "cut", record | {"history": history, "steps": cut[-1][0], "best": best}


@checkout
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_falsified_record_is_seen(setting):
    path, record = committed(setting)[0]
    lies = dict(falsified(record))
    assert len(lies) == 11
    for what, lie in lies.items():
        assert departures(setting, path, lie) != [], what


@checkout
def test_the_readme_shows_the_records_that_are_kept():
    """python examples/paper/tables.py makes it so."""
    readme = (PAPER / "README.md").read_text(encoding="utf-8")
    assert tables.filled(readme) == readme
    assert re.findall("<!-- table: (.*) -->", readme) == list(tables.TABLES)


def test_tables_beside_the_logs():
    assert tables.cliff({20: 0.001, 40: 0.02, 60: 0.1}) == 40
    assert tables.cliff({20: 0.001, 60: 0.02}) == "at most 60"
    assert tables.cliff({20: 0.02}) == 20
    assert tables.cliff({20: 0.002}) == ""
    assert tables.beside(0.0334, 0.0245) == "0.0334 / 0.0245"
    assert tables.beside(0.0334, None) == "0.0334"
    assert [tables.number(x) for x in (0.00018, 62.3, 1019.0, 344000.0)] == [
        "0.00018",
        "62",
        "1.0e3",
        "3.4e5",
    ]
    assert tables.markdown(["a", "|b|"], [[1, 2]]) == "| a | \\|b\\| |\n| --- | --- |\n| 1 | 2 |\n"


# Normalisation of the delta rule.


def set_up(label):
    (found,) = [s for s in normalisation.SET_UPS if s.label == label]
    return found


def test_a_pair_written_again_is_met_by_what_the_first_write_left():
    """v - v~ shrinks by 1 - beta n; under attention normalisation, the read mixes old and new."""
    rng = np.random.default_rng(0)
    keys, values = np.repeat(rng.standard_normal((2, 1, 64)), 2, axis=1)
    for label in ("no map, L2", "DPFP-1, sum", "ELU+1, sum"):
        m = normalisation.trace(set_up(label), keys, values, beta=0.3)
        assert m["contrast"][0] == 1
        assert abs(m["contrast"][1] - (1 - m["write_strength"][0])) < 1e-12
    m = normalisation.trace(set_up("ELU+1, attention"), keys, values, beta=0.3)
    assert m["contrast"][0] == 1
    assert abs(m["contrast"][1] - 0.7) < 1e-6  # nothing was there before: the read is beta v


@pytest.mark.parametrize("label", ["ELU+1, attention", "ELU+1, sum + attention"])
def test_attention_normalisation_reads_a_mixture(label):
    """After a write the key reads ((s - beta n) v~ + beta n v) / (s + n)."""
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 30, 64))
    keys, values = np.append(keys, keys[-1:], axis=0), np.append(values, values[-1:], axis=0)
    m = normalisation.trace(set_up(label), keys, values, beta=0.4)
    s, n, v = m["accumulator"][29], m["accumulator"][30] - m["accumulator"][29], values[29]
    assert abs(m["write_strength"][29] - 0.4 * n / (s + n)) < 1e-12
    old = normalisation.trace(set_up(label), keys[:-1], values[:-1], beta=0.4)
    assert old["contrast"][29] == m["contrast"][29]
    before = stored(set_up(label), keys[:29], values[:29], keys[29], beta=0.4)
    read = ((s - 0.4 * n) * before + 0.4 * n * v) / (s + n)
    assert abs(m["contrast"][30] - np.linalg.norm(v - read) / np.linalg.norm(v)) < 1e-7


def stored(chosen, keys, values, key, beta):
    """What a key reads after all writes, by the reference."""
    k = np.append(keys, key[None], axis=0)[None, :, None]
    v = np.append(values, np.zeros((1, 64)), axis=0)[None, :, None]
    strength = np.append(np.full(len(keys), beta), 0.0)[None, :, None]
    _, state = fwp.reference.delta_rule(k[:, :-1], k[:, :-1], v[:, :-1], strength[:, :-1], **chosen.options)
    _, after = fwp.reference.delta_rule(k, k, v, strength, **chosen.options)
    phi = after[0, 0, :, -1] - state[0, 0, :, -1]
    return phi @ state[0, 0, :, :-1] / (phi @ state[0, 0, :, -1])


def test_what_each_normalisation_keeps_fixed():
    length = normalisation.growth(set_up("no map, L2"), 50)
    assert np.abs(length["write_strength"] - 0.5).max() < 1e-12
    for label in ("DPFP-1, sum", "ELU+1, sum"):
        assert np.abs(normalisation.growth(set_up(label), 50)["balance"] - 1).max() < 1e-12


def test_the_accumulator_grows_with_the_steps():
    for label in ("ELU+1, attention", "ELU+1, sum + attention"):
        m = normalisation.growth(set_up(label), 600)
        assert 0.9 < normalisation.slope(m["accumulator"]) < 1.1
        assert m["balance"][-1] < 0.1 * m["balance"][10]


def test_without_normalisation_only_short_keys_survive():
    lengths = {
        label: len(normalisation.growth(set_up(label), 600)["state_norm"])
        for label in ("no map, none, |k|² ≈ 1", "DPFP-1, none", "ELU+1, none")
    }
    assert lengths["no map, none, |k|² ≈ 1"] == 600
    assert lengths["ELU+1, none"] < 30 < lengths["DPFP-1, none"] < 300


def test_slope_and_smoothing():
    i = np.arange(1.0, 1000)
    assert abs(normalisation.slope(3 * i**1.5) - 1.5) < 1e-12
    assert np.allclose(normalisation.smooth(np.full(100, 0.3)), 0.3)
    wild = normalisation.smooth(np.array([np.inf, 2.0, 0.0] + 29 * [8.0]))
    assert np.isnan(wild[[0, 2]]).all()
    assert np.allclose(wild[[1, 3, 31]], [2, 8, 8])


def test_contrast_falls_where_pairs_can_be_stored_and_stays_where_not():
    contrast = {
        label: normalisation.by_sweep(normalisation.repeated_pairs(set_up(label), pairs=4, sweeps=30), 4)
        for label in ("no map, none, |k|² ≈ 1", "no map, L2", "ELU+1, attention", "ELU+1, none")
    }
    for label in ("no map, none, |k|² ≈ 1", "no map, L2"):
        assert contrast[label][29] < 1e-6 < 0.5 < contrast[label][30]
    assert contrast["ELU+1, attention"][29] > 0.5
    assert len(contrast["ELU+1, none"]) < 10


def test_means_of_whole_sweeps():
    assert normalisation.by_sweep(np.arange(11.0), 4).tolist() == [1.5, 5.5]
    assert normalisation.by_sweep(np.arange(3.0), 4).size == 0


def test_normalisation_in_quick_mode(tmp_path):
    normalisation.main(["--quick", "--results", str(tmp_path)])
    summary = json.loads((tmp_path / "normalisation-quick.json").read_text())
    labels = {s.label for s in normalisation.SET_UPS}
    assert set(summary["contrast"]) == set(summary["growth"]) == labels
    assert summary["growth"]["ELU+1, none"]["diverged_at"] < 30
    assert summary["contrast"]["ELU+1, none"]["diverged_at"] < 30
    assert summary["contrast"]["ELU+1, sum"]["diverged_at"] is None
    assert summary["growth"]["ELU+1, sum"]["diverged_at"] is None
    assert (tmp_path / "normalisation-quick.png").read_bytes().startswith(b"\x89PNG")
