"""Checks the machine code of the CUDA library, without a GPU: each kernel holds the instructions it was written for.

A kernel that lost its matrix instructions, its copy engine or its registers still gives right numbers, only slowly, and
no test without a GPU would notice. So the built library is disassembled and every kernel in it is held to this:

- in a namespace `sm90`: HGMMA (wgmma; HMMA in products of few columns, which wait for memory) and UTMALDG (a TMA
  load), no LDL or STL, no stack or local memory, and a fence between an LDSM and the next arrival at a barrier: the
  copy engine may refill what is released there, and nothing but a fence makes an LDSM, whose registers only matrix
  products read, come first (wrong rows, seen on an H200);
- in a namespace `sm80` with a 16-bit type: HMMA (mma.sync);
- in the namespace `decode`: no LDL or STL, no stack or local memory, and in the forward LDGSTS (cp.async), for sm_90a
  UTMALDG and that fence as well, and, with a 16-bit type, HMMA.

A kernel that has no matrix product (a reduction, a merge) therefore belongs in neither `sm80` nor `sm90`.

Usage: python tools/check_sass.py [LIBRARY.so] [--require-sm90]. Needs cuobjdump and nvdisasm: of a CUDA toolkit, or the
PyPI wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, which the extra `dev` has.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jax_bsk.qa.support.cuda_tools import RESOURCES, find_tool, short_names

# Namespaces and types as they stand in a mangled name, which needs no demangler: length, then identifier.
SM80, SM90, DECODE = "4sm80", "4sm90", "6decode"
# Kernels there whose products are mma.sync's.
SMALL_PRODUCTS = ("12NarrowKernel",)
SIXTEEN_BIT = ("7Float16", "8BFloat16")

FUNCTION = re.compile(r"^\t\tFunction : (\S+)\n", re.MULTILINE)
# "  /*00f0*/   @!UP0 UTMALDG.2D [UR4], [UR10] ;   /* encoding */": address, predicate, opcode up to its first modifier.
OPCODE = re.compile(r"^[ \t]+/\*[0-9a-f]{4,}\*/[ \t]+(?:@!?U?P\w+[ \t]+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
# Of these, what loads from shared memory for HGMMA, what says that the memory may be refilled, and what keeps the two
# in order.
ORDERED = re.compile(r"^[ \t]+/\*[0-9a-f]{4,}\*/[ \t]+(?:@!?U?P\w+[ \t]+)?(LDSM|SYNCS\.ARRIVE|FENCE)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel entry in one of the library's cubins."""

    arch: str
    mangled: str
    name: str
    registers: int
    local_bytes: int  # stack frame and local memory
    opcodes: Mapping[str, int]  # instructions by opcode, without modifiers
    unfenced: int  # arrivals at a barrier that follow an LDSM with no fence between them

    def __str__(self) -> str:
        return f"{self.name} ({self.arch})"


def parse(text: str) -> list[Kernel]:
    """Kernels of one cubin, from what `cuobjdump -sass -res-usage` says of it.

    Raises:
        ValueError: the text is not understood, or lists a kernel without its registers or without instructions.
    """
    arch = re.search(r"^\tcode for (\S+)$", text, re.MULTILINE)
    if arch is None:
        raise ValueError(f"no architecture in what cuobjdump says: {text[:200]!r}")
    resources = {mangled: [int(n) for n in numbers] for mangled, *numbers in RESOURCES.findall(text)}
    _, *parts = FUNCTION.split(text)
    codes = dict(zip(parts[::2], parts[1::2], strict=True))
    opcodes = {m: collections.Counter(OPCODE.findall(code)) for m, code in codes.items()}
    # Half an answer would pass for a library without faults.
    unread = resources.keys() ^ {m for m, count in opcodes.items() if count}
    if unread:
        raise ValueError(f"cuobjdump gave only registers or only instructions of {', '.join(sorted(unread))}")
    return [
        Kernel(arch.group(1), mangled, name, registers, stack + local, opcodes[mangled], _unfenced(codes[mangled]))
        for (mangled, (registers, stack, local)), name in zip(
            resources.items(), short_names(list(resources)), strict=True
        )
    ]


def _unfenced(code: str) -> int:
    """Arrivals whose last LDSM or fence before them, as the code is laid out, is an LDSM."""
    count, loaded = 0, False
    for opcode in ORDERED.findall(code):
        count += loaded and opcode == "SYNCS.ARRIVE"
        loaded = opcode == "LDSM"
    return count


