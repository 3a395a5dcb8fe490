// The interface of the TensorRT shim. It does not include TensorRT's headers, because it is implemented once against
// those of TensorRT (tensorrt.cpp) and once against those of TensorRT for RTX (tensorrt_rtx.cpp).
//
// Functions that can fail throw std::runtime_error with TensorRT's last error lines, which the bridge turns into a Rust
// `Err`. Tensors of a network are referred to by index, which is checked on every use.
#pragma once

#include <cstdint>
#include <memory>

#include "rust/cxx.h"

namespace aotron {

// Defined by the bridge.
struct BuildOptions;
struct ConstantBytes;
struct LayerInfo;
struct Observer;
struct TensorInfo;
struct TopK;
struct Validity;
enum class Element : std::uint8_t;

// A serialized engine.
class Plan {
public:
    virtual ~Plan() = default;
    virtual rust::Slice<const std::uint8_t> bytes() const = 0;
};

// A strongly typed network under construction, with the builder that compiles it.
class Network {
public:
    virtual ~Network() = default;

    // Sets the name prefix of the layers that follow.
    virtual void scope(rust::Str name) = 0;
    // Dimensions of -1 are dynamic, bounded by a profile.
    virtual std::uint32_t input(rust::Str name, Element element, rust::Slice<const std::int64_t> dims) = 0;
    virtual void output(std::uint32_t tensor, rust::Str name) = 0;

    virtual std::uint32_t constant_f32(float value, std::uint32_t rank) = 0; // [1, 1, ...]
    virtual std::uint32_t constant_i64(rust::Slice<const std::int64_t> values) = 0; // [n]
    // The bytes are read in place, and their owner is kept alive until the network is destroyed.
    virtual std::uint32_t constant_of(
        rust::Box<ConstantBytes> bytes, Element element, rust::Slice<const std::int64_t> dims)
        = 0;
    virtual std::uint32_t shape(std::uint32_t x) = 0; // i64[rank]
    virtual std::uint32_t concat(rust::Slice<const std::uint32_t> parts) = 0; // along axis 0
    virtual std::uint32_t gather(std::uint32_t table, std::uint32_t indices) = 0; // along axis 0
    virtual std::uint32_t cast(std::uint32_t x, Element element) = 0;
    virtual std::uint32_t reshape(std::uint32_t x, rust::Slice<const std::int64_t> dims) = 0;
    virtual std::uint32_t reshape_to(std::uint32_t x, std::uint32_t shape) = 0;
    virtual std::uint32_t transpose(std::uint32_t x, rust::Slice<const std::int32_t> order) = 0;
    // Slice from `start` (constant) of the extents in `size` (a shape tensor).
    virtual std::uint32_t slice(std::uint32_t x, rust::Slice<const std::int64_t> start, std::uint32_t size) = 0;
    // Elementwise; dimensions of 1 broadcast.
    virtual std::uint32_t sum(std::uint32_t x, std::uint32_t y) = 0;
    virtual std::uint32_t product(std::uint32_t x, std::uint32_t y) = 0;
    virtual std::uint32_t relu(std::uint32_t x) = 0;
    // x [n, in] times the transpose of weight [out, in].
    virtual std::uint32_t linear(std::uint32_t x, std::uint32_t weight) = 0;
    // x [n, in] times weight [in, out].
    virtual std::uint32_t matmul(std::uint32_t x, std::uint32_t weight) = 0;
    // x / scale rounded to codes; per-tensor scale [1].
    virtual std::uint32_t quantize(std::uint32_t x, std::uint32_t scale, Element element) = 0;
    // codes * scale: per tensor [], per channel along `axis`, or per block if the scale has the rank of the codes.
    virtual std::uint32_t dequantize(std::uint32_t codes, std::uint32_t scale, std::int32_t axis, Element element) = 0;
    // Over the last of two dimensions; scale and bias [1, width].
    virtual std::uint32_t layer_norm(std::uint32_t x, std::uint32_t scale, std::uint32_t bias, float eps) = 0;
    // x [B, heads, T, head_dim], cos and sin [B, T, rotary_dims / 2]; dimension j is paired with j + rotary_dims / 2.
    virtual std::uint32_t rotary(std::uint32_t x, std::uint32_t cos, std::uint32_t sin, std::uint32_t rotary_dims) = 0;
    // cache [B, heads, S, head_dim] with update [B, heads, T, head_dim] written at indices [B].
    virtual std::uint32_t cache_update(std::uint32_t cache, std::uint32_t update, std::uint32_t indices) = 0;
    // Lower-right causal mask, over all keys or the first lengths[b] of each sequence.
    virtual std::uint32_t attention(std::uint32_t q, std::uint32_t keys, std::uint32_t values) = 0;
    virtual std::uint32_t attention_with_lengths(
        std::uint32_t q, std::uint32_t keys, std::uint32_t values, std::uint32_t lengths)
        = 0;
    // Over the keys for which mask [B, 1, T, S] is true; every query needs one.
    virtual std::uint32_t attention_with_mask(
        std::uint32_t q, std::uint32_t keys, std::uint32_t values, std::uint32_t mask)
        = 0;
    // Allows all attentions so far to be compiled to several kernels each; returns their number.
    virtual std::uint32_t decompose_attention() = 0;
    // The k largest elements along the last of two dimensions.
    virtual TopK top_k(std::uint32_t x, std::uint32_t k) = 0;
    // The sum along the last dimension, which the result does not have.
    virtual std::uint32_t last_sums(std::uint32_t x) = 0;

