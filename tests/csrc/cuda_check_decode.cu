// The CUDA kernels of decoding against a float64 loop: problems drawn at random (check_decode.h), and times beside a
// copy of as many bytes.

#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "check_decode.h"
#include "cuda_check.h"
#include "decode/launch.h"

namespace jax_bsk::check {
namespace {

using decode::CacheType;
using decode::ForwardParams;

// Of int8: so many are 1.
constexpr float kOne = 16.f;

// The cache's numbers as its bytes, which are what `values` become.
std::vector<uint8_t> EncodeCache(std::vector<float>& values, DType dtype, CacheType cache) {
  if (cache == CacheType::kSame) return Encode(values, dtype);
  std::vector<uint8_t> bytes(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (cache == CacheType::kE4M3) {
      bytes[i] = __nv_cvt_float_to_fp8(values[i], __NV_SATFINITE, __NV_E4M3);
      values[i] = __half2float(__half(__nv_cvt_fp8_to_halfraw(bytes[i], __NV_E4M3)));
    } else {
      const float x = std::isnan(values[i]) ? 0.f : std::round(std::clamp(kOne * values[i], -128.f, 127.f));
      bytes[i] = static_cast<uint8_t>(static_cast<int8_t>(x));
      values[i] = x / kOne;
    }
  }
  return bytes;
}

// Arrays of a problem on the device.
struct OnDevice {
  Exact query, key, value, kv_lens, page_indices, cu_q_lens, num_seqs, selection, tree, sinks;
  Device out, lse, workspace;

  OnDevice(DecodeProblem& p, DType dtype, CacheType cache = CacheType::kSame)
      : query(Encode(p.query, dtype)),
        key(EncodeCache(p.key, dtype, cache)),
        value(EncodeCache(p.value, dtype, cache)),
        kv_lens(p.kv_lens),
        page_indices(p.page_indices),
        cu_q_lens(p.cu_q_lens),
        num_seqs(p.num_seqs),
        selection(p.selection),
        tree(p.tree),
        sinks(p.sinks),
        out(p.shape.groups * p.shape.tokens * p.shape.heads * p.shape.value_dim * SizeOf(dtype), 0xFF),
        lse(p.shape.groups * p.shape.tokens * p.shape.heads * 4, 0xFF),
        workspace(decode::PartialLayout(p.shape, p.short_part, p.long_part).bytes, 0x7F) {}

