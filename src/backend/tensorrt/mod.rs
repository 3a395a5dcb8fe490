//! The TensorRT backend: lowers the graph to a TensorRT network, which one of TensorRT's two libraries compiles to a
//! plan (a serialized engine).
//!
//! | library | compiles for | where |
//! | --- | --- | --- |
//! | TensorRT for RTX 1.7 ([`LibraryKind::Rtx`]) | SM 8.0 (A100), 8.6, 8.9, 12.0 as named targets | anywhere; needs neither GPU nor driver |
//! | TensorRT 11.4 ([`LibraryKind::TensorRt`]) | the GPU in the machine, H100 included | on that GPU |
//!
//! Both are opened on first use ([`TensorRtLibrary::find`]), so the program runs without them. Their C++ API is reached
//! through the shim in `cpp/`; [`TensorRtLibrary`], [`Network`] and [`SerializedPlan`] are its safe wrappers for
//! building, `TensorRtRuntime`, `CudaEngine` and `ExecutionContext` for running. The GPU itself is behind `device`, and
//! [`TensorRtExecutor`] puts the two together.
//!
//! Without the feature `tensorrt` the shim is not compiled: looking for a library or for GPUs fails with an error that
//! says so (`absent`). Lowering, packing and the manifest do not depend on the feature.

#[cfg(not(feature = "tensorrt"))]
mod absent;
pub mod analysis;
#[cfg(feature = "tensorrt")]
pub mod device;
#[cfg(feature = "tensorrt")]
mod executor;
#[cfg(feature = "tensorrt")]
mod ffi;
mod gpu;
pub mod kernels;
mod kind;
mod layers;
#[cfg(feature = "tensorrt")]
mod library;
pub mod lower;
#[cfg(feature = "tensorrt")]
mod network;
mod options;
pub mod pack;
#[cfg(feature = "tensorrt")]
mod runtime;
pub mod stage;
mod weights;

use std::ops::ControlFlow;

#[cfg(not(feature = "tensorrt"))]
pub use absent::{Network, SerializedPlan, TensorRtExecutor, TensorRtLibrary, devices, driver_version};
#[cfg(feature = "tensorrt")]
pub use device::{devices, driver_version};
#[cfg(feature = "tensorrt")]
pub use executor::TensorRtExecutor;
pub(crate) use gpu::gpu_words;
pub use gpu::{DeviceInfo, DriverVersion};
pub use kind::{LibraryKind, Version};
pub use layers::{
    AttentionMask, BuildOptions, ConstantBytes, Layer, Layers, NetworkTensor, OptimizationProfile, ShapeRange,
};
#[cfg(feature = "tensorrt")]
pub use library::TensorRtLibrary;
#[cfg(feature = "tensorrt")]
pub use network::{Network, SerializedPlan};
pub use options::{GpuEvent, GpuOptions, GpuReport, KernelCompilation};
#[cfg(feature = "tensorrt")]
pub use runtime::{CudaEngine, EngineTensor, ExecutionContext, TensorRtRuntime, Validity};

/// Severity of a line of TensorRT's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The request failed. The last such lines become the text of the [`crate::Error`] that follows.
    Error,
    /// TensorRT continues, but perhaps not as expected.
    Warning,
    /// Progress and settings, for people.
    Info,
    /// Thousands of lines, including the plan's kernels if requested.
    Verbose,
}

/// Receives the log and progress of a network from its first layer to its plan, and can cancel the build. Called on
/// TensorRT's threads, which cannot unwind: a panic in a monitor aborts the process.
pub trait Monitor: Send + Sync {
    /// Called for each line of TensorRT's log.
    fn log(&self, _severity: Severity, _line: &str) {}

    /// Called when a build phase of `steps` steps begins. Phases nest.
    fn phase(&self, _name: &str, _steps: usize) {}

    /// Called after each step of a phase. `Break` ends the build with [`crate::Error::Cancelled`].
    fn step(&self, _phase: &str, _step: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Ignores everything and never cancels.
impl Monitor for () {}

/// Forwards TensorRT's log to `tracing`.
#[derive(Debug, Clone, Copy)]
pub struct Traced;

impl Monitor for Traced {
    fn log(&self, severity: Severity, line: &str) {
        match severity {
            Severity::Error => tracing::error!(target: "tensorrt", "{line}"),
            Severity::Warning => tracing::warn!(target: "tensorrt", "{line}"),
            Severity::Info => tracing::info!(target: "tensorrt", "{line}"),
            Severity::Verbose => tracing::debug!(target: "tensorrt", "{line}"),
        }
    }
}
