"""The library on torch tensors: differentiable scans, plain calls for the rest, and a layer for models."""

from .adapters.torch import delta_rule, linear_attention

__all__ = ["delta_rule", "linear_attention"]
