"""The native boundary: custom calls past every Python check, with one thing that does not fit.

A plain custom call trusts whatever shapes it was given, so what C++ does not check is a wild read or write.

A misaligned pointer cannot be made from JAX alone: its own buffers are aligned to 64 bytes and more, and on the CPU it
copies an array with less that comes by DLPack. `misaligned-pointer` hands such arrays over nevertheless, for platforms
that take them as they are.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core.version import __version__
from jax_bsk.matmul import ffi
from jax_bsk.qa.testing.faults import checks, direct
from jax_bsk.qa.testing.faults.calls import BLOCK
from jax_bsk.qa.testing.faults.direct import CAPACITY, B, DirectCall, H, N, S, T, shape
from jax_bsk.qa.testing.faults.scenario import NATIVE, Scenario, scenario

FAULT = "misaligned pointer, bad attribute, wrong result shape"
EXPECTED = "an INVALID_ARGUMENT error reaches Python; the process lives"
Changes = Mapping[str, Mapping[str, Any]]  # what is wrong -> the parts to replace

GATES = shape("float32", B, N, CAPACITY)

ATTRIBUTES: Changes = {
    "block size that is no multiple of 32": {"block_q": np.int64(33)},
    "block size 0": {"block_kv": np.int64(0)},
    "negative block size": {"block_q": np.int64(-BLOCK)},
    "huge block size": {"block_kv": np.int64(2**63 - 32)},
    "block size of other lists": {"block_q": np.int64(2 * BLOCK)},
    "block size of 32 bits": {"block_q": np.int32(BLOCK)},
    "scale of 32 bits": {"scale": np.float32(0.25)},
    "no scale": {"scale": None},
    "another version": {"version": "0.0.0"},
    "a number for a version": {"version": np.int64(1)},
}


def _large_blocks(**columns: Any) -> Changes:
    """Blocks that no kernel takes, with lists, and bit tiles of which there is none, that fit them.

    Scratch memory for them cannot be had, or its size overflows. `columns` are the lists of one block of keys.
    """
    changes = {}
    for size in (288, 2**24, 2**40, 2**62):
        tiles = {"bit_tiles": shape("uint32", 1, 1, 0, size, BLOCK // 32)}
        rows = {"row_offsets": shape("int32", 1, 1, 2)}
        changes[f"blocks of {size} queries"] = {"block_q": np.int64(size), **tiles, **rows}
        tiles = {"bit_tiles": shape("uint32", 1, 1, 0, BLOCK, size // 32)}
        changes[f"blocks of {size} keys"] = {"block_kv": np.int64(size), **tiles, **columns}
    return changes


def _tables(names: str, *tables: int) -> Mapping[str, Any]:
    """Lists of their own for examples or heads: good ones, empty."""
    lengths = {"row_offsets": T // BLOCK + 1, "col_offsets": S // BLOCK + 1}
    return {name: shape("int32", *tables, lengths.get(name, CAPACITY)) for name in names.split()}


OPERANDS: Changes = {
    "query rank": {"query": shape("float32", T, N, H)},
    "query type": {"query": shape("int32", B, T, N, H)},
    "key shape": {"key": shape("float32", B, S, N, H // 2)},
    "key type": {"key": shape("bfloat16", B, S, N, H)},
    "value length": {"value": shape("float32", B, S - 1, N, H)},
    "heads": {"key": shape("float32", B, S, N - 1, H), "value": shape("float32", B, S, N - 1, H)},
    "offsets length": {"row_offsets": shape("int32", 1, 1, T // BLOCK + 2)},
    "offsets type": {"row_offsets": shape("float32", 1, 1, T // BLOCK + 1)},
    "ids batch": {"kv_blocks": shape("int32", B + 1, 1, CAPACITY)},
    "tiles capacity": {"tiles": shape("int32", 1, 1, CAPACITY + 1)},
    "bit tile words": {"bit_tiles": shape("uint32", 1, 1, 1, BLOCK, BLOCK // 32 + 1)},
    "bit tile type": {"bit_tiles": shape("int32", 1, 1, 1, BLOCK, BLOCK // 32)},
    "lengths rank": {"lengths": shape("int32", 2)},
    "an operand less": {"lengths": None},
}
FORWARD_OPERANDS: Changes = {
    **OPERANDS,
    "sinks shape": {"sinks": shape("float32", 1, N - 1)},
    "sinks type": {"sinks": shape("bfloat16", 1, 1)},
    "gates capacity": {"gates": shape("float32", B, N, CAPACITY + 1)},
    "gates of one head": {"gates": shape("float32", B, 1, CAPACITY)},
    "gates rank": {"gates": shape("float32", N, CAPACITY)},
    "gates type": {"gates": shape("bfloat16", B, N, CAPACITY)},
    "no gates operand": {"gates": None},
}
BACKWARD_OPERANDS: Changes = {
    **OPERANDS,
    "dout shape": {"dout": shape("float32", B, T, N, H - 1)},
    "dout type": {"dout": shape("bfloat16", B, T, N, H)},
    "lse type": {"lse": shape("bfloat16", B, N, T)},
    "lse_rest shape": {"lse_rest": shape("float32", B, T, N)},
    "delta shape": {"delta": shape("float32", B, T, N)},
    "column offsets length": {"col_offsets": shape("int32", 1, 1, S // BLOCK)},
    "column ids type": {"q_blocks": shape("float32", 1, 1, CAPACITY)},
    "column tiles heads": {"col_tiles": shape("int32", 1, N, CAPACITY)},
    "rows shared by the examples, columns not": _tables("col_offsets q_blocks col_tiles", B, 1),
    "rows shared by the heads, columns not": _tables("col_offsets q_blocks col_tiles", 1, N),
    "columns shared by the examples, rows not": _tables("row_offsets kv_blocks tiles", B, 1),
    "columns shared by the heads, rows not": _tables("row_offsets kv_blocks tiles", 1, N),
    "gates of rows alone": {"row_gates": GATES},
    "gates of columns alone": {"col_gates": GATES},
    "gates without their gradient": {"row_gates": GATES, "col_gates": GATES},
    "gates capacity": {"row_gates": GATES, "col_gates": shape("float32", B, N, CAPACITY - 1), "dgates": GATES},
    "gates type": {"row_gates": shape("bfloat16", B, N, CAPACITY), "col_gates": GATES, "dgates": GATES},
}
FORWARD_RESULTS: Changes = {
    "out shape": {"out": shape("float32", B, T, N, H // 2)},
    "out length": {"out": shape("float32", B, 1, N, H)},
    "out type": {"out": shape("bfloat16", B, T, N, H)},
    "lse shape": {"lse": shape("float32", B, T, N)},
    "lse type": {"lse": shape("bfloat16", B, N, T)},
    "no lse": {"lse": None},
    "lse_rest shape": {"lse_rest": shape("float32", B, N, T + 1)},
}
BACKWARD_RESULTS: Changes = {
    "dquery shape": {"dquery": shape("float32", B, T, N, 1)},
    "dkey length": {"dkey": shape("float32", B, S - 1, N, H)},
    "dkey type": {"dkey": shape("float16", B, S, N, H)},
    "dvalue heads": {"dvalue": shape("float32", B, S, 1, H)},
    "no dvalue": {"dvalue": None},
    "dgates without gates": {"dgates": GATES},
    "dgates shape": {"row_gates": GATES, "col_gates": GATES, "dgates": shape("float32", B, N, CAPACITY + 1)},
    "dgates type": {"row_gates": GATES, "col_gates": GATES, "dgates": shape("bfloat16", B, N, CAPACITY)},
    "no dgates": {"dgates": None},
}


DELTA: Changes = {
    "out rank": {"out": shape("float32", T, N, H)},
    "out type": {"out": shape("int32", B, T, N, H)},
    "dout shape": {"dout": shape("float32", B, T, N, H - 1)},
    "dout type": {"dout": shape("bfloat16", B, T, N, H)},
    "dlse shape": {"dlse": shape("float32", B, T, N)},
    "dlse type": {"dlse": shape("bfloat16", B, N, T)},
    "no dlse operand": {"dlse": None},
    "delta shape": {"delta": shape("float32", B, T, N)},
    "delta type": {"delta": shape("bfloat16", B, N, T)},
    "another version": {"version": "0.0.0"},
    "a number for a version": {"version": np.int64(1)},
}


def check_refused(call: DirectCall, faults: Changes) -> None:
    """Each fault is refused by the handler, or by XLA's decoding in front of it."""
    for what, changes in faults.items():
        attempt = functools.partial(call, **changes)
        # The handler's own messages name the package, XLA's the stage in which the call could not be decoded.
        words = r"INVALID_ARGUMENT.*(jax_bsk: |\[\w+\])"
        checks.check_raises(f"{call.target}, {what}", attempt, jax.errors.JaxRuntimeError, words)


