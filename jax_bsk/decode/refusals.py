"""What the native decoding kernels cannot take, a sentence with its remedy per reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class DecodeFacts:
    """A decoding call.

    Attributes:
      function: The public function's name.
      dtype: Name of the query's type.
      cache_dtype: Name of the cache's type.
      head_dim: Head size of query and key.
      value_dim: Head size of value.
      sequences: Sequences of all groups.
    """

    function: str
    dtype: str
    cache_dtype: str
    head_dim: int
    value_dim: int
    sequences: int

    def problems(self, implementation: str, info: Mapping[str, Any]) -> list[str]:
        """Why a native library's kernels cannot take the call; it says of decoding what differs from attention."""
        del implementation
        reasons = []

        def limit(name: str, otherwise: Any) -> Any:
            return info.get(f"decode_{name}", info.get(name, otherwise))

        dtypes = limit("dtypes", [self.dtype])
        if self.dtype not in dtypes:
            reasons.append(f"Its kernels take {', '.join(dtypes)}, got {self.dtype}; cast the inputs.")
        quantised = ""
        if self.cache_dtype != self.dtype:
            quantised = "quantised_"
            caches = info.get("decode_cache_dtypes", [])
            if self.cache_dtype not in caches:
                also = f" or of {' or '.join(caches)}" if caches else ""
                reasons.append(
                    f"Its kernels take a cache of the query's type {self.dtype}{also}, got {self.cache_dtype}; "
                    "cast one of them."
                )
            elif self.dtype not in ("bfloat16", "float16"):
                reasons.append(f"Its kernels take a cache of {self.cache_dtype} with bfloat16 and float16 queries.")
        for name, size in (("query's", self.head_dim), ("value's", self.value_dim)):
            most, multiple = limit(f"{quantised}max_head_dim", size), limit(f"{quantised}head_dim_multiple", 1)
            most = limit(f"max_head_dim_{self.dtype}", most)
            if size > most:
                reasons.append(f"The {name} head size is at most {most}, got {size}.")
            elif size % multiple != 0:
                reasons.append(f"The {name} head size is a multiple of {multiple}, got {size}; pad it.")
        sequences = limit("max_sequences", self.sequences)
        if self.sequences > sequences:
            reasons.append(f"Its kernels take {sequences} sequences in a call, got {self.sequences}; split the batch.")
        return reasons
