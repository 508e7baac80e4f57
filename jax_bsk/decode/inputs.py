"""Checks of what both public functions of decoding are given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core import inputs, scalars
from jax_bsk.decode.ffi import DecodeAttributes
from jax_bsk.decode.tokens import Ragged

MOST_DRAFTS = 64  # bits of a token's word
_INT32 = np.iinfo(np.int32)


def cache(x: ArrayLike, name: str) -> jax.Array:
    """A cache: floating-point, or int8.

    Raises:
      TypeError: It is of another type.
    """
    array = jnp.asarray(x)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype == jnp.int8):
        raise TypeError(f"{name} is a floating-point or int8 array, got {array.dtype}; cast it")
    return array


def pages(x: ArrayLike, name: str) -> jax.Array:
    """A cache in pages [P, Z, 2 K, H].

    Raises:
      TypeError: It is of another type.
      ValueError: It has another shape.
    """
    array = cache(x, name)
    if array.ndim != 4 or array.shape[2] % 2 or 0 in array.shape:
        raise ValueError(
            f"{name} is [pages, page size, 2 key/value heads, head size], keys at even heads, none of them 0, got "
            f"shape {array.shape}"
        )
    return array


def ragged(kv_lens: Any, page_indices: Any, cu_q_lens: Any, num_seqs: Any) -> Ragged:
    """Lengths, table, offsets and number of sequences of a batch.

    Raises:
      TypeError: One holds no integers.
      ValueError: One has another shape.
    """
    table = jnp.asarray(page_indices)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"page_indices is [sequences, pages of a sequence], none of them 0, got shape {table.shape}; pad it"
        )
    seqs = table.shape[0]
    number = jnp.asarray(num_seqs)
    return Ragged(
        kv_lens=integers(kv_lens, "kv_lens", (seqs,), "[sequences]"),
        page_indices=integers(table, "page_indices", table.shape, "[sequences, pages of a sequence]"),
        cu_q_lens=integers(cu_q_lens, "cu_q_lens", (seqs + 1,), "[sequences + 1]"),
        num_seqs=integers(number[None] if number.ndim == 0 else number, "num_seqs", (1,), "[1]"),
    )


def integers(x: ArrayLike, name: str, shape: tuple[int, ...], letters: str) -> jax.Array:
    """An array of integers of a shape, as int32.

    Raises:
      TypeError: It holds no integers.
      ValueError: It has another shape.
    """
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} holds integers, got {array.dtype}; cast it, e.g. {name}.astype('int32')")
    if array.shape != shape:
        raise ValueError(f"{name} is {letters} = {shape}, got shape {array.shape}; reshape or pad it")
    if array.dtype.itemsize > 4:  # what 32 bits do not hold is wrong, and stays so
        array = jnp.minimum(array, _INT32.max)
        if jnp.issubdtype(array.dtype, jnp.signedinteger):
            array = jnp.maximum(array, _INT32.min)
    return array.astype(jnp.int32)


def heads(query_heads: int, kv_heads: int) -> None:
    """Refuses query heads that are no multiple of the key/value heads."""
    if query_heads < 1 or kv_heads < 1 or query_heads % kv_heads:
        raise ValueError(
            f"query's heads are a multiple of the cache's (grouped-query attention), got {query_heads} and {kv_heads}; "
            "repeat the cache's"
        )


def attributes(
    *,
    scale: tuple[float, str],
    value_scale: float,
    causal: bool,
    window: tuple[int | None, str],
    sink_tokens: int,
    soft_cap: Any,
) -> DecodeAttributes:
    """Static numbers of a call; `scale` and `window` come with their names.

    Raises:
      TypeError: One is no number that is known when tracing.
      ValueError: One is outside its range.
    """
    factor = scalars.logits_scale(scale[0], 1, scale[1])
    cap = scalars.soft_cap(soft_cap, factor, "soft_cap")
    given, name = window
    near, first = 0 if given is None else whole(given, name), whole(sink_tokens, "sink_tokens")
    if given is not None and near < 1:
        raise ValueError(f"{name} is at least 1, the query's own position, got {given}; pass None for no window")
    if first < 0:
        raise ValueError(f"sink_tokens is at least 0, got {sink_tokens}; pass 0 for none")
    if first and given is None:
        raise ValueError(
            f"sink_tokens are positions that a window leaves visible, but the call has no {name}; pass both, or none"
        )
    return DecodeAttributes(
        scale=factor,
        soft_cap=cap or 0.0,
        value_scale=scalars.logits_scale(value_scale, 1, "v_scale", of="output"),
        causal=bool(causal),
        # No cache has more positions than 32 bits count.
        window=min(near, _INT32.max),
        sink_tokens=min(first, _INT32.max),
    )


def whole(x: Any, name: str) -> int:
    """An integer that is known when tracing."""
    value = scalars.number(x, name)
    if not value.is_integer():  # nor infinite, nor NaN
        raise TypeError(f"{name} is an integer, got {x!r}; round it")
    return int(value)


def keys_per_part(given: int | None) -> int | None:
    """The caller's keys of a part, checked."""
    if given is None:
        return None
    value = whole(given, "keys_per_part")
    if value < 64 or value % 64:
        raise ValueError(f"keys_per_part is a positive multiple of 64, got {given}; pass None to choose")
    return min(value, _INT32.max // 64 * 64)


def tree_words(tree_mask: ArrayLike | None, lead: tuple[int, ...], letters: str) -> jax.Array | None:
    """The tree as words: uint32 [*lead, 2], from that or from booleans [*lead, <= 64].

    Raises:
      TypeError: It is of another type.
      ValueError: It has another shape.
    """
    if tree_mask is None:
        return None
    array = jnp.asarray(tree_mask)
    if array.dtype == jnp.uint32:
        if array.shape != (*lead, 2):
            raise ValueError(f"tree_mask of uint32 is [{letters}, 2] = {(*lead, 2)}, got shape {array.shape}")
        return array
    if array.dtype != np.bool_:
        raise TypeError(f"tree_mask holds booleans, or words of uint32, got {array.dtype}; compare it, e.g. mask > 0")
    if array.shape[:-1] != lead or not 1 <= array.shape[-1] <= MOST_DRAFTS:
        raise ValueError(
            f"tree_mask of booleans is [{letters}, drafts] with ({letters}) = {lead} and at most {MOST_DRAFTS} drafts, "
            f"got shape {array.shape}"
        )
    padded = jnp.pad(array, [(0, 0)] * len(lead) + [(0, MOST_DRAFTS - array.shape[-1])])
    bits = padded.reshape((*lead, 2, 32)).astype(jnp.uint32)
    places = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    return (bits * jnp.expand_dims(places, tuple(range(len(lead) + 1)))).sum(-1, dtype=jnp.uint32)


def sinks(x: ArrayLike | None, heads: int) -> jax.Array | None:
    """One logit per query head in float32, checked."""
    if x is None:
        return None
    array = inputs.floating(x, "sinks")
    if array.shape != (heads,):
        raise ValueError(
            f"sinks has one logit per query head, shape ({heads},), got {array.shape}; give each head its own"
        )
    return array.astype(jnp.float32)


def selection(x: ArrayLike | None, name: str, lead: tuple[int, ...], letters: str) -> jax.Array | None:
    """Pages (blocks) per key/value head, int32 [*lead, count], checked."""
    if x is None:
        return None
    array = jnp.asarray(x)
    if array.ndim != len(lead) + 1 or array.shape[:-1] != lead or array.shape[-1] < 1:
        raise ValueError(
            f"{name} is [{letters}, count] with ({letters}) = {lead} and a count of 1 or more, got shape "
            f"{array.shape}; fill it up with -1"
        )
    return integers(array, name, array.shape, f"[{letters}, count]")
