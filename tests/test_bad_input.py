"""Every function, every argument, every way to be wrong: the documented error, and nothing touched."""

import array
import itertools

import ml_dtypes
import numpy as np
import pytest
from arguments import FUNCTIONS, SIZES, accepted, dtype_of, get, good, put, refused
from cases import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import fwp_core as fwp

POSITIONS = [
    pytest.param(function, position, id=f"{name}-{position}")
    for name, function in FUNCTIONS.items()
    for position in function.positions
]
OUTPUTS = [
    pytest.param(function, position, id=f"{name}-{position}")
    for name, function in FUNCTIONS.items()
    for position in function.outputs
]
SIZED = [
    pytest.param(function, letter, id=f"{name}-{letter}")
    for name, function in FUNCTIONS.items()
    for letter in ("BTHKV" if function.time else "BHKV")
]
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


class Subclass(np.ndarray):
    pass


class Pretender:
    """Says that it is an array; nobody should ask."""

    shape = (2, 3, 5, 4)
    dtype = np.dtype(np.float32)

    def __array__(self, *arguments, **options):
        raise AssertionError("asked for an array")


# ---- not an array, or an array of something else ----


def strangers(x):
    """Objects that are no arrays, made from one that would do."""
    return [
        x.tolist(),
        tuple(x),
        1.0,
        np.float32(1),
        np.ma.masked_array(x),
        x.view(Subclass),
        np.rec.array(x),
        memoryview(x),
        array.array("f", x.ravel()),
        bytes(x),
        "array",
        {"q": x},
        {1.0},
        iter(x),
        Pretender(),
        np.ndarray,
        np.zeros,
        Ellipsis,
    ]


@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_objects_that_are_no_arrays(function, position):
    arguments = good(function)
    for stranger in strangers(get(arguments, position)):
        message = refused(function, put(arguments, position, stranger), fwp.DTypeError)
        no_subclass = ", no subclass of numpy.ndarray" if isinstance(stranger, np.ndarray) else ""
        assert message == f"{position}: expected an array{no_subclass}, got {type(stranger).__name__}" or (
            # Types of the standard library are named with their module.
            message.endswith(f".{type(stranger).__name__}")
        )


@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_none(function, position):
    arguments = put(good(function), position, None)
    if function.required(position):
        assert refused(function, arguments, fwp.DTypeError).startswith(f"{position}: ")
    else:
        gradients = {"beta": "out.dbeta", "g": "out.dg", "initial_state": "out.dinitial_state"}
        if function.kind == "backward" and position in gradients:
            refused(function, arguments, fwp.ArgumentError)
            arguments = put(arguments, gradients[position], None)
        accepted(function, arguments)


ALL_DTYPES = [
    *(np.dtype(code) for code in "?bBhHiIlLqQefdgFDGO"),
    *(np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3, ml_dtypes.int4)),
    np.dtype(ml_dtypes.bfloat16).newbyteorder(),
    *(np.dtype(code) for code in ("S4", "U1", "V4", "M8[s]", "m8[s]", "f4,f4", ">f4", ">f8", ">i8")),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_dtypes(function, position, dtype):
    arguments = good(function, dtype)
    for other in ALL_DTYPES:
        if other == np.float32 and position in ("beta", "g"):
            continue  # may be float32 whatever the others are
        changed = put(arguments, position, np.zeros(get(arguments, position).shape, other))
        if other == dtype_of(position, dtype):
            accepted(function, changed)
            continue
        message = refused(function, changed, fwp.DTypeError)
        if position == "q" and other in DTYPES:
            assert message.startswith("k: expected dtype")  # q decides what the others must be
        else:
            assert message.startswith(f"{position}: expected dtype")


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_FUNCTION
def test_float32_gates(function, dtype):
    arguments = good(function, dtype)
    for gate in ("beta", "g"):
        arguments = put(arguments, gate, arguments[gate].astype(np.float32))
        if function.kind == "backward":
            arguments = put(arguments, f"out.d{gate}", np.zeros(arguments[gate].shape, np.float32))
    accepted(function, arguments)


# ---- shapes ----


