"""The benchmark's registry, its protocol and its reports; nothing here looks at a time."""

import importlib.metadata
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import fwp_core as fwp

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compare
import measure
import peers
import registry
import report
import worker
from measure import Key, Samples, Settings
from registry import GROUPS, Case
from tolerances import ROUNDING

BENCHMARKS = Path(compare.__file__).parent
CASES = list(dict.fromkeys(case for cases in GROUPS.values() for case in cases))
SCANS = [case for case in CASES if case.rule in registry.FAST_WEIGHT_RULES]
TINY = list(dict.fromkeys(replace(case.tiny(), every_thread_count=False) for case in CASES))
TINY_SCANS = [case for case in TINY if case.rule in registry.FAST_WEIGHT_RULES]


def features_of(case):
    return {"feature_map": fwp.feature_maps.DPFP(case.nu), "qk_norm": "sum"} if case.nu else {}


def name_of(parameter):
    return getattr(parameter, "name", None)


# the registry


@pytest.mark.parametrize("group", GROUPS)
def test_names_tell_the_cases_of_a_group_apart(group):
    names = [case.name for case in GROUPS[group]]
    assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_case_is_one_that_somebody_measures(case):
    assert case.rule in {"linear", "delta", "softmax", "sgemm", "copy", "add"}
    assert case.task in registry.TASKS
    assert case.decay in {"none", "scalar", "channel"}
    asked = [name for name, peer in peers.PEERS.items() if peer.is_asked(case)]
    assert (peers.OURS in asked) == (case in SCANS)
    assert asked


def test_the_table_holds_the_promised_cases():
    names = {case.name for case in GROUPS["main"]}
    scans = ("delta", "linear", "delta-scalar", "delta-channel")
    forward = {f"{s}/forward/T{t}-H8-K{k}" for s in scans for t in (1024, 4096) for k in (64, 128)}
    training = {f"{s}/forward+backward/T4096-H8-K{k}" for s in scans for k in (64, 128)}
    steps = {"delta/step/H32-K128", "delta/step/H1-K64", "delta/step/B32-H32-K128"}
    assert forward | training | steps | {"delta/forward/T65536-H1-K64"} <= names


def test_a_case_with_a_map_is_for_the_library_fused_and_not():
    (case,) = [case for case in GROUPS["main"] if case.nu]
    assert case.name == "delta-dpfp3/forward/T16384-H1-K64"
    assert (case.features, case.V) == (384, 64)
    assert replace(case, every_thread_count=False) in GROUPS["memory"]
    for mapped in (case, case.tiny()):
        asked = [name for name, peer in peers.PEERS.items() if peer.is_asked(mapped)]
        assert asked == ["fwp_core", "fwp_core unfused"]


def test_unfused_is_the_map_and_then_the_scan(monkeypatch):
    """What reaches the scan is features: the map is not applied twice, and not inside."""
    case, seen = Case("delta", T=6, K=4, V=5, nu=2), []
    module = peers.PEERS["fwp_core unfused"].load()
    monkeypatch.setitem(module.SCAN, "delta", lambda *x, **options: seen.append((x, options)))
    module.prepare(case).call()
    ((q, k, *_), options), phi, x = seen[0], fwp.feature_maps.DPFP(2), registry.inputs(case)
    assert np.array_equal(q, phi(x.q))
    assert np.array_equal(k, phi(x.k))
    assert options["feature_map"] is None
    assert options["qk_norm"] == "sum"


def test_the_lower_level_is_asked_for_delta_forward_only():
    v3 = peers.PEERS["fwp_core v3"]
    asked = {(case.rule, case.decay, case.task) for case in CASES if v3.is_asked(case)}
    assert asked == {("delta", "none", "forward")}


@pytest.mark.parametrize(
    ("case", "credit"),
    [
        (Case("delta", T=10, H=3, K=4, V=5), 6 * 4 * 5 * 30),
        (Case("linear", T=10, H=3, K=4, V=5), 4 * 4 * 5 * 30),
        (Case("delta", "forward+backward", "channel", B=2, T=10, H=3, K=4, V=5), 22 * 4 * 5 * 60),
        (Case("linear", "forward+backward", T=10, H=3, K=4, V=5), 14 * 4 * 5 * 30),
        (Case("delta", "step", B=2, H=3, K=4, V=5), 2 * 4 * (2 * 3 * 4 * 5)),
        (Case("delta", T=10, H=3, K=4, V=5, nu=3), 6 * 24 * 5 * 30),
        (Case("softmax", T=3, H=2, K=4, V=5), 2 * (1 + 2 + 3) * (2 * 4 + 2 * 5)),
        (Case("sgemm", T=10), 2000),
        (Case("copy", T=10), 80),
        (Case("add", T=10), 120),
    ],
    ids=name_of,
)
def test_credited_work(case, credit):
    assert case.credit == credit


