"""Sparsity inside Flax: `attention_fn` for Flax's multi-head attention, and ready modules in `linen` and `nnx`.

Above `attention.py` and `matmul.py` on the path of a call, and the only package of jax_bsk that imports Flax;
`import jax_bsk` does not import it.
"""

from __future__ import annotations

try:
    import flax as _flax  # noqa: F401  (asked for here, so that what is missing is named once)
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ImportError("jax_bsk.flax needs Flax; install it with `pip install 'jax_bsk[flax]'`", name="flax") from error

from jax_bsk.flax import linen as linen
from jax_bsk.flax import nnx as nnx
from jax_bsk.flax._attention_fn import attention_fn as attention_fn
