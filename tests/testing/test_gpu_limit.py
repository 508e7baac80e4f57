"""A GPU test that does not end says so and ends its process: with one that sleeps, as there need be no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_does_not_end_says_so(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a limit\n")
    (tmp_path / "test_sleep.py").write_text(
        "import time, pytest\nfrom tests.conftest import gpu_limit\n\n"
        "@pytest.mark.gpu(seconds=1)\ndef test_sleeps():\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert result.returncode == 4
    assert "test_sleeps does not end (limit 1 s)" in result.stderr
