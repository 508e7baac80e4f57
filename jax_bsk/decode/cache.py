"""`attention` over a contiguous cache, one per example, and `append`, which writes to it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core import inputs, scalars
from jax_bsk.core.dispatch import Implementation
from jax_bsk.decode import call, sequence
from jax_bsk.decode import inputs as checks


@overload
def attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    lengths: ArrayLike,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    tree_mask: ArrayLike | None = None,
    key_blocks: ArrayLike | None = None,
    block_size: int = 128,
    k_scale: float | None = None,
    v_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    keys_per_part: int | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[False] = False,
) -> jax.Array: ...


@overload
def attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    lengths: ArrayLike,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    tree_mask: ArrayLike | None = None,
    key_blocks: ArrayLike | None = None,
    block_size: int = 128,
    k_scale: float | None = None,
    v_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    keys_per_part: int | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    lengths: ArrayLike,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    tree_mask: ArrayLike | None = None,
    key_blocks: ArrayLike | None = None,
    block_size: int = 128,
    k_scale: float | None = None,
    v_scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    keys_per_part: int | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention of each example's newest tokens over its cache of keys and values.

    Example b has `lengths[b]` positions in its cache, and its T queries are the last T of them: `append` writes their
    keys and values first. Positions from the length on are not read. The function has no gradients.

    Dimensions: B batch size, T queries of an example, S positions of the cache, N query heads, K key/value heads
    (K divides N), H head size.

    Args:
      query: [B, T, N, H] array of float32, bfloat16, float16 or float64.
      key_cache: [B, S, K, H] array of query's type, or quantised: see `ragged_paged_attention`.
      value_cache: [B, S, K, H] array of key_cache's type; its head size may differ.
      lengths: Integers [B] in [0, S], the filled positions, those of the queries included.
      is_causal: Whether a query attends to no position after its own.
      scale: Factor of the logits, a Python number; the default is 1 / sqrt(H).
      window: Number of positions up to its own that a query attends to; None for all.
      sink_tokens: Number of first positions that `window` leaves visible (StreamingLLM, arXiv 2309.17453).
      soft_cap: Bound of the logits, applied by tanh; a Python number in [1e-30, 1e30].
      sinks: [N] logits, one per head, that join the denominator of each softmax and carry no value.
      tree_mask: For speculative decoding, which of the T last positions each query attends to, in place of those up to
        its own: booleans [B, T, n] with n at most 64 (True attends), or uint32 [B, T, 2], lower word first. With more
        than 64 queries it is not read.
      key_blocks: Integers [B, K, count], the blocks of `block_size` positions that the queries of an example and
        key/value head attend to. Numbers below 0 and blocks past the length list nothing. A block that is listed twice
        counts twice. None for all.
      block_size: Positions of a block of `key_blocks`; it divides S.
      k_scale: Scale of quantised keys, a Python number: the logits are multiplied by it.
      v_scale: Scale of quantised values: the output is multiplied by it.
      axis_name: Inside `jax.shard_map`, the mesh axis (or a tuple of axes) that the cache's positions are sharded over.
        S is then the number of this device's positions: device i holds positions i S to (i + 1) S - 1. Lengths and
        `key_blocks` count positions and blocks of the whole cache. They and `query` are the same on all devices. Each
        device attends to its own positions, then outputs and log-sum-exps are gathered and merged in the order of the
        devices (`merge_partials`), so all have the same result. Outputs are rounded to query's type before that. The
        cache is not moved.
      keys_per_part: As in `ragged_paged_attention`.
      implementation: As in `sparse_attention`.
      return_residual: Whether the log-sum-exp is returned too. It is -inf for queries that attend to nothing.

    Returns:
      [B, T, N, H] output of query's type, with value_cache's head size; 0 where a query attends to nothing, NaN for
      examples whose length is not in [0, S]. With `return_residual` also float32 [B, T, N], the natural logarithm of
      the softmax's denominator.

    Raises:
      ValueError: A shape or a number does not fit, or there is no `shard_map` of `axis_name` around the call.
      TypeError: An argument has the wrong type.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import decode
      >>> keys, values = jnp.zeros((2, 2, 64, 2, 16))  # two examples of up to 64 positions, 2 key/value heads
      >>> lengths = jnp.array([10, 30])
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, 2, 16))
      >>> keys, values = decode.append(keys, k, lengths), decode.append(values, v, lengths)
      >>> decode.attention(q, keys, values, lengths + 1).shape
      (2, 1, 2, 16)
    """
    query, keys, values = (
        inputs.floating(query, "query"),
        checks.cache(key_cache, "key_cache"),
        checks.cache(value_cache, "value_cache"),
    )
    shapes = f"query {query.shape}, key_cache {keys.shape}, value_cache {values.shape}"
    if query.ndim != 4 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(f"query is [B, T, N, H], key_cache and value_cache [B, S, K, H], got {shapes}; add the batch")
    batch, count, heads, head_dim = query.shape
    if keys.shape[0] != batch or values.shape[:3] != keys.shape[:3] or keys.dtype != values.dtype:
        raise ValueError(
            "key_cache and value_cache have query's batch size, and one length, number of heads and type, got "
            f"{shapes} of {keys.dtype} and {values.dtype}"
        )
    if keys.shape[3] != head_dim:
        raise ValueError(f"key_cache has query's head size {head_dim}, got {keys.shape[3]} ({shapes}); pad the smaller")
    _, length, kv_heads, _ = keys.shape
    if length < 1 or values.shape[3] < 1:
        raise ValueError(f"a cache has one position and a head size of 1 or more, got {shapes}")
    checks.heads(heads, kv_heads)
    factor = 1 / math.sqrt(max(head_dim, 1)) if scale is None else scalars.logits_scale(scale, 1, "scale")
    if k_scale is not None:
        factor *= scalars.logits_scale(k_scale, 1, "k_scale")
    attributes = checks.attributes(
        scale=(factor, "scale" if k_scale is None else "scale * k_scale"),
        value_scale=1.0 if v_scale is None else v_scale,
        causal=is_causal,
        window=(window, "window"),
        sink_tokens=sink_tokens,
        soft_cap=soft_cap,
    )
    selection = checks.selection(key_blocks, "key_blocks", (batch, kv_heads), "batch, key/value heads")
    page = length if selection is None else checks.whole(block_size, "block_size")
    if page < 1 or length % page:
        raise ValueError(f"block_size divides the cache's {length} positions, got {block_size}; pad the cache")
    pages = length // page
    table: Any = np.arange(pages, dtype=np.int32)[None]
    lengths = checks.integers(lengths, "lengths", (batch,), "[batch]")
    head_sinks = checks.sinks(sinks, heads)
    if axis_name is not None:
        sequence.devices(axis_name)
        head_sinks = sequence.of_first(axis_name, head_sinks)
        if count == 1 and selection is None and window is None and tree_mask is None:
            # One query attends to all that is filled, wherever it stands: no position matters.
            attributes = dataclasses.replace(attributes, causal=False)
            lengths = sequence.own_length(axis_name, length, lengths)
        else:
            table, selection = sequence.own_pages(axis_name, pages, selection, (batch, kv_heads))
    result = call.attend(
        call.Operands(
            query=query,
            key=keys.reshape((batch, pages, page, *keys.shape[2:])),
            value=values.reshape((batch, pages, page, *values.shape[2:])),
            kv_lens=lengths[:, None],
            page_indices=table,
            cu_q_lens=np.array([0, count], np.int32),
            num_seqs=np.ones(1, np.int32),
            selection=None if selection is None else selection[:, None],
            tree=checks.tree_words(tree_mask, (batch, count), "batch, queries"),
            sinks=head_sinks,
        ),
        attributes,
        function="decode.attention",
        implementation=implementation,
        keys_per_part=checks.keys_per_part(keys_per_part),
        return_residual=return_residual or axis_name is not None,
    )
    if axis_name is None:
        return result
    out, lse = sequence.merge(axis_name, *result)
    return (out, lse) if return_residual else out


