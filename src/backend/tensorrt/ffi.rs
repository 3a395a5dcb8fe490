//! The bridge to `cpp/`, which alone uses TensorRT's C++ API. cxx checks both sides against each other at compile time;
//! no raw pointers cross the bridge.
#![allow(unsafe_code)]
// The bridge's generated code has no documentation.
#![allow(missing_docs)]

use std::pin::Pin;
use std::sync::Arc;

use cxx::UniquePtr;

use super::device::{ALIGN, Buffer, Stream};
use super::{ConstantBytes, Monitor, Severity};

#[cxx::bridge(namespace = "aotron")]
pub(super) mod bridge {
    /// Element type of a network tensor.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Element {
        F32,
        F16,
        BF16,
        I32,
        I8,
        I4,
        F8,
        Bool,
    }

    /// The two outputs of a TopK layer.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct TopK {
        values: u32,
        indices: u32,
    }

    /// The shapes one input may have: smallest, optimal (tuned for), largest.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Range {
        input: String,
        min: Vec<i64>,
        opt: Vec<i64>,
        max: Vec<i64>,
    }

    /// An optimization profile: the shapes of one kind of step.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Profile {
        ranges: Vec<Range>,
    }

    /// Options for building a network.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct BuildOptions {
        /// 80 for SM 8.0; 0 for the GPU in this machine.
        compute_capability: i32,
        /// TensorRT 11's builder optimization level; -1 for its default.
        optimization_level: i32,
        /// TensorRT 11's tiling optimization level; -1 for its default.
        tiling_optimization_level: i32,
        /// TensorRT 11's timing cache from earlier builds; empty for none.
        timings: Vec<u8>,
        /// Log the plan's kernels in detail.
        list_kernels: bool,
        profiles: Vec<Profile>,
    }

    /// A layer as TensorRT reports it.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct LayerInfo {
        name: String,
        kind: String,
        inputs: Vec<String>,
        outputs: Vec<String>,
    }

    /// An input or output of an engine.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct TensorInfo {
        name: String,
        input: bool,
        dtype: String,
        /// Shape, -1 for dynamic dimensions.
        dims: Vec<i64>,
        /// In the GPU's memory.
        on_device: bool,
        /// For an output, the input whose memory it must alias; empty if none.
        alias: String,
    }

    /// Result of checking a plan's header against this machine.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Validity {
        /// The library supports the check and was given enough bytes.
        checked: bool,
        valid: bool,
        suboptimal: bool,
        /// TensorRT's `EngineInvalidityDiagnostics` bits.
        reasons: u64,
    }

    extern "Rust" {
        type Observer;
        fn log(self: &Observer, severity: i32, line: &[u8]);
        fn phase(self: &Observer, name: &[u8], steps: i32);
        fn step(self: &Observer, phase: &[u8], step: i32) -> bool;

        type ConstantBytes;
        fn as_slice(self: &ConstantBytes) -> &[u8];
    }

    // SAFETY: this asserts that the C++ functions below may be called with any arguments from safe code. They validate
    // their arguments (tensor indices, number of dimensions) and TensorRT's results (null pointers) and throw, which
    // cxx turns into an `Err`; they keep no reference to an argument past their return, and what they return is owned
    // by its `UniquePtr` or, for libraries, lives until the process ends. The ABI of the loaded library is checked by
    // its version (library.rs) before anything else in it is called.
    unsafe extern "C++" {
        include!("aotron/cpp/shim.h");

        type Library;
        fn open_library(rtx: bool, path: &[u8]) -> Result<&'static Library>;
        fn header_version(rtx: bool) -> i32;
        fn version(self: &Library) -> i32;
        fn path(self: &Library) -> Vec<u8>;
        fn network(self: &Library, observer: Box<Observer>) -> Result<UniquePtr<Network>>;
        fn runtime(self: &Library, observer: Box<Observer>) -> Result<UniquePtr<Runtime>>;

        type Network;
        fn scope(self: Pin<&mut Network>, name: &str);
        fn input(self: Pin<&mut Network>, name: &str, element: Element, dims: &[i64]) -> Result<u32>;
        fn output(self: Pin<&mut Network>, tensor: u32, name: &str) -> Result<()>;
        fn constant_f32(self: Pin<&mut Network>, value: f32, rank: u32) -> Result<u32>;
        fn constant_i64(self: Pin<&mut Network>, values: &[i64]) -> Result<u32>;
        fn constant_of(
            self: Pin<&mut Network>,
            bytes: Box<ConstantBytes>,
            element: Element,
            dims: &[i64],
        ) -> Result<u32>;
        fn shape(self: Pin<&mut Network>, x: u32) -> Result<u32>;
        fn concat(self: Pin<&mut Network>, parts: &[u32]) -> Result<u32>;
        fn gather(self: Pin<&mut Network>, table: u32, indices: u32) -> Result<u32>;
        fn cast(self: Pin<&mut Network>, x: u32, element: Element) -> Result<u32>;
        fn reshape(self: Pin<&mut Network>, x: u32, dims: &[i64]) -> Result<u32>;
        fn reshape_to(self: Pin<&mut Network>, x: u32, shape: u32) -> Result<u32>;
        fn transpose(self: Pin<&mut Network>, x: u32, order: &[i32]) -> Result<u32>;
        fn slice(self: Pin<&mut Network>, x: u32, start: &[i64], size: u32) -> Result<u32>;
        fn sum(self: Pin<&mut Network>, x: u32, y: u32) -> Result<u32>;
        fn product(self: Pin<&mut Network>, x: u32, y: u32) -> Result<u32>;
        fn relu(self: Pin<&mut Network>, x: u32) -> Result<u32>;
        fn linear(self: Pin<&mut Network>, x: u32, weight: u32) -> Result<u32>;
        fn matmul(self: Pin<&mut Network>, x: u32, weight: u32) -> Result<u32>;
        fn quantize(self: Pin<&mut Network>, x: u32, scale: u32, element: Element) -> Result<u32>;
        fn dequantize(self: Pin<&mut Network>, codes: u32, scale: u32, axis: i32, element: Element) -> Result<u32>;
        fn layer_norm(self: Pin<&mut Network>, x: u32, scale: u32, bias: u32, eps: f32) -> Result<u32>;
        fn rotary(self: Pin<&mut Network>, x: u32, cos: u32, sin: u32, rotary_dims: u32) -> Result<u32>;
        fn cache_update(self: Pin<&mut Network>, cache: u32, update: u32, indices: u32) -> Result<u32>;
        fn attention(self: Pin<&mut Network>, q: u32, keys: u32, values: u32) -> Result<u32>;
        fn attention_with_lengths(self: Pin<&mut Network>, q: u32, keys: u32, values: u32, lengths: u32)
        -> Result<u32>;
        fn attention_with_mask(self: Pin<&mut Network>, q: u32, keys: u32, values: u32, mask: u32) -> Result<u32>;
        fn decompose_attention(self: Pin<&mut Network>) -> Result<u32>;
        fn top_k(self: Pin<&mut Network>, x: u32, k: u32) -> Result<TopK>;
        fn last_sums(self: Pin<&mut Network>, x: u32) -> Result<u32>;
        fn layers(self: &Network) -> u32;
        fn layer(self: &Network, index: u32) -> Result<LayerInfo>;
        fn build(self: Pin<&mut Network>, options: &BuildOptions) -> Result<UniquePtr<Plan>>;
        fn cancelled(self: &Network) -> bool;
        fn timings(self: &Network) -> &[u8];

        type Plan;
        fn bytes(self: &Plan) -> &[u8];

        type Runtime;
        fn validity(self: &Runtime, plan: &[u8]) -> Validity;
        fn deserialize(self: &Runtime, plan: &[u8]) -> Result<UniquePtr<Engine>>;

        type Engine;
        fn tensors(self: &Engine) -> Vec<TensorInfo>;
        fn profiles(self: &Engine) -> u32;
        fn largest(self: &Engine, input: &str, profile: u32) -> Vec<i64>;
        fn memory_bytes(self: &Engine) -> u64;
        fn load_kernels(self: Pin<&mut Engine>, bytes: &[u8]) -> Result<bool>;
        fn kernels(self: &Engine) -> Result<UniquePtr<Plan>>;

        // These take streams and device addresses as numbers, so that no pointer crosses. The numbers must be a valid
        // stream handle, and device memory that stays allocated for as long as the context runs.
        unsafe fn context(self: &Engine, profile: u32, specialize: bool, stream: u64) -> Result<UniquePtr<Context>>;

        type Context;
        fn shape(self: Pin<&mut Context>, name: &str, dims: &[i64]) -> Result<()>;
        unsafe fn memory(self: Pin<&mut Context>, address: u64, bytes: u64) -> Result<()>;
        unsafe fn address(self: Pin<&mut Context>, name: &str, address: u64) -> Result<()>;
        unsafe fn capturable(self: &Context, stream: u64) -> bool;
        unsafe fn enqueue(self: Pin<&mut Context>, stream: u64) -> Result<()>;
    }
}

