"""PyTorch: FlexAttention, compiled, with a block mask of the same blocks; and SDPA, causal and dense.

Tensors are the same numbers laid out (B, H, S, D). Short calls are chained in a CUDA graph as JAX's are in a jit.
The gradients alone are taken again and again of one graph of autograd, which is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_bsk.qa.benchmarking.attention.cases import DENSE, Case
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.benchmarking.attention.spots import Spots
from jax_bsk.qa.benchmarking.contender import Contender, Refused, need, need_gpu

_SDPA = {"sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION"}


def names(case: Case) -> tuple[str, ...]:
    """SDPA without the mask, like cuDNN, where calls are short."""
    return ("flex", *(f"{name} unmasked" if case.calls > 1 else name for name in _SDPA))


def make(name: str, case: Case, inputs: Inputs) -> Contender:
    """The contender of that name."""
    need_gpu()
    return contender(name, case, inputs, "cuda")


def contender(name: str, case: Case, inputs: Inputs, device: str) -> Contender:
    """The same on a named device."""
    torch = need("torch")
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("PyTorch sees no GPU; this build of it may have none")
    unmasked = name.endswith(" unmasked")
    base = name.removesuffix(" unmasked")
    if base in _SDPA and not unmasked and case.pattern.kind not in ("causal", "dense"):
        raise Refused("SDPA has no such pattern of its own")
    with_gradients = case.measured is not Pass.FORWARD
    torch.set_grad_enabled(with_gradients)
    if "torch" not in inputs.copies:
        inputs.copies["torch"] = [_tensor(torch, x, device) for x in inputs.of(case.measured)]
    tensors = inputs.copies["torch"]
    for tensor in tensors[:3]:
        tensor.requires_grad_(with_gradients)

    if base == "flex":
        attention, variant = _flex(torch, case, device)
    else:
        causal = case.pattern.kind == "causal" and not unmasked
        attention = _sdpa(torch, _SDPA[base], causal=causal, grouped=case.group > 1)
        variant = "unmasked" if unmasked else "native"
    wait = Wait(torch if device == "cuda" else None)
    if case.calls == 1:
        step = _step(torch, case.measured, attention, tensors)

        def single(i: int) -> Wait:
            step()
            return wait

        dispatch = single
    else:
        step, dispatch = _chained(torch, case.measured, attention, tensors, case.calls, device, wait)

    def once() -> tuple[Any, ...]:
        results = step()
        wait.block_until_ready()
        return results

    return Contender(once, _rows, dispatch, case.calls, variant, DENSE if unmasked else None)


def _step(
    torch: Any, measured: Pass, attention: Callable[..., Any], tensors: list[Any]
) -> Callable[..., tuple[Any, ...]]:
    """One call of a pass, `Pass.results`; what it is given takes the place of the query (backward: the cotangent)."""
    inputs, cotangents = tensors[:3], tensors[3:]

    def forward(query: Any = inputs[0]) -> tuple[Any, ...]:
        return (attention(query, *inputs[1:]),)

    def training(query: Any = inputs[0]) -> tuple[Any, ...]:
        wanted = query, *inputs[1:]
        out = attention(*wanted)
        return out.detach(), *torch.autograd.grad(out, wanted, cotangents[0])

    if measured is not Pass.BACKWARD:
        return training if measured is Pass.TRAINING else forward
    out = attention(*inputs)

    def backward(cotangent: Any = cotangents[0]) -> tuple[Any, ...]:
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=True)

    return backward


class Wait:
    """What a dispatch returns; `jax.block_until_ready` waits for it, so that one clock times both frameworks."""

    def __init__(self, torch: Any):
        self._torch = torch

    def block_until_ready(self) -> Wait:
        if self._torch is not None:
            self._torch.cuda.synchronize()
        return self


def from_jax(torch: Any, x: jax.Array, device: str) -> Any:
    """The same numbers as a tensor, where the two understand each other without a copy."""
    try:
        return torch.from_dlpack(x)
    except (BufferError, NotImplementedError, RuntimeError, TypeError):
        # Versions of the two that do not understand each other's capsules: by way of the host, slow but certain.
        host = np.array(x)
        bits = torch.from_numpy(host.view(np.int16) if host.itemsize == 2 else host).to(device)
        return bits.view(getattr(torch, x.dtype.name))


def _tensor(torch: Any, x: jax.Array, device: str) -> Any:
    """[B, S, H, D] of JAX as a contiguous (B, H, S, D) tensor of its own."""
    copy = from_jax(torch, x, device).transpose(1, 2).contiguous()
    if device == "cuda":
        torch.cuda.synchronize()  # JAX may free x once we return
    return copy


def _rows(out: Any, spots: Spots) -> tuple[np.ndarray, bool]:
    torch = need("torch")
    examples, heads, rows = (torch.from_numpy(x).to(out.device) for x in (spots.examples, spots.heads, spots.rows))
    picked = out[examples[:, None], heads[:, None], rows]
    return picked.double().cpu().numpy(), bool(torch.isfinite(out).all())


def _chained(
    torch: Any,
    measured: Pass,
    attention: Callable[..., Any],
    tensors: list[Any],
    calls: int,
    device: str,
    wait: Wait,
) -> tuple[Callable[..., tuple[Any, ...]], Callable[[int], Wait]]:
    """The step, and replays of a CUDA graph of so many, each made of the one before."""
    fed = measured.results.index("out" if measured is Pass.FORWARD else "dquery")  # what the next is made of

    def chain(step: Callable[..., tuple[Any, ...]], count: int) -> tuple[Any, ...]:
        results = step()
        for _ in range(count - 1):
            results = step(results[fed].detach().requires_grad_(measured is Pass.TRAINING))
        return results

    if device != "cuda":
        step = _step(torch, measured, attention, tensors)

        def run(i: int) -> Wait:
            chain(step, calls)
            return wait

        return step, run

    # Compiles and picks kernels off the default stream, as a capture asks for; twice chained, since an output may be
    # strided unlike the query and then compiles once more. The step is made there too: autograd runs a backward on the
    # stream of its forward, which must be the one that is captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step = _step(torch, measured, attention, tensors)
        chain(step, 3)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: JAX has threads of its own in this process.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        results = chain(step, calls)

    def replay(i: int, results: Any = results) -> Wait:
        graph.replay()
        return wait

    return step, replay


def _sdpa(torch: Any, backend: str, causal: bool, grouped: bool) -> Callable[..., Any]:
    attention = need("torch.nn.attention")
    chosen = getattr(attention.SDPBackend, backend)

    def run(query: Any, key: Any, value: Any) -> Any:
        with attention.sdpa_kernel(chosen):  # this one or an error, never another
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=grouped
            )

    return run


@functools.cache
def _compiled_flex() -> Any:
    """`flex_attention` compiled, a kernel a shape and kind of mask."""
    torch = need("torch")
    config = need("torch._dynamo").config
    if hasattr(config, "recompile_limit"):
        # The grid has more shapes than the limit of 8, beyond which it would run uncompiled, with S^2 numbers.
        config.recompile_limit = 256
    functorch = need("torch._functorch.config")
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False  # a backward that may reuse what the forward kept runs only once a graph
    flex = need("torch.nn.attention.flex_attention")
    return torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)


def _flex(torch: Any, case: Case, device: str) -> tuple[Callable[..., Any], str]:
    if case.traced:
        raise Refused("its block mask is built outside; see the row with the mask prebuilt")
    flex = need("torch.nn.attention.flex_attention")
    compiled = _compiled_flex()
    size, pattern = case.block_size, case.pattern
    # Its tiles must divide the blocks, and by default they are of 128 queries.
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if size < 128 and device == "cuda" else None
    if pattern.kind in ("random", "dense"):
        count = case.length // size
        blocks = np.ones((count, count), bool) if pattern.blocks is None else pattern.blocks
        mask = _from_blocks(torch, flex, blocks, size, device)
        variant = "block lists"
    else:
        batch = None
        if pattern.kind == "causal":
            mask_mod = _causal
        elif pattern.kind == "window":
            mask_mod = _window_mod(pattern.window)
        else:
            ids = torch.from_numpy(np.tile(np.asarray(pattern.ids), (case.batch, 1))).to(device)
            mask_mod, batch = _documents_mod(ids), case.batch
        mask = flex.create_block_mask(mask_mod, batch, None, case.length, case.length, device=device, BLOCK_SIZE=size)
        variant = "mask function, block mask prebuilt"

    def run(query: Any, key: Any, value: Any) -> Any:
        return compiled(query, key, value, block_mask=mask, kernel_options=options, enable_gqa=case.group > 1)

    return run, variant


def _from_blocks(torch: Any, flex: Any, blocks: np.ndarray, size: int, device: str) -> Any:
    """A block mask whose blocks are all full, so that no element of them is masked."""

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x, np.int32)[None, None]).to(device)

    counts = blocks.sum(1)
    ids = np.argsort(~blocks, axis=1, kind="stable")  # a row's visited blocks first, ascending
    return flex.BlockMask.from_kv_blocks(
        tensor(np.zeros_like(counts)), tensor(np.zeros_like(ids)), tensor(counts), tensor(ids), BLOCK_SIZE=size
    )


def _causal(batch: Any, head: Any, q: Any, kv: Any) -> Any:
    return kv <= q


@functools.cache  # one function object a window: another one would compile again
def _window_mod(window: int) -> Callable[..., Any]:
    def windowed(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (q - kv <= window)

    return windowed


def _documents_mod(ids: Any) -> Callable[..., Any]:
    def documents(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (ids[batch, q] == ids[batch, kv])

    return documents
