"""The layout of the package: rooms by capability, imports strictly downwards, one home for each fact."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jax_bsk"

# Rooms, and the rooms below each, which it may import from.
OPERATIONS = {
    "core",
    "lists",
    "masks",
    "biases",
    "context",
    "attention",
    "decode",
    "selection",
    "matmul",
    "compositions",
}
ROOMS = {
    "core": set[str](),
    "lists": {"core"},
    "masks": {"core", "lists"},
    "biases": {"core", "masks"},
    "context": {"core", "masks"},
    "attention": {"core", "masks", "biases", "context"},
    "decode": {"core"},
    "selection": {"core", "lists", "masks", "decode"},
    "matmul": {"core"},
    "packing": {"core"},
    "compositions": {"core", "masks", "attention", "selection"},
    "flops": {"core", "masks", "attention", "matmul"},
    "flax": OPERATIONS,
    "qa": {*OPERATIONS, "flops", "packing", "flax", ""},
    "cli": {*OPERATIONS, "qa", ""},
    "": {*OPERATIONS, "flops", "packing"},  # jax_bsk/__init__.py
    "__main__": {"core", "cli"},
}

# Layers within rooms, top to bottom: a module imports only from the layers below its own. Modules of subpackages are
# named by their path within the room; the subpackages themselves hold a docstring.
LAYERS = {
    "core": [
        ["bilinear", "forward_mode"],
        ["native_call", "dispatch"],
        ["library", "dims", "explicit_mesh", "checks", "scalars"],
        ["compat", "errors", "version", "arrays", "dtypes"],
    ],
    "lists": [["native"], ["ffi"]],
    "masks": [
        ["convert", "token_order"],
        ["block_mask"],
        ["builders._combine", "builders.elements", "algebra.shifted", "algebra.ordered", "algebra.packed"],
        ["algebra.block_diagonal", "algebra.space_windows"],
        ["builders._host", "builders._traced", "builders._topk", "algebra.patterns", "algebra.function_mask"],
        ["algebra.neighborhood", "algebra.row_ranges", "algebra.slices", "algebra.block_diffusion"],
        ["algebra.column_ranges", "algebra.vertical_slash"],
        ["algebra._boxes", "algebra.tree"],
        ["algebra._ranges"],
        ["builders._descent", "builders._intervals", "algebra.data_masks", "views._checks"],
        ["orders.permutation"],
        ["run_lists", "algebra.mask", "builders.indices", "orders.entry_order", "views._reading", "views._plot"],
        ["block_lists"],
        ["orders.column_lists", "algebra._node", "algebra._places", "algebra._intervals", "_tiles"],
        ["algebra._offsets"],
        ["grid", "_runs", "_search", "_text", "_export", "_curves"],
    ],
    "biases": [
        ["lowering", "_export"],
        ["distances"],
        ["entries", "features"],
        ["base"],
        ["terms"],
    ],
    "context": [
        ["description"],
        ["planning", "exchange"],
        ["balance"],
        ["visits"],
    ],
    "attention": [
        ["packed"],
        ["api"],
        ["derivatives"],
        ["native", "xla"],
        ["refusals", "sharding", "schedule", "parts"],
        ["sequence"],
        ["ffi", "dropout"],
    ],
    "decode": [
        ["ragged", "cache"],
        ["call", "inputs"],
        ["native", "sequence", "shared"],
        ["xla", "sharding", "refusals"],
        ["ffi", "tokens", "parts", "pool", "merge"],
    ],
    "matmul": [
        ["api"],
        ["products"],
        ["xla", "pruning"],
        ["bsr", "native"],
        ["bsr_lists", "refusals", "sharding", "ffi"],
    ],
    "selection": [
        ["_moba", "_nsa", "_pages", "_sparsek", "_topk", "_xattention"],
        ["choice", "summaries"],
        ["candidates", "soft_topk_causal"],
        ["inputs", "_prefixes", "soft_topk"],
    ],
}

NATIVE_LIBRARIES = {"jax_bsk._cpu", "jax_bsk._cuda"}


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(source: str) -> set[str]:
    """Modules of the package imported anywhere in a file; what a function or a type checker imports counts too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                where = PACKAGE.parent / submodule.replace(".", "/")
                found.add(submodule if where.with_suffix(".py").exists() or where.is_dir() else node.module)
    return {name for name in found if name.split(".")[0] == "jax_bsk"} - NATIVE_LIBRARIES


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def layer_of(module: str) -> int | None:
    """Depth of a module within its room, counted from the top; None where the room has no layers."""
    room, name = room_of(module), ".".join(module.split(".")[2:])
    if room not in LAYERS or not name or (PACKAGE / room / name.replace(".", "/")).is_dir():
        return None
    (depth,) = [i for i, names in enumerate(LAYERS[room]) if name in names] or [-1]
    assert depth >= 0, f"{module} has no layer: give it one in LAYERS"
    return depth


