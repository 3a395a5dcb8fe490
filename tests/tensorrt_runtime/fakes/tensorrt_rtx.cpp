// A fake TensorRT for RTX, libtensorrt_rtx.so.1, or with -DFAKE_RTX=0 a fake TensorRT, libnvinfer.so.11, on the GPUs of
// cuda.cpp. Its plans are text: the compute capability they were built for, bindings and profiles.
// Running one writes each token into the caches and returns logits that depend on the weights and on every token the
// row may attend to, so that a wrong slot, position, length or address changes them.
#ifndef FAKE_RTX
#define FAKE_RTX 1
#define nvinfer1 nvinfer1_rtx
#endif
#include AOTRON_HEADER

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

using namespace nvinfer1;

namespace {

[[noreturn]] void unused(char const* name)
{
    std::fprintf(stderr, "the stand-in for TensorRT has no %s\n", name);
    std::abort();
}

ILogger* gLogger = nullptr;

bool fail(std::string const& words)
{
    gLogger->log(ILogger::Severity::kERROR, words.c_str());
    return false;
}

template <typename Function> Function driver(char const* name)
{
    static void* const handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Function>(dlsym(handle, name));
}

bool inside(std::uint64_t address, std::uint64_t bytes)
{
    return driver<bool (*)(std::uint64_t, std::uint64_t)>("fake_inside")(address, bytes);
}

struct Tensor {
    std::string name;
    std::string role;
    bool input = false;
    DataType dtype = DataType::kFLOAT;
    Dims dims{};
    std::string alias;
};

struct Spec {
    std::vector<Tensor> tensors;
    std::vector<std::array<std::int64_t, 3>> profiles; // largest B, T, R
    std::vector<std::int64_t> least;                   // smallest B of each profile
    std::string fault;                                 // see model.inl
    int network = -1;                                  // see evaluate.inl

    Tensor const* find(std::string const& name) const
    {
        auto found = std::find_if(tensors.begin(), tensors.end(), [&](Tensor const& t) { return t.name == name; });
        return found == tensors.end() ? nullptr : &*found;
    }
};

std::size_t width(DataType dtype)
{
    switch (dtype) {
    case DataType::kBF16:
    case DataType::kHALF: return 2;
    case DataType::kINT8:
    case DataType::kFP8:
    case DataType::kBOOL: return 1;
    default: return 4;
    }
}

// A tensor with its shape and address in a run.
struct Bound {
    std::vector<std::int64_t> dims;
    std::uint64_t address = 0;
};

struct Run;
void compute_model(Run const& run);
void compute_network(Run const& run);

struct Run {
    std::shared_ptr<Spec const> spec;
    std::map<std::string, Bound> bound;

    template <typename T> T* data(std::string const& role) const
    {
        for (auto const& tensor : spec->tensors) {
            if (tensor.role == role) {
                return reinterpret_cast<T*>(bound.at(tensor.name).address);
            }
        }
        return nullptr;
    }
    std::vector<std::int64_t> const& dims(std::string const& role) const
    {
        for (auto const& tensor : spec->tensors) {
            if (tensor.role == role) {
                return bound.at(tensor.name).dims;
            }
        }
        unused(role.c_str());
    }

