"""The error table, and every message of the library once."""

import builtins
import pickle
import re

import numpy as np
import pytest
from arguments import FUNCTIONS, good, put, refused

import fwp_core as fwp
from fwp_core import _core

CLASSES = [row for row in _core.ERRORS if row[1] != row[2]]


@pytest.mark.parametrize(("code", "name", "base", "meaning"), _core.ERRORS)
def test_table(code, name, base, meaning):
    assert code > 0
    assert meaning
    if name == base:
        assert issubclass(getattr(builtins, name), BaseException)
        return
    error = getattr(fwp, name)
    assert name in fwp.__all__
    assert error.__bases__ == (fwp.FwpError, getattr(builtins, base))
    assert (error.__module__, error.__qualname__, error.__doc__) == ("fwp_core", name, meaning)


def test_table_is_complete():
    errors = {name for name in fwp.__all__ if name.endswith("Error")}
    assert errors == {"FwpError"} | {row[1] for row in CLASSES}
    assert [row[0] for row in _core.ERRORS] == list(range(1, len(_core.ERRORS) + 1))


@pytest.mark.parametrize("name", [row[1] for row in CLASSES])
def test_errors_can_be_pickled(name):
    error = getattr(fwp, name)("k: expected something else")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.args == error.args


delta, linear = FUNCTIONS["delta_rule"], FUNCTIONS["linear_attention"]
backward, step = FUNCTIONS["delta_rule_backward"], FUNCTIONS["delta_rule_step"]
steps = FUNCTIONS["delta_rule_steps"]


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def packed(**changes):
    """Arguments of delta_rule for one batch of 6 tokens."""
    return {
        "q": zeros(1, 6, 2, 3),
        "k": zeros(1, 6, 2, 3),
        "v": zeros(1, 6, 2, 3),
        "beta": zeros(1, 6, 2),
    } | changes


def read_only(x):
    x.flags.writeable = False
    return x


def by_bytes(x, shape, strides):
    return np.lib.stride_tricks.as_strided(x, shape, strides)


SHAPE = {
    "q: expected shape (B, T, Hq, K), got (3, 5, 4)": (delta, {"q": zeros(3, 5, 4)}),
    "q: expected shape (B, T, Hq, K), got ()": (delta, {"q": zeros()}),
    "q: expected shape (B, T, Hq, K), got (4,)": (delta, {"q": zeros(4)}),
    "k: expected shape (B=2, T=3, Hk, K=4), got (2, 3, 5, 7)": (delta, {"k": zeros(2, 3, 5, 7)}),
    "v: expected shape (B=2, T=3, Hv, V), got (2, 4, 5, 6)": (delta, {"v": zeros(2, 4, 5, 6)}),
    "q: expected a number of heads that divides H=5, got 3": (delta, {"q": zeros(2, 3, 3, 4)}),
    "k: expected a number of heads that divides H=5, got 0": (delta, {"k": zeros(2, 3, 0, 4)}),
    "v: expected a number of heads that divides H=5, got 2": (delta, {"v": zeros(2, 3, 2, 6)}),
    "beta: expected shape (B=2, T=3, H=5), got (2, 3, 1)": (delta, {"beta": zeros(2, 3, 1)}),
    "g: expected shape (B=2, T=3, H=5) or (B=2, T=3, H=5, K=4), got (2, 3)": (delta, {"g": zeros(2, 3)}),
    "initial_state: expected shape (N=2, H=5, K=4, V=6), got (2, 5, 6, 4)": (
        delta,
        {"initial_state": zeros(2, 5, 6, 4)},
    ),
    "out: expected shape (B=2, T=3, H=5, V=6), got (2, 3, 5, 5)": (delta, {"out": zeros(2, 3, 5, 5)}),
    "final_state_out: expected shape (N=2, H=5, K=4, V=6), got (1, 5, 4, 6)": (
        delta,
        {"final_state_out": zeros(1, 5, 4, 6)},
    ),
    "do: expected shape (B=2, T=3, H=5, V=6), got (2, 3, 5, 4)": (backward, {"do": zeros(2, 3, 5, 4)}),
    "dfinal_state: expected shape (N=2, H=5, K=4, V=6), got (2, 5, 4)": (
        backward,
        {"dfinal_state": zeros(2, 5, 4)},
    ),
    "out.dq: expected shape (B=2, T=3, Hq=5, K=4), got (2, 3, 1, 4)": (
        backward,
        {"out.dq": zeros(2, 3, 1, 4)},
    ),
    "out.dk: expected shape (B=2, T=3, Hk=5, K=4), got (2, 3, 1, 4)": (
        backward,
        {"out.dk": zeros(2, 3, 1, 4)},
    ),
    "out.dv: expected shape (B=2, T=3, Hv=5, V=6), got (2, 3, 5, 4)": (
        backward,
        {"out.dv": zeros(2, 3, 5, 4)},
    ),
    "out.dbeta: expected shape (B=2, T=3, H=5), got (2, 3)": (backward, {"out.dbeta": zeros(2, 3)}),
    "out.dg: expected shape (B=2, T=3, H=5), got (2, 3, 5, 4)": (backward, {"out.dg": zeros(2, 3, 5, 4)}),
    "out.dinitial_state: expected shape (N=2, H=5, K=4, V=6), got (0,)": (
        backward,
        {"out.dinitial_state": zeros(0)},
    ),
    "cu_seqlens: expected at least one offset, got none": (delta, packed(cu_seqlens=[])),
    "cu_seqlens: expected shape (N+1,), got (1, 2)": (delta, packed(cu_seqlens=np.array([[0, 6]]))),
    "q: expected shape (B, Hq, K) or (B, T, Hq, K), got (5, 4)": (step, {"q": zeros(5, 4)}),
    "k: expected shape (B=2, T=3, Hk, K=4), got (2, 5, 4)": (step, {"q": zeros(2, 3, 5, 4)}),
    "beta: expected shape (B=2, T=3, H=5), got (2, 5)": (steps, {"beta": zeros(2, 5)}),
    "state_indices: expected shape (B=2,), got (3,)": (step, {"state_indices": [0, 1, -1]}),
    "state: expected shape (S, H=5, K=4, V=6), got (7, 4, 4, 6)": (
        step,
        {"state": zeros(7, 4, 4, 6), "state_indices": [0, 2]},
    ),
    "g: expected shape (B=2, H=5) or (B=2, H=5, K=4), got (2, 3, 5)": (step, {"g": zeros(2, 3, 5)}),
    "state: expected shape (B=2, H=5, K=4, V=6), got (2, 5, 4, 5)": (step, {"state": zeros(2, 5, 4, 5)}),
    "out: expected shape (B=2, H=5, V=6), got (2, 6, 5)": (step, {"out": zeros(2, 6, 5)}),
}

