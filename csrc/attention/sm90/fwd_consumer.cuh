// A consumer warpgroup of the Hopper forward: 64 queries of the CTA's tile, from products to stored rows.
#pragma once

#include "attention/dropout.cuh"
#include "attention/sm90/bias.cuh"
#include "attention/sm90/fwd_exact_rows.cuh"
#include "attention/sm90/fwd_shared.cuh"
#include "attention/sm90/fwd_softmax.cuh"
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
#include "lists/block_list.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// The pipeline of a CTA. `x ==>` is a buffer that is filled and announced by barrier full_x; `<-- x` is its release by
// barrier empty_x, for the next filling. Each barrier is one of ForwardShared.
//
//   ForwardScheduler (1 warp)    ForwardLoader (1 warp)    ForwardConsumer (1 or 2 warpgroups)
//   header ====================> walks its list
//   header ==============================================> kind and position of the tile
//          <-- header ---------- list is walked
//          <-- header ------------------------------------ StoreTile, StoreNothing
//   query  ==============================================> first Q K^T of the tile
//          <-- query ------------------------------------- in registers; at 256 dimensions: after the last Q K^T
//                                key n ==================> Q K^T of step n, its flags, bit tile and gate
//                                      <-- key n --------- mask of step n is applied
//                                (biases n, with kExtras: ForwardHelper) > as key n, of whose phase they are a part
//                                value n (after key n+1) > P V of step n, issued during step n+1
//                                      <-- value n ------- P V of step n is done
//
// Step n in a warpgroup. With two of them, one has the tensor cores while the other computes its softmax; they pass
// the turn to each other by the named barriers kTurn and kTurn + 1:
//
//   wait     full_key n, turn                 full_value n-1
//   issue          Q K^T n ---------------.       P V n-1 -------------------------.   pass the turn
//   compute                               '-> softmax n, release key n (P V runs)  '-> release value n-1, rescale O,
//                                                                                      P n to 16 bits
//
// With kExtras two helper warps (fwd_helper.cuh) get the loader's message of step n by full_step n, find its biases,
// and arrive at full_key n.
//
// Where there is a feeder (fwd_feeder.cuh), one warp is scheduler and loader, and headers have no barriers: a header is
// there with the keys of its tile's first step.
//
// A tile's first step has no P V to run beside its softmax; its last P V runs beside the first Q K^T of the next tile
// (FinishTile), and the rows are stored while that product runs.
template <typename Config>
class ForwardConsumer {
 public:
  using Shared = ForwardShared<Config>;
  using Element = typename Config::Element;
  static constexpr int kDim = Config::kDim, kTileQ = Config::kTileQ, kTileKv = Config::kTileKv;
  static constexpr int kLogits = kTileKv / 2, kProbs = kTileKv / 4, kOut = kDim / 2;  // registers

  __device__ ForwardConsumer(Shared& shared, const ForwardParams& params, const ForwardPlan& plan, int group)
      : shared_(shared), params_(params), plan_(plan), group_(group) {}

  __device__ __forceinline__ void Run() {
    if (kTakeTurns && group_ == 1) device::sm90::ArriveNamed(kTurn, 2 * kWarpgroup);  // group 0 goes first
    Headers tile;
    if (!SkipEmptyTiles(tile)) return;
    do {
      FirstStep(tile);
      do {
        while (!(flags_ & StepInfo::kLast)) Step();
      } while (FinishTile(tile));
    } while (SkipEmptyTiles(tile));

    FixInexactTiles();
  }

  // The same with a feeder, which announces no headers: every tile has a step.
  __device__ __forceinline__ void RunFed() {
    Headers tile;
    FirstStep(tile);
    do {
      while (!(flags_ & StepInfo::kLast)) Step();
    } while (FinishTile(tile));
    FixInexactTiles();
  }

 private:
  // Named barriers: one a warpgroup for its turn at the tensor cores, one for all at the end.
  static constexpr int kTurn = 1, kMeeting = 3;
  static constexpr bool kTakeTurns = Config::kConsumers == 2;
  // True if references may lag (fwd_softmax.cuh): with a bias, at steps without StepBias::kRaise.
  static constexpr bool kLazy = Config::kPlain;

