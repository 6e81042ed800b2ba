"""Loading compiled kernels and launching them on torch's current stream, with little work for each launch."""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache, lru_cache

import torch

from canopyq.errors import CanopyError
from canopyq.kernels.cuda import nvrtc


def unavailable(device: torch.device) -> str | None:
    """Why kernels of this folder cannot run for a layer on ``device``, or None if they can."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs; the layer lies on {device}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU or no driver"
    if (capability := torch.cuda.get_device_capability(device)) < nvrtc.OLDEST:
        have, need = (".".join(map(str, c)) for c in (capability, nvrtc.OLDEST))
        return f"it needs compute capability {need} or newer; this GPU has {have}"
    return nvrtc.missing() or _no_driver()


@cache
def _no_driver() -> str | None:
    try:
        from cuda.bindings import driver

        result, *_ = driver.cuDriverGetVersion()
    except Exception as error:  # what cuda-bindings raises depends on what of the driver is missing
        return f"the driver library was not found ({str(error).splitlines()[0]})"
    return None if result == 0 else f"the driver does not answer ({result.name})"


class Function:
    """A compiled kernel on one device.

    Args:
        file, name: the source in this folder, and the kernel in it.
        constants: for the preprocessor.
        arguments: the kernel's parameters as `struct` letters: ``P`` a pointer, ``i`` an int, ``f`` a float, ``q`` a
            64-bit integer, ``128s`` 128 bytes such as a tensor map (aligned to 64).
        device: index of the GPU.
        threads: to a block.
        shared: bytes of dynamic shared memory, where a launch does not say otherwise.
        cluster: blocks along z that form a cluster and read each other's shared memory (compute capability 9.0).
        overlap: start before the kernel ahead in the stream has ended (programmatic dependent launch; 9.0). The kernel
            must call ``wait_for_earlier_kernels`` before it touches what that one reads or writes.
        extra: see `nvrtc.compile`.

    Raises:
        CanopyError: if the source does not compile or the driver does not load it.
    """

    def __init__(
        self,
        file: str,
        name: str,
        constants: nvrtc.Constants,
        arguments: str,
        device: int,
        threads: int,
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = True,
        extra: str = "",
    ) -> None:
        from cuda.bindings import driver

        self._driver, self.name, self._device, self._shared = driver, f"{name} of {file}", device, shared
        capability = torch.cuda.get_device_capability(device)
        torch.cuda.init()
        compiled = nvrtc.compile(file, constants, nvrtc.architecture(capability), extra=extra)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # creates the context that the driver loads into
            library = self._check(driver.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0))
            kernel = self._check(driver.cuLibraryGetKernel(library, name.encode()))
            of_kernel, of_device = driver.CUfunction_attribute, driver.CUdevice_attribute
            most = of_device.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            gpu = self._check(driver.cuDeviceGet(device))
            static = self._check(
                driver.cuKernelGetAttribute(of_kernel.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel, gpu)
            )
            registers = of_kernel.CU_FUNC_ATTRIBUTE_NUM_REGS
            self.registers = self._check(driver.cuKernelGetAttribute(registers, kernel, gpu))  # of each thread
            self.most_shared = self._check(driver.cuDeviceGetAttribute(most, gpu)) - static
            attribute = of_kernel.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(driver.cuKernelSetAttribute(attribute, self.most_shared, kernel, gpu))
        self._function = driver.CUfunction(int(kernel))
        self._config = config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        attributes = []
        if overlap and capability >= (9, 0):
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x, attribute.value.clusterDim.y = 1, 1
            attribute.value.clusterDim.z = cluster
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        # The driver copies the arguments from where an array of pointers says. Both are made once; a launch fills in.
        letters = [arguments[a:b] for a, b in _words(arguments)]
        offsets, size = [], 0
        for letter in letters:
            size += -size % (64 if letter.endswith("s") else struct.calcsize(letter))
            offsets.append(size)
            size += struct.calcsize(letter)
        self._memory = ctypes.create_string_buffer(size + 64)
        base = ctypes.addressof(self._memory)
        skip = -base % 64
        self._packers = [
            (struct.Struct(letter).pack_into, skip + offset) for letter, offset in zip(letters, offsets, strict=True)
        ]
        self._pointers = (ctypes.c_void_p * len(letters))(*[base + skip + offset for offset in offsets])
        self._address = ctypes.addressof(self._pointers)
        self._lock = threading.Lock()

    def __call__(self, grid: tuple[int, int, int], *values: object, shared: int | None = None) -> None:
        """Launch ``grid`` blocks on the current stream of the function's device."""
        shared = self._shared if shared is None else shared
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self._launch(grid, shared, stream, values)
        return self._launch(grid, shared, stream, values)

    def _launch(self, grid: tuple[int, int, int], shared: int, stream: int, values: tuple[object, ...]) -> None:
        with self._lock:
            for (pack, offset), value in zip(self._packers, values, strict=True):
                pack(self._memory, offset, value)
            config = self._config
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.sharedMemBytes, config.hStream = shared, stream
            self._check(self._driver.cuLaunchKernelEx(config, self._function, self._address, 0))

    def _check(self, returned: tuple):
        result, *values = returned
        if result != 0:
            raise CanopyError(f"the driver could not load or launch {self.name}: {result.name}")
        return values[0] if values else None


def _words(arguments: str) -> list[tuple[int, int]]:
    """Where each letter with its count begins and ends: ``"PP128si"`` -> P, P, 128s, i."""
    found, start = [], 0
    for i, letter in enumerate(arguments):
        if not letter.isdigit():
            found.append((start, i + 1))
            start = i + 1
    return found


@cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=4096)
def tensor_map(
    pointer: int, element: str, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> bytes:
    """Tells the copy engine where a tensor lies and in what boxes it comes or goes, swizzled by 128 bytes.

    Args:
        element: the driver's name for its type, such as ``"UINT8"`` or ``"BFLOAT16"``.
        sizes, box: elements along each dimension of the tensor and of a box, which is 128 bytes across; the innermost
            dimension, whose neighbours lie side by side, comes first.
        strides: bytes from one element to the next along each dimension but the first, multiples of 16.

    Raises:
        CanopyError: if the driver does not accept it.
    """
    from cuda.bindings import driver as d

    result, made = d.cuTensorMapEncodeTiled(
        getattr(d.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{element}"),
        len(sizes),
        pointer,
        [d.cuuint64_t(size) for size in sizes],
        [d.cuuint64_t(stride) for stride in strides],
        [d.cuuint32_t(size) for size in box],
        [d.cuuint32_t(1)] * len(sizes),
        d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if result != 0:
        raise CanopyError(f"the driver does not describe a tensor of sizes {sizes}: {result.name}")
    return ctypes.string_at(made.getPtr(), 128)


def matrix_map(pointer: int, rows: int, columns: int, item: int, box_rows: int, box_columns: int) -> bytes:
    """`tensor_map` of a matrix (rows, columns) without gaps, ``item`` bytes (1 or 2) to an element."""
    element = "UINT8" if item == 1 else "UINT16"
    return tensor_map(pointer, element, (columns, rows), (columns * item,), (box_columns, box_rows))
