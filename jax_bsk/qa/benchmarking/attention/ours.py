"""jax_bsk as a contender."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import sparse_attention
from jax_bsk.masks import CausalMask, SegmentMask
from jax_bsk.qa.benchmarking.attention.cases import Case
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.passes import of_jax
from jax_bsk.qa.benchmarking.contender import Contender


def make(case: Case, inputs: Inputs, implementation: str | None, *, ahead: bool = False) -> Contender:
    """`sparse_attention` of a named implementation, which raises rather than fall back to a slower one."""
    if case.traced:

        def packed(query, key, value, ids):
            mask = CausalMask() & SegmentMask(ids, contiguous=True)
            bound = mask.bind(case.length, block_size=case.block_size)
            return sparse_attention(query, key, value, mask=bound, implementation=implementation)  # type: ignore[arg-type]

        return of_jax(case, inputs, packed, segment_ids(case), variant="mask built in the jit", ahead=ahead)

    def masked(query, key, value, mask):
        return sparse_attention(query, key, value, mask=mask, implementation=implementation)  # type: ignore[arg-type]

    return of_jax(case, inputs, masked, jax.device_put(case.mask), variant="block mask", ahead=ahead)


@functools.lru_cache(maxsize=1)
def _batched(ids: bytes, batch: int) -> jax.Array:
    return jnp.tile(jnp.asarray(np.frombuffer(ids, np.int32)), (batch, 1))


def segment_ids(case: Case) -> jax.Array:
    """Ids of the documents, int32 [B, S], as a jit's argument."""
    assert case.pattern.ids is not None
    return _batched(case.pattern.ids.tobytes(), case.batch)
