"""The check of the CUDA library's machine code, on recorded text: CI runs it on the library itself, `make sass`."""

from __future__ import annotations

import re
import stat

import pytest

from jax_bsk.qa.support import cuda_tools
from tools import check_sass

# What cuobjdump 13.5 says of a cubin with two small kernels, their code cut to a few lines.
MINE = "_ZN7jax_bsk9attention4cuda4sm9013ForwardKernelINS2_6ConfigINS_6device8BFloat16ELi128EEEEEv14CUtensorMap_stPf"
OTHER = "_ZN7jax_bsk9attention4cuda4sm8011PlainKernelIfEEvPT_"
TEXT = f"""
Resource usage:
 Common:
  GLOBAL:0
 Function {OTHER}:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {MINE}:
  REG:30 STACK:0 SHARED:9224 LOCAL:0 CONSTANT[0]:776 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
	.target	sm_90a

		Function : {OTHER}
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0030*/                   LDG.E R5, desc[UR4][R2.64+0x4] ;                          /* 0x0000040402057981 */
                                                                                             /* 0x001ea8000c1e1900 */
        /*0050*/                   EXIT ;                                                    /* 0x000000000000794d */
                                                                                             /* 0x000fea0003800000 */
		..........


		Function : {MINE}
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*00e0*/               @P0 ELECT P1, URZ, PT ;                                       /* 0x00000000ff00082f */
                                                                                             /* 0x000fe20003820000 */
        /*00f0*/              @!UP0 UTMALDG.2D [UR4], [UR10] ;                               /* 0x000000040a0075b4 */
                                                                                             /* 0x0003e20008009000 */
        /*0120*/               @P0 BRA.U.ANY 0xe0 ;                                          /* 0xfffffffd00ec0947 */
                                                                                             /* 0x000fea000393ffff */
        /*0710*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;  /* 0x00000000041879f0 */
                                                                                             /* 0x000fe4000c7008ff */
        /*0720*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;       /* 0x00000000081879f0 */
                                                                                             /* 0x000fe40008000818 */
        /*0800*/                   EXIT ;                                                    /* 0x000000000000794d */
                                                                                             /* 0x000fea0003800000 */
		..........
"""


def test_what_is_read():
    other, mine = check_sass.parse(TEXT)
    assert (other.mangled, other.arch, other.registers, other.local_bytes) == (OTHER, "sm_90a", 8, 0)
    assert other.opcodes == {"LDG": 1, "EXIT": 1}
    assert (mine.mangled, mine.arch, mine.registers, mine.local_bytes) == (MINE, "sm_90a", 30, 0)
    assert mine.opcodes == {"ELECT": 1, "UTMALDG": 1, "BRA": 1, "HGMMA": 2, "EXIT": 1}
    assert not check_sass.violations([other, mine], require_sm90=True)
    assert len(check_sass.table([other, mine]).splitlines()) == 3


@pytest.mark.parametrize(
    ("before", "after", "faults"),
    [
        (r"HGMMA\S+", "NOP", ["no HGMMA instruction."]),
        (r"UTMALDG\S+", "UBLKCP", ["no UTMALDG instruction."]),
        (r"ELECT P1, URZ, PT", "STL.128 [R1+0x10], R12", ["0 LDL and 1 STL instructions."]),
        (r"@P0 ELECT P1, URZ, PT", "LDL.LU.64 R12, [R1+0x10]", ["1 LDL and 0 STL instructions."]),
        (r"REG:30 STACK:0", "REG:30 STACK:256", ["256 bytes of stack or local memory."]),
        (r"SHARED:9224 LOCAL:0", "SHARED:9224 LOCAL:8", ["8 bytes of stack or local memory."]),
        (r"(?<=code for )sm_90a", "sm_90", ["no kernel in a namespace sm90 for sm_90a (it has kernels for sm_90)."]),
        (r"4sm90", "5later", ["no kernel in a namespace sm90 for sm_90a"]),
        (r"HGMMA\S+|UTMALDG\S+", "NOP", ["no HGMMA", "no UTMALDG"]),
        (r"PlainKernelIf", "PlainKernelIN7jax_bsk6device7Float16E", ["16-bit type and has no HMMA"]),
        (r"PlainKernelIf", "PlainKernelIN7jax_bsk6device8BFloat16E", ["16-bit type and has no HMMA"]),
        (r"9attention4cuda4sm8011PlainKernelIf", "6decode4cuda11MergeKernelIf", []),
        (r"9attention4cuda4sm8011PlainKernelIf", "6decode4cuda13ForwardKernelIf", ["no LDGSTS", "no UTMALDG"]),
        (
            r"9attention4cuda4sm8011PlainKernelIf",
            "6decode4cuda13ForwardKernelIN7jax_bsk6device8BFloat16E",
            ["no LDGSTS", "no UTMALDG", "16-bit type and has no HMMA"],
        ),
    ],
)
def test_every_rule_has_its_sentence(before, after, faults):
    text, count = re.subn(before, after, TEXT)
    assert count
    found = check_sass.violations(check_sass.parse(text), require_sm90=True)
    assert len(found) == len(faults), found
    for sentence, fault in zip(found, faults, strict=True):
        assert fault in sentence


