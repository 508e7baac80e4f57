"""One decoding call: picks an implementation and its parts, and binds what is not given.

Between the public functions (`ragged`, `cache`), which say what their arguments are, and the implementations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_bsk.core import compat, dispatch
from jax_bsk.core.errors import UnsupportedError
from jax_bsk.decode import ffi, parts
from jax_bsk.decode.ffi import DecodeAttributes
from jax_bsk.decode.native import FORWARD, DecodeCall
from jax_bsk.decode.refusals import DecodeFacts
from jax_bsk.decode.xla import NO_LOG_SUM_EXP


class Operands(NamedTuple):
    """Arrays of a call, in the order of the native one; `csrc/decode/params.h` says what they mean.

    Each has the query's leading dimensions in front, or none where it is one for all groups. None is not given.
    """

    query: Any
    key: Any
    value: Any
    kv_lens: Any
    page_indices: Any
    cu_q_lens: Any
    num_seqs: Any
    selection: Any
    tree: Any
    sinks: Any


def attend(
    operands: Operands,
    attributes: DecodeAttributes,
    *,
    function: str,
    implementation: str | None,
    keys_per_part: int | None,
    return_residual: bool,
    one_sequence: bool = False,
) -> Any:
    """The output, and with `return_residual` the log-sum-exp, -inf where nothing is attended to.

    Args:
      operands: Arrays, checked.
      attributes: Static numbers; the parts in them are chosen here.
      function: Name of the public function, for messages.
      implementation: As the public functions have it.
      keys_per_part: Keys of a part, or None to choose.
      return_residual: Whether the log-sum-exp is returned, too.
      one_sequence: Whether to choose the parts of long sequences as if one sequence had all tokens.
    """
    query, key, value, _, table, *_, selection, _, _ = operands
    *lead, tokens, heads, head_dim = query.shape
    cache_heads = key.shape[-2]
    kv_heads = cache_heads // 2 if value is None else cache_heads
    value_dim = head_dim if value is None else value.shape[-1]
    sequences = math.prod(lead) * table.shape[-2]
    facts = DecodeFacts(function, query.dtype.name, key.dtype.name, head_dim, value_dim, sequences)
    chosen, named = dispatch.choose(implementation, facts)
    pages = table.shape[-1] if selection is None else selection.shape[-1]
    sizes = parts.Sizes(
        groups=math.prod(lead),
        tokens=tokens,
        seqs=table.shape[-2],
        heads=heads,
        kv_heads=kv_heads,
        value_dim=value_dim,
        positions=pages * key.shape[-3],
        quantised=key.dtype.itemsize == 1,
    )
    short_part, long_part = parts.choose(sizes, keys_per_part)
    if one_sequence:
        _, long_part = parts.choose(dataclasses.replace(sizes, seqs=1), keys_per_part)
    attributes = dataclasses.replace(attributes, short_part=short_part, long_part=long_part)
    nothing = {
        "value": ffi.no_value(kv_heads, key.dtype),
        "selection": ffi.no_selection(kv_heads),
        "tree": ffi.no_tree(),
        "sinks": ffi.no_sinks(),
    }
    filled = [compat.staged(nothing[name] if x is None else x) for name, x in operands._asdict().items()]
    # What has no leading dimension is one for all.
    ranks = [len(letters) for letters in ffi.FORWARD.operands.values()]
    axes = [0 if x.ndim > rank else None for x, rank in zip(filled, ranks, strict=True)]
    call = DecodeCall(attributes, chosen if named or chosen == "xla" else None)
    out, lse = _forward((call, tuple(axes), len(lead)), *filled)
    if not return_residual:
        return out
    return out, jnp.where(lse == NO_LOG_SUM_EXP, -jnp.inf, lse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(static: tuple[DecodeCall, tuple[int | None, ...], int], *operands: Any) -> tuple[jax.Array, jax.Array]:
    call, axes, lead = static
    function: Callable[..., Any] = functools.partial(FORWARD, call)
    for _ in range(lead):
        function = jax.vmap(function, axes)
    out, lse = function(*compat.match_varying(*operands))
    return out, lse


@_forward.defjvp
def _no_derivatives(static: Any, primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise UnsupportedError(
        static[0].platform,
        ["The functions of jax_bsk.decode have no derivatives; differentiate jax_bsk.sparse_attention."],
    )
