"""Masked attention and its gradients in float64 NumPy, from a dense boolean mask: what every implementation must give.

Written from the definition, head by head, with nothing of the implementations in it. Beside each result stands its
*magnitude*, the same sum over absolute values: rounding errors are relative to it, not to the result, which may cancel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class OracleResult:
    """Named results in float64: out, lse and, if asked for, the gradient of each operand, as dq.

    Attributes:
        values: the results.
        magnitudes: the same sums over absolute values.
        reach: the magnitudes with every probability weighted by the size of what it is the exponential of: its logit,
            and in gradients also lse, since a blockwise backward forms exp(logit - lse) from the rounded lse it was
            handed. One rounding of a logit or of lse changes a result by this times the machine epsilon of the softmax.
    """

    values: dict[str, np.ndarray]
    magnitudes: dict[str, np.ndarray]
    reach: dict[str, np.ndarray]


def attention_oracle(
    query: Any,
    key: Any,
    value: Any,
    mask: np.ndarray,
    *,
    bias: Any = None,
    lengths: np.ndarray | None = None,
    sinks: Any = None,
    scale: float,
    soft_cap: float | None = None,
    dout: Any = None,
    dlse: Any = None,
    gates: Any = None,
    entries: np.ndarray | None = None,
    distances: Any = None,
    tiles: Any = None,
    tile_numbers: np.ndarray | None = None,
    factors: np.ndarray | None = None,
) -> OracleResult:
    """Attention under a dense mask.

    Args:
        query: ``[B, T, N, H]``, any real dtype.
        key: ``[B, S, K, H]``.
        value: ``[B, S, K, Hv]``.
        mask: bool ``[B|1, N|1, T, S]``, True attends.
        bias: ``[B|1, N|1, T, S]``, added after the soft cap.
        lengths: int ``[B|1, 2]``, valid queries and keys.
        sinks: ``[N]``.
        scale: factor of the products.
        soft_cap: bound of the logits.
        dout: ``[B, T, N, Hv]``, cotangent of out; asks for the gradients.
        dlse: ``[B, N, T]``, cotangent of lse, None for zero. What is given for rows whose lse is -inf counts as zero.
        gates: ``[B|1, N|1, capacity]``, factors of the normalised probabilities.
        entries: int ``[B|1, N|1, T, S]``, which of them each pair has; -1 only where no pair attends.
        distances: ``[B|1, N|1, T + S - 1]``, more of the bias: element k - q + T - 1.
        tiles: ``[B|1, N|1, count, block_q, block_kv]``, more of it.
        tile_numbers: int ``[B|1, N|1, T, S]``, which of the tiles each pair has; -1 for none.
        factors: ``[B, N, T, S]`` of the normalised probabilities: dropout's.

    Returns:
        out ``[B, T, N, Hv]``, lse ``[B, N, T]`` and with ``dout`` dq, dk, dv, dgates, dbias, ddistances and dtiles (of
        their operand's shape), dsinks ``[N]``.
        A NaN or infinity in an operand makes NaN of the rows that attend to it.
    """
    query, key, value = (np.asarray(x).astype(np.float64) for x in (query, key, value))
    (batch, q_len, heads, _), (kv_len, kv_heads) = query.shape, key.shape[1:3]
    group = heads // kv_heads if kv_heads else 1
    values = {"out": np.zeros(query.shape[:3] + value.shape[3:]), "lse": np.zeros((batch, heads, q_len))}
    if dout is not None:
        dout = np.asarray(dout).astype(np.float64)
        dlse = np.zeros_like(values["lse"]) if dlse is None else np.asarray(dlse).astype(np.float64)
        values |= {"dq": np.zeros_like(query), "dk": np.zeros_like(key), "dv": np.zeros_like(value)}
        if sinks is not None:
            values["dsinks"] = np.zeros(heads)
        if gates is not None:
            values["dgates"] = np.zeros(np.shape(gates))
        terms = {"dbias": bias, "ddistances": distances, "dtiles": tiles}
        values |= {name: np.zeros(np.shape(x)) for name, x in terms.items() if x is not None}
    gates = None if gates is None else np.asarray(gates).astype(np.float64)
    magnitudes = {name: np.zeros_like(x) for name, x in values.items()}
    reach = {name: np.zeros_like(x) for name, x in values.items()}

    for b in range(batch):
        q_end, kv_end = (q_len, kv_len) if lengths is None else np.asarray(lengths)[b % len(lengths)]
        valid = np.arange(q_len) < q_end
        for n in range(heads):
            attends = mask[b % mask.shape[0], n % mask.shape[1]] & valid[:, None] & (np.arange(kv_len) < kv_end)
            one_bias = _bias_of_head(b, n, bias, distances, tiles, tile_numbers, (q_len, kv_len))
            of_pairs = None if entries is None else entries[b % len(entries), n % entries.shape[1]]
            own_gates = None if gates is None else gates[b % len(gates), n % gates.shape[1]]
            head = _Head(
                query[b, :, n],
                key[b, :, n // group],
                value[b, :, n // group],
                attends,
                valid,
                one_bias,
                scale,
                soft_cap,
                own_gates,
                of_pairs,
                None if factors is None else factors[b, n],
            )
            results = head.forward(None if sinks is None else float(np.asarray(sinks)[n]))
            values["out"][b, :, n], values["lse"][b, n] = results["out"][0], results["lse"][0]
            magnitudes["out"][b, :, n], magnitudes["lse"][b, n] = results["out"][1], results["lse"][1]
            reach["out"][b, :, n], reach["lse"][b, n] = results["out"][2], results["lse"][2]
            if dout is None:
                continue
            gradients = head.backward(dout[b, :, n], dlse[b, n])
            for store, i in ((values, 0), (magnitudes, 1), (reach, 2)):
                store["dq"][b, :, n] = gradients["dq"][i]
                store["dk"][b, :, n // group] += gradients["dk"][i]
                store["dv"][b, :, n // group] += gradients["dv"][i]
                if sinks is not None:
                    store["dsinks"][n] += gradients["dsinks"][i]
                if gates is not None:
                    store["dgates"][b % len(gates), n % gates.shape[1]] += gradients["dgates"][i]
                _add_to_terms(store, b, n, gradients["dlogits"][i], tile_numbers)
    return OracleResult(values, magnitudes, reach)


def _bias_of_head(b, n, bias, distances, tiles, numbers, lengths) -> np.ndarray | None:
    """The sum of one head's terms, [T, S]."""
    if bias is None and distances is None and tiles is None:
        return None

    def of_head(x):
        return np.asarray(x)[b % len(x), n % np.shape(x)[1]].astype(np.float64)

    total = np.zeros(lengths) if bias is None else of_head(bias) + np.zeros(lengths)
    rows, columns = np.arange(lengths[0])[:, None], np.arange(lengths[1])
    if distances is not None:
        total = total + of_head(distances)[columns - rows + lengths[0] - 1]
    if tiles is not None:
        tiles, number = of_head(tiles), numbers[b % len(numbers), n % numbers.shape[1]]
        found = tiles[np.maximum(number, 0), rows % tiles.shape[1], columns % tiles.shape[2]]
        total = total + np.where(number < 0, 0, found)
    return total


def _add_to_terms(store, b, n, dlogits, numbers) -> None:
    """Adds one head's gradient of what is added to its logits, [T, S], to those of the terms."""
    rows, columns = np.arange(dlogits.shape[0])[:, None], np.arange(dlogits.shape[1])
    if "dbias" in store:
        store["dbias"][b % len(store["dbias"]), n % store["dbias"].shape[1]] += dlogits
    if "ddistances" in store:
        into = store["ddistances"][b % len(store["ddistances"]), n % store["ddistances"].shape[1]]
        into += np.bincount((columns - rows + len(rows) - 1).reshape(-1), dlogits.reshape(-1), into.size)
    if "dtiles" in store:
        into = store["dtiles"][b % len(store["dtiles"]), n % store["dtiles"].shape[1]]
        number = numbers[b % len(numbers), n % numbers.shape[1]]
        at = np.broadcast_arrays(number, rows % into.shape[1], columns % into.shape[2])
        has = number >= 0
        np.add.at(into, tuple(x[has] for x in at), dlogits[has])


class _Head:
    """One head of one example: ``[T, H]``, ``[S, H]``, ``[S, Hv]`` and the pairs that attend, ``[T, S]``."""

    def __init__(self, query, key, value, attends, valid, bias, scale, soft_cap, gates, entries, factors=None):
        # A vector that is not finite takes part as zero, and puts a NaN on every pair that attends to or from it.
        (self.query, q_flaw), (self.key, k_flaw), (self.value, v_flaw) = map(_isolate, (query, key, value))
        self.attends, self.valid, self.scale = attends, valid, scale
        self.raw_magnitude = abs(scale) * np.abs(self.query) @ np.abs(self.key).T
        logits = scale * self.query @ self.key.T
        self.cap_slope = np.ones_like(logits)
        if soft_cap is not None:
            tanh = np.tanh(logits / soft_cap)
            logits, self.cap_slope = soft_cap * tanh, 1 - tanh**2
        if bias is not None:
            logits = logits + np.where(attends, bias, 0)
            self.raw_magnitude = self.raw_magnitude + np.abs(np.where(attends & np.isfinite(bias), bias, 0))
        self.logits = np.where(attends, logits + q_flaw[:, None] + k_flaw, -np.inf)
        self.value_flaw = np.where(attends, v_flaw, 0)
        self.gates, self.entries = gates, entries
        self.factor = 1.0 if factors is None else np.asarray(factors, np.float64)
        self.gate = self.factor * (1.0 if gates is None or not gates.size else np.where(attends, gates[entries], 0))

    def forward(self, sink):
        ceiling = self.logits.max(-1, initial=-np.inf)
        if sink is not None:
            ceiling = np.where(self.valid, np.maximum(ceiling, sink), ceiling)
        ceiling = np.where(np.isneginf(ceiling), 0, ceiling)
        weights = np.where(self.attends, np.exp(self.logits - ceiling[:, None]), 0)
        sink_weight = np.zeros(len(ceiling)) if sink is None else np.where(self.valid, np.exp(sink - ceiling), 0)
        total = weights.sum(-1) + sink_weight
        empty = total == 0
        safe_total = np.where(empty, 1, total)
        self.lse = np.where(empty, -np.inf, ceiling + np.log(safe_total))
        # Where a NaN makes the total NaN, what is not attended to still has the probability 0.
        self.probs = np.where(self.attends, weights / safe_total[:, None], 0)
        self.sink_prob = sink_weight / safe_total
        self.out = (self.gate * (self.probs + self.value_flaw)) @ self.value
        self.logit_size = np.where(np.isfinite(self.logits), np.abs(self.logits), 0)
        self.sink_size = 0.0 if sink is None or not np.isfinite(sink) else abs(sink)
        largest = np.max(np.where(self.attends, self.raw_magnitude, 0), -1, initial=0)
        weights = np.abs(self.gate) * self.probs
        return {
            "out": (self.out, weights @ np.abs(self.value), (weights * self.logit_size) @ np.abs(self.value)),
            "lse": (
                self.lse,
                np.maximum(largest, np.where(np.isfinite(self.lse), np.abs(self.lse), 0)),
                (self.probs * self.logit_size).sum(-1),
            ),
        }

    def backward(self, dout, dlse):
        dout, dout_flaw = _isolate(dout)
        dlse = np.where(np.isneginf(self.lse), 0, dlse)
        delta = (dout * self.out).sum(-1) - dlse
        dprobs = dout @ self.value.T
        slope = self.scale * self.cap_slope
        of_bias = self.probs * (self.gate * dprobs - delta[:, None])
        dlogits = of_bias * slope + dout_flaw[:, None]
        dlogits, of_bias = (np.where(self.attends, x, 0) for x in (dlogits, of_bias + dout_flaw[:, None]))
        # Magnitudes: of both terms of the difference, which cancels where a row attends to one key.
        dprobs_size = np.abs(dout) @ np.abs(self.value).T
        steepness = np.abs(self.gate) * dprobs_size + (np.abs(dout) * np.abs(self.out)).sum(-1)[:, None]
        of_bias_size = self.probs * (steepness + np.abs(dlse)[:, None])
        spread = of_bias_size * np.abs(slope)
        flawed_probs = self.probs + np.where(self.attends, dout_flaw[:, None], 0)
        sink_spread = self.sink_prob * ((np.abs(dout) * np.abs(self.out)).sum(-1) + np.abs(dlse))
        lse_size = np.where(np.isfinite(self.lse), np.abs(self.lse), 0)
        size = self.logit_size + lse_size[:, None]
        moved = np.where(np.isfinite(dlogits), np.abs(dlogits), 0) * size  # by a relative change of the probabilities
        abs_query, abs_key, abs_dout = np.abs(self.query), np.abs(self.key), np.abs(dout)
        weights = np.abs(self.gate) * self.probs
        dgates = (flawed_probs + self.value_flaw) * dprobs, self.probs * dprobs_size, self.probs * size * np.abs(dprobs)
        dgates = tuple(self.factor * x for x in dgates)
        bias_moved = np.where(np.isfinite(of_bias), np.abs(of_bias), 0) * size
        return {
            "dlogits": (of_bias, of_bias_size, bias_moved),
            "dq": (dlogits @ self.key, spread @ abs_key, moved @ abs_key),
            "dk": (dlogits.T @ self.query, spread.T @ abs_query, moved.T @ abs_query),
            "dv": ((self.gate * flawed_probs).T @ dout, weights.T @ abs_dout, (weights * size).T @ abs_dout),
            "dgates": tuple(map(self._sum_by_entry, dgates)),
            "dsinks": (
                -(self.sink_prob * delta).sum(),
                sink_spread.sum(),
                (sink_spread * (lse_size + self.sink_size)).sum(),
            ),
        }

    def _sum_by_entry(self, pairs):
        if self.gates is None:
            return None
        return np.bincount(self.entries[self.attends], pairs[self.attends], self.gates.size)


def _isolate(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (last axis) made finite, and NaN for each that was not, else 0."""
    finite = np.asarray(np.isfinite(x).all(-1))
    return np.where(finite[:, None], x, 0.0), np.where(finite, 0.0, np.nan)
