"""docs/reference: public names, commands and options all stand there, and what it says of messages and bits is so."""

from __future__ import annotations

import ast
import functools
import html
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_bsk
import jax_bsk.flax
from jax_bsk import (
    BSR,
    BlockMask,
    biases,
    context,
    decode,
    flops,
    masks,
    packed_attention,
    packing,
    pruning,
    sampled_matmul,
    selection,
    sparse_attention,
    sparse_matmul,
)
from jax_bsk.__main__ import COMMANDS
from jax_bsk.biases import AlibiBias, BlockBias, PositionBias, RelativeBias, TileBias
from jax_bsk.cli import bench
from jax_bsk.core import dispatch, library
from jax_bsk.flax._attention_fn import attend as flax_attend
from jax_bsk.masks import (
    ArrayMask,
    BigBirdMask,
    CausalMask,
    FullMask,
    FunctionMask,
    GlobalMask,
    LocalMask,
    MultiHeadMask,
    PackedMask,
    SegmentMask,
)
from jax_bsk.qa.benchmarking.matmul import cases as matmul_cases
from jax_bsk.qa.validation.settings import STAGES
from tests.test_pages import ROOT

FOLDER = ROOT / "docs" / "reference"
PAGES = {path.stem: path.read_text() for path in FOLDER.glob("*.md")}

# ---- public names ---------------------------------------------------------------------------------------------------


def public_names() -> set[str]:
    """What users import: the package's names, those of its modules, and the layers of each Flax library."""
    exported = {f"jax_bsk.{name}" for name, x in vars(jax_bsk).items() if name[0] != "_" and not hasattr(x, "__path__")}
    modules = {f"jax_bsk.{name}" for name in ("flops", "packing", "pruning")}
    exported -= {name for name in exported - modules if isinstance(getattr(jax_bsk, name[8:]), types.ModuleType)}
    exported |= {f"jax_bsk.masks.{name}" for name in masks.__all__}
    exported |= {f"jax_bsk.biases.{name}" for name in biases.__all__}
    exported |= {f"jax_bsk.context.{name}" for name in context.__all__}
    exported |= {f"jax_bsk.decode.{name}" for name in decode.__all__}
    exported |= {f"jax_bsk.selection.{name}" for name in selection.__all__}
    exported |= {f"jax_bsk.flops.{name}" for name in flops.__all__}
    exported |= {f"jax_bsk.packing.{name}" for name in packing.__all__}
    exported |= {f"jax_bsk.pruning.{name}" for name in functions_of(pruning)}
    exported |= {"jax_bsk.flax.attention_fn"}
    for module, base in ((jax_bsk.flax.nnx, nnx.Module), (jax_bsk.flax.linen, flax.linen.Module)):
        layers = {name for name, x in vars(module).items() if isinstance(x, type) and issubclass(x, base)}
        exported |= {f"{module.__name__}.{name}" for name in layers if name[0] != "_"}
    return exported


def functions_of(module: types.ModuleType) -> set[str]:
    own = (name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__)
    return {name for name in own if name[0] != "_"}


def documented() -> dict[str, list[str]]:
    """Identifiers of the pages, those of a module's members included, with their options."""
    found: dict[str, list[str]] = {}
    for text in PAGES.values():
        for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE):
            members = re.search(r"members: \[([^\]]*)\]", options)
            found[name] = [] if members is None else [member.strip() for member in members[1].split(",")]
            if isinstance(resolved(name), types.ModuleType):
                found |= {f"{name}.{member}": [] for member in found[name]}
    return found


def resolved(name: str) -> Any:
    return functools.reduce(getattr, name.split(".")[1:], jax_bsk)


# The name on the page of what users import by another one; the command line's page is the home of no object.
ALSO = {"jax_bsk.BlockMask": "jax_bsk.masks.BlockMask"}


def test_every_public_name_stands_on_a_page():
    names = {ALSO.get(name, name) for name in public_names()}
    assert names - documented().keys() == set()


def test_what_stands_on_a_page_is_there_and_described():
    for name, members in documented().items():
        found = resolved(name)
        described = [found, *(getattr(found, member, None) for member in members)]
        missing = [x for x in described if x is None or not (x.__doc__ or isinstance(x, tuple))]
        assert not missing, f"{name}: {missing}"


def test_docstrings_have_the_sections_that_the_site_renders():
    """ "Example:" would be shown as prose; directives of Sphinx as they are."""
    for path in (ROOT / "jax_bsk").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node) or ""
                wrong = re.search(r"^ *(Example|Arguments|Return|Raise):$|\.\. \w+::|:\w+:`", doc, re.MULTILINE)
                assert wrong is None, f"{path.name}: {wrong and wrong[0]}"


# ---- command line ---------------------------------------------------------------------------------------------------


def options_of(command: Any) -> set[str]:
    added: list[Any] = []

    class Subparsers:
        def add_parser(self, name: str, **options: Any) -> Any:
            import argparse

            added.append(argparse.ArgumentParser(prog=name))
            return added[-1]

    command.add_parser(Subparsers())
    (parser,) = added
    return {parser.prog, *(option for action in parser._actions for option in action.option_strings)} - {"-h", "--help"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__.rpartition(".")[2])
