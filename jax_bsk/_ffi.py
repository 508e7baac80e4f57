"""Native libraries: loading, version checks, registration, and the typed wrappers of their custom calls.

On the path of a call this is the last Python module before `csrc/`, and the only one that knows the names of targets
and attributes and the order of operands (in C++ `registrations.h` and each operation's `buffers.h` do).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.export
import numpy as np

from jax_bsk import _compat
from jax_bsk._version import __version__

ATTENTION_FORWARD = "jax_bsk_attention_forward"
ATTENTION_BACKWARD = "jax_bsk_attention_backward"
LISTS_CHOOSE = "jax_bsk_lists_choose"
LISTS_TRANSPOSE = "jax_bsk_lists_transpose"
MATMUL_PRODUCT = "jax_bsk_matmul_product"
MATMUL_SAMPLED = "jax_bsk_matmul_sampled"
TARGETS = (ATTENTION_FORWARD, ATTENTION_BACKWARD, LISTS_CHOOSE, LISTS_TRANSPOSE, MATMUL_PRODUCT, MATMUL_SAMPLED)

_PLATFORM_NAMES = {"cpu": "cpu", "cuda": "CUDA"}  # as jax.ffi.register_ffi_target spells them


@dataclasses.dataclass(frozen=True)
class Library:
    """One native library: what it says of itself, or why it cannot be used (with the remedy)."""

    platform: str
    info: Mapping[str, Any]
    problem: str | None

    @property
    def usable(self) -> bool:
        return self.problem is None


@functools.cache
def library(platform: str) -> Library:
    """The native library of `platform` ("cpu" or "cuda"), loaded, checked and registered with XLA on first need."""
    name = f"jax_bsk._{platform}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return Library(platform, {}, _missing(platform))
    except ImportError as error:
        return Library(platform, {}, f"{name} does not load ({error}); build it again with `make build`.")
    info, handlers = module.build_info(), module.registrations()
    problem = _mismatch(name, info, set(handlers))
    if problem is None:
        for target, handler in handlers.items():
            jax.ffi.register_ffi_target(target, handler, platform=_PLATFORM_NAMES[platform])
    return Library(platform, info, problem)


def limits(platform: str) -> Mapping[str, Any]:
    """What a platform's kernels can take, also where its library was not built; empty where no library says."""
    own = library(platform)
    if own.usable:
        return own.info
    every, prefix = library("cpu"), f"{platform}_"
    facts = every.info if every.usable else {}
    return {name.removeprefix(prefix): fact for name, fact in facts.items() if name.startswith(prefix)}


def register() -> None:
    """Registers every usable library, so that executables loaded from a cache find their targets."""
    for platform in _PLATFORM_NAMES:
        library(platform)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to let a program with this package's custom calls pass.

    The program runs wherever a jax_bsk of the same version is imported.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]


def _missing(platform: str) -> str:
    package = Path(__file__).parent
    in_source_tree = (package.parent / "csrc").is_dir()
    if platform == "cuda":
        remedy = "install the CUDA toolkit's nvcc (or the PyPI wheels named in the README) and build again with"
        return f"this jax_bsk was built without its CUDA library; {remedy} " + (
            "`make build`." if in_source_tree else "`pip install --force-reinstall --no-cache-dir jax_bsk`."
        )
    if in_source_tree:
        return (
            "jax_bsk was imported from its source tree, which holds no built library: run `make build` there and use "
            "the `.venv` it makes, or start Python in another directory if jax_bsk is installed."
        )
    return "the installed jax_bsk holds no CPU library; reinstall it from source."


