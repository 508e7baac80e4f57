# Cross-compiles for 64-bit ARM with Debian's g++-aarch64-linux-gnu, and runs what it built under qemu-user.
#
# CUDA programs compile and link as well (Grace Hopper; there is nothing here to run them on): JAX_BSK_CUDA=ON,
# CMAKE_CUDA_HOST_COMPILER=aarch64-linux-gnu-g++, CMAKE_CUDA_FLAGS="-target-dir sbsa-linux", and an nvcc beside a folder
# targets/sbsa-linux with `include` and `lib` of the aarch64 wheels nvidia-cuda-runtime, nvidia-cuda-crt, nvidia-cuda-cccl
# and nvidia-cuda-nvcc. Only the host compiler differs from an x86-64 build.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# The target's libc, libstdc++ and loader.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
