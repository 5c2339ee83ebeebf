"""The retrieval task of the paper (setting 2) and a small slow network that programs a fast weight for it.

An episode shows 2S pairs (key, value), drawn with replacement from S keys and S values, and then asks for the
value that each key was last paired with (Schlag, Irie, Schmidhuber 2021, section 6.1.2). Old values must be
replaced, not added to. Everything here is NumPy with gradients written by hand; the gradient through the
memory itself comes from fwp_core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Parameters = dict[str, Array]


class Episodes(NamedTuple):
    """A batch of B episodes with L writes each, over S keys and S values."""

    keys: Array  # [B,L] which key is written
    values: Array  # [B,L] which value it is paired with
    answers: Array  # [B,S] the value last paired with each key, -1 for a key that was never shown


def draw_episodes(rng: np.random.Generator, count: int, symbols: int) -> Episodes:
    """Draw `count` episodes of 2 * symbols pairs, keys and values with replacement."""
    keys = rng.integers(symbols, size=(count, 2 * symbols))
    values = rng.integers(symbols, size=(count, 2 * symbols))
    answers = np.full((count, symbols), -1)
    for t in range(keys.shape[1]):
        answers[np.arange(count), keys[:, t]] = values[:, t]
    return Episodes(keys, values, answers)


class Write(NamedTuple):
    """One write that replaces the value of a key, and what the memory holds around it."""

    key: int
    held: list[int]  # the values given to the key, in order; the last one by this write
    before: Array  # [K,S] fast weight
    after: Array  # [K,S]
    answer: Array  # [S] what the key is answered with after the write


class Tokens(NamedTuple):
    """What the slow network emits: T = L writes followed by S reads, one head.

    A write has q = 0. A read has k = 0, v = 0, beta = 0, so it leaves the fast weight as it is.
    """

    q: Array  # [B,T,1,K]
    k: Array  # [B,T,1,K]
    v: Array  # [B,T,1,S]
    beta: Array  # [B,T,1]


class SlowNetwork:
    """Learned key embedding e and projections; x = [v; e(key)] is the input of a write.

    k = W_k x / |W_k x|    beta = sigmoid(w_beta . x)    v one-hot    q = W_q e(key) / |W_q e(key)|
    """

    def __init__(self, rng: np.random.Generator, symbols: int, key_size: int, dtype: npt.DTypeLike) -> None:
        width = int(1.1 * 2 * symbols)

        def normal(*shape: int, scale: float = 1.0) -> Array:
            return (scale * rng.standard_normal(shape)).astype(dtype)

        self.symbols = symbols
        self.parameters: Parameters = {
            "embedding": normal(symbols, width),
            "w_k": normal(symbols + width, key_size, scale=(symbols + width) ** -0.5),
            "w_q": normal(width, key_size, scale=width**-0.5),
            "w_beta": normal(symbols + width, scale=(symbols + width) ** -0.5),
        }

    def forward(self, episodes: Episodes) -> tuple[Tokens, Callable[[Any], Parameters]]:
        """The tokens for a batch of episodes, and the pullback from fwp.Gradients to the parameters."""
        p, symbols = self.parameters, self.symbols
        batch, writes = episodes.keys.shape
        one_hot = np.eye(symbols, dtype=p["embedding"].dtype)

        v = one_hot[episodes.values]
        x = np.concatenate([v, p["embedding"][episodes.keys]], axis=-1)
        k, k_pullback = normalise(x @ p["w_k"])
        beta = 1 / (1 + np.exp(-(x @ p["w_beta"])))
        q, q_pullback = normalise(p["embedding"] @ p["w_q"])

        tokens = Tokens(
            q=pad_tokens(np.broadcast_to(q, (batch, *q.shape)), before=writes),
            k=pad_tokens(k, after=symbols),
            v=pad_tokens(v, after=symbols),
            beta=pad_tokens(beta, after=symbols),
        )

        def pullback(gradients: Any) -> Parameters:
            dq = q_pullback(gradients.dq[:, writes:, 0].sum(axis=0))
            dk = k_pullback(gradients.dk[:, :writes, 0])
            dlogit = gradients.dbeta[:, :writes, 0] * beta * (1 - beta)
            dx = dk @ p["w_k"].T + dlogit[..., None] * p["w_beta"]
            return {
                "embedding": sum_outer(one_hot[episodes.keys], dx[..., symbols:]) + dq @ p["w_q"].T,
                "w_k": sum_outer(x, dk),
                "w_q": p["embedding"].T @ dq,
                "w_beta": sum_outer(x, dlogit[..., None])[:, 0],
            }

        return tokens, pullback


def normalise(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """y = x / |x| along the last axis, and its pullback dx = (dy - y (y . dy)) / |x|."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    y = x / length
    return y, lambda dy: (dy - y * (y * dy).sum(axis=-1, keepdims=True)) / length


def sum_outer(a: Array, b: Array) -> Array:
    """Sum of a_t b_t^T over the tokens of all episodes: [B,L,m], [B,L,n] to [m,n]."""
    # One small product per episode: BLAS keeps those on one thread, which is faster than waking a second.
    product: Array = (a.swapaxes(1, 2) @ b).sum(axis=0)
    return product


def pad_tokens(x: Array, before: int = 0, after: int = 0) -> Array:
    """Append zero tokens on axis 1 and add the head axis: [B,T,...] to [B,before+T+after,1,...]."""
    widths = [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)]
    return np.expand_dims(np.pad(x, widths), 2)


def retrieval_loss(o: Array, episodes: Episodes) -> tuple[float, float, Array]:
    """Mean of 1/2 |v* - o|^2 over the keys that were shown, share of right argmax, and the gradient do."""
    symbols = episodes.answers.shape[1]
    read = o[:, -symbols:, 0]
    shown = episodes.answers >= 0
    error = np.where(shown[..., None], read - np.eye(symbols, dtype=o.dtype)[episodes.answers], 0)
    do = np.zeros_like(o)
    do[:, -symbols:, 0] = error / shown.sum()
    loss = 0.5 * float(np.sum(error.astype(np.float64) ** 2)) / int(shown.sum())
    recall = float((read.argmax(axis=-1) == episodes.answers)[shown].mean())
    return loss, recall, do


class Adam:
    """Adam (Kingma and Ba 2015) on a dictionary of arrays, updated in place."""

    def __init__(self, parameters: Parameters, decay: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameters = parameters
        self.decay = decay
        self.steps = 0
        self.mean = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.square = {name: np.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradients: Parameters, rate: float) -> None:
        """Take one step of size `rate`."""
        self.steps += 1
        b1, b2 = self.decay
        for name, gradient in gradients.items():
            self.mean[name] += (1 - b1) * (gradient - self.mean[name])
            self.square[name] += (1 - b2) * (gradient**2 - self.square[name])
            mean = self.mean[name] / (1 - b1**self.steps)
            square = self.square[name] / (1 - b2**self.steps)
            self.parameters[name] -= rate * mean / (np.sqrt(square) + 1e-8)
