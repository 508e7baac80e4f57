"""A small model of the time of attention over a sharded sequence, fitted to two GPUs, for machines that we do not have.

A device has a number of visited blocks per head, and receives keys and values of others. Its time is

    forward    f work + bytes,        or   max(f near, bytes) + f far   where rows of own keys run beside the exchange
    backward   the same with b in place of f, and the bytes once more: the gradients that go back

and that of the slowest device counts, with a constant for each pass. `f` and `b` are the mask's own times of a block
and head on one GPU. A row of blocks is one multiprocessor's, so a device is never faster than its longest row. Where
keys come one by one behind the own ones, these are copied meanwhile, at the rate of a copy. Fitted are the rate of the
bytes, and the constants of the two passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_bsk import BlockMask, context
from jax_bsk.context.exchange import exchange_of
from jax_bsk.context.visits import Visits

from .cases import DEFAULT_MASKS, GROUPED, Sizes, case
from .layouts import exchange_cost

MULTIPROCESSORS = 132  # of an H200
STEP_SECONDS = 20e-6  # latency of a step of an exchange, as `context.exchange` assumes it
RATES = np.arange(100, 501) * 1e9  # of bytes, among which the fit chooses
PASSES = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Loads:
    """What each device of a layout has to do.

    Attributes:
      near: [shards], visited blocks of rows that run beside the exchange, summed over heads and examples.
      far: [shards], those of the other rows.
      longest: [shards], blocks of the longest row of blocks.
      received: [shards], bytes of keys and values of others.
      copied: Bytes that are read and written to make room for others' keys, beside the exchange.
      steps: Collectives of the exchange.
    """

    near: np.ndarray
    far: np.ndarray
    longest: np.ndarray
    received: np.ndarray
    copied: int
    steps: int

    @classmethod
    def of(cls, mask: BlockMask, shards: int, batch: int, heads: int, kv_heads: int, head_dim: int) -> Loads:
        """Loads of a mask that all heads share, in bfloat16."""
        visits = Visits.of(mask)
        assert visits is not None
        described = context.describe(mask, shards, kv_heads=kv_heads, head_dim=head_dim, batch=batch)
        rows = visits.work()
        work = rows.reshape(shards, -1)
        exchange = None if described.gathered else exchange_of(visits, shards)
        near, copied = np.zeros(shards, np.int64), 0
        if exchange is not None and len(exchange.parts) == 2:
            near = (rows * ~visits.far(shards)).reshape(shards, -1).sum(1)
        elif exchange is not None and exchange.steps:
            copied = 2 * batch * (mask.kv_len // shards) * kv_heads * 2 * head_dim * jnp.dtype(jnp.bfloat16).itemsize
        all_heads = batch * heads
        far = (work.sum(1) - near) * all_heads
        steps = described.steps if described.received.any() else 0
        return cls(near * all_heads, far, work.max(1), described.received, copied, steps)

    def seconds(self, block: float, bytes_per_second: float, copy_rate: float, returned: bool) -> float:
        """Seconds of a pass on the slowest device, without the constant.

        Args:
          block: Seconds of a visited block of one head on a whole device.
          bytes_per_second: Rate of received bytes.
          copy_rate: Bytes per second that a copy reads and writes.
          returned: Whether gradients go back, as many bytes.
        """
        travel = self.received / bytes_per_second + STEP_SECONDS * self.steps
        row = MULTIPROCESSORS * block * self.longest
        if self.near.any():
            found = np.maximum(block * self.near, travel) + block * self.far
        else:
            found = np.maximum(travel, self.copied / copy_rate) + block * self.far
        return float((np.maximum(found, row) + returned * travel).max())


@dataclasses.dataclass(frozen=True)
class TimeModel:
    """The constants.

    Attributes:
      block_seconds: By mask, seconds of a visited block and head in the forward and in the backward, of one GPU.
      bytes_per_second: Rate of received bytes.
      constants: Seconds that each pass takes beside.
      copy_rate: Bytes per second that a copy reads and writes.
    """

    block_seconds: Mapping[str, tuple[float, float]]
    bytes_per_second: float
    constants: tuple[float, float]
    copy_rate: float

    def seconds(self, name: str, loads: Loads) -> tuple[float, float]:
        """Seconds of the forward, and of forward and backward."""
        passes = [
            loads.seconds(block, self.bytes_per_second, self.copy_rate, returned) + constant
            for block, returned, constant in zip(self.block_seconds[name], (False, True), self.constants, strict=True)
        ]
        return passes[0], sum(passes)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measured row of two GPUs.

    Attributes:
      name: Name of the mask.
      order: `contiguous` or `plan`.
      loads: What the model is told.
      seconds: Seconds of the forward, and of forward and backward.
    """

    name: str
    order: str
    loads: Loads
    seconds: tuple[float, float]


