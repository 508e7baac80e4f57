// From sizes by name to the operations' own formulas; compiled into every library.
#include "workspace.h"

#include <initializer_list>
#include <stdexcept>
#include <utility>

#include "attention/sm90/bwd_plan.h"
#include "attention/workspace.h"
#include "decode/partials.h"
#include "lists/workspace.h"
#include "matmul/workspace.h"
#include "registrations.h"
#include "sizes.h"

namespace jax_bsk {
namespace {

using Sizes = std::map<std::string, int64_t>;

// Stores each of the named sizes, of which there are no others.
void Take(const Sizes& sizes, std::initializer_list<std::pair<const char*, int64_t*>> wanted) {
  for (const auto& [name, value] : wanted) {
    const auto found = sizes.find(name);
    if (found == sizes.end()) throw std::invalid_argument("jax_bsk: the workspace depends on " + std::string(name));
    *value = found->second;
  }
  if (sizes.size() != wanted.size()) throw std::invalid_argument("jax_bsk: the workspace does not depend on all sizes");
}

// distance_tables: of a bias by distance, 0 without one.
int64_t AttentionForward(const Sizes& sizes) {
  attention::Shape shape{};
  int64_t distance_tables = 0;
  Take(sizes, {{"batch", &shape.batch},
               {"heads", &shape.heads},
               {"kv_heads", &shape.kv_heads},
               {"q_len", &shape.q_len},
               {"kv_len", &shape.kv_len},
               {"value_dim", &shape.value_dim},
               {"block_q", &shape.block_q},
               {"distance_tables", &distance_tables}});
  return 4 * attention::cuda::ForwardWorkspace(shape, distance_tables);
}

// tables: block lists, of `capacity` entries each. gates: numbers in them, 0 for none. distance_tables: as above.
int64_t AttentionBackward(const Sizes& sizes) {
  attention::Shape shape{};
  int64_t tables = 0, capacity = 0, gates = 0, distance_tables = 0;
  Take(sizes, {{"batch", &shape.batch},
               {"heads", &shape.heads},
               {"kv_heads", &shape.kv_heads},
               {"q_len", &shape.q_len},
               {"kv_len", &shape.kv_len},
               {"head_dim", &shape.head_dim},
               {"block_q", &shape.block_q},
               {"block_kv", &shape.block_kv},
               {"tables", &tables},
               {"capacity", &capacity},
               {"gates", &gates},
               {"distance_tables", &distance_tables}});
  shape.q_blocks = BlocksOf(shape.q_len, shape.block_q);
  return attention::cuda::sm90::RecommendedBackwardBytes(shape, tables, capacity, gates, distance_tables);
}

// positions: keys that a sequence can visit at most, all of its pages or those selected.
int64_t DecodeForward(const Sizes& sizes) {
  decode::Shape shape{};
  int64_t short_part = 0, long_part = 0;
  Take(sizes, {{"groups", &shape.groups},
               {"tokens", &shape.tokens},
               {"heads", &shape.heads},
               {"kv_heads", &shape.kv_heads},
               {"value_dim", &shape.value_dim},
               {"seqs", &shape.seqs},
               {"positions", &shape.page_size},
               {"short_part", &short_part},
               {"long_part", &long_part}});
  shape.max_pages = 1;
  return decode::PartialLayout(shape, short_part, long_part).bytes;
}

int64_t ListsChoose(const Sizes& sizes) {
  lists::ChooseParams params{};
  Take(sizes, {{"tables", &params.tables},
               {"rows", &params.rows},
               {"blocks", &params.blocks},
               {"width", &params.width},
               {"group", &params.group}});
  return 4 * lists::cuda::ChooseWorkspace(params);
}

int64_t MatmulProduct(const Sizes& sizes) {
  matmul::ProductParams params{};
  Take(sizes, {{"matrix_batch", &params.matrix_batch}, {"out_blocks", &params.out_blocks}});
  return 4 * matmul::cuda::ProductWorkspace(params);
}

int64_t MatmulSampled(const Sizes& sizes) {
  matmul::SampledParams params{};
  Take(sizes, {{"list_batch", &params.list_batch}, {"capacity", &params.capacity}});
  return 4 * matmul::cuda::SampledWorkspace(params);
}

}  // namespace

int64_t WorkspaceBytes(const std::string& target, const Sizes& sizes) {
  if (target == kAttentionForward) return AttentionForward(sizes);
  if (target == kAttentionBackward) return AttentionBackward(sizes);
  if (target == kDecodeForward) return DecodeForward(sizes);
  if (target == kListsChoose) return ListsChoose(sizes);
  if (target == kMatmulProduct) return MatmulProduct(sizes);
  if (target == kMatmulSampled) return MatmulSampled(sizes);
  return 0;
}

}  // namespace jax_bsk
