"""What the native attention kernels cannot take, a sentence with its remedy per reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class AttentionFacts:
    """A call of attention.

    Attributes:
      dtype: Name of the inputs' type.
      head_dim: Head size of query and key.
      value_dim: Head size of value.
      block_q: Queries a block.
      block_kv: Keys a block.
      bias: Whether a bias is added to the logits.
    """

    dtype: str
    head_dim: int
    value_dim: int
    block_q: int
    block_kv: int
    bias: bool

    function = "sparse_attention"

    def problems(self, implementation: str, info: Mapping[str, Any]) -> list[str]:
        del implementation
        reasons = []
        if self.bias:
            reasons.append("The native kernels take no bias; use implementation='xla', or express it as a mask.")
        if not info:
            return reasons
        if self.dtype not in info["dtypes"]:
            reasons.append(f"Its kernels take {', '.join(info['dtypes'])}, got {self.dtype}; cast the inputs.")
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
