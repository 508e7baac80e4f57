"""Tasks in processes of their own: what crashes, hangs, or dies on its way out is told apart and blamed alone.

A `Worker` is the client of `jax_bsk.qa.testing.worker`, which says what tasks there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def child_environment(implementation: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a process that shares the machine, perhaps its GPU, with this one."""
    chosen = {"JAX_PLATFORMS": "cpu"} if implementation == "cpu" else {}
    # A process that has not asked for all memory leaves some to the others.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **chosen, **(extra or {})}


class Worker:
    """A process that is begun on need, and again after it died."""

    def __init__(
        self,
        implementation: str,
        seconds: float,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
    ):
        """Starts nothing yet.

        Args:
          implementation: "xla", "cpu" or "cuda".
          seconds: time without an answer after which it counts as hung.
          environment: variables beside those of `child_environment`.
          command: what is run; the worker by default.
        """
        self._seconds = seconds
        self._environment = child_environment(implementation, environment)
        self._command = command or [sys.executable, "-m", "jax_bsk.qa.testing.worker", implementation]
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def ask(self, task: str, *words: str) -> Iterator[dict[str, Any]]:
        """The records of a task; where the process died or hung the last one has "ok": False and says so in "text"."""
        process = self._process or self._start()
        line: str | None = ""
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.write(" ".join((task, *words)) + "\n")
            process.stdin.flush()
            while line := self._answer(process):
                record = json.loads(line)
                if record is None:
                    return
                yield record
        hung = f"it does not end (limit {self._seconds:g} s)" if line is None else ""
        status, messages = self._end()
        died = f"its process crashed: {signal.Signals(-status).name}" if status < 0 else ""
        text = hung or died or f"its process ended early with status {status}"
        yield {"task": task, "ok": False, "text": text + messages}

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
        )
        return self._process

    def _answer(self, process: subprocess.Popen[str]) -> str | None:
        """The next line; empty where the process died, None where it hung and was killed."""
        hung = threading.Event()

        def kill() -> None:
            hung.set()
            process.kill()

        watchdog = threading.Timer(self._seconds, kill)
        watchdog.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        return line or (None if hung.is_set() else "")

    def close(self) -> str:
        """Gives it no more tasks, and waits for its end; what is wrong with how it ended, if anything is."""
        if self._process is None:
            return ""
        status, messages = self._end()
        return f"its process ended with status {status} after its last task{messages}" if status else ""

    def _end(self) -> tuple[int, str]:
        """The exit status, and the end of its messages; killed if it does not end by itself."""
        process, self._process = self._process, None
        assert process is not None
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()
        try:
            status = process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        with self._errors as errors:
            errors.seek(0)
            messages = errors.read()[-2000:].strip()
        return status, f"; {messages}" if messages else ""
