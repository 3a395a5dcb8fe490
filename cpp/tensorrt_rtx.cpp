// The shim over TensorRT for RTX, libtensorrt_rtx.so. Its headers declare classes of the same names as TensorRT's with
// other virtual tables: the namespace keeps the two apart.
#define nvinfer1 nvinfer1_rtx
#define AOTRON_FLAVOR rtx
#define AOTRON_CROSS_COMPILES 1
#define AOTRON_KEEPS_KERNELS 1
#define AOTRON_HEADER AOTRON_TENSORRT_RTX_HEADER
#include "shim.inl"
