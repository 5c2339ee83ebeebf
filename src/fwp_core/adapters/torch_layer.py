"""Fast weights as a layer of a torch model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._core import ArgumentError, DTypeError, ShapeError
from ..feature_maps import FAVOR, FeatureMap, _integer
from ..ops import QKNorm
from . import torch as ops
from .torch_call import Offsets, wide

_SCANS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "delta": ops.delta_rule,
    "linear": ops.linear_attention,
}
_STEPS: dict[str, Callable[..., Tensor]] = {"delta": ops.delta_rule_step, "linear": ops.linear_attention_step}
_GATES = (None, "scalar", "channel")


class FastWeightState(NamedTuple):
    """What a :class:`FastWeightAttention` carries from one segment to the next."""

    memory: Tensor  # [N,H,K,V] fast weights, or [N,H,K,V+1] with attention_norm
    recent: Tensor | None  # [N,taps-1,C] the last inputs of the short convolution, None without one

    def detach(self) -> FastWeightState:
        """The same values, through which no gradient flows."""
        return FastWeightState(self.memory.detach(), None if self.recent is None else self.recent.detach())


class FastWeightAttention(nn.Module):
    """Attention whose memory is a fast weight per head: linear attention, DeltaNet and their gated forms.

    From x [B,T,D], with W for learned matrices::

        q, k, v = silu(conv(W x))                          conv and silu with taps only
        beta    = sigmoid(W x + b)                         one per head; delta rule only
        g       = -exp(A) softplus(W x + b)                log decay, per head, or per head and key channel
        o       = delta_rule(q, k, v, beta, g)             or linear_attention(q, k, v, None, g)
        y       = W (rms_norm(o) * silu(W x))              the norm over each head's V; its gate if asked for

    ``rule="delta"`` without a gate is DeltaNet, with ``gate="scalar"`` Gated DeltaNet, with ``"channel"``
    Kimi Delta Attention; ``rule="linear"`` is linear attention, with a gate as in Mamba-2 or Gated Linear
    Attention.

    Parameters
    ----------
    hidden_size : int
        D, the size of x and y.
    heads : int
        H, the number of fast weights.
    key_size, value_size : int, optional
        Rows of q and k (before the feature map) and of v; ``hidden_size // heads`` unless given.
    key_heads : int, optional
        Heads of q and k, each shared by ``heads // key_heads`` fast weights; ``heads`` unless given.
    rule : {"delta", "linear"}
        Whether a write replaces what its key retrieves, or is added to it.
    feature_map, qk_norm, attention_norm, eps
        As for :func:`fwp_core.delta_rule`. FAVOR's projection becomes a buffer of the layer.
    gate : {None, "scalar", "channel"}
        How many log decays a head has. A channel's comes through ``value_size`` hidden units.
    taps : int
        Inputs that the causal convolution of each channel of q, k and v sees; 0: no convolution.
    output_norm, output_gate : bool
        Whether o is normalised, and multiplied with a gate made of x.
    scale : float, optional
        Factor of o: 1 unless given, and ``key_size ** -0.5`` where q is not normalised.
    device, dtype
        Of the parameters, and of FAVOR's projection.

    Raises
    ------
    ArgumentError, DTypeError
        For a parameter that is none of those.

    Examples
    --------
    >>> import torch
    >>> layer = FastWeightAttention(32, heads=2, gate="scalar", taps=4)
    >>> y, state = layer(torch.randn(1, 5, 32))
    >>> y, state = layer(torch.randn(1, 3, 32), state)
    >>> y.shape, state.memory.shape
    (torch.Size([1, 3, 32]), torch.Size([1, 2, 16, 16]))
    """

    projection: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        key_size: int | None = None,
        value_size: int | None = None,
        key_heads: int | None = None,
        rule: Literal["delta", "linear"] = "delta",
        feature_map: FeatureMap | None = None,
        qk_norm: QKNorm | None = "l2",
        attention_norm: bool = False,
        eps: float = 1e-6,
        gate: Literal["scalar", "channel"] | None = None,
        taps: int = 0,
        output_norm: bool = True,
        output_gate: bool = False,
        scale: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = _integer("hidden_size", hidden_size, 1)
        self.heads = _integer("heads", heads, 1)
        size = self.hidden_size // self.heads
        self.key_heads = self.heads if key_heads is None else _integer("key_heads", key_heads, 1)
        self.key_size = _integer("key_size", size if key_size is None else key_size, 1)
        self.value_size = _integer("value_size", size if value_size is None else value_size, 1)
        self.taps = _integer("taps", taps, 0)
        self.rule, self.gate = rule, gate
        self._check(feature_map)
        normalised = qk_norm is not None or attention_norm
        self.scale = scale if scale is not None else 1.0 if normalised else self.key_size**-0.5
        ops.check_call((1, 0, 1, 1), qk_norm, attention_norm, eps, self.scale)
        for name, switch in (("output_norm", output_norm), ("output_gate", output_gate)):
            if not isinstance(switch, bool):
                raise DTypeError(f"{name}: expected True or False, got {type(switch).__name__}")
        self.qk_norm, self.attention_norm, self.eps = qk_norm, attention_norm, eps
        self.feature_map = feature_map
        self.state_keys = feature_map.dim(self.key_size) if feature_map else self.key_size
        projection = feature_map.projection if isinstance(feature_map, FAVOR) else None
        factory = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        buffer = None if projection is None else torch.as_tensor(projection).to(**factory, copy=True)
        self.register_buffer("projection", buffer)
        self._make(output_norm, output_gate, factory)
        self.reset_parameters()

    def _check(self, feature_map: Any) -> None:
        if feature_map is not None and not isinstance(feature_map, FeatureMap):
            raise DTypeError(
                "feature_map: expected None or an object of fwp_core.feature_maps, got "
                f"{type(feature_map).__name__}"
            )
        if self.heads % self.key_heads:
            raise ArgumentError(f"key_heads: expected a divisor of {self.heads} heads, got {self.key_heads}")
        if self.rule not in tuple(_SCANS):
            raise ArgumentError(f"rule: expected 'delta' or 'linear', got {self.rule!r}")
        if self.gate not in _GATES:
            raise ArgumentError(f"gate: expected None, 'scalar' or 'channel', got {self.gate!r}")

    def _make(self, output_norm: bool, output_gate: bool, factory: dict[str, Any]) -> None:
        D, H, V = self.hidden_size, self.heads, self.value_size
        sizes = self._sizes()
        self.project = nn.Linear(D, sum(sizes), bias=False, **factory)
        self.convolution = nn.Parameter(torch.empty(self.taps, sum(sizes), **factory)) if self.taps else None
        self.strength = nn.Linear(D, H, **factory) if self.rule == "delta" else None
        self.decay: nn.Module | None = None
        if self.gate == "scalar":
            self.decay = nn.Linear(D, H, **factory)
        elif self.gate == "channel":
            self.decay = nn.Sequential(
                nn.Linear(D, V, bias=False, **factory), nn.Linear(V, H * self.state_keys, **factory)
            )
        self.decay_rate = nn.Parameter(torch.empty(H, **factory)) if self.gate else None  # A
        self.norm = nn.RMSNorm(V, eps=1e-5, **factory) if output_norm else None
        self.output_gate = nn.Linear(D, H * V, bias=False, **factory) if output_gate else None
        self.out = nn.Linear(H * V, D, bias=False, **factory)

    def _sizes(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        keys = self.key_heads * self.key_size
        return keys, keys, self.heads * self.value_size

    def reset_parameters(self) -> None:
        """Draw new parameters: activations keep their size, and decays forget within 1 to 1000 tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        if self.convolution is not None:
            nn.init.uniform_(self.convolution, -(self.taps**-0.5), self.taps**-0.5)
        if self.decay_rate is not None:
            self._reset_decay()

    @torch.no_grad()
    def _reset_decay(self) -> None:
        """As in Mamba-2: rates exp(A) between 1 and 16, steps softplus(b) between 0.001 and 0.1."""
        assert self.decay_rate is not None
        assert self.decay is not None
        self.decay_rate.uniform_(1, 16).log_()
        last = self.decay[-1] if isinstance(self.decay, nn.Sequential) else self.decay
        assert isinstance(last, nn.Linear)
        step = last.bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
        step.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def initial_state(self, sequences: int) -> FastWeightState:
        """Return the state before the first token of that many sequences: zeros."""
        weight = self.out.weight
        shape = (sequences, self.heads, self.state_keys, self.value_size + self.attention_norm)
        recent = weight.new_zeros(sequences, self.taps - 1, sum(self._sizes())) if self.taps else None
        return FastWeightState(weight.new_zeros(shape, dtype=wide(weight)), recent)

    def forward(
        self,
        x: Tensor,
        state: FastWeightState | None = None,
        *,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, FastWeightState]:
        """Read a segment and return the outputs at its tokens, and the state after it.

        Parameters
        ----------
        x : Tensor [B,T,D]
        state : FastWeightState, optional
            Of N sequences, as the call for the segment before returned it, or ``initial_state``, which None
            stands for. It is not changed. Gradients flow through it: see ``FastWeightState.detach``.
        cu_seqlens : sequence or tensor of N+1 integers, optional
            Packed sequences, B = 1, as for :func:`fwp_core.delta_rule`; N = B without it.

        Returns
        -------
        y : Tensor [B,T,D]
        state : FastWeightState
        """
        self._check_input(x)
        offsets = None
        if cu_seqlens is not None:
            if x.shape[0] != 1:
                raise ShapeError(f"x: expected B=1 for packed sequences, got {x.shape[0]}")
            offsets = ops.offsets(cu_seqlens, x)
        sequences = x.shape[0] if offsets is None else _count(offsets) - 1
        if state is None:
            state = self.initial_state(sequences)
        self._check_state(state, sequences)
        q, k, v, recent = self._projected(x, state, offsets)
        o, memory = _SCANS[self.rule](
            *(q, k, v, *self._strengths(x)),
            initial_state=state.memory,
            cu_seqlens=offsets,
            **self._options(),
        )
        return self._read_out(o, x), FastWeightState(memory, recent)

    @torch.no_grad()
    def step(self, x: Tensor, state: FastWeightState) -> Tensor:
        """Read a token or a few [B,T,D] and return y [B,T,D]; ``state`` is changed in place.

        For decoding: as forward, to rounding, without gradients and at the cost of no new state.
        """
        self._check_input(x)
        self._check_state(state, x.shape[0])
        q, k, v, recent = self._projected(x, state, None)
        o = _STEPS[self.rule](q, k, v, *self._strengths(x), state=state.memory, **self._options())
        if state.recent is not None and recent is not None:
            state.recent.copy_(recent)
        return self._read_out(o, x)

    def _check_input(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise DTypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            raise ShapeError(f"x: expected shape (B, T, D={self.hidden_size}), got {tuple(x.shape)}")

    def _check_state(self, state: FastWeightState, sequences: int) -> None:
        if not isinstance(state, FastWeightState):
            raise DTypeError(f"state: expected a FastWeightState, got {type(state).__name__}")
        if state.memory.shape[0] != sequences:
            raise ShapeError(f"state: expected that of {sequences} sequences, got {state.memory.shape[0]}")
        shape = (sequences, self.heads, self.state_keys, self.value_size + self.attention_norm)
        if state.memory.shape != shape:
            raise ShapeError(f"state: expected memory of shape {shape}, got {tuple(state.memory.shape)}")
        recent = (sequences, self.taps - 1, sum(self._sizes())) if self.taps else None
        given = None if state.recent is None else tuple(state.recent.shape)
        if given != recent:
            raise ShapeError(f"state: expected recent of shape {recent}, got {given}")

    def _projected(
        self, x: Tensor, state: FastWeightState, offsets: Offsets | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k and v [B,T,heads,size], and the state of the convolution after them."""
        y, recent = self.project(x), None
        if self.convolution is not None:
            assert state.recent is not None
            before = state.recent.to(y.dtype)
            if offsets is None:
                y, recent = _convolve(y, before, self.convolution)
            else:
                y, recent = _convolve_packed(y, before, self.convolution, offsets)
            y = F.silu(y)
        q, k, v = y.split(self._sizes(), dim=-1)
        keys = (self.key_heads, self.key_size)
        return q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, (self.heads, -1)), recent

    def _strengths(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """beta and g."""
        beta = None if self.strength is None else torch.sigmoid(self.strength(x))
        if self.decay is None or self.decay_rate is None:
            return beta, None
        step: Tensor = self.decay(x)
        rate: Tensor = self.decay_rate
        if step.dtype != torch.float64:
            step, rate = step.float(), rate.float()  # decays close to 1 have no room in half precision
        if self.gate == "channel":
            step, rate = step.view(*step.shape[:-1], self.heads, self.state_keys), rate[:, None]
        return beta, -torch.exp(rate) * F.softplus(step)

    def _options(self) -> dict[str, Any]:
        return {
            "feature_map": self._map(),
            "qk_norm": self.qk_norm,
            "attention_norm": self.attention_norm,
            "eps": self.eps,
            "scale": self.scale,
        }

    def _map(self) -> Any:
        """The feature map, with the projection that the layer has, where it has it."""
        if self.projection is None or self.feature_map is None:
            return self.feature_map
        projection: Tensor = self.projection
        projection = projection.to(wide(projection))
        if ops.traced():
            return self.feature_map._parameters._replace(projection=projection)
        return FAVOR(projection, self.feature_map._parameters.eps)

    def _read_out(self, o: Tensor, x: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o.to(self.norm.weight.dtype))  # under autocast they differ
        o = o.flatten(2)
        y: Tensor = self.out(o if self.output_gate is None else o * F.silu(self.output_gate(x)))
        return y

    def extra_repr(self) -> str:
        sizes = (
            f"{self.hidden_size}, heads={self.heads}, key_size={self.key_size}, value_size={self.value_size}"
        )
        options = {
            "key_heads": (self.key_heads, self.heads),
            "rule": (self.rule, None),
            "feature_map": (self.feature_map, None),
            "qk_norm": (self.qk_norm, "l2"),
            "attention_norm": (self.attention_norm, False),
            "gate": (self.gate, None),
            "taps": (self.taps, 0),
        }
        return ", ".join(
            [sizes, *(f"{name}={value!r}" for name, (value, usual) in options.items() if value != usual)]
        )


# The short convolution: y_t = sum_i taps_i x_{t-n+1+i}, channel by channel, n the number of taps.


def _convolve(x: Tensor, recent: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """x [B,T,C] after recent [B,n-1,C], taps [n,C]: the sums, and the last n - 1 inputs."""
    x = torch.cat([recent, x], dim=1)
    length = x.shape[1] - len(taps) + 1
    y = sum(tap * x[:, i : i + length] for i, tap in enumerate(taps.unbind()))
    assert isinstance(y, Tensor)
    return y, x[:, length:]


def _count(offsets: Offsets) -> int:
    return offsets.shape[0] if isinstance(offsets, Tensor) else len(offsets)


def _convolve_packed(x: Tensor, recent: Tensor, taps: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """The same of the sequences of x [1,T,C], each after its own recent [N,n-1,C].

    Wrong offsets on a device, which the scan finds, read wrong rows, and none that is not there.
    """
    before = recent.shape[1]
    starts = torch.as_tensor(offsets, device=x.device)
    ends = starts[1:]
    rows = torch.cat([recent.flatten(0, 1), x[0]])

    def row(sequence: Tensor, place: Tensor) -> Tensor:
        """Where among the rows a place of a sequence is; what came before it has places from -before on."""
        in_x = recent.shape[0] * before + starts[sequence] + place
        found = torch.where(place >= 0, in_x, before * (sequence + 1) + place)
        return found.clamp(0, rows.shape[0] - 1)

    token = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(ends, token, right=True)
    place = token - starts[sequence]
    y = sum(tap * rows[row(sequence, place + i - before)] for i, tap in enumerate(taps.unbind()))
    assert isinstance(y, Tensor)
    every = torch.arange(recent.shape[0], device=x.device)[:, None]
    last = starts.diff()[:, None] + torch.arange(-before, 0, device=x.device)
    return y[None], rows[row(every, last)]
