"""Who takes part in gpu.py: this library, and those whose functions can be called on the same tensors.

A participant's ``scan(case)`` returns a function of (Tensors, with_state) that gives (o, final_state or None)
and is differentiable; ``step(case)`` one of Tensors that takes one token. On the CPU, in a dry run, ours is
ours, and fla is its references in torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_cases import Tensors, model
from peers import Unsupported
from registry import Case

import fwp_core as fwp

Scan = Callable[[Tensors, bool], tuple[torch.Tensor, torch.Tensor | None]]
Step = Callable[[Tensors], torch.Tensor]


class Ours:
    """fwp_core."""

    packages = ("fwp_core",)

    def __init__(self, device: str) -> None:
        if device == "cuda" and not fwp.has_cuda():
            raise Unsupported(f"fwp_core sees no GPU: {fwp.show_config(mode='dict')['cuda']}")

    def scan(self, case: Case) -> Scan:
        """The rule's function."""
        function = fwp.delta_rule if case.rule == "delta" else fwp.linear_attention
        return lambda x, with_state: function(**x.inputs, scale=case.scale)

    def step(self, case: Case) -> Step:
        """Decoding, the state updated in place."""
        function = fwp.delta_rule_step if case.rule == "delta" else fwp.linear_attention_step
        return lambda x: function(**x.inputs, state=x.state, scale=case.scale)

    def note(self, case: Case) -> str:
        """What a row should say."""
        return ""


# fla's module, the function, and the options that make it compute what the others compute.
FLA_SCANS = {
    "linear": ("linear_attn", "chunk_linear_attn", {"normalize": False}),
    "simple_gla": ("simple_gla", "chunk_simple_gla", {}),
    "gla": ("gla", "chunk_gla", {}),
    "delta": ("delta_rule", "chunk_delta_rule", {}),
    "gdn": ("gated_delta_rule", "chunk_gated_delta_rule", {}),
    "kda": ("kda", "chunk_kda", {}),
}
FLA_STEPS = {
    "linear": ("linear_attn", "fused_recurrent_linear_attn", {"normalize": False}),
    "delta": ("delta_rule", "fused_recurrent_delta_rule", {}),
    "gdn": ("gated_delta_rule", "fused_recurrent_gated_delta_rule", {}),
}


class Fla:
    """flash-linear-attention's Triton kernels, without the backends of others."""

    packages = ("fla-core", "triton")

    def __init__(self, device: str) -> None:
        os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"
        import fla.ops.common.chunk_o as chunk_o

        # On Hopper, with Triton from 3.4 to before 3.7.1, the kernel of gated gradients is refused, since its
        # dg and dbeta come out wrong. Its time is still the one to beat, so it is called all the same.
        self.guarded = bool(
            chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
        )
        chunk_o.TRITON_ABOVE_3_7_1 = True

    def scan(self, case: Case) -> Scan:
        """A chunk function."""
        function, options = self._function(FLA_SCANS, case)
        return lambda x, with_state: function(
            **x.inputs, scale=case.scale, output_final_state=with_state, **options
        )

    def step(self, case: Case) -> Step:
        """A recurrent function for a sequence of one token; it makes a new state."""
        function, options = self._function(FLA_STEPS, case)

        def step(x: Tensors) -> torch.Tensor:
            token = {name: array[:, None] for name, array in x.inputs.items()}
            return function(
                **token, scale=case.scale, initial_state=x.state, output_final_state=True, **options
            )[0][:, 0]

        return step

    def note(self, case: Case) -> str:
        """Whether the guard of its gradients had to be taken off."""
        off = self.guarded and case.decay == "scalar" and case.task == "forward+backward"
        return "guard off" if off else ""

    @staticmethod
    def _function(table: dict[str, Any], case: Case) -> tuple[Callable[..., Any], dict[str, Any]]:
        if model(case) not in table:
            raise Unsupported(f"no function for {model(case)}")
        module, name, options = table[model(case)]
        return getattr(importlib.import_module(f"fla.ops.{module}"), name), options


class FlaReferences:
    """fla's references in torch, for dry runs; without their final states."""

    packages = ("fla-core",)

    def __init__(self, device: str) -> None:
        from peers import fla_naive

        self.naive = fla_naive

    def scan(self, case: Case) -> Scan:
        """A chunk reference; those of some rules would take seconds."""
        name = case.rule if case.decay == "none" else f"{case.rule}-{case.decay}"
        if name not in ("linear", "linear-scalar", "delta"):
            raise Unsupported(f"no fast reference for {name}")
        function, swap = self.naive.SCANS[name], name == "delta"  # it alone wants heads before time

        def scan(x: Tensors, with_state: bool) -> tuple[torch.Tensor, None]:
            inputs = {key: array.float() for key, array in x.inputs.items()}  # some mix the dtypes
            returned = function(**{k: a.transpose(1, 2) if swap else a for k, a in inputs.items()})
            o = returned[0] if isinstance(returned, tuple) else returned
            return (o.transpose(1, 2) if swap else o).to(x.v.dtype), None

        return scan

    def step(self, case: Case) -> Step:
        """There is none in half precision."""
        raise Unsupported("no reference of a step")

    def note(self, case: Case) -> str:
        """What a row should say."""
        return "references"


