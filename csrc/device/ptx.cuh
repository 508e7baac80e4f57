// The only home of inline PTX: one thin wrapper per instruction, named after what it does. First what sm_80 and newer
// have; at the end, in namespace sm90, what needs sm_90a (Hopper): barriers, bulk copies, warpgroup matrix products.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace jax_bsk::device {

// A pointer into shared memory as the 32-bit address that the instructions below take.
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read at this place: what is derived from it is not hoisted out of a loop, where it would hold registers.
__device__ __forceinline__ int ThreadHere() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Adds 1 to the count if x is at least `least`: a comparison and an addition under its predicate, where nvcc makes
// three instructions of `count += x >= least`.
__device__ __forceinline__ void CountAtLeast(int& count, uint32_t x, uint32_t least) {
  asm("{\n.reg .pred p;\nsetp.ge.u32 p, %1, %2;\n@p add.s32 %0, %0, 1;\n}" : "+r"(count) : "r"(x), "r"(least));
}

// cp.async: copies 16 bytes from global to shared memory without passing registers; writes zeros and reads nothing when
// `valid` is false. Both addresses are 16-byte aligned.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}

// Waits for all of this thread's copies; a barrier must follow before other threads read what was copied.
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ldmatrix: four 8x8 matrices of 16-bit elements. Lanes 8m .. 8m+7 give the addresses of the rows of matrix m; lane l
// receives elements 2(l%4), 2(l%4)+1 of row l/4 of matrix m in word m.
__device__ __forceinline__ void LoadMatrices(uint32_t (&words)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// As LoadMatrices, each matrix transposed: lane l receives rows 2(l%4), 2(l%4)+1 of column l/4.
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&words)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// mma.sync m16n8k16 with float32 accumulation. With g = lane / 4 and t = lane % 4 a lane holds
//   a0..a3: (row g, k 2t..), (row g+8, k 2t..), (row g, k 2t+8..), (row g+8, k 2t+8..)   pairs along k
//   b0, b1: (k 2t.., column g), (k 2t+8.., column g)                                     pairs along k
//   c0..c3: (row g, column 2t), (row g, 2t+1), (row g+8, 2t), (row g+8, 2t+1)
template <typename Element>
__device__ __forceinline__ void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<Element, __half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 2^x by the special function unit: relative error 2^-22; 2^-inf = 0, NaN stays NaN.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Hopper (sm_90a)
namespace sm90 {

// ---- mbarriers in shared memory. A barrier completes a phase when its count of arrivals and its announced bytes are
// in; phases alternate in parity, and a fresh barrier counts as having completed one of parity 1.
using Barrier = uint64_t;

__device__ __forceinline__ void InitBarrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void Arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(&barrier)) : "memory");
}
// Lets the phase wait for `bytes` of bulk copies more, without arriving.
__device__ __forceinline__ void Expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(bytes)
               : "memory");
}
// Arrives, and lets the phase wait for `bytes` of bulk copies as well.
__device__ __forceinline__ void ArriveExpecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&barrier)), "r"(bytes)
               : "memory");
}

// ---- Clusters: CTAs that run side by side and reach into each other's shared memory
__device__ __forceinline__ int ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all CTAs of the cluster.
__device__ __forceinline__ void SyncCluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The address, in another CTA of the cluster, of what lies at this place of its shared memory.
__device__ __forceinline__ uint32_t ClusterAddress(const void* pointer, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(SharedAddress(pointer)), "r"(rank));
  return address;
}
// Says that what this thread read of its own shared memory may be overwritten by another CTA's copies: of the order of
// what it wrote there nothing is said (a release at cluster scope is a fence: 470 instead of 600 TFLOP/s).
__device__ __forceinline__ void ArriveAt(Barrier& barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(ClusterAddress(&barrier, rank)) : "memory");
}
// A word into another CTA's shared memory, and an arrival at a barrier there that says so, for WaitForWord. (st.async,
// which does both, was seen to complete its barrier before the word could be read.)
__device__ __forceinline__ void SendWord(int& word, Barrier& barrier, int rank, int value) {
  asm volatile(
      "st.shared::cluster.s32 [%0], %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%2];" ::"r"(ClusterAddress(&word, rank)),
      "r"(value), "r"(ClusterAddress(&barrier, rank))
      : "memory");
}
// Waits for such a word.
__device__ __forceinline__ int WaitForWord(const int& word, Barrier& barrier, uint32_t parity) {
  int value;
  asm volatile(
      "{\n.reg .pred p;\n"
      "wait%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "@p bra done%=;\n"
      "bra wait%=;\n"
      "done%=: ld.volatile.shared.s32 %0, [%3];\n}"
      : "=r"(value)
      : "r"(SharedAddress(&barrier)), "r"(parity), "r"(SharedAddress(&word))
      : "memory");
  return value;
}

