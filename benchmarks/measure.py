"""The protocol: a gate that every participant passes first, then rounds in which one runs at a time."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import OURS, PEERS
from registry import STREAMS, Case, exact
from worker import Worker

Say = Callable[[str], None]


class GateClosed(Exception):
    """The library itself gave a wrong result."""


class Settings(NamedTuple):
    """How to measure."""

    rounds: int = 9
    thread_counts: tuple[int, ...] = (1,)
    peers: tuple[str, ...] = tuple(PEERS)
    peak_seconds: float = 0.03
    slow_seconds: float = 1.0  # who takes longer takes part in the first slow_rounds only
    slow_rounds: int = 3


class Key(NamedTuple):
    """A participant at a thread count."""

    peer: str
    threads: int


@dataclass
class Samples:
    """One participant in one case: seconds per call and the FMA peak beside it, by round."""

    case: Case
    key: Key
    errors: dict[str, float]
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Credited work per second at the median."""
        return self.case.credit / statistics.median(self.seconds)

    @property
    def best_rate(self) -> float:
        """Credited work per second in the best round."""
        return self.case.credit / min(self.seconds)


class Refusal(NamedTuple):
    """A participant that was asked for a case and is not in the table, and why."""

    peer: str
    case: str  # "" if it could not be started at all
    reason: str


@dataclass
class Result:
    """All that one group of cases gave."""

    samples: list[Samples]
    refusals: list[Refusal]
    versions: dict[str, str]


class Plan(NamedTuple):
    """Who is asked for what: (case, threads) and its participants, in the order of the table."""

    case: Case
    threads: int
    peers: tuple[str, ...]


def plan(cases: Iterable[Case], settings: Settings) -> list[Plan]:
    """The blocks of the table. Cases that are for everyone go to every peer that they concern."""
    blocks = []
    for case in cases:
        asked = (OURS,) if case.alone else settings.peers
        peers = tuple(peer for peer in asked if PEERS[peer].is_asked(case))
        counts = settings.thread_counts if case.every_thread_count else settings.thread_counts[-1:]
        blocks += [Plan(case, threads, peers) for threads in counts if peers]
    return blocks


def measure(cases: Iterable[Case], settings: Settings, say: Say) -> Result:
    """Open the gate for every participant, then time those who passed, interleaved."""
    blocks = plan(cases, settings)
    with workers({Key(peer, block.threads) for block in blocks for peer in block.peers}, say) as (
        open_,
        refusals,
    ):
        versions = {name: version for worker in open_.values() for name, version in worker.versions.items()}
        samples = gate(blocks, open_, refusals, say)
        for peer, case, reason in refusals:
            if case and PEERS[peer].module == PEERS[OURS].module:
                raise GateClosed(f"{peer}: {case}: {reason}")
        rounds(samples, open_, settings, say)
    return Result(samples, list(dict.fromkeys(refusals)), versions)


@contextmanager
def workers(keys: set[Key], say: Say) -> Iterator[tuple[dict[Key, Worker], list[Refusal]]]:
    """Start a process for each, one after the other; those that cannot start are refusals."""
    started = {}
    refusals = []
    # Ours is always there: it measures the peak.
    for key in sorted(keys | {Key(OURS, key.threads) for key in keys}):
        worker = Worker(*key)
        reason = worker.versions.get("refused")
        say(f"{key.peer} on {key.threads}: {reason or 'ready'}")
        if reason:
            refusals.append(Refusal(key.peer, "", reason))
            worker.close()
        else:
            started[key] = worker
    try:
        yield started, refusals
    finally:
        for worker in started.values():
            worker.close()


def gate(blocks: list[Plan], open_: dict[Key, Worker], refusals: list[Refusal], say: Say) -> list[Samples]:
    """Compare everyone's results with the exact ones; refuse by name and reason who is wrong or cannot."""
    passed = []
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[Case, str] = {}
        for block in blocks:
            if block.case not in paths:
                paths[block.case] = str(Path(folder, f"{len(paths)}.npz"))
                np.savez(paths[block.case], **expected(block.case))
            for peer in block.peers:
                key = Key(peer, block.threads)
                if key not in open_:
                    continue
                answer = open_[key].ask("prepare", case=block.case, exact=paths[block.case])
                if "refused" in answer:
                    refusals.append(Refusal(peer, block.case.name, answer["refused"]))
                else:
                    passed.append(Samples(block.case, key, answer["errors"]))
            say(f"checked {block.case.name} on {block.threads}")
    return passed


def expected(case: Case) -> dict[str, Any]:
    """Exact results; the yardsticks have none but their own."""
    return {} if case.rule in (*STREAMS, "sgemm") else exact(case)


def rounds(samples: list[Samples], open_: dict[Key, Worker], settings: Settings, say: Say) -> None:
    """Add one sample per round for everyone, and before each case the peak of its threads.

    A round takes the cases in random order, and a case its participants one after the other, in random order.
    """
    order = random.Random(0)
    blocks: dict[tuple[Case, int], list[Samples]] = {}
    for sample in samples:
        blocks.setdefault((sample.case, sample.key.threads), []).append(sample)
    for number in range(settings.rounds):
        for block in order.sample(list(blocks.values()), len(blocks)):
            peaks = {}
            for key in {_peak_of(sample.key) for sample in block}:
                peaks[key] = _ask(open_[key], "peak", seconds=settings.peak_seconds)["rate"]
            for sample in order.sample(block, len(block)):
                if number >= settings.slow_rounds and min(sample.seconds) > settings.slow_seconds:
                    continue
                answer = _ask(open_[sample.key], "run", case=sample.case)
                sample.seconds.append(answer["seconds"])
                sample.peaks.append(peaks[_peak_of(sample.key)])
        say(f"round {number + 1} of {settings.rounds}")


def _peak_of(key: Key) -> Key:
    """Who measures the peak that a participant is compared with: itself if it is a level of ours."""
    return key if PEERS[key.peer].module == PEERS[OURS].module else Key(OURS, key.threads)


def _ask(worker: Worker, do: str, **arguments: Any) -> dict[str, Any]:
    answer = worker.ask(do, **arguments)
    if "refused" in answer:
        raise RuntimeError(f"{do} {arguments}: {answer['refused']}")
    return answer


class Memory(NamedTuple):
    """Extra memory of one call, beside that of its inputs and outputs."""

    case: Case
    peer: str
    extra: int
    arrays: int


def measure_memory(cases: Iterable[Case], settings: Settings, say: Say) -> tuple[list[Memory], list[Refusal]]:
    """Extra memory at its highest, in a fresh process each, whose malloc is as it comes."""
    rows, refusals = [], []
    for block in plan(cases, settings):
        for peer in block.peers:
            worker = Worker(peer, block.threads, warm_malloc=False)
            answer = worker.versions
            if "refused" not in answer:
                answer = worker.ask("memory", case=block.case)
            worker.close()
            say(f"memory: {block.case.name}, {peer}")
            if "refused" in answer:
                refusals.append(Refusal(peer, block.case.name, answer["refused"]))
            else:
                rows.append(Memory(block.case, peer, answer["extra"], block.case.array_bytes))
    return rows, refusals
