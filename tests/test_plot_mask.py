"""`python -m jax_bsk plot-mask`: the drawn mask is the written one, and nothing but masks is read."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jax_bsk import masks
from jax_bsk.__main__ import main
from jax_bsk.cli import mask_expression, plot_mask
from jax_bsk.masks import (
    ArrayMask,
    BigBirdMask,
    BlockArrayMask,
    CausalMask,
    ChunkedMask,
    DilatedMask,
    FullMask,
    GlobalMask,
    LocalMask,
    MultiHeadMask,
    PrefixLMMask,
    SegmentMask,
)

EXPRESSIONS = {
    "CausalMask() & LocalMask((64, 0))": CausalMask() & LocalMask((64, 0)),
    "CausalMask() & (LocalMask((32, None)) | GlobalMask([0, 5]))": CausalMask()
    & (LocalMask((32, None)) | GlobalMask([0, 5])),
    " ~DilatedMask(3, window=(40, 7)) ": ~DilatedMask(3, window=(40, 7)),
    "PrefixLMMask(prefix=50) | ChunkedMask(100, offset=-3)": PrefixLMMask(50) | ChunkedMask(100, offset=-3),
    "NeighborhoodMask((8, 24), (3, 5), causal=(True, False), start=0) | VerticalSlashMask([3], [0, 9])": (
        masks.NeighborhoodMask((8, 24), (3, 5), causal=(True, False), start=0) | masks.VerticalSlashMask([3], [0, 9])
    ),
    "SliceMask([[0, 256]], [[0, 192]], 'causal') & BlockDiagonalMask([100, 90], window=(None, 0))": (
        masks.SliceMask([[0, 256]], [[0, 192]], "causal") & masks.BlockDiagonalMask([100, 90], window=(None, 0))
    ),
    "MultiHeadMask([FullMask(), ~CausalMask(), BigBirdMask(32, seed=1)])": MultiHeadMask(
        [FullMask(), ~CausalMask(), BigBirdMask(32, seed=1)]
    ),
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_is_the_mask_that_python_makes(text):
    found = plot_mask.bound(text, 256, 192, 64)
    expected = EXPRESSIONS[text].bind(256, 192, block_size=64)
    np.testing.assert_array_equal(found.to_dense(), expected.to_dense())
    assert found.describe() == expected.describe()


def test_masks_of_data():
    ids = [0] * 20 + [1] * 44
    text = f"CausalMask() & SegmentMask({ids}, contiguous=True)"
    np.testing.assert_array_equal(
        plot_mask.bound(text, 64, None, 32).to_dense(),
        (CausalMask() & SegmentMask(np.array(ids))).bind(64, block_size=32).to_dense(),
    )
    array = [[True, False], [True, True]]
    assert plot_mask.bound(f"ArrayMask({array})", 2, 2, 32).to_dense()[0, 0].tolist() == array
    blocks = plot_mask.bound(f"BlockArrayMask({array}, block_size=32)", 64, None, 32).to_dense()
    np.testing.assert_array_equal(blocks[0, 0], np.kron(array, np.ones((32, 32))))


def test_every_mask_but_the_one_of_a_function_can_be_written():
    written = {ArrayMask, BigBirdMask, BlockArrayMask, CausalMask, ChunkedMask, DilatedMask, FullMask, GlobalMask}
    written |= {LocalMask, MultiHeadMask, PrefixLMMask, SegmentMask}
    written |= {masks.NeighborhoodMask, masks.SlidingTileMask, masks.ShiftedWindowMask, masks.VerticalSlashMask}
    written |= {masks.RowRangeMask, masks.ColumnRangeMask, masks.SliceMask, masks.BlockDiagonalMask}
    written |= {masks.BlockDiffusionMask, masks.TreeMask, masks.PackedMask}
    assert set(mask_expression.ALLOWED.values()) == written
    assert {"Mask", "FunctionMask", "BlockMask", "TokenOrder", "as_block_mask"} == set(masks.__all__) - set(
        mask_expression.ALLOWED
    )


REFUSED = [
    "__import__('os').system('touch hacked')",
    "().__class__.__bases__[0].__subclasses__()",
    "CausalMask().__class__",
    "CausalMask().bind(64)",
    "CausalMask",
    "masks.CausalMask()",
    "Mask()",
    "BlockMask(1)",
    "FunctionMask(CausalMask)",
    "open('x')",
    "[CausalMask() for _ in (1,)]",
    "{CausalMask()}",
    "lambda: CausalMask()",
    "(x := CausalMask())",
    "CausalMask() if True else FullMask()",
    "CausalMask() and FullMask()",
    "not CausalMask()",
    "CausalMask() ^ FullMask()",
    "CausalMask() < FullMask()",
    "CausalMask() & 3",
    "~0",
    "3",
    "[CausalMask()]",
    "LocalMask(1 + 1)",
    "LocalMask(9 ** 9 ** 9)",
    "LocalMask(1e999)",
    "LocalMask(1073741824)",
    "LocalMask(-True)",
    "LocalMask(b'1')",
    "LocalMask(f'{1}')",
    "LocalMask(*(1,))",
    "LocalMask(**{'window': 1})",
    "LocalMask(window=1, window=2)",
    "CausalMask(); FullMask()",
    "CausalMask()\nimport os",
    "CausalMask(",
    "",
    "a\0b",
    "LocalMask(" + "9" * 5000 + ")",
    "~" * 9000 + "FullMask()",
    "~(" * 150 + "FullMask()" + ")" * 150,
    "a" + ".a" * 4000,
    "+".join(["FullMask()"] * 900),
    "&".join(["FullMask()"] * 900),
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_everything_else_is_refused_with_what_is_allowed(text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot-mask", text, "--length", "64"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "An expression consists of calls of ArrayMask, BigBirdMask" in told.err
    assert told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["CausalMask()", "--length", "0"], "--length must be in"),
        (["CausalMask()", "--length", "999999999999"], "--length must be in"),
        (["CausalMask()", "--length", "64", "--kv-length", "99999999"], "--kv-length must be in"),
        (["CausalMask()", "--length", "262144"], "pairs, and at most"),
        (["BigBirdMask(1)", "--length", "8192"], "give smaller lengths or a larger `block`"),
        (["FullMask() | ~BigBirdMask(128)", "--length", "65536"], "pairs, and at most"),
        (["CausalMask()", "--length", "64", "--block-size", "48"], "multiple of 32"),
        (["CausalMask()", "--length", "64", "--block-size", "65536"], "multiple of 32 in [32, 1,024]"),
        (["CausalMask()", "--length", "64", "--heads", "0"], "at least 1"),
        (["MultiHeadMask([CausalMask(), FullMask()])", "--length", "64", "--heads", "3"], "the mask has 2 heads"),
        (["LocalMask('x')", "--length", "64"], "window must be an int"),
        (["LocalMask()", "--length", "64"], "window"),
        (["SegmentMask([0, 1])", "--length", "64"], "SegmentMask"),
        ([" " * 20_000 + "CausalMask()", "--length", "64"], "at most 10,000 are read"),
    ],
)
def test_what_cannot_be_honoured(options, words, capsys):
    assert main(["plot-mask", *options]) == 2
    assert words in capsys.readouterr().err


def test_the_text_picture():
    mask = plot_mask.bound("CausalMask() & LocalMask((64, 0))", 192, 128, 64)
    assert plot_mask.blocks_of(mask).tolist() == [[1, 0], [1, 1], [0, 1]]
    assert plot_mask.picture(mask, encoding="utf-8").splitlines() == [
        "     keys 0 to 127",
        "  0  ▒▒··",
        "     ▒▒▒▒",
        "     ··▒▒",
        "██ full  ▒▒ partial  ·· empty; one cell is a block, 64 queries x 64 keys",
    ]
    assert plot_mask.picture(mask, encoding="ascii").splitlines()[1:3] == ["  0  ++ .", "     ++++"]


def test_cells_of_several_blocks():
    mask = plot_mask.bound("CausalMask()", 33 * 32 - 5, None, 32)
    lines = plot_mask.picture(mask, encoding="utf-8").splitlines()[1:-1]
    assert len(lines) == 17  # of two rows of blocks each, the last of one
    for place, line in enumerate(lines):
        cells = line[-34:]
        assert cells == "██" * place + "▒▒" + "··" * (16 - place)
    assert lines[4].startswith("  256  ")


def test_long_masks_are_held_as_runs():
    mask = plot_mask.bound("CausalMask()", 131_072, None, 128)
    assert mask.holds_runs
    np.testing.assert_array_equal(
        plot_mask.blocks_of(mask), 2 * np.tri(1024, k=-1, dtype=np.int8) + np.eye(1024, dtype=np.int8)
    )


def test_the_command(capsys):
    assert main(["plot-mask", "CausalMask() & LocalMask((1024, 0))", "--length", "8192"]) == 0
    text = capsys.readouterr().out
    assert text.startswith((CausalMask() & LocalMask((1024, 0))).bind(8192).describe())
    assert "one cell is 2 x 2 blocks, 256 queries x 256 keys" in text


def test_heads_are_drawn_one_by_one(capsys):
    expression = "MultiHeadMask([CausalMask(), LocalMask(64), FullMask()])"
    assert main(["plot-mask", expression, "--length", "256"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "head " in line] == [
        "head 0:",
        "head 1:",
        "head 2:",
    ]
    assert main(["plot-mask", expression, "--length", "256", "--heads", "2"]) == 0
    assert "head 2:" not in capsys.readouterr().out
    # All heads of an attention call share a mask that has one.
    assert main(["plot-mask", "CausalMask()", "--length", "256", "--heads", "8"]) == 0
    assert "head " not in capsys.readouterr().out


@pytest.mark.parametrize("expression", ["CausalMask()", "MultiHeadMask([CausalMask(), FullMask()])"])
def test_a_picture(expression, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "mask.png"
    assert main(["plot-mask", expression, "--length", "256", "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {path}" in capsys.readouterr().out
    assert main(["plot-mask", expression, "--length", "256", "--output", str(path.with_suffix(".nothing"))]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_matplotlib_there_is_the_text_and_the_remedy(tmp_path, capsys, monkeypatch):
    for name in [*(name for name in sys.modules if name.startswith("matplotlib.")), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "mask.png"
    assert main(["plot-mask", "CausalMask()", "--length", "256", "--output", str(path)]) == 2
    told = capsys.readouterr()
    assert "one cell is a block" in told.out
    assert "pip install matplotlib" in told.err
    assert not path.exists()
