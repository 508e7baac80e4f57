"""`FunctionMask`: a mask given by a function of the indices, and of the numbers of example and head on demand.

Nothing is known of the function beforehand, so every block that other parts of the mask leave open is evaluated. A mask
that contains it bounds them: `within`, which is joined by `&` before the mask is bound.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np

from jax_bsk.core.arrays import Array, is_array, is_traced
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._offsets import static_int
from jax_bsk.masks.algebra.mask import AndMask, Mask, described, remedy_for
from jax_bsk.masks.grid import OWN, Grid

__all__ = ["FunctionMask"]


class _Function(Mask):
    """A mask of a function; `_function` gives it as one of (q_idx, kv_idx)."""

    fn: Callable[..., Any]

    def _function(self) -> Callable[[Any, Any], Any]:
        raise NotImplementedError

    def _validate(self, q_len: int, kv_len: int) -> None:
        """Asks for two shapes: an array that is not read at the indices may fit the blocks' shape, never both of these.

        They have two dimensions, so that any that the function adds is seen, and no length is 1.
        """
        if not q_len or not kv_len:
            return
        ask = self._shape_when_traced if self._closes_over_tracers() else self._values
        for rows, columns in ((2, 3), (3, 5)):
            q = np.minimum(np.arange(rows, dtype=np.int32), q_len - 1)[:, None]
            k = np.minimum(np.arange(columns, dtype=np.int32), kv_len - 1)[None, :]
            self._check(self._answer(ask, q, k), q, k)

    def _own_traced(self, grid: Grid) -> bool:
        return bool(grid.q_len and grid.kv_len) and self._closes_over_tracers()

    def _closes_over_tracers(self) -> bool:
        index = np.zeros((1, 1), np.int32)
        try:
            with jax.ensure_compile_time_eval():
                return is_traced(self._answer(self._function(), index, index))
        except (jax.errors.TracerArrayConversionError, jax.errors.TracerBoolConversionError):
            return True  # numpy code that met a tracer: will be told so, by JAX, when it is traced

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        return grid.xp.full((1, 1), OWN, np.int8)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        q, k = grid.clip_q(q), grid.clip_kv(k)
        return self._check(self._function()(q, k) if grid.xp is not np else self._values(q, k), q, k)

    def _answer(self, ask: Callable[[Any, Any], Any], q: Array, k: Array) -> Any:
        """`ask(q, k)`; where shapes that do not fit each other make it fail, with the remedy."""
        try:
            return ask(q, k)
        except (TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            if "broadcast" not in reason:
                raise
            raise ValueError(f"{self!r}: fn fails for {_described(q, k)} ({reason}); {_ELEMENTWISE}") from error

    def _values(self, q: Array, k: Array) -> np.ndarray:
        result = self._function()(q, k)
        if is_traced(result):  # written with jax.numpy, it was staged into a surrounding jit
            with jax.ensure_compile_time_eval():
                result = self._function()(q, k)
        return np.asarray(result)

    def _shape_when_traced(self, q: np.ndarray, k: np.ndarray) -> Any:
        return jax.eval_shape(
            self._function(), jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)
        )

    def _check(self, result: Any, q: Array, k: Array) -> Any:
        expected = np.broadcast_shapes(q.shape, k.shape)
        given = f"{getattr(result, 'dtype', type(result).__name__)}{getattr(result, 'shape', '')}"
        if getattr(result, "dtype", None) != np.bool_:
            raise TypeError(f"{self!r}: fn must return booleans, given {given} for {_described(q, k)}")
        if result.shape != expected and result.shape not in self._other_shapes(q, k):
            raise ValueError(
                f"{self!r}: fn must return the shape {expected} for {_described(q, k)}, given {given}; {_ELEMENTWISE}"
            )
        return result

    def _other_shapes(self, q: Array, k: Array) -> tuple[tuple[int, ...], ...]:
        """Shapes besides the broadcast one that `fn` may return."""
        del q, k
        return ()


class FunctionMask(_Function):
    """A mask given by a function of the indices.

    Args:
      fn: `fn(q_idx, kv_idx)` with int32 index arrays that broadcast against each other (numpy on the host, jax.numpy
        when traced) returning booleans of exactly the broadcast shape, elementwise: other arrays are read at the
        indices, as in `flags[q_idx]`, and nothing adds a dimension. It must be pure: masks with the same function are
        equal, and what was built of one may be reused for another. It is asked only about positions inside the
        lengths. A function that closes over traced arrays makes the mask traced. Or `fn(b, h, q_idx, kv_idx)`, as
        FlexAttention's `mask_mod`: a function of four required positional parameters is also given the numbers of
        example and query head, int32 scalars, and is asked about each of them that it uses. It may also return the
        shape of either index alone, or a scalar.
      batch: examples that `fn(b, h, q_idx, kv_idx)` distinguishes. By default those of the call (`sparse_attention`);
        `bind` has no call to ask and needs them here, if fn uses b.
      heads: query heads that it distinguishes; likewise, if fn uses h.
      within: mask that bounds the function: nothing outside of it is attended, whatever fn says, and fn is called only
        on blocks that `within` does not leave empty. It is best one whose bounds are known, as `LocalMask(512)`.

    Raises:
      TypeError: fn is not callable, or within is no mask; sizes for a function of two parameters; when bound, where fn
        does not return booleans.
      ValueError: when bound, where fn returns another shape, or a size is missing.

    Nothing is known about such a mask beforehand: every block is evaluated once (per example and head, if fn uses
    those), or of `within` those that are not empty. `FunctionMask(fn, within=mask)` attends as `mask &
    FunctionMask(fn)` does, and keeps its bound when it is inverted or passed on.

    Examples:
      >>> from jax_bsk.masks import FunctionMask
      >>> even = FunctionMask(lambda q_idx, kv_idx: (q_idx + kv_idx) % 2 == 0)
      >>> even.bind(3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
      >>> from jax_bsk.masks import LocalMask
      >>> near = FunctionMask(lambda q_idx, kv_idx: (q_idx * kv_idx) % 7 < 3, within=LocalMask(100))
      >>> near.bind(65_536).density  # three blocks a row: those of the window
      0.005851745605...
    """

    _coarse_bounds = True
    _data_fields = ("within",)

    within: Mask | None
    sizes: tuple[int | None, int | None] | None

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        batch: int | None = None,
        heads: int | None = None,
        within: Mask | None = None,
    ) -> None:
        if within is not None and not isinstance(within, Mask):
            raise TypeError(f"FunctionMask: within must be a mask, given {described(within)}; {remedy_for(within)}")
        if not callable(fn):
            remedy = "; wrap a boolean array in ArrayMask(...)" if is_array(fn) else ""
            raise TypeError(
                f"FunctionMask: fn must be callable as fn(q_idx, kv_idx), given {type(fn).__name__}{remedy}"
            )
        numbered = _asks_for_numbers(fn)
        if not numbered and (batch, heads) != (None, None):
            raise TypeError(
                f"FunctionMask: batch and heads must be given with fn(b, h, q_idx, kv_idx) only, got {short(fn)} of "
                "other parameters; leave them out, or let fn take four"
            )
        sizes = (
            None if size is None else static_int(size, "FunctionMask", name, minimum=1)
            for size, name in ((batch, "batch"), (heads, "heads"))
        )
        self._set(fn=fn, sizes=tuple(sizes) if numbered else None, within=within)

    def parts(self) -> tuple[Mask, FunctionMask]:
        """What bounds the function, and the function without a bound. There must be one."""
        assert self.within is not None
        bare = object.__new__(FunctionMask)
        bare._set(**{**self._named(), "within": None})
        return self.within, bare

    def _function(self) -> Callable[[Any, Any], Any]:
        if self.sizes is None:
            return self.fn
        sized = self._sized(None, None)
        assert isinstance(sized, _Function)
        return sized._function()

    def _structural_dims(self, dim: str) -> set[int]:
        size = None if self.sizes is None else self.sizes["bh".index(dim)]
        return super()._structural_dims(dim) | (set() if size is None else {size})

    def _sized(self, batch: int | None, heads: int | None) -> Mask:
        if self.within is not None:
            return AndMask(*(part._sized(batch, heads) for part in self.parts()))
        if self.sizes is None:
            return self
        numbers = []
        for n, (given, of_call, name) in enumerate(zip(self.sizes, (batch, heads), ("batch", "heads"), strict=True)):
            size = given or (of_call if self._uses(n) else 1)
            if size is None:
                raise ValueError(
                    f"FunctionMask: {name} must be given where fn uses {'bh'[n]} and no call says it, got "
                    f"{self!r}; write FunctionMask({short(self.fn)}, {name}=...), or pass the mask to sparse_attention"
                )
            numbers.append(np.arange(size, dtype=np.int32))
        return _NumberedFunction(self.fn, *numbers)

    def _uses(self, n: int) -> bool:
        """Whether fn does anything with its argument b (0) or h (1): it is asked once without."""
        index = np.zeros((1, 1), np.int32)
        numbers: list[Any] = [np.int32(0), np.int32(0)]
        numbers[n] = _Unused()
        try:
            with jax.ensure_compile_time_eval():
                self.fn(*numbers, index, index)
        except Exception:  # whatever it did with it; a fault of fn's own is met again where it is evaluated
            return True
        return False

    def _repr_arguments(self) -> list[str]:
        sizes = zip(("batch", "heads"), self.sizes or (), strict=False)
        name = getattr(self.fn, "__qualname__", None) or repr(self.fn)
        within = [] if self.within is None else [f"within={self.within!r}"]
        return [name, *(f"{n}={size}" for n, size in sizes if size is not None), *within]


class _NumberedFunction(_Function):
    """A function of (b, h, q_idx, kv_idx) with the numbers it is asked about: [B] and [H], scalars of one of them."""

    _data_fields = ("examples", "heads_of_call")
    examples: Array
    heads_of_call: Array

    def __init__(self, fn: Callable[..., Any], examples: np.ndarray, heads: np.ndarray) -> None:
        self._set(fn=fn, examples=examples, heads_of_call=heads)

    def _leaf_dims(self, name: str) -> str:
        return ("b" if name == "examples" else "h") if np.ndim(getattr(self, name)) else ""

    def _function(self) -> Callable[[Any, Any], Any]:
        # Where they were not selected yet, the first ones: only shapes and types are asked for.
        numbers = (x[0] if np.ndim(x) else x for x in (self.examples, self.heads_of_call))
        return functools.partial(self.fn, *numbers)

    def _other_shapes(self, q: Array, k: Array) -> tuple[tuple[int, ...], ...]:
        # FlexAttention asks about one pair at a time, so its functions often name one index only, or none.
        return q.shape, k.shape, (), (1,) * len(q.shape)

    def __repr__(self) -> str:
        return f"FunctionMask({getattr(self.fn, '__qualname__', None) or repr(self.fn)})"


class _Unused:
    """Stands for a number in a call that asks whether a function uses it: everything that is done with it fails."""

    __array_ufunc__ = None

    def _used(self, *_: Any) -> NoReturn:
        raise TypeError("used")

    __eq__ = __ne__ = __hash__ = __bool__ = __index__ = __int__ = __array__ = __getattr__ = _used  # type: ignore


def _asks_for_numbers(fn: Callable[..., Any]) -> bool:
    """Whether a function has four required positional parameters."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in positional) == 4


_ELEMENTWISE = (
    "is it elementwise? Read arrays at the indices, as in flags[q_idx], and name both indices, as in (q_idx > 4) & "
    "(kv_idx >= 0). For a mask per example or head use ArrayMask, or a function of (b, h, q_idx, kv_idx)"
)


def _described(q: Array, k: Array) -> str:
    return f"indices of shapes {q.shape} and {k.shape}"
