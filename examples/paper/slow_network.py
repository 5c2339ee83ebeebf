"""The network that programs the fast weight: an embedding of keys and two projections, trained by Adam.

    [k, logit] = W [v; e(key)] + b         write: the key sees its value too; beta = sigmoid(logit)
    q = W_q e(key) + b_q                   read

v is one-hot, so that W [v; e(key)] is a sum of two rows: one of W itself, one of the embedding times W.
"""

from typing import NamedTuple

import numpy as np


class Tokens(NamedTuple):
    q: np.ndarray  # [Q,K] one query for each key asked
    k: np.ndarray  # [B,L,K]
    v: np.ndarray  # [B,L,S]
    beta: np.ndarray | None  # [B,L]


class SlowNetwork:
    """Parameters of the paper's size: embeddings of width 1.1 * 2S, initialised as in its code."""

    def __init__(self, rng, symbols, key_size, with_beta, glorot=False, dtype=np.float32):
        width = int(1.1 * 2 * symbols)
        fan_in = symbols + width

        def uniform(limit, *shape):
            return rng.uniform(-limit, limit, shape).astype(dtype)

        def projection(inputs):
            return uniform((6 / (inputs + key_size)) ** 0.5 if glorot else key_size**-0.5, inputs, key_size)

        write = projection(fan_in)
        if with_beta:
            write = np.concatenate([write, uniform(fan_in**-0.5, fan_in, 1)], axis=1)
        self.symbols, self.key_size, self.with_beta = symbols, key_size, with_beta
        self.parameters = {
            "embedding": rng.standard_normal((symbols, width)).astype(dtype),
            "write": write,
            "write_bias": uniform(fan_in**-0.5, write.shape[1]),
            "read": projection(width),
            "read_bias": uniform(width**-0.5, key_size),
        }

    def forward(self, keys, values, asked):
        """Tokens of writes [B,L] and questions [Q], and the pullback from dq, dk, dbeta to the parameters."""
        p, S = self.parameters, self.symbols
        of_value, of_embedding = p["write"][:S], p["write"][S:]
        written = of_value[values] + (p["embedding"] @ of_embedding)[keys] + p["write_bias"]
        q = p["embedding"][asked] @ p["read"] + p["read_bias"]
        k = np.ascontiguousarray(written[..., : self.key_size])
        beta = 1 / (1 + np.exp(-written[..., self.key_size])) if self.with_beta else None
        tokens = Tokens(q, k, np.eye(S, dtype=k.dtype)[values], beta)

        def pullback(dq, dk, dbeta):
            dwritten = (
                dk if beta is None else np.concatenate([dk, (dbeta * beta * (1 - beta))[..., None]], -1)
            )
            by_value, by_key = sum_rows(dwritten, values, S), sum_rows(dwritten, keys, S)
            by_question = sum_rows(dq, asked, S)
            return {
                "embedding": by_key @ of_embedding.T + by_question @ p["read"].T,
                "write": np.concatenate([by_value, p["embedding"].T @ by_key]),
                "write_bias": by_value.sum(axis=0),
                "read": p["embedding"].T @ by_question,
                "read_bias": by_question.sum(axis=0),
            }

        return tokens, pullback


def sum_rows(rows, index, count):
    """The sum of the rows [...,n] of each index [...]: [count,n]."""
    order = np.argsort(index, axis=None, kind="stable")
    present, starts = np.unique(index.ravel()[order], return_index=True)
    sums = np.zeros((count, rows.shape[-1]), rows.dtype)
    sums[present] = np.add.reduceat(rows.reshape(-1, rows.shape[-1])[order], starts, axis=0)
    return sums


class Adam:
    """Adam (Kingma and Ba 2015) on a dictionary of arrays, updated in place."""

    def __init__(self, parameters, rate):
        self.parameters, self.rate, self.steps = parameters, rate, 0
        self.mean, self.square = (
            {name: np.zeros_like(x) for name, x in parameters.items()} for _ in range(2)
        )

    def step(self, gradients):
        self.steps += 1
        for name, gradient in gradients.items():
            self.mean[name] += 0.1 * (gradient - self.mean[name])
            self.square[name] += 0.001 * (gradient**2 - self.square[name])
            size = np.sqrt(self.square[name] / (1 - 0.999**self.steps)) + 1e-8
            self.parameters[name] -= self.rate / (1 - 0.9**self.steps) * self.mean[name] / size
