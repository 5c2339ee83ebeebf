"""python -m fwp_core: see what the library is (info), how fast it is (bench) and what it does (demo)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fwp_core as fwp

from .cli import bench, demo, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fwp_core", description="Fast weight programmers.")
    parser.add_argument("--version", action="version", version=fwp.__version__)
    parser.add_argument(
        "--cmakedir", action="store_true", help="print the folder of the CMake package, for CMAKE_PREFIX_PATH"
    )
    parser.add_argument("--includedir", action="store_true", help="print the folder of the C and C++ headers")
    commands = parser.add_subparsers(title="commands", metavar="info | bench | demo")
    for name, command in {"info": info, "bench": bench, "demo": demo}.items():
        subparser = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)

    args = parser.parse_args(arguments)
    if args.cmakedir:
        print(fwp.get_cmake_dir())
    elif args.includedir:
        print(fwp.get_include())
    elif hasattr(args, "run"):
        return int(args.run(args))
    else:
        parser.print_help()
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
