"""One case through one implementation, judged against float64: the battery that every implementation passes.

The program runs three times: again with the same arrays, which must give the same bits (on CUDA also where it may use
a few multiprocessors only), and with the sequences in the
reverse order, which must give each token the same bits, too (batch invariance).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import decode
from jax_bsk.qa.testing import grid, tolerance
from jax_bsk.qa.testing.decode.cases import Case, Inputs, make_inputs
from jax_bsk.qa.testing.decode.oracle import oracle, poisoned
from jax_bsk.qa.testing.judgement import Judgement


def judge_case(case: Case, implementation: str, *, multiprocessors: int | None = None) -> Judgement:
    """Runs a case under `jit` and judges its results, and their bits when it runs again.

    Args:
      case: What to run.
      implementation: Of the public functions.
      multiprocessors: On CUDA, the second run is confined to so many (`grid.limited`).
    """
    inputs = poisoned(case, make_inputs(case))
    expected, reference = oracle(case, inputs)
    program = _program(case, implementation)
    first = _run(program, inputs)
    with contextlib.nullcontext() if multiprocessors is None else grid.limited(multiprocessors):
        again = _run(program, inputs)
    elsewhere = "" if multiprocessors is None else f" on {multiprocessors} multiprocessors"
    comparisons, problems = [], []
    if first["out"].dtype != jnp.dtype(case.dtype) or first["lse"].dtype != np.float32:
        problems.append(f"out is {first['out'].dtype} and lse {first['lse'].dtype}")
    for name, got in first.items():
        if got.tobytes() != again[name].tobytes():
            problems.append(f"{name} has other bits when it is computed again{elsewhere}")
        comparisons.append(
            tolerance.compare(
                name,
                got,
                expected.values[name],
                reference[name],
                expected.magnitudes[name],
                dtype=case.dtype if name == "out" else np.float32,
                gradient=False,
                reach=expected.reach[name],
            )
        )
    if case.fault is None and len(case.q_lens) > 1:
        turned, order = _reversed(case, inputs)
        other = _run(program, turned)
        for name, got in first.items():
            if got[:, order].tobytes() != other[name][:, : len(order)].tobytes():
                problems.append(f"{name} has other bits where the sequences stand in another order")
    return Judgement(case, tuple(comparisons), tuple(problems))


def run_case(case: Case, implementation: str, *, multiprocessors: int | None = None) -> str:
    """The report of `judge_case`.

    Raises:
      Mismatch: A result is outside the tolerance rule.
    """
    command = f"--implementation {implementation}"
    command += "" if multiprocessors is None else f" --multiprocessors {multiprocessors}"
    return judge_case(case, implementation, multiprocessors=multiprocessors).report(command)


def _run(program: Callable[..., Any], inputs: Inputs) -> dict[str, np.ndarray]:
    arrays = inputs._asdict()
    return {name: np.asarray(x) for name, x in zip(("out", "lse"), program(arrays), strict=True)}


def _reversed(case: Case, inputs: Inputs) -> tuple[Inputs, np.ndarray]:
    """The same sequences in the reverse order, and where each of the new tokens stood."""
    count, offsets = len(case.q_lens), np.cumsum([0, *case.q_lens])
    order = np.concatenate([np.arange(offsets[s], offsets[s + 1]) for s in reversed(range(count))])
    rows = np.concatenate([np.arange(count)[::-1], np.arange(count, case.seqs)])
    tokens = np.concatenate([order, np.arange(offsets[-1], case.tokens)])
    turned = inputs.cu_q_lens.copy()
    turned[:, : count + 1] = np.cumsum([0, *reversed(case.q_lens)])

    def turn(x: np.ndarray | None, by: np.ndarray) -> Any:
        return None if x is None else x[:, by]

    return inputs._replace(
        query=turn(inputs.query, tokens),
        kv_lens=turn(inputs.kv_lens, rows),
        page_indices=turn(inputs.page_indices, rows),
        cu_q_lens=turned,
        selection=turn(inputs.selection, rows),
        tree=turn(inputs.tree, tokens),
        key=_turned_cache(case, inputs.key),
        value=_turned_cache(case, inputs.value),
    ), order


def _turned_cache(case: Case, x: np.ndarray) -> np.ndarray:
    """Examples of a contiguous cache go with their sequences; pages stay where they are."""
    if not case.contiguous:
        return x
    split = x.reshape((case.groups, case.seqs, -1, *x.shape[2:]))
    return split[:, ::-1].reshape(x.shape)


def _program(case: Case, implementation: str) -> Callable[..., Any]:
    """Arrays of a case, with a leading dimension of groups, to out [G, T, N, Hv] and lse [G, T, N]."""
    options: dict[str, Any] = {
        "sink_tokens": case.sink_tokens,
        "soft_cap": case.soft_cap or None,
        "keys_per_part": case.part or None,
        "implementation": implementation,
    }

    def ragged(sinks: Any, arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        key, value = arrays["key"], arrays["value"]
        pages = jnp.stack([key, value], 3).reshape((*key.shape[:2], -1, key.shape[-1]))
        names = ("kv_lens", "page_indices", "cu_q_lens", "num_seqs")
        return decode.ragged_paged_attention(
            arrays["query"],
            pages,
            *(arrays[name] for name in names),
            sm_scale=case.scale,
            sliding_window=case.window or None,
            k_scale=None if case.k_scale == 1 else case.k_scale,
            v_scale=None if case.v_scale == 1 else case.v_scale,
            tree_mask=arrays["tree"],
            page_selection=arrays["selection"],
            shared_pages=case.max_pages if case.read_once else None,
            sinks=sinks,
            return_residual=True,
            **options,
        )

    def contiguous(arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        batch, length = case.seqs, case.max_pages * case.page_size
        arrays = arrays | {name: arrays[name][0] for name in ("query", "key", "value")}
        query = arrays["query"].reshape((batch, -1, *arrays["query"].shape[1:]))
        key, value = (arrays[n].reshape((batch, length, *arrays[n].shape[2:])) for n in ("key", "value"))
        tree = None if arrays["tree"] is None else arrays["tree"][0].reshape((*query.shape[:2], 64))
        out, lse = decode.attention(
            query,
            key,
            value,
            arrays["kv_lens"][0],
            is_causal=case.causal,
            scale=case.scale,
            window=case.window or None,
            sinks=arrays["sinks"],
            tree_mask=tree,
            key_blocks=None if arrays["selection"] is None else arrays["selection"][0],
            block_size=case.page_size,
            return_residual=True,
            **options,
        )
        return out.reshape((1, case.tokens, *out.shape[2:])), lse.reshape((1, case.tokens, -1))

    def call(arrays: dict[str, Any]) -> Any:
        if case.contiguous:
            return contiguous(arrays)
        arrays = dict(arrays)
        one = functools.partial(ragged, arrays.pop("sinks"))
        if case.groups == 1:
            return jax.tree.map(lambda x: x[None], one({n: None if x is None else x[0] for n, x in arrays.items()}))
        return jax.vmap(one)(arrays)

    return jax.jit(call)
