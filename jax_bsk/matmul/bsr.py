"""`BSR`: a block-sparse matrix as an array of blocks and lists of their places. A `BSR` is a pytree.

The lists have `BlockMask`'s conventions: they go row by row, and the constructors make ids that ascend within a row.
Entries past `indptr[-1]` belong to no row and are -1. Sizes are static. The kind of the lists decides what is a leaf:

- Lists with values on the host (which all constructors make) belong to the structure, as the shape does. The blocks are
  then the only leaf: `jax.grad` and optimizers see the blocks alone, a compiled function holds the lists as constants,
  and another pattern compiles the function again.
- Lists that are JAX arrays, traced or not, are leaves: another pattern with as many entries compiles nothing.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_bsk.core.arrays import is_traced
from jax_bsk.matmul.bsr_lists import ArrayLists, ColumnLists, StaticLists

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO, JAXSparse

DEFAULT_BLOCK_SIZE = 128


class BSR:
    """A matrix of which only some blocks are stored: block compressed sparse rows, as in `scipy.sparse.bsr_array`.

    A `BSR` is an immutable pytree. `A @ x` and `x @ A` call `sparse_matmul`; `2 * A`, `A / 2` and `-A` scale the
    blocks.

    Args:
      data: Blocks [entries, bm, bk], row by row. Numbers that stick out of the shape count as 0.
      indptr: int32 [rows of blocks + 1], the first entry of each row, and the end of the last row.
      indices: int32 [entries], the column of blocks of each entry.
      shape: (M, K) of the matrix, which need not be multiples of the block.
      column_lists: The same places column by column, as `columns` returns them, which products with the transpose (and
        so the derivatives of all products) walk. Lists on the host need none. For lists that are JAX arrays, None makes
        them where they are needed; for traced ones that is a sort on the device in every call.

    Attributes:
      data: The blocks; the only leaf where the lists are static.
      lists: `StaticLists` of NumPy arrays, a part of the structure, where NumPy arrays were given; otherwise
        `ArrayLists`, whose arrays are leaves.
      shape: (M, K); static.
      block_size: (bm, bk); static.

    Raises:
      TypeError: `data` is no array.
      ValueError: Sizes do not fit.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from jax_bsk import BSR
      >>> matrix = BSR(jnp.ones((2, 32, 32)), np.array([0, 1, 2]), np.array([1, 0]), (64, 64))
      >>> matrix
      BSR(shape=(64, 64), block_size=(32, 32), entries=2, dtype=float32)
      >>> matrix.density
      0.5
      >>> (2 * matrix @ jnp.ones(64))[0].item()
      64.0
    """

    __slots__ = ("__weakref__", "block_size", "data", "lists", "shape")
    data: Any
    lists: StaticLists | ArrayLists
    shape: tuple[int, int]
    block_size: tuple[int, int]

    # So that NumPy leaves `array @ A` and `number * A` to this class.
    __array_ufunc__ = None
    # `sparse_matmul`, which stands above this module and names itself here.
    product: ClassVar[Callable[..., jax.Array]]

    def __init__(
        self,
        data: jax.Array | np.ndarray,
        indptr: Any,
        indices: Any,
        shape: tuple[int, int],
        column_lists: ColumnLists | None = None,
    ) -> None:
        if not hasattr(data, "shape"):
            raise TypeError(
                f"data must be an array [entries, bm, bk], got {type(data).__name__}; for a tree of other things map "
                "over a BSR with jax.tree.map"
            )
        indptr, indices = (x if hasattr(x, "shape") else np.asarray(x) for x in (indptr, indices))
        if len(data.shape) != 3 or data.shape[:1] != indices.shape:
            raise ValueError(
                f"data must be [entries, bm, bk] and indices [entries], got {data.shape} and {indices.shape}; give "
                "each entry one block"
            )
        shape, block_size = (int(shape[0]), int(shape[1])), (data.shape[1], data.shape[2])
        rows, columns = grid_of(shape, block_size)
        if indptr.shape != (rows + 1,):
            raise ValueError(
                f"indptr must have {rows + 1} numbers for {shape[0]} rows in blocks of {block_size[0]}, got "
                f"{indptr.shape}; give where each row's entries begin, and the last one's end"
            )
        if all(isinstance(x, np.ndarray) for x in (indptr, indices, *(column_lists or ()))):
            lists = StaticLists.of(indptr, indices, columns)
        else:
            lists = jax.tree.map(_not_on_the_host, ArrayLists(indptr, indices, column_lists))
        _set(self, data, lists, shape, block_size)

    # ---- Facts

    @property
    def indptr(self) -> Any:
        """int32 [rows of blocks + 1]: where each row's entries begin, and the last one's end."""
        return self.lists.indptr

    @property
    def indices(self) -> Any:
        """int32 [entries]: the column of blocks of each entry."""
        return self.lists.indices

    @property
    def column_lists(self) -> ColumnLists | None:
        """The places column by column, as `columns` gives them; None where they are not known."""
        return self.lists.column_lists

    @property
    def has_static_lists(self) -> bool:
        """Whether the lists belong to the structure, and the blocks are the only leaf."""
        return isinstance(self.lists, StaticLists)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return grid_of(self.shape, self.block_size)

    @property
    def entries(self) -> int:
        """Number of blocks that there is room for."""
        return self.indices.shape[-1]

    @property
    def dtype(self) -> np.dtype:
        """Type of the blocks."""
        return np.dtype(self.data.dtype)

    @property
    def density(self) -> float:
        """Number of stored blocks / number of all blocks.

        Raises:
          TypeError: The lists are traced.
        """
        self._need_values("density")
        rows, columns = self.grid
        return int(np.asarray(self.indptr)[-1]) / max(rows * columns, 1)

    def __repr__(self) -> str:
        facts = [f"shape={self.shape}, block_size={self.block_size}"]
        listed = getattr(self.indices, "shape", None)
        facts += [f"entries={listed[-1]}"] if listed else [f"indices={self.indices!r}"]
        if not (hasattr(self.data, "shape") and hasattr(self.data, "dtype")):  # of a tree of other things
            facts.append(f"data={self.data!r}")
        elif len(self.data.shape) == 3:
            facts.append(f"dtype={self.dtype}")
        else:
            facts.append(f"data={self.dtype}{list(self.data.shape)}")
        return f"BSR({', '.join(facts)}{'' if self.has_static_lists else ', lists are leaves'})"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a BSR is immutable, got an assignment to {name}; make another one, as with_data does")

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.data, self.lists, self.shape, self.block_size)

    # ---- Constructors

    @classmethod
    def from_dense(
        cls,
        array: jax.Array | np.ndarray,
        block_size: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
        *,
        keep: ArrayLike | None = None,
    ) -> Self:
        """Stores the blocks of a matrix that have a number other than 0, or those that `keep` names.

        Args:
          array: Matrix [M, K]. Of a NumPy array only the blocks that are kept are copied to the device.
          block_size: Side of a block, or (rows, columns).
          keep: Booleans [rows of blocks, columns of blocks] with known values. None keeps the blocks that are not 0.

        Returns:
          A `BSR` of shape [M, K] and the array's type.

        Raises:
          TypeError: `keep` is traced, or the array is traced and there is no `keep`.
          ValueError: The array is not a matrix, or `keep` has another shape.

        Examples:
          >>> import numpy as np
          >>> from jax_bsk import BSR
          >>> dense = np.zeros((64, 64), np.float32)
          >>> dense[0, 40] = 1.0
          >>> BSR.from_dense(dense, block_size=32)
          BSR(shape=(64, 64), block_size=(32, 32), entries=1, dtype=float32)
        """
        bm, bk = pair_of(block_size)
        if array.ndim != 2:
            raise ValueError(f"array must be a matrix [M, K], got {array.shape}; convert the matrices one by one")
        if is_traced(keep) or (keep is None and is_traced(array)):
            name = "array" if keep is None else "keep"
            raise TypeError(
                f"{name} must have values, because it decides which blocks are kept and so the sizes of arrays, got a "
                "traced array; give `keep` with values, or call from_dense outside of jit"
            )
        xp = jnp if isinstance(array, jax.Array) else np
        m, k = array.shape
        rows, columns = grid_of((m, k), (bm, bk))
        padded = xp.pad(array, ((0, rows * bm - m), (0, columns * bk - k)))
        blocks = padded.reshape(rows, bm, columns, bk).swapaxes(1, 2)
        keep = np.asarray((blocks != 0).any((2, 3)) if keep is None else keep, bool)
        if keep.shape != (rows, columns):
            raise ValueError(f"keep must be a bool for each block, {(rows, columns)}, got {keep.shape}; see block_size")
        places = np.nonzero(keep)
        indptr = np.concatenate([[0], keep.sum(1).cumsum()])
        return cls(jnp.asarray(blocks[places]), indptr, places[1], (m, k))

    @classmethod
    def random(
        cls,
        key: jax.Array,
        shape: tuple[int, int],
        density: float,
        block_size: int | tuple[int, int] = DEFAULT_BLOCK_SIZE,
        dtype: DTypeLike | None = None,
    ) -> Self:
        """Draws blocks at random and fills them with numbers of the standard normal distribution.

        Args:
          key: Key of `jax.random` with a known value, because it decides which blocks are stored.
          shape: (M, K).
          density: Number of stored blocks / number of all blocks, in [0, 1]; the count is rounded to a whole block.
          block_size: Side of a block, or (rows, columns).
          dtype: Type of the blocks; the default is float32.

        Returns:
          A `BSR` of shape [M, K].

        Raises:
          TypeError: An argument is traced.
          ValueError: The density is outside of [0, 1].
        """
        for name, value in (("key", key), ("density", density), ("shape", shape[0]), ("shape", shape[1])):
            if is_traced(value):
                raise TypeError(
                    f"{name} must have a value, because it decides which blocks are stored, got a traced array; call "
                    "BSR.random outside of jit, vmap and grad, and draw other blocks inside with with_data"
                )
        bm, bk = pair_of(block_size)
        rows, columns = grid_of(shape, (bm, bk))
        if not 0 <= density <= 1:
            raise ValueError(f"density must be stored blocks / all blocks, in [0, 1], got {density}; give a fraction")
        count = round(density * rows * columns)
        with jax.ensure_compile_time_eval():  # a key with a value has places with values, in jit as well
            draw, numbers = jax.random.split(key)
            chosen = np.sort(np.asarray(jax.random.permutation(draw, rows * columns)[:count]))
        indptr = np.searchsorted(chosen, np.arange(rows + 1) * columns)
        data = jax.random.normal(numbers, (count, bm, bk), dtype or jnp.float32)
        return cls(data, indptr, chosen % max(columns, 1), (shape[0], shape[1]))

    @classmethod
    def from_scipy(cls, array: Any, block_size: int | tuple[int, int] | None = None) -> Self:
        """Converts a sparse array or matrix of `scipy.sparse` in any format.

        A format without blocks (CSR, COO, ..) stores single numbers. Each block that has such a number is stored whole,
        so the matrix should be sparse in blocks, and `block_size` small enough to follow it. Any block size fits any
        shape.

        Args:
          array: Sparse matrix [M, K] of `scipy.sparse`.
          block_size: Side of a block, or (rows, columns). None takes the array's own blocks, and 128 where it has none.

        Returns:
          A `BSR` of shape [M, K] with ids that ascend within rows, and blocks on the device.

        Raises:
          TypeError: The argument is no sparse array.
          ValueError: The array is not a matrix.
        """
        if not (hasattr(array, "tocoo") and hasattr(array, "format")):
            raise TypeError(
                f"array must be a sparse array of scipy.sparse, got {type(array).__name__}; use BSR.from_dense or "
                "BSR.from_jax"
            )
        if len(array.shape) != 2:
            raise ValueError(f"array must be a matrix [M, K], got {array.shape}; reshape it to two dimensions")
        own = tuple(array.blocksize) if array.format == "bsr" else None
        bm, bk = pair_of(block_size or own or DEFAULT_BLOCK_SIZE)
        shape = (array.shape[0], array.shape[1])
        if own == (bm, bk):
            array = array.copy()
            array.sort_indices()
            return cls(jnp.asarray(array.data), array.indptr, array.indices, shape)
        numbers = array.tocoo()
        rows, columns = grid_of(shape, (bm, bk))
        row, column = numbers.row.astype(np.int64), numbers.col.astype(np.int64)
        places, entry = np.unique(row // bm * columns + column // bk, return_inverse=True)
        data = np.zeros((places.size, bm, bk), numbers.dtype)
        np.add.at(data, (entry, row % bm, column % bk), numbers.data)
        indptr = np.searchsorted(places, np.arange(rows + 1) * columns)
        return cls(jnp.asarray(data), indptr, places % max(columns, 1), shape)

    @classmethod
    def from_jax(cls, array: JAXSparse, block_size: int | tuple[int, int] = DEFAULT_BLOCK_SIZE) -> Self:
        """Converts a matrix of `jax.experimental.sparse` (BCOO, BCSR, ..), by way of the dense matrix.

        Args:
          array: Sparse matrix [M, K] with known values.
          block_size: Side of a block, or (rows, columns).

        Returns:
          A `BSR` of shape [M, K] with the blocks that have a number other than 0.

        Raises:
          TypeError, ValueError: As in `from_dense`.
        """
        return cls.from_dense(array.todense(), block_size)

    def to_jax(self) -> BCOO:
        """Returns a `jax.experimental.sparse.BCOO` of shape [M, K] with one index per number of a stored block."""
        from jax.experimental.sparse import BCOO

        (m, k), (bm, bk) = self.shape, self.block_size
        rows, columns = jnp.asarray(self.row_ids()), jnp.asarray(self.indices)
        row = rows[:, None, None] * bm + jnp.arange(bm)[None, :, None]
        column = columns[:, None, None] * bk + jnp.arange(bk)[None, None]
        row, column = jnp.broadcast_arrays(row, column)
        inside = (rows >= 0)[:, None, None] & (row < m) & (column >= 0) & (column < k)
        # An index out of range is BCOO's padding.
        places = jnp.stack([jnp.where(inside, row, m), jnp.where(inside, column, k)], -1).reshape(-1, 2)
        return BCOO((jnp.where(inside, self.data, 0).reshape(-1), places), shape=self.shape)

    def to_scipy(self) -> Any:
        """Returns a `scipy.sparse.bsr_array` of shape [M, K], which must be of whole blocks.

        Raises:
          TypeError: The lists or the blocks are traced.
          ValueError: scipy refuses a shape that is not of whole blocks.
        """
        from scipy.sparse import bsr_array

        self._need_values("to_scipy()", self.data)
        end = int(np.asarray(self.indptr)[-1])
        parts = (np.asarray(self.data)[:end], np.asarray(self.indices)[:end], np.asarray(self.indptr))
        return bsr_array(parts, shape=self.shape)

    def to_dense(self) -> jax.Array:
        """Returns the dense matrix [M, K]. Entries of no row are left out, and blocks listed twice are summed."""
        (rows, columns), (bm, bk) = self.grid, self.block_size
        row_ids = self.row_ids()
        listed = (row_ids >= 0) & (row_ids < rows) & (self.indices >= 0) & (self.indices < columns)
        place = jnp.where(listed, row_ids * columns + self.indices, rows * columns)
        data = jnp.asarray(self.data)
        blocks = jnp.zeros((rows * columns + 1, bm, bk), data.dtype).at[place].add(data)[:-1]
        dense = blocks.reshape(rows, columns, bm, bk).swapaxes(1, 2).reshape(rows * bm, columns * bk)
        return dense[: self.shape[0], : self.shape[1]]

    # ---- Views

    def with_data(self, data: Any) -> Self:
        """Returns a matrix with the same places and other blocks.

        Args:
          data: Blocks [entries, bm, bk]. What is no array (a leaf of another tree, say) is taken as it is.

        Raises:
          ValueError: The array has another shape.
        """
        if hasattr(data, "shape") and data.shape != (self.entries, *self.block_size):
            raise ValueError(
                f"data must be [entries, bm, bk] = {(self.entries, *self.block_size)}, got {data.shape}; make a BSR of "
                "other sizes with its constructor"
            )
        return self._with(data, self.lists)

    def astype(self, dtype: DTypeLike) -> Self:
        """Returns the same matrix with blocks of another type."""
        return self.with_data(jnp.asarray(self.data).astype(dtype))

    def with_column_lists(self) -> Self:
        """Returns the same matrix with `column_lists`; a matrix with traced lists is returned as it is."""
        if self.lists.traced or self.column_lists is not None:
            return self
        lists = jax.tree.map(jnp.asarray, ArrayLists(self.indptr, self.indices, self.columns()))
        return self._with(self.data, lists)

    def with_traced_lists(self) -> Self:
        """Returns the same matrix with its lists as leaves on the device, those by columns among them.

        Compiled functions then take the lists as arguments: a new pattern with as many entries compiles nothing.
        `jax.grad` takes such a matrix's `data`, not the matrix: integers have no gradient.
        """
        if not self.has_static_lists:
            return self.with_column_lists()
        return self._with(
            self.data, jax.tree.map(jnp.asarray, ArrayLists(self.indptr, self.indices, self.column_lists))
        )

    def with_static_lists(self) -> Self:
        """Returns the same matrix with its lists as a part of the structure, and the blocks as the only leaf.

        Raises:
          TypeError: The lists are traced.
        """
        if self.has_static_lists:
            return self
        self._need_values("with_static_lists()")
        lists = StaticLists.of(self.indptr, self.indices, self.grid[1])
        return self._with(self.data, lists)

    def row_ids(self) -> Any:
        """Returns int32 [entries], the row of each entry: -1 past the end and where offsets cannot be followed."""
        return self.lists.row_ids

    def columns(self) -> ColumnLists:
        """Returns the same lists column by column: offsets [columns + 1], rows [entries], and entry numbers [entries].

        Entries that belong to no row, or name no column, are left out. Numbers past the end are -1.
        """
        return self.lists.by_columns(self.grid[1])

    @property
    def T(self) -> Self:
        """The transposed matrix [K, M]; its blocks are copied."""
        offsets, rows, entries = self.columns()
        data = jnp.swapaxes(jnp.asarray(self.data)[jnp.maximum(jnp.asarray(entries), 0)], 1, 2)
        if not self.has_static_lists:
            offsets, rows = jnp.asarray(offsets), jnp.asarray(rows)
        return type(self)(data, offsets, rows, (self.shape[1], self.shape[0])).with_column_lists()

    # ---- Operators

    def __matmul__(self, other: Any) -> jax.Array:
        return BSR.product(self, other) if _is_operand(other) else NotImplemented

    def __rmatmul__(self, other: Any) -> jax.Array:
        return BSR.product(other, self) if _is_operand(other) else NotImplemented

    def __mul__(self, factor: Any) -> Self:
        return self._scaled(operator.mul, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Self:
        return self._scaled(operator.truediv, divisor)

    def __neg__(self) -> Self:
        return self.with_data(-jnp.asarray(self.data))

    def _scaled(self, operation: Callable[[Any, Any], Any], factor: Any) -> Self:
        if not (isinstance(factor, int | float | complex | np.number) or _is_operand(factor)):
            return NotImplemented
        if np.ndim(factor) != 0:
            raise ValueError(
                f"factor must be a scalar, got an array of shape {np.shape(factor)}; multiply A.data by what "
                "broadcasts with [entries, bm, bk] and give it to with_data"
            )
        return self.with_data(operation(jnp.asarray(self.data), factor))

    # ---- Checks

    def need_lists(self, name: str) -> None:
        """Checks that a product can follow the lists of an argument of that name.

        Raises:
          ValueError: The lists have another number of dimensions, or something else is in their place.
        """
        found = [getattr(x, "shape", None) for x in (self.indptr, self.indices)]
        if found != [(self.grid[0] + 1,), (self.entries,)]:
            raise ValueError(
                f"{name} must have lists indptr [rows of blocks + 1] and indices [entries], got {self!r}; use jax.vmap "
                "for a stack of matrices"
            )

    def need_blocks(self, name: str) -> None:
        """Checks that a product can multiply the blocks of an argument of that name, and follow its lists.

        Raises:
          TypeError: The blocks are no array, or boolean.
          ValueError: The blocks have another shape.
        """
        self.need_lists(name)
        if not (hasattr(self.data, "shape") and hasattr(self.data, "dtype")):
            raise TypeError(f"{name} must have an array of blocks, got {self!r}; give them with with_data")
        wanted = (self.entries, *self.block_size)
        if self.data.shape != wanted:
            raise ValueError(f"{name} must have blocks {wanted}, got {self!r}; use jax.vmap for a stack of matrices")
        if self.dtype == np.bool_:
            raise TypeError(
                f"{name} must have blocks of numbers, got boolean data; convert it with A.astype(jnp.float32)"
            )

    def check(self) -> None:
        """Checks that the lists can be followed. Products give NaN for a row whose lists cannot.

        Raises:
          ValueError: Entries or columns of a row are out of range; the message names the first such row.
          TypeError: The lists are traced.
        """
        self._need_values("check()")
        offsets, indices = np.asarray(self.indptr, np.int64), np.asarray(self.indices)
        begin, end = offsets[:-1], offsets[1:]
        bad = (end < begin) | (begin < 0) | (end > self.entries)
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(
                f"invalid BSR: row {row} has entries {begin[row]} to {end[row]}, of {self.entries} that there are"
            )
        rows = self.row_ids()
        bad = (rows >= 0) & ((indices < 0) | (indices >= self.grid[1]))
        if bad.any():
            entry = int(np.argmax(bad))
            raise ValueError(
                f"invalid BSR: row {rows[entry]} has a block in column {indices[entry]}, outside [0, {self.grid[1]})"
            )

    def _need_values(self, what: str, *arrays: Any) -> None:
        if self.lists.traced or any(is_traced(x) for x in arrays):
            raise TypeError(f"BSR.{what} needs values, got a matrix that is traced; call it outside of jit")

    def _with(self, data: Any, lists: StaticLists | ArrayLists) -> Self:
        return _set(object.__new__(type(self)), data, lists, self.shape, self.block_size)


def _set(matrix: Any, data: Any, lists: Any, shape: tuple[int, int], block_size: tuple[int, int]) -> Any:
    """Gives a matrix its attributes without checks."""
    for name, value in (("data", data), ("lists", lists), ("shape", shape), ("block_size", block_size)):
        object.__setattr__(matrix, name, value)
    return matrix


def _made(data: Any, lists: Any, shape: tuple[int, int], block_size: tuple[int, int]) -> BSR:
    """Makes a matrix of these parts without checks."""
    return _set(object.__new__(BSR), data, lists, shape, block_size)


def _not_on_the_host(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _is_operand(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.Array | BSR)


def grid_of(shape: tuple[int, int], block_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the numbers of rows and columns of blocks."""
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


