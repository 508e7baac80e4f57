// x86-64 with AVX-512 F, BW, DQ and VL (Skylake-SP, 2017, and newer; Zen 4). Compile with
// -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c; without those flags (another processor) nothing is
// defined, and there are no kernels.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define JAX_BSK_CPU_ISA avx512
#define JAX_BSK_CPU_VECTOR_BYTES 64
#define JAX_BSK_CPU_ISA_NAME "avx512"
#endif
