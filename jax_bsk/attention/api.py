"""`sparse_attention`: validates and canonicalises a call, binds its mask, and hands it to an implementation.

The top of the one path of a call: `attention.api` -> `masks` -> `core.dispatch` -> `attention.derivatives` ->
`attention.native` -> `core.native_call` -> `csrc/` (docs/architecture.md).
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_bsk.attention import derivatives, refusals
from jax_bsk.attention.ffi import AttentionAttributes
from jax_bsk.attention.native import AttentionCall
from jax_bsk.attention.xla import sparse_attention_xla
from jax_bsk.core import arrays, checks, dispatch, inputs, scalars
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import BlockMask, CausalMask, FullMask, LocalMask, Mask, as_block_mask
from jax_bsk.masks.convert import array_mask, check_kind


@checks.refuses_flax(
    "sparse_attention takes no arguments of Flax's modules; give them attention_fn=jax_bsk.flax.attention_fn(mask)"
)
def sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Mask | BlockMask | ArrayLike | None = None,
    *,
    scale: float | ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    gates: ArrayLike | None = None,
    implementation: Literal["cpu", "cuda", "xla"] | None = None,
    return_residual: bool = False,
) -> Any:
    r"""Attention that computes only the blocks its mask visits.

    Takes the place of `jax.nn.dot_product_attention`: the same argument names, order, layouts and meanings, except that
    `mask` may be lazy or block-sparse, that a query which may attend to nothing yields 0 (not the mean of the values),
    and that the residual has a gradient. For each head

    .. math:: O = \mathrm{softmax}(c(\sigma Q K^T) + \mathrm{bias} \mid \mathrm{mask}) V, \quad
              c(x) = \kappa \tanh(x / \kappa)

    computed blockwise with a running maximum (FlashAttention, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691),
    with the sum over the visited blocks only. With `gates` g, one number for each entry e of a `BlockMask`'s lists,

    .. math:: O_i = \sum_{e \in \mathrm{row}(i)} g_e P_{i, j(e)} V_{j(e)},

    where P is the softmax over all visited blocks (and the sink) as without gates and j(e) the entry's key block: what
    a block contributes is multiplied after the softmax, and the log-sum-exp knows nothing of it. Works under `jit`,
    `grad`, `vmap`, `scan`, `remat`, `shard_map` and sharded meshes; batch and heads shard without a collective. The
    native kernels have reverse-mode gradients; `jvp` and second derivatives of their calls are computed by "xla".

    Letters: B batch, T query length, S key/value length, N query heads, K key/value heads (K divides N), H head size.

    Args:
      query: BTNH or TNH; float32, bfloat16, float16 or float64.
      key: BSKH or SKH, of query's type.
      value: BSKH or SKH, of query's type; its head size may differ from key's.
      bias: Numbers (integers, too) added to the logits, broadcastable to BNTS, of which the first dimensions may be
        missing; "xla" only.
      mask: What may attend to what (True attends): a `jax_bsk.masks.Mask`, a `BlockMask`, or a boolean array
        broadcastable to BNTS, of which the first dimensions may be missing; keys that are valid in each example,
        [B, S], are mask[:, None, None, :]. None attends to everything. May be traced.
      scale: Factor of the logits; 1 / sqrt(H) by default. A number in [-2e38, 2e38] is used in float32 (float64 for
        float64 inputs). A traced number (differentiable, of shape ()) multiplies the query for the native kernels, and
        is rounded with it to query's type: for bfloat16 logits then err by up to 2^-8 of them, for float16 by 2^-11.
      is_causal: Query t attends to keys s <= t (aligned at the top left, as in `jax.nn`), on top of `mask`.
      query_seq_lengths: int [B], at most T (traced ones are clipped); queries from there on yield 0, log-sum-exp -inf.
      key_value_seq_lengths: int [B], at most S; keys from there on are not attended to.
      local_window_size: Keys to the left and right of query t it may attend to, (left, right) or one number for both,
        on top of `mask`. None in the pair is unbounded.
      logits_soft_cap: Caps the logits at +-this by tanh, as in Gemma 2 (arXiv 2408.00118); a Python number in
        [1e-30, 1e30]. It is used in float32 (float64 for float64 inputs) as the scale is; scale / logits_soft_cap must
        be a normal float32 number (or 0).
      sinks: [N] logits that join each softmax's denominator and no value, as in gpt-oss (arXiv 2508.10925); learnable.
        -inf is no sink. With +inf queries attend to their sink alone: the output is 0, the log-sum-exp +inf, and all
        gradients are 0. NaN makes the head's output NaN.
      gates: [B|1, N|1, capacity] floating factors of the visited blocks, where `mask` is a `BlockMask` and capacity its
        `kv_blocks.shape[-1]` (for TNH also [N|1, capacity]): number e of a head's gates belongs to entry e of that
        head's `kv_blocks`, in row order, and what lies past the last entry means nothing. Of any sign; differentiable
        (0 for what no row lists). They are used in float32 (float64 for float64 inputs).
      implementation: "cuda" or "cpu" (native kernels), "xla" (pure JAX: every platform and type), or None:
        the platform's native kernel and, where it cannot take the call, "xla" with one `FallbackWarning` saying why.
      return_residual: Also return the log-sum-exp. Where queries attend to nothing it is -inf, at which
        `jax_debug_infs` raises as at every infinite result; without it no result or residual of finite inputs is
        infinite or NaN.

    Returns:
      BTNH (TNH) output of query's type, with value's head size. With `return_residual` also the natural logarithm of
      the softmax's denominator, BTN (TN), float32 (float64 for float64 inputs), -inf where nothing is attended to.

    Raises:
      ValueError, TypeError: An argument does not fit; the message names it and the remedy.
      UnsupportedError: The named implementation cannot take the call.
    """
    query, key, value = (inputs.floating(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    unbatched = query.ndim == 3
    if unbatched and key.ndim == 3 and value.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    inputs.check_query_key(query, key, value)
    checks.check_devices(
        query,
        [
            *(("key", key), ("value", value), ("bias", bias), ("sinks", sinks), ("gates", gates)),
            *(("query_seq_lengths", query_seq_lengths), ("key_value_seq_lengths", key_value_seq_lengths)),
            *([("mask", mask)] if isinstance(mask, BlockMask) else []),
        ],
    )
    batch, q_len, heads, head_dim = query.shape
    kv_len = key.shape[1]

    block_mask = bind_mask(mask, is_causal, local_window_size, (batch, heads, q_len, kv_len), unbatched)
    traced_scale, scale = _scale(scale, head_dim)
    soft_cap = scalars.soft_cap(logits_soft_cap, scale)
    bias = _bias(bias, (batch, heads, q_len, kv_len), unbatched)
    lengths = _lengths(query_seq_lengths, key_value_seq_lengths, (batch, q_len, kv_len))
    sinks = _sinks(sinks, heads)
    gates = _gates(gates, mask, (batch, heads), unbatched)

    facts = refusals.AttentionFacts(
        dtype=query.dtype.name,
        head_dim=head_dim,
        value_dim=value.shape[-1],
        block_q=block_mask.block_q,
        block_kv=block_mask.block_kv,
        bias=bias is not None,
    )
    chosen, named = dispatch.choose(implementation, facts)
    if chosen == "xla":
        out, lse = sparse_attention_xla(
            query,
            key,
            value,
            block_mask,
            bias=bias,
            lengths=lengths,
            sinks=sinks,
            scale=scale if traced_scale is None else traced_scale,
            soft_cap=soft_cap,
            gates=gates,
            with_lse=return_residual,
        )
    else:
        attributes = AttentionAttributes(block_mask.block_q, block_mask.block_kv, scale, soft_cap or 0.0)
        call = AttentionCall(attributes, platform=chosen if named else None)
        stats = statistics_dtype(query.dtype)
        if traced_scale is not None:
            query = (query.astype(stats) * traced_scale.astype(stats)).astype(query.dtype)
        if lengths is None:
            lengths = np.array([[q_len, kv_len]], np.int32)
        sinks = None if sinks is None else sinks.astype(stats)[None, :]
        gates = None if gates is None else gates.astype(stats)
        out, lse = derivatives.attend(call, query, key, value, sinks, gates, block_mask, lengths)
        if return_residual:
            lse = derivatives.log_sum_exp(lse)
    if unbatched:
        out = out[0]
    if not return_residual:
        return out
    assert lse is not None  # asked for
    lse = jnp.swapaxes(lse, 1, 2)
    return out, lse[0] if unbatched else lse


def _scale(scale: Any, head_dim: int) -> tuple[jax.Array | None, float]:
    """A traced factor of the logits, or None; and the one that is known."""
    if not isinstance(scale, Tracer):
        return None, scalars.logits_scale(scale, head_dim)
    if scale.shape != () or not jnp.issubdtype(scale.dtype, jnp.number) or jnp.iscomplexobj(scale):
        raise TypeError(
            f"scale is one number, got a traced {scale.dtype} array of shape {scale.shape}; multiply the query by it"
        )
    return scale.astype(jnp.result_type(float)) if jnp.issubdtype(scale.dtype, jnp.integer) else scale, 1.0


def bind_mask(
    mask: Mask | BlockMask | ArrayLike | None,
    is_causal: bool,
    local_window_size: int | tuple[int | None, int | None] | None,
    sizes: tuple[int, int, int, int],
    unbatched: bool,
) -> BlockMask:
    """The block lists of a call with (B, N, T, S) sizes, from its arguments of these names."""
    batch, heads, q_len, kv_len = sizes
    extra: list[Mask] = []
    if is_causal:
        extra.append(CausalMask())
    if local_window_size is not None:
        extra.append(LocalMask(local_window_size))
    if isinstance(mask, BlockMask) and extra:
        raise ValueError(
            "is_causal and local_window_size cannot be added to a BlockMask, whose blocks are already chosen; mask its "
            "elements, mask & jax_bsk.masks.CausalMask(), or build it from the combined mask, which visits fewer "
            "blocks: (lazy & jax_bsk.masks.CausalMask()).bind(q_len, kv_len)"
        )
    if mask is not None and not isinstance(mask, Mask | BlockMask):
        check_kind(mask)
        mask = array_mask(_mask_array(mask, sizes, unbatched), q_len, kv_len)
    if not isinstance(mask, BlockMask):
        parts = [*extra] if mask is None else [mask, *extra]
        mask = functools.reduce(operator.and_, parts) if parts else FullMask()
    return as_block_mask(mask, q_len, kv_len, batch=batch, heads=heads)


def _mask_array(mask: ArrayLike, sizes: tuple[int, int, int, int], unbatched: bool) -> Any:
    """A boolean array of any broadcastable shape, with two dimensions at least."""
    array = mask if isinstance(mask, np.ndarray | jax.Array) else np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(
            f"mask is a Mask, a BlockMask or a boolean array (True attends), got an array of {array.dtype}; compare "
            "it, e.g. mask > 0, or pass numbers to be added to the logits as bias"
        )
    _check_broadcasts(array.shape, sizes, unbatched, "mask")
    return of_rank(array, max(array.ndim, 2))


def _check_broadcasts(shape: tuple[int, ...], full: tuple[int, int, int, int], unbatched: bool, name: str) -> None:
    """Refuses an array that has other dimensions than those of `full` or 1; the first ones may be missing."""
    if len(shape) <= len(full) and all(n in (1, m) for n, m in zip(shape[::-1], full[::-1], strict=False)):
        return
    batch, _, q_len, kv_len = full
    letters, wanted = ("NTS", full[1:]) if unbatched else ("BNTS", full)
    if shape == (batch, kv_len):
        remedy = f"numbers of each example's keys are {name}[:, None, None, :]"
    elif len(shape) == 3 and shape[0] == batch and shape[1] in (1, q_len) and shape[2] in (1, kv_len):
        remedy = f"numbers of each example are {name}[:, None]"
    elif shape == (batch, q_len):
        remedy = f"numbers of each example's queries are {name}[:, None, :, None]"
    else:
        remedy = f"give it dimensions of these sizes or 1, e.g. {name}[None]"
    raise ValueError(f"{name} broadcasts to {letters} = {wanted}, got shape {shape}; {remedy}")


def _bias(bias: ArrayLike | None, sizes: tuple[int, int, int, int], unbatched: bool) -> jax.Array | None:
    if bias is None:
        return None
    array = jnp.asarray(bias)
    if array.dtype == np.bool_:
        raise TypeError("bias holds numbers, got an array of bool; pass it as mask (True attends)")
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(jnp.float32)
    array = inputs.floating(array, "bias")
    _check_broadcasts(array.shape, sizes, unbatched, "bias")
    array = of_rank(array, 4)
    return jnp.broadcast_to(array, (*array.shape[:2], *sizes[2:]))


def _lengths(queries: ArrayLike | None, keys: ArrayLike | None, sizes: tuple[int, int, int]) -> jax.Array | None:
    if queries is None and keys is None:
        return None
    batch, q_len, kv_len = sizes

    def column(lengths: Any, longest: int, name: str) -> jax.Array:
        array = jnp.asarray(lengths)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} holds integers, got {array.dtype}; cast it, e.g. {name}.astype('int32')")
        if array.ndim == 0 and batch == 1:
            array = array[None]
        if array.shape != (batch,):
            raise ValueError(
                f"{name} has one length per example, shape ({batch},), got {array.shape}; give it one for each"
            )
        values = arrays.known(lengths)
        if values is not None and values.size and (values.min() < 0 or values.max() > longest):
            raise ValueError(
                f"{name} is in [0, {longest}], the tokens there are, got {values.min()} to {values.max()}; cut it, "
                f"e.g. jnp.clip(lengths, 0, {longest})"
            )
        return jnp.clip(array, 0, longest).astype(jnp.int32)

    # One that is not given is like the other, which an explicit mesh may shard.
    if queries is None:
        of_keys = column(keys, kv_len, "key_value_seq_lengths")
        of_queries = jnp.full_like(of_keys, q_len)
    else:
        of_queries = column(queries, q_len, "query_seq_lengths")
        of_keys = jnp.full_like(of_queries, kv_len) if keys is None else column(keys, kv_len, "key_value_seq_lengths")
    return jnp.stack([of_queries, of_keys], axis=1)


def _sinks(sinks: ArrayLike | None, heads: int) -> jax.Array | None:
    if sinks is None:
        return None
    array = inputs.floating(sinks, "sinks")
    if array.shape != (heads,):
        raise ValueError(
            f"sinks has one logit per query head, shape ({heads},), got {array.shape}; give each head its own"
        )
    return array


def _gates(gates: ArrayLike | None, mask: Any, sizes: tuple[int, int], unbatched: bool) -> jax.Array | None:
    if gates is None:
        return None
    if not isinstance(mask, BlockMask):
        given = "no mask" if mask is None else f"mask of type {type(mask).__name__}"
        raise ValueError(
            f"gates has one number for each entry of a BlockMask's lists, but the call has {given}; pass a BlockMask, "
            "e.g. mask=CausalMask().bind(q_len, kv_len), and gates of shape [B|1, N|1, mask.kv_blocks.shape[-1]]"
        )
    array = inputs.floating(gates, "gates")
    if array.ndim == 2 and unbatched:
        array = array[None]
    full = (*sizes, mask.capacity)
    if array.ndim != 3 or array.shape[2] != full[2] or any(array.shape[i] not in (1, full[i]) for i in (0, 1)):
        letters = "[N|1, capacity]" if unbatched else "[B|1, N|1, capacity]"
        raise ValueError(
            f"gates is {letters} with (B, N, capacity) = {full}, got shape {array.shape}; capacity is "
            "mask.kv_blocks.shape[-1]"
        )
    return array
