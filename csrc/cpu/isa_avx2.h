// x86-64 with AVX2, FMA and F16C (Haswell, 2013, and newer). Compile with -mavx2 -mfma -mf16c; without those flags
// (another processor) nothing is defined, and there are no kernels.
#pragma once

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define JAX_BSK_CPU_ISA avx2
#define JAX_BSK_CPU_VECTOR_BYTES 32
#define JAX_BSK_CPU_ISA_NAME "avx2"
#endif
