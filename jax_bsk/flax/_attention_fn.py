"""From the arguments of Flax's attention modules to one call of `sparse_attention`; needs nothing of Flax itself.

Flax hands an attention function more than attention can honour blockwise (dropout of weights, weights to be sown,
replaced einsums). Each such argument is named here and refused: Linen passes by name only what the signature shows, so
an argument hidden in `**kwargs` would be dropped without a word.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.attention.api import sparse_attention
from jax_bsk.core import checks
from jax_bsk.masks import ArrayMask, BlockMask, FullMask, Mask, SegmentMask
from jax_bsk.masks.convert import array_mask

Implementation = Literal["cpu", "cuda", "xla"]


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
    """An `attention_fn` for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    The module's own `mask` (padding, the cache of decoding) is combined by `&` with the one given here. One that only
    says which keys are valid, `[*batch, 1, 1, kv_len]`, is never expanded to all pairs. The others of Flax are dense
    arrays: give structure (causal, window, documents) here, as a lazy mask.

    Args:
      mask: What may attend to what in each call: a lazy `Mask` (bound to the lengths of the call), a `BlockMask`, or a
        boolean array [T, S], [N|1, T, S] or [B|1, N|1, T, S]. None attends to everything. B counts all leading
        dimensions of the inputs, flattened.
      scale, logits_soft_cap, implementation: As in `jax_bsk.sparse_attention`.

    Returns:
      A function of `query` [*batch, T, N, H], `key` [*batch, S, K, H] and `value` [*batch, S, K, Hv] with the keyword
      arguments of Flax's `dot_product_attention`, that returns [*batch, T, N, Hv]. K divides N.

      A `precision` is honoured: the native kernels compute float32 in full and sum 16-bit types in float32 whatever it
      says, and "xla" follows it. It raises `ValueError` for what it cannot honour: active dropout, `sow_weights`, a
      preset of dot algorithms as `precision`, replaced einsums, a
      `BlockMask` beside a mask of the module, and a lazy mask in a step of cached decoding, where the position of the
      one query is unknown. A `bias` is taken by the "xla" implementation only.
    """
    if mask is not None and not isinstance(mask, Mask | BlockMask):
        mask = ArrayMask(mask)
    static_mask = mask

    def sparse_attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: Mask | BlockMask | jax.Array | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> jax.Array:
        # The softmax is in float32 at least, always; without dropout there is nothing to broadcast, no use for a key.
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        _refuse_dropout(dropout_rate, deterministic)
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
                implementation=implementation,
            )

    return sparse_attention_fn


def _at_precision(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """Where products are traced with a precision that XLA is asked for; the native kernels' is the highest always."""
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


def _refuse_dropout(dropout_rate: float, deterministic: bool) -> None:
    if dropout_rate > 0 and not deterministic:
        raise ValueError(
            f"dropout_rate must be 0, as attention weights are never formed here, got dropout_rate={dropout_rate}; "
            "drop out the module's output instead, or set deterministic=True"
        )


