"""The mutation check: bugs seeded into the kernels, each of which `cuda_check` or `cpu_check` has to find.

A mutation replaces one piece of text of one file of csrc. The kernels themselves know nothing of it: a mutant is the
check program with the few sources that contain the file compiled from a copy, and everything else as it is.

    cmake -S tests/csrc -B build/mutants -DJAX_BSK_MUTANTS=ON -DJAX_BSK_CUDA=ON -DSANITIZE= -DCMAKE_BUILD_TYPE=Release
    cmake --build build/mutants --target cpu_check cuda_check mutants
    python tests/csrc/mutations.py run build/mutants --json mutations.json

`run` starts every mutant with its cases until one fails, and the unmutated programs with all of these cases, which must
pass. It needs no more than this file and a folder with the programs (`cpu_check`, `cuda_check`, `mutant_*`), and for
those of `cuda_check` a Hopper GPU. Cases of `cuda_check` have the names that `cuda_check list` prints; `seeds-0-19` are
the random cases 0 to 19 of `cpu_check`.

For another mutation: a gradient that is not finite is computed once more by the portable kernels, which would repair a
bug that makes NaNs. So the Hopper backward's bugs give finite values, or spoil what finds those that are not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CASE_SECONDS = 30  # that a case of cuda_check may take

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"

# Files that csrc/variants.py writes with --split; of Hopper's forward and backward those without gates.
FORWARD_64 = ("attention/sm90/fwd_bf16_64_plain.cu", "attention/sm90/fwd_bf16_64_softcap.cu")
FORWARD_128 = ("attention/sm90/fwd_bf16_128_plain.cu", "attention/sm90/fwd_bf16_128_softcap.cu")
FORWARD_256 = ("attention/sm90/fwd_bf16_256_plain.cu", "attention/sm90/fwd_bf16_256_softcap.cu")
BACKWARD_64 = ("attention/sm90/bwd_bf16_64_plain.cu", "attention/sm90/bwd_bf16_64_softcap.cu")
BACKWARD_128 = ("attention/sm90/bwd_bf16_128_plain.cu", "attention/sm90/bwd_bf16_128_softcap.cu")
GATED_FORWARD_64 = ("attention/sm90/fwd_bf16_64_plaingated.cu",)
GATED_BACKWARD_64 = ("attention/sm90/bwd_bf16_64_plaingated.cu",)
GATED_BACKWARD_128 = ("attention/sm90/bwd_bf16_128_plaingated.cu",)
PRODUCT = ("matmul/sm90/product_bf16.cu",)
NARROW = ("matmul/sm90/narrow_bf16.cu",)
SAMPLED = ("matmul/sm90/sampled_bf16.cu",)
DECODE_64 = ("decode/cuda/paged_bf16_64.cu",)
DECODE_128 = ("decode/cuda/paged_bf16_128.cu",)
# Cases for bugs that show only where warps happen to run apart.
RACING_DECODE = ("decode-bf16-d128", "decode-faults-bf16-d128", "decode-0-15", "decode-16-31", "decode-32-47")
PORTABLE_FORWARD = ("attention/sm80/fwd_f32_64_any.cu",)
PORTABLE_BACKWARD = ("attention/sm80/bwd_bf16_64_ungated.cu",)
EXTENDED_PORTABLE_FORWARD = ("attention/sm80/fwd_bf16_64_extended.cu",)
EXTENDED_PORTABLE_BACKWARD = ("attention/sm80/bwd_bf16_64_extended.cu",)
EXTRAS_FORWARD = ("attention/sm90/fwd_bf16_64_plainextras.cu",)
EXTRAS_BACKWARD = ("attention/sm90/bwd_bf16_64_plainextras.cu",)
BIAS_GRADIENT = ("attention/bias_gradient.cu",)
HOPPER_BIAS_GRADIENT = ("attention/sm90/bias_gradient.cu",)
DELTA = ("attention/delta.cu",)
PREPARE = ("attention/prepare.cu",)
CHOOSE = ("lists/choose.cu",)
LISTS = ("lists/transpose.cu",)
CPU_CHOOSE = ("lists/cpu_choose.cc",)
CPU_LISTS = ("lists/cpu.cc",)
MATMUL_PLAN = ("matmul/plan.cu",)
CPU = ("attention/cpu/isa_baseline.cc",)
CPU_DECODE = ("decode/cpu/isa_baseline.cc",)
CPU_MATMUL = ("matmul/cpu/isa_baseline.cc",)


@dataclass(frozen=True)
class Mutation:
    name: str
    what: str  # the bug
    file: str  # that has it, relative to csrc
    before: str  # occurs once there
    after: str
    # Sources that it is compiled into, relative to csrc or written by csrc/variants.py; as few as show it.
    instances: tuple[str, ...]
    cases: tuple[str, ...]  # that show it, the likeliest first
    program: str = "cuda_check"

    def apply(self, text: str) -> str:
        count = text.count(self.before)
        if count != 1:
            raise ValueError(f"{self.name}: its text occurs {count} times in {self.file}, and must occur once")
        return text.replace(self.before, self.after)


FORWARD = (
    Mutation(
        name="forward-no-rescale",
        what="outputs so far are not rescaled when a row's maximum moves",
        file="attention/sm90/fwd_consumer.cuh",
        before="if (raised) Rescale(rescale);",
        after="(void)raised;",
        instances=FORWARD_64,
        cases=("full", "jump-8", "basic"),
    ),
    Mutation(
        name="forward-lagging-maximum",
        what="a reference that lags behind the row's maximum is never raised, and exponentials overflow",
        file="attention/sm90/fwd_consumer.cuh",
        before="lags = !raised && RowSoftmax::Lags(total);",
        after="lags = false;",
        instances=FORWARD_64,
        cases=("jump-200", "jump-2000"),
    ),
    Mutation(
        name="forward-last-block",
        what="the last block of a row is not visited",
        file="lists/block_list.cuh",
        before="left_ = row.length;",
        after="left_ = row.length > 1 ? row.length - 1 : row.length;",
        instances=FORWARD_64,
        cases=("full", "basic", "lengths"),
    ),
    Mutation(
        name="forward-bit-order",
        what="the bits of neighbouring keys in a bit tile are swapped",
        file="attention/sm90/fwd_consumer.cuh",
        before="if (!(bits >> (8 * n + e) & 1)) x",
        after="if (!(bits >> (8 * n + 1 - e) & 1)) x",
        instances=FORWARD_64,
        cases=("basic", "masks-per-head", "instance-bf16-d64"),
    ),
    Mutation(
        name="forward-bit-word",
        what="the second 64 keys of a block of 128 read the bit tile's words of the first",
        file="attention/sm90/fwd_shared.cuh",
        before="return Config::kTileKv == 128 ? 8 * piece : (start & 64) / 8;",
        after="return 0;",
        instances=FORWARD_128,
        cases=("causal-d128-b128", "instance-bf16-d128", "cap-d128-b128"),
    ),
    Mutation(
        name="forward-key-limit",
        what="the key length is compared with positions within the block: keys past it are attended to",
        file="attention/sm90/fwd_consumer.cuh",
        before="device::FirstBits(limit - start[piece])",
        after="device::FirstBits(limit)",
        instances=FORWARD_64,
        cases=("full", "lengths-b128", "basic"),
    ),
    Mutation(
        name="forward-first-lengths",
        what="every example has the first one's lengths",
        file="attention/sm90/fwd_producer.cuh",
        before="(params_.lengths.batch == 1 ? 0 : 2 * int64_t{header.batch})",
        after="0",
        instances=FORWARD_64,
        cases=("lengths", "sinks", "lengths-b128"),
    ),
    Mutation(
        name="forward-lse-base",
        what="the log-sum-exp adds the maximum in units of log2 to a natural logarithm",
        file="device/softmax.cuh",
        before="value = fmaf(max, kLn2, log_sum);",
        after="value = max + log_sum;",
        instances=FORWARD_64,
        cases=("basic", "full", "one-query"),
    ),
    Mutation(
        name="forward-no-rest",
        what="what rounding takes from the log-sum-exp is not kept",
        file="device/softmax.cuh",
        before="return {value, isfinite(rest) ? rest : 0.f};",
        after="return {value, 0.f};",
        instances=FORWARD_64,
        cases=("jump-10000000",),
    ),
    Mutation(
        name="forward-no-sink",
        what="the sink does not join the denominator",
        file="attention/sm90/fwd_consumer.cuh",
        before="const float sink_logit = tile.sink;",
        after="const float sink_logit = -device::Infinity();",
        instances=FORWARD_64,
        cases=("sinks", "instance-bf16-d64", "instance-bf16-d64-cap"),
    ),
    Mutation(
        name="forward-no-cap",
        what="logits are scaled for the soft cap, but not capped",
        file="attention/sm90/fwd_consumer.cuh",
        before="x[i] = plan_.logits(x[i]);",
        after="x[i] *= plan_.logits.before;",
        instances=FORWARD_64,
        cases=("cap", "instance-bf16-d64-cap"),
    ),
    Mutation(
        name="forward-group-head",
        what="query heads of a group are taken to be strided instead of neighbours: wrong keys and values",
        file="attention/sm90/fwd_shared.cuh",
        before="header.kv_head = plan.group.Quotient(header.head);",
        after="header.kv_head = header.head % static_cast<int>(plan.heads.divisor / plan.group.divisor);",
        instances=FORWARD_64,
        cases=("basic", "full", "many-b128"),
    ),
    Mutation(
        name="forward-tail-rows",
        what="rows past the query length are stored: over the next example, and past the end of the array",
        file="attention/sm90/fwd_consumer.cuh",
        before="StoreRows(out_, finish, static_cast<int>(shape.q_len) - tile.q_start - first,",
        after="StoreRows(out_, finish, kWarpgroupRows,",
        instances=FORWARD_64,
        cases=("full", "basic", "one-query"),
    ),
    Mutation(
        name="forward-key-stage",
        what="Q K^T reads the stage after its own in the ring of keys",
        file="attention/sm90/fwd_consumer.cuh",
        before="Logits::OverwriteRegisters(logits, query_, FullDescriptor(key));",
        after="Logits::OverwriteRegisters(logits, query_, FullDescriptor(device::sm90::TileDescriptor(\n"
        "          shared_.key[Ring<Config::kKeyStages>{step_ + 1}.Stage()])));",
        instances=FORWARD_64,
        cases=("full", "jump-8", "basic"),
    ),
    Mutation(
        name="forward-skip-ahead",
        what="tiles without work are skipped before the live one's header is released: a full ring waits for itself",
        file="attention/sm90/fwd_consumer.cuh",
        before="if (!Config::kOverlapTiles || !IsLive(next)) {",
        after="if constexpr (!Config::kFeeder) SkipEmptyTiles(next);\n"
        "    if (!Config::kOverlapTiles || !IsLive(next)) {",
        instances=FORWARD_64,
        cases=("padded", "regimes-0-39"),
    ),
    Mutation(
        name="forward-kept-header",
        what="the header of a tile without work is never released",
        file="attention/sm90/fwd_consumer.cuh",
        before="ReleaseHeader(tile);\n      tile.Advance();",
        after="tile.Advance();",
        instances=FORWARD_64,
        cases=("padded", "regimes-0-39"),
    ),
    Mutation(
        name="forward-kept-queries",
        what="queries in shared memory are never released",
        file="attention/sm90/fwd_consumer.cuh",
        before="if constexpr (!Config::kQueryInRegisters) Release(shared_.empty_query);",
        after="",
        instances=FORWARD_256,
        cases=("padded-d256", "many-d256"),
    ),
    Mutation(
        name="forward-end-without-place",
        what="the end is announced in a place of the ring that is not free",
        file="attention/sm90/fwd_producer.cuh",
        before="end.kind = TileHeader::kEnd;\n    Announce(end);",
        after="end.kind = TileHeader::kEnd;\n    if (device::sm90::ElectLane()) {\n"
        "      shared_.headers[headers_.Stage()] = end;\n"
        "      device::sm90::Arrive(shared_.full_header[headers_.Stage()]);\n    }",
        instances=FORWARD_64,
        cases=("padded", "many-b128", "regimes-0-39"),
    ),
    Mutation(
        name="forward-feeder-queries",
        what="the feeder asks for the next tile's queries before this one's are in registers, and waits where values "
        "are to be asked for",
        file="attention/sm90/fwd_feeder.cuh",
        before="if (queries_ == TileOf(step) + 1 && queries_",
        after="if (queries_",
        instances=FORWARD_64,
        cases=("many-b128", "many-kv64", "padded"),
    ),
    Mutation(
        name="forward-feeder-words",
        what="with a feeder, all tiles of a CTA have the list of the first",
        file="attention/sm90/fwd_feeder.cuh",
        before="scheduler_.WordOf(NextTile())",
        after="scheduler_.WordOf(static_cast<int>(blockIdx.x))",
        instances=FORWARD_64,
        cases=("many-b128", "many-kv64", "padded"),
    ),
    Mutation(
        name="forward-feeder-parity",
        what="with a feeder, every tile waits for the queries of the first",
        file="attention/sm90/fwd_feeder.cuh",
        before="header.query_parity = tiles_ & 1;",
        after="header.query_parity = 0;",
        instances=FORWARD_64,
        cases=("many-b128", "many-kv64", "padded"),
    ),
    Mutation(
        name="forward-feeder-empty-row",
        what="with a feeder, a tile with nothing to attend to attends to the first keys",
        file="attention/sm90/fwd_feeder.cuh",
        before="next_start_ = plan_.past_end, next_bits_ = -1;",
        after="next_start_ = 0, next_bits_ = -1;",
        instances=FORWARD_64,
        cases=("many-empty", "empty", "padded"),
    ),
    Mutation(
        name="forward-feeder-entries",
        what="with a feeder, entries of a row past the first 32 are never read",
        file="attention/sm90/fwd_feeder.cuh",
        before="AskEntries(header, taken_ + kEntries / 2);",
        after="",
        instances=FORWARD_64,
        cases=("long-rows",),
    ),
    Mutation(
        name="forward-no-inexact",
        what="rows that share a block with a NaN value, but do not attend to it, are not put right",
        file="attention/sm90/fwd_consumer.cuh",
        before="if (__any_sync(0xFFFFFFFFu, inexact)) NoteInexact(place);",
        after="(void)inexact;",
        instances=FORWARD_64,
        cases=("nan-value-d64", "many-nan-value", "inf-value-d64"),
    ),
)

BACKWARD = (
    Mutation(
        name="backward-no-delta",
        what="dS = P dP: delta is not subtracted",
        file="attention/sm90/bwd_consumer.cuh",
        before="const float& own = delta[i / 4 * 2 + i % 2];",
        after="const float own = 0.f;",
        instances=BACKWARD_64,
        cases=("basic", "full", "mqa"),
    ),
    Mutation(
        name="backward-statistics-head",
        what="log-sum-exp and delta are those of the query head with the key/value head's number",
        file="attention/sm90/bwd_producer.cuh",
        before="static_cast<int>(params_.shape.heads) + head_;",
        after="static_cast<int>(params_.shape.heads) + item.head;",
        instances=BACKWARD_64,
        cases=("basic", "full", "mqa"),
    ),
    Mutation(
        name="backward-dq-scale",
        what="dQ is not multiplied by the scale",
        file="attention/sm90/bwd_consumer.cuh",
        before="StoreTile(dquery, params_.scale, item,",
        after="StoreTile(dquery, 1.f, item,",
        instances=BACKWARD_64,
        cases=("basic", "full", "d64-b128"),
    ),
    Mutation(
        name="backward-dk-scale",
        what="dK is not multiplied by the scale",
        file="attention/sm90/bwd_consumer.cuh",
        before="StoreKeyRows(item, dkey, params_.scale,",
        after="StoreKeyRows(item, dkey, 1.f,",
        instances=BACKWARD_128,
        cases=("causal-d128", "causal-d128-b128", "many-kv64-d128"),
    ),
    Mutation(
        name="backward-last-block",
        what="the last block of every list is not visited",
        file="attention/sm90/bwd_producer.cuh",
        before="for (int entry = 0; entry < row.length; ++entry) {",
        after="for (int entry = 0; entry + 1 < row.length; ++entry) {",
        instances=BACKWARD_64,
        cases=("basic", "full", "d64-b128"),
    ),
    Mutation(
        name="backward-group-sum",
        what="dK and dV are those of the first query head of the group alone",
        file="attention/sm90/bwd_producer.cuh",
        before="for (int i = 0; i < heads; ++i) sound &=",
        after="for (int i = 0; i < 1; ++i) sound &=",
        instances=BACKWARD_64,
        cases=("basic", "full", "mqa"),
    ),
    Mutation(
        name="backward-first-bad-list",
        what="the first list that cannot be followed ends the group: its later heads' dS is never written",
        file="attention/sm90/bwd_producer.cuh",
        before="for (int i = 0; i < heads; ++i) sound &=",
        after="for (int i = 0; i < heads && sound; ++i) sound &=",
        instances=BACKWARD_64,
        cases=("bad-first-col", "bad-first-col-b128"),
    ),
    Mutation(
        name="backward-own-place",
        what="dQ takes dS at its entry's place in its own list instead of the matching key-major one",
        file="attention/sm90/bwd_producer.cuh",
        before="subtile + (keys ? entry : other) * plan_.entry_subtiles",
        after="subtile + entry * plan_.entry_subtiles",
        instances=BACKWARD_64,
        cases=("full", "basic", "masks-per-head"),
    ),
    Mutation(
        name="backward-subtile-order",
        what="dQ of blocks of 128 takes the subtiles of dS in the wrong order",
        file="attention/sm90/bwd_producer.cuh",
        before="const int stride = keys ? 1 : static_cast<int>(params_.shape.block_q / 64);",
        after="const int stride = 1;",
        instances=BACKWARD_128,
        cases=("causal-d128-b128", "instance-bf16-d128", "cap-d128-b128"),
    ),
    Mutation(
        name="backward-no-wait",
        what="dQ does not wait until the dS it sums has been written",
        file="attention/sm90/bwd_producer.cuh",
        before="WaitFor(plan_.done_keys + item.slice, Items(item.slice, plan_.key_tiles.divisor));",
        after="__syncwarp();",
        instances=BACKWARD_64,
        cases=("full", "basic", "many-b128"),
    ),
    Mutation(
        name="backward-mask-rows",
        what="keys 8 to 15 of every 16 take the bits of keys 0 to 7",
        file="attention/sm90/bwd_consumer.cuh",
        before="if (!(attended >> 8 & 1)",
        after="if (!(attended & 1)",
        instances=BACKWARD_128,
        cases=("causal-d128", "causal-d128-b128", "instance-bf16-d128"),
    ),
    Mutation(
        name="backward-key-limit",
        what="the key length is compared with positions within the tile: keys past it reach dQ",
        file="attention/sm90/bwd_consumer.cuh",
        before="left = item.key_limit - first;",
        after="left = item.key_limit;",
        instances=BACKWARD_64,
        cases=("lengths-b128",),
    ),
    Mutation(
        name="backward-no-slope",
        what="dS leaves out the soft cap's derivative",
        file="attention/sm90/bwd_consumer.cuh",
        before="make_float4(map.Slope(x.x), map.Slope(x.y), map.Slope(x.z), map.Slope(x.w));",
        after="make_float4(1.f, 1.f, 1.f, 1.f);",
        instances=BACKWARD_64,
        cases=("cap", "instance-bf16-d64-cap"),
    ),
    Mutation(
        name="backward-void-without-scores",
        what="an item of keys without steps never tells the storer",
        file="attention/sm90/bwd_consumer.cuh",
        before="WaitForScoresBuffer();\n      ArriveScores();\n    }\n    return true;",
        after="WaitForScoresBuffer();\n    }\n    return true;",
        instances=BACKWARD_64,
        cases=("empty", "padded", "regimes-0-39"),
    ),
    Mutation(
        name="backward-kept-place",
        what="the last step of an item of keys is never released",
        file="attention/sm90/bwd_consumer.cuh",
        before="ReleasePlace(Stages().Stage());\n    ++step_;\n    keys_.Advance();",
        after="++step_;\n    keys_.Advance();",
        instances=BACKWARD_64,
        cases=("padded", "basic", "regimes-0-39"),
    ),
    Mutation(
        name="backward-no-inexact",
        what="gradients that are not finite are not marked for the exact kernels",
        file="attention/sm90/bwd_consumer.cuh",
        before="inexact |= finish[half].keep && !RowIsFinite(sums, half);",
        after="(void)inexact;",
        instances=BACKWARD_64,
        cases=("nan-value-d64", "many-nan-value", "nan-key-d64"),
    ),
    Mutation(
        name="backward-no-faults",
        what="gradients of a list that cannot be followed are not marked for the exact kernels",
        file="attention/sm90/bwd_consumer.cuh",
        before="bool inexact = flags_ & StepFlag::kInexact;",
        after="bool inexact = false;",
        instances=BACKWARD_64,
        cases=("bad-col-d64", "bad-first-col", "bad-first-col-b128"),
    ),
    Mutation(
        name="backward-no-rest",
        what="probabilities are those of the rounded log-sum-exp, however large it is",
        file="attention/sm90/bwd_consumer.cuh",
        before="const bool large = __any_sync(0xFFFFFFFFu, two.x != 0.f || two.y != 0.f);",
        after="const bool large = two.x != two.x;",
        instances=BACKWARD_64,
        cases=("jump-10000000",),
    ),
    Mutation(
        name="prepare-lse-base",
        what="the backward's log-sum-exp stays in natural units, and the logits are in units of log2",
        file="attention/softmax.cuh",
        before="const float value = __fmul_rn(lse, device::kLog2E),",
        after="const float value = lse,",
        instances=PREPARE,
        cases=("basic", "full", "causal-d128"),
    ),
    Mutation(
        name="prepare-next-match",
        what="an entry is matched with the one after its own in the key-major list",
        file="attention/prepare.cu",
        before="+ i + __ffs(found) - 1;",
        after="+ i + __ffs(found);",
        instances=PREPARE,
        cases=("full", "basic", "causal-d128"),
    ),
    Mutation(
        name="prepare-unsound-column",
        what="entries are matched in key-major lists that cannot be followed, whose dS is not written",
        file="attention/prepare.cu",
        before="if (!sound) match = -1;",
        after="(void)sound;",
        instances=PREPARE,
        cases=("bad-first-col", "bad-col-d64", "bad-first-col-b128"),
    ),
)

MATMUL = (
    Mutation(
        name="narrow-second-half",
        what="the second 64 of a block's contracted length are multiplied by the dense operand's first",
        file="matmul/sm90/narrow.cuh",
        before="params.in_block) + half * kPiece;",
        after="params.in_block);",
        instances=NARROW,
        cases=("matmul-narrow-bf16-128-8", "matmul-narrow-bf16-64x128-32"),
    ),
    Mutation(
        name="narrow-last-stages",
        what="stages that do not divide among the CTAs of a cluster are left out",
        file="matmul/sm90/narrow.cuh",
        before="last = stages * (rank + 1) / kNarrowParts;",
        after="last = stages / kNarrowParts * (rank + 1);",
        instances=NARROW,
        cases=("matmul-narrow-bf16-64-8", "matmul-narrow-long-128x64"),
    ),
    Mutation(
        name="narrow-own-poison",
        what="a wrong entry makes NaN of the rows alone that its own CTA stores",
        file="matmul/sm90/narrow.cuh",
        before="&shared_.poisoned, part)",
        after="&shared_.poisoned, rank)",
        instances=NARROW,
        cases=("matmul-narrow-large-id-64", "matmul-narrow-negative-place-128"),
    ),
    Mutation(
        name="narrow-depth",
        what="the sums of one half of the stages' contracted length are added twice",
        file="matmul/sm90/narrow.cuh",
        before="address + depth * kSums * 4",
        after="address",
        instances=NARROW,
        cases=("matmul-narrow-bf16-64-64", "matmul-narrow-bf16-64-8"),
    ),
    Mutation(
        name="narrow-first-piece",
        what="all rows of a block of 128 are computed from its first 64",
        file="matmul/sm90/narrow.cuh",
        before="(kTransposeLeft ? half : tile.piece) * kPiece, kTransposeLeft ? tile.piece : half,",
        after="kTransposeLeft ? half * kPiece : 0, kTransposeLeft ? 0 : half,",
        instances=NARROW,
        cases=("matmul-narrow-bf16-128-8", "matmul-narrow-bf16-128x64-64"),
    ),
    Mutation(
        name="narrow-first-group",
        what="every 64 columns of the result are computed from the dense operand's first",
        file="matmul/sm90/narrow.cuh",
        before="kTransposeRight ? tile.column : row, kTransposeRight ? row : tile.column,",
        after="kTransposeRight ? 0 : row, kTransposeRight ? row : 0,",
        instances=NARROW,
        cases=("matmul-narrow-groups", "matmul-narrow-groups-128"),
    ),
    Mutation(
        name="narrow-first-dense",
        what="every example is multiplied by the first one's dense operand",
        file="matmul/sm90/narrow.cuh",
        before="dense = params.dense_batch == 1 ? 0 : batch;",
        after="dense = 0;",
        instances=NARROW,
        cases=("matmul-narrow-shared-matrix", "matmul-narrow-batches"),
    ),
    Mutation(
        name="narrow-own-sums",
        what="a CTA adds its own sums as often as its cluster has CTAs",
        file="matmul/sm90/narrow.cuh",
        before="device::sm90::ClusterAddress(place, part)",
        after="device::sm90::ClusterAddress(place, rank)",
        instances=NARROW,
        cases=("matmul-narrow-bf16-128-32", "matmul-narrow-bf16-64-32"),
    ),
    Mutation(
        name="product-second-step",
        what="the second 64 of a block's contracted length are multiplied by the dense operand's first",
        file="matmul/sm90/product.cuh",
        before="LoadDense(column, id * in_block + k, dense);",
        after="LoadDense(column, id * in_block, dense);",
        instances=PRODUCT,
        cases=("matmul-product-bf16-128", "matmul-product-bf16-64x128"),
    ),
    Mutation(
        name="product-block-half",
        what="the lower half of a block of 128 rows is its upper half once more",
        file="matmul/sm90/product.cuh",
        before="two ? 0 : kPiece, k);",
        after="0, k);",
        instances=PRODUCT,
        cases=("matmul-product-bf16-128", "matmul-product-bf16-128x64"),
    ),
    Mutation(
        name="product-other-rows",
        what="the warpgroups store their rows in each other's place",
        file="matmul/sm90/product.cuh",
        before="first_row_(warpgroup * kPiece)",
        after="first_row_((1 - warpgroup) * kPiece)",
        instances=PRODUCT,
        cases=("matmul-product-bf16-128", "matmul-product-bf16-64"),
    ),
    Mutation(
        name="product-last-entry",
        what="the last block of an out block is left out",
        file="matmul/sm90/product.cuh",
        before="left_ = asked_ = end - begin;",
        after="left_ = asked_ = max(end - begin - 1, 0);",
        instances=PRODUCT,
        cases=("matmul-product-bf16-64", "matmul-product-full"),
    ),
    Mutation(
        name="product-unmerged-pair",
        what="the lists of two out blocks are walked in step, whatever ids they have",
        file="matmul/sm90/product.cuh",
        before="use_lower = two && !lower.AtEnd() && lower.id() == id;",
        after="use_lower = two && !lower.AtEnd();",
        instances=PRODUCT,
        cases=("matmul-product-bf16-64", "matmul-product-uneven"),
    ),
    Mutation(
        name="product-no-poison",
        what="the second of two out blocks is not NaN where its list cannot be followed",
        file="matmul/sm90/product.cuh",
        before="if (lower.poisoned()) info.flags |=",
        after="if (false) info.flags |=",
        instances=PRODUCT,
        cases=("matmul-product-large-id-64", "matmul-product-negative-place-64"),
    ),
    Mutation(
        name="product-first-dense",
        what="every example has the first one's dense operand",
        file="matmul/sm90/product.cuh",
        before="dense = params_.dense_batch == 1 ? 0 : tile.batch;",
        after="dense = 0;",
        instances=PRODUCT,
        cases=("matmul-product-shared-matrix", "matmul-product-batches"),
    ),
    Mutation(
        name="product-transposed-staging",
        what="two of the four matrices that a warp stores transposed are swapped",
        file="matmul/sm90/epilogue.cuh",
        before="lane / 16 * 8 + lane % 8, column = 2 * warp + lane / 8 % 2;",
        after="lane / 8 % 2 * 8 + lane % 8, column = 2 * warp + lane / 16;",
        instances=PRODUCT,
        cases=("matmul-product-bf16-128", "matmul-product-bf16-64"),
    ),
    Mutation(
        name="product-kept-half",
        what="the half of a tile that waits for the next one's products goes where the first half went",
        file="matmul/sm90/epilogue.cuh",
        before="if (keeps_) Send<1>(kept_",
        after="if (keeps_) Send<0>(kept_",
        instances=PRODUCT,
        cases=("matmul-product-bf16-128", "matmul-product-many-128"),
    ),
    Mutation(
        name="product-short-tile",
        what="half a tile is forgotten when the next one is too short to send it behind its products",
        file="matmul/sm90/epilogue.cuh",
        before="Flush(of);  // if the tile was so short",
        after="keeps_ = false;  // if the tile was so short",
        instances=PRODUCT,
        cases=("matmul-product-many", "matmul-product-many-128"),
    ),
    Mutation(
        name="product-own-release",
        what="a stage is released to the CTA's own producer, not to the other one of the cluster",
        file="matmul/sm90/consumer.cuh",
        before="if (lane < kCluster) device::sm90::ArriveAt(shared_.empty[stage], lane ^ rank_);",
        after="if (lane == 0) device::sm90::ArriveAt(shared_.empty[stage], rank_);",
        instances=PRODUCT,
        cases=("matmul-product-bf16-128",),
    ),
    Mutation(
        name="product-row-order",
        what="the order of rows names the row after each, and the last one twice",
        file="matmul/plan.cu",
        before="order[rank] = row;",
        after="order[rank] = min(row + 1, rows - 1);",
        instances=MATMUL_PLAN,
        cases=("matmul-product-bf16-128", "matmul-product-bf16-64"),
    ),
    Mutation(
        name="product-last-panel",
        what="the last panel is taken to be as wide as the others",
        file="matmul/sm90/product.cuh",
        before="panel == plan.last_panel ? plan.last_part_divider : plan.part_divider",
        after="panel == -1 ? plan.last_part_divider : plan.part_divider",
        instances=PRODUCT,
        cases=("matmul-product-panels",),
    ),
    Mutation(
        name="product-backwards",
        what="a panel that is gone through backwards has its first row all the time",
        file="matmul/sm90/product.cuh",
        before="plan.rows - 1 - place : place",
        after="0 : place",
        instances=PRODUCT,
        cases=("matmul-product-panels-128",),
    ),
    Mutation(
        name="sampled-sizes",
        what="the places of items of each size are not moved on from chunk to chunk",
        file="matmul/plan.cu",
        before="if (thread >= 1 && thread <= entries) totals",
        after="if (thread > entries && thread <= entries) totals",
        instances=MATMUL_PLAN,
        cases=("matmul-sampled-grouped", "matmul-sampled-grouped-128"),
    ),
    Mutation(
        name="sampled-neighbour",
        what="an entry has its neighbour's columns",
        file="matmul/sm90/sampled.cuh",
        before="const int c = columns[i] * static_cast<int>(params_.block_columns)",
        after="const int c = columns[i ^ 1] * static_cast<int>(params_.block_columns)",
        instances=SAMPLED,
        cases=("matmul-sampled-bf16-64", "matmul-sampled-bf16-128"),
    ),
    Mutation(
        name="sampled-kept-entry",
        what="the entry that waits for the next item's products is stored as the item's first",
        file="matmul/sm90/epilogue.cuh",
        before="if (keeps_) Send<1>(kept_",
        after="if (keeps_) Send<0>(kept_",
        instances=SAMPLED,
        cases=("matmul-sampled-bf16-128", "matmul-sampled-many-128"),
    ),
    Mutation(
        name="sampled-tail",
        what="what is beyond the matrix is the product with zeros, which is not 0 beside an infinity",
        file="matmul/sm90/sampled.cuh",
        before="if (rows < kPiece || columns < kPiece) Cut",
        after="if (rows <= 0 || columns <= 0) Cut",
        instances=SAMPLED,
        cases=("matmul-sampled-nan", "matmul-sampled-nan-128"),
    ),
)

PORTABLE = (
    Mutation(
        name="portable-forward-no-rescale",
        what="outputs so far are not rescaled when a row's maximum moves",
        file="attention/sm80/fwd.cuh",
        before="out[m][n][e] *= rescale[e / 2];",
        after="out[m][n][e] *= 1.f;",
        instances=PORTABLE_FORWARD,
        cases=("f32", "large-logits", "f32-cap"),
    ),
    Mutation(
        name="portable-backward-bit-word",
        what="the second 64 keys of a block of 128 read the bit tile's words of the first",
        file="attention/sm80/bwd_key.cuh",
        before="kv_start % block_kv / 32 + thread % 2);",
        after="thread % 2);",
        instances=PORTABLE_BACKWARD,
        cases=("instance-bf16-d64", "tail-64", "mqa"),
    ),
    Mutation(
        name="portable-backward-last-head",
        what="dK and dV leave out the last query head of the group",
        file="attention/sm80/bwd_key.cuh",
        before="if (walker_.poisoned() || head_ == last_head_) return false;",
        after="if (walker_.poisoned() || head_ + 1 >= last_head_) return false;",
        instances=PORTABLE_BACKWARD,
        cases=("basic", "full", "mqa"),
    ),
    Mutation(
        name="delta-rest",
        what="row sums leave out what is behind the last whole 16 bytes of a row",
        file="attention/delta.cu",
        before=" + (dim % kPerChunk<Element> != 0);",
        after=";",
        instances=DELTA,
        cases=("delta-bf16", "delta-f32"),
    ),
)

BIASES = (
    Mutation(
        name="bias-distance-sign",
        what="the bias by distance is read by q - k, not by k - q",
        file="attention/bias.cuh",
        before="return {bias.distances, true, -1, 1,",
        after="return {bias.distances, true, 1, -1,",
        instances=EXTENDED_PORTABLE_FORWARD,
        cases=("bias-distances-0", "bias-distances-3"),
    ),
    Mutation(
        name="bias-tile-of-the-first-block",
        what="tiles of a bias are read as if every block were the first",
        file="attention/bias.cuh",
        before="static_cast<int64_t>(block_key) * terms[2].step_kv;",
        after="0 * block_key;",
        instances=EXTENDED_PORTABLE_FORWARD,
        cases=("bias-tiles-12", "bias-tiles-8", "bias-instance-bf16-d64-b64"),
    ),
    Mutation(
        name="dropout-byte-transposed",
        what="dK and dV drop the pair across the diagonal of its patch",
        file="attention/dropout.cuh",
        before="kKeyRows ? n % 2 + 2 * (e / 2) :",
        after="kKeyRows ? e / 2 + 2 * (n % 2) :",
        instances=EXTENDED_PORTABLE_BACKWARD,
        cases=("bias-dropout-b128", "bias-dropout"),
    ),
    Mutation(
        name="dropout-before-the-softmax",
        what="dV has the probabilities that dropout left as they were",
        file="attention/sm80/bwd_key.cuh",
        before="if (prob != 0.f) prob *= gate * weight;",
        after="if (prob != 0.f) prob *= gate;",
        instances=EXTENDED_PORTABLE_BACKWARD,
        cases=("bias-dropout-b128", "bias-dropout"),
    ),
    Mutation(
        name="bias-gradient-first-match",
        what="a bias's gradient has of every 32 entries no more than the first that adds to it",
        file="attention/bias_gradient.cu",
        before="for (unsigned mask = shared.found_by[warp]; mask != 0; mask &= mask - 1) {",
        after="for (unsigned mask = shared.found_by[warp]; mask != 0; mask = 0) {",
        instances=BIAS_GRADIENT,
        cases=("bias-dense-7", "bias-tiles-0", "bias-tiles-12"),
    ),
    Mutation(
        name="bias-gradient-halves",
        what="neighbouring diagonals of tiles are written to one half",
        file="attention/bias_gradient.cu",
        before="(slot.key_tile & 1)",
        after="0 * (slot.key_tile & 1)",
        instances=BIAS_GRADIENT,
        cases=("bias-distances-0", "bias-distances-3"),
    ),
    Mutation(
        name="bias-gradient-half-the-keys",
        what="sums over the keys have those of the first 32",
        file="attention/bias_gradient.cu",
        before="sums[i] += parts[0][i] + parts[1][i];",
        after="sums[i] += parts[0][i];",
        instances=BIAS_GRADIENT,
        cases=("bias-dense-7", "bias-tiles-4"),
    ),
)

HOPPER_BIASES = (
    Mutation(
        name="hopper-bias-second-row",
        what="a thread's second row has the first row's numbers by distance",
        file="attention/sm90/bias.cuh",
        before="add(n, 1, e, before[e]);",
        after="add(n, 1, e, value);",
        instances=EXTRAS_FORWARD,
        cases=("bias-distances-0", "bias-distances-3"),
    ),
    Mutation(
        name="hopper-bias-left-out",
        what="steps of keys after a tile's first have no bias",
        file="attention/sm90/fwd_consumer.cuh",
        before="if (read_ & (StepBias::kRaise - 1)) AddBias(x);",
        after="if (read_ & (StepBias::kRaise - 1) && step_ == 0) AddBias(x);",
        instances=EXTRAS_FORWARD,
        cases=("bias-dense-7", "bias-dense-15", "bias-lengths"),
    ),
    Mutation(
        name="hopper-line-of-group",
        what="both warpgroups take the line of the first one's queries",
        file="attention/sm90/fwd_helper.cuh",
        before="max(line - number_ + key / 64, 0)",
        after="max(line + key / 64, 0)",
        instances=EXTRAS_FORWARD,
        cases=("bias-distances-2", "bias-lengths-per-head"),
    ),
    Mutation(
        name="hopper-line-of-keys",
        what="where rows are keys, a line falls with the distance",
        file="attention/sm90/bias.cuh",
        before="factor * (kKeyRows ? -line.y : line.y)",
        after="factor * line.y",
        instances=EXTRAS_BACKWARD,
        cases=("bias-lines-2", "bias-lines-6"),
    ),
    Mutation(
        name="hopper-line-read-again",
        what="numbers by distance are read where they lie on a line, too",
        file="attention/sm90/fwd_consumer.cuh",
        before="if (term == kDistanceTerm && (read_ >> piece & 1) == 0) continue;",
        after="",
        instances=EXTRAS_FORWARD,
        cases=("bias-lines-terms",),
    ),
    Mutation(
        name="hopper-line-sums",
        what="products that are computed once more leave out the bias",
        file="attention/sm90/fwd_consumer.cuh",
        before="if constexpr (Config::kExtras) AddLines(again);",
        after="",
        instances=EXTRAS_FORWARD,
        cases=("bias-lines-6-jump-keys",),
    ),
    Mutation(
        name="hopper-line-low-part",
        what="of the three parts of a line's numbers the lowest is left out",
        file="attention/sm90/fwd_shared.cuh",
        before="device::PackPair<device::BFloat16>(x - high - middle, 0.f)",
        after="0u",
        instances=EXTRAS_FORWARD,
        cases=("bias-lines-2", "bias-lines-1"),
    ),
    Mutation(
        name="hopper-line-second-keys",
        what="the second 64 keys of a step have the columns of the first",
        file="attention/sm90/fwd_shared.cuh",
        before="column / 8 != key / 64",
        after="column / 8 != 0",
        instances=EXTRAS_FORWARD,
        cases=("bias-lines-2", "bias-lines-6"),
    ),
    Mutation(
        name="hopper-dense-neighbours",
        what="two neighbouring keys have each other's numbers of a dense bias",
        file="attention/sm90/bias.cuh",
        before="            add(n, half, 0, pair.x);\n            add(n, half, 1, pair.y);\n",
        after="            add(n, half, 0, pair.y);\n            add(n, half, 1, pair.x);\n",
        instances=EXTRAS_FORWARD,
        cases=("bias-instance-bf16-d64-b128", "bias-instance-bf16-d64-b64"),
    ),
    Mutation(
        name="hopper-dropout-parity",
        what="both keys of a pair are dropped where the first is",
        file="attention/dropout.cuh",
        before="(12 | byte) * 0x1100",
        after="(8 | byte) * 0x1100",
        instances=EXTRAS_FORWARD,
        cases=("bias-dropout", "bias-dropout-b128"),
    ),
    Mutation(
        name="hopper-dropout-sixteens",
        what="the backward keeps the flags of four times sixteen queries in one place",
        file="attention/dropout.cuh",
        before="parity[e] += flags >> m;",
        after="parity[e] |= flags;",
        instances=EXTRAS_BACKWARD,
        cases=("bias-dropout", "bias-dropout-b128"),
    ),
)


def _pairs(name: str, what: str, part: str, before: str, after: str, *cases: str) -> Mutation:
    """A bug of Hopper's kernel for gradients of biases; `cases` are those of `bias-pairs-` unless they say another."""
    names = tuple(case if case.startswith("bias-") else f"bias-pairs-{case}" for case in cases)
    file = f"attention/sm90/bias_gradient_{part}.cuh"
    return Mutation(f"bias-pairs-{name}", what, file, before, after, HOPPER_BIAS_GRADIENT, names)