  using Headers = Ring<Shared::kHeaders>;

  // ---- Stages of a tile

  // The first product of a tile with nothing else in flight, and its softmax.
  __device__ __forceinline__ void FirstStep(Headers tile) {
    float logits[kLogits];
    WaitForFirstOperands(tile);
    device::sm90::FenceProducts();
    MultiplySharedQueries(logits);
    MultiplyLines(logits);
    device::sm90::CommitProducts();
    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(logits);
    StartTile(tile, logits);
  }

  // One step in the middle: Q K^T of this step and P V of the step before are in flight together, and this step's
  // softmax runs during the latter.
  __device__ __forceinline__ void Step() {
    float logits[kLogits];
    device::sm90::Wait(shared_.full_key[Keys().Stage()], Keys().Full());
    TakeTurn();
    device::sm90::Pin(out_);
    device::sm90::Pin(probs_);
    device::sm90::FenceProducts();
    if constexpr (Config::kQueryInRegisters) {
      MultiplyRegisterQueries(logits);
    } else {
      MultiplySharedQueries(logits);
    }
    MultiplyLines(logits);
    device::sm90::CommitProducts();
    device::sm90::Wait(shared_.full_value[Values().Stage()], Values().Full());
    device::sm90::FenceProducts();
    MultiplyValues();
    device::sm90::CommitProducts();
    PassTurn();
    flags_ = ReadShared(shared_.Step(step_).flags);
    if constexpr (Config::kExtras) read_ = ReadShared(StepBiases().read[group_]);
    const bool raise = softmax_.Fresh();
    KeptPairs kept{};  // else those of the step before would be kept for no one
    if constexpr (Config::kExtras) {
      if (DropsHere()) FindKept(kept);
    }

    device::sm90::WaitForProducts<1>();
    device::sm90::Pin(logits);
    float rescale[2];
    bool lags = false;
    const bool raised = Softmax(logits, raise, rescale, lags);
    device::sm90::Pin(logits);
    device::sm90::Pin(softmax_.sum);
    // Never blocks: a branch that keeps ptxas from moving the next wait up above the exponentials, which would undo the
    // overlap. (Not a second wait on a ring's barrier: another warp may have let the producer refill that stage.)
    device::sm90::Wait(shared_.open, 1);

    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(out_);
    Release(shared_.empty_value[Values().Stage()]);
    if (raised) Rescale(rescale);
    if (lags) {
      CatchUp(logits, kept);
    } else {
      KeepProbabilities(logits, kept);
    }
    ++step_;
  }

  // The last P V of a tile, and its output. If the next header is a live tile's, its first product runs during this
  // tile's output; otherwise false is returned, and that tile is still to be begun. One header beyond this tile's is
  // all that is waited for before this tile's is released: the ring is bounded, and waiting for more (an earlier
  // version skipped all tiles without work here) never ends once the ring's next place is this tile's.
  __device__ __forceinline__ bool FinishTile(Headers& next) {
    const Headers tile = TileOfStep();
    const bool poisoned = flags_ & StepInfo::kRowPoisoned;
    next = tile;
    next.Advance();
    if (!Config::kOverlapTiles || !IsLive(next)) {
      if constexpr (!Config::kQueryInRegisters) Release(shared_.empty_query);  // its products are done
      LastProduct();
      StoreTile(tile, poisoned);
      return false;
    }
    static_assert(!(Config::kOverlapTiles && Config::kExtras), "the product below has no lines");
    WaitForFirstOperands(next);
    float logits[kLogits];
    device::sm90::Wait(shared_.full_value[Values().Stage()], Values().Full());
    TakeTurn();
    device::sm90::Pin(out_);
    device::sm90::Pin(probs_);
    device::sm90::FenceProducts();
    MultiplyValues();
    device::sm90::CommitProducts();
    MultiplySharedQueries(logits);
    device::sm90::CommitProducts();
    PassTurn();
    device::sm90::WaitForProducts<1>();
    device::sm90::Pin(out_);
    Release(shared_.empty_value[Values().Stage()]);
    StoreTile(tile, poisoned);
    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(logits);
    StartTile(next, logits);
    return true;
  }

