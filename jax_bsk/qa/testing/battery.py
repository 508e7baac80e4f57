"""One case through one implementation, judged against the oracle: the battery that every implementation passes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_bsk.attention import dropout
from jax_bsk.biases import DenseBias, RelativeBias, TileBias
from jax_bsk.biases.terms import Terms
from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.testing import grid, tolerance
from jax_bsk.qa.testing.cases import Case, Inputs, make_inputs
from jax_bsk.qa.testing.judgement import Judgement
from jax_bsk.qa.testing.judgement import Mismatch as Mismatch
from jax_bsk.qa.testing.oracle import attention_oracle

# (query, key, value, block_mask, *, bias, lengths, sinks, gates, scale, soft_cap) -> out [B, T, N, Hv], lse [B, N, T]
AttentionFn = Callable[..., tuple[Any, Any]]
# Of the operands and their gradients. Those of a bias know the output, which was rounded to the operands' type.
_NAMES = ("dq", "dk", "dv", "dbias", "dsinks", "dgates", "ddistances", "dtiles")


def judge_case(
    case: Case,
    attention_fn: AttentionFn,
    *,
    gradients: bool = True,
    traced_mask: bool = False,
    multiprocessors: int | None = None,
) -> Judgement:
    """Runs ``case`` through ``attention_fn`` under ``jit`` and judges out, lse and the gradients.

    Args:
        case: what to run.
        attention_fn: arguments and results as ``sparse_attention_xla``; ``from_public`` makes one of the public call.
        gradients: whether to judge gradients too (of query, key, value, sinks and gates, for cotangents of out and
            lse).
        traced_mask: whether the mask is an argument of the jitted function instead of a constant in it; its lists and
            tiles then have room for every block, as traced ones do, and cases that differ in data alone share programs.
        multiprocessors: on CUDA, judge the same call once more on so many multiprocessors (`grid.limited`); what is
            wrong there is a problem of the judgement.
    """
    with jax.enable_x64(case.dtype == "float64"):
        return _judge(case, attention_fn, gradients, traced_mask, multiprocessors)


def _judge(
    case: Case, attention_fn: AttentionFn, gradients: bool, traced_mask: bool, multiprocessors: int | None
) -> Judgement:
    inputs = make_inputs(case)
    pairs = inputs.pairs
    factors = None if inputs.rng is None else _dropout_factors(inputs)
    if traced_mask:
        inputs = with_room(inputs)
    extra: dict[str, Any] = {"lengths": inputs.lengths, "scale": inputs.scale, "soft_cap": inputs.soft_cap}
    oracle = attention_oracle(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.dense,
        bias=inputs.bias,
        sinks=inputs.sinks,
        gates=inputs.gates,
        entries=pairs.gates,
        distances=inputs.distances,
        tiles=inputs.tiles,
        tile_numbers=pairs.tiles,
        factors=factors,
        **extra,
        **_cotangents(inputs) if gradients else {},
    )
    reference = _runner(_dense, inputs, (inputs.dense, pairs, factors), extra, gradients, traced_mask=True)()
    run = _runner(attention_fn, inputs, (inputs.mask, inputs.numbers), extra, gradients, traced_mask=traced_mask)
    expected_dtypes = {"out": case.dtype, "lse": "float64" if case.dtype == "float64" else "float32"}

    def compare(candidate: dict[str, np.ndarray]) -> tuple[list[tolerance.Comparison], list[str]]:
        comparisons, problems = [], []
        for name, expected in oracle.values.items():
            if name in expected_dtypes and candidate[name].dtype != jnp.dtype(expected_dtypes[name]):
                problems.append(f"{name} is {candidate[name].dtype}, expected {expected_dtypes[name]}")
            comparisons.append(
                tolerance.compare(
                    name,
                    candidate[name],
                    expected,
                    reference[name],
                    oracle.magnitudes[name],
                    dtype=expected_dtypes["lse"] if name in ("lse", "dgates") else case.dtype,
                    gradient=name not in expected_dtypes,
                    reach=oracle.reach[name],
                )
            )
        return comparisons, problems

    comparisons, problems = compare(run())
    if multiprocessors is not None:
        with grid.limited(multiprocessors):
            again = run()
        # Not bit-equal to the first: which kernel is best depends on the multiprocessors.
        limited, more = compare(again)
        wrong = [str(comparison) for comparison in limited if not comparison.ok] + more
        problems += [f"on {multiprocessors} multiprocessors: {text}" for text in wrong]
    return Judgement(case, tuple(comparisons), tuple(problems))


def run_case(case: Case, attention_fn: AttentionFn, *, command: str = "", **options: Any) -> str:
    """The report of `judge_case`, whose options it takes; `command` is appended to the repro line.

    Raises:
        Mismatch: a result is outside the tolerance rule.
    """
    return judge_case(case, attention_fn, **options).report(command)


def from_public(implementation: str | None) -> AttentionFn:
    """The public ``sparse_attention`` with the arguments and results that ``run_case`` calls for."""
    from jax_bsk import sparse_attention  # not at the top: the kit can judge an implementation without the rest

    def attention(query, key, value, mask, *, bias, lengths, sinks, gates, scale, soft_cap, **dropout):
        batch = query.shape[0]
        q_lengths, kv_lengths = (None, None) if lengths is None else jnp.broadcast_to(lengths, (batch, 2)).T
        out, lse = sparse_attention(
            query,
            key,
            value,
            _public_bias(bias, query.shape[1]),
            mask,
            scale=scale,
            query_seq_lengths=q_lengths,
            key_value_seq_lengths=kv_lengths,
            logits_soft_cap=soft_cap,
            sinks=sinks,
            gates=gates,
            implementation=cast(Implementation | None, implementation),
            return_residual=True,
            **dropout,
        )
        return out, jnp.swapaxes(lse, 1, 2)

    return attention


def with_sharded_sequence(attention_fn: AttentionFn, shards: int) -> AttentionFn:
    """The same of a query, key and value whose sequences are sharded over `shards` devices, as is the output."""
    mesh = jax.make_mesh((shards,), ("sequence",), devices=jax.devices()[:shards], axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "sequence"))

    def sharded(x: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, sharding)

    def attention(query, key, value, mask, **options):
        out, lse = attention_fn(sharded(query), sharded(key), sharded(value), mask, **options)
        return sharded(out), lse

    return attention


def _dense(query, key, value, mask, *, bias, dropout_rate=0, dropout_rng=None, **options):
    """`tolerance.dense_attention` with what the battery calls a mask: the dense one, and what each pair belongs to."""
    del dropout_rate, dropout_rng
    dense, pairs, factors = mask
    if isinstance(bias, Terms):
        bias = tolerance.bias_of_pairs(bias.dense, bias.distances, bias.tiles, pairs.tiles, dense.shape[2:])
    return tolerance.dense_attention(
        query, key, value, dense, bias=bias, entries=pairs.gates, factors=factors, **options
    )


@dataclasses.dataclass(frozen=True)
class _FromFirst:
    """Buckets of distances counted from the least one: a number per distance."""

    queries: int

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        return distances + self.queries - 1


def _public_bias(bias: Any, queries: int) -> Any:
    """What a user gives for terms."""
    if not isinstance(bias, Terms):
        return bias
    parts: list[Any] = [] if bias.dense is None else [DenseBias(bias.dense)]
    if bias.distances is not None:
        parts.append(RelativeBias(bias.distances[0].T, _FromFirst(queries)))
    if bias.tiles is not None:
        parts.append(TileBias(bias.tiles, bias.numbers))
    return functools.reduce(lambda a, b: a + b, parts)


def _dropout_factors(inputs: Inputs) -> np.ndarray:
    """The factor of each pair's probability, float64 [B, N, T, S]."""
    batch, q_len, heads = inputs.query.shape[:3]
    keys = dropout.keys_of_heads(_rng(inputs.rng), batch, heads)
    kept = dropout.dense_factors(keys, q_len, inputs.key.shape[1], inputs.dropout) != 0
    return np.where(kept, dropout.DROPPED_OF / (dropout.DROPPED_OF - inputs.dropout), 0)