HOPPER_BIAS_GRADIENTS = (
    _pairs(
        "early-queries",
        "queries are multiplied before the copy engine has brought them",
        "consumer",
        "if (flags & Message::kNewLeft) device::sm90::Wait(shared_.full_query[l], left.Full());",
        "",
        "128-128-d128",
        "waves-dense",
    ),
    _pairs(
        "no-release",
        "the buffers of statistics and bit tiles are never given back",
        "consumer",
        "    Release(shared_.empty_side[sides.Stage()]);\n",
        "",
        "128-128-d64",
    ),
    _pairs(
        "early-sums",
        "a warpgroup adds the other one's sums of a diagonal before these are there",
        "consumer",
        "      device::sm90::SyncNamed(kBothBarrier, Config::kConsumerThreads);\n      const int64_t length",
        "      const int64_t length",
        "waves-heads",
        "waves-examples",
    ),
    _pairs(
        "value-buffer",
        "all values come into the first buffer",
        "producer",
        "Load(shared_.value[right], plan_.value,",
        "Load(shared_.value[0], plan_.value,",
        "128-128-d128",
        "64-64-d64",
    ),
    _pairs(
        "other-queries",
        "the queries of the head before are taken for this one's",
        "producer",
        "before.batch == batch && before.head == head && before.q_start == q_start;",
        "before.batch == batch && before.q_start == q_start;",
        "causal-128-128-d64",
        "waves-dense",
        "members",
    ),
    _pairs(
        "other-keys",
        "the keys of the key/value head before are taken for this one's",
        "producer",
        "before.batch == batch && before.kv_head == kv_head && before.key_start == key_start;",
        "before.batch == batch && before.key_start == key_start;",
        "members",
        "bias-dense-12",
    ),
    _pairs(
        "halves",
        "neighbouring pairs of diagonals are written to one half",
        "consumer",
        "((slot + 1) / 2 & 1)",
        "0 * ((slot + 1) / 2 & 1)",
        "causal-128-128-d64",
        "bias-distances-0",
    ),
    _pairs(
        "second-diagonal",
        "tiles of the second diagonal are added to the first",
        "producer",
        "(tile == 0 ? 0 : Message::kSecond)",
        "(tile == 0 ? 0 : 0 * Message::kSecond)",
        "causal-128-128-d64",
        "bias-distances-0",
    ),
    _pairs(
        "first-round",
        "every other round of groups is left out",
        "producer",
        "Own().first_group += static_cast<int>(gridDim.x);",
        "Own().first_group += 2 * static_cast<int>(gridDim.x);",
        "waves-heads",
        "waves-dense",
        "waves-rows",
    ),
    _pairs(
        "long-diagonal",
        "of every 64 tiles of a diagonal the second 32 are left out",
        "producer",
        "Own().begin < QEnd(); Own().begin += 32",
        "Own().begin < QEnd(); Own().begin += 64",
        "long",
    ),
    _pairs(
        "bits-of-queries",
        "the second 64 queries of a block of 128 have the first ones' bits",
        "producer",
        "block_q == 128 ? 64 * half : 0, block_q",
        "0, block_q",
        "causal-128-128-d64",
        "128-64-d64",
    ),
    _pairs(
        "bits-of-keys",
        "the second 64 keys of a block of 128 have bits of other rows",
        "consumer",
        "piece * (block_kv == 128 ? 8 : 512)",
        "piece * 512",
        "causal-128-128-d64",
        "64-128-d64",
    ),
)

