"""The benchmark for GPUs: its cases, floors and table, and the whole of it in a dry run on the CPU."""

import ast
import functools
import importlib
import json
import sys
import types
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
gpu, gpu_cases, gpu_peers = map(importlib.import_module, ("gpu", "gpu_cases", "gpu_peers"))

# cases and floors


def test_cases_are_those_of_the_plan():
    names = [gpu_cases.name(case) for case in gpu_cases.timed(False) + gpu_cases.decoding(False)]
    assert len(set(names)) == len(names) == 6 * 6 * 2 * 2 + 6
    assert names[-6] == "gdn step B256 T1 H16 D128"
    assert "kda fwd+bwd B1 T131072 H32 D64" in names
    checked = {(gpu_cases.model(case), case.K) for case in gpu_cases.checked(False)}
    assert checked == {(gpu_cases.model(case), case.K) for case in gpu_cases.timed(False)}


@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [
        (("linear", "none"), (1024, 98e3), (1792, 246e3)),
        (("linear", "scalar"), (1028, 98e3), (1800, 246e3)),
        (("linear", "channel"), (1280, 98e3), (2304, 246e3)),
        (("delta", "none"), (1026, 168e3), (1796, 410e3)),
        (("delta", "scalar"), (1030, 168e3), (1804, 426e3)),
        (("delta", "channel"), (1282, 168e3), (2308, 426e3)),
    ],
)
def test_floors_of_a_token_and_head(kind, forward, backward):
    case = gpu_cases.case(*kind, "forward+backward", 1, 1, 1, 128)
    floors = gpu_cases.floors(case)
    assert [floor.bytes for floor in floors] == [forward[0], backward[0]]
    assert [floor.flops for floor in floors] == pytest.approx([forward[1], backward[1]], rel=5e-3)


def test_floor_of_decoding_is_its_states():
    (floor,) = gpu_cases.floors(gpu_cases.case("delta", "none", "step", 256, 1, 16, 128))
    assert floor.seconds(4.3e12, 790e12) == pytest.approx(126e-6, rel=0.02)


@pytest.mark.parametrize("case", gpu_cases.checked(True) + gpu_cases.decoding(True), ids=gpu_cases.name)
def test_tensors_follow_from_case_and_seed(case):
    x, again, other = (gpu_cases.tensors(case, "cpu", seed) for seed in (0, 0, 1))
    assert all(torch.equal(array, again.inputs[name]) for name, array in x.inputs.items())
    assert not torch.equal(x.q, other.q)
    assert ("beta" in x.inputs, "g" in x.inputs) == (case.rule == "delta", case.decay != "none")
    size = sum(array.nbytes for array in x.inputs.values()) + x.do.nbytes  # do is as large as o
    states = 2 * x.state.nbytes if case.task == "step" else 0
    assert gpu_cases.floors(case)[0].bytes == size + states


# peers


def test_fla_has_the_functions_and_parameters_that_it_is_called_with():
    try:
        installed = {file.as_posix(): file for file in files("fla-core")}
    except PackageNotFoundError:
        pytest.skip("fla is not installed")
    tables = [(gpu_peers.FLA_SCANS, set()), (gpu_peers.FLA_STEPS, {"initial_state"})]
    for table, more in tables:
        for name, (module, function, options) in table.items():
            sources = [
                installed[path].locate().read_text()
                for path in installed
                if path.startswith(f"fla/ops/{module}/") and path.endswith(".py")
            ]
            found = [
                node
                for source in sources
                for node in ast.parse(source).body
                if isinstance(node, ast.FunctionDef) and node.name == function
            ]
            assert len(found) == 1, function
            accepted = {argument.arg for argument in found[0].args.args}
            rule, decay = {model: kind for kind, model in gpu_cases.MODELS.items()}[name]
            case = gpu_cases.case(rule, decay, "forward", 1, 1, 1, 4)
            used = set(gpu_cases.tensors(case, "cpu", 0).inputs) | {"scale", "output_final_state", *options}
            assert used | more <= accepted, function
    guard = installed["fla/ops/common/chunk_o.py"].locate().read_text()
    assert "IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1" in guard


class Config:
    def __init__(self, kwargs, **options):
        self.kwargs, self.options = kwargs, options

    def all_kwargs(self):
        return {**self.kwargs, **self.options}