def _rng(numbers: Any) -> Any:
    return jax.random.wrap_key_data(jnp.asarray(numbers))


def _cotangents(inputs: Inputs) -> dict[str, Any]:
    return {"dout": inputs.dout, "dlse": inputs.dlse}


def _runner(
    attention_fn: AttentionFn, inputs: Inputs, mask: Any, extra: dict[str, Any], gradients: bool, *, traced_mask: bool
) -> Callable[[], dict[str, np.ndarray]]:
    """A jitted call that gives named results: out, lse and gradients."""
    present = {name: x for name, x in zip(_NAMES, inputs.operands, strict=True) if x is not None}
    options = attention_fn, extra["scale"], extra["soft_cap"], gradients, inputs.dropout
    arguments = inputs.lengths, inputs.dout, inputs.dlse, inputs.rng
    if traced_mask:
        jitted, operands = _jitted_call(*options), (present, jax.tree.map(jnp.asarray, mask), *arguments)
    else:
        call = _call(*options)
        jitted = jax.jit(lambda present, *arguments: call(present, mask, *arguments))
        operands = present, *arguments
    return lambda: {name: np.asarray(x) for name, x in jitted(*operands).items()}


@functools.lru_cache(maxsize=8)
def _jitted_call(*options: Any) -> Callable[..., Any]:
    """Kept, so that its compiled programs are."""
    return jax.jit(_call(*options))


