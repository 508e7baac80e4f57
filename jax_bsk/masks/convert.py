"""From whatever a caller passes as `mask` to the `BlockMask` of the call; what the attention layer uses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import Array, is_array
from jax_bsk.masks.algebra.data_masks import ArrayMask
from jax_bsk.masks.algebra.mask import Mask, described, is_hashable, remedy_for
from jax_bsk.masks.block_mask import BlockMask

# Host-built masks by (structure, sizes), least recently used first. Bounded in number and in bytes.
_MAX_ENTRIES = 32
_MAX_BYTES = 2**28
_cache: OrderedDict[Any, BlockMask] = OrderedDict()
_lock = threading.Lock()


def check_kind(mask: Any) -> None:
    """Refuses what is taken for a mask by mistake, before it is made an array.

    Raises:
      TypeError: mask is a class, a function or a string.
    """
    if isinstance(mask, type | str) or callable(mask):
        raise _no_mask(mask)


def _no_mask(mask: Any) -> TypeError:
    return TypeError(
        f"mask must be a Mask, a BlockMask or a boolean array, given {described(mask)}; {remedy_for(mask)}"
    )


def array_mask(array: Array, q_len: int, kv_len: int) -> ArrayMask:
    """The mask of a boolean array whose last two dimensions may be 1, as those of padding masks [B, 1, 1, S] are.

    Args:
      array: bool [T|1, S|1], [H|1, T|1, S|1] or [B|1, H|1, T|1, S|1], host or traced.
      q_len, kv_len: T and S.

    Raises:
      TypeError: where it is not boolean.
      ValueError: where it has other dimensions; other lengths are refused when the mask is bound.
    """
    if array.ndim >= 2:
        lengths = tuple(n if size == 1 else size for size, n in zip(array.shape[-2:], (q_len, kv_len), strict=True))
        if lengths != array.shape[-2:]:
            xp = np if isinstance(array, np.ndarray) else jnp
            array = xp.broadcast_to(array, (*array.shape[:-2], *lengths))
    return ArrayMask(array)


def as_block_mask(
    mask: Mask | BlockMask | Array,
    q_len: int,
    kv_len: int,
    *,
    batch: int,
    heads: int,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """The BlockMask of an attention call.

    Masks without arrays are built once and kept in a small cache, so that repeated eager calls and
    retracing cost nothing.

    Args:
      mask: a `Mask`, a `BlockMask`, or a boolean array [T, S], [H|1, T, S] or [B|1, H|1, T, S], host or traced;
        its T and S may also be 1.
      q_len, kv_len: tokens of the call.
      batch, heads: examples and query heads of the call; the mask's must be these or 1.
      block_size: block size of the BlockMask to build; one that is given keeps its own.

    Returns:
      A `BlockMask` of these lengths, which distinguishes `batch` examples and `heads` heads or 1.

    Raises:
      TypeError: where mask is none of these.
      ValueError: where its lengths, batch or heads do not fit the call.

    Examples:
      >>> from jax_bsk.masks import CausalMask, as_block_mask
      >>> as_block_mask(CausalMask(), 256, 256, batch=4, heads=8).shape
      (1, 1, 256, 256)
    """
    if isinstance(mask, BlockMask):
        if (mask.q_len, mask.kv_len) != (q_len, kv_len):
            raise ValueError(
                f"mask is a BlockMask for q_len={mask.q_len}, kv_len={mask.kv_len}, but the call has q_len={q_len}, "
                f"kv_len={kv_len}; bind the mask to these lengths"
            )
        _check_dims(mask.batch, mask.heads, batch, heads, mask)
        return mask
    if not isinstance(mask, Mask):
        if not is_array(mask):
            raise _no_mask(mask)
        mask = array_mask(mask, q_len, kv_len)
    sized = mask._sized(batch, heads)
    _check_dims(sized.batch, sized.heads, batch, heads, mask)
    if not is_hashable(mask):  # holds arrays
        return BlockMask.from_mask(sized, q_len, kv_len, block_size=block_size)
    key = (hash(mask), mask, sized.batch, sized.heads, q_len, kv_len, block_size)
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    built = BlockMask.from_mask(sized, q_len, kv_len, block_size=block_size)
    if not built.is_traced and built.nbytes <= _MAX_BYTES // 4:
        with _lock:
            _cache[key] = built
            while len(_cache) > _MAX_ENTRIES or sum(m.nbytes for m in _cache.values()) > _MAX_BYTES:
                _cache.popitem(last=False)
    return built


def _check_dims(mask_batch: int, mask_heads: int, batch: int, heads: int, mask: Any) -> None:
    if mask_batch not in (1, batch):
        raise ValueError(f"mask has batch {mask_batch}, the call has batch {batch}; it must be that or 1: {mask!r}")
    if mask_heads not in (1, heads):
        remedy = "; a mask has one entry per query head (not a key/value head)"
        raise ValueError(f"mask has {mask_heads} heads, the call has {heads}; it must be that or 1{remedy}: {mask!r}")
