"""The passes that the benchmark measures, and how the function of a JAX contender becomes each of them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax

from jax_bsk import flops

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


@dataclasses.dataclass(frozen=True)
class Program:
    """The pass as jitted functions with their arguments.

    Attributes:
      once: one call; `Pass.results`.
      dispatch: queues the chained calls and returns arrays of the last.
    """

    once: Callable[[], tuple[jax.Array, ...]]
    dispatch: Callable[[], Any]


def program(which: Pass, attention: Attention, arrays: tuple[jax.Array, ...], operand: Any, calls: int) -> Program:
    """The pass of an attention.

    Args:
      attention: differentiable unless the pass is the forward.
      arrays: query, key, value and the cotangent of the output, which the forward leaves out.
      operand: the attention's last argument, an argument of the jit.
      calls: calls chained in one jit, unrolled: a loop costs 11 us a turn. Each call needs the one before it, so none
        is dropped and no two overlap.
    """
    return {Pass.FORWARD: _forward, Pass.BACKWARD: _backward, Pass.TRAINING: _training}[which](
        attention, arrays, operand, calls
    )


def _forward(attention: Attention, arrays: tuple[jax.Array, ...], operand: Any, calls: int) -> Program:
    once = jax.jit(attention)

    def chain(query, key, value, operand):
        for _ in range(calls):
            query = attention(query, key, value, operand)
        return query

    many = once if calls == 1 else jax.jit(chain)
    return Program(lambda: (once(*arrays, operand),), lambda: many(*arrays, operand))


def _backward(attention: Attention, arrays: tuple[jax.Array, ...], operand: Any, calls: int) -> Program:
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

    once = jax.jit(backward)
    many = once if calls == 1 else jax.jit(chain)
    return Program(lambda: once(residuals, cotangent), lambda: many(residuals, cotangent))


def _training(attention: Attention, arrays: tuple[jax.Array, ...], operand: Any, calls: int) -> Program:
    def step(query, key, value, cotangent, operand):
        out, backward = jax.vjp(lambda *x: attention(*x, operand), query, key, value)
        return out, *backward(cotangent)

    def chain(query, key, value, cotangent, operand):
        others = []
        for _ in range(calls):
            out, query, *rest = step(query, key, value, cotangent, operand)
            others += [out, *rest]
        return query, others

    once = jax.jit(step)
    many = once if calls == 1 else jax.jit(chain)
    return Program(lambda: once(*arrays, operand), lambda: many(*arrays, operand))
