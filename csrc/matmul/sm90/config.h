// Tile shapes of the Hopper products (TMA + wgmma, sm_90a), what the host plans for a launch, and the launchers. No
// kernel code here, so that launch.cu compiles in a moment.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "device/element.h"
#include "device/ring.cuh"
#include "matmul/params.h"

namespace jax_bsk::matmul::cuda::sm90 {

// Everything is copied in pieces of 64 x 64 elements: a row is 128 bytes, swizzled as a whole.
constexpr int kPiece = 64;
constexpr int kPieceElements = kPiece * kPiece;
constexpr int kPieceBytes = 2 * kPieceElements;

// A CTA's tile of the result: up to 128 rows x 256 columns, 64 rows each (or 128 columns each) for two warpgroups. A
// stage is 64 of the contracted length: two pieces of the left operand, four of the right.
constexpr int kTileColumns = 256;
constexpr int kLeftPieces = 2;
constexpr int kRightPieces = kTileColumns / kPiece;
constexpr int kStages = 4;

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kConsumerRegisters = 216;
constexpr int kProducerRegisters = 504 - 2 * kConsumerRegisters;

// CTAs that compute neighbouring column tiles of one row of blocks and share its blocks by multicast.
constexpr int kProductCluster = 2;
constexpr int kClusterColumns = kProductCluster * kTileColumns;
// As many columns make a panel as its part of the dense operand has bytes of L2 to stay in (50 MB in all, and what all
// multiprocessors read lies in both of its halves). At 8192^3 and 22 % panels of 8, 16 and 32 MiB read 556, 523 and
// 614 MB of device memory; 16 is 2 % faster than 8.
constexpr int64_t kPanelBytes = 16 << 20;

// Numbers that the host computes for a launch of the product, beside the parameters. A row here is a CTA's work: one
// out block, or two of 64.
struct ProductPlan {
  CUtensorMap data, out;  // (column, row, entry or batch)
  CUtensorMap dense;      // the same; a whole N-major one (column of 64, row, 64 columns, batch)
  bool whole;             // a tile's dense operand is one box: K-major, or of whole 64 columns
  int rows;               // a batch: ceil(out_blocks / blocks_per_row)
  int blocks_per_row;     // 1 or 2
  int steps;              // of 64 in a block: in_block / 64
  int work_count;         // batch * rows * parts of all panels
  int last_panel;         // the number of the last one
  // By the work indices of a batch and of a panel; by the parts of a panel, of a cluster's columns each, and of the
  // last one.
  device::sm90::Divider batch_divider, panel_divider, part_divider, last_part_divider;
  int32_t* work_counter;  // the next row to be taken
  const int32_t* order;   // [matrix_batch, rows]: rows, longest first
};

// The same for the sampled product. An item is some entries of one row of blocks.
struct SampledPlan {
  CUtensorMap left, right, out;
  int entries;           // of an item at most: 256 / block_columns
  int steps;             // of 64 in the contracted length
  const int32_t* count;  // [list_batch]: items
  const int32_t* items;  // [list_batch, capacity]: first entry | (entries - 1) << kItemShift, largest first
};
constexpr int kItemShift = 28;

// ---- Products of few columns: a cluster has 64 rows of one out block x up to 64 columns, and its CTAs divide the
// entries of the block, whatever the problem and the device: the bits of a result depend on its own list alone.
constexpr int kNarrowRows = kPiece;  // of a tile: a block of 128 has two
constexpr int kNarrowColumns = 64;   // of a tile at most
constexpr int kNarrowParts = 2;      // CTAs of a cluster
constexpr int kNarrowConsumers = 4;  // warps
constexpr int kNarrowThreads = 32 * (kNarrowConsumers + 1);
// CTAs that share a multiprocessor, and what the stages of each take of its 228 KB: some 200 KB are under way, where
// the memory needs about 40 at all times. So late CTAs go on at the memory's speed when others are done.
constexpr int kNarrowResident = 2;
constexpr int kNarrowRingBytes = (216 << 10) / kNarrowResident;

struct NarrowPlan {
  CUtensorMap data;   // (column of 64, row, 64 columns, entry)
  CUtensorMap dense;  // (column, row, batch)
  int shift;          // log2 of the stages of a block: in_block / 64
  int groups;         // of 64 columns
};

// Which index of an operand runs through neighbouring elements: the contracted one, or the one that it shares with the
// result (M of the left operand, N of the right one).
enum class Layout { kKMajor, kMnMajor };

template <typename Element, Layout kLeft, Layout kRight>
cudaError_t LaunchProduct(const ProductParams& params, const ProductPlan& plan, int grid, cudaStream_t stream);
template <typename Element, Layout kLeft, Layout kRight>
cudaError_t LaunchNarrow(const ProductParams& params, const NarrowPlan& plan, int columns, int grid,
                         cudaStream_t stream);
template <typename Element, Layout kLeft, Layout kRight>
cudaError_t LaunchSampled(const SampledParams& params, const SampledPlan& plan, int grid, cudaStream_t stream);

}  // namespace jax_bsk::matmul::cuda::sm90
