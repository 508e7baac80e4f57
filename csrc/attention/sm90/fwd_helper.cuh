// What a step of the Hopper forward adds to its logits: two warps of the producer's warpgroup, one for each of the
// consumers', look for the lines that biases by distance lie on, which took 500 clocks a step of 2,560 in the
// consumers' own chain of work (H200, 128 dimensions), and ask for the numbers of a dense bias. (Which pairs dropout
// leaves takes more here than there: another 1,000 instructions a step are slow wherever they are, while tensor cores
// use the registers.)
#pragma once

#include "attention/sm90/bias.cuh"
#include "attention/sm90/fwd_shared.cuh"
#include "device/ptx/barrier.cuh"
#include "device/ptx/fence.cuh"
#include "device/ptx/thread.cuh"

namespace jax_bsk::attention::cuda::sm90 {

template <typename Config>
class ForwardHelper {
 public:
  using Shared = ForwardShared<Config>;

  __device__ ForwardHelper(Shared& shared, const ForwardParams& params, const ForwardPlan& plan, int number)
      : shared_(shared), params_(params), plan_(plan), number_(number) {}

  __device__ __forceinline__ void Run() {
    while (true) {
      device::sm90::Wait(shared_.full_header[headers_.Stage()], headers_.Full());
      const TileHeader& header = shared_.headers[headers_.Stage()];
      const int kind = ReadShared(header.kind), line = ReadShared(header.line);
      if (kind == TileHeader::kEnd) return;
      FindDense(header);
      device::sm90::ReleaseForWarp(shared_.empty_header[headers_.Stage()]);
      headers_.Advance();
      if (kind != TileHeader::kLive) continue;
      while (!Step(line)) {
      }
    }
  }

 private:
  // True after a tile's last step. (The next one of the same stage comes after the consumers have had this one, and
  // they get none before both helpers have arrived for it: no phase of full_step is missed.)
  __device__ __forceinline__ bool Step(int line) {
    const Ring<Config::kKeyStages> keys{step_};
    device::sm90::Wait(shared_.full_step[keys.Stage()], keys.Full());
    const StepInfo& info = shared_.Step(step_);
    const int last = ReadShared(info.flags) & StepInfo::kLast;
    const int start[kMaxPieces] = {ReadShared(info.start[0]), ReadShared(info.start[1])};
    if (number_ < Config::kConsumers) WriteBiases(shared_.biases[step_ % (2 * Shared::kKeyStages)], line, start);
    device::sm90::ReleaseForWarp(shared_.full_key[keys.Stage()]);
    if (dense_ != nullptr) PrefetchDense(start);
    ++step_;
    return last != 0;
  }

  // A dense bias with a number for each pair is asked for as soon as a step is known: what consumers read then comes
  // from L2. Of each row of the warpgroup's 64, lane % 32 and the one 32 further.
  __device__ __forceinline__ void FindDense(const TileHeader& tile) {
    const Bias& bias = params_.bias;
    dense_ = nullptr;
    if (bias.dense == nullptr || bias.dense_q == 1 || bias.dense_kv == 1 || number_ >= Config::kConsumers) return;
    const int64_t table = lists::TableIndex(bias.dense_batch, bias.dense_heads, tile.batch, tile.head);
    const int row = tile.q_start + number_ * kWarpgroupRows + device::ThreadHere() % 32;
    dense_ = static_cast<const char*>(bias.dense) + (table * bias.dense_q + row) * bias.dense_kv * DenseBytes();
    rows_left_ = static_cast<int>(bias.dense_q) - row;
  }
  __device__ __forceinline__ int DenseBytes() const {
    return params_.bias.dense_wide ? 4 : static_cast<int>(sizeof(typename Config::Element));
  }
  __device__ __forceinline__ void PrefetchDense(const int (&start)[kMaxPieces]) {
    constexpr int kLine = 128;
    const int bytes = DenseBytes(), row_bytes = static_cast<int>(params_.bias.dense_kv) * bytes;
#pragma unroll
    for (int piece = 0; piece < Config::kTileKv / 64; ++piece) {
      const int begin = start[piece] * bytes, end = min(begin + 64 * bytes, row_bytes);
#pragma unroll 1
      for (int at = begin; at < end; at += kLine) {
        if (rows_left_ > 0) device::PrefetchL2(dense_ + at);
        if (rows_left_ > 32) device::PrefetchL2(dense_ + int64_t{32} * row_bytes + at);
      }
    }
  }

  // What a bias may gain from a step to the next without being called steep, in units of log2. A reference of lagging
  // rows is raised once it is behind by more than RowSoftmax::kSlack, 2^10.
  static constexpr float kSteep = 2.f;

  // Of the consumer warpgroup of this helper's number, a lane for each 64 keys.
  __device__ __forceinline__ void WriteBiases(StepBias& bias, int line, const int (&start)[kMaxPieces]) {
    const int lane = device::ThreadHere() % 32;
    float2 own{0.f, 0.f};
    if (params_.bias.distances != nullptr && lane < Config::kTileKv / 64) {
      const int key = min(lane == 0 ? start[0] : start[1], static_cast<int>(params_.shape.kv_len) - 1);
      own = __ldg(plan_.bias_lines.lines + max(line - number_ + key / 64, 0));
      // Enormous numbers, as some write for what is not to be seen, are read: as parts of a product they are not
      // finite.
      if (!(plan_.bias_factor * (fabsf(own.x) + 64.f * fabsf(own.y)) < 1e38f)) own.y = device::QuietNan();
    }
    if (params_.bias.distances != nullptr) WriteRows(own);
    const bool off = !IsBiasLine(own), steep = own.y < -kSteep / (device::kLog2E * Config::kTileKv);
    const unsigned read = __ballot_sync(0xFFFFFFFFu, off), follow = __ballot_sync(0xFFFFFFFFu, off || steep);
    if (lane < kMaxPieces) bias.lines[number_][lane] = off ? float2{0.f, 0.f} : own;
    const bool other = params_.bias.dense != nullptr || params_.bias.tiles != nullptr;
    if (lane == 0) {
      bias.read[number_] =
          static_cast<int>(read) | (other ? StepBias::kOther : 0) | (other || follow != 0 ? StepBias::kRaise : 0);
    }
  }

  // The rows of BiasRamp. `line`: of the lane's 64 keys.
  __device__ __forceinline__ void WriteRows(const float2& line) {
    const int stage = Ring<Config::kKeyStages>{step_}.Stage(), lane = device::ThreadHere() % 32;
    const bool on = IsBiasLine(line);
#pragma unroll
    for (int piece = 0; piece < Config::kTileKv / 64; ++piece) {
      const float x = __shfl_sync(0xFFFFFFFFu, on ? plan_.bias_factor * line.x : 0.f, piece);
      const float y = __shfl_sync(0xFFFFFFFFu, on ? plan_.bias_factor * line.y : 0.f, piece);
      shared_.ramp.Write(stage, number_, lane, piece, x, y);
      shared_.ramp.Write(stage, number_, lane + 32, piece, x, y);
    }
    device::sm90::FenceAsyncProxy();
  }

  Shared& shared_;
  const ForwardParams& params_;
  const ForwardPlan& plan_;
  const int number_;
  Ring<Shared::kHeaders> headers_;
  uint32_t step_ = 0;  // of the CTA
  const char* dense_;  // of the lane's first row; null: nothing to ask for
  int rows_left_;      // from that row on
};

}  // namespace jax_bsk::attention::cuda::sm90
