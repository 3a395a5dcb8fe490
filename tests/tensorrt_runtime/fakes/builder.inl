// The builder of the fake TensorRT: it infers shapes as far as the shim asks for them, and its plan is the text of the
// network's inputs and outputs that the runtime reads. A step's inputs have the roles of their names, inputs of fixed
// shape are weights. Included by tensorrt_rtx.cpp.

#include "evaluate.inl"

Dims dims_of(std::vector<std::int64_t> const& sizes)
{
    Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), dims.d);
    return dims;
}

class TensorImpl final : public apiv::VTensor {
public:
    std::string name;
    DataType type = DataType::kFLOAT;
    std::function<Dims()> shape; // lazy: layers are configured after they are added
    std::string alias; // the cache that an update writes to
    bool isCache = false;

    void setName(char const* text) noexcept override { name = text; }
    char const* getName() const noexcept override { return name.c_str(); }
    Dims getDimensions() const noexcept override { return shape(); }
    DataType getType() const noexcept override { return type; }
    void setDimensions(Dims const& dimensions) noexcept override { unused("setDimensions"); }
    bool isNetworkInput() const noexcept override { unused("isNetworkInput"); }
    bool isNetworkOutput() const noexcept override { unused("isNetworkOutput"); }
    void setAllowedFormats(TensorFormats formats) noexcept override { unused("setAllowedFormats"); }
    TensorFormats getAllowedFormats() const noexcept override { unused("getAllowedFormats"); }
    bool isShapeTensor() const noexcept override { unused("isShapeTensor"); }
    bool isExecutionTensor() const noexcept override { unused("isExecutionTensor"); }
    void setDimensionName(int32_t index, char const* name) noexcept override { unused("setDimensionName"); }
    char const* getDimensionName(int32_t index) const noexcept override { unused("getDimensionName"); }
#if !FAKE_RTX
    void setBroadcastAcrossBatch(bool broadcastAcrossBatch) noexcept override { unused("setBroadcastAcrossBatch"); }
    bool getBroadcastAcrossBatch() const noexcept override { unused("getBroadcastAcrossBatch"); }
    TensorLocation getLocation() const noexcept override { unused("getLocation"); }
    void setLocation(TensorLocation location) noexcept override { unused("setLocation"); }
#endif
};
struct FakeTensor final : ITensor {
    FakeTensor() { mImpl = &impl; }
    TensorImpl impl;
};

class LayerImpl final : public apiv::VLayer {
public:
    LayerType type = LayerType::kIDENTITY;
    std::string name;
    std::vector<ITensor*> inputs;
    std::vector<std::unique_ptr<FakeTensor>> outputs;

    Dims in(std::size_t index) const { return inputs[index]->getDimensions(); }
    LayerType getType() const noexcept override { return type; }
    void setName(char const* text) noexcept override { name = text; }
    char const* getName() const noexcept override { return name.c_str(); }
    std::int32_t getNbInputs() const noexcept override { return static_cast<std::int32_t>(inputs.size()); }
    ITensor* getInput(std::int32_t index) const noexcept override { return inputs.at(static_cast<std::size_t>(index)); }
    std::int32_t getNbOutputs() const noexcept override { return static_cast<std::int32_t>(outputs.size()); }
    ITensor* getOutput(std::int32_t index) const noexcept override
    {
        return outputs.at(static_cast<std::size_t>(index)).get();
    }
    void setInput(std::int32_t index, ITensor& tensor) noexcept override
    {
        inputs.resize(std::max(inputs.size(), static_cast<std::size_t>(index) + 1));
        inputs[static_cast<std::size_t>(index)] = &tensor;
    }
    DataType getOutputType(int32_t index) const noexcept override { unused("getOutputType"); }
    void setMetadata(char const* docString) noexcept override { unused("setMetadata"); }
    char const* getMetadata() const noexcept override { unused("getMetadata"); }
    bool setNbRanks(int32_t nbRanks) noexcept override { unused("setNbRanks"); }
    int32_t getNbRanks() const noexcept override { unused("getNbRanks"); }
};

// A layer with settings that do not matter here.
template <typename Interface, typename Settings> struct FakeLayer final : Interface {
    FakeLayer()
    {
        this->mLayer = &layer;
        this->mImpl = &settings;
    }
    LayerImpl layer;
    Settings settings;
};

