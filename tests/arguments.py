"""Good arguments of every function, and a check that a bad one is refused without a trace."""

from dataclasses import dataclass

import numpy as np
import pytest
from cases import state_dtype

import fwp_core as fwp

# B, T, H, K, V; every head count is H, so that no other number of heads divides or is divided.
SIZES = (2, 3, 5, 4, 6)

GRADIENTS = dict(zip(("q", "k", "v", "beta", "g", "initial_state"), fwp.Gradients._fields, strict=True))


@dataclass(frozen=True)
class Function:
    """A function of the library, the kind of its arguments (scan, backward, step), whether they have a T."""

    call: object
    kind: str
    time: bool = True

    @property
    def needs_beta(self):
        return self.call.__name__.startswith("delta")

    @property
    def inputs(self):
        names = ["q", "k", "v", "beta", "g"]
        more = {"scan": ["initial_state"], "backward": ["initial_state", "do", "dfinal_state"], "step": []}
        return names + more[self.kind]

    @property
    def outputs(self):
        gradients = [f"out.{name}" for name in fwp.Gradients._fields]
        return {"scan": ["out", "final_state_out"], "backward": gradients, "step": ["state", "out"]}[
            self.kind
        ]

    @property
    def positions(self):
        """Every place where an array goes in, as error messages name it."""
        return self.inputs + self.outputs

    def required(self, position):
        return position in ("q", "k", "v", "do", "state") or (position == "beta" and self.needs_beta)


FUNCTIONS = {
    "linear_attention": Function(fwp.linear_attention, "scan"),
    "delta_rule": Function(fwp.delta_rule, "scan"),
    "linear_attention_backward": Function(fwp.linear_attention_backward, "backward"),
    "delta_rule_backward": Function(fwp.delta_rule_backward, "backward"),
    "linear_attention_step": Function(fwp.linear_attention_step, "step", time=False),
    "delta_rule_step": Function(fwp.delta_rule_step, "step", time=False),
    "linear_attention_steps": Function(fwp.linear_attention_step, "step"),
    "delta_rule_steps": Function(fwp.delta_rule_step, "step"),
}


def good(function, dtype=np.float32, channel=False, sizes=SIZES, heads=None):
    """Every argument of a function, all of them given, in fresh memory."""
    B, T, H, K, V = sizes
    Hq, Hk, Hv = heads or (H, H, H)
    rng = np.random.default_rng(0)
    time = (T,) if function.time else ()
    shapes = {
        "q": (B, *time, Hq, K),
        "k": (B, *time, Hk, K),
        "v": (B, *time, Hv, V),
        "beta": (B, *time, H),
        "g": (B, *time, H, K) if channel else (B, *time, H),
    }
    state, o = (B, H, K, V), (B, *time, H, V)
    if function.kind == "scan":
        shapes |= {"initial_state": state, "out": o, "final_state_out": state}
    elif function.kind == "step":
        shapes |= {"state": state, "out": o}
    else:
        shapes |= {"initial_state": state, "do": o, "dfinal_state": state}
    arguments = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arguments = {name: x.astype(dtype_of(name, dtype)) for name, x in arguments.items()}
    arguments["g"] = -abs(arguments["g"])
    if function.kind == "backward":
        arguments["out"] = fwp.Gradients(*(np.full_like(arguments[name], np.nan) for name in GRADIENTS))
    return arguments


def dtype_of(position, dtype):
    """What an argument must be where q, k and v are of this dtype."""
    return np.dtype(state_dtype(dtype) if "state" in position else dtype)


def get(arguments, position):
    name, _, field = position.partition(".")
    return getattr(arguments[name], field) if field else arguments[name]


def put(arguments, position, value):
    """The arguments with another value at one position."""
    name, _, field = position.partition(".")
    return arguments | {name: arguments[name]._replace(**{field: value}) if field else value}


def arrays(arguments):
    """Every array among the arguments, and the memory of every view."""
    flat = []
    for value in arguments.values():
        flat += value if isinstance(value, fwp.Gradients) else [value]
    found = [x for x in flat if isinstance(x, np.ndarray) and not x.dtype.hasobject]
    return found + [x.base for x in found if isinstance(x.base, np.ndarray)]


def fingerprint(arguments):
    # Compared as bytes, because NaN is data here. Some bad arrays claim more memory than there is.
    return [x.tobytes() for x in arrays(arguments) if max(x.nbytes, span(x)) < 1 << 20]


def span(x):
    low, high = np.lib.array_utils.byte_bounds(x)
    return high - low


def refused(function, arguments, error):
    """The call raises, and no argument has changed; returns the message."""
    before = fingerprint(arguments)
    with pytest.raises(error) as caught:
        function.call(**arguments)
    assert fingerprint(arguments) == before
    if isinstance(caught.value, fwp.FwpError):
        assert "expected" in str(caught.value)
    return str(caught.value)


def accepted(function, arguments):
    """The call succeeds and leaves its inputs as they were; returns the results."""
    inputs = [arguments[name] for name in function.inputs if arguments[name] is not None]
    before = [x.tobytes() for x in inputs]
    result = function.call(**arguments)
    assert [x.tobytes() for x in inputs] == before
    return result
