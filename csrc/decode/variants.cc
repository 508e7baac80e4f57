#include "decode/variants.h"

#include <algorithm>
#include <iterator>

#include "device/element.h"

namespace jax_bsk::decode::cuda {
namespace {

#define JAX_BSK_DECODE(Element, dim, keys)                                              \
  {keys, device::kDType<Element>, dim, SharedBytesAtMost<Config<Element, dim, keys>>(), \
   Launch<Config<Element, dim, keys>>},
constexpr Variant kVariants[] = {
#include "decode/variants.inc"
};
#undef JAX_BSK_DECODE

}  // namespace

const Variant* Choose(Keys keys, DType dtype, int64_t dim) {
  const auto* found = std::find_if(std::begin(kVariants), std::end(kVariants), [&](const Variant& variant) {
    return variant.keys == keys && variant.dtype == dtype && variant.dim >= dim;
  });
  return found == std::end(kVariants) ? nullptr : found;
}

}  // namespace jax_bsk::decode::cuda
