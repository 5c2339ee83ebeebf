"""What the device's compiler made of every kernel, held against the limits of budgets.csv; no GPU is needed.

    python tests/cuda/budgets.py                        # what has changed since it kept to them
    python tests/cuda/budgets.py --all                  # every source
    python tests/cuda/budgets.py libfwp_core_cuda.so    # what was built: a library, objects, cubins
    python tests/cuda/budgets.py --update               # after a look at the report: write its limits anew

Sources are compiled here, for every architecture. It needs cuobjdump and nvdisasm, and nvcc where it is to
compile: those of this environment's packages, which the extra dev installs, before those on the path.

A line of the table: for each architecture the most registers, the fewest tensor core instructions, the least
percentage of loads from global memory that are of 16 bytes. A kernel without a line is over its budget, and
so is a line without a kernel. No kernel has local memory (spills, and arrays that are indexed at run time),
static shared memory (how much a launch takes the sources know: shared_of in cuda/launch.hpp), or accesses of
memory whose kind the compiler does not know. Sources that kept to their limits have a line in budgets.sha256,
with a digest of their text and all that they include, without comments, of their limits, and of how they were
compiled.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
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
SOURCES = sorted((ROOT / "cuda").rglob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
# Bytes of shared memory of a block that has any.
RESERVED = {"sm_80": 0, "sm_90": 1024, "sm_120": 1024}
COMPILER = "13.0"
UPDATE = "if it is meant: python tests/cuda/budgets.py --update"


class Unavailable(RuntimeError):
    """A tool is not on this machine."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture."""

    name: str
    source: str  # from the project's root; empty: of a file that was built
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

    source: str
    registers: dict[str, int]  # by architecture
    mma: int
    wide: int


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


FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-cubin")


def check_compiler() -> None:
    """Another one gives other numbers."""
    if f"release {COMPILER}," not in run(tool("nvcc"), "--version"):
        raise Unavailable(f"no package here: nvcc {COMPILER}, of which the table is")


def compiled(source: Path, architecture: str, folder: Path, flags: Sequence[str] = ()) -> Path:
    """A .cu file as a cubin."""
    cubin = folder / f"{source.parent.name}-{source.stem}.{architecture}.cubin"
    layout = "-DFWP_LAYOUT=0"  # of the border, which nobody crosses here
    include = f"-I{ROOT / 'cuda'}"
    run(tool("nvcc"), *FLAGS, f"-arch={architecture}", layout, include, *flags, source, "-o", cubin)
    return cubin


# measuring


def kernels(binary: Path, source: str = "") -> list[Kernel]:
    """Every kernel in a cubin, an object file or a library."""
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ["PATH"]])  # cuobjdump calls it
    command = [tool("cuobjdump"), "-sass", "--dump-resource-usage", binary]
    found = list(functions(run(*command, env={**os.environ, "PATH": path}).splitlines()))
    names = readable([symbol for symbol, *_ in found])
    return [
        Kernel(name, source, architecture, *resources, *counts(opcodes))
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
                row["source"],
                {architecture: int(row[architecture]) for architecture in ARCHITECTURES if row[architecture]},
                int(row["mma"]),
                int(row["wide"]),
            )
            for row in csv.DictReader(file)
        }


def write_table(path: Path, table: dict[str, Limits]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["source", "kernel", *ARCHITECTURES, "mma", "wide"])
        for name, limits in sorted(table.items(), key=lambda line: (line[1].source, line[0])):
            cells = [limits.registers.get(architecture, "") for architecture in ARCHITECTURES]
            out.writerow([limits.source, name, *cells, limits.mma, limits.wide])


