"""Other work on a GPU while a test runs there, so that its kernels' CTAs start, wait and finish in another order.

JAX runs all programs of a device on one stream, one after the other, whichever thread launches them: a second thread
of JAX calls would run between the kernels and never beside them. So this talks to the CUDA driver: a thread with a
stream of its own takes random numbers of multiprocessors away for random times, and writes through the L2 cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
from collections.abc import Iterator

# Holds its multiprocessors for `cycles`: with so much shared memory, no CTA of another kernel fits beside one of it.
HOLD = b"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry hold(.param .u64 cycles) {
  .reg .u64 %rd<4>;
  .reg .pred %p;
  ld.param.u64 %rd0, [cycles];
  mov.u64 %rd1, %clock64;
again:
  mov.u64 %rd2, %clock64;
  sub.u64 %rd3, %rd2, %rd1;
  setp.lt.u64 %p, %rd3, %rd0;
  @%p bra again;
  ret;
}
"""
L2_BYTES = 64 << 20
MULTIPROCESSOR_COUNT, MAX_SHARED_MEMORY = 16, 97  # CU_DEVICE_ATTRIBUTE_...
DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_...
NON_BLOCKING = 1  # a stream that does not wait for the default one


class Load:
    """The driver calls of one thread on one device."""

    def __init__(self, device: int, seed: int = 0):
        self.random, self.rounds = random.Random(seed), 0
        self.cuda = ctypes.CDLL("libcuda.so.1")  # calls release the GIL
        self.device, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.function, self.stream, self.memory = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
        self.call("cuInit", ctypes.c_uint(0))
        self.call("cuDeviceGet", ctypes.byref(self.device), ctypes.c_int(device))
        self.multiprocessors = self.attribute(MULTIPROCESSOR_COUNT)
        self.shared_memory = self.attribute(MAX_SHARED_MEMORY)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)  # JAX's own: kernels run together
        self.call("cuCtxSetCurrent", context)
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(HOLD))
        self.call("cuModuleGetFunction", ctypes.byref(self.function), module, ctypes.c_char_p(b"hold"))
        size = ctypes.c_int(self.shared_memory)
        self.call("cuFuncSetAttribute", self.function, ctypes.c_int(DYNAMIC_SHARED_MEMORY), size)
        self.call("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(NON_BLOCKING))
        self.call("cuMemAlloc_v2", ctypes.byref(self.memory), ctypes.c_size_t(L2_BYTES))
        self.round()

    def call(self, name: str, *args) -> None:
        if status := getattr(self.cuda, name)(*args):
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self.device)
        return value.value

    def round(self) -> None:
        """A few kernels of 5 to 100 microseconds on some of the multiprocessors, and one pass through L2."""
        one, none = ctypes.c_uint(1), ctypes.c_void_p()
        for _ in range(4):
            grid = ctypes.c_uint(self.random.randint(1, self.multiprocessors * 3 // 4))
            cycles = ctypes.c_uint64(self.random.randint(10_000, 200_000))
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(cycles))
            shared = ctypes.c_uint(self.shared_memory)
            sizes = grid, one, one, ctypes.c_uint(32), one, one, shared
            self.call("cuLaunchKernel", self.function, *sizes, self.stream, arguments, none)
        size = ctypes.c_size_t(self.random.randint(1, L2_BYTES))
        self.call("cuMemsetD8Async", self.memory, ctypes.c_ubyte(0), size, self.stream)
        self.call("cuStreamSynchronize", self.stream)
        self.rounds += 1

    def close(self) -> None:
        self.call("cuStreamDestroy_v2", self.stream)
        self.call("cuMemFree_v2", self.memory)
        self.call("cuDevicePrimaryCtxRelease_v2", self.device)


@contextlib.contextmanager
def concurrent_load(device: int = 0) -> Iterator[None]:
    """Keeps a GPU (its CUDA ordinal) busy until the block ends; raises if it was not."""
    ready, stop = threading.Event(), threading.Event()
    rounds, errors = [0], []

    def work():
        try:
            load = Load(device)
            ready.set()
            while not stop.is_set():
                load.round()
            rounds[0] = load.rounds - 1
            load.close()
        except Exception as error:  # raised below, in the thread of the test
            errors.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    if rounds[0] < 10:
        raise RuntimeError(f"the load ran only {rounds[0]} times beside the test")
