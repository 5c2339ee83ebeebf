"""What came out: a table, a JSON file and a picture."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

import fwp_core as fwp

from .training import Run, Settings

COLOURS = {"linear": "#c44e52", "delta": "#2a6f97", "softmax": "#8a8a8a"}
GREY = "#555555"


def record(runs: list[Run], settings: Settings, text: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, and under what, as plain data for JSON."""
    versions = {"fwp_core": fwp.__version__, "torch": torch.__version__, "python": platform.python_version()}
    machine = {"isa": fwp.isa(), "threads": [fwp.get_num_threads(), torch.get_num_threads()]}
    return {
        "settings": asdict(settings),
        "text": text,
        "versions": versions,
        "machine": machine,
        "runs": [asdict(run) for run in runs],
    }


def by_rule(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each rule, in the order of their appearance."""
    rules: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        rules.setdefault(run["rule"], []).append(run)
    return rules


def table(results: dict[str, Any]) -> str:
    """One line per rule in Markdown: means over seeds, and the standard deviation of the bits per byte."""
    lines = ["| rule | parameters | seeds | bits per byte | tokens/s |", "|---|---|---|---|---|"]
    for rule, runs in by_rule(results).items():
        bits = [run["bits_per_byte"] for run in runs]
        speed = np.mean([run["tokens_per_second"] for run in runs])
        spread = f" ± {np.std(bits, ddof=1):.3f}" if len(bits) > 1 else ""
        lines.append(
            f"| {rule} | {runs[0]['parameters']} | {len(runs)} | {np.mean(bits):.3f}{spread} | {speed:.0f} |"
        )
    return "\n".join(lines)


def advantage(results: dict[str, Any], better: str = "delta", worse: str = "linear") -> str | None:
    """By how much one rule beats another, seed by seed; None if they do not share two seeds."""
    rules = by_rule(results)
    bits = [{run["seed"]: run["bits_per_byte"] for run in rules.get(rule, [])} for rule in (better, worse)]
    gains = [bits[1][seed] - bits[0][seed] for seed in bits[0] if seed in bits[1]]
    if len(gains) < 2:
        return None
    return (
        f"{better} takes {np.mean(gains):.3f} ± {np.std(gains, ddof=1):.3f} bits per byte less than {worse} "
        f"with the same seed, {sum(gain > 0 for gain in gains)} of {len(gains)} times"
    )


def draw(results: dict[str, Any], path: str) -> None:
    """Write the picture: training curves, one line per seed, and validation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, dots) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[1.7, 1], layout="constrained")
    for place, (rule, runs) in enumerate(by_rule(results).items()):
        draw_curves(curves, rule, runs, results["settings"])
        bits = [run["bits_per_byte"] for run in runs]
        dots.plot([place] * len(bits), bits, "o", color=COLOURS[rule], alpha=0.7)
        dots.annotate(f"{np.mean(bits):.3f}", (place + 0.15, np.mean(bits)), va="center", color=COLOURS[rule])
    curves.set(xlabel="bytes read, millions", ylabel="bits per byte", title="training")
    curves.legend(frameon=False)
    dots.set(title="validation, one dot per seed", xlim=(-0.5, place + 0.8))
    dots.set_xticks(range(place + 1), by_rule(results))
    for axes in (curves, dots):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(axes: Any, rule: str, runs: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Training curves of one rule; the first averages, far above the others, are left out."""
    total = settings["steps"] * settings["streams"] * settings["length"] / 1e6
    for number, run in enumerate(runs):
        averages = run["training"]
        seen = (np.arange(len(averages)) + 0.5) / len(averages) * total
        label = rule if number == 0 else None
        axes.plot(seen[2:], averages[2:], color=COLOURS[rule], linewidth=1.3, alpha=0.8, label=label)
