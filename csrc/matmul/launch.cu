// From params to a kernel: refusals, tensor maps, and the table of the kernels.
#include <algorithm>
#include <initializer_list>
#include <iterator>

#include "device/host.h"
#include "device/tensor_map.h"
#include "matmul/launch.h"
#include "matmul/plan.h"
#include "matmul/sm90/config.h"

namespace jax_bsk::matmul::cuda {
namespace {

using device::CeilDiv;
using device::DeviceFacts;
using device::DeviceScope;
using device::kMaxInt;
using sm90::kPiece;

std::string TypeRefusal(DType dtype) {
  if (dtype == DType::kBF16 || dtype == DType::kF16) return "";
  return "the CUDA products take float16 and bfloat16";
}

std::string BlockRefusal(std::initializer_list<int64_t> blocks) {
  for (const int64_t block : blocks) {
    if (block != 64 && block != 128) return "the CUDA products take blocks of 64 or 128, not " + std::to_string(block);
  }
  return "";
}

// `inner`: innermost dimensions of arrays that the copy engine reads or writes.
std::string ArrayRefusal(std::initializer_list<int64_t> inner, std::initializer_list<const void*> pointers,
                         std::initializer_list<int64_t> sizes) {
  for (const int64_t size : inner) {
    if (size % Limits::kMultiple != 0) {
      return "the CUDA products take arrays whose last dimension is a multiple of " +
             std::to_string(Limits::kMultiple) + ", not " + std::to_string(size);
    }
  }
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return "the CUDA products need arrays aligned to 16 bytes";
  }
  // Positions are 32-bit in the kernels; offsets in memory are 64-bit.
  for (const int64_t size : sizes) {
    if (size > kMaxInt - 4096)
      return "the CUDA products take sizes, blocks and tiles of which there are fewer than 2^31";
  }
  return "";
}

std::string DeviceRefusal(int device) {
  const DeviceScope scope(device);
  DeviceFacts facts;
  cudaError_t error = scope.error();
  if (error == cudaSuccess) error = device::ReadDevice(device, &facts);
  if (error != cudaSuccess) {
    return "CUDA device " + std::to_string(device) + " is not usable: " + cudaGetErrorString(error);
  }
  if (facts.capability == Limits::kComputeCapability) return "";
  return "the CUDA products need compute capability 9.0 (Hopper), and the device has " +
         std::to_string(facts.capability / 10) + "." + std::to_string(facts.capability % 10);
}

int64_t BlocksPerRow(const ProductParams& params) { return params.out_block == 64 ? 2 : 1; }
int64_t Rows(const ProductParams& params) { return CeilDiv(params.out_blocks, BlocksPerRow(params)); }
// Parts of the width that a cluster works on at a time.
int64_t Parts(const ProductParams& params) { return CeilDiv(params.width, sm90::kClusterColumns); }
int64_t PartsPerPanel(const ProductParams& params) {
  const int64_t bytes = std::max<int64_t>(params.in_length, 1) * sm90::kClusterColumns * 2;
  return std::clamp<int64_t>(sm90::kPanelBytes / bytes, 1, Parts(params));
}

// [batch, rows, columns], or [entries, bm, bk]; an array without elements has `other`'s address, which is never read.
bool MakeMap(DType dtype, const void* data, const void* other, int64_t batch, int64_t rows, int64_t columns,
             CUtensorMap* map, int box_rows = kPiece, int box_columns = kPiece) {
  const bool empty = batch * rows * columns == 0;
  const int64_t row = std::max<int64_t>(columns, Limits::kMultiple), matrix = std::max<int64_t>(rows, 1) * row;
  return device::sm90::MakeTensorMap(dtype, empty ? other : data, empty ? Limits::kMultiple : columns,
                                     {{rows, row}, {batch, matrix}, {1, std::max<int64_t>(batch, 1) * matrix}},
                                     box_rows, 1, map, box_columns);
}

// ---- The kernels: all that csrc/variants.py lists

using sm90::Layout;

template <typename Launch>
struct Variant {
  DType dtype;
  Layout left, right;
  Launch* launch;
};
using ProductLaunch = cudaError_t(const ProductParams&, const sm90::ProductPlan&, int, cudaStream_t);
using NarrowLaunch = cudaError_t(const ProductParams&, const sm90::NarrowPlan&, int, int, cudaStream_t);
using SampledLaunch = cudaError_t(const SampledParams&, const sm90::SampledPlan&, int, cudaStream_t);

#define JAX_BSK_PRODUCT(Element, left, right) \
  {device::kDType<Element>, left, right, sm90::LaunchProduct<Element, left, right>},
#define JAX_BSK_NARROW(Element, left, right)
#define JAX_BSK_SAMPLED(Element, left, right)
constexpr Variant<ProductLaunch> kProducts[] = {
#include "matmul/variants.inc"
};
#undef JAX_BSK_PRODUCT
#undef JAX_BSK_NARROW
#define JAX_BSK_PRODUCT(Element, left, right)
#define JAX_BSK_NARROW(Element, left, right) \
  {device::kDType<Element>, left, right, sm90::LaunchNarrow<Element, left, right>},
constexpr Variant<NarrowLaunch> kNarrow[] = {
#include "matmul/variants.inc"
};
#undef JAX_BSK_NARROW
#undef JAX_BSK_SAMPLED
#define JAX_BSK_NARROW(Element, left, right)
#define JAX_BSK_SAMPLED(Element, left, right) \
  {device::kDType<Element>, left, right, sm90::LaunchSampled<Element, left, right>},
constexpr Variant<SampledLaunch> kSampled[] = {
#include "matmul/variants.inc"
};
#undef JAX_BSK_PRODUCT
#undef JAX_BSK_NARROW
#undef JAX_BSK_SAMPLED

// The launcher for a type and the layouts of both operands; null where there is none.
template <typename Table>
auto Find(const Table& table, DType dtype, bool mn_major_left, bool mn_major_right) {
  const Layout left = mn_major_left ? Layout::kMnMajor : Layout::kKMajor;
  const Layout right = mn_major_right ? Layout::kMnMajor : Layout::kKMajor;
  const auto found = std::find_if(std::begin(table), std::end(table), [&](const auto& variant) {
    return variant.dtype == dtype && variant.left == left && variant.right == right;
  });
  return found == std::end(table) ? nullptr : found->launch;
}

}  // namespace

