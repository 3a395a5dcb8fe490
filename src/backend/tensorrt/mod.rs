//! TensorRT: the graph is lowered to a network, which one of TensorRT's two libraries compiles into a plan.
//!
//! | library | compiles for | where |
//! | --- | --- | --- |
//! | TensorRT for RTX 1.7 ([`LibraryKind::Rtx`]) | SM 8.0 (A100), 8.6, 8.9, 12.0 by name | anywhere, no GPU or driver needed |
//! | TensorRT 11.4 ([`LibraryKind::TensorRt`]) | the GPU at hand, H100 among them | on that GPU |
//!
//! Both are opened when they are first asked for ([`TensorRtLibrary::find`]), so the program runs where neither is. Their C++
//! API is reached through the shim in `cpp/`; [`TensorRtLibrary`], [`Network`] and [`SerializedPlan`] are the safe ends of it for building,
//! `TensorRtRuntime`, `CudaEngine` and `ExecutionContext` for running. The GPU itself is behind `device`, and [`TensorRtExecutor`] puts
//! the two together.
//!
//! Without the feature `tensorrt` none of the shim is compiled: a library is never found and no GPU is listed, each with
//! an error that says so (`absent`). Lowering, packing and the manifest are the same with and without it.

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
mod weights;

use std::ops::ControlFlow;

#[cfg(not(feature = "tensorrt"))]
pub use absent::{Network, SerializedPlan, TensorRtExecutor, TensorRtLibrary, devices};
#[cfg(feature = "tensorrt")]
pub use device::devices;
#[cfg(feature = "tensorrt")]
pub use executor::TensorRtExecutor;
pub use gpu::DeviceInfo;
pub(crate) use gpu::gpu_words;
pub use kind::{LibraryKind, Version};
pub use layers::{BuildOptions, ConstantBytes, Layer, Layers, NetworkTensor, OptimizationProfile, ShapeRange};
#[cfg(feature = "tensorrt")]
pub use library::TensorRtLibrary;
#[cfg(feature = "tensorrt")]
pub use network::{Network, SerializedPlan};
pub use options::{GpuEvent, GpuOptions, GpuReport};
#[cfg(feature = "tensorrt")]
pub use runtime::{CudaEngine, EngineTensor, ExecutionContext, TensorRtRuntime, Validity};

/// How serious TensorRT takes a line of its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// What it was asked for cannot be done. The last of these are the text of the [`crate::Error`] that follows.
    Error,
    /// It goes on, but not as one might expect.
    Warning,
    /// For people.
    Info,
    /// Thousands of lines; among them, if asked for, the plan's kernels.
    Verbose,
}

/// Follows a network from its first layer to its plan, and can stop the build. Called from TensorRT's threads, which
/// cannot unwind: a panic in here ends the process.
pub trait Monitor: Send + Sync {
    /// A line of TensorRT's log.
    fn log(&self, _severity: Severity, _line: &str) {}

    /// A phase of the build begins, in that many steps. Phases nest.
    fn phase(&self, _name: &str, _steps: usize) {}

    /// A step of the phase is done. `Break` ends the build with [`crate::Error::Cancelled`].
    fn step(&self, _phase: &str, _step: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Hears nothing, stops nothing.
impl Monitor for () {}

/// Passes TensorRT's log on to `tracing`.
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
