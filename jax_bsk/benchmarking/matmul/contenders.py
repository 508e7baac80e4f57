"""Who may take part, by name. Each maker returns a contender or raises; `Refused` where it cannot compute the case."""

from __future__ import annotations

from collections.abc import Callable

from jax_bsk.benchmarking.matmul import jax_products, torch_products
from jax_bsk.benchmarking.matmul.cases import Case
from jax_bsk.benchmarking.matmul.contender import Contender, of_jax
from jax_bsk.benchmarking.matmul.operands import Operands

OURS, DENSE = "jax_bsk", "dense"
OURS_CONSTANT = "jax_bsk-constant"
Maker = Callable[[Case, Operands], Contender]

NAMES = (OURS, OURS_CONSTANT, DENSE, "torch-bsr", "torch-bsr-tuned", "cusparse-csr", "bcoo", "bcsr")
# BCSR runs BCOO's code, constant lists tell something only where an order is made of them in every call, and tuning
# compiles four kernels a size and block: a minute of a whole run.
DEFAULT = (OURS, DENSE, "torch-bsr", "cusparse-csr", "bcoo")


def makers(implementation: str | None) -> dict[str, Maker]:
    """A maker a name; the implementation is that of jax_bsk, None its own choice."""
    return {
        OURS: lambda case, o: of_jax(case, o, jax_products.ours(o, implementation, constant=False)),
        OURS_CONSTANT: lambda case, o: of_jax(case, o, jax_products.ours(o, implementation, constant=True)),
        DENSE: lambda case, o: of_jax(case, o, jax_products.dense(o)),
        "torch-bsr": torch_products.bsr,
        "torch-bsr-tuned": torch_products.bsr_tuned,
        "cusparse-csr": torch_products.csr,
        "bcoo": lambda case, o: of_jax(case, o, jax_products.bcoo(o)),
        "bcsr": lambda case, o: of_jax(case, o, jax_products.bcsr(o)),
    }
