"""The differentiable native attention operation: custom_jvp -> custom_vmap -> custom_partitioning -> primitive.

Stands between `attention` (which validates, builds the block mask and picks an implementation) and `_ffi` (which names
the custom calls) or, for derivatives that kernels lack, `_reference`. Each layer has one duty:

- `attend` (custom_jvp within; the tangents become the native backward in reverse mode and plain JAX in forward mode,
  see `_forward_mode`): saves out and log-sum-exp (as two numbers: what rounding took from it counts where logits are
  large), computes the row sums `delta` and the sinks' gradient, which are cheap row-wise sums that XLA fuses, and takes
  gates to the key-major order and their gradient back, so that every native backward sees the same small set of
  operands;
- custom_vmap: a mapped axis becomes a leading dimension of the operands (never merged into the batch here: merging
  makes a sharded batch all-gather);
- custom_partitioning: batch and heads split over a mesh with no collective (`_partition`);
- the primitive: shape rule and one lowering a platform. It keeps the leading dimensions; the handlers in C++ read them
  and the batch as one (a reshape here would be refused on explicit meshes).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding

from jax_bsk.attention import ffi, refusals, sharding
from jax_bsk.attention.xla import sparse_attention_xla
from jax_bsk.core import compat, forward_mode, library
from jax_bsk.core.native_call import like, primitive
from jax_bsk.masks import BlockMask
from jax_bsk.masks.entry_order import to_columns, to_rows, with_entry_order
from jax_bsk.masks.run_mask import RunBlockMask

# For jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES), which spares the forward's recomputation.
RESIDUAL_NAMES = ("jax_bsk_out", "jax_bsk_lse", "jax_bsk_lse_rest")


@dataclasses.dataclass(frozen=True)
class NativeCall:
    """Static part of a native call; hashable, so it can be a static argument of every layer.

    Attributes:
      attributes: Numbers that travel to the kernel.
      platform: The only platform the call may be lowered for, or None for whichever has a native kernel.
    """

    attributes: ffi.AttentionAttributes
    platform: str | None = None


def stats_dtype(dtype: Any) -> np.dtype:
    """Type of log-sum-exp, delta and sinks: float64 for float64 inputs, float32 otherwise."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def _no_log_sum_exp(dtype: Any) -> float:
    """What calls return for the log-sum-exp of a query that attends to nothing: `kNoLogSumExp` in C++.

    It is finite, so that neither results nor residuals hold an infinity that the user did not ask for.
    """
    return float(jnp.finfo(dtype).min)


def log_sum_exp(lse: jax.Array) -> jax.Array:
    """The log-sum-exp as users know it, -inf where nothing is attended to, from what `attend` returns."""
    return jnp.where(lse == _no_log_sum_exp(lse.dtype), -jnp.inf, lse)


# --- Primitives: shape rules and lowerings


def _forward_shapes(query, key, value, *lists_and_more, call: NativeCall):
    del key, lists_and_more, call
    *lead, t, n, _ = query.shape
    dims = list(range(query.ndim))
    out = like(query, (*lead, t, n, value.shape[-1]), query.dtype, [*dims[:-1], -1])
    lse = like(query, (*lead, n, t), stats_dtype(query.dtype), [*dims[:-3], dims[-2], dims[-3]])
    return out, lse, lse


def _backward_shapes(dout, query, key, value, *stats_lists_and_gates, call: NativeCall):
    del dout, call
    shaped = [query, key, value]
    if 4 + len(stats_lists_and_gates) == len(sharding.GATED_BACKWARD.operands):
        shaped.append(stats_lists_and_gates[-1])
    return tuple(like(x, x.shape, x.dtype, range(x.ndim)) for x in shaped)


def _problems(first: int):
    """Why a platform's kernels cannot take a call whose query, key and value are operands number `first` on."""

    def problems(platform: str, avals: Sequence[Any], attributes: ffi.AttentionAttributes) -> list[str]:
        query, _, value = avals[first : first + 3]
        facts = refusals.AttentionFacts(
            dtype=query.dtype.name,
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            block_q=attributes.block_q,
            block_kv=attributes.block_kv,
            bias=False,
        )
        return facts.problems(platform, library.limits(platform))

    return problems