struct ActivationSettings final : apiv::VActivationLayer {
    void setActivationType(ActivationType type) noexcept override { unused("setActivationType"); }
    ActivationType getActivationType() const noexcept override { unused("getActivationType"); }
    void setAlpha(float alpha) noexcept override { unused("setAlpha"); }
    void setBeta(float beta) noexcept override { unused("setBeta"); }
    float getAlpha() const noexcept override { unused("getAlpha"); }
    float getBeta() const noexcept override { unused("getBeta"); }
};
struct ConcatenationSettings final : apiv::VConcatenationLayer {
    void setAxis(std::int32_t) noexcept override {}
    int32_t getAxis() const noexcept override { unused("getAxis"); }
};
struct ElementWiseSettings final : apiv::VElementWiseLayer {
    void setOperation(ElementWiseOperation op) noexcept override { unused("setOperation"); }
    ElementWiseOperation getOperation() const noexcept override { unused("getOperation"); }
};
struct GatherSettings final : apiv::VGatherLayer {
    void setGatherAxis(int32_t axis) noexcept override { unused("setGatherAxis"); }
    int32_t getGatherAxis() const noexcept override { unused("getGatherAxis"); }
    void setNbElementWiseDims(int32_t k) noexcept override { unused("setNbElementWiseDims"); }
    int32_t getNbElementWiseDims() const noexcept override { unused("getNbElementWiseDims"); }
    void setMode(GatherMode mode) noexcept override { unused("setMode"); }
    GatherMode getMode() const noexcept override { unused("getMode"); }
};
struct MatrixMultiplySettings final : apiv::VMatrixMultiplyLayer {
    void setOperation(int32_t index, MatrixOperation op) noexcept override { unused("setOperation"); }
    MatrixOperation getOperation(int32_t index) const noexcept override { unused("getOperation"); }
};
struct ConstantSettings final : apiv::VConstantLayer {
    void setWeights(Weights weights) noexcept override { unused("setWeights"); }
    Weights getWeights() const noexcept override { unused("getWeights"); }
    void setDimensions(Dims const& dimensions) noexcept override { unused("setDimensions"); }
    Dims getDimensions() const noexcept override { unused("getDimensions"); }
};
struct SliceSettings final : apiv::VSliceLayer {
    void setStart(Dims const& start) noexcept override { unused("setStart"); }
    Dims getStart() const noexcept override { unused("getStart"); }
    void setSize(Dims const& size) noexcept override { unused("setSize"); }
    Dims getSize() const noexcept override { unused("getSize"); }
    void setStride(Dims const& stride) noexcept override { unused("setStride"); }
    Dims getStride() const noexcept override { unused("getStride"); }
    void setMode(SampleMode mode) noexcept override { unused("setMode"); }
    SampleMode getMode() const noexcept override { unused("getMode"); }
    void setAxes(Dims const& axes) noexcept override { unused("setAxes"); }
    Dims getAxes() const noexcept override { unused("getAxes"); }
};
struct ShapeSettings final : apiv::VShapeLayer {
};
struct CastSettings final : apiv::VCastLayer {
    void setToType(DataType toType) noexcept override { unused("setToType"); }
    DataType getToType() const noexcept override { unused("getToType"); }
};
struct ReduceSettings final : apiv::VReduceLayer {
    void setOperation(ReduceOperation) noexcept override { unused("setOperation"); }
    ReduceOperation getOperation() const noexcept override { unused("getOperation"); }
    void setReduceAxes(uint32_t) noexcept override { unused("setReduceAxes"); }
    uint32_t getReduceAxes() const noexcept override { unused("getReduceAxes"); }
    void setKeepDimensions(bool) noexcept override { unused("setKeepDimensions"); }
    bool getKeepDimensions() const noexcept override { unused("getKeepDimensions"); }
};
struct TopKSettings final : apiv::VTopKLayer {
    void setOperation(TopKOperation op) noexcept override { unused("setOperation"); }
    TopKOperation getOperation() const noexcept override { unused("getOperation"); }
    void setK(int32_t k) noexcept override { unused("setK"); }
    int32_t getK() const noexcept override { unused("getK"); }
    void setReduceAxes(uint32_t reduceAxes) noexcept override { unused("setReduceAxes"); }
    uint32_t getReduceAxes() const noexcept override { unused("getReduceAxes"); }
    bool setIndicesType(DataType type) noexcept override { unused("setIndicesType"); }
    DataType getIndicesType() const noexcept override { unused("getIndicesType"); }
};
struct NormalizationSettings final : apiv::VNormalizationLayer {
    float epsilon = 0;
    void setEpsilon(float value) noexcept override { epsilon = value; }
    float getEpsilon() const noexcept override { unused("getEpsilon"); }
    void setAxes(uint32_t axesMask) noexcept override { unused("setAxes"); }
    uint32_t getAxes() const noexcept override { unused("getAxes"); }
    void setNbGroups(int64_t nbGroups) noexcept override { unused("setNbGroups"); }
    int64_t getNbGroups() const noexcept override { unused("getNbGroups"); }
    bool isV2() const noexcept override { unused("isV2"); }
};
struct RotarySettings final : apiv::VRotaryEmbeddingLayer {
    void setInterleaved(bool interleaved) noexcept override { unused("setInterleaved"); }
    bool getInterleaved() const noexcept override { unused("getInterleaved"); }
    bool setRotaryEmbeddingDim(int32_t rotaryEmbeddingDim) noexcept override { unused("setRotaryEmbeddingDim"); }
    int32_t getRotaryEmbeddingDim() const noexcept override { unused("getRotaryEmbeddingDim"); }
    void setInput(int32_t index, ITensor& input) noexcept override { unused("setInput"); }
};
struct UpdateSettings final : apiv::VKVCacheUpdateLayer {
    bool setCacheMode(KVCacheMode cacheMode) noexcept override { unused("setCacheMode"); }
    KVCacheMode getCacheMode() const noexcept override { unused("getCacheMode"); }
    bool setUpdateForm(AttentionIOForm form) noexcept override { unused("setUpdateForm"); }
    AttentionIOForm getUpdateForm() const noexcept override { unused("getUpdateForm"); }
    bool setUpdateLengths(ITensor* lengths) noexcept override { unused("setUpdateLengths"); }
    ITensor* getUpdateLengths() const noexcept override { unused("getUpdateLengths"); }
};
struct QuantizeSettings final : apiv::VQuantizeLayer {
    void setAxis(std::int32_t) noexcept override {}
    int32_t getAxis() const noexcept override { unused("getAxis"); }
    DataType getToType() const noexcept override { unused("getToType"); }
    void setToType(DataType toType) noexcept override { unused("setToType"); }
    Dims getBlockShape() const noexcept override { unused("getBlockShape"); }
    bool setBlockShape(Dims const& blockShape) noexcept override { unused("setBlockShape"); }
};
struct DequantizeSettings final : apiv::VDequantizeLayer {
    std::int32_t axis = 0;
    void setAxis(std::int32_t value) noexcept override { axis = value; }
    bool setBlockShape(Dims const&) noexcept override { return true; }
    int32_t getAxis() const noexcept override { unused("getAxis"); }
    DataType getToType() const noexcept override { unused("getToType"); }
    void setToType(DataType toType) noexcept override { unused("setToType"); }
    Dims getBlockShape() const noexcept override { unused("getBlockShape"); }
};
struct SelectSettings final : apiv::VSelectLayer {
};
struct ShuffleSettings final : apiv::VShuffleLayer {
    Permutation transpose{};
    bool transposes = false;
    Dims reshaped{};
    bool reshapes = false;
    void setFirstTranspose(Permutation const& order) noexcept override
    {
        transpose = order;
        transposes = true;
    }
    void setReshapeDimensions(Dims const& dims) noexcept override
    {
        reshaped = dims;
        reshapes = true;
    }
    void setZeroIsPlaceholder(bool) noexcept override {}
    Permutation const& getFirstTranspose() const noexcept override { unused("getFirstTranspose"); }
    Dims getReshapeDimensions() const noexcept override { unused("getReshapeDimensions"); }
    void setSecondTranspose(Permutation const& permutation) noexcept override { unused("setSecondTranspose"); }
    Permutation const& getSecondTranspose() const noexcept override { unused("getSecondTranspose"); }
    bool getZeroIsPlaceholder() const noexcept override { unused("getZeroIsPlaceholder"); }
};

class AttentionImpl final : public apiv::VAttention {
public:
    LayerImpl layer;
    bool setName(char const* name) noexcept override
    {
        layer.name = name;
        return true;
    }
    char const* getName() const noexcept override { return layer.name.c_str(); }
    std::int32_t getNbOutputs() const noexcept override { return layer.getNbOutputs(); }
    ITensor* getOutput(std::int32_t index) const noexcept override { return layer.getOutput(index); }
    ITensor* mask = nullptr;
    bool setMask(ITensor& tensor) noexcept override
    {
        mask = &tensor;
        return true;
    }
    bool setDecomposable(bool) noexcept override { return true; }
    bool setKeyValueLengths(ITensor*) noexcept override { return true; }
    bool setInput(int32_t index, ITensor& input) noexcept override { unused("setInput"); }
    int32_t getNbInputs() const noexcept override { unused("getNbInputs"); }
    ITensor* getInput(int32_t index) const noexcept override { unused("getInput"); }
    bool setNormalizationOperation(AttentionNormalizationOp op) noexcept override { unused("setNormalizationOperation"); }
    AttentionNormalizationOp getNormalizationOperation() const noexcept override { unused("getNormalizationOperation"); }
    bool setCausal(bool isCausal) noexcept override { unused("setCausal"); }
    bool getCausal() const noexcept override { unused("getCausal"); }
    ITensor* getMask() const noexcept override { unused("getMask"); }
    bool getDecomposable() const noexcept override { unused("getDecomposable"); }
    bool setNormalizationQuantizeScale(ITensor& tensor) noexcept override { unused("setNormalizationQuantizeScale"); }
    ITensor* getNormalizationQuantizeScale() const noexcept override { unused("getNormalizationQuantizeScale"); }
    bool setNormalizationQuantizeToType(DataType type) noexcept override { unused("setNormalizationQuantizeToType"); }
    DataType getNormalizationQuantizeToType() const noexcept override { unused("getNormalizationQuantizeToType"); }
    bool setMetadata(char const* docString) noexcept override { unused("setMetadata"); }
    char const* getMetadata() const noexcept override { unused("getMetadata"); }
    bool setNbRanks(int32_t nbRanks) noexcept override { unused("setNbRanks"); }
    int32_t getNbRanks() const noexcept override { unused("getNbRanks"); }
    bool setCausalKind(CausalMaskKind kind) noexcept override { unused("setCausalKind"); }
    CausalMaskKind getCausalKind() const noexcept override { unused("getCausalKind"); }
    bool setQueryForm(AttentionIOForm form) noexcept override { unused("setQueryForm"); }
    AttentionIOForm getQueryForm() const noexcept override { unused("getQueryForm"); }
    bool setKeyValueForm(AttentionIOForm form) noexcept override { unused("setKeyValueForm"); }
    AttentionIOForm getKeyValueForm() const noexcept override { unused("getKeyValueForm"); }
    bool setQueryLengths(ITensor* lengths) noexcept override { unused("setQueryLengths"); }
    ITensor* getQueryLengths() const noexcept override { unused("getQueryLengths"); }
    ITensor* getKeyValueLengths() const noexcept override { unused("getKeyValueLengths"); }
};
struct FakeAttention final : IAttention {
    FakeAttention() { mImpl = &impl; }
    AttentionImpl impl;
};