def promote(
    query: jax.Array, key: jax.Array, value: jax.Array, dtype: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three in the type `dtype`, or the one they promote to."""
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | BlockMask | None,
    *,
    call_mask: Mask | BlockMask | jax.Array | None = None,
    bias: jax.Array | None = None,
    lengths: jax.Array | None = None,
    is_causal: bool = False,
    **options: Any,
) -> jax.Array:
    """Sparse attention over any leading dimensions, under a module's mask and the one of this call together.

    Args:
      query: [*batch, T, N, H].
      key: [*batch, S, K, H].
      value: [*batch, S, K, Hv].
      mask: The module's.
      call_mask: This call's: a mask, or an array broadcastable to [*batch, N, T, S] where what is not 0 attends.
      bias: Broadcastable to [*batch, N, T, S].
      lengths: Integers [*batch], valid queries and keys of each example.
      is_causal: As in `sparse_attention`, as are the options.

    Returns:
      [*batch, T, N, Hv].
    """
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
        raise ValueError(
            f"query, key and value are [*batch, length, heads, head size], got {shapes}; give all three a batch"
        )
    batch, q_len, kv_len = query.shape[:-3], query.shape[-3], key.shape[-3]
    _refuse_unknown_position(mask, is_causal, q_len, kv_len)
    if call_mask is not None and not isinstance(call_mask, Mask | BlockMask):
        call_mask = _array_as_mask(_flatten_logits_like(call_mask, batch, "mask"), q_len, kv_len)
    if lengths is not None:
        lengths = lengths.reshape(-1)
    out = sparse_attention(
        *(x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)),
        bias=None if bias is None else _flatten_logits_like(bias, batch, "bias"),
        mask=_both(mask, call_mask),
        is_causal=is_causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        **options,
    )
    return out if len(batch) == 1 else out.reshape(*batch, *out.shape[-3:])


def _both(mask: Mask | BlockMask | None, call_mask: Mask | BlockMask | None) -> Mask | BlockMask | None:
    if mask is None or call_mask is None:
        return call_mask if mask is None else mask
    if isinstance(mask, BlockMask) or isinstance(call_mask, BlockMask):
        raise ValueError(
            "a BlockMask cannot be combined with another mask, as its blocks are already chosen; give both as lazy "
            "masks (jax_bsk.masks), which are bound together in the call"
        )
    return mask & call_mask


def _lacks_position(mask: Mask) -> bool:
    """Whether a mask reads the positions of queries and was given none as an offset."""
    children = mask._children()
    if children:
        return any(map(_lacks_position, children))
    offset = getattr(mask, "offset", 0)
    given = not isinstance(offset, int) or offset != 0
    return not (given or isinstance(mask, FullMask | ArrayMask | SegmentMask))


def _refuse_unknown_position(mask: Mask | BlockMask | None, is_causal: bool, q_len: int, kv_len: int) -> None:
    """Refuses what would take the newest query of a decoding step for the first position of the sequence."""
    positional = isinstance(mask, Mask) and _lacks_position(mask)
    if q_len == 1 and kv_len > 1 and (positional or is_causal):
        raise ValueError(
            f"one query and {kv_len} keys, as in a step of decoding with a cache: the position of that query is not "
            f"known here, so {f'mask={mask!r}' if positional else 'is_causal'} would be read at position 0. The mask "
            "of Flax's cache is causal already: decode with attention_fn() and without is_causal, and give the row of "
            "any other mask as the module's mask, or give the position as its offset, e.g. LocalMask(window, "
            "offset=position). Where position 0 is meant, pass a BlockMask: mask.bind(1, kv_len)"
        )


def _flatten_logits_like(array: Any, batch: tuple[int, ...], name: str) -> Any:
    """An array broadcastable to [*batch, N, T, S], with the leading dimensions as one: [B|1, N|1, T|1, S|1]."""
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
    """The mask of a [B|1, N|1, T|1, S|1] array of Flax's, often float32: as there, what is not 0 attends."""
    array = array if array.dtype == np.bool_ else array != 0
    rows, columns = array.shape[-2:]
    if rows not in (1, q_len) or columns not in (1, kv_len):
        raise ValueError(f"mask broadcasts to [*batch, heads, {q_len}, {kv_len}], got {array.shape}")
    if rows == array.shape[1] == 1 and q_len > 1:
        # Only which keys are valid: queries are segment 0, valid keys too. Linear in the length, not quadratic.
        valid = jnp.broadcast_to(array[:, 0, 0], (array.shape[0], kv_len))
        return SegmentMask(jnp.zeros(q_len, jnp.int32), jnp.where(valid, 0, 1).astype(jnp.int32))
    return array_mask(jnp.asarray(array), q_len, kv_len)


def default_head_dim(head_dim: int | None, features: int, num_heads: int) -> int:
    """The size of a head, which `features` gives where it is not told."""
    if head_dim is not None:
        return head_dim
    if features % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the {features} features; give head_dim")
    return features // num_heads
