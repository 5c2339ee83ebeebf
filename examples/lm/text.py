"""Bytes to learn from: files, or the sources of the running interpreter's standard library."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
VALIDATION = 20  # one in so many bytes is for validation, the last ones


def standard_library() -> list[Path]:
    """The .py files of the standard library without its tests, shuffled, always in the same order."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(python_files(folder), key=lambda path: path.relative_to(folder).as_posix())
    random.Random(0).shuffle(files)
    return files


def python_files(folder: Path) -> Iterator[Path]:
    """All .py files in a folder and below, where that is part of the library."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in NOT_THE_LIBRARY:
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def read(files: Iterable[Path], least: int = 0) -> tuple[Bytes, Bytes]:
    """All files one behind the other, a zero byte between two; the last twentieth of it is for validation.

    ValueError if that has fewer than ``least`` bytes.
    """
    text = np.frombuffer(b"\0".join(Path(file).read_bytes() for file in files), np.uint8)
    border = len(text) - len(text) // VALIDATION
    if len(text) - border < least:
        raise ValueError(
            f"text: expected at least {VALIDATION * least} bytes, since validation takes one in {VALIDATION} "
            f"and needs {least}, which is streams * (length + 1); got {len(text)}"
        )
    return text[:border], text[border:]


def segments(text: Bytes, streams: int, length: int, offset: int = 0) -> Iterator[Tensor]:
    """Read ``text`` in ``streams`` streams, which start evenly apart: [streams, length + 1], without an end.

    Each segment starts with the byte that ended the one before, and its other bytes are the targets. The text
    is a ring, whose reading starts at ``offset``.
    """
    if len(text) < streams * (length + 1):
        raise ValueError(f"text: expected at least {streams * (length + 1)} bytes, got {len(text)}")
    places = offset + len(text) // streams * np.arange(streams)[:, None] + np.arange(length + 1)
    while True:
        yield torch.from_numpy(text[places % len(text)].astype(np.int64))
        places += length