def _mismatch(name: str, info: Mapping[str, Any], targets: set[str]) -> str | None:
    """Why a loaded library must not be registered: XLA kills the whole backend when the FFI versions do not fit."""
    if info["version"] != __version__:
        return f"{name} is version {info['version']} but the Python code is {__version__}; run `make build`."
    if targets != set(TARGETS):
        return f"{name} has the calls {sorted(targets)} but the Python code {sorted(TARGETS)}; run `make build`."
    built, runtime = tuple(info["ffi_api"]), _compat.runtime_ffi_api()
    if runtime is not None and (built[0] != runtime[0] or built[1] > runtime[1]):
        return (
            f"{name} was built against XLA FFI API {built[0]}.{built[1]}, the installed jaxlib has "
            f"{runtime[0]}.{runtime[1]}; install a newer jaxlib (0.10.2 or later) or build jax_bsk against this one."
        )
    return None


@dataclasses.dataclass(frozen=True)
class AttentionAttributes:
    """Static numbers of the attention calls.

    Attributes:
      block_q: Queries a block.
      block_kv: Keys a block.
      scale: Factor of the logits. It and the cap travel in float64, of which float64 inputs make use.
      soft_cap: Soft cap of the logits; 0 is none.
    """

    block_q: int
    block_kv: int
    scale: float
    soft_cap: float

    def encode(self) -> dict[str, Any]:
        # The version makes a cached executable of an older library miss.
        return {
            "block_q": np.int64(self.block_q),
            "block_kv": np.int64(self.block_kv),
            "scale": np.float64(self.scale),
            "soft_cap": np.float64(self.soft_cap),
            "version": __version__,
        }


_FORWARD_OPERANDS, _BACKWARD_OPERANDS = 10, 17  # with gates
NO_GATES = (1, 1, 0)  # shape of what stands in their place where there are none
NO_SINKS = (1, 0)  # likewise


def attention_forward(ctx, operands: Sequence[Any], attributes: AttentionAttributes, platform: str):
    """Lowers to the forward call.

    Operands: query, key, value, row_offsets, kv_blocks, tiles, bit_tiles, lengths, sinks (or an array of shape
    `NO_SINKS`) and, if there are any, gates. Results: out, lse, lse_rest; on CUDA also a workspace, which XLA allocates
    with the program's other buffers and nobody reads.
    """
    results = list(ctx.avals_out)
    stats = results[1].dtype
    if platform == "cuda":
        results.append(jax.core.ShapedArray((_forward_workspace(ctx.avals_in[0].shape),), np.dtype(np.int32)))
    lower_ctx, operands = _without_gates(ctx, operands, _FORWARD_OPERANDS - len(operands), stats)
    lower = jax.ffi.ffi_lowering(ATTENTION_FORWARD)
    return lower(lower_ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]


def _without_gates(ctx, operands: Sequence[Any], missing: int, stats: np.dtype):
    """Appends the operands that tell the call of no gates."""
    none = np.zeros(NO_GATES, stats)
    avals = [*ctx.avals_in, *[jax.core.ShapedArray(none.shape, stats)] * missing]
    return ctx.replace(avals_in=avals), [*operands, *(_compat.mlir.ir_constant(none) for _ in range(missing))]


