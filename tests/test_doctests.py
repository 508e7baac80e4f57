"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
from typing import Any

import jax
import pytest

import jax_bsk
import jax_bsk.flax
from jax_bsk import decode, masks, packing, selection

# Objects by the name that users import them by. Methods with examples are found below their class.
OBJECTS: dict[str, Any] = {
    **{f"masks.{name}": getattr(masks, name) for name in masks.__all__},
    **{
        f"decode.{name}": getattr(decode, name)
        for name in ("attention", "append", "ragged_paged_attention", "append_pages", "PagePool")
    },
    **{f"selection.{name}": getattr(selection, name) for name in selection.__all__},
    **{
        name: getattr(jax_bsk, name)
        for name in (
            "sparse_attention",
            "packed_attention",
            "sparse_matmul",
            "sampled_matmul",
            "BSR",
            "pruning",
            "sparsek",
            "sparsek_causal",
            "SparseKState",
            "sparsek_attention",
            "nsa_attention",
            "flops",
        )
    },
    **{f"packing.{name}": getattr(packing, name) for name in packing.__all__},
    **{f"context.{name}": getattr(jax_bsk.context, name) for name in ("plan", "describe")},
    "flax.attention_fn": jax_bsk.flax.attention_fn,
    **{
        f"flax.{library.__name__.rpartition('.')[2]}.{name}": getattr(library, name)
        for library in (jax_bsk.flax.nnx, jax_bsk.flax.linen)
        for name in ("SparseSelfAttention", "BlockSparseDense", "NSASelfAttention", "SparseKSelfAttention")
    },
}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_examples_of_a_docstring_run(name):
    found = doctest.DocTestFinder(exclude_empty=True).find(OBJECTS[name], name)
    examples = [test for test in found if test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    with jax.numpy_dtype_promotion("standard"):  # as a reader has it
        failed = sum(runner.run(test, out=report.append).failed for test in examples)
    assert failed == 0, "".join(report)