def measured(results: Mapping[str, Any]) -> tuple[dict[str, tuple[float, float]], list[Measured]]:
    """Seconds of a block on one GPU by mask, and the rows of all, from results of one GPU and several.

    Args:
      results: What `benchmarks/results/context-nvidia-h200-x2.json` holds.
    """
    blocks, rows = {}, []
    count = len(results["devices"])
    for found in results["cases"]:
        batch, heads, kv_heads, length, size = found["shape"]
        name = GROUPED if kv_heads < heads else found["case"]
        # That of grouped heads has a length of its own.
        sizes = Sizes(lengths=(length,))
        mask = case("causal" if name == GROUPED else name, length, batch, heads, sizes).mask
        visited = batch * heads * mask.nq * mask.nk * float(mask.density)
        forward, both = (1e-3 * found["one"][f"{key}_ms"] for key in ("forward", "both"))
        blocks[name] = forward / visited, (both - forward) / visited
        plan = context.plan(mask, count, exchange_cost=exchange_cost(heads, kv_heads))
        for order, of_order in (("contiguous", mask), ("plan", plan.mask)):
            loads = Loads.of(of_order, count, batch, heads, kv_heads, size)
            forward, both = (1e-3 * found[order][f"{key}_ms"] for key in ("forward", "both"))
            rows.append(Measured(name, order, loads, (forward, both)))
    return blocks, rows


def measured_again(results: Mapping[str, Any]) -> list[Measured]:
    """Rows of attention over the sequence, from results of `benchmarks/scaling.py` on as many devices."""
    rows = []
    for found in results["rows"]:
        if found["part"] != "attention" or found["split"] != "sequence" or "both_ms" not in found:
            continue
        batch, heads, kv_heads, length, size = found["shape"]
        mask = case(found["mask"], length, batch, heads, Sizes(lengths=(length,))).mask
        if found["order"] == "plan":
            mask = context.plan(mask, found["devices"], exchange_cost=exchange_cost(heads, kv_heads)).mask
        loads = Loads.of(mask, found["devices"], batch, heads, kv_heads, size)
        seconds = 1e-3 * found["forward_ms"], 1e-3 * found["both_ms"]
        rows.append(Measured(found["mask"], found["order"], loads, seconds))
    return rows


def fit(blocks: Mapping[str, tuple[float, float]], rows: Sequence[Measured], copy_rate: float) -> TimeModel:
    """The rate of bytes and the constants with the least squares of relative errors, of both passes apart."""
    best, least = None, np.inf
    for rate in RATES:
        free = TimeModel(blocks, float(rate), (0.0, 0.0), copy_rate)
        found = np.array([free.seconds(row.name, row.loads) for row in rows])
        want = np.array([row.seconds for row in rows])
        found[:, 1] -= found[:, 0]
        want[:, 1] -= want[:, 0]
        weights = 1 / want**2
        constants = np.maximum(0, ((want - found) * weights).sum(0) / weights.sum(0))
        error = float((((found + constants - want) / want) ** 2).sum())
        if error < least:
            best, least = dataclasses.replace(free, constants=tuple(constants.tolist())), error
    assert best is not None
    return best