# The plainest instruction set stands for all: it is the same code, and every machine has it.
CPU_KERNELS = (
    Mutation(
        name="cpu-forward-no-rescale",
        what="outputs so far are not rescaled when a row's maximum moves",
        file="attention/cpu/forward.h",
        before="Store<C>(x.rescale + v, rescale);",
        after="Store<C>(x.rescale + v, Broadcast<C>(C(1)));",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-forward-key-length",
        what="an example's key length is taken for the array's",
        file="attention/cpu/forward.h",
        before="Minimum(s.block_kv, kv_length - first_key)",
        after="Minimum(s.block_kv, s.kv_len - first_key)",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-bit-order",
        what="the words of bit tiles are read from their most significant bit",
        file="attention/cpu/block_list.h",
        before="BroadcastWord<C>(Lane<C>(1) << (key & 31))",
        after="BroadcastWord<C>(Lane<C>(1) << (31 - (key & 31)))",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-delta-rest",
        what="row sums leave out what is behind the last whole vector",
        file="attention/cpu/delta.h",
        before="if (d < dim) sum",
        after="if (d > dim) sum",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-backward-no-delta",
        what="dS = P dP: delta is not subtracted",
        file="attention/cpu/backward.h",
        before="gradient = score * (gradient - of.delta);",
        after="gradient = score * gradient;",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-backward-no-slope",
        what="dS leaves out the soft cap's derivative",
        file="attention/cpu/backward.h",
        before="(gradient - of.delta) * (C(1) - capped * capped);",
        after="(gradient - of.delta);",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-backward-group-sum",
        what="dK and dV are those of the first query head of the group alone",
        file="attention/cpu/backward.h",
        before="for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {",
        after="for (int64_t h = kv_head * group; h < kv_head * group + 1; ++h) {",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-backward-query-gates",
        what="dQ is made without the gates",
        file="attention/cpu/backward.h",
        before="gates != nullptr ? gates[entry] : C(1));",
        after="C(1));",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-backward-gates-tail",
        what="the lanes beyond the last key join the gradient of its block's gate",
        file="attention/cpu/backward.h",
        before="for (int64_t k = 0; k < keys; ++k) sum += x.d_gate[k];",
        after="for (int64_t k = 0; k < vectors * kLanes<C>; ++k) sum += x.d_gate[k];",
        instances=CPU,
        cases=("seeds-220-229",),  # 224 alone of the first 300 shows it
        program="cpu_check",
    ),
    Mutation(
        name="cpu-gates-of-an-example",
        what="every example has the first one's gates",
        file="attention/cpu/block_list.h",
        before="(b * shape.heads + h) * list.capacity",
        after="(0 * b + h) * list.capacity",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-bias-lanes",
        what="the distances' term is added to the lanes in reverse",
        file="attention/cpu/add_bias.h",
        before="Reverse<C>(Elements<C, E>::Load(row - v - (n - 1)))",
        after="Elements<C, E>::Load(row - v - (n - 1))",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-bias-slope",
        what="with a bias dS leaves out the soft cap's derivative",
        file="attention/cpu/add_bias.h",
        before="before * Load<C>(slope + o * ld + v)",
        after="before",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-dropout-byte",
        what="with keys along the lanes dropout takes the bytes of the transposed pairs",
        file="attention/cpu/drop.h",
        before=": DropoutByte(other_place, own_place);",
        after=": DropoutByte(own_place, other_place);",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-bias-gradient-examples",
        what="only the first example joins the gradient of a term that all share",
        file="attention/cpu/bias_gradient.h",
        before="b < s.batch; ++b",
        after="b < 1; ++b",
        instances=CPU,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-merge",
        what="the sums of earlier parts are not rescaled when a later part has a larger maximum",
        file="decode/cpu/partial.h",
        before="Load<C>(into.sum + first) * old_scale",
        after="Load<C>(into.sum + first)",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-few-no-rescale",
        what="the outputs of few rows are not rescaled when a row's maximum moves",
        file="decode/cpu/few.h",
        before="Load<C>(to) * rescale[r] + sums[r][v]",
        after="Load<C>(to) + sums[r][v]",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-window",
        what="a window is one position longer",
        file="decode/cpu/visits.h",
        before="key <= position - window && key >= sink_tokens",
        after="key < position - window && key >= sink_tokens",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-window-start",
        what="a tile of several tokens starts at the last token's window",
        file="decode/cpu/visits.h",
        before="Clamp(mask.base + first - mask.window + 1, high)",
        after="Clamp(mask.base + last - mask.window + 1, high)",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-tree-word",
        what="the drafted tokens from the 33rd on are looked up in the first word",
        file="decode/cpu/visits.h",
        before="tree[2 * token + (key - base) / 32]",
        after="tree[2 * token]",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-selection-of-a-head",
        what="every key/value head has the selection of the first",
        file="decode/cpu/visits.h",
        before="* s.kv_heads + tile.kv_head) * s.selected",
        after="* s.kv_heads) * s.selected",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-page-end",
        what="the page just past the cache is taken for one of it",
        file="decode/cpu/block.h",
        before="page < 0 || page >= pages_",
        after="page < 0 || page > pages_",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-freed-values",
        what="a NaN among the values reaches rows that do not attend to it",
        file="decode/cpu/block.h",
        before="block.value[k] = zeros;",
        after="",
        instances=CPU_DECODE,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-decode-offsets",
        what="the offsets of a group are not looked at for one that decreases",
        file="decode/cpu.cc",
        before="offsets[i + 1] < offsets[i]",
        after="offsets[i + 1] < INT32_MIN",
        instances=("decode/cpu.cc",),
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-product-last-entry",
        what="the last block of an out block is left out",
        file="matmul/cpu/product.h",
        before="for (int64_t entry = 0; entry < list.count; ++entry) {",
        after="for (int64_t entry = 0; entry + 1 < list.count; ++entry) {",
        instances=CPU_MATMUL,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-product-stale-panel",
        what="a packed block of the dense operand is taken for any other that has its place",
        file="matmul/cpu/held_blocks.h",
        before="return numbers_[number % places_] == number;",
        after="return numbers_[number % places_] >= 0;",
        instances=CPU_MATMUL,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-sampled-depth",
        what="sampled products stop at the last whole step of the depth",
        file="matmul/cpu/sampled.h",
        before="k < p.depth; k += kDepth",
        after="k + kDepth <= p.depth; k += kDepth",
        instances=CPU_MATMUL,
        cases=("seeds-0-19", "seeds-20-59"),
        program="cpu_check",
    ),
)

