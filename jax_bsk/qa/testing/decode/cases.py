"""Test cases of decoding as data: named corners, and random ones from a seed.

A case is a ragged batch of sequences over pages. Rows of the cache that no token attends to hold NaN, and table entries
of pages that no token attends to may be no pages at all: neither must reach a result.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from jax_bsk.qa.testing.judgement import NamedCase

Fault = Literal[
    "length too long",
    "length negative",
    "page too large",
    "page negative",
    "offsets decrease",
    "offset negative",
    "offset too large",
    "offset least",
    "too many sequences",
    "sequences negative",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    """One call of `decode.ragged_paged_attention`, or with `contiguous` of `decode.attention`.

    Attributes:
      q_lens: tokens of each sequence; of a contiguous cache all are equal.
      kv_lens: positions of each sequence.
      seqs: sequences that the table has room for.
      padding: tokens of no sequence.
      kv_heads: key/value heads.
      group: query heads of each.
      head_dim: of queries and keys.
      value_dim: of values, which is another only in a contiguous cache.
      page_size: positions of a page; of a contiguous cache, of a block that is selected.
      max_pages: pages of a sequence.
      contiguous: whether the cache is one.
      causal: of a contiguous cache.
      window: positions that a query attends to; 0 for all.
      sink_tokens: first positions that it leaves visible.
      tree: whether tokens attend to each other by a tree.
      selected: pages listed for a sequence and key/value head; 0 for all.
      sinks: whether heads have sinks.
      soft_cap: of the logits; 0 for none.
      k_scale, v_scale: of a paged cache.
      shared: whether sequences share their first pages.
      read_once: whether shared pages are read once for all sequences, by `shared_pages`.
      groups: problems that vmap maps over.
      part: keys of a part; 0 to choose.
      dtype: of query and cache.
      fault: what is wrong with the integers.
      seed: of all numbers.
    """

    q_lens: tuple[int, ...] = (1, 7, 1)
    kv_lens: tuple[int, ...] = (40, 7, 130)
    seqs: int = 4
    padding: int = 3
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    value_dim: int = 64
    page_size: int = 16
    max_pages: int = 10
    contiguous: bool = False
    causal: bool = True
    window: int = 0
    sink_tokens: int = 0
    tree: bool = False
    selected: int = 0
    sinks: bool = False
    soft_cap: float = 0.0
    k_scale: float = 1.0
    v_scale: float = 1.0
    shared: bool = False
    read_once: bool = False
    groups: int = 1
    part: int = 0
    dtype: str = "float32"
    fault: Fault | None = None
    seed: int = 0

    @property
    def repro(self) -> str:
        """The command that runs this case alone."""
        command = "python -m jax_bsk.qa.testing.decode"
        if not self.name.startswith("seed-"):
            return f"{command} --case {self.name}"
        return f"{command} --cases 1 --seed {self.name.removeprefix('seed-')}"

    @property
    def tokens(self) -> int:
        """Tokens of the call, padding included."""
        return sum(self.q_lens) + self.padding

    @property
    def scale(self) -> float:
        """Factor of the logits, the keys' scale left out."""
        return self.head_dim**-0.5


class Inputs(NamedTuple):
    """Arrays of a case, each with a leading dimension of groups; None where the case has none."""

    query: np.ndarray  # [G, T, N, H]
    key: np.ndarray  # [G, P, Z, K, H]
    value: np.ndarray  # [G, P, Z, K, Hv]
    kv_lens: np.ndarray  # int32 [G, Q]
    page_indices: np.ndarray  # int32 [G, Q, M]
    cu_q_lens: np.ndarray  # int32 [G, Q + 1]
    num_seqs: np.ndarray  # int32 [G, 1]
    selection: np.ndarray | None  # int32 [G, Q, K, selected]
    tree: np.ndarray | None  # bool [G, T, 64]
    sinks: np.ndarray | None  # float32 [N]


def make_inputs(case: Case) -> Inputs:
    """Arrays of a case, before what nobody attends to is poisoned (`oracle.poisoned`)."""
    rng = np.random.default_rng(case.seed)
    groups = [_group(case, rng) for _ in range(case.groups)]
    names = Inputs._fields[:-1]
    arrays = [None if groups[0][i] is None else np.stack([g[i] for g in groups]) for i in range(len(names))]
    sinks = None
    if case.sinks:
        sinks = rng.standard_normal(case.kv_heads * case.group).astype(np.float32) * 2
        sinks[rng.random(len(sinks)) < 0.2] = -np.inf
    return Inputs(*arrays, sinks)  # type: ignore[arg-type]