@pytest.mark.parametrize("case", TINY_SCANS, ids=name_of)
def test_array_bytes_are_those_of_a_forward_and_backward_pass(case):
    case = replace(case, task="forward+backward")
    x = registry.inputs(case)
    (o, state), pullback = fwp.vjp(
        fwp.delta_rule if x.beta is not None else fwp.linear_attention, *x.values()[:5], **features_of(case)
    )
    arrays = [*x.values(), o, state, *pullback(x.do)]
    assert case.array_bytes == sum(array.nbytes for array in arrays if array is not None)
    forward = [*x.values()[:5], o, state]
    expected = sum(array.nbytes for array in forward if array is not None)
    assert replace(case, task="forward").array_bytes == expected


@pytest.mark.parametrize("case", TINY_SCANS, ids=name_of)
def test_inputs_have_the_shapes_of_their_case(case):
    x = registry.inputs(case)
    rows = (case.B, case.H) if case.task == "step" else (case.B, case.T, case.H)
    key_rows = (*rows[:-1], case.query_heads or case.H)
    assert x.q.shape == x.k.shape == (*key_rows, case.K)
    assert x.v.shape == (*rows, case.V)
    rounding = ROUNDING.get(np.dtype(case.dtype), 0)
    np.testing.assert_allclose(np.linalg.norm(x.k.astype(np.float32), axis=-1), 1, rtol=1e-6 + rounding)
    assert (x.beta is None) == (case.rule == "linear")
    gate = {"none": None, "scalar": rows, "channel": (*rows, case.features)}[case.decay]
    assert (None if x.g is None else x.g.shape) == gate
    assert (x.state is None) == (case.task != "step")
    assert (x.do is None) == (case.task != "forward+backward")
    arrays = [array for array in x.values()[:-1] if array is not None]
    assert {array.dtype for array in arrays} == {np.dtype(case.dtype)}
    assert {array.ctypes.data % 64 for array in arrays} == {0}


def test_inputs_are_the_same_in_every_process():
    code = "import registry; print(registry.inputs(registry.Case('delta', T=5, K=4, V=4)).q.sum())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(registry.inputs(Case("delta", T=5, K=4, V=4)).q.sum())


# the exact results


@pytest.mark.parametrize("rule", registry.FAST_WEIGHT_RULES)
@pytest.mark.parametrize("nu", [0, 2])
def test_exact_gradients_do_not_depend_on_pieces(rule, nu):
    case = Case(rule, "forward+backward", decay="scalar", T=23, H=2, K=5, V=4, nu=nu)
    x = [None if array is None else array.astype(np.float64) for array in registry.inputs(case).values()]
    whole, pieces = (registry._exact_gradients(case, x[5], *x[:5], tokens=n) for n in (23, 7))
    assert (
        whole.keys()
        == pieces.keys()
        == ({"dq", "dk", "dv", "dbeta", "dg"} - ({"dbeta"} if rule == "linear" else set()))
    )
    for name, array in whole.items():
        np.testing.assert_allclose(pieces[name], array, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", [case for case in TINY_SCANS if not case.query_heads], ids=name_of)
def test_exact_results_are_those_of_the_specification(case):
    x, expected = registry.inputs(case), registry.exact(case)
    step = case.task == "step"
    arrays = [array[:, None] if step and array is not None else array for array in x.values()[:5]]
    scan = fwp.reference.delta_rule if case.rule == "delta" else fwp.reference.linear_attention
    o, state = scan(*arrays, scale=case.scale, initial_state=x.state, **features_of(case))
    np.testing.assert_allclose(expected["o"], registry.checked(case, o[:, 0] if step else o), rtol=1e-11)
    if step:
        np.testing.assert_allclose(expected["state"], registry.checked(case, state), rtol=1e-11)
    given = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "g": x.g}
    present = {f"d{name}" for name, array in given.items() if array is not None}
    assert (
        set(expected) == {"o"} | {"forward": set(), "step": {"state"}, "forward+backward": present}[case.task]
    )


