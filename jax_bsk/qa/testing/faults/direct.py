"""The custom calls themselves, past every Python check: what `boundary` spoils part by part.

Beside `calls`, which goes through the public function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.attention import ffi
from jax_bsk.core.version import __version__
from jax_bsk.qa.testing.faults import checks
from jax_bsk.qa.testing.faults.calls import BLOCK, HEAD_SIZE

B, T, S, N, H = 2, 2 * BLOCK, 3 * BLOCK, 4, HEAD_SIZE
CAPACITY = 2  # entries of the lists: both query blocks visit all of key block 0
SCALE = 0.25


@dataclasses.dataclass(frozen=True)
class DirectCall:
    """A custom call as the lowering makes it.

    Attributes:
      target: its name.
      operands: arrays by name, in order.
      results: what it is said to return, by name, in order.
      attributes: its numbers.
    """

    target: str
    operands: dict[str, Any]
    results: dict[str, jax.ShapeDtypeStruct]
    attributes: dict[str, Any]

    def __call__(self, **changes: Any) -> dict[str, jax.Array]:
        """Makes the call with parts of any kind replaced by name.

        A part of None is left out; an operand that is given by its shape becomes an array of zeros.
        """
        return self.prepare(**changes)()

    def prepare(self, **changes: Any) -> Callable[..., dict[str, jax.Array]]:
        """The same as a jitted function, which takes operands of the same shapes to replace those by name."""
        unknown = changes.keys() - self.operands.keys() - self.results.keys() - self.attributes.keys()
        assert not unknown, f"{self.target} has no {unknown}"
        operands, results, attributes = (
            {name: changes.get(name, part) for name, part in parts.items() if changes.get(name, part) is not None}
            for parts in (self.operands, self.results, self.attributes)
        )
        arrays = {name: jnp.zeros(x.shape, x.dtype) if _is_shape(x) else x for name, x in operands.items()}
        call = jax.ffi.ffi_call(self.target, list(results.values()))
        step = jax.jit(lambda arrays: call(*arrays, **attributes))

        def run(**replaced: Any) -> dict[str, jax.Array]:
            values = step([replaced.get(name, x) for name, x in arrays.items()])
            return dict(zip(results, jax.block_until_ready(values), strict=True))

        return run


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def shape(dtype: str, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


def _ones(*sizes: int) -> jax.Array:
    return jnp.ones(sizes, jnp.float32)


def _inputs() -> dict[str, Any]:
    return {"query": _ones(B, T, N, H), "key": _ones(B, S, N, H), "value": _ones(B, S, N, H)}


def _integers(*numbers: int) -> jax.Array:
    return jnp.array([[numbers]], jnp.int32)


def _rows() -> dict[str, Any]:
    return {"row_offsets": _integers(0, 1, 2), "kv_blocks": _integers(0, 0), "tiles": _integers(-1, -1)}


def _columns() -> dict[str, Any]:
    return {"col_offsets": _integers(0, 2, 2, 2), "q_blocks": _integers(0, 1), "col_tiles": _integers(-1, -1)}


def _rest() -> dict[str, Any]:
    bit_tiles = jnp.zeros((1, 1, 0, BLOCK, BLOCK // 32), jnp.uint32)
    return {"bit_tiles": bit_tiles, "lengths": jnp.array([[T, S]], jnp.int32)}


def _attributes() -> dict[str, Any]:
    return {**ffi.AttentionAttributes(BLOCK, BLOCK, SCALE, 0.0).encode(), "version": __version__}


def _extras(*tile_numbers: str) -> dict[str, Any]:
    """Neither a bias nor dropout."""
    terms = ("dense_bias", "distance_bias", "bias_tiles")
    absent = dict(zip(terms, map(jnp.asarray, ffi.no_bias(np.float32)), strict=True))
    absent |= {name: jnp.asarray(ffi.no_bias_tile_numbers()) for name in tile_numbers}
    return absent | {"dropout_keys": jnp.asarray(ffi.no_dropout())}


def forward_call(implementation: str) -> DirectCall:
    """The forward of ones."""
    results = {"out": shape("float32", B, T, N, H)}
    results |= {name: shape("float32", B, N, T) for name in ("lse", "lse_rest")}
    if implementation == "cuda":
        results["workspace"] = shape("int32", ffi.forward_workspace((B, T, N, H), (B, S, N, H), H, (BLOCK, BLOCK)) // 4)
    sinks = jnp.full((1, 1), -jnp.inf, jnp.float32)
    operands = {**_inputs(), **_rows(), **_rest(), "sinks": sinks, "gates": shape("float32", *ffi.NO_GATES)}
    operands |= _extras("row_bias_tiles")
    return DirectCall(ffi.ATTENTION_FORWARD, operands, results, _attributes())


def delta_call() -> DirectCall:
    """The row sums of ones, whose log-sum-exps have cotangents of ones, too."""
    operands = {"dout": _ones(B, T, N, H), "out": _ones(B, T, N, H), "dlse": _ones(B, N, T)}
    return DirectCall(ffi.ATTENTION_DELTA, operands, {"delta": shape("float32", B, N, T)}, {"version": __version__})


def _backward_bytes(gates: tuple[int, ...], capacity: int = CAPACITY) -> int:
    return ffi.backward_workspace((B, T, N, H), (B, S, N, H), (1, 1, capacity), (BLOCK, BLOCK), gates)


def backward_call(implementation: str) -> DirectCall:
    """The backward of ones, for a cotangent of ones."""
    sizes = {"dquery": (B, T, N, H), "dkey": (B, S, N, H), "dvalue": (B, S, N, H)}
    results = {name: shape("float32", *size) for name, size in sizes.items()}
    gates = shape("float32", *ffi.NO_GATES)
    results["dgates"] = gates
    if implementation == "cuda":
        results["workspace"] = shape("uint8", _backward_bytes(gates.shape))
    # lse is of BLOCK logits of H * SCALE, its rest nothing, delta the sum of H products of ones.
    lse = _ones(B, N, T) * (H * SCALE + math.log(BLOCK))
    statistics = {"lse": lse, "lse_rest": jnp.zeros_like(lse), "delta": _ones(B, N, T) * H}
    operands = {"dout": _ones(B, T, N, H), **_inputs(), **statistics, **_rows(), **_columns(), **_rest()}
    operands |= {"row_gates": gates, "col_gates": gates, **_extras("row_bias_tiles", "col_bias_tiles")}
    return DirectCall(ffi.ATTENTION_BACKWARD, operands, results, _attributes())


def bias_gradient_call(implementation: str) -> DirectCall:
    """The gradient of a bias by distance that is 0, of the backward's call."""
    backward = backward_call(implementation)
    given = {**backward.operands, "gates": backward.operands["row_gates"]}
    given["distance_bias"] = jnp.zeros((1, 1, T + S - 1), jnp.float32)
    operands = {name: given[name] for name in ffi.BIAS_GRADIENT[ffi.BiasTerm.DISTANCES].operands}
    results = {"dbias": shape("float32", 1, 1, 2, T + S - 1)}
    attributes = {**_attributes(), "term": np.int64(ffi.BiasTerm.DISTANCES)}
    return DirectCall(ffi.ATTENTION_BIAS_GRADIENT, operands, results, attributes)