def limits_of(found: Sequence[Kernel]) -> Limits:
    """What one kernel needs on the architectures found; registers are given in eights."""
    return Limits(
        found[0].source,
        {kernel.architecture: -(-kernel.registers // 8) * 8 for kernel in found},
        min(kernel.mma for kernel in found),
        min(kernel.wide for kernel in found),
    )


def lines_of(table: dict[str, Limits], sources: Iterable[str]) -> dict[str, Limits]:
    """The lines of these sources, and of those that are no more."""
    names = set(sources)
    return {
        name: limits
        for name, limits in table.items()
        if limits.source in names or not (ROOT / limits.source).exists()
    }


def updated(table: dict[str, Limits], found: Iterable[Kernel], sources: Iterable[str]) -> dict[str, Limits]:
    """The table with the lines of these sources made anew."""
    of_name: dict[str, list[Kernel]] = {}
    for kernel in found:
        of_name.setdefault(kernel.name, []).append(kernel)
    anew = lines_of(table, sources)
    kept = {name: limits for name, limits in table.items() if name not in anew}
    return kept | {name: limits_of(of) for name, of in of_name.items()}


def excesses(
    found: Iterable[Kernel], table: dict[str, Limits], sources: Iterable[str] | None = None
) -> Iterator[str]:
    """What is over its budget, a line each. sources: of which every kernel is there; None: of all."""
    found = list(found)
    for kernel in found:
        at = f"{kernel.name}, {kernel.architecture}:"
        if kernel.stack:
            yield f"{at} {kernel.stack} bytes of stack (spills)"
        if kernel.shared not in (0, RESERVED[kernel.architecture]):
            yield f"{at} {kernel.shared} bytes of static shared memory"
        if kernel.generic:
            yield f"{at} {kernel.generic} accesses of unknown memory"
        limits = table.get(kernel.name)
        if limits is None or kernel.architecture not in limits.registers:
            yield f"{at} not in the table"
            continue
        if kernel.registers > limits.registers[kernel.architecture]:
            yield f"{at} {kernel.registers} registers, at most {limits.registers[kernel.architecture]}"
        if kernel.mma < limits.mma:
            yield f"{at} {kernel.mma} tensor core instructions, at least {limits.mma}"
        if kernel.wide < limits.wide:
            loads = f"{kernel.wide_loads} of {kernel.loads} loads are of 16 bytes"
            yield f"{at} {loads}, {kernel.wide} %, at least {limits.wide} %"
    expected = table if sources is None else lines_of(table, sources)
    for name in sorted(expected.keys() - {kernel.name for kernel in found}):
        yield f"{name}: in the table, but there is no such kernel"


# the sources that kept to it


def closure(source: Path) -> list[Path]:
    """A source and what it includes of the project's."""
    found: list[Path] = []
    left = [source.resolve()]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.append(file)
        for name in re.findall(r'^\s*#\s*include "(.+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            folders = (file.parent, ROOT / "cuda")
            left.append(next(path for folder in folders if (path := folder / name).exists()).resolve())
    return sorted(found)


def digest(source: Path, table: dict[str, Limits]) -> str:
    lines = sorted((name, limits) for name, limits in table.items() if limits.source == name_of(source))
    text = hashlib.sha256(f"{COMPILER} {FLAGS} {ARCHITECTURES} {lines}".encode())
    for file in closure(source):
        text.update(without_comments(file.read_text(encoding="utf-8")).encode())
    return text.hexdigest()


def without_comments(text: str) -> str:
    return re.sub(r"[ \t]*//.*", "", text)


def read_digests(table: Path) -> dict[str, str]:
    """By source, those of this table."""
    path = table.with_suffix(".sha256")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {source: digest for digest, source in (line.split("  ") for line in lines)}


def write_digests(table: Path, digests: dict[str, str]) -> None:
    lines = [f"{digest}  {source}\n" for source, digest in sorted(digests.items())]
    table.with_suffix(".sha256").write_text("".join(lines), encoding="utf-8")


def stale(path: Path = TABLE) -> list[Path]:
    """The sources that have changed, or what they include, or their limits, since they kept to these."""
    known, table = read_digests(path), read_table(path)
    return [source for source in SOURCES if digest(source, table) != known.get(name_of(source))]


def name_of(source: Path) -> str:
    source = source.resolve()
    return source.relative_to(ROOT).as_posix() if source.is_relative_to(ROOT) else source.name


# the command


def measured(files: Sequence[Path], architectures: Sequence[str]) -> list[Kernel]:
    """The kernels of these files for these architectures; .cu files are compiled for them."""
    if any(file.suffix == ".cu" for file in files):
        check_compiler()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def kernels_of(file: Path, architecture: str) -> list[Kernel]:
            if file.suffix != ".cu":
                return kernels(file)
            return kernels(compiled(file, architecture, Path(folder)), name_of(file))

        jobs = [
            pool.submit(kernels_of, file, architecture)
            for file in files
            for architecture in (architectures if file.suffix == ".cu" else architectures[:1])
        ]
        return sorted(
            (k for job in jobs for k in job.result() if k.architecture in architectures),
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
    parser.add_argument("files", nargs="*", type=Path, help="default: sources that have changed")
    parser.add_argument("--all", action="store_true", help="every source")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--update", action="store_true", help="write the limits of what is measured anew")
    options = parser.parse_args(arguments)
    files = options.files or (SOURCES if options.all else stale(options.table))
    sources = [file for file in files if file.suffix == ".cu"]
    names = [name_of(source) for source in sources]
    if options.update and (len(sources) < len(files) or len(options.architectures) < len(ARCHITECTURES)):
        parser.error("--update: expected sources, for every architecture")
    try:
        found = measured(files, options.architectures)
    except Unavailable as reason:
        print(reason)
        return 2
    report(found)
    table = read_table(options.table)
    if options.update:
        table = updated(table, found, names)
        write_table(options.table, table)
    over = list(excesses(found, table, names if sources == files else None))
    if over:
        print(*over, f"{len(over)} over budget; {UPDATE}", sep="\n")
        return 1
    if sources and len(options.architectures) == len(ARCHITECTURES):
        digests = read_digests(options.table) | {name_of(source): digest(source, table) for source in sources}
        write_digests(options.table, {name: x for name, x in digests.items() if (ROOT / name).exists()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