// Waits until the phase of this parity is complete. Built with JAX_BSK_DEBUG_BARRIERS, a wait of about a second names
// itself and stops the kernel: it finds a deadlock in minutes.
__device__ __forceinline__ void Wait(Barrier& barrier, uint32_t parity) {
#ifdef JAX_BSK_DEBUG_BARRIERS
  const long long start = clock64();
  while (true) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(SharedAddress(&barrier)), "r"(parity)
                 : "memory");
    if (done) return;
    if (clock64() - start > 2000000000ll) {
      if (threadIdx.x % 32 == 0) {
        printf("stuck: cta %d thread %d, barrier at shared %u, parity %u\n", blockIdx.x, threadIdx.x,
               SharedAddress(&barrier) & 0xFFFFFFu, parity);
      }
      __nanosleep(100000000);
      asm volatile("trap;");
    }
  }
#else
  asm volatile(
      "{\n.reg .pred p;\n"
      "wait%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done%=;\n"
      "bra wait%=;\n"
      "done%=:\n}" ::"r"(SharedAddress(&barrier)),
      "r"(parity)
      : "memory");
#endif
}

// True for one lane of a converged warp, always the same one. Takes no register between uses, as a stored lane would.
__device__ __forceinline__ bool ElectLane() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// Named barriers 1..15 among `threads` threads, for groups smaller than the CTA.
__device__ __forceinline__ void SyncNamed(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void ArriveNamed(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before what the copy engine and wgmma do with it later: its
// writes, which they read, and loads whose values nothing has waited for, when the copy engine writes there next.
__device__ __forceinline__ void FenceAsyncProxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Bulk copies
__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A box of a tensor of rank 4, first element at (c0, c1, c2, c3), innermost first; elements outside become zero.
__device__ __forceinline__ void LoadBox(void* shared, const CUtensorMap& map, Barrier& barrier, int c0, int c1, int c2,
                                        int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(SharedAddress(shared)),
      "l"(&map), "r"(SharedAddress(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// The same box to the same place of every CTA of the cluster in `mask`; each one's own barrier counts its bytes.
__device__ __forceinline__ void LoadBoxMulticast(void* shared, const CUtensorMap& map, Barrier& barrier, uint16_t mask,
                                                 int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(SharedAddress(shared)),
      "l"(&map), "r"(SharedAddress(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(mask)
      : "memory");
}
// A box from shared to global memory, as part of this thread's current group of stores; what lies outside the tensor is
// not written.
__device__ __forceinline__ void StoreBox(const CUtensorMap& map, const void* shared, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(SharedAddress(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
// Contiguous bytes; addresses and count are multiples of 16.
__device__ __forceinline__ void LoadBytes(void* shared, const void* global, Barrier& barrier, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   SharedAddress(shared)),
               "l"(global), "r"(bytes), "r"(SharedAddress(&barrier))
               : "memory");
}
// From shared to global memory, as part of this thread's current group of stores; addresses and count are multiples of
// 16. What was written with ordinary stores needs FenceAsyncProxy before.
__device__ __forceinline__ void StoreBytes(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(SharedAddress(shared)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CommitStores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory of all this thread's groups of stores but the last kPending has been read and may be written
// again.
template <int kPending>
__device__ __forceinline__ void WaitForStoresRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until all this thread's stores are in global memory.
__device__ __forceinline__ void WaitForStores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders ordinary and asynchronous accesses to global memory as well.
__device__ __forceinline__ void FenceAsyncProxyGlobal() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// stmatrix: four 8x8 matrices of 16-bit elements, the opposite of LoadMatrices.
__device__ __forceinline__ void StoreMatrices(uint32_t shared, const uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void StoreMatricesTransposed(uint32_t shared, const uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// ---- Words of global memory that CTAs signal with
__device__ __forceinline__ int LoadAcquire(const int32_t* word) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void AddRelease(int32_t* word, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// ---- Registers of a warpgroup's threads
template <int kRegisters>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Warpgroup matrix products: asynchronous, in order, in groups.
__device__ __forceinline__ void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are unfinished.
template <int kPending>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Pins values to registers at this point: arithmetic on them is not moved across it.
template <int kCount>
__device__ __forceinline__ void Pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void Pin(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
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
  struct Multiply<__nv_bfloat16, N> {                \
    JAX_BSK_WGMMA(N, "bf16.bf16", D, R, __VA_ARGS__) \
  };                                                 \
  template <>                                        \
  struct Multiply<__half, N> {                       \
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

}  // namespace sm90
}  // namespace jax_bsk::device
