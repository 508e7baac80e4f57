// The CPU's row sums of the backward, of random sizes, against float64; the same bits by one and by three workers, and
// for an example alone.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "attention/cpu.h"
#include "cpu_check.h"

namespace jax_bsk::check {

bool CheckDelta(uint64_t seed) {
  using attention::DeltaParams;
  namespace cpu = attention::cpu;
  Random random(seed * 31 + 7);
  const auto dtype = random.Pick({DType::kF16, DType::kBF16, DType::kF32, DType::kF64});
  const DType stats = dtype == DType::kF64 ? DType::kF64 : DType::kF32;
  // A third of them have several tasks an example.
  const bool large = seed % 3 == 0;
  const int64_t batch = random.Int(1, 3), heads = large ? 32 : random.Int(1, 4);
  const int64_t q_len = large ? random.Int(1, 80) : random.Int(0, 40);
  const int64_t dim = large ? 64 : random.Pick<int64_t>({0, 1, 5, 8, 16, 17, 64, 100, 300});
  const bool given = random.Chance(0.5);
  const int64_t rows = batch * q_len * heads;
  const Array dout = random.Normals(dtype, rows * dim), out = random.Normals(dtype, rows * dim);
  const Array dlse = random.Normals(stats, rows);
  Array delta(stats, rows);
  const auto params = [&](int64_t first, int64_t count, Array& result) {  // of some examples
    const auto at = [&](const Array& array, int64_t of_row) {
      return array.data.get() + first * q_len * heads * of_row * Size(array.dtype);
    };
    return DeltaParams{
        count, q_len, heads, dim, dtype, at(dout, dim), at(out, dim), given ? at(dlse, 1) : nullptr, result.data.get()};
  };
  const DeltaParams all = params(0, batch, delta);
  const auto run = [](const DeltaParams& p, int workers) { Run(p, cpu::DeltaTasks(p), &cpu::RunDeltaTasks, workers); };
  run(all, 1);
  bool passed = true;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < q_len; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = (b * q_len + t) * heads + h, i = (b * heads + h) * q_len + t;
        double want = given ? -dlse[i] : 0, terms = std::fabs(want);
        for (int64_t d = row * dim; d < (row + 1) * dim; ++d) {
          want += dout[d] * out[d];
          terms += std::fabs(dout[d] * out[d]);
        }
        if (passed && !(std::fabs(delta[i] - want) <= Allowed(stats, stats, want, terms))) {
          passed = false;
          std::printf("delta of example %ld, query %ld, head %ld: got %g want %g\n", b, t, h, delta[i], want);
        }
      }
  passed = Repeats("delta", delta, [&](int workers) { run(all, workers); }) && passed;
  Array alone(stats, q_len * heads);
  const int64_t last = batch - 1, bytes = alone.size * Size(stats);
  run(params(last, 1, alone), 2);
  if (std::memcmp(alone.data.get(), delta.data.get() + last * bytes, bytes) != 0) {
    passed = false;
    std::printf("delta of an example alone differs\n");
  }
  if (!passed) {
    std::printf("seed %lu: row sums of %ld x %ld queries of %ld heads of %ld, type %d, are wrong\n", seed, batch, q_len,
                heads, dim, static_cast<int>(dtype));
  }
  return passed;
}

}  // namespace jax_bsk::check
