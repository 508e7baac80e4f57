"""The cases that are repeated for bit-equal results."""

from __future__ import annotations

from jax_bsk.qa.testing import steady


def test_every_case_is_found_by_its_name():
    """A worker looks a product up by name alone: one name for two platforms would ask a GPU for the CPU's matrix."""
    for cases in steady.PRODUCTS.values():
        for name, case in cases.items():
            assert steady.STEADY[f"matmul:{name}"] is case
    for cases in steady.DECODING.values():
        for name, case in cases.items():
            assert steady.STEADY[f"decode:{name}"] is case
    for name, case in steady.ATTENTION.items():
        assert steady.STEADY[name] is case


def test_a_serving_batch_repeats():
    case = steady.DECODING["cpu"]["float32-short-parts"]
    assert steady.repeats_are_equal(case, "cpu", 2)
    q, _, lengths, table, offsets, number = case.operands()
    assert q.shape[0] == offsets[-1]
    assert number[0] == len(lengths) == len(table)