def _refused(name: str, fault: str, forward: Changes, backward: Changes) -> Scenario:
    @scenario(name, fault, EXPECTED, platforms=NATIVE, may_crash=True)
    def run(implementation: str) -> None:
        check_refused(direct.forward_call(implementation), forward)
        check_refused(direct.backward_call(implementation), backward)
        direct.check_unchanged(implementation)

    return run


@scenario("wrong-workspace", FAULT, EXPECTED, platforms=("cuda",), may_crash=True)
def wrong_workspace(implementation: str) -> None:
    """The kernels write there without looking: a size that the lowering and C++ see differently is a wild write."""
    forward, backward = direct.forward_call(implementation), direct.backward_call(implementation)
    (words,), (size,) = forward.results["workspace"].shape, backward.results["workspace"].shape
    either = {"empty": {"workspace": shape("uint8", 0)}, "missing": {"workspace": None}}
    short = {"a word short": {"workspace": shape("int32", words - 1)}}
    check_refused(forward, {**either, **short, "type": {"workspace": shape("float32", words)}})
    check_refused(backward, {**either, "16 bytes": {"workspace": shape("uint8", 16)}})
    check_refused(backward, {"type": {"workspace": shape("int32", size // 4)}})
    direct.check_unchanged(implementation)


@scenario("wrong-row-sums", FAULT, EXPECTED, platforms=NATIVE, may_crash=True)
def wrong_row_sums(implementation: str) -> None:
    """Of the backward's row sums: operands, results and attributes."""
    del implementation
    call = direct.delta_call()
    check_refused(call, DELTA)
    checks.check_close("delta", call()["delta"], H - 1.0)
    checks.check_close("delta without dlse", call(dlse=shape("float32", 1, 1, 0))["delta"], float(H))


@scenario("bad-sizes-of-a-product", FAULT, EXPECTED, platforms=("cpu",), may_crash=True)
def bad_sizes_of_a_product(implementation: str) -> None:
    """Of the block-sparse products: attributes, and blocks that no kernel takes, which an empty matrix may have."""
    del implementation  # CUDA's kernels take two block sizes
    rows, columns, width, block = 64, 96, 8, 32
    version = {"version": __version__}
    product = DirectCall(
        ffi.MATMUL_PRODUCT,
        {
            "data": jnp.ones((1, block, block), jnp.float32),
            "offsets": jnp.array([0, 1, 1], jnp.int32),
            "ids": jnp.array([2], jnp.int32),
            "places": jnp.array([0], jnp.int32),
            "dense": jnp.ones((columns, width), jnp.float32),
        },
        {"out": shape("float32", rows, width)},
        ffi.ProductAttributes(rows, columns, transposed=False, dense_left=False, out_dtype="float32").encode()
        | version,
    )
    sampled = DirectCall(
        ffi.MATMUL_SAMPLED,
        {
            "left": jnp.ones((rows, width), jnp.float32),
            "right": jnp.ones((width, columns), jnp.float32),
            "row_ids": jnp.array([1], jnp.int32),
            "column_ids": jnp.array([2], jnp.int32),
        },
        {"blocks": shape("float32", 1, block, block)},
        ffi.SampledAttributes(False, False, (block, block), "float32").encode() | version,
    )
    faults: dict[str, Mapping[str, Any]] = {}
    for size in (-(2**63), -rows, 2**40, 2**63 - 1):
        faults |= {f"{size} rows": {"rows": np.int64(size)}, f"{size} columns": {"columns": np.int64(size)}}
    none = {"ids": shape("int32", 0), "places": shape("int32", 0), "offsets": shape("int32", 2)}
    # XLA makes no call whose results are empty, so that these blocks are no larger than a result can be.
    blocks = {f"blocks of {size}": {"blocks": shape("float32", 1, *size)} for size in ((257, 32), (32, 65536))}
    for size in (257, 2**31, 2**40, 2**62):
        faults[f"blocks of {size} rows"] = {**none, "data": shape("float32", 0, size, block)}
        faults[f"blocks of {size} columns"] = {**none, "data": shape("float32", 0, block, size)}
    check_refused(product, faults)
    check_refused(sampled, blocks)
    # Row 0 of blocks is a product of ones with the third block of ones, row 1 is empty.
    checks.check_close("out", product()["out"], np.repeat([[float(block)], [0.0]], block, axis=0) * np.ones(width))
    checks.check_close("blocks", sampled()["blocks"], np.full((1, block, block), float(width)))


# ---- a misaligned pointer ---------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """DLTensor of DLPack."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Shifted:
    """An array without its first element, as far as whole rows of the first dimension go."""

    def __init__(self, array: Any):
        self.array = array

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        capsule = self.array.__dlpack__(stream=stream)
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        tensor = _Tensor.from_address(address(capsule, b"dltensor"))
        tensor.byte_offset += self.array.dtype.itemsize
        tensor.shape[0] -= 1
        return capsule


@scenario(
    "misaligned-pointer",
    FAULT,
    "an error says so, of the handler or of XLA; or JAX aligns the array and the result is right; the process lives",
    platforms=NATIVE,
    may_crash=True,
)
def misaligned_pointer(implementation: str) -> None:
    call = direct.forward_call(implementation)
    for name in ("query", "key", "value"):
        good, said = call.operands[name], None
        try:
            operand = jnp.from_dlpack(_Shifted(jnp.ones((B + 1, *good.shape[1:]), good.dtype)))
            out = call(**{name: operand})["out"]
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            said = str(error)
        if said is None:
            checks.check_close(f"out with a misaligned {name}", out, np.ones((B, T, N, H)))
        else:
            assert re.search("align|multiple of", said), f"misaligned {name}: the message does not say so: {said}"
    direct.check_unchanged(implementation)


SCENARIOS = (
    _refused(
        "bad-attribute",
        FAULT,
        {**ATTRIBUTES, **_large_blocks()},
        {**ATTRIBUTES, **_large_blocks(col_offsets=shape("int32", 1, 1, 2))},
    ),
    _refused("wrong-result-shape", FAULT, FORWARD_RESULTS, BACKWARD_RESULTS),
    _refused(
        "wrong-operand", "wrong operand shape or dtype at the native boundary", FORWARD_OPERANDS, BACKWARD_OPERANDS
    ),
    wrong_workspace,
    wrong_row_sums,
    bad_sizes_of_a_product,
    misaligned_pointer,
)