GATES = (
    Mutation(
        name="gates-forward-piece",
        what="the second 64 keys of a step are multiplied by the gate of the first",
        file="attention/sm90/fwd_producer.cuh",
        before="gates[1] = blocks.gate[1];",
        after="gates[1] = blocks.gate[0];",
        instances=GATED_FORWARD_64,
        cases=("gates", "gates-q128"),
    ),
    Mutation(
        name="gates-forward-exact-rows",
        what="rows that are computed once more, for a value that is not finite, leave the gates out",
        file="attention/sm90/fwd_exact_rows.cuh",
        before="prob *= lists::ReadGate",
        after="(void)lists::ReadGate",
        instances=GATED_FORWARD_64,
        cases=("gates-nan-value", "gates-inf-value"),
    ),
    Mutation(
        name="gates-head",
        what="all heads that share a list have the gates of its first",
        file="lists/block_list.cuh",
        before="batch * head_count + head - TableIndex(list.batch, list.heads, batch, head);",
        after="batch * head_count - TableIndex(list.batch, list.heads, batch, head);",
        instances=GATED_BACKWARD_64,
        cases=("gates", "gates-kv128"),
    ),
    Mutation(
        name="gates-backward-values",
        what="dV is that without gates",
        file="attention/sm90/bwd_consumer.cuh",
        before="PackScaled(packed_probs, scores, Gate(stage));",
        after="Pack(packed_probs, scores);",
        instances=GATED_BACKWARD_128,
        cases=("gates-causal-d128-b128", "gates-many-d128"),
    ),
    Mutation(
        name="gates-backward-scores",
        what="dS is that without gates, for blocks of 128 keys",
        file="attention/sm90/bwd_consumer.cuh",
        before="Scale(dscores, Gate(stage));\n        device::sm90::Pin(dscores);",
        after="device::sm90::Pin(dscores);",
        instances=GATED_BACKWARD_128,
        cases=("gates-causal-d128-b128", "gates-many-d128"),
    ),
    Mutation(
        name="gates-backward-sums",
        what="the second warpgroup's part of a gate's gradient overwrites the first's",
        file="attention/sm90/bwd_consumer.cuh",
        before="const int group = Config::kSplit ? 0 : group_ *",
        after="const int group = Config::kSplit ? 0 : 0 * group_ *",
        instances=GATED_BACKWARD_128,
        cases=("gates-causal-d128-b128", "gates-many-d128"),
    ),
    Mutation(
        name="gates-backward-step",
        what="the gates' gradients are in the order of steps, not of the blocks' quarters",
        file="attention/sm90/bwd_producer.cuh",
        before="gate_sums_ = sums + 4 * (entry * plan_.entry_subtiles + offset / 64);",
        after="gate_sums_ = sums + 4 * entry * plan_.entry_subtiles;",
        instances=GATED_BACKWARD_128,
        cases=("gates-causal-d128-b128", "gates-many-d128"),
    ),
    Mutation(
        name="gates-portable-sums",
        what="a gate's gradient has those of the steps before in it",
        file="attention/sm80/bwd_key.cuh",
        before="    sum = 0.f;\n",
        after="",
        instances=EXTENDED_PORTABLE_BACKWARD,
        cases=("gates", "gates-b128"),
    ),
)

