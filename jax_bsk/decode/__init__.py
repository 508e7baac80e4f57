"""Decoding and serving: attention over caches in pages and contiguous caches, their updates, and a pool of pages."""

from jax_bsk.decode.cache import append, attention
from jax_bsk.decode.merge import merge_partials
from jax_bsk.decode.pool import PagePool, PagesExhausted
from jax_bsk.decode.ragged import append_pages, ragged_paged_attention

__all__ = [
    "PagePool",
    "PagesExhausted",
    "append",
    "append_pages",
    "attention",
    "merge_partials",
    "ragged_paged_attention",
]
