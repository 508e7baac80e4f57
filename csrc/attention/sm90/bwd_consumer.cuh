// A consumer warpgroup of the Hopper backward. With x = q.k, P = exp(cap(scale x) - lse), dP = dO V^T and
// dS = P (gate dP - delta) cap'(scale x), all of them transposed here (rows are keys, columns queries):
//   an item of keys    dV += gate P^T dO, dK += dS^T Q for each step, and dS to the workspace; dgate += P o dP;
//   an item of queries dQ += dS K.
// Gates are for plain logits only.
#pragma once

#include "attention/dropout.cuh"
#include "attention/sm90/bias.cuh"
#include "attention/sm90/bwd_shared.cuh"
#include "attention/sm90/store_rows.cuh"
#include "device/numbers.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/matrix.cuh"
#include "device/ptx/registers.cuh"
#include "device/ptx/thread.cuh"
#include "device/ptx/wgmma.cuh"
#include "device/tile.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// The pipeline of a CTA: four producer warps and two consumer warpgroups. `x ==>` is a buffer that is filled and
// announced by barrier full_x; `<-- x` is its release by barrier empty_x. Each barrier is one of BackwardShared.
//
//   producer warp                                          consumer warpgroups (0, 1)
//   BackwardScheduler   item =============================> kind and position, also to the other producers
//                            <-- item --------------------- results are stored
//   LoadKeysAndValues   key[0], key[1] ===================> of an item of keys: K, V of a warpgroup, for all steps
//                            <-- key[group] --------------- last step's first products are done
//   BackwardLoader      step n ("full", "empty") =========> Q, dO, statistics, bit tile, gate; or K and dS
//                            <-- step n ------------------- products of step n are done, seen in step n+1
//   StoreScores                    <============ scores n   dS of step n, as 16-bit words
//                       scores n ---------------------> free again once the copy engine has read it
//
// open_item orders BackwardLoader before LoadKeysAndValues: queries use the memory of keys and values.
//
// Step n of an item of keys:
//   unsplit, each warpgroup with its own 64 keys
//     issue    S = K Q^T, dP = V dO^T ---.                          dV += P^T dO, dK += dS^T Q ----> run into step n+1
//     compute       P (dP still runs) <--'-> dS = P (dP - delta) ---'-> scores n
//   split, both warpgroups with the same 64 keys
//     0:       S ---> P ---> dV += P^T dO (runs into step n+1) ---> hands P over
//     1:       dP --------------------------------------------------> dS = P (dP - delta) ---> dK += dS^T Q, scores n
//              P goes through shared_.probs: at full_probs and empty_probs every thread arrives for its own words.
//
// Step n of an item of queries, each warpgroup with 64 queries of the block: dQ += dS K is issued, that of step n-1 is
// waited for, and its buffer released.
template <typename Config>
class BackwardConsumer {
 public:
  using Shared = BackwardShared<Config>;
  using Element = typename Config::Element;
  static constexpr int kDim = Config::kDim, kTileKv = Config::kTileKv;
  static constexpr int kScores = 32, kPacked = 16, kGradient = kDim / 2;  // registers
  static constexpr bool kMakesScores = !Config::kSplit;                   // every warpgroup, or number 1 alone
  static constexpr int kOwnRows = Config::kSplit ? 0 : 64;                // between the keys of the warpgroups
  static constexpr int kProbStages = Config::kSplit ? Config::kProbStages : 1;

  __device__ BackwardConsumer(Shared& shared, const BackwardParams& params, const BackwardPlan& plan, int group)
      : shared_(shared), params_(params), plan_(plan), group_(group) {}

  __device__ __forceinline__ void Run() {
    Ring<Shared::kItems> items;
    while (true) {
      device::sm90::Wait(shared_.full_item[items.Stage()], items.Full());
      const BackwardItem& item = shared_.items[items.Stage()];
      const int kind = ReadShared(item.kind);
      if (kind == BackwardItem::kEnd) return;
      if (kind == BackwardItem::kKeys) {
        Keys(item);
      } else {
        Queries(item);
      }
      device::sm90::ReleaseForWarp(shared_.empty_item[items.Stage()]);
      items.Advance();
    }
  }

 private:
  // ---- Items