def _call(
    attention_fn: AttentionFn, scale: float, soft_cap: float | None, gradients: bool, threshold: int
) -> Callable[..., Any]:
    """(operands, mask, lengths, dout, dlse, rng) -> named results."""

    def forward(present, mask, lengths, rng):
        query, key, value, bias, sinks, gates, distances, tiles = (present.get(name) for name in _NAMES)
        numbers = None
        if attention_fn is not _dense:
            mask, numbers = mask
        if distances is not None or tiles is not None:
            bias = Terms(bias, distances, tiles, numbers)
        options = {} if not threshold else {"dropout_rate": threshold / dropout.DROPPED_OF, "dropout_rng": _rng(rng)}
        return attention_fn(
            query,
            key,
            value,
            mask,
            bias=bias,
            lengths=lengths,
            sinks=sinks,
            gates=gates,
            scale=scale,
            soft_cap=soft_cap,
            **options,
        )

    def call(present, mask, lengths, dout, dlse, rng):
        if not gradients:
            out, lse = forward(present, mask, lengths, rng)
            return {"out": out, "lse": lse}
        (out, lse), pullback = jax.vjp(lambda present: forward(present, mask, lengths, rng), present)
        # lse is the constant -inf for a row without keys: no cotangent belongs to it.
        (grads,) = pullback((dout, jnp.where(jnp.isneginf(lse), 0, dlse)))
        return {"out": out, "lse": lse} | grads

    return call


def with_room(inputs: Inputs) -> Inputs:
    """The same lists, with the key-major ones, in arrays with room for every block of every head, and a tile for each.

    Behind the last gate comes NaN: what is there means nothing.
    """
    mask = inputs.mask.transpose()
    lead = mask.row_offsets.shape[:-1]
    blocks = -(-mask.q_len // mask.block_q) * -(-mask.kv_len // mask.block_kv)

    def padded(x: Any, axis: int, size: int, fill: float) -> np.ndarray:
        x = np.asarray(x)
        widths = [(0, size - n if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)]
        return np.pad(x, widths, constant_values=fill)

    lists = ("kv_blocks", "tiles", "q_blocks", "col_tiles")
    longer = {name: padded(getattr(mask, name), -1, blocks, -1) for name in lists}
    tiles = padded(mask.bit_tiles, 2, math.prod(lead) * blocks, 0)
    gates = None if inputs.gates is None else padded(inputs.gates, -1, blocks, np.nan)
    numbers = None if inputs.numbers is None else padded(inputs.numbers, -1, blocks, -1)
    longer_mask = dataclasses.replace(mask, bit_tiles=tiles, **longer)
    return inputs._replace(mask=longer_mask, gates=gates, numbers=numbers)