def errors(
    blocks: Mapping[str, tuple[float, float]],
    rows: Sequence[Measured],
    copy_rate: float,
    again: Sequence[Measured] = (),
) -> dict[str, Any]:
    """Relative errors of the fitted model, and of each mask's rows where the others alone were fitted.

    Args:
      blocks: Seconds of a block, by mask.
      rows: What the model is fitted to.
      copy_rate: Bytes per second that a copy reads and writes.
      again: Rows of another run, to which it is not fitted.
    """
    model = fit(blocks, rows, copy_rate)
    others = {
        name: fit(blocks, [row for row in rows if row.name != name], copy_rate) for name in {row.name for row in rows}
    }

    def error(model: TimeModel, row: Measured) -> list[float]:
        pairs = zip(model.seconds(row.name, row.loads), row.seconds, strict=True)
        return [predicted / seconds - 1 for predicted, seconds in pairs]

    def record(row: Measured) -> dict[str, Any]:
        return {
            "mask": row.name,
            "order": row.order,
            "measured_ms": [1e3 * x for x in row.seconds],
            "predicted_ms": [1e3 * x for x in model.seconds(row.name, row.loads)],
            "errors": error(model, row),
        }

    def summary(errors: Sequence[list[float]]) -> dict[str, float]:
        return {"median": float(np.median(np.abs(errors))), "largest": float(np.abs(errors).max())}

    records = [record(row) | {"errors_left_out": error(others[row.name], row)} for row in rows]
    found: dict[str, Any] = {"rows": records}
    found |= {key: summary([one[key] for one in records]) for key in ("errors", "errors_left_out")}
    if again:
        found["again"] = [record(row) for row in again]
        found["errors_again"] = summary([one["errors"] for one in found["again"]])
    return found


def simulate(
    model: TimeModel, lengths: Sequence[int], counts: Sequence[int], sizes: Sizes, heads: int, masks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows of shards that nobody has: of each mask in the better balanced order, what the busiest has and the time."""
    for length in lengths:
        for name in masks:
            one = case(name, length, 1, heads, sizes)
            visited = heads * one.mask.nq * one.mask.nk * float(one.mask.density)
            alone = [visited * sum(model.block_seconds[name][: i + 1]) for i in range(2)]
            for count in counts:
                if length % (count * one.mask.block_q):
                    continue
                plan = context.plan(one.mask, count, exchange_cost=exchange_cost(heads, heads))
                described = {
                    order: context.describe(mask, count, kv_heads=heads, head_dim=sizes.head_dim)
                    for order, mask in (("contiguous", one.mask), ("plan", plan.mask))
                }
                order = min(described, key=lambda order: described[order].balance)
                mask = plan.mask if order == "plan" else one.mask
                loads = Loads.of(mask, count, 1, heads, heads, sizes.head_dim)
                times = model.seconds(name, loads)
                yield {
                    "mask": name,
                    "length": length,
                    "shards": count,
                    "order": order,
                    "balance": described[order].balance,
                    "busiest_blocks": int(described[order].work.max()) * heads,
                    "received_bytes": int(described[order].received.max()),
                    "gathered": described[order].gathered,
                    "steps": loads.steps,
                    **{
                        f"{key}_{what}": value
                        for key, seconds, of_one in zip(("forward", "both"), times, alone, strict=True)
                        for what, value in (("ms", 1e3 * seconds), ("efficiency", of_one / count / seconds))
                    },
                }


def table(
    results: Mapping[str, Any],
    copy_rate: float,
    lengths: Sequence[int] = (131072, 1 << 20),
    counts: Sequence[int] = (2, 4, 8, 64, 512),
    heads: int = 16,
    masks: Sequence[str] = DEFAULT_MASKS,
    again: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The constants, the model's errors on what was measured, and the simulated rows.

    Args:
      results: What `benchmarks/results/context-nvidia-h200-x2.json` holds; the model is fitted to it.
      copy_rate: Bytes per second that a copy reads and writes.
      lengths: Lengths of a sequence.
      counts: Numbers of shards.
      heads: Number of heads.
      masks: Names of the masks.
      again: Results of `benchmarks/scaling.py` on as many devices; the fitted model is compared with them.
    """
    blocks, rows = measured(results)
    sizes, model = Sizes(), fit(blocks, rows, copy_rate)
    return {
        "benchmark": "simulated scaling",
        "shape": [1, heads, heads, sizes.head_dim],
        "fitted_to": {"devices": results["devices"], "rows": len(rows)},
        "constants": {
            "block_nanoseconds": {name: [1e9 * x for x in found] for name, found in model.block_seconds.items()},
            "bytes_per_second": model.bytes_per_second,
            "pass_ms": [1e3 * x for x in model.constants],
            "copy_bytes_per_second": copy_rate,
            "step_us": 1e6 * STEP_SECONDS,
            "multiprocessors": MULTIPROCESSORS,
        },
        "model": errors(blocks, rows, copy_rate, measured_again(again) if again else ()),
        "rows": list(simulate(model, lengths, counts, sizes, heads, masks)),
    }