class Autotuner:
    def __init__(self, keys, cache):
        self.keys, self.cache = keys, cache


def test_configurations_survive_and_hold_for_other_numbers_of_heads(monkeypatch):
    chosen = Config({"BK": 32}, num_warps=4, num_stages=3)
    tuner = Autotuner(["H", "K"], {(16, 128, "torch.bfloat16"): chosen})
    heuristics = types.SimpleNamespace(fn=tuner)
    modules = {
        "triton": types.SimpleNamespace(Config=Config),
        "triton.runtime": types.SimpleNamespace(),
        "triton.runtime.autotuner": types.SimpleNamespace(Autotuner=Autotuner),
        "fla.ops.made_up": types.SimpleNamespace(kernel=heuristics, number=3),
        "fla.ops.other": types.SimpleNamespace(again=tuner),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    known = json.loads(json.dumps(gpu_peers.chosen_configurations()))
    assert list(known) == ["fla.ops.made_up.kernel"]
    tuner.cache = {(8, 128, "torch.bfloat16"): None}  # tuned by itself meanwhile
    gpu_peers.choose_configurations(known, (8, 32))
    assert tuner.cache.pop((8, 128, "torch.bfloat16")) is None
    assert set(tuner.cache) == {(16, 128, "torch.bfloat16"), (32, 128, "torch.bfloat16")}
    for config in tuner.cache.values():
        assert (config.kwargs, config.options) == ({"BK": 32}, {"num_warps": 4, "num_stages": 3})


# the table


def times(graph, eager):
    return {
        kind: {"median": t, "best": t, "quartiles": [0.98 * t, 1.02 * t], "repeats": 30}
        for kind, t in (("graph", graph), ("eager", eager))
    }


LIMITS = {"copy": 4.3e12, "product": 790e12}
GDN = gpu_cases.case("delta", "scalar", "forward+backward", 8, 8192, 16, 128)


def row(case=GDN, ours=None, fla=None, errors=None, **others):
    answer = {
        gpu.OURS: {"note": "", **(times(3e-3, 3.1e-3) if ours is None else ours)},
        "fla": {"note": "guard off", **(times(7.5e-3, 8.2e-3) if fla is None else fla)},
        **others,
        "sets": 1,
    }
    errors = errors or {
        gpu.OURS: {"o": 1.7e-3, "dq": 1.8e-3},
        "fla": {"o": 4.4e-3, "dq": 1e-3},
    }
    return gpu.record(case, answer, LIMITS, errors)


def document(*rows, missing=(), errors=()):
    machine = {"gpu": "NVIDIA H200"}
    versions = {"fla-core": "0.6.0"}
    return {
        "dry": False,
        "limits": LIMITS,
        "rows": list(rows),
        "missing": [entry._asdict() for entry in missing],
        "errors": list(errors),
        "machine": machine,
        "versions": versions,
    }


def test_a_row_says_how_far_ours_is_from_fla_and_from_the_floor():
    found = row(flashqla={"note": "", **times(2.5e-3, 2.6e-3)})
    assert found["ratio"] == pytest.approx(2.5)
    assert found["floor"] == pytest.approx(0.82e-3, rel=0.02)
    assert found["share"] == pytest.approx(found["floor"] / 3e-3)
    text = gpu.line(found)
    assert text.split()[:7] == ["gdn", "fwd+bwd", "8", "16", "8192", "128", "bf16"]
    assert "3.000 /   3.100 ±2%" in text
    assert "2.50x" in text
    assert text.endswith("1.8e-03  4.4e-03  guard off; flashqla 2.500; less exact than fla: dq")


def test_a_forward_pass_has_no_errors_of_gradients():
    forward = row(gpu_cases.case("delta", "scalar", "forward", 8, 8192, 16, 128))
    assert forward["errors"] == {gpu.OURS: {"o": 1.7e-3}, "fla": {"o": 4.4e-3}}
    assert gpu.less_exact(forward) == []


def test_who_does_not_take_part_leaves_a_gap_and_a_reason():
    found = row(fla={"refused": "not tuned"}, errors={gpu.OURS: {"o": 1e-3}})
    assert found["ratio"] is None
    assert gpu.line(found).endswith("guard off; fla: not tuned")
    assert gpu.wrong(document(found)) == []
    found = row(ours={"refused": "CudaError: out of memory"})
    assert found["share"] is None
    assert gpu.wrong(document(found)) == ["gdn fwd+bwd B8 T8192 H16 D128: CudaError: out of memory"]


def test_without_a_graph_the_call_itself_counts():
    found = row(ours={"eager": times(1, 5e-3)["eager"], "no graph": "it allocates"})
    assert found["ratio"] == pytest.approx(1.5)
    assert "- /   5.000" in gpu.line(found)
    assert "it allocates" in gpu.line(found)


def test_the_table_ends_with_limits_verdict_and_what_is_missing():
    slow = row(fla=times(3.3e-3, 3.4e-3), errors={gpu.OURS: {"o": 1e-3}, "fla": {"o": 1e-3}})
    gap = gpu.Missing("kda fwd B1 T32768 H8 D64", "no time left")
    lines = gpu.table(document(row(), slow, missing=[gap])).splitlines()
    assert "limits: copy 4.30 TB/s, bfloat16 product 790 TFLOP/s" in lines
    verdict = "1 of 2 rows at least 1.5 times as fast as fla; the worst ratio is 1.10"
    assert any(line.startswith(verdict) for line in lines)
    assert "1 of 2 rows no less exact than fla in every result" in lines
    assert lines[-2:] == ["missing: 1", "  kda fwd B1 T32768 H8 D64: no time left"]


def test_wrong_results_are_named():
    errors = [{"model": "gla", "D": 64, gpu.OURS: {"o": 1e-3, "dg": float("nan")}, "fla": {"o": 1.0}}]
    text = gpu.table(document(row(), errors=errors))
    assert "WRONG: gla D64: dg has an error of nan" in text
    assert text.count("WRONG") == 1


# the whole


def test_dry_run_writes_everything(tmp_path, capsys):
    options = [
        "--dry",
        "--seconds",
        "200",
        "--repeats",
        "1",
        "--date",
        "2026-01-01",
        "--output",
        str(tmp_path),
    ]
    assert gpu.main(options) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "2026-01-01-dry.txt").read_text() == printed
    found = json.loads((tmp_path / "2026-01-01-dry.json").read_text())
    cases = [gpu_cases.name(case) for case in gpu_cases.decoding(True) + gpu_cases.timed(True)]
    assert [row["case"] for row in found["rows"]] == cases
    for row in found["rows"]:
        ours = row["peers"][gpu.OURS]
        assert ours["graph"]["median"] > 0
        assert ours["eager"]["repeats"] == 1
        assert row["floor"] > 0
        assert row["case"].split()[0] in printed
    assert {of["model"] for of in found["errors"]} == set(gpu_cases.MODELS.values())
    assert all(error < 3e-3 for of in found["errors"] for error in of[gpu.OURS].values())
    assert found["versions"]["fwp_core"]


