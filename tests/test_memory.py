"""Memory: how much a call takes, and what happens when there is none."""

import os

import numpy as np
import pytest
from cases import make_case, scan
from processes import run_python
from workspace import backward_workspace

import fwp_core as fwp

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")

# States of all tokens would take 2.6 GB here. Inputs are the same at every token, to leave the results alone.
GRADIENTS_OF_A_LONG_SCAN = """
import numpy as np
import fwp_core as fwp
from cases import gradients, make_case, scan
from memory import peak

T = 20000
case = make_case("delta", "channel", B=1, T=1, heads=(2, 2, 2), K=128, V=128)
per_token = ("q", "k", "v", "beta", "g", "do")
case = case.but(**{name: np.broadcast_to(getattr(case, name), (1, T, *getattr(case, name).shape[2:]))
                   for name in per_token})
before = peak()
results = [gradients(case), fwp.vjp(fwp.delta_rule, *case.inputs, **case.options)]
results.append(results[1][1](case.do, case.dfinal_state))
taken = peak() - before
given = sum(x.nbytes for grads in (results[0], results[2]) for x in grads) + results[1][0][0].nbytes
print((taken - given) / 2**20)
"""


def test_memory_does_not_grow_with_tokens_times_state():
    """Beside the results: checkpoints, some numbers per token and value column (here 20 MB), and scratch."""
    done = run_python(GRADIENTS_OF_A_LONG_SCAN)
    assert float(done.stdout) < 120, done.stderr


# Features are six times as wide as keys and values.
FUSED_AND_NOT = """
import numpy as np
import fwp_core as fwp
from cases import gradients, library_map, make_case, scan
from memory import peak

case = make_case("delta", B=1, T=8192, heads=(2, 2, 2), K=64, V=64, feature_map=("DPFP", 3), qk_norm="sum",
                 state=False)
phi = library_map(case.feature_map)
call = {call}
call(case.at(slice(0, 1)))
before = peak()
results = call(case)
fused = peak() - before
results = call(case.but(feature_map=None, q=phi(case.q), k=phi(case.k)))
print(fused / (peak() - before))
"""


@pytest.mark.parametrize(("call", "most"), [("scan", 1 / 3), ("gradients", 1 / 2)])
def test_features_are_never_held_for_all_tokens(call, most):
    done = run_python(FUSED_AND_NOT.format(call=call))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < most


NO_MEMORY = """
import resource
import numpy as np
import fwp_core as fwp
from cases import SCAN, gradients, make_case, scan

case = make_case("delta", B=1, T=3, heads=(1, 1, 1), K=60000, V=16)
small = make_case("delta")
expected = scan(small)
out, final = np.full_like(case.do, 7), np.full_like(case.initial_state, 7)
inputs_and_state = (*case.inputs, case.initial_state)
grads = fwp.Gradients(*(None if x is None else np.full_like(x, 7) for x in inputs_and_state))
inputs = case.map(np.copy)
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, hard))  # a state takes 4 MB
refused = 0
for call in (lambda: scan(case, out=out, final_state_out=final), lambda: gradients(case, out=grads)):
    try:
        call()
    except MemoryError:
        refused += 1
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
untouched = all((x == 7).all() for x in (out, final, *grads) if x is not None)
unchanged = all((x == y).all() for x, y in zip(case.arrays.values(), inputs.arrays.values()))
usable = all(np.array_equal(x, y) for x, y in zip(scan(small), expected))
scan(case, out=out, final_state_out=final)
print(refused, untouched, unchanged, usable, bool((out != 7).all()))
"""


def test_out_of_memory_leaves_everything_as_it_was():
    done = run_python(NO_MEMORY, MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536")
    assert done.stdout.split() == ["2", "True", "True", "True", "True"], done.stderr


@pytest.mark.parametrize(
    ("heads", "most"), [((8, 8, 8), 0.15), ((1, 1, 1), 0.15), ((8, 2, 2), 0.3), ((8, 2, 8), 0.3)], ids=str
)
@pytest.mark.parametrize("K", [64, 128])
def test_extra_memory_of_long_scans(isa, heads, K, most):
    with fwp.threads(2):
        extra, arrays = backward_workspace(heads, 65536, K, K, np.float32)
        scan(make_case("delta", T=1))  # the fixture wants a call
    assert extra < most * arrays


@pytest.mark.parametrize("K", [4096, 8192])
def test_extra_memory_of_short_scans_with_large_keys(isa, K):
    """The states inside one segment, which every thread holds, are bounded by time and not by K."""
    with fwp.threads(2):
        extra, arrays = backward_workspace((1, 1, 1), K, K, 64, np.float32)
        scan(make_case("delta", T=1))  # the fixture wants a call
    assert extra < arrays
