"""The differentiable native attention operation.

Stands between `api`, which validates, builds the block mask and picks an implementation, and the native calls
(`native`), or `xla` for derivatives that kernels lack. `attend` saves out and log-sum-exp (as two numbers: what
rounding took from it counts where logits are large). In reverse mode a native call of its own computes the row sums
`delta`, which the others are given; the sinks' gradient, a sum over rows, is XLA's. Gates are taken to the key-major
order and their gradient back. So every native backward sees the same small set of operands. The tangents become the
native backward in reverse mode and plain JAX in forward mode (`core.forward_mode`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from jax_bsk.attention import ffi
from jax_bsk.attention.native import BACKWARD, BIAS_GRADIENT, DELTA, FORWARD, AttentionCall, DeltaCall
from jax_bsk.attention.sequence import in_shard_map
from jax_bsk.attention.xla import sparse_attention_xla
from jax_bsk.biases.terms import Terms
from jax_bsk.core import compat, forward_mode
from jax_bsk.core.dims import Dims
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.core.native_call import NativeCall, like
from jax_bsk.masks import BlockMask
from jax_bsk.masks.orders.entry_order import EntryOrder, to_columns, to_rows, with_entry_order

# For jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES), which spares the forward's recomputation.
RESIDUAL_NAMES = ("jax_bsk_out", "jax_bsk_lse", "jax_bsk_lse_rest")

Results = tuple[jax.Array, jax.Array, jax.Array]  # out, log-sum-exp, what rounding took from it
Gradients = tuple[jax.Array | None, ...]  # of the inputs, None for what is not given or not asked for
# Number of the differentiable arguments: query, key, value, sinks, gates, and the bias's dense, distances and tiles.
INPUTS = 8


def _no_log_sum_exp(dtype: Any) -> float:
    """What calls return for the log-sum-exp of a query that attends to nothing: `kNoLogSumExp` in C++.

    It is finite, so that neither results nor residuals hold an infinity that the user did not ask for.
    """
    return float(jnp.finfo(dtype).min)


def log_sum_exp(lse: jax.Array) -> jax.Array:
    """The log-sum-exp as users know it, -inf where nothing is attended to, from what `attend` returns."""
    return jnp.where(lse == _no_log_sum_exp(lse.dtype), -jnp.inf, lse)


def attend(
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None,
    gates: jax.Array | None,
    mask: BlockMask,
    lengths: jax.Array | np.ndarray,
    bias: Terms = Terms(),  # noqa: B008 (immutable)
    dropout_keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Native block-sparse attention.

    Args:
      call: Static part.
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, Hv].
      sinks: [B|1, N|1] logits of the sinks in the statistics type, or None.
      gates: [B|1, N|1, capacity] factors of the visited blocks in the statistics type, or None.
      mask: Block lists. The key-major ones are made on the host, once per mask; of a traced mask in the backward.
      lengths: int32 [B|1, 2], valid query and key/value lengths.
      bias: Terms of the bias without features, `numbers` of the shape of the mask's lists.
      dropout_keys: uint32 [B, N], a word per head, or None.

    Returns:
      out [B, T, N, Hv] and the log-sum-exp [B, N, T] in the statistics type; `log_sum_exp` makes of it what users know.
    """
    order = None
    if gates is not None:
        gates = _for_every_head(gates, query)
    if not mask.is_traced:
        if gates is None and bias.tiles is None:
            mask = mask.transpose()
        elif not mask.holds_runs:
            mask, order = with_entry_order(mask)
    inputs = query, key, value, sinks, gates, bias.dense, bias.distances, bias.tiles
    leaves, tree = jax.tree.flatten(inputs)
    inputs = tree.unflatten(compat.match_varying(*(jnp.asarray(compat.staged(x)) for x in leaves)))
    lists, tree = jax.tree.flatten(_Lists(_with_a_tile(mask), lengths, order, bias.numbers, dropout_keys))
    return _attend(_Static(call, tree), *inputs, *map(compat.staged, lists))[:2]