    void run() const
    {
        if (spec->network >= 0) {
            return compute_network(*this);
        }
        if (spec->find("embedding") != nullptr) {
            return compute_model(*this);
        }
        std::uint32_t weights = 0;
        std::vector<std::pair<std::uint16_t*, std::vector<std::int64_t>>> caches;
        for (auto const& tensor : spec->tensors) {
            auto const& at = bound.at(tensor.name);
            if (tensor.role == "weight") {
                auto const* bytes = reinterpret_cast<std::uint8_t const*>(at.address);
                auto const count = std::accumulate(at.dims.begin(), at.dims.end(),
                    static_cast<std::int64_t>(width(tensor.dtype)), std::multiplies<>());
                for (std::int64_t i = 0; i < count; ++i) {
                    weights = weights * 31 + bytes[i];
                }
            } else if (tensor.role == "cache") {
                caches.push_back({reinterpret_cast<std::uint16_t*>(at.address), at.dims});
            }
        }
        auto const b_count = dims("token_ids")[0];
        auto const t_count = dims("token_ids")[1];
        auto const* ids = data<std::int32_t>("token_ids");
        auto const* positions = data<std::int32_t>("positions");
        auto const* past = data<std::int32_t>("past_tokens");
        auto const* total = data<std::int32_t>("total_tokens");
        auto const* mask = data<std::uint8_t>("attention_mask");
        // Writes every token to every head, with a distinct mark per cache.
        for (std::size_t c = 0; c < caches.size(); ++c) {
            auto const& [memory, d] = caches[c];
            for (std::int64_t b = 0; b < b_count; ++b) {
                for (std::int64_t h = 0; h < d[1]; ++h) {
                    for (std::int64_t t = 0; t < t_count; ++t) {
                        auto* row = memory + ((b * d[1] + h) * d[2] + past[b] + t) * d[3];
                        std::fill_n(row, d[3], static_cast<std::uint16_t>(ids[b * t_count + t] + c));
                    }
                }
            }
        }
        auto const rows = dims("logits_rows")[0];
        auto const* wanted = data<std::int32_t>("logits_rows");
        auto const vocab = dims("logits")[1];
        auto const k = dims("top_logits")[1];
        auto* logits = data<float>("logits");
        auto* top_logits = data<float>("top_logits");
        auto* top_ids = data<std::int32_t>("top_ids");
        auto* logit_sums = data<float>("logit_sums");
        for (std::int64_t r = 0; r < rows; ++r) {
            auto const b = wanted[r] / t_count;
            auto const t = wanted[r] % t_count;
            // The keys that the row attends to: as the mask says, else causally up to the sequence's length, else (the
            // context plan) causally over the step's own.
            auto const attends = [&](std::int64_t s, std::int64_t capacity) {
                return mask != nullptr ? mask[(b * t_count + t) * capacity + s] != 0
                    : total != nullptr ? s < total[b] - (t_count - 1 - t)
                                       : s < t + 1;
            };
            std::uint32_t hash = weights;
            bool sound = positions[wanted[r]] == past[b] + t;
            for (std::size_t c = 0; c < caches.size(); ++c) {
                auto const& [memory, d] = caches[c];
                for (std::int64_t h = 0; h < d[1]; ++h) {
                    auto const* head = memory + (b * d[1] + h) * d[2] * d[3];
                    // Entries past the end are multiplied by zero, so they must not be NaN.
                    sound = sound && std::none_of(head, head + d[2] * d[3], [](std::uint16_t x) { return x == 0xffff; });
                    for (std::int64_t s = 0; s < d[2]; ++s) {
                        if (!attends(s, d[2])) {
                            continue;
                        }
                        auto const token = static_cast<std::uint16_t>(head[s * d[3] + d[3] - 1] - c);
                        if (c == 0 && h == 0) {
                            hash = hash * 31 + token + 1;
                        }
                        auto const* first = caches[0].first + b * caches[0].second[1] * d[2] * d[3];
                        sound = sound && token == first[s * d[3]];
                    }
                }
            }
            std::vector<std::int32_t> order(static_cast<std::size_t>(vocab));
            std::iota(order.begin(), order.end(), 0);
            auto const value = [&](std::int32_t v) {
                auto const mixed = (hash ^ (static_cast<std::uint32_t>(v) * 2654435761U)) >> 8;
                return sound ? static_cast<float>(mixed) : -1.0F;
            };
            auto const sums = dims("logit_sums")[1];
            std::fill_n(logit_sums + r * sums, sums, 0.0F);
            for (std::int32_t v = 0; v < vocab; ++v) {
                logits[r * vocab + v] = value(v);
                logit_sums[r * sums + v / (vocab / sums)] += value(v);
            }
            std::stable_sort(order.begin(), order.end(), [&](auto x, auto y) { return value(x) > value(y); });
            for (std::int64_t i = 0; i < k; ++i) {
                top_ids[r * k + i] = order[static_cast<std::size_t>(i)];
                top_logits[r * k + i] = value(order[static_cast<std::size_t>(i)]);
            }
        }
    }
};

#include "model.inl"

void compute_model(Run const& run)
{
    model::Model(run).compute();
}

class HostMemoryImpl final : public apiv::VHostMemory {
public:
    explicit HostMemoryImpl(std::string bytes) : mBytes(std::move(bytes)) {}
    void* data() const noexcept override { return const_cast<char*>(mBytes.data()); }
    std::size_t size() const noexcept override { return mBytes.size(); }
    DataType type() const noexcept override { unused("type"); }
private:
    std::string mBytes;
};
struct FakeHostMemory final : IHostMemory {
    explicit FakeHostMemory(std::string bytes) : impl(std::move(bytes)) { mImpl = &impl; }
    HostMemoryImpl impl;
};

#if FAKE_RTX
class CacheImpl final : public apiv::VRuntimeCache {
public:
    IHostMemory* serialize() const noexcept override { return new FakeHostMemory("kernels of the stand-in"); }
    bool deserialize(void const* blob, std::size_t size) noexcept override
    {
        bool const same = std::string(static_cast<char const*>(blob), size) == "kernels of the stand-in";
        std::fprintf(stderr, same ? "kept kernels were taken\n" : "kept kernels were refused\n");
        return same;
    }
    bool reset() noexcept override { unused("reset"); }
};
struct FakeCache final : IRuntimeCache {
    FakeCache() { mImpl = &impl; }
    CacheImpl impl;
};
#endif

class ConfigImpl final : public apiv::VRuntimeConfig {
public:
    void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy) noexcept override {}
    IRuntimeConfig* getPImpl() noexcept override { unused("getPImpl"); }
    ExecutionContextAllocationStrategy getExecutionContextAllocationStrategy() const noexcept override { unused("getExecutionContextAllocationStrategy"); }
#if FAKE_RTX
    IRuntimeCache* createRuntimeCache() const noexcept override { return new FakeCache; }
    bool setRuntimeCache(IRuntimeCache const&) noexcept override { return true; }
    void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept override
    {
        waits = strategy == DynamicShapesKernelSpecializationStrategy::kEAGER;
    }
    bool waits = false;
    IRuntimeCache* getRuntimeCache() const noexcept override { unused("getRuntimeCache"); }
    DynamicShapesKernelSpecializationStrategy getDynamicShapesKernelSpecializationStrategy() const noexcept override { unused("getDynamicShapesKernelSpecializationStrategy"); }
    bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept override { unused("setCudaGraphStrategy"); }
    CudaGraphStrategy getCudaGraphStrategy() const noexcept override { unused("getCudaGraphStrategy"); }
#endif
};
struct FakeConfig final : IRuntimeConfig {
    FakeConfig() { mImpl = &impl; }
    ConfigImpl impl;
};

