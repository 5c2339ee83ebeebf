"""Measure fwp_core on a GPU beside fla's kernels and the GPU's own limits; table and JSON in a folder.

    python benchmarks/gpu.py                     # everything, eight minutes at most
    python benchmarks/gpu.py --seconds 240       # half of it
    python benchmarks/gpu.py --dry               # on the CPU, tiny: does the script work? no figures

A process does the work and can be stopped at any time: what it was at is then missing from the table, with
the reason, and the rest is measured by another. Every section has its share of the seconds; what it leaves
goes to the next.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_cases
from gpu_peers import OURS
from registry import Case

HERE = Path(__file__).parent
Record = dict[str, Any]

SECONDS = 480
# Shares of the time, after the first process has started.
SHARES = {"limits": 0.04, "tuning": 0.36, "errors": 0.14, "decoding": 0.06, "times": 0.40}
REPEATS = 30
ROW_SECONDS = 12.0  # of the samples of one row, at most
# Relative errors above which a result is wrong rather than rounded.
WRONG = 2e-2
CHANCE = 1.02  # two results that are only rounded at their end have about the same error
WANTED = 1.5  # times as fast as fla


class Worker:
    """The process that measures. ask() waits for its answer as long as it may take, and no longer."""

    def __init__(self, *arguments: str | Path, program: Path = HERE / "gpu_work.py") -> None:
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)
        self.lines.put("")

    def answer(self, seconds: float) -> Record:
        """Its next answer."""
        try:
            line = self.lines.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            self.close()
            return {"refused": f"stopped after {seconds:.0f} s"}
        if line:
            answer: Record = json.loads(line)
            return answer
        status = self.process.wait()
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["no message"])[-1]
        self.close()
        return {"refused": f"the process ended with status {status}: {last}"}

    def ask(self, seconds: float, **request: Any) -> Record:
        """Send a request, a case as its fields, and wait."""
        if "case" in request:
            request["case"] = vars(request["case"])
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer(seconds)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self.log.closed and self.process.poll() is None

    def close(self) -> None:
        """Stop it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.reader.join()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.log.close()


class Missing(NamedTuple):
    """What is not in the table, and why."""

    what: str
    reason: str


class Run:
    """One run: its budget, the worker, and what has come out so far."""

    def __init__(self, options: argparse.Namespace, configurations: Path) -> None:
        self.options, self.configurations = options, configurations
        self.device = "cpu" if options.dry else "cuda"
        self.began = time.monotonic()
        self.end_of_section = self.began + options.seconds  # the start may take all
        self.shared = 0.0  # seconds that the sections have shares of
        self.worker: Worker | None = None
        self.machine: Record = {}
        self.peers: list[str] = []
        self.limits: Record = {}
        self.errors: dict[tuple[str, int], Record] = {}
        self.rows: list[Record] = []
        self.missing: list[Missing] = []
        self.untuned: dict[tuple[str, int], str] = {}

    def section(self, name: str) -> None:
        """Begin a section; time that those before it left is its own."""
        self.end_of_section += SHARES[name] * self.shared
        say(f"-- {name}: until {self.end_of_section - self.began:.0f} s")

    @property
    def left(self) -> float:
        """Seconds of this section."""
        return self.end_of_section - time.monotonic()

    def ask(self, **request: Any) -> Record:
        """Ask the worker; start one first where there is none."""
        if self.left <= 0:
            return {"refused": "no time left"}
        if self.worker is None or not self.worker.alive:
            if self.worker:
                self.worker.close()
            self.worker = Worker(self.device, self.configurations)
            hello = self.worker.answer(self.left)
            if "machine" not in hello:
                return {"refused": f"it does not start: {hello['refused']}"}
            self.machine = hello
            self.peers = hello["peers"]
        return self.worker.ask(self.left, **request) if request else self.machine

    def everything(self) -> None:
        """All sections."""
        dry = self.options.dry
        hello = self.ask()
        if "machine" not in hello:
            self.missing.append(Missing("everything", hello["refused"]))
            return
        self.shared, self.end_of_section = self.left, time.monotonic()
        self.missing += [Missing(peer, reason) for peer, reason in hello["refused"].items()]
        if OURS not in self.peers:
            return

        self.section("limits")
        self.limits = self.ask(do="ceilings")
        if "refused" in self.limits:
            self.missing.append(Missing("the limits of the GPU", self.limits.pop("refused")))
        say(f"limits: {self.limits}")

        self.section("tuning")
        for case in gpu_cases.tuned(dry) if "fla" in self.peers else ():
            answer = self.ask(do="tune", case=case, peer="fla")
            say(f"fla {gpu_cases.model(case)} D{case.K}: {answer}")
            if "refused" in answer:
                self.untuned[gpu_cases.model(case), case.K] = f"not tuned: {answer['refused']}"

        self.section("errors")
        for case in gpu_cases.checked(dry):
            self._errors(case)

        self.section("decoding")
        for case in gpu_cases.decoding(dry):
            self._time(case)
        self.section("times")
        for case in gpu_cases.timed(dry):
            self._time(case)

    def _errors(self, case: Case) -> None:
        what = f"errors of {gpu_cases.model(case)} D{case.K}"
        answer = self.ask(do="errors", case=case, peers=self._asked(case))
        if "refused" in answer:
            answer = {OURS: answer}
        for peer, found in answer.items():
            if "refused" in found:
                self.missing.append(Missing(f"{peer}: {what}", found["refused"]))
        self.errors[gpu_cases.model(case), case.K] = {
            peer: found for peer, found in answer.items() if "refused" not in found
        }
        say(f"{what}: {answer}")

    def _time(self, case: Case) -> None:
        name = gpu_cases.name(case)
        seconds = min(ROW_SECONDS, max(self.left, 0.0))
        request = {"peers": self._asked(case), "repeats": self.options.repeats, "within": seconds}
        answer = self.ask(do="time", case=case, **request)
        if "refused" in answer:
            self.missing.append(Missing(name, answer["refused"]))
            say(f"{name}: {answer['refused']}")
            return
        row = record(case, answer, self.limits, self.errors.get((gpu_cases.model(case), case.K), {}))
        reason = self.untuned.get((gpu_cases.model(case), case.K))
        if reason and case.task != "step":
            row["peers"]["fla"] = {"note": "", "refused": reason}
        self.rows.append(row)
        for peer, times in row["peers"].items():
            if "refused" in times and peer in (OURS, "fla"):
                self.missing.append(Missing(f"{peer}: {name}", times["refused"]))
        say(line(row))

    def _asked(self, case: Case) -> list[str]:
        tuned = (gpu_cases.model(case), case.K) not in self.untuned or case.task == "step"
        return [peer for peer in self.peers if peer != "fla" or tuned]

    def document(self) -> Record:
        """All of it, as plain values."""
        return {
            "date": self.options.date,
            "dry": self.options.dry,
            **{key: self.machine.get(key, {}) for key in ("machine", "versions")},
            "limits": self.limits,
            "repeats": self.options.repeats,
            "seconds": time.monotonic() - self.began,
            "errors": [
                {"model": model, "D": D, **peers} for (model, D), peers in sorted(self.errors.items())
            ],
            "rows": self.rows,
            "missing": [missing._asdict() for missing in self.missing],
        }


