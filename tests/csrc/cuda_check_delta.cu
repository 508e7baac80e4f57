// The CUDA kernel of the backward's row sums, for cuda_check: against float64, repeated, between guard bytes, and bit
// for bit the same for a row alone, in a part of the call and from arrays that are not aligned to 16 bytes.
#include <array>
#include <cmath>

#include "attention/launch.h"
#include "cuda_check.h"

namespace jax_bsk::check {
namespace {

using attention::DeltaParams;
namespace cuda = attention::cuda;

enum class Kind { kSizes, kZero, kHuge, kTime };
struct Named {
  const char* name;
  DType dtype;
  Kind kind;
};
const Named kCases[] = {
    {"delta-bf16", DType::kBF16, Kind::kSizes},        {"delta-f16", DType::kF16, Kind::kSizes},
    {"delta-f32", DType::kF32, Kind::kSizes},          {"delta-zero", DType::kBF16, Kind::kZero},
    {"delta-huge", DType::kBF16, Kind::kHuge},         {"time-delta-bf16-d128", DType::kBF16, Kind::kTime},
    {"time-delta-f32-d128", DType::kF32, Kind::kTime},
};

const char* At(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }

void Launch(const DeltaParams& params, cudaStream_t stream) {
  if (const std::string refusal = cuda::DeltaRefusal(params, 0); !refusal.empty()) {
    std::printf("REFUSED: %s\n", refusal.c_str());
    std::exit(3);
  }
  CUDA_OK(cuda::LaunchDelta(params, 0, stream));
}

std::vector<float> Floats(const Device& array) { return Decode(array.Bytes(), DType::kF32); }

// The row sums of a call, which fills an array of its own.
std::vector<float> Sums(DeltaParams params, cudaStream_t stream, bool* passed) {
  Device delta(params.batch * params.q_len * params.heads * 4, 0xFF);
  params.delta = delta.data();
  Launch(params, stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  *passed &= delta.GuardsIntact();
  return Floats(delta);
}

bool SameBits(const char* what, float got, float want) {
  if (std::memcmp(&got, &want, 4) == 0) return true;
  std::printf("  %s: got %.9g want %.9g   <-- FAILED\n", what, got, want);
  return false;
}

bool RunSizes(DType dtype, int64_t batch, int64_t q_len, int64_t heads, int64_t dim, bool given) {
  std::mt19937 rng(static_cast<uint32_t>(dim * 7 + q_len));
  const int64_t rows = batch * q_len * heads, size = static_cast<int64_t>(SizeOf(dtype)), row_bytes = dim * size;
  auto dout_values = Normal(rows * dim, rng), out_values = Normal(rows * dim, rng), dlse_values = Normal(rows, rng);
  const Exact dout(Encode(dout_values, dtype)), out(Encode(out_values, dtype)), dlse(dlse_values);
  Device delta(rows * 4, 0xFF);
  const DeltaParams params{
      batch, q_len, heads, dim, dtype, dout.data(), out.data(), given ? dlse.data() : nullptr, delta.data()};
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  Launch(params, stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  const std::vector<float> got = Floats(delta);
  bool passed = true;
  double largest = 0;  // error, in roundings of the sum of all terms' sizes
  const auto place = [&](int64_t row) {
    const int64_t token = row / heads;
    return (token / q_len * heads + row % heads) * q_len + token % q_len;
  };
  for (int64_t row = 0; row < rows; ++row) {
    double want = given ? -double(dlse_values[place(row)]) : 0, terms = std::abs(want);
    for (int64_t d = row * dim; d < (row + 1) * dim; ++d) {
      const double term = double(dout_values[d]) * out_values[d];
      want += term, terms += std::abs(term);
    }
    const double error = std::abs(got[place(row)] - want) / (std::ldexp(terms, -24) + 1e-30);
    largest = error <= largest ? largest : error;  // a NaN stays
  }
  // A lane has 32 products at most, and rounds as often; 4 sums of lanes and the log-sum-exp's part follow.
  if (!(largest <= 37)) passed = false;
  std::printf("  %lld x %lld queries of %lld heads of %lld%s: max error %.2f roundings%s\n", (long long)batch,
              (long long)q_len, (long long)heads, (long long)dim, given ? ", dlse" : "", largest,
              passed ? "" : "   <-- FAILED");
  passed &= delta.GuardsIntact();
  passed &= Repeats({&delta}, stream, [&] { Launch(params, stream); });

  // The last example alone, without its last queries where there are several.
  DeltaParams part = params;
  part.batch = 1, part.q_len = (q_len + 1) / 2, part.dlse = nullptr;
  part.dout = At(params.dout, (batch - 1) * q_len * heads * row_bytes);
  part.out = At(params.out, (batch - 1) * q_len * heads * row_bytes);
  DeltaParams whole = params;
  whole.dlse = nullptr;
  const std::vector<float> sums = Sums(whole, stream, &passed), of_part = Sums(part, stream, &passed);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t t = 0; t < part.q_len; ++t) {
      const int64_t at = ((batch - 1) * heads + h) * q_len + t;
      passed &= SameBits("a part of the call", of_part[h * part.q_len + t], sums[at]);
    }
  for (const int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
    DeltaParams one = whole;
    one.batch = one.q_len = one.heads = 1;
    one.dout = At(params.dout, row * row_bytes), one.out = At(params.out, row * row_bytes);
    passed &= SameBits("a row alone", Sums(one, stream, &passed)[0], sums[place(row)]);
  }
  // Arrays that begin one element behind an aligned place.
  for (const bool both : {false, true}) {
    const Device shifted_dout(rows * row_bytes + size), shifted_out(rows * row_bytes + size);
    DeltaParams shifted = whole;
    const auto move = [&](const Device& to, const void*& from) {
      char* const place = static_cast<char*>(to.data()) + size;
      CUDA_OK(cudaMemcpy(place, from, rows * row_bytes, cudaMemcpyDeviceToDevice));
      from = place;
    };
    move(shifted_out, shifted.out);
    if (both) move(shifted_dout, shifted.dout);
    const std::vector<float> again = Sums(shifted, stream, &passed);
    for (int64_t i = 0; i < rows; ++i) passed &= SameBits("arrays that are not aligned", again[i], sums[i]);
  }
  CUDA_OK(cudaStreamDestroy(stream));
  return passed;
}

// Nothing to do, or rows without elements: -dlse.
bool RunZero(DType dtype) {
  bool passed = true;
  const Device dlse(std::vector<float>(6, 2.f));
  for (const auto& [batch, q_len, heads] : {std::array{0, 3, 2}, {1, 0, 2}, {1, 3, 0}})
    passed &= Sums({batch, q_len, heads, 64, dtype, nullptr, nullptr, nullptr, nullptr}, nullptr, &passed).empty();
  for (const float sum : Sums({1, 3, 2, 0, dtype, nullptr, nullptr, dlse.data(), nullptr}, nullptr, &passed))
    passed &= SameBits("a row without elements", sum, -2.f);
  return passed;
}

// More than 2^31 elements: of zeros but for the last row.
bool RunHuge(DType dtype) {
  const int64_t q_len = 70000, heads = 256, dim = 128, rows = q_len * heads, size = static_cast<int64_t>(SizeOf(dtype));
  const Device dout(rows * dim * size), out(rows * dim * size);
  std::mt19937 rng(3);
  auto values = Normal(dim, rng);
  const auto bytes = Encode(values, dtype);
  double want = 0;
  for (const float x : values) want += double(x) * x;
  for (const Device* array : {&dout, &out}) {
    char* const last = static_cast<char*>(array->data()) + (rows - 1) * dim * size;
    CUDA_OK(cudaMemcpy(last, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
  bool passed = true;
  const std::vector<float> sums =
      Sums({1, q_len, heads, dim, dtype, dout.data(), out.data(), nullptr, nullptr}, nullptr, &passed);
  for (int64_t i = 0; i < rows - 1; ++i) passed &= sums[i] == 0;
  std::printf("  the last row: got %.9g want %.9g\n", sums[rows - 1], want);
  return passed && std::abs(sums[rows - 1] - want) < 1e-5 * want;
}

bool RunTime(DType dtype) {
  const int64_t batch = 4, q_len = 8192, heads = 32, dim = 128, rows = batch * q_len * heads;
  const int64_t bytes = rows * dim * static_cast<int64_t>(SizeOf(dtype));
  const Device dout(bytes), out(bytes), delta(rows * 4);
  const DeltaParams params{batch, q_len, heads, dim, dtype, dout.data(), out.data(), nullptr, delta.data()};
  const Milliseconds time = Time([&] { CUDA_OK(cuda::LaunchDelta(params, 0, nullptr)); });
  std::printf("  %.4f ms median, %.4f ms best, %.0f GB/s\n", time.median, time.best,
              (2. * bytes + 4. * rows) / time.median * 1e-6);
  return true;
}

bool Run(const Named& c) {
  switch (c.kind) {
    case Kind::kZero:
      return RunZero(c.dtype);
    case Kind::kHuge:
      return RunHuge(c.dtype);
    case Kind::kTime:
      return RunTime(c.dtype);
    case Kind::kSizes:
      break;
  }
  bool passed = true;
  for (const int64_t dim : {1, 5, 8, 17, 64, 128, 256, 500}) {
    passed &= RunSizes(c.dtype, 3, 37, 5, dim, true);
    passed &= RunSizes(c.dtype, 1, 130, 3, dim, false);
  }
  return RunSizes(c.dtype, 2, 1, 1, 64, true) && passed;
}

}  // namespace

std::vector<std::string> DeltaNames() {
  std::vector<std::string> names;
  for (const Named& c : kCases) names.push_back(c.name);
  return names;
}

bool RunDelta(const std::string& name, bool& known) {
  for (const Named& c : kCases)
    if (name == c.name) return Run(c);
  return known = false;
}

}  // namespace jax_bsk::check