def _with_a_tile(mask: BlockMask) -> BlockMask:
    """The mask; within a `shard_map` one without bit tiles has one that no entry refers to.

    A gradient that is taken outside keeps the tiles between the two passes as an operand of the backward's `shard_map`,
    and XLA of jax 0.11.2 dies of one without elements (`compat.staged`).
    """
    if mask.bit_tiles.shape[2] or not compat.manual_axes():
        return mask
    shape = list(mask.bit_tiles.shape)
    shape[2] = 1
    return dataclasses.replace(mask, bit_tiles=np.zeros(shape, mask.bit_tiles.dtype))


@functools.partial(jax.jit, keep_unused=True)  # eager gates may be on one device: the query says which devices
def _for_every_head(gates: jax.Array, query: jax.Array) -> jax.Array:
    """[B|1, N|1, capacity] to [B, N, capacity], sharded as the query on an explicit mesh; its transpose is the sum."""
    shape = (query.shape[0], query.shape[2], gates.shape[2])
    source = jax.typeof(query)
    explicit = AxisType.Explicit in source.sharding.mesh.axis_types
    sharding = like(source, shape, gates.dtype, (0, 2, -1)).sharding if explicit else None
    return gates if gates.shape == shape else jnp.broadcast_to(gates, shape, out_sharding=sharding)


class _Lists(NamedTuple):
    """The arguments of `_attend` behind the differentiable ones.

    Attributes:
      mask: Block lists.
      lengths: int32 [B|1, 2].
      order: Order of the mask's entries where it is known beforehand and asked for.
      numbers: int32 of the lists' shape, the bias tile of each entry; None without tiles.
      dropout_keys: uint32 [B, N], or None.
    """

    mask: BlockMask
    lengths: Any
    order: EntryOrder | None
    numbers: Any
    dropout_keys: Any


@dataclasses.dataclass(frozen=True)
class _Static:
    """A native call and the structure of its lists; hashable.

    Attributes:
      call: The call.
      lists: Structure of `_Lists`, whose arrays are arguments.
      asked: Of each input, whether its gradient is wanted. A gradient of the bias costs a call of its own.
      lse_used: Whether the log-sum-exp's cotangent may be anything but zeros, which are not made otherwise.
    """

    call: AttentionCall
    lists: Any
    asked: tuple[bool, ...] = (True,) * INPUTS
    lse_used: bool = True


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(static: _Static, *args: Any) -> Results:
    return _call_forward(static.call, args[:INPUTS], static.lists.unflatten(args[INPUTS:]))


def _attend_jvp(static: _Static, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Results, Results]:
    results = _attend(static, *primals)
    out, lse, lse_rest = (checkpoint_name(x, name) for x, name in zip(results, RESIDUAL_NAMES, strict=True))
    leaves, tree = jax.tree.flatten((primals, lse_rest, out, lse))
    moving = [None if x is None or isinstance(x, SymbolicZero) else x for x in tangents[:INPUTS]]
    if all(x is None for x in moving):
        dout, dlse = jnp.zeros_like(out), jnp.zeros_like(lse)
    else:
        dout, dlse = _tangents((static, tree), leaves, (out.ndim, lse.ndim), moving)
    return (out, lse, lse_rest), (dout, dlse, jnp.zeros_like(lse_rest))


_attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _in_plain_jax(static: _Static, lists: Sequence[Any]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The same function of the inputs, with every derivative."""
    mask, lengths, _, tile_numbers, dropout_keys = static.lists.unflatten(lists)
    numbers = static.call.attributes

    def attention(
        query: Any, key: Any, value: Any, sinks: Any, gates: Any, dense: Any, distances: Any, tiles: Any
    ) -> tuple[jax.Array, jax.Array]:
        sinks = None if sinks is None else jnp.broadcast_to(sinks[0], (query.shape[2],))
        axis, tokens = static.call.axis, query.shape[1]
        if axis is not None:  # of all shards' rows, cut to this one's
            query, key, value = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (query, key, value))
            if dense is not None and dense.shape[2] == tokens:
                dense = jax.lax.all_gather(dense, axis, axis=2, tiled=True)
        out, lse = sparse_attention_xla(
            query,
            key,
            value,
            mask,
            bias=Terms(dense, distances, tiles, tile_numbers),
            lengths=lengths,
            sinks=sinks,
            gates=gates,
            scale=numbers.scale,
            soft_cap=numbers.soft_cap or None,
            dropout_keys=dropout_keys,
            dropout_threshold=numbers.dropout,
        )
        if axis is None:
            return out, lse
        first = jax.lax.axis_index(axis) * tokens
        out = jax.lax.dynamic_slice_in_dim(out, first, tokens, axis=1)
        return out, jax.lax.dynamic_slice_in_dim(lse, first, tokens, axis=2)

    return attention


def _pushforward(static_and_tree: tuple[_Static, Any], residuals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    static, tree = static_and_tree
    primals = tree.unflatten(residuals)[0]
    inputs = primals[:INPUTS]
    tangents = [
        None if x is None else jnp.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)
    ]
    return jax.jvp(_in_plain_jax(static, primals[INPUTS:]), inputs, tuple(tangents))[1]


def _pullback(
    static_and_tree: tuple[_Static, Any],
    residuals: Sequence[Any],
    present: Sequence[bool],
    cotangents: Sequence[Any],
    zero: Sequence[bool],
) -> list[Any]:
    static, tree = static_and_tree
    static = dataclasses.replace(static, asked=tuple(present), lse_used=not zero[1])
    gradients = _gradients((static, tree), *residuals, *cotangents)
    return [x for x, there in zip(gradients, present, strict=True) if there]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradients(static_and_tree: tuple[_Static, Any], *args: Any) -> Gradients:
    """Cotangents of the inputs that are asked for, from the residuals and the results' cotangents."""
    static, tree = static_and_tree
    primals, lse_rest, out, lse = tree.unflatten(args[:-2])
    lists = static.lists.unflatten(primals[INPUTS:])
    return _native_gradients(static, primals[:INPUTS], lists, (out, lse, lse_rest), args[-2:])


@_gradients.defjvp
def _gradients_jvp(
    static_and_tree: tuple[_Static, Any], args: Sequence[Any], tangents: Sequence[Any]
) -> tuple[Gradients, Any]:
    static, tree = static_and_tree
    primals = tree.unflatten(args[:-2])[0]

    def exact(inputs: Any, cotangents: Any) -> Any:
        gradients = jax.vjp(_in_plain_jax(static, primals[INPUTS:]), *inputs)[1](cotangents)
        return tuple(x if asked else None for x, asked in zip(gradients, static.asked, strict=True))

    moving = tree.unflatten(tangents[:-2])[0][:INPUTS]
    _, changes = jax.jvp(exact, (primals[:INPUTS], tuple(args[-2:])), (moving, tuple(tangents[-2:])))
    return _gradients(static_and_tree, *args), changes


_tangents = forward_mode.define("jax_bsk_attention_tangents", _pushforward, _pullback)


def _call_forward(call: AttentionCall, inputs: Sequence[Any], lists: _Lists) -> Results:
    query, key, value, sinks, gates = inputs[:5]
    stats = statistics_dtype(query.dtype)
    operands = (
        _marked(call, query),
        key,
        value,
        *lists.mask.kernel_rows(),
        lists.mask.bit_tiles,
        lists.lengths,
        np.zeros(ffi.NO_SINKS, stats) if sinks is None else sinks,
        np.zeros(ffi.NO_GATES, stats) if gates is None else gates,
        *_bias_operands(query, inputs[5:]),
        _or(lists.numbers, ffi.no_bias_tile_numbers),
        _or(lists.dropout_keys, ffi.no_dropout),
    )
    out, lse, lse_rest = _native(FORWARD, ffi.FORWARD, call, operands)
    return out, lse, lse_rest


def _bias_operands(query: Any, terms: Sequence[Any]) -> list[Any]:
    """The terms of the bias, with what stands for those that are not given."""
    return [absent if x is None else x for x, absent in zip(terms, ffi.no_bias(query.dtype), strict=True)]


def _or(x: Any, absent: Callable[[], Any]) -> Any:
    return absent() if x is None else x


def _native(native: NativeCall, dims: Dims, call: AttentionCall, operands: Sequence[Any]) -> tuple[jax.Array, ...]:
    return native(call, *operands) if call.axis is None else in_shard_map(native, dims, call, operands)


def _native_gradients(
    static: _Static, inputs: Sequence[Any], lists: _Lists, results: Results, cotangents: Sequence[Any]
) -> Gradients:
    call, asked = static.call, static.asked
    query, key, value, sinks, gates, *terms = inputs
    mask, lengths, order, numbers, dropout_keys = lists
    out, lse, lse_rest = results
    dout, dlse = cotangents
    # delta = rowsum(dO o O) - dlse turns the log-sum-exp's gradient into part of the usual backward:
    # dS = P o (dP - delta). With gates and dropout, of which O knows, the same: dS = P o (m g dP - delta). A native
    # call sums the rows in a fixed order. XLA's order depends on shapes and on the program around it, and gradients of
    # query and key had other bits on two devices than on one. A row needs nothing of other rows, so that inside a
    # `shard_map` the call is the same.
    if not static.lse_used:
        dlse = np.zeros(ffi.NO_LSE_COTANGENT, lse.dtype)
    (delta,) = DELTA(DeltaCall(call.platform), dout, out, dlse)
    dout = _marked(call, dout)
    common = dout, query, key, value, lse, lse_rest, delta
    bias = _bias_operands(query, terms)
    keys = _or(dropout_keys, ffi.no_dropout)
    no_gates = np.zeros(ffi.NO_GATES, lse.dtype)
    found: list[jax.Array | None] = [None] * INPUTS
    if any(asked[:3]) or (asked[4] and gates is not None):
        columns = mask
        if gates is None and numbers is None:
            columns = mask.transpose()
        elif order is None:
            columns, order = with_entry_order(mask)
        operands = (
            *common,
            *columns.kernel_rows(),
            *columns.kernel_columns(),
            columns.bit_tiles,
            lengths,
            no_gates if gates is None else gates,
            no_gates if gates is None or order is None else to_columns(gates, order),
            *bias,
            _or(numbers, ffi.no_bias_tile_numbers),
            ffi.no_bias_tile_numbers() if numbers is None or order is None else to_columns(jnp.asarray(numbers), order),
            keys,
        )
        *found[:3], dgates = _native(BACKWARD, ffi.BACKWARD, call, operands)
        found[4] = None if gates is None or order is None else to_rows(dgates, order)
    if asked[3] and sinks is not None:
        found[3] = _sinks_gradient(sinks, lse, lse_rest, delta)
    for term in ffi.BiasTerm:
        if not asked[5 + term] or terms[term] is None:
            continue
        operands = (
            *common,
            *mask.kernel_rows(),
            mask.bit_tiles,
            lengths,
            no_gates if gates is None else gates,
            *bias,
            _or(numbers, ffi.no_bias_tile_numbers),
            keys,
        )
        of_term = dataclasses.replace(call, term=term)
        (dterm,) = _native(BIAS_GRADIENT, ffi.BIAS_GRADIENT[term], of_term, operands)
        found[5 + term] = dterm.sum(-2) if term is ffi.BiasTerm.DISTANCES else dterm
    return tuple(x if wanted else None for x, wanted in zip(found, asked, strict=True))


def _marked(call: AttentionCall, x: Any) -> Any:
    """The same array, behind a barrier with a number of the mask.

    Over a sharded sequence a program depends on what the host mask visits, also where the lists are its arguments.
    JAX's persistent cache knows a program by its text, in which this number then differs.
    """
    if call.visits is None:
        return x
    return jax.lax.optimization_barrier((x, jax.lax.full((), call.visits.mark, np.int32)))[0]


def _sinks_gradient(sinks: jax.Array, lse: jax.Array, lse_rest: jax.Array, delta: jax.Array) -> jax.Array:
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
