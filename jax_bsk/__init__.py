"""Block-sparse attention for JAX: native CUDA and CPU kernels behind one differentiable function."""

from jax_bsk import flops as flops
from jax_bsk import masks as masks
from jax_bsk import pruning as pruning
from jax_bsk import selection as selection
from jax_bsk._attention_op import RESIDUAL_NAMES as RESIDUAL_NAMES
from jax_bsk._errors import FallbackWarning as FallbackWarning
from jax_bsk._errors import UnsupportedError as UnsupportedError
from jax_bsk._ffi import export_checks as export_checks
from jax_bsk._ffi import register as _register
from jax_bsk._sparsek_attention import sparsek_attention as sparsek_attention
from jax_bsk._sparsek_causal import SparseKCausal as SparseKCausal
from jax_bsk._sparsek_causal import SparseKState as SparseKState
from jax_bsk._sparsek_causal import sparsek_causal as sparsek_causal
from jax_bsk._version import __version__ as __version__
from jax_bsk.attention import sparse_attention as sparse_attention
from jax_bsk.bsr import BSR as BSR
from jax_bsk.masks import BlockMask as BlockMask
from jax_bsk.matmul import sampled_matmul as sampled_matmul
from jax_bsk.matmul import sparse_matmul as sparse_matmul
from jax_bsk.nsa import nsa_attention as nsa_attention
from jax_bsk.sparsek import sparsek as sparsek

_register()
