# jax_bsk on NVIDIA GPUs, in the steps of the README: the system's packages, the build, the tests.
#
#     docker build -t jax_bsk .                           # compiles both libraries: about 10 minutes on two cores
#     docker run --gpus all jax_bsk                       # python -m jax_bsk info
#     docker run --gpus all -it jax_bsk make test CUDA=1  # the tests, on the GPU
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# The distribution's newest packages on purpose: it removes a version once it has mended it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /jax_bsk
COPY . .

# There is no GPU while an image is built: GPU=1 has JAX's CUDA plugin installed all the same.
RUN make build CUDA=1 GPU=1

ENV PATH="/jax_bsk/.venv/bin:$PATH"
CMD ["python", "-m", "jax_bsk", "info"]
