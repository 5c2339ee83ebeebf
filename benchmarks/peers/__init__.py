"""The participants: one module each, and what they are asked for.

A participant's module has ``PACKAGES``, the distributions whose versions are recorded; ``start(threads)``,
called once; and ``prepare(case)``, which makes everything that is not timed (sessions, outputs, the layout
that the participant wants) and returns the call to be timed with a function for its results. What it cannot
do it refuses with ``Unsupported`` and the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fnmatch import fnmatch
from types import ModuleType
from typing import Any, NamedTuple

from registry import FAST_WEIGHT_RULES, Array, Case


class Unsupported(Exception):
    """This participant has no such operation; the message says what is missing."""


class Prepared(NamedTuple):
    """A call without arguments, and what gives its results in the library's layouts, after the call.

    allocates: bytes of results that the call makes anew each time, because it cannot be handed outputs.
    """

    call: Callable[[], Any]
    results: Callable[[], dict[str, Array]]
    allocates: int = 0


class Peer(NamedTuple):
    """One participant: its module here, the rules it is asked for, and what sets its process apart."""

    module: str
    rules: tuple[str, ...] = FAST_WEIGHT_RULES
    environment: tuple[tuple[str, str], ...] = ()
    cases: str = "*"

    def is_asked(self, case: Case) -> bool:
        """Whether a case concerns it at all; only the library has half precisions and feature maps."""
        asked = (case.dtype == "float32" and not case.nu) or self.module in LIBRARY
        return asked and case.rule in self.rules and fnmatch(case.name, self.cases)

    def load(self) -> ModuleType:
        """Its module; ImportError if what it measures is not installed."""
        return importlib.import_module(f"peers.{self.module}")


LIBRARY = ("ours", "ours_unfused")
OURS = "fwp_core"
YARDSTICK = "numpy"
PEERS = {
    OURS: Peer("ours"),
    YARDSTICK: Peer("numpy_yardsticks", ("sgemm", "copy", "add")),
    "fwp_core v3": Peer("ours", environment=(("FWP_ISA", "v3"),), cases="delta/forward/T????-H8-*"),
    "fwp_core unfused": Peer("ours_unfused", cases="*-dpfp?/forward/*"),
    "onnxruntime": Peer("onnx_runtime"),
    "transformers": Peer("hugging_face"),
    "fla": Peer("fla_naive"),
    "fast-transformers": Peer("fast_transformers_cpu"),
    "torch": Peer("torch_yardsticks", ("sgemm", "softmax")),
}