class NetworkImpl final : public apiv::VNetworkDefinition {
public:
    // Computes the layers, in the order they were added.
    std::vector<evaluate::Step> steps;
    bool holdsCodes = false; // an input is a matrix of E4M3 codes
    bool holdsConstantCodes = false;

    // How it holds E4M3 codes, as the environment names it.
    bool is(char const* variable) const
    {
        char const* const kind = std::getenv(variable);
        return kind != nullptr
            && ((holdsCodes && std::strcmp(kind, "inputs") == 0)
                || (holdsConstantCodes && std::strcmp(kind, "constants") == 0) || std::strcmp(kind, "any") == 0);
    }
    std::vector<std::unique_ptr<FakeTensor>> inputs;
    std::vector<FakeTensor*> outputs;

    ITensor* addInput(char const* name, DataType type, Dims const& dims) noexcept override
    {
        auto tensor = std::make_unique<FakeTensor>();
        tensor->impl.name = name;
        tensor->impl.type = type;
        tensor->impl.shape = [dims] { return dims; };
        holdsCodes = holdsCodes || (type == DataType::kFP8 && dims.nbDims == 2);
        inputs.push_back(std::move(tensor));
        return inputs.back().get();
    }
    void markOutput(ITensor& tensor) noexcept override { outputs.push_back(static_cast<FakeTensor*>(&tensor)); }
    std::int32_t getNbLayers() const noexcept override { return static_cast<std::int32_t>(mLayers.size()); }
    ILayer* getLayer(std::int32_t index) const noexcept override { return mLayers.at(static_cast<std::size_t>(index)); }

