"""Train fast weight memories on the paper's retrieval task, linear against delta."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import fwp_core as fwp

from . import positive_int
from .retrieval import Adam, Array, Episodes, SlowNetwork, Write, draw_episodes, retrieval_loss

# Setting 2 of the paper: S, d_key, batch size and Adam's step size are its own.
SYMBOLS = 20
KEY_SIZE = 64
BATCH = 32
RATE = 1e-3
STEPS = 1000
EVALUATION_EPISODES = 500

LOSS_TARGET = 0.01
RECALL_TARGET = 0.95
LINEAR_FACTOR = 10.0
OUTPUT_TOLERANCE = 1e-5  # float32 against float64, relative L2
GRADIENT_TOLERANCE = 1e-6  # float64 against central differences, relative
RANK_TOLERANCE = 1e-5  # second singular value over first, float32

INTRODUCTION = """\
fwp_core demo: fast weight memories on a retrieval task (Schlag, Irie, Schmidhuber 2021, setting 2)

task      {pairs} pairs (key, value), drawn with replacement from {symbols} keys and {symbols} values,
          are written one by one; then every key that was shown is asked for the value it was
          last paired with. Old values have to be replaced, not added to.
network   embedding and projections in NumPy, keys and queries of size {key_size} with unit length,
          beta = sigmoid; the same for both rules. Adam, {steps} steps of {batch} episodes, float32,
          seed {seed}. Gradients through the memory are this library's.
measured  on {evaluation} fresh episodes: loss = 1/2 |v* - v|^2 per answer (answering zero gives 0.5) and
          recall = share of answers whose largest entry is the right value (guessing gives {chance:.0%})"""


@dataclass(frozen=True)
class Rule:
    """An update rule of the library and its specification in fwp.reference."""

    name: str
    scan: Callable[..., tuple[Array, Array]]
    step: Callable[..., Array]
    reference: Callable[..., tuple[Array, Array]]


@dataclass
class Trained:
    """A slow network trained with one rule, and how well it does."""

    rule: Rule
    network: SlowNetwork
    losses: list[float]
    loss: float
    recall: float


class Check(NamedTuple):
    """A measured error that has to stay below a tolerance."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error < self.tolerance