std::string ProductRefusal(const ProductParams& params, int device) {
  std::string reason = TypeRefusal(params.dtype);
  if (reason.empty()) reason = BlockRefusal({params.out_block, params.in_block});
  if (reason.empty()) {
    const int64_t in = params.dense_left ? params.in_length : params.width;
    const int64_t out = params.dense_left ? params.out_length : params.width;
    reason = ArrayRefusal({in, out}, {params.data, params.dense, params.out},
                          {params.in_length, params.out_length, params.width, params.matrix_batch * params.capacity,
                           params.batch * Parts(params) * Rows(params)});
  }
  return reason.empty() ? DeviceRefusal(device) : reason;
}

std::string SampledRefusal(const SampledParams& params, int device) {
  std::string reason = TypeRefusal(params.dtype);
  if (reason.empty()) reason = BlockRefusal({params.block_rows, params.block_columns});
  if (reason.empty()) {
    const int64_t left = params.left_transposed ? params.rows : params.depth;
    const int64_t right = params.right_transposed ? params.depth : params.columns;
    reason = ArrayRefusal({left, right}, {params.left, params.right, params.out},
                          {params.rows, params.columns, params.depth, params.batch * params.capacity,
                           params.capacity << (31 - sm90::kItemShift)});
  }
  return reason.empty() ? DeviceRefusal(device) : reason;
}

int64_t NarrowGroups(const ProductParams& params) { return CeilDiv(params.width, sm90::kNarrowColumns); }
int64_t NarrowCtas(const ProductParams& params) {
  const int64_t pieces = params.out_block / sm90::kNarrowRows;
  return params.batch * params.out_blocks * pieces * NarrowGroups(params) * sm90::kNarrowParts;
}

bool IsNarrow(const ProductParams& params) {
  return params.width <= Limits::kNarrowWidth && NarrowCtas(params) <= kMaxInt;
}

cudaError_t LaunchProduct(const ProductParams& params, int32_t* workspace, int device, cudaStream_t stream) {
  return IsNarrow(params) ? LaunchNarrow(params, device, stream) : LaunchWide(params, workspace, device, stream);
}