  ForwardParams Params(const DecodeProblem& p, DType dtype, CacheType cache = CacheType::kSame) const {
    ForwardParams params = p.Params();
    const auto& s = p.shape;
    params.dtype = dtype, params.cache = cache;
    if (cache == CacheType::kInt8) params.scale /= kOne, params.value_scale /= kOne;
    params.query = query.data();
    if (p.both) {
      params.key = {key.data(), 2 * s.kv_heads * s.head_dim, 2 * s.head_dim};
      const int64_t size = cache == CacheType::kSame ? SizeOf(dtype) : 1;
      params.value = {static_cast<const char*>(key.data()) + s.head_dim * size, params.key.stride,
                      params.key.head_stride};
    } else {
      params.key = {key.data(), s.kv_heads * s.head_dim, s.head_dim};
      params.value = {value.data(), s.kv_heads * s.value_dim, s.value_dim};
    }
    params.kv_lens = static_cast<const int32_t*>(kv_lens.data());
    params.page_indices = static_cast<const int32_t*>(page_indices.data());
    params.cu_q_lens = static_cast<const int32_t*>(cu_q_lens.data());
    params.num_seqs = static_cast<const int32_t*>(num_seqs.data());
    params.selection = static_cast<const int32_t*>(selection.data());
    params.tree = static_cast<const uint32_t*>(tree.data());
    params.sinks = static_cast<const float*>(sinks.data());
    params.out = out.data();
    params.lse = static_cast<float*>(lse.data());
    return params;
  }
};

// Rounding of the result, of the probabilities (to the element type before the product with the values), and of sums.
// `spoiled` are rows of `columns` numbers of which those that are not NaN may be anything.
bool Compare(const char* what, const std::vector<double>& want, const std::vector<double>& allowed,
             const std::vector<float>& got, const std::vector<char>& spoiled, int64_t columns, bool quiet) {
  double worst = 0;
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = got[i], y = want[i];
    double ratio = 0;
    if (std::isnan(y)) {
      ratio = std::isnan(x) ? 0 : INFINITY;
    } else if (spoiled[i / columns]) {
      ratio = 0;
    } else if (std::isinf(y)) {
      ratio = x == y ? 0 : INFINITY;
    } else {
      ratio = std::isfinite(x) ? std::abs(x - y) / allowed[i] : INFINITY;
    }
    worst = std::max(worst, ratio);
    if (ratio > 1 && wrong++ == 0) first = i;
  }
  if (!quiet || wrong) {
    std::printf("  %-10s largest error %.3f of the allowed%s\n", what, worst, wrong ? "   <-- FAILED" : "");
  }
  if (wrong) {
    std::printf("        %zu of %zu are wrong, first %zu: got %g want %g\n", wrong, got.size(), first, got[first],
                want[first]);
  }
  return wrong == 0;
}

// `far`: the first launch finds nothing of the arrays in L2.
bool RunProblem(DecodeProblem& p, DType dtype, bool repeats, bool quiet, bool far = false,
                CacheType cache = CacheType::kSame) {
  OnDevice arrays(p, dtype, cache);  // rounds the problem's numbers
  const ForwardParams params = arrays.Params(p, dtype, cache);
  if (const std::string reason = decode::cuda::ForwardRefusal(params, 0); !reason.empty()) {
    const bool expected = dtype == DType::kF32 && std::max(p.shape.head_dim, p.shape.value_dim) > 128;
    if (!expected || !quiet) std::printf("  refused: \"%s\"%s\n", reason.c_str(), expected ? "" : "   <-- FAILED");
    return expected;
  }
  const DecodeWanted want = DecodeReference(p);
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  const auto launch = [&] { CUDA_OK(decode::cuda::LaunchForward(params, arrays.workspace.data(), 0, stream)); };
  if (far) {
    const Device others(int64_t{256} << 20, 0);  // which take its place
    CUDA_OK(cudaDeviceSynchronize());
  }
  launch();
  CUDA_OK(cudaStreamSynchronize(stream));
  const double rounding = dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  std::vector<double> out_allowed(want.out.size()), lse_allowed(want.lse.size());
  for (size_t i = 0; i < out_allowed.size(); ++i) {
    out_allowed[i] = 1.01 * rounding * std::abs(want.out[i]) + (1.5 * rounding + 0x1p-18) * want.terms[i] +
                     (dtype == DType::kF16 ? 0x1p-24 : 1e-35);
  }
  for (size_t i = 0; i < lse_allowed.size(); ++i) lse_allowed[i] = 0x1p-17 * (1 + std::abs(want.lse[i]));
  std::vector<float> lse(want.lse.size());
  const auto lse_bytes = arrays.lse.Bytes();
  std::memcpy(lse.data(), lse_bytes.data(), lse_bytes.size());
  const std::vector<float> out = Decode(arrays.out.Bytes(), dtype);
  bool passed = Compare("out", want.out, out_allowed, out, want.spoiled, p.shape.value_dim, quiet);
  passed &= Compare("lse", want.lse, lse_allowed, lse, std::vector<char>(lse.size()), 1, quiet);
  if (repeats) passed &= Repeats({&arrays.out, &arrays.lse}, stream, launch);
  if (!arrays.out.GuardsIntact() || !arrays.lse.GuardsIntact() || !arrays.workspace.GuardsIntact()) {
    passed = false, std::printf("  guard bytes overwritten   <-- FAILED\n");
  }
  CUDA_OK(cudaStreamDestroy(stream));
  return passed;
}

// Random problems of every kind, by their first and last seed.
constexpr int kProblems = 192, kProblemsEach = 16;

// Short ones for one instantiation of the kernels each: for compute-sanitizer, and for programs with a seeded bug.
struct Instance {
  const char* name;
  DType dtype;
  std::vector<int64_t> head_dims;  // that the same instantiation takes
  bool faults;
  CacheType cache = CacheType::kSame;
};
const Instance kInstances[] = {
    {"decode-bf16-d64", DType::kBF16, {64, 40, 16}, false},
    {"decode-bf16-d128", DType::kBF16, {128, 96, 72}, false},
    {"decode-bf16-d256", DType::kBF16, {256, 136}, false},
    {"decode-f16-d64", DType::kF16, {64, 40, 16}, false},
    {"decode-f16-d128", DType::kF16, {128, 96, 72}, false},
    {"decode-f16-d256", DType::kF16, {256, 136}, false},
    {"decode-f32-d64", DType::kF32, {64, 40, 16}, false},
    {"decode-f32-d128", DType::kF32, {128, 96, 72}, false},
    {"decode-faults-bf16-d64", DType::kBF16, {64, 40}, true},
    {"decode-faults-bf16-d128", DType::kBF16, {128, 96}, true},
    {"decode-e4m3-bf16-d128", DType::kBF16, {128, 96, 16}, false, CacheType::kE4M3},
    {"decode-e4m3-f16-d128", DType::kF16, {128, 64}, false, CacheType::kE4M3},
    {"decode-int8-bf16-d128", DType::kBF16, {128, 112, 48}, false, CacheType::kInt8},
    {"decode-int8-f16-d128", DType::kF16, {128, 32}, false, CacheType::kInt8},
    {"decode-faults-e4m3-bf16-d128", DType::kBF16, {128, 80}, true, CacheType::kE4M3},
};
// Queries of bfloat16 that float16 does not have: rows of very large or very small numbers, with the scale that makes
// their logits as they were.
void Stretch(DecodeProblem& p, int number) {
  const int exponent = number % 4 == 1 ? 100 : number % 4 == 3 ? -90 : 0;
  for (float& x : p.query) x = std::ldexp(x, exponent);
  p.scale = std::ldexp(p.scale, -exponent);
}

constexpr unsigned kInstanceSeed = 10000;
constexpr int kInstanceProblems = 16, kFaultProblems = 32;

bool RunInstance(const Instance& instance) {
  DecodeKinds kinds;
  kinds.head_dims = instance.head_dims, kinds.most_positions = 330, kinds.most_queries = 40;
  kinds.faults = instance.faults ? 1 : 0;
  if (instance.cache != CacheType::kSame) kinds.least_dim = 16;
  bool passed = true;
  for (int i = 0; i < (instance.faults ? kFaultProblems : kInstanceProblems); ++i) {
    DecodeProblem p = DrawDecode(kInstanceSeed + i, kinds);
    if (instance.cache != CacheType::kSame && instance.dtype == DType::kBF16) Stretch(p, i);
    const bool right = RunProblem(p, instance.dtype, true, true, false, instance.cache);
    if (!right) std::printf("  in %s of %s\n", p.name.c_str(), instance.name);
    passed &= right;
  }
  return passed;
}

// 134 MB of keys and values in long rows, for which every CTA waits at every step: one that begins before its copies
// are there reads others. (Those of smaller problems come from L2, and between short rows there is time: they are there
// without a wait.)
// In one page per sequence, which the copy engine reads; and in two pages whose size is no multiple of 8, of which the
// threads copy the rows. (In pages of four, kernels without a wait passed.)
struct FarCase {
  const char* name;
  int64_t pages, page_size;
  CacheType cache = CacheType::kSame;
};
constexpr FarCase kFar[] = {
    {"decode-far-bf16-d128", 1, 1024},
    {"decode-far-pages-bf16-d128", 2, 508},
    {"decode-far-e4m3-bf16-d128", 1, 1024, CacheType::kE4M3},
    {"decode-far-pages-e4m3-bf16-d128", 2, 508, CacheType::kE4M3},
};

bool RunFar(const FarCase& far) {
  constexpr int64_t kSequences = 128, kHeads = 4, kKvHeads = 2, kDim = 128;
  const int64_t positions = far.pages * far.page_size;
  DecodeProblem p;
  p.name = far.name;
  p.shape = {kSequences, 1, kHeads, kKvHeads, kDim, kDim, 1, far.pages, far.page_size, far.pages, 0};
  p.both = false;
  p.short_part = 1024;
  p.kv_lens.assign(kSequences, static_cast<int32_t>(positions));
  for (int64_t i = 0; i < kSequences * far.pages; ++i) p.page_indices.push_back(static_cast<int32_t>(i % far.pages));
  p.num_seqs.assign(kSequences, 1);
  for (int64_t i = 0; i < kSequences; ++i) p.cu_q_lens.insert(p.cu_q_lens.end(), {0, 1});
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0.f, 1.f);
  std::vector<float> some(10007);  // drawing all of them would take seconds
  for (float& x : some) x = normal(rng);
  for (auto* array : {&p.query, &p.key, &p.value}) {
    array->resize(kSequences * (array == &p.query ? kHeads : positions * kKvHeads) * kDim);
    for (float& x : *array) x = some[rng() % some.size()];
  }
  return RunProblem(p, DType::kBF16, false, true, true, far.cache);
}