_forward_p = primitive("jax_bsk_attention_forward", _forward_shapes, ffi.attention_forward, _problems(0))
_backward_p = primitive("jax_bsk_attention_backward", _backward_shapes, ffi.attention_backward, _problems(1))


# --- custom_partitioning


def _partitioned(primitive, dims: sharding.CallDims):
    def bind(call, args):
        return tuple(primitive.bind(*args, call=call))

    function = custom_partitioning(bind, static_argnums=(0,))

    def partition(call, mesh, arg_shapes, result_shapes):
        (args,) = arg_shapes
        if not isinstance(args[0].sharding, NamedSharding):  # partial-manual shard_map hands out GSPMDSharding
            results = tuple(r.sharding for r in result_shapes)
            return mesh, functools.partial(bind, call), results, (tuple(a.sharding for a in args),)
        local = sharding.local_call(dims, mesh, args)

        def run(local_args):
            return local.run(functools.partial(bind, call), local_args)

        return mesh, run, local.results, (local.operands,)

    function.def_partition(
        partition=partition,
        sharding_rule=lambda call, mesh, operands, results: sharding.sharding_rule(dims, mesh, operands, results),
    )
    return function


# --- custom_vmap


def _mapped(partitioned, dims: sharding.CallDims):
    @functools.cache
    def function(call: NativeCall):
        @custom_vmap
        def mapped(args):
            return partitioned(call, args)

        @mapped.def_vmap
        def rule(axis_size, in_batched, args):
            (batched,) = in_batched
            shape = args[dims.query].shape
            shape = shape if batched[dims.query] else (axis_size, *shape)
            lead = dims.lead(len(shape))
            full = shape[: lead + 1]

            # An unmapped array gets a dimension of 1. The handlers read the leading dimensions and the batch as one,
            # which an array has or is shared along; the arrays of a block list alike, whichever of them are mapped.
            args = [x if mapped_over else x[None] for x, mapped_over in zip(args, batched, strict=True)]

            def is_shared(i: int) -> bool:
                return dims.operands[i][0] == "b" and math.prod(args[i].shape[: lead + 1]) == 1

            def moved(i: int):
                if all(is_shared(j) for j in dims.group(i)):
                    return args[i]
                return jnp.broadcast_to(args[i], (*full, *args[i].shape[lead + 1 :]))

            results = mapped(tuple(moved(i) for i in range(len(args))))
            return results, tuple(True for _ in results)

        return mapped

    return function


def _layered(primitive, dims: sharding.CallDims):
    return _mapped(_partitioned(primitive, dims), dims)


_forward = _layered(_forward_p, sharding.FORWARD)
_gated_forward = _layered(_forward_p, sharding.GATED_FORWARD)
_backward = _layered(_backward_p, sharding.BACKWARD)
_gated_backward = _layered(_backward_p, sharding.GATED_BACKWARD)


# --- custom_jvp


def attend(call: NativeCall, query, key, value, sinks, gates, mask: BlockMask, lengths) -> tuple[jax.Array, jax.Array]:
    """Native block-sparse attention.

    Args:
      call: Static part.
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, Hv].
      sinks: [B|1, N|1] logits of the sinks in the stats type, or None.
      gates: [B|1, N|1, capacity] factors of the visited blocks in the stats type, or None.
      mask: Block lists. The key-major ones are made on the host, once a mask; of a traced mask in the backward.
      lengths: int32 [B|1, 2], valid query and key/value lengths.

    Returns:
      out [B, T, N, Hv] and the log-sum-exp [B, N, T] in the stats type, of which `log_sum_exp` makes what users know.
    """
    order = None
    if gates is not None:
        gates = _for_every_head(gates, query)
    if not mask.is_traced:
        if gates is None:
            mask = mask.transpose()
        elif not isinstance(mask, RunBlockMask):
            mask, order = with_entry_order(mask)
    leaves, tree = jax.tree.flatten((query, key, value, sinks, gates))
    query, key, value, sinks, gates = tree.unflatten(compat.match_varying(*_as_arrays(*leaves)))
    lists, tree = jax.tree.flatten((mask, lengths, order))
    return _attend(_Static(call, tree), query, key, value, sinks, gates, *lists)[:2]