def test_commands_and_their_options_stand_on_the_page(command):
    options = options_of(command)
    (name,) = (option for option in options if option[0] != "-")
    sections = re.split(r"^## ", PAGES["command-line"], flags=re.MULTILINE)
    (section,) = (text for text in sections if text.startswith(f"{name}\n"))
    listed = set(re.findall(r"`(--[a-z-]+)", section))
    assert listed == options - {name}


def row_of(page: str, option: str) -> list[str]:
    (line,) = re.findall(rf"^\| `{option}[ `].*$", page, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_defaults_on_the_page_are_those_of_the_commands():
    sections = {s.partition("\n")[0]: s for s in re.split(r"^## ", PAGES["command-line"], flags=re.MULTILINE)}
    for field in ("lengths", "densities", "patterns", "dtype", "block_size", "window"):
        values = [getattr(defaults, field) for defaults in (bench.CPU, bench.CUDA)]
        shown = [" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
        assert row_of(sections["bench"], f"--{field.replace('_', '-')}")[1:3] == shown
    sizes = [f"{d.batch}, {d.heads}, {d.head_dim}" for d in (bench.CPU, bench.CUDA)]
    assert row_of(sections["bench"], "--batch")[1:3] == sizes
    for field in ("sizes", "sparsities", "blocks", "dtypes"):
        shown = [" ".join(map(str, getattr(grid, field))) for grid in (matmul_cases.CPU, matmul_cases.GPU)]
        assert row_of(sections["bench-matmul"], f"--{field}")[1:3] == shown
    for stage in STAGES.values():
        assert row_of(sections["validate"], stage.name)[1] == stage.title[0].lower() + stage.title[1:]


# ---- messages -------------------------------------------------------------------------------------------------------

X: Any = np.zeros((1, 64, 2, 16), np.float32)
ARRAY: Any = np.ones((4, 4), bool)
LAZY: Any = CausalMask()
BOUND = CausalMask().bind(64)
QUERIES, KEYS, VALUES = (np.zeros((2, n, 4, 16), np.float32) for n in (64, 96, 96))


def attend(q: Any = X, k: Any = X, v: Any = X, *args: Any, **options: Any) -> Any:
    return sparse_attention(q, k, v, *args, **options)


def in_shard_map(**options: Any) -> Any:
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))
    call = functools.partial(attend, axis_name="a", **options)
    return jax.shard_map(call, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)(X)


def with_traced(function: Callable[[Any], Any], value: Any) -> Callable[[], Any]:
    return lambda: jax.eval_shape(function, value)


def ids_out_of_range() -> None:
    mask = jax.jit(lambda ids: BlockMask.from_indices(ids, jnp.array([1]), q_len=64))(jnp.array([[7]]))
    mask.check()


def too_many_blocks() -> None:
    build = jax.jit(lambda a: BlockMask.from_dense(a, block_size=32, max_blocks=1))
    build(np.ones((64, 64), bool)).check()


def fallback() -> None:
    with mock.patch.object(dispatch, "_already_said", set()):
        attend(np.zeros((1, 64, 2, 300), np.float32), *[np.zeros((1, 64, 2, 300), np.float32)] * 2)


def no_device(*_: Any) -> None:
    raise RuntimeError("Unknown backend cuda")


CUDA_FACTS = dict(library.limits("cuda"))  # what a CUDA library would say of itself


def on_a_gpu(call: Callable[[], Any], capability: str | None) -> Callable[[], Any]:
    """A call as a machine with such a GPU (or none) and a CUDA library would check it."""

    def run() -> None:
        devices = no_device if capability is None else lambda *_: [types.SimpleNamespace(compute_capability=capability)]
        with (
            mock.patch.object(jax, "devices", devices),
            mock.patch.object(library, "load", lambda platform: library.Library(platform, CUDA_FACTS, None)),
        ):
            call()

    return run


def elsewhere() -> None:
    first, second = jax.devices()[:2]
    query, key = jax.device_put(X, first), jax.device_put(X, second)
    attend(query, key, query)


def assign() -> None:
    BSR.random(jax.random.key(0), (64, 64), density=0.5, block_size=32).data = 0


def weight() -> BSR:
    return BSR.random(jax.random.key(0), (64, 96), density=0.5, block_size=32)


def serve(**changes: Any) -> Any:
    args = {
        "q": X[0, :4],
        "kv_pages": X.reshape(4, 16, 2, 16),
        "kv_lens": np.array([4]),
        "page_indices": np.array([[0]]),
        "cu_q_lens": np.array([0, 4]),
        "num_seqs": np.array([1]),
    }
    return decode.ragged_paged_attention(**(args | changes))


def choose_pages(choose: Callable[..., Any] = selection.quest_pages, **changes: Any) -> Any:
    args = {
        "query": X[0, :4],
        "summaries": selection.summarize_pages(X.reshape(4, 16, 2, 16)),
        "kv_lens": np.array([4]),
        "page_indices": np.array([[0]]),
        "cu_q_lens": np.array([0, 4]),
        "num_seqs": np.array([1]),
        "count": 2,
    }
    return choose(**(args | changes))


