"""Kernels on a GPU, through torch: sizes that models have, every kind of gate, equal bits; also on the CPU.

FWP_GPU=required: without a GPU these tests fail instead of being skipped.
"""

import os

import ml_dtypes
import numpy as np
import pytest
from cases import BACKWARD, DECAYS, RULES, SCAN, STEP, exact_gradients, exact_scan, make_case
from tolerances import DEVICE, relative_error

import fwp_core as fwp

torch = pytest.importorskip("torch")
torch_cases = pytest.importorskip("torch_cases")

NAMES = ("q", "k", "v", "beta", "g", "initial_state")
DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
# Of one chunk and less, of several and a part, with K and V that fill tiles or do not.
SIZES = (
    {"T": 9, "K": 8, "V": 12},
    {"T": 130, "K": 64, "V": 64},
    {"T": 200, "K": 128, "V": 128},
    {"T": 67, "K": 40, "V": 100},
    {"T": 70, "K": 256, "V": 32},
)

every_rule = pytest.mark.parametrize("rule", RULES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
halves = pytest.mark.parametrize("dtype", DTYPES[2:], ids=["float16", "bfloat16"])
# On the CPU one size is enough.
every_size = pytest.mark.parametrize(
    ("device", "sizes"),
    [("cpu", SIZES[0]), *(("cuda", sizes) for sizes in SIZES)],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
    indirect=["device"],
)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and os.environ.get("FWP_GPU") != "required":
        if not torch.cuda.is_available():
            pytest.skip("no GPU here")
        if not fwp.has_cuda():
            pytest.skip(f"no CUDA back end here: {fwp.show_config('dict')['cuda']}")
    return request.param


def tensor(x, device):
    return None if x is None else torch_cases.tensor(x).to(device)


def array(x):
    return torch_cases.array(x.cpu())


class There:
    """A case's tensors on a device."""

    def __init__(self, case, device):
        arrays = dict(zip(NAMES, (*case.inputs, case.initial_state), strict=True))
        self.case, self.inputs = case, {name: tensor(x, device) for name, x in arrays.items()}
        self.do, self.dfinal_state = tensor(case.do, device), tensor(case.dfinal_state, device)
        self.options = {name: x for name, x in case.options.items() if name != "initial_state"}

    def scan(self, **options):
        return SCAN[self.case.rule](**self.inputs, **self.options, **options)

    def gradients(self, **options):
        return BACKWARD[self.case.rule](
            self.do, **self.inputs, dfinal_state=self.dfinal_state, **self.options, **options
        )

    def everything(self):
        return [*self.scan(), *(x for x in self.gradients() if x is not None)]


def assert_exact(found, exact, case, name=""):
    error = relative_error(array(found), exact, floor=1.0)
    assert error <= DEVICE[np.dtype(case.v.dtype).name], f"{name}: error {error:.2g}"


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def are_the_oracles(case, device):
    there = There(case, device)
    exact_o, exact_state = exact_scan(case)
    poison = There(case.map(lambda x: np.full_like(x, np.nan)), device)  # memory that results come to lie in
    del poison
    o, final_state = there.scan()
    assert o.device.type == final_state.device.type == device
    assert_exact(o, exact_o, case, "o")
    assert_exact(final_state, exact_state, case, "final_state")
    exact = exact_gradients(case)
    for name, x, y in zip(exact._fields, there.gradients(), exact, strict=True):
        if y is not None:
            assert_exact(x, y, case, name)


@every_size
@every_dtype
@pytest.mark.parametrize("decay", DECAYS)
@every_rule
def test_results_are_the_oracles(device, rule, decay, dtype, sizes):
    are_the_oracles(make_case(rule, decay, dtype=dtype, heads=(1, 2, 2), B=2, **sizes), device)


@pytest.mark.parametrize("gate", ["positive", "strong", "reset", "mixed"])
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@halves
@every_rule
def test_gates_of_every_kind(device, rule, decay, dtype, gate):
    case = make_case(rule, decay, dtype=dtype, gate=gate, gate_dtype=np.float32, B=1, T=150, K=64, V=64)
    are_the_oracles(case, device)


@halves
@every_rule
def test_packed_sequences(device, rule, dtype):
    lengths = (64, 0, 1, 150, 63)
    case = make_case(rule, "scalar", dtype=dtype, lengths=lengths, K=64, V=64)
    are_the_oracles(case, device)
    there = There(case, device)
    expected = there.everything()
    there.options["cu_seqlens"] = torch.tensor(case.cu_seqlens, device=device)
    assert_same(there.everything(), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "l2"},
        {"feature_map": ("DPFP", 1), "qk_norm": "sum"},
        {"feature_map": ("ELU1",), "qk_norm": "sum", "attention_norm": True},
    ],
    ids=str,
)
@halves
@every_rule
def test_features(device, rule, dtype, options):
    are_the_oracles(make_case(rule, "scalar", dtype=dtype, B=1, T=130, K=32, V=64, **options), device)