    IActivationLayer* addActivation(ITensor& x, ActivationType) noexcept override
    {
        auto* made = like<FakeLayer<IActivationLayer, ActivationSettings>>(LayerType::kACTIVATION, {&x}, x.getType());
        computes(made->layer, [&x](evaluate::Values& of) {
            auto out = of.at(&x);
            std::transform(out.of.begin(), out.of.end(), out.of.begin(), [](float v) { return v < 0 ? 0 : v; });
            return out;
        });
        return made;
    }
    ICastLayer* addCast(ITensor& x, DataType type) noexcept override
    {
        auto* made = like<FakeLayer<ICastLayer, CastSettings>>(LayerType::kCAST, {&x}, type);
        computes(made->layer, [&x](evaluate::Values& of) { return of.at(&x); });
        return made;
    }
    INormalizationLayer* addNormalizationV2(ITensor& x, ITensor& scale, ITensor& bias, std::uint32_t) noexcept override
    {
        auto* made = like<FakeLayer<INormalizationLayer, NormalizationSettings>>(
            LayerType::kNORMALIZATION, {&x, &scale, &bias}, x.getType());
        computes(made->layer, [&x, &scale, &bias, made](evaluate::Values& of) {
            return evaluate::normalized(of.at(&x), of.at(&scale), of.at(&bias), made->settings.epsilon);
        });
        return made;
    }
    IRotaryEmbeddingLayer* addRotaryEmbedding(
        ITensor& x, ITensor& cos, ITensor& sin, bool, std::int32_t) noexcept override
    {
        auto* made = like<FakeLayer<IRotaryEmbeddingLayer, RotarySettings>>(
            LayerType::kROTARY_EMBEDDING, {&x, &cos, &sin}, x.getType());
        computes(made->layer, [&x, &cos, &sin](evaluate::Values& of) {
            return evaluate::rotated(of.at(&x), of.at(&cos), of.at(&sin));
        });
        return made;
    }
    IQuantizeLayer* addQuantizeV2(ITensor& x, ITensor& scale, DataType type) noexcept override
    {
        auto* made = like<FakeLayer<IQuantizeLayer, QuantizeSettings>>(LayerType::kQUANTIZE, {&x, &scale}, type);
        computes(made->layer, [&x, &scale](evaluate::Values& of) {
            auto out = of.at(&x);
            auto const by = of.at(&scale).of.at(0);
            std::transform(out.of.begin(), out.of.end(), out.of.begin(),
                [by](float v) { return evaluate::rounded_f8(v / by); });
            return out;
        });
        return made;
    }
    IDequantizeLayer* addDequantizeV2(ITensor& x, ITensor& scale, DataType type) noexcept override
    {
        auto* made = like<FakeLayer<IDequantizeLayer, DequantizeSettings>>(LayerType::kDEQUANTIZE, {&x, &scale}, type);
        computes(made->layer, [&x, &scale, made](evaluate::Values& of) {
            return evaluate::dequantized(of.at(&x), of.at(&scale), made->settings.axis);
        });
        return made;
    }
    IElementWiseLayer* addElementWise(ITensor& x, ITensor& y, ElementWiseOperation op) noexcept override
    {
        auto* made = made_of<FakeLayer<IElementWiseLayer, ElementWiseSettings>>(LayerType::kELEMENTWISE, {&x, &y});
        output(made->layer, x.getType(), [layer = &made->layer] {
            Dims dims = layer->in(0);
            for (std::int32_t i = 0; i < dims.nbDims; ++i) {
                dims.d[i] = dims.d[i] == 1 ? layer->in(1).d[i] : dims.d[i];
            }
            return dims;
        });
        computes(made->layer, [&x, &y, op](evaluate::Values& of) {
            return evaluate::elementwise(of.at(&x), of.at(&y), op == ElementWiseOperation::kPROD);
        });
        return made;
    }
    ISelectLayer* addSelect(ITensor& condition, ITensor& x, ITensor& y) noexcept override
    {
        auto* made = made_of<FakeLayer<ISelectLayer, SelectSettings>>(LayerType::kSELECT, {&condition, &x, &y});
        output(made->layer, x.getType(), [layer = &made->layer] { return layer->in(1); });
        return made;
    }
    IConcatenationLayer* addConcatenation(ITensor* const* parts, std::int32_t count) noexcept override
    {
        auto* made = made_of<FakeLayer<IConcatenationLayer, ConcatenationSettings>>(
            LayerType::kCONCATENATION, {parts, parts + count});
        output(made->layer, parts[0]->getType(), [layer = &made->layer] {
            Dims dims = layer->in(0);
            for (std::size_t i = 1; i < layer->inputs.size(); ++i) {
                dims.d[0] += layer->in(i).d[0];
            }
            return dims;
        });
        computes(made->layer, [layer = &made->layer](evaluate::Values& of) {
            evaluate::Value out{{0}, {}};
            for (auto const* part : layer->inputs) {
                auto const& values = of.at(part).of;
                out.of.insert(out.of.end(), values.begin(), values.end());
            }
            out.dims[0] = static_cast<std::int64_t>(out.of.size());
            return out;
        });
        return made;
    }
    IConstantLayer* addConstant(Dims const& dims, Weights weights) noexcept override
    {
        auto* made = made_of<FakeLayer<IConstantLayer, ConstantSettings>>(LayerType::kCONSTANT, {});
        output(made->layer, weights.type, [dims] { return dims; });
        holdsConstantCodes = holdsConstantCodes || (weights.type == DataType::kFP8 && dims.nbDims == 2);
        if (std::getenv("FAKE_COMPUTES") != nullptr) {
            auto value = evaluate::read(weights.type, {dims.d, dims.d + dims.nbDims}, weights.values);
            computes(made->layer, [value = std::move(value)](evaluate::Values&) { return value; });
        }
        return made;
    }
    IShapeLayer* addShape(ITensor& x) noexcept override
    {
        auto* made = made_of<FakeLayer<IShapeLayer, ShapeSettings>>(LayerType::kSHAPE, {&x});
        output(made->layer, DataType::kINT64, [layer = &made->layer] { return dims_of({layer->in(0).nbDims}); });
        computes(made->layer, [&x](evaluate::Values& of) {
            auto const& dims = of.at(&x).dims;
            return evaluate::Value{{static_cast<std::int64_t>(dims.size())}, {dims.begin(), dims.end()}};
        });
        return made;
    }
    IGatherLayer* addGather(ITensor& table, ITensor& indices, std::int32_t) noexcept override
    {
        auto* made = made_of<FakeLayer<IGatherLayer, GatherSettings>>(LayerType::kGATHER, {&table, &indices});
        output(made->layer, table.getType(), [layer = &made->layer] {
            Dims const table = layer->in(0);
            Dims dims = layer->in(1);
            for (std::int32_t i = 1; i < table.nbDims; ++i) {
                dims.d[dims.nbDims++] = table.d[i];
            }
            return dims;
        });
        computes(made->layer,
            [&table, &indices](evaluate::Values& of) { return evaluate::gathered(of.at(&table), of.at(&indices)); });
        return made;
    }
    IMatrixMultiplyLayer* addMatrixMultiply(
        ITensor& x, MatrixOperation, ITensor& weight, MatrixOperation op) noexcept override
    {
        auto* made = made_of<FakeLayer<IMatrixMultiplyLayer, MatrixMultiplySettings>>(
            LayerType::kMATRIX_MULTIPLY, {&x, &weight});
        output(made->layer, x.getType(), [layer = &made->layer, op] {
            Dims dims = layer->in(0);
            Dims const weight = layer->in(1);
            dims.d[dims.nbDims - 1] = weight.d[op == MatrixOperation::kTRANSPOSE ? 0 : weight.nbDims - 1];
            return dims;
        });
        computes(made->layer, [&x, &weight, op](evaluate::Values& of) {
            return evaluate::multiplied(of.at(&x), of.at(&weight), op == MatrixOperation::kTRANSPOSE);
        });
        return made;
    }
    IShuffleLayer* addShuffle(ITensor& x) noexcept override
    {
        auto* made = made_of<FakeLayer<IShuffleLayer, ShuffleSettings>>(LayerType::kSHUFFLE, {&x});
        output(made->layer, x.getType(), [made] {
            if (made->layer.inputs.size() > 1) {
                return unknown(made->layer.in(1));
            }
            if (made->settings.reshapes) {
                return made->settings.reshaped;
            }
            Dims dims = made->layer.in(0);
            if (made->settings.transposes) {
                Dims const from = dims;
                for (std::int32_t i = 0; i < dims.nbDims; ++i) {
                    dims.d[i] = from.d[made->settings.transpose.order[i]];
                }
            }
            return dims;
        });
        computes(made->layer, [&x, made](evaluate::Values& of) {
            auto out = of.at(&x);
            if (made->settings.transposes) {
                out = evaluate::transposed(out, made->settings.transpose.order);
            }
            if (made->layer.inputs.size() > 1) {
                return evaluate::reshaped(std::move(out), evaluate::sizes(of.at(made->layer.inputs[1])));
            }
            auto const& dims = made->settings.reshaped;
            return made->settings.reshapes ? evaluate::reshaped(std::move(out), {dims.d, dims.d + dims.nbDims}) : out;
        });
        return made;
    }
    ISliceLayer* addSlice(ITensor& x, Dims const& start, Dims const& size, Dims const&) noexcept override
    {
        auto* made = made_of<FakeLayer<ISliceLayer, SliceSettings>>(LayerType::kSLICE, {&x});
        output(made->layer, x.getType(), [layer = &made->layer, size] {
            return layer->inputs.size() > 2 ? unknown(layer->in(2)) : size;
        });
        computes(made->layer, [&x, start, layer = &made->layer](evaluate::Values& of) {
            return evaluate::sliced(of.at(&x), start, evaluate::sizes(of.at(layer->inputs.at(2))));
        });
        return made;
    }
    ITopKLayer* addTopK(ITensor& x, TopKOperation, std::int32_t k, std::uint32_t) noexcept override { return top(x, k); }
    ITopKLayer* addTopKV2(ITensor& x, TopKOperation, std::int32_t k, std::uint32_t, DataType) noexcept override
    {
        return top(x, k);
    }
    IReduceLayer* addReduce(ITensor& x, ReduceOperation, std::uint32_t, bool) noexcept override
    {
        auto* made = made_of<FakeLayer<IReduceLayer, ReduceSettings>>(LayerType::kREDUCE, {&x});
        output(made->layer, x.getType(), [layer = &made->layer] {
            Dims dims = layer->in(0);
            --dims.nbDims;
            return dims;
        });
        computes(made->layer, [&x](evaluate::Values& of) { return evaluate::summed(of.at(&x)); });
        return made;
    }
    IKVCacheUpdateLayer* addKVCacheUpdate(
        ITensor& cache, ITensor& update, ITensor& indices, KVCacheMode) noexcept override
    {
        auto* made = like<FakeLayer<IKVCacheUpdateLayer, UpdateSettings>>(
            LayerType::kKVCACHE_UPDATE, {&cache, &update, &indices}, cache.getType());
        static_cast<FakeTensor&>(cache).impl.isCache = true;
        made->layer.outputs[0]->impl.alias = cache.getName();
        computes(made->layer, [&cache, &update, &indices](evaluate::Values& of) {
            return evaluate::updated(of.at(&cache), of.at(&update), of.at(&indices));
        });
        return made;
    }
    IAttention* addAttentionV2(
        ITensor& q, ITensor& keys, ITensor& values, AttentionNormalizationOp, CausalMaskKind) noexcept override
    {
        auto* made = new FakeAttention;
        output(made->impl.layer, q.getType(), [&q] { return q.getDimensions(); });
        computes(made->impl.layer, [&q, &keys, &values, made](evaluate::Values& of) {
            auto const* const mask = made->impl.mask == nullptr ? nullptr : &of.at(made->impl.mask);
            return evaluate::attended(of.at(&q), of.at(&keys), of.at(&values), mask);
        });
        return made;
    }
    ILRNLayer* addLRN(ITensor& input, int64_t window, float alpha, float beta, float k) noexcept override { unused("addLRN"); }
    IScaleLayer* addScale( ITensor& input, ScaleMode mode, Weights shift, Weights scale, Weights power) noexcept override { unused("addScale"); }
    ISoftMaxLayer* addSoftMax(ITensor& input) noexcept override { unused("addSoftMax"); }
    IUnaryLayer* addUnary(ITensor& input, UnaryOperation operation) noexcept override { unused("addUnary"); }
    int32_t getNbInputs() const noexcept override { unused("getNbInputs"); }
    ITensor* getInput(int32_t index) const noexcept override { unused("getInput"); }
    int32_t getNbOutputs() const noexcept override { unused("getNbOutputs"); }
    ITensor* getOutput(int32_t index) const noexcept override { unused("getOutput"); }
    IRaggedSoftMaxLayer* addRaggedSoftMax(ITensor& input, ITensor& bounds) noexcept override { unused("addRaggedSoftMax"); }
    IIdentityLayer* addIdentity(ITensor& input) noexcept override { unused("addIdentity"); }
    void removeTensor(ITensor& tensor) noexcept override { unused("removeTensor"); }
    void unmarkOutput(ITensor& tensor) noexcept override { unused("unmarkOutput"); }
    void setName(char const* name) noexcept override { unused("setName"); }
    char const* getName() const noexcept override { unused("getName"); }
    bool hasImplicitBatchDimension() const noexcept override { unused("hasImplicitBatchDimension"); }
    bool markOutputForShapes(ITensor& tensor) noexcept override { unused("markOutputForShapes"); }
    bool unmarkOutputForShapes(ITensor& tensor) noexcept override { unused("unmarkOutputForShapes"); }
    IParametricReLULayer* addParametricReLU(ITensor& input, ITensor& slope) noexcept override { unused("addParametricReLU"); }
    IConvolutionLayer* addConvolutionNd( ITensor& input, int64_t nbOutputMaps, Dims const& kernelSize, Weights kernelWeights, Weights biasWeights) noexcept override { unused("addConvolutionNd"); }
    IPoolingLayer* addPoolingNd(ITensor& input, PoolingType type, Dims const& windowSize) noexcept override { unused("addPoolingNd"); }
    IDeconvolutionLayer* addDeconvolutionNd( ITensor& input, int64_t nbOutputMaps, Dims const& kernelSize, Weights kernelWeights, Weights biasWeights) noexcept override { unused("addDeconvolutionNd"); }
    IScaleLayer* addScaleNd( ITensor& input, ScaleMode mode, Weights shift, Weights scale, Weights power, int32_t channelAxis) noexcept override { unused("addScaleNd"); }
    IResizeLayer* addResize(ITensor& input) noexcept override { unused("addResize"); }
    ILoop* addLoop() noexcept override { unused("addLoop"); }
    IPaddingLayer* addPaddingNd(ITensor& input, Dims const& prePadding, Dims const& postPadding) noexcept override { unused("addPaddingNd"); }
    bool setWeightsName(Weights weights, char const* name) noexcept override { unused("setWeightsName"); }
    void setErrorRecorder(IErrorRecorder* recorder) noexcept override { unused("setErrorRecorder"); }
    IErrorRecorder* getErrorRecorder() const noexcept override { unused("getErrorRecorder"); }
    IGatherLayer* addGatherV2(ITensor& data, ITensor& indices, GatherMode mode) noexcept override { unused("addGatherV2"); }
    IIfConditional* addIfConditional() noexcept override { unused("addIfConditional"); }
    IScatterLayer* addScatter(ITensor& data, ITensor& indices, ITensor& updates, ScatterMode mode) noexcept override { unused("addScatter"); }
    IEinsumLayer* addEinsum(ITensor* const* inputs, int32_t nbInputs, char const* equation) noexcept override { unused("addEinsum"); }
    IAssertionLayer* addAssertion(ITensor& condition, char const* message) noexcept override { unused("addAssertion"); }
    IOneHotLayer* addOneHot(ITensor& indices, ITensor& values, ITensor& depth, int32_t axis) noexcept override { unused("addOneHot"); }
    INonZeroLayer* addNonZero(ITensor& input) noexcept override { unused("addNonZero"); }
    IGridSampleLayer* addGridSample(ITensor& input, ITensor& grid) noexcept override { unused("addGridSample"); }
    INMSLayer* addNMS(ITensor& boxes, ITensor& scores, ITensor& maxOutputBoxesPerClass) noexcept override { unused("addNMS"); }
    IReverseSequenceLayer* addReverseSequence(ITensor& input, ITensor& sequenceLens) noexcept override { unused("addReverseSequence"); }
    INormalizationLayer* addNormalization( ITensor& input, ITensor& scale, ITensor& bias, uint32_t axesMask) noexcept override { unused("addNormalization"); }
    IBuilder& getBuilder() const noexcept override { unused("getBuilder"); }
    NetworkDefinitionCreationFlags getFlags() const noexcept override { unused("getFlags"); }
    bool getFlag(NetworkDefinitionCreationFlag networkDefinitionCreationFlag) const noexcept override { unused("getFlag"); }
    IFillLayer* addFillV2(Dims const& dimensions, FillOperation op, DataType outputType) noexcept override { unused("addFillV2"); }
    bool markDebug(ITensor& tensor) noexcept override { unused("markDebug"); }
    bool unmarkDebug(ITensor& tensor) noexcept override { unused("unmarkDebug"); }
    bool isDebugTensor(ITensor const& tensor) const noexcept override { unused("isDebugTensor"); }
    bool markWeightsRefittable(char const* name) noexcept override { unused("markWeightsRefittable"); }
    bool unmarkWeightsRefittable(char const* name) noexcept override { unused("unmarkWeightsRefittable"); }
    bool areWeightsMarkedRefittable(char const* name) const noexcept override { unused("areWeightsMarkedRefittable"); }
    ISqueezeLayer* addSqueeze(ITensor& input, ITensor& axes) noexcept override { unused("addSqueeze"); }
    IUnsqueezeLayer* addUnsqueeze(ITensor& input, ITensor& axes) noexcept override { unused("addUnsqueeze"); }
    IDynamicQuantizeLayer* addDynamicQuantize( ITensor& input, int32_t axis, int32_t blockSize, DataType toType, DataType scaleType) noexcept override { unused("addDynamicQuantize"); }
    ICumulativeLayer* addCumulative( ITensor& input, ITensor& axis, CumulativeOperation operation, bool exclusive, bool reverse) noexcept override { unused("addCumulative"); }
    bool markUnfusedTensorsAsDebugTensors() noexcept override { unused("markUnfusedTensorsAsDebugTensors"); }
    bool unmarkUnfusedTensorsAsDebugTensors() noexcept override { unused("unmarkUnfusedTensorsAsDebugTensors"); }
    INonZeroLayer* addNonZeroV2(ITensor& input, DataType indicesType) noexcept override { unused("addNonZeroV2"); }
    INMSLayer* addNMSV2( ITensor& boxes, ITensor& scores, ITensor& maxOutputBoxesPerClass, DataType indicesType) noexcept override { unused("addNMSV2"); }
    IAttention* addAttention( ITensor& query, ITensor& key, ITensor& value, AttentionNormalizationOp normOp, bool isCausal) noexcept override { unused("addAttention"); }
    IDynamicQuantizeLayer* addDynamicQuantizeV2( ITensor& input, Dims const& blockShape, DataType toType, DataType scaleType) noexcept override { unused("addDynamicQuantizeV2"); }
    IMoELayer* addMoE( ITensor& hiddenStates, ITensor& selectedExpertsForTokens, ITensor& scoresForSelectedExperts) noexcept override { unused("addMoE"); }
    IDistCollectiveLayer* addDistCollective(ITensor& input, CollectiveOperation distCollectiveOp, ReduceOperation reduceOp, int64_t root, int64_t* groups, int64_t groupSize) noexcept override { unused("addDistCollective"); }
    ISqueezeLayer* addSqueezeV2(ITensor& input, ITensor* axes) noexcept override { unused("addSqueezeV2"); }
#if !FAKE_RTX
    IPluginV2Layer* addPluginV2(ITensor* const* inputs, int32_t nbInputs, IPluginV2& plugin) noexcept override { unused("addPluginV2"); }
    IPluginV3Layer* addPluginV3(ITensor* const* inputs, int32_t nbInputs, ITensor* const* shapeInputs, int32_t nbShapeInputs, IPluginV3& plugin) noexcept override { unused("addPluginV3"); }
#endif

private:
    // Shape of as many dimensions as a shape tensor has elements.
    static Dims unknown(Dims const& of) { return dims_of(std::vector<std::int64_t>(static_cast<std::size_t>(of.d[0]), -1)); }

