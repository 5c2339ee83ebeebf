"""Threads: the same bits for any number, from any caller, after a fork, and without room for any."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cases import DECAYS, RULES, gradients, make_case, scan
from processes import run_forked, run_python
from tolerances import assert_bits_equal

import fwp_core as fwp

all_scans = pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])
# Large enough to be shared out: one head with many value tiles, many heads, grouped heads, packed sequences.
SHAPES = (
    {"B": 1, "T": 150, "heads": (1, 1, 1), "K": 48, "V": 200},
    {"B": 3, "T": 60, "heads": (4, 4, 4), "K": 32, "V": 40},
    {"B": 2, "T": 100, "heads": (6, 2, 3), "K": 24, "V": 70},
    {"lengths": (80, 0, 3, 150, 1), "heads": (2, 1, 2), "K": 40, "V": 65},
)


def results(case):
    return [*scan(case), *gradients(case)]


def same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        if y is not None:
            assert_bits_equal(x, y)
    return True


@pytest.mark.parametrize("shape", SHAPES)
@all_scans
def test_any_number_of_threads_gives_the_same_bits(isa, rule, decay, shape):
    case = make_case(rule, decay, **shape)
    with fwp.threads(1):
        expected = results(case)
    for count in range(2, 9):
        with fwp.threads(count):
            same_bits(results(case), expected)


def test_number_of_threads():
    before = fwp.get_num_threads()
    assert before >= 1
    with fwp.threads(3):
        assert fwp.get_num_threads() == 3
        fwp.set_num_threads(5)
        assert fwp.get_num_threads() == 5
    assert fwp.get_num_threads() == before


@pytest.mark.parametrize("count", [0, -1])
def test_no_threads_is_refused(count):
    before = fwp.get_num_threads()
    with pytest.raises(ValueError, match=str(count)):
        fwp.set_num_threads(count)
    assert fwp.get_num_threads() == before


COUNT = "import fwp_core as fwp; print(fwp.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FWP_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"FWP_NUM_THREADS": None, "OMP_NUM_THREADS": "5"}, 5),
        ({"FWP_NUM_THREADS": "64", "OMP_NUM_THREADS": None}, 64),
    ],
)
def test_environment_sets_the_number(environment, expected):
    done = run_python(COUNT, **environment)
    assert int(done.stdout) == expected, done.stderr


@pytest.mark.parametrize("value", ["many", "0", "-2", ""])
def test_nonsense_in_the_environment_leaves_the_default(value):
    done = run_python(COUNT, FWP_NUM_THREADS=value, OMP_NUM_THREADS=None)
    assert 1 <= int(done.stdout) <= len(os.sched_getaffinity(0)), done.stderr


def test_affinity_is_the_default():
    one = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); " + COUNT
    done = run_python(one, FWP_NUM_THREADS=None, OMP_NUM_THREADS=None)
    assert int(done.stdout) == 1, done.stderr


@pytest.mark.parametrize("same_inputs", [True, False])
def test_many_callers_at_once(same_inputs):
    """Callers get the bits they would get alone."""
    shapes = [{**SHAPES[i % 3], "seed": 0 if same_inputs else i} for i in range(8)]
    if same_inputs:
        shapes = shapes[:1] * 8
    work = [make_case(RULES[i % 2], DECAYS[i % 3], **shape) for i, shape in enumerate(shapes)]
    with fwp.threads(2):
        expected = [results(case) for case in work]
        with ThreadPoolExecutor(8) as callers:
            for _ in range(8):
                jobs = [callers.submit(results, case) for case in work]
                assert all(same_bits(job.result(), x) for job, x in zip(jobs, expected, strict=True))


def test_callers_change_the_number_of_threads_meanwhile():
    case = make_case("delta", "scalar", **SHAPES[1])
    expected = results(case)
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for count in (1, 4, 2):
                fwp.set_num_threads(count)

    before = fwp.get_num_threads()
    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(30):
            same_bits(results(case), expected)
    finally:
        stop.set()
        changer.join()
        fwp.set_num_threads(before)


def test_other_threads_run_during_a_scan():
    """The lock of the interpreter is released: a thread of Python counts while the scan computes."""
    case = make_case("delta", B=1, T=20000, heads=(2, 2, 2), K=64, V=64)
    counted = [0]
    stop = threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = counted[0]
        with fwp.threads(1):
            scan(case)
        during = counted[0] - before
    finally:
        stop.set()
        counter.join()
    assert during > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_fork_after_threads_and_fork_in_a_fork(shape):
    case = make_case("delta", "channel", **shape)
    with fwp.threads(4):
        expected = results(case)

        def grandchild():
            return same_bits(results(case), expected)

        def child():
            return same_bits(results(case), expected) and run_forked(grandchild) == 0 and grandchild()

        assert run_forked(child) == 0
        same_bits(results(case), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_another_thread_computes():
    case = make_case("delta", **SHAPES[1])
    with fwp.threads(2):
        expected = results(case)
        stop = threading.Event()

        def compute():
            while not stop.is_set():
                results(case)

        busy = threading.Thread(target=compute)
        busy.start()
        try:
            for _ in range(10):
                assert run_forked(lambda: same_bits(results(case), expected)) == 0
        finally:
            stop.set()
            busy.join()


def test_a_thread_with_a_small_stack():
    case = make_case("delta", "channel", T=40, K=200, V=200)
    expected = results(case)
    outcome = []
    size = threading.stack_size(256 * 1024)
    try:
        caller = threading.Thread(target=lambda: outcome.append(same_bits(results(case), expected)))
        caller.start()
        caller.join()
    finally:
        threading.stack_size(size)
    assert outcome == [True]


NO_ROOM = """
import resource
import numpy as np
import fwp_core as fwp
from cases import gradients, make_case, scan