LISTS_KERNELS = (
    Mutation(
        name="lists-rank",
        what="entries of one key among 32 take each other's places",
        file="lists/transpose.cu",
        before="own[now.key] + rank;",
        after="own[now.key] + __popc(peers) - 1 - rank;",
        instances=LISTS,
        cases=("lists", "lists-topk"),
    ),
    Mutation(
        name="lists-offsets",
        what="offsets that decrease are taken as they are",
        file="lists/transpose.cu",
        before="x = max(x, largest);",
        after="",
        instances=LISTS,
        cases=("lists-bad", "lists-one-large"),
    ),
    Mutation(
        name="cpu-lists-class",
        what="entries with and without a bit tile are mixed",
        file="lists/cpu.cc",
        before="2 * int64_t{ids[entry]} + (tiles[entry] == -1)",
        after="2 * int64_t{ids[entry]}",
        instances=CPU_LISTS,
        cases=("seeds-0-19",),
        program="cpu_check",
    ),
    Mutation(
        name="choose-ties",
        what="of equal scores among 32 the later groups are taken",
        file="lists/choose.cu",
        before="ties + __popc(Below(equal)) < choice.ties",
        after="ties + __popc(equal & ~Below(equal)) - 1 < choice.ties",
        instances=CHOOSE,
        cases=("choose", "choose-one-row"),
    ),
    Mutation(
        name="choose-required",
        what="required groups are chosen by their score",
        file="lists/choose.cu",
        before="states_of[i] == kRequired ? kRequiredKey : 0",
        after="states_of[i] == kRequired ? key : 0",
        instances=CHOOSE,
        cases=("choose", "choose-topk"),
    ),
    Mutation(
        name="choose-full-order",
        what="a row's full blocks descend",
        file="lists/choose.cu",
        before="room - 1 - (at - partials[of])",
        after="room - (ends[of] - (of > 0 ? ends[of - 1] : 0)) + at",
        instances=CHOOSE,
        cases=("choose", "choose-topk"),
    ),
    Mutation(
        name="choose-earlier-rows",
        what="a part of the rows counts its own first row among those before it",
        file="lists/choose.cu",
        before="if (row < first) before += count;",
        after="if (row <= first) before += count;",
        instances=CHOOSE,
        cases=("choose", "choose-topk"),
    ),
    Mutation(
        name="cpu-choose-ties",
        what="groups whose score is that of the last one chosen are left out",
        file="lists/cpu_choose.cc",
        before="return key > least;",
        after="return key >= least;",
        instances=CPU_CHOOSE,
        cases=("seeds-0-19",),
        program="cpu_check",
    ),
    Mutation(
        name="cpu-choose-infinity",
        what="a score of +inf comes before the largest finite one",
        file="lists/score_key.h",
        before="key > kLargest ? kLargest : key;",
        after="key;",
        instances=CPU_CHOOSE,
        cases=("seeds-0-19",),
        program="cpu_check",
    ),
)