    // Rounds a layer's result to its type and keeps it.
    static void keep(evaluate::Values& of, LayerImpl const& layer, evaluate::Value value)
    {
        if (layer.outputs[0]->impl.type == DataType::kBF16) {
            std::transform(value.of.begin(), value.of.end(), value.of.begin(), model::rounded);
        }
        of[layer.outputs[0].get()] = std::move(value);
    }
    template <typename Compute> void computes(LayerImpl& layer, Compute compute)
    {
        steps.push_back([layer = &layer, compute](evaluate::Values& of) { keep(of, *layer, compute(of)); });
    }

    template <typename Made> Made* made_of(LayerType type, std::vector<ITensor*> inputs)
    {
        auto* made = new Made; // never freed, like everything that a test's process makes of networks
        made->layer.type = type;
        made->layer.inputs = std::move(inputs);
        mLayers.push_back(made);
        return made;
    }
    static void output(LayerImpl& layer, DataType type, std::function<Dims()> shape)
    {
        layer.outputs.push_back(std::make_unique<FakeTensor>());
        layer.outputs.back()->impl.type = type;
        layer.outputs.back()->impl.shape = std::move(shape);
    }
    // A layer whose result has the shape of its first input.
    template <typename Made> Made* like(LayerType type, std::vector<ITensor*> inputs, DataType result)
    {
        auto* made = made_of<Made>(type, std::move(inputs));
        output(made->layer, result, [layer = &made->layer] { return layer->in(0); });
        return made;
    }
    ITopKLayer* top(ITensor& x, std::int32_t k)
    {
        auto* made = made_of<FakeLayer<ITopKLayer, TopKSettings>>(LayerType::kTOPK, {&x});
        auto const shape = [layer = &made->layer, k] {
            Dims dims = layer->in(0);
            dims.d[dims.nbDims - 1] = k;
            return dims;
        };
        output(made->layer, x.getType(), shape);
        output(made->layer, DataType::kINT32, shape);
        steps.push_back([&x, k, layer = &made->layer](evaluate::Values& of) {
            auto [values, ids] = evaluate::largest(of.at(&x), k);
            of[layer->outputs[0].get()] = std::move(values);
            of[layer->outputs[1].get()] = std::move(ids);
        });
        return made;
    }

