#include "decode/variants.h"

#include <algorithm>
#include <iterator>

#include "device/element.h"

namespace jax_bsk::decode::cuda {
namespace {

template <typename Cache>
constexpr CacheType kCacheType = CacheType::kSame;
template <>
inline constexpr CacheType kCacheType<device::Float8E4M3> = CacheType::kE4M3;
template <>
inline constexpr CacheType kCacheType<device::Int8> = CacheType::kInt8;

#define JAX_BSK_DECODE(Element, Cache, dim, keys)          \
  {keys,                                                   \
   device::kDType<Element>,                                \
   kCacheType<Cache>,                                      \
   dim,                                                    \
   SharedBytesAtMost<Config<Element, Cache, dim, keys>>(), \
   Launch<Config<Element, Cache, dim, keys>>},
constexpr Variant kVariants[] = {
#include "decode/variants.inc"
};
#undef JAX_BSK_DECODE

}  // namespace

const Variant* Choose(Keys keys, DType dtype, CacheType cache, int64_t dim) {
  const auto* found = std::find_if(std::begin(kVariants), std::end(kVariants), [&](const Variant& variant) {
    return variant.keys == keys && variant.dtype == dtype && variant.cache == cache && variant.dim >= dim;
  });
  return found == std::end(kVariants) ? nullptr : found;
}

}  // namespace jax_bsk::decode::cuda
