"""The contenders: the same attention said in different ways, with what each is told of the mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jax_bsk
from jax_bsk.masks import BlockMask

from .config import Config

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]  # (query, key, value, operand), all [B, S, N, H]


@dataclasses.dataclass(frozen=True)
class Attention:
    """One contender.

    Attributes:
      what: in words, for the table.
      attend: the function.
      operand: from the config to its last argument, made once on the host.
      masked: whether it applies the whole mask; else it computes more, and trains another model.
    """

    what: str
    attend: Attend
    operand: Callable[[Config], Any]
    masked: bool = True


def _block_mask(config: Config) -> BlockMask:
    return config.mask().bind(config.length, block_size=config.block_size)


def _dense_mask(config: Config) -> np.ndarray:
    return np.asarray(_block_mask(config).to_dense())


def _jax_nn(implementation: Any, **options: Any) -> Attend:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array, operand: Any) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, mask=operand, implementation=implementation, **options)

    return attend


def _sparse(query: jax.Array, key: jax.Array, value: jax.Array, operand: Any) -> jax.Array:
    return jax_bsk.sparse_attention(query, key, value, mask=operand)


def _nothing(config: Config) -> None:
    return None


ATTENTIONS = {
    "jax_bsk": Attention("block mask", _sparse, _block_mask),
    "cudnn-mask": Attention("dense mask", _jax_nn("cudnn"), _dense_mask),
    "cudnn-causal-mask": Attention("dense mask and is_causal", _jax_nn("cudnn", is_causal=True), _dense_mask),
    "cudnn-causal": Attention("is_causal alone", _jax_nn("cudnn", is_causal=True), _nothing, masked=False),
    "xla-mask": Attention("dense mask", _jax_nn("xla"), _dense_mask),
    "xla-causal": Attention("is_causal alone", _jax_nn("xla", is_causal=True), _nothing, masked=False),
}
ON_GPU = ("jax_bsk", "cudnn-mask", "cudnn-causal-mask", "cudnn-causal")
ON_CPU = ("jax_bsk", "xla-mask", "xla-causal")
