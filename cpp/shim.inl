// The shim, compiled once for each of the two libraries with its own headers.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include AOTRON_HEADER

#include "aotron/src/backend/tensorrt/ffi.rs.h"
#include "shim.h"

namespace aotron {
namespace AOTRON_FLAVOR {
namespace {

using namespace nvinfer1;

// Maximum number of error lines in a message, and the length each is truncated to.
constexpr std::size_t kERROR_LINES = 6;
constexpr std::size_t kLINE_BYTES = 2000;

rust::Slice<const std::uint8_t> bytes_of(char const* text)
{
    return {reinterpret_cast<std::uint8_t const*>(text), std::strlen(text)};
}

// True if this process has opened NVIDIA's driver, as TensorRT does where there is one.
bool driver_is_loaded()
{
    void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (driver == nullptr) {
        return false;
    }
    dlclose(driver); // only drops the count that dlopen added
    return true;
}

// Receives TensorRT's log lines for one network or runtime.
class Listener {
public:
    explicit Listener(rust::Box<Observer> observer)
        : mObserver(std::move(observer))
    {
    }

    // A network is only used by the thread that created it, a runtime by the thread that last called belongs_here().
    bool is_of_this_thread() const
    {
        return mThread == std::this_thread::get_id();
    }

    void belongs_here()
    {
        mThread = std::this_thread::get_id();
    }

    void hear(ILogger::Severity severity, char const* line)
    {
        if (severity <= ILogger::Severity::kERROR) {
            std::lock_guard<std::mutex> lock(mMutex);
            mErrors.push_back({std::this_thread::get_id(), std::string(line, strnlen(line, kLINE_BYTES))});
            if (mErrors.size() > kERROR_LINES) {
                mErrors.pop_front();
            }
        }
        mObserver->log(static_cast<std::int32_t>(severity), bytes_of(line));
    }

    // Takes the last error lines: those of this thread, or all if there are none, since then one of TensorRT's own
    // threads reported the error.
    std::string errors()
    {
        std::lock_guard<std::mutex> lock(mMutex);
        auto const is_other_thread = [](Line const& line) { return line.thread != std::this_thread::get_id(); };
        drop_unless_all(is_other_thread);
        // Without a driver, TensorRT logs error 35 after every other error. With one, it says that the driver is too
        // old, which is the reason for the others.
        if (!driver_is_loaded()) {
            drop_unless_all([](Line const& line) { return line.text.find("cudaError 35:") != std::string::npos; });
        }
        std::string text;
        for (auto const& line : mErrors) {
            text += text.empty() ? line.text : "; " + line.text;
        }
        mErrors.clear();
        return text.empty() ? "TensorRT gives no reason" : text;
    }

    // Drops earlier error lines, which have nothing to do with the next error.
    void forget()
    {
        std::lock_guard<std::mutex> lock(mMutex);
        mErrors.clear();
    }

    Observer const& observer() const
    {
        return *mObserver;
    }

private:
    struct Line {
        std::thread::id thread;
        std::string text;
    };

    template <typename Predicate> void drop_unless_all(Predicate drop)
    {
        if (!std::all_of(mErrors.begin(), mErrors.end(), drop)) {
            mErrors.erase(std::remove_if(mErrors.begin(), mErrors.end(), drop), mErrors.end());
        }
    }

    rust::Box<Observer> mObserver;
    std::atomic<std::thread::id> mThread{std::this_thread::get_id()};
    std::mutex mMutex;
    std::deque<Line> mErrors;
};

// TensorRT keeps one logger for the whole process, so this one lives as long as its library. Lines logged on a thread
// with networks or runtimes go to these; lines from TensorRT's own threads go to all live listeners.
class Logger final : public ILogger {
public:
    void log(Severity severity, AsciiChar const* line) noexcept override
    {
        try {
            // Listeners are called without the lock, since one of them may take it.
            auto const all = listeners();
            auto const is_mine = [](auto const& listener) { return listener->is_of_this_thread(); };
            bool const any_mine = std::any_of(all.begin(), all.end(), is_mine);
            for (auto const& listener : all) {
                if (is_mine(listener) || !any_mine) {
                    listener->hear(severity, line);
                }
            }
        } catch (...) {
            // Out of memory: losing the line is better than terminating the process.
        }
    }

