"""The scans: one recurrence over time per head, its gradients, and single steps.

Shapes: B batch, T time, H heads, K key size, V value size, N sequences. The fast weight S of a head is [K,V],
the transpose of W in Schlag, Irie, Schmidhuber, "Linear Transformers Are Secretly Fast Weight Programmers",
arXiv 2102.11174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from . import _core
from ._core import ArgumentError
from .adapters import routed_by
from .feature_maps import FeatureMap


class SupportsDLPack(Protocol):
    """An array of any framework."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=SupportsDLPack)
Integers: TypeAlias = Sequence[int] | SupportsDLPack
QKNorm: TypeAlias = Literal["sum", "l2"]


class Gradients(NamedTuple):
    """Gradients in the order of the inputs, each of its input's shape and dtype; None where that was None."""

    dq: Any
    dk: Any
    dv: Any
    dbeta: Any = None
    dg: Any = None
    dinitial_state: Any = None


Pullback: TypeAlias = Callable[..., Gradients]


@routed_by("q")
def delta_rule(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    beta: ArrayT,
    g: ArrayT | None = None,
    *,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: ArrayT | None = None,
    cu_seqlens: Integers | None = None,
    out: ArrayT | None = None,
    final_state_out: ArrayT | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Run the delta rule over time: each key's value in the fast weight is corrected towards v.

    Per head, from S = ``initial_state`` or zero::

        S'  = a_t S_{t-1}                     a_t = 1, or exp(g_t)
        S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T
        o_t = scale S_t^T q_t

    (paper, eqs. 20 to 25). With ``g`` it is Gated DeltaNet, or, for one gate per key channel, Kimi Delta
    Attention.

    Parameters
    ----------
    q : ndarray [B,T,Hq,K]
        Queries, float32, float64, float16 or bfloat16 (the type of the package ml_dtypes).
    k : ndarray [B,T,Hk,K]
        Keys, of the dtype of q. Where ``beta |k|^2`` exceeds 2 states may grow without bound; with
        ``qk_norm="l2"`` it is beta.
    v : ndarray [B,T,Hv,V]
        Values, of the dtype of q.
    beta : ndarray [B,T,H]
        Write strengths, usually in (0, 1), of the dtype of q or float32. H = max(Hq, Hk, Hv); each of these
        divides H, and head h reads q head h // (H // Hq), and so on.
    g : ndarray [B,T,H] or [B,T,H,K], optional
        Log decay per head, or per head and key channel, of the dtype of q or float32. -inf empties the state.
    feature_map : FeatureMap, optional
        An object of :mod:`fwp_core.feature_maps`: phi(q) and phi(k) take the place of q and k. K is then
        ``feature_map.dim`` of the size of their rows, in ``g`` and in states.
    qk_norm : {"sum", "l2"}, optional
        Then rows of q and k are divided by their sum (paper, eq. 29) or their length. A row whose sum or
        length is 0 becomes 0.
    attention_norm : bool
        Whether reads are divided by the keys gathered so far (paper, eqs. 26 to 28)::

            z' = a_t z_{t-1}        S'^T k_t / (z'.k_t + eps) in place of S'^T k_t
            z_t = z' + k_t          o_t = scale S_t^T q_t / (z_t.q_t + eps)

        both 0 where the product with z is 0. z is kept beside the state: states are [N,H,K,V+1], z last.
    eps : float
        Of ``attention_norm`` only.
    scale : float
        Factor of the output.
    initial_state : ndarray [N,H,K,V], optional
        Fast weight before the first token, float32 (float64 where q is). N = B, or the number of packed
        sequences. [N,H,K,V+1] with ``attention_norm``, as all states.
    cu_seqlens : sequence of N+1 integers, optional
        Packed sequences, B = 1: sequence n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1] - 1``. It
        starts with 0 and ends with T; a sequence may be empty.
    out : ndarray [B,T,H,V], optional
        Where to write o. It may overlap no other argument.
    final_state_out : ndarray [N,H,K,V], optional
        Where to write the final state, float32 (float64 where q is). It may overlap no other argument,
        ``initial_state`` included.

    Returns
    -------
    o : ndarray [B,T,H,V]
        Outputs, of the dtype of v; ``out`` if given.
    final_state : ndarray [N,H,K,V]
        Fast weight after the last token, float32 (float64 where q is); ``final_state_out`` if given.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, ReadOnlyError
        For the first argument that is wrong, before anything is computed or written. Nothing is cast.
    DeviceError, UnsupportedError
        For an array that is not where q is, on the CPU or a CUDA device that can be used, or that does not
        hand out its memory.
    CudaError
        For a failure on a device, and for wrong ``cu_seqlens`` there, which are clamped: the next call, or
        :func:`fwp_core.check_device`, reports them.
    MemoryError, KeyboardInterrupt
        An interrupted call leaves ``out`` and ``final_state_out`` with unspecified contents.

    Notes
    -----
    Arrays are read and written in place whatever the strides of B, T and H; one whose K or V axis is not
    contiguous is copied once. Any size may be 0. The result is the same, bit for bit, for every number of
    threads, memory layout and batch around a sequence. The GIL is released. Cost: 6 K V flops per token and
    head, and memory for the results and about one state per thread.

    A call runs where q is. On a CUDA device all arrays are on that, but for ``cu_seqlens``, which may be on
    the CPU; the work is put on the current stream of their framework, and the call returns before it is done.

    float16 and bfloat16 are ways to store: all sums are float32, and each result is that of float32 arrays of
    the same values, rounded once, to nearest even. What float16 cannot hold, beyond 65504, becomes infinite.

    Examples
    --------
    Write two values under two keys, then overwrite the first:

    >>> import numpy as np
    >>> k = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).reshape(1, 3, 1, 2)
    >>> v = np.array([3.0, 5.0, 4.0]).reshape(1, 3, 1, 1)
    >>> o, final_state = delta_rule(k, k, v, np.ones((1, 3, 1)))
    >>> final_state[0, 0]
    array([[4.],
           [5.]])
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale, initial_state, cu_seqlens)
    o, final_state, _ = _core.delta_rule(q, k, v, beta, g, *options, out, final_state_out, False)
    return o, final_state