def _decode(name: str, what: str, file: str, before: str, after: str, **others: Any) -> Mutation:
    """A bug of the decoding kernels, in those of bf16 and 64 dimensions unless said otherwise."""
    fields = {"instances": DECODE_64, "cases": ("decode-bf16-d64", "decode-faults-bf16-d64")} | others
    return Mutation(f"decode-{name}", what, f"decode/cuda/{file}", before, after, **fields)


DECODE_KERNELS = (
    _decode(
        "unit-slot",
        "the producer describes its units in two slots by turns, the consumers look in four",
        "forward.cuh",
        "slot_ = (slot_ + 1) % kUnitsKept<Config>;",
        "slot_ = (slot_ + 1) % 2;",
    ),
    _decode(
        "early-step",
        "a step that the copy engine brings is not waited for",
        "forward.cuh",
        "device::sm90::Wait(shared_.full[stage], phases_ >> stage & 1);",
        "",
        instances=DECODE_128,
        cases=("decode-far-bf16-d128",),
    ),
    # Of rows that threads copy a missing wait shows in no comparison. (racecheck found one that the kernel had.)
    _decode(
        "box-rows",
        "the copy engine takes a step's rows at once, though pages are smaller",
        "forward.cuh",
        "return rows < 8 ? 0 : static_cast<int>(rows);",
        "return kStepKeys;",
    ),
    _decode(
        "query-scale",
        "the power of two by which queries became float16 stays in the logits",
        "forward.cuh",
        "scale[half] = __uint_as_float((254 - exponent) << 23);",
        "scale[half] = 1.f;",
        instances=("decode/cuda/quantised_bf16_128.cu",),
        cases=("decode-e4m3-bf16-d128",),
    ),
    _decode(
        "steps-of-bytes",
        "of two steps that are taken at once the second has the first one's mask",
        "forward.cuh",
        "masked[step] = shared.masked[at].any != 0;",
        "masked[step] = shared.masked[stage].any != 0;",
        instances=("decode/cuda/quantised_bf16_128.cu",),
        cases=("decode-e4m3-bf16-d128", "decode-int8-bf16-d128"),
    ),
    _decode(
        "no-barrier",
        "rows are stored over a stage that other warps still read",
        "forward.cuh",
        "      __syncthreads();  // nobody reads the stage any more\n",
        "",
        instances=DECODE_128,
        cases=RACING_DECODE,
    ),
    _decode(
        "no-second-barrier",
        "rows are read from a stage before the other warps, of which one is late, have stored theirs",
        "forward.cuh",
        "        const float sum = device::QuadSum(softmax.sum[half]);\n"
        "        if (t == 0) shared.stats[warp][g + 8 * half] = make_float2(softmax.max[half], sum);\n"
        "      }\n"
        "      __syncthreads();\n",
        "        const float sum = device::QuadSum(softmax.sum[half]);\n"
        "        if (warp == 0) __nanosleep(20000);\n"
        "        if (t == 0) shared.stats[warp][g + 8 * half] = make_float2(softmax.max[half], sum);\n"
        "      }\n",
        instances=DECODE_128,
        cases=RACING_DECODE,
    ),
    _decode(
        "last-step",
        "a last step of fewer than 64 keys is not visited",
        "sequence.cuh",
        "const int last = (max(end, 0) + kStepKeys - 1) / kStepKeys;",
        "const int last = max(end, 0) / kStepKeys;",
    ),
    _decode(
        "part-query",
        "the queries of a short sequence keep their parts in one place",
        "merge.cuh",
        "sequence * params.short_queries + query;",
        "sequence * params.short_queries;",
    ),
    _decode(
        "no-cleaning",
        "values that are not finite reach rows that do not attend to them",
        "forward.cuh",
        "bad[step] = device::CleanRows<Config::kThreads>(values, shared.bad_values, device::ThreadHere());",
        "(void)values;",
        cases=("decode-faults-bf16-d64",),
    ),
    _decode(
        "last-mask",
        "the last step of a unit has no mask",
        "forward.cuh",
        "shared_.masked[stage].any = !whole,",
        "shared_.masked[stage].any = !whole && left_ > 0,",
    ),
    _decode(
        "window",
        "a window has one more key",
        "masks.cuh",
        "position - params.window + 1 : 0;",
        "position - params.window : 0;",
    ),
    _decode(
        "tree-bits",
        "a token's bits of the tree are read one token too far",
        "masks.cuh",
        "(bits_ >> (key - draft_) & 1)",
        "(bits_ >> (key - draft_ + 1) & 1)",
    ),
    _decode(
        "first-sink",
        "every head has the first one's sink",
        "merge.cuh",
        "params.sink_group_stride + head * params.sink_head_stride);",
        "params.sink_group_stride);",
    ),
    _decode(
        "merge-rescale",
        "the sum of the parts so far is not rescaled when a part raises the maximum",
        "merge.cuh",
        "sum = fmaf(stats.y, factor, sum * old);",
        "sum = fmaf(stats.y, factor, sum);",
    ),
    _decode(
        "warp-sums",
        "the warps' sums of a narrow tile are added as if they had one maximum",
        "forward.cuh",
        "sum = fmaf(stats.y, factor, sum);",
        "sum += stats.y;",
    ),
    _decode(
        "first-group",
        "every group reads the first one's pages",
        "copies.cuh",
        "return {(group * params.pages + physical) * page_size",
        "return {physical * page_size",
    ),
    _decode(
        "page-check",
        "pages past the cache's last are read",
        "copies.cuh",
        "if (physical < 0 || physical >= params.pages) return",
        "if (physical < 0) return",
        cases=("decode-faults-bf16-d64",),
    ),
    _decode(
        "length-check",
        "queries of a sequence whose length cannot be true give 0",
        "merge.cuh",
        "if (sequence.kv_len < 0) return fill(device::QuietNan(), device::QuietNan());",
        "if (sequence.kv_len < 0) return fill(0.f, -device::Infinity());",
        cases=("decode-faults-bf16-d64",),
    ),
)

