"""Block selection: which key blocks each query block attends to, chosen from data inside `jit`, as a `BlockMask`."""

from jax_bsk.selection._moba import moba
from jax_bsk.selection._nsa import nsa
from jax_bsk.selection._sparsek import sparsek
from jax_bsk.selection._topk import from_topk
from jax_bsk.selection._xattention import xattention

__all__ = ["from_topk", "moba", "nsa", "sparsek", "xattention"]