def _forward_workspace(query_shape: Sequence[int]) -> int:
    """Words of `cuda::ForwardWorkspace` in `csrc/attention/launch.cu`, which the handler checks."""
    *lead, length, heads, _ = query_shape
    return 1 + math.prod(lead) * heads * -(-length // 64)


def attention_backward(ctx, operands: Sequence[Any], attributes: AttentionAttributes, platform: str):
    """Lowers to the backward call.

    Operands: dout, query, key, value, lse, lse_rest, delta, row_offsets, kv_blocks, tiles, col_offsets, q_blocks,
    col_tiles, bit_tiles, lengths and, if there are any, row_gates and col_gates. Results: dquery, dkey, dvalue and,
    with gates, dgates in the order of col_gates; on CUDA also a workspace, as for the forward.
    """
    results = list(ctx.avals_out)
    stats, missing = ctx.avals_in[4].dtype, _BACKWARD_OPERANDS - len(operands)
    if missing:
        results.append(jax.core.ShapedArray(NO_GATES, stats))
    if platform == "cuda":
        query, key, ids = (ctx.avals_in[i].shape for i in (1, 2, 8))
        size = _backward_workspace(query, key, ids, (attributes.block_q, attributes.block_kv), results[3].shape)
        results.append(jax.core.ShapedArray((size,), np.dtype(np.uint8)))
    lower_ctx, operands = _without_gates(ctx, operands, missing, stats)
    lower = jax.ffi.ffi_lowering(ATTENTION_BACKWARD)
    return lower(lower_ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]


def _backward_workspace(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    ids_shape: Sequence[int],
    block_size: tuple[int, int],
    gates_shape: Sequence[int] = NO_GATES,
) -> int:
    """Bytes for the CUDA backward: what `BackwardLayout` in `csrc/attention/sm90/bwd_plan.h` needs, and more for speed.

    The kernels keep dS (the gradient of the logits, in query's type) of three key/value heads' visited blocks or more;
    they are as fast as they can be with as many heads in each third as `BackwardLayout` calls enough. More than twice
    what dQ takes in float32, or 2 GiB, is spent on that only where three heads need it. So the workspace grows as the
    inputs and the visited blocks do. With gates come four partial sums of each 64 x 64 pairs of each visited block.
    """
    *lead, q_len, heads, head_dim = query_shape
    kv_len, kv_heads = key_shape[-3:-1]
    query_rows, kv_rows = math.prod(lead) * heads, math.prod(lead) * kv_heads
    q_tiles, kv_tiles = -(-q_len // 64), -(-kv_len // 64)
    words = 1 + 2 * kv_rows + 3 * kv_rows * kv_tiles + query_rows * q_tiles * 193 + 2 * math.prod(ids_shape) + 33
    words += 4 * math.prod(gates_shape) * math.prod(-(-size // 64) for size in block_size)
    head_bytes = 2 * math.prod(block_size) * ids_shape[-1] * (heads // max(kv_heads, 1))
    enough = max(-(-1056 // max(-(-kv_len // 128), 1)), -(-264 * -(-q_len // block_size[0]) // max(ids_shape[-1], 1)))
    wanted = min(kv_rows, 3 * enough, max(3, max(8 * query_rows * q_len * head_dim, 2 << 30) // max(head_bytes, 1)))
    return 4 * words + 1024 + wanted * max(head_bytes, 1)


def takes_transpose(platform: str, rows: int, columns: int) -> bool:
    """Whether the platform's library transposes lists of this size: on CUDA a table's counters are in shared memory."""
    native = library(platform)
    return native.usable and rows + 4 * columns + 3 <= native.info.get("lists_max_words", math.inf)


def lists_transpose(ctx, operands: Sequence[Any], columns: int):
    """Lowers to the transpose of block lists.

    Operands: row_offsets, kv_blocks, tiles. Results: col_offsets, q_blocks, col_tiles, entries, places.
    """
    return jax.ffi.ffi_lowering(LISTS_TRANSPOSE)(ctx, *operands, columns=np.int64(columns), version=__version__)


def takes_choose(platform: str, dtype: np.dtype, units: int) -> bool:
    """Whether the platform's library chooses by such scores: on CUDA a row's keys or its list are in shared memory."""
    native = library(platform)
    return native.usable and dtype == np.float32 and units <= native.info.get("lists_max_units", math.inf)


@dataclasses.dataclass(frozen=True)
class ChooseAttributes:
    """Static numbers of a choice of key blocks.

    Attributes:
      k: Units a row, and where more are required, these.
      width: Units that no row exceeds.
      unit: Key blocks of a unit.
    """

    k: int
    width: int
    unit: int

    def encode(self) -> dict[str, Any]:
        return {
            "k": np.int64(self.k),
            "width": np.int64(self.width),
            "unit": np.int64(self.unit),
            "version": __version__,
        }


def lists_choose(ctx, operands: Sequence[Any], attributes: ChooseAttributes, platform: str):
    """Lowers to the choice of key blocks by scores.

    Operands: scores, states, outline. Results: row_offsets, kv_blocks, tiles; on CUDA also a workspace, as for
    attention.
    """
    results = list(ctx.avals_out)
    if platform == "cuda":
        words = _choose_workspace(ctx.avals_in[0].shape, ctx.avals_in[2].shape[1], attributes)
        results.append(jax.core.ShapedArray((words,), np.dtype(np.int32)))
    lower = jax.ffi.ffi_lowering(LISTS_CHOOSE)
    return lower(ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]


def _choose_workspace(scores_shape: Sequence[int], blocks: int, attributes: ChooseAttributes) -> int:
    """Words of `cuda::ChooseWorkspace` in `csrc/lists/choose.cu`, which the handler checks."""
    return 2 * math.prod(scores_shape[:-1]) * (1 + min(attributes.width * attributes.unit, blocks))


@dataclasses.dataclass(frozen=True)
class ProductAttributes:
    """Static numbers of a product with a sparse matrix.

    Attributes:
      rows: Rows of the sparse matrix, M.
      columns: Columns of it, K.
      transposed: Whether the product is with its transpose.
      dense_left: Whether the dense factor lies as [N, contracted] and the result as [N, out], not the other way round.
      out_dtype: Name of the result's type: the factors' or float32.
    """

    rows: int
    columns: int
    transposed: bool
    dense_left: bool
    out_dtype: str

    def encode(self) -> dict[str, Any]:
        return {
            "rows": np.int64(self.rows),
            "columns": np.int64(self.columns),
            "transposed": np.bool_(self.transposed),
            "dense_left": np.bool_(self.dense_left),
            "version": __version__,
        }


@dataclasses.dataclass(frozen=True)
class SampledAttributes:
    """Static numbers of a product at the blocks of a pattern.

    Attributes:
      left_transposed: Whether the left factor lies as [L, M] and not [M, L].
      right_transposed: Whether the right one lies as [K, L] and not [L, K].
      block_size: (bm, bk).
      out_dtype: Name of the blocks' type: the factors' or float32.
    """

    left_transposed: bool
    right_transposed: bool
    block_size: tuple[int, int]
    out_dtype: str

    def encode(self) -> dict[str, Any]:
        return {
            "left_transposed": np.bool_(self.left_transposed),
            "right_transposed": np.bool_(self.right_transposed),
            "version": __version__,
        }


def matmul_product(ctx, operands: Sequence[Any], attributes: ProductAttributes, platform: str):
    """Lowers to the product call.

    Operands: data, offsets, ids, places, dense. Results: out; on CUDA also a workspace, as for attention.
    """
    offsets = ctx.avals_in[1]
    words = 1 + math.prod(offsets.shape[:-1]) * (offsets.shape[-1] - 1)  # csrc/matmul/launch.cu: ProductWorkspace
    return _lower_matmul(MATMUL_PRODUCT, ctx, operands, attributes, platform, words)


def matmul_sampled(ctx, operands: Sequence[Any], attributes: SampledAttributes, platform: str):
    """Lowers to the sampled product's call.

    Operands: left, right, row_ids, column_ids. Results: blocks; on CUDA also a workspace.
    """
    *lead, entries = ctx.avals_in[2].shape
    words = math.prod(lead) * (1 + 2 * entries)  # csrc/matmul/launch.cu: SampledWorkspace
    return _lower_matmul(MATMUL_SAMPLED, ctx, operands, attributes, platform, words)


def _lower_matmul(target, ctx, operands, attributes, platform, words):
    results = list(ctx.avals_out)
    if platform == "cuda":
        results.append(jax.core.ShapedArray((words,), np.dtype(np.int32)))
    lower = jax.ffi.ffi_lowering(target)
    return lower(ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]
