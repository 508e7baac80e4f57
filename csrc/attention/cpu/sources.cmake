# Sources of the CPU kernels and the flags of each. The files are the same on every processor: one without its
# instruction set's flags compiles to nothing, and cpu.cc chooses among the others at run time.
get_filename_component(JAX_BSK_CPU_DIR "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
set(JAX_BSK_CPU_SOURCES
    ${JAX_BSK_CPU_DIR}/cpu.cc
    ${JAX_BSK_CPU_DIR}/cpu/isa_baseline.cc
    ${JAX_BSK_CPU_DIR}/cpu/isa_avx2.cc
    ${JAX_BSK_CPU_DIR}/cpu/isa_avx512.cc)
set_source_files_properties(${JAX_BSK_CPU_SOURCES} PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=fast")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(JAX_BSK_AVX2 -mavx2 -mfma -mf16c)
  set_property(SOURCE ${JAX_BSK_CPU_DIR}/cpu/isa_avx2.cc APPEND PROPERTY COMPILE_OPTIONS ${JAX_BSK_AVX2})
  set_property(SOURCE ${JAX_BSK_CPU_DIR}/cpu/isa_avx512.cc APPEND PROPERTY COMPILE_OPTIONS
               -mavx512f -mavx512bw -mavx512dq -mavx512vl ${JAX_BSK_AVX2})
endif()