@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_ranks(function, position):
    arguments = good(function)
    x = get(arguments, position)
    for rank in range(7):
        if rank == x.ndim or (position == "g" and rank == x.ndim + 1):
            continue
        shape = (x.shape + (1, 1, 1, 1))[:rank]
        message = refused(function, put(arguments, position, np.zeros(shape, x.dtype)), fwp.ShapeError)
        if function.kind == "step" and position == "q" and rank in (3, 4):
            assert message.startswith("k: expected shape (")  # the rank of q decides
            continue
        assert message.startswith(f"{position}: expected shape (")
        assert message.endswith(f"got {shape}")


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_sizes(function, position, channel):
    arguments = good(function, channel=channel)
    x = get(arguments, position)
    for axis, change in itertools.product(range(x.ndim), (-1, 1)):
        shape = [size + change * (i == axis) for i, size in enumerate(x.shape)]
        refused(function, put(arguments, position, np.zeros(shape, x.dtype)), fwp.ShapeError)


@EVERY_FUNCTION
def test_numbers_of_heads(function):
    for heads in itertools.product(range(5), repeat=3):
        H = max(heads)
        arguments = good(function, heads=heads, sizes=(2, 3, H, 4, 6))
        if all(n == H or (n and H % n == 0) for n in heads):
            accepted(function, arguments)
        else:
            assert f"divides H={H}" in refused(function, arguments, fwp.ShapeError)


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize(("function", "zero"), SIZED)
def test_empty_sizes(function, zero, channel):
    sizes = tuple(0 if name == zero else size for name, size in zip("BTHKV", SIZES, strict=True))
    arguments = good(function, channel=channel, sizes=sizes)
    before = np.copy(arguments.get("state"))
    result = accepted(function, arguments)
    if function.kind == "backward":
        if zero in "KV":
            assert all((d == 0).all() for d in result)
        elif zero == "T":
            assert np.array_equal(result.dinitial_state, arguments["dfinal_state"])
    elif function.kind == "scan":
        assert (result[0] == 0).all()
        if zero == "T":
            assert np.array_equal(result[1], arguments["initial_state"])
    else:
        assert (result == 0).all()
        if zero == "T":
            assert np.array_equal(arguments["state"], before)


# ---- memory ----


def structured(x):
    """The same values in a field of packed records of 5 or 9 bytes."""
    records = np.zeros(x.shape, np.dtype([("x", x.dtype), ("gap", "u1")]))
    records["x"] = x
    return records["x"]


def misaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_fields_of_packed_records(function, position):
    arguments = good(function)
    arguments = put(arguments, position, structured(get(arguments, position)))
    assert "item size of 4 bytes" in refused(function, arguments, fwp.ArgumentError)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_misaligned_data(function, position, dtype):
    arguments = good(function, dtype)
    arguments = put(arguments, position, misaligned(get(arguments, position)))
    assert "aligned" in refused(function, arguments, fwp.ArgumentError)


@pytest.mark.parametrize(("function", "position"), POSITIONS)
def test_strides_beyond_the_address_space(function, position):
    arguments = good(function)
    x = get(arguments, position)
    for stride in (1 << 61, -(1 << 61), (1 << 62) - 4, 4 - (1 << 62)):
        strides = (stride, *x.strides[1:])
        if (x.shape[0] - 1) * abs(stride) < 1 << 63:
            refused(function, put(arguments, position, as_strided(x, strides=strides)), fwp.ArgumentError)


@pytest.mark.parametrize(("function", "name"), SIZED)
def test_sizes_beyond_64_bits(function, name):
    """A few bytes with stride 0 pass for an enormous array."""
    sizes = dict(zip("BTHKV", (1, 1, 1, 1, 1), strict=True))
    arguments = good(function, sizes=tuple(sizes.values()))
    axes = {
        "q": "BTHK",
        "k": "BTHK",
        "v": "BTHV",
        "beta": "BTH",
        "g": "BTH",
        "initial_state": "BHKV",
        "do": "BTHV",
        "dfinal_state": "BHKV",
        "state": "BHKV",
        "out": "BTHV",
        "final_state_out": "BHKV",
    }
    if not function.time:
        axes = {key: value if key == "state" else value.replace("T", "") for key, value in axes.items()}
    for bits in (40, 57, 60):
        huge = dict(arguments)
        for key, letters in axes.items():
            if isinstance(huge.get(key), np.ndarray):
                shape = [1 << bits if letter == name else 1 for letter in letters]
                huge[key] = as_strided(huge[key], shape, [0] * len(shape))
        if function.kind == "backward":
            huge["out"] = None
        # If not the inputs, then outputs of stride 0 are wrong, or new ones do not fit into memory.
        refused(function, huge, (fwp.ArgumentError, MemoryError))


