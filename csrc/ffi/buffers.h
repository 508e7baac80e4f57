// The buffers of a custom call by name. XLA hands them to a handler by position; this is the one place where positions
// become names, for all calls and platforms.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ffi/checks.h"
#include "registrations.h"

namespace jax_bsk {

// The role of a buffer in its call. The optional ones have a last dimension of 0 where there is nothing to pass.
enum class BufferKind { kOperand, kOptionalOperand, kResult, kOptionalResult };

struct BufferEntry {
  const char* name;
  BufferKind kind;
  constexpr bool is_result() const { return kind == BufferKind::kResult || kind == BufferKind::kOptionalResult; }
};

// True if an optional buffer has anything in it.
inline bool IsGiven(const Operand& buffer) { return buffer.dimensions().back() != 0; }

// Defines struct Name from a call's table of buffers: a macro that calls its argument with (kind, name) for each of
// them, in the order in which the call passes them, operands before results. The struct has a member of each name.
#define JAX_BSK_BUFFERS(Name, TABLE)                                       \
  struct Name {                                                            \
    TABLE(JAX_BSK_BUFFER_MEMBER)                                           \
    static constexpr BufferEntry kTable[] = {TABLE(JAX_BSK_BUFFER_ENTRY)}; \
  }
#define JAX_BSK_BUFFER_MEMBER(kind, name) Operand name;
#define JAX_BSK_BUFFER_ENTRY(kind, name) {#name, BufferKind::kind},

// On CUDA a call has one more result, behind the others: memory for the kernels to use, which nobody reads.
template <typename Buffers_>
struct WithWorkspace {
  using Buffers = Buffers_;
  Buffers buffers;
  Operand workspace;
};

template <typename Buffers, bool kResults>
constexpr size_t CountBuffers() {
  size_t count = 0;
  for (const BufferEntry& entry : Buffers::kTable) count += entry.is_result() == kResults;
  return count;
}

// A binding cannot be moved, so that each step returns a new one.
template <size_t kCount, typename Binding>
auto BindOperands(Binding&& binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Arg<Operand>();
  } else {
    return BindOperands<kCount - 1>(std::move(binding).template Arg<Operand>());
  }
}

template <size_t kCount, typename Binding>
auto BindResults(Binding&& binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Ret<Operand>();
  } else {
    return BindResults<kCount - 1>(std::move(binding).template Ret<Operand>());
  }
}

// Binds a call's attributes and buffers behind the context arguments of a platform. XLA checks their numbers.
template <typename Buffers, typename Attributes, typename Binding>
auto BindCall(Binding&& binding) {
  return BindResults<CountBuffers<Buffers, true>()>(
      BindOperands<CountBuffers<Buffers, false>()>(std::move(binding).template Attrs<Attributes>()));
}

inline const Operand& Unwrap(const Operand& operand) { return operand; }
inline const Operand& Unwrap(Output& result) { return *result; }

// A function for XLA of a handler that has its buffers by name, in front of the context arguments and attributes.
template <typename Buffers, typename Result, typename... Context>
auto ByName(Result (*handler)(const Buffers&, Context...)) {
  return [handler](Context... context, auto... buffers) {
    return handler(Buffers{Unwrap(buffers)...}, std::move(context)...);
  };
}

// The names of a call's buffers, for Python's tests to compare.
template <typename Buffers>
BufferNames NamesOf(bool has_workspace = false) {
  BufferNames names{{"operands", {}}, {"results", {}}, {"optional", {}}};
  for (const BufferEntry& entry : Buffers::kTable) {
    names[entry.is_result() ? "results" : "operands"].push_back(entry.name);
    if (entry.kind == BufferKind::kOptionalOperand || entry.kind == BufferKind::kOptionalResult) {
      names["optional"].push_back(entry.name);
    }
  }
  if (has_workspace) names["results"].push_back("workspace");
  return names;
}

}  // namespace jax_bsk