def test_exact_softmax_is_softmax_attention():
    case = Case("softmax", T=5, H=3, K=4, V=4)
    x = registry.inputs(case)
    o = fwp.reference.softmax_attention(x.q, x.k, x.v)
    np.testing.assert_allclose(registry.exact(case)["o"], o[:, :, [0, 2]])


@pytest.mark.parametrize("index", [(0, 0, 0, 0), (-1, -1, -1, -1)])
@pytest.mark.parametrize("value", [100.0, np.nan])
def test_errors_see_a_wrong_entry_in_the_first_and_last_head(index, value):
    case = Case("delta", "forward+backward", B=3, T=6, H=3, K=4, V=4)
    results = peers.PEERS[peers.OURS].load().prepare(case)
    results.call()
    arrays, expected = results.results(), registry.exact(case)
    assert max(registry.errors(case, arrays, expected).values()) < 1e-6
    arrays["dk"][index] += value
    assert registry.errors(case, arrays, expected)["dk"] > case.tolerance
    assert registry.errors(case, {"o": arrays["o"]}, expected)["dq"] == np.inf


def test_a_long_forward_pass_is_compared_at_its_beginning():
    case = Case("linear", T=registry.CHECKED_TOKENS + 7, K=1, V=1)
    assert registry.exact(case)["o"].shape == (1, registry.CHECKED_TOKENS, 1, 1)
    longer = replace(case, task="forward+backward", T=5000)
    assert registry.checked(longer, registry.inputs(longer).v).shape == (1, 5000, 1, 1)


# the plan


def test_plan_asks_everybody_for_what_concerns_them():
    settings = Settings(thread_counts=(1, 2), peers=("fwp_core", "numpy", "onnxruntime", "torch"))
    cases = [
        Case("delta", T=8, every_thread_count=True),
        Case("delta", T=8, alone=True),
        Case("softmax", T=8),
        Case("copy", T=8, every_thread_count=True),
    ]
    asked = [(block.case.rule, block.threads, block.peers) for block in measure.plan(cases, settings)]
    assert asked == [
        ("delta", 1, ("fwp_core", "onnxruntime")),
        ("delta", 2, ("fwp_core", "onnxruntime")),
        ("delta", 2, ("fwp_core",)),
        ("softmax", 2, ("torch",)),
        ("copy", 1, ("numpy",)),
        ("copy", 2, ("numpy",)),
    ]


def test_plan_leaves_out_a_case_that_concerns_nobody_chosen():
    assert measure.plan([Case("softmax", T=8)], Settings(peers=("fwp_core", "numpy"))) == []


# the rounds, with participants that only note when they are called


class Note:
    """A worker whose calls take as many seconds as it says."""

    def __init__(self, key, log, seconds=0.001):
        self.key, self.log, self.seconds = key, log, seconds

    def ask(self, do, case=None, **arguments):
        self.log.append((do, self.key, case and case.name))
        return {"rate": 1e9} if do == "peak" else {"seconds": self.seconds}


def run_rounds(peer_seconds, number, tokens=(8, 9)):
    log, cases = [], [Case("delta", T=T) for T in tokens]
    keys = [Key(peer, 1) for peer in peer_seconds]
    open_ = {key: Note(key, log, peer_seconds[key.peer]) for key in keys}
    samples = [Samples(case, key, {}) for case in cases for key in keys]
    settings = Settings(rounds=number, slow_rounds=2)
    measure.rounds(samples, open_, settings, say=lambda text: None)
    return samples, log


def test_rounds_give_everyone_a_sample_and_a_peak_per_round():
    samples, log = run_rounds({"fwp_core": 0.001, "onnxruntime": 0.002}, 5)
    assert all(len(sample.seconds) == len(sample.peaks) == 5 for sample in samples)
    assert len(log) == 5 * 2 * 3


