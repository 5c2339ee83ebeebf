"""The command line: python -m fwp_core info | bench | demo."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """An option's value that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return number
