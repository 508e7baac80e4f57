"""The same program over two processes: `jax.distributed` on CPUs, with four of eight devices each."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, number = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_bsk import context, sparse_attention
from jax_bsk.masks import CausalMask, SegmentMask

assert (jax.device_count(), jax.local_device_count()) == (8, 4)
sharding = NamedSharding(jax.make_mesh((8,), ("sequence",)), P(None, "sequence"))
mask = (CausalMask() & SegmentMask(np.arange(512) // 100)).bind(512, block_size=32)
plan = context.plan(mask, 8)
rng = np.random.default_rng(0)
whole = [rng.normal(size=(1, 512, 2, 16)).astype(np.float32) for _ in range(3)]

def step(q, k, v, mask):
    def loss(q, k, v):
        out = sparse_attention(q, k, v, mask=mask, implementation="cpu")
        return (out ** 2).sum(), out
    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads

spread = [jax.make_array_from_callback(x.shape, sharding, lambda i, x=plan.dispatch(x): x[i]) for x in whole]
found = jax.jit(lambda *x: step(*x, plan.mask))(*spread)
expected = jax.jit(lambda *x: step(*x, mask))(*whole)  # on this process's first device
for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected):
    b = plan.dispatch(np.asarray(b))
    for part in a.addressable_shards:
        np.testing.assert_allclose(part.data, b[part.index], atol=2e-5)
print("devices", sorted(part.device.id for part in found[0].addressable_shards))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes():
    more = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", PROGRAM, str(free_port())]
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(
            [*command, str(number)],
            cwd=root,
            env=os.environ | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        found = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    ids = []
    for process, (out, errors) in zip(both, found, strict=True):
        assert process.returncode == 0, errors[-3000:]
        ids += re.findall(r"\d+", out.partition("devices")[2].partition("]")[0])
    assert len(set(ids)) == 8, "each process has its own half"
