"""The tables of docs/coming-from: every entry of their right columns has the values that its left column means.

A row exists once, in its page. Its right cell is a code span, or says "not there", then perhaps what to use instead in
a code span. The code is evaluated after the page's python blocks, and compared with a dense computation in numpy. That
is kept here under the text of the left cell; where the left cell is code of JAX itself, it is run. Rows that say "not
there" name words that no public name or argument may contain: what is built later must appear in them.
"""

from __future__ import annotations

import functools
import html
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jax_bsk
import jax_bsk.flax
from jax_bsk import BlockMask, masks, selection, sparse_attention
from jax_bsk.attention import dropout
from jax_bsk.masks import Mask, MultiHeadMask
from tests.test_pages import BLOCK, ROOT

FOLDER = ROOT / "docs" / "coming-from"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))
CODE = re.compile(r"`([^`]+)`|<code>(.*?)</code>")


class Row(NamedTuple):
    """A row of a page's tables: the text of its left cell, the codes in it, and the code of its right cell (or "")."""

    name: str
    left: list[str]
    right: str


def codes(cell: str) -> list[str]:
    return [plain or html.unescape(marked) for plain, marked in CODE.findall(cell)]


def rows_of(text: str) -> list[Row]:
    """The rows of all tables whose second column is of jax_bsk."""
    found, ours = [], False
    for line, after in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if after.startswith("|---"):
            ours = len(cells) > 1 and "jax_bsk" in cells[1]
        elif ours and cells and not line.startswith("|---"):
            left, right = cells[:2]
            assert right.startswith(("`", "<code>", "not there")), line
            assert right == "not there" or right.startswith(("`", "<code>", "not there; use ")), line
            name = html.unescape(re.sub("</?code>|`", "", left))
            found.append(Row(name, codes(left), (codes(right) or [""])[0]))
    return found


@functools.cache
def page(name: str) -> tuple[dict[str, Any], dict[str, Row]]:
    """The names that a page's blocks leave, and its rows."""
    text = (FOLDER / f"{name}.md").read_text()
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):
        for _, code in BLOCK.findall(text):
            exec(compile(code, name, "exec"), names)
    rows = rows_of(text)
    assert len({row.name for row in rows}) == len(rows), "two rows have the same left cell"
    return names, {row.name: row for row in rows}


def evaluated(name: str, code: str) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader has it
        return eval(compile(code, f"{name}.md", "eval"), page(name)[0])


# ---- dense computations ---------------------------------------------------------------------------------------------


