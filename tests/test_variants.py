"""The list of the CUDA kernels' variants (csrc/variants.py): the kernels that calls look for are there."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest

from csrc import variants

CSRC = Path(variants.__file__).parent
MAX_HEAD_DIM = int(re.findall(r"kMaxHeadDim = (\d+);", (CSRC / "attention/cuda_limits.h").read_text())[0])
CALLS = set(itertools.product((False, True), repeat=3))  # a soft cap, gates, extras (biases and dropout)
TAKES = {  # features: which of these, as in attention/variant.h
    "Any": CALLS,
    "Ungated": {(False, False, False), (True, False, False)},
    "Extended": {(cap, gates, extras) for cap, gates, extras in CALLS if gates or extras},
    "Plain": {(False, False, False)},
    "SoftCap": {(True, False, False)},
    "PlainGated": {(False, True, False)},
    "PlainExtras": {(False, False, True)},
}


def rows(arch: str, kernel: str, element: str, tile: int) -> list[variants.Kernels]:
    return [
        row
        for row in variants.ATTENTION
        if (row.arch, row.kernel) == (arch, kernel) and element in row.types and tile in row.tiles
    ]


@pytest.mark.parametrize("kernel", ["Forward", "Backward"])
@pytest.mark.parametrize("element", variants.DTYPES)
def test_the_portable_kernels_take_every_call(kernel, element):
    taken = {
        call
        for row in rows("sm80", kernel, element, 64)
        if max(row.sizes) == MAX_HEAD_DIM
        for feature in row.features
        for call in TAKES[feature]
    }
    assert taken == CALLS


@pytest.mark.parametrize("kernel", ["Forward", "Backward"])
def test_head_sizes_rise_within_what_a_call_may_take(kernel):
    # A call takes the first that is large enough.
    for arch, element, tile in itertools.product(("sm80", "sm90"), variants.DTYPES, (64, 128)):
        for call in CALLS:
            sizes = [
                size
                for row in rows(arch, kernel, element, tile)
                for size in row.sizes
                if any(call in TAKES[feature] for feature in row.features)
            ]
            assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("split", [False, True])
def test_files_instantiate_every_variant_once(split):
    chosen = variants.variants(split)
    written = variants.files(chosen)
    instances = [line for path, text in written.items() if path.endswith(".cu") for line in text.splitlines()]
    assert sorted(line for line in instances if line.startswith("template ")) == sorted(v.instance for v in chosen)
    assert (
        len({v.instance for v in chosen})
        == len(chosen)
        == sum(len(text.splitlines()) for path, text in written.items() if path.endswith(".inc"))
    )
    for path in written:
        if path.endswith(".cu"):
            assert f'"${{CMAKE_CURRENT_LIST_DIR}}/{path}"' in written["variants.cmake"]
            assert all((CSRC / v.header).is_file() for v in chosen if v.path == path)


def test_writing_again_touches_nothing_but_what_is_stale(tmp_path):
    variants.write(tmp_path)
    files = [tmp_path / path for path in variants.files(variants.variants())]
    for file in files:
        os.utime(file, (1_000_000_000, 1_000_000_000))
    files[0].write_text("of an earlier list")
    variants.write(tmp_path)
    assert files[0].read_text() == variants.files(variants.variants())[str(files[0].relative_to(tmp_path))]
    assert all(file.stat().st_mtime == 1_000_000_000 for file in files[1:])