# what comes out


def record(case: Case, answer: Record, limits: Record, errors: Record) -> Record:
    """A row: times, and what follows from them."""
    peers = {name: times for name, times in answer.items() if name != "sets"}
    floors = gpu_cases.floors(case)
    floor = sum(f.seconds(limits["copy"], limits["product"]) for f in floors) if limits else None
    ours = seconds(peers.get(OURS, {}))
    return {
        "case": gpu_cases.name(case),
        "model": gpu_cases.model(case),
        **vars(case),
        "peers": peers,
        "sets": answer["sets"],
        "floor": floor,
        "share": floor / ours if floor and ours else None,
        "ratio": seconds(peers.get("fla", {})) / ours if ours and seconds(peers.get("fla", {})) else None,
        "errors": {peer: of_mode(case, found) for peer, found in errors.items()} if case.T > 1 else {},
    }


def seconds(times: Record, kind: str = "graph") -> float | None:
    """Its median, from a graph where there is one."""
    found = times.get(kind) or times.get("eager")
    return float(found["median"]) if found else None


def of_mode(case: Case, errors: dict[str, float]) -> dict[str, float]:
    """The errors of the results that a case has."""
    forward = {"o", "final_state"}
    return {
        name: error for name, error in errors.items() if name in forward or case.task == "forward+backward"
    }


HEADER = (
    "rule       mode      B  H      T   D in       ours ms graph/eager      fla ms graph/eager  ratio"
    "  floor ms     share err ours  err fla  note"
)


def line(row: Record) -> str:
    """A row of the table."""
    task = gpu_cases.MODES[row["task"]]
    kind = f"{row['model']:10s} {task:7s} {row['B']:3d} {row['H']:2d} {row['T']:6d} {row['K']:3d}"
    ours, fla = (row["peers"].get(peer, {}) for peer in (OURS, "fla"))
    ratio = f"{row['ratio']:5.2f}x" if row["ratio"] else f"{'-':>6s}"
    floor = f"{1e3 * row['floor']:9.3f}" if row["floor"] else f"{'-':>9s}"
    share = f"{row['share']:9.0%}" if row["share"] else f"{'-':>9s}"
    errors = "".join(f"{_worst(row['errors'].get(peer)):>9s}" for peer in (OURS, "fla"))
    dtype = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[row["dtype"]]
    return f"{kind} {dtype:4s} {_times(ours)} {_times(fla)} {ratio} {floor} {share} {errors}  {_note(row)}"


