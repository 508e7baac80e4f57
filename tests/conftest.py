"""The strict world of all tests: eight host devices, warnings as errors, no implicit promotion of types or ranks."""

from __future__ import annotations

import gc
import os
import sys
import threading

import jaxlib.version

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share a GPU's memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Most of the tests' time is JAX tracing and XLA compiling. Without LLVM's optimisations test_gates takes 166 s of the
# processor's time and not 288, and with modules compiled in one piece (on another machine) 85 and not 99; with the
# older of XLA's two ways to make loops all tests together take 18 minutes of it and not 26.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_gpu_enable_command_buffer=",  # a graph keeps its first launch's grid: jax_bsk/qa/testing/grid.py
        "--xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")  # as in JAX's own tests
# Tracing makes objects by the million, which live as long as they are cached: test_sparsek_attention takes 131 s and
# not 146 when they are looked through less often.
gc.set_threshold(200_000, 20, 50)


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=40, help="random cases an implementation in the numeric battery")
    parser.addoption("--seed", type=int, default=0, help="first seed of the random cases")


def pytest_generate_tests(metafunc):
    if "random_seed" in metafunc.fixturenames:
        first, count = metafunc.config.getoption("--seed"), metafunc.config.getoption("--cases")
        metafunc.parametrize("random_seed", range(first, first + count))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not os.environ.get("JAX_BSK_SLOW_TESTS"):
            item.add_marker(pytest.mark.skip(reason="slow: JAX_BSK_SLOW_TESTS=1 runs it"))
        if "gpu" in item.keywords and jax.default_backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


GPU_SECONDS = 300  # that a GPU test may take where it names no limit of its own: @pytest.mark.gpu(seconds=...)


@pytest.fixture(autouse=True)
def gpu_limit(request):
    """Ends the process when a GPU test does not end: nothing in Python can stop waiting for a kernel that hangs."""
    marker = request.node.get_closest_marker("gpu")
    if marker is None:
        yield
        return
    seconds = marker.kwargs.get("seconds", GPU_SECONDS)

    def give_up() -> None:
        if (capture := request.config.pluginmanager.getplugin("capturemanager")) is not None:
            capture.suspend_global_capture(in_=True)  # or nobody would read it
        print(f"{request.node.nodeid} does not end (limit {seconds} s)", file=sys.__stderr__, flush=True)
        os._exit(4)

    watchdog = threading.Timer(seconds, give_up)
    watchdog.daemon = True
    watchdog.start()
    yield
    watchdog.cancel()


@pytest.fixture(params=["cpu", "xla"])
def implementation(request) -> str:
    """Every implementation that runs on the CPU; the same tests hold for each."""
    return request.param
