"""Triton kernels and their launchers, one file per op; lego_kernels.ops registers them for CUDA."""