// ---- Times

struct Timing {
  const char* name;
  int64_t batch, kv_len, queries, heads, kv_heads, dim, page_size, part;  // page_size 0: a contiguous cache
  decode::CacheType cache = decode::CacheType::kSame;
};

const Timing kTimings[] = {
    {"time-decode-1-1k", 1, 1024, 1, 32, 8, 128, 0, 64},
    {"time-decode-1-32k", 1, 32768, 1, 32, 8, 128, 0, 256},
    {"time-decode-8-8k", 8, 8192, 1, 32, 8, 128, 0, 512},
    {"time-decode-8-8k-4", 8, 8192, 4, 32, 8, 128, 0, 512},
    {"time-decode-32-4k", 32, 4096, 1, 32, 8, 128, 0, 1024},
    {"time-decode-64-8k", 64, 8192, 1, 32, 8, 128, 0, 1024},
    {"time-decode-256-2k", 256, 2048, 1, 32, 8, 128, 0, 1024},
    {"time-decode-64-8k-p16", 64, 8192, 1, 32, 8, 128, 16, 1024},
    {"time-decode-64-8k-p64", 64, 8192, 1, 32, 8, 128, 64, 1024},
    {"time-decode-64-8k-e4m3", 64, 8192, 1, 32, 8, 128, 0, 2048, decode::CacheType::kE4M3},
    {"time-decode-64-8k-int8", 64, 8192, 1, 32, 8, 128, 0, 2048, decode::CacheType::kInt8},
    {"time-decode-8-8k-e4m3", 8, 8192, 1, 32, 8, 128, 0, 2048, decode::CacheType::kE4M3},
    {"time-decode-prefill-2k-32k", 1, 32768, 2048, 32, 8, 128, 64, 8192},
};