def append(
    cache: ArrayLike, new: ArrayLike, lengths: ArrayLike, *, axis_name: str | tuple[str, ...] | None = None
) -> jax.Array:
    """Writes new keys (or values) behind those that a contiguous cache holds.

    Donate the cache to `jax.jit` and it is updated in place.

    Args:
      cache: [B, S, K, H] array.
      new: [B, T, K, H] array, cast to the cache's type.
      lengths: Integers [B], the filled positions before the update: example b's token t is written at lengths[b] + t.
      axis_name: As in `attention`: each device writes the positions that it holds.

    Returns:
      The updated cache. Positions past the end of the cache, and below 0, are dropped.

    Raises:
      ValueError: A shape does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import decode
      >>> cache = decode.append(jnp.zeros((2, 4, 1, 1)), jnp.ones((2, 2, 1, 1)), jnp.array([0, 3]))
      >>> cache[:, :, 0, 0].tolist()
      [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    cache, new = checks.cache(cache, "cache"), checks.cache(new, "new")
    if cache.ndim != 4 or new.ndim != 4 or (new.shape[0], *new.shape[2:]) != (cache.shape[0], *cache.shape[2:]):
        raise ValueError(f"cache is [B, S, K, H] and new [B, T, K, H], got {cache.shape} and {new.shape}")
    starts = checks.integers(lengths, "lengths", (cache.shape[0],), "[batch]")
    most = cache.shape[1]
    if axis_name is not None:
        starts = starts - sequence.first_of_device(axis_name, most)

    def one(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        position = start + jnp.arange(new.shape[0], dtype=jnp.int32)
        position = jnp.where(position < 0, most, position)
        # Positions grow by 1, but for those that are dropped.
        return cache.at[position].set(new, mode="drop")

    return jax.vmap(one)(cache, new.astype(cache.dtype), starts)
