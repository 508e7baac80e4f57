"""What the native attention kernels cannot take, a sentence with its remedy per reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Below it, features of a PositionBias divided by the scale might overflow: the query is then multiplied beforehand.
LEAST_SCALE_OF_FEATURES = 1e-6


def type_problems(dtype: str, info: Mapping[str, Any]) -> list[str]:
    """Why a native library's kernels cannot take inputs of a type, from what the library says of itself."""
    if not info or dtype in info["dtypes"]:
        return []
    return [f"Its kernels take {', '.join(info['dtypes'])}, got {dtype}; cast the inputs."]


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """A call of attention.

    Attributes:
      dtype: Name of the inputs' type.
      head_dim: Head size of query and key.
      value_dim: Head size of value.
      block_q: Queries a block.
      block_kv: Keys a block.
      score_function: Whether a Python function changes the logits.
      capped_features: Whether there is a bias of low rank beside a soft cap.
    """

    dtype: str
    head_dim: int
    value_dim: int
    block_q: int
    block_kv: int
    score_function: bool = False
    capped_features: bool = False

    function = "sparse_attention"

    def problems(self, implementation: str, info: Mapping[str, Any]) -> list[str]:
        del implementation
        reasons = []
        if self.score_function:
            reasons.append(
                "The native kernels are compiled beforehand and take no score_function; use implementation='xla', or a "
                "bias of jax_bsk.biases and a mask."
            )
        if self.capped_features:
            reasons.append(
                "The native kernels append a PositionBias to query and key, where a soft cap would bound it; use "
                "implementation='xla'."
            )
        if not info:
            return reasons
        reasons += type_problems(self.dtype, info)
        for name, size in (("query's", self.head_dim), ("value's", self.value_dim)):
            if size > info["max_head_dim"]:
                reasons.append(f"The {name} head size is at most {info['max_head_dim']}, got {size}.")
            elif size % info.get("head_dim_multiple", 1) != 0:
                multiple = info["head_dim_multiple"]
                reasons.append(f"The {name} head size is a multiple of {multiple}, got {size}; pad it.")
        for block in dict.fromkeys((self.block_q, self.block_kv)):
            if "blocks" in info and block not in info["blocks"]:
                reasons.append(
                    f"Block sizes are {' or '.join(map(str, info['blocks']))}, got {block}; rebuild the mask."
                )
            elif block > info.get("max_block", block):
                reasons.append(f"Block sizes are at most {info['max_block']}, got {block}; rebuild the mask.")
        return reasons