@functools.partial(jax.jit, keep_unused=True)  # eager gates may be on one device: the query says which devices
def _for_every_head(gates, query):
    """[B|1, N|1, capacity] to [B, N, capacity], sharded as the query on an explicit mesh; its transpose is the sum."""
    shape = (query.shape[0], query.shape[2], gates.shape[2])
    source = jax.typeof(query)
    explicit = AxisType.Explicit in source.sharding.mesh.axis_types
    sharding = like(source, shape, gates.dtype, (0, 2, -1)).sharding if explicit else None
    return gates if gates.shape == shape else jnp.broadcast_to(gates, shape, out_sharding=sharding)


@dataclasses.dataclass(frozen=True)
class _Static:
    """A native call and the structure of its lists; hashable.

    Attributes:
      call: The call.
      lists: Structure of (mask, lengths, order), whose arrays are arguments.
    """

    call: NativeCall
    lists: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(static: _Static, query, key, value, sinks, gates, *lists):
    mask, lengths, _ = static.lists.unflatten(lists)
    return _call_forward(static.call, query, key, value, sinks, gates, mask, lengths)


def _attend_jvp(static: _Static, primals, tangents):
    results = _attend(static, *primals)
    out, lse, lse_rest = (checkpoint_name(x, name) for x, name in zip(results, RESIDUAL_NAMES, strict=True))
    leaves, tree = jax.tree.flatten((primals, lse_rest, out, lse))
    moving = [None if x is None or isinstance(x, SymbolicZero) else x for x in tangents[:5]]
    if all(x is None for x in moving):
        dout, dlse = jnp.zeros_like(out), jnp.zeros_like(lse)
    else:
        dout, dlse = _tangents((static, tree), leaves, (out.ndim, lse.ndim), moving)
    return (out, lse, lse_rest), (dout, dlse, jnp.zeros_like(lse_rest))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _in_plain_jax(static: _Static, lists):
    """The same function of (query, key, value, sinks, gates), with every derivative."""
    mask, lengths, _ = static.lists.unflatten(lists)
    numbers = static.call.attributes

    def attention(query, key, value, sinks, gates):
        sinks = None if sinks is None else jnp.broadcast_to(sinks[0], (query.shape[2],))
        return sparse_attention_xla(
            query,
            key,
            value,
            mask,
            bias=None,
            lengths=lengths,
            sinks=sinks,
            gates=gates,
            scale=numbers.scale,
            soft_cap=numbers.soft_cap or None,
        )

    return attention


def _pushforward(static_and_tree, residuals, tangents):
    static, tree = static_and_tree
    primals = tree.unflatten(residuals)[0]
    inputs = primals[:5]
    tangents = [
        None if x is None else jnp.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)
    ]
    return jax.jvp(_in_plain_jax(static, primals[5:]), inputs, tuple(tangents))[1]


def _pullback(static_and_tree, residuals, present, cotangents):
    gradients = _gradients(static_and_tree, *residuals, *cotangents)
    return [x for x, there in zip(gradients, present, strict=True) if there]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(static_and_tree, *args):
    """Cotangents of query, key, value, sinks and gates, or None, from the residuals and the results' cotangents."""
    static, tree = static_and_tree
    primals, lse_rest, out, lse = tree.unflatten(args[:-2])
    mask, lengths, order = static.lists.unflatten(primals[5:])
    return _native_gradients(static.call, (*primals[:5], mask, lengths, order, out, lse, lse_rest), args[-2:])