  // The last P V of a tile by itself.
  __device__ __forceinline__ void LastProduct() {
    device::sm90::Wait(shared_.full_value[Values().Stage()], Values().Full());
    TakeTurn();
    device::sm90::Pin(out_);
    device::sm90::Pin(probs_);
    device::sm90::FenceProducts();
    MultiplyValues();
    device::sm90::CommitProducts();
    PassTurn();
    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(out_);
    Release(shared_.empty_value[Values().Stage()]);
  }

  // ---- Parts of them

  // The ring positions of this step's keys, and of the values of the step before.
  __device__ __forceinline__ Ring<Config::kKeyStages> Keys() const { return {step_}; }
  __device__ __forceinline__ Ring<Config::kValueStages> Values() const { return {step_ - 1}; }

  // The kind of the tile whose header is at `place`, once it is there. Headers stay where they are until StoreTile has
  // used them: in registers they would be spilled.
  __device__ __forceinline__ int WaitForHeader(Headers place) {
    device::sm90::Wait(shared_.full_header[place.Stage()], place.Full());
    return Uniform(shared_.headers[place.Stage()].kind);
  }
  // Whether the tile of the header after this one's has steps; with a feeder its keys say that it is there.
  __device__ __forceinline__ bool IsLive(Headers next) {
    if constexpr (Config::kFeeder) return !(flags_ & StepInfo::kFinal);
    return WaitForHeader(next) == TileHeader::kLive;
  }
  // Goes on from `tile` to the first with something to attend to, writing the results of those without; false at the
  // end. To be called with no other header held: see FinishTile.
  __device__ __forceinline__ bool SkipEmptyTiles(Headers& tile) {
    while (true) {
      const int kind = WaitForHeader(tile);
      if (kind == TileHeader::kLive) return true;
      if (kind == TileHeader::kEnd) return false;
      StoreNothing(shared_.headers[tile.Stage()]);
      ReleaseHeader(tile);
      tile.Advance();
    }
  }
  // The header of the tile that the current step belongs to.
  __device__ __forceinline__ Headers TileOfStep() const {
    return Headers{static_cast<uint32_t>(flags_) >> StepInfo::kHeader};
  }
  __device__ __forceinline__ void ReleaseHeader(Headers tile) { Release(shared_.empty_header[tile.Stage()]); }

  __device__ __forceinline__ void WaitForFirstOperands(Headers tile) {
    device::sm90::Wait(shared_.full_key[Keys().Stage()], Keys().Full());
    device::sm90::Wait(shared_.full_query, shared_.headers[tile.Stage()].query_parity);
  }

  // After the first product of a tile.
  __device__ __forceinline__ void StartTile(Headers tile, float (&logits)[kLogits]) {
    if constexpr (Config::kQueryInRegisters) LoadQueries();
    flags_ = ReadShared(shared_.Step(step_).flags);
    if constexpr (Config::kExtras) read_ = ReadShared(StepBiases().read[group_]);
    softmax_.Clear();
    float rescale[2];
    bool lags;
    Softmax(logits, true, rescale, lags);
#pragma unroll
    for (int i = 0; i < kOut; ++i) out_[i] = 0.f;
    KeptPairs kept{};  // else those of the step before would be kept for no one
    if constexpr (Config::kExtras) {
      if (DropsHere()) {
        device::sm90::Pin(logits);
        StartDropout(shared_.headers[tile.Stage()]);
        FindKept(kept);
      }
    }
    KeepProbabilities(logits, kept);
    ++step_;
  }

