"""An emulator that runs the CUDA kernels' PTX on numpy, so that they are tested without a GPU.

To read it: `parser` turns PTX into instructions; `instructions` and `conversions` say what each
computes, `accesses` what moves memory, `collectives` what needs other lanes; `flow` and `compiler`
make basic blocks of functions of them; `machine` runs these over a `batch` of blocks in lockstep.
`memory` and `checks` know which bytes may be touched, which were written, and by whom; `counts`
what was moved. `cudart` and fake_cudart.cpp stand in for the CUDA runtime, `emulated` builds
gradfuse on top of them, `toolchain` calls the compilers.
"""
