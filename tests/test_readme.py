"""The README's code runs, in order, in one session, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np

import jax_bsk

README = Path(jax_bsk.__file__).parents[1] / "README.md"


def test_the_examples_run():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(block, names)
            assert np.isfinite(np.asarray(names.get("out", 0.0))).all(), block


def test_the_files_it_points_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
