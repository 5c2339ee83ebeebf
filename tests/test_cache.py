"""The cache of warm memory: what it keeps, live arrays that never meet, results that are ordinary arrays."""

import itertools
import pickle
import threading

import numpy as np
import pytest
from cases import RULES, SCAN, gradients, make_case, scan
from hypothesis import given
from hypothesis import strategies as st
from numpy._core.multiarray import get_handler_name
from processes import run_forked, run_python
from tolerances import assert_bits_equal

import fwp_core as fwp

MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    fwp.empty_cache()
    yield
    fwp.empty_cache()


def idle():
    return fwp.show_config(mode="dict")["cache_idle"]


def result(megabytes, dtype=np.float64):
    """The output [1,T,1,64] of a scan that costs little, about so many megabytes: 1, 2, 3 ... along T."""
    T = int(megabytes * MEGABYTE / 64 / np.dtype(dtype).itemsize)
    one = np.broadcast_to(np.ones(1, dtype), (1, T, 1, 1))
    return fwp.linear_attention(one, one, np.broadcast_to(np.ones(64, dtype), (1, T, 1, 64)))[0]


def address(x):
    return x.ctypes.data


def test_memory_of_a_result_that_is_gone_is_used_again():
    o = result(4)
    first = address(o)
    assert idle() == 0
    del o
    assert 4 * MEGABYTE <= idle() <= 5 * MEGABYTE
    o = result(3.5)
    assert address(o) == first
    assert idle() == 0


@pytest.mark.parametrize("megabytes", [2.5, 5])
def test_no_memory_of_a_much_different_size_is_taken(megabytes):
    kept = address(result(4))
    o = result(megabytes)
    assert address(o) != kept
    assert idle() >= 4 * MEGABYTE


def test_small_results_are_numpy_s_own():
    o = result(0.5)
    assert get_handler_name(o) == get_handler_name(np.empty(1))
    del o
    assert idle() == 0


def test_arrays_of_others_are_not_touched():
    before = get_handler_name()
    o = result(2)
    assert get_handler_name(o) == "fwp_core"
    assert get_handler_name() == get_handler_name(np.empty(MEGABYTE)) == before
    with pytest.raises(fwp.ShapeError):
        fwp.linear_attention(o, o, o[:, 1:])
    assert get_handler_name() == before


def test_emptying_gives_the_idle_memory_back_and_no_other():
    o, other = result(2), result(3)
    copy = o.copy()
    del other
    assert idle() > 0
    assert fwp.empty_cache() is None
    assert idle() == 0
    assert_bits_equal(o, copy)


@given(st.lists(st.tuples(st.booleans(), st.floats(0.2, 6)), max_size=12))
def test_results_never_share_memory(steps):
    """Make a result, or drop the oldest one; each keeps the number that it was filled with."""
    alive = []
    for i, (drop, megabytes) in enumerate(steps):
        if drop and alive:
            alive.pop(0)
        else:
            o = result(megabytes)
            o[...] = i
            alive.append((i, o))
        ranges = sorted((address(o), address(o) + o.nbytes) for _, o in alive)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
        assert all((o == n).all() for n, o in alive)


@pytest.mark.parametrize("rule", RULES)
def test_every_result_is_written_in_full(rule):
    """Results in memory that holds NaN are those in fresh memory."""
    case = make_case(rule, "channel", B=2, T=700, heads=(2, 2, 2), K=64, V=64, dtype=np.float64)

    def run():
        (o, final_state), pullback = fwp.vjp(SCAN[rule], *case.inputs, **case.options)
        return [o, final_state, *pullback(case.do, case.dfinal_state), *gradients(case), *scan(case)]

    expected = [x.copy() for x in run()]
    for x in (results := run()):
        x[...] = np.nan
    del x, results
    assert idle() > 0
    for x, y in zip(run(), expected, strict=True):
        assert_bits_equal(x, y)


def test_copies_of_strided_arrays_and_workspaces_are_given_back():
    case = make_case("delta", B=1, T=3000, heads=(2, 2, 2), K=64, V=64, dtype=np.float64)
    strided = case.map(lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim == 4 else x)
    expected = gradients(case)
    del expected
    before = idle()
    for _ in range(3):
        gradients(strided)
    after = idle()
    gradients(strided)
    assert before < idle() == after


def test_results_are_arrays_like_any_other():
    o = result(2)
    expected = o.copy()
    assert type(o) is np.ndarray
    assert o.base is None
    assert o.flags.owndata
    assert o.flags.c_contiguous
    assert np.ascontiguousarray(o) is o
    assert_bits_equal(pickle.loads(pickle.dumps(o, protocol=5)), expected)
    o.flags.writeable = False
    o.flags.writeable = True
    view = o[0, 1:]
    del o
    fwp.empty_cache()
    result(2)[...] = np.nan
    assert_bits_equal(view, expected[0, 1:])


