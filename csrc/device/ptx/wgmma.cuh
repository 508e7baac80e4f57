// Warpgroup matrix products (wgmma, sm_90a): asynchronous, in order, in groups.
#pragma once

#include <cstdint>

#include "device/element.h"
#include "device/ptx/thread.cuh"

namespace jax_bsk::device::sm90 {

__device__ __forceinline__ void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are unfinished.
template <int kPending>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Matrix descriptor of a tile with 128-byte swizzle: chunks of 64 columns, each row of a chunk 128 bytes, chunks
// aligned to 1024 bytes. It is kept as its low word, address / 16 | chunk stride / 16 << 16, to which byte offsets / 16
// are added (shared memory ends below 2^18, so nothing carries): two instructions a product, not a dozen.
//   K-major (queries; keys): 32 bytes further for each 16 of k inside a chunk; the chunk stride is not used.
//   N-major (values, k = rows): 2048 bytes further for each 16 rows; the chunk stride is that between 64 columns.
// In a cluster the address carries the CTA's rank above bit 24, hence the mask.
__device__ __forceinline__ uint32_t TileDescriptor(const void* tile, int chunk_stride = 0) {
  return ((SharedAddress(tile) & 0x3FFFF) >> 4) | static_cast<uint32_t>(chunk_stride >> 4) << 16;
}
__device__ __forceinline__ uint64_t FullDescriptor(uint32_t low) {
  uint64_t descriptor;  // 1024 bytes between groups of eight rows; swizzle mode 1 = 128 bytes
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"((1024u >> 4) | (1u << 30)));
  return descriptor;
}

// The same of a K-major tile without swizzle, of 16 columns: cores of 8 rows and 8 columns lie together, `row_stride`
// bytes from those of the next 8 rows and `column_stride` from those of the other 8 columns.
__device__ __forceinline__ uint64_t PlainDescriptor(const void* tile, int column_stride, int row_stride) {
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};"
      : "=l"(descriptor)
      : "r"(((SharedAddress(tile) & 0x3FFFF) >> 4) | static_cast<uint32_t>(column_stride >> 4) << 16),
        "r"(row_stride >> 4));
  return descriptor;
}

// d[64 x N] = a b or d += a b, float32 accumulators. A thread of warp w (of the four) holds, for each eight
// columns n, d[4n .. 4n+3] = (row 16w + g, column 8n + 2t), (.., + 1), (row + 8, ..), (row + 8, .. + 1) with
// g = lane / 4, t = lane % 4; four words of `a` in registers are its share of rows x 16 of k, as for
// MultiplyAccumulate.
//   Overwrite: a and b in shared memory, b K-major; what d held does not matter, also to the compiler.
//   OverwriteRegisters: the same with a in registers.      Shared / Registers: the same, accumulating.
//   RegistersTransposed: a in registers, b N-major, accumulating.
//   SharedTransposed: a M-major and b N-major, both in shared memory, accumulating.
//   Any<kTransposeA, kTransposeB>: both in shared memory, each either way (true: M-major, N-major); d is overwritten
//   where `accumulate` is 0.
template <typename Element, int kN>
struct Multiply;

#define JAX_BSK_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define JAX_BSK_D8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define JAX_BSK_D16(c, i) JAX_BSK_D8(c, i), JAX_BSK_D8(c, i + 8)
#define JAX_BSK_D32(c, i) JAX_BSK_D16(c, i), JAX_BSK_D16(c, i + 16)
#define JAX_BSK_D48(c, i) JAX_BSK_D32(c, i), JAX_BSK_D16(c, i + 32)
#define JAX_BSK_D64(c, i) JAX_BSK_D32(c, i), JAX_BSK_D32(c, i + 32)
#define JAX_BSK_D128(c, i) JAX_BSK_D64(c, i), JAX_BSK_D64(c, i + 64)
#define JAX_BSK_R32 JAX_BSK_TEN() JAX_BSK_TEN(1) JAX_BSK_TEN(2) "%30, %31"
#define JAX_BSK_R48 JAX_BSK_TEN() JAX_BSK_TEN(1) JAX_BSK_TEN(2) JAX_BSK_TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_BSK_R64 \
  JAX_BSK_TEN() JAX_BSK_TEN(1) JAX_BSK_TEN(2) JAX_BSK_TEN(3) JAX_BSK_TEN(4) JAX_BSK_TEN(5) "%60, %61, %62, %63"
