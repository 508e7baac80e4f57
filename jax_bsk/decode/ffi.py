"""The decoding call as `csrc/decode` knows it: its name, operands, attributes and workspace.

On the path of a call this is the last Python module before `csrc/decode`, whose `buffers.h` reads the operands in the
same order and whose `params.h` says what they mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_bsk.core import library
from jax_bsk.core.dims import Dims

DECODE_FORWARD = "jax_bsk_decode_forward"

# Letters: N query heads, K key/value heads, C heads of keys, or of keys and values together (see `core.dims`). What is
# independent (examples of a contiguous cache, each with its own pages) are leading dimensions.
FORWARD = Dims(
    operands={
        "query": ".N.",
        "key": "..C.",
        "value": "..K.",
        "kv_lens": ".",
        "page_indices": "..",
        "cu_q_lens": ".",
        "num_seqs": ".",
        "selection": ".K.",
        "tree": "..",
        "sinks": "n",
    },
    results={"out": ".N.", "lse": ".N"},
    unmapped=("sinks",),
    follow=("query",),
)


def no_value(kv_heads: int, dtype: Any) -> np.ndarray:
    """What stands for the values where the keys' array holds both: an array without elements."""
    return np.zeros((1, 1, kv_heads, 0), dtype)


def no_selection(kv_heads: int) -> np.ndarray:
    """What stands for the selection where all pages are visited."""
    return np.zeros((1, kv_heads, 0), np.int32)


def no_tree() -> np.ndarray:
    """What stands for the tree where there is none."""
    return np.zeros((1, 0), np.uint32)


def no_sinks() -> np.ndarray:
    """What stands for the sinks where there are none."""
    return np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True)
class DecodeAttributes:
    """Static numbers of the decoding call; `csrc/decode/params.h` says what they mean.

    Attributes:
      scale: Factor of the logits, the scale of quantised keys included.
      soft_cap: Soft cap of the logits; 0 is none.
      value_scale: Factor of the output: the scale of quantised values.
      causal: Whether a query attends to no position after its own.
      window: Positions that a query attends to, its own included; 0 is all.
      sink_tokens: First positions that the window leaves visible.
      short_part: Keys of a part, for sequences of few queries.
      long_part: The same for others.
    """

    scale: float
    soft_cap: float = 0.0
    value_scale: float = 1.0
    causal: bool = True
    window: int = 0
    sink_tokens: int = 0
    short_part: int = 512
    long_part: int = 8192

    def encode(self) -> dict[str, Any]:
        """The attributes of the custom call."""
        return {
            "causal": np.int64(self.causal),
            "window": np.int64(self.window),
            "sink_tokens": np.int64(self.sink_tokens),
            "scale": np.float64(self.scale),
            "soft_cap": np.float64(self.soft_cap),
            "value_scale": np.float64(self.value_scale),
            "short_part": np.int64(self.short_part),
            "long_part": np.int64(self.long_part),
        }


def positions(key_shape: Sequence[int], table_shape: Sequence[int], selection_shape: Sequence[int]) -> int:
    """Most positions of a sequence that are visited."""
    return (selection_shape[-1] or table_shape[-1]) * key_shape[-3]


def forward_workspace(avals: Sequence[Any], attributes: DecodeAttributes) -> int:
    """Bytes of the workspace on CUDA: partial results, and the plan of who computes which."""
    shapes = dict(zip(FORWARD.operands, (tuple(x.shape) for x in avals), strict=True))
    *lead, tokens, heads, head_dim = shapes["query"]
    value_dim = shapes["value"][-1] or head_dim
    return library.workspace(
        DECODE_FORWARD,
        groups=math.prod(lead),
        tokens=tokens,
        heads=heads,
        kv_heads=shapes["value"][-2],
        value_dim=value_dim,
        seqs=shapes["page_indices"][-2],
        positions=positions(shapes["key"], shapes["page_indices"], shapes["selection"]),
        short_part=attributes.short_part,
        long_part=attributes.long_part,
    )