def test_rounds_interleave_participants_and_measure_the_peak_before_each_case():
    _, log = run_rounds({"fwp_core": 0.001, "onnxruntime": 0.002, "fla": 0.003}, 6)
    blocks = [log[i : i + 4] for i in range(0, len(log), 4)]
    for block in blocks:
        assert block[0] == ("peak", Key("fwp_core", 1), None)
        assert {key.peer for _, key, _ in block[1:]} == {"fwp_core", "onnxruntime", "fla"}
        assert len({case for _, _, case in block[1:]}) == 1
    assert len({tuple(key.peer for _, key, _ in block) for block in blocks}) > 1, "always the same order"
    for i in range(0, len(blocks), 2):
        assert {block[1][2] for block in blocks[i : i + 2]} == {
            "delta/forward/T8-H1-K1",
            "delta/forward/T9-H1-K1",
        }


def test_rounds_measure_the_peak_of_another_level_by_itself():
    samples, log = run_rounds({"fwp_core": 0.001, "fwp_core v3": 0.002}, 1, tokens=[8])
    assert {key.peer for do, key, _ in log if do == "peak"} == {"fwp_core", "fwp_core v3"}
    assert len(samples[1].peaks) == 1


def test_rounds_do_not_wait_for_the_slow_every_time():
    samples, _ = run_rounds({"fwp_core": 0.001, "fla": 3.0}, 5, tokens=[8])
    assert [len(sample.seconds) for sample in samples] == [5, 2]


def test_rounds_stop_when_a_participant_fails():
    class Failing(Note):
        def ask(self, do, **arguments):
            return {"refused": "its process ended"} if do == "run" else super().ask(do, **arguments)

    key = Key("fwp_core", 1)
    samples = [Samples(Case("delta", T=8), key, {})]
    with pytest.raises(RuntimeError, match="its process ended"):
        measure.rounds(samples, {key: Failing(key, [])}, Settings(), say=lambda text: None)


# the gate


def wrong_prepare(case):
    prepared = peers.PEERS[peers.OURS].load()._forward(case, registry.inputs(case))
    return prepared._replace(results=lambda: {"o": prepared.results()["o"] * np.float32(1.001)})


@pytest.mark.parametrize("wrong", [False, True])
def test_gate_refuses_a_wrong_result(monkeypatch, tmp_path, wrong):
    case = Case("delta", T=6, H=2, K=4, V=4)
    np.savez(tmp_path / "exact.npz", **registry.exact(case))
    server = worker.Server(peers.OURS, 1)
    if wrong:
        monkeypatch.setattr(server.module, "prepare", wrong_prepare)
    answer = server.prepare(case, str(tmp_path / "exact.npz"))
    assert ("refused" in answer) == wrong
    if wrong:
        assert re.match(r"out of tolerance: o 1\.0e-03", answer["refused"])
        assert case.name not in server.prepared, "it could be timed"
    else:
        assert server.run(case)["seconds"] > 0


class Refusing:
    def ask(self, do, case, exact):
        return {"refused": "out of tolerance: o 1e-2"}


def test_gate_names_who_is_refused_and_why():
    case, refusals = Case("delta", T=6, H=2, K=4, V=4), []
    blocks = measure.plan([case], Settings(peers=("onnxruntime",)))
    passed = measure.gate(blocks, {Key("onnxruntime", 1): Refusing()}, refusals, say=lambda text: None)
    assert passed == []
    assert refusals == [("onnxruntime", case.name, "out of tolerance: o 1e-2")]


def test_nothing_is_timed_if_the_library_itself_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(measure, "exact", lambda case: {"o": np.ones((1, case.T, 2, case.V))})
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "--quick", "--peers", "none", "--cases", "delta/forward/T1024-H8-K64"]
    )
    monkeypatch.setattr(measure, "rounds", lambda *arguments: pytest.fail("timed"))
    assert compare.main() == 1
    assert "out of tolerance" in capsys.readouterr().err


# the processes


