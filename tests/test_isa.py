"""Instruction set levels: which exist, how one is chosen, and that they agree."""

import pytest
from cases import DECAYS, DTYPES, RULES, gradients, make_case, scan
from processes import run_python
from tolerances import REORDERED, assert_bits_equal, relative_error

import fwp_core as fwp

LEVELS = fwp.available_isas()


def test_levels_of_this_machine():
    assert isinstance(LEVELS, tuple)
    assert LEVELS[0] == "base"
    assert set(LEVELS) <= {"base", "v3", "v4", "neon"}
    assert fwp.isa() in LEVELS


@pytest.mark.parametrize("level", LEVELS)
def test_the_level_asked_for_runs(level):
    case = make_case("delta")
    with fwp.use_isa(level):
        assert fwp.isa() == level
        before = {name: fwp._core.isa_calls(name) for name in LEVELS}
        scan(case)
        gradients(case)
        after = {name: fwp._core.isa_calls(name) for name in LEVELS}
    assert [name for name in LEVELS if after[name] != before[name]] == [level]


def test_switching_is_at_once_and_the_context_restores():
    first, last = LEVELS[0], LEVELS[-1]
    with fwp.use_isa(last):
        fwp.use_isa(first)
        assert fwp.isa() == first
        with fwp.use_isa(last):
            assert fwp.isa() == last
        assert fwp.isa() == first
        with pytest.raises(RuntimeError, match="inside"), fwp.use_isa(last):
            raise RuntimeError("inside")
        assert fwp.isa() == first


@pytest.mark.parametrize("name", ["v9", "", "V3", "avx2"])
def test_unknown_levels_are_refused(name):
    before = fwp.isa()
    with pytest.raises(ValueError, match="base") as error:
        fwp.use_isa(name)
    assert repr(name) in str(error.value) or name in str(error.value)
    assert fwp.isa() == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule in RULES for decay in DECAYS])
def test_levels_agree_to_rounding(rule, decay, dtype):
    case = make_case(rule, decay, T=200, K=64, V=70, dtype=dtype)
    results = []
    for level in LEVELS:
        with fwp.use_isa(level):
            results.append([*scan(case), *gradients(case)])
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            if y is not None:
                assert relative_error(x, y) < 4 * REORDERED[x.dtype]


def test_block_size_is_shown():
    assert fwp.show_config(mode="dict")["block_size"] >= 1


CALL = """
import numpy as np
import fwp_core as fwp
x = np.ones((1, 3, 1, 4))
fwp.linear_attention(x, x, x)
print(fwp.isa(), [name for name in fwp.available_isas() if fwp._core.isa_calls(name)])
"""


@pytest.mark.parametrize("level", LEVELS)
def test_environment_chooses_the_level(level):
    done = run_python(CALL, FWP_ISA=level)
    assert done.stdout.split() == [level, f"['{level}']"], done.stderr


@pytest.mark.parametrize("level", ["", None])
def test_best_level_unless_chosen(level):
    done = run_python(CALL, FWP_ISA=level)
    assert done.stdout.split()[0] == LEVELS[-1], done.stderr


def test_unknown_level_in_the_environment_is_an_error():
    """Not a silent fallback: the message says what was asked for and what exists."""
    done = run_python(CALL, FWP_ISA="v9")
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert "FWP_ISA" in last_line
    assert "v9" in last_line
    assert all(level in last_line for level in LEVELS)


def test_a_switch_mid_way_keeps_arrays_usable():
    """State made at one level continues at another."""
    case = make_case("delta", T=20)
    with fwp.use_isa(LEVELS[0]):
        state = scan(case)[1]
    with fwp.use_isa(LEVELS[-1]):
        first = scan(case.but(initial_state=state))
        again = scan(case.but(initial_state=state))
    for x, y in zip(first, again, strict=True):
        assert_bits_equal(x, y)


def test_one_context_can_be_entered_again():
    first, last = LEVELS[0], LEVELS[-1]
    with fwp.use_isa(last):
        context = fwp.use_isa(first)
        for _ in range(2):
            fwp.use_isa(last)
            with context:
                assert fwp.isa() == first
            assert fwp.isa() == last


@pytest.mark.parametrize("name", [None, 3, b"base"])
def test_a_level_is_a_string(name):
    level = fwp.isa()
    with pytest.raises(fwp.DTypeError, match=f"^name: expected a string, got {type(name).__name__}$"):
        fwp.use_isa(name)
    assert fwp.isa() == level


def test_an_unknown_first_choice_can_be_seen_and_repaired():
    """FWP_ISA names no level: scans say so, show_config and use_isa still work."""
    code = """
import numpy as np
import fwp_core as fwp
x = np.ones((1, 1, 1, 1))
config = fwp.show_config(mode="dict")
assert config["isa"] is None and config["block_size"] == 0, config
try:
    fwp.linear_attention(x, x, x)
except fwp.ArgumentError as error:
    print(error)
fwp.use_isa("base")
print(fwp.isa(), fwp.linear_attention(x, x, x)[0].item())
"""
    said, works = run_python(code, FWP_ISA="bogus").stdout.splitlines()
    assert said.startswith("FWP_ISA: expected one of base")
    assert said.endswith("got bogus")
    assert works == "base 1.0"


def test_checkpoints_of_another_level_are_not_used():
    if len(LEVELS) < 2:
        pytest.skip("one level only")
    case = make_case("delta", "scalar", T=200, K=64, V=64)
    results = {}
    for made, used in ((LEVELS[0], LEVELS[-1]), (LEVELS[-1], LEVELS[-1])):
        with fwp.use_isa(made):
            _, pullback = fwp.vjp(fwp.delta_rule, *case.inputs, **case.options)
        with fwp.use_isa(used):
            results[made] = pullback(case.do, case.dfinal_state)
    for x, y in zip(*results.values(), strict=True):
        assert_bits_equal(x, y)
