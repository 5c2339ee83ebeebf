"""ONNX Runtime's LinearAttention (domain com.microsoft), as a model of that one node.

Inputs and outputs are bound once, so that a call neither copies nor allocates. A step reads one state and
writes another; two bindings take turns.
"""

from __future__ import annotations

from itertools import cycle

import onnxruntime
from onnx import TensorProto, helper
from registry import Array, Case, Inputs, inputs

from . import Prepared, Unsupported

PACKAGES = ("onnxruntime", "onnx")

UPDATE_RULES = {
    ("linear", False): "linear",
    ("linear", True): "gated",
    ("delta", False): "delta",
    ("delta", True): "gated_delta",
}

_threads = 1


def start(threads: int) -> None:
    """Sessions are made with this many threads inside an operator."""
    global _threads
    _threads = threads


def prepare(case: Case) -> Prepared:
    """One session, and values that live in its own memory."""
    if case.task == "forward+backward":
        raise Unsupported("the operator has no gradient")
    x = inputs(case)
    arrays = _packed(case, x)
    shapes = {"o": (case.B, case.T, case.H * case.V), "present_state": (case.B, case.H, case.K, case.V)}
    session = _session(case, {name: array.shape for name, array in arrays.items()}, shapes)
    values = {name: _value(array) for name, array in arrays.items()}
    o, *states = (_empty(shape) for shape in (shapes["o"], shapes["present_state"], shapes["present_state"]))
    if case.task == "step":
        states[0] = values.pop("past_state")
        pairs = [(states[0], states[1]), (states[1], states[0])]
    else:
        pairs = [(None, states[0])]

    bindings = []
    for past, present in pairs:
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        if past is not None:
            binding.bind_ortvalue_input("past_state", past)
        binding.bind_ortvalue_output("o", o)
        binding.bind_ortvalue_output("present_state", present)
        bindings.append(binding)
    turns = cycle(bindings)
    run = session.run_with_iobinding

    def results() -> dict[str, Array]:
        output = o.numpy().reshape(case.B, case.T, case.H, case.V)
        return {"o": output[:, 0], "state": states[1].numpy()} if case.task == "step" else {"o": output}

    return Prepared(lambda: run(next(turns)), results)


def _packed(case: Case, x: Inputs) -> dict[str, Array]:
    """The operator's inputs by name, [B,T,H*D], in its order."""
    named = {"query": x.q, "key": x.k, "value": x.v, "past_state": x.state, "decay": x.g, "beta": x.beta}
    present = {name: array for name, array in named.items() if array is not None}
    return {
        name: array if name == "past_state" else array.reshape(case.B, case.T, -1)
        for name, array in present.items()
    }


def _session(
    case: Case, input_shapes: dict[str, tuple[int, ...]], output_shapes: dict[str, tuple[int, ...]]
) -> onnxruntime.InferenceSession:
    def declared(shapes: dict[str, tuple[int, ...]]) -> list[object]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()
        ]

    order = ("query", "key", "value", "past_state", "decay", "beta")
    node = helper.make_node(
        "LinearAttention",
        [name if name in input_shapes else "" for name in order],
        list(output_shapes),
        domain="com.microsoft",
        q_num_heads=case.query_heads or case.H,
        kv_num_heads=case.H,
        update_rule=UPDATE_RULES[case.rule, case.decay != "none"],
        scale=case.scale,
    )
    graph = helper.make_graph([node], "linear_attention", declared(input_shapes), declared(output_shapes))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _value(array: Array) -> onnxruntime.OrtValue:
    # It would refer to the array, which belongs to all cases of this shape, and a step writes into its state.
    return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())


def _empty(shape: tuple[int, ...]) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, "float32")
