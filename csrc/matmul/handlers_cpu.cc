// XLA FFI handlers of the block-sparse products on the CPU: buffers -> checked parameters -> workers on XLA's thread
// pool.
#include "ffi/pool.h"
#include "matmul/buffers.h"
#include "matmul/cpu.h"
#include "registrations.h"

namespace jax_bsk::matmul {
namespace {

ffi::Future Product(const ProductBuffers& buffers, ffi::ThreadPool pool, ProductAttributes attributes) {
  ProductParams params{};
  ffi::Error error = ReadProduct(buffers, attributes, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::ProductTasks(params), &cpu::RunProductTasks);
}

ffi::Future Sampled(const SampledBuffers& buffers, ffi::ThreadPool pool, SampledAttributes attributes) {
  SampledParams params{};
  ffi::Error error = ReadSampled(buffers, attributes, &params);
  if (error.success()) error = Refusal(cpu::Refusal(params));
  if (error.failure()) return Completed(error);
  return RunOnPool(pool, params, cpu::SampledTasks(params), &cpu::RunSampledTasks);
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

XLA_FFI_DEFINE_HANDLER(kProduct, ByName(Product), (BindCall<ProductBuffers, ProductAttributes>(Bind())));
XLA_FFI_DEFINE_HANDLER(kSampled, ByName(Sampled), (BindCall<SampledBuffers, SampledAttributes>(Bind())));

}  // namespace

Handlers Registrations() { return {{kMatmulProduct, kProduct}, {kMatmulSampled, kSampled}}; }

CallBuffers Buffers() {
  return {{kMatmulProduct, NamesOf<ProductBuffers>()}, {kMatmulSampled, NamesOf<SampledBuffers>()}};
}

Facts BuildInfo() {
  return {{"matmul_dtypes", std::vector<std::string>{"float16", "bfloat16", "float32", "float64"}},
          {"matmul_max_block", cpu::kMaxBlock}};
}

}  // namespace jax_bsk::matmul
