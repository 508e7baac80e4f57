"""The decoding call as `csrc/decode` knows it: its name, operands, attributes and workspace.

On the path of a call this is the last Python module before `csrc/decode`, whose `buffers.h` reads the operands in the
same order and whose `params.h` says what they mean.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jax_bsk.core.dims import Dims

DECODE_FORWARD = "jax_bsk_decode_forward"

# Letters: N query heads, K key/value heads, C heads of keys and values together (see `core.dims`). What is independent
# (examples of a contiguous cache, each with its own pages) are leading dimensions.
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
        "sinks": "N",
    },
    results={"out": ".N.", "lse": ".N"},
    unmapped=("sinks",),
    follow=("query",),
)


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
