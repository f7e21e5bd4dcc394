"""CUDA kernels and schedule rules."""
