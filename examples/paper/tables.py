"""The tables of README.md, from the records under results/: python tables.py writes them into it.

A table stands between the lines <!-- table: name --> and <!-- end -->.
"""

import json
import re
import sys
from pathlib import Path

import figures
import normalisation
import setting1
import setting2
import sweep

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FORMS = {"setting1": "fast weight", "setting1-attention": "attention"}  # by the folder of their records
MEASURES = {
    "accumulator": "s",
    "write_strength": "share of the new value",
    "balance": "removed / written",
}
# Of the measures over random pairs, those that the text speaks of.
GROWTH = {
    "ELU+1, sum": ["write_strength"],
    "ELU+1, attention": list(MEASURES),
    "ELU+1, sum + attention": list(MEASURES),
    "DPFP-1, sum + attention": list(MEASURES),
}


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |\n" for line in lines)


def number(x):
    """Two digits."""
    return f"{x:.1e}".replace("e+0", "e") if x >= 1000 else f"{x:.2g}"


def capacity():
    """Setting 1: every loss of a map and form of gradients, and where the memory is too small."""
    official = figures.by_size(figures.OFFICIAL["setting1"])
    logged, rows = figures.OFFICIAL["setting1"]["first_above_0.01"], []
    for name, rule in setting1.rules().items():
        for folder, form in FORMS.items():
            losses = figures.best_losses(sweep.load(RESULTS / folder), "S").get(name)
            if losses:
                cells = [f"{size}: {beside(loss, official[name].get(size))}" for size, loss in losses.items()]
                first = logged.get(name, cliff(official[name]))
                rows.append([rule.label, form, ", ".join(cells), cliff(losses), first])
    return markdown(
        ["map", "gradients", "S: best loss / in the logs", "above 0.01 from", "in the logs"], rows
    )


def beside(loss, official):
    return f"{loss:.4f}" + (official is not None) * f" / {in_the_logs(official)}"


def cliff(losses):
    """The first S that failed; "at most" that, where the size before it on the paper's grid was not run."""
    failure = figures.first_failure(losses)
    if failure is None:
        return ""
    grid = setting1.SYMBOLS
    known = failure == grid[0] or grid[grid.index(failure) - 1] in losses
    return failure if known else f"at most {failure}"


def update_rules():
    """Setting 2: losses of each rule at both lengths of evaluation."""
    records = sweep.load(RESULTS / "setting2")
    official = figures.by_size(figures.OFFICIAL["setting2"])
    long, short = (figures.best_losses(records, length) for length in ("2S", "S"))
    rows = [
        [rule.label, size, f"{loss:.4f}", f"{short[name][size]:.4f}", in_the_logs(official[name].get(size))]
        for name, rule in setting2.rules().items()
        for size, loss in long.get(name, {}).items()
    ]
    return markdown(["rule", "S", "length 2S", "length S", "the paper's logs, length S"], rows)


def in_the_logs(loss):
    return "" if loss is None else f"{loss:.4f}"


def contrast():
    """Contrast on repeated pairs by sweep, and where set-ups diverge."""
    found = json.loads((RESULTS / "normalisation.json").read_text(encoding="utf-8"))["contrast"]
    sweeps = list(found[normalisation.SET_UPS[0].label]["sweep"])
    rows = []
    for label, x in found.items():
        if x["diverged_at"]:
            cells = [f"diverged at write {x['diverged_at']}"] + [""] * len(sweeps)
        else:
            cells = [f"{y:.2f}" for y in [*x["sweep"].values(), x["new_values"]]]
        rows.append([label, *cells])
    return markdown(["", f"sweep {sweeps[0]}", *sweeps[1:], f"{sweeps[-1]} after new values"], rows)


def growth():
    """Accumulator, share of the new value and balance over random pairs."""
    found = json.loads((RESULTS / "normalisation.json").read_text(encoding="utf-8"))["growth"]
    steps = ["16", "64", "256", "1024", "4096"]
    rows = [
        [label, MEASURES[name], *(number(found[label][name][step]) for step in steps)]
        for label, names in GROWTH.items()
        for name in names
    ]
    return markdown(["", "", f"step {steps[0]}", *steps[1:]], rows)


TABLES = {"capacity": capacity, "update rules": update_rules, "contrast": contrast, "growth": growth}


def filled(text):
    """The text with every table made anew from the records."""

    def block(match):
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", block, text, flags=re.DOTALL)


def main():
    readme = HERE / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
