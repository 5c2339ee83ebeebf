"""Measure fwp_core, this machine and the peers by one protocol; print a table, write JSON and a picture.

python benchmarks/compare.py --json result.json --plot result.png
python benchmarks/compare.py --scaling              # also the curves: long
python benchmarks/compare.py --cases 'delta/step/*' --peers onnxruntime
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import report
from measure import GateClosed, Settings, measure, measure_memory
from peers import OURS, PEERS, YARDSTICK
from registry import GROUPS, Case

import fwp_core as fwp

TITLES = {
    "main": "table",
    "tokens": "against the number of tokens",
    "sizes": "against K and V",
    "threads": "against the number of threads",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; --quick and --scaling are worked in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    most = fwp.get_num_threads()
    choices = [name for name in PEERS if name not in (OURS, YARDSTICK)]
    parser.add_argument("--rounds", type=int, default=9, help="samples of everything (default: 9)")
    parser.add_argument("--threads", type=int, nargs="+", help=f"thread counts (default: 1 and {most})")
    parser.add_argument(
        "--cases", nargs="+", default=["*"], metavar="GLOB", help="only cases with such names"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=choices,
        choices=[*choices, "none"],
        metavar="PEER",
        help=f"beside fwp_core and numpy: none, or some of {', '.join(choices)} (default: all)",
    )
    parser.add_argument(
        "--groups", nargs="+", default=["main", "memory"], choices=GROUPS, help="groups of cases"
    )
    parser.add_argument("--scaling", action="store_true", help="all groups: the curves too")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; no figures")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or min(args.threads or [1]) < 1:
        parser.error("--rounds and --threads: expected positive numbers")
    args.threads = tuple(sorted(set(args.threads or (1, most))))
    args.groups = list(GROUPS) if args.scaling else args.groups
    args.peers = [] if "none" in args.peers else args.peers
    return args


def chosen(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases asked for, by group."""
    groups = {}
    for name in args.groups:
        cases = [case for case in GROUPS[name] if any(fnmatch(case.name, glob) for glob in args.cases)]
        groups[name] = (
            list({case.tiny().name: case.tiny() for case in cases}.values()) if args.quick else cases
        )
    return {name: cases for name, cases in groups.items() if cases}


def settings(args: argparse.Namespace) -> Settings:
    """How to measure, from the options."""
    names = (OURS, YARDSTICK, *args.peers)
    common = {
        "rounds": args.rounds,
        "thread_counts": args.threads,
        "peers": tuple(n for n in PEERS if n in names),
    }
    return Settings(**common, peak_seconds=0.003) if args.quick else Settings(**common)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen groups one after the other; print each as it is done, and return everything."""
    how = settings(args)
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": report.machine(),
        "fwp_core": fwp.show_config(mode="dict"),
        "versions": {},
        "settings": {**how._asdict(), "quick": args.quick},
        "load": report.load(),
    }
    print(f"{document['machine']['cpu']}, load average {document['load']}: figures count if it is near 0")
    before = report.cpu_time()
    refusals = []
    for name, cases in chosen(args).items():
        if name == "memory":
            rows, refused = measure_memory(cases, how, say)
            document["memory"] = [report.memory_record(row) for row in rows]
            report.print_memory(document["memory"])
        else:
            result = measure(cases, how, say)
            refused = result.refusals
            document["versions"] |= result.versions
            document[name] = report.records(result.samples)
            report.print_table(TITLES[name], document[name])
        refusals += refused
    document["refusals"] = report.refusal_records(refusals)
    report.print_refusals(document["refusals"])
    passed, stolen = (after - start for after, start in zip(report.cpu_time(), before, strict=True))
    document["stolen"] = stolen / passed if passed else None
    print(report.NOTES)
    return document


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Run, then write what was asked for."""
    args = parse()
    if args.list:
        print(
            *(f"{group:8s} {case.name}" for group, cases in chosen(args).items() for case in cases), sep="\n"
        )
        return 0
    sys.stdout.reconfigure(line_buffering=True)  # a table shows when its group is done, in a file too
    try:
        document = run(args)
    except GateClosed as reason:
        print(f"the gate is closed, nothing was timed: {reason}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from plot import draw

        draw(document, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
