"""Ctrl-C ends a scan within 50 ms and leaves the library usable."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from cases import gradients, make_case, scan
from tolerances import assert_bits_equal

import fwp_core as fwp

DELAY = 0.05
LIMIT = 0.05


@pytest.fixture(autouse=True)
def _handler_of_ctrl_c():
    """A shell's background jobs ignore SIGINT from the start; then Python sets no handler of its own."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def long_case(rule, decay, T):
    """Hundreds of milliseconds of work in little memory: what comes in is the same at every token."""
    short = make_case(rule, decay, B=1, T=1, heads=(1, 1, 1), K=256, V=256)
    return short.but(
        **{
            name: np.broadcast_to(x, (1, T, *x.shape[2:]))
            for name, x in short.arrays.items()
            if name not in ("initial_state", "dfinal_state")
        }
    )


def sized_case(call, rule, decay):
    """A case that takes long enough to be interrupted here, at this level."""
    T = 200
    while True:
        case = long_case(rule, decay, T)
        start = time.perf_counter()
        call(case)
        elapsed = time.perf_counter() - start
        if elapsed > 10 * DELAY:
            return case
        T = int(T * min(8, 12 * DELAY / elapsed))


def latency(call, case):
    """Seconds from the signal to the exception."""
    sent, ended = [], []

    def press():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    def compute():
        call(case)
        ended.append(True)
        time.sleep(10 * DELAY)

    timer = threading.Timer(DELAY, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        compute()
    caught = time.perf_counter()
    timer.join()
    assert not ended, "the call was over before the signal came"
    return caught - sent[0]


def check_latency(call, case):
    """The median, as another process may hold the cores once; and again, as it may do so for longer."""
    medians = []
    while len(medians) < 3:
        medians.append(np.median([latency(call, case) for _ in range(5)]))
        if medians[-1] < LIMIT:
            return
    pytest.fail(f"median seconds from the signal to the exception: {medians}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", [scan, gradients])
@pytest.mark.parametrize(("rule", "decay"), [("delta", "none"), ("linear", "channel")])
def test_interrupted_within_50_ms(isa, call, rule, decay, threads):
    with fwp.threads(threads):
        case = sized_case(call, rule, decay)
        check_latency(call, case)

        small = make_case(rule, decay, T=20)
        first, second = call(small), call(small)
        for x, y in zip(first, second, strict=True):
            if x is not None:
                assert_bits_equal(x, y)


def test_vjp_is_interrupted(isa):
    def forward(case):
        fwp.vjp(fwp.delta_rule, *case.inputs, **case.options)

    case = sized_case(forward, "delta", "none")
    check_latency(forward, case)


def test_an_exception_of_another_handler_comes_through():
    """Any signal handler may end the scan, with the exception it raises."""

    class Enough(Exception):
        pass

    def handler(*_):
        raise Enough

    case = sized_case(scan, "delta", "none")
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, DELAY)
    try:
        with pytest.raises(Enough):
            scan(case)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_scans_of_other_threads_go_on():
    """Only the main thread's scan ends; it does not take a worker's with it."""
    case = sized_case(scan, "delta", "none")
    expected = scan(case)
    results = []
    worker = threading.Thread(target=lambda: results.append(scan(case)))
    worker.start()
    latency(scan, case)
    worker.join()
    for x, y in zip(results[0], expected, strict=True):
        assert_bits_equal(x, y)
