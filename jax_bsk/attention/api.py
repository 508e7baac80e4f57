"""`sparse_attention`: checks and canonicalises a call, binds its mask, and hands it to an implementation.

This is the top of the path of a call: `attention.api` -> `masks` -> `core.dispatch` -> `attention.derivatives` ->
`attention.native` -> `core.native_call` -> `csrc/attention/` (docs/design/architecture.md).
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_bsk.attention import derivatives, dropout, refusals
from jax_bsk.attention.ffi import AttentionAttributes
from jax_bsk.attention.native import AttentionCall
from jax_bsk.attention.xla import ScoreFunction, sparse_attention_xla
from jax_bsk.biases import Bias
from jax_bsk.biases.features import appended_size, features_of_heads
from jax_bsk.biases.lowering import lower
from jax_bsk.biases.terms import Call, Terms
from jax_bsk.context.visits import visits_of_shards
from jax_bsk.core import arrays, checks, dispatch, explicit_mesh, inputs, scalars
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dispatch import Implementation
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import BlockMask, CausalMask, FullMask, LocalMask, Mask, as_block_mask
from jax_bsk.masks.convert import array_mask, check_kind


# A call gives one array, or two where it asks for the residual; the two overloads tell type checkers which.
@overload
def sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | Bias | None = None,
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
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    score_function: ScoreFunction | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[False] = False,
) -> jax.Array: ...


@overload
def sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | Bias | None = None,
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
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    score_function: ScoreFunction | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


@checks.refuses_flax(
    "sparse_attention takes no arguments of Flax's modules; give them attention_fn=jax_bsk.flax.attention_fn(mask)"
)
def sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | Bias | None = None,
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
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    score_function: ScoreFunction | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention over the blocks that its mask visits, and skips the others.

    The function takes the place of `jax.nn.dot_product_attention`. Argument names, order, layouts and meanings are the
    same, with three differences: `mask` may be lazy or block-sparse, a query that may attend to nothing yields 0 (not
    the mean of the values), and the residual has a gradient. For each head it computes

        O = (D o softmax(c(scale Q K^T) + bias, where the mask attends)) V
        c(x) = cap tanh(x / cap), or x without a cap
        D = 0 for a share `dropout_rate` of the pairs, 1 / (1 - dropout_rate) for the others; 1 without dropout

    blockwise with a running maximum (FlashAttention, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691). The sum
    goes over the visited blocks only. `gates` are one factor g_e for each entry e of a `BlockMask`'s lists:

        O_i = sum of g_e P_i,j(e) V_j(e) over the entries e of row i

    Here j(e) is the key block of entry e, and P is the softmax over all visited blocks (and the sink), as without
    gates. A gate multiplies the contribution of its block after the softmax, so the log-sum-exp does not depend on it,
    nor does it on dropout.

    The function works under `jit`, `grad`, `vmap`, `scan`, `remat`, `shard_map` and on sharded meshes. Batch and heads
    shard without a collective. The native kernels have reverse-mode gradients; "xla" computes `jvp` and second
    derivatives of their calls.

    Dimensions: B batch size, T query length, S key/value length, N query heads, K key/value heads (K divides N),
    H head size.

    Args:
      query: BTNH or TNH array of float32, bfloat16, float16 or float64.
      key: BSKH or SKH array of query's type.
      value: BSKH or SKH array of query's type; its head size may differ from key's.
      bias: Numbers that are added to the logits: a `jax_bsk.biases` object (ALiBi, T5's table, low rank, a number or a
        tile per visited block), which needs no array of all pairs, or an array (floating or integer) that broadcasts to
        BNTS and whose first dimensions may be missing. Biases are differentiable. A bias of -inf masks its pair.
      mask: Mask that says which query attends to which key (True attends): a `jax_bsk.masks.Mask`, a `BlockMask`, or a
        boolean array that broadcasts to BNTS and whose first dimensions may be missing. A boolean array [B, S] of valid
        keys is given as mask[:, None, None, :]. None lets every query attend to every key. The mask may be traced.
      scale: Factor of the logits; the default is 1 / sqrt(H). A number in [-2e38, 2e38] is used in float32 (float64 for
        float64 inputs). A traced number of shape () is differentiable. For the native kernels it multiplies the query,
        which is then rounded to its type: the logits err by up to 2^-8 of their value for bfloat16, 2^-11 for float16.
      is_causal: Whether query t attends only to keys s <= t (aligned at the top left, as in `jax.nn`), on top of
        `mask`.
      query_seq_lengths: Integers [B], at most T (traced ones are clipped). Queries from there on yield 0 and a
        log-sum-exp of -inf.
      key_value_seq_lengths: Integers [B], at most S. No query attends to keys from there on.
      local_window_size: Number of keys to the left and to the right of query t that it may attend to, (left, right) or
        one number for both sides, on top of `mask`. None in the pair is unbounded.
      logits_soft_cap: Bound of the logits, applied by tanh as in Gemma 2 (arXiv 2408.00118): a Python number in
        [1e-30, 1e30], used in float32 (float64 for float64 inputs). scale / logits_soft_cap must be a normal float32
        number or 0.
      sinks: [N] logits, one per head, that join the denominator of each softmax and carry no value, as in gpt-oss
        (arXiv 2508.10925). They are differentiable. -inf is no sink. +inf makes queries attend to their sink alone: the
        output is 0, the log-sum-exp +inf, and all gradients are 0. NaN makes the output of the head NaN.
      gates: [B or 1, N or 1, capacity] floating factors of the visited blocks (for TNH also [N or 1, capacity]), where
        `mask` is a `BlockMask` and capacity its `kv_blocks.shape[-1]`. Gate number e of a head belongs to entry e of
        that head's `kv_blocks`, in row order; numbers past the last entry are not read. Gates have any sign, are used
        in float32 (float64 for float64 inputs) and are differentiable (with gradient 0 where no row lists the entry).
      dropout_rate: Share of the probabilities that are dropped, a Python number in [0, 1). It is rounded to a multiple
        of 1/256 (at least 1/256 where it is not 0, at most 255/256). The other probabilities are divided by 1 minus the
        rounded rate.
      dropout_rng: Key of `jax.random`, needed where dropout_rate > 0. The dropped pairs are a function of this key, the
        rate, the example, the head, and the positions of query and key. They are the same in every implementation, in
        the backward, and on every mesh. Inside a `shard_map` all devices of a sequence are given one key.
      score_function: Function of (logits, example, head, query, key) whose result takes the logits' place, after the
        soft cap and the bias and before the mask. Its arguments are six-dimensional arrays of some blocks, which
        broadcast against each other; the last four are int32 (example and head count from 0; query and key may be past
        the lengths). The function is traced, and may close over traced arrays, which then have gradients. Only "xla"
        takes one. What can be said by `jax_bsk.biases` or a mask is much faster so.
      axis_name: Mesh axes of the `shard_map` around the call along which the sequence is sharded. query, key and value
        are then the device's own tokens, as all devices have them in the order of the axes, and `mask` and the lengths
        are those of the whole sequence. Keys and values travel as the mask wants (`jax_bsk.context`). Each device has
        whole blocks of the mask. A bias of distances, blocks or tiles is that of the whole sequence, a bias array has
        the device's own queries and all keys, and features of a `PositionBias` are those of the device's own tokens.
        Only native kernels take it.
      implementation: Name of an implementation: "cuda" or "cpu" (native kernels) or "xla" (pure JAX, for every platform
        and type). None takes the platform's native kernel. Where that cannot take the call, None takes "xla" and warns
        once with a `FallbackWarning` that says why.
      return_residual: Whether the log-sum-exp is returned too. It is -inf for queries that attend to nothing, at which
        `jax_debug_infs` raises as at every infinite result. Without it, finite inputs give no infinite or NaN result or
        residual.

    Returns:
      BTNH (TNH) output of query's type, with value's head size. With `return_residual` also a BTN (TN) array: the
      natural logarithm of the softmax's denominator in float32 (float64 for float64 inputs).

    Raises:
      ValueError: A shape or a number does not fit, or a combination of arguments is not possible. The message names
        the argument and the remedy.
      TypeError: An argument has the wrong type; the message names it and the remedy.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import sparse_attention
      >>> from jax_bsk.masks import CausalMask, LocalMask
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> mask = CausalMask() & LocalMask((16, 0))
      >>> sparse_attention(q, k, v, mask=mask, implementation="cpu").shape
      (1, 64, 2, 16)
      >>> loss = lambda q: sparse_attention(q, k, v, mask=mask, implementation="cpu").sum()
      >>> jax.grad(loss)(q).shape
      (1, 64, 2, 16)
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
            ("dropout_rng", dropout_rng),
            *(("query_seq_lengths", query_seq_lengths), ("key_value_seq_lengths", key_value_seq_lengths)),
            *([("mask", mask)] if isinstance(mask, BlockMask) else []),
        ],
    )
    batch, q_len, heads, head_dim = query.shape
    kv_len = key.shape[1]
    threshold = dropout.threshold_of(dropout_rate)
    if axis_name is not None:  # the lengths of the whole sequence
        shards = _axis_size(axis_name)
        q_len, kv_len = q_len * shards, kv_len * shards

    block_mask = bind_mask(mask, is_causal, local_window_size, (batch, heads, q_len, kv_len), unbatched)
    if axis_name is not None and (query.shape[1] % block_mask.block_q or key.shape[1] % block_mask.block_kv):
        raise ValueError(
            f"with axis_name={axis_name!r} each device has whole blocks of the mask, got {query.shape[1]} queries and "
            f"{key.shape[1]} keys per device for blocks of {block_mask.block_q} and {block_mask.block_kv}; bind the "
            "mask with a smaller block_size, or pad the sequence"
        )
    traced_scale, scale = _scale(scale, head_dim)
    soft_cap = scalars.soft_cap(logits_soft_cap, scale)
    own_mask = mask if isinstance(mask, BlockMask) else None
    own = query.shape[1], key.shape[1]
    shapes = Call(batch, heads, key.shape[2], q_len, kv_len, own, query.dtype, unbatched, own_mask)
    terms, block_mask = lower(bias, shapes, block_mask)
    dropout_keys = dropout.keys_of_heads(dropout_rng, batch, heads) if threshold else None
    lengths = _lengths(query_seq_lengths, key_value_seq_lengths, (batch, q_len, kv_len))
    sinks = _sinks(sinks, heads)
    gates = _gates(gates, mask, (batch, heads), unbatched)

    facts = refusals.AttentionFacts(
        dtype=query.dtype.name,
        head_dim=head_dim + _appended(terms, (heads, key.shape[2]), head_dim),
        value_dim=value.shape[-1],
        block_q=block_mask.block_q,
        block_kv=block_mask.block_kv,
        score_function=score_function is not None,
        capped_features=soft_cap is not None and terms.query_features is not None,
    )
    if axis_name is None:
        chosen, named = dispatch.choose(implementation, facts)
    else:
        chosen, named = dispatch.choose_native(implementation, facts, "axis_name")
    if chosen == "xla":
        out, lse = sparse_attention_xla(
            query,
            key,
            value,
            block_mask,
            bias=terms,
            lengths=lengths,
            sinks=sinks,
            scale=scale if traced_scale is None else traced_scale,
            soft_cap=soft_cap,
            gates=gates,
            dropout_keys=dropout_keys,
            dropout_threshold=threshold,
            score_function=score_function,
            with_lse=return_residual,
        )
    else:
        stats = statistics_dtype(query.dtype)
        has_features = terms.query_features is not None
        if has_features and abs(scale) < refusals.LEAST_SCALE_OF_FEATURES:
            traced_scale, scale = jnp.asarray(scale, stats), 1.0
        if traced_scale is not None:
            query = (query.astype(stats) * traced_scale.astype(stats)).astype(query.dtype)
        if has_features:
            if query.dtype == jnp.float16 and abs(scale) < 1:  # features divided by the scale might overflow
                power = 2.0 ** math.floor(math.log2(abs(scale)))  # of which no rounding comes
                query, scale = (query.astype(stats) * power).astype(query.dtype), scale / power
            query, key = _with_features(query, key, terms, scale)
        attributes = AttentionAttributes(block_mask.block_q, block_mask.block_kv, scale, soft_cap or 0.0, threshold)
        visits = None
        if key_value_seq_lengths is None:
            visits = visits_of_shards(block_mask, query, axis_name)
        call = AttentionCall(attributes, chosen if named else None, visits, axis_name)
        if lengths is None:
            lengths = np.array([[q_len, kv_len]], np.int32)
        sinks = None if sinks is None else sinks.astype(stats)[None, :]
        gates = None if gates is None else gates.astype(stats)
        out, lse = derivatives.attend(call, query, key, value, sinks, gates, block_mask, lengths, terms, dropout_keys)
        if return_residual:
            lse = derivatives.log_sum_exp(lse)
    if unbatched:
        out = out[0]
    if not return_residual:
        return out
    assert lse is not None  # asked for
    lse = jnp.swapaxes(lse, 1, 2)
    return out, lse[0] if unbatched else lse


def _axis_size(axis_name: str | tuple[str, ...]) -> int:
    """The number of devices along mesh axes of the `shard_map` around a call."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name names mesh axes of a shard_map around the call, got {axis_name!r}; outside of one, leave it "
            "out: under jit a call follows the sharding of its arguments"
        ) from None


