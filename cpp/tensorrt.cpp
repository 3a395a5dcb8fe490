// The shim over TensorRT, libnvinfer.so.
#define AOTRON_FLAVOR enterprise
#define AOTRON_CROSS_COMPILES 0
#define AOTRON_KEEPS_KERNELS 0
#define AOTRON_HEADER AOTRON_TENSORRT_HEADER
#include "shim.inl"