# ---- The pytree. The kind of the lists alone decides what is a leaf. Nothing is checked when a matrix is made from its
# leaves, because JAX and others put anything in the place of a leaf.

_LEAVES = ("data", "indptr", "indices", "column_lists")


def _flatten(matrix: BSR) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if isinstance(matrix.lists, StaticLists):
        return (matrix.data,), (matrix.shape, matrix.block_size, matrix.lists)
    return (matrix.data, *matrix.lists), (matrix.shape, matrix.block_size, None)


def _flatten_with_keys(matrix: BSR):
    children, static = _flatten(matrix)
    return tuple((jax.tree_util.GetAttrKey(name), x) for name, x in zip(_LEAVES, children, strict=False)), static


def _unflatten(static: tuple[Any, ...], children: Any) -> BSR:
    shape, block_size, lists = static
    data, *arrays = children
    return _made(data, ArrayLists(*arrays) if lists is None else lists, shape, block_size)


def _write_static(static: tuple[Any, ...]) -> bytes:
    shape, block_size, lists = static
    words = None if lists is None else [lists.indptr.tolist(), lists.indices.tolist(), lists.columns]
    return json.dumps([shape, block_size, words]).encode()


def _read_static(text: bytes) -> tuple[Any, ...]:
    shape, block_size, words = json.loads(text)
    return tuple(shape), tuple(block_size), None if words is None else StaticLists.of(*words)


jax.tree_util.register_pytree_with_keys(BSR, _flatten_with_keys, _unflatten, _flatten)
# So that exported functions may take and return one.
jax.export.register_pytree_node_serialization(
    BSR, serialized_name="jax_bsk.BSR", serialize_auxdata=_write_static, deserialize_auxdata=_read_static
)


def pair_of(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns the rows and columns of a block, from that pair or from one number for both.

    Raises:
      ValueError: A number is not positive.
      TypeError: A number is no integer.
    """
    pair = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    bm, bk = (operator.index(size) for size in pair)
    if min(bm, bk) < 1:
        raise ValueError(f"block_size must be positive, got {block_size}; give rows and columns of a block")
    return bm, bk