@routed_by("q")
def linear_attention(
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
    out: ArrayT | None = None,
    final_state_out: ArrayT | None = None,
) -> tuple[ArrayT, ArrayT]:
    """Run linear attention over time: each value is added to the fast weight under its key.

    Per head, from S = ``initial_state`` or zero::

        S_t = a_t S_{t-1} + beta_t k_t v_t^T   a_t = 1, or exp(g_t); beta_t = 1 unless given
        o_t = scale S_t^T q_t

    (paper, eqs. 10 and 11). With ``g`` it is RetNet, Mamba-2 or the gate of Random Feature Attention, or, for
    one gate per key channel, Gated Linear Attention.

    Parameters, results, errors and promises are those of :func:`delta_rule`; ``beta`` may be None. With
    ``attention_norm`` it is the Linear Transformer (eqs. 18 and 19): only the output is divided, by z.q.
    Cost: 4 K V flops per token and head.

    Examples
    --------
    >>> import numpy as np
    >>> k = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).reshape(1, 3, 1, 2)
    >>> v = np.array([3.0, 5.0, 4.0]).reshape(1, 3, 1, 1)
    >>> o, final_state = linear_attention(k, k, v)
    >>> final_state[0, 0]
    array([[7.],
           [5.]])
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale, initial_state, cu_seqlens)
    o, final_state, _ = _core.linear_attention(q, k, v, beta, g, *options, out, final_state_out, False)
    return o, final_state


@routed_by("do")
def delta_rule_backward(
    do: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    beta: ArrayT,
    g: ArrayT | None = None,
    *,
    dfinal_state: ArrayT | None = None,
    out: Gradients | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: ArrayT | None = None,
    cu_seqlens: Integers | None = None,
) -> Gradients:
    """Return the exact gradients of :func:`delta_rule`.

    They are those of sum(o * do) + sum(final_state * dfinal_state), in reverse time by hand-derived formulas.

    :func:`vjp` spares this function its own forward sweep.

    Parameters
    ----------
    do : ndarray [B,T,H,V]
        Gradient with respect to o, of the dtype of v.
    q, k, v, beta, g, feature_map, qk_norm, attention_norm, eps, scale, initial_state, cu_seqlens
        As given to :func:`delta_rule`.
    dfinal_state : ndarray [N,H,K,V], optional
        Gradient with respect to the final state, float32 (float64 where q is); zero if None.
    out : Gradients, optional
        Arrays to overwrite, each with its input's shape and dtype; None among them: a new array. They may
        overlap no other argument.

    Returns
    -------
    Gradients
        dq, dk, dv, dbeta, dg, dinitial_state; None where the input was None. Grouped heads sum over the
        group.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, ReadOnlyError, MemoryError, KeyboardInterrupt
        As :func:`delta_rule`.

    Notes
    -----
    Bitwise repeatable as :func:`delta_rule`. Cost: about 16 K V flops per token and head; memory never grows
    as T K V.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 5, 2, 4))
    >>> grads = delta_rule_backward(np.ones((1, 5, 2, 4)), q, k, v, np.full((1, 5, 2), 0.5))
    >>> grads.dbeta.shape
    (1, 5, 2)
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale, initial_state, cu_seqlens)
    return Gradients(*_core.delta_rule_backward(do, q, k, v, beta, g, dfinal_state, out, *options, None))