    void add(std::shared_ptr<Listener> listener)
    {
        std::lock_guard<std::mutex> lock(mMutex);
        mListeners.push_back(std::move(listener));
    }

    void remove(Listener const* listener) noexcept
    {
        std::lock_guard<std::mutex> lock(mMutex);
        mListeners.erase(std::remove_if(mListeners.begin(), mListeners.end(),
                             [&](auto const& other) { return other.get() == listener; }),
            mListeners.end());
    }

private:
    std::vector<std::shared_ptr<Listener>> listeners()
    {
        std::lock_guard<std::mutex> lock(mMutex);
        return mListeners;
    }

    std::mutex mMutex;
    std::vector<std::shared_ptr<Listener>> mListeners;
};

// Registration of a listener with the logger.
class Listening {
public:
    Listening(Logger& logger, std::shared_ptr<Listener> listener)
        : mLogger(logger)
        , mListener(std::move(listener))
    {
        mLogger.add(mListener);
    }
    Listening(Listening const&) = delete;
    Listening& operator=(Listening const&) = delete;
    ~Listening()
    {
        mLogger.remove(mListener.get());
    }
    Listener& operator*() const
    {
        return *mListener;
    }
    Listener* operator->() const
    {
        return mListener.get();
    }

private:
    Logger& mLogger;
    std::shared_ptr<Listener> mListener;
};

class Monitor final : public IProgressMonitor {
public:
    explicit Monitor(Observer const& observer)
        : mObserver(observer)
    {
    }
    void phaseStart(char const* phase, char const*, std::int32_t steps) noexcept override
    {
        mObserver.phase(bytes_of(phase), steps);
    }
    bool stepComplete(char const* phase, std::int32_t step) noexcept override
    {
        if (!mObserver.step(bytes_of(phase), step)) {
            mCancelled = true;
        }
        return !mCancelled;
    }
    void phaseFinish(char const*) noexcept override {}
    bool cancelled() const
    {
        return mCancelled;
    }

private:
    Observer const& mObserver;
    std::atomic<bool> mCancelled{false};
};

DataType data_type(Element element)
{
    switch (element) {
    case Element::F32: return DataType::kFLOAT;
    case Element::F16: return DataType::kHALF;
    case Element::BF16: return DataType::kBF16;
    case Element::I32: return DataType::kINT32;
    case Element::I8: return DataType::kINT8;
    case Element::I4: return DataType::kINT4;
    case Element::F8: return DataType::kFP8;
    case Element::Bool: return DataType::kBOOL;
    }
    throw std::runtime_error("an element type that the shim does not know");
}

char const* name_of(DataType type)
{
    switch (type) {
    case DataType::kFLOAT: return "f32";
    case DataType::kHALF: return "f16";
    case DataType::kBF16: return "bf16";
    case DataType::kINT8: return "i8";
    case DataType::kINT32: return "i32";
    case DataType::kINT64: return "i64";
    case DataType::kBOOL: return "bool";
    case DataType::kUINT8: return "u8";
    case DataType::kFP8: return "f8e4m3";
    case DataType::kINT4: return "i4";
    default: return "?";
    }
}

std::int64_t bits_of(DataType type)
{
    switch (type) {
    case DataType::kFLOAT:
    case DataType::kINT32: return 32;
    case DataType::kHALF:
    case DataType::kBF16: return 16;
    case DataType::kINT4: return 4;
    default: return 8;
    }
}

char const* name_of(LayerType type)
{
    switch (type) {
    case LayerType::kCONSTANT: return "constant";
    case LayerType::kSHAPE: return "shape";
    case LayerType::kCONCATENATION: return "concatenation";
    case LayerType::kGATHER: return "gather";
    case LayerType::kCAST: return "cast";
    case LayerType::kSHUFFLE: return "shuffle";
    case LayerType::kSLICE: return "slice";
    case LayerType::kELEMENTWISE: return "elementwise";
    case LayerType::kACTIVATION: return "activation";
    case LayerType::kMATRIX_MULTIPLY: return "matrix_multiply";
    case LayerType::kNORMALIZATION: return "normalization";
    case LayerType::kROTARY_EMBEDDING: return "rotary_embedding";
    case LayerType::kKVCACHE_UPDATE: return "kv_cache_update";
    case LayerType::kATTENTION_INPUT: return "attention_input";
    case LayerType::kATTENTION_OUTPUT: return "attention_output";
    case LayerType::kTOPK: return "top_k";
    case LayerType::kREDUCE: return "reduce";
    case LayerType::kQUANTIZE: return "quantize";
    case LayerType::kDEQUANTIZE: return "dequantize";
    default: return "other";
    }
}

std::string describe(ITensor const& tensor)
{
    std::string text = std::string(tensor.getName()) + ": " + name_of(tensor.getType()) + "[";
    Dims const dims = tensor.getDimensions();
    for (std::int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

Dims dims_of(rust::Slice<const std::int64_t> sizes)
{
    if (sizes.size() > static_cast<std::size_t>(Dims::MAX_DIMS)) {
        throw std::runtime_error("a tensor of " + std::to_string(sizes.size()) + " dimensions");
    }
    Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return dims;
}

class PlanOf final : public Plan {
public:
    explicit PlanOf(std::unique_ptr<IHostMemory> memory)
        : mMemory(std::move(memory))
    {
    }
    rust::Slice<const std::uint8_t> bytes() const override
    {
        return {static_cast<std::uint8_t const*>(mMemory->data()), mMemory->size()};
    }

private:
    std::unique_ptr<IHostMemory> mMemory;
};

class NetworkOf final : public Network {
public:
    using CreateBuilder = std::function<IBuilder*(ILogger&)>;

    NetworkOf(Logger& logger, std::shared_ptr<Listener> listener, CreateBuilder const& createBuilder)
        : mListening(logger, std::move(listener))
        , mBuilder(createBuilder(logger))
    {
        if (!mBuilder) {
            fail("create a builder");
        }
        auto const flags = 1U << static_cast<std::uint32_t>(NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
        mNetwork.reset(mBuilder->createNetworkV2(flags));
        if (!mNetwork) {
            fail("create a network");
        }
        // Without a driver, TensorRT logs an error and continues.
        mListening->forget();
    }

    void scope(rust::Str name) override
    {
        mListening->forget();
        mScope.assign(name.data(), name.size());
        mInScope = 0;
    }

    std::uint32_t input(rust::Str name, Element element, rust::Slice<const std::int64_t> dims) override
    {
        std::string const text(name);
        return keep(mNetwork->addInput(text.c_str(), data_type(element), dims_of(dims)), "add input " + text);
    }

    void output(std::uint32_t tensor, rust::Str name) override
    {
        ITensor& t = at(tensor);
        t.setName(std::string(name).c_str());
        mNetwork->markOutput(t);
    }

    std::uint32_t constant_f32(float value, std::uint32_t rank) override
    {
        std::vector<std::int64_t> const ones(rank, 1);
        auto& stored = mConstants.emplace_back(sizeof value);
        std::memcpy(stored.data(), &value, sizeof value);
        return constant(DataType::kFLOAT, {ones.data(), ones.size()}, stored, 1);
    }

    std::uint32_t constant_i64(rust::Slice<const std::int64_t> values) override
    {
        std::int64_t const count = static_cast<std::int64_t>(values.size());
        auto& stored = mConstants.emplace_back(values.size() * sizeof(std::int64_t));
        std::memcpy(stored.data(), values.data(), stored.size());
        return constant(DataType::kINT64, {&count, 1}, stored, count);
    }

    std::uint32_t constant_of(
        rust::Box<ConstantBytes> bytes, Element element, rust::Slice<const std::int64_t> dims) override
    {
        std::int64_t count = 1;
        DataType const type = data_type(element);
        // So that the number of bits, rounded up to bytes, fits.
        std::int64_t const most = (std::numeric_limits<std::int64_t>::max() - 7) / bits_of(type);
        for (auto size : dims) {
            if (size <= 0 || count > most / size) {
                throw std::runtime_error("a constant of impossible sizes");
            }
            count *= size;
        }
        auto const needed = static_cast<std::size_t>((count * bits_of(type) + 7) / 8);
        auto const slice = bytes->as_slice();
        if (slice.size() != needed) {
            throw std::runtime_error("a constant of " + std::to_string(slice.size()) + " bytes, expected "
                + std::to_string(needed));
        }
        mBorrowed.push_back(std::move(bytes));
        return keep(mNetwork->addConstant(dims_of(dims), Weights{type, slice.data(), count}), "constant");
    }

    std::uint32_t shape(std::uint32_t x) override
    {
        return keep(mNetwork->addShape(at(x)), "shape");
    }

    std::uint32_t concat(rust::Slice<const std::uint32_t> parts) override
    {
        std::vector<ITensor*> tensors;
        for (auto part : parts) {
            tensors.push_back(&at(part));
        }
        auto* layer = mNetwork->addConcatenation(tensors.data(), static_cast<std::int32_t>(tensors.size()));
        if (layer != nullptr) {
            layer->setAxis(0);
        }
        return keep(layer, "concat");
    }

    std::uint32_t gather(std::uint32_t table, std::uint32_t indices) override
    {
        return keep(mNetwork->addGather(at(table), at(indices), 0), "gather");
    }

    std::uint32_t cast(std::uint32_t x, Element element) override
    {
        return keep(mNetwork->addCast(at(x), data_type(element)), "cast");
    }

    std::uint32_t reshape(std::uint32_t x, rust::Slice<const std::int64_t> dims) override
    {
        auto* layer = mNetwork->addShuffle(at(x));
        if (layer != nullptr) {
            layer->setReshapeDimensions(dims_of(dims));
        }
        return keep(layer, "reshape");
    }

    std::uint32_t reshape_to(std::uint32_t x, std::uint32_t shape) override
    {
        auto* layer = mNetwork->addShuffle(at(x));
        if (layer != nullptr) {
            layer->setInput(1, at(shape));
        }
        return keep(layer, "reshape");
    }

    std::uint32_t transpose(std::uint32_t x, rust::Slice<const std::int32_t> order) override
    {
        Permutation permutation{};
        if (order.size() > static_cast<std::size_t>(Dims::MAX_DIMS)) {
            throw std::runtime_error("transposing too many dimensions");
        }
        std::copy(order.begin(), order.end(), permutation.order);
        auto* layer = mNetwork->addShuffle(at(x));
        if (layer != nullptr) {
            layer->setFirstTranspose(permutation);
        }
        return keep(layer, "transpose");
    }

    std::uint32_t slice(std::uint32_t x, rust::Slice<const std::int64_t> start, std::uint32_t size) override
    {
        Dims const from = dims_of(start);
        Dims ones{};
        ones.nbDims = from.nbDims;
        std::fill_n(ones.d, from.nbDims, 1);
        auto* layer = mNetwork->addSlice(at(x), from, ones, ones);
        if (layer != nullptr) {
            layer->setInput(2, at(size));
        }
        return keep(layer, "slice");
    }

    std::uint32_t sum(std::uint32_t x, std::uint32_t y) override
    {
        return keep(mNetwork->addElementWise(at(x), at(y), ElementWiseOperation::kSUM), "sum");
    }

    std::uint32_t product(std::uint32_t x, std::uint32_t y) override
    {
        return keep(mNetwork->addElementWise(at(x), at(y), ElementWiseOperation::kPROD), "product");
    }

    std::uint32_t relu(std::uint32_t x) override
    {
        return keep(mNetwork->addActivation(at(x), ActivationType::kRELU), "relu");
    }

    std::uint32_t linear(std::uint32_t x, std::uint32_t weight) override
    {
        auto* layer = mNetwork->addMatrixMultiply(
            at(x), MatrixOperation::kNONE, at(weight), MatrixOperation::kTRANSPOSE);
        return keep(layer, "linear");
    }

    std::uint32_t matmul(std::uint32_t x, std::uint32_t weight) override
    {
        auto* layer = mNetwork->addMatrixMultiply(at(x), MatrixOperation::kNONE, at(weight), MatrixOperation::kNONE);
        return keep(layer, "linear");
    }

    std::uint32_t quantize(std::uint32_t x, std::uint32_t scale, Element element) override
    {
        return keep(mNetwork->addQuantize(at(x), at(scale), data_type(element)), "quantize");
    }

    std::uint32_t dequantize(std::uint32_t codes, std::uint32_t scale, std::int32_t axis, Element element) override
    {
        auto* layer = mNetwork->addDequantize(at(codes), at(scale), data_type(element));
        if (layer != nullptr && axis >= 0) {
            layer->setAxis(axis);
        }
        return keep(layer, "dequantize");
    }

    std::uint32_t layer_norm(std::uint32_t x, std::uint32_t scale, std::uint32_t bias, float eps) override
    {
        auto* layer = mNetwork->addNormalizationV2(at(x), at(scale), at(bias), 1U << 1);
        if (layer != nullptr) {
            layer->setEpsilon(eps);
        }
        return keep(layer, "layer_norm");
    }

    std::uint32_t rotary(std::uint32_t x, std::uint32_t cos, std::uint32_t sin, std::uint32_t dims) override
    {
        auto const rotating = static_cast<std::int32_t>(dims);
        return keep(mNetwork->addRotaryEmbedding(at(x), at(cos), at(sin), false, rotating), "rotary");
    }

    std::uint32_t cache_update(std::uint32_t cache, std::uint32_t update, std::uint32_t indices) override
    {
        return keep(mNetwork->addKVCacheUpdate(at(cache), at(update), at(indices), KVCacheMode::kLINEAR), "update");
    }

    std::uint32_t attention(std::uint32_t q, std::uint32_t keys, std::uint32_t values) override
    {
        return keep(attend(q, keys, values, CausalMaskKind::kLOWER_RIGHT), "attention");
    }

    std::uint32_t attention_with_lengths(
        std::uint32_t q, std::uint32_t keys, std::uint32_t values, std::uint32_t lengths) override
    {
        auto* attention = attend(q, keys, values, CausalMaskKind::kLOWER_RIGHT);
        if (attention != nullptr && !attention->setKeyValueLengths(&at(lengths))) {
            fail("give attention its lengths at " + mScope);
        }
        return keep(attention, "attention");
    }

    std::uint32_t attention_with_mask(
        std::uint32_t q, std::uint32_t keys, std::uint32_t values, std::uint32_t mask) override
    {
        auto* attention = attend(q, keys, values, CausalMaskKind::kNONE);
        if (attention != nullptr && !attention->setMask(at(mask))) {
            fail("give attention its mask at " + mScope);
        }
        return keep(attention, "attention");
    }

    std::uint32_t decompose_attention() override
    {
        for (auto* attention : mAttentions) {
            if (!attention->setDecomposable(true)) {
                fail("decompose attention");
            }
        }
        return static_cast<std::uint32_t>(mAttentions.size());
    }

    TopK top_k(std::uint32_t x, std::uint32_t k) override
    {
        auto* layer = mNetwork->addTopK(
            at(x), TopKOperation::kMAX, static_cast<std::int32_t>(k), 1U << 1, DataType::kINT32);
        auto const values = keep(layer, "top_k");
        return {values, keep(layer->getOutput(1), "read the indices of top_k")};
    }

    std::uint32_t last_sums(std::uint32_t x) override
    {
        auto const last = std::max(at(x).getDimensions().nbDims - 1, 0);
        return keep(mNetwork->addReduce(at(x), ReduceOperation::kSUM, 1U << last, false), "last_sums");
    }

    std::uint32_t layers() const override
    {
        return static_cast<std::uint32_t>(mNetwork->getNbLayers());
    }

    LayerInfo layer(std::uint32_t index) const override
    {
        if (index >= layers()) {
            throw std::runtime_error("the network has no layer " + std::to_string(index));
        }
        ILayer const& layer = *mNetwork->getLayer(static_cast<std::int32_t>(index));
        LayerInfo info;
        info.name = rust::String::lossy(layer.getName());
        info.kind = rust::String::lossy(name_of(layer.getType()));
        for (std::int32_t i = 0; i < layer.getNbInputs(); ++i) {
            // Absent optional inputs are null.
            if (ITensor const* tensor = layer.getInput(i)) {
                info.inputs.push_back(rust::String::lossy(describe(*tensor)));
            }
        }
        for (std::int32_t i = 0; i < layer.getNbOutputs(); ++i) {
            if (ITensor const* tensor = layer.getOutput(i)) {
                info.outputs.push_back(rust::String::lossy(describe(*tensor)));
            }
        }
        return info;
    }

    std::unique_ptr<Plan> build(BuildOptions const& options) override
    {
        mCancelled = false;
        mListening->forget();
        std::unique_ptr<IBuilderConfig> const config(mBuilder->createBuilderConfig());
        if (!config) {
            fail("create a builder configuration");
        }
        if (options.compute_capability != 0) {
            target(*config, options.compute_capability);
        }
#if AOTRON_CROSS_COMPILES
        // Contexts then never allocate by themselves, so that the memory that was summed up is all, and runs can be
        // captured as graphs.
        config->setFlag(BuilderFlag::kREQUIRE_USER_ALLOCATION);
#else
        if (options.optimization_level >= 0) {
            config->setBuilderOptimizationLevel(options.optimization_level);
        }
        if (options.tiling_optimization_level >= 0
            && !config->setTilingOptimizationLevel(
                static_cast<TilingOptimizationLevel>(options.tiling_optimization_level))) {
            fail("set tiling optimization level " + std::to_string(options.tiling_optimization_level));
        }
        auto const* const timings = timing_cache(*config, {options.timings.data(), options.timings.size()});
#endif
        config->setProfilingVerbosity(
            options.list_kernels ? ProfilingVerbosity::kDETAILED : ProfilingVerbosity::kLAYER_NAMES_ONLY);
        for (auto const& ranges : options.profiles) {
            // The builder owns the profile.
            IOptimizationProfile* profile = mBuilder->createOptimizationProfile();
            if (profile == nullptr) {
                fail("create an optimization profile");
            }
            for (auto const& range : ranges.ranges) {
                std::string const name(range.input);
                auto set = [&](OptProfileSelector which, rust::Vec<std::int64_t> const& dims) {
                    return profile->setDimensions(name.c_str(), which, dims_of({dims.data(), dims.size()}));
                };
                if (!set(OptProfileSelector::kMIN, range.min) || !set(OptProfileSelector::kOPT, range.opt)
                    || !set(OptProfileSelector::kMAX, range.max)) {
                    fail("set the range of input " + name);
                }
            }
            if (config->addOptimizationProfile(profile) < 0) {
                fail("add an optimization profile");
            }
        }
        Monitor monitor(mListening->observer());
        config->setProgressMonitor(&monitor);
        // Serialized: concurrent builds for different compute capabilities interfere inside TensorRT.
        static std::mutex building;
        std::lock_guard<std::mutex> const lock(building);
        std::unique_ptr<IHostMemory> memory(mBuilder->buildSerializedNetwork(*mNetwork, *config));
        mCancelled = monitor.cancelled();
        if (!memory || memory->size() == 0) {
            fail("build the network");
        }
#if !AOTRON_CROSS_COMPILES
        // Without it, the next build only takes longer.
        mTimings.reset(timings != nullptr ? timings->serialize() : nullptr);
#endif
        return std::make_unique<PlanOf>(std::move(memory));
    }

    bool cancelled() const override
    {
        return mCancelled;
    }

    rust::Slice<const std::uint8_t> timings() const override
    {
        if (!mTimings) {
            return {};
        }
        return {static_cast<std::uint8_t const*>(mTimings->data()), mTimings->size()};
    }

private:
#if !AOTRON_CROSS_COMPILES
    // Gives the builder the timings of earlier builds, or an empty cache if they are of another version or GPU.
    ITimingCache const* timing_cache(IBuilderConfig& config, rust::Slice<const std::uint8_t> earlier)
    {
        for (auto const size : {earlier.size(), std::size_t{0}}) {
            auto& cache = mTimingCaches.emplace_back(config.createTimingCache(earlier.data(), size));
            if (cache && config.setTimingCache(*cache, false)) {
                return cache.get();
            }
            // What it says of timings that it does not take is not the reason of a later failure.
            mListening->forget();
        }
        return nullptr;
    }
#endif

    [[noreturn]] void fail(std::string const& action) const
    {
        throw std::runtime_error("cannot " + action + ": " + mListening->errors());
    }

    // Targets another GPU than the one in this machine, which only TensorRT for RTX can.
    void target(IBuilderConfig& config, std::int32_t capability) const
    {
        auto const action = "build for compute capability " + std::to_string(capability);
#if AOTRON_CROSS_COMPILES
        auto const wanted = static_cast<ComputeCapability>(capability);
        if (!config.setNbComputeCapabilities(1) || !config.setComputeCapability(wanted, 0)) {
            fail(action);
        }
#else
        throw std::runtime_error("cannot " + action + ": this library only builds for the GPU in this machine");
#endif
    }

    ITensor& at(std::uint32_t index) const
    {
        if (index >= mTensors.size()) {
            throw std::runtime_error("the network has no tensor " + std::to_string(index));
        }
        return *mTensors[index];
    }

    std::uint32_t keep(ITensor* tensor, std::string const& action)
    {
        if (tensor == nullptr) {
            fail(action);
        }
        mTensors.push_back(tensor);
        return static_cast<std::uint32_t>(mTensors.size() - 1);
    }

    // Names a layer or an attention, and registers its first output.
    template <typename Layer, typename = std::enable_if_t<!std::is_same_v<Layer, ITensor>>>
    std::uint32_t keep(Layer* layer, char const* operation)
    {
        auto const action = std::string("add ") + operation + " at " + mScope;
        if (layer == nullptr) {
            fail(action);
        }
        auto const name = mScope + "/" + std::to_string(mInScope++) + "." + operation;
        layer->setName(name.c_str());
        ITensor* tensor = layer->getOutput(0);
        if (tensor != nullptr) {
            // Querying the shape makes TensorRT infer it now, so that an error can name the layer.
            if (tensor->getDimensions().nbDims < 0) {
                fail(action);
            }
            tensor->setName(name.c_str());
        }
        return keep(tensor, action);
    }

    std::uint32_t constant(
        DataType type, rust::Slice<const std::int64_t> dims, std::vector<char> const& stored, std::int64_t count)
    {
        return keep(mNetwork->addConstant(dims_of(dims), Weights{type, stored.data(), count}), "constant");
    }

    IAttention* attend(std::uint32_t q, std::uint32_t keys, std::uint32_t values, CausalMaskKind causal)
    {
        auto* attention = mNetwork->addAttentionV2(
            at(q), at(keys), at(values), AttentionNormalizationOp::kSOFTMAX, causal);
        if (attention != nullptr) {
            mAttentions.push_back(attention);
        }
        return attention;
    }

    // Destroyed in reverse order: the listener receives the builder's last lines.
    Listening mListening;
    std::deque<std::vector<char>> mConstants; // read by TensorRT until the network is destroyed
    std::vector<rust::Box<ConstantBytes>> mBorrowed; // likewise
#if !AOTRON_CROSS_COMPILES
    std::vector<std::unique_ptr<ITimingCache>> mTimingCaches; // they outlive the builder, as TensorRT requires
#endif
    std::unique_ptr<IBuilder> mBuilder;
    std::unique_ptr<INetworkDefinition> mNetwork;
    std::vector<ITensor*> mTensors; // owned by the network
    std::vector<IAttention*> mAttentions; // likewise
    std::unique_ptr<IHostMemory> mTimings;
    std::string mScope;
    std::uint32_t mInScope = 0;
    bool mCancelled = false;
};

#include "runtime.inl"

class LibraryOf final : public Library {
public:
    explicit LibraryOf(std::string const& path)
        : mHandle(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL))
    {
        if (mHandle == nullptr) {
            char const* reason = dlerror();
            throw std::runtime_error(reason == nullptr ? "the system gives no reason" : reason);
        }
        auto* const version = symbol<std::int32_t (*)()>("getInferLibVersion");
        mCreateBuilder = symbol<Create>("createInferBuilder_INTERNAL");
        mVersion = version();
        link_map* map = nullptr;
        bool const known = dlinfo(mHandle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr && map->l_name != nullptr;
        mPath = known && *map->l_name != '\0' ? map->l_name : path;
    }

    std::int32_t version() const override
    {
        return mVersion;
    }

    rust::Vec<std::uint8_t> path() const override
    {
        rust::Vec<std::uint8_t> bytes;
        std::copy(mPath.begin(), mPath.end(), std::back_inserter(bytes));
        return bytes;
    }

    std::unique_ptr<Network> network(rust::Box<Observer> observer) const override
    {
        return std::make_unique<NetworkOf>(
            mLogger, std::make_shared<Listener>(std::move(observer)), [this](ILogger& logger) {
                std::lock_guard<std::mutex> lock(mMutex);
                return static_cast<IBuilder*>(mCreateBuilder(&logger, NV_TENSORRT_VERSION));
            });
    }

    std::unique_ptr<Runtime> runtime(rust::Box<Observer> observer) const override
    {
        auto const create = symbol<Create>("createInferRuntime_INTERNAL");
        return std::make_unique<RuntimeOf>(
            mLogger, std::make_shared<Listener>(std::move(observer)), [this, create](ILogger& logger) {
                std::lock_guard<std::mutex> lock(mMutex);
                return static_cast<IRuntime*>(create(&logger, NV_TENSORRT_VERSION));
            });
    }

private:
    using Create = void* (*) (void*, std::int32_t);

    template <typename Function> Function symbol(char const* name) const
    {
        void* const address = dlsym(mHandle, name);
        if (address == nullptr) {
            throw std::runtime_error(std::string("it has no function ") + name + ", so it is a different library");
        }
        return reinterpret_cast<Function>(address);
    }

    void* mHandle; // never closed
    std::string mPath;
    std::int32_t mVersion = 0;
    Create mCreateBuilder = nullptr;
    mutable std::mutex mMutex; // TensorRT sets up its process-wide state in the first builder's or runtime's creation
    mutable Logger mLogger;
};

} // namespace

std::unique_ptr<Library> load(std::string const& path)
{
    return std::make_unique<LibraryOf>(path);
}

std::int32_t header_version()
{
    return NV_TENSORRT_VERSION;
}

} // namespace AOTRON_FLAVOR
} // namespace aotron
