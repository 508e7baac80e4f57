"""Block-sparse attention for JAX: native CUDA and CPU kernels behind one differentiable function."""

from jax_bsk import biases as biases
from jax_bsk import context as context
from jax_bsk import decode as decode
from jax_bsk import flops as flops
from jax_bsk import masks as masks
from jax_bsk import packing as packing
from jax_bsk import selection as selection
from jax_bsk.attention.api import sparse_attention as sparse_attention
from jax_bsk.attention.derivatives import RESIDUAL_NAMES as RESIDUAL_NAMES
from jax_bsk.attention.packed import packed_attention as packed_attention
from jax_bsk.compositions.nsa import nsa_attention as nsa_attention
from jax_bsk.compositions.sparsek import sparsek_attention as sparsek_attention
from jax_bsk.core.errors import FallbackWarning as FallbackWarning
from jax_bsk.core.errors import UnsupportedError as UnsupportedError
from jax_bsk.core.library import export_checks as export_checks
from jax_bsk.core.library import register as _register
from jax_bsk.core.version import __version__ as __version__
from jax_bsk.masks import BlockMask as BlockMask
from jax_bsk.matmul import pruning as pruning
from jax_bsk.matmul.api import sampled_matmul as sampled_matmul
from jax_bsk.matmul.api import sparse_matmul as sparse_matmul
from jax_bsk.matmul.bsr import BSR as BSR
from jax_bsk.selection.soft_topk import sparsek as sparsek
from jax_bsk.selection.soft_topk_causal import SparseKCausal as SparseKCausal
from jax_bsk.selection.soft_topk_causal import SparseKState as SparseKState
from jax_bsk.selection.soft_topk_causal import sparsek_causal as sparsek_causal

_register()