@_gradients.defjvp
def _gradients_jvp(static_and_tree, args, tangents):
    static, tree = static_and_tree
    primals = tree.unflatten(args[:-2])[0]

    def exact(inputs, cotangents):
        return jax.vjp(_in_plain_jax(static, primals[5:]), *inputs)[1](cotangents)

    moving = tree.unflatten(tangents[:-2])[0][:5]
    _, changes = jax.jvp(exact, (primals[:5], tuple(args[-2:])), (moving, tuple(tangents[-2:])))
    return _gradients(static_and_tree, *args), changes


_tangents = forward_mode.define("jax_bsk_attention_tangents", _pushforward, _pullback)


def _call_forward(call, query, key, value, sinks, gates, mask, lengths):
    if sinks is None:
        sinks = np.zeros(ffi.NO_SINKS, stats_dtype(query.dtype))
    args = _as_arrays(query, key, value, *mask._kernel_rows(), mask.bit_tiles, lengths, sinks)
    if gates is None:
        return _forward(call)(args)
    return _gated_forward(call)((*args, gates))


def _as_arrays(*args):
    return tuple(jnp.asarray(x) for x in args)


def _native_gradients(call, residuals, cotangents):
    query, key, value, sinks, gates, mask, lengths, order, out, lse, lse_rest = residuals
    dout, dlse = cotangents
    # delta = rowsum(dO o O) - dlse turns the log-sum-exp's gradient into part of the usual backward:
    # dS = P o (dP - delta). With gates, of which O knows, the same: dS = P o (g dP - delta).
    delta = _row_products(dout, out, lse.dtype) - dlse
    if gates is None:
        mask = mask.transpose()
    elif order is None:
        mask, order = with_entry_order(mask)
    rows, columns = mask._kernel_rows(), mask._kernel_columns()
    args = _as_arrays(dout, query, key, value, lse, lse_rest, delta, *rows, *columns, mask.bit_tiles, lengths)
    dgates = None
    if gates is None:
        dquery, dkey, dvalue = _backward(call)(args)
    else:
        args = (*args, gates, to_columns(gates, order))
        dquery, dkey, dvalue, dgates = _gated_backward(call)(args)
        dgates = to_rows(dgates, order)
    dsinks = None if sinks is None else _sinks_gradient(sinks, lse, lse_rest, delta)
    return dquery, dkey, dvalue, dsinks, dgates


def _row_products(dout, out, dtype):
    """rowsum(dO o O), [B, T, N, H] twice to [B, N, T]."""
    if out.dtype != dtype:
        return jnp.einsum("btnh,btnh->bnt", dout, out, preferred_element_type=dtype)
    # In float32 XLA's CPU compiler runs the fused product and sum on one thread, element by element: 20 ms at
    # 4,096 x 8 x 64, against 1 ms for a product with ones (jax 0.10.2; a barrier between the two is optimised away).
    ones = jnp.ones(out.shape[-1], dtype)
    return jnp.einsum("btnh,h->bnt", dout * out, ones, precision=jax.lax.Precision.HIGHEST)


def _sinks_gradient(sinks, lse, lse_rest, delta):
    """d loss / d sink = sum over rows of P_sink * (dlse - rowsum(dO o O)) = -sum P_sink * delta.

    P_sink = exp(sink - lse) is the sink's share of the softmax: the sink lowers every probability by it and raises the
    log-sum-exp by it. A sink of -inf is none, and one of +inf takes part in every softmax alone, however it changes:
    both have the gradient 0. Nothing here is NaN or infinite for finite inputs, before the selection neither.
    """
    logits = sinks[:, :, None]
    shares = ~(jnp.isinf(logits) | (lse <= _no_log_sum_exp(lse.dtype)))
    exponent = (jnp.where(shares, logits, 0) - jnp.where(shares, lse, 0)) - lse_rest
    share = jnp.where(shares, jnp.exp(exponent), 0)
    gradient = -jnp.sum(jnp.where(share == 0, 0, share * delta), axis=2)
    for axis in (0, 1):
        if sinks.shape[axis] == 1:
            gradient = gradient.sum(axis, keepdims=True)
    return gradient.astype(sinks.dtype)
