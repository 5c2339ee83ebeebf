"""What normalisation does to the delta rule, over steps: contrast on repeated pairs, and the accumulator.

    python normalisation.py                        writes results/normalisation.json and .png, under a minute

The paper argues that attention normalisation suits the delta rule badly: its accumulator z only grows, and it
does not balance what is removed against what is written. Here fwp.diagnose measures both. At each step, with
phi the key's features, n = |phi|^2, z from before the step, and v~ what the key reads then:

    contrast            |v - v~| / |v|       how far what is stored is from what is written
    accumulator s       z.phi                what attention normalisation divides by
    write strength      beta n / (s + n)     share of the new value in what the key reads after the write;
                                             beta n without attention normalisation
    balance             sum(phi) / s         weight on old columns over weight on the new value; sum(phi)
                                             without attention normalisation, which sum normalisation makes 1

Without any normalisation the rule is stable only where beta n stays below 2, as for keys of length about 1;
under a map n is 30 and more, and the state overflows within some dozen writes.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from figures import GREY, STYLE, plt
from tqdm import tqdm

import fwp_core as fwp
from fwp_core import feature_maps as maps

HERE = Path(__file__).parent
SIZE = 64  # of keys and values
PROBES = ("contrast", "accumulator", "write_strength", "balance", "state_norm")
OVERFLOW = 1e30  # a state as large as this is called diverged
SINGLE_WRITES = 200  # of repeated pairs, drawn one by one

COLOURS = {"no map": "#222222", "ELU+1": "#c44e52", "DPFP-1": "#2a6f97", "DPFP-3": "#7fb2d0"}
LINES = {"none": ":", "L2": "-", "sum": "-", "attention": "--", "sum + attention": "-."}


@dataclass(frozen=True)
class SetUp:
    """A feature map and a normalisation, by their names; keys are Gaussian of this size per number."""

    map_name: str
    normalisation: str
    feature_map: maps.FeatureMap | None
    key_size: float = 1.0

    @property
    def label(self):
        return f"{self.map_name}, {self.normalisation}" + (", |k|² ≈ 1" if self.key_size < 1 else "")

    @property
    def options(self):
        norms = {"L2": "l2", "sum": "sum", "sum + attention": "sum"}
        return {
            "feature_map": self.feature_map,
            "qk_norm": norms.get(self.normalisation),
            "attention_norm": "attention" in self.normalisation,
        }


SET_UPS = [
    SetUp("no map", "none", None, key_size=SIZE**-0.5),
    SetUp("DPFP-1", "none", maps.DPFP(1)),
    SetUp("ELU+1", "none", maps.ELU1()),
    SetUp("no map", "L2", None),
    SetUp("DPFP-1", "sum", maps.DPFP(1)),
    SetUp("DPFP-3", "sum", maps.DPFP(3)),
    SetUp("ELU+1", "sum", maps.ELU1()),
    SetUp("DPFP-1", "attention", maps.DPFP(1)),
    SetUp("ELU+1", "attention", maps.ELU1()),
    SetUp("DPFP-1", "sum + attention", maps.DPFP(1)),
    SetUp("ELU+1", "sum + attention", maps.ELU1()),
]


def trace(set_up, keys, values, beta):
    """The probes of the delta rule over keys, values [T,n]: {name: [T]}, cut where the state diverges."""
    k, v = set_up.key_size * keys[None, :, None], values[None, :, None]
    d = fwp.diagnose(fwp.delta_rule, k, k, v, np.full(k.shape[:3], beta), **set_up.options)
    length = np.count_nonzero(np.logical_and.accumulate(d.state_norm[0, :, 0] < OVERFLOW))
    return {name: getattr(d, name)[0, :length, 0] for name in PROBES}


def repeated_pairs(set_up, pairs, sweeps, seed=0):
    """Contrast at each write of fixed pairs, beta = 1; after `sweeps` of them all values are new."""
    rng = np.random.default_rng(seed)
    keys, old, new = rng.standard_normal((3, pairs, SIZE))
    values = np.concatenate([np.tile(old, (sweeps, 1)), np.tile(new, (sweeps, 1))])
    return trace(set_up, np.tile(keys, (2 * sweeps, 1)), values, beta=1.0)["contrast"]


def by_sweep(contrast, pairs):
    """The mean over each whole sweep."""
    whole = len(contrast) // pairs * pairs
    return contrast[:whole].reshape(-1, pairs).mean(axis=1)


def growth(set_up, steps, seed=0):
    """The measures over `steps` random pairs, beta = 0.5."""
    keys, values = np.random.default_rng(seed).standard_normal((2, steps, SIZE))
    return trace(set_up, keys, values, beta=0.5)


def slope(s):
    """The exponent p of s ~ i^p over the second half of the steps."""
    half = np.arange(len(s)) >= len(s) // 2
    i = np.arange(1, len(s) + 1)
    return float(np.polyfit(np.log(i[half]), np.log(s[half]), 1)[0])


def smooth(x):
    """The geometric mean over the last sixteenth of the steps so far; NaN where nothing has a logarithm."""
    there = np.isfinite(x) & (x > 0)
    total, count = (
        np.concatenate([[0], np.cumsum(y)]) for y in (np.log(np.where(there, x, 1)), there.astype(float))
    )
    last = np.arange(1, len(x) + 1)
    first = last - np.maximum(last // 16, 1)
    counted = count[last] - count[first]
    mean = (total[last] - total[first]) / np.maximum(counted, 1)
    return np.where(counted > 0, np.exp(mean), np.nan)


def draw(path, contrasts, grown, pairs, sweeps):
    means = {label: by_sweep(x, pairs) for label, x in contrasts.items()}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 4, figsize=(19, 8.5), layout="constrained")
        figure.suptitle(
            f"Delta rule: contrast |v - v~| / |v| of {pairs} pairs shown again and again (above), "
            "and growth over random pairs (below)",
            weight="bold",
        )
        draw_contrasts(axes[0], contrasts, means, pairs, sweeps)
        draw_growth(axes[1], grown)
        legend_into(axes[0, 3], axes.flat)
        figure.savefig(path)
        plt.close(figure)


def draw_contrasts(axes, contrasts, means, pairs, sweeps):
    draw_lines(axes[0], {label: x[:SINGLE_WRITES] for label, x in contrasts.items()})
    draw_lines(axes[1], {label: x[:sweeps] for label, x in means.items()})
    draw_lines(axes[2], {label: x[sweeps:] for label, x in means.items() if len(x) > sweeps})
    axes[0].axvline(pairs, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes[0].set(
        title="At each write (dotted: first sweep)", xlabel="write", yscale="log", ylim=(1e-3, OVERFLOW)
    )
    axes[1].set(title="Mean of each sweep", xlabel="sweep over the pairs", ylim=(-0.03, 1.6))
    axes[2].set(title="The same, after all values are new", xlabel="sweep over the pairs", ylim=(-0.03, 1.6))


def draw_growth(axes, grown):
    panels = {
        "accumulator": "Accumulator: what a read is divided by, s = z.φ(k)",
        "balance": "Weight on what is removed / on what is written",
        "write_strength": "Share of the new value in what its key reads",
        "state_norm": "Size of the fast weight",
    }
    for panel, (name, title) in zip(axes, panels.items(), strict=True):
        draw_lines(panel, {label: smooth(x[name]) for label, x in grown.items() if shown(label, name)})
        panel.set(title=title, xlabel="step", yscale="log")


def shown(label, name):
    """s divides under attention normalisation only; without a feature map sums have any sign."""
    return {"accumulator": "attention" in label, "balance": "no map" not in label}.get(name, True)


def draw_lines(axes, lines):
    """A line over steps for each set-up; a cross where it ends, since its state has diverged."""
    longest = max(map(len, lines.values()))
    for set_up in SET_UPS:
        if (y := lines.get(set_up.label)) is None or not len(y):
            continue
        line = {"color": COLOURS[set_up.map_name], "linestyle": LINES[set_up.normalisation], "linewidth": 1.5}
        axes.semilogx(np.arange(1, len(y) + 1), y, label=set_up.label, **line)
        if len(y) < longest:
            axes.plot(len(y), y[-1], "x", color=line["color"], markersize=7)


def legend_into(axes, panels):
    """One legend for all panels, in the order of the set-ups."""
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    labels = [set_up.label for set_up in SET_UPS]
    axes.legend(
        [lines[label] for label in labels], labels, loc="center left", frameon=False, handlelength=3.5
    )
    axes.set_axis_off()
    axes.set_title("x  the state has diverged, beyond 1e30")


def summary(contrasts, grown, pairs, sweeps, steps):
    """What results/normalisation.json holds: figures at powers of four, None where a set-up has diverged."""

    def at(x, i):
        return float(x[i - 1]) if i <= len(x) and np.isfinite(x[i - 1]) else None

    def diverged_at(x, count):
        return len(x) + 1 if len(x) < count else None

    sizes = [4**n for n in range(8)]
    return {
        "contrast": {
            label: {
                "diverged_at": diverged_at(x, 2 * sweeps * pairs),
                "write": {i: at(x, i) for i in sizes if i <= SINGLE_WRITES},
                "sweep": {i: at(by_sweep(x, pairs), i) for i in sizes if i <= sweeps},
                "new_values": at(by_sweep(x, pairs), 2 * sweeps),
            }
            for label, x in contrasts.items()
        },
        "growth": {
            label: {
                "diverged_at": diverged_at(m["balance"], steps),
                "slope_of_s": slope(m["accumulator"]) if "attention" in label else None,
                **{name: {i: at(smooth(x), i) for i in sizes if i <= len(x)} for name, x in m.items()},
            }
            for label, m in grown.items()
        },
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, a few seconds")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args(argv)
    pairs, sweeps, steps = (4, 16, 256) if arguments.quick else (16, 256, 4096)
    contrasts, grown = {}, {}
    for set_up in tqdm(SET_UPS, unit="set-up"):
        contrasts[set_up.label] = repeated_pairs(set_up, pairs, sweeps)
        grown[set_up.label] = growth(set_up, steps)
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = "normalisation-quick" if arguments.quick else "normalisation"
    text = json.dumps(summary(contrasts, grown, pairs, sweeps, steps), indent=1, ensure_ascii=False)
    (arguments.results / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    draw(arguments.results / f"{name}.png", contrasts, grown, pairs, sweeps)


if __name__ == "__main__":
    sys.exit(main())
