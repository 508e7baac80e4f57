"""Numeric test kit: oracle, tolerance rule, cases and one battery for every implementation of sparse attention.

Not on the path of a call. Shared by the tests, validation on other machines and benchmarks; needs NumPy and JAX only.
"""

from jax_bsk.qa.testing.battery import Mismatch as Mismatch
from jax_bsk.qa.testing.battery import from_public as from_public
from jax_bsk.qa.testing.battery import run_case as run_case
from jax_bsk.qa.testing.cases import CORNER_CASES as CORNER_CASES
from jax_bsk.qa.testing.cases import PERFORMANCE_CASES as PERFORMANCE_CASES
from jax_bsk.qa.testing.cases import Case as Case
from jax_bsk.qa.testing.cases import Inputs as Inputs
from jax_bsk.qa.testing.cases import make_inputs as make_inputs
from jax_bsk.qa.testing.cases import random_case as random_case
from jax_bsk.qa.testing.oracle import OracleResult as OracleResult
from jax_bsk.qa.testing.oracle import attention_oracle as attention_oracle
from jax_bsk.qa.testing.tolerance import Comparison as Comparison
from jax_bsk.qa.testing.tolerance import compare as compare
from jax_bsk.qa.testing.tolerance import dense_attention as dense_attention
