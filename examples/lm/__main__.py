"""Train a small byte-level language model with each memory, and compare: linear, delta, softmax."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .model import MEMORIES, ByteModel, generate
from .report import advantage, draw, record, table
from .text import Bytes, read, standard_library
from .training import Run, Settings, run

QUICK = Settings(steps=60, width=64, layers=1, validation_bytes=32768)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.lm", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="text (default: the standard library's sources)")
    parser.add_argument("--rules", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a smaller model and few steps: does it work?")
    for setting in fields(Settings):
        parser.add_argument(f"--{setting.name.replace('_', '-')}", type=type(setting.default))
    parser.add_argument("--prompt", default="def ", help="what the last delta model continues")
    parser.add_argument(
        "--generate", type=int, default=400, metavar="N", help="bytes to generate: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", metavar="FILE", help="write a picture")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    given = {setting.name: getattr(args, setting.name) for setting in fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    settings = replace(QUICK if args.quick else Settings(), **given)
    texts = read(args.files or standard_library(), settings.least_bytes)
    source = ", ".join(map(str, args.files)) or f"standard library of Python {sys.version.split()[0]}"
    text = {"source": source, "training": len(texts[0]), "validation": len(texts[1])}
    print(f"text      {source}: {len(texts[0])} bytes, {len(texts[1])} for validation\nsettings  {settings}")

    models, runs = compare(args.rules, args.seeds, texts, settings)
    results: dict[str, Any] = record(runs, settings, text)
    print("\n" + table(results))
    print(advantage(results) or "")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        draw(results, args.plot)
    speaker = next((rule for rule in ("delta", "linear") if rule in models), None)
    if speaker and args.generate:
        continuation = generate(models[speaker], args.prompt.encode(), args.generate).decode(errors="replace")
        print(f"\n{speaker}, one step of the fast weight per byte:\n{args.prompt}{continuation}")
    return 0


def compare(
    rules: list[str], seeds: list[int], texts: tuple[Bytes, Bytes], settings: Settings
) -> tuple[dict[str, ByteModel], list[Run]]:
    """Train every rule with every seed; return the last model of each rule and all results."""
    models, runs = {}, []
    for seed in seeds:
        for rule in rules:
            models[rule], result = run(rule, seed, texts, settings)
            runs.append(result)
            print(f"{rule:8s}seed {seed}  {result.bits_per_byte:.4f} bits per byte", flush=True)
    return models, runs


if __name__ == "__main__":
    sys.exit(main())
