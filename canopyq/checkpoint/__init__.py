"""Quantized models on disk: compressed-tensors files, written and read with safetensors alone."""