class FlashQLA:
    """Fused TileLang kernels for the gated delta rule."""

    packages = ("flash-qla",)

    def __init__(self, device: str) -> None:
        self.function = importlib.import_module("flash_qla").chunk_gated_delta_rule

    def scan(self, case: Case) -> Scan:
        """It takes what fla takes."""
        if model(case) != "gdn" or case.K != 128:
            raise Unsupported("gdn with D = 128 only")
        return lambda x, with_state: self.function(
            **x.inputs, scale=case.scale, output_final_state=with_state
        )

    def step(self, case: Case) -> Step:
        """It has none."""
        raise Unsupported("no step")

    def note(self, case: Case) -> str:
        """What a row should say."""
        return ""


class FlashInfer(FlashQLA):
    """Kernels for serving: forward only, packed sequences, decay and strength in float32."""

    packages = ("flashinfer-python",)

    def __init__(self, device: str) -> None:
        self.function = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule

    def scan(self, case: Case) -> Scan:
        """The batch is packed; what it wants in float32 is made outside of the timed call."""
        if model(case) != "gdn" or case.K != 128 or case.task != "forward":
            raise Unsupported("gdn fwd with D = 128 only")
        made: dict[int, Any] = {}

        def arguments(x: Tensors) -> dict[str, Any]:
            packed = {name: array.flatten(0, 1) for name, array in x.inputs.items()}
            packed["g"], packed["beta"] = packed["g"].exp(), packed["beta"].float()
            ends = torch.arange(case.B + 1, device=x.q.device) * case.T
            return {**packed, "cu_seqlens": ends, "scale": case.scale}

        def scan(x: Tensors, with_state: bool) -> tuple[torch.Tensor, None]:
            if id(x) not in made:
                made[id(x)] = arguments(x)
            return self.function(**made[id(x)]).unflatten(0, (case.B, case.T)), None

        return scan


OURS = "ours"
PEERS = {
    "cuda": {OURS: Ours, "fla": Fla, "flashqla": FlashQLA, "flashinfer": FlashInfer},
    "cpu": {OURS: Ours, "fla": FlaReferences},
}

# What Triton chose for each of fla's kernels, as plain values.
Configurations = dict[str, list[dict[str, Any]]]
HEADS = ("H", "HV")


def autotuners() -> Iterator[tuple[str, Any]]:
    """The kernels of fla that choose a configuration, by name."""
    from triton.runtime.autotuner import Autotuner

    seen = set()
    for path, module in sorted(sys.modules.items()):
        for name, kernel in sorted(vars(module).items()) if path.startswith("fla.") else ():
            while kernel is not None and not isinstance(kernel, Autotuner):
                kernel = vars(kernel).get("fn") if hasattr(kernel, "__dict__") else None
            if kernel is not None and id(kernel) not in seen:
                seen.add(id(kernel))
                yield f"{path}.{name}", kernel


def chosen_configurations() -> Configurations:
    """All that has been chosen so far."""
    return {
        name: [{"key": list(key), **config.all_kwargs()} for key, config in tuner.cache.items()]
        for name, tuner in autotuners()
        if tuner.cache
    }


def choose_configurations(known: Configurations, heads: tuple[int, ...]) -> None:
    """Let kernels have what was chosen before, for these numbers of heads too: each would tune anew."""
    import triton

    named = ("num_warps", "num_ctas", "num_stages", "maxnreg")
    for name, tuner in autotuners():
        for entry in known.get(name, ()):
            values = {key: value for key, value in entry.items() if key != "key"}
            options = {key: values.pop(key) for key in named if values.get(key) is not None}
            config = triton.Config({k: v for k, v in values.items() if v is not None}, **options)
            for count in (None, *heads):
                key = [
                    count if count and word in HEADS else value
                    for word, value in zip(_words(tuner, entry["key"]), entry["key"], strict=True)
                ]
                tuner.cache.setdefault(tuple(key), config)


def _words(tuner: Any, key: list[Any]) -> list[str]:
    """What each entry of a key is called; the dtypes at its end are not."""
    return [*tuner.keys, *[""] * len(key)][: len(key)]
