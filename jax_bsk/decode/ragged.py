"""`ragged_paged_attention`: attention of a serving batch over a cache in pages, and the writing of its pages."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.core import inputs, scalars
from jax_bsk.core.dispatch import Implementation
from jax_bsk.decode import call, shared, tokens
from jax_bsk.decode import inputs as checks
from jax_bsk.decode.merge import merge_partials

_MASK_VALUE = -1e4  # logits of masked keys are to vanish; here they do not exist


@overload
def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    sink_tokens: int = 0,
    tree_mask: ArrayLike | None = None,
    page_selection: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    shared_pages: ArrayLike | None = None,
    keys_per_part: int | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[False] = False,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
) -> jax.Array: ...


@overload
def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    sink_tokens: int = 0,
    tree_mask: ArrayLike | None = None,
    page_selection: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    shared_pages: ArrayLike | None = None,
    keys_per_part: int | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[True],
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    sink_tokens: int = 0,
    tree_mask: ArrayLike | None = None,
    page_selection: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    shared_pages: ArrayLike | None = None,
    keys_per_part: int | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention of a serving batch: prompts and decoding sequences in one call, over a cache in pages.

    Names, order and meanings are those of `jax.experimental.pallas.ops.tpu.ragged_paged_attention`, up to
    `v_scale`. The tokens of all sequences stand in a row. Those of sequence s are `cu_q_lens[s]` to
    `cu_q_lens[s + 1] - 1`. They are the last of its `kv_lens[s]` positions, and their keys and values are in the cache
    already (`append_pages` writes them). A query attends to its own position and those before it.

    Lengths, tables and the cache may be traced: a compiled program serves any batch of its sizes. Positions that a
    query does not attend to are not read into its result, so NaN in a freed page reaches nobody. Differences to JAX's
    function: tokens of no sequence yield 0, and wrong integers yield NaN (see Returns).

    There are no gradients. `vmap` maps over everything but `sinks`.

    Letters: T tokens, N query heads, K key/value heads (K divides N), H head size, P pages of Z positions, Q sequences
    at most, M pages of a sequence at most.

    Args:
      q: [T, N, H] array of float32, bfloat16, float16 or float64.
      kv_pages: [P, Z, 2 K, H] cache with keys at even and values at odd heads, of q's type. On CUDA also int8, and on
        Hopper float8_e4m3fn, with bfloat16 and float16 queries; "xla" takes int8 and every floating type with all.
      kv_lens: Integers [Q], positions of each sequence, those of its queries included.
      page_indices: Integers [Q, M], the page that holds each sequence's positions 0 to Z - 1, Z to 2 Z - 1, and so on.
        Entries past the sequence's length are not read.
      cu_q_lens: Integers [Q + 1], the offsets of the sequences' tokens. Entries past `num_seqs` are not read.
      num_seqs: Integers [1] (or one integer), how many sequences there are.
      sm_scale: Factor of the logits, a Python number in [-2e38, 2e38].
      sliding_window: Number of positions that a query attends to, its own included; None for all.
      soft_cap: Bound of the logits, applied by tanh (arXiv 2408.00118); a Python number in [1e-30, 1e30].
      mask_value: Taken for compatibility. Masked keys have no weight at all, so it must be None or below -1e4.
      k_scale: Scale of quantised keys, a Python number: the logits are multiplied by it.
      v_scale: Scale of quantised values: the output is multiplied by it.
      sink_tokens: Number of first positions that `sliding_window` leaves visible (StreamingLLM, arXiv 2309.17453).
      tree_mask: For speculative decoding, which of its sequence's tokens each token attends to, in place of those up to
        its own: booleans [T, n] with n at most 64 (True attends), or the same as bits, uint32 [T, 2], lower word first.
        Number j stands for the sequence's token j. Sequences of more than 64 tokens are causal. A window is counted in
        positions of the cache.
      page_selection: Integers [Q, K, count], the pages that all queries of a sequence and key/value head attend to,
        counted within the sequence (0 is its first Z positions). Numbers below 0 and pages past the length list
        nothing. A page that is listed twice counts twice. None for all pages.
      sinks: [N] logits, one per head, that join the denominator of each softmax and carry no value (arXiv 2508.10925).
      shared_pages: Integer [] or [1], which may be traced: how many leading pages to read once for all sequences that
        share them. Sequences that stand side by side and begin with the same page share the leading pages that all
        their tables have in common and that end before the first token of each. Too large a number (M, say) is
        therefore no mistake. What is shared and what is not are two calls, which `merge_partials` puts together:
        their outputs are rounded to q's type before that. None makes one call.
      keys_per_part: Keys that are summed in a row, a multiple of 64, before such parts are merged in their order. None
        chooses by the sizes of the call. With equal parts a sequence has the same bits whatever else is in the batch.
      implementation: "cuda" or "cpu" (native kernels), "xla" (plain JAX, for every platform and type), or None for the
        platform's native kernel, and "xla" with a `FallbackWarning` where that cannot take the call.
      return_residual: Whether the log-sum-exp is returned too. It is -inf for tokens that attend to nothing.
      num_kv_pages_per_block: Ignored; it tunes JAX's kernel for TPUs.
      num_queries_per_block: Ignored, likewise.
      vmem_limit_bytes: Ignored, likewise.

    Returns:
      [T, N, H] output of q's type. With `return_residual` also float32 [T, N], the natural logarithm of the softmax's
      denominator. Both are NaN where the integers are wrong: for all tokens where `num_seqs` is not in [0, Q], or the
      offsets are below 0, decrease or end past T; for a sequence's tokens where its length is below 0 or beyond M Z;
      for a query that attends to a position of a page outside [0, P). Tokens of no sequence, and those that attend to
      nothing, yield 0.

    Raises:
      ValueError: A shape or a number does not fit.
      TypeError: An argument has the wrong type.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import decode
      >>> pages = jax.random.normal(jax.random.key(0), (8, 16, 2 * 2, 32))  # 8 pages of 16 positions, 2 key/value heads
      >>> q = jax.random.normal(jax.random.key(1), (7, 4, 32))  # a prompt of 5 tokens, a decoding sequence, padding
      >>> out = decode.ragged_paged_attention(
      ...     q, pages, jnp.array([5, 40]), jnp.array([[3, 0, 0], [1, 6, 2]]), jnp.array([0, 5, 6]), jnp.array([2])
      ... )
      >>> out.shape, bool((out[6] == 0).all())
      ((7, 4, 32), True)
    """
    del num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes
    q = inputs.floating(q, "q")
    if q.ndim != 3:
        raise ValueError(
            f"q is [tokens, heads, head size], got shape {q.shape}; put the tokens of all sequences in a row"
        )
    kv_pages = checks.pages(kv_pages, "kv_pages")
    count, heads, head_dim = q.shape
    kv_heads = kv_pages.shape[2] // 2
    if kv_pages.shape[3] != head_dim:
        raise ValueError(f"kv_pages has q's head size {head_dim}, got {kv_pages.shape[3]}; pad the smaller")
    checks.heads(heads, kv_heads)
    batch = checks.ragged(kv_lens, page_indices, cu_q_lens, num_seqs)
    seqs = batch.page_indices.shape[0]
    if mask_value is not None and not scalars.number(mask_value, "mask_value") <= _MASK_VALUE:
        raise ValueError(
            f"mask_value is None or below {_MASK_VALUE:g}, got {mask_value}: masked keys have no weight here, whatever "
            "the value; leave it out"
        )
    factor = scalars.logits_scale(sm_scale, 1, "sm_scale")
    if k_scale is not None:
        factor *= scalars.logits_scale(k_scale, 1, "k_scale")
    attributes = checks.attributes(
        scale=(factor, "sm_scale * k_scale"),
        value_scale=1.0 if v_scale is None else v_scale,
        causal=True,
        window=(sliding_window, "sliding_window"),
        sink_tokens=sink_tokens,
        soft_cap=soft_cap,
    )
    options: dict[str, Any] = {
        "function": "decode.ragged_paged_attention",
        "implementation": implementation,
        "keys_per_part": checks.keys_per_part(keys_per_part),
    }
    operands = call.Operands(
        query=q,
        key=kv_pages,
        value=None,
        **batch._asdict(),
        selection=checks.selection(page_selection, "page_selection", (seqs, kv_heads), "sequences, key/value heads"),
        tree=checks.tree_words(tree_mask, (count,), "tokens"),
        sinks=checks.sinks(sinks, heads),
    )
    if shared_pages is None:
        return call.attend(operands, attributes, return_residual=return_residual, **options)
    if sliding_window is not None or page_selection is not None:
        raise ValueError(
            "shared_pages are attended to by all tokens of a sequence, but a sliding_window or page_selection leaves "
            "some out; leave shared_pages out"
        )
    most = jnp.asarray(shared_pages)
    most = checks.integers(most[None] if most.ndim == 0 else most, "shared_pages", (1,), "[1]")[0]
    prefixes, rest = shared.split(batch, most, kv_pages.shape[1])
    # The tokens of a group are one sequence of queries behind its prefix: all of them attend to all of it.
    behind = operands._replace(tree=None, sinks=None, **prefixes._asdict())
    partials = [
        call.attend(
            behind, dataclasses.replace(attributes, causal=False), return_residual=True, one_sequence=True, **options
        ),
        call.attend(operands._replace(**rest._asdict()), attributes, return_residual=True, **options),
    ]
    out, lse = merge_partials(*zip(*partials, strict=True))
    return (out, lse) if return_residual else out