def gated_columns(implementation: str, capacity: int) -> Callable[[Sequence[int], Sequence[int]], dict[str, jax.Array]]:
    """The backward with gates of 1 and key-major lists of full blocks, whose offsets and ids it takes."""
    gates = (B, N, capacity)
    changes = {
        "kv_blocks": _integers(*[0] * capacity),
        "tiles": _integers(*[-1] * capacity),
        "q_blocks": shape("int32", 1, 1, capacity),
        "col_tiles": _integers(*[-1] * capacity),
        "row_gates": _ones(*gates),
        "col_gates": _ones(*gates),
        "dgates": shape("float32", *gates),
    }
    if implementation == "cuda":
        changes["workspace"] = shape("uint8", _backward_bytes(gates, capacity))
    run = backward_call(implementation).prepare(**changes)
    return lambda offsets, ids: run(col_offsets=_integers(*offsets), q_blocks=_integers(*ids))


def check_unchanged(implementation: str) -> None:
    """Both calls are right with nothing replaced, and with gates."""
    forward, backward = forward_call(implementation)(), backward_call(implementation)()
    # Each query averages ones; its probabilities are 1 / BLOCK, and dS = P (dP - delta) is 0.
    attended = np.broadcast_to(np.arange(S)[:, None, None] < BLOCK, (B, S, N, H))
    for name, actual, expected in (
        ("out", forward["out"], 1.0),
        ("lse", forward["lse"], H * SCALE + math.log(BLOCK)),
        ("dquery", backward["dquery"], 0.0),
        ("dkey", backward["dkey"], 0.0),
        ("dvalue", backward["dvalue"], np.where(attended, T / BLOCK, 0.0)),
    ):
        checks.check_close(f"{name} of the direct call", actual, expected)
    check_gates(implementation)


def check_gates(implementation: str) -> None:
    """Both calls are right with gates of 2: the output doubles, of which delta, 1 a product, is no part here."""
    gates = 2 * _ones(B, N, CAPACITY)
    changes = {"row_gates": gates, "col_gates": gates, "dgates": shape("float32", B, N, CAPACITY)}
    call = backward_call(implementation)
    if implementation == "cuda":
        changes["workspace"] = shape("uint8", _backward_bytes(gates.shape))
    forward, backward = forward_call(implementation)(gates=gates), call(**changes)
    attended = np.broadcast_to(np.arange(S)[:, None, None] < BLOCK, (B, S, N, H))
    for name, actual, expected in (
        ("out", forward["out"], 2.0),
        ("lse", forward["lse"], H * SCALE + math.log(BLOCK)),
        ("dquery", backward["dquery"], SCALE * H),  # dS = P (2 H - H), and P sums to 1
        ("dkey", backward["dkey"], np.where(attended, SCALE * H * T / BLOCK, 0.0)),
        ("dvalue", backward["dvalue"], np.where(attended, 2 * T / BLOCK, 0.0)),
        ("dgates", backward["dgates"], float(BLOCK * H)),  # BLOCK rows whose P sum to 1, of products of H ones
    ):
        checks.check_close(f"{name} of the direct call with gates", actual, expected)
