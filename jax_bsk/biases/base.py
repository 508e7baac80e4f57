"""`Bias`: what may be added to the logits. A pytree that `+` composes; arrays are the biases that know every pair."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.biases.terms import Call, Terms
from jax_bsk.core import inputs
from jax_bsk.core.arrays import of_rank


class Bias:
    """Numbers that are added to the logits of attention, after the soft cap and before the softmax.

    An immutable pytree: its arrays are leaves, may be traced, and are differentiable where they hold floating-point
    numbers. `a + b` adds two biases, one of which may be an array that broadcasts to [B, N, T, S].
    """

    _leaves: ClassVar[tuple[str, ...]] = ()  # names of the arrays; all other fields are static
    __array_ufunc__ = None  # numpy's `array + bias` is then __radd__

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten)

    def _set(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"biases are immutable: cannot set {name} of {self!r}")

    def _flatten_with_keys(self) -> tuple[Any, Any]:
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self._leaves)
        return children, tuple((name, x) for name, x in self.__dict__.items() if name not in self._leaves)

    @classmethod
    def _unflatten(cls, static: Any, children: Any) -> Self:
        # No validation: transformations rebuild biases with placeholders and with arrays of other ranks.
        bias = object.__new__(cls)
        bias.__dict__.update(zip(cls._leaves, children, strict=True))
        bias.__dict__.update(static)
        return bias

    def __repr__(self) -> str:
        def text(x: Any) -> str:
            return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else repr(x)

        return f"{type(self).__name__}({', '.join(f'{name}={text(x)}' for name, x in self.__dict__.items())})"

    def __add__(self, other: Any) -> Bias:
        return BiasSum(*_parts(self), *_parts(as_bias(other)))

    def __radd__(self, other: Any) -> Bias:
        return BiasSum(*_parts(as_bias(other)), *_parts(self))

    def _terms(self, call: Call) -> Terms:
        """The terms of this bias in a call, its arrays checked."""
        raise NotImplementedError


class BiasSum(Bias):
    """The sum of biases; what `+` gives."""

    _leaves = ("parts",)
    parts: tuple[Bias, ...]

    def __init__(self, *parts: Bias) -> None:
        self._set(parts=parts)


class DenseBias(Bias):
    """A number per pair: what `bias=array` is, as an object that can be added to others.

    Kernels read it block by block, where the mask visits a block. A dimension of 1 is shared, and is not repeated in
    memory. Its gradient has its shape.

    Args:
      array: Numbers (floating or integer) that broadcast to [B, N, T, S]; first dimensions may be missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk.biases import DenseBias
      >>> DenseBias(jnp.zeros((2, 1, 64, 64)))
      DenseBias(array=float32[2, 1, 64, 64])
    """

    _leaves = ("array",)
    array: Any

    def __init__(self, array: ArrayLike) -> None:
        self._set(array=jnp.asarray(array))

    def _terms(self, call: Call) -> Terms:
        array = jnp.asarray(self.array)
        if array.dtype == np.bool_:
            raise TypeError("bias holds numbers, got an array of bool; pass it as mask (True attends)")
        if jnp.issubdtype(array.dtype, jnp.integer):
            array = array.astype(call.stats)
        array = inputs.floating(array, "bias")
        sizes = call.batch, call.heads, call.own[0], call.kv_len
        inputs.check_broadcasts(array.shape, sizes, call.unbatched, "bias")
        if array.dtype not in (call.dtype, call.stats):
            array = array.astype(call.stats)
        return Terms(dense=of_rank(array, 4))


def as_bias(bias: Any) -> Bias:
    """A bias of what a user gives: a `Bias`, or an array."""
    return bias if isinstance(bias, Bias) else DenseBias(bias)


def _parts(bias: Bias) -> tuple[Bias, ...]:
    return bias.parts if isinstance(bias, BiasSum) else (bias,)
