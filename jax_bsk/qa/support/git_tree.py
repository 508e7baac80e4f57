"""Git's hash of a folder as it lies on disk: `git rev-parse HEAD:csrc` of a clean checkout, without git.

Tells which sources a library was built from (the build runs this file as a script) and which a report is of. Standard
library alone: the build has nothing else.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

# What builds and editors leave in a package and git ignores.
_IGNORED_NAMES = {"__pycache__"}
_IGNORED_SUFFIXES = {".so", ".pyc", ".pyd"}


def tree_hash(folder: Path) -> str:
    """SHA-1 of the tree object that git would store for `folder`; empty folders do not count, as in git."""
    return _tree(folder).hex()


def _tree(folder: Path) -> bytes:
    entries = []
    for path in folder.iterdir():
        if path.name in _IGNORED_NAMES or path.suffix in _IGNORED_SUFFIXES or path.name.startswith("."):
            continue
        if path.is_dir():
            if any(child.is_file() for child in path.rglob("*")):
                entries.append((path.name + "/", b"40000 " + path.name.encode(), _tree(path)))
        else:
            mode = b"100755 " if path.stat().st_mode & 0o100 else b"100644 "
            entries.append((path.name, mode + path.name.encode(), _object(b"blob", path.read_bytes())))
    # Git orders a folder as if its name ended in a slash.
    return _object(b"tree", b"".join(name + b"\0" + digest for _, name, digest in sorted(entries)))


def _object(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).digest()


def _write_header(folder: Path, header: Path) -> None:
    """A header that defines the hash; untouched where it does already, so that nothing is compiled again."""
    text = f'#define JAX_BSK_SOURCE_TREE "{tree_hash(folder)}"\n'
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


if __name__ == "__main__":
    _write_header(Path(sys.argv[1]), Path(sys.argv[2]))