    std::vector<ILayer*> mLayers;
};
struct FakeNetwork final : INetworkDefinition {
    FakeNetwork() { mImpl = &impl; }
    NetworkImpl& impl = *new NetworkImpl; // never freed: plans may compute it
};

// Networks that plans of this process compute; never freed.
std::vector<NetworkImpl const*> gNetworks;

void compute_network(Run const& run)
{
    NetworkImpl const& net = *gNetworks.at(static_cast<std::size_t>(run.spec->network));
    evaluate::Values of;
    for (auto const& input : net.inputs) {
        auto const& bound = run.bound.at(input->impl.name);
        of[input.get()] = evaluate::read(input->impl.type, bound.dims, reinterpret_cast<void const*>(bound.address));
    }
    for (auto const& step : net.steps) {
        step(of);
    }
    for (auto const* output : net.outputs) {
        auto const& value = of.at(output);
        auto* const data = reinterpret_cast<void*>(run.bound.at(output->impl.name).address);
        bool const isWrong = output->impl.name == "logits" && net.is("FAKE_FAULT");
        for (std::size_t i = 0; i < value.of.size(); ++i) {
            evaluate::store(output->impl.type, data, static_cast<std::int64_t>(i), value.of[i] * (isWrong ? 1.5F : 1.0F));
        }
    }
    if (net.is("FAKE_SLOW")) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
}

class ProfileImpl final : public apiv::VOptimizationProfile {
public:
    std::map<std::string, Dims> largest;
    std::map<std::string, Dims> least;
    bool setDimensions(char const* name, OptProfileSelector which, Dims const& dims) noexcept override
    {
        if (which == OptProfileSelector::kMIN) {
            least[name] = dims;
        }
        if (which == OptProfileSelector::kMAX) {
            largest[name] = dims;
        }
        return true;
    }
    Dims getDimensions(char const* inputName, OptProfileSelector select) const noexcept override { unused("getDimensions"); }
    int32_t getNbShapeValues(char const* inputName) const noexcept override { unused("getNbShapeValues"); }
    bool setExtraMemoryTarget(float target) noexcept override { unused("setExtraMemoryTarget"); }
    float getExtraMemoryTarget() const noexcept override { unused("getExtraMemoryTarget"); }
    bool isValid() const noexcept override { unused("isValid"); }
    bool setShapeValuesV2( char const* inputName, OptProfileSelector select, int64_t const* values, int32_t nbValues) noexcept override { unused("setShapeValuesV2"); }
    int64_t const* getShapeValuesV2( char const* inputName, OptProfileSelector select) const noexcept override { unused("getShapeValuesV2"); }
    void setProfileStream(cudaStream_t stream) noexcept override { unused("setProfileStream"); }
    cudaStream_t getProfileStream() const noexcept override { unused("getProfileStream"); }
};
struct FakeProfile final : IOptimizationProfile {
    FakeProfile() { mImpl = &impl; }
    ProfileImpl impl;
};

