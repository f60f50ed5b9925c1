"""Tests of the CUDA kernels, and of the emulator that runs them."""
