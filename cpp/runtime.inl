// Execution of plans: the second half of shim.inl, which includes this file inside its namespace.

// A runtime and its listener. Members are destroyed in reverse order of declaration, here and below: TensorRT requires
// contexts to be destroyed before their engine and engines before their runtime; the listener receives their last lines.
struct RuntimeState {
    Listening listening;
    std::unique_ptr<IRuntime> runtime;

    // A runtime and its objects are used by one thread at a time, not always the same. Called at the start of an
    // operation to attribute what is logged from now on to this thread.
    void begin() const
    {
        listening->belongs_here();
        listening->forget();
    }

    [[noreturn]] void fail(std::string const& action) const
    {
        throw std::runtime_error("cannot " + action + ": " + listening->errors());
    }
};

struct EngineState {
    std::shared_ptr<RuntimeState> runtime;
    std::unique_ptr<ICudaEngine> engine;
#if AOTRON_KEEPS_KERNELS
    std::unique_ptr<IRuntimeCache> kernels;
#endif

    std::unique_ptr<IRuntimeConfig> configuration() const
    {
        std::unique_ptr<IRuntimeConfig> config(engine->createRuntimeConfig());
        if (!config) {
            runtime->fail("configure the engine");
        }
        config->setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy::kUSER_MANAGED);
        return config;
    }
};

std::vector<std::int64_t> sizes_of(Dims const& dims)
{
    return {dims.d, dims.d + std::max(dims.nbDims, 0)};
}

template <typename Values> rust::Vec<std::int64_t> rust_vec(Values const& values)
{
    rust::Vec<std::int64_t> copy;
    std::copy(values.begin(), values.end(), std::back_inserter(copy));
    return copy;
}

cudaStream_t stream_of(std::uint64_t handle)
{
    return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(handle));
}

class ContextOf final : public Context {
public:
    ContextOf(std::shared_ptr<EngineState> state, std::uint32_t profile, bool specialize, std::uint64_t stream)
        : mState(std::move(state))
        , mConfig(mState->configuration())
    {
#if AOTRON_KEEPS_KERNELS
        // Kernels for exact shapes are compiled either eagerly, before their first run, or in the background while runs
        // use slower, generic ones.
        mConfig->setDynamicShapesKernelSpecializationStrategy(specialize
                ? DynamicShapesKernelSpecializationStrategy::kEAGER
                : DynamicShapesKernelSpecializationStrategy::kLAZY);
        if (mState->kernels && !mConfig->setRuntimeCache(*mState->kernels)) {
            mState->runtime->fail("use the kept kernels");
        }
#else
        static_cast<void>(specialize);
#endif
        mContext.reset(mState->engine->createExecutionContext(mConfig.get()));
        if (!mContext) {
            mState->runtime->fail("create an execution context");
        }
        if (!mContext->setOptimizationProfileAsync(static_cast<std::int32_t>(profile), stream_of(stream))) {
            mState->runtime->fail("choose profile " + std::to_string(profile));
        }
    }

    void memory(std::uint64_t address, std::uint64_t bytes) override
    {
        mState->runtime->begin();
        mContext->setDeviceMemoryV2(pointer(address), static_cast<std::int64_t>(bytes));
    }

    void shape(rust::Str name, rust::Slice<const std::int64_t> dims) override
    {
        mState->runtime->begin();
        mName.assign(name.data(), name.size());
        if (!mContext->setInputShape(mName.c_str(), dims_of(dims))) {
            mState->runtime->fail("set the shape of " + mName);
        }
    }

    void address(rust::Str name, std::uint64_t address) override
    {
        mState->runtime->begin();
        mName.assign(name.data(), name.size());
        if (!mContext->setTensorAddress(mName.c_str(), pointer(address))) {
            mState->runtime->fail("set the address of " + mName);
        }
    }

    bool capturable(std::uint64_t stream) const override
    {
#if AOTRON_KEEPS_KERNELS
        return mContext->isStreamCapturable(stream_of(stream));
#else
        static_cast<void>(stream);
        return true;
#endif
    }

    void enqueue(std::uint64_t stream) override
    {
        mState->runtime->begin();
        if (!mContext->enqueueV3(stream_of(stream))) {
            mState->runtime->fail("run the plan");
        }
    }

private:
    static void* pointer(std::uint64_t address)
    {
        return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
    }

    std::shared_ptr<EngineState> mState;
    std::unique_ptr<IRuntimeConfig> mConfig;
    std::unique_ptr<IExecutionContext> mContext;
    std::string mName; // a member to reuse its allocation: shapes and addresses are set in every step
};

class EngineOf final : public Engine {
public:
    explicit EngineOf(std::shared_ptr<EngineState> state)
        : mState(std::move(state))
    {
    }

