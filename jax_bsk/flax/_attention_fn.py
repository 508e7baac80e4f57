"""`attention_fn`: turns the arguments of Flax's attention modules into one call of `sparse_attention`.

The module needs nothing of Flax itself. Flax hands an attention function more than blockwise attention can honour:
dropout of weights, weights to be sown, replaced einsums. The signature names each such argument, and the function
refuses it. Linen passes by name only what the signature shows, so it would silently drop an argument hidden in
`**kwargs`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_bsk.attention.api import sparse_attention
from jax_bsk.biases import Bias
from jax_bsk.core import checks
from jax_bsk.core.dispatch import Implementation
from jax_bsk.masks import ArrayMask, BlockMask, CausalMask, FullMask, Mask, SegmentMask
from jax_bsk.masks.algebra.shifted import at_positions, has_given_offset
from jax_bsk.masks.convert import array_mask


@checks.refuses_flax(
    "attention_fn makes an attention function and is none; call it: attention_fn=attention_fn(mask)",
    positional=1,
)
def attention_fn(
    mask: Mask | BlockMask | ArrayLike | None = None,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> Callable[..., jax.Array]:
    """Makes an `attention_fn` for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    The function combines the module's own `mask` (padding, or the cache of decoding) with the one given here by `&`. A
    mask of the module that only tells which keys are valid, `[*batch, 1, 1, S]`, is never expanded to all pairs. Other
    masks of Flax are dense arrays, so structure (causal, window, documents) is better given here, as a lazy mask.

    With `decode=True` Flax passes one query, all cached keys, and a mask of those written so far. The query's position
    is the last of these keys, and the lazy mask is bound to it. A mask that gives positions by an offset of its own is
    taken as it is.

    Args:
      mask: Mask of every call: a lazy `Mask` (which is bound to the lengths of the call), a `BlockMask`, or a boolean
        array [T, S], [N or 1, T, S] or [B or 1, N or 1, T, S], where B counts all leading dimensions of the inputs,
        flattened. None lets every query attend to every key.
      scale: Factor of the logits, as in `jax_bsk.sparse_attention`.
      logits_soft_cap: Bound of the logits, as in `jax_bsk.sparse_attention`.
      implementation: Implementation, as in `jax_bsk.sparse_attention`.

    Returns:
      A function of query `[*batch, T, N, H]`, key `[*batch, S, K, H]` and value `[*batch, S, K, Hv]` with the keyword
      arguments of Flax's `dot_product_attention`. It returns `[*batch, T, N, Hv]`; K divides N. "xla" follows a
      `precision`; the native kernels compute float32 in full and sum 16-bit types in float32 at every precision. A
      `bias` is an array that broadcasts to [*batch, N, T, S], or an object of `jax_bsk.biases`. Dropout follows
      `dropout_rate`, `dropout_rng` and `deterministic`, with the rate of `sparse_attention` (a multiple of 1/256) and
      other bits than Flax's. Each example and head has a mask of its own, whatever `broadcast_dropout` says: no mask
      is stored that broadcasting could make smaller.

    Raises:
      ValueError: The returned function raises it for what it cannot honour: `sow_weights`, a preset of dot algorithms
        as `precision`, replaced einsums, active dropout without a `dropout_rng`, a `BlockMask` beside a mask of the
        module, and a lazy mask for one query among several keys without a mask of the module, where the position of the
        query is unknown.
      TypeError: The function itself was given to a module as its attention function, without a call.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jax_bsk.flax
      >>> from jax_bsk.masks import CausalMask
      >>> attend = jax_bsk.flax.attention_fn(CausalMask(), implementation="cpu")
      >>> layer = nnx.MultiHeadAttention(2, 32, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 64, 32))).shape
      (1, 64, 32)
    """
    if mask is not None and not isinstance(mask, Mask | BlockMask):
        mask = ArrayMask(mask)
    static_mask = mask

    def sparse_attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | Bias | None = None,
        mask: Mask | BlockMask | jax.Array | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> jax.Array:
        # The softmax is always in float32 or wider, and each example and head has a dropout mask of its own.
        del broadcast_dropout, force_fp32_for_softmax
        dropped = dropout_rate > 0 and not deterministic
        if module is not None:
            raise ValueError(
                "sow_weights must be False, as the attention weights are never formed here, got True; to look at them, "
                "use Flax's own attention_fn with the dense mask"
            )
        for replaced, name in (
            (einsum_dot_general, "einsum_dot_general"),
            (qk_attn_weights_einsum, "qk_attn_weights_einsum"),
            (attn_weights_value_einsum, "attn_weights_value_einsum"),
        ):
            if replaced is not None:
                raise ValueError(
                    f"{name} must be None, as the kernels form no such product that could be replaced, got "
                    f"{replaced!r}; leave it out"
                )
        with _at_precision(precision):
            return attend(
                *promote(query, key, value, dtype),
                mask=static_mask,
                bias=bias,
                call_mask=mask,
                is_causal=is_causal,
                scale=scale,
                logits_soft_cap=logits_soft_cap,
                dropout_rate=dropout_rate if dropped else 0.0,
                dropout_rng=dropout_rng if dropped else None,
                implementation=implementation,
            )

    return sparse_attention_fn


def _at_precision(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which "xla" traces products with that precision; native kernels always have the highest."""
    parts = precision if isinstance(precision, tuple | list) else (precision,)
    try:
        wanted = max((jax.lax.Precision(x) for x in parts if x is not None), default=None, key=lambda x: x.value)
    except ValueError:
        raise ValueError(
            f"precision is None or a jax.lax.Precision, got {precision!r}; the kernels multiply in the inputs' type "
            "and sum in float32: leave it None, and for the module's projections use jax.default_matmul_precision(...)"
        ) from None
    if wanted in (None, jax.lax.Precision.DEFAULT):
        return contextlib.nullcontext()
    return jax.default_matmul_precision(wanted.name.lower())


