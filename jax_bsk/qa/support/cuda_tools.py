"""Programs of the CUDA toolkit, wherever they are, and what they say of compiled kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

TOOLKIT = "/usr/local/cuda/bin"
# A kernel in what `cuobjdump -res-usage` says: mangled name, registers, stack frame, local memory.
RESOURCES = re.compile(r"^ Function (\S+):\n +REG:(\d+) STACK:(\d+) .*?\bLOCAL:(\d+)", re.MULTILINE)
_CUBIN = re.compile(r"^arch = (\S+)$", re.MULTILINE)


def find_tool(name: str) -> str | None:
    """A CUDA program on PATH, in the usual toolkit folder, next to nvcc, or in the PyPI wheels."""
    folders = [os.environ.get("PATH", os.defpath), TOOLKIT]
    nvcc = shutil.which("nvcc")
    if nvcc:  # a link on PATH leads to the toolkit
        folders.append(str(Path(nvcc).resolve().parent))
    wheels = importlib.util.find_spec("nvidia")
    folders += [f"{folder}/cu13/bin" for folder in (wheels and wheels.submodule_search_locations) or ()]
    return shutil.which(name, path=os.pathsep.join(folders))


def shorten(demangled: str) -> str:
    """`void jax_bsk::attention::cuda::sm80::K<(int)8, A<B> >(P)` as `sm80::K<8, A<B>>`."""
    name = re.sub(r"\bjax_bsk::(?:attention::)?(?:cuda::)?", "", demangled.removeprefix("void "))
    name = re.sub(r"\((?:bool|int|unsigned int|long|unsigned long)\)(?=[-\d])", "", name)
    return re.sub(r"\([^()]*\)$", "", name).replace("> >", ">>")


def short_names(mangled: list[str]) -> list[str]:
    """Demangled and shortened where the machine has a demangler, as they are elsewhere."""
    demangler = shutil.which("c++filt") or find_tool("cu++filt")
    if not (demangler and mangled):
        return mangled
    result = subprocess.run([demangler], input="\n".join(mangled) + "\n", capture_output=True, text=True, check=True)
    return [shorten(line) for line in result.stdout.splitlines()]


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """What one kernel takes."""

    name: str
    arch: str
    registers: int
    local_bytes: int  # stack frame and local memory
    hopper: bool  # of the namespace sm90, whose kernels are to have none


class NoDisassembler(Exception):
    """cuobjdump is absent or failed; the message says so."""


def kernel_resources(library: Path) -> list[KernelResources]:
    """Of every kernel in a library.

    Raises:
      NoDisassembler: it could not be read.
    """
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        raise NoDisassembler("there is no cuobjdump (a CUDA toolkit's, or the PyPI wheel nvidia-cuda-cuobjdump)")
    command = [cuobjdump, "-res-usage", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    _, *parts = _CUBIN.split(result.stdout)
    found = [
        (arch, mangled, *map(int, numbers))
        for arch, text in zip(parts[::2], parts[1::2], strict=True)
        for mangled, *numbers in RESOURCES.findall(text)
    ]
    if result.returncode or not found:
        raise NoDisassembler(f"cuobjdump lists no kernel: {result.stderr.strip()[-200:]}")
    names = short_names([mangled for _, mangled, *_ in found])
    return [
        KernelResources(name, arch, registers, stack + local, "4sm90" in mangled)
        for name, (arch, mangled, registers, stack, local) in zip(names, found, strict=True)
    ]
