"""Sizes of a run, its documents, and what may attend to what."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, Mask, SegmentMask


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder with 123 M parameters, sized like GPT-2 small, and one long sequence of packed documents.

    Attributes:
      dtype: of the computation; parameters are float32.
      document_length: mean tokens of a document.
      window: tokens that a token sees to its left.
      global_tokens: first tokens of the sequence, seen by all of their document.
      learned_positions: whether positions have an embedding; without one the mask alone tells them apart.
      remat: whether a layer is computed again in the backward. The output of jax_bsk's attention is kept even so.
      ordered_embedding: whether the gradient of the tokens' embedding is summed in a fixed order, at the cost of a
        product with one-hot rows.
      loss_chunk: tokens whose logits exist at a time: all of them, in float32, would outweigh everything else.
    """

    length: int = 16384
    batch: int = 1
    layers: int = 12
    width: int = 768
    heads: int = 6
    vocabulary: int = 32768
    dtype: str = "bfloat16"
    document_length: int = 4096
    window: int = 1024
    global_tokens: int = 128
    block_size: int = 128
    learned_positions: bool = True
    remat: bool = False
    ordered_embedding: bool = False
    loss_chunk: int = 2048
    learning_rate: float = 3e-4
    steps: int = 20
    warm_up: int = 3
    seed: int = 0

    def documents(self) -> np.ndarray:
        """Ids of the documents, int32 [batch, length]; at random places, so many in every example."""
        rng = np.random.default_rng([self.seed, self.batch, self.length])
        count = max(2, self.length // self.document_length)
        ends = [rng.choice(np.arange(1, self.length), count - 1, replace=False) for _ in range(self.batch)]
        positions = np.arange(self.length)
        return np.stack([np.searchsorted(np.sort(end), positions, side="right") for end in ends]).astype(np.int32)

    def mask(self) -> Mask:
        """Causal, within a document, and within the window or to the first tokens of the sequence."""
        near = LocalMask((self.window, 0)) | GlobalMask(self.global_tokens)
        return CausalMask() & SegmentMask(self.documents(), contiguous=True) & near

    def batches(self) -> np.ndarray:
        """Tokens of every step and their targets, int32 [warm_up + steps, batch, length + 1].

        Frequencies fall like those of words, so that there is something to learn in a few steps.
        """
        rng = np.random.default_rng(self.seed)
        shape = (self.warm_up + self.steps, self.batch, self.length + 1)
        return (self.vocabulary ** rng.random(shape) - 1).astype(np.int32)