@pytest.mark.parametrize(("function", "position"), OUTPUTS)
def test_outputs_over_inputs(function, position):
    arguments = good(function)
    out = get(arguments, position)
    for name in function.inputs:
        # One buffer holds the input, then a tail; the output starts somewhere in it.
        x = arguments[name]
        buffer = np.zeros(x.size + 2 * out.size, np.float32)
        source = buffer[: x.size].reshape(x.shape)
        source[...] = x
        for shift in {0, 1, x.size // 2, x.size - 1}:
            target = buffer[shift : shift + out.size].reshape(out.shape)
            for view in (target, target[::-1], target[..., ::-1]):
                changed = put(put(arguments, name, source), position, view)
                message = refused(function, changed, fwp.ArgumentError)
                assert message.startswith(f"{position}: ")
                assert message.endswith(f"shares memory with {name}")
        beside = buffer[x.size : x.size + out.size].reshape(out.shape)
        accepted(function, put(put(good(function), name, source), position, beside))


@EVERY_FUNCTION
def test_outputs_over_outputs(function):
    for first, second in itertools.combinations(function.outputs, 2):
        arguments = good(function)
        a, b = get(arguments, first), get(arguments, second)
        buffer = np.zeros(a.size + b.size, np.float32)
        left = buffer[: a.size].reshape(a.shape)
        over = buffer[a.size - 1 : a.size - 1 + b.size].reshape(b.shape)
        beside = buffer[a.size :].reshape(b.shape)
        message = refused(function, put(put(arguments, first, left), second, over), fwp.ArgumentError)
        assert first in message
        assert second in message
        arguments = put(put(arguments, first, left), second, beside)
        if "state" in arguments:
            arguments["state"][...] = 0
        accepted(function, arguments)


@pytest.mark.parametrize(("function", "position"), OUTPUTS)
def test_outputs_that_overlap_themselves(function, position):
    arguments = good(function)
    x = get(arguments, position)
    for axis in range(x.ndim):
        # Broadcast along one axis, and a window that slides by less than it holds.
        for stride in (0, 4 if axis < x.ndim - 1 else 0):
            strides = (*x.strides[:axis], stride, *x.strides[axis + 1 :])
            view = as_strided(x, strides=strides)
            assert "its own elements" in refused(function, put(arguments, position, view), fwp.ArgumentError)


@pytest.mark.parametrize(("function", "position"), OUTPUTS)
def test_read_only_outputs(function, position):
    arguments = good(function)
    get(arguments, position).flags.writeable = False
    message = refused(function, arguments, fwp.ReadOnlyError)
    assert message == f"{position}: expected a writable array, got a read-only one"


@EVERY_FUNCTION
def test_read_only_inputs(function):
    expected = accepted(function, good(function))
    arguments = good(function)
    for name in function.inputs:
        arguments[name].flags.writeable = False
    for one, other in zip(accepted(function, arguments), expected, strict=True):
        assert np.array_equal(one, other)


@EVERY_FUNCTION
def test_inputs_that_alias_each_other(function):
    sizes = (2, 3, 5, 4, 4)
    arguments = good(function, sizes=sizes)
    arguments["k"] = arguments["v"] = arguments["q"]
    if "do" in arguments:
        arguments["do"] = arguments["q"]
        arguments["dfinal_state"] = arguments["initial_state"]
    apart = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    if function.kind == "backward":
        apart["out"] = None
    for one, other in zip(accepted(function, arguments), accepted(function, apart), strict=True):
        assert np.array_equal(one, other)


# ---- which views overlap ----


def test_disjoint_views_of_one_buffer():
    B, T, H, K = 2, 7, 3, 4
    rng = np.random.default_rng(0)
    qkvo = rng.standard_normal((B, T, 4, H, K)).astype(np.float32)
    q, k, v, o = (qkvo[:, :, i] for i in range(4))
    expected, _ = fwp.linear_attention(q.copy(), k.copy(), v.copy())
    result, _ = fwp.linear_attention(q, k, v, out=o)
    assert result is o
    assert np.array_equal(o, expected)

    every_other = np.repeat(q, 2, axis=1)
    out = every_other[:, 1::2]
    fwp.linear_attention(every_other[:, ::2], k, v, out=out[:, ::-1])
    assert np.array_equal(out[:, ::-1], expected)

    columns = np.zeros((B, T, H, 2 * K), np.float32)
    columns[..., ::2] = q
    fwp.linear_attention(columns[..., ::2], k, v, out=columns[..., 1::2])
    assert np.array_equal(columns[..., 1::2], expected)
    with pytest.raises(fwp.ArgumentError, match="shares memory with q"):
        fwp.linear_attention(columns[..., ::2], k, v, out=columns[..., ::2])


@st.composite
def views(draw, buffer, shape):
    """A view of this shape: any axes of the buffer in any order, with steps and directions of any kind."""
    axes = draw(st.permutations(range(buffer.ndim)))
    view = buffer.transpose(axes)
    index = []
    for have, want in zip(view.shape, shape, strict=False):
        most = (have - 1) // (want - 1) if want > 1 else 1
        step = draw(st.integers(1, max(1, most)))
        start = draw(st.integers(0, have - 1 - step * (want - 1)))
        part = slice(start, start + step * (want - 1) + 1, step)
        index.append((part, draw(st.booleans())))
    view = view[tuple(part for part, _ in index)]
    return view[tuple(slice(None, None, -1 if back else 1) for _, back in index)]


@given(st.data())
def test_views_are_refused_exactly_where_they_share_memory(data):
    buffer = np.zeros((6, 6, 6, 6))
    shape = data.draw(st.tuples(*[st.integers(1, 3)] * 4))
    initial_state = data.draw(views(buffer, shape))
    final_state_out = data.draw(views(buffer, shape))
    B, H, K, V = shape
    arguments = {
        "q": np.zeros((B, 0, H, K)),
        "k": np.zeros((B, 0, H, K)),
        "v": np.zeros((B, 0, H, V)),
        "initial_state": initial_state,
        "final_state_out": final_state_out,
    }
    if np.shares_memory(initial_state, final_state_out):
        with pytest.raises(fwp.ArgumentError, match="final_state_out: .* shares memory with initial_state"):
            fwp.linear_attention(**arguments)
    else:
        initial_state[...] = 1
        fwp.linear_attention(**arguments)
        assert (final_state_out == 1).all()


@given(st.data())
def test_any_strides_are_refused_where_they_share_memory(data):
    """Strides that no slicing makes: never an overlap missed, and gaps of a common divisor are seen."""
    strides = st.tuples(*[st.integers(-12, 12)] * 2)
    shape = (1, 1, *data.draw(st.tuples(*[st.integers(1, 4)] * 2)))
    buffer = np.zeros(400)

    def view():
        inner = data.draw(strides)
        return as_strided(
            buffer[data.draw(st.integers(150, 250)) :], shape, [8, 8, *(8 * stride for stride in inner)]
        )

    initial_state, final_state_out = view(), view()
    K, V = shape[2:]
    q, v = np.zeros((1, 0, 1, K)), np.zeros((1, 0, 1, V))
    offset = (final_state_out.ctypes.data - buffer.ctypes.data) // 8
    k, j = np.indices((K, V))
    places = offset + k * (final_state_out.strides[2] // 8) + j * (final_state_out.strides[3] // 8)
    itself = len(np.unique(places)) < places.size
    try:
        fwp.linear_attention(q, q, v, initial_state=initial_state, final_state_out=final_state_out)
    except fwp.ArgumentError as error:
        if "shares memory with" in str(error):
            assert np.shares_memory(initial_state, final_state_out)
    else:
        assert not itself
        assert not np.shares_memory(initial_state, final_state_out)


def test_long_interleaved_arrays():
    """Thousands of elements that pass each other without meeting: every 6th and every 4th, 20001 apart."""
    K = 20000
    buffer = np.zeros(6 * K)
    initial_state = as_strided(buffer, (1, 1, K, 1), (8, 8, 48, 8))
    final_state_out = as_strided(buffer[20001:], (1, 1, K, 1), (8, 8, 32, 8))
    empty = np.zeros((1, 0, 1, K)), np.zeros((1, 0, 1, K)), np.zeros((1, 0, 1, 1))
    initial_state[...] = 1
    fwp.linear_attention(*empty, initial_state=initial_state, final_state_out=final_state_out)
    assert (final_state_out == 1).all()
    final_state_out = as_strided(buffer[20000:], (1, 1, K, 1), (8, 8, 32, 8))
    with pytest.raises(fwp.ArgumentError, match="shares memory"):
        fwp.linear_attention(*empty, initial_state=initial_state, final_state_out=final_state_out)


# ---- packed sequences ----


def packed(function, cu_seqlens, T=6):
    arguments = good(function, sizes=(1, T, 2, 3, 4))
    N = 3
    for name, x in arguments.items():
        if isinstance(x, np.ndarray) and "state" in name:
            arguments[name] = np.repeat(x, N, axis=0)
    if function.kind == "backward":
        arguments["out"] = None
    return arguments | {"cu_seqlens": cu_seqlens}


SCANS = pytest.mark.parametrize(
    "function",
    [f for f in FUNCTIONS.values() if f.kind != "step"],
    ids=[name for name, f in FUNCTIONS.items() if f.kind != "step"],
)


@SCANS
@pytest.mark.parametrize("offsets", [[0, 2, 2, 6], [0, 0, 6, 6], [0, 6, 6, 6]])
def test_offsets_of_every_integer_kind(function, offsets):
    expected = accepted(function, packed(function, offsets))
    kinds = [
        tuple(offsets),
        array.array("q", offsets),
        bytearray(offsets),
        [np.int32(n) for n in offsets],
        *(np.array(offsets, dtype) for dtype in ("i1", "u1", "i2", "i4", "u4", "i8", "u8", ">i4", ">i8")),
        np.repeat(np.array(offsets), 2)[::2],
        np.array(offsets[::-1], np.int32)[::-1],
    ]
    for kind in kinds:
        for one, other in zip(accepted(function, packed(function, kind)), expected, strict=True):
            assert np.array_equal(one, other)


@SCANS
def test_offsets_that_are_no_integers(function):
    zoo = [6, 6.0, "06", b"\x00\x06", {0, 6}, {0: 6}, iter([0, 6]), [0, 6.0], [0, None], ["0", "6"], [0j, 6]]
    zoo += [[False, 6], [np.True_, 6], [0, [6]], [[0], [6]], [np.array([0]), np.array([6])]]
    zoo += [np.array([0, 6.0]), np.array([0, 6], "O"), np.array([False, True]), np.array(6.0)]
    zoo += [np.ma.array([0, 2, 2, 6]), np.array([0, 2, 2, 6]).view(Subclass), np.array([0, 6], "m8[s]")]
    for bad in zoo:
        assert refused(function, packed(function, bad), fwp.DTypeError).startswith("cu_seqlens: ")


BAD_OFFSETS = [
    [1, 2, 2, 6],
    [-1, 2, 2, 6],
    [0, 2, 1, 6],
    [0, 2, 2, 5],
    [0, 2, 2, 7],
    [0, 7, 7, 6],
    [0, -1, 0, 6],
]


@SCANS
def test_offsets_with_bad_values(function):
    for dtype in ("i4", "i8", "list"):
        for bad in BAD_OFFSETS:
            offsets = bad if dtype == "list" else np.array(bad, dtype)
            message = refused(function, packed(function, offsets), fwp.ArgumentError)
            assert message.startswith("cu_seqlens: ")
    for bad in ([], [0, 6], [0, 2, 6], np.array([[0, 2, 2, 6]]), np.array(6), np.zeros((4, 1), int)):
        # Another number of sequences makes other states.
        refused(function, packed(function, bad), (fwp.ShapeError, fwp.ArgumentError, fwp.DTypeError))
    for bad in ([0, 1 << 62], [0, -(1 << 63)], [0, 1 << 64], np.array([0, (1 << 64) - 1], np.uint64)):
        refused(function, packed(function, bad), fwp.ArgumentError)


def test_outputs_over_offsets():
    offsets = np.array([0, 1, 0, 0])
    one = np.ones((1, 1, 1, 2))
    out = offsets.view(np.float64)[1:3].reshape(1, 1, 1, 2)
    with pytest.raises(fwp.ArgumentError, match="^out: .* shares memory with cu_seqlens$"):
        fwp.linear_attention(one, one, one, cu_seqlens=offsets[:2], out=out)
    assert offsets.tolist() == [0, 1, 0, 0]


@SCANS
def test_offsets_need_one_batch(function):
    for B in (0, 2):
        arguments = good(function, sizes=(B, 6, 2, 3, 4)) | {"cu_seqlens": [0, 6]}
        assert "B=1" in refused(function, arguments, fwp.ArgumentError)


# ---- the rest ----


@EVERY_FUNCTION
def test_scale(function):
    for scale in (2, 2.0, np.float32(2), np.float64(2), np.int8(2), np.array(2.0), True):
        accepted(function, good(function) | {"scale": scale})
    for scale in ("2", None, 2j, [2.0], np.zeros(2), b"2", object()):
        assert refused(function, good(function) | {"scale": scale}, TypeError)
    for scale in (np.inf, np.nan, -0.0, 1e300):
        accepted(function, good(function) | {"scale": scale})


@EVERY_FUNCTION
def test_signature(function):
    arguments = good(function)
    positional = [arguments.pop(name) for name in (["do"] if "do" in arguments else []) + ["q", "k", "v"]]
    with pytest.raises(TypeError, match="positional"):
        function.call(*positional, arguments.pop("beta"), arguments.pop("g"), 1.0, **arguments)
    refused(function, good(function) | {"epsilon": 1e-6}, TypeError)
    if function.needs_beta:
        without = good(function)
        del without["beta"]
        refused(function, without, TypeError)


@pytest.mark.parametrize("fn", [fwp.delta_rule, fwp.linear_attention])
def test_vjp(fn):
    function = FUNCTIONS[fn.__name__]
    arguments = good(function)
    for position in function.positions:
        changed = put(arguments, position, get(arguments, position).tolist())
        with pytest.raises(fwp.DTypeError, match=f"^{position}: "):
            fwp.vjp(fn, **changed)
        changed = put(arguments, position, np.zeros(3, np.float32))
        with pytest.raises(fwp.ShapeError, match=f"^{position}: "):
            fwp.vjp(fn, **changed)
    (o, final_state), pullback = fwp.vjp(fn, **arguments)
    for do in (None, o.tolist()):
        with pytest.raises(fwp.DTypeError, match="^do: "):
            pullback(do)
    with pytest.raises(fwp.ShapeError, match="^dfinal_state: "):
        pullback(o, o)
    with pytest.raises(fwp.DTypeError, match="^do: "):
        pullback(o.astype(np.float64))
    with pytest.raises(fwp.ArgumentError, match=r"^out\.dq: .* shares memory with q"):
        pullback(o, out=fwp.Gradients(arguments["q"], None, None))
    pullback(o, final_state)


@pytest.mark.parametrize("fn", [None, "delta_rule", fwp.delta_rule_step, fwp.reference.delta_rule, np.sum])
def test_vjp_of_something_else(fn):
    arguments = good(FUNCTIONS["delta_rule"])
    with pytest.raises(fwp.ArgumentError, match="^fn: expected fwp_core.delta_rule or"):
        fwp.vjp(fn, arguments["q"], arguments["k"], arguments["v"], arguments["beta"])