def rules() -> tuple[Rule, Rule]:
    """The two rules that the demo compares."""
    return (
        Rule("linear", fwp.linear_attention, fwp.linear_attention_step, fwp.reference.linear_attention),
        Rule("delta", fwp.delta_rule, fwp.delta_rule_step, fwp.reference.delta_rule),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--output", default="fwp_demo.png", help="picture to write (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive_int, default=STEPS, help="training steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=positive_int, default=1, help="random seed (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="60 steps, no targets: to see that it runs")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, check and draw. Returns 1 if a check or a target is missed."""
    missing = [name for name in ("tqdm", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        return 2
    from .picture import draw

    steps = 60 if args.quick else args.steps
    start = time.perf_counter()
    print(introduction(steps, args.seed), flush=True)
    linear, delta = (train(rule, steps, args.seed) for rule in rules())
    print("\nrule        loss   recall")
    for trained in (linear, delta):
        print(f"{trained.rule.name:8s}  {trained.loss:.4f}  {trained.recall:7.1%}")

    writes = [rewrite(trained, args.seed) for trained in (linear, delta)]
    rank_one = "delta: one write changes the fast weight by rank one"
    passed = report_checks(
        [
            *check_library(linear, args.seed),
            *check_library(delta, args.seed),
            Check(rank_one, rank_one_error(writes[1]), RANK_TOLERANCE),
        ]
    )
    if not args.quick:
        passed &= report_targets(linear, delta)
    draw(args.output, {"linear": linear.losses, "delta": delta.losses}, *writes)
    print(f"\npicture   {args.output}\ntime      {time.perf_counter() - start:.1f} s")
    return 0 if passed else 1


def report_checks(checks: list[Check]) -> bool:
    """Print the checks of the library; True if all pass."""
    print("\nchecks on the trained networks, relative errors (FAIL: the library computes something wrong)")
    for check in checks:
        print(f"{verdict(check.passed)}  {check.what:54s} {check.error:.1e} < {check.tolerance:.0e}")
    return all(check.passed for check in checks)


def report_targets(linear: Trained, delta: Trained) -> bool:
    """Print whether the memories learned what the paper reports; True if they did."""
    print("\ntargets (FAIL: the memories did not learn what the paper reports)")
    targets = {
        f"delta loss below {LOSS_TARGET}": delta.loss < LOSS_TARGET,
        f"delta recall above {RECALL_TARGET:.0%}": delta.recall > RECALL_TARGET,
        f"linear loss over {LINEAR_FACTOR:.0f} times delta's": linear.loss > LINEAR_FACTOR * delta.loss,
    }
    for what, reached in targets.items():
        print(f"{verdict(reached)}  {what}")
    return all(targets.values())


def introduction(steps: int, seed: int) -> str:
    """What is trained and what is measured, in words."""
    return INTRODUCTION.format(
        symbols=SYMBOLS,
        pairs=2 * SYMBOLS,
        key_size=KEY_SIZE,
        steps=steps,
        batch=BATCH,
        seed=seed,
        evaluation=EVALUATION_EPISODES,
        chance=1 / SYMBOLS,
    )


def verdict(passed: bool) -> str:
    """Four letters for a column."""
    return "pass" if passed else "FAIL"


def train(rule: Rule, steps: int, seed: int) -> Trained:
    """Train a slow network through the memory and evaluate it on fresh episodes."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    # Both rules see the same initial network, the same episodes and the same evaluation.
    initialise, draw, evaluate = (np.random.default_rng([seed, stream]) for stream in range(3))
    network = SlowNetwork(initialise, SYMBOLS, KEY_SIZE, np.float32)
    adam = Adam(network.parameters)
    losses = []
    # A terminal sees the bar move; a log file gets a line every few seconds.
    interval = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(range(steps), desc=f"{rule.name:6s}", ncols=90, mininterval=interval) as bar:
        for _ in bar:
            loss, gradients = loss_and_gradients(rule, network, draw_episodes(draw, BATCH, SYMBOLS))
            adam.step(gradients, RATE)
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    episodes = draw_episodes(evaluate, EVALUATION_EPISODES, SYMBOLS)
    tokens, _ = network.forward(episodes)
    o, _ = rule.scan(*tokens)
    loss, recall, _ = retrieval_loss(o, episodes)
    return Trained(rule, network, losses, loss, recall)


def loss_and_gradients(
    rule: Rule, network: SlowNetwork, episodes: Episodes
) -> tuple[float, dict[str, Array]]:
    """The loss and its gradient: slow network, memory, loss, and back through each pullback."""
    tokens, network_pullback = network.forward(episodes)
    (o, _), memory_pullback = fwp.vjp(rule.scan, *tokens)
    loss, _, do = retrieval_loss(o, episodes)
    return loss, network_pullback(memory_pullback(do))


def check_library(trained: Trained, seed: int) -> list[Check]:
    """Outputs against the O(T^2) form, gradients against a directional finite difference."""
    name = trained.rule.name
    rng = np.random.default_rng([seed, 3])
    episodes = draw_episodes(rng, BATCH, SYMBOLS)
    return [
        Check(f"{name}: output against the O(T^2) form", output_error(trained, episodes), OUTPUT_TOLERANCE),
        Check(
            f"{name}: gradient against finite differences",
            gradient_error(trained, episodes, rng),
            GRADIENT_TOLERANCE,
        ),
    ]


def output_error(trained: Trained, episodes: Episodes) -> float:
    """Relative L2 distance of the float32 output from the reference's masked O(T^2) form in float64."""
    tokens, _ = trained.network.forward(episodes)
    o, _ = trained.rule.scan(*tokens)
    expected, _ = trained.rule.reference(*tokens, form="attention")
    return float(np.linalg.norm(o - expected) / np.linalg.norm(expected))


def gradient_error(trained: Trained, episodes: Episodes, rng: np.random.Generator, h: float = 1e-4) -> float:
    """Relative error of the derivative of the loss along a random direction of all parameters, in float64."""
    network = SlowNetwork(rng, SYMBOLS, KEY_SIZE, np.float64)
    centre = {name: value.astype(np.float64) for name, value in trained.network.parameters.items()}
    direction = {name: rng.standard_normal(value.shape) for name, value in centre.items()}

    def at(distance: float) -> tuple[float, dict[str, Array]]:
        network.parameters = {name: centre[name] + distance * direction[name] for name in centre}
        return loss_and_gradients(trained.rule, network, episodes)

    _, gradients = at(0.0)
    derivative = sum(float(np.vdot(gradients[name], direction[name])) for name in centre)
    # Fourth order, so that the difference formula is exact far below the tolerance.
    difference = (8 * (at(h)[0] - at(-h)[0]) - (at(2 * h)[0] - at(-2 * h)[0])) / (12 * h)
    return abs(derivative - difference) / abs(difference)


def rewrite(trained: Trained, seed: int) -> Write:
    """The last write of an episode that gives a key a new value: the fast weight before and after it."""
    episodes = draw_episodes(np.random.default_rng([seed, 4]), 1, SYMBOLS)
    keys, values = episodes.keys[0].tolist(), episodes.values[0].tolist()
    held: dict[int, list[int]] = {}
    for t, (key, value) in enumerate(zip(keys, values, strict=True)):
        if held.setdefault(key, [value])[-1] != value:
            held[key].append(value)
            last = t

    tokens, _ = trained.network.forward(episodes)
    _, before = trained.rule.scan(*(x[:, :last] for x in tokens))
    after = before.copy()
    key = keys[last]
    query = tokens.q[:, len(keys) + key]
    _, k, v, beta = (x[:, last] for x in tokens)
    answer = trained.rule.step(query, k, v, beta, state=after)
    return Write(key, held[key], before[0, 0], after[0, 0], answer[0, 0])


def rank_one_error(write: Write) -> float:
    """Second singular value of the change over the first."""
    singular: Any = np.linalg.svd(write.after - write.before, compute_uv=False)
    return float(singular[1] / singular[0])
