"""Confines CUDA kernels to a few multiprocessors, so that small cases walk long sequences of tiles.

Most of the batteries' shapes have fewer tiles than an H200 has multiprocessors: a CTA then takes one tile, no ring
wraps, and what goes wrong between tiles is not seen. On one multiprocessor every persistent loop is run to its end.
For tests alone; `csrc/grid_limit.h` is the other half.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

LIMITS = (1, 2, 3, 7)


@contextlib.contextmanager
def limited(multiprocessors: int) -> Iterator[None]:
    """Launches from this process use at most so many multiprocessors.

    Results are to be waited for inside: the limit is that of the moment of a launch. A program that XLA has captured as
    a CUDA graph keeps the grid of its first launch; start Python with `XLA_FLAGS=--xla_gpu_enable_command_buffer=` to
    have none.

    Raises:
      ModuleNotFoundError: jax_bsk was built without its CUDA library.
    """
    library = importlib.import_module("jax_bsk._cuda")
    library.limit_grid(multiprocessors)
    try:
        yield
    finally:
        library.limit_grid(0)