MUTATIONS = (
    FORWARD
    + BACKWARD
    + GATES
    + LISTS_KERNELS
    + MATMUL
    + DECODE_KERNELS
    + PORTABLE
    + BIASES
    + HOPPER_BIASES
    + HOPPER_BIAS_GRADIENTS
    + CPU_KERNELS
)


# ---- Copies


def generate(folder: Path) -> None:
    """Makes folder/NAME/csrc for every mutation, and folder/mutants.cmake, which CMakeLists.txt reads.

    What is as it should be is not touched, so that a build that follows compiles only what changed.
    """
    calls = ["# Written by mutations.py: jax_bsk_mutant(name program file sources...)"]
    for mutation in MUTATIONS:
        text = mutation.apply((CSRC / mutation.file).read_text())
        _overlay(CSRC, folder / mutation.name / "csrc", Path(mutation.file).parts, text)
        calls.append(
            f"jax_bsk_mutant({mutation.name} {mutation.program} {mutation.file} {' '.join(mutation.instances)})"
        )
    _write(folder / "mutants.cmake", "\n".join(calls) + "\n")


def _overlay(source: Path, target: Path, parts: Sequence[str], text: str) -> None:
    """Makes `target` the folder `source` with `text` in the file at `parts`, and links to everything beside it."""
    if target.is_symlink():
        target.unlink()
    target.mkdir(parents=True, exist_ok=True)
    entries = {entry.name for entry in source.iterdir()}
    for gone in [entry for entry in target.iterdir() if entry.name not in entries]:
        _remove(gone)
    for name in entries:
        if name != parts[0]:
            _link(target / name, source / name)
        elif len(parts) > 1:
            _overlay(source / name, target / name, parts[1:], text)
        else:
            _write(target / name, text)


