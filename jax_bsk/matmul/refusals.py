"""What the native products cannot take, a sentence with its remedy per reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_bsk.core.dispatch import capability


@dataclasses.dataclass(frozen=True)
class MatmulFacts:
    """A call of a block-sparse matrix product.

    Attributes:
      function: The public function's name.
      dtype: Name of the factors' common type.
      block_size: (bm, bk).
    """

    function: str
    dtype: str
    block_size: tuple[int, int]

    def problems(self, implementation: str, info: Mapping[str, Any]) -> list[str]:
        if not info:
            return []
        reasons = []
        if self.dtype not in info["matmul_dtypes"]:
            reasons.append(f"Its kernels take {', '.join(info['matmul_dtypes'])}, got {self.dtype}; cast the factors.")
        for block in dict.fromkeys(self.block_size):
            if "matmul_blocks" in info and block not in info["matmul_blocks"]:
                reasons.append(f"Block sizes are {' or '.join(map(str, info['matmul_blocks']))}, got {block}.")
            elif block > info.get("matmul_max_block", block):
                reasons.append(f"Block sizes are at most {info['matmul_max_block']}, got {block}.")
        needed = info.get("matmul_compute_capability")
        if implementation == "cuda" and needed and (found := capability()) not in (None, needed):
            reasons.append(f"The products need compute capability {needed / 10}, and the GPU has {found / 10}.")
        return reasons
