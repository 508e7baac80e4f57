"""The tolerance rule: an error is judged by the error of plain XLA at the same precision, never by a hand-picked bound.

With float64 oracle ``o``, candidate ``c`` and dense masked XLA attention ``x`` in the candidate's dtype::

    max |c - o|  <=  a * max |x - o|  +  ulp * max magnitude           a = 2,   3 for gradients
    mean |c - o| <=  b * mean |x - o| +  ulp * mean magnitude * slack  b = 1.2, 2 for gradients

``ulp`` is the dtype's machine epsilon. The magnitude of a result is its sum taken over absolute values (see
``oracle``): where terms cancel, one rounding of a term is the unit of what can be asked for. ``slack`` is
``s + 2/sqrt(count)``: ``s`` is an eighth for operands in half precision, where the rounding of the operands is nearly
all of the error and the two computations share it, and a half (a correctly rounded result's) where the operands have
the precision of the softmax, since there XLA's own error is a fraction of an ulp that depends on how its matrix product
happens to split a sum. The second part is there because the two means of few numbers scatter. To the ulp of the
result comes that of the softmax times its reach, one rounding of a logit or of lse (see ``OracleResult.reach``). NaN
and infinities must stand where the oracle's stand.

A plain matrix product needs no other computation beside it, since its sums can be bounded (``compare_product``). With
the magnitude ``m`` (the sum of absolute products) of an element that is a sum of ``n`` products::

    |c - o|  <=  ulp_out / 2 * |o|  +  ulp_sum * (1 + sqrt(n) / 2) * m                   of each element
    mean     <=  (ulp_out / 4 * mean |o|  +  ulp_sum / 4 * mean (1 + sqrt(n) / 2) m) * (1 + 4 / sqrt(count))

The first part is one rounding to the result's type, on average a quarter of an ulp. The second is what a sum in float32
(float64) may lose: in the worst case n roundings of half an ulp of m, but they hardly ever all go one way, and with
random ones the error grows with the square root of n (Higham and Mary, "A New Approach to Probabilistic Rounding Error
Analysis", 2019; their lambda is 1 here). The 1 is for what does not grow: the last roundings, and tensor cores, which
cut off where processors round. On average a sum of numbers of both signs loses about a quarter of ulp_sum * m whatever
its length, so a quarter of the bound leaves room; the means of few numbers scatter. A product whose sums are rounded to
16 bits, or its float32 operands to tf32, is outside both. An element without a product is 0, exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MAX_FACTOR = {False: 2.0, True: 3.0}  # by "is a gradient"
MEAN_FACTOR = {False: 1.2, True: 2.0}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Errors of one named result and their bounds.

    Attributes:
        reference_max, reference_mean: errors of XLA's own computation, where the rule has one.
        pattern: how NaN or infinities differ, if they do.
    """

    name: str
    max_error: float = 0.0
    max_bound: float = 0.0
    mean_error: float = 0.0
    mean_bound: float = 0.0
    reference_max: float | None = None
    reference_mean: float | None = None
    worst_index: tuple[int, ...] = ()
    pattern: str = ""

    @property
    def ok(self) -> bool:
        return not self.pattern and self.max_error <= self.max_bound and self.mean_error <= self.mean_bound

    def __str__(self) -> str:
        head = f"{self.name:7s}{'ok  ' if self.ok else 'FAIL'}"
        if self.pattern:
            return f"{head} {self.pattern}"
        xla_max, xla_mean = ("" if x is None else f" (xla {x:.3g})" for x in (self.reference_max, self.reference_mean))
        return (
            f"{head} max {self.max_error:.3g} <= {self.max_bound:.3g}{xla_max}"
            f"  mean {self.mean_error:.3g} <= {self.mean_bound:.3g}{xla_mean}  worst at {self.worst_index}"
        )


