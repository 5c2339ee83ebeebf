"""Update rules (the paper's section 6.1.2): which rules replace a value when its key is shown again?

    python setting2.py --quick                     S = 20 and few steps, about a minute
    python setting2.py                             the whole sweep, S = 20 to 200

2S pairs with replacement over S keys. Each evaluation is made at two lengths: 2S, that of training and of the
paper's text, and S, that of the paper's code and so of its published logs. --stop-on says which one decides
when a run ends.
"""

import sys
from dataclasses import replace
from pathlib import Path

import figures
import sweep
from memories import FastWeight, FastWeightMemory
from setting1 import favor

import fwp_core as fwp
from fwp_core import feature_maps as maps

HERE = Path(__file__).parent
SYMBOLS = list(range(20, 201, 20))
PROTOCOL = sweep.Protocol(replacement=True, stop_on="2S")

QUICK_SYMBOLS = [20]
QUICK_PROTOCOL = replace(PROTOCOL, max_steps=600)


def delta(name, label, feature_map):
    """The paper's rule: delta, with keys and queries divided by their sums."""

    def memory(rng, key_size, dtype):
        return FastWeight(fwp.delta_rule, feature_map(rng, key_size, dtype), qk_norm="sum")

    return sweep.Rule(name, label, memory, with_beta=True)


def additive(rng, key_size, dtype):
    return FastWeight(fwp.linear_attention, maps.DPFP(1), attention_norm=True)


def rules():
    """By name. The rule of the Fast Weight Memory with tanh has a step size and batch of its own."""
    chosen = [
        sweep.Rule("sum-dpfp1", "sum, DPFP-1", additive),
        delta("delta-dpfp1", "delta, DPFP-1", lambda *_: maps.DPFP(1)),
        delta("delta-dpfp2", "delta, DPFP-2", lambda *_: maps.DPFP(2)),
        delta("delta-elu1", "delta, ELU+1", lambda *_: maps.ELU1()),
        delta("delta-favor64", "delta, FAVOR+ 64", favor(1)),
        delta("delta-favor128", "delta, FAVOR+ 128", favor(2)),
        sweep.Rule("fwm-dpfp1", "FWM, DPFP-1", lambda *_: FastWeightMemory(maps.DPFP(1)), with_beta=True),
        sweep.Rule(
            "fwm-tanh", "FWM, tanh", lambda *_: FastWeightMemory(), with_beta=True, rate=1e-4, batch=128
        ),
    ]
    return {rule.name: rule for rule in chosen}


def main(argv=None):
    chosen = rules()
    parser = sweep.parser(__doc__.splitlines()[0], chosen, SYMBOLS, HERE / "results")
    parser.add_argument("--stop-on", choices=["S", "2S"], default="2S", help="evaluation length that decides")
    arguments = parser.parse_args(argv)
    symbols, protocol = (QUICK_SYMBOLS, QUICK_PROTOCOL) if arguments.quick else (SYMBOLS, PROTOCOL)
    protocol = replace(protocol, stop_on=arguments.stop_on)
    name = "setting2-quick" if arguments.quick else "setting2"
    if not arguments.plot_only:
        sweep.sweep(sweep.chosen_runs(arguments, chosen, symbols, protocol), arguments.results / name)
    records = sweep.load(arguments.results / name)
    for length in ("2S", "S"):
        figures.print_table(records, chosen, length)
    figures.draw_setting2(arguments.results / f"{name}.png", records, chosen)


if __name__ == "__main__":
    sys.exit(main())
