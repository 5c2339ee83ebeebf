"""ONNX's LinearAttention: against onnx's own reference evaluator, the oracle, and its refusals."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import REORDERED, assert_close, relative_error

import fwp_core as fwp
from fwp_core.compat.onnx import linear_attention

RULES = ("linear", "gated", "delta", "gated_delta")
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def make(rule="gated_delta", B=2, T=5, heads=(4, 2), K=8, V=6, channels=False, shared=False, state=np.float32,
         dtype=np.float32, scale=0.0, seed=0):  # fmt: skip
    """The inputs and attributes of a node; channels: a gate per channel, shared: one beta for all heads."""
    rng = np.random.default_rng(seed)
    q_heads, heads = heads
    inputs = {
        "query": rng.standard_normal((B, T, q_heads * K)),
        "key": rng.standard_normal((B, T, heads, K)),
        "value": rng.standard_normal((B, T, heads * V)),
        "decay": -rng.exponential(0.3, (B, T, heads * K if channels else heads)),
        "beta": rng.uniform(size=(B, T, 1 if shared else heads)),
    }
    inputs["key"] /= np.linalg.norm(inputs["key"], axis=-1, keepdims=True)
    inputs["key"] = inputs["key"].reshape(B, T, heads * K)
    absent = {"linear": {"decay", "beta"}, "gated": {"beta"}, "delta": {"decay"}}.get(rule, set())
    inputs = {name: x.astype(dtype) for name, x in inputs.items() if name not in absent}
    if state is not None:
        inputs["past_state"] = rng.standard_normal((B, heads, K, V)).astype(state)
    return inputs, {"q_num_heads": q_heads, "kv_num_heads": heads, "update_rule": rule, "scale": scale}


@st.composite
def nodes(draw):
    return make(
        rule=draw(st.sampled_from(RULES)),
        B=draw(st.integers(0, 2)),
        T=draw(st.sampled_from((0, 1, 2, 7, 13))),
        heads=draw(st.sampled_from(((1, 1), (2, 2), (4, 2), (6, 2), (3, 1)))),
        K=draw(st.sampled_from((1, 3, 8, 17))),
        V=draw(st.sampled_from((1, 5, 16))),
        channels=draw(st.booleans()),
        shared=draw(st.booleans()),
        state=draw(st.sampled_from((None, *DTYPES))),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.sampled_from((0.0, 0.5, -2.0))),
        seed=draw(st.integers(0, 2**16)),
    )


def exact(inputs, attributes):
    """The oracle's results, with a fast weight for every head of queries."""
    heads, group = attributes["kv_num_heads"], attributes["q_num_heads"] // attributes["kv_num_heads"]
    wide = {name: x.astype(np.float64) for name, x in inputs.items()}
    B, T = wide["query"].shape[:2]

    def heads_of(name, axis_size):
        return wide[name].reshape(B, T, axis_size, wide[name].shape[2] // axis_size)

    q, k, v = heads_of("query", heads * group), heads_of("key", heads), heads_of("value", heads)
    beta = g = None
    if "beta" in wide:
        beta = np.repeat(np.broadcast_to(wide["beta"], (B, T, heads)), group, 2)
    if "decay" in wide:
        g = np.repeat(np.broadcast_to(heads_of("decay", heads), k.shape), group, 2)
    state = wide.get("past_state")
    o, final_state = oracle.forward(
        "delta" if "beta" in wide else "linear",
        *(np.repeat(x, group, 2) if x is not q else x for x in (q, k, v)),
        beta,
        g,
        scale=attributes["scale"] or k.shape[3] ** -0.5,
        initial_state=None if state is None else np.repeat(state, group, 1),
    )
    return o.reshape(B, T, heads * group * v.shape[3]), final_state[:, ::group]


@given(nodes())
def test_results_are_the_oracles(node):
    inputs, attributes = node
    output, present_state = linear_attention(**inputs, **attributes)
    exact_output, exact_state = exact(inputs, attributes)
    assert output.dtype == inputs["query"].dtype
    assert present_state.dtype == inputs.get("past_state", inputs["query"]).dtype
    assert_close(output, exact_output, "forward", "output")
    assert_close(present_state, exact_state, "forward", "present_state")


def evaluate(inputs, attributes):
    """What onnx's reference evaluator makes of a model of that one node."""
    onnx = pytest.importorskip("onnx", minversion="1.23")
    from onnx.reference import ReferenceEvaluator

    order = ("query", "key", "value", "past_state", "decay", "beta")
    names = [name if name in inputs else "" for name in order]
    tensor_type = {name: onnx.helper.np_dtype_to_tensor_dtype(x.dtype) for name, x in inputs.items()}
    state_type = tensor_type.get("past_state", tensor_type["query"])
    outputs = {"output": (tensor_type["query"], [None] * 3), "present_state": (state_type, [None] * 4)}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("LinearAttention", names, list(outputs), **attributes)],
        "one_node",
        [onnx.helper.make_tensor_value_info(name, tensor_type[name], x.shape) for name, x in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, *output) for name, output in outputs.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 27)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_results_are_those_of_onnx(rule, channels, dtype):
    for heads, state, scale in (((4, 2), dtype, 0.0), ((2, 2), None, 0.5), ((3, 1), np.float32, -2.0)):
        inputs, attributes = make(
            rule, T=13, heads=heads, channels=channels, state=state, dtype=dtype, scale=scale
        )
        actual = linear_attention(**inputs, **attributes)
        expected = evaluate(inputs, attributes)
        for name, x, y in zip(("output", "present_state"), actual, expected, strict=True):
            assert x.dtype == y.dtype, name
            assert relative_error(x, y, floor=1.0) <= REORDERED[x.dtype], name