def _appended(terms: Terms, heads: tuple[int, int], head_dim: int) -> int:
    """How many numbers a bias of low rank appends to each query and key; head sizes of whole eights stay such."""
    size = appended_size(terms, *heads)
    return size + (-size % 8 if head_dim % 8 == 0 else 0)


def _with_features(query: jax.Array, key: jax.Array, terms: Terms, scale: float) -> tuple[jax.Array, jax.Array]:
    """Queries and keys with the features of a bias of low rank appended, which the scale then leaves as they were."""
    heads, kv_heads = query.shape[2], key.shape[2]
    size = _appended(terms, (heads, kv_heads), query.shape[3])

    def append(x: jax.Array, features: jax.Array) -> jax.Array:
        features = jnp.pad(features, [(0, 0)] * 3 + [(0, size - features.shape[-1])])
        return jnp.concatenate([x, features.astype(x.dtype)], axis=-1)

    def with_features(query: jax.Array, key: jax.Array, terms: Terms) -> tuple[jax.Array, jax.Array]:
        of_queries, of_keys = features_of_heads(terms, query.shape[0], heads, kv_heads)
        return append(query, of_queries / scale), append(key, of_keys)

    terms = Terms(query_features=terms.query_features, key_features=terms.key_features)
    arrays = query, key, *jax.tree.leaves(terms)
    if not explicit_mesh.shards(arrays):
        return with_features(query, key, terms)
    shardings = tuple(PartitionSpec(*jax.typeof(x).sharding.spec[:3]) for x in (query, key))
    partitioned: Any = jax.sharding.auto_axes(with_features, out_sharding=shardings)
    with explicit_mesh.mesh_of(arrays):
        return partitioned(query, key, terms)


def _scale(scale: Any, head_dim: int) -> tuple[jax.Array | None, float]:
    """Returns the factor of the logits that is traced (or None), and the factor whose value is known."""
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
    """Returns the block lists of a call from its arguments of these names.

    Args:
      mask: Mask of the call, or None.
      is_causal: Whether the call is causal on top of `mask`.
      local_window_size: Window of the call on top of `mask`, or None.
      sizes: (B, N, T, S).
      unbatched: Whether the call's arrays have no batch dimension, which messages then leave out.
    """
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


def _mask_array(mask: ArrayLike, sizes: tuple[int, int, int, int], unbatched: bool) -> jax.Array | np.ndarray:
    """Returns a boolean array that broadcasts to `sizes`, with at least two dimensions."""
    array = mask if isinstance(mask, np.ndarray | jax.Array) else np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(
            f"mask is a Mask, a BlockMask or a boolean array (True attends), got an array of {array.dtype}; compare "
            "it, e.g. mask > 0, or pass numbers to be added to the logits as bias"
        )
    inputs.check_broadcasts(array.shape, sizes, unbatched, "mask")
    return of_rank(array, max(array.ndim, 2))


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
