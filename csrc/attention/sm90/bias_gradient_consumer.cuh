// A consumer warpgroup of the Hopper kernel for gradients of biases: 64 queries of the CTA's tiles of pairs. With
// x = q.k and b the sum of the bias's terms, P = exp(scale x + b - lse), dP = dO V^T and dS = P (m g dP - delta), where
// g is the block's gate, and m what dropout makes of the pair.
#pragma once

#include "attention/dropout.cuh"
#include "attention/sm90/bias.cuh"
#include "attention/sm90/bias_gradient_shared.cuh"
#include "attention/sm90/store_rows.cuh"
#include "attention/softmax.cuh"
#include "device/numbers.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/registers.cuh"
#include "device/ptx/thread.cuh"
#include "device/ptx/wgmma.cuh"

namespace jax_bsk::attention::cuda::sm90 {

// The pipeline of a CTA. `x ==>` is a buffer that is filled and announced by barrier full_x; `<-- x` is its release by
// barrier empty_x. Each barrier is one of BiasGradientShared.
//
//   producer warp                                     consumer warpgroups (0, 1)
//   PairSearch           step n ====================> kind and position, also to the other producers
//                             <-- step n ------------ the tile is added, the slot stored
//   PairLoader           value, key, dout, query ===> of both warpgroups, where they are not those of the tile before
//                             <-- all four ---------- S and dP are done, and the next tile has others
//   PairLoader and       side n ====================> bit tiles and statistics
//   ReadPairStatistics        <-- side n ------------ dS is added
//
// A tile in a warpgroup; meanwhile the other one has the tensor cores or computes:
//
//   issue         S = b + Q K^T, dP = dO V^T ---.
//   compute  b ---'                             '-> P, dS, total += dS
template <typename Config>
class PairConsumer {
 public:
  using Shared = BiasGradientShared<Config>;
  using Element = typename Config::Element;
  using Message = PairMessage;
  static constexpr int kDim = Config::kDim;
  static constexpr int kPairs = kPairTile / 2;  // registers: 64 queries x 128 keys
  // Of diagonals a thread's two rows share sums: eight rows below is eight keys further. [8 keys][2].
  static constexpr int kSums = Config::kDiagonals ? 2 * (Config::kSlotTiles * 16 + 1) : kPairs;

  __device__ PairConsumer(Shared& shared, const BiasGradientParams& params, const PairPlan& plan, int group)
      : shared_(shared), params_(params), plan_(plan), group_(group) {}

  __device__ __forceinline__ void Run() {
    Clear();
    Ring<Shared::kSteps> steps;
    while (true) {
      device::sm90::Wait(shared_.full_step[steps.Stage()], steps.Full());
      const Message& message = shared_.steps[steps.Stage()];
      const int flags = ReadShared(message.flags);
      if (flags & Message::kEnd) return;
      if (flags & Message::kPairs) AddTile(message, flags);
      if (flags & Message::kStore) {
        if constexpr (Config::kDiagonals) {
          StoreDiagonals(message);
        } else {
          StoreTile(message);
        }
        Clear();
      }
      Release(shared_.empty_step[steps.Stage()]);
      steps.Advance();
    }
  }

