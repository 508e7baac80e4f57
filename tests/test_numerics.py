"""The numeric battery: every implementation that runs here against float64, by the tolerance rule of `testing`.

`pytest tests/test_numerics.py --cases 2000 --seed 1000` runs more; a failure prints the command that repeats it.
"""

from __future__ import annotations

import jax
import pytest

from jax_bsk.qa.testing import battery, cases


def run(case, implementation):
    with jax.numpy_dtype_promotion("standard"):
        battery.run_case(
            case, battery.from_public(implementation), command=f"--implementation {implementation} --max-len 400"
        )


@pytest.mark.parametrize("name", cases.CORNER_CASES)
def test_corner(name, implementation):
    run(cases.CORNER_CASES[name], implementation)


def test_random(random_seed, implementation):
    # The native kernel sees every seed; the slower "xla", which has its own tests, every fourth.
    if implementation == "xla" and random_seed % 4:
        pytest.skip("every fourth seed")
    run(cases.random_case(random_seed, max_len=400), implementation)
