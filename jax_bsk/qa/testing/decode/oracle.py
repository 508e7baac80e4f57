"""Which rows of the cache each token attends to, from the definition, and attention over these in float64.

Token by token in plain Python, with nothing of the implementations in it. The sums, magnitudes and reach are those of
`qa.testing.oracle`, of one example per token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jax_bsk.qa.testing.decode.cases import Case, Inputs
from jax_bsk.qa.testing.oracle import OracleResult, attention_oracle
from jax_bsk.qa.testing.tolerance import dense_attention


@dataclasses.dataclass(frozen=True)
class Visit:
    """What one token and key/value head of a group attends to.

    Attributes:
      pages, places: Page and position within it of each key, a key that counts twice standing there twice.
      owned: Whether the token has a sequence.
      wrong: Whether integers are wrong, so that the result is NaN.
    """

    pages: list[int]
    places: list[int]
    owned: bool
    wrong: bool


def visits(case: Case, inputs: Inputs, group: int) -> list[list[Visit]]:
    """[T][K] of one group."""
    pages, size = inputs.key.shape[1:3]
    lengths, table, offsets = (x[group].tolist() for x in (inputs.kv_lens, inputs.page_indices, inputs.cu_q_lens))
    number, seqs = int(inputs.num_seqs[group, 0]), case.seqs
    used = offsets[: number + 1] if 0 <= number <= seqs else []
    sound = bool(used) and used[0] >= 0 and used == sorted(used) and used[-1] <= case.tokens
    found = []
    for token in range(case.tokens):
        if not sound:
            found.append([Visit([], [], False, True)] * case.kv_heads)
            continue
        seq = next((s for s in range(number) if offsets[s] <= token < offsets[s + 1]), None)
        if seq is None:
            found.append([Visit([], [], False, False)] * case.kv_heads)
            continue
        length, q_len, mine = lengths[seq], offsets[seq + 1] - offsets[seq], token - offsets[seq]
        if not 0 <= length <= case.max_pages * size:
            found.append([Visit([], [], True, True)] * case.kv_heads)
            continue
        base = length - q_len

        def attends(k: int, base=base, mine=mine, q_len=q_len, token=token) -> bool:
            own = base + mine
            if case.window and not (k > own - case.window or k < case.sink_tokens):
                return False
            if inputs.tree is not None and q_len <= 64 and k >= base:
                return bool(inputs.tree[group, token, k - base])
            return k <= own or not case.causal

        row = []
        for head in range(case.kv_heads):
            if row and inputs.selection is None:  # all heads visit the same
                row.append(row[0])
                continue
            listed = range(case.max_pages)
            if inputs.selection is not None:
                listed = [p for p in inputs.selection[group, seq, head].tolist() if p >= 0]
            keys = [k for p in listed for k in range(p * size, min((p + 1) * size, length)) if attends(k)]
            numbers = [table[seq][k // size] for k in keys]
            wrong = any(not 0 <= p < pages for p in numbers)
            row.append(Visit([] if wrong else numbers, [] if wrong else [k % size for k in keys], True, wrong))
        found.append(row)
    return found


def poisoned(case: Case, inputs: Inputs) -> Inputs:
    """The inputs with NaN in each row of the cache that no token attends to.

    Table entries of pages that no token attends to become numbers of no page, where the case has no fault.
    """
    key, value, table = inputs.key.copy(), inputs.value.copy(), inputs.page_indices.copy()
    for group in range(case.groups):
        read = np.zeros(key.shape[1:4], bool)
        for row in visits(case, inputs, group):
            for head, visit in enumerate(row):
                read[visit.pages, visit.places, head] = True
        key[group][~read] = np.nan
        value[group][~read] = np.nan
        if case.fault is None and not case.contiguous:
            owned = np.asarray(read.any(axis=(1, 2)))
            nobody = ~owned[table[group]]
            table[group] = np.where(nobody, np.resize([-1, 10**6, -(2**31), 2**31 - 1], nobody.shape), table[group])
    return inputs._replace(key=key, value=value, page_indices=table)


def oracle(case: Case, inputs: Inputs) -> tuple[OracleResult, dict[str, np.ndarray]]:
    """Named results out [G, T, N, Hv] and lse [G, T, N] in float64, and the same as XLA computes them in their type."""
    found = [_group(case, inputs, group) for group in range(case.groups)]

    def stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    exact = OracleResult(*(stacked([getattr(f[0], x) for f in found]) for x in ("values", "magnitudes", "reach")))
    return exact, stacked([f[1] for f in found])


def _group(case: Case, inputs: Inputs, group: int) -> tuple[OracleResult, dict[str, np.ndarray]]:
    if case.tokens == 0:  # which `dense_attention` has no example of
        heads = case.kv_heads * case.group
        nothing = {"out": np.zeros((0, heads, case.value_dim)), "lse": np.zeros((0, heads))}
        return OracleResult(nothing, nothing, nothing), nothing
    rows = visits(case, inputs, group)
    longest = max([1, *(len(visit.pages) for row in rows for visit in row)])
    shape = (case.tokens, longest, case.kv_heads)
    key = np.zeros((*shape, case.head_dim), inputs.key.dtype)
    value = np.zeros((*shape, case.value_dim), inputs.value.dtype)
    mask = np.zeros((case.tokens, case.kv_heads, 1, longest), bool)
    wrong = np.zeros((case.tokens, case.kv_heads), bool)
    for t, row in enumerate(rows):
        for h, visit in enumerate(row):
            n = len(visit.pages)
            key[t, :n, h] = inputs.key[group, visit.pages, visit.places, h]
            value[t, :n, h] = inputs.value[group, visit.pages, visit.places, h]
            mask[t, h, 0, :n] = True
            wrong[t, h] = visit.wrong
    lengths = np.array([[row[0].owned, longest] for row in rows], np.int32)
    query = inputs.query[group][:, None]
    mask, wrong = (np.repeat(x, case.group, 1) for x in (mask, wrong))
    options: dict[str, Any] = {
        "lengths": lengths,
        "sinks": inputs.sinks,
        "scale": case.scale * case.k_scale,
        "soft_cap": case.soft_cap or None,
    }
    exact = attention_oracle(query, key, value, mask, **options)

    def of_tokens(out: Any, lse: Any) -> dict[str, np.ndarray]:
        out = np.asarray(out).astype(np.float64)[:, 0] * case.v_scale
        return {"out": out, "lse": np.asarray(lse).astype(np.float64)[:, :, 0]}

    values = of_tokens(**exact.values)
    for x in values.values():
        x[wrong] = np.nan

    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        reference = of_tokens(
            *jax.jit(dense_attention, static_argnames=("scale", "soft_cap"))(query, key, value, mask, **options)
        )
    return OracleResult(values, of_tokens(**exact.magnitudes), of_tokens(**exact.reach)), reference