def _times(times: Record) -> str:
    shown = [f"{1e3 * times[kind]['median']:.3f}" if kind in times else "-" for kind in ("graph", "eager")]
    graph = times.get("graph") or times.get("eager")
    spread = 50 * (graph["quartiles"][1] - graph["quartiles"][0]) / graph["median"] if graph else 0
    return f"{shown[0]:>8s} /{shown[1]:>8s} {f'±{min(spread, 99):.0f}%' if graph else '':4s}"


def _worst(errors: dict[str, float] | None) -> str:
    return f"{max(errors.values()):.1e}" if errors else "-"


def _note(row: Record) -> str:
    """What else is to be said: reasons, other peers, results that fla has more exact."""
    said = []
    for peer, times in row["peers"].items():
        said += [text for text in (times.get("note"), times.get("no graph")) if text]
        if "refused" in times and peer in (OURS, "fla"):
            said.append(f"{peer}: {times['refused']}")
        elif peer not in (OURS, "fla") and seconds(times):
            said.append(f"{peer} {1e3 * seconds(times):.3f}")
    if worse := less_exact(row):
        said.append("less exact than fla: " + " ".join(worse))
    return "; ".join(said)


def less_exact(row: Record) -> list[str]:
    """Results in which our error is larger than fla's, by more than chance."""
    ours, fla = (row["errors"].get(peer, {}) for peer in (OURS, "fla"))
    return [name for name in ours if name in fla and ours[name] > CHANCE * fla[name]]


def wrong(document: Record) -> list[str]:
    """Results of ours that are not those of the rule, and rows that it does not have."""
    found = [
        f"{of['model']} D{of['D']}: {name} has an error of {error:.1e}"
        for of in document["errors"]
        for name, error in of.get(OURS, {}).items()
        if not error < WRONG
    ]
    found += [
        f"{row['case']}: {row['peers'][OURS]['refused']}"
        for row in document["rows"]
        if "refused" in row["peers"].get(OURS, {})
    ]
    return found + ([] if document["rows"] else ["nothing was timed"])


def table(document: Record) -> str:
    """The document for people."""
    limits, rows = document["limits"], document["rows"]
    lines = [HEADER, *map(line, rows), ""]
    if limits:
        lines.append(
            f"limits: copy {limits['copy'] / 1e12:.2f} TB/s, "
            f"bfloat16 product {limits['product'] / 1e12:.0f} TFLOP/s"
        )
    lines.append(" ".join(f"{name} {version}" for name, version in document["versions"].items()))
    lines.append(", ".join(f"{name} {value}" for name, value in document["machine"].items()))
    compared = [row for row in rows if row["ratio"]]
    if compared:
        slowest = min(compared, key=lambda row: row["ratio"])
        fast = sum(row["ratio"] >= WANTED for row in compared)
        lines.append(
            f"{fast} of {len(compared)} rows at least {WANTED} times as fast as fla; "
            f"the worst ratio is {slowest['ratio']:.2f} ({slowest['case']})"
        )
        exact = sum(not less_exact(row) for row in compared)
        lines.append(f"{exact} of {len(compared)} rows no less exact than fla in every result")
    lines += [f"WRONG: {text}" for text in wrong(document)]
    missing = document["missing"]
    lines.append(f"missing: {len(missing) or 'nothing'}")
    lines += [f"  {entry['what']}: {entry['reason']}" for entry in missing]
    if document["dry"]:
        lines.append("a dry run on the CPU: no figure here means anything")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny sizes; no figures")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"in all (default: {SECONDS})")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"samples (default: {REPEATS})")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of table and JSON")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="in the files' names")
    parser.add_argument(
        "--fla-configurations", type=Path, metavar="FILE", help="what an earlier run wrote: no tuning"
    )
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.repeats < 1:
        parser.error("--seconds and --repeats: expected positive numbers")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        configurations = Path(folder, "configurations.json")
        if options.fla_configurations:
            configurations.write_text(options.fla_configurations.read_text())
        run = Run(options, configurations)
        try:
            run.everything()
        finally:  # what there is, also after an interrupt
            if run.worker:
                run.worker.close()
            document = run.document()
            gpu = re.sub(r"[^a-z0-9]+", "-", document["machine"].get("gpu", "none").lower()).strip("-")
            name = f"{options.date}-{'dry' if options.dry else gpu}"
            options.output.mkdir(parents=True, exist_ok=True)
            write = write_to(options.output, name)
            write(".json", json.dumps(document, indent=1) + "\n")
            write(".txt", table(document))
            if configurations.exists():
                write("-fla-configurations.json", configurations.read_text())
            print(table(document), end="")
    return 1 if wrong(document) else 0


def write_to(folder: Path, name: str) -> Callable[[str, str], None]:
    """Write files of one name there."""
    return lambda ending, text: (folder / f"{name}{ending}").write_text(text, encoding="utf-8") and None


if __name__ == "__main__":
    sys.exit(main())
