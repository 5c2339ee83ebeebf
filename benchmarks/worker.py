"""One participant in a process of its own, and the handle by which the others wait for it.

The process reads one request per line and answers with one line, both JSON. It answers only when its thread
pools have come to rest, so that of all participants only one runs at a time.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, Prepared, Unsupported
from registry import Case, errors

Answer = dict[str, Any]

# A short call is repeated until a sample takes this long; one that takes longer needs no warming up.
SAMPLE_SECONDS = 0.02
COLD_SECONDS = 0.5

THREAD_VARIABLES = ("FWP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# glibc keeps what is freed: torch cannot be handed outputs and would pay for fresh pages in every call.
WARM_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


class Server:
    """The requests that a process answers."""

    def __init__(self, peer: str, threads: int) -> None:
        self.module = PEERS[peer].load()
        self.module.start(threads)
        self.prepared: dict[str, tuple[Prepared, int, bool]] = {}

    def versions(self) -> Answer:
        """Versions of the packages behind this participant."""
        return {name: importlib.metadata.version(name) for name in self.module.PACKAGES}

    def prepare(self, case: Case, exact: str | None) -> Answer:
        """Make what a case needs, call it once, compare with the exact results, and see how long it takes."""
        prepared = self.module.prepare(case)
        prepared.call()
        worst = {}
        if exact is not None:
            with np.load(exact) as expected:
                worst = errors(case, prepared.results(), expected)
            wrong = {name: error for name, error in worst.items() if not error <= case.tolerance}
            if wrong:
                return {"errors": worst, "refused": "out of tolerance: " + _named(wrong)}
        seconds = _seconds(prepared.call, 1)
        if seconds < COLD_SECONDS:
            seconds = min(seconds, *(_seconds(prepared.call, 1) for _ in range(4)))
        repeats = min(max(round(SAMPLE_SECONDS / seconds), 1), 100_000)
        self.prepared[case.name] = prepared, repeats, seconds < COLD_SECONDS
        _rest()
        return {"errors": worst}

    def run(self, case: Case) -> Answer:
        """One sample: seconds per call, after a call that brings the arrays back into the caches."""
        prepared, repeats, warm_up = self.prepared[case.name]
        if warm_up:
            prepared.call()
        gc.disable()
        seconds = _seconds(prepared.call, repeats)
        gc.enable()
        _rest()
        return {"seconds": seconds}

    def peak(self, seconds: float) -> Answer:
        """FMA rate at this participant's instruction set level and threads."""
        return {"rate": self.module.peak(seconds)}

    def memory(self, case: Case) -> Answer:
        """Bytes beyond the inputs and results at the highest point of the first call."""
        _growth(self.module.prepare(case.tiny()).call)  # threads and libraries have their memory from here on
        prepared = self.module.prepare(case)
        return {"extra": _growth(prepared.call) - prepared.allocates}


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _rest(interval: float = 0.005, most: float = 1.0) -> None:
    """Wait until this process uses no processor: some pools spin for tens of milliseconds after a call."""
    deadline = time.monotonic() + most
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(interval)
        if time.process_time() - before < 0.1 * interval:
            return


def _growth(call: Callable[[], Any]) -> int:
    """Growth of the resident memory, at its highest, while call() runs."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in values.items())


def serve(peer: str, threads: int, requests: Any, answers: Any) -> None:
    """Answer requests until there are no more. What goes wrong is an answer too: {"refused": reason}."""

    def answer(work: Callable[[], Answer]) -> bool:
        try:
            reply, good = work(), True
        except Unsupported as reason:
            reply, good = {"refused": str(reason)}, False
        except ImportError as reason:
            reply, good = {"refused": f"not installed: {reason}"}, False
        except Exception as reason:
            text = " ".join(str(reason).split())
            reply, good = {"refused": f"failed: {type(reason).__name__}: {text[:300]}"}, False
        print(json.dumps(reply), file=answers, flush=True)
        return good

    server = None

    def open_server() -> Answer:
        nonlocal server
        server = Server(peer, threads)
        return server.versions()

    if not answer(open_server):
        return
    for line in requests:
        request = json.loads(line)
        if "case" in request:
            request["case"] = Case(**request["case"])
        answer(lambda request=request: getattr(server, request.pop("do"))(**request))


class Worker:
    """The handle of such a process. ask() returns its answer, with "refused" and a reason if it has none."""

    def __init__(self, peer: str, threads: int, warm_malloc: bool = True) -> None:
        environment = {
            **os.environ,
            **dict(PEERS[peer].environment),
            **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        }
        if warm_malloc:
            environment |= WARM_MALLOC
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, peer, str(threads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.versions = self._answer()

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Send a request, cases as their fields, and wait for the answer."""
        if "case" in arguments:
            arguments["case"] = vars(arguments["case"])
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.log.close()

    def _answer(self) -> Answer:
        line = self.process.stdout.readline()
        if line:
            answer: Answer = json.loads(line)
            return answer
        status = self.process.wait()
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["no message"])[-1]
        return {"refused": f"its process ended with status {status}: {last}"}


if __name__ == "__main__":
    # What a library prints belongs on stderr; the answers keep the real stdout.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.argv[1], int(sys.argv[2]), sys.stdin, answers)
