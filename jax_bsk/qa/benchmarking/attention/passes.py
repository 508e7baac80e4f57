"""The passes that are measured, and how the function of a JAX contender becomes each of them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jax_bsk import flops
from jax_bsk.qa.benchmarking.attention.spots import pick
from jax_bsk.qa.benchmarking.contender import Contender

if TYPE_CHECKING:
    from jax_bsk.qa.benchmarking.attention.cases import Case, Pattern
    from jax_bsk.qa.benchmarking.attention.inputs import Inputs

Attention = Callable[..., jax.Array]  # (query, key, value, operand) -> out, all [B, S, H, D]
GRADIENTS = ("dquery", "dkey", "dvalue")


class Pass(enum.Enum):
    """One pass of attention; the value is its name on the command line and in file names."""

    FORWARD = "forward"
    BACKWARD = "backward"  # the gradients alone, given what the forward kept for them
    TRAINING = "training"  # both

    def flops_of(self, pairs: float, head_dim: int) -> float:
        """Useful operations for a number of attended pairs of a query and a key."""
        forward, backward = flops.of_pairs(pairs, head_dim, head_dim)
        return {Pass.FORWARD: forward, Pass.BACKWARD: backward, Pass.TRAINING: forward + backward}[self]

    @property
    def results(self) -> tuple[str, ...]:
        """What one call yields, in its order."""
        return {Pass.FORWARD: ("out",), Pass.BACKWARD: GRADIENTS, Pass.TRAINING: ("out", *GRADIENTS)}[self]

    @property
    def title(self) -> str:
        """As a heading."""
        return "forward and backward" if self is Pass.TRAINING else self.value


def of_jax(
    case: Case,
    inputs: Inputs,
    attention: Attention,
    operand: Any = None,
    *,
    variant: str,
    pattern: Pattern | None = None,
    calls: int | None = None,
    ahead: bool = False,
) -> Contender:
    """A contender of a JAX function, in the pass that the case measures.

    Args:
      case: what is measured.
      inputs: its tensors.
      attention: function of (query, key, value, operand); differentiable unless the pass is the forward.
      operand: argument of the jit, whatever the mask is made of.
      variant: as in `Contender`.
      pattern: what it computes, where that is not the case's.
      calls: number of calls chained in one jit, the case's by default. They are unrolled: a loop costs 11 us a turn.
        Each call needs the one before it, so none is dropped and no two overlap.
      ahead: whether it is compiled before the first call, which tells how much scratch memory it takes.
    """
    calls = case.calls if calls is None else calls
    make = {Pass.FORWARD: _forward, Pass.BACKWARD: _backward, Pass.TRAINING: _training}[case.measured]
    step, chain, arguments = make(attention, inputs.of(case.measured), operand, calls)
    once: Any = jax.jit(step)
    temp_bytes = None
    if ahead:
        once = once.lower(*arguments).compile()
        analysis = once.memory_analysis()
        temp_bytes = None if analysis is None else int(analysis.temp_size_in_bytes)
    many = once if calls == 1 else jax.jit(chain)
    return Contender(
        once=lambda: jax.block_until_ready(once(*arguments)),
        pick=pick,
        dispatch=lambda i: many(*arguments),
        calls=calls,
        variant=variant,
        instead=pattern,
        temp_bytes=temp_bytes,
    )


# Each gives (one call, the chained calls, the arguments of both).
_Made = tuple[Callable[..., tuple[Any, ...]], Callable[..., Any], tuple[Any, ...]]


def _forward(attention: Attention, arrays: tuple[jax.Array, ...], operand: Any, calls: int) -> _Made:
    def step(query, key, value, operand):
        return (attention(query, key, value, operand),)

    def chain(query, key, value, operand):
        for _ in range(calls):
            query = attention(query, key, value, operand)
        return query

    return step, chain, (*arrays, operand)


def _backward(attention: Attention, arrays: tuple[jax.Array, ...], operand: Any, calls: int) -> _Made:
    *inputs, cotangent = arrays

    @jax.jit
    def forward(query, key, value, operand):
        return jax.vjp(lambda *x: attention(*x, operand), query, key, value)[1]

    # A vjp function is a tree of residuals. Its leaves are the argument and its structure is closed over: as an
    # argument the structure, jaxprs, would be hashed in every call.
    residuals, tree = jax.tree.flatten(forward(*inputs, operand))

    def backward(residuals, cotangent):
        return jax.tree.unflatten(tree, residuals)(cotangent)

    def chain(residuals, cotangent):
        others = []  # returned, or the compiler may leave out what makes them
        for _ in range(calls):
            cotangent, *rest = backward(residuals, cotangent)
            others += rest
        return cotangent, others

    return backward, chain, (residuals, cotangent)


def _training(attention: Attention, arrays: tuple[jax.Array, ...], operand: Any, calls: int) -> _Made:
    def step(query, key, value, cotangent, operand):
        out, backward = jax.vjp(lambda *x: attention(*x, operand), query, key, value)
        return out, *backward(cotangent)

    def chain(query, key, value, cotangent, operand):
        others = []
        for _ in range(calls):
            out, query, *rest = step(query, key, value, cotangent, operand)
            others += [out, *rest]
        return query, others

    return step, chain, (*arrays, operand)
