"""How fields of masks are printed."""

from __future__ import annotations

from typing import Any

from jax_bsk.core.arrays import is_array


def short(value: Any) -> str:
    """The printed form of a field: an array as its dtype and shape, a long tuple as its beginning."""
    if is_array(value):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, tuple) and len(value) > 8:
        return f"({', '.join(map(repr, value[:6]))}, ... {len(value)} in all)"
    return getattr(value, "__name__", None) or repr(value)
