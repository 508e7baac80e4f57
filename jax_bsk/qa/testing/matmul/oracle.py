"""Block-sparse products and their gradients in float64 NumPy, block by block from the lists: what all must give.

Beside each result stands its magnitude, the same sum over absolute values, and how many products each of its sums has:
the bounds of `tolerance.compare_product`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jax_bsk.qa.testing.matmul.cases import Case, Inputs, inside, listed_blocks


@dataclasses.dataclass(frozen=True)
class Sum:
    """One result in float64, with what bounds its error."""

    value: np.ndarray
    magnitude: np.ndarray
    terms: np.ndarray

    @property
    def fields(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.value, self.magnitude, self.terms

    @property
    def T(self) -> Sum:
        return Sum(self.value.T, self.magnitude.T, self.terms.T)

    def __matmul__(self, other: Sum) -> Sum:
        return Sum(self.value @ other.value, self.magnitude @ other.magnitude, self.terms @ other.terms)


def _factor(x: np.ndarray) -> Sum:
    x = x.astype(np.float64)
    return Sum(x, np.abs(x), np.ones(x.shape))


def oracle(case: Case, inputs: Inputs, *, gradients: bool) -> dict[str, Sum]:
    """Named results, each with a leading dimension of examples.

    Returns:
      "out"; with gradients also "ddata" and "ddense", or "dleft" and "dright".
    """
    examples = [_one(case, inputs, i, gradients) for i in range(len(inputs.cotangent))]

    def stacked(name: str) -> Sum:
        parts = zip(*(example[name].fields for example in examples), strict=True)
        return Sum(*map(np.stack, parts))

    return {name: stacked(name) for name in examples[0]}


def _one(case: Case, inputs: Inputs, example: int, gradients: bool) -> dict[str, Sum]:
    def operand(name: str) -> Any:
        x = inputs.operands[name]
        if name == "lists":
            return tuple(y[example] for y in x) if name in case.mapped else x
        return x[example] if name in case.mapped else x

    indptr, indices = operand("lists")
    blocks, dout = listed_blocks(case, indptr, indices), inputs.cotangent[example]

    def dense_of(data: np.ndarray) -> Sum:
        total = Sum(*(np.zeros(case.shape) for _ in range(3)))
        for row, column, entry in blocks:
            height, width = inside(case, row, column)
            block = _factor(data[entry, :height, :width])
            top, left = row * case.block_rows, column * case.block_columns
            for whole, part in zip(total.fields, block.fields, strict=True):
                whole[top : top + height, left : left + width] += part
        return total

    def sampled(matrix: Sum) -> Sum:
        found = Sum(*(np.zeros((indices.size, *case.block_size)) for _ in range(3)))
        for row, column, entry in blocks:
            height, width = inside(case, row, column)
            top, left = row * case.block_rows, column * case.block_columns
            for part, whole in zip(found.fields, matrix.fields, strict=True):
                part[entry, :height, :width] = whole[top : top + height, left : left + width]
        return found

    if case.form == "sampled":
        left, right = (_factor(operand(name)) for name in ("left", "right"))
        results = {"out": sampled(left @ right)}
        if gradients:
            matrix = dense_of(dout)
            results |= {"dleft": matrix @ right.T, "dright": left.T @ matrix}
        return results
    # R D with R = A or A^T, of which a dense factor on the left gives the transpose.
    matrix, dense = dense_of(operand("data")), _factor(operand("dense"))
    dense = dense.T if case.dense_left else dense
    factor = matrix.T if case.transposed_lists else matrix
    out = factor @ dense
    if not case.transposed_lists:
        out = _poisoned(case, out, indptr, indices)
    results = {"out": out.T if case.dense_left else out}
    if gradients:
        dproduct = _factor(dout.T if case.dense_left else dout)
        dfactor, ddense = dproduct @ dense.T, factor.T @ dproduct
        results["ddata"] = sampled(dfactor.T if case.transposed_lists else dfactor)
        results["ddense"] = ddense.T if case.dense_left else ddense
    return results


def _poisoned(case: Case, out: Sum, indptr: np.ndarray, indices: np.ndarray) -> Sum:
    """NaN in the rows whose offsets or ids make no sense."""
    value = out.value.copy()
    for row in range(case.grid[0]):
        begin, end = int(indptr[row]), int(indptr[row + 1])
        ids = indices[max(begin, 0) : max(end, 0)]
        if not 0 <= begin <= end <= indices.size or ((ids < 0) | (ids >= case.grid[1])).any():
            value[row * case.block_rows : (row + 1) * case.block_rows] = np.nan
    return dataclasses.replace(out, value=value)