def compare(
    name: str,
    candidate: Any,
    oracle: np.ndarray,
    reference: Any,
    magnitude: np.ndarray,
    *,
    dtype: Any,
    gradient: bool,
    reach: np.ndarray | None = None,
) -> Comparison:
    """Applies the rule to one result.

    Args:
        name: what it is called in reports.
        candidate: the result to judge.
        oracle: the same in float64.
        reference: the same by ``dense_attention`` in the candidate's dtype.
        magnitude: the oracle's sum over absolute values.
        dtype: the precision whose rounding counts (of the operands; float32 for lse and dgates, which are made of
            logits and of products of operands, with nothing rounded to half precision).
        gradient: whether the wider factors of gradients hold.
        reach: the oracle's; None for zero.
    """
    candidate, reference = (np.asarray(x).astype(np.float64) for x in (candidate, reference))
    if problem := _pattern(name, candidate, oracle):
        return problem
    judged = np.isfinite(oracle)
    if not judged.any():
        return Comparison(name)
    error = np.where(judged, np.abs(np.where(judged, candidate, 0) - np.where(judged, oracle, 0)), 0)
    # Where XLA itself is not finite (NaN reaches further in it) there is nothing to compare with.
    comparable = judged & np.isfinite(reference)
    xla_error = np.abs(reference[comparable] - oracle[comparable])
    xla_max, xla_mean = (float(xla_error.max()), float(xla_error.mean())) if comparable.any() else (0.0, 0.0)
    ulp, magnitude = float(jnp.finfo(dtype).eps), magnitude[judged]
    softmax_ulp = min(ulp, float(jnp.finfo(jnp.float32).eps))
    slack = (1 / 2 if ulp == softmax_ulp else 1 / 8) + 2 / np.sqrt(judged.sum())
    reach = softmax_ulp * (np.zeros_like(oracle) if reach is None else reach)[judged]
    return Comparison(
        name,
        max_error=float(error.max()),
        max_bound=MAX_FACTOR[gradient] * xla_max + ulp * float(magnitude.max()) + float(reach.max()),
        mean_error=float(error[judged].mean()),
        mean_bound=MEAN_FACTOR[gradient] * xla_mean
        + ulp * float(magnitude.mean()) * slack
        + float(reach.mean()) * slack,
        reference_max=xla_max,
        reference_mean=xla_mean,
        worst_index=tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape)),
    )


def compare_product(
    name: str, candidate: Any, oracle: np.ndarray, magnitude: np.ndarray, terms: np.ndarray, *, summed_in: Any
) -> Comparison:
    """Applies the rule of plain products to one result, element by element.

    Args:
        name: what it is called in reports.
        candidate: the result to judge; its type is the one that it is rounded to.
        oracle: the same in float64.
        magnitude: its sums of absolute products.
        terms: how many products each sum has, of a shape that broadcasts.
        summed_in: the type of the sums.

    Returns:
        With the error and the bound of the element that is worst as a share of its bound.
    """
    candidate = np.asarray(candidate)
    out = jnp.finfo(candidate.dtype)
    candidate = candidate.astype(np.float64)
    if problem := _pattern(name, candidate, oracle):
        return problem
    judged = np.isfinite(oracle)
    summed = judged & (magnitude > 0)
    if (judged & ~summed & (candidate != 0)).any():
        where = tuple(int(i) for i in np.argwhere(judged & ~summed & (candidate != 0))[0])
        return Comparison(name, worst_index=where, pattern=f"{candidate[where]} at {where}, a sum of nothing")
    if not summed.any():
        return Comparison(name)
    error, size = np.abs(candidate[summed] - oracle[summed]), np.abs(oracle[summed])
    growth = 1 + np.sqrt(np.broadcast_to(terms, oracle.shape)[summed]) / 2
    lost = float(jnp.finfo(summed_in).eps) * growth * magnitude[summed]
    ulp, least = float(out.eps), float(out.smallest_subnormal)
    bound = ulp / 2 * size + lost + least
    worst = int((error / bound).argmax())
    mean_bound = (ulp * size.mean() + lost.mean()) / 4 * (1 + 4 / np.sqrt(error.size)) + least
    return Comparison(
        name,
        max_error=float(error[worst]),
        max_bound=float(bound[worst]),
        mean_error=float(error.mean()),
        mean_bound=float(mean_bound),
        worst_index=tuple(int(i) for i in np.argwhere(summed)[worst]),
    )


def _pattern(name: str, candidate: np.ndarray, oracle: np.ndarray) -> Comparison | None:
    """The comparison of a result of another shape, or whose NaN or infinities stand elsewhere."""
    if candidate.shape != oracle.shape:
        return Comparison(name, pattern=f"shape {candidate.shape}, expected {oracle.shape}")
    for what, find in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differs = find(candidate) != find(oracle)
        if differs.any():
            where = tuple(int(i) for i in np.argwhere(differs)[0])
            text = (
                f"{what} at {int(find(candidate).sum())} places, expected at {int(find(oracle).sum())}; "
                f"first difference at {where}: {candidate[where]}, expected {oracle[where]}"
            )
            return Comparison(name, worst_index=where, pattern=text)
    return None


