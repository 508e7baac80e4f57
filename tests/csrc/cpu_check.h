// What the checks of cpu_check share: arrays of exactly their size, random values, workers and the permitted error.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dtype.h"

namespace jax_bsk::check {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// --- Elements
// ---------------------------------------------------------------------------------------------------------

inline int64_t Size(DType dtype) { return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2; }

// Half the spacing of numbers near 1.
inline double Rounding(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return 0x1p-11;
    case DType::kBF16:
      return 0x1p-8;
    case DType::kF32:
      return 0x1p-24;
    default:
      return 0x1p-53;
  }
}

inline double DecodeSmall(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? kNaN : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

struct AlignedDelete {
  void operator()(char* data) const { ::operator delete[](data, std::align_val_t{64}); }
};

// An array of exactly its size, of any of the types, read and written as double. Aligned as XLA's are: from 16 bytes
// off, every load of a 64-byte vector touches two cache lines, and the times say so.
struct Array {
  DType dtype = DType::kF32;
  int64_t size = 0;
  std::unique_ptr<char[], AlignedDelete> data;

  Array() = default;
  Array(DType dtype, int64_t size)
      : dtype(dtype), size(size), data(new (std::align_val_t{64}) char[size * Size(dtype)]) {
    std::memset(data.get(), 0xff, size * Size(dtype));  // NaN in every type: what a kernel leaves out is found
  }
  double operator[](int64_t i) const {
    const char* at = data.get() + i * Size(dtype);
    if (dtype == DType::kF64) return *reinterpret_cast<const double*>(at);
    if (dtype == DType::kF32) return *reinterpret_cast<const float*>(at);
    const uint16_t bits = *reinterpret_cast<const uint16_t*>(at);
    return dtype == DType::kF16 ? DecodeSmall(bits, 5, 10) : DecodeSmall(bits, 8, 7);
  }
  // Rounds by truncation for the small types: any value will do for inputs.
  void Set(int64_t i, double x) {
    char* at = data.get() + i * Size(dtype);
    if (dtype == DType::kF64) {
      *reinterpret_cast<double*>(at) = x;
    } else if (dtype == DType::kF32) {
      *reinterpret_cast<float*>(at) = static_cast<float>(x);
    } else {
      const float narrow = static_cast<float>(x);
      uint32_t bits;
      std::memcpy(&bits, &narrow, 4);
      uint16_t small = static_cast<uint16_t>(bits >> 16);
      if (dtype == DType::kF16) {
        const uint16_t sign = small & 0x8000;
        const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
        if (exponent == 128) {
          small = sign | 0x7c00 | (bits & 0x7fffff ? 0x200 : 0);
        } else if (exponent >= -14) {
          small = sign | (exponent + 15) << 10 | (bits >> 13 & 0x3ff);
        } else {
          small = sign | static_cast<uint16_t>(std::fabs(std::ldexp(narrow, 24)));
        }
      }
      std::memcpy(at, &small, 2);
    }
  }
};

template <class T>
std::unique_ptr<T[]> Exact(const std::vector<T>& from) {
  std::unique_ptr<T[]> to(new T[from.size()]);
  for (size_t i = 0; i < from.size(); ++i) to[i] = from[i];  // GCC 13 at -O3 mistakes the size of a std::copy here
  return to;
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool Chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine_) < p; }
  double Normal() { return std::normal_distribution<double>(0, 1)(engine_); }
  template <class T>
  T Pick(std::initializer_list<T> from) {
    return from.begin()[Int(0, from.size() - 1)];
  }

  Array Normals(DType dtype, int64_t size) {
    Array result(dtype, size);
    for (int64_t i = 0; i < size; ++i) result.Set(i, Normal());
    return result;
  }

 private:
  std::mt19937_64 engine_;
};

inline void Spoil(Random& random, Array& array, int64_t times) {
  for (int64_t t = 0; t < times && array.size > 0; ++t) {
    array.Set(random.Int(0, array.size - 1), random.Pick<double>({kNaN, kNaN, kInf, -kInf}));
  }
}

// --- Runs

template <class Params>
void Run(const Params& params, int64_t tasks, bool (*run)(const Params&, std::atomic<int64_t>&) noexcept, int workers) {
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int w = 1; w < workers; ++w) threads.emplace_back([&] { (void)run(params, next); });
  (void)run(params, next);
  for (std::thread& thread : threads) thread.join();
}

// Permitted error of a result whose terms' absolute values sum to `terms`: rounding to the type, and of the sums.
inline double Allowed(DType type, DType computed, double value, double terms) {
  const double fine = computed == DType::kF64 ? 0x1p-53 : 0x1p-24;
  const double smallest = type == DType::kF16 ? 0x1p-24 : type == DType::kF64 ? 1e-300 : 1e-35;
  return Rounding(type) * std::fabs(value) * 1.01 + 40 * fine * terms + smallest;
}

// Whether run(workers) writes the same bits into `result` again with three workers.
template <class Run>
bool Repeats(const char* name, Array& result, const Run& run) {
  const int64_t bytes = result.size * Size(result.dtype);
  const std::string before(result.data.get(), bytes);
  std::memset(result.data.get(), 0xff, bytes);
  run(3);
  if (std::memcmp(before.data(), result.data.get(), bytes) == 0) return true;
  std::printf("%s differs with three workers\n", name);
  return false;
}

// The best time of run() in seconds.
template <class Run>
double BestSeconds(const Run& run) {
  double best = kInf;
  double spent = 0;
  for (int repeat = 0; repeat < 100 && (repeat < 5 || spent < 1.5); ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::fmin(best, seconds);
    spent += seconds;
  }
  return best;
}

// --- What is beside attention's forward and backward, which are in cpu_check.cc itself

bool CheckChoose(uint64_t seed);
bool CheckDecode(uint64_t seed);
bool CheckDelta(uint64_t seed);
bool CheckLists(uint64_t seed);
bool CheckMatmul(uint64_t seed);
void TimeDecode();
void TimeMatmul();

}  // namespace jax_bsk::check
