"""A small network learns associative recall through the delta rule, trained by JAX with jit and grad.

Each sequence shows pairs of a key and a value, and then asks for the value of one of the keys. The network
embeds what it sees, writes and reads a fast weight, and classifies what it reads:

    python examples/jax_training.py
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fwp_core as fwp

PAIRS, SYMBOLS, HEADS, SIZE = 8, 16, 2, 16  # pairs per sequence, different keys and values
WIDTH = HEADS * SIZE


def draw(rng: np.random.Generator, batch: int) -> tuple[Any, Any, Any, Any]:
    """Keys and values [batch, PAIRS], no key twice in a sequence, the key asked for and its value [batch]."""
    keys = rng.permuted(np.tile(np.arange(SYMBOLS), (batch, 1)), axis=1)[:, :PAIRS]
    values = rng.integers(SYMBOLS, size=(batch, PAIRS))
    rows, asked = np.arange(batch), rng.integers(PAIRS, size=batch)
    return keys, values, keys[rows, asked], values[rows, asked]


def make_network(seed: int) -> dict[str, Any]:
    """Embeddings of keys and values, the write strength of a pair, and the classifier."""
    rng = np.random.default_rng(seed)
    shapes = {
        "keys": (SYMBOLS, WIDTH),
        "values": (SYMBOLS, WIDTH),
        "strength": (2 * WIDTH, HEADS),
        "answer": (WIDTH, SYMBOLS),
    }
    return {name: jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32) for name, shape in shapes.items()}


def answers(network: dict[str, Any], keys: Any, values: Any, question: Any) -> Any:
    """Scores [batch, SYMBOLS] of what is read under the question after all pairs were written."""
    k, v = network["keys"][keys], network["values"][values]  # [batch, PAIRS, WIDTH]
    beta = jax.nn.sigmoid(jnp.concatenate([k, v], axis=-1) @ network["strength"])

    def heads(x: Any) -> Any:
        return x.reshape(*x.shape[:-1], HEADS, SIZE)

    q = jnp.broadcast_to(network["keys"][question][:, None], k.shape)
    o, _ = fwp.delta_rule(heads(q), heads(k), heads(v), beta, qk_norm="l2")
    return o[:, -1].reshape(-1, WIDTH) @ network["answer"]


def loss(network: dict[str, Any], keys: Any, values: Any, question: Any, answer: Any) -> Any:
    scores = jax.nn.log_softmax(answers(network, keys, values, question))
    return -jnp.mean(jnp.take_along_axis(scores, answer[:, None], axis=1))


@jax.jit
def train_step(network: Any, moments: Any, step: Any, batch: Any, rate: float = 0.02) -> Any:
    """One step of Adam."""
    value, gradient = jax.value_and_grad(loss)(network, *batch)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], gradient)

    def update(x: Any, m: Any, s: Any) -> Any:
        return x - rate * (m / (1 - 0.9**step)) / (jnp.sqrt(s / (1 - 0.99**step)) + 1e-8)

    return jax.tree.map(update, network, first, second), (first, second), value


def recall(network: dict[str, Any], rng: np.random.Generator) -> float:
    """Fraction of questions of fresh sequences that are answered right."""
    keys, values, question, answer = draw(rng, 500)
    found = jax.jit(answers)(network, keys, values, question)
    return float(np.mean(np.argmax(found, axis=-1) == answer))


def main(steps: int, seed: int = 0) -> tuple[float, float]:
    """Train, and return the recall before and after."""
    rng = np.random.default_rng(seed)
    network = make_network(seed)
    zeros = jax.tree.map(jnp.zeros_like, network)
    moments, before = (zeros, zeros), recall(network, rng)
    for step in range(1, steps + 1):
        network, moments, value = train_step(network, moments, step, draw(rng, 64))
        if step % 20 == 0:
            print(f"step {step:4d}  loss {float(value):.3f}  recall {recall(network, rng):.3f}")
    return before, recall(network, rng)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
