// A fake NVIDIA driver, libcuda.so.1: two GPUs whose memory is host memory. Stream work runs as late as possible, when
// something waits for it, which exposes buffers that are reused too early. Fresh memory is all ones, NaN in every float
// type.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace {

using Work = std::function<void()>;

enum Status : int {
    kSUCCESS = 0,
    kINVALID_VALUE = 1,
    kOUT_OF_MEMORY = 2,
    kINVALID_DEVICE = 101,
    kINVALID_CONTEXT = 201,
    kILLEGAL_ADDRESS = 700,
    kCAPTURE_UNSUPPORTED = 900,
};

struct Gpu {
    char const* name;
    int capability;
    std::uint64_t total;
    std::uint64_t used;
};

// FAKE_GPU=h100 makes GPU 1 an H100, h200 an H200.
Gpu second()
{
    char const* const chosen = std::getenv("FAKE_GPU");
    if (chosen == nullptr) {
        return {"Fake A100-40GB", 80, 42400000000ULL, 400000000ULL};
    }
    bool const large = std::strcmp(chosen, "h200") == 0;
    return {large ? "Fake H200" : "Fake H100-80GB", 90, large ? 150000000000ULL : 85000000000ULL, 400000000ULL};
}

Gpu gGpus[] = {{"Fake L40", 89, 46000000000ULL, 0}, second()};
std::map<std::uint64_t, std::pair<Gpu*, std::uint64_t>> gMemory;
thread_local Gpu* tCurrent = nullptr;
Status gFailed = kSUCCESS;
int gKernels = 0;

struct Stream {
    std::deque<Work> queue;
    std::uint64_t done = 0;
    bool capturing = false;
    std::vector<Work> recorded;

    void put(Work work)
    {
        if (capturing) {
            recorded.push_back(std::move(work));
        } else {
            queue.push_back(std::move(work));
        }
    }
    void run_until(std::uint64_t end)
    {
        while (done < end && !queue.empty()) {
            Work work = std::move(queue.front());
            queue.pop_front();
            ++done;
            if (gFailed == kSUCCESS) {
                work();
            }
        }
    }
};

struct Event {
    Stream* stream = nullptr;
    std::uint64_t end = 0;
};

std::set<Stream*> gStreams;

bool inside(std::uint64_t address, std::uint64_t bytes)
{
    auto found = gMemory.upper_bound(address);
    if (found == gMemory.begin()) {
        return false;
    }
    --found;
    return address + bytes <= found->first + found->second.second;
}

Status ready()
{
    return gFailed != kSUCCESS ? gFailed : tCurrent == nullptr ? kINVALID_CONTEXT : kSUCCESS;
}

#define READY()                                                                                                        \
    if (Status const status = ready()) {                                                                               \
        return status;                                                                                                 \
    }

} // namespace