@pytest.mark.parametrize(
    ("code", "places"),
    [
        (["LDSM.16.M88.4 R4, [R2]", "@P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x8], RZ"], 1),
        (["LDSM.16.M88.4 R4, [R2]", "FENCE.VIEW.ASYNC.S", "@P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x8], RZ"], 0),
        (["LDSM.16.M88.4 R4, [R2]", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "SYNCS.ARRIVE.A1T0 RZ, [R4]"], 1),
        (["SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ", "LDSM.16.M88.4 R4, [R2]"], 0),
        (["LDSM.16.M88.4 R4, [R2]", *["SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ"] * 2], 1),
    ],
)
def test_a_fence_stands_between_a_load_and_the_release(code, places):
    lines = "".join(f"        /*{0x900 + 16 * n:04x}*/    {line} ;    /* 0x0 */\n" for n, line in enumerate(code))
    cut = TEXT.rindex("        /*0800*/")
    kernels = check_sass.parse(TEXT[:cut] + lines + TEXT[cut:])
    assert kernels[1].unfenced == places
    assert len(check_sass.violations(kernels)) == bool(places)


def test_a_16_bit_kernel_with_its_instruction_has_no_fault():
    text = TEXT.replace("PlainKernelIf", "PlainKernelIN7jax_bsk6device7Float16E").replace(
        "LDG.E R5", "HMMA.16816.F32 R5"
    )
    kernels = check_sass.parse(text)
    assert kernels[0].opcodes["HMMA"] == 1
    assert not check_sass.violations(kernels)


def test_an_sm90_kernel_is_for_sm_90a_alone():
    stub = re.sub(r"HGMMA\S+|UTMALDG\S+", "NOP", TEXT).replace("code for sm_90a", "code for sm_80")
    found = check_sass.violations(check_sass.parse(TEXT) + check_sass.parse(stub), require_sm90=True)
    assert len(found) == 2
    assert all(s.endswith("it is to be compiled for sm_90a alone.") for s in found)


def test_sm90_kernels_are_asked_for_only_when_told():
    assert not check_sass.violations([])
    assert check_sass.violations([], require_sm90=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuobjdump has changed", "no architecture"),
        (TEXT.replace("REG:30 STACK:0", "REG:30 STACK:UNKNOWN"), MINE),
        (TEXT[: TEXT.index(f"\t\tFunction : {MINE}")], MINE),
        (re.sub(r"/\*[0-9a-f]{4}\*/", "", TEXT), OTHER),
    ],
)
def test_half_an_answer_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        check_sass.parse(text)


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void jax_bsk::attention::cuda::sm90::ForwardKernel<jax_bsk::attention::cuda::sm90::Config<__half, 128> >"
            "(CUtensorMap_st, float*)",
            "sm90::ForwardKernel<sm90::Config<__half, 128>>",
        ),
        ("void jax_bsk::attention::cuda::sm80::K<(int)-8, (bool)1>(jax_bsk::attention::Params)", "sm80::K<-8, 1>"),
        ("jax_bsk::attention::cuda::(anonymous namespace)::ProbeKernel()", "(anonymous namespace)::ProbeKernel"),
    ],
)
def test_short_names(demangled, short):
    assert cuda_tools.shorten(demangled) == short


