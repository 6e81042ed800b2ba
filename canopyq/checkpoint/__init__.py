"""Checkpoints: folders of safetensors files, in the layout of compressed-tensors."""
