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
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from figures import STYLE, plt, save
from tqdm import tqdm

import fwp_core as fwp
from fwp_core import feature_maps as maps

HERE = Path(__file__).parent
SIZE = 64  # of keys and values
PROBES = ("contrast", "accumulator", "write_strength", "balance", "state_norm")
OVERFLOW = 1e30  # a state as large as this is called diverged


@dataclass(frozen=True)
class SetUp:
    label: str
    feature_map: maps.FeatureMap | None
    qk_norm: str | None = None
    attention_norm: bool = False

    @property
    def options(self):
        names = ("feature_map", "qk_norm", "attention_norm")
        return {name: getattr(self, name) for name in names}


SET_UPS = [
    SetUp("ELU+1", maps.ELU1()),
    SetUp("no map, L2", None, "l2"),
    SetUp("DPFP-1, sum", maps.DPFP(1), "sum"),
    SetUp("DPFP-3, sum", maps.DPFP(3), "sum"),
    SetUp("ELU+1, sum", maps.ELU1(), "sum"),
    SetUp("DPFP-1, attention", maps.DPFP(1), attention_norm=True),
    SetUp("ELU+1, attention", maps.ELU1(), attention_norm=True),
    SetUp("DPFP-1, sum + attention", maps.DPFP(1), "sum", attention_norm=True),
    SetUp("ELU+1, sum + attention", maps.ELU1(), "sum", attention_norm=True),
]


def trace(set_up, keys, values, beta):
    """The probes of the delta rule over keys, values [T,n]: {name: [T]}, cut where the state diverges."""
    k, v = keys[None, :, None], values[None, :, None]
    d = fwp.diagnose(fwp.delta_rule, k, k, v, np.full(k.shape[:3], beta), **set_up.options)
    length = np.count_nonzero(np.logical_and.accumulate(d.state_norm[0, :, 0] < OVERFLOW))
    return {name: getattr(d, name)[0, :length, 0] for name in PROBES}


def repeated_pairs(set_up, pairs, sweeps, seed=0):
    """Mean contrast of each sweep over fixed pairs, beta = 1; after `sweeps` of them all values are new."""
    rng = np.random.default_rng(seed)
    keys, old, new = rng.standard_normal((3, pairs, SIZE))
    values = np.concatenate([np.tile(old, (sweeps, 1)), np.tile(new, (sweeps, 1))])
    contrast = trace(set_up, np.tile(keys, (2 * sweeps, 1)), values, beta=1.0)["contrast"]
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


def draw(path, contrasts, grown):
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(15.5, 8), layout="constrained")
        figure.suptitle(
            "Delta rule: contrast of 16 pairs shown again and again, and growth over random pairs"
        )
        sweeps = max(map(len, contrasts.values())) // 2
        draw_lines(axes[0, 0], {label: x[:sweeps] for label, x in contrasts.items()})
        draw_lines(axes[0, 1], {label: x[sweeps:] for label, x in contrasts.items()})
        panels = {
            "accumulator": "Accumulator: what a read is divided by, s = z.φ(k)",
            "balance": "Weight on what is removed / weight on what is written",
            "write_strength": "Share of the new value in what its key reads",
            "state_norm": "Size of the fast weight",
        }
        for panel, name in zip(axes.flat[2:], panels, strict=True):
            draw_lines(panel, {label: smooth(x[name]) for label, x in grown.items() if shown(label, name)})
            panel.set(title=panels[name], xlabel="step", yscale="log")
        axes[1, 2].set_ylim(top=1e4)
        for panel, title in zip(
            axes[0, :2], ("Contrast |v - v~| / |v|", "The same, after all values are new"), strict=True
        ):
            panel.set(title=title, xlabel="sweep over the pairs", ylim=(-0.03, 1.6))
        save(figure, axes.flat, path)


def shown(label, name):
    """s divides under attention normalisation only; without a feature map sums have any sign."""
    return {"accumulator": "attention" in label, "balance": "no map" not in label}.get(name, True)


def draw_lines(axes, lines):
    for i, set_up in enumerate(SET_UPS):
        if (y := lines.get(set_up.label)) is not None:
            style = "--" if "+ attention" in set_up.label else "-"
            colour = plt.get_cmap("tab10")(i)
            axes.semilogx(np.arange(1, len(y) + 1), y, style, color=colour, label=set_up.label, linewidth=1.5)


def summary(contrasts, grown, sweeps, steps):
    """What results/normalisation.json holds: figures at powers of four, None where a set-up has diverged."""

    def at(x, i):
        return float(x[i - 1]) if i <= len(x) and np.isfinite(x[i - 1]) else None

    sizes = [4**n for n in range(8)]
    return {
        "contrast": {
            label: {"sweep": {i: at(x, i) for i in sizes if i <= sweeps}, "new_values": at(x, 2 * sweeps)}
            for label, x in contrasts.items()
        },
        "growth": {
            label: {
                "diverged_at": len(m["balance"]) + 1 if len(m["balance"]) < steps else None,
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
    text = json.dumps(summary(contrasts, grown, sweeps, steps), indent=1)
    (arguments.results / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    draw(arguments.results / f"{name}.png", contrasts, grown)


if __name__ == "__main__":
    sys.exit(main())