class ContextImpl final : public apiv::VExecutionContext {
public:
    ContextImpl(std::shared_ptr<Spec const> spec, bool waits) : mWaits(waits) { mRun.spec = std::move(spec); }

    bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t) noexcept override
    {
        mProfile = static_cast<std::size_t>(profile);
        return mProfile < mRun.spec->profiles.size() || fail("no such profile");
    }
    void setDeviceMemoryV2(void* memory, std::int64_t bytes) noexcept override
    {
        mMemory = bytes >= 4096 && inside(reinterpret_cast<std::uint64_t>(memory), static_cast<std::uint64_t>(bytes));
    }
    bool setInputShape(char const* name, Dims const& dims) noexcept override
    {
        Tensor const* tensor = mRun.spec->find(name);
        if (tensor == nullptr || !tensor->input || tensor->dims.nbDims != dims.nbDims) {
            return fail(std::string("cannot set the shape of ") + name);
        }
        auto const& most = mRun.spec->profiles[mProfile];
        auto const limit = tensor->role == "logits_rows" ? most[2] : most[0];
        for (std::int32_t i = 0; i < dims.nbDims; ++i) {
            auto const largest = tensor->dims.d[i] != -1 ? tensor->dims.d[i] : i == 0 ? limit : most[1];
            auto const smallest = tensor->dims.d[i] == -1 && i == 0 ? mRun.spec->least[mProfile] : 1;
            if (dims.d[i] < smallest || dims.d[i] > largest || (tensor->dims.d[i] != -1 && dims.d[i] != largest)) {
                return fail(std::string(name) + " does not satisfy any optimization profile");
            }
        }
        mRun.bound[name].dims.assign(dims.d, dims.d + dims.nbDims);
        return true;
    }
    bool setTensorAddress(char const* name, void* data) noexcept override
    {
        if (mRun.spec->find(name) == nullptr || reinterpret_cast<std::uint64_t>(data) % 256 != 0) {
            return fail(std::string("cannot bind ") + name);
        }
        mRun.bound[name].address = reinterpret_cast<std::uint64_t>(data);
        return true;
    }