def promote(
    query: jax.Array, key: jax.Array, value: jax.Array, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the three arrays in the type `dtype`, or in the type they promote to."""
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | BlockMask | None,
    *,
    call_mask: Mask | BlockMask | jax.Array | None = None,
    bias: jax.Array | Bias | None = None,
    lengths: jax.Array | None = None,
    is_causal: bool = False,
    **options: Any,
) -> jax.Array:
    """Computes sparse attention over any leading dimensions, under the masks of a module and of this call together.

    Args:
      query: Array [*batch, T, N, H].
      key: Array [*batch, S, K, H].
      value: Array [*batch, S, K, Hv].
      mask: Mask of the module.
      call_mask: Mask of this call, or an array that broadcasts to [*batch, N, T, S] and in which numbers other than 0
        attend.
      bias: Array that broadcasts to [*batch, N, T, S], or a bias of the flattened batch.
      lengths: Integers [*batch], the number of valid queries and keys of each example.
      is_causal: Whether the call is causal.
      **options: Further arguments of `sparse_attention`.

    Returns:
      Array [*batch, T, N, Hv].
    """
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
        raise ValueError(
            f"query, key and value are [*batch, length, heads, head size], got {shapes}; give all three a batch"
        )
    batch, q_len, kv_len = query.shape[:-3], query.shape[-3], key.shape[-3]
    if q_len == 1 < kv_len and call_mask is not None and not isinstance(call_mask, Mask | BlockMask):
        mask, is_causal = _at_last_key(mask, is_causal, _flatten_logits_like(call_mask, batch, "mask"), kv_len)
    _refuse_unknown_position(mask, is_causal, q_len, kv_len)
    call_mask = call_mask_of(call_mask, batch, q_len, kv_len)
    if lengths is not None:
        lengths = lengths.reshape(-1)
    out = sparse_attention(
        *(x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)),
        bias=bias if bias is None or isinstance(bias, Bias) else _flatten_logits_like(bias, batch, "bias"),
        mask=both_masks(mask, call_mask),
        is_causal=is_causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        **options,
    )
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[-3:])


def call_mask_of(
    mask: Mask | BlockMask | jax.Array | None, batch: tuple[int, ...], q_len: int, kv_len: int
) -> Mask | BlockMask | None:
    """Returns the mask of a call as a mask of the call's flattened batch, where it is an array."""
    if mask is None or isinstance(mask, Mask | BlockMask):
        return mask
    return _array_as_mask(_flatten_logits_like(mask, batch, "mask"), q_len, kv_len)


def both_masks(mask: Mask | BlockMask | None, call_mask: Mask | BlockMask | None) -> Mask | BlockMask | None:
    """Returns the mask that attends where both do; None attends everywhere."""
    if mask is None or call_mask is None:
        return call_mask if mask is None else mask
    if isinstance(mask, BlockMask) or isinstance(call_mask, BlockMask):
        raise ValueError(
            "a BlockMask cannot be combined with another mask, as its blocks are already chosen; give both as lazy "
            "masks (jax_bsk.masks), which are bound together in the call"
        )
    return mask & call_mask


def _at_last_key(
    mask: Mask | BlockMask | None, is_causal: bool, valid: Any, kv_len: int
) -> tuple[Mask | BlockMask | None, bool]:
    """Binds the masks of one query to its position in the cache: the last key that Flax's mask lets it attend to.

    In a step of cached decoding that mask holds the keys written so far, the query's own the last of them, and Flax
    says no more. A mask that gives positions by its offset stays as it is.

    Args:
      mask: Mask of the module.
      is_causal: Whether the call is causal.
      valid: Array [B or 1, N or 1, 1, S or 1] of the call.
      kv_len: S.

    Returns:
      The mask with its position, and whether the call is still to be made causal.
    """
    if isinstance(mask, BlockMask) or (mask is not None and has_given_offset(mask)):
        return mask, is_causal
    joined = both_masks(mask, CausalMask()) if is_causal else mask
    if not isinstance(joined, Mask):
        return mask, is_causal
    _check_array(valid, 1, kv_len)
    keys = jnp.arange(kv_len, dtype=jnp.int32)[None, None, None]
    last = jnp.where(jnp.asarray(valid) != 0, keys, -1).max((1, 2, 3))
    return at_positions(joined, last[0] if last.shape == (1,) else last, 1, kv_len), False


def _lacks_position(mask: Mask) -> bool:
    """Returns whether a mask reads the positions of queries but has no offset that gives them."""
    children = mask._children()
    if children:
        return any(map(_lacks_position, children))
    return not (has_given_offset(mask) or isinstance(mask, FullMask | ArrayMask | SegmentMask))


def _refuse_unknown_position(mask: Mask | BlockMask | None, is_causal: bool, q_len: int, kv_len: int) -> None:
    """Refuses a call that would take the newest query of a decoding step for the first of the sequence."""
    positional = isinstance(mask, Mask) and _lacks_position(mask)
    if q_len == 1 and kv_len > 1 and (positional or is_causal):
        raise ValueError(
            f"one query and {kv_len} keys, as in a step of decoding with a cache: the position of that query is not "
            f"known here, so {f'mask={mask!r}' if positional else 'is_causal'} would be read at position 0. Pass the "
            "valid keys as the module's mask, as Flax's cache does: the query stands at the last of them. Or give the "
            "position as the mask's offset, e.g. LocalMask(window, offset=position). Where position 0 is meant, pass "
            "a BlockMask: mask.bind(1, kv_len)"
        )


def _flatten_logits_like(array: Any, batch: tuple[int, ...], name: str) -> Any:
    """Joins the leading dimensions of an array that broadcasts to [*batch, N, T, S], which may all be 1."""
    array = array if isinstance(array, np.ndarray | jax.Array) else jnp.asarray(array)
    if array.ndim > len(batch) + 3:
        raise ValueError(f"{name} broadcasts to [*batch, heads, q_len, kv_len] with batch {batch}, got {array.shape}")
    array = array.reshape((1,) * (len(batch) + 3 - array.ndim) + array.shape)
    leading, rest = array.shape[:-3], array.shape[-3:]
    if all(n == 1 for n in leading):
        return array.reshape(1, *rest)
    if any(n not in (1, m) for n, m in zip(leading, batch, strict=True)):
        raise ValueError(f"{name} broadcasts to [*batch, heads, q_len, kv_len] with batch {batch}, got {array.shape}")
    return array if len(batch) == 1 else jnp.broadcast_to(array, (*batch, *rest)).reshape(-1, *rest)


def _array_as_mask(array: Any, q_len: int, kv_len: int) -> Mask:
    """Makes a mask of Flax's array [B or 1, N or 1, T or 1, S or 1], often float32: numbers other than 0 attend."""
    array = array if array.dtype == np.bool_ else array != 0
    _check_array(array, q_len, kv_len)
    if array.shape[-2] == array.shape[1] == 1 and q_len > 1:
        # The array only tells which keys are valid. Queries and valid keys are segment 0, which is linear in the
        # length.
        valid = jnp.broadcast_to(array[:, 0, 0], (array.shape[0], kv_len))
        return SegmentMask(jnp.zeros(q_len, jnp.int32), jnp.where(valid, 0, 1).astype(jnp.int32))
    return array_mask(jnp.asarray(array), q_len, kv_len)


def _check_array(array: Any, q_len: int, kv_len: int) -> None:
    rows, columns = array.shape[-2:]
    if rows not in (1, q_len) or columns not in (1, kv_len):
        raise ValueError(f"mask broadcasts to [*batch, heads, {q_len}, {kv_len}], got {array.shape}")


def default_head_dim(head_dim: int | None, features: int, num_heads: int) -> int:
    """Returns the size of a head: `head_dim`, or features / num_heads where it is None."""
    if head_dim is not None:
        return head_dim
    if features % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the {features} features; give head_dim")
    return features // num_heads