#define JAX_BSK_R128 \
  JAX_BSK_TEN() JAX_BSK_TEN(1) JAX_BSK_TEN(2) JAX_BSK_TEN(3) JAX_BSK_TEN(4) JAX_BSK_TEN(5) JAX_BSK_TEN(6)         \
  JAX_BSK_TEN(7) JAX_BSK_TEN(8) JAX_BSK_TEN(9) JAX_BSK_TEN(10) JAX_BSK_TEN(11) "%120, %121, %122, %123, %124, "   \
                                                                               "%125, %126, %127"
// o0 .. o4: the numbers of the operands after the accumulators.
#define JAX_BSK_WGMMA(N, TYPE, D, R, o0, o1, o2, o3, o4)                                                               \
  static __device__ __forceinline__ void Overwrite(float (&d)[N / 2], uint64_t a, uint64_t b) {                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" R \
                 "}, %" #o0 ", %" #o1 ", p, 1, 1, 0, 0;\n}"                                                            \
                 : D("=f", 0)                                                                                          \
                 : "l"(a), "l"(b));                                                                                    \
  }                                                                                                                    \
  static __device__ __forceinline__ void Shared(float (&d)[N / 2], uint64_t a, uint64_t b) {                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" R \
                 "}, %" #o0 ", %" #o1 ", p, 1, 1, 0, 0;\n}"                                                            \
                 : D("+f", 0)                                                                                          \
                 : "l"(a), "l"(b));                                                                                    \
  }                                                                                                                    \
  static __device__ __forceinline__ void OverwriteRegisters(float (&d)[N / 2], const uint32_t* a, uint64_t b) {        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" R \
                 "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, 0;\n}"                               \
                 : D("=f", 0)                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }                                                                                                                    \
  static __device__ __forceinline__ void Registers(float (&d)[N / 2], const uint32_t* a, uint64_t b) {                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" R \
                 "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, 0;\n}"                               \
                 : D("+f", 0)                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }                                                                                                                    \
  static __device__ __forceinline__ void RegistersTransposed(float (&d)[N / 2], const uint32_t* a, uint64_t b) {       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" R \
                 "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, 1;\n}"                               \
                 : D("+f", 0)                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }                                                                                                                    \
  static __device__ __forceinline__ void SharedTransposed(float (&d)[N / 2], uint64_t a, uint64_t b) {                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" R \
                 "}, %" #o0 ", %" #o1 ", p, 1, 1, 1, 1;\n}"                                                            \
                 : D("+f", 0)                                                                                          \
                 : "l"(a), "l"(b));                                                                                    \
  }                                                                                                                    \
  template <bool kTransposeA, bool kTransposeB>                                                                        \
  static __device__ __forceinline__ void Any(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 " {" R "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 ";\n}"                                       \
                 : D("+f", 0)                                                                                          \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA ? 1 : 0), "n"(kTransposeB ? 1 : 0));               \
  }
#define JAX_BSK_MULTIPLY(N, D, R, ...)               \
  template <>                                        \
  struct Multiply<BFloat16, N> {                     \
    JAX_BSK_WGMMA(N, "bf16.bf16", D, R, __VA_ARGS__) \
  };                                                 \
  template <>                                        \
  struct Multiply<Float16, N> {                      \
    JAX_BSK_WGMMA(N, "f16.f16", D, R, __VA_ARGS__)   \
  };
JAX_BSK_MULTIPLY(64, JAX_BSK_D32, JAX_BSK_R32, 32, 33, 34, 35, 36)
JAX_BSK_MULTIPLY(96, JAX_BSK_D48, JAX_BSK_R48, 48, 49, 50, 51, 52)
JAX_BSK_MULTIPLY(128, JAX_BSK_D64, JAX_BSK_R64, 64, 65, 66, 67, 68)
JAX_BSK_MULTIPLY(256, JAX_BSK_D128, JAX_BSK_R128, 128, 129, 130, 131, 132)

#undef JAX_BSK_TEN
#undef JAX_BSK_D8
#undef JAX_BSK_D16
#undef JAX_BSK_D32
#undef JAX_BSK_D48
#undef JAX_BSK_D64
#undef JAX_BSK_D128
#undef JAX_BSK_R32
#undef JAX_BSK_R48
#undef JAX_BSK_R64
#undef JAX_BSK_R128
#undef JAX_BSK_WGMMA
#undef JAX_BSK_MULTIPLY

}  // namespace jax_bsk::device::sm90