case = make_case("delta", "scalar", B=2, T=200, heads=(4, 4, 4), K=32, V=64)
with fwp.threads(1):
    expected = [*scan(case), *gradients(case)]
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
# Room for the arrays, not for a thread's stack of 8 MiB.
resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**20, used + 6 * 2**20))
with fwp.threads(8):
    for x, y in zip([*scan(case), *gradients(case)], expected):
        assert np.array_equal(x, y)
print("same")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_no_room_for_threads_means_fewer_threads():
    done = run_python(NO_ROOM, MALLOC_ARENA_MAX="1")
    assert done.stdout.strip() == "same", done.stderr


def test_signals_during_scans():
    """A timer at 1 kHz whose handler calls the library itself."""
    case, small = make_case("delta", **SHAPES[0]), make_case("linear", T=5)
    expected, small_expected = results(case), results(small)
    calls = []
    previous = signal.signal(
        signal.SIGALRM, lambda *_: calls.append(same_bits(results(small), small_expected))
    )
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for _ in range(20):
            same_bits(results(case), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert calls


FLOATING_POINT_STATE = """
import ctypes
import numpy as np

libm = ctypes.CDLL("libm.so.6")

def state():
    tiny = np.float32(1e-40)
    return libm.fegetround(), libm.fetestexcept(0), bool(tiny * np.float32(1) > 0), bool(tiny + tiny > tiny)

before = state()
import fwp_core as fwp
assert state() == before
x = np.full((2, 300, 4, 64), 1e-30, np.float32)
beta = np.ones((2, 300, 4), np.float32)
with fwp.threads(4):
    fwp.delta_rule(x, x, x, beta)
    fwp.delta_rule_backward(x, x, x, x, beta)
assert state() == before
assert libm.fesetround(0x400) == 0  # downward
down = fwp.delta_rule(x, x, x, beta)
assert libm.fegetround() == 0x400
print("same")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="rounding modes are numbered otherwise here")
def test_the_floating_point_state_is_left_alone():
    done = run_python(FLOATING_POINT_STATE)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.slow
def test_repeated_runs_at_batch_60():
    """Races show in repetition."""
    case = make_case("delta", "channel", B=60, T=40, heads=(4, 2, 4), K=32, V=48)
    with fwp.threads(8):
        expected = results(case)
        for _ in range(250):
            same_bits(results(case), expected)


@pytest.mark.parametrize("unusable", ["2x", "1e2", "0", "-1", "", " "])
def test_only_whole_numbers_count_in_the_environment(unusable):
    code = "import fwp_core; print(fwp_core.get_num_threads())"
    assert int(run_python(code, FWP_NUM_THREADS=unusable, OMP_NUM_THREADS="3").stdout) == 3


@pytest.mark.parametrize(("value", "expected"), [("2,4", 2), ("999", 256), ("9" * 30, 256)])
def test_lists_and_large_numbers_of_threads(value, expected):
    code = "import fwp_core; print(fwp_core.get_num_threads())"
    assert int(run_python(code, FWP_NUM_THREADS=None, OMP_NUM_THREADS=value).stdout) == expected