bool RunTiming(Timing t, int64_t part = 0) {
  if (part > 0) t.part = part;
  const int64_t positions = t.batch * t.kv_len, row = t.kv_heads * t.dim;
  const int64_t bytes = positions * row * 2 * (t.cache == decode::CacheType::kSame ? 2 : 1);
  DecodeProblem p;
  auto& s = p.shape;
  const bool paged = t.page_size > 0;
  const int64_t pages = paged ? t.kv_len / t.page_size : 1;
  s = {paged ? 1 : t.batch,
       paged ? t.batch * t.queries : t.queries,
       t.heads,
       t.kv_heads,
       t.dim,
       t.dim,
       paged ? t.batch : 1,
       paged ? t.batch * pages : 1,
       paged ? t.page_size : t.kv_len,
       pages,
       0};
  p.both = paged;
  const int64_t groups = s.groups;
  p.kv_lens.assign(t.batch, static_cast<int32_t>(t.kv_len));
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i <= s.seqs; ++i) p.cu_q_lens.push_back(static_cast<int32_t>(i * t.queries));
    p.num_seqs.push_back(static_cast<int32_t>(s.seqs));
  }
  if (paged) {
    for (int64_t i = 0; i < t.batch * pages; ++i) p.page_indices.push_back(static_cast<int32_t>(i));
    std::mt19937 rng(1);
    std::shuffle(p.page_indices.begin(), p.page_indices.end(), rng);
  } else {
    p.page_indices.assign(groups, 0);
  }
  const std::vector<float> some(t.batch * t.queries * t.heads * t.dim, 0.5f);
  p.query = some;
  Device cache(bytes, 0x3A), copy(bytes / 2);
  OnDevice arrays(p, DType::kBF16);
  Device workspace(decode::PartialLayout(s, t.part, 8192).bytes);
  ForwardParams params = arrays.Params(p, DType::kBF16);
  params.short_part = t.part, params.long_part = 8192, params.cache = t.cache;
  const auto* first = static_cast<const char*>(cache.data());
  params.key.first = first, params.value.first = paged ? first + t.dim * 2 : first + bytes / 2;
  const auto launch = [&] { CUDA_OK(decode::cuda::LaunchForward(params, workspace.data(), 0, cudaStreamPerThread)); };
  // In a graph of many calls, as XLA has them.
  constexpr int kCalls = 20;
  const auto in_graph = [&](const std::function<void()>& call) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA_OK(cudaStreamBeginCapture(cudaStreamPerThread, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < kCalls; ++i) call();
    CUDA_OK(cudaStreamEndCapture(cudaStreamPerThread, &graph));
    CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
    const Milliseconds time = Time([&] { CUDA_OK(cudaGraphLaunch(executable, cudaStreamLegacy)); });
    CUDA_OK(cudaGraphExecDestroy(executable));
    CUDA_OK(cudaGraphDestroy(graph));
    return 1e3 * time.median / kCalls;
  };
  const double us = in_graph(launch);
  // A copy that reads half of the bytes and writes as many moves the same.
  const double copy_us = in_graph([&] {
    CUDA_OK(cudaMemcpyAsync(copy.data(), cache.data(), bytes / 2, cudaMemcpyDeviceToDevice, cudaStreamPerThread));
  });
  const double flops = 4. * t.batch * t.queries * t.heads * t.dim * (t.kv_len - (t.queries - 1) / 2.);
  if (part > 0) std::printf("  part %5d:", static_cast<int>(part));
  std::printf("  %.1f us, a copy of as many bytes %.1f us: %.3f of its speed, %.2f TB/s, %.0f TFLOP/s\n", us, copy_us,
              copy_us / us, bytes / us * 1e-6, flops / us * 1e-6);
  return true;
}

}  // namespace

