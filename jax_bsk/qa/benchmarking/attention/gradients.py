"""What the gradients must be: some rows of dquery, dkey and dvalue in float64.

A row of dkey or dvalue needs every query that attends to it, and of each the log-sum-exp and delta = sum_d dout * out,
which need all of that head's logits: S^2 work, done in float64 on the device in chunks of queries. What follows, a few
columns a head, is done by numpy. With P = exp(scale q k^T - lse) and dS = P * (dout v^T - delta)

    dquery = scale dS k,    dkey = scale dS^T q,    dvalue = P^T dout.

The tolerance is made like the output's: three times the error of the same row where P, dS, the output that delta is
made of, and the result are rounded to the type, and one rounding. The rounding is of the row's largest number, or of
what is typical of the tensor where the row is less: in a row whose terms cancel an error is as large as the terms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.qa.benchmarking.attention.cases import Case, Pattern
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.passes import GRADIENTS
from jax_bsk.qa.benchmarking.attention.spots import Spots, whole_heads
from jax_bsk.qa.benchmarking.check import Reference, rounded, rounding_of

CHUNK = 1024  # queries at a time: 270 MB of float64 logits at 32,768 keys
ROUNDINGS = 3


class GradientReferences:
    """References of the gradients of one case, one a pattern."""

    def __init__(self, case: Case, inputs: Inputs, spots: Spots):
        self._length, self._group, self._spots = case.length, case.group, spots
        self._scale = 1 / math.sqrt(case.head_dim)
        query, key, value = inputs.arrays
        self._dtype = np.dtype(query.dtype)
        kv_spots = spots.of_kv(case.group)
        # Every query head of the groups that are looked at, [n, group, S, D].
        members = kv_spots.heads[:, None] * case.group + np.arange(case.group)
        self._query, self._dout = (
            np.stack([_float64(whole_heads(x, spots.examples, heads)) for heads in members.T], 1)
            for x in (query, inputs.cotangent)
        )
        self._key, self._value = (
            _float64(whole_heads(x, kv_spots.examples, kv_spots.heads)) for x in (key, value)
        )  # [n, S, D]
        self._made: dict[int, dict[str, Reference]] = {}

    def of(self, pattern: Pattern) -> dict[str, Reference]:
        if id(pattern) not in self._made:
            self._made[id(pattern)] = self._make(pattern)
        return self._made[id(pattern)]

    def _make(self, pattern: Pattern) -> dict[str, Reference]:
        exact: dict[str, list[np.ndarray]] = {name: [] for name in GRADIENTS}
        of_type: dict[str, list[np.ndarray]] = {name: [] for name in GRADIENTS}
        for i in range(len(self._spots.heads)):
            lse, delta, rounded_delta = self._statistics(i, pattern)
            to_type = functools.partial(rounded, dtype=self._dtype)
            for made, delta_of, kept in ((exact, delta, lambda x: x), (of_type, rounded_delta, to_type)):
                for name, rows in zip(GRADIENTS, self._rows(i, pattern, lse, delta_of, kept), strict=True):
                    made[name].append(rows)
        kv_spots = self._spots.of_kv(self._group)
        return {
            name: self._reference(self._spots if name == "dquery" else kv_spots, exact[name], of_type[name])
            for name in GRADIENTS
        }

    def _statistics(self, i: int, pattern: Pattern) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """lse, delta, and delta of the rounded output; float64 [group, S] each, of spot i's query heads."""
        chunks = []
        with jax.enable_x64(True):
            key, value = (jnp.asarray(x[i]) for x in (self._key, self._value))
            kv = jnp.arange(self._length)[None]
            for start in range(0, self._length, CHUNK):
                some = slice(start, start + CHUNK)
                allowed = pattern.attends(jnp.arange(self._length)[some, None], kv, self._length, jnp)
                query, dout = (jnp.asarray(x[i, :, some]) for x in (self._query, self._dout))
                parts = [
                    _statistics(q, key, value, do, allowed, self._scale, self._dtype.name)
                    for q, do in zip(query, dout, strict=True)
                ]
                chunks.append(np.stack([np.stack([np.asarray(x) for x in part]) for part in parts], 1))
        lse, delta, rounded_delta = np.concatenate(chunks, -1)
        return lse, delta, rounded_delta

    def _rows(
        self, i: int, pattern: Pattern, lse: np.ndarray, delta: np.ndarray, to_type: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, ...]:
        """Spot i's rows of the gradients, [r, D] each; `to_type` is applied where kernels round."""
        rows, positions = self._spots.rows[i], np.arange(self._length)
        query, dout, key, value = self._query[i], self._dout[i], self._key[i], self._value[i]

        def weights(some_q, some_k):
            """P and dS of those queries and keys, [group, q, k]."""
            allowed = pattern.attends(positions[some_q, None], positions[None, some_k], self._length)
            logits = self._scale * query[:, some_q] @ key[some_k].T - lse[:, some_q, None]
            p = np.exp(np.where(allowed, logits, -np.inf))
            return p, p * (dout[:, some_q] @ value[some_k].T - delta[:, some_q, None])

        member = self._spots.heads[i] % self._group
        ds = weights(rows, slice(None))[1][member]
        dquery = self._scale * to_type(ds) @ key
        p, ds = weights(slice(None), rows)
        dkey = self._scale * np.einsum("gqk,gqd->kd", to_type(ds), query)
        dvalue = np.einsum("gqk,gqd->kd", to_type(p), dout)
        return tuple(to_type(x) for x in (dquery, dkey, dvalue))

    def _reference(self, spots: Spots, exact: list[np.ndarray], of_type: list[np.ndarray]) -> Reference:
        rows = np.stack(exact)
        error = np.abs(np.stack(of_type) - rows).max(-1)
        largest = np.abs(rows).max(-1)
        largest = np.maximum(largest, np.median(largest))
        return Reference(spots, rows, ROUNDINGS * error + rounding_of(self._dtype) * largest)


def _float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _statistics(
    query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array, allowed: jax.Array, scale: float, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """lse, delta and delta of the output rounded to the type, of one head and some of its queries."""
    logits = jnp.where(allowed, scale * query @ key.T, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.exp(logits - lse[:, None]) @ value
    info = jnp.finfo(dtype)
    # Not a conversion there and back, which XLA may leave out.
    rounded = jax.lax.reduce_precision(out, exponent_bits=int(info.nexp), mantissa_bits=int(info.nmant))
    return lse, (out * dout).sum(-1), (rounded * dout).sum(-1)