DTYPE = {
    "q: expected an array, got list": (delta, {"q": [[[[1.0]]]]}),
    "beta: expected an array, got None": (delta, {"beta": None}),
    "state: expected an array, got None": (step, {"state": None}),
    "v: expected an array, no subclass of numpy.ndarray, got MaskedArray": (
        delta,
        {"v": np.ma.zeros((2, 3, 5, 6), np.float32)},
    ),
    "out: expected an array, got str": (delta, {"out": "o"}),
    "out: expected fwp_core.Gradients, got list": (backward, {"out": [None] * 6}),
    "q: expected dtype float32, float64, float16 or bfloat16, got int32": (
        delta,
        {"q": zeros(2, 3, 5, 4, dtype=np.int32)},
    ),
    "q: expected dtype float32, float64, float16 or bfloat16, got >f4": (
        delta,
        {"q": zeros(2, 3, 5, 4, dtype=">f4")},
    ),
    "k: expected dtype float32, got float64": (delta, {"k": zeros(2, 3, 5, 4, dtype=np.float64)}),
    "beta: expected dtype float32, got float64": (delta, {"beta": zeros(2, 3, 5, dtype=np.float64)}),
    "out.dbeta: expected dtype float32, got float64": (
        backward,
        {"out.dbeta": zeros(2, 3, 5, dtype=np.float64)},
    ),
    "scale: expected a number, got str": (delta, {"scale": "1"}),
    "scale: expected a number, got NoneType": (step, {"scale": None}),
    "cu_seqlens: expected a sequence of integers, got float": (delta, packed(cu_seqlens=6.0)),
    "cu_seqlens: expected a sequence of integers, got str": (delta, packed(cu_seqlens="06")),
    "state_indices: expected integers, got float": (step, {"state_indices": [0, 1.0]}),
    "cu_seqlens: expected integers, got float": (delta, packed(cu_seqlens=[0, 6.0])),
    "cu_seqlens: expected integers, got bool": (delta, packed(cu_seqlens=[False, 6])),
    "cu_seqlens: expected integers, got dtype float64": (delta, packed(cu_seqlens=np.array([0.0, 6.0]))),
    "cu_seqlens: expected integers, got dtype bool": (delta, packed(cu_seqlens=np.array([False, True]))),
    "cu_seqlens: expected a sequence of integers, got MaskedArray": (
        delta,
        packed(cu_seqlens=np.ma.array([0, 6])),
    ),
}

