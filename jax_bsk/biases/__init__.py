"""Biases of the logits as data: what `sparse_attention(..., bias=...)` adds, without an array of all pairs."""

from jax_bsk.biases import _export
from jax_bsk.biases.base import Bias, DenseBias
from jax_bsk.biases.base import BiasSum as _BiasSum
from jax_bsk.biases.distances import AlibiBias, ClippedBuckets, RelativeBias, T5Buckets, alibi_slopes
from jax_bsk.biases.entries import BlockBias, TileBias
from jax_bsk.biases.features import PositionBias

__all__ = [
    "AlibiBias",
    "Bias",
    "BlockBias",
    "ClippedBuckets",
    "DenseBias",
    "PositionBias",
    "RelativeBias",
    "T5Buckets",
    "TileBias",
    "alibi_slopes",
]

_export.register(AlibiBias, BlockBias, DenseBias, PositionBias, RelativeBias, TileBias, _BiasSum)