def _write(path: Path, text: str) -> None:
    if path.is_symlink():
        path.unlink()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _link(path: Path, to: Path) -> None:
    if path.is_symlink() and path.readlink() == to:
        return
    _remove(path)
    path.symlink_to(to)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- Runs


@dataclass(frozen=True)
class Verdict:
    mutation: Mutation
    by: str | None  # the case that caught it
    how: str | None  # "wrong result", "does not end", "timeout" or "crash"
    seconds: float

    def as_json(self) -> dict[str, object]:
        mutation = self.mutation
        return {
            "name": mutation.name,
            "what": mutation.what,
            "file": mutation.file,
            "program": mutation.program,
            "caught": self.by is not None,
            "by": self.by,
            "how": self.how,
            "seconds": round(self.seconds, 2),
        }


def run(
    build: Path, mutations: tuple[Mutation, ...] = MUTATIONS, jobs: int = 1, timeout: float = 120
) -> tuple[list[Verdict], list[str]]:
    """The mutants' verdicts, and what the unmutated programs fail, in words; prints both as a table."""
    needed = {build / mutation.program for mutation in mutations}
    needed |= {build / f"mutant_{mutation.name}" for mutation in mutations}
    if missing := sorted(path.name for path in needed if not path.exists()):
        raise FileNotFoundError(f"{build} has no {', '.join(missing)}: build these targets (JAX_BSK_MUTANTS=ON)")

    def judge(mutation: Mutation) -> Verdict:
        start = time.monotonic()
        by = how = None
        for case in mutation.cases:
            if sound[mutation.program, case].result() is not None:  # its failure would say nothing
                continue
            how = _failure(build / f"mutant_{mutation.name}", case, timeout)
            if how is not None:
                by = case
                break
        return Verdict(mutation, by, how, time.monotonic() - start)

    verdicts, unsound = [], []
    with ThreadPoolExecutor(jobs) as pool:
        shared = dict.fromkeys((mutation.program, case) for mutation in mutations for case in mutation.cases)
        # The first in the queue, so that a mutant which waits for them waits for what is running or done.
        sound = {at: pool.submit(_failure, build / at[0], at[1], timeout) for at in shared}
        judged = [pool.submit(judge, mutation) for mutation in mutations]
        for (program, case), failure in sound.items():
            if (how := failure.result()) is not None:
                unsound.append(f"{program} {case}: {how}")
                print(f"the unmutated {unsound[-1]}", flush=True)
        width = max(len(mutation.name) for mutation in mutations)
        for future in judged:
            verdict = future.result()
            verdicts.append(verdict)
            caught = "SURVIVED" if verdict.by is None else f"caught by {verdict.by}"
            if verdict.how not in (None, "wrong result"):
                caught += f" ({verdict.how})"
            print(f"{verdict.mutation.name:{width}}  {caught:32}  {verdict.mutation.what}", flush=True)
    print(f"{sum(verdict.by is not None for verdict in verdicts)} of {len(verdicts)} caught; ", end="")
    print(f"the unmutated programs fail {len(unsound)} of {len(sound)} cases")
    return verdicts, unsound


def _failure(program: Path, case: str, timeout: float) -> str | None:
    """How a program fails a case; None when it passes."""
    if case.startswith("seeds-"):
        _, first, last = case.split("-")
        arguments = ["--cases", str(int(last) - int(first) + 1), "--seed", first]
    else:
        arguments = [case, "1", str(CASE_SECONDS)]
    # The instruction set that the mutants of the CPU's kernels are compiled for.
    environment = {**os.environ, "JAX_BSK_CPU_ISA": "baseline"}
    try:
        status = subprocess.run(
            [program.resolve(), *arguments], env=environment, capture_output=True, timeout=timeout, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return "timeout"
    return {0: None, 1: "wrong result", 4: "does not end"}.get(status, "crash")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names the mutations")
    command = commands.add_parser("generate", help="makes the mutants' copies of csrc")
    command.add_argument("folder", type=Path, metavar="DIR")
    command = commands.add_parser(
        "run", help="runs the mutants; status 1 when one survives or an unmutated program fails"
    )
    command.add_argument("build", type=Path, metavar="BUILD_DIR", help="the folder with the programs")
    command.add_argument("--only", action="append", metavar="NAME", help="this mutation; may be repeated")
    command.add_argument("--jobs", type=int, default=1, metavar="N", help="programs at a time (1)")
    command.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds a case may take (120)")
    command.add_argument("--json", type=Path, metavar="FILE", help="writes the verdicts there as well")
    given = parser.parse_args(arguments)

    if given.command == "generate":
        generate(given.folder)
        return 0
    if given.command == "list":
        for mutation in MUTATIONS:
            print(f"{mutation.name}  {mutation.file}: {mutation.what} ({mutation.program} {' '.join(mutation.cases)})")
        return 0
    unknown = set(given.only or ()) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = tuple(mutation for mutation in MUTATIONS if given.only is None or mutation.name in given.only)
    try:
        verdicts, unsound = run(given.build, chosen, given.jobs, given.timeout)
    except FileNotFoundError as error:
        parser.error(str(error))
    if given.json is not None:
        given.json.write_text(json.dumps([verdict.as_json() for verdict in verdicts], indent=2) + "\n")
    return int(bool(unsound) or any(verdict.by is None for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