#if FAKE_RTX
    bool isStreamCapturable(cudaStream_t) const noexcept override { return true; }
#endif

    bool enqueueV3(cudaStream_t stream) noexcept override
    {
        if (!mMemory || !driver<bool (*)()>("fake_current")()) {
            return fail("no device memory, or no GPU is current");
        }
        // What TensorRT for RTX would compile: kernels of a shape that has not run before.
        auto const& ids = mRun.dims("token_ids");
        static std::set<std::tuple<Spec const*, std::size_t, std::int64_t, std::int64_t>> seen;
        if (FAKE_RTX && seen.emplace(mRun.spec.get(), mProfile, ids[0], ids[1]).second) {
            std::fprintf(stderr, "%s for %d x %d\n", mWaits ? "a run waits for kernels" : "kernels are compiled aside",
                static_cast<int>(ids[0]), static_cast<int>(ids[1]));
        }
        auto* run = new Run(mRun);
        if (std::getenv("FAKE_TELLS") != nullptr && mRun.dims("token_ids")[1] == 1) {
            std::fprintf(stderr, "decoded %d in profile %zu\n", static_cast<int>(mRun.dims("token_ids")[0]), mProfile);
        }
        std::int64_t rows = 0;
        for (auto const& tensor : run->spec->tensors) {
            if (tensor.role == "logits_rows") {
                rows = run->bound[tensor.name].dims.at(0);
            }
        }
        for (auto const& tensor : run->spec->tensors) {
            auto& at = run->bound[tensor.name];
            if (tensor.role == "updated") {
                at.dims = run->bound[tensor.alias].dims;
                if (at.address != run->bound[tensor.alias].address) {
                    return fail(tensor.name + " is not in the memory of " + tensor.alias);
                }
            } else if (!tensor.input || tensor.role == "weight") {
                at.dims.assign(tensor.dims.d, tensor.dims.d + tensor.dims.nbDims);
                std::replace(at.dims.begin(), at.dims.end(), std::int64_t{-1}, rows);
            }
            auto const bytes = std::accumulate(
                at.dims.begin(), at.dims.end(), static_cast<std::int64_t>(width(tensor.dtype)), std::multiplies<>());
            if (at.dims.empty() || !inside(at.address, static_cast<std::uint64_t>(bytes))) {
                return fail(tensor.name + " is not bound to enough memory");
            }
        }
        auto const put = driver<void (*)(void*, void (*)(void*), void*)>("fake_put");
        put(stream, [](void* argument) { static_cast<Run*>(argument)->run(); }, run); // graphs keep it: never freed
        return true;
    }
    IExecutionContext* getPImpl() noexcept override { unused("getPImpl"); }
    void setDebugSync(bool sync) noexcept override { unused("setDebugSync"); }
    bool getDebugSync() const noexcept override { unused("getDebugSync"); }
    void setProfiler(IProfiler*) noexcept override { unused("setProfiler"); }
    IProfiler* getProfiler() const noexcept override { unused("getProfiler"); }
    ICudaEngine const& getEngine() const noexcept override { unused("getEngine"); }
    void setName(char const* name) noexcept override { unused("setName"); }
    char const* getName() const noexcept override { unused("getName"); }
    void setDeviceMemory(void* memory) noexcept override { unused("setDeviceMemory"); }
    int32_t getOptimizationProfile() const noexcept override { unused("getOptimizationProfile"); }
    bool allInputDimensionsSpecified() const noexcept override { unused("allInputDimensionsSpecified"); }
    void setErrorRecorder(IErrorRecorder* recorder) noexcept override { unused("setErrorRecorder"); }
    IErrorRecorder* getErrorRecorder() const noexcept override { unused("getErrorRecorder"); }
    bool executeV2(void* const* bindings) noexcept override { unused("executeV2"); }
    void setEnqueueEmitsProfile(bool enqueueEmitsProfile) noexcept override { unused("setEnqueueEmitsProfile"); }
    bool getEnqueueEmitsProfile() const noexcept override { unused("getEnqueueEmitsProfile"); }
    bool reportToProfiler() const noexcept override { unused("reportToProfiler"); }
    Dims getTensorShape(char const* tensorName) const noexcept override { unused("getTensorShape"); }
    Dims getTensorStrides(char const* tensorName) const noexcept override { unused("getTensorStrides"); }
    void const* getTensorAddress(char const* tensorName) const noexcept override { unused("getTensorAddress"); }
    bool setInputTensorAddress(char const* tensorName, void const* data) noexcept override { unused("setInputTensorAddress"); }
    bool setOutputTensorAddress(char const* tensorName, void* data) noexcept override { unused("setOutputTensorAddress"); }
    int32_t inferShapes(int32_t nbMaxNames, char const** tensorNames) noexcept override { unused("inferShapes"); }
    bool setInputConsumedEvent(cudaEvent_t event) noexcept override { unused("setInputConsumedEvent"); }
    cudaEvent_t getInputConsumedEvent() const noexcept override { unused("getInputConsumedEvent"); }
    void* getOutputTensorAddress(char const* tensorName) const noexcept override { unused("getOutputTensorAddress"); }
    bool setOutputAllocator(char const* tensorName, IOutputAllocator* outputAllocator) noexcept override { unused("setOutputAllocator"); }
    IOutputAllocator* getOutputAllocator(char const* name) noexcept override { unused("getOutputAllocator"); }
    int64_t getMaxOutputSize(char const* tensorName) const noexcept override { unused("getMaxOutputSize"); }
    bool setTemporaryStorageAllocator(IGpuAllocator* allocator) noexcept override { unused("setTemporaryStorageAllocator"); }
    IGpuAllocator* getTemporaryStorageAllocator() const noexcept override { unused("getTemporaryStorageAllocator"); }
    void setPersistentCacheLimit(size_t size) noexcept override { unused("setPersistentCacheLimit"); }
    size_t getPersistentCacheLimit() const noexcept override { unused("getPersistentCacheLimit"); }
    bool setNvtxVerbosity(ProfilingVerbosity verbosity) noexcept override { unused("setNvtxVerbosity"); }
    ProfilingVerbosity getNvtxVerbosity() const noexcept override { unused("getNvtxVerbosity"); }
    void setAuxStreams(cudaStream_t* auxStreams, int32_t nbStreams) noexcept override { unused("setAuxStreams"); }
    bool setDebugListener(IDebugListener* listener) noexcept override { unused("setDebugListener"); }
    IDebugListener* getDebugListener() noexcept override { unused("getDebugListener"); }
    bool setTensorDebugState(char const* name, bool flag) noexcept override { unused("setTensorDebugState"); }
    bool getDebugState(char const* name) const noexcept override { unused("getDebugState"); }
    bool setAllTensorsDebugState(bool flag) noexcept override { unused("setAllTensorsDebugState"); }
    size_t updateDeviceMemorySizeForShapes() noexcept override { unused("updateDeviceMemorySizeForShapes"); }
    IRuntimeConfig* getRuntimeConfig() const noexcept override { unused("getRuntimeConfig"); }
    bool setUnfusedTensorsDebugState(bool flag) noexcept override { unused("setUnfusedTensorsDebugState"); }
    bool getUnfusedTensorsDebugState() const noexcept override { unused("getUnfusedTensorsDebugState"); }
    bool setCommunicator(void* communicator) noexcept override { unused("setCommunicator"); }
