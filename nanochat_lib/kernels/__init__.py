"""Triton kernels, exported from lesson 03."""
