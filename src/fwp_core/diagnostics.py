"""Probes of a fast weight at work: is what is retrieved what was written, and do the accumulators grow?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .adapters import routed_by
from .feature_maps import FeatureMap
from .ops import ArrayT, Integers, QKNorm, rule_of

Numbers = NDArray[Any]


@dataclass(frozen=True, repr=False, eq=False)
class Diagnostics:
    """Probes of every token and head, each [B,T,H], of the states' dtype.

    With k and q after feature map and normalisation, z' = a z, z = z' + k the keys gathered (followed whether
    or not ``attention_norm`` divides by them), s = z'.k, c = z.q, v~ what the key retrieves before its write
    and w~ after it. Where a divisor is 0 a probe is NaN or infinite, as IEEE arithmetic has it.

    Attributes
    ----------
    contrast
        \\|v - v~\\| / \\|v\\|: how far what is retrieved is from what is to be stored. 0 for a pair that the
        fast weight knows.
    retrieved
        \\|v~\\| / \\|v\\|.
    cosine
        Of the angle between v and v~.
    residual
        \\|v - w~\\| / \\|v\\|: what is left of the contrast after the write.
    write_strength
        beta \\|k\\|^2, with ``attention_norm`` beta \\|k\\|^2 / (s + \\|k\\|^2): the part of v that a read of
        its own key finds written.
    balance
        sum(k), with ``attention_norm`` sum(k) / s: the weight on the old values that are removed over that on
        the new value that is written; 1 is balanced (paper, appendix A.2).
    accumulator, query_accumulator
        s and c.
    z_sum, z_max
        sum(\\|z\\|) and max(z).
    state_norm
        Frobenius norm of the state after the write.
    stalled
        Channels in which z is so large that adding k changes nothing.
    """

    contrast: Numbers
    retrieved: Numbers
    cosine: Numbers
    residual: Numbers
    write_strength: Numbers
    balance: Numbers
    accumulator: Numbers
    query_accumulator: Numbers
    z_sum: Numbers
    z_max: Numbers
    state_norm: Numbers
    stalled: Numbers
    positions: Numbers  # [T], of every token in its sequence, from 1

    def probes(self) -> dict[str, Numbers]:
        """Return the probes [B,T,H] by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "positions"}

    def summary(self) -> dict[str, dict[str, float]]:
        """Return mean, min and max of the finite entries of every probe, and how many are not finite.

        ``slope`` is that of log(probe) over log(position), fitted to the positive entries: 1 for an
        accumulator that grows with the number of steps.
        """
        return {name: _summary(x, self.positions) for name, x in self.probes().items()}

    def plot(self) -> Any:
        """Return a matplotlib Figure of the probes over the tokens: mean and range over batch and heads."""
        from .cli.probes import draw

        return draw(self)

    def __repr__(self) -> str:
        return f"Diagnostics({len(self.probes())} probes {list(self.contrast.shape)})"


@routed_by("q")
def diagnose(
    fn: Callable[..., tuple[Any, Any]],
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    beta: ArrayT | None = None,
    g: ArrayT | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: ArrayT | None = None,
    cu_seqlens: Integers | None = None,
) -> Diagnostics:
    """Run a scan token by token and return what happens in it; its outputs are not made, let alone changed.

    Parameters
    ----------
    fn : fwp_core.delta_rule or fwp_core.linear_attention
        Anything else is an ArgumentError.
    q, k, v, beta, g, and the options
        As for ``fn``.

    Returns
    -------
    Diagnostics
        Arrays [B,T,H], of NumPy whatever the inputs are, a summary and a picture.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, MemoryError, KeyboardInterrupt
        As ``fn``.

    Notes
    -----
    Cost: about 10 K V flops per token and head, not blocked: several times that of ``fn``.

    Examples
    --------
    The delta rule knows a pair after one write, the sum rule adds it up:

    >>> import numpy as np
    >>> import fwp_core as fwp
    >>> k, v = np.ones((1, 3, 1, 1)), np.ones((1, 3, 1, 1))
    >>> fwp.diagnose(fwp.delta_rule, k, k, v, np.ones((1, 3, 1))).contrast.ravel()
    array([1., 0., 0.])
    >>> fwp.diagnose(fwp.linear_attention, k, k, v).contrast.ravel()
    array([1., 0., 1.])
    """
    measure = getattr(_core, f"{rule_of(fn)}_diagnose")
    options = (feature_map, qk_norm, attention_norm, eps, scale, initial_state, cu_seqlens)
    probes = _core.to_numpy("probes", measure(q, k, v, beta, g, *options))
    # In the order of fwp_linear_diagnose of fwp.h.
    v2, read2, v_read, error2, residual2, state2, k2, k_sum, s, c, z_sum, z_max, stalled = np.moveaxis(
        probes, -1, 0
    )
    strength = k2 if beta is None else _core.to_numpy("beta", beta).astype(k2.dtype) * k2
    with np.errstate(all="ignore"):
        return Diagnostics(
            contrast=np.sqrt(error2 / v2),
            retrieved=np.sqrt(read2 / v2),
            cosine=v_read / np.sqrt(v2 * read2),
            residual=np.sqrt(residual2 / v2),
            write_strength=strength / (s + k2) if attention_norm else strength,
            balance=k_sum / s if attention_norm else k_sum.copy(),
            accumulator=s.copy(),
            query_accumulator=c.copy(),
            z_sum=z_sum.copy(),
            z_max=z_max.copy(),
            state_norm=np.sqrt(state2),
            stalled=stalled.copy(),
            positions=_positions(probes.shape[1], cu_seqlens),
        )


def _positions(tokens: int, cu_seqlens: Integers | None) -> Numbers:
    positions = np.arange(1, tokens + 1)
    if cu_seqlens is not None:
        starts = _core.to_integers("cu_seqlens", cu_seqlens)
        positions -= starts[np.searchsorted(starts, np.arange(tokens), side="right") - 1]
    return positions


def _summary(x: Numbers, positions: Numbers) -> dict[str, float]:
    finite = x[np.isfinite(x)].astype(np.float64)
    empty = finite.size == 0
    return {
        "mean": float("nan") if empty else float(finite.mean()),
        "min": float("nan") if empty else float(finite.min()),
        "max": float("nan") if empty else float(finite.max()),
        "slope": _slope(x, positions),
        "not_finite": float(x.size - finite.size),
    }


def _slope(x: Numbers, positions: Numbers) -> float:
    """Least squares slope of log(x) over log(position)."""
    where = np.broadcast_to(positions[None, :, None], x.shape)
    use = np.isfinite(x) & (x > 0)
    if np.unique(where[use]).size < 2:
        return float("nan")
    log_x, log_t = np.log(x[use].astype(np.float64)), np.log(where[use])
    log_t -= log_t.mean()
    return float(log_t @ (log_x - log_x.mean()) / (log_t @ log_t))
