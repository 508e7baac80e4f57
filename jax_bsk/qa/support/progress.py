"""Progress of a long command on standard error: a tqdm bar where it is installed, else a plain line a step."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Counts steps; use it in a `with` statement and call `step(what is done next)` before each."""

    def __init__(self, total: int, quiet: bool = False):
        self._total, self._done, self._start, self._quiet = total, 0, time.perf_counter(), quiet
        self._bar = None
        if sys.stderr.isatty() and not quiet:
            try:
                from tqdm import tqdm
            except ImportError:
                return  # the plain lines below serve
            self._bar = tqdm(total=total, leave=False, dynamic_ncols=True)

    @property
    def done(self) -> int:
        """Steps begun."""
        return self._done

    def step(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)  # what was begun before is done now
            self._bar.set_description(what)
        elif not self._quiet:
            elapsed = time.perf_counter() - self._start
            print(f"[{self._done + 1}/{self._total}, {elapsed:.0f} s] {what}", file=sys.stderr, flush=True)
        self._done += 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.close()
