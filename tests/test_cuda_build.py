"""What nvcc makes of the CUDA kernels, against tests/cuda/budgets.csv, how that is checked; the plugin."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import run_python

import fwp_core as fwp

sys.path.append(str(Path(__file__).with_name("cuda")))

import budgets
from budgets import Kernel, Limits

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tools():
    try:
        for name in ("nvcc", "cuobjdump", "nvdisasm"):
            budgets.tool(name)
    except budgets.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def its_compiler(tools):
    """Another one gives other numbers."""
    try:
        budgets.check_compiler()
    except budgets.Unavailable as reason:
        pytest.skip(str(reason))


def built():
    """The plugin of this installation, where nvcc built one."""
    folders = {Path(fwp.__file__).parent, Path(fwp._core.__file__).parent}
    found = {path.resolve() for folder in folders for path in folder.rglob("libfwp_core_cuda.*")}
    return [path for path in sorted(found) if b".nv_fatbin" in path.read_bytes()]


# the kernels, and the plugin that they are in


def run(*command):
    variables = {
        name: x for name, x in os.environ.items() if not name.startswith(("CUDA", "FWP_", "SKBUILD"))
    }
    done = subprocess.run([*map(str, command)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def plugin_of_nvcc(folder, flags="", **settings):
    """Build it, without a warning. Flags that PyPI's nvcc links with are added to these."""
    settings = {
        "FWP_CUDA": "ON",
        "FWP_WERROR": "ON",
        "FWP_ISA_LEVELS": "base",
        "CMAKE_CUDA_COMPILER": budgets.tool("nvcc"),
        **settings,
    }
    definitions = [f"-D{name}={x}" for name, x in settings.items()]
    run("env", f"CUDAFLAGS={flags}", "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions)
    run("cmake", "--build", folder, "--target", "fwp_core_cuda")
    (plugin,) = (folder / "cuda").glob("libfwp_core_cuda.*")
    return plugin


def opens_without_a_gpu(plugin):
    listing = run("nm", "--dynamic", "--defined-only", "--extern-only", plugin)
    assert [line.split()[-1] for line in listing.splitlines()] == ["fwp_cuda_backend"]
    # Neither the driver's library nor the runtime's, which machines may lack.
    assert "libcuda" not in run("readelf", "--dynamic", plugin)
    if not Path("/dev/nvidia0").exists():
        assert state_with(plugin) in (
            "CUDA driver version is insufficient for CUDA runtime version",
            "no CUDA-capable device is detected",
            "without a device",
        )


for_linux = pytest.mark.skipif(sys.platform != "linux", reason="for Linux")


@for_linux
def test_the_plugin_opens_without_a_gpu(tools, tmp_path):
    """One that is text for drivers, and that not optimised: kernels for a GPU take minutes."""
    for plugin in built() or [plugin_of_nvcc(tmp_path, "-Xcicc -O0", CMAKE_CUDA_ARCHITECTURES="90-virtual")]:
        opens_without_a_gpu(plugin)


def test_kernels_keep_to_their_budgets(its_compiler):
    """Those that have been found to do so by budgets.py are not compiled again."""
    changed = budgets.stale()
    found = budgets.measured(changed, ["sm_90"])
    names = [budgets.name_of(source) for source in changed]
    assert list(budgets.excesses(found, budgets.read_table(budgets.TABLE), names)) == [], budgets.UPDATE


@pytest.mark.slow
def test_kernels_keep_to_their_budgets_on_every_architecture(its_compiler):
    found = budgets.measured(budgets.SOURCES, budgets.ARCHITECTURES)
    assert {kernel.architecture for kernel in found} == set(budgets.ARCHITECTURES)
    assert list(budgets.excesses(found, budgets.read_table(budgets.TABLE))) == [], budgets.UPDATE


@pytest.mark.slow
@for_linux
def test_the_plugin_keeps_to_its_budgets(its_compiler, tmp_path):
    for plugin in built() or [plugin_of_nvcc(tmp_path)]:
        found = budgets.measured([plugin], ["sm_90"])
        assert found
        assert list(budgets.excesses(found, budgets.read_table(budgets.TABLE))) == [], budgets.UPDATE
        opens_without_a_gpu(plugin)


# the plugin

STATE = """
import numpy as np, fwp_core as fwp
print(fwp.show_config("dict")["cuda"])
print(fwp.has_cuda())
try:
    fwp.linear_attention(*[Device()] * 3)
except fwp.DeviceError as error:
    print(error)
one = np.ones((1, 1, 1, 1))
print(float(fwp.delta_rule(one, one, 3 * one, one[..., 0])[0][0, 0, 0, 0]))
"""


def state_with(plugin):
    """What this installation says of a plugin; on a device it refuses to work, and on the CPU it goes on."""
    code = STATE.replace("Device()", "DeviceArray(np.ones((1, 2, 1, 3), np.float32))")
    done = run_python("from device import DeviceArray\n" + code, FWP_CUDA_PLUGIN=str(plugin))
    assert done.returncode == 0, done.stderr
    state, has_cuda, error, on_cpu = done.stdout.splitlines()
    assert has_cuda == "False"
    assert error == f"q: expected memory of the CPU, since CUDA is {state}, got cuda:0"
    assert float(on_cpu) == 3
    return state


# Opens on any machine; what it says of itself is up to the macros. Large, as those with kernels are.
PLUGIN = """
#include "cpp/scan/backend.hpp"

#ifndef NAME
#define NAME fwp_cuda_backend
#endif

char large[1 << 20] = {1};

extern "C" const fwp::Backend* NAME() {
  static const fwp::Backend table{LAYOUT, sizeof(fwp::Backend) + MORE, sizeof(fwp::Problem) + MORE_PROBLEM,
                                  [] { return "a plugin that was let in"; }};
  return &table;
}
"""


def layout():
    """FWP_LAYOUT, as CMakeLists.txt computes it."""
    headers = ("scan/backend.hpp", "scan/problem.hpp", "scan/dtype.hpp", "features/features.hpp")
    text = b"".join((ROOT / "cpp" / header).read_bytes() for header in headers)
    return f"0x{hashlib.sha256(text).hexdigest()[:16]}u"


@pytest.fixture
def plugin(tmp_path):
    """Build a plugin that is wrong in some way."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++ here, or not Linux")

    def plugin(**macros):
        macros = {"LAYOUT": layout(), "MORE": 0, "MORE_PROBLEM": 0, **macros}
        source, library = tmp_path / "plugin.cpp", tmp_path / "plugin.so"
        source.write_text(PLUGIN)
        flags = [
            "-std=c++17",
            "-shared",
            "-fPIC",
            f"-I{ROOT}",
            *(f"-D{name}={x}" for name, x in macros.items()),
        ]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        return library

    return plugin


@pytest.mark.parametrize(
    ("macros", "state"),
    [
        ({}, "a plugin that was let in"),
        ({"LAYOUT": "0x0123456789abcdefu"}, "{} is of another build than this library"),
        ({"MORE": 8}, "{} is of another build than this library"),
        ({"MORE_PROBLEM": -8}, "{} is of another build than this library"),
        ({"NAME": "fwp_other"}, "{} has no fwp_cuda_backend"),
    ],
    ids=["alike", "layout", "table", "problem", "name"],
)
def test_plugins_of_another_build_are_refused(plugin, macros, state):
    library = plugin(**macros)
    assert state_with(library) == state.format(library)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_plugin_that_is_cut_short_is_refused(plugin, part):
    library = plugin()
    os.truncate(library, int(part * library.stat().st_size))
    assert state_with(library) == f"{library} is cut short"


def test_what_is_no_library_is_refused_in_the_loaders_words(tmp_path):
    text = tmp_path / "text.so"
    text.write_text("no library" * 100)
    assert str(text) in state_with(text)
    empty = tmp_path / "empty.so"
    empty.write_bytes(b"")
    assert str(empty) in state_with(empty)
    assert str(tmp_path) in state_with(tmp_path)
    assert state_with(tmp_path / "none.so") == f"{tmp_path / 'none.so'} not found"


# kernels under the emulator


@pytest.mark.slow
def test_every_case_under_the_emulator(tmp_path):
    run("cmake", "-S", ROOT, "--preset", "emulate", "-B", tmp_path)
    run("cmake", "--build", tmp_path, "--target", "fwp_core_cuda", "tests/cuda/all")
    every_case = ["env", "FWP_EVERY_CASE=1", "ctest", "--parallel", "2", "--output-on-failure"]
    run(*every_case, "--test-dir", tmp_path / "tests" / "cuda")


# the check, on a kernel that gets faults

KERNEL = """
#include "rows.cuh"

struct alignas(ALIGNMENT) Words {
  uint32_t x[4];
};

namespace fwp::cuda {
namespace {
template <Decay decay, int n>
FWP_KERNEL void product(const Words* x, float* y, int stride) {
  Words kept[n];
  for (int i = 0; i < n; ++i) kept[i] = load_global(x + i * stride + thread_index());
  float d[4] = {};
  for (int i = 0; i < 2 * n; ++i) {  // twice, so that all are kept
    const Words& a = kept[i % n];
    const uint32_t b[2] = {a.x[0], a.x[3]};
    if (TENSOR_CORES) {
      mma_f16(d, a.x, b);
    } else {
      d[0] += unpack_half(a.x[1], 0) * unpack_half(b[1], 0) + unpack_half(a.x[2], 0);
    }
  }
  sync_block();
#ifdef STATIC_SHARED
  __shared__ float kept_here[4];
  kept_here[stride % 4] = d[0];
  sync_block();
  d[1] += kept_here[thread_index() % 4];
#endif
#ifdef UNKNOWN_MEMORY
  *(stride > 1 ? y : static_cast<float*>(shared_memory())) = d[2];
#endif
  for (int r = 0; r < 4; ++r) store_global(y + 4 * thread_index() + r, d[r]);
}
template __global__ void product<Decay::channel, 16>(const Words*, float*, int);
}
}
"""
NAME = "product<channel, 16>"


@pytest.fixture(scope="module")
def compiled(tools, tmp_path_factory):
    def compiled(*flags, alignment=16, tensor_cores=1):
        folder = tmp_path_factory.mktemp("kernel")
        source = folder / "kernel.cu"
        source.write_text(KERNEL)
        flags = [f"-DALIGNMENT={alignment}", f"-DTENSOR_CORES={tensor_cores}", *flags]
        return budgets.kernels(budgets.compiled(source, "sm_90", folder, flags))

    return compiled


@pytest.fixture(scope="module")
def sound(compiled):
    (kernel,) = compiled()
    return kernel


def complaints(found, sound):
    """What is wrong, each without the name that precedes it."""
    found = list(budgets.excesses(found, {sound.name: budgets.limits_of([sound])}))
    assert all(line.startswith(f"{NAME}, sm_90: ") for line in found)
    return [line.removeprefix(f"{NAME}, sm_90: ") for line in found]


def test_a_kernel_is_read_as_it_was_written(sound):
    assert (sound.name, sound.architecture) == (NAME, "sm_90")
    assert 64 < sound.registers < 128  # sixteen times four words are kept
    assert (sound.stack, sound.shared, sound.generic) == (0, 0, 0)
    assert (sound.mma, sound.ldsm, sound.barriers) == (32, 0, 1)
    assert (sound.loads, sound.wide_loads, sound.wide) == (16, 16, 100)
    assert complaints([sound], sound) == []


def test_a_spill_is_seen(compiled, sound):
    (kernel,) = found = compiled("-maxrregcount=32")
    assert complaints(found, sound) == [f"{kernel.stack} bytes of stack (spills)"]


def test_missing_tensor_core_instructions_are_seen(compiled, sound):
    assert complaints(compiled(tensor_cores=0), sound) == ["0 tensor core instructions, at least 32"]


def test_narrow_loads_are_seen(compiled, sound):
    assert complaints(compiled(alignment=4), sound) == ["0 of 64 loads are of 16 bytes, 0 %, at least 100 %"]


def test_static_shared_memory_is_seen(compiled, sound):
    assert complaints([replace(sound, shared=1024)], sound) == []
    assert complaints(compiled("-DSTATIC_SHARED"), sound) == ["1040 bytes of static shared memory"]


def test_memory_of_an_unknown_kind_is_seen(compiled, sound):
    assert complaints(compiled("-DUNKNOWN_MEMORY"), sound) == ["1 accesses of unknown memory"]


def test_an_object_of_several_architectures_gives_each(tools, tmp_path):
    source, object_file = tmp_path / "kernel.cu", tmp_path / "kernel.o"
    source.write_text(KERNEL)
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    constants = ["-DALIGNMENT=16", "-DTENSOR_CORES=1"]
    nvcc = [budgets.tool("nvcc"), "-std=c++17", "-c", f"-I{ROOT / 'cuda'}", *constants, *targets]
    budgets.run(*nvcc, source, "-o", object_file)
    found = budgets.measured([object_file], budgets.ARCHITECTURES)
    assert [(kernel.name, kernel.architecture, kernel.mma) for kernel in found] == [
        (NAME, "sm_80", 32),
        (NAME, "sm_90", 32),
    ]


def test_the_command_updates_and_checks(tools, tmp_path, capsys):
    source, table = tmp_path / "kernel.cu", tmp_path / "table.csv"
    constants = "#define ALIGNMENT 16\n#define TENSOR_CORES {}\n"
    options = [str(source), "--table", str(table)]
    source.write_text(constants.format(1) + KERNEL)
    assert budgets.main([*options, "--architectures", "sm_90"]) == 1
    assert f"{NAME}, sm_90: not in the table" in capsys.readouterr().out
    assert budgets.main([*options, "--update"]) == 0
    assert budgets.main(options) == 0
    capsys.readouterr()
    source.write_text(constants.format(0) + KERNEL)
    assert budgets.main([*options, "--architectures", "sm_90"]) == 1
    assert capsys.readouterr().out.endswith(
        f"{NAME}, sm_90: 0 tensor core instructions, at least 32\n1 over budget; {budgets.UPDATE}\n"
    )
    with pytest.raises(SystemExit):
        budgets.main([*options, "--architectures", "sm_90", "--update"])


# without a compiler


def kernel(**values):
    numbers = {
        "stack": 0,
        "shared": 1024,
        "mma": 8,
        "ldsm": 0,
        "loads": 9,
        "wide_loads": 6,
        "generic": 0,
        "barriers": 1,
    }
    return Kernel("scan<f16>", "cuda/a.cu", "sm_90", **{"registers": 61, **numbers, **values})


def test_limits_leave_room_up_to_the_next_eight_registers():
    table = {"scan<f16>": budgets.limits_of([kernel()])}
    assert table == {"scan<f16>": Limits("cuda/a.cu", {"sm_90": 64}, 8, 66)}
    assert list(budgets.excesses([kernel(registers=64)], table)) == []
    over = list(budgets.excesses([kernel(registers=65)], table))
    assert over == ["scan<f16>, sm_90: 65 registers, at most 64"]


def test_limits_hold_on_every_architecture():
    other = replace(kernel(registers=90, mma=6, shared=0), architecture="sm_80")
    limits = Limits("cuda/a.cu", {"sm_90": 64, "sm_80": 96}, 6, 66)
    assert budgets.limits_of([kernel(), other]) == limits
    assert list(budgets.excesses([kernel(), other], {"scan<f16>": limits})) == []


def test_table_and_kernels_are_the_same_set():
    table = {"gone": budgets.limits_of([kernel()])}
    gone = "gone: in the table, but there is no such kernel"
    assert list(budgets.excesses([kernel()], table)) == ["scan<f16>, sm_90: not in the table", gone]
    assert list(budgets.excesses([], table, ["cuda/a.cu"])) == [gone]


def test_an_update_leaves_the_lines_of_other_sources(project):
    table = {
        name: Limits(source, {"sm_90": 8}, 0, 0)
        for name, source in [("gone", "cuda/a.cu"), ("other", "cuda/b.cu"), ("old", "cuda/c.cu")]
    }
    made = budgets.updated(table, [kernel()], ["cuda/a.cu"])
    assert made == {"other": table["other"], "scan<f16>": budgets.limits_of([kernel()])}
    assert list(budgets.excesses([kernel()], table, ["cuda/a.cu"])) == [
        "scan<f16>, sm_90: not in the table",
        "gone: in the table, but there is no such kernel",
        "old: in the table, but there is no such kernel",
    ]


def test_the_table_survives_writing(tmp_path):
    table = {
        "b": Limits("cuda/a.cu", {"sm_80": 8, "sm_120": 8}, 0, 100),
        "a<f16, 2>": Limits("cuda/b.cu", {"sm_80": 8, "sm_90": 16}, 1, 50),
    }
    path = tmp_path / "table.csv"
    budgets.write_table(path, table)
    assert budgets.read_table(path) == table
    assert path.read_text().splitlines()[1:] == ["cuda/a.cu,b,8,,8,0,100", 'cuda/b.cu,"a<f16, 2>",8,16,,1,50']


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two sources, one of which includes a header, that have kept to their limits."""
    for name, text in {
        "cuda/a.cu": '#include "parts/one.cuh"\n#include <cmath>\n',
        "cuda/b.cu": "",
        "cuda/parts/one.cuh": '#include "../../cpp/two.hpp"\n  #include "parts/three.cuh"\n',
        "cuda/parts/three.cuh": '#include "one.cuh"\n',
        "cpp/two.hpp": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = sorted((tmp_path / "cuda").glob("*.cu"))
    monkeypatch.setattr(budgets, "ROOT", tmp_path)
    monkeypatch.setattr(budgets, "SOURCES", sources)
    table = {"scan<f16>": budgets.limits_of([kernel()])}
    budgets.write_table(tmp_path / "table.csv", table)
    budgets.write_digests(
        tmp_path / "table.csv", {f"cuda/{path.name}": budgets.digest(path, table) for path in sources}
    )
    return tmp_path


def test_sources_are_measured_again_when_anything_changes(project, monkeypatch):
    def changed():
        return [path.name for path in budgets.stale(project / "table.csv")]

    assert changed() == []
    for name, text, expected in [
        ("cuda/b.cu", "int x;", ["b.cu"]),
        ("cpp/two.hpp", "int x;  // why", ["a.cu"]),
        ("cpp/two.hpp", "  // why", []),
        ("table.csv", 'cuda/b.cu,"other",8,8,8,0,0', ["b.cu"]),
    ]:
        before = (project / name).read_text()
        (project / name).write_text(before + text)
        assert changed() == expected
        (project / name).write_text(before)
    for name, value in [("COMPILER", "13.1"), ("FLAGS", ("-O2",))]:
        with monkeypatch.context() as patch:
            patch.setattr(budgets, name, value)
            assert changed() == ["a.cu", "b.cu"]


DUMP = """
Fatbin elf code:
================
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:24 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:544 TEXTURE:0 SURFACE:0 SAMPLER:0
\tcode for sm_90
\t\tFunction : first
        /*0000*/                   LDG.E.128 R1, [R2] ;          /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe20000000800 */
        /*0010*/              @!PT LDS RZ, [RZ] ;                /* 0x00000000fffff984 */
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128.ZFILL [R9], [R2] ;
        /*0030*/              @UP0 LDG.E R1, [R2] ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0050*/                   LD.E R1, [R2] ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   LDSM.16.MT88.4 R4, [R2] ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""


def test_what_is_counted():
    ((symbol, architecture, resources, opcodes),) = budgets.functions(DUMP.splitlines())
    assert (symbol, architecture, resources) == ("first", "sm_90", (24, 8, 1024))
    first = Kernel(symbol, "", architecture, *resources, *budgets.counts(opcodes))
    assert first == Kernel(
        "first", "", "sm_90", 24, 8, 1024, mma=1, ldsm=1, loads=3, wide_loads=2, generic=1, barriers=1
    )
