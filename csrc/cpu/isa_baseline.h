// The instruction set every machine of the target has: SSE2 on x86-64, NEON on arm64. No extra compile flags.
#pragma once

#define JAX_BSK_CPU_ISA baseline
#define JAX_BSK_CPU_VECTOR_BYTES 16
#if defined(__aarch64__)
#define JAX_BSK_CPU_ISA_NAME "neon"
#else
#define JAX_BSK_CPU_ISA_NAME "baseline"
#endif