def freed_twice() -> None:
    pool = decode.PagePool(4, 16)
    sequence = pool.allocate(20)
    pool.free(sequence)
    pool.free(sequence)


def message_of_mismatch(info: dict[str, Any]) -> Callable[[], Any]:
    def run() -> None:
        built = {"version": jax_bsk.__version__, "ffi_api": (0, 99)} | info
        raise ImportError(library.mismatch("jax_bsk._cpu", built, set(library.targets())))

    return run


def flax_layer(**options: Any) -> Any:
    return nnx.MultiHeadAttention(2, 32, decode=False, rngs=nnx.Rngs(0), **options)


def decode_step() -> None:
    flax_attend(X[:, :1], X, X, mask=CausalMask(), call_mask=None, bias=None, lengths=None)


def decode_with(**options: Any) -> Callable[[], Any]:
    def run() -> None:
        layer = jax_bsk.flax.nnx.SparseSelfAttention(2, 32, decode=True, rngs=nnx.Rngs(0), **options)
        if options:
            layer.init_cache((2, 64, 32))
        layer(jnp.zeros((1, 64, 32)))

    return run


def decode_without_collection() -> None:
    layer = jax_bsk.flax.linen.SparseSelfAttention(2, decode=True)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 64, 32)))
    layer.apply({"params": variables["params"]}, jnp.zeros((1, 64, 32)), mutable=["cache"])


def block_masks_together() -> None:
    fn = jax_bsk.flax.attention_fn(BOUND)
    flax_layer(attention_fn=fn)(jnp.zeros((1, 64, 32)), mask=jnp.ones((1, 1, 64, 64), bool))


