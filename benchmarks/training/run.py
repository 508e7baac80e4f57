"""One contender's run in this process: compiles the step, takes a few, and says what they cost."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_bsk.qa.support import environment

from .attentions import ATTENTIONS
from .config import Config
from .model import Decoder
from .step import optimizer_of, step_of


def run(name: str, config: Config) -> dict[str, Any]:
    """The record of one contender, ready for JSON."""
    attention = ATTENTIONS[name]
    graph, parameters = nnx.split(Decoder(config, attention.attend, nnx.Rngs(config.seed)))
    take = step_of(graph, config)

    def step(parameters: Any, state: Any, tokens: jax.Array, operand: Any) -> tuple[Any, Any, jax.Array]:
        return take(parameters, state, tokens[:, :-1], tokens[:, 1:], operand)

    started = time.perf_counter()
    operand = attention.operand(config)
    mask_seconds = time.perf_counter() - started
    operand = jax.device_put(operand)
    state = jax.jit(optimizer_of(config).init)(parameters)
    batches = config.batches()

    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(parameters, state, jax.device_put(batches[0]), operand)
    compiled = compiled.compile()
    compile_seconds = time.perf_counter() - started

    losses, seconds = [], []
    for tokens in batches:
        tokens = jax.block_until_ready(jax.device_put(tokens))
        started = time.perf_counter()
        parameters, state, loss = jax.block_until_ready(compiled(parameters, state, tokens, operand))
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    samples = seconds[config.warm_up :]
    return {
        "what": attention.what,
        "masked": attention.masked,
        "ran": _what_ran(name, compiled.as_text() or ""),
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(parameters)),
        "seconds": statistics.median(samples),
        "least_seconds": min(samples),
        "samples": samples,
        "tokens_per_second": config.batch * config.length / statistics.median(samples),
        "compile_seconds": compile_seconds,
        "mask_seconds": mask_seconds,
        "program_bytes": _program_bytes(compiled.memory_analysis()),
        "peak_bytes": _peak_bytes(),
        "losses": losses,
        "versions": environment.versions(),
        "devices": environment.devices(),
    }


def _what_ran(name: str, program: str) -> str:
    """Of jax_bsk whether its kernels are in the compiled program: without them the figures are another's."""
    if name != "jax_bsk":
        return "jax.nn.dot_product_attention"
    return "kernels" if "jax_bsk_attention_backward" in program else "xla"


def _program_bytes(memory: Any) -> dict[str, int] | None:
    """What XLA says that the step needs; outputs that reuse donated arguments count once in the total."""
    if memory is None:
        return None
    parts = {part: int(getattr(memory, f"{part}_size_in_bytes")) for part in ("argument", "output", "alias", "temp")}
    return parts | {"total": parts["argument"] + parts["output"] - parts["alias"] + parts["temp"]}


def _peak_bytes() -> int:
    """Peak bytes in use on the GPU since this process began; on a CPU those of the process."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