def violations(kernels: Iterable[Kernel], *, require_sm90: bool = False) -> list[str]:
    """One sentence for each rule that a kernel breaks."""
    kernels, found = list(kernels), []
    if require_sm90 and not any(SM90 in k.mangled and k.arch == "sm_90a" for k in kernels):
        archs = ", ".join(sorted({k.arch for k in kernels})) or "no architecture"
        found.append(f"The library has no kernel in a namespace sm90 for sm_90a (it has kernels for {archs}).")
    for kernel in kernels:
        count = kernel.opcodes.get
        if SM90 in kernel.mangled:
            where = "" if kernel.arch == "sm_90a" else "; it is to be compiled for sm_90a alone"
            product = "HMMA" if any(name in kernel.mangled for name in SMALL_PRODUCTS) else "HGMMA"
            if not count(product):
                found.append(f"{kernel} has no {product} instruction{where}.")
            if not count("UTMALDG"):
                found.append(f"{kernel} has no UTMALDG instruction{where}.")
        decodes = DECODE in kernel.mangled and "ForwardKernel" in kernel.mangled
        if (SM90 in kernel.mangled or (decodes and kernel.arch == "sm_90a")) and kernel.unfenced:
            found.append(
                f"{kernel} releases shared memory without a fence after LDSM, in {kernel.unfenced} places; call "
                "FenceAsyncProxy before the release."
            )
        if SM90 in kernel.mangled or DECODE in kernel.mangled:
            if count("LDL") or count("STL"):
                found.append(f"{kernel} has {count('LDL', 0)} LDL and {count('STL', 0)} STL instructions.")
            if kernel.local_bytes:
                found.append(f"{kernel} has {kernel.local_bytes} bytes of stack or local memory.")
        if decodes and not count("LDGSTS"):
            found.append(f"{kernel} has no LDGSTS instruction.")
        if decodes and kernel.arch == "sm_90a" and not count("UTMALDG"):
            found.append(f"{kernel} has no UTMALDG instruction.")
        if (decodes or SM80 in kernel.mangled) and any(t in kernel.mangled for t in SIXTEEN_BIT) and not count("HMMA"):
            found.append(f"{kernel} computes on a 16-bit type and has no HMMA instruction.")
    return found


def table(kernels: Iterable[Kernel]) -> str:
    """One line a kernel."""
    lines = ["arch    regs  local  HGMMA  UTMALDG  HMMA  LDL/STL  kernel"]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        n = collections.Counter(k.opcodes)
        lines.append(
            f"{k.arch:7} {k.registers:4} {k.local_bytes:6} {n['HGMMA']:6} {n['UTMALDG']:8} {n['HMMA']:5} "
            f"{n['LDL'] + n['STL']:8}  {k.name}"
        )
    return "\n".join(lines)


def find_disassembler() -> tuple[str, dict[str, str]]:
    """cuobjdump ($CUOBJDUMP, else `find_tool`), and the environment in which it finds its nvdisasm.

    Raises:
        SystemExit: one of the two is missing.
    """
    chosen = os.environ.get("CUOBJDUMP")
    cuobjdump = shutil.which(chosen) if chosen else find_tool("cuobjdump")
    if cuobjdump is None:
        where = f"$CUOBJDUMP is {chosen!r}, which is no program" if chosen else "There is no cuobjdump on this machine"
        raise SystemExit(f"{where}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or a CUDA toolkit.")
    environment = dict(os.environ)
    # cuobjdump runs the nvdisasm next to it, then $NVDISASM_PATH's, then PATH's: a toolkit with only the one gets ours.
    if not Path(cuobjdump).with_name("nvdisasm").exists() and "NVDISASM_PATH" not in environment:
        nvdisasm = find_tool("nvdisasm")
        if nvdisasm is None:
            raise SystemExit(f"{cuobjdump} needs nvdisasm: pip install nvidia-cuda-nvdisasm, or a CUDA toolkit.")
        environment["NVDISASM_PATH"] = str(Path(nvdisasm).parent)
    return cuobjdump, environment


def read_kernels(library: Path) -> list[Kernel]:
    """Disassembles a library, one cubin a process: 6 seconds on 2 cores for 64 kernels, 11 when asked for all at once.

    Raises:
        SystemExit: no disassembler, no such library, no CUDA code in it, or code newer than the disassembler.
    """
    cuobjdump, environment = find_disassembler()

    def run(*arguments: str | Path, cwd: str | None = None) -> str:
        result = subprocess.run([cuobjdump, *arguments], capture_output=True, text=True, env=environment, cwd=cwd)
        if result.returncode:
            raise SystemExit(f"{cuobjdump} failed on {library} ({result.stderr.strip() or result.returncode}).")
        return result.stdout

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        run("-xelf", "all", library.resolve(), cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        try:
            texts = pool.map(functools.partial(run, "-sass", "-res-usage"), cubins)
            return [kernel for text in texts for kernel in parse(text)]
        except ValueError as error:
            raise SystemExit(f"{library} could not be read: {error}.") from error


def built_library() -> Path:
    """The CUDA library of the jax_bsk of this environment.

    Raises:
        SystemExit: there is none.
    """
    spec = importlib.util.find_spec("jax_bsk") and importlib.util.find_spec("jax_bsk._cuda")
    if not (spec and spec.origin):
        raise SystemExit("jax_bsk has no CUDA library here: `make build` builds it where there is an nvcc.")
    return Path(spec.origin)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks the machine code of the CUDA library; needs no GPU.")
    parser.add_argument("library", nargs="?", type=Path, help="a library with CUDA code (default: jax_bsk's own)")
    parser.add_argument("--require-sm90", action="store_true", help="fail when there is no sm90 kernel for sm_90a")
    options = parser.parse_args(arguments)
    library = options.library or built_library()
    kernels = read_kernels(library)
    found = violations(kernels, require_sm90=options.require_sm90)
    if found:
        print(*found, f"{library}: {len(kernels)} kernels, faults: {len(found)}.", sep="\n", file=sys.stderr)
        return 1
    print(table(kernels), f"{library}: {len(kernels)} kernels, no faults.", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
