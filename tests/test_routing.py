"""Which part of the package answers a call: that of the framework its first array belongs to."""

import inspect
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest

import fwp_core as fwp
from fwp_core import adapters

# Public function -> the argument it is routed by.
ROUTED = {
    "linear_attention": "q",
    "delta_rule": "q",
    "linear_attention_backward": "do",
    "delta_rule_backward": "do",
    "linear_attention_step": "q",
    "delta_rule_step": "q",
    "vjp": "q",
    "diagnose": "q",
}


class Stranger:
    """An array of a framework that the tests make up."""


@pytest.fixture
def framework(monkeypatch):
    """A framework "torch" whose arrays are Strangers, and an adapter that returns what it is called with."""
    calls = types.ModuleType("fwp_core.adapters.torch")
    for name in [*ROUTED, "feature_forward", "feature_backward"]:
        setattr(calls, name, lambda *args, _name=name, **kwargs: (_name, args, kwargs))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Stranger))
    monkeypatch.setitem(sys.modules, "fwp_core.adapters.torch", calls)
    monkeypatch.setattr(adapters, "torch", calls, raising=False)
    return calls


@pytest.mark.parametrize("name", ROUTED)
def test_the_adapter_of_the_array_takes_the_call(framework, name):
    x = Stranger()
    names = list(inspect.signature(getattr(fwp, name)).parameters)
    args = [x if n == ROUTED[name] else None for n in names[: names.index(ROUTED[name]) + 1]]
    assert getattr(fwp, name)(*args, scale=2.0) == (name, tuple(args), {"scale": 2.0})
    keywords = dict(zip(names, args, strict=False))
    assert getattr(fwp, name)(**keywords) == (name, (), keywords)


def test_feature_maps_are_routed_by_x(framework):
    phi, x, dy = fwp.feature_maps.ReLU(), Stranger(), object()
    assert phi(x) == ("feature_forward", (phi, x), {})
    assert phi.backward(dy, x) == ("feature_backward", (phi, dy, x), {})


@pytest.mark.parametrize("x", [np.zeros(3), [1.0], None, 1.0, object(), Stranger()])
def test_what_belongs_to_no_framework_needs_no_adapter(x):
    assert adapters.adapter(x) is None


def test_a_framework_that_is_half_imported_owns_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    assert adapters.adapter(Stranger()) is None


@pytest.mark.parametrize("module", [None, mock.MagicMock(), types.SimpleNamespace(Tensor="no type")])
def test_another_module_of_that_name_owns_nothing(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "torch", module)
    assert adapters.adapter(Stranger()) is None


@pytest.mark.parametrize("name", ROUTED)
def test_routed_functions_keep_their_face(name):
    function = getattr(fwp, name)
    assert function.__name__ == name
    assert function.__doc__
    assert ROUTED[name] in inspect.signature(function).parameters


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_functions_of_a_framework_have_the_same_parameters(framework, name):
    pytest.importorskip(framework)
    theirs = inspect.signature(getattr(getattr(fwp, framework), name)).parameters
    own = {"twice_differentiable"} if framework == "jax" else set()
    expected = inspect.signature(getattr(fwp, name)).parameters
    found = [(x.name, x.kind, x.default) for x in theirs.values() if x.name not in own]
    assert found == [(x.name, x.kind, x.default) for x in expected.values()]


@pytest.mark.parametrize("name", ROUTED)
def test_a_call_without_its_array_is_refused_by_name(name):
    with pytest.raises(TypeError, match=rf"{name}\(\) missing .*'{ROUTED[name]}'"):
        getattr(fwp, name)()


def test_modules_of_frameworks_are_imported_when_asked_for():
    code = """if True:
        import sys, types, fwp_core
        assert not {"fwp_core.torch", "fwp_core.jax", "fwp_core.compat"} & set(sys.modules)
        stub = sys.modules["fwp_core.torch"] = types.ModuleType("fwp_core.torch")
        assert fwp_core.torch is stub
        try:
            fwp_core.nothing
        except AttributeError as error:
            print(error)
    """
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == "module 'fwp_core' has no attribute 'nothing'\n"
