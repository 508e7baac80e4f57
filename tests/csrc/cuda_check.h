// What the checks of cuda_check share: arrays on the device, elements, random values and repeats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "dtype.h"
#include "grid_limit.h"

namespace jax_bsk::check {

#define CUDA_OK(call)                                                                    \
  do {                                                                                   \
    const cudaError_t error = (call);                                                    \
    if (error != cudaSuccess) {                                                          \
      std::printf("FAILED: %s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error)); \
      std::exit(2);                                                                      \
    }                                                                                    \
  } while (false)

// ---- Arrays

// A device array between guard bytes, which show what is written beyond it.
class Device {
 public:
  explicit Device(size_t bytes, int fill = 0) : bytes_(bytes) {
    CUDA_OK(cudaMalloc(&base_, bytes + 2 * kGuard));
    CUDA_OK(cudaMemset(base_, 0xAB, bytes + 2 * kGuard));
    CUDA_OK(cudaMemset(data(), fill, bytes));
  }
  template <typename T>
  explicit Device(const std::vector<T>& host) : Device(host.size() * sizeof(T)) {
    CUDA_OK(cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(base_); }
  void* data() const { return static_cast<char*>(base_) + kGuard; }
  void Fill(int byte) { CUDA_OK(cudaMemset(data(), byte, bytes_)); }
  std::vector<uint8_t> Bytes() const {
    std::vector<uint8_t> host(bytes_);
    CUDA_OK(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  bool GuardsIntact() const {
    std::vector<uint8_t> all(bytes_ + 2 * kGuard);
    CUDA_OK(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < kGuard; ++i)
      if (all[i] != 0xAB || all[all.size() - 1 - i] != 0xAB) return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 4096;
  void* base_ = nullptr;
  size_t bytes_;
};

// An input of exactly its size, so that compute-sanitizer sees what is read beyond it; null where it has no elements.
class Exact {
 public:
  template <typename T>
  explicit Exact(const std::vector<T>& host) {
    if (host.empty()) return;
    CUDA_OK(cudaMalloc(&data_, host.size() * sizeof(T)));
    CUDA_OK(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Exact(const Exact&) = delete;
  ~Exact() { cudaFree(data_); }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// ---- Elements

inline size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline std::vector<uint8_t> Encode(std::vector<float>& values, DType dtype) {  // also rounds `values`
  std::vector<uint8_t> bytes(values.size() * SizeOf(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kF32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
    } else if (dtype == DType::kF16) {
      const __half x = __float2half(values[i]);
      std::memcpy(&bytes[2 * i], &x, 2);
      values[i] = __half2float(x);
    } else {
      const __nv_bfloat16 x = __float2bfloat16(values[i]);
      std::memcpy(&bytes[2 * i], &x, 2);
      values[i] = __bfloat162float(x);
    }
  }
  return bytes;
}

inline std::vector<float> Decode(const std::vector<uint8_t>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / SizeOf(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kF32) {
      std::memcpy(&values[i], &bytes[4 * i], 4);
    } else if (dtype == DType::kF16) {
      __half x;
      std::memcpy(&x, &bytes[2 * i], 2);
      values[i] = __half2float(x);
    } else {
      __nv_bfloat16 x;
      std::memcpy(&x, &bytes[2 * i], 2);
      values[i] = __bfloat162float(x);
    }
  }
  return values;
}

inline std::vector<float> Normal(size_t count, std::mt19937& rng, float amplitude = 1.f) {
  std::normal_distribution<float> normal(0.f, amplitude);
  std::vector<float> values(count);
  for (float& x : values) x = normal(rng);
  return values;
}

// ---- Time

inline int case_seconds = 100;

// Ends the process if the case has not ended, or another begun, when its time is over. A kernel that waits for what
// never comes would wait for ever.
inline void StartClock(const std::string& name) {
  static char message[256];
  alarm(0);
  std::snprintf(message, sizeof(message), "%s does not end (limit %d s)   <-- FAILED\n", name.c_str(), case_seconds);
  std::signal(SIGALRM, [](int) {
    const auto written = write(STDOUT_FILENO, message, std::strlen(message));
    _exit(written < 0 ? 5 : 4);
  });
  std::fflush(stdout);
  alarm(static_cast<unsigned>(case_seconds));
}

// ---- Launches

inline int repeat_count = 20;
// Multiprocessors that repeats are confined to, in turn; 0 for all.
inline constexpr int kGridLimits[] = {1, 0, 2, 3, 7};

// Whether launch() on the stream writes into the arrays the bits that are there again, however few multiprocessors it
// may use, and from a captured graph.
inline bool Repeats(const std::vector<Device*>& arrays, cudaStream_t stream, const std::function<void()>& launch) {
  const auto fill = [&](int byte) {
    for (Device* array : arrays) array->Fill(byte);
  };
  const auto read = [&] {
    std::vector<std::vector<uint8_t>> bytes;
    for (Device* array : arrays) bytes.push_back(array->Bytes());
    return bytes;
  };
  const auto results = read();
  bool equal = true;
  for (int repeat = 0; repeat < repeat_count && equal; ++repeat) {
    const int limit = kGridLimits[repeat % std::size(kGridLimits)];
    fill(repeat);
    {
      const GridLimit limited(limit);
      launch();
      CUDA_OK(cudaStreamSynchronize(stream));
    }
    const auto again = read();
    for (size_t i = 0; i < again.size(); ++i) {
      const auto [got, first] = std::mismatch(again[i].begin(), again[i].end(), results[i].begin());
      if (got == again[i].end()) continue;
      equal = false;
      size_t count = 0;
      for (size_t byte = 0; byte < again[i].size(); ++byte) count += again[i][byte] != results[i][byte];
      std::printf(
          "  repeat %d (multiprocessors: %d, 0 for all): %zu of %zu bytes of result %zu differ, the first is %zu"
          "   <-- FAILED\n",
          repeat, limit, count, again[i].size(), i, size_t(got - again[i].begin()));
    }
  }
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch();
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  fill(0x11);
  for (int i = 0; i < 2; ++i) CUDA_OK(cudaGraphLaunch(executable, stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  if (read() != results) equal = false, std::printf("  graph replay differs   <-- FAILED\n");
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
  return equal;
}

struct Milliseconds {
  float median, best;
};

// Of ten calls of launch() on the default stream, after three that warm up.
inline Milliseconds Time(const std::function<void()>& launch) {
  cudaEvent_t start, stop;
  CUDA_OK(cudaEventCreate(&start));
  CUDA_OK(cudaEventCreate(&stop));
  for (int i = 0; i < 3; ++i) launch();
  std::vector<float> times(10);
  for (float& time : times) {
    CUDA_OK(cudaEventRecord(start));
    launch();
    CUDA_OK(cudaEventRecord(stop));
    CUDA_OK(cudaEventSynchronize(stop));
    CUDA_OK(cudaEventElapsedTime(&time, start, stop));
  }
  CUDA_OK(cudaEventDestroy(start));
  CUDA_OK(cudaEventDestroy(stop));
  std::sort(times.begin(), times.end());
  return {times[5], times[0]};
}

// ---- What is beside attention's forward and backward, which are in cuda_check.cu itself

// Cases that are not run but timed have names that begin with time-.
std::vector<std::string> ChooseNames();
bool RunChoose(const std::string& name, bool& known);
std::vector<std::string> DeltaNames();
bool RunDelta(const std::string& name, bool& known);
std::vector<std::string> DecodeNames();
bool RunDecode(const std::string& name, bool& known);
std::vector<std::string> ListsNames();
bool RunLists(const std::string& name, bool& known);
std::vector<std::string> MatmulNames();
bool RunMatmul(const std::string& name, bool& known);

}  // namespace jax_bsk::check
