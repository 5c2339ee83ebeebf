"""What normalisation does to the delta rule, over steps: contrast on repeated pairs, and the accumulator.

    python normalisation.py                        writes results/normalisation.json and .png, under a minute

The paper argues that attention normalisation suits the delta rule badly: its accumulator z only grows, and it
does not balance what is removed against what is written. Here both are measured. At each step, with phi the
key's features, z and S from before the step, and v~ what the key reads then:

    contrast            |v - v~| / |v|       how far what is stored is from what is written
    s                   z.phi                what attention normalisation divides by
    write strength      beta n / (s + n)     share of the new value in what the key reads after the write;
                                             n = |phi|^2; beta n without attention normalisation
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
from memories import normalised
from tqdm import tqdm

import fwp_core as fwp
from fwp_core import feature_maps as maps

HERE = Path(__file__).parent
SIZE = 64  # of keys and values
EPS = 1e-6
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
        return {name: getattr(self, name) for name in names} | {"eps": EPS}


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
    """Measure each step of the delta rule over keys, values [T,n]: {name: [T]}, shorter where it diverges."""
    features = keys if set_up.feature_map is None else set_up.feature_map(keys)
    if set_up.qk_norm is not None:
        features = normalised(features, set_up.qk_norm)
    columns = values.shape[1] + set_up.attention_norm
    state = np.zeros((1, 1, features.shape[1], columns))
    strength = np.full((1, 1), float(beta))
    measured = []
    for key, value, phi in zip(keys, values, features, strict=True):
        measured.append(measure(set_up, state[0, 0], value, phi, beta))
        k, v = key[None, None], value[None, None]
        fwp.delta_rule_step(k, k, v, strength, state=state, **set_up.options)
        if not np.abs(state).max() < OVERFLOW:
            break
    return {name: np.array([row[name] for row in measured]) for name in measured[0]}


def measure(set_up, state, value, phi, beta):
    """The measures of one step; state [K,V] or [K,V+1] is that before the step, phi [K]."""
    read = phi @ state
    s, length = 1.0, phi @ phi
    write_strength = beta * length
    if set_up.attention_norm:
        read, s = read[:-1], read[-1]
        read = read / (s + EPS) if s != 0 else np.zeros_like(read)
        write_strength = beta * length / (s + length)
    return {
        "contrast": np.linalg.norm(value - read) / np.linalg.norm(value),
        "s": s,
        "write_strength": write_strength,
        "balance": phi.sum() / s if s != 0 else np.inf,
        "state": np.linalg.norm(state[:, : len(value)]),
    }


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
    """The geometric mean over the last sixteenth of the steps so far, for drawing."""
    total = np.concatenate([[0], np.cumsum(np.log(np.maximum(x, 1e-300)))])
    i = np.arange(1, len(x) + 1)
    first = i - np.maximum(i // 16, 1)
    return np.exp((total[i] - total[first]) / (i - first))


def draw(path, contrasts, grown):
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12.5, 8.4), layout="constrained")
        colours = {set_up.label: plt.get_cmap("tab10")(i) for i, set_up in enumerate(SET_UPS)}
        draw_contrast(axes[0, 0], contrasts, colours)
        for panel, name, title in (
            (axes[0, 1], "s", "Accumulator: what a read is divided by, s = z.φ(k)"),
            (axes[1, 0], "balance", "Weight on what is removed over weight on what is written"),
            (axes[1, 1], "write_strength", "Share of the new value in what its key reads"),
        ):
            for label, measures in grown.items():
                if name != "s" or "attention" in label:
                    panel.loglog(smooth(measures[name]), color=colours[label], label=label, linewidth=1.4)
            panel.set(title=title, xlabel="step")
        axes[1, 0].axhline(1, color="black", linewidth=0.8, linestyle=":")
        save(figure, axes.flat, path)


def draw_contrast(axes, contrasts, colours):
    for label, contrast in contrasts.items():
        axes.semilogx(
            np.arange(1, len(contrast) + 1), contrast, color=colours[label], label=label, linewidth=1.6
        )
    replaced = max(map(len, contrasts.values())) // 2
    axes.axvline(replaced, color="black", linewidth=0.8, linestyle=":")
    axes.text(replaced, 1.43, "new values ", ha="right", va="top")
    axes.set(
        title="Contrast |v - v~| / |v| of fixed pairs shown again and again",
        xlabel="sweep over the pairs",
        ylim=(-0.03, 1.45),
    )


def summary(contrasts, grown, sweeps):
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
                "diverged_at": len(m["s"])
                if len(m["s"]) < max(len(x["s"]) for x in grown.values())
                else None,
                "slope_of_s": slope(m["s"]) if "attention" in label else None,
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
    text = json.dumps(summary(contrasts, grown, sweeps), indent=1)
    (arguments.results / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    draw(arguments.results / f"{name}.png", contrasts, grown)


if __name__ == "__main__":
    sys.exit(main())