@routed_by("do")
def linear_attention_backward(
    do: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    beta: ArrayT | None = None,
    g: ArrayT | None = None,
    *,
    dfinal_state: ArrayT | None = None,
    out: Gradients | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    initial_state: ArrayT | None = None,
    cu_seqlens: Integers | None = None,
) -> Gradients:
    """Return the exact gradients of :func:`linear_attention`.

    Parameters, results, errors and promises are those of :func:`delta_rule_backward`; ``beta`` may be None.
    Cost: about 10 K V flops per token and head.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 5, 2, 4))
    >>> grads = linear_attention_backward(np.ones((1, 5, 2, 4)), q, k, v)
    >>> grads.dv.shape, grads.dbeta
    ((1, 5, 2, 4), None)
    """
    options = (feature_map, qk_norm, attention_norm, eps, scale, initial_state, cu_seqlens)
    return Gradients(
        *_core.linear_attention_backward(do, q, k, v, beta, g, dfinal_state, out, *options, None)
    )


@routed_by("q")
def vjp(
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
    out: ArrayT | None = None,
    final_state_out: ArrayT | None = None,
) -> tuple[tuple[ArrayT, ArrayT], Pullback]:
    """Run ``fn`` forward and return its results with a function for its gradients.

    Parameters
    ----------
    fn : fwp_core.delta_rule or fwp_core.linear_attention
        Anything else is an ArgumentError.
    q, k, v, beta, g, out, final_state_out, and the options
        As for ``fn``.

    Returns
    -------
    (o, final_state) : tuple of ndarray
        As ``fn`` returns them.
    pullback : callable
        ``pullback(do, dfinal_state=None, out=None)`` returns the Gradients that ``fn``'s backward function
        would. It may be called again. It keeps references to the input arrays, whose contents must not
        change, a copy of ``cu_seqlens``, and checkpoints of the state. Those belong to one instruction set
        level; after a switch the pullback does without them.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, ReadOnlyError, MemoryError, KeyboardInterrupt
        As ``fn``; the pullback as its backward function.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 5, 2, 4))
    >>> (o, final_state), pullback = vjp(delta_rule, q, k, v, np.full((1, 5, 2), 0.5))
    >>> pullback(np.ones_like(o)).dq.shape
    (1, 5, 2, 4)
    """
    rule = rule_of(fn)
    forward, backward = getattr(_core, rule), getattr(_core, f"{rule}_backward")

    # Checkpoints hold for the level they were made at; without them the pullback makes its own.
    level = _core.isa()
    options = (feature_map, qk_norm, attention_norm, eps, scale, initial_state)
    o, final_state, checkpoints = forward(q, k, v, beta, g, *options, cu_seqlens, out, final_state_out, True)
    if _core.isa() != level:
        checkpoints = None
    if cu_seqlens is not None:
        cu_seqlens = _core.kept_integers("cu_seqlens", cu_seqlens)

    def pullback(do: ArrayT, dfinal_state: ArrayT | None = None, out: Gradients | None = None) -> Gradients:
        kept = checkpoints if _core.isa() == level else None
        return Gradients(*backward(do, q, k, v, beta, g, dfinal_state, out, *options, cu_seqlens, kept))

    return (o, final_state), pullback


def rule_of(fn: Callable[..., Any], *adapted: Callable[..., Any]) -> str:
    """Return the name of this scan, which is one of this module or of these two of an adapter."""
    for scan in (delta_rule, linear_attention, *adapted):
        if fn is scan:
            return scan.__name__
    raise ArgumentError(f"fn: expected fwp_core.delta_rule or fwp_core.linear_attention, got {fn!r}")


