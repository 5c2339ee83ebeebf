"""The demo's picture. The only module that imports matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .retrieval import Array, Write

COLOURS = {"linear": "#c44e52", "delta": "#2a6f97"}
GREY = "#555555"


def draw(path: str, losses: dict[str, list[float]], linear: Write, delta: Write) -> None:
    """Write the picture: loss curves, one answer of both memories, and the delta memory around one write."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 8.0,
    }
    with plt.rc_context(style):
        figure: Any = plt.figure(figsize=(11.5, 7.4), layout="constrained")
        figure.suptitle(
            "Fast weights as memories: a later pair (key, value) replaces an earlier one", weight="bold"
        )
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1], hspace=0.04)
        loss_axes, answer_axes = top.subplots(1, 2, width_ratios=[1.35, 1])
        draw_losses(loss_axes, losses)
        draw_answers(answer_axes, {"linear": linear, "delta": delta})
        draw_write(bottom.subplots(1, 3, sharey=True), delta)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def draw_losses(axes: Axes, losses: dict[str, list[float]]) -> None:
    """Training loss of both rules on a log scale."""
    for name, values in losses.items():
        axes.semilogy(values, color=COLOURS[name], linewidth=1.6)
        end = (len(values) - 1, values[-1])
        axes.annotate(f" {name}", end, color=COLOURS[name], va="center", weight="bold", annotation_clip=False)
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.text(len(values) - 1, 0.5, "always answering zero", ha="right", va="bottom", color=GREY)
    axes.set(title="Training loss  ½ |v* - v|²", xlabel="step of Adam", xlim=(0, len(values) - 1))
    axes.spines[["top", "right"]].set_visible(False)


def draw_answers(axes: Axes, writes: dict[str, Write]) -> None:
    """What both memories answer for a key just after its value was replaced."""
    for offset, (name, write) in zip((-0.2, 0.2), writes.items(), strict=True):
        positions = np.arange(len(write.answer)) + offset
        axes.bar(positions, write.answer, width=0.4, color=COLOURS[name], label=name)
    axes.axhline(0, color=GREY, linewidth=0.8)
    *older, old, new = writes["delta"].held
    for value, label in {**dict.fromkeys(older, "older"), old: "old value", new: "new value"}.items():
        top = max(write.answer[value] for write in writes.values())
        axes.text(value, top + 0.02, label, rotation=90, ha="center", va="bottom", color=GREY)
    key = writes["delta"].key
    axes.set(title=f"Answer for key {key}, just given a new value", xlabel="value", ylim=(-0.1, 1.45))
    axes.set_xticks(range(0, len(positions), 5))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_write(axes: Array, write: Write) -> None:
    """The fast weight before a write, after it, and the difference, on one colour scale."""
    old, new = write.held[-2:]
    panels = {
        "Delta rule: fast weight before a write": write.before,
        "after it": write.after,
        "difference β (v - v̄) kᵀ, of rank one": write.after - write.before,
    }
    limit = float(np.quantile(np.abs(write.after), 0.995))
    for panel_axes, (title, panel) in zip(axes, panels.items(), strict=True):
        image = panel_axes.imshow(
            panel.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none"
        )
        panel_axes.set(title=title, xlabel="key dimension")
        panel_axes.tick_params(left=False)
    axes[0].set_ylabel("value")
    axes[0].set_yticks([old, new], [f"old {old}", f"new {new}"])
    axes[0].figure.colorbar(image, ax=list(axes), pad=0.01, aspect=15, extend="both")