def _group(case: Case, rng: np.random.Generator) -> tuple[Any, ...]:
    count, seqs, pages = len(case.q_lens), case.seqs, case.max_pages

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype))

    needed = [-(-length // case.page_size) for length in case.kv_lens]
    total = (seqs if case.contiguous else 0) * pages or sum(needed) + 2
    free = list(range(total)) if case.contiguous else list(rng.permutation(total))
    table = rng.integers(0, total, (seqs, pages))
    for row in range(seqs if case.contiguous else count):
        own = pages if case.contiguous else needed[row]
        table[row, :own] = [free.pop(0) for _ in range(own)]
    if case.shared and not case.contiguous:
        common = min(needed) // 2
        table[:count, :common] = table[0, :common]
    lengths = rng.integers(-3, 9, seqs)  # past the sequences nobody looks at them
    lengths[:count] = case.kv_lens
    offsets = rng.integers(-9, 99, seqs + 1)
    offsets[: count + 1] = np.cumsum([0, *case.q_lens])
    number = count
    _break(case, lengths, table, offsets, total, rng)
    if case.fault == "too many sequences":
        number = seqs + 1
    if case.fault == "sequences negative":
        number = -1
    selection = tree = None
    if case.selected:
        most = pages + 2  # some are past the table
        selection = rng.integers(-1, most, (seqs, case.kv_heads, case.selected))
        for row in range(count):  # the last page is what a query attends to before all others
            if needed[row] and rng.random() < 0.8:
                selection[row, :, rng.integers(case.selected)] = needed[row] - 1
    if case.tree:
        tree = rng.random((case.tokens, 64)) < 0.5
    shape = (total, case.page_size, case.kv_heads)
    return (
        numbers(case.tokens, case.kv_heads * case.group, case.head_dim),
        numbers(*shape, case.head_dim),
        numbers(*shape, case.value_dim),
        lengths.astype(np.int32),
        table.astype(np.int32),
        offsets.astype(np.int32),
        np.array([number], np.int32),
        None if selection is None else selection.astype(np.int32),
        tree,
    )


def _break(case: Case, lengths: Any, table: Any, offsets: Any, total: int, rng: np.random.Generator) -> None:
    """Puts the case's fault into the integers."""
    row = int(rng.integers(max(1, len(case.q_lens))))
    if case.fault == "length too long":
        lengths[row] = case.max_pages * case.page_size + 1
    elif case.fault == "length negative":
        lengths[row] = -1 - int(rng.integers(5))
    elif case.fault in ("page too large", "page negative") and case.kv_lens[row]:
        wrong = total + 5 if case.fault == "page too large" else -7
        table[row, int(rng.integers(-(-case.kv_lens[row] // case.page_size)))] = wrong
    elif case.fault == "offsets decrease":
        offsets[row + 1] = offsets[row] - 1
    elif case.fault == "offset negative":
        offsets[0] = -1
    elif case.fault == "offset too large":
        offsets[len(case.q_lens)] = case.tokens + 1
    elif case.fault == "offset least":  # the number of tokens is not one of 32 bits
        offsets[len(case.q_lens)] = -(1 << 31)


def random_case(seed: int) -> Case:
    """A case of small sizes, drawn from a seed."""
    rng = np.random.default_rng([seed, 23])

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def one_of(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    contiguous = chance(0.25)
    count = int(rng.integers(1, 6))
    page_size = one_of(16, 16, 32, 64, 128, 256)
    longest = page_size * int(rng.integers(1, max(3, 640 // page_size)))
    if contiguous:
        q_lens = [one_of(1, 1, 2, 5, 16, 40)] * count
    else:
        lengths = [lambda: 1, lambda: int(rng.integers(0, 9)), lambda: int(rng.integers(1, 97))]
        q_lens = [one_of(*lengths)() for _ in range(count)]
        while sum(q_lens) > 130:  # the oracle goes token by token
            q_lens[int(np.argmax(q_lens))] = 2
    kv_lens = []
    for q_len in q_lens:
        least = 0 if chance(0.1) else min(q_len, longest)
        kv_lens.append(int(rng.integers(least, longest + 1)))
    window = int(rng.integers(1, longest + 20)) if chance(0.3) else 0
    head_dim = one_of(64, 64, 128, 128, 32, 80, 96, 256)
    dtype = one_of("float32", "bfloat16", "bfloat16", "float16")
    fault = one_of(*FAULTS) if chance(0.15) and not contiguous else None
    case = Case(
        f"seed-{seed}",
        q_lens=tuple(q_lens),
        kv_lens=tuple(kv_lens),
        seqs=count if contiguous else count + int(rng.integers(0, 3)),
        padding=0 if contiguous else int(rng.integers(0, 5)),
        kv_heads=one_of(1, 2, 3),
        group=one_of(1, 2, 4, 4, 5, 8, 16),
        head_dim=head_dim,
        value_dim=one_of(head_dim, 64) if contiguous else head_dim,
        page_size=page_size,
        max_pages=longest // page_size,
        contiguous=contiguous,
        causal=not contiguous or chance(0.8),
        window=window,
        sink_tokens=int(rng.integers(0, 40)) if window and chance(0.5) else 0,
        tree=chance(0.2),
        selected=int(rng.integers(1, 7)) if chance(0.25) else 0,
        sinks=chance(0.2),
        soft_cap=one_of(2.0, 20.0) if chance(0.2) else 0.0,
        k_scale=0.5 if chance(0.1) and not contiguous else 1.0,
        v_scale=2.0 if chance(0.1) and not contiguous else 1.0,
        shared=chance(0.3),
        groups=1 if contiguous else one_of(1, 1, 1, 2),
        part=one_of(0, 0, 64, 128, 4096),
        dtype=dtype,
        fault=fault,
        seed=seed,
    )
    may_share = case.shared and not (case.contiguous or case.window or case.selected)
    return dataclasses.replace(case, read_once=may_share and seed % 4 != 1)


_SIZES = {"q_lens": (1, 5), "kv_lens": (33, 20), "seqs": 2, "max_pages": 3, "head_dim": 32, "value_dim": 32}
CORNER_CASES = {
    case.name: case
    for case in (
        Case("mixed"),
        Case("decoding", q_lens=(1,) * 5, kv_lens=(1, 16, 17, 90, 160), seqs=5, padding=0),
        Case("prompts", q_lens=(70, 130), kv_lens=(70, 160), seqs=2, max_pages=10, padding=2, part=64),
        Case("mha", kv_heads=4, group=1),
        Case("wide-group", kv_heads=1, group=16, q_lens=(1, 3, 1)),
        Case("odd-group", kv_heads=2, group=5),
        Case("no-keys", q_lens=(1, 4, 2), kv_lens=(0, 2, 5), sinks=True),
        Case("no-tokens", q_lens=(0, 3, 0), kv_lens=(9, 20, 4)),
        Case("no-tokens-at-all", q_lens=(0,), kv_lens=(9,)),
        Case("no-sequences", q_lens=(), kv_lens=(), padding=4),
        Case("window", window=20, kv_lens=(100, 30, 150)),
        Case("window-and-sink-tokens", window=20, sink_tokens=18, kv_lens=(100, 30, 150), q_lens=(1, 30, 4)),
        Case("tree", tree=True, q_lens=(1, 64, 9), kv_lens=(30, 100, 12)),
        Case("tree-in-a-window", tree=True, window=12, q_lens=(1, 40, 9), kv_lens=(30, 100, 12)),
        Case(
            "tree-and-window-in-parts",
            tree=True,
            window=100,
            q_lens=(64,),
            kv_lens=(257,),
            seqs=1,
            max_pages=17,
            part=64,
        ),
        Case("tree-of-too-many", tree=True, q_lens=(65, 2), kv_lens=(80, 40)),
        Case("selected", selected=3, kv_lens=(40, 60, 130)),
        Case("selected-in-a-window", selected=4, window=30, sink_tokens=5, kv_lens=(140, 60, 130)),
        Case("sinks", sinks=True),
        Case("soft-cap", soft_cap=2.0),
        Case("scales", k_scale=0.25, v_scale=4.0),
        Case("shared-prefix", shared=True, kv_lens=(100, 120, 130)),
        Case("shared-prefix-once", shared=True, read_once=True, kv_lens=(100, 120, 130), sinks=True),
        Case("shared-prefix-once-tree", shared=True, read_once=True, kv_lens=(100, 120, 130), tree=True, part=64),
        Case("large-pages", page_size=256, max_pages=2, kv_lens=(300, 7, 512)),
        Case("long", q_lens=(1, 2), kv_lens=(1500, 3000), page_size=64, max_pages=50, seqs=2, part=128),
        Case("vmap", groups=2),
        Case("bfloat16", dtype="bfloat16", head_dim=128, value_dim=128),
        Case("float16", dtype="float16"),
        Case("contiguous", contiguous=True, q_lens=(2, 2, 2), seqs=3, padding=0),
        Case("contiguous-values", contiguous=True, q_lens=(1, 1, 1), seqs=3, padding=0, value_dim=32, head_dim=96),
        Case("contiguous-selected", contiguous=True, q_lens=(1, 1, 1), seqs=3, padding=0, selected=4, tree=True),
        Case("contiguous-not-causal", contiguous=True, q_lens=(9, 9, 9), seqs=3, padding=0, causal=False, window=30),
        Case(
            "not-causal-window-in-parts",
            q_lens=(130,),
            kv_lens=(160,),
            seqs=1,
            padding=0,
            contiguous=True,
            causal=False,
            window=20,
            part=64,
        ),
        *(Case(fault.replace(" ", "-"), fault=fault, kv_lens=(40, 37, 130), sinks=True) for fault in FAULTS),
    )
}
