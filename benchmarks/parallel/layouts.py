"""How a problem is split over devices: data, heads, the sequence, and data x sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import BlockMask, context

from .cases import Case, Sizes

# `sequence` is in contiguous parts or in the order of a plan, whichever is better balanced; the last two name one.
SPLITS = ("sequence", "data", "heads", "data x sequence", "contiguous", "plan")
DEFAULT_SPLITS = SPLITS[:4]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to split [batch, tokens, heads, ..] arrays.

    Attributes:
      split: Name of the split.
      mask: The mask, of the tokens in the layout's order.
      mesh: Its devices.
      data, sequence, heads: Mesh axes of these dimensions, or None.
      plan: The order of the tokens; None where it is that of the sequence.
      described: What each device computes and receives; None where the sequence is not split.
    """

    split: str
    mask: BlockMask
    mesh: Mesh
    data: str | None = None
    sequence: str | None = None
    heads: str | None = None
    plan: context.Plan | None = None
    described: context.Description | None = None

    @property
    def shards(self) -> int:
        """Number of parts of the sequence."""
        return self.mesh.shape[self.sequence] if self.sequence else 1

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(self.data, self.sequence, self.heads))

    @property
    def of_tokens(self) -> NamedSharding:
        """Sharding of [batch, tokens] arrays."""
        return NamedSharding(self.mesh, P(self.data, self.sequence))

    def dispatch(self, x: Any) -> Any:
        return x if self.plan is None else self.plan.dispatch(x)

    def undispatch(self, x: Any) -> Any:
        return x if self.plan is None else self.plan.undispatch(x)

    def facts(self) -> dict[str, Any]:
        """Its part of a row."""
        found: dict[str, Any] = {"split": self.split, "mesh": dict(self.mesh.shape)}
        if self.described is not None:
            found["order"] = "contiguous" if self.plan is None else "plan"
            found["balance"] = self.described.balance
            found["predicted_bytes"] = int(self.described.received.max())
        return found


def layouts(
    case: Case, names: Sequence[str], devices: Sequence[Any], sizes: Sizes
) -> tuple[list[Layout], dict[str, str]]:
    """The layouts of some splits, and of the others why there is none."""
    found, refused = [], {}
    for name in names:
        reason = _refusal(case, name, len(devices))
        if reason:
            refused[name] = reason
        else:
            found.append(_layout(case, name, devices, sizes))
    return found, refused


def _refusal(case: Case, name: str, count: int) -> str:
    if name == "data" and case.batch % count:
        return f"{count} devices do not divide the batch of {case.batch}"
    if name == "heads" and case.kv_heads % count:
        return f"{count} devices do not divide the {case.kv_heads} key/value heads"
    if name == "data x sequence" and (count < 4 or count % 2 or case.batch % 2):
        return f"it needs an even number of devices, four at least, and an even batch; got {count} and {case.batch}"
    shards = count // 2 if name == "data x sequence" else count
    if name not in ("data", "heads") and case.length % (shards * case.mask.block_q):
        return f"{shards} devices do not divide {case.length} tokens into whole blocks"
    return ""


def _layout(case: Case, name: str, devices: Sequence[Any], sizes: Sizes) -> Layout:
    def mesh(**axes: int) -> Mesh:
        return jax.make_mesh(
            tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices
        )

    count = len(devices)
    if name == "data":
        return Layout(name, case.mask, mesh(data=count), data="data")
    if name == "heads":
        return Layout(name, case.mask, mesh(heads=count), heads="heads")
    if name == "data x sequence":
        plan, described = _order(case, count // 2, case.batch // 2, "sequence", sizes)
        axes = mesh(data=2, sequence=count // 2)
        return Layout(name, (plan or case).mask, axes, "data", "sequence", None, plan, described)
    plan, described = _order(case, count, case.batch, name, sizes)
    return Layout(name, (plan or case).mask, mesh(sequence=count), None, "sequence", None, plan, described)


def _order(
    case: Case, shards: int, batch: int, name: str, sizes: Sizes
) -> tuple[context.Plan | None, context.Description]:
    """The plan or None, as its name says or the better balanced one, and what it costs."""
    plan = context.plan(case.mask, shards, exchange_cost=exchange_cost(case.heads, case.kv_heads))
    both = [
        context.describe(
            mask, shards, kv_heads=case.kv_heads, head_dim=sizes.head_dim, batch=batch, dtype=jnp.dtype(sizes.dtype)
        )
        for mask in (case.mask, plan.mask)
    ]
    planned = name == "plan" or (name == "sequence" and both[1].balance < both[0].balance)
    return (plan, both[1]) if planned else (None, both[0])


def exchange_cost(heads: int, kv_heads: int) -> float:
    """Of `context.plan`, on H200s at head size 128."""
    return 16 * kv_heads / heads
