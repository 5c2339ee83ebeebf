"""The library on JAX arrays: differentiable scans under jit, vmap and shard_map, plain calls for the rest."""

from .adapters.jax import (
    delta_rule,
    delta_rule_backward,
    delta_rule_step,
    diagnose,
    linear_attention,
    linear_attention_backward,
    linear_attention_step,
    vjp,
)

__all__ = [
    "delta_rule",
    "delta_rule_backward",
    "delta_rule_step",
    "diagnose",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_step",
    "vjp",
]