def append_pages(
    kv_pages: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
) -> jax.Array:
    """Writes keys and values of a batch's tokens into their pages: the update before `ragged_paged_attention`.

    Token number t of sequence s is written at the position `kv_lens[s] - q_len + t - cu_q_lens[s]`, where q_len is the
    number of the sequence's tokens: at the last positions, as the attention reads them. Donate `kv_pages` to `jax.jit`
    and it is updated in place.

    Args:
      kv_pages: [P, Z, 2 K, H] cache.
      key: [T, K, H] keys of the tokens; cast to the cache's type.
      value: [T, K, H] values of the tokens.
      kv_lens: As in `ragged_paged_attention`, after the update.
      page_indices: As there.
      cu_q_lens: As there.
      num_seqs: As there.

    Returns:
      The updated pages. Nothing is written for tokens of no sequence, for positions below 0 or beyond the table or in a
      page outside [0, P), and nothing at all where the offsets are wrong. Where two tokens have one place (pages that
      overlap), one of them is written.

    Raises:
      ValueError: A shape does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import decode
      >>> pages = jnp.zeros((4, 16, 2, 8))
      >>> new = jnp.ones((3, 1, 8))  # two tokens of a prompt, one of a longer sequence
      >>> pages = decode.append_pages(
      ...     pages, new, 2 * new, jnp.array([2, 17]), jnp.array([[3, 0], [1, 0]]), jnp.array([0, 2, 3]), jnp.array([2])
      ... )
      >>> pages[3, :3, 0, 0].tolist(), pages[0, 0, :, 0].tolist()
      ([1.0, 1.0, 0.0], [1.0, 2.0])
    """
    kv_pages = checks.pages(kv_pages, "kv_pages")
    key, value = checks.cache(key, "key"), checks.cache(value, "value")
    pages, size, combined, head_dim = kv_pages.shape
    for x, name in ((key, "key"), (value, "value")):
        if x.ndim != 3 or x.shape[1:] != (combined // 2, head_dim) or x.shape[0] != key.shape[0]:
            raise ValueError(
                f"{name} is [tokens, key/value heads, head size] = (tokens, {combined // 2}, {head_dim}) of kv_pages, "
                f"got shape {x.shape}"
            )
    lengths, table, offsets, number = checks.ragged(kv_lens, page_indices, cu_q_lens, num_seqs)
    token = jnp.arange(key.shape[0], dtype=jnp.int32)
    seq, owned, sound = tokens.sequences(token, offsets, number)
    length = lengths[seq]
    position = length - (offsets[seq + 1] - offsets[seq]) + (token - offsets[seq])
    page = table[seq, jnp.clip(position // size, 0, table.shape[1] - 1)]
    most = table.shape[1] * size
    good = owned & sound & (length >= 0) & (length <= most) & (position >= 0) & (page >= 0) & (page < pages)
    row = jnp.where(good, page * size + position % size, pages * size)
    new = jnp.stack([key, value], axis=2).reshape((-1, combined, head_dim)).astype(kv_pages.dtype)
    flat = kv_pages.reshape((pages * size, combined, head_dim))
    return flat.at[row].set(new, mode="drop").reshape(kv_pages.shape)
