"""Examples in docstrings: those of the objects listed here are run."""

from __future__ import annotations

import doctest

import pytest

import jax_bsk
from jax_bsk import masks, selection

# Objects by the name that users import them by. Methods with examples are found below their class.
EXAMPLES = {
    **{f"masks.{name}": getattr(masks, name) for name in masks.__all__},
    **{f"selection.{name}": getattr(selection, name) for name in selection.__all__},
    "sparsek": jax_bsk.sparsek,
    "sparsek_causal": jax_bsk.sparsek_causal,
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    found = doctest.DocTestFinder(exclude_empty=True).find(EXAMPLES[name], name, globs={})
    examples = [test for test in found if test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples:
        report: list[str] = []
        runner.run(test, out=report.append)
        assert not runner.failures, "".join(report)
