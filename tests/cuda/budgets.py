"""What the device's compiler made of every kernel, held against the limits of budgets.csv; no GPU is needed.

    python tests/cuda/budgets.py                        # cuda/**/*.cu, compiled here for every architecture
    python tests/cuda/budgets.py libfwp_core_cuda.so    # what was built: a library, objects, cubins
    python tests/cuda/budgets.py --update               # after a look at the report: write the limits anew

It needs cuobjdump and nvdisasm, and nvcc where it is to compile: those of this environment's packages, which
the extra dev installs, before those on the path.

A line of the table: for each architecture the most registers, and after a plus, where it is not 0, the most
bytes of stack (spills, and arrays that are indexed at run time); the fewest tensor core instructions, the
least percentage of loads from global memory that are of 16 bytes, the most accesses of memory whose kind the
compiler does not know. A kernel without a line is over its budget, and so is a line without a kernel.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("budgets.csv")
ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
COMPILER = "13.0"
UPDATE = "if it is meant: python tests/cuda/budgets.py --update"


class Unavailable(RuntimeError):
    """A tool is not on this machine."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int  # bytes of a thread in local memory
    shared: int  # bytes, static ones and those that the architecture keeps for itself
    mma: int  # instructions in the text, of tensor cores,
    ldsm: int  # of matrices from shared memory,
    loads: int  # from global memory, asynchronous copies among them,
    wide_loads: int  # of them those of 16 bytes and more,
    generic: int  # on memory whose kind the compiler does not know,
    barriers: int

    @property
    def wide(self) -> int:
        """Percentage of the loads that are wide."""
        return 100 * self.wide_loads // self.loads if self.loads else 100


@dataclass(frozen=True)
class Limits:
    """A kernel's line in the table."""

    registers: dict[str, int]  # by architecture
    stack: dict[str, int]  # likewise, in bytes
    mma: int
    wide: int
    generic: int


# tools


@cache
def tool(name: str) -> str:
    """Where a tool of the toolkit is: in this environment's packages, on the path, or beside nvcc there."""
    nvcc = shutil.which("nvcc")
    toolkit = [Path(nvcc).resolve().parent] if nvcc else []
    packages = [folder for entry in sys.path for folder in Path(entry).glob("nvidia/cu*/bin")]
    for folder in (*packages, None, *toolkit):
        if found := shutil.which(name, path=folder):
            return found
    raise Unavailable(f"no package here: {name} (nvidia-cuda-{name})")


def run(*command: str | Path, **options: str) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def compiled(source: Path, architecture: str, folder: Path, flags: Sequence[str] = ()) -> Path:
    """A .cu file as a cubin."""
    cubin = folder / f"{source.parent.name}-{source.stem}.{architecture}.cubin"
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch={architecture}", "-cubin"]
    options.append("-DFWP_LAYOUT=0")  # of the border, which nobody crosses here
    run(tool("nvcc"), *options, f"-I{ROOT / 'cuda'}", *flags, source, "-o", cubin)
    return cubin


