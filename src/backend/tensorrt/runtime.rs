//! Execution of plans: a runtime deserializes a plan into an engine, and an execution context runs one of its profiles.

use std::fmt;
use std::sync::Arc;

use cxx::UniquePtr;

use super::device::{Buffer, CudaGraph, Stream};
use super::ffi::{self, Observer, bridge};
use super::{Monitor, TensorRtLibrary};
use crate::error::{Error, Result};

fn refused(error: cxx::Exception) -> Error {
    Error::TensorRt(error.what().into())
}

/// Deserializes plans (TensorRT's `IRuntime`).
pub struct TensorRtRuntime {
    inner: UniquePtr<bridge::Runtime>,
    library: TensorRtLibrary,
}

/// Result of checking a plan's header against this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validity {
    /// The library cannot tell from the header.
    Unknown,
    /// The plan should run.
    Valid,
    /// The plan should run, but slower than a recompiled one.
    Suboptimal,
    /// The plan cannot run here, for these reasons.
    Invalid(Vec<&'static str>),
}

impl TensorRtLibrary {
    /// Creates a runtime. The monitor receives TensorRT's log lines about it and everything created from it.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message.
    pub fn runtime(&self, monitor: Arc<dyn Monitor>) -> Result<TensorRtRuntime> {
        let inner = self.inner().runtime(Box::new(Observer(monitor))).map_err(|error| self.refused(&error))?;
        Ok(TensorRtRuntime { inner, library: *self })
    }
}

impl TensorRtRuntime {
    /// Checks a plan's header. Without a GPU, even a well-formed plan is invalid, with no reason given.
    pub fn validity(&self, plan: &[u8]) -> Validity {
        let bridge::Validity { checked, valid, suboptimal, reasons } = self.inner.validity(plan);
        match (checked, valid, suboptimal) {
            (false, ..) => Validity::Unknown,
            (true, true, false) => Validity::Valid,
            (true, true, true) => Validity::Suboptimal,
            (true, false, _) => Validity::Invalid(reasons_in_words(reasons)),
        }
    }

    /// Deserializes a plan. It must be complete and unmodified: TensorRT validates the framing, not the content, so
    /// callers verify the digest first ([`crate::engine::Package::read`] does).
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message.
    pub fn deserialize(&self, plan: &[u8]) -> Result<CudaEngine> {
        let inner = self.inner.deserialize(plan).map_err(|error| self.library.refused(&error))?;
        Ok(CudaEngine { inner })
    }
}

impl fmt::Debug for TensorRtRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TensorRtRuntime")
    }
}

/// Describes the bits of TensorRT's `EngineInvalidityDiagnostics`.
fn reasons_in_words(reasons: u64) -> Vec<&'static str> {
    let known = [
        "it was compiled by another version of TensorRT for RTX",
        "it was not compiled for this GPU",
        "the NVIDIA driver is older than it needs",
        "the CUDA runtime is older than it needs",
        "the GPU has too little memory for its weights",
        "it is not a plan, or it is damaged",
        "CUDA does not work here: the NVIDIA driver is missing or incompatible",
    ];
    known.into_iter().enumerate().filter(|(bit, _)| reasons >> bit & 1 == 1).map(|(_, words)| words).collect()
}

/// An input or output of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineTensor {
    /// Name of the tensor.
    pub name: String,
    /// True for an input, false for an output.
    pub is_input: bool,
    /// Element type, such as `"bf16"`.
    pub dtype: String,
    /// Shape, -1 for dynamic dimensions.
    pub dims: Vec<i64>,
    /// True if the tensor is in device memory.
    pub on_device: bool,
    /// The input whose memory an output must alias.
    pub alias: Option<String>,
}

/// A deserialized plan (TensorRT's `ICudaEngine`).
pub struct CudaEngine {
    inner: UniquePtr<bridge::Engine>,
}

impl fmt::Debug for CudaEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaEngine({} profiles)", self.profiles())
    }
}

impl CudaEngine {
    /// Inputs and outputs.
    pub fn tensors(&self) -> Vec<EngineTensor> {
        let convert = |tensor: bridge::TensorInfo| {
            let bridge::TensorInfo { name, input, dtype, dims, on_device, alias } = tensor;
            let alias = if alias.is_empty() { None } else { Some(alias) };
            EngineTensor { name, is_input: input, dtype, dims, on_device, alias }
        };
        self.inner.tensors().into_iter().map(convert).collect()
    }

    /// Number of profiles.
    pub fn profiles(&self) -> u32 {
        self.inner.profiles()
    }

