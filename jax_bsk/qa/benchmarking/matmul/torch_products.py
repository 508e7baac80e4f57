"""PyTorch: its BSR tensors (Triton kernels) and cuSPARSE with CSR, on the same numbers as JAX's.

Products from the right and with the transposed matrix take W^T, stored beforehand: PyTorch's own linear layer keeps its
weight so. Short chains of the BSR product are captured in a CUDA graph, as JAX's are in a jit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_bsk import BSR
from jax_bsk.qa.benchmarking.attention.peers.torch_peers import Wait, from_jax
from jax_bsk.qa.benchmarking.contender import Contender, Refused, first_line, need, need_gpu, need_memory
from jax_bsk.qa.benchmarking.matmul.cases import Case, Operation
from jax_bsk.qa.benchmarking.matmul.operands import Operands
from jax_bsk.qa.benchmarking.matmul.references import Spots

DEVICE = "cuda"
# (columns of a tile, warps, stages) that the tuned contender tries. PyTorch has options of its own for the A100 alone,
# elsewhere a tile is as wide as a block, of 4 warps, and loads nothing ahead of its products.
TILES = ((64, 4, 4), (128, 4, 3), (128, 8, 3), (256, 8, 3))

Step = Callable[[Any], Any]  # the operand that moves -> the result


def bsr(case: Case, operands: Operands) -> Contender:
    """`torch.sparse._triton_ops`, which `@` of a BSR tensor runs, with its default options."""
    torch = _torch()
    ops = need("torch.sparse._triton_ops")
    multiply, sample = getattr(ops, "bsr_dense_mm", None), getattr(ops, "sampled_addmm", None)
    if multiply is None or sample is None:
        raise Refused("PyTorch has its BSR kernels only where triton is installed")
    x, moving = _dense(torch, operands, "x"), _dense(torch, operands, _moving(case.operation))
    if case.operation is Operation.DATA_GRADIENT:
        w = _bsr(torch, operands, transposed=False)
        return _contender(torch, case, lambda dy: sample(w, dy, x.mT, beta=0.0, alpha=1.0), moving, "BSR, Triton")
    w = _bsr(torch, operands, transposed=case.operation is not Operation.FORWARD)
    return _contender(torch, case, _product(case.operation, w, multiply), moving, "BSR, Triton")


def bsr_tuned(case: Case, operands: Operands) -> Contender:
    """The same kernel with the best of `TILES` for the case; each is compiled for each size."""
    torch = _torch()
    multiply = getattr(need("torch.sparse._triton_ops"), "bsr_dense_addmm", None)
    if multiply is None or not need("torch.utils._triton").has_triton():
        raise Refused("PyTorch has its BSR kernels only where triton is installed")
    if case.operation is Operation.DATA_GRADIENT:
        raise Refused("its sampled product has no options to tune")
    moving = _dense(torch, operands, _moving(case.operation))
    w = _bsr(torch, operands, transposed=case.operation is not Operation.FORWARD)
    wait = Wait(torch)

    def step_of(width: int, warps: int, stages: int) -> Step:
        options = {"GROUP_SIZE_ROW": 4, "num_warps": warps, "num_stages": stages}

        def product(w: Any, dense: Any) -> Any:
            out = dense.new_empty((w.shape[0], dense.shape[1]))
            meta = options | {"SPLIT_N": max(1, dense.shape[1] // width)}
            return multiply(out, w, dense, alpha=1, beta=0, out=out, meta=meta)

        return _product(case.operation, w, product)

    times: dict[tuple[int, int, int], float] = {}
    reason = ""
    for tile in TILES:
        try:
            step = step_of(*tile)
            step(moving)
            wait.block_until_ready()
            start = time.perf_counter()
            for _ in range(3):
                step(moving)
            wait.block_until_ready()
            times[tile] = time.perf_counter() - start
        except Exception as error:  # more shared memory than there is, say
            reason = first_line(error)
    if not times:
        raise Refused(f"none of its tiles runs: {reason}")
    width, warps, stages = best = min(times, key=lambda tile: times[tile])
    variant = f"BSR, Triton, {width} columns, {warps} warps, {stages} stages"
    return _contender(torch, case, step_of(*best), moving, variant)


def csr(case: Case, operands: Operands) -> Contender:
    """cuSPARSE, an index for each number, as `@` of a CSR tensor runs it."""
    torch = _torch()
    x, moving = _dense(torch, operands, "x"), _dense(torch, operands, _moving(case.operation))
    transposed = case.operation in (Operation.LAYER, Operation.DENSE_GRADIENT)
    w = _csr(torch, operands, transposed=transposed)
    if case.operation is Operation.DATA_GRADIENT:
        sample = torch.sparse.sampled_addmm
        step: Step = lambda dy: sample(w, dy, x.mT, beta=0.0, alpha=1.0)  # noqa: E731
    else:
        step = _product(case.operation, w, lambda w, dense: w @ dense)
    return _contender(torch, case, step, moving, "CSR, cuSPARSE", chained=False)


def _torch() -> Any:
    need_gpu()
    torch = need("torch")
    if not torch.cuda.is_available():
        raise Refused("PyTorch sees no GPU; this build of it may have none")
    torch.set_grad_enabled(False)
    return torch


def _moving(operation: Operation) -> str:
    return "x" if operation in (Operation.FORWARD, Operation.LAYER) else "dy"


def _product(operation: Operation, w: Any, multiply: Callable[[Any, Any], Any]) -> Step:
    """W X, W^T dY, or (W^T X^T)^T = X W; all but the first are given W^T."""
    if operation is Operation.LAYER:
        return lambda x: multiply(w, x.mT).mT
    return lambda dense: multiply(w, dense)


# ---- The operands as tensors, made once for all operations of a config


def _cached(operands: Operands, key: str, make: Callable[[], Any]) -> Any:
    if key not in operands.copies:
        operands.copies[key] = make()
    return operands.copies[key]


def _dense(torch: Any, operands: Operands, name: str) -> Any:
    return _cached(operands, f"torch {name}", lambda: from_jax(torch, getattr(operands, name), DEVICE))


def _bsr(torch: Any, operands: Operands, transposed: bool) -> Any:
    def make() -> Any:
        matrix: BSR = operands.host.T if transposed else operands.host
        indptr, indices = (torch.from_numpy(np.array(x)).to(DEVICE) for x in (matrix.indptr, matrix.indices))
        # jax_bsk's array may go once this returns; a tensor's memory is its own.
        values = from_jax(torch, matrix.data.block_until_ready(), DEVICE).clone()
        torch.cuda.synchronize()
        return torch.sparse_bsr_tensor(indptr, indices, values, size=matrix.shape, check_invariants=False)

    return _cached(operands, f"torch bsr {transposed}", make)


def _csr(torch: Any, operands: Operands, transposed: bool) -> Any:
    def make() -> Any:
        need_memory(operands.matrix.data.size * 40, "an index for each number")  # while it is made
        dense = from_jax(torch, operands.dense, DEVICE)
        made = (dense.mT if transposed else dense).contiguous().to_sparse_csr()
        # Indices of 32 bits: less to read, and cuSPARSE knows them for every type.
        parts = (made.crow_indices().int(), made.col_indices().int(), made.values())
        return torch.sparse_csr_tensor(*parts, size=tuple(made.shape), check_invariants=False)

    return _cached(operands, f"torch csr {transposed}", make)


# ---- Running them


def _contender(torch: Any, case: Case, step: Step, moving: Any, variant: str, chained: bool = True) -> Contender:
    wait = Wait(torch)
    step(moving)  # compiles and picks kernels
    wait.block_until_ready()
    calls, replay = 1, None
    if chained and case.calls > 1:
        try:
            replay = _graph(torch, step, moving, case.calls)
            calls = case.calls
        except Exception as error:  # it runs all the same, a call at a time
            torch.cuda.synchronize()
            variant += f", not captured in a graph ({first_line(error)})"

    def dispatch(i: int) -> Wait:
        if replay is None:
            step(moving)
        else:
            replay()
        return wait

    def once() -> tuple[Any, ...]:
        result = step(moving)
        wait.block_until_ready()
        return (result,)

    return Contender(once, _pick, dispatch, calls, variant)


def _graph(torch: Any, step: Step, moving: Any, calls: int) -> Callable[[], None]:
    """Replays a CUDA graph of so many calls, each fed by the one before."""

    def chain(count: int) -> Any:
        result = moving
        for _ in range(count):
            result = step(result)
        return result

    # Off the default stream, as a capture asks for; twice, as a result may be strided unlike the first operand.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain(2)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: JAX has threads of its own in this process.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        result = chain(calls)

    def replay(result: Any = result) -> None:  # the graph's memory lives as long as its result
        graph.replay()

    return replay


def _pick(result: Any, spots: Spots) -> tuple[np.ndarray, bool]:
    torch = need("torch")
    numbers = result if result.layout is torch.strided else result.values()
    finite = bool(torch.isfinite(numbers).all())
    rows, columns = (torch.from_numpy(x).to(numbers.device) for x in (spots.rows, spots.columns))
    if result.layout is torch.sparse_bsr:
        dense = _dense_of_bsr(torch, result)
    else:
        dense = result if result.layout is torch.strided else result.to_dense()
    return dense[rows][:, columns].double().cpu().numpy(), finite


def _dense_of_bsr(torch: Any, matrix: Any) -> Any:
    values, offsets = matrix.values(), matrix.crow_indices().long()
    _, bm, bk = values.shape
    m, k = matrix.shape
    rows = torch.repeat_interleave(torch.arange(m // bm, device=values.device), offsets.diff())
    blocks = values.new_zeros((m // bm, k // bk, bm, bk))
    blocks[rows, matrix.col_indices().long()] = values
    return blocks.permute(0, 2, 1, 3).reshape(m, k)