@routed_by("q")
def delta_rule_step(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    beta: ArrayT,
    g: ArrayT | None = None,
    *,
    state: ArrayT,
    state_indices: Integers | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    out: ArrayT | None = None,
) -> ArrayT:
    """Take one token of :func:`delta_rule`, or a few, for decoding; ``state`` is updated in place.

    Parameters
    ----------
    q : ndarray [B,Hq,K] or [B,T,Hq,K]
        One token, or T, float32, float64, float16 or bfloat16. The other arguments have the T axis if and
        only if q has it.
    k, v : ndarray [B,Hk,K], [B,Hv,V] or [B,T,Hk,K], [B,T,Hv,V]
        Keys and values, of the dtype of q.
    beta : ndarray [B,H] or [B,T,H]
        Write strengths.
    g : ndarray [B,H] or [B,H,K], or [B,T,H] or [B,T,H,K], optional
        Log decay.
    state : ndarray [B,H,K,V], or [S,H,K,V] with ``state_indices``
        Fast weights, read and overwritten, float32 (float64 where q is). It may overlap no other argument.
    state_indices : sequence of B integers, optional
        Slots of a pool of states, as in a server: sequence b reads and writes ``state[state_indices[b]]``.
        No slot may be given twice. -1 leaves a sequence out, as padding of a batch: its output is 0. Slots
        that no sequence has are neither read nor written.
    feature_map, qk_norm, attention_norm, eps
        As for :func:`delta_rule`; the state is [B,H,K,V+1] with ``attention_norm``.
    scale : float
        Factor of the output.
    out : ndarray [B,H,V] or [B,T,H,V], optional
        Where to write o. It may overlap no other argument.

    Returns
    -------
    o : ndarray [B,H,V] or [B,T,H,V]
        The output, of the dtype of v; ``out`` if given.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, ReadOnlyError, MemoryError
        As :func:`delta_rule`; the state is then unchanged. A step cannot be interrupted.

    Notes
    -----
    Equal to the scan to rounding; one token gives the same bits with and without a T axis. Bitwise repeatable
    as :func:`delta_rule`. Cost: 6 K V flops per token and head, one pass over the memory of the states for up
    to 24 tokens, and a few microseconds per call. Up to 24 tokens, whole tiles of the states are worked on
    where they lie, whatever the strides of their first three axes, fastest where their rows start at
    multiples of 64 bytes (rows of whole pages, V = 1024 in float32, pass through the caches once more); where
    the last axis is not contiguous, ``state``, all slots of it, is copied and copied back.

    Examples
    --------
    >>> import numpy as np
    >>> state = np.zeros((1, 1, 2, 1))
    >>> k = np.array([[[1.0, 0.0]]])
    >>> delta_rule_step(k, k, np.array([[[3.0]]]), np.ones((1, 1)), state=state)
    array([[[3.]]])
    >>> state[0, 0]
    array([[3.],
           [0.]])

    Two sequences, the second of them padding, and a pool of three states:

    >>> pool = np.zeros((3, 1, 2, 1))
    >>> k = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> v, beta = np.array([[[3.0]], [[5.0]]]), np.ones((2, 1))
    >>> delta_rule_step(k, k, v, beta, state=pool, state_indices=[2, -1])[:, 0, 0]
    array([3., 0.])
    >>> pool[:, 0, :, 0]
    array([[0., 0.],
           [0., 0.],
           [3., 0.]])
    """
    return _core.delta_rule_step(
        q, k, v, beta, g, state, state_indices, feature_map, qk_norm, attention_norm, eps, scale, out
    )


@routed_by("q")
def linear_attention_step(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    beta: ArrayT | None = None,
    g: ArrayT | None = None,
    *,
    state: ArrayT,
    state_indices: Integers | None = None,
    feature_map: FeatureMap | None = None,
    qk_norm: QKNorm | None = None,
    attention_norm: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    out: ArrayT | None = None,
) -> ArrayT:
    """Take one token of :func:`linear_attention`, or a few, for decoding; ``state`` is updated in place.

    Parameters, results, errors and promises are those of :func:`delta_rule_step`; ``beta`` may be None.
    Cost: 4 K V flops per token and head.

    Examples
    --------
    >>> import numpy as np
    >>> state = np.ones((1, 1, 2, 1))
    >>> k = np.array([[[1.0, 0.0]]])
    >>> linear_attention_step(k, k, np.array([[[3.0]]]), state=state)
    array([[[4.]]])
    """
    return _core.linear_attention_step(
        q, k, v, beta, g, state, state_indices, feature_map, qk_norm, attention_norm, eps, scale, out
    )
