// What setup.py says in a header of this name, of the emulated build.
#define GRADFUSE_TORCH_VERSION "emulated"
#define GRADFUSE_CUDA_VERSION "emulated"
#define GRADFUSE_CUDA_ARCHS ""
