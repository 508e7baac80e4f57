"""Block selection: which key blocks each query block attends to, chosen from data inside `jit`, as a `BlockMask`.

And which pages of a cache the newest tokens attend to while decoding, from summaries of the pages' keys.
"""

from jax_bsk.selection._moba import moba
from jax_bsk.selection._nsa import nsa
from jax_bsk.selection._pages import moba_blocks, moba_pages, quest_blocks, quest_pages
from jax_bsk.selection._sparsek import sparsek
from jax_bsk.selection._topk import from_topk
from jax_bsk.selection._xattention import xattention
from jax_bsk.selection.summaries import (
    PageSummaries,
    summarize_blocks,
    summarize_pages,
    update_block_summaries,
    update_page_summaries,
)

__all__ = [
    "PageSummaries",
    "from_topk",
    "moba",
    "moba_blocks",
    "moba_pages",
    "nsa",
    "quest_blocks",
    "quest_pages",
    "sparsek",
    "summarize_blocks",
    "summarize_pages",
    "update_block_summaries",
    "update_page_summaries",
    "xattention",
]
