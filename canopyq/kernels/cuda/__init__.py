"""Kernels for NVIDIA GPUs: CUDA C++ in this folder, compiled when first used, without a toolkit or a host compiler.

`nvrtc` turns a source of this folder into machine code and keeps it on disk, `launch` loads and launches it. A kernel's
source includes nothing but the ``.cuh`` files beside it: what it needs of 16-bit floats, asynchronous copies and tensor
cores is written there as PTX, so no header of the CUDA toolkit has to be found.
"""