RAISED: dict[str, Callable[[], Any]] = {
    # Packed sequences.
    "query is TNH and key and value SKH, without a batch, got ...": lambda: packed_attention(X, X, X, [0, 64]),
    "cu_seqlens_q is [sequences + 1], got shape ...; give sparse_attention(..., mask=PackedMask(...)) ...": lambda: (
        packed_attention(X[0], X[0], X[0], np.array([[0, 64]]))
    ),
    "cu_seqlens_kv is given where there are more or fewer keys than queries, got ...": lambda: packed_attention(
        X[0, :3], X[0], X[0], [0, 3]
    ),
    "mask is a lazy mask of the positions within a sequence, got a BlockMask; bind PackedMask(...) and pass that to "
    "sparse_attention": lambda: packed_attention(X[0], X[0], X[0], [0, 64], mask=BOUND),
    "packed_attention takes no arguments of Flax's modules; give a layer the mask ...": lambda: packed_attention(
        X[0],
        X[0],
        X[0],
        [0, 64],
        deterministic=True,  # type: ignore
    ),
    # Which implementation.
    "implementation=... cannot take this call: ...": lambda: attend(
        score_function=lambda s, *_: s, implementation="cpu"
    ),
    "jax_bsk.sparse_attention uses its slower pure-JAX implementation: ...": fallback,
    "implementation is one of (None, 'cpu', 'cuda', 'xla'), got ...": lambda: attend(implementation="cudnn"),
    "The native kernels are compiled beforehand and take no score_function; use implementation='xla', or a bias of "
    "jax_bsk.biases and a mask.": lambda: attend(score_function=lambda s, *_: s, implementation="cpu"),
    "The native kernels append a PositionBias to query and key, where a soft cap would bound it; use "
    "implementation='xla'.": lambda: attend(
        bias=PositionBias(np.zeros((1, 64, 1, 2), np.float32), np.zeros((1, 64, 1, 2), np.float32)),
        logits_soft_cap=2.0,
        implementation="cpu",
    ),
    "Its kernels take ..., got ...; cast the inputs.": on_a_gpu(
        lambda: attend(*[X.astype(jnp.float8_e4m3fn)] * 3, implementation="cuda"), "9.0"
    ),
    "The query's head size is at most ..., got ...": lambda: attend(
        *[np.zeros((1, 64, 2, 300), np.float32)] * 3, implementation="cpu"
    ),
    "The ... head size is a multiple of ..., got ...; pad it.": on_a_gpu(
        lambda: attend(*[np.zeros((1, 64, 2, 12), np.float32)] * 3, implementation="cuda"), "9.0"
    ),
    "Block sizes are ..., got ...; rebuild the mask.": on_a_gpu(
        lambda: attend(mask=CausalMask().bind(64, block_size=32), implementation="cuda"), "9.0"
    ),
    "The products need compute capability ..., and the GPU has ...": on_a_gpu(
        lambda: sparse_matmul(
            np.zeros((8, 128), jnp.bfloat16),
            BSR.from_dense(np.zeros((128, 128), jnp.bfloat16), block_size=64),
            implementation="cuda",
        ),
        "8.0",
    ),
    "JAX sees no CUDA device; install jax[cuda13] on a machine with an NVIDIA GPU, or leave it out.": on_a_gpu(
        lambda: attend(implementation="cuda"), None
    ),
    "The GPU has compute capability ...; the kernels need ... or later.": on_a_gpu(
        lambda: attend(implementation="cuda"), "7.5"
    ),
    # Arguments of attention.
    "query is BTNH and key and value BSKH, or TNH and SKH all three, got ...": lambda: attend(X[0]),
    "key is of query's type ..., got ...; cast one of them": lambda: attend(k=X.astype(np.float16)),
    "key has query's batch size ..., got ...": lambda: attend(QUERIES, KEYS[:1], VALUES[:1]),
    "key and value have the same length and heads, got ...": lambda: attend(v=X[:, :32]),
    "key has query's head size ..., got ...": lambda: attend(k=X[..., :8]),
    "query's heads are a multiple of key's (grouped-query attention), got ...": lambda: attend(
        QUERIES, KEYS[:, :, :3], VALUES[:, :, :3]
    ),
    "query is a floating-point array, got ...": lambda: attend(X.astype(int)),
    "mask broadcasts to BNTS = ..., got shape ...; numbers of each example's keys are mask[:, None, None, :]": (
        lambda: attend(QUERIES, KEYS, VALUES, mask=np.ones((2, 96), bool))
    ),
    "mask is a Mask, a BlockMask or a boolean array (True attends), got an array of ...": lambda: attend(
        mask=np.zeros((64, 64), np.float32)
    ),
    "mask must be a Mask, a BlockMask or a boolean array, given the class CausalMask; make an instance of it, ...": (
        lambda: attend(mask=CausalMask)
    ),
    "mask must be a Mask, a BlockMask or a boolean array, given function; wrap a function of (q_idx, kv_idx) in "
    "FunctionMask(...)": lambda: attend(mask=lambda q, k: q >= k),
    "bias holds numbers, got an array of bool; pass it as mask (True attends)": lambda: attend(
        bias=np.ones((64, 64), bool)
    ),
    "... is [B/1, N/1] = [...], got shape ...; give it dimensions of these sizes": lambda: attend(
        bias=AlibiBias(np.ones(3, np.float32))
    ),
    "BlockBias belongs to the entries of a BlockMask's lists, but the call has another mask; ...": lambda: attend(
        bias=BlockBias(np.ones((1, 1, 3), np.float32))
    ),
    "numbers of TileBias are tiles, 0 to ..., or negative for none, got ...; give it more tiles": lambda: attend(
        bias=TileBias(np.ones((1, 1, 1, 1, 1), np.float32), np.full(BOUND.capacity, 7)), mask=BOUND
    ),
    "table of RelativeBias is [buckets, N/1] with N = ... heads, got shape ...; give each head a column": lambda: (
        attend(bias=RelativeBias.clipped(np.ones((3, 7), np.float32)))
    ),
    "buckets are rows of the table, 0 to ..., got ...; give the table more rows": lambda: attend(
        bias=RelativeBias(np.ones((3, 1), np.float32), np.abs)
    ),
    "buckets gives an integer for each of ... distances, got ...; return the numbers of the table's rows, ...": (
        lambda: attend(bias=RelativeBias(np.ones((3, 1), np.float32), lambda distances: distances / 2))
    ),
    "dropout_rate is in [0, 1), got ...; it is the share of probabilities that are dropped": lambda: attend(
        dropout_rate=1.0
    ),
    "dropout_rate is a Python number, got ...; make it a static argument of the jitted function ...": with_traced(
        lambda rate: attend(dropout_rate=rate), 0.5
    ),
    "dropout_rng is a key of jax.random where dropout_rate > 0, got None; pass jax.random.key(seed)": lambda: attend(
        dropout_rate=0.5
    ),
    "mask is a BlockMask for q_len=..., kv_len=..., but the call has q_len=..., kv_len=...": lambda: attend(
        mask=CausalMask().bind(96)
    ),
    "is_causal and local_window_size cannot be added to a BlockMask, ...": lambda: attend(mask=BOUND, is_causal=True),
    "mask has ... heads, the call has ...; it must be that or 1; ...": lambda: attend(
        QUERIES, QUERIES[:, :, :2], QUERIES[:, :, :2], mask=MultiHeadMask([CausalMask()] * 2)
    ),
    "key_value_seq_lengths is in [0, ...], the tokens there are, got ...": lambda: attend(
        key_value_seq_lengths=np.array([65])
    ),
    "key_value_seq_lengths holds integers, got ...": lambda: attend(key_value_seq_lengths=np.array([6.0])),
    "scale is in [...], as it is used in float32, got ...": lambda: attend(scale=1e39),
    "logits_soft_cap is a number known when tracing, got ...": with_traced(
        lambda cap: attend(logits_soft_cap=cap), jnp.float32(3)
    ),
    "logits_soft_cap is in [...], as it is used in float32, got ...": lambda: attend(logits_soft_cap=0.0),
    "sinks has one logit per query head, shape ..., got ...": lambda: attend(sinks=np.zeros(3, np.float32)),
    "gates has one number for each entry of a BlockMask's lists, but the call has ...": lambda: attend(
        gates=np.ones((1, 1, 1), np.float32)
    ),
    "gates is [B/1, N/1, capacity] with (B, N, capacity) = ..., got shape ...": lambda: attend(
        mask=BOUND, gates=np.ones((1, 1, 9), np.float32)
    ),
    "key must be on the query's devices ..., got ...; move it, e.g. jax.device_put(x, query.sharding)": elsewhere,
    "sparse_attention takes no arguments of Flax's modules; give them attention_fn=jax_bsk.flax.attention_fn(mask); "
    "got ...": lambda: flax_layer(attention_fn=sparse_attention)(jnp.zeros((1, 8, 32))),
    # Masks.
    "a mask has no truth value: ...": lambda: CausalMask() and LocalMask(4),
    "cannot combine a mask with ndarray by ...: wrap a boolean array in ArrayMask(...)": (
        lambda: CausalMask() & np.ones((4, 4), bool)
    ),
    "LocalMask: window must be one argument, an int or a (left, right) pair, got 2 arguments; write "
    "LocalMask((128, 0))": (lambda: LocalMask(128, 0)),
    "LocalMask: window must be an int that is known when tracing, got the traced ...": with_traced(
        lambda w: LocalMask(w).bind(64), jnp.int32(3)
    ),
    "LocalMask: window[0] must be at least 0, ...": lambda: LocalMask((-1, 3)),
    "BigBirdMask: window must be odd (blocks around the query's own), given ...": lambda: BigBirdMask(window=2),
    "GlobalMask: tokens cannot be traced; use FunctionMask(...)": with_traced(
        lambda t: GlobalMask(t).bind(64), jnp.int32(3)
    ),
    "PackedMask: cu_seqlens_q must never decrease, got ...": lambda: PackedMask([0, 3, 2]).bind(3),
    "PackedMask: cu_seqlens_q must lie in [0, ...], the tokens there are, got ...": lambda: PackedMask([0, 9]).bind(3),
    "PackedMask: cu_seqlens_q has a sequence of ... tokens, more than the ... that were promised; ...": lambda: (
        PackedMask([0, 3], max_seqlen_q=2).bind(3)
    ),
    "PackedMask: cu_seqlens_kv must be given where q_len=... and kv_len=... differ, got None; ...": lambda: PackedMask(
        [0, 3]
    ).bind(3, 4),
    "PackedMask: within must be a mask of positions in a sequence, got ...": lambda: PackedMask(
        [0, 3], within=SegmentMask([0, 0, 1])
    ),
    "PackedMask: within must be one mask for all heads, got ...": lambda: PackedMask(
        [0, 3], within=MultiHeadMask([LAZY])
    ),
    "SegmentMask: q_ids has shape ...; expected a last dimension of q_len=...": lambda: SegmentMask([0, 1]).bind(64),
    "SegmentMask: kv_ids has shape ...; expected a last dimension of kv_len=...; give kv_ids, as there are more or "
    "fewer keys than queries": lambda: SegmentMask([0, 1]).bind(2, 3),
    "ArrayMask: array must be boolean with True for attended, given ...": lambda: ArrayMask(np.zeros((4, 4))),
    "FunctionMask: fn must be callable as fn(q_idx, kv_idx), given ...": lambda: FunctionMask(ARRAY),
    "...: fn must return booleans, given ...": lambda: FunctionMask(lambda q, k: q - k).bind(64),
    "...: fn must return the shape ... for indices of shapes ...": lambda: FunctionMask(lambda q, k: q > 4).bind(64),
    "FunctionMask: heads must be given where fn uses h and no call says it, ...": (
        lambda: FunctionMask(lambda b, h, q, k: q >= k + h).bind(64)
    ),
    "MultiHeadMask: masks[1] is a ndarray, not a mask; wrap a boolean array in ArrayMask(...)": (
        lambda: MultiHeadMask([CausalMask(), ARRAY])
    ),
    "mask ...: its parts have head sizes ...; they must be equal, or 1": (
        lambda: (MultiHeadMask([FullMask()] * 2) & MultiHeadMask([FullMask()] * 3)).bind(64)
    ),
    "block_size must be a positive multiple of 32, given ...": lambda: CausalMask().bind(64, block_size=48),
    # Block lists.
    "cannot combine a BlockMask with ... by ...: its blocks are chosen, and none can be added; ...": (
        lambda: BOUND | FullMask()
    ),
    "a BlockMask cannot be inverted, as its blocks are chosen; ...": lambda: ~BOUND,
    "BlockMask.check() needs values, but this mask is traced; call it outside of jit": with_traced(
        lambda ids: SegmentMask(ids).bind(64).check(), np.zeros(64, np.int32)
    ),
    "max_blocks=..., but the mask visits ... blocks in one example and head": lambda: BlockMask.from_mask(
        FullMask(), 256, max_blocks=1
    ),
    "from_indices: batch ..., head ..., row ...: its ids do not ascend; sort them": lambda: BlockMask.from_indices(
        np.array([[1, 0], [0, 1]]), np.array([2, 2]), q_len=256
    ),
    "invalid BlockMask: batch 0, head 0, row 0: it visits key block ..., outside [0, ...)": ids_out_of_range,
    "invalid BlockMask: ...: its entries end at ..., past the lists' capacity of ...; give a larger max_blocks, or "
    "keep the mask's promises": too_many_blocks,
    # A sharded sequence.
    "plan takes a BlockMask, got ...; a lazy mask has bind(length)": lambda: context.plan(LAZY, 2),
    "plan takes a mask of host arrays, whose lists are known; this one is traced or on a device": with_traced(
        lambda ids: context.plan(SegmentMask(ids).bind(64), 2).order, np.zeros(64, np.int32)
    ),
    "plan takes as many queries as keys, which ... shards divide into whole blocks of ... tokens; got ... queries and "
    "... keys; pad the sequence to a multiple of ...": lambda: context.plan(CausalMask().bind(320), 2),
    "shards must be at least 1, got ...": lambda: context.plan(BOUND, 0),
    "chunk is a multiple of the blocks' ... tokens that divides a shard's ..., got ...": lambda: context.plan(
        CausalMask().bind(512), 2, chunk=48
    ),
    "the plan orders ... tokens, got axis ... of an array of shape ...": lambda: context.plan(
        CausalMask().bind(512), 2
    ).dispatch(np.zeros((1, 500))),
    "describe needs the number of shards: describe(mask, shards, ...)": lambda: context.describe(
        BOUND, kv_heads=1, head_dim=8
    ),
    "describe takes a mask of host arrays; of a traced mask, all keys are gathered": with_traced(
        lambda ids: context.describe(SegmentMask(ids).bind(64), 2, kv_heads=1, head_dim=8).work, np.zeros(64, np.int32)
    ),
    "... shards do not divide ... queries and ... keys into whole blocks of ... and ...: such calls gather": (
        lambda: context.describe(CausalMask().bind(320), 2, kv_heads=1, head_dim=8)
    ),
    "with axis_name=... each device has whole blocks of the mask, got ... queries and ... keys per device for blocks "
    "of ... and ...; ...": in_shard_map,
    "axis_name names mesh axes of a shard_map around the call, got ...; ...": lambda: attend(axis_name="a"),
    "axis_name needs a native kernel, of which ... has none; use jit without a shard_map.": lambda: in_shard_map(
        mask=CausalMask().bind(64, block_size=32), implementation="xla"
    ),
    # Selection and compositions.
    "top_k is at least 1, got ...": lambda: selection.moba(X, X, top_k=0),
    "top_k is an int (it decides shapes), got ...": with_traced(lambda n: selection.moba(X, X, top_k=n), jnp.int32(3)),
    "mask has ... heads, the lists of the selection have ...; it must be that or 1 (...)": lambda: selection.from_topk(
        jnp.zeros((2, 1, 1)), 1, q_len=64, mask=MultiHeadMask([CausalMask()] * 3)
    ),
    "quest reads bounds, and these summaries have none; make them with bounds=True": lambda: choose_pages(
        summaries=selection.summarize_pages(X.reshape(4, 16, 2, 16), bounds=False)
    ),
    "moba reads means, and these summaries have none; make them with means=True": lambda: choose_pages(
        selection.moba_pages, summaries=selection.summarize_pages(X.reshape(4, 16, 2, 16), means=False)
    ),
    "summaries keep bounds or means; pass bounds=True for quest_pages, means=True for moba_pages": (
        lambda: selection.summarize_pages(X.reshape(4, 16, 2, 16), bounds=False, means=False)
    ),
    "summaries are PageSummaries, got ...; make them by summarize_pages or summarize_blocks": lambda: choose_pages(
        summaries=X
    ),
    "summaries hold arrays ..., got shape ...; those of pages are made by summarize_pages, those of a contiguous cache "
    "by summarize_blocks": lambda: choose_pages(summaries=selection.summarize_blocks(X, np.array([4]), block_size=16)),
    "summaries are those of the cache, ... of ... positions, got shape ... of ...; make them of this cache": (
        lambda: selection.update_block_summaries(
            selection.summarize_blocks(X, np.array([4]), block_size=16), X[:, :32], np.array([4])
        )
    ),
    "keep_first and keep_last are at least 0, and together at most count = ..., got ...": lambda: choose_pages(count=1),
    "combine is 'max' or 'sum', got ...": lambda: choose_pages(combine="mean"),
    "gates are floating-point numbers of shape ..., got ...": lambda: jax_bsk.nsa_attention(X, X, X, X),
    "scores has one number a key and key/value or query head, shape ..., got ...": lambda: jax_bsk.sparsek_attention(
        X, X, X, X
    ),
    # Decoding.
    "Its kernels take a cache of the query's type ..., got ...; cast one of them.": lambda: serve(
        kv_pages=np.zeros((4, 16, 2, 16), np.int8), implementation="cpu"
    ),
    "q is [tokens, heads, head size], got shape ...; put the tokens of all sequences in a row": lambda: serve(q=X),
    "kv_pages is [pages, page size, 2 key/value heads, head size], keys at even heads, none of them 0, got shape ...": (
        lambda: serve(kv_pages=X[0])
    ),
    "kv_lens is [sequences] = ..., got shape ...; reshape or pad it": lambda: serve(kv_lens=np.array([4, 5])),
    "query's heads are a multiple of the cache's (grouped-query attention), got ...": lambda: serve(
        kv_pages=X.reshape(2, 16, 4, 16), q=X[0, :4, :1]
    ),
    "mask_value is None or below ..., got ...: masked keys have no weight here, whatever the value; leave it out": (
        lambda: serve(mask_value=-1.0)
    ),
    "sliding_window is at least 1, the query's own position, got ...; pass None for no window": lambda: serve(
        sliding_window=0
    ),
    "sink_tokens are positions that a window leaves visible, but the call has no ...": lambda: serve(sink_tokens=4),
    "tree_mask of booleans is [...] with ... and at most 64 drafts, got shape ...": lambda: serve(
        tree_mask=np.ones((4, 65), bool)
    ),
    "page_selection is [...] with ... and a count of 1 or more, got shape ...; fill it up with -1": lambda: serve(
        page_selection=np.array([[0]])
    ),
    "shared_pages are attended to by all tokens of a sequence, but a sliding_window or page_selection leaves some out; "
    "leave shared_pages out": lambda: serve(shared_pages=1, sliding_window=4),
    "outs and lses have one array per partial result, at least one, got ...": lambda: decode.merge_partials([X], []),
    "outs have one shape [..., head size] and type, and lses have that shape without the head size, got ...": (
        lambda: decode.merge_partials([X], [X])
    ),
    "keys_per_part is a positive multiple of 64, got ...": lambda: serve(keys_per_part=100),
    "block_size divides the cache's ... positions, got ...; pad the cache": lambda: decode.attention(
        X[:, :1], X, X, np.array([4]), key_blocks=np.zeros((1, 2, 1), int)
    ),
    "The functions of jax_bsk.decode have no derivatives; differentiate jax_bsk.sparse_attention.": (
        lambda: jax.eval_shape(jax.grad(lambda q: serve(q=q).sum()), X[0, :4])
    ),
    "... pages are asked for, and ... of ... are free": lambda: decode.PagePool(4, 16).allocate(100),
    "sequence ... was freed already": freed_twice,
    # Matrices.
    "a and b must be one a BSR and the other an array, got ...": lambda: sparse_matmul(weight(), weight()),
    "a must be [...] for b of ..., got ...; see transpose": lambda: sparse_matmul(np.zeros((4, 96)), weight()),
    "keep must have values, because it decides which blocks are kept and so the sizes of arrays, got a traced array; "
    "...": (
        with_traced(
            lambda keep: BSR.from_dense(jnp.zeros((64, 64)), block_size=32, keep=keep).data, np.ones((2, 2), bool)
        )
    ),
    "a BSR is immutable, got an assignment to ...": assign,
    "density must be stored blocks / all blocks, in [0, 1], got ...": lambda: BSR.random(
        jax.random.key(0), (64, 64), density=2
    ),
    # Flax.
    "sow_weights must be False, as the attention weights are never formed here, got True; ...": lambda: flax_layer(
        attention_fn=jax_bsk.flax.attention_fn()
    )(jnp.zeros((1, 8, 32)), sow_weights=True),
    "a BlockMask cannot be combined with another mask, as its blocks are already chosen; ...": block_masks_together,
    "one query and ... keys, as in a step of decoding with a cache: the position of that query is not known "
    "here, ...": (decode_step),
    "decode=True needs lazy masks (jax_bsk.masks), which are bound to the position of each call's tokens; "
    "...": decode_with(mask=BOUND),
    "decode=True needs a cache, and there is none; ...": decode_with(),
    "decode=True needs the collection 'cache', and none was given; ...": decode_without_collection,
    "the cache holds keys ..., and the call has keys ...; make a cache for this batch": decode_with(mask=CausalMask()),
    # Installation.
    "... was built against XLA FFI API ..., the installed jaxlib has ...; install a newer jaxlib ...": (
        message_of_mismatch({})
    ),
    "... is version ... but the Python code is ...; run ...": message_of_mismatch({"version": "0.0.1"}),
}


