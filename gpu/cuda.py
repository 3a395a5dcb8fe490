"""CUDA's driver API, as far as these scripts need it, through ctypes: no package is needed beside Python."""

import ctypes
import os

COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class CudaError(Exception):
    pass


class Driver:
    def __init__(self):
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"no NVIDIA driver: {error}") from None
        self.call("cuInit", 0)

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'?').decode()} ({status})")

    def number(self, name, *arguments, kind=ctypes.c_int):
        found = kind()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def cuda_version(self):
        version = self.number("cuDriverGetVersion")
        return f"{version // 1000}.{version % 1000 // 10}"

    def gpus(self):
        """Name, compute capability and memory of every GPU."""
        found = []
        for index in range(self.number("cuDeviceGetCount")):
            device = self.number("cuDeviceGet", index)
            name = ctypes.create_string_buffer(256)
            self.call("cuDeviceGetName", name, 256, device)
            major, minor = (self.number("cuDeviceGetAttribute", which, device) for which in COMPUTE_CAPABILITY)
            memory = self.number("cuDeviceTotalMem_v2", device, kind=ctypes.c_size_t)
            found.append({"index": index, "name": name.value.decode(), "sm": 10 * major + minor, "memory_bytes": memory})
        return found


class Gpu:
    """One GPU, current on this thread, with a stream."""

    def __init__(self, driver, index):
        self.driver = driver
        device = driver.number("cuDeviceGet", index)
        self.context = ctypes.c_void_p(driver.number("cuDevicePrimaryCtxRetain", device, kind=ctypes.c_void_p))
        driver.call("cuCtxSetCurrent", self.context)
        self.stream = driver.number("cuStreamCreate", 1, kind=ctypes.c_void_p)

    def allocate(self, size):
        size = (max(size, 1) + 255) // 256 * 256
        return self.driver.number("cuMemAlloc_v2", ctypes.c_size_t(size), kind=ctypes.c_uint64)

    def free(self, address):
        self.driver.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, data, address=None):
        """Copies bytes to `address`, or to new memory, and returns the address."""
        address = self.allocate(len(data)) if address is None else address
        self.driver.call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)), ctypes.c_void_p(self.stream)
        )
        self.wait()
        return address

    def download(self, address, size):
        data = ctypes.create_string_buffer(size)
        self.driver.call(
            "cuMemcpyDtoHAsync_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.c_void_p(self.stream)
        )
        self.wait()
        return data.raw

    def copy(self, to, source, size):
        self.driver.call(
            "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )

    def wait(self):
        self.driver.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))


def target_of(sm):
    """Name of the recipe for a compute capability."""
    return {80: "a100", 90: "h100"}.get(sm)


def chosen(driver):
    """The first GPU that a recipe is for, else the first; AOTRON_GPU names another."""
    gpus = driver.gpus()
    if not gpus:
        raise CudaError("the driver finds no GPU")
    if index := os.environ.get("AOTRON_GPU"):
        return gpus[int(index)]
    return next((gpu for gpu in gpus if target_of(gpu["sm"])), gpus[0])
