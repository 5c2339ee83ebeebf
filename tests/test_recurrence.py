"""The scans as plain functions of arrays: on torch, against the oracle, with torch's own gradients."""

import numpy as np
import oracle
import pytest
from cases import exact_gradients, exact_scan, make_case
from hypothesis import given
from strategies import cases, feature_cases
from tolerances import assert_close, assert_gradients_close
from torch_cases import array, loss, parameters, present, tensors

from fwp_core.adapters import recurrence

torch = pytest.importorskip("torch")


precise = {"dtypes": (np.float64,), "times": (0, 1, 2, 7), "sizes": (0, 1, 3, 8)}


def rule_of(case):
    phi = parameters(case.options.get("feature_map"))
    return recurrence.Rule(case.rule == "delta", phi, case.qk_norm, case.attention_norm, case.eps, case.scale)


def run(case, inputs, loop=None):
    lengths = None if case.cu_seqlens is None else case.cu_seqlens.tolist()
    inputs = [None if x is None else x.to(inputs[2].dtype) for x in inputs]
    return recurrence.scan(torch, rule_of(case), *inputs, lengths, loop)


def is_the_oracles(case):
    inputs = tensors(case, requires_grad=True)
    o, final_state = run(case, inputs)
    exact_o, exact_state = exact_scan(case)
    assert_close(array(o), exact_o, "forward", "o")
    assert_close(array(final_state), exact_state, "forward", "final_state")
    zero = sum(x.sum() * 0 for x in present(inputs))  # what no output depends on has a gradient, of zero
    (loss((o, final_state), case) + zero).backward()
    assert_gradients_close([x if x is None else array(x.grad) for x in inputs], exact_gradients(case))


@given(case=cases(**precise))
def test_is_the_oracles(case):
    is_the_oracles(case)


@given(case=feature_cases(**precise))
def test_features_are_the_oracles(case):
    is_the_oracles(case)


@pytest.mark.parametrize("rule", oracle.RULES)
@pytest.mark.parametrize("lengths", [None, (3, 0, 4)])
@pytest.mark.parametrize("phi", [None, ("DPFP", 2)])
def test_attention_norm(rule, lengths, phi):
    norm = {"attention_norm": True, "feature_map": phi, "eps": 1e-3}
    is_the_oracles(make_case(rule, "scalar", T=7, K=5, V=3, lengths=lengths, dtype=np.float64, **norm))


def test_rows_without_a_norm():
    """Zero rows give zeros and zero gradients, of the second order too."""
    for qk_norm in ("sum", "l2"):
        case = make_case("delta", T=4, K=3, V=2, dtype=np.float64, qk_norm=qk_norm)
        case.q[:, 1], case.k[:, 2] = 0, 0
        is_the_oracles(case)
        inputs = tensors(case, requires_grad=True)
        o, _ = run(case, inputs)
        (dk,) = torch.autograd.grad(o.sum(), inputs[1], create_graph=True)
        assert dk.square().sum().isfinite()
        assert all(x.isfinite().all() for x in torch.autograd.grad(dk.square().sum(), inputs[:4]))


def test_large_and_small_rows():
    """Neither the squares of a row nor the features of FAVOR overflow where the result does not."""
    case = make_case("linear", T=3, K=3, V=2, qk_norm="l2")
    case.q[...] *= 1e30
    case.k[...] *= 1e-30
    is_the_oracles(case)
    case = make_case("linear", T=3, K=3, V=2, feature_map=("FAVOR", 4), qk_norm="sum", dtype=np.float64)
    near, far = case.but(k=case.k * 5), case.but(k=case.k * 5)
    far.k[...] *= 100
    assert np.isfinite(array(run(far, tensors(far))[0])).all()
    is_the_oracles(near)


def test_a_loop_of_the_framework():
    """Packed or not, all tokens of a sequence go through ``loop``, which may be jax.lax.scan."""
    walked = []

    def loop(step, state, tokens):
        rows = []
        walked.append(tokens[0].shape[0])
        for token in zip(*tokens, strict=True):
            state, o = step(state, token)
            rows.append(o)
        return state, torch.stack(rows)

    for lengths, expected in ((None, [6]), ((4, 2), [4, 2])):
        case = make_case("delta", "channel", B=1, T=6, lengths=lengths, K=3, V=2, dtype=np.float64)
        walked.clear()
        o, final_state = run(case, tensors(case), loop)
        assert walked == expected
        assert torch.equal(o, run(case, tensors(case))[0])
        assert_close(array(final_state), exact_scan(case)[1], "forward", "final_state")