def test_one_strength_for_all_heads_and_the_chunk_size():
    inputs, attributes = make(shared=True, heads=(6, 3))
    output, present_state = linear_attention(**inputs, **attributes)
    per_head = inputs | {"beta": np.repeat(inputs["beta"], 3, 2)}
    for chunk_size in (64, 1):
        o, state = linear_attention(**per_head, **attributes, chunk_size=chunk_size)
        np.testing.assert_array_equal(o, output)
        np.testing.assert_array_equal(state, present_state)


def test_a_sequence_goes_on_from_its_state():
    inputs, attributes = make(T=9)
    whole, last = linear_attention(**inputs, **attributes)
    state, pieces = inputs.pop("past_state"), []
    for t in range(9):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        o, state = linear_attention(**token, past_state=state, **attributes)
        pieces.append(o)
    assert relative_error(np.concatenate(pieces, 1), whole, floor=1.0) <= REORDERED[np.dtype(np.float32)]
    assert relative_error(state, last, floor=1.0) <= REORDERED[np.dtype(np.float32)]


def test_inputs_are_read_only_to_it():
    inputs, attributes = make()
    before = {name: x.copy() for name, x in inputs.items()}
    for x in inputs.values():
        x.flags.writeable = False
    linear_attention(**inputs, **attributes)
    for name, x in inputs.items():
        np.testing.assert_array_equal(x, before[name], name)


def test_a_shared_state_keeps_no_more_memory_alive():
    inputs, attributes = make()
    assert attributes["q_num_heads"] > attributes["kv_num_heads"]
    _, state = linear_attention(**inputs, **attributes)
    assert state.base is None or state.base.size == state.size