class TimingCacheImpl final : public apiv::VTimingCache {
public:
    std::string content;
    IHostMemory* serialize() const noexcept override { return new FakeHostMemory(content); }
    bool combine(ITimingCache const& inputCache, bool ignoreMismatch) noexcept override { unused("combine"); }
    bool reset() noexcept override { unused("reset"); }
    int64_t queryKeys(TimingCacheKey* keyBuffer, int64_t capacity) const noexcept override { unused("queryKeys"); }
    TimingCacheValue query(TimingCacheKey const& key) const noexcept override { unused("query"); }
    bool update(TimingCacheKey const& key, TimingCacheValue const& value) noexcept override { unused("update"); }
};
struct FakeTimingCache final : ITimingCache {
    explicit FakeTimingCache(std::string content)
    {
        impl.content = std::move(content);
        mImpl = &impl;
    }
    TimingCacheImpl impl;
};

class BuilderConfigImpl final : public apiv::VBuilderConfig {
public:
    std::vector<FakeProfile const*> profiles;
    std::int32_t capability = 0; // 0: that of the current GPU
    bool userAllocates = false;
    TimingCacheImpl* timings = nullptr;

    std::int32_t addOptimizationProfile(IOptimizationProfile const* profile) noexcept override
    {
        profiles.push_back(static_cast<FakeProfile const*>(profile));
        return static_cast<std::int32_t>(profiles.size()) - 1;
    }
    void setProfilingVerbosity(ProfilingVerbosity) noexcept override {}
    void setProgressMonitor(IProgressMonitor*) noexcept override {}
    void setBuilderOptimizationLevel(std::int32_t) noexcept override {}
    bool setTilingOptimizationLevel(TilingOptimizationLevel) noexcept override { return true; }
    void setFlag(BuilderFlag flag) noexcept override
    {
#if FAKE_RTX
        userAllocates = userAllocates || flag == BuilderFlag::kREQUIRE_USER_ALLOCATION;
#endif
    }
#if FAKE_RTX
    bool setNbComputeCapabilities(std::int32_t) noexcept override { return true; }
    bool setComputeCapability(ComputeCapability wanted, std::int32_t) noexcept override
    {
        capability = static_cast<std::int32_t>(wanted);
        return capability == 80 || capability == 86 || capability == 89 || capability == 120
            || fail("the compute capability is invalid or not supported");
    }
#endif
    void setAvgTimingIterations(int32_t avgTiming) noexcept override { unused("setAvgTimingIterations"); }
    int32_t getAvgTimingIterations() const noexcept override { unused("getAvgTimingIterations"); }
    void setEngineCapability(EngineCapability capability) noexcept override { unused("setEngineCapability"); }
    EngineCapability getEngineCapability() const noexcept override { unused("getEngineCapability"); }
    void setFlags(BuilderFlags builderFlags) noexcept override { unused("setFlags"); }
    BuilderFlags getFlags() const noexcept override { unused("getFlags"); }
    void clearFlag(BuilderFlag builderFlag) noexcept override { unused("clearFlag"); }
    bool getFlag(BuilderFlag builderFlag) const noexcept override { unused("getFlag"); }
    void setDeviceType(ILayer const* layer, DeviceType deviceType) noexcept override { unused("setDeviceType"); }
    DeviceType getDeviceType(ILayer const* layer) const noexcept override { unused("getDeviceType"); }
    bool isDeviceTypeSet(ILayer const* layer) const noexcept override { unused("isDeviceTypeSet"); }
    void resetDeviceType(ILayer const* layer) noexcept override { unused("resetDeviceType"); }
    bool canRunOnDLA(ILayer const* layer) const noexcept override { unused("canRunOnDLA"); }
    void setDLACore(int32_t dlaCore) noexcept override { unused("setDLACore"); }
    int32_t getDLACore() const noexcept override { unused("getDLACore"); }
    void setDefaultDeviceType(DeviceType deviceType) noexcept override { unused("setDefaultDeviceType"); }
    DeviceType getDefaultDeviceType() const noexcept override { unused("getDefaultDeviceType"); }
    void reset() noexcept override { unused("reset"); }
    void setProfileStream(const cudaStream_t stream) noexcept override { unused("setProfileStream"); }
    cudaStream_t getProfileStream() const noexcept override { unused("getProfileStream"); }
    int32_t getNbOptimizationProfiles() const noexcept override { unused("getNbOptimizationProfiles"); }
    ProfilingVerbosity getProfilingVerbosity() const noexcept override { unused("getProfilingVerbosity"); }
    bool setTacticSources(TacticSources tacticSources) noexcept override { unused("setTacticSources"); }
    TacticSources getTacticSources() const noexcept override { unused("getTacticSources"); }
    ITimingCache* createTimingCache(void const* blob, std::size_t size) const noexcept override
    {
        return new FakeTimingCache(std::string(static_cast<char const*>(blob), size));
    }
    bool setTimingCache(ITimingCache const& cache, bool ignoreMismatch) noexcept override
    {
        timings = &const_cast<FakeTimingCache&>(static_cast<FakeTimingCache const&>(cache)).impl;
        std::fprintf(stderr, "timings of %zu plans were taken\n", timings->content.size() / 6);
        return !ignoreMismatch && timings->content.rfind("other", 0) != 0;
    }
    ITimingCache const* getTimingCache() const noexcept override { unused("getTimingCache"); }
    void setMemoryPoolLimit(MemoryPoolType pool, std::size_t poolSize) noexcept override { unused("setMemoryPoolLimit"); }
    std::size_t getMemoryPoolLimit(MemoryPoolType pool) const noexcept override { unused("getMemoryPoolLimit"); }
    void setPreviewFeature(PreviewFeature feature, bool enable) noexcept override { unused("setPreviewFeature"); }
    bool getPreviewFeature(PreviewFeature feature) const noexcept override { unused("getPreviewFeature"); }
    int32_t getBuilderOptimizationLevel() const noexcept override { unused("getBuilderOptimizationLevel"); }
    void setHardwareCompatibilityLevel(HardwareCompatibilityLevel hardwareCompatibilityLevel) noexcept override { unused("setHardwareCompatibilityLevel"); }
    HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept override { unused("getHardwareCompatibilityLevel"); }
    void setPluginsToSerialize(char const* const* paths, int32_t nbPaths) noexcept override { unused("setPluginsToSerialize"); }
    char const* getPluginToSerialize(int32_t index) const noexcept override { unused("getPluginToSerialize"); }
    int32_t getNbPluginsToSerialize() const noexcept override { unused("getNbPluginsToSerialize"); }
    bool setMaxAuxStreams(int32_t nbStreams) noexcept override { unused("setMaxAuxStreams"); }
    int32_t getMaxAuxStreams() const noexcept override { unused("getMaxAuxStreams"); }
    IProgressMonitor* getProgressMonitor() const noexcept override { unused("getProgressMonitor"); }
    void setRuntimePlatform(RuntimePlatform runtimePlatform) noexcept override { unused("setRuntimePlatform"); }
    RuntimePlatform getRuntimePlatform() const noexcept override { unused("getRuntimePlatform"); }
    void setMaxNbTactics(int32_t maxTactics) noexcept override { unused("setMaxNbTactics"); }
    int32_t getMaxNbTactics() const noexcept override { unused("getMaxNbTactics"); }
    TilingOptimizationLevel getTilingOptimizationLevel() const noexcept override { unused("getTilingOptimizationLevel"); }
    bool setL2LimitForTiling(int64_t size) noexcept override { unused("setL2LimitForTiling"); }
    int64_t getL2LimitForTiling() const noexcept override { unused("getL2LimitForTiling"); }
    bool setBuildRoute(char const* buildRoute) noexcept override { unused("setBuildRoute"); }
    char const* getBuildRoute() const noexcept override { unused("getBuildRoute"); }
    char const* getAllBuildRoutes() const noexcept override { unused("getAllBuildRoutes"); }
#if FAKE_RTX
    int32_t getNbComputeCapabilities() const noexcept override { unused("getNbComputeCapabilities"); }
    ComputeCapability getComputeCapability(int32_t index) const noexcept override { unused("getComputeCapability"); }
#endif
#if !FAKE_RTX
    bool setRemoteAutoTuningConfig(char const* config) noexcept override { unused("setRemoteAutoTuningConfig"); }
    char const* getRemoteAutoTuningConfig() const noexcept override { unused("getRemoteAutoTuningConfig"); }
#endif
};
struct FakeBuilderConfig final : IBuilderConfig {
    FakeBuilderConfig() { mImpl = &impl; }
    BuilderConfigImpl impl;
};

