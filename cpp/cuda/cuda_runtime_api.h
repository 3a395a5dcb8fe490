// TensorRT's headers name two handles of the CUDA runtime and use nothing else of it, so these two declarations
// stand in for the toolkit's header of the same name.
#pragma once

typedef struct CUevent_st* cudaEvent_t;
typedef struct CUstream_st* cudaStream_t;
