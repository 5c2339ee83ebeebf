"""Tables and figures of the settings, beside the losses of the paper's own logs (official.json)."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OFFICIAL = json.loads((Path(__file__).parent / "official.json").read_text(encoding="utf-8"))
FAILED = 0.01  # a loss above says that the memory is too small
FEATURES = {"elu1": 1, "dpfp1": 2, "dpfp2": 4, "dpfp3": 6}  # per number of the key
GREY = "#555555"
STYLE = {"font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 8.0}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110}


def best_losses(records, length):
    """{rule: {S: best loss}}, the mean over seeds where there are several."""
    found = {}
    for record in records:
        if length in record["best"]:
            losses = found.setdefault(record["rule"], {}).setdefault(record["symbols"], [])
            losses.append(record["best"][length])
    return {
        name: {size: sum(losses) / len(losses) for size, losses in sorted(sizes.items())}
        for name, sizes in found.items()
    }


def first_failure(losses):
    """The first S whose loss says that the memory is too small, or None: of {S: loss}."""
    return next((size for size, loss in sorted(losses.items()) if not loss <= FAILED), None)


def print_table(records, rules, length):
    """Best losses at evaluation length `length`, a row for each rule, a column for each S."""
    losses = best_losses(records, length)
    sizes = sorted({size for row in losses.values() for size in row})
    print(f"\nbest loss on sequences of length {length}\n{'S':18s}" + "".join(f"{size:8d}" for size in sizes))
    for name in [name for name in rules if name in losses]:
        row = losses[name]
        cells = "".join(f"{row[size]:8.4f}" if size in row else " " * 8 for size in sizes)
        failure = first_failure(row)
        note = "" if failure is None else f"   above {FAILED} from {failure}"
        print(f"{rules[name].label:18s}{cells}{note}")


def draw_setting1(path, records, rules, key_size):
    """Loss over S for each feature map: runs of this library, and the paper's logs for keys of size 64."""
    official = OFFICIAL["setting1"]
    panels = {f"This library, keys of size {key_size}": best_losses(records, "S")}
    if key_size == 64:
        panels["Logs of the paper"] = by_size(official)
    colours = colours_of(rules)
    with plt.rc_context(STYLE):
        figure, axes = panels_of(panels, "Capacity: sum rule with attention normalisation, S pairs")
        for panel, (title, losses) in zip(axes, panels.items(), strict=True):
            draw_losses(panel, losses, rules, colours)
            for name, ratio in FEATURES.items():
                panel.axvline(ratio * key_size, color=colours[name], linewidth=0.8, linestyle=":", zorder=0)
            panel.set(title=title, xlabel="S, pairs shown", ylim=(-0.01, 0.52))
        axes[0].set_ylabel("best loss ½ |v* - v|²   (dotted: number of features)")
        save(figure, axes, path)


def draw_setting2(path, records, rules):
    """Loss over S for each rule, at both lengths of evaluation, and the logs of the paper."""
    panels = {
        "This library, length 2S": best_losses(records, "2S"),
        "This library, length S": best_losses(records, "S"),
        "Logs of the paper, length S": by_size(OFFICIAL["setting2"]),
    }
    with plt.rc_context(STYLE):
        figure, axes = panels_of(panels, "Update rules: pairs with replacement, the last value counts")
        for panel, (title, losses) in zip(axes, panels.items(), strict=True):
            draw_losses(panel, losses, rules, colours_of(rules))
            panel.set(title=title, xlabel="S, keys", yscale="log", ylim=(1e-4, 200))
            panel.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes[0].set_ylabel("best loss ½ |v* - v|²   (dotted: answering zero)")
        save(figure, axes, path)


def by_size(official):
    """The tables of official.json as {rule: {S: loss}}, without what is missing."""
    return {
        name: {s: loss for s, loss in zip(official["symbols"], row, strict=True) if loss is not None}
        for name, row in official["loss"].items()
    }


def colours_of(rules):
    return {name: plt.get_cmap("tab10")(i) for i, name in enumerate(rules)}


def panels_of(panels, title):
    width = 1.6 + 4.4 * len(panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, 4.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    return figure, axes[0]


def draw_losses(axes, losses, rules, colours):
    for name, rule in rules.items():
        row = losses.get(name, {})
        axes.plot(
            list(row), list(row.values()), marker="o", markersize=3, color=colours[name], label=rule.label
        )


def save(figure, axes, path):
    """Write the figure, with one legend for all panels."""
    lines = {line.get_label(): line for panel in axes for line in panel.get_legend_handles_labels()[0]}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
    figure.savefig(path)
    plt.close(figure)