  __device__ __forceinline__ void Keys(const BackwardItem& item) {
    device::sm90::Wait(shared_.full_key[group_], keys_.Full());
    if constexpr (Config::kSplit) {
      float gradient[kGradient] = {};  // of values or keys
      const bool live = !SkipVoid();
      if (live && group_ == 0) ForSteps(gradient, [&] { SplitProbabilities(item, gradient); });
      if (live && group_ == 1) ForSteps(gradient, [&] { SplitScores(item, gradient); });
      EndSteps();
      if (group_ == 0) {
        StoreValueGradient(item, gradient);
      } else {
        StoreKeyGradient(item, gradient);
      }
    } else {
      float dkey[kGradient] = {}, dvalue[kGradient] = {};
      if (!SkipVoid()) {
        device::sm90::Pin(dvalue);
        ForSteps(dkey, [&] { KeyStep(item, dkey, dvalue); });
        device::sm90::Pin(dvalue);
      }
      EndSteps();
      StoreValueGradient(item, dvalue);
      StoreKeyGradient(item, dkey);
    }
  }

  // True if the item has nothing to do; its buffers are released then.
  __device__ __forceinline__ bool SkipVoid() {
    if (!(WaitForStep() & StepFlag::kVoid)) return false;
    Release(shared_.empty_key[group_]);
    if (kMakesScores || group_ == 1) {
      WaitForScoresBuffer();
      ArriveScores();
    }
    return true;
  }

  // All steps of an item of keys, `gradient` among what they add to.
  template <typename Step>
  __device__ __forceinline__ void ForSteps(float (&gradient)[kGradient], Step step) {
    device::sm90::Pin(gradient);
    first_ = true;
#pragma unroll 1
    while (true) {
      step();
      if (flags_ & StepFlag::kLast) break;
      first_ = false;
      ++step_;
    }
    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(gradient);
  }
  __device__ __forceinline__ void EndSteps() {
    ReleasePlace(Stages().Stage());
    ++step_;
    keys_.Advance();
  }

  __device__ __forceinline__ void Queries(const BackwardItem& item) {
    const Shape& shape = params_.shape;
    const bool active = 64 * group_ < shape.block_q;
    float dquery[kGradient] = {};
    const bool live = !(WaitForQueryStep() & StepFlag::kVoid);
    while (!active && !(flags_ & StepFlag::kLast)) {
      ReleasePlace(QueryPlace(query_step_++));
      WaitForQueryStep();
    }
    if (active && live) {
      device::sm90::Pin(dquery);
      bool first = true;
#pragma unroll 1
      while (true) {
        const int place = QueryPlace(query_step_);
        const uint32_t scores = device::sm90::TileDescriptor(shared_.Second(place) + group_ * kSubtileElements);
        const uint32_t key = device::sm90::TileDescriptor(shared_.First(place), 64 * 128);
        device::sm90::FenceProducts();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          Gradients::SharedTransposed(dquery, device::sm90::FullDescriptor(scores + k * 128),
                                      device::sm90::FullDescriptor(key + k * 128));
        }
        device::sm90::CommitProducts();
        device::sm90::WaitForProducts<1>();
        if (!first) ReleasePlace(QueryPlace(query_step_ - 1));
        first = false;
        if (flags_ & StepFlag::kLast) break;
        ++query_step_;
        WaitForQueryStep();
      }
      device::sm90::WaitForProducts<0>();
      device::sm90::Pin(dquery);
    }
    ReleasePlace(QueryPlace(query_step_++));
    // All of the item's dS has arrived.
    if (group_ == 0 && Thread() == 0) device::sm90::AddRelease(plan_.done_queries + item.slice, 1);
    if (!active) return;