def attention(
    query,
    key,
    value,
    allowed: Any = True,
    *,
    bias: Any = 0.0,
    scale=None,
    cap=None,
    sinks=None,
    factors: Any = 1.0,
    residual=False,
) -> Any:
    """Dense attention in float64 of BTNH (or TNH) arrays; a query that attends to nothing yields 0."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    unbatched = query.ndim == 3
    if unbatched:
        query, key, value = query[None], key[None], value[None]
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], 2) for x in (key, value))
    logits = np.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    logits = np.where(np.broadcast_to(allowed, logits.shape), logits + np.asarray(bias, np.float64), -np.inf)
    sink = np.full(query.shape[2], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.logaddexp(np.logaddexp.reduce(logits, -1), sink[:, None])
        weights = factors * np.where(np.isneginf(logits), 0.0, np.exp(logits - lse[..., None]))
    out, lse = np.einsum("bnts,bsnh->btnh", weights, value), lse.swapaxes(1, 2)
    if unbatched:
        out, lse = out[0], lse[0]
    return (out, lse) if residual else out


def grid(queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(queries)[:, None], np.arange(keys)[None, :]


def pairs(queries: int, keys: int, attends: Callable[[int, int], bool]) -> np.ndarray:
    """A predicate of one pair, asked about every pair."""
    return np.array([[bool(attends(q, k)) for k in range(keys)] for q in range(queries)])


class Missing(NamedTuple):
    """What a row says is not there: words that no public name or argument of `sparse_attention` contains."""

    words: tuple[str, ...]


def missing(*words: str) -> Missing:
    return Missing(words)


def of(name: str, **options: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    """Dense attention of a page's q, k and v; an option is a function of the page's names."""

    def compute() -> Any:
        names = page(name)[0]
        given = {option: value(names) for option, value in options.items()}
        q, k, v = (given.pop(x, names[x]) for x in ("q", "k", "v"))
        return attention(q, k, v, **given)

    return compute


def kept(queries: int, keys: int, examples: int) -> np.ndarray:
    """The factors of a quarter that is dropped, for four heads and the key of the pages."""
    of_heads = dropout.keys_of_heads(jax.random.key(0), examples, 4)
    return np.asarray(dropout.dense_factors(of_heads, queries, keys, 64), np.float64)


def first_heads(n: dict[str, Any], name: str) -> Any:
    return n[name][:, :, :2]


# ---- FlexAttention --------------------------------------------------------------------------------------------------

Q, K = grid(256, 256)
DISTANCE: Any = abs(Q - K)
DOCUMENT = np.repeat([0, 1, 2], [100, 96, 60])
SAME_DOCUMENT = DOCUMENT[:, None] == DOCUMENT[None]
PLACE = Q - np.array([0, 100, 196])[DOCUMENT][:, None]  # of a query in its document


def blocks_of(array: np.ndarray, size: int = 64) -> np.ndarray:
    """Which blocks of a dense mask are empty (0), partial (1) and full (2)."""
    tiles = array.reshape(array.shape[0] // size, size, array.shape[1] // size, size)
    return tiles.any((1, 3)).astype(int) + tiles.all((1, 3))


def per_head(heads: int = 4) -> np.ndarray:
    return np.stack([(Q >= K) & (h <= K % 4) for h in range(heads)])


def neighbours(places: list[tuple[int, ...]], size: tuple[int, ...], width: tuple[int, ...]) -> np.ndarray:
    """Pairs of places: whether the second is in the window around the first, which is moved to stay inside."""

    def windows(place: tuple[int, ...]) -> list[range]:
        firsts = [min(max(p - w // 2, 0), n - w) for p, w, n in zip(place, width, size, strict=True)]
        return [range(first, first + w) for first, w in zip(firsts, width, strict=True)]

    known = {place: windows(place) for place in set(places)}
    return pairs(
        len(places),
        len(places),
        lambda q, k: all(x in window for x, window in zip(places[k], known[places[q]], strict=True)),
    )


def rows_first(height: int, width: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(height) for column in range(width)]


def tiles_first() -> list[tuple[int, int]]:
    return [
        (4 * down + row, 4 * right + column)
        for down, right in rows_first(4, 4)
        for row, column in rows_first(4, 4)  # tile after tile
    ]


def z_order() -> list[tuple[int, int]]:
    """Quarter after quarter, each likewise."""
    order = [(0, 0)]
    for size in (1, 2, 4, 8):
        order = [
            (row + size * down, column + size * right) for down, right in rows_first(2, 2) for row, column in order
        ]
    return order


def tiles_of(size: tuple[int, ...], tokens: int) -> list[tuple[int, ...]]:
    """The tile of each token, where tiles of so many tokens follow each other."""
    return [place for place in np.ndindex(*size) for _ in range(tokens)]


def with_text(picture: np.ndarray, text: int) -> np.ndarray:
    whole = np.ones((len(picture) + text,) * 2, bool)
    whole[: len(picture), : len(picture)] = picture
    return whole


def block_diffusion(q: int, k: int) -> bool:
    """Tokens 0 to 127 are noised, 128 to 255 are clean: section 3.1 of arXiv 2503.09573."""
    noised_q, noised_k = q < 128, k < 128
    block_q, block_k = (q % 128) // 32, (k % 128) // 32
    if noised_q and noised_k:
        return block_q == block_k
    if noised_q:
        return block_k < block_q
    return not noised_k and block_k <= block_q


IMAGES = [(0, 60), (40, 120), (90, 220), (200, 256)]
PARENTS = [None, 0, 0, 1]


def on_path(node: int, other: int) -> bool:
    at: int | None = node
    while at is not None and at != other:
        at = PARENTS[at]
    return at == other


def strided_blocks() -> np.ndarray:
    chosen = {0: (0, 2), 1: (1, 3), 2: (0, 1), 3: (2, 3)}
    return pairs(256, 256, lambda q, k: k // 64 in chosen[q // 64])


def big_bird() -> np.ndarray:
    return pairs(256, 256, lambda q, k: abs(q // 32 - k // 32) <= 1 or q < 32 or k < 32)


CAUSAL_BLOCKS = blocks_of(Q >= K)
GLOBALS = np.isin(np.arange(256), [0, 70, 200])


def flex(**options: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    return of("flex-attention", **options)


def graphormer_edges(n: dict[str, Any]) -> np.ndarray:
    """The mean of the edges' numbers along each path, edge by edge."""
    table, edges, hops = np.asarray(n["of_edges"]), n["edges"][0], n["hops"][0]
    total = np.zeros((4, 256, 256))
    for place in range(2):
        total += np.where(hops > place, table[:, place][:, edges[..., place]], 0)
    return total / np.maximum(1, np.minimum(hops, 2))


def sandwich(n: dict[str, Any]) -> np.ndarray:
    del n
    total = sum(np.cos((Q - K) * 10000.0 ** (-2 * i / 16)) for i in range(8))
    return np.stack([total / (8 * (h + 1) / 4) for h in range(4)])


