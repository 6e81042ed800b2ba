"""Matmul on quantized operands: how a weight is packed, the kernels that read it, and which one runs.

`reference` defines what every kernel has to compute; `select` knows them all and says why one was not taken.
"""
