"""Capacity (the paper's section 6.1.1): how many pairs does a fast weight hold under each feature map?

    python setting1.py --quick                                          small keys, about a minute
    python setting1.py                                                  the whole sweep, S = 20 to 600
    python setting1.py --rules dpfp1 --symbols 120 140 160              a part of it
    python setting1.py --form attention                                 the sweep with cheaper gradients

S pairs without replacement, the sum rule with attention normalisation, keys of size 64. A map with d_dot
features has room for d_dot orthogonal keys; beyond, the loss must rise.

A batch asks one question per sequence. Gradients by the fast weight, which could answer any, cost O(L K V)
per sequence; by the attention form, which compares the one query with all keys, O(L K). Both are the same
numbers to rounding (a test compares them). Losses are always measured through the fast weight.
"""

import sys
from pathlib import Path

import figures
import sweep
from memories import FastWeight, OneQuestion, SoftmaxAttention

import fwp_core as fwp
from fwp_core import feature_maps as maps

HERE = Path(__file__).parent
SYMBOLS = list(range(20, 601, 20))
PROTOCOL = sweep.Protocol(replacement=False)
FORMS = {"fast-weight": FastWeight, "attention": OneQuestion}

QUICK_SYMBOLS = [10, 20, 40, 60]
QUICK_PROTOCOL = sweep.Protocol(replacement=False, key_size=16, max_steps=600)


def sum_rule(form, feature_map):
    """The sum rule with a feature map of the key size, as sweep.Rule.memory."""
    return lambda rng, key_size, dtype: FORMS[form](
        fwp.linear_attention, feature_map(rng, key_size, dtype), attention_norm=True
    )


def favor(ratio):
    """FAVOR+ with 2 * ratio features per number of the key, drawn anew for each batch."""

    def draw(rng, key_size, dtype):
        seed = int(rng.integers(2**31))
        return maps.FAVOR(maps.orthogonal_gaussian(int(ratio * key_size), key_size, seed, dtype))

    return draw


def rules(form="fast-weight"):
    """By name. The ratio of FAVOR+ is m / 64, so that m is 64, 128 and 512 in the paper's size."""
    feature_maps = {("elu1", "ELU+1"): lambda *_: maps.ELU1()}
    feature_maps |= {(f"dpfp{nu}", f"DPFP-{nu}"): lambda *_, nu=nu: maps.DPFP(nu) for nu in (1, 2, 3)}
    feature_maps |= {(f"favor{64 * ratio}", f"FAVOR+ {64 * ratio}"): favor(ratio) for ratio in (1, 2, 8)}
    chosen = [sweep.Rule("softmax", "softmax", lambda *_: SoftmaxAttention(), glorot=True)]
    chosen += [sweep.Rule(*names, sum_rule(form, feature_map)) for names, feature_map in feature_maps.items()]
    return {rule.name: rule for rule in chosen}


def main(argv=None):
    parser = sweep.parser(__doc__.splitlines()[0], rules(), SYMBOLS, HERE / "results")
    parser.add_argument(
        "--form", choices=list(FORMS), default="fast-weight", help="how gradients are computed"
    )
    arguments = parser.parse_args(argv)
    chosen = rules(arguments.form)
    symbols, protocol = (QUICK_SYMBOLS, QUICK_PROTOCOL) if arguments.quick else (SYMBOLS, PROTOCOL)
    name = "setting1" + "-quick" * arguments.quick + "-attention" * (arguments.form == "attention")
    if not arguments.plot_only:
        sweep.sweep(sweep.chosen_runs(arguments, chosen, symbols, protocol), arguments.results / name)
    records = sweep.load(arguments.results / name)
    figures.print_table(records, chosen, "S")
    figures.draw_setting1(arguments.results / f"{name}.png", records, chosen, protocol.key_size)


if __name__ == "__main__":
    sys.exit(main())