def messages() -> list[str]:
    """The left cells of the tables of messages, as they are read."""
    found = []
    for line, before in zip(PAGES["errors"].splitlines()[2:], PAGES["errors"].splitlines(), strict=False):
        del before
        if line.startswith("| `") and not line.startswith(("| `ValueError", "| `TypeError", "| `jax.errors")):
            cell = re.match(r"\| `(.*?)` \|", line)
            if cell:
                found.append(html.unescape(cell[1]))
    return found


def as_pattern(message: str) -> str:
    return ".*".join(re.escape(part) for part in message.split("...")).replace("B/1", "B.1").replace("N/1", "N.1")


@functools.cache
def texts_in_the_sources() -> str:
    """The string constants of the sources, one a line; what is filled in is a NUL."""
    found = []
    for path in (ROOT / "jax_bsk").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(x.value) if isinstance(x, ast.Constant) else "\0" for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    # A number between two strings.
    filled = r'"\s*\+?\s*(?:std::\w+\((?:[^()"]|\([^()]*\))*\)|ShapeString\([^"]*?\))\s*\+\s*"'
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".h", ".cc"):
            joined = re.sub(r'"\s*(?:JAX_BSK_VERSION)?\s*"', "", re.sub(filled, "\0", path.read_text()))
            found += re.findall(r'"([^"\n]*)"', joined)
    return "\n".join(found)