ARGUMENT = {
    "state_indices: expected slots from 0 to S-1=1, or -1 for none, got 2": (step, {"state_indices": [0, 2]}),
    "state_indices: expected every slot at most once, got 1 twice": (step, {"state_indices": [1, 1]}),
    "q: expected strides that are multiples of the item size of 4 bytes, got 6 bytes along axis 3": (
        delta,
        {"q": by_bytes(zeros(1000), (2, 3, 5, 4), (360, 120, 24, 6))},
    ),
    "q: expected data aligned to its item size of 4 bytes, got an address 1 bytes past a multiple": (
        delta,
        {"q": np.zeros(481, np.uint8)[1:].view(np.float32).reshape(2, 3, 5, 4)},
    ),
    "q: expected at most 2^55 elements, got shape (2, 3, 18014398509481984, 4)": (
        delta,
        {"q": by_bytes(zeros(1), (2, 3, 1 << 54, 4), (0, 0, 0, 0))},
    ),
    "q: expected strides within the address space, got a stride of 576460752303423488 elements along an "
    "axis of size 2": (delta, {"q": by_bytes(zeros(1), (2, 3, 5, 4), (1 << 61, 0, 0, 4))}),
    "out: expected an output without overlap, but its own elements share memory": (
        delta,
        {"out": by_bytes(zeros(6), (2, 3, 5, 6), (0, 0, 0, 4))},
    ),
    "cu_seqlens: expected B=1 for packed sequences, got B=2": (delta, {"cu_seqlens": [0, 3]}),
    "cu_seqlens: expected it to start with 0, got 1": (delta, packed(cu_seqlens=[1, 6])),
    "cu_seqlens: expected offsets that never fall, got 5 before 4": (delta, packed(cu_seqlens=[0, 5, 4, 6])),
    "cu_seqlens: expected it to end with T=6, got 7": (delta, packed(cu_seqlens=[0, 7])),
    "cu_seqlens: expected integers of at most 64 bits, got 9223372036854775808": (
        delta,
        packed(cu_seqlens=[0, 1 << 63]),
    ),
    "out.dbeta: expected None, as its input is, got an array": (
        FUNCTIONS["linear_attention_backward"],
        {"beta": None},
    ),
}

READ_ONLY = {
    "out: expected a writable array, got a read-only one": (delta, {"out": read_only(zeros(2, 3, 5, 6))}),
    "state: expected a writable array, got a read-only one": (step, {"state": read_only(zeros(2, 5, 4, 6))}),
}

MESSAGES = [
    pytest.param(error, message, *call, id=f"{error.__name__}-{message}")
    for error, table in (
        (fwp.ShapeError, SHAPE),
        (fwp.DTypeError, DTYPE),
        (fwp.ArgumentError, ARGUMENT),
        (fwp.ReadOnlyError, READ_ONLY),
    )
    for message, call in table.items()
]


@pytest.mark.parametrize(("error", "message", "function", "changes"), MESSAGES)
def test_message(error, message, function, changes):
    arguments = {} if "q" in changes and "v" in changes else good(function)
    for position, value in changes.items():
        arguments = put(arguments, position, value)
    assert refused(function, arguments, error) == message


def test_overlap_message():
    arguments = good(delta)
    arguments["out"] = arguments["v"]
    message = "out: expected an output without overlap, but it shares memory with v"
    assert refused(delta, arguments, fwp.ArgumentError) == message
    arguments = good(delta)
    arguments["final_state_out"] = arguments["initial_state"]
    message = "final_state_out: expected an output without overlap, but it shares memory with initial_state"
    assert refused(delta, arguments, fwp.ArgumentError) == message


SETTINGS = {
    "threads: expected at least 1, got 0": lambda: fwp.set_num_threads(0),
    "threads: expected at least 1, got -3": lambda: fwp.threads(-3).__enter__(),
    "device: expected a number from 0 on, got -2": lambda: fwp.check_device(-2),
    "mode: expected None or 'dict', got 'json'": lambda: fwp.show_config("json"),
    "fn: expected fwp_core.delta_rule or fwp_core.linear_attention, got <built-in function len>": lambda: (
        fwp.vjp(len, None, None, None)
    ),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings(message):
    threads = fwp.get_num_threads()
    with pytest.raises(fwp.ArgumentError, match=f"^{re.escape(message)}$"):
        SETTINGS[message]()
    assert fwp.get_num_threads() == threads


@pytest.mark.parametrize("name", ["v9", "", "V4", "base ", "o", "base\0"])
def test_unknown_isa(name):
    level = fwp.isa()
    known = ", ".join(fwp.available_isas())
    with pytest.raises(fwp.ArgumentError, match=f"^name: expected one of {known}, got {name}$"):
        fwp.use_isa(name)
    assert fwp.isa() == level


def test_memory_error_leaves_everything_as_it_was():
    # Results of 2^50 bytes: more than any address space.
    arguments = good(linear) | {"out": None, "final_state_out": None, "initial_state": None}
    T = 1 << 46
    for name in ("q", "k", "v", "beta", "g"):
        shape = (2, T, *arguments[name].shape[2:])
        arguments[name] = np.broadcast_to(arguments[name][:, :1], shape)
    refused(linear, arguments, MemoryError)