def dense_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    *,
    bias: Array | None = None,
    lengths: Array | None = None,
    sinks: Array | None = None,
    scale: float,
    soft_cap: float | None = None,
    gates: Array | None = None,
    entries: Array | None = None,
    factors: Array | None = None,
) -> tuple[Array, Array]:
    """Dense masked attention as XLA does it: the reference of the rule, differentiable, quadratic in memory.

    Dtypes go as in ``jax.nn.dot_product_attention(implementation="xla")``: logits and softmax in float32, probabilities
    rounded to the dtype of the operands, their product with the values in it. Arguments as ``attention_oracle``;
    returns out ``[B, T, N, Hv]`` in the operands' dtype and lse ``[B, N, T]`` in the softmax's.
    """
    (batch, q_len, heads, size), (kv_len, kv_heads) = query.shape, key.shape[1:3]
    dtype = np.dtype(np.float64 if query.dtype == np.float64 else np.float32)
    grouped = query.reshape(batch, q_len, kv_heads, heads // kv_heads, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=dtype)
    logits = logits.reshape(batch, heads, q_len, kv_len) * jnp.asarray(scale, dtype)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    valid = jnp.ones((1, 1, q_len), bool)
    if lengths is not None:
        valid = (jnp.arange(q_len, dtype=lengths.dtype)[None] < lengths[:, :1])[:, None]
        mask = (
            mask & valid[..., None] & (jnp.arange(kv_len, dtype=lengths.dtype)[None] < lengths[:, 1:])[:, None, None, :]
        )
    ceiling = lax.stop_gradient(jnp.where(mask, logits, -jnp.inf)).max(-1, initial=-jnp.inf)
    if sinks is not None:
        sink = sinks.astype(dtype)[None, :, None]
        ceiling = jnp.maximum(ceiling, lax.stop_gradient(sink))
    ceiling = jnp.where(jnp.isneginf(ceiling), 0, ceiling)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - ceiling[..., None], 0)), 0)
    total = weights.sum(-1)
    if sinks is not None:
        total = total + jnp.where(valid, jnp.exp(sink - ceiling), 0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    probs = weights / total[..., None]
    if gates is not None and entries is not None and gates.size:
        entries = jnp.broadcast_to(entries, probs.shape).reshape(batch, heads, -1)
        gates = jnp.broadcast_to(gates.astype(dtype), (batch, heads, gates.shape[-1]))
        of_pairs = jnp.take_along_axis(gates, jnp.maximum(entries, 0), axis=-1)
        probs = probs * jnp.where(entries < 0, 0, of_pairs).reshape(probs.shape)
    if factors is not None:
        probs = probs * factors.astype(dtype)
    probs = probs.astype(key.dtype).reshape(batch, kv_heads, -1, q_len, kv_len)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, value).reshape(batch, q_len, heads, value.shape[-1])
    return out, jnp.where(empty, -jnp.inf, ceiling + jnp.log(total))


def bias_of_pairs(
    dense: Array | None, distances: Array | None, tiles: Array | None, numbers: Array | None, lengths: tuple[int, int]
) -> Array:
    """The terms of a bias as one array of all pairs, [B|1, N|1, T, S].

    Args:
        dense: ``[B|1, N|1, T, S]``.
        distances: ``[B|1, N|1, T + S - 1]``.
        tiles: ``[B|1, N|1, count, block_q, block_kv]``.
        numbers: int ``[B|1, N|1, T, S]``, the tile of each pair; negative for none.
        lengths: T and S.
    """
    # No gathers, whose transposes, scatters of all pairs, take XLA's CPU seconds.
    q_len, kv_len = lengths
    total: Any = jnp.zeros((1, 1, 1, 1), np.float32) if dense is None else dense
    if distances is not None:  # row after row begins one element earlier
        lead, width = distances.shape[:2], q_len + kv_len - 1
        rows = jnp.pad(distances, [(0, 0), (0, 0), (0, 1)])[:, :, None]
        rows = jnp.broadcast_to(rows, (*lead, q_len, width + 1)).reshape(*lead, -1)[..., : q_len * width]
        total = total.astype(distances.dtype) + rows.reshape(*lead, q_len, width)[..., q_len - 1 :]
    if tiles is not None and numbers is not None:
        repeats = [-(-n // size) for n, size in zip(lengths, tiles.shape[3:], strict=True)]
        everywhere = jnp.tile(tiles, (1, 1, 1, *repeats))[..., :q_len, :kv_len]
        for number in range(tiles.shape[2]):
            found = jnp.where(numbers == number, everywhere[:, :, number], 0)
            total = total.astype(tiles.dtype) + found
    return total


def assert_close(comparisons: list[Comparison], repro: str) -> str:
    """Returns the report of all comparisons; raises AssertionError with it and the repro line if one fails."""
    report = "\n".join(str(c) for c in comparisons)
    if not all(c.ok for c in comparisons):
        raise AssertionError(f"outside the tolerance rule:\n{report}\nrepro: {repro}")
    return report