private:
    Run mRun;
    std::size_t mProfile = 0;
    bool mMemory = false;
    bool mWaits;
};
struct FakeContext final : IExecutionContext {
    FakeContext(std::shared_ptr<Spec const> spec, bool waits) : impl(std::move(spec), waits) { mImpl = &impl; }
    ContextImpl impl;
};

class EngineImpl final : public apiv::VCudaEngine {
public:
    explicit EngineImpl(std::shared_ptr<Spec const> spec) : mSpec(std::move(spec)) {}
    std::int32_t getNbIOTensors() const noexcept override { return static_cast<std::int32_t>(mSpec->tensors.size()); }
    char const* getIOTensorName(std::int32_t index) const noexcept override
    {
        return mSpec->tensors[static_cast<std::size_t>(index)].name.c_str();
    }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override
    {
        return mSpec->find(name)->input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    DataType getTensorDataType(char const* name) const noexcept override { return mSpec->find(name)->dtype; }
    Dims getTensorShape(char const* name) const noexcept override { return mSpec->find(name)->dims; }
    TensorLocation getTensorLocation(char const*) const noexcept override { return TensorLocation::kDEVICE; }
    char const* getAliasedInputTensor(char const* name) const noexcept override
    {
        auto const& alias = mSpec->find(name)->alias;
        return alias.empty() ? nullptr : alias.c_str();
    }
    std::int32_t getNbOptimizationProfiles() const noexcept override
    {
        return static_cast<std::int32_t>(mSpec->profiles.size());
    }
    Dims getProfileShape(char const* name, std::int32_t profile, OptProfileSelector) const noexcept override
    {
        auto const& most = mSpec->profiles[static_cast<std::size_t>(profile)];
        bool const rows = mSpec->find(name)->role == "logits_rows";
        return rows ? Dims{1, {most[2]}} : Dims{2, {most[0], most[1]}};
    }
    std::int64_t getDeviceMemorySizeV2() const noexcept override { return 4096; }
    IRuntimeConfig* createRuntimeConfig() noexcept override { return new FakeConfig; }
    IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig* config) noexcept override
    {
#if FAKE_RTX
        return new FakeContext(mSpec, static_cast<FakeConfig*>(config)->impl.waits);
#else
        static_cast<void>(config);
        return new FakeContext(mSpec, true);
#endif
    }
    ICudaEngine* getPImpl() noexcept override { unused("getPImpl"); }
    int32_t getNbLayers() const noexcept override { unused("getNbLayers"); }
    IHostMemory* serialize() const noexcept override { unused("serialize"); }
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override { unused("createExecutionContext"); }
    bool isRefittable() const noexcept override { unused("isRefittable"); }
    char const* getName() const noexcept override { unused("getName"); }
    EngineCapability getEngineCapability() const noexcept override { unused("getEngineCapability"); }
    void setErrorRecorder(IErrorRecorder* recorder) noexcept override { unused("setErrorRecorder"); }
    IErrorRecorder* getErrorRecorder() const noexcept override { unused("getErrorRecorder"); }
    TacticSources getTacticSources() const noexcept override { unused("getTacticSources"); }
    ProfilingVerbosity getProfilingVerbosity() const noexcept override { unused("getProfilingVerbosity"); }
    IEngineInspector* createEngineInspector() const noexcept override { unused("createEngineInspector"); }
    bool isShapeInferenceIO(char const* tensorName) const noexcept override { unused("isShapeInferenceIO"); }
    int32_t getTensorBytesPerComponent(char const* tensorName) const noexcept override { unused("getTensorBytesPerComponent"); }
    int32_t getTensorComponentsPerElement(char const* tensorName) const noexcept override { unused("getTensorComponentsPerElement"); }
    TensorFormat getTensorFormat(char const* tensorName) const noexcept override { unused("getTensorFormat"); }
    char const* getTensorFormatDesc(char const* tensorName) const noexcept override { unused("getTensorFormatDesc"); }
    int32_t getTensorVectorizedDim(char const* tensorName) const noexcept override { unused("getTensorVectorizedDim"); }
    HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept override { unused("getHardwareCompatibilityLevel"); }
    int32_t getNbAuxStreams() const noexcept override { unused("getNbAuxStreams"); }
    int32_t getTensorBytesPerComponentV2(char const* tensorName, int32_t profileIndex) const noexcept override { unused("getTensorBytesPerComponentV2"); }
    int32_t getTensorComponentsPerElementV2(char const* tensorName, int32_t profileIndex) const noexcept override { unused("getTensorComponentsPerElementV2"); }
    TensorFormat getTensorFormatV2(char const* tensorName, int32_t profileIndex) const noexcept override { unused("getTensorFormatV2"); }
    char const* getTensorFormatDescV2(char const* tensorName, int32_t profileIndex) const noexcept override { unused("getTensorFormatDescV2"); }
    int32_t getTensorVectorizedDimV2(char const* tensorName, int32_t profileIndex) const noexcept override { unused("getTensorVectorizedDimV2"); }
    ISerializationConfig* createSerializationConfig() noexcept override { unused("createSerializationConfig"); }
    IHostMemory* serializeWithConfig(ISerializationConfig& config) const noexcept override { unused("serializeWithConfig"); }
    IRefitter* createRefitter(ILogger& logger) noexcept override { unused("createRefitter"); }
    int64_t getStreamableWeightsSize() const noexcept override { unused("getStreamableWeightsSize"); }
    bool isDebugTensor(char const* name) const noexcept override { unused("isDebugTensor"); }
    bool setWeightStreamingBudgetV2(int64_t gpuMemoryBudget) noexcept override { unused("setWeightStreamingBudgetV2"); }
    int64_t getWeightStreamingBudgetV2() const noexcept override { unused("getWeightStreamingBudgetV2"); }
    int64_t getWeightStreamingAutomaticBudget() const noexcept override { unused("getWeightStreamingAutomaticBudget"); }
    int64_t getWeightStreamingScratchMemorySize() const noexcept override { unused("getWeightStreamingScratchMemorySize"); }
    int64_t getDeviceMemorySizeForProfileV2(int32_t profileIndex) const noexcept override { unused("getDeviceMemorySizeForProfileV2"); }
    int64_t const* getProfileTensorValuesV2( char const* tensorName, int32_t profileIndex, OptProfileSelector select) const noexcept override { unused("getProfileTensorValuesV2"); }
    int64_t getEngineStat(EngineStat stat) const noexcept override { unused("getEngineStat"); }
#if FAKE_RTX
    bool areWeightsLoaded() const noexcept override { unused("areWeightsLoaded"); }
    bool loadWeights(void const* blob, int64_t size) noexcept override { unused("loadWeights"); }
    bool loadWeightsAsync(IStreamReaderV2& streamReader, cudaStream_t stream) noexcept override { unused("loadWeightsAsync"); }
    bool unloadWeights() noexcept override { unused("unloadWeights"); }
    IWeightsManager* createWeightsManager() noexcept override { unused("createWeightsManager"); }
#endif
private:
    std::shared_ptr<Spec const> mSpec;
};
struct FakeEngine final : ICudaEngine {
    explicit FakeEngine(std::shared_ptr<Spec const> spec) : impl(std::move(spec)) { mImpl = &impl; }
    EngineImpl impl;
};

