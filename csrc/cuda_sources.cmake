# Sources of the CUDA kernels and of what launches them, for the library and for its checks.
set(JAX_BSK_CUDA_CSRC "${CMAKE_CURRENT_LIST_DIR}")

# Calls variants.py, with options beyond the folder, and sets
#   JAX_BSK_PORTABLE_SOURCES  compiled for every architecture; they include files of the folder
#   JAX_BSK_HOPPER_SOURCES    compiled for sm_90a alone
#   JAX_BSK_VARIANTS          the number of variants
macro(jax_bsk_write_variants folder)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${JAX_BSK_CUDA_CSRC}/variants.py")
  execute_process(COMMAND "${Python_EXECUTABLE}" "${JAX_BSK_CUDA_CSRC}/variants.py" "${folder}" ${ARGN}
                  COMMAND_ERROR_IS_FATAL ANY)
  include("${folder}/variants.cmake")
  set(JAX_BSK_PORTABLE_SOURCES ${JAX_BSK_PORTABLE_INSTANCES})
  foreach(source attention/bias_gradient.cu attention/delta.cu attention/few_queries.cc attention/gates.cu attention/launch.cc attention/refusals.cc attention/variants.cc decode/launch.cc decode/variants.cc lists/choose.cu
                 lists/transpose.cu matmul/launch.cu)
    list(APPEND JAX_BSK_PORTABLE_SOURCES "${JAX_BSK_CUDA_CSRC}/${source}")
  endforeach()
  set(JAX_BSK_HOPPER_SOURCES ${JAX_BSK_HOPPER_INSTANCES} "${JAX_BSK_CUDA_CSRC}/attention/prepare.cu"
      "${JAX_BSK_CUDA_CSRC}/attention/bias_lines.cu" "${JAX_BSK_CUDA_CSRC}/attention/sm90/bias_gradient.cu"
      "${JAX_BSK_CUDA_CSRC}/matmul/plan.cu")
endmacro()