def stub(tmp_path, monkeypatch, text):
    """A package onnxruntime that does as it is told."""
    (tmp_path / "onnxruntime.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    handle = worker.Worker("onnxruntime", 1)
    handle.close()
    return handle.versions["refused"]


def test_a_participant_that_is_not_installed_says_so(tmp_path, monkeypatch):
    reason = stub(
        tmp_path, monkeypatch, "print('noise')\nraise ImportError(\"No module named 'onnxruntime'\")"
    )
    assert reason == "not installed: No module named 'onnxruntime'"


def test_a_participant_that_dies_leaves_its_last_words(tmp_path, monkeypatch):
    code = "import os, sys; print('first\\nillegal instruction', file=sys.stderr, flush=True); os._exit(3)"
    assert stub(tmp_path, monkeypatch, code) == "its process ended with status 3: illegal instruction"


def test_a_participant_that_fails_says_how(tmp_path, monkeypatch):
    assert stub(tmp_path, monkeypatch, "1 / 0") == "failed: ZeroDivisionError: division by zero"


def test_a_process_has_its_own_threads_and_level():
    name = fwp.available_isas()[0]
    variant = peers.PEERS["fwp_core v3"]._replace(environment=(("FWP_ISA", name),))
    environment = dict(variant.environment)
    assert environment == {"FWP_ISA": name}
    handle = worker.Worker("numpy", 3)
    assert handle.versions == {"numpy": np.__version__}
    handle.close()
    assert handle.process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_a_call_needs_beyond_its_results(monkeypatch):
    server = worker.Server(peers.OURS, 1)

    def prepare(case):
        results, scratch = 32 * 2**20, 64 * 2**20

        def call():
            kept.append(np.ones(results, np.uint8))
            np.ones(scratch, np.uint8)

        kept = []
        return peers.Prepared(call, dict, allocates=results)

    monkeypatch.setattr(server.module, "prepare", prepare)
    assert 60 * 2**20 < server.memory(Case("delta", T=8))["extra"] < 72 * 2**20


def test_a_participant_waits_until_its_threads_have_come_to_rest():
    spinning = threading.Event()

    def spin():
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass
        spinning.set()

    threading.Thread(target=spin).start()
    worker._rest(most=60)
    assert spinning.is_set()


# the peers, where they are installed


ASKED = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name, peer in peers.PEERS.items()
    for case in TINY
    if peer.is_asked(case) and case.rule not in ("sgemm", "copy", "add") and not case.query_heads
]


@pytest.mark.parametrize(("peer", "case"), ASKED)
def test_peers_compute_the_same_or_say_why_not(peer, case):
    try:
        module = peers.PEERS[peer].load()
    except ImportError as reason:
        pytest.skip(str(reason))
    module.start(1)
    try:
        prepared = module.prepare(case)
    except peers.Unsupported as reason:
        pytest.skip(str(reason))
    before = [None if array is None else array.copy() for array in registry.inputs(case).values()]
    prepared.call()
    found = registry.errors(case, prepared.results(), registry.exact(case))
    assert max(found.values()) <= case.tolerance, found
    prepared.call()
    for array, copy in zip(registry.inputs(case).values(), before, strict=True):
        np.testing.assert_array_equal(array, copy, "the inputs of the next participant have changed")


def test_the_extra_installs_what_the_peers_need():
    required = importlib.metadata.requires("fwp_core")
    pinned = {match[1] for text in required if (match := re.match(r"([\w-]+)==.*bench", text))}
    used = set()
    for peer in peers.PEERS.values():
        source = (BENCHMARKS / "peers" / f"{peer.module}.py").read_text()
        used |= set(re.findall('"([^"]+)"', re.search(r"^PACKAGES = (.*)$", source, re.MULTILINE).group(1)))
    assert used - pinned == {"fwp_core", "numpy", "pytorch-fast-transformers"}
    assert pinned <= used


# the report


def sample(peer="fwp_core", case=None, seconds=(2e-3, 1e-3, 4e-3), peaks=(1e9, 3e9, 2e9), threads=2):
    return Samples(
        case or Case("delta", T=1000, K=8, V=8), Key(peer, threads), {"o": 1e-7}, [*seconds], [*peaks]
    )


def test_records_give_medians_best_and_shares_of_both_peaks():
    (row,) = report.records([sample()])
    flops = 6 * 64 * 1000
    assert row["seconds"] == {"median": 2e-3, "best": 1e-3, "samples": [2e-3, 1e-3, 4e-3]}
    assert row["rate"] == pytest.approx(flops / 2e-3)
    assert row["best_rate"] == pytest.approx(flops / 1e-3)
    assert row["limit"] == {"median": 2e9, "best": 3e9}
    assert row["share"] == pytest.approx({"median": flops / 2e-3 / 2e9, "best": flops / 2e-3 / 3e9})


def test_records_compare_a_step_with_the_bandwidth_on_the_same_threads():
    copies = [sample("numpy", Case("copy", T=1000), [t], threads=n) for n, t in ((1, 4e-3), (2, 1e-3))]
    step = sample(case=Case("delta", "step", H=2, K=8, V=8), seconds=[1e-6])
    row = report.records([*copies, step])[-1]
    assert row["limit"]["median"] == pytest.approx(8e6)
    assert row["share"]["median"] == pytest.approx(2 * 4 * 128 / 1e-6 / 8e6)
    assert report.records([step])[0]["share"] == {}