def test_offsets_that_cannot_be(device):
    there = There(make_case("delta", lengths=(3, 2), dtype=np.float16, K=64, V=64), device)
    expected = there.everything()
    there.options["cu_seqlens"] = torch.tensor([0, 3, 4], device=device)
    if device == "cpu":
        with pytest.raises(fwp.ArgumentError):
            there.scan()
        return
    found = there.scan()
    torch.cuda.synchronize()
    with pytest.raises(fwp.CudaError, match=r"^delta_rule, an earlier call: cu_seqlens: expected offsets"):
        fwp.check_device()
    assert_same(found, expected[:2])  # clamped, they are those of before


@halves
@every_rule
def test_long_sequences(device, rule, dtype):
    T = 2048 if device == "cuda" else 256
    case = make_case(rule, "scalar", dtype=dtype, gate_dtype=np.float32, B=1, T=T, K=128, V=128)
    wide = case.map(lambda x: x.astype(np.float64))
    found, exact = There(case, device).everything(), There(wide, "cpu").everything()
    for x, y in zip(found, exact, strict=True):
        assert_exact(x, array(y), case)


@every_dtype
@every_rule
def test_steps_are_a_scan(device, rule, dtype):
    case = make_case(rule, "scalar", dtype=dtype, heads=(1, 2, 4), B=3, T=4, K=64, V=128)
    there = There(case, device)
    o, final_state = there.scan()
    state = there.inputs.pop("initial_state").clone()
    memory = state.data_ptr()
    for t in range(4):
        token = {name: None if x is None else x[:, t] for name, x in there.inputs.items()}
        step = STEP[rule](**token, state=state, scale=case.scale)
        error = relative_error(array(step), array(o[:, t]), floor=1.0)
        assert error <= 2 * DEVICE[np.dtype(dtype).name]
    assert state.data_ptr() == memory
    assert_exact(state, array(final_state), case, "state")


@halves
@every_rule
def test_a_sequence_does_not_know_what_is_beside_it(device, rule, dtype):
    case = make_case(rule, "scalar", dtype=dtype, B=3, T=130, K=64, V=64)
    whole = There(case, device).everything()
    alone = There(case.map(lambda x: x[1:2]), device).everything()
    assert_same(alone, [x[1:2] for x in whole])


@every_dtype
@every_rule
def test_layouts_do_not_matter(device, rule, dtype):
    there = There(make_case(rule, "channel", dtype=dtype, B=2, T=70, K=64, V=64), device)
    expected = there.everything()

    def heads_first(x):
        return None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2)

    there.inputs = {name: heads_first(x) for name, x in there.inputs.items()}
    there.do = heads_first(there.do)
    assert_same(there.everything(), expected)


@halves
@every_rule
def test_a_call_repeats_bit_for_bit(device, rule, dtype):
    there = There(make_case(rule, "scalar", dtype=dtype, B=2, T=300, K=128, V=128), device)
    expected = there.everything()
    for _ in range(3):
        assert_same(there.everything(), expected)


@halves
@every_rule
def test_a_number_that_is_none_goes_where_it_is_used_and_nowhere_else(device, rule, dtype):
    case = make_case(rule, "scalar", dtype=dtype, B=2, T=150, K=64, V=64)
    there = There(case, device)
    clean, _ = there.scan()
    there.inputs["v"][0, 100, 1, 3] = float("nan")
    o, final_state = there.scan()
    beside = [(slice(1, 2), slice(None)), (slice(None), slice(0, 1))]  # the other sequence, the other head
    for b, h in beside:
        assert_same([o[b, :, h]], [clean[b, :, h]])
    assert torch.isfinite(o[0, :100, 1]).all()
    # The delta rule's error has it in its own column of the state only.
    assert torch.isnan(o[0, 100:, 1, 3]).all()
    assert torch.isfinite(o[0, :, 1, :3]).all()
    assert torch.isnan(final_state[0, 1, :, 3]).any()
