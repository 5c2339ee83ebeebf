"""A picture of diagnostics: every probe over the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..diagnostics import Diagnostics

# Probes that range over orders of magnitude, drawn on a logarithmic axis.
WIDE = ("balance", "accumulator", "query_accumulator", "z_sum", "z_max", "state_norm")


def draw(diagnostics: Diagnostics) -> Figure:
    """Draw mean and range over batch and heads of every probe; a figure without a window."""
    from matplotlib.figure import Figure

    probes = diagnostics.probes()
    columns = 3
    rows = -(-len(probes) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    tokens = np.arange(1, len(diagnostics.positions) + 1)
    for axes, (name, values) in zip(grid, probes.items(), strict=False):
        axes.set_title(name.replace("_", " "), fontsize=9)
        if values.size == 0:
            continue
        by_token = np.moveaxis(np.where(np.isfinite(values), values, np.nan), 1, 0).reshape(len(tokens), -1)
        shown = np.ma.masked_invalid(by_token)
        axes.plot(tokens, shown.mean(axis=1), linewidth=1)
        axes.fill_between(tokens, shown.min(axis=1), shown.max(axis=1), alpha=0.25)
        if name in WIDE and np.any(by_token > 0):
            axes.set_yscale("log")
    for axes in grid[len(probes) :]:
        axes.set_axis_off()
    for axes in grid[-columns:]:
        axes.set_xlabel("token")
    return figure