class RuntimeImpl final : public apiv::VRuntime {
public:
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override
    {
        auto spec = std::make_shared<Spec>();
        std::istringstream text(std::string(static_cast<char const*>(blob), size));
        std::string kind;
        while (text >> kind) {
            if (kind == "sm") {
                int built = 0;
                text >> built;
                int const here = driver<int (*)()>("fake_capability")();
                if (built != here) {
                    fail("the plan was built for SM " + std::to_string(built) + ", the current GPU is SM " + std::to_string(here));
                    return nullptr;
                }
            } else if (kind == "fault") {
                text >> spec->fault;
            } else if (kind == "profile") {
                auto& most = spec->profiles.emplace_back();
                text >> most[0] >> most[1] >> most[2];
                spec->least.push_back(1);
            } else if (kind == "least") {
                text >> spec->least.back();
            } else if (kind == "network") {
                text >> spec->network;
            } else {
                Tensor tensor;
                std::string dtype;
                std::string alias;
                text >> tensor.role >> tensor.name >> dtype >> alias >> tensor.dims.nbDims;
                for (std::int32_t i = 0; i < tensor.dims.nbDims; ++i) {
                    text >> tensor.dims.d[i];
                }
                tensor.input = kind == "input";
                std::map<std::string, DataType> const known{{"bf16", DataType::kBF16}, {"f16", DataType::kHALF},
                    {"i32", DataType::kINT32}, {"i8", DataType::kINT8}, {"f8e4m3", DataType::kFP8},
                    {"bool", DataType::kBOOL}, {"f32", DataType::kFLOAT}};
                tensor.dtype = known.at(dtype);
                tensor.alias = alias == "-" ? "" : alias;
                spec->tensors.push_back(std::move(tensor));
            }
        }
        if (spec->profiles.empty()) {
            fail("the stand-in cannot read this plan");
            return nullptr;
        }
        return new FakeEngine(spec);
    }
#if FAKE_RTX
    std::int64_t getEngineHeaderSize() const noexcept override { return 64; }
    EngineValidity getEngineValidity(void const* blob, std::int64_t, std::uint64_t* reasons) const noexcept override
    {
        bool const old = std::strncmp(static_cast<char const*>(blob), "old", 3) == 0;
        *reasons = old ? 1 : 0;
        return old ? EngineValidity::kINVALID : EngineValidity::kVALID;
    }
#endif
    IRuntime* getPImpl() noexcept override { unused("getPImpl"); }
    void setDLACore(int32_t dlaCore) noexcept override { unused("setDLACore"); }
    int32_t getDLACore() const noexcept override { unused("getDLACore"); }
    int32_t getNbDLACores() const noexcept override { unused("getNbDLACores"); }
    void setGpuAllocator(IGpuAllocator* allocator) noexcept override { unused("setGpuAllocator"); }
    void setErrorRecorder(IErrorRecorder* recorder) noexcept override { unused("setErrorRecorder"); }
    IErrorRecorder* getErrorRecorder() const noexcept override { unused("getErrorRecorder"); }
    ILogger* getLogger() const noexcept override { unused("getLogger"); }
    bool setMaxThreads(int32_t maxThreads) noexcept override { unused("setMaxThreads"); }
    int32_t getMaxThreads() const noexcept override { unused("getMaxThreads"); }
    void setTemporaryDirectory(char const*) noexcept override { unused("setTemporaryDirectory"); }
    char const* getTemporaryDirectory() const noexcept override { unused("getTemporaryDirectory"); }
    void setTempfileControlFlags(TempfileControlFlags) noexcept override { unused("setTempfileControlFlags"); }
    TempfileControlFlags getTempfileControlFlags() const noexcept override { unused("getTempfileControlFlags"); }
    IPluginRegistry& getPluginRegistry() noexcept override { unused("getPluginRegistry"); }
    void setPluginRegistryParent(IPluginRegistry* parent) noexcept override { unused("setPluginRegistryParent"); }
    IRuntime* loadRuntime(char const* path) noexcept override { unused("loadRuntime"); }
    void setEngineHostCodeAllowed(bool allowed) noexcept override { unused("setEngineHostCodeAllowed"); }
    bool getEngineHostCodeAllowed() const noexcept override { unused("getEngineHostCodeAllowed"); }
    ICudaEngine* deserializeCudaEngineV2(IStreamReaderV2& streamReader) noexcept override { unused("deserializeCudaEngineV2"); }
#if FAKE_RTX
    void setDeferredWeightsLoading(bool defer) noexcept override { unused("setDeferredWeightsLoading"); }
    bool getDeferredWeightsLoading() const noexcept override { unused("getDeferredWeightsLoading"); }
#endif
    bool setDLAWorkspaceAllocationStrategy(DLAWorkspaceAllocationStrategy strategy) noexcept override { unused("setDLAWorkspaceAllocationStrategy"); }
    DLAWorkspaceAllocationStrategy getDLAWorkspaceAllocationStrategy() const noexcept override { unused("getDLAWorkspaceAllocationStrategy"); }
};
struct FakeRuntime final : IRuntime {
    FakeRuntime() { mImpl = &impl; }
    RuntimeImpl impl;
};

#include "builder.inl"

} // namespace

extern "C" {
std::int32_t getInferLibVersion() noexcept
{
    return NV_TENSORRT_VERSION;
}
// As in the sources that the real library carries for its kernels: the CUDA version it was built with.
extern char const fake_sources[]; // exported, so that it is kept
char const fake_sources[] = "#define CUDART_VERSION 13040\n";

void* createInferBuilder_INTERNAL(void* logger, std::int32_t) noexcept
{
    gLogger = static_cast<ILogger*>(logger);
    return static_cast<IBuilder*>(new FakeBuilder);
}
void* createInferRuntime_INTERNAL(void* logger, std::int32_t) noexcept
{
    gLogger = static_cast<ILogger*>(logger);
    return static_cast<IRuntime*>(new FakeRuntime);
}
}
