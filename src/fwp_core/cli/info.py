"""Show version, build, instruction sets, threads and CUDA state."""

from __future__ import annotations

import argparse
import platform

import numpy as np

import fwp_core as fwp


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command: it has none."""


def run(args: argparse.Namespace) -> int:
    """Print show_config(), one entry per line, and what the library runs on."""
    config = fwp.show_config(mode="dict")
    config |= {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    width = max(map(len, config))
    for name, value in config.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        print(f"{name.replace('_', ' '):{width}s}   {text}")
    return 0
