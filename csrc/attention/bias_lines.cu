#include "attention/bias_lines.h"
#include "attention/sm90/bias_lines.h"
#include "device/numbers.cuh"

namespace jax_bsk::attention::cuda {
namespace {

constexpr int kThreads = 256;

// How far a number may be from its line: four units in the last place of the largest of the tile. ALiBi's are rounded
// products, up to three from the line through the first and the last of them.
constexpr float kBound = 0x1p-22f;

// A warp per line. Distances are key - query; `distances` points to that of 0 in the first table.
__global__ void __launch_bounds__(kThreads)
    BiasLinesKernel(const float* distances, float2* lines, int64_t count, int lines_of_table, int line_of_zero,
                    int q_len, int kv_len) {
  const int64_t line = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / 32;
  if (line >= count) return;
  const int64_t table = line / lines_of_table;
  const int middle = 64 * (static_cast<int>(line % lines_of_table) - line_of_zero), lane = threadIdx.x % 32;
  const int low = max(middle - 63, 1 - q_len), high = min(middle + 63, kv_len - 1);
  const float* numbers = distances + table * (q_len + kv_len - 1);
  const float first = __ldg(numbers + low), last = __ldg(numbers + high);
  const float step = high > low ? (last - first) / static_cast<float>(high - low) : 0.f;
  const float at_middle = fmaf(step, static_cast<float>(middle - low), first);
  const float bound = kBound * fmaxf(fabsf(first), fabsf(last));
  bool straight = true;
  for (int distance = low + lane; distance <= high; distance += 32) {
    // False of a number that is not finite, too.
    straight &=
        fabsf(fmaf(step, static_cast<float>(distance - middle), at_middle) - __ldg(numbers + distance)) <= bound;
  }
  straight = __all_sync(0xFFFFFFFFu, straight);
  if (lane == 0) lines[line] = make_float2(at_middle, straight ? step : device::QuietNan());
}

}  // namespace

cudaError_t LaunchBiasLines(const Bias& bias, const Shape& shape, float* lines, cudaStream_t stream) {
  const int64_t of_table = sm90::BiasLinesOfTable(shape), count = sm90::DistanceTables(bias) * of_table;
  if (count == 0 || shape.q_len == 0 || shape.kv_len == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>((count * 32 + kThreads - 1) / kThreads);
  BiasLinesKernel<<<grid, kThreads, 0, stream>>>(static_cast<const float*>(bias.distances) + shape.q_len - 1,
                                                 reinterpret_cast<float2*>(lines), count, static_cast<int>(of_table),
                                                 static_cast<int>(sm90::BiasLineOfZero(shape)),
                                                 static_cast<int>(shape.q_len), static_cast<int>(shape.kv_len));
  return cudaGetLastError();
}

}  // namespace jax_bsk::attention::cuda