@pytest.mark.parametrize("rows", [1, 100, 4096, 9000])
def test_results_can_be_resized_in_place(rows):
    o = result(2)
    expected = o[0, :rows, 0].copy()
    o.resize((rows, 64), refcheck=False)
    assert_bits_equal(o[: len(expected)], expected)
    assert (o[len(expected) :] == 0).all()


def test_threads_do_not_meet():
    case = make_case("delta", B=1, T=600, heads=(4, 4, 4), K=64, V=64, dtype=np.float64)
    expected = [x.copy() for x in (*scan(case), *gradients(case)) if x is not None]
    wrong = []

    def work():
        for _ in range(8):
            results = [x for x in (*scan(case), *gradients(case)) if x is not None]
            wrong.extend(i for i, (x, y) in enumerate(zip(results, expected, strict=True)) if (x != y).any())
            for x in results:
                x[...] = np.nan

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forked_children_have_a_cache_of_their_own():
    o, kept = result(2), result(3)
    del kept
    before, expected = idle(), o.copy()
    stop = threading.Event()

    def work():
        while not stop.is_set():
            result(2)

    def child():
        mine = result(3)
        mine[...] = 5
        fwp.empty_cache()
        return (o == expected).all() and (mine == 5).all() and idle() == 0

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert [run_forked(child) for _ in range(10)] == [0] * 10
    finally:
        stop.set()
        thread.join()
    assert idle() >= before


CHURN = """
import numpy as np
import fwp_core as fwp
from test_cache import MEGABYTE, idle, result

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

result(0.5)
base = resident()
most = 0
for megabytes in (2, 3, 5, 7, 2, 3, 5, 7, 30, 2):
    result(megabytes)
    most = max(most, idle())
kept = [result(m) for m in (2, 3, 5, 7)]
del kept
config = fwp.show_config(mode="dict")
print(config["cache_limit"] // MEGABYTE, most / MEGABYTE, idle() / MEGABYTE, (resident() - base) / MEGABYTE)
fwp.empty_cache()
print((resident() - base) / MEGABYTE)
"""


@pytest.mark.parametrize(("limit", "least"), [("0", 0), ("8", 5), ("64", 17), ("00100", 17)])
def test_the_limit_holds_and_memory_is_given_back(limit, least):
    done = run_python(CHURN, FWP_CACHE_MB=limit)
    assert done.returncode == 0, done.stderr
    told, most, kept, resident, rest = map(float, done.stdout.split())
    assert told == int(limit)
    assert most <= told
    assert least <= kept <= told
    assert kept - 1 <= resident <= kept + 8
    assert rest <= 8


def test_the_newest_stay():
    code = """if True:
        from test_cache import MEGABYTE, address, idle, result
        blocks = [result(2), result(3), result(5)]
        addresses = [address(x) for x in blocks]
        while blocks:
            del blocks[0]
        print(idle() // MEGABYTE, address(result(5)) == addresses[2], address(result(3)) == addresses[1])
    """
    done = run_python(code, FWP_CACHE_MB="9")
    assert done.stdout.split() == ["8", "True", "True"], done.stderr


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1e3", "5 MB", "9" * 30])
def test_a_limit_that_is_no_number_is_an_error(value):
    code = """if True:
        import fwp_core as fwp
        from test_cache import result
        result(0.5)
        print(fwp.show_config(mode="dict")["cache_limit"])
        try:
            result(2)
        except fwp.ArgumentError as error:
            print(error)
    """
    done = run_python(code, FWP_CACHE_MB=value)
    said = f"FWP_CACHE_MB: expected a whole number of megabytes, got {value}"
    assert done.stdout.splitlines() == ["None", said], done.stderr


@pytest.mark.parametrize("value", [None, ""])
def test_the_limit_without_a_value(value):
    code = "import fwp_core as fwp; print(fwp.show_config(mode='dict')['cache_limit'])"
    assert int(run_python(code, FWP_CACHE_MB=value).stdout) == 512 * MEGABYTE


def test_results_outlive_the_interpreter_s_modules():
    code = """if True:
        import atexit, sys, threading
        from test_cache import result
        kept = result(2)
        sys.kept_too = result(3)
        atexit.register(lambda: result(2))
        local = threading.local()
        local.kept = result(2)
        cycle = [result(2)]
        cycle.append(cycle)
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