// SAFETY: the only mutable state of an open library is its list of listeners and, through the creation of builders,
// TensorRT's own state; a mutex guards each (cpp/shim.inl), and another serializes builds. Builders on different
// threads share nothing else except what TensorRT guards itself: it allows one builder per thread. A library is never
// destroyed.
unsafe impl Sync for bridge::Library {}

// SAFETY: none is tied to the thread that created it. The C++ objects they share are thread-safe: TensorRT's runtimes
// and engines are (a context is not, and is not `Sync`), the listener has a mutex, its observer is `Send` and `Sync`,
// and an engine's kernel cache is set once.
unsafe impl Send for bridge::Runtime {}
// SAFETY: as above.
unsafe impl Send for bridge::Engine {}
// SAFETY: as above.
unsafe impl Send for bridge::Context {}

/// Creates an execution context for a profile, with its set-up work enqueued on the stream.
pub(super) fn context(
    engine: &bridge::Engine,
    profile: u32,
    specialize: bool,
    stream: &Stream,
) -> Result<UniquePtr<bridge::Context>, cxx::Exception> {
    // SAFETY: the number is the handle of a live stream.
    unsafe { engine.context(profile, specialize, stream.number()) }
}

/// Gives a context its scratch memory, which the caller keeps alive as long as the context.
pub(super) fn memory(context: Pin<&mut bridge::Context>, memory: &Buffer) -> Result<(), cxx::Exception> {
    // SAFETY: the address is valid for that many bytes of device memory.
    unsafe { context.memory(memory.address(), memory.bytes()) }
}