    StoreTile(dquery, params_.scale, item, item.start + 64 * group_, item.query_limit, shape.q_len, shape.heads,
              params_.dquery, static_cast<int>(shape.head_dim), plan_.inexact_queries);
  }

  // ---- Steps of keys: 64 keys of this warpgroup, 64 queries. The gradients of the step before are still in flight.

  // Both gradients.
  __device__ __forceinline__ void KeyStep(const BackwardItem& item, float (&dkey)[kGradient],
                                          float (&dvalue)[kGradient]) {
    float scores[kScores], dscores[kScores], rows[kPacked];
    KeptPairs kept;
    const int stage = Stages().Stage();
    BeginStep<Config::kExtras>(item, scores, shared_.key, shared_.first[stage]);
    device::sm90::FenceProducts();
    MultiplyRows(dscores, shared_.value, shared_.second[stage]);
    device::sm90::CommitProducts();
    flags_ = ReadShared(shared_.flags[stage]);
    if constexpr (Config::kExtras) {
      if (Drops(params_.dropout)) FindKept(item, stage, kept);
    }

    const auto load_lse = [&] {
      LoadStatistics(rows, shared_.statistics[stage][0]);
      device::sm90::Pin(rows);
    };
    load_lse();
    if constexpr (Config::kPlain) {
      device::sm90::WaitForProducts<1>();
      device::sm90::Pin(scores);
      Probabilities(scores, rows, stage);
      if (flags_ & StepFlag::kMasked) ApplyMask(item, scores, stage);
      // Not earlier where the sum of a gate needs the registers.
      constexpr bool kDeltaLater = Config::kGated;
      if constexpr (!kDeltaLater) LoadStatistics(rows, shared_.statistics[stage][1]);
      device::sm90::Pin(scores);
      device::sm90::Pin(rows);
      // Never blocks: a branch that keeps ptxas from moving the next wait up above the exponentials.
      device::sm90::Wait(shared_.open, 1);
      device::sm90::WaitForProducts<0>();
      device::sm90::Pin(dscores);
      if constexpr (Config::kGated) {
        StoreGateSum(stage, ProductSum(scores, dscores));
        Scale(dscores, Gate(stage));
        device::sm90::Pin(dscores);
      }
      if constexpr (Config::kExtras) {
        if (Drops(params_.dropout)) {
          DropScores(dscores, kept);
          device::sm90::Pin(dscores);
        }
      }
      if constexpr (kDeltaLater) LoadStatistics(rows, shared_.statistics[stage][1]);
      SubtractDelta(dscores, rows);
    } else {
      // Nothing overlaps here: there are no registers for the slopes as well.
      device::sm90::WaitForProducts<0>();
      device::sm90::Pin(scores);
      device::sm90::Pin(dscores);
      float deltas[kPacked];
      LoadStatistics(deltas, shared_.statistics[stage][1]);
      SubtractDelta(dscores, deltas);
      MapLogits(scores);
#pragma unroll
      for (int i = 0; i < kScores; ++i) dscores[i] *= plan_.logits.Slope(scores[i]);
      Probabilities(scores, rows, stage);
      if (flags_ & StepFlag::kMasked) ApplyMask(item, scores, stage);
    }
    if (flags_ & StepFlag::kLast) Release(shared_.empty_key[group_]);
    uint32_t packed_probs[kPacked], packed_scores[kPacked];
    if constexpr (Config::kGated) {
      PackScaled(packed_probs, scores, Gate(stage));
    } else {
      Pack(packed_probs, scores);
    }
    if constexpr (Config::kExtras) {
      if (Drops(params_.dropout)) DropPacked(packed_probs, kept);
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) dscores[i] *= scores[i];
    Pack(packed_scores, dscores);
    device::sm90::Pin(packed_probs);
    device::sm90::Pin(packed_scores);
    device::sm90::Pin(dkey);
    device::sm90::Pin(dvalue);
    device::sm90::FenceProducts();
    MultiplyColumns(dvalue, packed_probs, shared_.second[stage]);
    MultiplyColumns(dkey, packed_scores, shared_.first[stage]);
    device::sm90::CommitProducts();
    StoreScores(packed_scores);
  }

  // Split, warpgroup 0: P, for itself and for warpgroup 1, and dV.
  __device__ __forceinline__ void SplitProbabilities(const BackwardItem& item, float (&dvalue)[kGradient]) {
    float scores[kScores];
    const int stage = Stages().Stage();
    BeginStep<Config::kExtras>(item, scores, shared_.key, shared_.first[stage]);
    flags_ = ReadShared(shared_.flags[stage]);
    KeptPairs kept;
    if constexpr (Config::kExtras) {
      if (Drops(params_.dropout)) FindKept(item, stage, kept);
    }
    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(scores);
    if (flags_ & StepFlag::kLast) Release(shared_.empty_key[group_]);
    const Ring<kProbStages> place{prob_step_++};
    device::sm90::Wait(shared_.empty_probs[place.Stage()], place.Empty());
    auto* words = reinterpret_cast<float4*>(shared_.probs[place.Stage()]) + Thread();
    if constexpr (!Config::kPlain) {
      MapLogits(scores);
      ForQuads(scores, [&](int i, const float4& x) {  // the slopes wait here for want of registers
        const auto& map = plan_.logits;
        words[i * kWarpgroup] = make_float4(map.Slope(x.x), map.Slope(x.y), map.Slope(x.z), map.Slope(x.w));
      });
    }
    float rows[kPacked];
    LoadStatistics(rows, shared_.statistics[stage][0]);
    Probabilities(scores, rows, stage);
    if (flags_ & StepFlag::kMasked) ApplyMask(item, scores, stage);
    uint32_t packed[kPacked];
    if constexpr (Config::kGated) {
      PackScaled(packed, scores, Gate(stage));
    } else {
      Pack(packed, scores);
    }
    if constexpr (Config::kExtras) {
      if (Drops(params_.dropout)) DropPacked(packed, kept);
    }
    device::sm90::Pin(packed);
    device::sm90::Pin(dvalue);
    device::sm90::FenceProducts();
    MultiplyColumns(dvalue, packed, shared_.second[stage]);
    device::sm90::CommitProducts();
    ForQuads(scores, [&](int i, float4 four) {
      if constexpr (!Config::kPlain) {
        const float4 slope = words[i * kWarpgroup];
        four = make_float4(four.x * slope.x, four.y * slope.y, four.z * slope.z, four.w * slope.w);
      }
      words[i * kWarpgroup] = four;
    });
    device::sm90::Arrive(shared_.full_probs[place.Stage()]);
  }

  // Split, warpgroup 1: dP, dS and dK. A thread has the pairs of the thread of the same number in warpgroup 0.
  __device__ __forceinline__ void SplitScores(const BackwardItem& item, float (&dkey)[kGradient]) {
    float dscores[kScores];
    const int stage = Stages().Stage();
    BeginStep<false>(item, dscores, shared_.value, shared_.second[stage]);
    flags_ = ReadShared(shared_.flags[stage]);
    KeptPairs kept;
    if constexpr (Config::kExtras) {
      if (Drops(params_.dropout)) FindKept(item, stage, kept);
    }
    const Ring<kProbStages> place{prob_step_++};
    device::sm90::Wait(shared_.full_probs[place.Stage()], place.Full());
    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(dscores);
    if (flags_ & StepFlag::kLast) Release(shared_.empty_key[group_]);
    const auto* words = reinterpret_cast<const float4*>(shared_.probs[place.Stage()]) + Thread();
    if constexpr (Config::kGated) {
      float sum = 0.f;
      ForQuads(dscores, [&](int i, const float4& x) {
        const float4 probs = words[i * kWarpgroup];
        sum = AddPair(probs.x, x.x, AddPair(probs.y, x.y, AddPair(probs.z, x.z, AddPair(probs.w, x.w, sum))));
      });
      StoreGateSum(stage, sum);
      Scale(dscores, Gate(stage));
    }
    if constexpr (Config::kExtras) {
      if (Drops(params_.dropout)) DropScores(dscores, kept);
    }
    float rows[kPacked];
    LoadStatistics(rows, shared_.statistics[stage][1]);
    SubtractDelta(dscores, rows);
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const float4 probs = words[i * kWarpgroup];
      dscores[4 * i] *= probs.x, dscores[4 * i + 1] *= probs.y;
      dscores[4 * i + 2] *= probs.z, dscores[4 * i + 3] *= probs.w;
    }
    device::sm90::Arrive(shared_.empty_probs[place.Stage()]);
    uint32_t packed[kPacked];
    Pack(packed, dscores);
    device::sm90::Pin(packed);
    device::sm90::Pin(dkey);
    device::sm90::FenceProducts();
    MultiplyColumns(dkey, packed, shared_.first[stage]);
    device::sm90::CommitProducts();
    StoreScores(packed);
  }

  // ---- Parts of a step

  // A step's first product; the gradients of the step before are done then, and their memory is released. kLogits: it
  // is added to the logits' biases.
  template <bool kLogits>
  __device__ __forceinline__ void BeginStep(const BackwardItem& item, float (&d)[kScores], const Element* resident,
                                            const Element* tile) {
    device::sm90::Wait(shared_.full[Stages().Stage()], Stages().Full());
    if constexpr (kLogits) StartLogits(item, d);
    device::sm90::FenceProducts();
    MultiplyRows<kLogits>(d, resident, tile);
    device::sm90::CommitProducts();
    device::sm90::WaitForProducts<1>();
    if (!first_) ReleasePrevious();
  }

  // Statistics of this thread's columns.
  __device__ __forceinline__ void LoadStatistics(float (&rows)[kPacked], const float* statistics) {
    const int column = Thread() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 pair = *reinterpret_cast<const float2*>(statistics + 8 * n + column);
      rows[2 * n] = pair.x;
      rows[2 * n + 1] = pair.y;
    }
  }

  // Logits to probabilities. Where the log-sum-exp of a query is large, what rounding took from it counts as well: a
  // branch for each step, so that all others cost what they would without (0 to 2 % more, H200). It is best decided
  // here: before the products are waited for it costs another 3 % at 128 columns.
  __device__ __forceinline__ void Probabilities(float (&x)[kScores], const float (&lse)[kPacked], int stage) {
    const float* all_rest = shared_.statistics[stage][2];
    const float2 two = *reinterpret_cast<const float2*>(all_rest + Thread() % 32 * 2);
    const bool large = __any_sync(0xFFFFFFFFu, two.x != 0.f || two.y != 0.f);
    if (kDim == 64 && Config::kPlain && !large) {
      // Exponentials begin while other exponents are computed: 5 % at 64 columns, -8 % at 128.
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        x[i] = device::Exp2(fmaf(x[i], plan_.logits.multiplier, -lse[i / 4 * 2 + i % 2]));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] = fmaf(x[i], plan_.logits.multiplier, -lse[i / 4 * 2 + i % 2]);
    if (large) {
      const float* rest = all_rest + Thread() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        x[i] = Exponent(x[i], rest[8 * (i / 4) + i % 2]);
        if (i % 2 == 1) device::sm90::Pin(x);  // two at a time: more would spill
      }
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] = device::Exp2(x[i]);
  }

  // With a soft cap, or a scale that is not positive.
  __device__ __forceinline__ void MapLogits(float (&scores)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      scores[i] = plan_.logits(scores[i]);
      if (i % 2 == 1) device::sm90::Pin(scores);  // two at a time: more would spill
    }
  }

  __device__ __forceinline__ void SubtractDelta(float (&dscores)[kScores], const float (&delta)[kPacked]) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float& own = delta[i / 4 * 2 + i % 2];
      dscores[i] = Config::kExtras ? fmaf(dscores[i], plan_.kept_scale, -own) : dscores[i] - own;
    }
  }

  // ---- Biases and dropout

  // The first of this thread's keys; its other one is 8 further.
  __device__ __forceinline__ int KeyOf(const BackwardItem& item) const {
    return item.start + kOwnRows * group_ + RowOf(Thread());
  }

  // What the products of a step are added to: its biases, in their units, or nothing.
  __device__ __forceinline__ void StartLogits(const BackwardItem& item, float (&x)[kScores]) {
    const PairStep& step = shared_.pairs[Stages().Stage()];
    const float2 line = FindBiasLine(plan_.bias_lines, params_.bias, item.batch, ReadShared(step.head),
                                     ReadShared(step.query), item.start + kOwnRows * group_);
    if (IsBiasLine(line)) {
      LinePairs::Of<true>(line, RowOf(Thread()), Thread() % 4 * 2, plan_.bias_factor).template Set<0>(x);
    } else {
      SetNoBias<0>(x);
    }
    const bool read = params_.bias.distances != nullptr && !IsBiasLine(line);
    if (read || params_.bias.dense != nullptr || params_.bias.tiles != nullptr) AddBias(item, x, read);
    device::sm90::Pin(x);
  }

  // Adds the terms of the bias that are given, that by distance if it is to be `read`.
  __device__ __forceinline__ void AddBias(const BackwardItem& item, float (&x)[kScores], bool read) {
    const PairStep& step = shared_.pairs[Stages().Stage()];
#pragma unroll 1
    for (int term = 0; term < kBiasTerms; ++term) {
      if (!HasTerm(params_.bias, term) || (term == kDistanceTerm && !read)) continue;
      const int start = ReadShared(step.query);
      const BiasTermView view = TermView(params_.bias, params_.shape, term, item.batch, ReadShared(step.head),
                                         ReadShared(step.bias_tile), start, item.start);
      if (view.data == nullptr) continue;
      const BiasAxis keys{item.start + kOwnRows * group_, RowOf(Thread()), static_cast<int>(params_.shape.kv_len)};
      const BiasAxis queries{start, Thread() % 4 * 2, static_cast<int>(params_.shape.q_len)};
      AddBiasTile<Element, true, 0>(x, view, keys, queries, plan_.bias_factor);
    }
  }

  // Which pairs stay does not depend on products: it is found while a step's first ones run. Lane l of a warp has the
  // word of a step's query of place l (DropoutPlace), for all lanes.
  __device__ __forceinline__ void FindKept(const BackwardItem& item, int stage, KeptPairs& kept) const {
    const PairStep& step = shared_.pairs[stage];
    const uint32_t thread = static_cast<uint32_t>(device::ThreadHere()) % kWarpgroup, lane = thread % 32;
    const auto bytes = KeptBytesHere(params_.dropout.threshold);
    const uint32_t head_key = __ldg(params_.dropout.keys + item.batch * params_.shape.heads + ReadShared(step.head));
    const auto start = static_cast<uint32_t>(ReadShared(step.query));  // a multiple of 64
    const uint32_t query_word = DropoutQueryWordOf(head_key, start / 2 + lane);
    const auto keys = static_cast<uint32_t>(item.start + kOwnRows * group_);  // likewise, and a warp has sixteen
    const uint32_t key_word = DropoutKeyWordOf(keys / 2 + thread / 32 * 8 + lane / 4);
    kept.Clear();
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t word = __shfl_sync(0xFFFFFFFFu, query_word, 8 * m + lane % 4 * 2 + e);
        kept.Add(m, e, DropoutProducts(word, key_word), bytes);
      }
    kept.Flip(bytes.flip);
    device::sm90::Pin(kept.parity);
  }

  // dP of the pairs that stay, 0 for the others. SubtractDelta scales it.
  __device__ __forceinline__ void DropScores(float (&x)[kScores], const KeptPairs& kept) const {
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int byte = 0; byte < 4; ++byte)
#pragma unroll
        for (int m = 0; m < 4; ++m)  // neighbouring bits, so that one instruction makes predicates of them (R2P)
          if (!kept.Stays(m, e, byte)) x[4 * (2 * m + byte % 2) + byte / 2 * 2 + e] = 0.f;
  }
  // Of packed probabilities, which StoreValueGradient scales.
  __device__ __forceinline__ void DropPacked(uint32_t (&packed)[kPacked], const KeptPairs& kept) const {
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      const int n = i / 2, byte = n % 2 + i % 2 * 2;
      packed[i] &= kept.Pair(n / 2, byte);
    }
  }

  // ---- Gates
  __device__ __forceinline__ float Gate(int stage) const { return ReadShared(shared_.gates[stage].gate); }
  __device__ __forceinline__ static void Scale(float (&x)[kScores], float factor) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] *= factor;
  }
  // P dP of a pair; where P is 0 the pair may not attend, and dP be anything.
  __device__ __forceinline__ static float AddPair(float prob, float dprob, float sum) {
    return fmaf(prob, prob == 0.f ? 0.f : dprob, sum);
  }
  __device__ __forceinline__ static float ProductSum(const float (&probs)[kScores], const float (&dprobs)[kScores]) {
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kScores; ++i) sum[i % 2] = AddPair(probs[i], dprobs[i], sum[i % 2]);
    return sum[0] + sum[1];
  }
  // Stores the sum of P o dP over this warp's pairs.
  __device__ __forceinline__ void StoreGateSum(int stage, float sum) {
    sum = device::WarpSum(sum);
    const int sums = ReadShared(shared_.gates[stage].sums);
    const int group = Config::kSplit ? 0 : group_ * static_cast<int>(params_.shape.block_q / 64);
    if (device::sm90::ElectLane()) plan_.gate_sums[sums + 4 * group + Thread() / 32] = sum;
  }

  template <typename Visit>
  __device__ __forceinline__ static void ForQuads(const float (&x)[kScores], Visit visit) {
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) visit(i, make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]));
  }

  // As operands of the next products. Written while no product is in flight.
  __device__ __forceinline__ void Pack(uint32_t (&packed)[kPacked], const float (&x)[kScores]) {
#pragma unroll
    for (int i = 0; i < kPacked; ++i) packed[i] = device::PackPair<Element>(x[2 * i], x[2 * i + 1]);
  }

  __device__ __forceinline__ void PackScaled(uint32_t (&packed)[kPacked], const float (&x)[kScores], float factor) {
#pragma unroll
    for (int i = 0; i < kPacked; ++i) packed[i] = device::PackPair<Element>(factor * x[2 * i], factor * x[2 * i + 1]);
  }

  // 0 for pairs that do not attend: dP of such a pair then gives 0 or, not being finite, the row is inexact.
  __device__ __forceinline__ void ApplyMask(const BackwardItem& item, float (&probs)[kScores], int stage) {
    const int thread = Thread(), row = RowOf(thread);
    const int block_kv = static_cast<int>(params_.shape.block_kv);
    const int first = item.start + kOwnRows * group_, left = item.key_limit - first;
    const uint8_t* bits = shared_.bits[stage] + ((first & (block_kv - 1)) + thread / 32 * 16) / 8;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = 8 * n + thread % 4 * 2 + e;
        uint32_t attended = 0xFFFF;
        if (flags_ & StepFlag::kBits) attended = *reinterpret_cast<const uint16_t*>(bits + query * (block_kv / 8));
        attended >>= thread % 32 / 4;
        if (!(attended & 1) || row >= left) probs[4 * n + e] = 0.f;
        if (!(attended >> 8 & 1) || row + 8 >= left) probs[4 * n + 2 + e] = 0.f;
      }
  }

  // dS on its way to the workspace, [key][query].
  __device__ __forceinline__ void StoreScores(const uint32_t (&packed)[kPacked]) {
    const Ring<Config::kScoreStages> place{key_step_};
    const int thread = Thread(), row = thread / 32 * 16 + thread % 16, vector = thread % 32 / 16;
    WaitForScoresBuffer();
    const uint32_t base = device::SharedAddress(shared_.scores[place.Stage()][ScoresGroup()]) + row * 128;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      device::sm90::StoreMatrices(base + ((2 * k + vector) ^ row % 8) * 16, packed + 4 * k);
    }
    device::sm90::FenceAsyncProxy();
    ArriveScores();
  }
  __device__ __forceinline__ int ScoresGroup() const { return kMakesScores ? group_ : 0; }
  __device__ __forceinline__ void WaitForScoresBuffer() {
    const Ring<Config::kScoreStages> place{key_step_};
    device::sm90::Wait(shared_.empty_scores[place.Stage()][ScoresGroup()], place.Empty());
  }
  __device__ __forceinline__ void ArriveScores() {
    const Ring<Config::kScoreStages> place{key_step_};
    Release(shared_.full_scores[place.Stage()][ScoresGroup()]);
    ++key_step_;
  }

  // ---- Results

  __device__ __forceinline__ void StoreValueGradient(const BackwardItem& item, const float (&dvalue)[kGradient]) {
    const float scale = Config::kExtras ? plan_.kept_scale : 1.f;
    StoreKeyRows(item, dvalue, scale, params_.dvalue, static_cast<int>(params_.shape.value_dim));
  }
  __device__ __forceinline__ void StoreKeyGradient(const BackwardItem& item, const float (&dkey)[kGradient]) {
    StoreKeyRows(item, dkey, params_.scale, params_.dkey, static_cast<int>(params_.shape.head_dim));
  }
  __device__ __forceinline__ void StoreKeyRows(const BackwardItem& item, const float (&sums)[kGradient], float scale,
                                               void* result, int dim) {
    const Shape& shape = params_.shape;
    StoreTile(sums, scale, item, item.start + kOwnRows * group_, item.key_limit, shape.kv_len, shape.kv_heads, result,
              dim, plan_.inexact_keys);
  }

  // 64 rows from `start` on of [batch, length, heads, dim]; not finite, or poisoned: they are marked as inexact.
  __device__ __forceinline__ void StoreTile(const float (&sums)[kGradient], float scale, const BackwardItem& item,
                                            int start, int limit, int64_t length, int64_t heads, void* result, int dim,
                                            int32_t* marks) {
    const int stored = static_cast<int>(length) - start;
    const int64_t row = (item.batch * length + start) * heads + item.head;
    device::RowFinish finish[2];
    bool inexact = flags_ & StepFlag::kInexact;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      finish[half] = {RowOf(Thread()) + 8 * half < limit - start, scale, 0.f};
      inexact |= finish[half].keep && !RowIsFinite(sums, half);
    }
    StoreRows(sums, finish, stored, static_cast<Element*>(result) + row * dim, heads * dim, dim, Thread());
    if (__any_sync(0xFFFFFFFFu, inexact) && stored > 0 && device::sm90::ElectLane()) {
      const int tiles = (static_cast<int>(length) + 63) / 64;
      marks[(item.batch * heads + item.head) * tiles + start / 64] = 1;
    }
  }

  // ---- Products
  using Scores = device::sm90::Multiply<Element, 64>;
  using Gradients = device::sm90::Multiply<Element, kDim>;

  // Offset of k = 16 step in a K-major tile of `rows`, / 16.
  __device__ __forceinline__ static constexpr uint32_t Step16(int step, int rows) {
    return (step / 4 * rows * 128 + step % 4 * 32) / 16;
  }
  // keys x queries: 64 rows of the CTA's keys (or values) by the 64 of a step.
  template <bool kAdd = false>
  __device__ __forceinline__ void MultiplyRows(float (&d)[kScores], const Element* resident, const Element* stage) {
    using device::sm90::FullDescriptor;
    const uint32_t a = device::sm90::TileDescriptor(resident) + kOwnRows * group_ * 128 / 16;
    const uint32_t b = device::sm90::TileDescriptor(stage);
    if constexpr (kAdd) {
      Scores::Shared(d, FullDescriptor(a), FullDescriptor(b));
    } else {
      Scores::Overwrite(d, FullDescriptor(a), FullDescriptor(b));
    }
#pragma unroll
    for (int k = 1; k < kDim / 16; ++k) {
      Scores::Shared(d, FullDescriptor(a + Step16(k, kTileKv)), FullDescriptor(b + Step16(k, 64)));
    }
  }
  __device__ __forceinline__ void MultiplyColumns(float (&d)[kGradient], const uint32_t (&a)[kPacked],
                                                  const Element* stage) {
    const uint32_t b = device::sm90::TileDescriptor(stage, 64 * 128);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Gradients::RegistersTransposed(d, a + 4 * k, device::sm90::FullDescriptor(b + k * 128));
    }
  }

  // ---- Pipeline
  __device__ __forceinline__ Ring<Config::kStages> Stages() const { return {step_}; }

  __device__ __forceinline__ static int QueryPlace(uint32_t step) {
    return Config::kStages + Ring<Config::kQueryStages>{step}.Stage();
  }
  // Wait for the step; its flags.
  __device__ __forceinline__ int WaitForQueryStep() {
    const int place = QueryPlace(query_step_);
    device::sm90::Wait(shared_.full[place], Ring<Config::kQueryStages>{query_step_}.Full());
    flags_ = ReadShared(shared_.flags[place]);
    return flags_;
  }
  __device__ __forceinline__ int WaitForStep() {
    device::sm90::Wait(shared_.full[Stages().Stage()], Stages().Full());
    flags_ = ReadShared(shared_.flags[Stages().Stage()]);
    return flags_;
  }
  __device__ __forceinline__ void ReleasePrevious() { ReleasePlace(Ring<Config::kStages>{step_ - 1}.Stage()); }
  // A step's place in memory.
  __device__ __forceinline__ void ReleasePlace(int place) {
    if constexpr (Config::kEveryThreadArrives) {
      device::sm90::Arrive(shared_.empty[place]);
    } else {
      Release(shared_.empty[place]);
    }
  }
  // For this warp, once all its lanes have read the buffer.
  __device__ __forceinline__ void Release(Barrier& barrier) {
    __syncwarp();
    if (device::sm90::ElectLane()) device::sm90::Arrive(barrier);
  }
  __device__ __forceinline__ static int Thread() { return device::ThreadHere() % kWarpgroup; }

  Shared& shared_;
  const BackwardParams& params_;
  const BackwardPlan& plan_;
  const int group_;

  int flags_ = 0;
  bool first_ = false;  // step of the item
  uint32_t step_ = 0;   // of keys, of the CTA
  uint32_t query_step_ = 0;
  uint32_t key_step_ = 0;  // of the CTA's steps of keys, void ones too
  uint32_t prob_step_ = 0;
  Ring<1> keys_;
};

}  // namespace jax_bsk::attention::cuda::sm90