@pytest.mark.parametrize("message", messages())
def test_messages_are_real(message):
    if message in RAISED:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((Exception, jax_bsk.FallbackWarning)) as raised:
                RAISED[message]()
        assert re.search(as_pattern(message), str(raised.value), re.DOTALL), str(raised.value)
    else:
        assert re.search(as_pattern(message), texts_in_the_sources()), message


def test_every_raised_message_stands_on_the_page():
    assert RAISED.keys() <= set(messages()), RAISED.keys() - set(messages())


# ---- determinism ----------------------------------------------------------------------------------------------------

MASK = (CausalMask() & LocalMask((100, 0))).bind(300, block_size=64)


def step_of(implementation: Any, mask: Any = MASK) -> Callable[..., Any]:
    @jax.jit
    def step(query, key, value, dout):
        def call(*inputs):
            return sparse_attention(*inputs, mask=mask, implementation=implementation, return_residual=True)

        (out, lse), pullback = jax.vjp(call, query, key, value)
        return out, lse, *pullback((dout, jnp.ones_like(lse)))

    return step


def inputs(dtype: Any = jnp.bfloat16) -> Any:
    return jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 300, 4, 32), np.float32)).astype(dtype)


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_cpu_kernels_are_batch_invariant(dtype):
    """Repeats, examples and heads alone, and masks with more room: output, log-sum-exp and gradients."""
    arrays, step = inputs(dtype), step_of("cpu")
    whole = step(*arrays)
    assert_same_bits(step(*arrays), whole)
    assert_same_bits(step(*arrays[:, 1:2]), [x[1:2] for x in whole])
    assert_same_bits(step(*arrays[:, :, :, 1:2]), [x[:, :, 1:2] for x in whole])
    assert_same_bits(step_of("cpu", MASK.padded())(*arrays), whole)