/// Binds a tensor to a range of a buffer, which the caller keeps alive as long as the context.
pub(super) fn address(
    context: Pin<&mut bridge::Context>,
    tensor: &str,
    buffer: &Buffer,
    offset: u64,
    bytes: u64,
) -> crate::Result<Result<(), cxx::Exception>> {
    let fits = offset.checked_add(bytes).is_some_and(|end| end <= buffer.bytes());
    if !fits || !offset.is_multiple_of(ALIGN) {
        let all = buffer.bytes();
        let detail = format!(
            "{tensor} cannot be bound to {bytes} bytes at offset {offset} of {all}: past the end or misaligned"
        );
        return Err(crate::Error::TensorRt(detail));
    }
    // SAFETY: the address is valid for that many bytes of device memory.
    Ok(unsafe { context.address(tensor, buffer.address() + offset) })
}

/// Returns true if a run of the context can be captured as a CUDA graph.
pub(super) fn capturable(context: &bridge::Context, stream: &Stream) -> bool {
    // SAFETY: the number is the handle of a live stream.
    unsafe { context.capturable(stream.number()) }
}

/// Enqueues a run of a context on a stream.
pub(super) fn enqueue(context: Pin<&mut bridge::Context>, stream: &Stream) -> Result<(), cxx::Exception> {
    // SAFETY: the number is the handle of a live stream. The run only accesses device addresses that `address` and
    // `memory` checked.
    unsafe { context.enqueue(stream.number()) }
}

/// Receiver of log lines and progress on the Rust side. Called on TensorRT's threads.
pub(super) struct Observer(pub Arc<dyn Monitor>);

impl Observer {
    fn log(&self, severity: i32, line: &[u8]) {
        let severity = match severity {
            0 | 1 => Severity::Error,
            2 => Severity::Warning,
            3 => Severity::Info,
            _ => Severity::Verbose,
        };
        self.0.log(severity, &String::from_utf8_lossy(line));
    }

    fn phase(&self, name: &[u8], steps: i32) {
        self.0.phase(&String::from_utf8_lossy(name), usize::try_from(steps).unwrap_or(0));
    }

    fn step(&self, phase: &[u8], step: i32) -> bool {
        let step = usize::try_from(step).unwrap_or(0);
        self.0.step(&String::from_utf8_lossy(phase), step).is_continue()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn a_constant_outside_its_memory_is_an_internal_error() {
        let memory: Arc<[u8]> = [1, 2, 3].into();
        assert_eq!(ConstantBytes::of_memory(memory.clone(), 1..3).unwrap().as_slice(), [2, 3]);
        let error = ConstantBytes::of_memory(memory, 1..4).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Internal { .. }), "{error}");
    }
}