 private:
  static constexpr int kOwnBarrier = 1, kBothBarrier = 3;  // named barriers: kOwnBarrier + group_, and of both

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) total_[i] = 0.f;
  }

  // ---- A tile of pairs

  __device__ __forceinline__ void AddTile(const Message& message, int flags) {
    float scores[kPairs], dscores[kPairs];
    if (flags & Message::kNewLeft) ++left_;
    if (flags & Message::kNewRight) ++right_;
    const Ring<Config::kLeftStages> left{left_ - 1};
    const Ring<Config::kRightStages> right{right_ - 1};
    const int l = left.Stage(), r = right.Stage();

    StartLogits(message, scores);
    if (flags & Message::kNewLeft) device::sm90::Wait(shared_.full_query[l], left.Full());
    if (flags & Message::kNewRight) device::sm90::Wait(shared_.full_key[r], right.Full());
    device::sm90::FenceProducts();
    Multiply<true>(scores, shared_.query[l], shared_.key[r]);
    device::sm90::CommitProducts();
    if (flags & Message::kNewLeft) device::sm90::Wait(shared_.full_dout[l], left.Full());
    if (flags & Message::kNewRight) device::sm90::Wait(shared_.full_value[r], right.Full());
    device::sm90::FenceProducts();
    Multiply<false>(dscores, shared_.dout[l], shared_.value[r]);
    device::sm90::CommitProducts();
    const Ring<Shared::kSides> sides{side_++};
    device::sm90::Wait(shared_.full_side[sides.Stage()], sides.Full());

    device::sm90::WaitForProducts<0>();
    device::sm90::Pin(scores);
    device::sm90::Pin(dscores);
    if (flags & Message::kLastLeft) Release(shared_.empty_query[l]), Release(shared_.empty_dout[l]);
    if (flags & Message::kLastRight) Release(shared_.empty_key[r]), Release(shared_.empty_value[r]);
    KeptPairs kept;
    if (Drops(params_.dropout)) FindKept(message, kept);

    MakeScores(message, flags, shared_.sides[sides.Stage()], kept, scores, dscores);
    Release(shared_.empty_side[sides.Stage()]);
    if constexpr (Config::kDiagonals) {
      if (flags & Message::kSecond) {
        AddDiagonals<1>(scores, dscores);
      } else {
        AddDiagonals<0>(scores, dscores);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) total_[i] = fmaf(scores[i], dscores[i], total_[i]);
    }
  }

  template <int kTile>
  __device__ __forceinline__ void AddDiagonals(const float (&probs)[kPairs], const float (&dprobs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float& sum = total_[2 * (16 * kTile + i / 4 + 1 - i % 4 / 2) + i % 2];
      sum = fmaf(probs[i], dprobs[i], sum);
    }
  }

  // Products to P, and dP to m g dP - delta; both are 0 for pairs that do not attend.
  __device__ __forceinline__ void MakeScores(const Message& message, int flags, const PairSide& side,
                                             const KeptPairs& kept, float (&x)[kPairs], float (&dx)[kPairs]) {
    const int row = kWarpgroupRows * group_ + RowOf(Thread());
    float lse[2], delta[2], rest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lse[half] = side.statistics[0][row + 8 * half];
      delta[half] = side.statistics[1][row + 8 * half];
      rest[half] = side.statistics[2][row + 8 * half];
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) x[i] = fmaf(x[i], plan_.multiplier, -lse[i % 4 / 2]);
    if (__any_sync(0xFFFFFFFFu, rest[0] != 0.f || rest[1] != 0.f)) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) x[i] = Exponent(x[i], rest[i % 4 / 2]);
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) x[i] = device::Exp2(x[i]);
    if (Drops(params_.dropout)) DropScores(dx, kept);
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const float weight = message.gates[group_][piece] * plan_.kept_scale;
#pragma unroll
      for (int i = 0; i < 32; ++i) dx[32 * piece + i] = fmaf(dx[32 * piece + i], weight, -delta[i % 4 / 2]);
    }
    if (flags & Message::kMasked) ApplyMask(message, side, x, dx);
  }

  __device__ __forceinline__ void ApplyMask(const Message& message, const PairSide& side, float (&x)[kPairs],
                                            float (&dx)[kPairs]) {
    const int block_kv = static_cast<int>(params_.shape.block_kv), thread = Thread();
    const int queries = message.query_limit - message.q_start - kWarpgroupRows * group_;
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const int tile = message.tiles[group_][piece];
      const uint64_t all = device::FirstBits(message.key_limit - message.key_start - 64 * piece);
      const uint8_t* words = side.bits[group_] + piece * (block_kv == 128 ? 8 : 512);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = RowOf(thread) + 8 * half;
        uint64_t bits = tile == Message::kAbsent || row >= queries ? 0 : all;
        if (tile >= 0) bits &= *reinterpret_cast<const uint64_t*>(words + row * (block_kv / 8));
        bits >>= 2 * (thread % 4);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (!(bits >> (8 * n + e) & 1)) {
              const int i = 32 * piece + 4 * n + 2 * half + e;
              x[i] = dx[i] = 0.f;
            }
      }
    }
  }

  // ---- Biases and dropout

  // What the products are added to: the biases, in their units, as in the forward.
  __device__ __forceinline__ void StartLogits(const Message& message, float (&x)[kPairs]) {
    const Shape& shape = params_.shape;
    const int batch = message.batch, head = message.head;
    const int query = message.q_start + kWarpgroupRows * group_, key = message.key_start;
    int first = 0;
    SetNoBias<0>(x), SetNoBias<32>(x);
    device::sm90::Pin(x);
    if (params_.bias.dense != nullptr) {
      const BiasTermView view = DenseBiasView(params_.bias, batch, head);
      if (query + 64 <= shape.q_len && key + kPairTile <= shape.kv_len && view.step_kv == 1 &&
          ((view.first | view.step_q) & 1) == 0) {
        AddDense(view, query, key, x);
        first = 1;
      }
    }
#pragma unroll 1
    for (int term = first; term < kBiasTerms; ++term) {
      if (!HasTerm(params_.bias, term)) continue;
      const BiasAxis queries{query, RowOf(Thread()), static_cast<int>(shape.q_len)};
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int start = key + 64 * piece;
        const BiasTermView view =
            TermView(params_.bias, shape, term, batch, head, message.bias_tiles[group_][piece], query, start);
        if (view.data == nullptr) continue;
        const BiasAxis keys{start, Thread() % 4 * 2, static_cast<int>(shape.kv_len)};
        if (piece == 0) {
          AddBiasTile<Element, false, 0>(x, view, queries, keys, plan_.bias_factor);
        } else {
          AddBiasTile<Element, false, 32>(x, view, queries, keys, plan_.bias_factor);
        }
      }
    }
    device::sm90::Pin(x);
  }

  // A dense bias of pairs that are all inside the array, its columns in pairs: sixteen loads at a time.
  __device__ __forceinline__ void AddDense(const BiasTermView& view, int query, int key, float (&x)[kPairs]) {
    const int64_t at = BiasIndex(view, query + RowOf(Thread()), key + Thread() % 4 * 2);
    const auto add = [&](const auto* numbers) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* row = numbers + 8 * half * view.step_q;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          const float2 pair = LoadBiasPair(row + 8 * n);
          x[4 * n + 2 * half] = BiasedLogit(x[4 * n + 2 * half], pair.x, plan_.bias_factor);
          x[4 * n + 2 * half + 1] = BiasedLogit(x[4 * n + 2 * half + 1], pair.y, plan_.bias_factor);
        }
        device::sm90::Pin(x);
      }
    };
    if (view.wide) {
      add(static_cast<const float*>(view.data) + at);
    } else {
      add(static_cast<const Element*>(view.data) + at);
    }
  }

  // Which pairs stay, while the products run. Lane l of a warp has the word of a key of place l (DropoutPlace) of each
  // 64, for all lanes.
  __device__ __forceinline__ void FindKept(const Message& message, KeptPairs& kept) const {
    const int lane = device::ThreadHere() % 32;
    const auto bytes = KeptBytesHere(params_.dropout.threshold);
    const uint32_t head_key = __ldg(params_.dropout.keys + message.batch * params_.shape.heads + message.head);
    const uint32_t query_word = DropoutQueryWord(head_key, message.q_start + kWarpgroupRows * group_ + RowOf(Thread()));
    kept.Clear();
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const uint32_t key_word = DropoutKeyWordOf(static_cast<uint32_t>((message.key_start + 64 * piece) / 2 + lane));
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t word = __shfl_sync(0xFFFFFFFFu, key_word, 8 * m + lane % 4 * 2 + e);
          kept.Add(4 * piece + m, e, DropoutProducts(query_word, word), bytes);
        }
    }
    kept.Flip(bytes.flip);
    device::sm90::Pin(kept.parity);
  }

  // 0 for the pairs that are dropped.
  __device__ __forceinline__ static void DropScores(float (&x)[kPairs], const KeptPairs& kept) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int byte = 0; byte < 4; ++byte)
