"""Draw fast_weight.png: one write and one read of the delta rule as equations in heat maps.

Run it from anywhere with fwp_core and matplotlib installed; it writes the picture beside itself.
"""

from pathlib import Path

import matplotlib
import numpy as np

import fwp_core as fwp

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GREY = "#444444"
SIZE = 6  # K = V


def main():
    before, after, k, v, o = one_write()
    figure, axes = plt.subplots(figsize=(10.4, 5.2))
    axes.set(xlim=(-3.4, 38), ylim=(-12.6, 8), aspect="equal")
    axes.axis("off")

    say(axes, -2.2, 3, "write", weight="bold", fontsize=13)
    tile(axes, 0, 0, before, "$S_{t-1}$", "the fast weight")
    say(axes, 7.6, 3, r"$+\ \ \beta_t$")
    tile(axes, 9.2, 0, k[:, None], "$k_t$", "the key")
    say(axes, 11.9, 3, r"$\otimes$  (")
    tile(axes, 13.4, 0, v[None], "$v_t$", "the new value")
    say(axes, 20.4, 3, "-")
    tile(axes, 21.4, 0, before.T[None] @ k, r"$S_{t-1}^{\top} k_t$", "what the key\nreads so far")
    say(axes, 28.9, 3, ")  =")
    tile(axes, 30.6, 0, after, "$S_t$", "the fast weight,\none value replaced")

    say(axes, -2.2, -8, "read", weight="bold", fontsize=13)
    tile(axes, 0, -11, k[None], "$q_t$", "the query, here\nthe same key")
    say(axes, 7.0, -8, r"$\times$")
    tile(axes, 8.0, -11, after, "$S_t$", "")
    say(axes, 15.2, -8, "=")
    tile(axes, 16.4, -11, o[None], "$o_t$", "the output: close to\nthe new value")

    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.1)


def one_write():
    """A state that holds three pairs, and the write of a fourth to a key that overlaps two of them."""
    rng = np.random.default_rng(7)
    keys = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    values = rng.uniform(-1, 1, (SIZE, SIZE))
    state = np.zeros((1, 1, SIZE, SIZE))
    for key, value in zip(keys[:3], values[:3], strict=True):
        fwp.delta_rule_step(*token(key, key, value, 1.0), state=state)
    before = state[0, 0].copy()
    k = (keys[0] + 0.6 * keys[1]) / np.hypot(1, 0.6)
    o = fwp.delta_rule_step(*token(k, k, values[4], 0.9), state=state)
    return before, state[0, 0], k, values[4], o[0, 0]


def token(q, k, v, beta):
    """One token for B = H = 1."""
    return (*(x[None, None] for x in (q, k, v)), np.full((1, 1), beta))


def tile(axes, left, bottom, matrix, name, meaning):
    """A heat map, centred on the height of a whole matrix, with its name above and its meaning below."""
    rows, columns = matrix.shape
    bottom += (SIZE - rows) / 2
    x, y = left + np.arange(columns + 1), bottom + np.arange(rows + 1)
    axes.pcolormesh(x, y, matrix[::-1], cmap="RdBu_r", vmin=-1, vmax=1, edgecolors="white", linewidth=1)
    say(axes, left + columns / 2, bottom + rows + 0.35, name, va="bottom", fontsize=13)
    say(axes, left + columns / 2, bottom - 0.4, meaning, va="top", fontsize=9.5, color=GREY)


def say(axes, x, y, text, va="center", fontsize=15, **style):
    """Text around a point."""
    axes.text(x, y, text, ha="center", va=va, fontsize=fontsize, **style)


if __name__ == "__main__":
    main()