def problems(module: str, imported: set[str]) -> list[str]:
    """Sentences on the imports of a module that the layout does not allow."""
    room, found = room_of(module), []
    assert room in ROOMS, f"{module} is in no room: give its room a row in ROOMS"
    for other in sorted(imported):
        if room_of(other) != room:
            if room_of(other) not in ROOMS[room]:
                found.append(f"{module} imports {other}, whose room is not below its own")
            if any(part.startswith("_") for part in other.split(".")):
                found.append(f"{module} imports {other}, which is private to another room")
            continue
        if room in LAYERS and module.startswith(f"{other}."):
            found.append(f"{module} imports {other}, the package that it is part of")
        mine, theirs = layer_of(module), layer_of(other)
        if mine is not None and theirs is not None and theirs <= mine:
            found.append(f"{module} imports {other}, which is not in a layer below its own")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_strictly_downwards(module):
    assert not problems(module, imports_of(modules()[module].read_text()))


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("jax_bsk.core.library", "from jax_bsk.masks import BlockMask", "not below"),
        ("jax_bsk.matmul.api", "def f():\n    from jax_bsk.attention import api", "not below"),
        ("jax_bsk.attention.sharding", "import jax_bsk.attention.native", "not in a layer below"),
        ("jax_bsk.masks.algebra.mask", "from jax_bsk.masks.block_mask import BlockMask", "not in a layer below"),
        ("jax_bsk.masks.algebra.mask", "from jax_bsk.masks import BlockMask", "part of"),
        ("jax_bsk.flax.nnx", "from jax_bsk.selection import _moba", "private"),
        ("jax_bsk.attention.api", "from jax_bsk.core import checks", None),
    ],
)
def test_an_import_that_goes_up_is_seen(module, source, problem):
    found = problems(module, imports_of(source))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_no_private_name_crosses_rooms():
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jax_bsk."):
                private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                assert room_of(node.module) == room_of(module) or not private, f"{module} imports {private}"


def test_subpackages_of_layered_rooms_hold_a_docstring():
    for module, path in modules().items():
        if path.name == "__init__.py" and module.count(".") > 1 and room_of(module) in LAYERS:
            (statement,) = ast.parse(path.read_text()).body
            assert isinstance(statement, ast.Expr), f"{module}: what it imports would have no layer"


def test_homes_of_what_has_one_home():
    for module, path in modules().items():
        if module != "jax_bsk.core.compat":
            assert "jax._src" not in path.read_text(), f"{module}: private JAX belongs in core.compat"
        if room_of(module) != "flax":
            imported = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            }
            assert "flax" not in imported, f"{module}: Flax belongs in jax_bsk.flax"
    for path in (PACKAGE.parent / "csrc").rglob("*.*"):
        text = path.read_text()
        assert ("nanobind/" in text) == (path.name == "bindings.cc"), path
        if path.suffix in (".cu", ".cuh"):
            assert "xla/ffi" not in text, f"{path}: kernels know no XLA header"
            assert "asm" not in text.split() or path.parent.name == "ptx", f"{path}: inline PTX belongs in device/ptx"


def test_includes_of_csrc_go_downwards():
    """Hardware, then what reads block lists, then the operations, which know nothing of each other.

    But for attention, whose forward of few queries is decoding's kernel.
    """
    below = {"device": {"device"}, "cpu": {"cpu"}, "ffi": {"ffi"}}
    below["lists"] = {"device", "cpu", "ffi", "lists"}
    below |= {operation: {*below["lists"], operation} for operation in ("attention", "decode", "matmul")}
    below["attention"] |= {"decode"}
    csrc = PACKAGE.parent / "csrc"
    for path in csrc.rglob("*.*"):
        folder = path.relative_to(csrc).parts[0]
        for included in re.findall(r'#include "(\w+)/', path.read_text()):
            assert folder not in below or included in below[folder] | {"xla"}, f"{path} includes {included}/"