  // This warpgroup's queries as operands of wgmma and mma.sync.
  __device__ __forceinline__ void LoadQueries() {
    const int thread = Thread(), row = thread / 32 * 16 + thread % 16, vector = thread % 32 / 16;
    const uint32_t base = device::SharedAddress(shared_.query) + group_ * kWarpgroupRows * 128;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t words[4];
      device::LoadMatrices(words, base + SwizzledOffset(row, 2 * k + vector));
#pragma unroll
      for (int i = 0; i < 4; ++i) query_[4 * k + i] = words[i];
    }
    device::sm90::Pin(query_);
    // The buffer goes back to the copy engine, whose writes an arrival does not keep behind this warp's loads: behind
    // the rows that StoreTile is still writing out, a load was seen to run after the next tile's queries had come (one
    // persistent tile in 200, with two CTAs of 64 queries a multiprocessor). The fence costs up to 1 %.
    device::sm90::FenceAsyncProxy();
    Release(shared_.empty_query);
  }

  // The byte offset of 16 bytes in a [chunk][kTileQ][64] tile.
  __device__ __forceinline__ static uint32_t SwizzledOffset(int row, int vector) {
    return vector / 8 * kTileQ * 128 + row * 128 + (vector % 8 ^ row % 8) * 16;
  }

  using Logits = device::sm90::Multiply<Element, kTileKv>;
  using Outputs = device::sm90::Multiply<Element, kDim>;

  // Offset of k = 16 step in a K-major tile of `rows`, / 16.
  __device__ __forceinline__ static constexpr uint32_t KeyStep(int step, int rows) {
    return (step / 4 * rows * 128 + step % 4 * 32) / 16;
  }
  __device__ __forceinline__ void MultiplySharedQueries(float (&logits)[kLogits]) {
    using device::sm90::FullDescriptor;
    const uint32_t query = device::sm90::TileDescriptor(shared_.query) + group_ * kWarpgroupRows * 128 / 16;
    const uint32_t key = device::sm90::TileDescriptor(shared_.key[Keys().Stage()]);
    Logits::Overwrite(logits, FullDescriptor(query), FullDescriptor(key));
#pragma unroll
    for (int k = 1; k < kDim / 16; ++k) {
      Logits::Shared(logits, FullDescriptor(query + KeyStep(k, kTileQ)), FullDescriptor(key + KeyStep(k, kTileKv)));
    }
  }
  __device__ __forceinline__ void MultiplyRegisterQueries(float (&logits)[kLogits]) {
    using device::sm90::FullDescriptor;
    const uint32_t key = device::sm90::TileDescriptor(shared_.key[Keys().Stage()]);
    Logits::OverwriteRegisters(logits, query_, FullDescriptor(key));
#pragma unroll
    for (int k = 1; k < kDim / 16; ++k) {
      Logits::Registers(logits, query_ + 4 * k, FullDescriptor(key + KeyStep(k, kTileKv)));
    }
  }
  // Biases on lines are 16 more columns of queries and keys: see BiasRamp.
  __device__ __forceinline__ void MultiplyLines(float (&logits)[kLogits]) {
    if constexpr (Config::kExtras) {
      const auto& ramp = shared_.ramp;
      device::sm90::Multiply<device::BFloat16, kTileKv>::Shared(logits, ramp.Rows(Keys().Stage(), group_), ramp.Keys());
    }
  }
  __device__ __forceinline__ void MultiplyValues() {
    const uint32_t value = device::sm90::TileDescriptor(shared_.value[Values().Stage()], kTileKv * 128);
#pragma unroll
    for (int k = 0; k < kTileKv / 16; ++k) {
      Outputs::RegistersTransposed(out_, probs_ + 4 * k, device::sm90::FullDescriptor(value + k * 128));
    }
  }

  // Products to probabilities relative to the reference, in place, and their sums; releases the keys. Returns whether
  // the references moved, and so the outputs so far must be rescaled. `lags`: the references lag too far; the sums are
  // left to CatchUp. `raise`: they are to move, for example because one is -inf.
  __device__ __forceinline__ bool Softmax(float (&x)[kLogits], bool raise, float (&rescale)[2], bool& lags) {
    if constexpr (!Config::kPlain) {
#pragma unroll
      for (int i = 0; i < kLogits; ++i) x[i] = plan_.logits(x[i]);
    }
    const bool raised = !kLazy || raise || flags_ & StepInfo::kMasked || (Config::kExtras && read_ != 0);
    if constexpr (Config::kExtras) {
      if (read_ & (StepBias::kRaise - 1)) AddBias(x);
    }
    if (flags_ & StepInfo::kMasked) ApplyMask(x);
    Release(shared_.empty_key[Keys().Stage()]);
    if (raised) {
      softmax_.RaiseToLogits(x, plan_.logits.multiplier, rescale);
    }
    float total[2];
    softmax_.Exponentials(x, plan_.logits.multiplier, total);
    lags = !raised && RowSoftmax::Lags(total);
    if (!lags) softmax_.Add(total);
    return raised;
  }

  // Brings references that lag too far up to date, after the products: the probabilities' registers are free.
  __device__ __forceinline__ void CatchUp(float (&x)[kLogits], const KeptPairs& kept) {
    float rescale[2], total[2];
    if (softmax_.Raise(x, total, rescale)) {
      KeepProbabilities(x, kept);
    } else {
      float again[kLogits];
      RecomputeProducts(again);
      if constexpr (Config::kExtras) AddLines(again);
      softmax_.RaiseToLogits(again, plan_.logits.multiplier, rescale);
      softmax_.Exponentials(again, plan_.logits.multiplier, total);
      KeepProbabilities(again, kept);
    }
    softmax_.Add(total);
    Rescale(rescale);
  }

  __device__ __forceinline__ void Rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOut; ++i) out_[i] *= factor[i % 4 / 2];
  }

  __device__ __forceinline__ const StepBias& StepBiases() const {
    return shared_.biases[step_ % (2 * Shared::kKeyStages)];
  }
  // The header of the tile of the step that is about to start.
  __device__ __forceinline__ const TileHeader& NextHeader(const StepInfo& info) const {
    const Headers place{static_cast<uint32_t>(ReadShared(info.flags)) >> StepInfo::kHeader};
    return shared_.headers[place.Stage()];
  }

  // Adds the biases that lie on lines to products that were computed once more.
  __device__ __forceinline__ void AddLines(float (&x)[kLogits]) {
    if (params_.bias.distances == nullptr) return;
#pragma unroll
    for (int piece = 0; piece < kTileKv / 64; ++piece) {
      const auto pairs =
          LinePairs::Of<false>(StepBiases().lines[group_][piece], RowOf(Thread()), Thread() % 4 * 2, plan_.bias_factor);
      if (piece == 0) {
        pairs.template Add<0>(x);
      } else {
        pairs.template Add<kLogits - 32>(x);
      }
      device::sm90::Pin(x);
    }
  }

  // Adds the terms of the bias that are given, 64 keys at a time; those by distance where they are not on lines.
  __device__ __forceinline__ void AddBias(float (&x)[kLogits]) {
    const StepInfo& info = shared_.Step(step_);
    const TileHeader& tile = NextHeader(info);
    const BiasAxis queries{tile.q_start + group_ * kWarpgroupRows, RowOf(Thread()),
                           static_cast<int>(params_.shape.q_len)};
#pragma unroll 1
    for (int term = 0; term < kBiasTerms; ++term) {
      if (!HasTerm(params_.bias, term)) continue;
#pragma unroll
      for (int piece = 0; piece < kTileKv / 64; ++piece) {
        if (term == kDistanceTerm && (read_ >> piece & 1) == 0) continue;
        const int number = ReadShared(StepBiases().tiles[piece]);
        const int start = ReadShared(info.start[piece]);
        const BiasTermView view =
            TermView(params_.bias, params_.shape, term, tile.batch, tile.head, number, tile.q_start, start);
        if (view.data == nullptr) continue;
        const BiasAxis keys{start, Thread() % 4 * 2, static_cast<int>(params_.shape.kv_len)};
        if (piece == 0) {
          AddBiasTile<Element, false, 0>(x, view, queries, keys, plan_.bias_factor);
        } else {
          AddBiasTile<Element, false, kLogits - 32>(x, view, queries, keys, plan_.bias_factor);
        }
      }
    }
  }

  // Dropout does not depend on logits: which pairs of a step stay is found while the step's products run. What is left
  // for after the softmax, when no product of this warpgroup runs, is to apply it. (In a tile's first step all of it.)
  // Compared anew each time: as a predicate that is kept it would spill.
  __device__ __forceinline__ bool DropsHere() const {
    float scale[] = {plan_.kept_scale};
    device::sm90::Pin(scale);
    return scale[0] != 1.f;
  }
  __device__ __forceinline__ void StartDropout(const TileHeader& tile) {
    const uint32_t head_key = __ldg(params_.dropout.keys + tile.batch * params_.shape.heads + tile.head);
    query_word_ = DropoutQueryWord(head_key, tile.q_start + group_ * kWarpgroupRows + RowOf(Thread()));
  }

  // Lane l of a warp has the word of a step's key of place l (DropoutPlace), for all lanes.
  __device__ __forceinline__ void FindKept(KeptPairs& kept) {
    const uint32_t lane = static_cast<uint32_t>(device::ThreadHere()) % 32;
    const auto bytes = KeptBytesHere(params_.dropout.threshold);
    kept.Clear();
#pragma unroll
    for (int piece = 0; piece < kTileKv / 64; ++piece) {
      const auto start = static_cast<uint32_t>(ReadShared(shared_.Step(step_).start[piece]));  // a multiple of 64
      const uint32_t key_word = DropoutKeyWordOf(start / 2 + lane);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t word = __shfl_sync(0xFFFFFFFFu, key_word, 8 * m + lane % 4 * 2 + e);
          kept.Add(4 * piece + m, e, DropoutProducts(query_word_, word), bytes);
        }
    }
    kept.Flip(bytes.flip);
    device::sm90::Pin(kept.parity);
  }

  // 0 for the probabilities that are dropped; StoreTile scales the others.
  __device__ __forceinline__ void DropProbabilities(const KeptPairs& kept) {
#pragma unroll
    for (int i = 0; i < kProbs; ++i) probs_[i] &= kept.Pair(i / 4, i % 4);
  }

  // -inf for pairs that do not attend.
  __device__ __forceinline__ void ApplyMask(float (&x)[kLogits]) {
    const StepInfo& info = shared_.Step(step_);
    const int limit = ReadShared(info.limit);
    const int start[kMaxPieces] = {ReadShared(info.start[0]), ReadShared(info.start[1])};
    const int block_kv = static_cast<int>(params_.shape.block_kv);
    const int thread = Thread();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group_ * kWarpgroupRows + RowOf(thread) + 8 * half;
#pragma unroll
      for (int piece = 0; piece < kTileKv / 64; ++piece) {
        uint64_t bits = device::FirstBits(limit - start[piece]);
        if (flags_ & StepInfo::kBits << piece) {
          const int offset = BitRowOffset<Config>(block_kv, start[piece], piece);
          bits &= *reinterpret_cast<const uint64_t*>(shared_.bits[Keys().Stage()] + offset + row * (block_kv / 8));
        }
        bits >>= 2 * (thread % 4);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (!(bits >> (8 * n + e) & 1)) x[32 * piece + 4 * n + 2 * half + e] = -device::Infinity();
      }
    }
  }

  // This warp's products of an unmasked step once more, by itself and from global memory, since the keys' buffer has
  // been released: with mma.sync, whose operands lie in registers as those of wgmma do. Rare, and so written for
  // registers and not for speed: all loops, and addresses computed where they are used. Anything else would spill.
  __device__ __forceinline__ void RecomputeProducts(float (&x)[kLogits]) {
#pragma unroll
    for (int i = 0; i < kLogits; ++i) x[i] = 0.f;
#pragma unroll 1
    for (int n = 0; n < kTileKv / 8; ++n) {
      float sums[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (int k = 0; k < kDim; k += 16) {
        uint32_t a[4], b[2];
        LoadOperands(n, k, a, b);
        device::MultiplyAccumulate<Element>(sums, a, b[0], b[1]);
      }
#pragma unroll
      for (int i = 0; i < kLogits; ++i)
        if (i / 4 == n) x[i] = sums[i % 4];
    }
  }

  // This thread's part of this warp's queries, and of keys 8 n .. 8 n + 7 of the step: dimensions k .. k + 15.
  __device__ __forceinline__ void LoadOperands(int n, int k, uint32_t (&a)[4], uint32_t (&b)[2]) {
    const Shape& shape = params_.shape;
    const TileHeader& tile = shared_.headers[TileOfStep().Stage()];
    const int thread = Thread(), heads = static_cast<int>(shape.heads), kv_heads = static_cast<int>(shape.kv_heads);
    const int column = k + thread % 4 * 2,
              key_position = ReadShared(shared_.Step(step_).start[n / 8]) + n % 8 * 8 + thread % 32 / 4;
    const auto pair = [&](const void* data, int64_t row, int position_heads, int head, int at,
                          bool inside) -> uint32_t {
      const auto* element = static_cast<const Element*>(data) + (row * position_heads + head) * shape.head_dim + at;
      return inside ? __ldg(reinterpret_cast<const uint32_t*>(element)) : 0;
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = tile.q_start + group_ * kWarpgroupRows + RowOf(thread) + i % 2 * 8, at = column + i / 2 * 8;
      a[i] = pair(params_.query, tile.batch * shape.q_len + position, heads, tile.head, at,
                  position < shape.q_len && at < shape.head_dim);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = column + i * 8;
      b[i] =
          pair(params_.key, tile.batch * shape.kv_len + key_position, kv_heads, tile.kv_head, at, at < shape.head_dim);
    }
  }

  // Probabilities as the next product's operand, times their gates. Written while no product is in flight.
  __device__ __forceinline__ void KeepProbabilities(float (&x)[kLogits], const KeptPairs& kept) {
    if constexpr (Config::kGated) {
#pragma unroll
      for (int piece = 0; piece < kTileKv / 64; ++piece) {
        const float gate = ReadShared(shared_.gates[step_ % (2 * Shared::kKeyStages)][piece]);
#pragma unroll
        for (int i = 0; i < 32; ++i) x[32 * piece + i] *= gate;
      }
    }
#pragma unroll
    for (int i = 0; i < kProbs; ++i) probs_[i] = device::PackPair<Element>(x[2 * i], x[2 * i + 1]);
    if constexpr (Config::kExtras) {
      if (DropsHere()) DropProbabilities(kept);
    }
  }

  // Epilogue: the sink joins the denominator, then out = accumulated / sum, lse = max + log(sum).
  __device__ __forceinline__ void StoreTile(Headers place, bool poisoned) {
    const TileHeader& tile = shared_.headers[place.Stage()];
    const int thread = Thread();
    const float sink_logit = tile.sink;
    const float sink = device::kLog2E * sink_logit;
    device::RowFinish finish[2];
    float* lse = LogSumExp(tile);
    bool inexact = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group_ * kWarpgroupRows + RowOf(thread) + 8 * half;
      const float reference = softmax_.reference[half], max = fmaxf(reference, sink);
      const float shift = RowSoftmax::Shift(max), rescale = device::Exp2(reference - shift);
      const float key_sum = device::QuadSum(softmax_.sum[half]);
      const float sum = fmaf(key_sum, rescale, sink == shift ? 1.f : device::Exp2(sink - shift));  // also of +inf
      const bool valid = row < tile.q_rows;
      finish[half] = {valid && !poisoned && sum != 0.f, __fdividef(rescale, sum),
                      valid && poisoned ? device::QuietNan() : 0.f};
      if constexpr (Config::kExtras) finish[half].scale *= plan_.kept_scale;
      if (thread % 4 == 0 && tile.q_start + row < params_.shape.q_len) {
        const auto log_sum = LogSum::Of(max, sum);
        lse[row] = StoredLse(!valid           ? -device::Infinity()
                             : poisoned       ? device::QuietNan()
                             : key_sum == 0.f ? sink_logit  // as it came, not through log2 and back
                                              : log_sum.value);
        LogSumExpRest(tile)[row] = valid && !poisoned && key_sum != 0.f ? log_sum.rest : 0.f;
      }
      inexact |= finish[half].keep && !RowIsFinite(out_, half) && sum - sum == 0.f;
    }
    if (__any_sync(0xFFFFFFFFu, inexact)) NoteInexact(place);

    const Shape& shape = params_.shape;
    const int first = group_ * kWarpgroupRows;
    StoreRows(out_, finish, static_cast<int>(shape.q_len) - tile.q_start - first, OutRow(tile, first),
              shape.heads * shape.value_dim, static_cast<int>(shape.value_dim), thread);
    if constexpr (!Config::kFeeder) ReleaseHeader(place);
  }

  // Enters the tile into the CTA's list of those to be put right in the end (fwd_exact_rows.cuh), once: the number of
  // the last is in shared memory, and that of the one before each, in global memory.
  __device__ __forceinline__ void NoteInexact(Headers place) {
    if (!device::sm90::ElectLane()) return;
    const int tile = shared_.headers[place.Stage()].tile;
    if (atomicExch(&shared_.inexact_noted[place.Stage()], tile) == tile) return;
    plan_.inexact_tiles[tile] = atomicExch(&shared_.last_inexact, tile);
  }

  // In the end, when no product needs registers.
  __device__ __forceinline__ void FixInexactTiles() {
    device::sm90::SyncNamed(kMeeting, Config::kConsumerThreads);
    for (int inexact = shared_.last_inexact; inexact >= 0; inexact = plan_.inexact_tiles[inexact]) {
      FixRows<Config>(params_, plan_, inexact, group_ * kWarpgroupRows + Thread() / 32 * 16);
    }
  }

  // Rows with nothing to attend to: 0 and the sink; NaN where the list cannot be read or the sink is NaN.
  __device__ __forceinline__ void StoreNothing(const TileHeader& tile) {
    const Shape& shape = params_.shape;
    const bool poisoned = tile.kind == TileHeader::kPoisoned;
    const int first = group_ * kWarpgroupRows, value_dim = static_cast<int>(shape.value_dim);
    const int rows = min(kWarpgroupRows, static_cast<int>(shape.q_len) - tile.q_start - first);
    const float sink = tile.sink;
    for (int r = Thread(); r < rows; r += kWarpgroup) {
      const bool valid = first + r < tile.q_rows;
      LogSumExp(tile)[first + r] = StoredLse(!valid ? -device::Infinity() : poisoned ? device::QuietNan() : sink);
      LogSumExpRest(tile)[first + r] = 0.f;
    }
    const uint32_t nan = device::PackPair<Element>(device::QuietNan(), device::QuietNan());
    const int vectors = value_dim / 8;
    for (int i = Thread(); i < rows * vectors; i += kWarpgroup) {
      const int row = first + i / vectors;
      const uint32_t fill = (poisoned || sink != sink) && row < tile.q_rows ? nan : 0;
      *reinterpret_cast<uint4*>(OutRow(tile, row) + i % vectors * 8) = make_uint4(fill, fill, fill, fill);
    }
  }

  __device__ __forceinline__ Element* OutRow(const TileHeader& tile, int row) const {
    const Shape& shape = params_.shape;
    return static_cast<Element*>(params_.out) +
           ((tile.batch * shape.q_len + tile.q_start + row) * shape.heads + tile.head) * shape.value_dim;
  }
  __device__ __forceinline__ int64_t Statistics(const TileHeader& tile) const {
    return (tile.batch * params_.shape.heads + tile.head) * params_.shape.q_len + tile.q_start;
  }
  __device__ __forceinline__ float* LogSumExp(const TileHeader& tile) const {
    return static_cast<float*>(params_.lse) + Statistics(tile);
  }
  __device__ __forceinline__ float* LogSumExpRest(const TileHeader& tile) const {
    return static_cast<float*>(params_.lse_rest) + Statistics(tile);
  }

  // Taking turns: while one warpgroup is at its softmax, the other has the tensor cores.
  __device__ __forceinline__ void TakeTurn() {
    if (kTakeTurns) device::sm90::SyncNamed(kTurn + group_, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void PassTurn() {
    if (kTakeTurns) device::sm90::ArriveNamed(kTurn + 1 - group_, 2 * kWarpgroup);
  }

  // For this warp, once all its lanes have read the buffer.
  __device__ __forceinline__ void Release(Barrier& barrier) { device::sm90::ReleaseForWarp(barrier); }

  // A value that all lanes have, as one the compiler knows to be the same: products are not issued under divergence.
  __device__ __forceinline__ static int Uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

  // The number of the thread in its warpgroup.
  __device__ __forceinline__ static int Thread() { return device::ThreadHere() % kWarpgroup; }

  Shared& shared_;
  const ForwardParams& params_;
  const ForwardPlan& plan_;
  const int group_;

  float out_[kOut];
  uint32_t probs_[kProbs];
  uint32_t query_[Config::kQueryInRegisters ? kDim / 4 : 4];
  RowSoftmax softmax_;
  uint32_t query_word_;  // of dropout
  int flags_ = 0;
  int read_ = 0;       // StepBias::read of the step
  uint32_t step_ = 0;  // of the CTA: the next to start
};

}  // namespace jax_bsk::attention::cuda::sm90
