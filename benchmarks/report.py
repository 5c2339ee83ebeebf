"""What comes out: one record per participant and case, the printed table, and the machine it ran on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import Memory, Refusal, Samples
from peers import OURS, YARDSTICK

Record = dict[str, Any]

NOTES = """
A row is one participant: the time of a call at the median and at the best of the rounds, credited work per
second at the median, its share of the limit at the limit's median and at its best, the worst error against
float64 (relative, L2), and the median as a multiple of ours. The limit is the FMA peak measured before the
case in each round, at the level of ours (v3 at its own), and for steps (GB/s) the bandwidth of NumPy's copy
on the same threads; a state that stays in cache beats it.
"""


def records(samples: list[Samples]) -> list[Record]:
    """Everything measured in one group, as plain values; rates in flop/s or byte/s."""
    copies = {s.key.threads: s for s in samples if s.case.rule == "copy" and s.key.peer == YARDSTICK}
    return [_record(sample, copies.get(sample.key.threads)) for sample in samples]


def _record(sample: Samples, copy: Samples | None) -> Record:
    limits = {"median": statistics.median(sample.peaks), "best": max(sample.peaks)}
    if sample.case.limit == "bandwidth":
        limits = {"median": copy.rate, "best": copy.best_rate} if copy else {}
    return {
        "case": sample.case.name,
        **asdict(sample.case),
        **sample.key._asdict(),
        "seconds": {
            "median": statistics.median(sample.seconds),
            "best": min(sample.seconds),
            "samples": sample.seconds,
        },
        "unit": "byte/s" if sample.case.limit == "bandwidth" else "flop/s",
        "rate": sample.rate,
        "best_rate": sample.best_rate,
        "limit": limits,
        "share": {name: sample.rate / limit for name, limit in limits.items()},
        "errors": sample.errors,
    }


def memory_record(row: Memory) -> Record:
    """Extra memory of one participant, absolute and as a share of the arrays."""
    shares = {"extra_bytes": row.extra, "array_bytes": row.arrays, "share": row.extra / row.arrays}
    return {"case": row.case.name, **asdict(row.case), "peer": row.peer, **shares}


def refusal_records(refusals: Iterable[Refusal]) -> list[Record]:
    """Refusals with the same peer and reason together."""
    cases: dict[tuple[str, str], list[str]] = {}
    for peer, case, reason in refusals:
        cases.setdefault((peer, reason), []).append(case)
    return [{"peer": peer, "reason": reason, "cases": names} for (peer, reason), names in cases.items()]


def print_table(title: str, rows: list[Record]) -> None:
    """One block per case and thread count, the participants in it by median."""
    print(f"\n== {title}")
    blocks: dict[tuple[str, int], list[Record]] = {}
    for row in rows:
        blocks.setdefault((row["case"], row["threads"]), []).append(row)
    for (case, threads), block in blocks.items():
        short = block[0]["task"] == "step"
        unit, rate = "us" if short else "ms", "GB/s" if block[0]["unit"] == "byte/s" else "GF/s"
        limit = block[0]["limit"]
        limits = f"limit {limit['median'] / 1e9:.1f}, best {limit['best'] / 1e9:.1f} {rate}" if limit else ""
        print(f"\n{case}, {_threads(threads)}{limits and '; ' + limits}")
        shares = f"{'share':>8s}{'best':>6s}"
        print(f"  {'':18s}{'median':>9s}{'best':>9s} {unit}{rate:>8s}{shares}  {'error':13s}{'x ours':>7s}")
        ours = [row["seconds"]["median"] for row in block if row["peer"] == OURS]
        for row in sorted(block, key=lambda row: row["seconds"]["median"]):
            print(_line(row, 1e6 if short else 1e3, ours))


def _line(row: Record, per_second: float, ours: list[float]) -> str:
    seconds, share = row["seconds"], row["share"]
    times = f"{seconds['median'] * per_second:9.2f}{seconds['best'] * per_second:9.2f}"
    shares = f"{share['median']:8.2f}{share['best']:6.2f}" if share else f"{'-':>8s}{'-':>6s}"
    worst = max(row["errors"].items(), key=lambda item: item[1], default=None)
    error = f"{worst[1]:.1e} {worst[0]}" if worst else "-"
    multiple = f"{seconds['median'] / ours[0]:7.2f}" if ours else f"{'-':>7s}"
    return f"  {row['peer']:18s}{times}   {row['rate'] / 1e9:8.1f}{shares}  {error:13s}{multiple}"


def print_memory(rows: list[Record]) -> None:
    """Extra memory of each call."""
    title = "memory of a call at its highest, beside its inputs, outputs and gradients"
    print(f"\n== {title}\n")
    print(f"  {'':48s}{'':18s}{'extra MiB':>10s}{'arrays MiB':>11s}{'share':>8s}")
    for row in rows:
        extra, arrays = (row[name] / 2**20 for name in ("extra_bytes", "array_bytes"))
        print(f"  {row['case']:48s}{row['peer']:18s}{extra:10.1f}{arrays:11.1f}{row['share']:8.1%}")


def print_refusals(rows: list[Record]) -> None:
    """Who is not in the table, and why."""
    if rows:
        print("\n== not measured\n")
    for row in rows:
        named = [case for case in row["cases"] if case]
        where = (
            f" ({len(named)} cases: {', '.join(named[:3])}{', ...' if len(named) > 3 else ''})"
            if named
            else ""
        )
        print(f"  {row['peer']}: {row['reason']}{where}")


def machine() -> Record:
    """What this ran on."""
    return {
        "cpu": _cpu_model(),
        "processors": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def cpu_time() -> tuple[int, int]:
    """(all, stolen) processor time so far in ticks: what a hypervisor gave to others; (0, 0) if unknown."""
    try:
        fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0, 0
    return sum(fields), fields[7]


def load() -> float | None:
    """Processes that wait for a processor, over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"
