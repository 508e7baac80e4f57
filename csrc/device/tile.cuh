// Tiles of rows in shared memory: padded layout, asynchronous loading, cleaning of non-finite values, storing.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/element.h"
#include "device/ptx/convert.cuh"
#include "device/ptx/copy_async.cuh"
#include "device/ptx/thread.cuh"

namespace jax_bsk::device {

// kRows rows of kDim elements, each followed by 16 unused bytes: eight consecutive rows of one column of 16-byte chunks
// then touch all 32 banks, and every address in a product is one register plus a constant. (An exclusive-or swizzle
// needs no padding, but the compiler kept some 24 addresses in registers and spilled.)
template <typename Element_, int kRows_, int kDim_>
struct alignas(16) Tile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kDim = kDim_;
  static constexpr int kPerChunk = 16 / sizeof(Element);
  static constexpr int kChunks = kDim / kPerChunk;
  static constexpr int kPitch = kChunks * 16 + 16;  // bytes from row to row
  static_assert(kChunks % 8 == 0);

  __device__ static int ChunkOffset(int row, int chunk) { return row * kPitch + chunk * 16; }
  __device__ char* Chunk(int row, int chunk) { return data + ChunkOffset(row, chunk); }
  __device__ const char* Chunk(int row, int chunk) const { return data + ChunkOffset(row, chunk); }

  // Where a lane's matrices begin: it has chunks in one row of each eight.
  class Lane {
   public:
    __device__ __forceinline__ Lane(const Tile& tile, int row, int chunk)
        : address_(SharedAddress(tile.data) + ChunkOffset(row, chunk)) {}
    // `rows` (a multiple of 8) further down and `chunks` (an even number) to the right.
    __device__ __forceinline__ uint32_t At(int rows, int chunks) const {
      return address_ + rows * kPitch + chunks * 16;
    }

   private:
    uint32_t address_;
  };

  char data[kRows * kPitch];
};

// The same as the copy engine lays it out: panels of 128 bytes of every row, one behind another, in which the chunks of
// row r lie at their number xor r % 8. Aligned to 1,024 bytes. kRows rows of a tile that has kPanelRows of them: from a
// multiple of 8 on they are a tile of their own.
template <typename Element_, int kRows_, int kDim_, int kPanelRows = kRows_>
struct SwizzledTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kDim = kDim_;
  static constexpr int kPerChunk = 16 / sizeof(Element);
  static constexpr int kChunks = kDim / kPerChunk;
  static constexpr int kPanelBytes = kPanelRows * 128;
  static constexpr int kPanels = kChunks / 8;
  static_assert(kChunks % 8 == 0 && kRows % 8 == 0);

  __device__ static int ChunkOffset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * 128 + (chunk ^ row) % 8 * 16;
  }
  __device__ char* Chunk(int row, int chunk) { return data + ChunkOffset(row, chunk); }
  __device__ const char* Chunk(int row, int chunk) const { return data + ChunkOffset(row, chunk); }

  // As Tile's; `chunk` is below 2, so that adding an even number does not carry.
  class Lane {
   public:
    __device__ __forceinline__ Lane(const SwizzledTile& tile, int row, int chunk)
        : address_(SharedAddress(tile.data) + ChunkOffset(row, chunk)) {}
    __device__ __forceinline__ uint32_t At(int rows, int chunks) const {
      return (address_ ^ (chunks % 8 * 16)) + chunks / 8 * kPanelBytes + rows * 128;
    }

   private:
    uint32_t address_;
  };

  char data[kPanels * kPanelBytes];
};

// Starts copying rows [0, rows) of `dim` elements, `stride` elements apart; zeros fill the rest of the tile, so that
// padding never carries a NaN into a product. rows >= 1.
template <int kThreads, typename T>
__device__ __forceinline__ void LoadTileAsync(T& tile, const typename T::Element* first, int stride, int rows, int dim,
                                              int thread) {
  static_assert(kThreads % T::kChunks == 0, "a thread stays in its column of chunks");
  constexpr int kRowStep = kThreads / T::kChunks;
  static_assert(T::kRows % kRowStep == 0);
  const int chunk = thread % T::kChunks, first_row = thread / T::kChunks;
  const bool in_dim = chunk * T::kPerChunk < dim;
  // Stepping the pointer costs an addition a row; row * stride for each row would be kept in registers across the
  // caller's loop. It may run past the array where nothing is read.
  const typename T::Element* source = first + int64_t{first_row} * stride + (in_dim ? chunk * T::kPerChunk : 0);
  const int64_t step = int64_t{kRowStep} * stride;
  const uint32_t base = SharedAddress(tile.data);
#pragma unroll
  for (int i = 0; i < T::kRows / kRowStep; ++i) {
    const int row = first_row + i * kRowStep;
    CopyAsync16(base + T::ChunkOffset(row, chunk), source, in_dim && row < rows);
    source += step;
  }
}

