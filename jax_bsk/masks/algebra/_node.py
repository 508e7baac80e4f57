"""What a mask is to JAX and to Python: an immutable pytree with equality, a hash and a printed form.

The structure of a mask is decided by its class and by its static fields alone. Which of its fields are pytree children
is settled once, when the mask is constructed, and then travels with the structure. So whatever a transformation puts in
the place of the arrays (None, booleans, shardings, strings, `object()`), the structure stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn, Self

import jax
import numpy as np

from jax_bsk.core.arrays import Array, is_array, is_traced
from jax_bsk.masks._text import short


class Node:
    """An immutable pytree whose fields are set once, by `_set` in the constructor."""

    # Names of the fields that may hold an array or another node; all the other fields are static. Set by each class.
    _data_fields: ClassVar[tuple[str, ...]] = ()
    # Those of them that are pytree children of this instance: the others were given as None or as a Python int.
    _held: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten)

    def _set(self, **fields: Any) -> None:
        """Sets the fields of a node under construction, all of them at once."""
        held = (name for name in self._data_fields if not isinstance(fields[name], int | None))
        self.__dict__.update(fields, _held=tuple(held))

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"masks are immutable: cannot set {name} of {self!r}")

    # ---- fields -------------------------------------------------------------------------------------------------

    def _named(self) -> dict[str, Any]:
        """All fields by name, in the order of the constructor."""
        return {name: value for name, value in self.__dict__.items() if name != "_held"}

    def _fields(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the data fields; of a tuple, those of its items."""
        for name in self._data_fields:
            value = getattr(self, name)
            if isinstance(value, tuple):
                yield from ((f"{name}[{n}]", item) for n, item in enumerate(value))
            else:
                yield name, value

    def _map_fields(self, on_node: Callable[[Any], Any], on_array: Callable[[str, Array], Any]) -> Self:
        """A copy with `on_node(node)` and `on_array(name, array)` in the data fields."""

        def convert(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(convert(name, item) for item in value)
            if isinstance(value, Node):
                return on_node(value)
            return on_array(name, value) if is_array(value) else value

        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.__dict__.update({name: convert(name, getattr(self, name)) for name in self._data_fields})
        return clone

    # ---- pytree -------------------------------------------------------------------------------------------------

    def _flatten_with_keys(self) -> tuple[Any, Any]:
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self._held)
        fields = self._named()
        static = tuple((name, value) for name, value in fields.items() if name not in self._held)
        return children, (tuple(fields), self._held, static)

    @classmethod
    def _unflatten(cls, aux: Any, children: Any) -> Self:
        # No validation: transformations rebuild masks with placeholders and with arrays of other ranks.
        names, held, static = aux
        values = {**dict(static), **dict(zip(held, children, strict=True))}
        node = object.__new__(cls)
        node.__dict__.update({name: values[name] for name in names}, _held=held)
        return node

    # ---- equality, hash, printing -------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Node):
            return NotImplemented
        leaves, structure = jax.tree_util.tree_flatten(self)
        other_leaves, other_structure = jax.tree_util.tree_flatten(other)
        return structure == other_structure and all(map(_same_leaf, leaves, other_leaves))

    def __hash__(self) -> int:
        leaves, structure = jax.tree_util.tree_flatten(self)
        if any(map(is_array, leaves)):
            raise TypeError(
                f"unhashable mask: {self!r} holds an array. Build its BlockMask once (mask.bind(...)) and pass that, "
                "or pass the mask as an ordinary (not static) argument of the jitted function"
            )
        return hash((structure, *leaves)) if leaves else hash(structure)

    def __repr__(self) -> str:
        arguments = ", ".join(self._repr_arguments())
        return f"{type(self).__name__}({arguments})"

    def _repr_arguments(self) -> list[str]:
        return [f"{name}={short(value)}" for name, value in self._named().items()]


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if is_traced(a) or is_traced(b):
        return False
    if is_array(a) and is_array(b):
        return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(np.asarray(a), np.asarray(b)))
    return not (is_array(a) or is_array(b)) and bool(a == b)
