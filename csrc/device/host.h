// Questions of launchers to a device, on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "grid_limit.h"

namespace jax_bsk::device {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// Makes a device current for a scope; attributes and launches apply to the current one.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Facts of a device that the choice of a kernel and the refusals need.
struct DeviceFacts {
  int capability = 0;       // major * 10 + minor
  int multiprocessors = 0;  // or as many as a test allows
  int shared_bytes = 0;     // a CTA may have
};

inline cudaError_t ReadDevice(int device, DeviceFacts* facts) {
  int major = 0, minor = 0;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&facts->multiprocessors, cudaDevAttrMultiProcessorCount},
      {&facts->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
  };
  for (const auto& [value, attribute] : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device); error != cudaSuccess) return error;
  }
  facts->capability = major * 10 + minor;
  if (const int limit = grid_limit; limit > 0) facts->multiprocessors = std::min(facts->multiprocessors, limit);
  return cudaSuccess;
}

}  // namespace jax_bsk::device
