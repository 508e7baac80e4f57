// Numbers about logits that kernels of all operations agree on.
#pragma once

#include <limits>

namespace jax_bsk {

// The log-sum-exp of a query that attends to nothing, in the statistics type C: its least finite number, so that no
// result holds an infinity nobody asked for (jax_debug_infs looks for them). The backward reads -inf alike.
template <typename C>
constexpr C kNoLogSumExp = std::numeric_limits<C>::lowest();

// Below this scale (and for negative ones) a row's largest product need not be its largest logit, or the product of
// scale and log2(e) is denormal: kernels then scale first.
constexpr float kLeastPlainScale = 1e-30f;

}  // namespace jax_bsk
