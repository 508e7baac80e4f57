"""Decoding with a cache, for the Linen and the NNX layer; nothing here needs Flax itself.

A cache holds the keys and values of the tokens so far, [*batch, max length, K, H], and one number per example, how many
these are. A call appends its tokens, one or several per example, and attends from them to all that is cached.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_bsk import decode
from jax_bsk.attention.api import sparse_attention
from jax_bsk.flax._attention_fn import both_masks, call_mask_of, promote
from jax_bsk.masks import BlockMask, CausalMask, FullMask, GlobalMask, LocalMask, Mask
from jax_bsk.masks.algebra.mask import AndMask, OrMask
from jax_bsk.masks.algebra.shifted import at_positions

# Of more tokens the queries alone fill tiles of `sparse_attention`.
MOST_DECODED = 64


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      key: Array [*batch, S, K, H].
      value: Array [*batch, S, K, Hv].
      index: Number of tokens so far, int32 [*batch]: where the next token of each example is written.
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array

    @classmethod
    def empty(cls, key: Any, value: Any) -> Cache:
        """Makes an empty cache from arrays (or shapes and types) of its keys and values."""
        return cls(jnp.zeros(key.shape, key.dtype), jnp.zeros(value.shape, value.dtype), empty_index(key.shape))

    def appended(self, key: jax.Array, value: jax.Array, lengths: jax.Array | None) -> Cache:
        """Returns the cache with the tokens of a call appended.

        Args:
          key: Array [*batch, T, K, H].
          value: Array [*batch, T, K, Hv].
          lengths: Number of tokens of each example, at most T; None is T. What lies behind them is not written, and
            neither are tokens past the cache's end.
        """
        batch, count, size = key.shape[:-3], key.shape[-3], self.key.shape[-3]
        if (*batch, size) != self.key.shape[:-2] or key.shape[-2:] != self.key.shape[-2:]:
            raise ValueError(
                f"the cache holds keys {self.key.shape}, [*batch, max length, heads, head size], and the call has keys "
                f"{key.shape}; make a cache for this batch"
            )
        index = self.index.reshape(-1)
        tokens = jnp.arange(count, dtype=jnp.int32)[None]
        places = index[:, None] + tokens
        if lengths is not None:
            places = jnp.where(tokens < lengths.reshape(-1, 1), places, size)

        def write(cached: jax.Array, new: jax.Array) -> jax.Array:
            # Mapped over examples, so that a mesh that shards them needs no communication.
            put = jax.vmap(lambda cached, new, places: cached.at[places].set(new, mode="drop"))
            flat, new = (x.reshape(-1, *x.shape[-3:]).astype(cached.dtype) for x in (cached, new))
            return put(flat, new, places).reshape(cached.shape)

        advanced = self.index + (jnp.int32(count) if lengths is None else lengths.astype(jnp.int32))
        return Cache(write(self.key, key), write(self.value, value), advanced)


def empty_index(key_shape: tuple[int, ...]) -> jax.Array:
    """Returns the index of an empty cache whose keys have that shape."""
    return jnp.zeros(key_shape[:-3], jnp.int32)


def attend_cached(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: Cache,
    mask: Mask | BlockMask | None,
    *,
    call_mask: Mask | BlockMask | jax.Array | None = None,
    lengths: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    logits_soft_cap: float | None = None,
    **options: Any,
) -> tuple[jax.Array, Cache]:
    """Appends the tokens of a call to the cache, and attends from them to the tokens so far, under the masks.

    Masks are those of the whole sequence, and no token attends to a later one.

    Args:
      query: Array [*batch, T, N, H].
      key: Array [*batch, T, K, H].
      value: Array [*batch, T, K, Hv].
      cache: Cache of S tokens at most.
      mask: Mask of the module.
      call_mask: Mask of this call, or an array that broadcasts to [*batch, N, T, S].
      lengths: Number of tokens of each example in this call, integers [*batch]; None is T.
      dtype: Type of the computation; None is what queries and the cache promote to.
      logits_soft_cap: Bound of the logits, as in `sparse_attention`.
      **options: scale, sinks and implementation, as in `sparse_attention`.

    Returns:
      Array [*batch, T, N, Hv], with NaN for examples whose tokens pass the cache's end, and the cache with the tokens
      appended.
    """
    if isinstance(mask, BlockMask) or isinstance(call_mask, BlockMask):
        raise ValueError(
            "decode=True needs lazy masks (jax_bsk.masks), which are bound to the position of each call's tokens; a "
            "BlockMask is bound to one length: give the mask that it was made of"
        )
    batch, count, size = query.shape[:-3], query.shape[-3], cache.key.shape[-3]
    new = cache.appended(key, value, lengths)
    start, filled = cache.index.reshape(-1), new.index.reshape(-1)
    query, keys, values = promote(query, new.key, new.value, dtype)
    query, keys, values = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, keys, values))
    joined = both_masks(both_masks(mask, call_mask_of(call_mask, batch, count, size)), CausalMask())
    assert isinstance(joined, Mask)
    # `decode.attention` takes the last positions for the queries': all of a call's tokens, or its only one.
    window = causal_window(joined) if count == 1 or (lengths is None and count <= MOST_DECODED) else None
    tokens = jnp.arange(count, dtype=jnp.int32)[None, :, None, None]
    given = None if lengths is None else tokens < lengths.reshape(-1, 1, 1, 1)
    if window is not None:
        near: dict[str, Any] = window._asdict()
        out = decode.attention(query, keys, values, filled, soft_cap=logits_soft_cap, **near, **options)
        out = out if given is None else jnp.where(given, out, jnp.zeros((), out.dtype))
    else:
        out = sparse_attention(
            query,
            keys,
            values,
            mask=at_positions(joined, start, count, size),
            query_seq_lengths=None if lengths is None else lengths.reshape(-1),
            key_value_seq_lengths=filled,
            logits_soft_cap=logits_soft_cap,
            **options,
        )
        # As in `decode.attention`: not all of the example's tokens are in the cache.
        past = (filled > size).reshape(-1, 1, 1, 1)
        out = jnp.where(past if given is None else past & given, jnp.asarray(jnp.nan, out.dtype), out)
    return out.reshape(*batch, *out.shape[1:]), new


class Window(NamedTuple):
    """What a query attends to: all up to its own position, or a window of these, and some first positions.

    Attributes:
      window: Number of positions up to its own that a query attends to; None for all.
      sink_tokens: Number of first positions that the window leaves visible.
    """

    window: int | None = None
    sink_tokens: int = 0


def causal_window(mask: Mask) -> Window | None:
    """Returns what a causal mask lets a query attend to, where that is a window; None where it is anything else."""
    parts = mask.masks if isinstance(mask, AndMask) else (mask,)
    windows = []
    for part in parts:
        if isinstance(part, CausalMask | LocalMask) and not (isinstance(part.offset, int) and part.offset == 0):
            return None
        if isinstance(part, OrMask) and len(part.masks) == 2:
            near, first = sorted(part.masks, key=lambda mask: isinstance(mask, GlobalMask))
            if not (isinstance(near, LocalMask) and isinstance(first, GlobalMask) and isinstance(first.tokens, int)):
                return None
            inner = causal_window(near & CausalMask())
            if inner is None:
                return None
            windows.append(inner if inner.window is None else inner._replace(sink_tokens=first.tokens))
        elif isinstance(part, LocalMask):
            left = part.window[0]
            windows.append(Window(None if left is None else left + 1))
        elif not isinstance(part, CausalMask | FullMask):
            return None
    bounded = [window for window in windows if window.window is not None]
    if not any(isinstance(part, CausalMask) for part in parts) or len(bounded) > 1:
        return None
    return bounded[0] if bounded else Window()