def mla() -> np.ndarray:
    """(q . latent + q_rope . k_rope) * 0.2, whose softmax weighs the latent vectors."""
    names = page("flex-attention")[0]
    n = {name: np.asarray(names[name], np.float64) for name in ("q", "latent", "q_rope", "k_rope")}
    logits = np.einsum("btnh,bsh->bnts", n["q"], n["latent"][:, :, 0])
    logits = (logits + np.einsum("btnh,bsh->bnts", n["q_rope"], n["k_rope"][:, :, 0])) * 0.2
    weights = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    return np.einsum("bnts,bsh->btnh", weights, n["latent"][:, :, 0])


FLEX: dict[str, Any] = {
    "query, key, value of [B, H, T, D]": flex(),
    "block_mask=create_block_mask(mask_mod, B, H, T, S)": flex(allowed=lambda _: per_head()),
    "scale=0.1": flex(scale=lambda _: 0.1),
    "enable_gqa=True": flex(k=lambda n: first_heads(n, "k"), v=lambda n: first_heads(n, "v")),
    "return_lse=True, AuxRequest(lse=True)": flex(residual=lambda _: True),
    "AuxRequest(max_scores=True)": missing("max_scores", "max_logit"),
    "score_mod=checkerboard": flex(scale=lambda _: np.where(DISTANCE % 2, 0.5, 2) / 4),
    "kernel_options": missing("kernel_options", "num_stages"),
    "torch.compile(flex_attention)": flex(),
    "paged attention, decoding": missing("paged", "page_table"),  # of `sparse_attention`: they are in `decode`
    # Block masks.
    "create_block_mask(mask_mod, None, 4, 256, 256, BLOCK_SIZE=64)": per_head,
    "and_masks(causal, window)": lambda: (Q >= K) & (abs(Q - K) <= 16),
    "or_masks(causal, window)": lambda: (Q >= K) | (abs(Q - K) <= 16),
    "noop_mask": lambda: np.ones((256, 256), bool),
    "create_mask(mask_mod, 1, 4, 256, 256)": lambda: per_head()[None],
    "BlockMask.from_kv_blocks(kv_num_blocks, kv_indices, BLOCK_SIZE=64)": lambda: pairs(
        256, 256, lambda q, k: k // 64 in {0: (0,), 1: (0, 1), 2: (2,), 3: (0, 3)}[q // 64]
    ),
    "block_mask.kv_num_blocks + block_mask.full_kv_num_blocks": lambda: (CAUSAL_BLOCKS > 0).sum(1)[None, None],
    "block_mask.full_kv_num_blocks.sum()": lambda: (CAUSAL_BLOCKS == 2).sum(),
    "block_mask.q_num_blocks + block_mask.full_q_num_blocks": lambda: (CAUSAL_BLOCKS > 0).sum(0)[None, None],
    "block_mask.BLOCK_SIZE": lambda: (64, 64),
    "block_mask.shape": lambda: (1, 1, 256, 256),
    "block_mask.sparsity()": lambda: 100 * (CAUSAL_BLOCKS == 0).mean(),
    "block_mask.to_string()": lambda: "visited: 10 blocks per list, 6 full, 4 partial",
    "block_mask[:, head], _adjust": missing("adjust"),
    # Mask functions.
    "causal_mask": lambda: Q >= K,
    "generate_sliding_window(32)": lambda: pairs(256, 256, lambda q, k: 0 <= q - k <= 32),
    "generate_prefix_lm_mask(64)": lambda: pairs(256, 256, lambda q, k: k < 64 or k <= q),
    "generate_doc_mask_mod(causal_mask, offsets)": lambda: SAME_DOCUMENT & (K <= Q),
    "generate_packed_causal_doc_mask_mod(offsets)": lambda: SAME_DOCUMENT & (K <= Q),
    "generate_doc_mask_mod(generate_sliding_window(32), offsets)": lambda: SAME_DOCUMENT & (K <= Q) & (Q - K <= 32),
    "generate_doc_mask_mod(generate_prefix_lm_mask(16), offsets)": lambda: (
        SAME_DOCUMENT & ((K <= Q) | (PLACE.reshape(1, -1) < 16))
    ),
    "generate_dilated_sliding_window(32, 4)": lambda: pairs(
        256, 256, lambda q, k: abs(q - k) <= 32 and abs(q - k) % 4 == 0
    ),
    "generate_global_sliding_window(16, is_global)": lambda: (abs(Q - K) <= 16) | GLOBALS[:, None] | GLOBALS[None],
    "generate_natten(16, 16, 5, 5)": lambda: neighbours(rows_first(16, 16), (16, 16), (5, 5)),
    "generate_tiled_natten(16, 16, 5, 5, 4, 4)": lambda: neighbours(tiles_first(), (16, 16), (5, 5)),
    "generate_morton_natten(16, 16, 5, 5)": lambda: neighbours(z_order(), (16, 16), (5, 5)),
    "generate_sta_mask_mod_2d((16, 16), (8, 12), (4, 4))": lambda: neighbours(tiles_of((4, 4), 16), (4, 4), (2, 3)),
    "generate_sta_mask_mod_2d((16, 15), (8, 9), (4, 3), text_seq_len=16)": lambda: with_text(
        neighbours(tiles_of((4, 5), 12), (4, 5), (2, 3)), 16
    ),
    "generate_sta_mask_mod_3d((4, 8, 8), (2, 6, 8), (1, 2, 2))": lambda: neighbours(
        tiles_of((4, 4, 4), 4), (4, 4, 4), (2, 3, 4)
    ),
    "generate_spatial_head_mask_mod(16, 6, 40, width=2, round_width=32)": lambda: (
        (abs(Q - K) < 64) | (Q < 16) | (K < 16)
    ),
    "generate_temporal_head_mask_mod(16, 6, 40, width=2)": lambda: pairs(
        256, 256, lambda q, k: q < 16 or k < 16 or abs((q - 16) % 40 - (k - 16) % 40) < 13
    ),
    "batchify_mask_mod(causal_mask, 64)": lambda: (Q // 64 == K // 64) & (K <= Q),
    "generate_vision_cross_attention_mask_mod(intervals, 64)": lambda: pairs(
        256, 256, lambda q, k: q in range(*IMAGES[k // 64])
    ),
    "generate_block_diffusion_mask(128, 32)": lambda: pairs(256, 256, block_diffusion),
    # Documents 1 and 2 continue document 0.
    "generate_shared_prefix_mask_mod(offsets, prefix_document_id)": lambda: pairs(
        256, 256, lambda q, k: k <= q if q < 100 else k < 100 or (DOCUMENT[q] == DOCUMENT[k] and k <= q)
    ),
    "generate_jetspec_tree_causal_mask_mod(64, ancestor)": lambda: pairs(
        4, 68, lambda q, k: k < 64 or on_path(q, k - 64)
    ),
    "generate_jetspec_training_mask_mod(64, 32)": lambda: pairs(
        256, 320, lambda q, k: k < 64 or ((k - 64) // 32 == q // 32 and k - 64 <= q)
    ),
    "generate_vsa_mask_mod(topk_indices, 64), create_vsa_block_mask": strided_blocks,
    "strided Sparse Transformer, stride 16": lambda: pairs(
        256, 256, lambda q, k: k <= q and (q - k <= 16 or (q - k) % 16 == 0)
    ),
    "fixed Sparse Transformer, stride 16, the last 2 of each stride": lambda: pairs(
        256, 256, lambda q, k: k <= q and (q // 16 == k // 16 or k % 16 in (14, 15))
    ),
    "StreamingLLM: a window of 32 and the first 4 tokens": lambda: pairs(
        256, 256, lambda q, k: k <= q and (q - k <= 32 or k < 4)
    ),
    "BigBird": big_bird,
    "one mask for each head": lambda: np.stack([Q >= K, abs(Q - K) <= 16, Q >= 0 * K, Q // 64 == K // 64]),
    # Score functions.
    "none, noop": flex(),
    "generate_tanh_softcap(30)": flex(cap=lambda _: 30.0),
    "generate_alibi_bias(4) with causal_mask": flex(
        bias=lambda _: np.stack([(K - Q) * 2.0 ** -(8 * (h + 1) / 4) for h in range(4)]), allowed=lambda _: K <= Q
    ),
    "relative position: score + bias[h, abs(q_idx - kv_idx)]": flex(
        bias=lambda n: np.moveaxis(np.asarray(n["by_distance"])[DISTANCE], -1, 0)
    ),
    "generate_graphormer_spatial_bias(of_hops, hops)": flex(
        bias=lambda n: np.stack([np.asarray(n["of_hops"])[h][n["hops"][0]] for h in range(4)])
    ),
    "generate_graphormer_edge_bias(of_edges, edges, lengths)": flex(bias=graphormer_edges),
    "generate_sandwich_bias(4, 256, d_bar=16)": flex(bias=sandwich),
    "score * scale[q_idx]": flex(scale=lambda n: np.asarray(n["per_query"], np.float64)[:, None] / 4),
    "generate_mla_rope_score_mod(q_rope, k_rope, 4, scale=0.2)": mla,
    "learnable sink of gpt-oss": flex(sinks=lambda _: [0, 1, 2, 3]),
    "checkerboard_score_mod: a factor of the score by (q_idx - kv_idx) % 2": flex(
        scale=lambda _: np.where(DISTANCE % 2, 0.5, 2) / 4
    ),
    "generate_activation_score_mod(gelu)": missing("activation"),
}

# ---- flash-attn -----------------------------------------------------------------------------------------------------

T, S = 128, 256
QT, KS = grid(T, S)
ALIGNED = QT + S - T  # position of a query, counted so that the last one stands at the last key


def flash(**options: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    return of("flash-attn", **options)


def sequences(q_lengths, kv_lengths, attends: Callable[[int, int, int, int], bool], begins=None) -> np.ndarray:
    """The pairs of each sequence, by their places in it: attends(query, key, queries, keys)."""
    kv_begins = np.cumsum([0, *kv_lengths])[:-1] if begins is None else begins
    mask = np.zeros((T, S), bool)
    for q0, nq, k0, nk in zip(np.cumsum([0, *q_lengths])[:-1], q_lengths, kv_begins, kv_lengths, strict=True):
        for q in range(nq):
            for k in range(nk):
                mask[q0 + q, k0 + k] = attends(q, k, nq, nk)
    return mask


FLASH_LENGTHS = ([50, 40, 38], [90, 60, 106])


def varlen(
    attends: Callable[[int, int, int, int], bool], **options: Callable[[dict[str, Any]], Any]
) -> Callable[[], Any]:
    one: dict[str, Callable[[dict[str, Any]], Any]] = {x: lambda n, x=x: n[x][0] for x in "qkv"}
    return flash(**one, **options, allowed=lambda _: sequences(*FLASH_LENGTHS, attends))


def fa4(kinds: np.ndarray) -> np.ndarray:
    """Blocks of 64 x 64: 0 is skipped, 1 is causal within itself, 2 is attended as a whole."""
    return pairs(T, S, lambda q, k: kinds[q // 64][k // 64] == 2 or (kinds[q // 64][k // 64] == 1 and q % 64 >= k % 64))


FA4_KINDS = np.array([[1, 0, 0, 2], [2, 1, 2, 0]])


def own_keys() -> Any:
    q = np.asarray(page("flash-attn")[0]["q"][0])
    ids = np.repeat([0, 1, 2], FLASH_LENGTHS[0])
    return attention(q, q, q, (ids[:, None] == ids) & (np.arange(T)[:, None] >= np.arange(T)))


def cached(attends: Callable[[int, int, int], bool]) -> Callable[[], Any]:
    """4 new queries, whose keys are the last of 200 and 130 that are in the cache."""
    mask = np.stack([pairs(4, S, lambda q, k, n=n: attends(q, k, n)) for n in (200, 130)])
    return flash(q=lambda n: n["q"][:, :4], allowed=lambda _: mask[:, None])


def appended() -> np.ndarray:
    cache = np.array(page("flash-attn")[0]["k"])
    cache[:, 96:100] = cache[:, :4].copy()
    return cache


def packed_qkv() -> Any:
    qkv = np.asarray(page("flash-attn")[0]["qkv"])
    return attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])


def beside_values() -> Any:
    """FA3's qv: the products with keys and with values are added."""
    n = page("flash-attn")[0]
    q, k, v, qv = (np.asarray(n[name], np.float64) for name in ("q", "k", "v", "q_of_v"))
    logits = (np.einsum("btnh,bsnh->bnts", q, k) + np.einsum("btnh,bsnh->bnts", qv, v)) / np.sqrt(32)
    weights = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights, v)


FLASH: dict[str, Any] = {
    "flash_attn_func(q, k, v)": flash(),
    "fewer heads in k and v": flash(k=lambda n: first_heads(n, "k"), v=lambda n: first_heads(n, "v")),
    "flash_attn_qkvpacked_func(qkv)": packed_qkv,
    "causal=True": flash(allowed=lambda _: KS <= ALIGNED),
    "window_size=(32, 0)": flash(allowed=lambda _: (ALIGNED - 32 <= KS) & (KS <= ALIGNED)),
    "window_size=(32, -1)": flash(allowed=lambda _: ALIGNED - 32 <= KS),
    "attention_chunk=64 (FA3)": flash(allowed=lambda _: ALIGNED // 64 == KS // 64),
    "softmax_scale=0.1": flash(scale=lambda _: 0.1),
    "softcap=15.0": flash(cap=lambda _: 15.0),
    "learnable_sink=... (FA4)": flash(sinks=lambda _: [0, 1, 2, 3]),
    "return_lse=True, return_attn_probs=True": flash(residual=lambda _: True),
    "alibi_slopes=slopes": flash(bias=lambda _: np.stack([-abs(ALIGNED - KS) * 0.25**h for h in range(1, 5)])),
    "score_mod (FA4)": missing("score_mod"),
    "qv (FA3, FA4)": beside_values,
    "deterministic=True": flash(),
    "dropout_p=0.25": flash(factors=lambda _: kept(T, S, 2)),
    "q_descale, FP8": missing("descale", "fp8"),
    "num_splits, sm_margin": missing("splits", "sm_margin"),
    "flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, ...)": varlen(lambda q, k, nq, nk: True),
    "the same, attention_chunk=64 (FA3)": varlen(lambda q, k, nq, nk: (q + nk - nq) // 64 == k // 64),
    "softcap, softmax_scale, return_attn_probs": varlen(
        lambda q, k, nq, nk: True, cap=lambda _: 15.0, scale=lambda _: 0.1, residual=lambda _: True
    ),
    "the same, causal=True": varlen(lambda q, k, nq, nk: k <= q + nk - nq),
    "the same, queries and keys of one length": own_keys,
    "the same, window_size=(16, 0)": varlen(lambda q, k, nq, nk: q + nk - nq - 16 <= k <= q + nk - nq),
    "seqused_k=used": flash(allowed=lambda _: np.stack([KS < 200, KS < 130])[:, None]),
    "mask_mod=mask_mod": flash(
        allowed=lambda _: pairs(
            T, S, lambda q, k: q // 64 + 1 < k // 64 or q % 64 >= k % 64 or (k // 64 % 2 == 0 and q >= 64)
        )
    ),
    "full_block_cnt, full_block_idx": lambda: fa4(np.where(FA4_KINDS == 2, 2, 0)),
    "BlockSparseTensorsTorch(mask_block_cnt, mask_block_idx, full_block_cnt, full_block_idx)": lambda: fa4(FA4_KINDS),
    "block_sparse_tensors_bwd, dq_write_order": lambda: fa4(np.where(FA4_KINDS > 0, 2, 0)),
    "gather_kv_indices (top-k of tokens)": missing("gather_kv"),
    "cache_seqlens=filled, causal=True": cached(lambda q, k, n: k <= n - 4 + q),
    "k=..., v=... appended in place": appended,
    "block_table": missing("block_table", "page_table"),
    "rotary_cos, rotary_sin": missing("rotary", "rope"),
    "cache_leftpad": cached(lambda q, k, n: k >= n - 100),
}

# ---- xformers -------------------------------------------------------------------------------------------------------

X_USED = [60, 50, 64]
X_PADDED, X_GAPPY = [0, 64, 128], [3, 100, 180]


def xformers(**options: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    return of("xformers", **options)


def diagonal(attends: Callable[[int, int, int, int], bool], lengths=FLASH_LENGTHS[1], begins=None):
    return lambda: sequences(FLASH_LENGTHS[0], lengths, attends, begins)


def one_head() -> Any:
    n = page("xformers")[0]
    return attention(*(n[x][:, :, :1] for x in "qkv"))[:, :, 0]


def groups_of_heads() -> Any:
    n = page("xformers")[0]
    q, k, v = (np.asarray(n[x]) for x in ("q5", "k5", "v5"))
    heads = [attention(q[:, :, g, h][:, :, None], k[:, :, g], v[:, :, g]) for g in range(2) for h in range(2)]
    return np.concatenate(heads, 2)


XFORMERS: dict[str, Any] = {
    "(q, k, v)": xformers(),
    "(q, k, v) of [B, M, K]": one_head,
    "(q, k, v) of [B, M, G, H, K]": groups_of_heads,
    "attn_bias=bias, a tensor": xformers(bias=lambda n: n["bias"]),
    "scale=0.1": xformers(scale=lambda _: 0.1),
    "p=0.25 (dropout)": xformers(factors=lambda _: kept(T, S, 2)),
    "op=...": xformers(),
    "output_dtype=torch.float32": xformers(),
    "memory_efficient_attention_forward_requires_grad": xformers(residual=lambda _: True),
    "LowerTriangularMask()": lambda: KS <= QT,
    "LowerTriangularFromBottomRightMask()": lambda: KS <= ALIGNED,
    # 32 keys, of which the last is the query's own.
    "LowerTriangularFromBottomRightLocalAttentionMask(32)": lambda: (ALIGNED - 32 < KS) & (KS <= ALIGNED),
    "LocalAttentionFromBottomRightMask(window_left=8, window_right=4)": lambda: pairs(
        T, S, lambda q, k: q - 8 <= k + (T - S) <= q + 4
    ),
    "LowerTriangularMaskWithTensorBias(bias)": xformers(bias=lambda n: n["bias"], allowed=lambda _: KS <= QT),
    "BlockDiagonalMask.from_seqlens(q_lengths, kv_lengths)": diagonal(lambda q, k, nq, nk: True),
    "BlockDiagonalMask.from_tensor_list": missing("tensor_list"),
    "BlockDiagonalCausalMask": diagonal(lambda q, k, nq, nk: k <= q),
    "BlockDiagonalCausalFromBottomRightMask": diagonal(lambda q, k, nq, nk: nk - 1 - k >= nq - 1 - q),
    "BlockDiagonalCausalLocalAttentionMask, window 32": diagonal(lambda q, k, nq, nk: q - 32 < k <= q),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask, window 32": diagonal(
        lambda q, k, nq, nk: 0 <= (nk - k) - (nq - q) < 32
    ),
    "BlockDiagonalPaddedKeysMask": diagonal(lambda q, k, nq, nk: True, X_USED, X_PADDED),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": diagonal(
        lambda q, k, nq, nk: (nk - k) >= (nq - q), X_USED, X_PADDED
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask, 8 to the left, 4 to the right": diagonal(
        lambda q, k, nq, nk: -4 <= (nk - k) - (nq - q) <= 8, X_USED, X_PADDED
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask, window 32": diagonal(
        lambda q, k, nq, nk: 0 <= (nk - k) - (nq - q) < 32, X_USED, X_PADDED
    ),
    "BlockDiagonalGappyKeysMask": diagonal(lambda q, k, nq, nk: True, X_USED, X_GAPPY),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": diagonal(lambda q, k, nq, nk: (nk - k) >= (nq - q), X_USED, X_GAPPY),
    "PagedBlockDiagonal...": missing("paged", "page_table"),
}

# ---- cuDNN ----------------------------------------------------------------------------------------------------------


def cudnn(**options: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    return of("cudnn", **options)


def within_lengths(_: Any) -> np.ndarray:
    return np.stack([(QT < 100) & (KS < 200), (QT < 128) & (KS < 130)])[:, None]


BSA = {0: (0, 2), 1: (1, 2, 3)}


def bsa(_: Any = None) -> np.ndarray:
    return pairs(T, S, lambda q, k: k // 64 in BSA[q // 64])


def endpoints(_: Any = None) -> np.ndarray:
    return pairs(T, S, lambda q, k: k < 8 or q + 20 <= k < q + 60)


CUDNN: dict[str, Any] = {
    "float16, bfloat16; FP8 by another function": cudnn(),
    "is_causal=True": cudnn(allowed=lambda _: KS <= QT),
    "local_window_size=(32, 0) with is_causal=True": cudnn(allowed=lambda _: (QT - 32 <= KS) & (KS <= QT)),
    "query_seq_lengths, key_value_seq_lengths": cudnn(allowed=within_lengths),
    "bias=bias": cudnn(bias=lambda n: n["bias"]),
    "mask=keep": cudnn(allowed=lambda n: n["keep"]),
    "scale=0.1": cudnn(scale=lambda _: 0.1),
    "return_residual=True": cudnn(residual=lambda _: True),
    "attn_scale=0.1": cudnn(scale=lambda _: 0.1),
    "use_causal_mask=True": cudnn(allowed=lambda _: KS <= QT),
    "use_causal_mask_bottom_right=True": cudnn(allowed=lambda _: KS <= ALIGNED),
    # What is 32 or more to the left is masked.
    "sliding_window_length=32 with a causal mask": cudnn(allowed=lambda _: (KS > QT - 32) & (KS <= QT)),
    "diagonal_band_right_bound=4, diagonal_band_left_bound=32": cudnn(
        allowed=lambda _: (KS > QT - 32) & (KS <= QT + 4)
    ),
    "use_padding_mask=True, seq_len_q, seq_len_kv": cudnn(allowed=within_lengths),
    "ragged offsets (THD)": cudnn(
        **{name: lambda n, name=name: n[name][0] for name in "qkv"},
        allowed=lambda _: sequences([50, 50, 28], [90, 90, 76], lambda q, k, nq, nk: True),
    ),
    "sink_token": cudnn(sinks=lambda _: [0, 1, 2, 3]),
    "generate_stats=True": cudnn(residual=lambda _: True),
    "use_deterministic_algorithm=True": cudnn(),
    "use_alibi_mask=True": cudnn(
        bias=lambda _: np.stack([-(QT - KS) * 0.25**h for h in range(1, 5)]), allowed=lambda _: KS <= QT
    ),
    "score_mod with a soft cap": cudnn(cap=lambda _: 15.0),
    "dropout": cudnn(factors=lambda _: kept(T, S, 2)),
    "paged_attention_k_table": missing("paged", "page_table"),
    "q2k_block_index, q2k_block_nums": cudnn(allowed=bsa),
    "block_sizes": lambda: bsa() & (np.repeat([64, 50, 64, 10], 64) > KS % 64),
    "k2q_block_index of the backward": lambda: np.array([[[0, 1, 0, 1, 1]]]),  # rows that visit column 0, 1, 2, 2, 3
    "create_mask_plan(mask_func)": endpoints,
    "flex_attn_func(q, k, v, plan)": cudnn(allowed=endpoints),
}

# ---- JAX's own, whose left columns run ------------------------------------------------------------------------------


def left_of_jax_nn(row: Row) -> Any:
    call = row.left[0].replace('"cudnn"', '"xla"')  # which needs a GPU, and means the same
    return evaluated("jax-nn", f"jax.nn.dot_product_attention{call}")


def left_of_splash(row: Row) -> Any:
    value = evaluated("splash-attention", row.left[0])
    if hasattr(value, "shape") and not isinstance(value, np.ndarray | jax.Array):  # one of its masks
        return np.asarray(value[(slice(None),) * len(value.shape)])
    return value


SPLASH: dict[str, Any] = {
    "residual_checkpoint_name": lambda: jax_bsk.RESIDUAL_NAMES,
    "head_shards, manual_sharding_spec": missing("head_shards", "sharding_spec"),
    "q_seq_shards": missing("q_seq_shards"),
    "mask_value": missing("mask_value"),
    "QKVLayout, BlockSizes.use_fused_bwd_kernel": missing("layout", "fused"),
    "interpret=True": lambda: evaluated("splash-attention", "reference(causal)(q, k, v)"),
}

REFERENCES = {
    "cudnn": CUDNN,
    "flash-attn": FLASH,
    "flex-attention": FLEX,
    "jax-nn": {},
    "splash-attention": SPLASH,
    "xformers": XFORMERS,
}
LEFT = {"jax-nn": left_of_jax_nn, "splash-attention": left_of_splash}
ROWS = [(name, row) for name in PAGES for row in rows_of((FOLDER / f"{name}.md").read_text())]


# ---- tests ----------------------------------------------------------------------------------------------------------


def test_every_row_has_a_reference_and_every_reference_a_row():
    assert set(REFERENCES) == set(PAGES)
    for name, references in REFERENCES.items():
        names = {row.name for row in rows_of((FOLDER / f"{name}.md").read_text())}
        assert references.keys() <= names, f"{name}: {references.keys() - names}"
        if name not in LEFT:
            assert names <= references.keys(), f"{name}: {names - references.keys()}"


def dense_of(value: Any, lengths: tuple[int, ...]) -> np.ndarray:
    block_mask = value if isinstance(value, BlockMask) else value.bind(*lengths)
    return block_mask.to_dense()


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(actual, Mask | BlockMask):
        expected = np.asarray(expected)
        actual = dense_of(actual, expected.shape[-2:])
        shape = np.broadcast_shapes(actual.shape, expected.shape)
        np.testing.assert_array_equal(np.broadcast_to(actual, shape), np.broadcast_to(expected, shape))
    elif isinstance(actual, str):
        assert expected in actual
    else:
        found, wanted = jax.tree.leaves(actual), jax.tree.leaves(expected)
        assert len(found) == len(wanted)
        for a, e in zip(found, wanted, strict=True):
            if isinstance(a, str):
                assert a == e
            else:
                assert np.shape(a) == np.shape(e)
                np.testing.assert_allclose(a, e, atol=3e-5, rtol=3e-5)


PUBLIC = [
    *inspect.signature(sparse_attention).parameters,
    *(name for module in (jax_bsk, masks, selection, jax_bsk.flax) for name in dir(module) if name[0] != "_"),
]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}: {row.name}" for name, row in ROWS])
def test_the_right_column_does_what_the_left_one_means(name, row):
    reference = REFERENCES[name].get(row.name)
    if isinstance(reference, Missing):
        assert not row.right
        there = [public for public in PUBLIC for word in reference.words if word in public.lower()]
        assert not there, f"{row.name}: {there}"
        return
    assert row.right, f"{row.name} says nothing that can run"
    if reference is None:
        reference = functools.partial(LEFT[name], row)
    assert_same(evaluated(name, row.right), reference())


@pytest.mark.parametrize("name", ["flex-attention", "splash-attention", "xformers"])
def test_attention_with_all_masks_of_a_page(name):
    """One head for each mask of the page's lengths, in one call."""
    _, rows = page(name)
    lengths = {"flex-attention": (256, 256)}.get(name, (T, S))
    found: list[tuple[Mask, np.ndarray]] = []
    for row in rows.values():
        value = evaluated(name, row.right) if row.right and "sparse_attention" not in row.right else None
        if isinstance(value, Mask) and value.heads == value.batch == 1:
            reference = REFERENCES[name].get(row.name) or functools.partial(LEFT[name], row)
            expected = np.asarray(reference())
            if expected.shape == lengths:
                found.append((value, expected))
    assert len(found) > 8
    shapes = [(1, n, len(found), 8) for n in (lengths[0], lengths[1], lengths[1])]
    q, k, v = (np.random.default_rng(i).standard_normal(shape, np.float32) for i, shape in enumerate(shapes))
    out = sparse_attention(q, k, v, mask=MultiHeadMask([mask for mask, _ in found]))
    expected = attention(q, k, v, np.stack([dense for _, dense in found]))
    np.testing.assert_allclose(out, expected, atol=3e-5)