std::vector<std::string> DecodeNames() {
  std::vector<std::string> names;
  for (const Instance& instance : kInstances) names.push_back(instance.name);
  for (const FarCase& far : kFar) names.push_back(far.name);
  for (int first = 0; first < kProblems; first += kProblemsEach) {
    names.push_back("decode-" + std::to_string(first) + "-" + std::to_string(first + kProblemsEach - 1));
  }
  for (const Timing& t : kTimings) names.push_back(t.name);
  return names;
}

bool RunDecode(const std::string& name, bool& known) {
  known = true;
  for (const Timing& t : kTimings) {
    if (name == t.name) return RunTiming(t);
  }
  for (const Instance& instance : kInstances) {
    if (name == instance.name) return RunInstance(instance);
  }
  for (const FarCase& far : kFar) {
    if (name == far.name) return RunFar(far);
  }
  int first = 0, last = 0;
  known = std::sscanf(name.c_str(), "decode-%d-%d", &first, &last) == 2;
  bool passed = known;
  for (int seed = first; known && seed <= last; ++seed) {
    const DType dtype = seed % 4 == 0 ? DType::kF32 : seed % 4 == 1 ? DType::kF16 : DType::kBF16;
    DecodeProblem p = DrawDecode(static_cast<unsigned>(seed));
    const bool right = RunProblem(p, dtype, seed % 4 == 2, true);
    if (!right) std::printf("  in %s\n", p.name.c_str());
    passed &= right;
  }
  return passed;
}

}  // namespace jax_bsk::check

// A program of these cases alone, which is built in a minute: cuda_check_decode [PART_OF_A_NAME [KEYS_PER_PART...]].
#ifdef JAX_BSK_DECODE_ALONE
int main(int argc, char** argv) {
  using namespace jax_bsk::check;
  int failed = 0;
  repeat_count = 5;
  for (const auto& name : DecodeNames()) {
    if (argc > 1 && name.find(argv[1]) == std::string::npos) continue;
    std::printf("%s\n", name.c_str());
    StartClock(name);
    if (argc > 2 && name.rfind("time-", 0) == 0) {
      for (const Timing& t : kTimings) {
        for (int i = 2; name == t.name && i < argc; ++i) {
          if (std::atoi(argv[i]) < 2 * t.kv_len) RunTiming(t, std::atoi(argv[i]));
        }
      }
      continue;
    }
    bool known;
    failed += !RunDecode(name, known);
  }
  std::printf("failed %d\n", failed);
  return failed > 0;
}
#endif
