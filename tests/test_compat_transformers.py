"""Models of transformers, patched: the same functions, models and tokens as before, and everything undone."""

import copy
import importlib
import inspect

import pytest
from tolerances import DROP_IN, relative_error

import fwp_core as fwp

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

from fwp_core.compat import transformers as compat  # noqa: E402
from fwp_core.compat.transformers import FUNCTIONS, MODELS, patch, patched, unpatch  # noqa: E402

QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"


def module_of(model):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def functions_of(model):
    """What the module has of the functions, as they are now."""
    module = module_of(model)
    return {name: getattr(module, name) for name in FUNCTIONS if hasattr(module, name)}


def close(actual, expected, name=""):
    error = relative_error(actual.detach().double().numpy(), expected.detach().double().numpy())
    assert error <= DROP_IN, (name, error)


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    before = {model: functions_of(model) for model in MODELS}
    yield
    unpatch()
    assert {model: functions_of(model) for model in MODELS} == before


@pytest.fixture
def calls(monkeypatch):
    """The functions of fla that are called, by name: a test sees that it is this library that computes."""
    names = []

    def counted(function):
        def call(*args, **kwargs):
            names.append(function.__name__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(compat, "FUNCTIONS", {name: counted(f) for name, f in FUNCTIONS.items()})
    return names


# Patching


def test_all_models_are_patched_and_restored():
    before = {model: functions_of(model) for model in MODELS}
    assert patch() == tuple(f"transformers.models.{model}.modeling_{model}" for model in MODELS)
    for model in MODELS:
        functions = functions_of(model)
        assert len(functions) == 2, model
        for name, function in functions.items():
            assert function is not before[model][name]
            assert function.__wrapped__ is before[model][name]
            assert function.__name__ == name
    unpatch()
    assert {model: functions_of(model) for model in MODELS} == before


def test_twice_is_once():
    before = functions_of("qwen3_next")
    assert patch("qwen3_next") == patch("qwen3_next") == (QWEN,)
    once = functions_of("qwen3_next")
    patch("qwen3_next")
    assert functions_of("qwen3_next") == once
    unpatch()
    assert functions_of("qwen3_next") == before
    unpatch()
    assert functions_of("qwen3_next") == before


def test_one_model_can_be_patched():
    others = {model: functions_of(model) for model in MODELS if model != "qwen3_next"}
    patch("qwen3_next")
    assert {model: functions_of(model) for model in others} == others
    assert patch("kimi_linear") == (QWEN, "transformers.models.kimi_linear.modeling_kimi_linear")


def test_a_with_statement_leaves_things_as_they_were():
    before = functions_of("qwen3_next")
    with patched() as modules:
        assert QWEN in modules
        assert functions_of("qwen3_next") != before
    assert functions_of("qwen3_next") == before
    with pytest.raises(ZeroDivisionError), patched():
        raise ZeroDivisionError
    assert functions_of("qwen3_next") == before

    patch("qwen3_next")
    kept = functions_of("qwen3_next")
    with patched("qwen3_next", "kimi_linear"):
        pass
    assert functions_of("qwen3_next") == kept
    assert not hasattr(functions_of("kimi_linear")["chunk_kimi_delta_attention"].__wrapped__, "__wrapped__")


def test_what_others_replaced_since_stays(monkeypatch):
    module, name = module_of("qwen3_next"), "torch_chunk_gated_delta_rule"
    original = getattr(module, name)
    patch("qwen3_next")
    theirs = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: theirs(*args, **kwargs))
    unpatch()
    assert getattr(module, name) not in (theirs, original)
    setattr(module, name, original)


def test_an_unknown_model_is_refused():
    with pytest.raises(fwp.ArgumentError, match="models: expected names out of .* got 'mamba'"):
        patch("mamba")


def test_all_is_patched_or_nothing():
    before = {model: functions_of(model) for model in MODELS}
    with pytest.raises(fwp.ArgumentError, match="models: expected names out of .* got 'mamba'"):
        patch("qwen3_next", "mamba")
    assert {model: functions_of(model) for model in MODELS} == before