def test_table_shows_everyone_beside_ours(capsys):
    step = Case("delta", "step", H=2, K=8, V=8)
    rows = report.records([sample(), sample("onnxruntime", seconds=[6e-3] * 3), sample("fla", step)])
    report.print_table("title", rows)
    text = capsys.readouterr().out
    assert re.search(
        r"^delta/forward/T1000-H1-K8, 2 threads; limit 2\.0, best 3\.0 GF/s$", text, re.MULTILINE
    )
    assert re.search(r"^  fwp_core +2\.00 +1\.00 +0\.2 +0\.10 +0\.06  1\.0e-07 o +1\.00$", text, re.MULTILINE)
    assert re.search(r"^  onnxruntime +6\.00 .* 3\.00$", text, re.MULTILINE)
    assert re.search(r"^  fla +2000\.00 +1000\.00 .* - +- .* -$", text, re.MULTILINE)


def test_refusals_of_one_kind_are_one_line_that_names_the_peer(capsys):
    cases = [f"case{i}" for i in range(5)]
    refusals = [measure.Refusal("fla", case, "no gradient") for case in cases]
    report.print_refusals(report.refusal_records([*refusals, measure.Refusal("torch", "", "not installed")]))
    lines = capsys.readouterr().out.splitlines()
    assert "  fla: no gradient (5 cases: case0, case1, case2, ...)" in lines
    assert "  torch: not installed" in lines


# the whole


def run_compare(*arguments):
    command = [sys.executable, BENCHMARKS / "compare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments", [("--rounds", 0), ("--threads", 0), ("--peers", "nobody"), ("--groups", "nothing")]
)
def test_wrong_arguments_exit_with_2_and_usage(arguments):
    result = run_compare(*arguments)
    assert result.returncode == 2
    assert "usage: compare.py" in result.stderr


def test_list_names_the_cases_without_running_them():
    result = run_compare("--list", "--scaling", "--cases", "delta/step/*", "softmax/*")
    names = {line.split()[1] for line in result.stdout.splitlines()}
    assert {"delta/step/H1-K64", "softmax/forward/T16384-H2-K64"} <= names
    assert all(name.startswith(("delta/step/", "softmax/")) for name in names)


SOME = (
    "copy/*",
    "delta/step/H1-K64",
    *(f"delta/forward/{shape}-K64" for shape in ("T4096-H8", "T16384-H2", "T2048-H8")),
    "delta/forward+backward/T65536-H1-K64",
)


@pytest.mark.parametrize("cases", [SOME, pytest.param(("*",), marks=pytest.mark.slow)], ids=["some", "all"])
def test_quick_run_writes_everything(tmp_path, cases):
    path, picture = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--quick", "--rounds", 2, "--peers", "none", "--threads", 1, 2, "--scaling", "--json", path]
    try:
        import matplotlib  # noqa: F401

        options += ["--plot", picture]
    except ImportError:
        picture = None
    result = run_compare(*options, "--cases", *cases)
    assert result.returncode == 0, result.stderr
    document = json.loads(path.read_text())
    rows = [row for group in ("main", "tokens", "sizes", "threads") for row in document.get(group, [])]
    assert {"fwp_core"} <= {row["peer"] for row in rows} <= {"fwp_core", "numpy"}
    assert {row["threads"] for row in rows} == {1, 2}
    for row in rows:
        assert 0 < row["seconds"]["best"] <= row["seconds"]["median"]
        assert len(row["seconds"]["samples"]) == 2
        case = Case(**{field.name: row[field.name] for field in fields(Case)})
        assert all(error <= case.tolerance for error in row["errors"].values())
        assert row["errors"] or row["peer"] == "numpy"
        assert row["limit"]["median"] <= row["limit"]["best"]
        assert row["case"] in result.stdout
    assert {row["peer"] for row in document["memory"]} == {"fwp_core"}
    assert document["versions"] == {"fwp_core": fwp.__version__, "numpy": np.__version__}
    assert document["machine"]["processors"] >= 1
    assert document["refusals"] == []
    if picture:
        assert picture.read_bytes().startswith(b"\x89PNG")
