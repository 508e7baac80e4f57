"""The example of context parallelism in small form: the losses of one device, on less memory each."""

from __future__ import annotations

import jax
import numpy as np

from examples import context_parallel


def test_losses_of_one_device(tmp_path):
    small = ["--length", "512", "--steps", "2", "--documents", "3", "--block-size", "32", "--output", str(tmp_path)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        one, many = context_parallel.main(small)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-4)
    assert many.losses[1] < many.losses[0]
    assert many.bytes_per_device < one.bytes_per_device / 2
    assert (tmp_path / "who_computes_what.png").stat().st_size > 1000
