"""The library on torch tensors: differentiable scans, plain calls for the rest, and a layer for models."""

from .adapters.torch import (
    delta_rule,
    delta_rule_backward,
    delta_rule_step,
    diagnose,
    linear_attention,
    linear_attention_backward,
    linear_attention_step,
    vjp,
)
from .adapters.torch_layer import FastWeightAttention, FastWeightState

__all__ = [
    "FastWeightAttention",
    "FastWeightState",
    "delta_rule",
    "delta_rule_backward",
    "delta_rule_step",
    "diagnose",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step",
    "vjp",
]
