"""fwp_core with the feature map applied outside of the scan, as a map of one's own would be."""

from __future__ import annotations

from registry import Case, inputs

from . import Prepared
from .ours import SCAN, feature_map, options, outputs, start

__all__ = ["PACKAGES", "prepare", "start"]

PACKAGES = ("fwp_core", "numpy")


def prepare(case: Case) -> Prepared:
    """phi(q) and phi(k) for the whole sequence, then the scan, which norms them; outputs given."""
    x, out, phi = inputs(case), outputs(case), feature_map(case)
    given = options(case) | {"feature_map": None}

    def call() -> None:
        SCAN[case.rule](phi(x.q), phi(x.k), x.v, x.beta, x.g, **given, **out)

    return Prepared(call, lambda: {"o": out["out"]})