def test_the_cpu_kernels_give_each_query_the_same_bits():
    """vmap, the first blocks of queries, the blocks after them, and the last query alone."""
    query, key, value, _ = inputs()

    def attend(query, first):
        mask = CausalMask(offset=first) & LocalMask((100, 0), offset=first)
        bound = mask.bind(query.shape[-3], 300, block_size=64)
        call = functools.partial(sparse_attention, mask=bound, implementation="cpu")
        return jax.vmap(call)(query, key, value)  # each example by itself

    whole = sparse_attention(query, key, value, mask=MASK, implementation="cpu")
    for first, last in ((0, 300), (0, 128), (128, 300), (299, 300)):
        assert_same_bits(attend(query[:, first:last], first), whole[:, first:last])


def test_the_products_of_the_cpu_kernels_are_batch_invariant():
    weight = BSR.random(jax.random.key(0), (256, 192), density=0.4, block_size=32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((100, 256), np.float32))

    @jax.jit
    def step(x):
        y, pullback = jax.vjp(lambda x: sparse_matmul(x, weight, implementation="cpu"), x)
        return y, *pullback(jnp.sin(y))

    whole = step(x)
    assert_same_bits(step(x), whole)
    for rows in (slice(0, 7), slice(3, 4), slice(40, 100)):
        assert_same_bits(step(x[rows]), [y[rows] for y in whole])
    tokens = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
    assert_same_bits(step(jax.device_put(x, tokens)), whole)
    sampled = jax.jit(lambda x, y: sampled_matmul(x.T, y, weight, implementation="cpu").data)
    assert_same_bits(sampled(x, whole[0]), sampled(x, whole[0]))