# measuring


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel in a cubin, an object file or a library."""
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])  # cuobjdump calls it
    command = [tool("cuobjdump"), "-sass", "--dump-resource-usage", binary]
    found = list(functions(run(*command, env={**os.environ, "PATH": path}).splitlines()))
    names = readable([symbol for symbol, *_ in found])
    return [
        Kernel(name, architecture, *resources, *counts(opcodes))
        for name, (_, architecture, resources, opcodes) in zip(names, found, strict=True)
    ]


def functions(lines: Iterable[str]) -> Iterator[tuple[str, str, tuple[int, ...], list[str]]]:
    """Symbol, architecture, (registers, stack, shared memory) and opcodes of each function of a dump.

    The resources of an architecture's functions precede their texts. What stands under @!PT never runs.
    """
    resources: dict[str, tuple[int, ...]] = {}
    architecture = symbol = ""
    opcodes: list[str] = []
    for line in lines:
        if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)", line):
            if found[1] != "@!PT":
                opcodes.append(found[2])
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            resources[symbol] = tuple(map(int, found.groups()))
        elif found := re.match(r"\s*code for (sm_\d+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (: )?([^\s:]+)", line):
            symbol = found[2]
            if found[1]:
                opcodes = []
                yield symbol, architecture, resources[symbol], opcodes


def counts(opcodes: list[str]) -> Iterator[int]:
    """The counts of a Kernel, in its order."""

    def matching(pattern: str) -> int:
        return sum(re.match(pattern, opcode) is not None for opcode in opcodes)

    yield matching(r"([HIQOD]|HG|IG|QG)MMA")
    yield matching(r"LDSM")
    yield matching(r"LDG(STS)?(\.|$)")
    yield matching(r"LDG(STS)?\..*(128|256)")
    yield matching(r"(LD|ST|ATOM)(\.|$)")
    yield matching(r"BAR\.")


def readable(symbols: Sequence[str]) -> list[str]:
    """Names as one would write them: no result, no parameters, no fwp::cuda::, enumerators by their names."""
    demangled = run("c++filt", input="\n".join(symbols)).splitlines() if symbols else []
    return [_shortened(name) for name in demangled]


def _shortened(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w+::|_INTERNAL_\w+::", "", name)
    name = re.sub(r"\((?:\w+::)*(\w+)\)(\d+)", _enumerator, name)
    name = re.sub(r"\b(fwp|cuda)::", "", name)
    depth, begin = 0, 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if depth == 0 and c == " ":
            begin = i + 1  # after the result's type
        if depth == 0 and c == "(":
            return name[begin:i]
    return name


def _enumerator(found: re.Match[str]) -> str:
    names = enumerations().get(found[1])
    number = int(found[2])
    return found[2] if names is None else names[number]


@cache
def enumerations() -> dict[str, list[str]]:
    """The plain enumerations of the headers that kernels include."""
    headers = [path for folder in ("cpp", "cuda") for path in (ROOT / folder).rglob("*.[hc]*")]
    pattern = re.compile(r"enum class (\w+)(?: : \w+)? \{([\w\s,]*)\}")
    found = [match for path in sorted(headers) for match in pattern.findall(path.read_text(encoding="utf-8"))]
    return {name: re.findall(r"\w+", body) for name, body in found}


# the table


def read_table(path: Path) -> dict[str, Limits]:
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row["kernel"]: Limits(
                *_registers_and_stack(row), *(int(row[column]) for column in ("mma", "wide", "generic"))
            )
            for row in csv.DictReader(file)
        }


def _registers_and_stack(row: dict[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    cells = [(architecture, row[architecture].partition("+")) for architecture in ARCHITECTURES]
    return (
        {architecture: int(registers) for architecture, (registers, _, _) in cells if registers},
        {architecture: int(stack or 0) for architecture, (registers, _, stack) in cells if registers},
    )


def _cell(limits: Limits, architecture: str) -> str:
    if architecture not in limits.registers:
        return ""
    stack = limits.stack[architecture]
    return f"{limits.registers[architecture]}" + (f"+{stack}" if stack else "")


def write_table(path: Path, table: dict[str, Limits]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["kernel", *ARCHITECTURES, "mma", "wide", "generic"])
        for name, limits in sorted(table.items()):
            cells = [_cell(limits, architecture) for architecture in ARCHITECTURES]
            out.writerow([name, *cells, limits.mma, limits.wide, limits.generic])


def limits_of(found: Sequence[Kernel], before: Limits | None = None) -> Limits:
    """What one kernel needs on the architectures found; registers are given in eights."""
    registers = {kernel.architecture: -(-kernel.registers // 8) * 8 for kernel in found}
    stack = {kernel.architecture: kernel.stack for kernel in found}
    return Limits(
        {**(before.registers if before else {}), **registers},
        {**(before.stack if before else {}), **stack},
        min(kernel.mma for kernel in found),
        min(kernel.wide for kernel in found),
        max(kernel.generic for kernel in found),
    )


def excesses(found: Iterable[Kernel], table: dict[str, Limits]) -> Iterator[str]:
    """What is over its budget, a line each."""
    found = list(found)
    for kernel in found:
        at = f"{kernel.name}, {kernel.architecture}:"
        limits = table.get(kernel.name)
        if limits is None or kernel.architecture not in limits.registers:
            yield f"{at} not in the table"
            continue
        if kernel.registers > limits.registers[kernel.architecture]:
            yield f"{at} {kernel.registers} registers, at most {limits.registers[kernel.architecture]}"
        if kernel.stack > limits.stack[kernel.architecture]:
            most = limits.stack[kernel.architecture]
            yield f"{at} {kernel.stack} bytes of stack (spills), at most {most}"
        if kernel.mma < limits.mma:
            yield f"{at} {kernel.mma} tensor core instructions, at least {limits.mma}"
        if kernel.wide < limits.wide:
            loads = f"{kernel.wide_loads} of {kernel.loads} loads are of 16 bytes"
            yield f"{at} {loads}, {kernel.wide} %, at least {limits.wide} %"
        if kernel.generic > limits.generic:
            yield f"{at} {kernel.generic} accesses of unknown memory, at most {limits.generic}"
    for name in sorted(table.keys() - {kernel.name for kernel in found}):
        yield f"{name}: in the table, but there is no such kernel"


# the command


def measured(files: Sequence[Path], architectures: Sequence[str]) -> list[Kernel]:
    """The kernels of these files for these architectures; .cu files are compiled for them."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compiled, file, architecture, Path(folder))
            for file in files
            if file.suffix == ".cu"
            for architecture in architectures
        ]
        binaries = [file for file in files if file.suffix != ".cu"] + [job.result() for job in jobs]
        return sorted(
            (k for found in pool.map(kernels, binaries) for k in found if k.architecture in architectures),
            key=lambda kernel: (kernel.name, ARCHITECTURES.index(kernel.architecture)),
        )


def report(found: Iterable[Kernel]) -> None:
    print(" arch   regs  stack shared   mma  ldsm  loads  wide generic barriers  kernel")
    for k in found:
        print(
            f"{k.architecture:>6} {k.registers:5} {k.stack:6} {k.shared:6} {k.mma:5} {k.ldsm:5} {k.loads:6} "
            f"{k.wide:4}% {k.generic:6} {k.barriers:8}  {k.name}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: every cuda/**/*.cu")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--update", action="store_true", help="write the table anew")
    options = parser.parse_args(arguments)
    files = options.files or sorted((ROOT / "cuda").rglob("*.cu"))
    try:
        found = measured(files, options.architectures)
    except Unavailable as reason:
        print(reason)
        return 2
    report(found)
    table = read_table(options.table)
    if options.update:
        of_name = {
            name: [kernel for kernel in found if kernel.name == name] for name in {k.name for k in found}
        }
        write_table(options.table, {name: limits_of(of, table.get(name)) for name, of in of_name.items()})
        return 0
    over = list(excesses(found, table))
    print(*over, sep="\n")
    if over:
        print(f"{len(over)} over budget; {UPDATE}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