WORKER = """
import json, os, sys, time
print(json.dumps({"machine": {}, "peers": ["ours"], "refused": {}}), flush=True)
for line in sys.stdin:
    do = json.loads(line)["do"]
    if do == "hang":
        time.sleep(60)
    if do == "die":
        sys.exit("the last words")
    print(json.dumps({"process": os.getpid()}), flush=True)
"""


def test_a_process_that_hangs_or_dies_is_replaced(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    monkeypatch.setattr(gpu, "Worker", functools.partial(gpu.Worker, program=program))
    run = gpu.Run(gpu.parse(["--dry"]), tmp_path / "configurations.json")
    assert run.ask()["peers"] == ["ours"]
    first = run.ask(do="something")
    assert run.ask(do="something") == first
    assert run.ask(do="die") == {"refused": "the process ended with status 1: the last words"}
    second = run.ask(do="something")
    assert second != first
    assert run.worker.ask(0.2, do="hang") == {"refused": "stopped after 0 s"}
    assert run.ask(do="something") not in (first, second)
    run.worker.process.kill()
    run.worker.process.wait()
    assert "process" in run.ask(do="something")
    run.end_of_section = 0.0
    assert run.ask(do="something") == {"refused": "no time left"}
    run.worker.close()


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--repeats", "0"]])
def test_wrong_arguments_exit_with_2_and_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.parse(arguments)
    assert "usage:" in capsys.readouterr().err