def test_programs_repeat_their_bits_on_a_cpu():
    arrays = inputs(jnp.float32)[:, :1]
    step = step_of("xla")
    assert_same_bits(step(*arrays), step(*arrays))
    choose = jax.jit(lambda q, k: selection.moba(q, k, top_k=2, moba_block=128))
    assert_same_bits(choose(*arrays[:2]), choose(*arrays[:2]))
    scores = jnp.sin(jnp.arange(512.0) ** 2)
    soft = jax.jit(jax.value_and_grad(lambda s: (jax_bsk.sparsek(s, k=20) * jnp.arange(512.0)).sum()))
    assert_same_bits(soft(scores), soft(scores))


# Hashes results of the CPU kernels: attention with gradients, and a product.
DIGEST = """
import hashlib, jax, numpy as np
from jax_bsk import BSR, sparse_attention, sparse_matmul
rng = np.random.default_rng(0)
query, key, value, dout = rng.standard_normal((4, 2, 300, 4, 32), np.float32)
out, pullback = jax.vjp(lambda *x: sparse_attention(*x, is_causal=True, implementation="cpu"), query, key, value)
weight = BSR.from_dense(rng.standard_normal((128, 96), np.float32), block_size=32)
product = sparse_matmul(rng.standard_normal((8, 128), np.float32), weight, implementation="cpu")
digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in (out, *pullback(dout), product))).hexdigest()
"""


def test_another_process_has_the_same_bits_on_a_cpu():
    code = f"{DIGEST}print(digest)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names: dict[str, Any] = {}
    exec(DIGEST, names)
    assert result.stdout.split()[-1] == names["digest"]
