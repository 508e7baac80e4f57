"""Progress of a long command on standard error: a tqdm bar where it is installed, else a plain line a step."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

# A bar is drawn again so often while one step lasts, so that its clock moves.
REDRAW_SECONDS = 1.0
# Without a bar, what happens within a step is told at most so often.
NOTE_SECONDS = 10.0

Note = Callable[[str], None]  # `Progress.note`


def unheard(what: str) -> None:
    """A `Note` that says nothing."""


class Progress:
    """Counts steps; use it in a `with` statement and call `step(what is done next)` before each."""

    def __init__(self, total: int, quiet: bool = False):
        self._total, self._done, self._start, self._quiet = total, 0, time.perf_counter(), quiet
        self._what, self._told = "", self._start
        self._bar = None
        self._closed = threading.Event()
        if sys.stderr.isatty() and not quiet:
            try:
                from tqdm import tqdm
            except ImportError:
                return  # the plain lines below serve
            self._bar = tqdm(total=total, leave=False, dynamic_ncols=True)
            threading.Thread(target=self._redraw, daemon=True).start()

    @property
    def done(self) -> int:
        """Steps begun."""
        return self._done

    def step(self, what: str) -> None:
        """Begins the next step."""
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)  # what was begun before is done now
        self._done += 1
        self._what = what
        self._tell(what)

    def note(self, what: str) -> None:
        """Says what is done within the step: at once on a bar, without one in a line at most every `NOTE_SECONDS`."""
        if self._bar is not None or time.perf_counter() - self._told >= NOTE_SECONDS:
            self._tell(f"{self._what}: {what}")

    def _tell(self, text: str) -> None:
        self._told = time.perf_counter()
        if self._bar is not None:
            self._bar.set_description(text)
        elif not self._quiet:
            elapsed = self._told - self._start
            print(f"[{self._done}/{self._total}, {elapsed:.0f} s] {text}", file=sys.stderr, flush=True)

    def _redraw(self) -> None:
        while not self._closed.wait(REDRAW_SECONDS):
            assert self._bar is not None
            self._bar.refresh()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._closed.set()
        if self._bar is not None:
            self._bar.close()