REFUSED = {
    "an unknown rule": ({}, {"update_rule": "oja"}, fwp.ArgumentError, "update_rule: expected one of linear"),
    "no decay": ({"decay": None}, {}, fwp.ArgumentError, "decay: expected an array .* got None"),
    "a decay too much": ({}, {"update_rule": "delta"}, fwp.ArgumentError, "decay: expected None"),
    "no beta": ({"beta": None}, {}, fwp.ArgumentError, "beta: expected an array"),
    "a beta too much": ({}, {"update_rule": "gated"}, fwp.ArgumentError, "beta: expected None"),
    "heads that do not divide": ({}, {"q_num_heads": 3}, fwp.ArgumentError, "q_num_heads: .* got 3"),
    "no heads": ({}, {"kv_num_heads": 0}, fwp.ArgumentError, "q_num_heads: .* kv_num_heads=0"),
    "unpacked heads": ({"query": np.zeros((2, 5, 4, 8), np.float32)}, {}, fwp.ShapeError, "query: expected"),
    "a width that does not divide": (
        {"key": np.zeros((2, 5, 15), np.float32)},
        {},
        fwp.ShapeError,
        r"key: expected shape \(B, T, 2 \* D\), got \(2, 5, 15\)",
    ),
    "a decay of the wrong width": (
        {"decay": np.zeros((2, 5, 3), np.float32)},
        {},
        fwp.ShapeError,
        r"decay: expected shape \(2, 5, 2\) or \(2, 5, 16\), got \(2, 5, 3\)",
    ),
    "a beta of the wrong width": ({"beta": np.zeros((2, 5, 4), np.float32)}, {}, fwp.ShapeError, "beta: "),
    "a state of other sizes": (
        {"past_state": np.zeros((2, 4, 8, 6), np.float32)},
        {},
        fwp.ShapeError,
        r"past_state: expected shape \(2, 2, 8, 6\), got \(2, 4, 8, 6\)",
    ),
    "a key of another length": (
        {"key": np.zeros((2, 4, 16), np.float32)},
        {},
        fwp.ShapeError,
        r"key: expected shape \(2, 5, 16\), got \(2, 4, 16\)",
    ),
    "a key of another width": (
        {"key": np.zeros((2, 5, 18), np.float32)},
        {},
        fwp.ShapeError,
        r"key: expected shape \(2, 5, 16\), got \(2, 5, 18\)",
    ),
    "a value of another length": (
        {"value": np.zeros((2, 4, 12), np.float32)},
        {},
        fwp.ShapeError,
        r"value: expected shape \(2, 5, 2 \* D\), got \(2, 4, 12\)",
    ),
    "a query of integers": (
        {"query": np.zeros((2, 5, 32), int)},
        {},
        fwp.DTypeError,
        "^query: expected dtype",
    ),
    "a key of another dtype": ({"key": np.zeros((2, 5, 16))}, {}, fwp.DTypeError, "^key: expected dtype"),
    "a value of another dtype": ({"value": np.zeros((2, 5, 12))}, {}, fwp.DTypeError, "^value: expected"),
    "a decay of another dtype": (
        {"decay": np.zeros((2, 5, 2))},
        {},
        fwp.DTypeError,
        "^decay: expected dtype",
    ),
    "another kind of array as state": (
        {"past_state": memoryview(b"")},
        {},
        fwp.DTypeError,
        "past_state: expected a NumPy array, got memoryview",
    ),
    "a list as state": ({"past_state": [0.0]}, {}, fwp.DTypeError, "past_state: .* got list"),
    "a state of integers": (
        {"past_state": np.zeros((2, 2, 8, 6), int)},
        {},
        fwp.DTypeError,
        "past_state: expected dtype float32, .* got int64",
    ),
    "a list of rules": ({}, {"update_rule": ["delta"]}, fwp.ArgumentError, "update_rule: expected one of"),
    "heads in words": ({}, {"q_num_heads": "4"}, fwp.DTypeError, "q_num_heads: expected an integer, got str"),
    "half a head": (
        {},
        {"kv_num_heads": 0.5},
        fwp.DTypeError,
        "kv_num_heads: expected an integer, got float",
    ),
    "lists": ({"query": [[[0.0]]]}, {}, fwp.DTypeError, "query: expected a NumPy array, got list"),
    "masked queries": (
        {"query": np.ma.zeros((2, 5, 12))},
        {},
        fwp.DTypeError,
        "query: .*, no subclass, got Mask",
    ),
    "masked strengths": (
        {"beta": np.ma.zeros((2, 5, 2))},
        {},
        fwp.DTypeError,
        "beta: .*, no subclass, got Mask",
    ),
    "a list of strengths": ({"beta": [[[0.0]]]}, {}, fwp.DTypeError, "beta: expected a NumPy array"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    changed, attributes, error, message = REFUSED[what]
    inputs, defaults = make()
    with pytest.raises(error, match=message):
        linear_attention(**(inputs | changed), **(defaults | attributes))


def test_it_needs_no_framework():
    """Neither the package nor this module imports what the other drop-ins need."""
    code = "import sys, fwp_core.compat.onnx; print({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "set()"