def test_what_is_found_is_that_of_this_call(monkeypatch):
    patch("qwen3_next")
    found = compat.find_spec
    monkeypatch.setattr(compat, "find_spec", lambda name: None if "kimi" in name else found(name))
    with pytest.raises(fwp.UnsupportedError, match="to have the functions of kimi_linear, got none"):
        patch("kimi_linear")


def test_a_version_without_these_models_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    with pytest.raises(fwp.UnsupportedError, match="models: expected transformers to have the functions"):
        patch()


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_other_devices_keep_the_function_that_was_there(name, monkeypatch):
    given = []
    monkeypatch.setattr(
        module_of("qwen3_next"), name, lambda query, *args, **kwargs: given.append((query, args, kwargs))
    )
    with patched("qwen3_next"):
        query = torch.zeros(1, 1, 1, 1, device="meta")
        functions_of("qwen3_next")[name](query, 2, 3, g=4, beta=5)
        functions_of("qwen3_next")[name](query=query, key=2)
    assert given == [(query, (2, 3), {"g": 4, "beta": 5}), (query, (), {"key": 2})]


@pytest.mark.parametrize("argument", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_keep_the_function_that_was_there(argument, monkeypatch):
    given = []
    name = "torch_chunk_gated_delta_rule"
    monkeypatch.setattr(module_of("qwen3_next"), name, lambda query, **kwargs: given.append((query, kwargs)))
    with patched("qwen3_next"):
        query, where = torch.zeros(1, 9, 1, 1), torch.tensor([0, 4, 9])
        functions_of("qwen3_next")[name](query, **{argument: where})
    assert given == [(query, {argument: where})]


# The functions


def inputs(name, T=70, dtype=torch.float32, state=True, size=1.0, seed=0):
    """Arguments of either function of a model; Kimi Delta Attention has gates of channels, and no groups."""
    generator = torch.Generator().manual_seed(seed)
    B, HV, K, V = 2, 4, 16, 8
    channels = "kimi" in name
    H = HV if channels else 2

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    g = -normal(B, T, HV, K if channels else 1).abs()
    tensors = [size * normal(B, T, H, K), size * normal(B, T, H, K), normal(B, T, HV, V)]
    tensors += [g if channels else g[..., 0], normal(B, T, HV).sigmoid()]
    initial_state = normal(B, HV, K, V) if state else None
    return [t.to(dtype) for t in tensors], initial_state


def both(model, name):
    """The function as it is in torch, beneath all wrappers, and as it is after a patch."""
    with patched(model):
        function = functions_of(model)[name]
    return inspect.unwrap(function), function


EVERY_FUNCTION = [(model, name) for model in MODELS for name in functions_of(model)]


@pytest.mark.parametrize(("model", "name"), EVERY_FUNCTION)
def test_functions_compute_the_same(model, name):
    original, function = both(model, name)
    for T, state, size in ((1, True, 1.0), (70, False, 1.0), (3, True, 1e-3)):
        arrays, initial_state = inputs(name, T=T, state=state, size=size)
        options = {
            "initial_state": initial_state,
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        }
        with torch.no_grad():
            for actual, expected in zip(
                function(*arrays, **options), original(*arrays, **options), strict=True
            ):
                assert actual.dtype == expected.dtype
                close(actual, expected)
            options["output_final_state"] = False
            assert function(*arrays, **options)[1] is None


@pytest.mark.parametrize(
    ("model", "name"), [key for key in EVERY_FUNCTION if key[0] in ("qwen3_next", "kimi_linear")]
)
def test_gradients_of_functions_are_the_same(model, name):
    original, function = both(model, name)
    arrays, initial_state = inputs(name, T=70 if "chunk" in name else 5)
    leaves = [t.requires_grad_() for t in (*arrays, initial_state)]
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(t.shape, generator=generator) for t in (arrays[2], initial_state)]
    found = []
    for run in (function, original):
        results = run(
            *arrays, initial_state=initial_state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        found.append(torch.autograd.grad(results, leaves, incoming))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_wrong_calls_are_those_of_the_original():
    arrays, _ = inputs("chunk", T=5)
    names = ("query", "key", "value", "g", "beta")
    original, function = both("qwen3_next", "torch_chunk_gated_delta_rule")
    for args, kwargs in (
        ((), {}),
        ((), dict(zip(names[1:], arrays[1:], strict=True))),
        (arrays, {"query": arrays[0]}),
        ((*arrays, *[None] * 20), {}),
    ):
        messages = []
        for run in (function, original):
            with pytest.raises(TypeError) as caught:
                run(*args, **kwargs)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_chunks_of_any_size():
    original, function = both("qwen3_next", "torch_chunk_gated_delta_rule")
    arrays, _ = inputs("chunk", T=20)
    close(function(*arrays, chunk_size=7)[0], original(*arrays, chunk_size=7)[0])


@pytest.mark.parametrize(
    ("model", "name"), [key for key in EVERY_FUNCTION if key[0] in ("qwen3_next", "kimi_linear")]
)
def test_autocast_leaves_dtypes_as_the_original_does(model, name):
    original, function = both(model, name)
    arrays, initial_state = inputs(name, T=5)
    options = {"initial_state": initial_state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected = original(*arrays, **options)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = original(*arrays, **options)
        ours = function(*arrays, **options)
    for actual, there, exact in zip(ours, theirs, expected, strict=True):
        assert actual.dtype == there.dtype == torch.float32
        close(actual, exact)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.*is deprecated")
@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_a_traced_function_computes_with_other_inputs(name):
    _, function = both("qwen3_next", name)

    def run(*arrays):
        *arrays, state = arrays
        return function(*arrays, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)

    first, others = ([*arrays, state] for arrays, state in (inputs(name, T=5, seed=n) for n in (0, 1)))
    traced = torch.jit.trace(run, tuple(first))
    for actual, expected in zip(traced(*others), run(*others), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_come_and_go(dtype):
    original, function = both("qwen3_next", "torch_chunk_gated_delta_rule")
    arrays, initial_state = inputs("chunk", dtype=dtype)
    options = {"initial_state": initial_state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    (o, state), (expected_o, expected_state) = function(*arrays, **options), original(*arrays, **options)
    assert o.dtype == expected_o.dtype == dtype
    assert state.dtype == expected_state.dtype == torch.float32
    # Normalised rows are rounded here, as fla does, and not there.
    bound = 4 * torch.finfo(dtype).eps
    assert relative_error(o.double().numpy(), expected_o.double().numpy()) <= bound
    assert relative_error(state.double().numpy(), expected_state.double().numpy()) <= bound


def test_positions_are_those_of_the_original():
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        original, function = both("qwen3_next", name)
        arrays, initial_state = inputs(name, T=5)
        positions = [64] if "chunk" in name else []
        arguments = (*arrays, *positions, initial_state, True, True)
        for actual, expected in zip(function(*arguments), original(*arguments), strict=True):
            close(actual, expected)


def fla_works():
    """Installed is not enough: without Triton it cannot be imported, and transformers does without it."""
    try:
        importlib.import_module("fla.ops.gated_delta_rule")
    except Exception:
        return False
    return True


without_fla = pytest.mark.skipif(fla_works(), reason="fla is there, and transformers uses it")


@without_fla
@pytest.mark.parametrize(("model", "name"), EVERY_FUNCTION)
@pytest.mark.parametrize("argument", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_are_refused_as_before(model, name, argument):
    """The convolutions of layers would mix them."""
    _, function = both(model, name)
    arrays, _ = inputs(name, T=9, state=False)
    where = torch.tensor([0, 4, 9]) if argument == "cu_seqlens" else torch.tensor([[0] * 4 + [1] * 5])
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        function(*(t[:1] for t in arrays), **{argument: where})
    function(*arrays, **{argument: None})


@pytest.mark.parametrize(
    ("model", "name"), [key for key in EVERY_FUNCTION if key[0] in ("qwen3_next", "kimi_linear")]
)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_computed_in_float32(model, name, dtypes):
    original, function = both(model, name)
    arrays, initial_state = inputs(name, T=5)
    mixed = [t.to(dtype) for t, dtype in zip(arrays, dtypes, strict=False)]
    arguments = (*mixed, *arrays[3:])
    options = {"initial_state": initial_state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    o, state = function(*arguments, **options)
    expected_o, expected_state = original(*arguments, **options)
    assert (o.dtype, state.dtype) == (expected_o.dtype, expected_state.dtype) == (dtypes[0], torch.float32)
    close(state, expected_state)
    error = relative_error(o.double().numpy(), expected_o.double().numpy())
    assert error <= max(DROP_IN, torch.finfo(dtypes[0]).eps)


# Models


COMMON = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = COMMON | {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
KIMI = COMMON | {
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
# (configuration, model, sizes)
TINY = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", GATED | EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", GATED),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", GATED | EXPERTS),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", GATED),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", KIMI),
}
every_model = pytest.mark.parametrize("model", TINY)


def make_model(model):
    config, model_class, sizes = TINY[model]
    torch.manual_seed(0)
    made = getattr(transformers, model_class)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)  # else what the first layers do is lost in the noise of the logits
    return made.eval()


def tokens(T=13):
    return torch.randint(3, 31, (2, T), generator=torch.Generator().manual_seed(0))


def train(model):
    """Loss of a training step, and the gradients of all parameters in one row."""
    model.zero_grad()
    loss = model(tokens(70), labels=tokens(70), use_cache=False).loss
    loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def decode(model):
    """Logits of a prefill, of tokens one by one after it, and of a few more at once."""
    ids, logits, cache = tokens(), [], None
    with torch.no_grad():
        for span in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 13)):
            out = model(ids[:, span], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1)


@every_model
def test_models_train_and_decode_the_same(model, calls):
    made_before = make_model(model)
    loss, gradients = train(made_before)
    logits = decode(made_before)
    assert calls == []
    with patched(model):
        for made in (made_before, make_model(model)):
            del calls[:]
            actual_loss, actual_gradients = train(made)
            assert calls
            close(actual_loss, loss)
            close(actual_gradients, gradients)
            del calls[:]
            close(decode(made), logits)
            assert {name.split("_")[0] for name in calls} == {"chunk", "fused"}
        made_within = make_model(model)
    del calls[:]
    close(decode(made_within), logits)
    assert calls == []


def test_generated_tokens_are_the_same():
    made = make_model("qwen3_next")
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    expected = made.generate(tokens(5), **options)
    with patched("qwen3_next"):
        assert torch.equal(made.generate(tokens(5), **options), expected)


def qwen_layer():
    """The fast weight layer of Qwen3-Next with gated, grouped heads."""
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(**GATED | EXPERTS)
    return module_of("qwen3_next").Qwen3NextGatedDeltaNet(config, 0)


def block_gradients(layer, x):
    """What comes out, and the gradients of the input and of all parameters, by name."""
    leaves = {"x": x} | dict(layer.named_parameters())
    y = layer(x)
    gradients = torch.autograd.grad(y.square().sum(), leaves.values())
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("T", [1, 64, 100])
def test_a_block_of_qwen3_next_is_the_same(T):
    """But for gradients of gates, sums that cancel: those of torch are farther from float64 than ours."""
    layer = qwen_layer()
    x = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    original = block_gradients(layer, x)
    with patched("qwen3_next"):
        ours = block_gradients(layer, x)
        exact = block_gradients(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    for name, expected in exact.items():
        assert expected.dtype == torch.float64, name
        close(ours[name], expected, name)
        if name not in ("A_log", "dt_bias"):
            close(ours[name], original[name], name)


@without_fla
def test_a_block_refuses_packed_sequences_as_before():
    layer, x = qwen_layer(), torch.randn(1, 9, 32)
    packed = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)}
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        layer(x, **packed)
    with patched("qwen3_next"), pytest.raises(ValueError, match="can't keep packed sequences apart"):
        layer(x, **packed)


def test_a_compiled_block_is_one_graph():
    layer, x = qwen_layer(), torch.randn(2, 20, 32)
    expected = layer(x)
    torch.compiler.reset()
    with patched("qwen3_next"):
        actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    close(actual, expected)


def test_padded_batches_are_the_same():
    made = make_model("qwen3_next")
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = made(tokens(), attention_mask=mask).logits
        with patched("qwen3_next"):
            close(made(tokens(), attention_mask=mask).logits, expected)