extern "C" {

// For the fake TensorRT.
void fake_put(void* stream, void (*run)(void*), void* argument)
{
    static_cast<Stream*>(stream)->put([=] {
        char const* fail = std::getenv("FAKE_FAIL_AT");
        if (fail != nullptr && ++gKernels == std::atoi(fail)) {
            gFailed = kILLEGAL_ADDRESS;
            return;
        }
        run(argument);
    });
}
bool fake_inside(std::uint64_t address, std::uint64_t bytes) { return inside(address, bytes); }
bool fake_current() { return tCurrent != nullptr; }
// Compute capability of the current GPU; as in CUDA's runtime, GPU 0 is current unless another was made so.
int fake_capability() { return tCurrent == nullptr ? gGpus[0].capability : tCurrent->capability; }

int cuInit(unsigned) { return kSUCCESS; }
int cuDriverGetVersion(int* version)
{
    char const* const chosen = std::getenv("FAKE_CUDA_VERSION");
    *version = chosen == nullptr ? 13000 : std::atoi(chosen);
    return kSUCCESS;
}
int cuGetErrorName(int error, char const** name)
{
    *name = error == kILLEGAL_ADDRESS ? "FAKE_ILLEGAL_ADDRESS" : error == kOUT_OF_MEMORY ? "FAKE_OUT_OF_MEMORY" : "FAKE";
    return kSUCCESS;
}
int cuGetErrorString(int error, char const** text)
{
    *text = error == kILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "some error";
    return kSUCCESS;
}
int cuDeviceGetCount(int* count)
{
    *count = 2;
    return kSUCCESS;
}
int cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return ordinal >= 0 && ordinal < 2 ? kSUCCESS : kINVALID_DEVICE;
}
int cuDeviceGetName(char* name, int bytes, int device)
{
    std::strncpy(name, gGpus[device].name, static_cast<std::size_t>(bytes));
    return kSUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    *value = attribute == 75 ? gGpus[device].capability / 10 : gGpus[device].capability % 10;
    return attribute == 75 || attribute == 76 ? kSUCCESS : kINVALID_VALUE;
}
int cuDeviceTotalMem_v2(std::size_t* bytes, int device)
{
    *bytes = gGpus[device].total;
    return kSUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int device)
{
    *context = &gGpus[device];
    return kSUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int)
{
    gFailed = kSUCCESS;
    return kSUCCESS;
}
int cuCtxSetCurrent(void* context)
{
    tCurrent = static_cast<Gpu*>(context);
    return gFailed;
}
int cuMemGetInfo_v2(std::size_t* free, std::size_t* total)
{
    READY();
    *free = tCurrent->total - tCurrent->used;
    *total = tCurrent->total;
    return kSUCCESS;
}
int cuMemAlloc_v2(std::uint64_t* address, std::size_t bytes)
{
    READY();
    if (bytes > tCurrent->total - tCurrent->used) {
        return kOUT_OF_MEMORY;
    }
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xff, bytes);
    *address = reinterpret_cast<std::uint64_t>(memory);
    gMemory[*address] = {tCurrent, bytes};
    tCurrent->used += bytes;
    return kSUCCESS;
}
int cuMemFree_v2(std::uint64_t address)
{
    READY();
    for (auto* stream : gStreams) {
        stream->run_until(UINT64_MAX);
    }
    auto found = gMemory.find(address);
    if (found == gMemory.end()) {
        return kINVALID_VALUE;
    }
    found->second.first->used -= found->second.second;
    std::free(reinterpret_cast<void*>(address));
    gMemory.erase(found);
    return kSUCCESS;
}
int cuMemHostAlloc(void** memory, std::size_t bytes, unsigned)
{
    READY();
    *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return kSUCCESS;
}
int cuMemFreeHost(void* memory)
{
    READY();
    std::free(memory);
    return kSUCCESS;
}
int cuMemsetD8Async(std::uint64_t address, unsigned char value, std::size_t bytes, void* stream)
{
    READY();
    if (!inside(address, bytes)) {
        return kINVALID_VALUE;
    }
    static_cast<Stream*>(stream)->put([=] { std::memset(reinterpret_cast<void*>(address), value, bytes); });
    return kSUCCESS;
}
int cuMemsetD2D8Async(
    std::uint64_t address, std::size_t pitch, unsigned char value, std::size_t width, std::size_t height, void* stream)
{
    READY();
    if (pitch < width || height == 0 || !inside(address, (height - 1) * pitch + width)) {
        return kINVALID_VALUE;
    }
    static_cast<Stream*>(stream)->put([=] {
        for (std::size_t row = 0; row < height; ++row) {
            std::memset(reinterpret_cast<void*>(address + row * pitch), value, width);
        }
    });
    return kSUCCESS;
}
// CUDA_MEMCPY2D. Only copies within the GPU's memory are known, and those that overlap are refused: the driver leaves
// their result undefined.
struct Copy2d {
    struct End {
        std::size_t x, y;
        unsigned type;
        void* host;
        std::uint64_t device;
        void* array;
        std::size_t pitch;
    } from, to;
    std::size_t width, height;
};
int cuMemcpy2DAsync_v2(Copy2d const* copy, void* stream)
{
    READY();
    Copy2d const c = *copy;
    auto const bytes = [&](Copy2d::End const& end) { return (c.height - 1) * end.pitch + c.width; };
    auto const fits = [&](Copy2d::End const& end) {
        return end.type == 2 && end.x == 0 && end.y == 0 && end.pitch >= c.width && inside(end.device, bytes(end));
    };
    bool const apart = c.from.device + bytes(c.from) <= c.to.device || c.to.device + bytes(c.to) <= c.from.device;
    if (c.height == 0 || !fits(c.from) || !fits(c.to) || !apart) {
        return kINVALID_VALUE;
    }
    static_cast<Stream*>(stream)->put([=] {
        for (std::size_t row = 0; row < c.height; ++row) {
            std::memcpy(reinterpret_cast<void*>(c.to.device + row * c.to.pitch),
                reinterpret_cast<void const*>(c.from.device + row * c.from.pitch), c.width);
        }
    });
    return kSUCCESS;
}
int cuMemcpyHtoDAsync_v2(std::uint64_t to, void const* from, std::size_t bytes, void* stream)
{
    READY();
    if (!inside(to, bytes)) {
        return kINVALID_VALUE;
    }
    static_cast<Stream*>(stream)->put([=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
    return kSUCCESS;
}
int cuMemcpyDtoHAsync_v2(void* to, std::uint64_t from, std::size_t bytes, void* stream)
{
    READY();
    if (!inside(from, bytes)) {
        return kINVALID_VALUE;
    }
    static_cast<Stream*>(stream)->put([=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
    return kSUCCESS;
}
int cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::size_t bytes, void* stream)
{
    READY();
    if (!inside(to, bytes) || !inside(from, bytes)) {
        return kINVALID_VALUE;
    }
    static_cast<Stream*>(stream)->put(
        [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
    return kSUCCESS;
}
int cuStreamCreate(void** stream, unsigned)
{
    READY();
    auto* made = new Stream;
    gStreams.insert(made);
    *stream = made;
    return kSUCCESS;
}
int cuStreamDestroy_v2(void* stream)
{
    READY();
    auto* gone = static_cast<Stream*>(stream);
    gone->run_until(UINT64_MAX);
    gStreams.erase(gone);
    delete gone;
    return kSUCCESS;
}
int cuStreamSynchronize(void* stream)
{
    READY();
    static_cast<Stream*>(stream)->run_until(UINT64_MAX);
    return gFailed;
}
int cuStreamIsCapturing(void*, int*) { return kSUCCESS; }
int cuStreamBeginCapture_v2(void* stream, int)
{
    READY();
    if (std::getenv("FAKE_NO_CAPTURE") != nullptr) {
        return kCAPTURE_UNSUPPORTED;
    }
    static_cast<Stream*>(stream)->capturing = true;
    return kSUCCESS;
}
int cuStreamEndCapture(void* stream, void** graph)
{
    auto* ended = static_cast<Stream*>(stream);
    ended->capturing = false;
    *graph = new std::vector<Work>(std::move(ended->recorded));
    ended->recorded.clear();
    return kSUCCESS;
}
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long)
{
    READY();
    *exec = new std::vector<Work>(*static_cast<std::vector<Work>*>(graph));
    return kSUCCESS;
}
int cuGraphDestroy(void* graph)
{
    delete static_cast<std::vector<Work>*>(graph);
    return kSUCCESS;
}
int cuGraphExecDestroy(void* graph) { return cuGraphDestroy(graph); }
int cuGraphLaunch(void* exec, void* stream)
{
    READY();
    for (auto const& work : *static_cast<std::vector<Work>*>(exec)) {
        static_cast<Stream*>(stream)->put(work);
    }
    return kSUCCESS;
}
int cuEventCreate(void** event, unsigned)
{
    READY();
    *event = new Event;
    return kSUCCESS;
}
int cuEventRecord(void* event, void* stream)
{
    READY();
    auto* recorded = static_cast<Event*>(event);
    recorded->stream = static_cast<Stream*>(stream);
    recorded->end = recorded->stream->done + recorded->stream->queue.size();
    return kSUCCESS;
}
int cuEventSynchronize(void* event)
{
    READY();
    auto* recorded = static_cast<Event*>(event);
    if (recorded->stream != nullptr && gStreams.count(recorded->stream) != 0) {
        recorded->stream->run_until(recorded->end);
    }
    return gFailed;
}
int cuEventDestroy_v2(void* event)
{
    READY();
    delete static_cast<Event*>(event);
    return kSUCCESS;
}

} // extern "C"