#pragma unroll
        for (int m = 0; m < 8; ++m)
          if (!kept.Stays(m, e, byte)) x[4 * (2 * m + byte / 2) + byte % 2 * 2 + e] = 0.f;
  }

  // ---- Results

  // 64 x 128 numbers of the term.
  __device__ __forceinline__ void StoreTile(const Message& message) {
    if constexpr (!Config::kDiagonals) {
      const Bias& bias = params_.bias;
      const int64_t table = message.table * bias.dense_q * bias.dense_kv;
      const int query = message.q_start + kWarpgroupRows * group_;
      const int64_t first = table + query * bias.dense_kv + message.key_start;
      const int queries = static_cast<int>(bias.dense_q) - query;
      const int keys = static_cast<int>(bias.dense_kv) - message.key_start;
      if (bias.dense_wide) {
        StoreWide(static_cast<float*>(params_.dbias) + first, queries, keys);
      } else if (bias.dense_kv % 4 == 0) {
        const device::RowFinish finish[2] = {{true, 1.f, 0.f}, {true, 1.f, 0.f}};
        StoreRows(total_, finish, queries, static_cast<Element*>(params_.dbias) + first, bias.dense_kv, keys, Thread());
      } else {
        ForPairs(queries, keys, [&](int row, int column, int i, bool two) {
          Element* to = static_cast<Element*>(params_.dbias) + first + row * bias.dense_kv + column;
          const uint32_t pair = device::PackPair<Element>(total_[i], total_[i + 1]);
          to[0] = Element{static_cast<uint16_t>(pair)};
          if (two) to[1] = Element{static_cast<uint16_t>(pair >> 16)};
        });
      }
    }
  }
  __device__ __forceinline__ void StoreWide(float* first, int queries, int keys) {
    const int64_t stride = params_.bias.dense_kv;
    ForPairs(queries, keys, [&](int row, int column, int i, bool two) {
      float* to = first + row * stride + column;
      if (stride % 2 == 0) {
        *reinterpret_cast<float2*>(to) = make_float2(total_[i], total_[i + 1]);
      } else {
        to[0] = total_[i];
        if (two) to[1] = total_[i + 1];
      }
    });
  }
  // Calls visit(row, column, place in total_, whether the next column is inside as well).
  template <typename Visit>
  __device__ __forceinline__ void ForPairs(int queries, int keys, const Visit& visit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = RowOf(Thread()) + 8 * half;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const int column = 8 * n + Thread() % 4 * 2;
        if (row < queries && column < keys) visit(row, column, 4 * n + 2 * half, column + 1 < keys);
      }
    }
  }

  // The sums of two neighbouring diagonals of tiles, into the half of the table that neighbouring slots do not write:
  // element k - q + T - 1. A sum of a thread is of all pairs that are `8 * (i / 2 - 1) + 2 t + e - row` apart, where
  // row is its first; its line in shared memory has 32 of them at a time, and each thread adds up, over the lines, what
  // belongs to three distances.
  __device__ __forceinline__ void StoreDiagonals(const Message& message) {
    if constexpr (Config::kDiagonals) {
      auto& shared = shared_.diagonals;
      constexpr int kColumns = DiagonalSums<true>::kColumns, kDistances = DiagonalSums<true>::kDistances;
      constexpr int kFarthest = kWarpgroupRows - 1;  // back, from a warpgroup's first query to the first key
      constexpr int kOwn = (kFarthest + 2 * kPairTile + kWarpgroup - 1) / kWarpgroup;
      const int thread = Thread(), line = thread / 32 * 8 + thread % 32 / 4;
      float own[kOwn] = {};
#pragma unroll
      for (int chunk = 0; chunk < (4 * kSums + kColumns - 1) / kColumns; ++chunk) {
        device::sm90::SyncNamed(kOwnBarrier + group_, kWarpgroup);  // everyone has read what was there
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
          const int at = chunk * (kColumns / 4) + i;
          shared.lines[group_][line][i / 2 * 8 + thread % 4 * 2 + i % 2] =
              at < kSums ? total_[at < kSums ? at : 0] : 0.f;
        }
        device::sm90::SyncNamed(kOwnBarrier + group_, kWarpgroup);
#pragma unroll
        for (int k = 0; k < kOwn; ++k) {
          const int distance = thread + k * kWarpgroup - kFarthest;
#pragma unroll 1
          for (int of = 0; of < 32; ++of) {
            const int column = distance + of / 8 * 16 + of % 8 + 8 - chunk * kColumns;
            if (column >= 0 && column < kColumns) own[k] += shared.lines[group_][of][column];
          }
        }
      }
      // Of the first warpgroup's distances, counted from the first of the slot's, the second's begin 64 earlier.
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const int distance = thread + k * kWarpgroup - kFarthest;
        if (distance < 2 * kPairTile) shared.sums[group_][distance + kPairTile - 1 - kWarpgroupRows * group_] = own[k];
      }
      device::sm90::SyncNamed(kBothBarrier, Config::kConsumerThreads);
      const int64_t length = params_.shape.q_len + params_.shape.kv_len - 1;
      const int slot = message.key_start / kPairTile;  // 2m - 1
      float* const table =
          static_cast<float*>(params_.dbias) + (2 * int64_t{message.table} + ((slot + 1) / 2 & 1)) * length;
      for (int i = device::ThreadHere(); i < kDistances; i += Config::kConsumerThreads) {
        const float first = i >= kPairTile - kWarpgroupRows ? shared.sums[0][i] : 0.f;
        const float second = i < kDistances - kWarpgroupRows ? shared.sums[1][i] : 0.f;
        const int64_t at = int64_t{message.key_start} + i - (kPairTile - 1) + params_.shape.q_len - 1;
        if (at >= 0 && at < length) table[at] = first + second;
      }
      device::sm90::SyncNamed(kBothBarrier, Config::kConsumerThreads);  // before the next slot's sums
    }
  }

  // ---- Products
  using Products = device::sm90::Multiply<Element, kPairTile>;

  // 64 rows of `left` by the 128 of `right`. kAdd: to what d holds.
  template <bool kAdd>
  __device__ __forceinline__ void Multiply(float (&d)[kPairs], const Element* left, const Element* right) {
    using device::sm90::FullDescriptor;
    const uint32_t a = device::sm90::TileDescriptor(left) + group_ * kWarpgroupRows * 128 / 16;
    const uint32_t b = device::sm90::TileDescriptor(right);
    if constexpr (kAdd) {
      Products::Shared(d, FullDescriptor(a), FullDescriptor(b));
    } else {
      Products::Overwrite(d, FullDescriptor(a), FullDescriptor(b));
    }
#pragma unroll
    for (int k = 1; k < kDim / 16; ++k) {
      const uint32_t step = (k / 4 * kPairTile * 128 + k % 4 * 32) / 16;
      Products::Shared(d, FullDescriptor(a + step), FullDescriptor(b + step));
    }
  }

  __device__ __forceinline__ void Release(Barrier& barrier) { device::sm90::ReleaseForWarp(barrier); }
  __device__ __forceinline__ static int Thread() { return device::ThreadHere() % kWarpgroup; }

  Shared& shared_;
  const BiasGradientParams& params_;
  const PairPlan& plan_;
  const int group_;
  float total_[kSums];
  uint32_t left_ = 0, right_ = 0, side_ = 0;  // of the CTA, so far
};

}  // namespace jax_bsk::attention::cuda::sm90
