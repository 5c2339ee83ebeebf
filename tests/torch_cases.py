"""Cases as torch tensors."""

import ml_dtypes
import numpy as np
import pytest

import fwp_core as fwp

torch = pytest.importorskip("torch")


SCAN = {"linear": fwp.torch.linear_attention, "delta": fwp.torch.delta_rule}
BACKWARD = {"linear": fwp.torch.linear_attention_backward, "delta": fwp.torch.delta_rule_backward}
STEP = {"linear": fwp.torch.linear_attention_step, "delta": fwp.torch.delta_rule_step}
INPUTS = ("q", "k", "v", "beta", "g", "initial_state")


def tensor(x, requires_grad=False):
    """A tensor in the memory of an array; None of None."""
    if x is None:
        return None
    if x.dtype == ml_dtypes.bfloat16:
        x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    else:
        x = torch.from_numpy(x)
    return x.requires_grad_() if requires_grad else x


def array(x):
    """The array of a tensor's values; None of None."""
    if x is None:
        return None
    x = x.detach().resolve_neg()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def tensors(case, requires_grad=False):
    """The six inputs of a case."""
    return [tensor(x, requires_grad) for x in (*case.inputs, case.initial_state)]


def present(xs):
    return [x for x in xs if x is not None]


def options(case):
    """The options of a scan, but for its initial state."""
    return {name: x for name, x in case.options.items() if name != "initial_state"}


def scan_of(case):
    """The scan of a case as a function of those of its inputs that are there."""
    function, more = SCAN[case.rule], options(case)
    there = [x is not None for x in (*case.inputs, case.initial_state)]

    def scan(*given):
        values = iter(given)
        inputs = [next(values) if yes else None for yes in there]
        return function(*inputs[:5], initial_state=inputs[5], **more)

    return scan


def scan(case, inputs):
    return SCAN[case.rule](*inputs[:5], initial_state=inputs[5], **options(case))


def loss(results, case):
    """What the gradients of a case are gradients of."""
    o, final_state = results
    total = (o * tensor(case.do)).sum()
    return total if case.dfinal_state is None else total + (final_state * tensor(case.dfinal_state)).sum()


def gradients(case):
    """By backward, in the order of the inputs, None where they are."""
    inputs = tensors(case, requires_grad=True)
    o, final_state = scan(case, inputs)
    incoming = [(o, tensor(case.do))]
    if case.dfinal_state is not None:
        incoming.append((final_state, tensor(case.dfinal_state)))
    torch.autograd.backward(*zip(*incoming, strict=True))
    return [None if x is None else x.grad for x in inputs]


def parameters(phi):
    """A feature map as the operators take it, its projection a tensor."""
    from fwp_core.adapters import torch_call

    return torch_call.parameters(phi)
