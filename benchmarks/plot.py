"""The picture of a comparison: everyone's rate in each case of the table, and the curves that were measured.

Also by itself: python benchmarks/plot.py result.json result.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Record = dict[str, Any]
Document = dict[str, Any]

COLOURS = {
    "fwp_core": "#c2410c",
    "fwp_core v3": "#fb923c",
    "fwp_core unfused": "#fdba74",
    "onnxruntime": "#1d4ed8",
    "transformers": "#15803d",
    "fla": "#7e22ce",
    "fast-transformers": "#a16207",
    "torch": "#0e7490",
    "numpy": "#666666",
}


def draw(document: Document, path: Path) -> None:
    """Write the picture; the file's suffix says the format."""
    panels = _panels(document)
    heights = [height for height, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, (_, fill) in zip(axes[:, 0], panels, strict=True):
        fill(ax)
    figure.suptitle(
        f"{document['machine']['cpu']}, level {document['fwp_core']['isa']}, {document['date'][:10]}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(document: Document) -> list[tuple[float, Callable[[Axes], None]]]:
    """(height in inches, what fills it)."""
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    main = document.get("main", [])
    most = max((row["threads"] for row in main), default=1)
    scans = [row for row in main if row["threads"] == most and row["task"] != "step" and row["K"] > 1]
    steps = [row for row in main if row["threads"] == most and row["task"] == "step"]
    for rows, fill in ((scans, _rates), (steps, _steps)):
        if rows:
            cases = len({row["case"] for row in rows})
            panels.append((1.2 + 0.24 * cases, lambda ax, rows=rows, fill=fill: fill(ax, rows, most)))
    for group, fill in (("tokens", _tokens), ("sizes", _sizes), ("threads", _speedups)):
        if document.get(group):
            panels.append((3.5, lambda ax, rows=document[group], fill=fill: fill(ax, rows)))
    return panels or [(1.0, lambda ax: ax.set_axis_off())]


def _rates(ax: Axes, rows: list[Record], threads: int) -> None:
    _dots(ax, rows, lambda row: row["rate"] / 1e9)
    peaks = [row["limit"]["median"] for row in rows if row["peer"] != "fwp_core v3"]
    ax.axvline(sorted(peaks)[len(peaks) // 2] / 1e9, color="black", linewidth=1, label="FMA peak")
    ax.set(
        xscale="log",
        xlabel="credited GFLOP/s at the median",
        title=f"forward and backward, threads: {threads}",
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _steps(ax: Axes, rows: list[Record], threads: int) -> None:
    _dots(ax, rows, lambda row: row["seconds"]["median"] * 1e6)
    ax.set(xscale="log", xlabel="microseconds at the median", title=f"one step, threads: {threads}")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _dots(ax: Axes, rows: list[Record], value: Callable[[Record], float]) -> None:
    """One line per case, one dot per participant."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for peer, mine in _by(rows, "peer"):
        ax.plot(
            [value(row) for row in mine],
            [cases.index(row["case"]) for row in mine],
            "o",
            color=COLOURS.get(peer),
            label=peer,
        )
    ax.set_yticks(range(len(cases)), cases, fontsize=8)
    ax.invert_yaxis()
    ax.grid(alpha=0.3)


def _tokens(ax: Axes, rows: list[Record]) -> None:
    _curves(ax, rows, lambda row: row["T"], lambda row: row["seconds"]["median"] * 1e9 / row["T"] / row["H"])
    ax.set(
        xlabel="tokens T",
        ylabel="ns per token and head",
        yscale="log",
        title="against T (K = V = 64, two heads)",
    )


def _sizes(ax: Axes, rows: list[Record]) -> None:
    square = [row for row in rows if row["K"] == row["V"]]
    _curves(ax, square, lambda row: row["K"], lambda row: row["rate"] / 1e9)
    ax.set(xlabel="K = V", ylabel="credited GFLOP/s", title="against K = V (T = 2048, eight heads)")


def _speedups(ax: Axes, rows: list[Record]) -> None:
    one = {(row["case"], row["peer"]): row["rate"] for row in rows if row["threads"] == 1}
    shown = [row for row in rows if row["peer"] == "fwp_core" and (row["case"], row["peer"]) in one]
    for case, mine in _by(shown, "case"):
        speedup = [row["rate"] / one[case, "fwp_core"] for row in mine]
        ax.plot([row["threads"] for row in mine], speedup, "o-", label=case)
    ax.set(xlabel="threads", ylabel="times one thread", title="fwp_core against threads")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)


def _curves(ax: Axes, rows: list[Record], x: Callable[[Record], float], y: Callable[[Record], float]) -> None:
    """One curve per participant and operation."""
    styles = {"forward": "o-", "forward+backward": "s--"}
    for peer, mine in _by(rows, "peer"):
        for (rule, task), same in _by(mine, "rule", "task"):
            same.sort(key=x)
            label = f"{peer}, {rule} {task}"
            ax.plot(
                [*map(x, same)],
                [*map(y, same)],
                styles[task],
                color=COLOURS.get(peer),
                label=label,
                markersize=4,
            )
    ax.set_xscale("log", base=2)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)


def _by(rows: Iterable[Record], *names: str) -> list[tuple[Any, list[Record]]]:
    """Rows in groups of equal values, in order of appearance."""
    groups: dict[Any, list[Record]] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return list(groups.items())


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
