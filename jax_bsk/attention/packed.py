"""`packed_attention`: attention within sequences that are packed one after another, without a batch dimension.

It makes a `PackedMask` of its arguments and calls `attention.api`. Inside `jit` the block lists are computed on the
device from where the sequences begin (`masks.builders._intervals`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.attention.api import sparse_attention
from jax_bsk.biases import AlibiBias, Bias, PositionBias, RelativeBias
from jax_bsk.biases.base import BiasSum
from jax_bsk.core import checks, inputs
from jax_bsk.core.dispatch import Implementation
from jax_bsk.masks import BlockMask, CausalMask, LocalMask, Mask, MultiHeadMask, PackedMask, as_block_mask
from jax_bsk.masks.convert import check_kind

# Longest sequences for which blocks of 64 are taken: a block of 128 would touch two sequences more often than not.
SHORT_SEQUENCES = 512

Alignment = Literal["top_left", "bottom_right"]


@overload
def packed_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike | Sequence[int],
    cu_seqlens_kv: ArrayLike | Sequence[int] | None = None,
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    alignment: Alignment = "top_left",
    local_window_size: int | tuple[int | None, int | None] | None = None,
    scale: float | ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[False] = False,
) -> jax.Array: ...


@overload
def packed_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike | Sequence[int],
    cu_seqlens_kv: ArrayLike | Sequence[int] | None = None,
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    alignment: Alignment = "top_left",
    local_window_size: int | tuple[int | None, int | None] | None = None,
    scale: float | ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


@checks.refuses_flax(
    "packed_attention takes no arguments of Flax's modules; give a layer the mask "
    "jax_bsk.masks.PackedMask(cu_seqlens_q, within=mask)"
)
def packed_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike | Sequence[int],
    cu_seqlens_kv: ArrayLike | Sequence[int] | None = None,
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    alignment: Alignment = "top_left",
    local_window_size: int | tuple[int | None, int | None] | None = None,
    scale: float | ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    bias: Bias | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention within sequences that are packed one after another (variable lengths).

    Sequence n has the queries `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1]` and the keys `cu_seqlens_kv[n]` to
    `cu_seqlens_kv[n + 1]`; either may be none. No query attends to another sequence's keys, and blocks between
    sequences are skipped. Tokens from the last number on are padding: queries there give 0 and a log-sum-exp of -inf,
    as do queries that may attend to nothing. The numbers may be traced: other lengths compile nothing anew. For fewer
    sequences than the arrays have room for, repeat the last number.

    `mask`, `is_causal` and `local_window_size` are about positions, which count from the start of each sequence. All
    else is as in `sparse_attention`: gradients, `jit`, `vmap`, sharding. The lists are made anew in each call. Layers
    of one model share them by `sparse_attention(query, key, value, mask=bound)`, where `bound` is
    `jax_bsk.masks.PackedMask(cu_seqlens_q, within=mask).bind(T)`.

    Dimensions: T queries and S keys of all sequences, N query heads, K key/value heads (K divides N), H head size.

    Args:
      query: TNH array of float32, bfloat16, float16 or float64.
      key: SKH array of query's type.
      value: SKH array of query's type; its head size may differ from key's.
      cu_seqlens_q: Integers [sequences + 1] that never decrease and lie in [0, T]: where each sequence's queries begin,
        and where the last one's end. Known values are checked; traced ones that break this give NaN.
      cu_seqlens_kv: Integers [sequences + 1] for keys, in [0, S]. None takes `cu_seqlens_q`, and needs T = S.
      mask: `jax_bsk.masks.Mask` of the positions within each sequence, e.g. a `ChunkedMask` or `PrefixLMMask`. Arrays
        of numbers in it have one number per sequence. A `MultiHeadMask` gives each head a mask of its own.
      is_causal: Whether query position t attends only to key positions s <= t, on top of `mask`.
      alignment: What positions of queries are where a sequence has more or fewer queries than keys. "top_left", as in
        `jax.nn`: the first query has the position of the first key, 0. "bottom_right", as flash-attn from 2.1 on: the
        last query has the position of the last key.
      local_window_size: Number of keys to the left and to the right of a query's position that it may attend to, as in
        `sparse_attention`.
      scale: Factor of the logits, as in `sparse_attention`.
      logits_soft_cap: Bound of the logits, as in `sparse_attention`.
      sinks: [N] logits that join the softmax's denominators, as in `sparse_attention`.
      bias: `jax_bsk.biases` object that is added to the logits. Biases of distances (ALiBi, T5's table) are of those
        within each sequence; they need equal numbers of queries and keys, `cu_seqlens_kv` being None. Features of low
        rank are those of the packed tokens. Biases of blocks and arrays of all pairs go to `sparse_attention`.
      dropout_rate: Share of the probabilities that are dropped, as in `sparse_attention`.
      dropout_rng: Key of `jax.random`, needed where dropout_rate > 0.
      max_seqlen_q: Promise, an int: no sequence has more queries. It bounds the room that traced lists have: without
        it memory for lists grows with T x S (8 bytes per pair of blocks). Rows for which it is broken and that find no
        room give NaN.
      max_seqlen_kv: The same for keys; where `cu_seqlens_kv` is None, either says it.
      block_size: Tokens of a block of queries and of keys. None takes 64 where the promises bound all sequences to 512
        tokens, else 128.
      implementation: Name of an implementation, as in `sparse_attention`.
      return_residual: Whether the log-sum-exp is returned too.

    Returns:
      TNH output of query's type, with value's head size. With `return_residual` also a TN array, the log-sum-exp.

    Raises:
      ValueError: A shape, a number or a combination of arguments does not fit.
      TypeError: An argument has the wrong type.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import packed_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 64, 2, 16))
      >>> starts = jnp.array([0, 20, 50])  # sequences of 20 and 30 tokens, then 14 tokens of padding
      >>> out = packed_attention(q, k, v, starts, is_causal=True, implementation="cpu")
      >>> out.shape, bool((out[50:] == 0).all())
      ((64, 2, 16), True)
    """
    query, key, value = (inputs.floating(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(
            f"query is TNH and key and value SKH, without a batch, got query {query.shape}, key {key.shape}, value "
            f"{value.shape}; take the batch off, e.g. query[0], or give sparse_attention(..., mask=PackedMask(...)) all"
        )
    checks.check_devices(query, [("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv), ("mask", mask)])
    for numbers, name in ((cu_seqlens_q, "cu_seqlens_q"), (cu_seqlens_kv, "cu_seqlens_kv")):
        if numbers is not None and np.ndim(numbers) != 1:
            raise ValueError(
                f"{name} is [sequences + 1], got shape {np.shape(numbers)}; give sparse_attention(..., "
                "mask=PackedMask(...)) the numbers of several examples"
            )
    (q_len, heads, _), kv_len = query.shape, key.shape[0]
    if cu_seqlens_kv is None and q_len != kv_len:
        raise ValueError(
            f"cu_seqlens_kv is given where there are more or fewer keys than queries, got {q_len} queries and {kv_len} "
            "keys; say where each sequence's keys begin"
        )
    _check_bias(bias, cu_seqlens_kv)
    packed = functools.partial(
        PackedMask,
        cu_seqlens_q,
        cu_seqlens_kv,
        alignment=alignment,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
    )
    bound = as_block_mask(
        _of_heads(packed, _within(mask, is_causal, local_window_size)),
        q_len,
        kv_len,
        batch=1,
        heads=heads,
        block_size=_block_size(block_size, cu_seqlens_kv is None, max_seqlen_q, max_seqlen_kv),
    )
    options: dict[str, Any] = {
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "sinks": sinks,
        "dropout_rate": dropout_rate,
        "dropout_rng": dropout_rng,
        "implementation": implementation,
        "return_residual": return_residual,
    }
    return sparse_attention(query, key, value, bias, bound, **options)


def _check_bias(bias: Any, cu_seqlens_kv: Any) -> None:
    """Refuses what does not mean the same within every sequence."""
    if bias is None:
        return
    parts = bias.parts if isinstance(bias, BiasSum) else (bias,)
    for part in parts:
        if not isinstance(part, AlibiBias | RelativeBias | PositionBias):
            raise TypeError(
                f"bias is an AlibiBias, a RelativeBias, a PositionBias or a sum of these, got {type(part).__name__}; "
                "give sparse_attention(..., mask=PackedMask(...)) a bias of pairs or blocks of the packed tokens"
            )
        if cu_seqlens_kv is not None and not isinstance(part, PositionBias):
            raise ValueError(
                f"{type(part).__name__} needs as many keys as queries in each sequence, so that distances are those "
                "within it; leave cu_seqlens_kv out"
            )


def _within(mask: Any, is_causal: bool, window: Any) -> list[Mask]:
    """The masks within each sequence, all of which hold."""
    if isinstance(mask, BlockMask):
        raise ValueError(
            "mask is a lazy mask of the positions within a sequence, got a BlockMask; bind PackedMask(cu_seqlens_q, "
            "within=lazy) and pass that to sparse_attention"
        )
    if mask is not None and not isinstance(mask, Mask):
        check_kind(mask)
        raise TypeError(
            f"mask is a lazy mask of the positions within a sequence, got {type(mask).__name__}; an array of all pairs "
            "of tokens goes to sparse_attention, as mask=PackedMask(cu_seqlens_q) & ArrayMask(array)"
        )
    parts: list[Mask] = [] if mask is None else [mask]
    if is_causal:
        parts.append(CausalMask())
    if window is not None:
        parts.append(LocalMask(window))
    return parts


def _of_heads(packed: Any, within: list[Mask]) -> Mask:
    """The packed mask of all heads, or one for each head where a part has one."""
    first, rest = within[:1], within[1:]
    if first and isinstance(first[0], MultiHeadMask):
        masks: tuple[Mask, ...] = first[0].masks
        return MultiHeadMask([packed(within=functools.reduce(operator.and_, [mask, *rest])) for mask in masks])
    return packed(within=functools.reduce(operator.and_, within) if within else None)


def _block_size(given: Any, alike: bool, max_seqlen_q: int | None, max_seqlen_kv: int | None) -> int:
    if given is not None:
        return given
    known = [n for n in (max_seqlen_q, max_seqlen_kv) if n is not None]
    bounded = len(known) == 2 or (alike and known)
    return 64 if bounded and (min if alike else max)(known) <= SHORT_SEQUENCES else 128
