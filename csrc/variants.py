"""The variants of the CUDA kernels, listed once: the build asks this script for its files.

    python csrc/variants.py FOLDER [--split]

writes below FOLDER

- the files that instantiate the kernels, such as attention/sm90/fwd_bf16_small.cu;
- the tables of what they instantiate, OPERATION/variants.inc, in which attention/variants.cc, decode/launch.cc and
  matmul/launch.cu look for the kernel that a call needs;
- variants.cmake, which tells CMake the names of the files.

A file that is already as it should be is not touched, so that nothing is compiled again.

For another head size, add the number to the rows of ATTENTION that are to have it. What its kernel needs beyond that,
such as a tile that fits the registers, is in attention/sm80/config.h and attention/sm90/config.h.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path

DTYPES = {"BFloat16": "bf16", "Float16": "f16", "float": "f32"}  # types of device/element.h: in names of files
HALVES = ("BFloat16", "Float16")
EXTRAS_APART = ("Ungated", "Extended")
HOPPER = ("Plain", "SoftCap", "PlainGated", "PlainExtras")


@dataclass(frozen=True)
class Kernels:
    """A row: every combination of its lists is a variant. attention/variant.h says what tiles and features are."""

    arch: str  # a namespace and a folder: sm80 is compiled for every target, sm90 for sm_90a alone
    kernel: str
    types: tuple[str, ...]
    sizes: tuple[int, ...]
    tiles: tuple[int | str, ...]
    features: tuple[str, ...]


# A call takes the first variant that has its type, its tile and its features, and a head size that is large enough.
ATTENTION = (
    Kernels("sm80", "Forward", HALVES, (64, 128), (64, 128), ("Ungated",)),
    Kernels("sm80", "Forward", HALVES, (64,), (64, 128), ("Extended",)),
    Kernels("sm80", "Forward", HALVES, (128,), (64,), ("Extended",)),
    Kernels("sm80", "Forward", HALVES, (256,), (64,), EXTRAS_APART),
    Kernels("sm80", "Forward", ("float",), (64, 128), (64,), ("Any",)),
    Kernels("sm80", "Forward", ("float",), (256,), (64,), EXTRAS_APART),
    Kernels("sm80", "Backward", HALVES, (64, 128, 256), (64,), EXTRAS_APART),
    Kernels("sm80", "Backward", ("float",), (64,), (64,), ("Any",)),
    Kernels("sm80", "Backward", ("float",), (128, 256), (64,), EXTRAS_APART),
    Kernels("sm90", "Forward", HALVES, (64, 96, 128, 256), (64, 128), HOPPER),
    Kernels("sm90", "Forward", HALVES, (64,), ("64Feeder",), ("Plain", "SoftCap", "PlainGated")),
    Kernels("sm90", "Backward", HALVES, (64, 96, 128), (64, 128), HOPPER),
    Kernels("sm90", "Backward", HALVES, (256,), (64,), HOPPER),
)
# Types and head sizes, each for both kinds of keys. A call takes the first variant that has its type and room for it.
DECODE = ((HALVES, (64, 128, 256)), (("float",), (64, 128)))
KEYS = ("Paged", "Listed")
QUANTISED = ("Float8E4M3", "Int8")  # caches in pages that are not of the queries' type, for both of these, of 128
PRODUCTS = ("Product", "Narrow", "Sampled")  # each for both types and for every layout of the two operands
LAYOUTS = ("Layout::kKMajor", "Layout::kMnMajor")

# Parameters of the launchers, as config.h declares them.
PARAMETERS = {
    ("sm80", "Forward"): "const ForwardParams&, cudaStream_t",
    ("sm80", "Backward"): "const BackwardParams&, const BackwardMarks&, float*, cudaStream_t",
    ("sm90", "Forward"): "const ForwardParams&, int32_t*, int, cudaStream_t",
    ("sm90", "Backward"): "const BackwardParams&, const BackwardLayout&, void*, int, cudaStream_t",
    ("cuda", "Decode"): "const KernelParams&, const device::DeviceFacts&, cudaStream_t",
    ("sm90", "Product"): "const ProductParams&, const ProductPlan&, int, cudaStream_t",
    ("sm90", "Narrow"): "const ProductParams&, const NarrowPlan&, int, int, cudaStream_t",
    ("sm90", "Sampled"): "const SampledParams&, const SampledPlan&, int, cudaStream_t",
}


@dataclass(frozen=True)
class Variant:
    """One set of template arguments: where it is instantiated, by what, and its row of the table."""

    path: str  # of the file
    header: str  # that defines the kernel
    namespace: str
    instance: str  # what instantiates it
    row: str  # of the table: a macro that the table's reader defines
    hopper: bool  # compiled for sm_90a alone

    @property
    def operation(self) -> str:
        return self.path.partition("/")[0]


def variants(split: bool = False) -> list[Variant]:
    """All variants in the order of the tables.

    Args:
        split: one file for each head size and each of the features, of which tests compile single ones. Otherwise a
            file has many variants, because the headers alone take 1.4 to 1.9 seconds to compile; but it takes no more
            than half a minute, so that a build on many cores does not wait for it.
    """
    found = []
    for row in ATTENTION:
        stem = {"Forward": "fwd", "Backward": "bwd"}[row.kernel]
        for element, size, feature, tile in itertools.product(row.types, row.sizes, row.features, row.tiles):
            name = f"{stem}_{DTYPES[element]}"
            if split:
                name += f"_{size}_{feature.lower()}"
            elif row.arch == "sm90":
                name += "_small" if size < 128 else "_large"
            arguments = f"{_qualified(element)}, {size}, Tile::k{tile}, Features::k{feature}"
            found.append(
                Variant(
                    path=f"attention/{row.arch}/{name}.cu",
                    header=f"attention/{row.arch}/{stem}.cuh",
                    namespace=f"attention::cuda::{row.arch}",
                    instance=f"template cudaError_t Launch{row.kernel}<{row.kernel}Config<{arguments}>>"
                    f"({PARAMETERS[row.arch, row.kernel]});",
                    row=f"JAX_BSK_{row.kernel.upper()}({row.arch}, {arguments})",
                    hopper=row.arch == "sm90",
                )
            )
    decode = [(e, e, size, keys) for types, sizes in DECODE for e, size, keys in itertools.product(types, sizes, KEYS)]
    decode += [(element, cache, 128, "Paged") for element, cache in itertools.product(HALVES, QUANTISED)]
    for element, cache, size, keys in decode:
        arguments = f"{_qualified(element)}, {_qualified(cache)}, {size}, Keys::k{keys}"
        name = f"{keys.lower()}_{DTYPES[element]}" if cache == element else f"quantised_{DTYPES[element]}"
        found.append(
            Variant(
                path=f"decode/cuda/{name}{f'_{size}' if split else ''}.cu",
                header="decode/cuda/forward.cuh",
                namespace="decode::cuda",
                instance=f"template cudaError_t Launch<Config<{arguments}>>({PARAMETERS['cuda', 'Decode']});",
                row=f"JAX_BSK_DECODE({arguments})",
                hopper=False,
            )
        )
    for kernel, element, left, right in itertools.product(PRODUCTS, HALVES, LAYOUTS, LAYOUTS):
        arguments = f"{_qualified(element)}, {left}, {right}"
        found.append(
            Variant(
                path=f"matmul/sm90/{kernel.lower()}_{DTYPES[element]}.cu",
                header=f"matmul/sm90/{kernel.lower()}.cuh",
                namespace="matmul::cuda::sm90",
                instance=f"template cudaError_t Launch{kernel}<{arguments}>({PARAMETERS['sm90', kernel]});",
                row=f"JAX_BSK_{kernel.upper()}({arguments})",
                hopper=True,
            )
        )
    return found


def _qualified(element: str) -> str:
    return element if element == "float" else f"device::{element}"


def files(chosen: list[Variant]) -> dict[str, str]:
    """The text of every file, by its path below the folder."""
    written: dict[str, str] = {}
    for path, group in itertools.groupby(sorted(chosen, key=lambda v: v.path), key=lambda v: v.path):
        members = list(group)
        lines = "\n".join(variant.instance for variant in members)
        written[path] = (
            f'#include "{members[0].header}"\n\nnamespace jax_bsk::{members[0].namespace} {{\n\n{lines}\n\n}}\n'
        )
    for operation in ("attention", "decode", "matmul"):
        rows = [variant.row for variant in chosen if variant.operation == operation]
        written[f"{operation}/variants.inc"] = "\n".join(rows) + "\n"
    lists = {
        "JAX_BSK_PORTABLE_INSTANCES": [variant.path for variant in chosen if not variant.hopper],
        "JAX_BSK_HOPPER_INSTANCES": [variant.path for variant in chosen if variant.hopper],
    }
    lines = [f"set(JAX_BSK_VARIANTS {len(chosen)})"]
    for name, paths in lists.items():
        lines += [f"set({name}", *(f'    "${{CMAKE_CURRENT_LIST_DIR}}/{path}"' for path in dict.fromkeys(paths)), ")"]
    written["variants.cmake"] = "\n".join(lines) + "\n"
    return written


def write(folder: Path, split: bool = False) -> None:
    for path, text in files(variants(split)).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", action="store_true", help="one file for each of the features")
    given = parser.parse_args()
    write(given.folder, given.split)


if __name__ == "__main__":
    main()
