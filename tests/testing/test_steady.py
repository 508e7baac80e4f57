"""The cases that are repeated for bit-equal results."""

from __future__ import annotations

from jax_bsk.qa.testing import steady


def test_every_case_is_found_by_its_name():
    """A worker looks a product up by name alone: one name for two platforms would ask a GPU for the CPU's matrix."""
    for cases in steady.PRODUCTS.values():
        for name, case in cases.items():
            assert steady.STEADY[f"matmul:{name}"] is case
    for name, case in steady.ATTENTION.items():
        assert steady.STEADY[name] is case