    rust::Vec<TensorInfo> tensors() const override
    {
        ICudaEngine const& engine = *mState->engine;
        rust::Vec<TensorInfo> tensors;
        for (std::int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
            char const* name = engine.getIOTensorName(i);
            if (name == nullptr) {
                continue;
            }
            TensorInfo info;
            info.name = rust::String::lossy(name);
            info.input = engine.getTensorIOMode(name) == TensorIOMode::kINPUT;
            info.dtype = rust::String::lossy(name_of(engine.getTensorDataType(name)));
            info.dims = rust_vec(sizes_of(engine.getTensorShape(name)));
            info.on_device = engine.getTensorLocation(name) == TensorLocation::kDEVICE;
            if (char const* alias = engine.getAliasedInputTensor(name)) {
                info.alias = rust::String::lossy(alias);
            }
            tensors.push_back(std::move(info));
        }
        return tensors;
    }

    std::uint32_t profiles() const override
    {
        return static_cast<std::uint32_t>(std::max(mState->engine->getNbOptimizationProfiles(), 0));
    }

    rust::Vec<std::int64_t> largest(rust::Str input, std::uint32_t profile) const override
    {
        std::string const name(input);
        return rust_vec(sizes_of(mState->engine->getProfileShape(
            name.c_str(), static_cast<std::int32_t>(profile), OptProfileSelector::kMAX)));
    }

    std::uint64_t memory_bytes() const override
    {
        return static_cast<std::uint64_t>(std::max<std::int64_t>(mState->engine->getDeviceMemorySizeV2(), 0));
    }

    bool load_kernels(rust::Slice<const std::uint8_t> bytes) override
    {
#if AOTRON_KEEPS_KERNELS
        mState->runtime->begin();
        if (mState->kernels) {
            throw std::runtime_error("the engine already has a kernel cache, which its contexts may use");
        }
        mState->kernels.reset(mState->configuration()->createRuntimeCache());
        if (!mState->kernels) {
            mState->runtime->fail("create a kernel cache");
        }
        return !bytes.empty() && mState->kernels->deserialize(bytes.data(), bytes.size());
#else
        static_cast<void>(bytes);
        return false;
#endif
    }

    std::unique_ptr<Plan> kernels() const override
    {
#if AOTRON_KEEPS_KERNELS
        mState->runtime->begin();
        std::unique_ptr<IHostMemory> memory(mState->kernels ? mState->kernels->serialize() : nullptr);
        if (!memory) {
            mState->runtime->fail("write the compiled kernels");
        }
        return std::make_unique<PlanOf>(std::move(memory));
#else
        throw std::runtime_error("cannot write the compiled kernels: with this library they are part of the plan");
#endif
    }

    std::unique_ptr<Context> context(std::uint32_t profile, bool specialize, std::uint64_t stream) const override
    {
        if (profile >= profiles()) {
            throw std::runtime_error("the engine has no profile " + std::to_string(profile));
        }
        mState->runtime->begin();
        return std::make_unique<ContextOf>(mState, profile, specialize, stream);
    }

private:
    std::shared_ptr<EngineState> mState;
};

class RuntimeOf final : public Runtime {
public:
    using CreateRuntime = std::function<IRuntime*(ILogger&)>;

    RuntimeOf(Logger& logger, std::shared_ptr<Listener> listener, CreateRuntime const& createRuntime)
        : mState(new RuntimeState{{logger, std::move(listener)}, nullptr})
    {
        mState->runtime.reset(createRuntime(logger));
        if (!mState->runtime) {
            mState->fail("create a runtime");
        }
    }

    Validity validity(rust::Slice<const std::uint8_t> plan) const override
    {
        Validity found{};
#if AOTRON_KEEPS_KERNELS
        mState->begin();
        // TensorRT reads the whole header regardless of the number of bytes given.
        found.checked = static_cast<std::int64_t>(plan.size()) >= mState->runtime->getEngineHeaderSize();
        if (found.checked) {
            auto const verdict = mState->runtime->getEngineValidity(
                plan.data(), static_cast<std::int64_t>(plan.size()), &found.reasons);
            found.valid = verdict != EngineValidity::kINVALID;
            found.suboptimal = verdict == EngineValidity::kSUBOPTIMAL;
        }
#else
        static_cast<void>(plan);
#endif
        return found;
    }

    std::unique_ptr<Engine> deserialize(rust::Slice<const std::uint8_t> plan) const override
    {
        mState->begin();
        auto state = std::make_shared<EngineState>();
        state->runtime = mState;
        state->engine.reset(mState->runtime->deserializeCudaEngine(plan.data(), plan.size()));
        if (!state->engine) {
            mState->fail("read the plan");
        }
        return std::make_unique<EngineOf>(std::move(state));
    }

private:
    std::shared_ptr<RuntimeState> mState;
};
