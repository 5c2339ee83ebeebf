"""Training by the paper's protocol, and sweeps over rules and sizes that can be interrupted and resumed.

Each finished run is one JSON file; a sweep skips the runs that have theirs. Nothing in a run depends on the
other runs, so that a sweep may also be cut into parts that run at the same time.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from retrieval import draw_episodes, draw_questions, squared_error
from slow_network import Adam, SlowNetwork
from tqdm import tqdm

import fwp_core as fwp


@dataclass(frozen=True)
class Rule:
    """A memory of the comparison, and what its training has of its own."""

    name: str
    label: str
    memory: Callable  # (rng, key_size, dtype) -> a memory; drawn anew for each batch, since FAVOR+ is random
    with_beta: bool = False
    glorot: bool = False  # initial projections of the paper's softmax attention
    rate: float = 1e-3
    batch: int = 32


@dataclass(frozen=True)
class Protocol:
    """How to train and when to stop; the paper's, except where --quick makes it smaller."""

    replacement: bool
    key_size: int = 64
    max_steps: int = 100_000
    evaluate_every: int = 100
    sequences: int = 20  # of one evaluation, all keys asked
    target: float = 1e-3  # stop here
    patience: int = 10  # or after more evaluations than this without a better loss
    stop_on: str = "S"  # the length of evaluation sequences that decides

    def lengths(self, symbols):
        """Lengths of evaluation sequences; the last one is that of training."""
        return {"S": symbols, "2S": 2 * symbols} if self.replacement else {"S": symbols}


@dataclass(frozen=True)
class Run:
    rule: Rule
    symbols: int
    seed: int
    protocol: Protocol

    @property
    def file_name(self):
        return f"{self.rule.name}-S{self.symbols:03d}-seed{self.seed}.json"


def train(run, bar=None):
    """Train one slow network and return the record of the run: its settings, and its losses over steps."""
    rule, protocol = run.rule, run.protocol
    rng = np.random.default_rng([run.seed, run.symbols])
    network = SlowNetwork(rng, run.symbols, protocol.key_size, rule.with_beta, rule.glorot)
    adam = Adam(network.parameters, rule.rate)
    history, best, strikes, start = [], np.inf, 0, time.perf_counter()
    for step in range(1, protocol.max_steps + 1):
        adam.step(loss_and_gradients(rng, network, run)[1])
        if step % protocol.evaluate_every:
            continue
        losses = evaluate(rng, network, run)
        history.append([step, *losses.values()])
        loss = losses[protocol.stop_on]
        strikes = 0 if loss < best else strikes + 1
        best = min(loss, best)
        if bar is not None:
            bar.set_postfix_str(f"{rule.name} S={run.symbols} step {step} loss {loss:.4f} best {best:.4f}")
        if loss <= protocol.target or strikes > protocol.patience:
            break
    return record(run, history, time.perf_counter() - start)


def loss_and_gradients(rng, network, run, dtype=np.float32):
    """The mean loss of a batch, one question per sequence, and the gradients of the network's parameters."""
    rule, protocol = run.rule, run.protocol
    length = list(protocol.lengths(run.symbols).values())[-1]
    episodes = draw_episodes(rng, rule.batch, length, run.symbols, protocol.replacement)
    asked = draw_questions(rng, episodes)
    memory = rule.memory(rng, protocol.key_size, dtype)
    tokens, to_parameters = network.forward(episodes.keys, episodes.values, asked)
    read, to_tokens = memory.answer(*tokens)
    losses, error = squared_error(read, episodes.answers[np.arange(rule.batch), asked])
    return losses.mean(), to_parameters(*to_tokens(error / dtype(rule.batch)))


def evaluate(rng, network, run):
    """The loss on fresh sequences of each length: a mean over all keys shown, then over the sequences."""
    rule, protocol = run.rule, run.protocol
    memory = rule.memory(rng, protocol.key_size, np.float32)
    losses = {}
    for name, length in protocol.lengths(run.symbols).items():
        episodes = draw_episodes(rng, protocol.sequences, length, run.symbols, protocol.replacement)
        tokens, _ = network.forward(episodes.keys, episodes.values, np.arange(run.symbols))
        shown = episodes.answers >= 0
        error = squared_error(memory.recall(*tokens), episodes.answers)[0]
        losses[name] = float(np.mean(np.sum(error * shown, axis=1) / shown.sum(axis=1)))
    return losses


def record(run, history, seconds):
    lengths = list(run.protocol.lengths(run.symbols))
    losses = np.array([row[1:] for row in history]).reshape(-1, len(lengths))
    return {
        "rule": run.rule.name,
        "symbols": run.symbols,
        "seed": run.seed,
        "protocol": {name: getattr(run.protocol, name) for name in Protocol.__dataclass_fields__},
        "rate": run.rule.rate,
        "batch": run.rule.batch,
        "version": fwp.__version__,
        "seconds": round(seconds, 1),
        "steps": history[-1][0] if history else 0,
        "best": dict(zip(lengths, np.fmin.reduce(losses, axis=0, initial=np.inf).tolist(), strict=True)),
        "history": {"columns": ["step", *lengths], "rows": history},
    }


def sweep(runs, folder):
    """Train what has no record in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not (folder / run.file_name).exists()]
    with tqdm(total=len(todo), unit="run") as bar:
        for run in todo:
            text = json.dumps(train(run, bar))
            unfinished = folder / f".{run.file_name}.{os.getpid()}"
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(folder / run.file_name)
            bar.update()


def load(folder):
    """All records of a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def parser(description, rules, symbols, folder):
    """The options that both settings share."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--quick", action="store_true", help="a small version of the sweep, about a minute")
    p.add_argument("--rules", nargs="+", choices=list(rules), help="train only these; all unless given")
    p.add_argument(
        "--symbols", nargs="+", type=int, help=f"sizes S; {symbols[0]} to {symbols[-1]} unless given"
    )
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--max-steps", type=int, help="steps of Adam at which a run ends in any case")
    p.add_argument("--results", type=Path, default=folder, help="folder of the records and of the figure")
    p.add_argument("--plot-only", action="store_true", help="draw what is there, train nothing")
    return p


def chosen_runs(arguments, rules, symbols, protocol):
    """The runs that the options ask for, small ones first."""
    if arguments.max_steps is not None:
        protocol = replace(protocol, max_steps=arguments.max_steps)
    names = arguments.rules or list(rules)
    sizes = arguments.symbols or symbols
    return [Run(rules[name], size, arguments.seed, protocol) for size in sizes for name in names]