    /// Largest shape of an input in a profile.
    pub fn largest(&self, input: &str, profile: u32) -> Vec<i64> {
        self.inner.largest(input, profile)
    }

    /// Scratch memory that a context of any profile needs.
    pub fn memory_bytes(&self) -> u64 {
        self.inner.memory_bytes()
    }

    /// Starts caching compiled kernels, and loads those of an earlier process. Returns true if the library accepted
    /// them.
    ///
    /// # Errors
    /// [`Error::TensorRt`] if a kernel cache is already in use.
    pub fn keep_kernels(&mut self, earlier: &[u8]) -> Result<bool> {
        self.inner.pin_mut().load_kernels(earlier).map_err(refused)
    }

    /// Serializes the kernels compiled so far, for [`CudaEngine::keep_kernels`].
    ///
    /// # Errors
    /// [`Error::TensorRt`] without a kernel cache.
    pub fn kernels(&self) -> Result<Vec<u8>> {
        Ok(self.inner.kernels().map_err(refused)?.bytes().to_vec())
    }

    /// Creates an execution context for a profile. With `specialize`, kernels for the exact shapes are compiled before
    /// their first run instead of in the background, which suits contexts with few, recurring shapes.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message.
    pub fn context(&self, profile: u32, specialize: bool, stream: &Stream) -> Result<ExecutionContext> {
        stream.device().bind()?;
        let inner = ffi::context(&self.inner, profile, specialize, stream).map_err(refused)?;
        Ok(ExecutionContext { inner, memory: None, buffers: Vec::new() })
    }
}

/// An engine set up to run one profile (TensorRT's `IExecutionContext`). It keeps the buffers bound to it alive.
pub struct ExecutionContext {
    inner: UniquePtr<bridge::Context>,
    memory: Option<Arc<Buffer>>,
    buffers: Vec<Arc<Buffer>>,
}

impl fmt::Debug for ExecutionContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExecutionContext")
    }
}

impl ExecutionContext {
    /// Sets the scratch memory. Contexts that run on the same stream may share it.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message.
    pub fn set_memory(&mut self, memory: &Arc<Buffer>) -> Result<()> {
        ffi::memory(self.inner.pin_mut(), memory).map_err(refused)?;
        self.memory = Some(memory.clone());
        Ok(())
    }

    /// Sets the shape of an input for the following runs.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message if the profile does not allow the shape.
    pub fn set_shape(&mut self, input: &str, dims: &[i64]) -> Result<()> {
        self.inner.pin_mut().shape(input, dims).map_err(refused)
    }

    /// Binds an input or output to `bytes` bytes of a buffer, starting at `offset`.
    ///
    /// # Errors
    /// [`Error::TensorRt`] if there is no such tensor, or the range is out of bounds or misaligned.
    pub fn set_address(&mut self, tensor: &str, buffer: &Arc<Buffer>, offset: u64, bytes: u64) -> Result<()> {
        ffi::address(self.inner.pin_mut(), tensor, buffer, offset, bytes)?.map_err(refused)?;
        if !self.buffers.iter().any(|kept| Arc::ptr_eq(kept, buffer)) {
            self.buffers.push(buffer.clone());
        }
        Ok(())
    }

    /// Enqueues a run on the stream.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message, [`Error::Gpu`] if the GPU has failed.
    pub fn enqueue(&mut self, stream: &Stream) -> Result<()> {
        stream.device().bind()?;
        ffi::enqueue(self.inner.pin_mut(), stream).map_err(refused)
    }

    /// Captures a run with the current shapes and addresses. A run with these shapes must have been executed before, as
    /// TensorRT then does set-up work that cannot be captured.
    ///
    /// # Errors
    /// [`Error::TensorRt`] or [`Error::Gpu`] if it cannot be captured; [`ExecutionContext::enqueue`] still works.
    pub(super) fn record(&mut self, stream: &Stream) -> Result<CudaGraph> {
        if !ffi::capturable(&self.inner, stream) {
            return Err(Error::TensorRt("this plan cannot be captured as a CUDA graph".into()));
        }
        stream.record(|| ffi::enqueue(self.inner.pin_mut(), stream).map_err(refused))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_in_words() {
        assert!(reasons_in_words(0).is_empty());
        let words = reasons_in_words(1 | 1 << 5);
        assert_eq!(
            words,
            ["it was compiled by another version of TensorRT for RTX", "it is not a plan, or it is damaged"]
        );
        assert_eq!(reasons_in_words(u64::MAX).len(), 7);
    }
}