cudaError_t LaunchNarrow(const ProductParams& params, int device, cudaStream_t stream) {
  if (params.batch * params.out_length * params.width == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  const int64_t grid = NarrowCtas(params);
  if (grid > kMaxInt) return cudaErrorInvalidValue;

  sm90::NarrowPlan plan{};
  const bool left = params.dense_left, transposed = params.transposed;
  const int64_t bm = transposed ? params.in_block : params.out_block;
  const int64_t bk = transposed ? params.out_block : params.in_block;
  const int64_t width = params.width, in = params.in_length, batch = params.dense_batch;
  const int64_t entries = params.matrix_batch * params.capacity;
  const int columns = width <= 8 ? 8 : width <= 32 ? 32 : sm90::kNarrowColumns;  // of a tile
  // A stage is 64 of the contracted length and 64 rows. An array without elements has the result's address, which is
  // never read.
  if (!device::sm90::MakeTensorMap(params.dtype, entries == 0 ? params.out : params.data, kPiece,
                                   {{bm, bk}, {bk / kPiece, kPiece}, {entries, bm * bk}}, kPiece, 1, &plan.data) ||
      !(left ? MakeMap(params.dtype, params.dense, params.out, batch, width, in, &plan.dense, columns)
             : MakeMap(params.dtype, params.dense, params.out, batch, in, width, &plan.dense, kPiece, columns))) {
    return cudaErrorInvalidValue;
  }
  plan.shift = static_cast<int>(params.in_block) / kPiece - 1;
  plan.groups = static_cast<int>(NarrowGroups(params));
  const auto launch = Find(kNarrow, params.dtype, transposed, !left);
  return launch == nullptr ? cudaErrorNotSupported : launch(params, plan, columns, static_cast<int>(grid), stream);
}

cudaError_t LaunchWide(const ProductParams& params, int32_t* workspace, int device, cudaStream_t stream) {
  if (params.batch * params.out_length * params.width == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (const cudaError_t error = device::ReadDevice(device, &facts); error != cudaSuccess) return error;

  sm90::ProductPlan plan{};
  const bool left = params.dense_left, transposed = params.transposed;
  const int64_t bm = transposed ? params.in_block : params.out_block;
  const int64_t bk = transposed ? params.out_block : params.in_block;
  const int64_t width = params.width, in = params.in_length, out = params.out_length;
  plan.whole = left || (width % kPiece == 0 && params.dense_batch * in > 0);
  const bool encoded =
      MakeMap(params.dtype, params.data, params.out, params.matrix_batch * params.capacity, bm, bk, &plan.data) &&
      MakeMap(params.dtype, params.out, params.out, params.batch, left ? width : out, left ? out : width, &plan.out) &&
      (plan.whole && !left
           ? device::sm90::MakeTensorMap(params.dtype, params.dense, kPiece,
                                         {{in, width}, {width / kPiece, kPiece}, {params.dense_batch, in * width}},
                                         kPiece, sm90::kRightPieces, &plan.dense)
           : MakeMap(params.dtype, params.dense, params.out, params.dense_batch, left ? width : in, left ? in : width,
                     &plan.dense, left ? sm90::kTileColumns : kPiece));
  if (!encoded) return cudaErrorInvalidValue;
  plan.blocks_per_row = static_cast<int>(BlocksPerRow(params));
  plan.rows = static_cast<int>(Rows(params));
  plan.steps = static_cast<int>(params.in_block) / kPiece;
  const int64_t parts = Parts(params), panel_parts = PartsPerPanel(params);
  plan.work_count = static_cast<int>(params.batch * parts * plan.rows);
  plan.last_panel = static_cast<int>((parts - 1) / panel_parts);
  plan.batch_divider = device::sm90::Divider(parts * plan.rows);
  plan.panel_divider = device::sm90::Divider(panel_parts * plan.rows);
  plan.part_divider = device::sm90::Divider(panel_parts);
  plan.last_part_divider = device::sm90::Divider(parts - plan.last_panel * panel_parts);
  plan.work_counter = workspace;
  plan.order = workspace + 1;
  if (const cudaError_t error =
          LaunchOrderRows(params, plan.rows, plan.blocks_per_row, workspace, workspace + 1, stream);
      error != cudaSuccess) {
    return error;
  }
  const int clusters = std::max(1, facts.multiprocessors / sm90::kProductCluster);
  const int grid = sm90::kProductCluster * std::min(plan.work_count, clusters);
  // The dense operand is the right one here: N-major as it lies on the right of the matrix, K-major on the left.
  const auto launch = Find(kProducts, params.dtype, transposed, !left);
  return launch == nullptr ? cudaErrorNotSupported : launch(params, plan, grid, stream);
}

cudaError_t LaunchSampled(const SampledParams& params, int32_t* workspace, int device, cudaStream_t stream) {
  if (params.batch * params.capacity == 0) return cudaSuccess;
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceFacts facts;
  if (const cudaError_t error = device::ReadDevice(device, &facts); error != cudaSuccess) return error;

  sm90::SampledPlan plan{};
  const auto operand = [&](const void* data, int64_t batch, int64_t rows, int64_t columns, bool swap,
                           CUtensorMap* map) {
    return MakeMap(params.dtype, data, params.out, batch, swap ? columns : rows, swap ? rows : columns, map);
  };
  if (!operand(params.left, params.left_batch, params.rows, params.depth, params.left_transposed, &plan.left) ||
      !operand(params.right, params.right_batch, params.depth, params.columns, params.right_transposed, &plan.right) ||
      !MakeMap(params.dtype, params.out, params.out, params.batch * params.capacity, params.block_rows,
               params.block_columns, &plan.out)) {
    return cudaErrorInvalidValue;
  }
  plan.entries = sm90::kTileColumns / static_cast<int>(params.block_columns);
  plan.steps = static_cast<int>(CeilDiv(params.depth, kPiece));
  plan.count = workspace;
  plan.items = workspace + params.list_batch;
  if (const cudaError_t error =
          LaunchGroupEntries(params, plan.entries, sm90::kItemShift, workspace, workspace + params.list_batch,
                             workspace + params.list_batch * (1 + params.capacity), stream);
      error != cudaSuccess) {
    return error;
  }
  const int grid = static_cast<int>(std::min<int64_t>(params.batch * params.capacity, facts.multiprocessors));
  const auto launch = Find(kSampled, params.dtype, params.left_transposed, !params.right_transposed);
  return launch == nullptr ? cudaErrorNotSupported : launch(params, plan, grid, stream);
}

}  // namespace jax_bsk::matmul::cuda
