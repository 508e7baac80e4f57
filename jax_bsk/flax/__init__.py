"""Sparsity inside Flax: `attention_fn` for Flax's multi-head attention, and ready modules in `linen` and `nnx`.

The package stands above `attention` and `matmul` on the path of a call. It is the only one in jax_bsk that imports
Flax, and `import jax_bsk` does not import it.
"""

from __future__ import annotations

try:
    import flax as _flax  # noqa: F401  (imported here, so that one place names the missing extra)
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ImportError("jax_bsk.flax needs Flax; install it with `pip install 'flax>=0.12'`", name="flax") from error

from jax_bsk.flax import linen as linen
from jax_bsk.flax import nnx as nnx
from jax_bsk.flax._attention_fn import attention_fn as attention_fn
