"""Who may take part, by name. Each maker returns a contender or raises; `Refused` where it cannot compute the case."""

from __future__ import annotations

from collections.abc import Callable

from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.benchmarking.matmul import jax_products, torch_products
from jax_bsk.qa.benchmarking.matmul.cases import Case
from jax_bsk.qa.benchmarking.matmul.contender import Contender, of_jax
from jax_bsk.qa.benchmarking.matmul.operands import Operands

OURS, DENSE, DENSE_RANDOM = "jax_bsk", "dense", "dense-random"
TORCH_BSR, CUSPARSE = "torch-bsr", "cusparse-csr"
OURS_CONSTANT = "jax_bsk-constant"
Maker = Callable[[Case, Operands], Contender]

NAMES = (OURS, OURS_CONSTANT, DENSE, DENSE_RANDOM, TORCH_BSR, "torch-bsr-tuned", CUSPARSE, "bcoo", "bcsr")
# BCSR runs BCOO's code, constant lists tell something only where an order is made of them in every call, and tuning
# compiles four kernels a size and block: a minute of a whole run.
DEFAULT = (OURS, DENSE, TORCH_BSR, CUSPARSE, "bcoo")


def makers(implementation: Implementation | None) -> dict[str, Maker]:
    """A maker a name; the implementation is that of jax_bsk, None its own choice."""
    return {
        OURS: lambda case, o: of_jax(case, o, jax_products.ours(o, implementation, constant=False)),
        OURS_CONSTANT: lambda case, o: of_jax(case, o, jax_products.ours(o, implementation, constant=True)),
        DENSE: lambda case, o: of_jax(case, o, jax_products.dense(o)),
        DENSE_RANDOM: lambda case, o: of_jax(case, o, jax_products.dense_random(o, case.operation)),
        TORCH_BSR: torch_products.bsr,
        "torch-bsr-tuned": torch_products.bsr_tuned,
        CUSPARSE: torch_products.csr,
        "bcoo": lambda case, o: of_jax(case, o, jax_products.bcoo(o)),
        "bcsr": lambda case, o: of_jax(case, o, jax_products.bcsr(o)),
    }
