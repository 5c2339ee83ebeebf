"""The paper's retrieval task: pairs (key, value) are shown one by one, then keys are asked for their values.

Setting 1 shows each of S keys once, with values that do not repeat either (without replacement). Setting 2
draws keys and values with replacement, so that a key may be shown again with another value; the last counts.
"""

from typing import NamedTuple

import numpy as np


class Episodes(NamedTuple):
    """B sequences of L pairs over S keys and S values."""

    keys: np.ndarray  # [B,L]
    values: np.ndarray  # [B,L]
    answers: np.ndarray  # [B,S] the value last shown with each key, -1 for a key that was never shown


def draw_episodes(rng, count, length, symbols, replacement):
    """Draw `count` sequences of `length` pairs over `symbols` keys and as many values."""

    def draw():
        if replacement:
            return rng.integers(symbols, size=(count, length))
        return rng.permuted(np.tile(np.arange(symbols), (count, 1)), axis=1)[:, :length]

    keys, values = draw(), draw()
    answers = np.full((count, symbols), -1)
    for t in range(length):
        answers[np.arange(count), keys[:, t]] = values[:, t]
    return Episodes(keys, values, answers)


def draw_questions(rng, episodes):
    """One key [B] per sequence, the more likely the more often it was shown."""
    count, length = episodes.keys.shape
    return episodes.keys[np.arange(count), rng.integers(length, size=count)]


def squared_error(read, answers):
    """1/2 |v* - v|^2 for each read [...,S], where v* is the one-hot vector of its answer [...]."""
    target = np.eye(read.shape[-1], dtype=read.dtype)[answers]
    return 0.5 * np.sum((read - target) ** 2, axis=-1, dtype=np.float64), read - target