template <typename Element>
__device__ __forceinline__ bool HasNonFinite(const uint4& chunk) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  bool found = false;
#pragma unroll
  for (const uint32_t word : words) {
    if constexpr (std::is_same_v<Element, Int8>) {
      break;
    } else if constexpr (std::is_same_v<Element, Float8E4M3>) {
      found |= (((word & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) != 0;  // a NaN is all ones; there is no infinity
    } else if constexpr (sizeof(Element) == 4) {
      found |= (word & 0x7F800000u) == 0x7F800000u;
    } else {
      constexpr uint32_t kExponent = std::is_same_v<Element, Float16> ? 0x7C00u : 0x7F80u;
      found |= (word & kExponent) == kExponent || (word & (kExponent << 16)) == (kExponent << 16);
    }
  }
  return found;
}

// Zeroes the chunks of a tile that hold a NaN or an infinity and returns, to every thread, one bit for each row that
// had one. A masked pair contributes 0 * x to a product, which is 0 only if x is finite; the caller puts a NaN into the
// attended pairs of those rows instead. Contains barriers: all threads call it, after a barrier that made the tile
// visible. `flags` is zero before and after; a barrier must separate two calls with the same flags.
template <int kThreads, typename T>
__device__ __forceinline__ uint64_t CleanRows(T& tile, uint32_t (&flags)[2], int thread) {
  static_assert(T::kRows <= 64);
  bool found = false;
#pragma unroll 2
  for (int i = thread; i < T::kRows * T::kChunks; i += kThreads) {
    const int row = i / T::kChunks;
    uint4* chunk = reinterpret_cast<uint4*>(tile.Chunk(row, i % T::kChunks));
    if (HasNonFinite<typename T::Element>(*chunk)) {
      *chunk = make_uint4(0, 0, 0, 0);
      atomicOr(&flags[row / 32], 1u << (row % 32));
      found = true;
    }
  }
  if (!__syncthreads_or(found)) return 0;
  const uint64_t rows = flags[0] | static_cast<uint64_t>(flags[1]) << 32;
  __syncthreads();
  if (thread < 2) flags[thread] = 0;
  return rows;
}

// The end of one accumulator row: it is scaled, or replaced.
struct RowFinish {
  bool keep;
  float scale;  // when kept
  float fill;   // when not
  __device__ float operator()(float x) const { return keep ? x * scale : fill; }
};

// Writes a warp's 16 accumulated rows to global memory, `stride` elements apart, by way of rows row .. row+15 of a tile
// that only this warp uses any more (16-byte stores instead of 4-byte ones). Rows at and past `rows` are not written.
template <typename T, int kN8>
__device__ __forceinline__ void StoreRows(const float (&acc)[kN8][4], const RowFinish (&finish)[2], T& tile, int row,
                                          typename T::Element* first, int stride, int rows, int dim) {
  using Element = typename T::Element;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kN8; ++n) {
    const int byte = (n * 8 + 2 * t) * static_cast<int>(sizeof(Element));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      char* target = tile.Chunk(row + g + 8 * half, byte / 16) + byte % 16;
      const float low = finish[half](acc[n][2 * half]), high = finish[half](acc[n][2 * half + 1]);
      if constexpr (sizeof(Element) == 4) {
        *reinterpret_cast<float2*>(target) = make_float2(low, high);
      } else {
        *reinterpret_cast<uint32_t*>(target) = PackPair<Element>(low, high);
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * T::kChunks; i += 32) {
    const int r = i / T::kChunks, chunk = i % T::kChunks;
    if (row + r < rows && chunk * T::kPerChunk < dim) {
      *reinterpret_cast<uint4*>(first + int64_t{row + r} * stride + chunk * T::kPerChunk) =
          *reinterpret_cast<const uint4*>(tile.Chunk(row + r, chunk));
    }
  }
}

}  // namespace jax_bsk::device