    virtual std::uint32_t layers() const = 0;
    virtual LayerInfo layer(std::uint32_t index) const = 0;

    virtual std::unique_ptr<Plan> build(BuildOptions const& options) = 0;
    // True if the observer cancelled the last build.
    virtual bool cancelled() const = 0;
    // Timing cache of the last build; empty if there is none.
    virtual rust::Slice<const std::uint8_t> timings() const = 0;
};

// An engine set up to run one profile. It keeps its engine alive; addresses are device addresses.
class Context {
public:
    virtual ~Context() = default;

    // Sets the scratch memory. Contexts that never run concurrently may share it.
    virtual void memory(std::uint64_t address, std::uint64_t bytes) = 0;
    virtual void shape(rust::Str name, rust::Slice<const std::int64_t> dims) = 0;
    virtual void address(rust::Str name, std::uint64_t address) = 0;
    virtual bool capturable(std::uint64_t stream) const = 0;
    virtual void enqueue(std::uint64_t stream) = 0;
};

// A deserialized plan. It keeps its runtime alive.
class Engine {
public:
    virtual ~Engine() = default;
    virtual rust::Vec<TensorInfo> tensors() const = 0;
    virtual std::uint32_t profiles() const = 0;
    virtual rust::Vec<std::int64_t> largest(rust::Str input, std::uint32_t profile) const = 0;
    virtual std::uint64_t memory_bytes() const = 0; // of a context, for any profile
    // Loads kernels compiled by an earlier process; returns false if there are none or if they belong to another GPU,
    // driver or library. From then on, contexts add the kernels they compile.
    virtual bool load_kernels(rust::Slice<const std::uint8_t> bytes) = 0;
    virtual std::unique_ptr<Plan> kernels() const = 0;
    virtual std::unique_ptr<Context> context(std::uint32_t profile, bool specialize, std::uint64_t stream) const = 0;
};

// Deserializes plans.
class Runtime {
public:
    virtual ~Runtime() = default;
    virtual Validity validity(rust::Slice<const std::uint8_t> plan) const = 0;
    virtual std::unique_ptr<Engine> deserialize(rust::Slice<const std::uint8_t> plan) const = 0;
};

// A loaded library. It stays until the process ends: TensorRT keeps pointers to its logger in static storage and runs
// threads of its own, so unloading it is never safe. Its functions may be called from any thread.
class Library {
public:
    virtual ~Library() = default;
    virtual std::int32_t version() const = 0;
    virtual rust::Vec<std::uint8_t> path() const = 0;
    virtual std::unique_ptr<Network> network(rust::Box<Observer> observer) const = 0;
    virtual std::unique_ptr<Runtime> runtime(rust::Box<Observer> observer) const = 0;
};

// Opens a library unless it is already open. A path without a slash is searched for on the system's library path.
Library const& open_library(bool rtx, rust::Slice<const std::uint8_t> path);
// Version of the headers the shim was compiled against, in TensorRT's numbering.
std::int32_t header_version(bool rtx);

// The two implementations.
namespace enterprise {
std::unique_ptr<Library> load(std::string const& path);
std::int32_t header_version();
}
namespace rtx {
std::unique_ptr<Library> load(std::string const& path);
std::int32_t header_version();
}

} // namespace aotron
