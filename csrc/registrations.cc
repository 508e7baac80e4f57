// The operations of a library put together, compiled once into each library.
#include "registrations.h"

namespace jax_bsk {

Handlers Registrations() {
  Handlers all = attention::Registrations();
  all.merge(decode::Registrations());
  all.merge(lists::Registrations());
  all.merge(matmul::Registrations());
  return all;
}

CallBuffers Buffers() {
  CallBuffers all = attention::Buffers();
  all.merge(decode::Buffers());
  all.merge(lists::Buffers());
  all.merge(matmul::Buffers());
  return all;
}

Facts BuildInfo() {
  Facts all = attention::BuildInfo();
  all.merge(decode::BuildInfo());
  all.merge(lists::BuildInfo());
  all.merge(matmul::BuildInfo());
  for (const Facts& limits : {attention::CudaLimits(), decode::CudaLimits(), matmul::CudaLimits()}) {
    for (const auto& [name, fact] : limits) all["cuda_" + name] = fact;
  }
  return all;
}

}  // namespace jax_bsk