class BuilderImpl final : public apiv::VBuilder {
public:
    IBuilderConfig* createBuilderConfig() noexcept override { return new FakeBuilderConfig; }
    INetworkDefinition* createNetworkV2(NetworkDefinitionCreationFlags) noexcept override { return new FakeNetwork; }
    IOptimizationProfile* createOptimizationProfile() noexcept override { return new FakeProfile; }
    IHostMemory* buildSerializedNetwork(INetworkDefinition& network, IBuilderConfig& config) noexcept override
    {
        auto const& net = static_cast<FakeNetwork&>(network).impl;
        auto const& options = static_cast<FakeBuilderConfig&>(config).impl;
        if (FAKE_RTX && !options.userAllocates) {
            fail("the stand-in builds no plan that may allocate by itself: its runs could not be captured");
            return nullptr;
        }
        // Without a named target, for the GPU that is current on this thread.
        auto const capability = options.capability != 0 ? options.capability : driver<int (*)()>("fake_capability")();
        std::string text = "sm " + std::to_string(capability) + "\n";
        for (auto const& tensor : net.inputs) {
            text += line("input", tensor->impl);
        }
        for (auto const* tensor : net.outputs) {
            text += line("output", tensor->impl);
        }
        for (auto const* profile : options.profiles) {
            Dims const ids = profile->impl.largest.at("token_ids");
            text += "profile " + std::to_string(ids.d[0]) + " " + std::to_string(ids.d[1]) + " "
                + std::to_string(profile->impl.largest.at("logits_rows").d[0]) + "\n";
            text += "least " + std::to_string(profile->impl.least.at("token_ids").d[0]) + "\n";
        }
        if (net.is("FAKE_REFUSES")) {
            fail("the stand-in has no kernels for these weights");
            return nullptr;
        }
        if (std::getenv("FAKE_COMPUTES") != nullptr) {
            text += "network " + std::to_string(gNetworks.size()) + "\n";
            gNetworks.push_back(&net);
        }
#if !FAKE_RTX
        if (options.timings != nullptr) {
            options.timings->content += "timed;";
        }
#endif
        return new FakeHostMemory(text);
    }
    int32_t getMaxDLABatchSize() const noexcept override { unused("getMaxDLABatchSize"); }
    int32_t getNbDLACores() const noexcept override { unused("getNbDLACores"); }
    void setGpuAllocator(IGpuAllocator* allocator) noexcept override { unused("setGpuAllocator"); }
    void setErrorRecorder(IErrorRecorder* recorder) noexcept override { unused("setErrorRecorder"); }
    IErrorRecorder* getErrorRecorder() const noexcept override { unused("getErrorRecorder"); }
    void reset() noexcept override { unused("reset"); }
    bool isNetworkSupported(INetworkDefinition const& network, IBuilderConfig const& config) const noexcept override { unused("isNetworkSupported"); }
    ILogger* getLogger() const noexcept override { unused("getLogger"); }
    bool setMaxThreads(int32_t maxThreads) noexcept override { unused("setMaxThreads"); }
    int32_t getMaxThreads() const noexcept override { unused("getMaxThreads"); }
    IPluginRegistry& getPluginRegistry() noexcept override { unused("getPluginRegistry"); }
    bool buildSerializedNetworkToStream( INetworkDefinition& network, IBuilderConfig& config, IStreamWriter& writer) noexcept override { unused("buildSerializedNetworkToStream"); }
#if !FAKE_RTX
    ICudaEngine* buildEngineWithConfig(INetworkDefinition& network, IBuilderConfig& config) noexcept override { unused("buildEngineWithConfig"); }
    IHostMemory* buildSerializedNetworkWithKernelText( INetworkDefinition& network, IBuilderConfig& config, IHostMemory*& kernelText) noexcept override { unused("buildSerializedNetworkWithKernelText"); }
#endif

private:
    static std::string line(char const* kind, TensorImpl const& tensor)
    {
        Dims const dims = tensor.shape();
        bool const isFixed = std::all_of(dims.d, dims.d + dims.nbDims, [](std::int64_t n) { return n >= 0; });
        std::string const role = tensor.isCache ? "cache"
            : !tensor.alias.empty()             ? "updated"
            : isFixed                           ? "weight"
                                                : tensor.name;
        std::string text = std::string(kind) + " " + role + " " + tensor.name + " " + name_of(tensor.type) + " "
            + (tensor.alias.empty() ? "-" : tensor.alias) + " " + std::to_string(dims.nbDims);
        for (std::int32_t i = 0; i < dims.nbDims; ++i) {
            text += " " + std::to_string(dims.d[i]);
        }
        return text + "\n";
    }
    static char const* name_of(DataType type)
    {
        switch (type) {
        case DataType::kBF16: return "bf16";
        case DataType::kHALF: return "f16";
        case DataType::kINT32: return "i32";
        case DataType::kINT8: return "i8";
        case DataType::kFP8: return "f8e4m3";
        case DataType::kBOOL: return "bool";
        default: return "f32";
        }
    }
};
struct FakeBuilder final : IBuilder {
    FakeBuilder() { mImpl = &impl; }
    BuilderImpl impl;
};