def program(path, code):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def disassembler(tmp_path, monkeypatch):
    """A cuobjdump that extracts two cubins of any library and says the recorded text of the second only."""
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "empty").write_text("\nResource usage:\n Common:\n  GLOBAL:0\n\n\tcode for sm_90a\n")
    code = f"""
case "$1 $3" in
  "-xelf /"*) touch a.1.sm_90a.cubin a.2.sm_90a.cubin ;;
  "-sass "*.1.*) cat {tmp_path}/empty ;;
  "-sass "*.2.*) cat {tmp_path}/text ;;
  *) echo "what is $*" >&2; exit 3 ;;
esac
"""
    monkeypatch.setenv("CUOBJDUMP", str(program(tmp_path / "bin" / "cuobjdump", code)))
    program(tmp_path / "bin" / "nvdisasm", "exit 1")
    return tmp_path


def test_the_command(disassembler, capsys):
    library = disassembler / "library.so"
    assert check_sass.main([str(library), "--require-sm90"]) == 0
    assert "2 kernels, no faults" in capsys.readouterr().out
    (disassembler / "text").write_text(re.sub(r"HGMMA\S+", "NOP", TEXT))
    assert check_sass.main([str(library)]) == 1
    assert "no HGMMA" in capsys.readouterr().err


def test_what_the_disassembler_says_is_passed_on(disassembler):
    program(disassembler / "bin" / "cuobjdump", "echo 'cuobjdump fatal: too new' >&2; exit 1")
    with pytest.raises(SystemExit, match=r"library\.so.*too new"):
        check_sass.main(["library.so"])


def test_where_the_disassembler_is_looked_for(tmp_path, monkeypatch):
    chosen, on_path, toolkit, linked, wheels = (
        tmp_path / name for name in ("mine", "path", "cuda", "linked", "wheels")
    )
    monkeypatch.delenv("CUOBJDUMP", raising=False)
    monkeypatch.delenv("NVDISASM_PATH", raising=False)
    monkeypatch.setenv("PATH", str(on_path))
    site = type("Spec", (), {"submodule_search_locations": [str(wheels)]})
    monkeypatch.setattr(cuda_tools.importlib.util, "find_spec", lambda name: site)
    monkeypatch.setattr(cuda_tools, "TOOLKIT", str(toolkit))

    with pytest.raises(SystemExit, match=r"no cuobjdump.*pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"):
        check_sass.find_disassembler()
    (wheels / "cu13").mkdir(parents=True)
    found = program(wheels / "cu13" / "bin" / "cuobjdump", "")
    with pytest.raises(SystemExit, match="needs nvdisasm"):
        check_sass.find_disassembler()
    program(wheels / "cu13" / "bin" / "nvdisasm", "")
    assert check_sass.find_disassembler()[0] == str(found)

    # The nvcc on PATH is a link into another toolkit, which has a cuobjdump and no nvdisasm: the wheel's is used.
    found = program(linked / "cuobjdump", "")
    on_path.mkdir()
    (on_path / "nvcc").symlink_to(program(linked / "nvcc", ""))
    path, environment = check_sass.find_disassembler()
    assert path == str(found)
    assert environment["NVDISASM_PATH"] == str(wheels / "cu13" / "bin")

    found = program(toolkit / "cuobjdump", "")
    assert check_sass.find_disassembler()[0] == str(found)
    found = program(on_path / "cuobjdump", "")
    assert check_sass.find_disassembler()[0] == str(found)
    found = program(chosen / "dump", "")
    monkeypatch.setenv("CUOBJDUMP", str(found))
    assert check_sass.find_disassembler()[0] == str(found)
    monkeypatch.setenv("CUOBJDUMP", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match=r"\$CUOBJDUMP.*nothing"):
        check_sass.find_disassembler()
