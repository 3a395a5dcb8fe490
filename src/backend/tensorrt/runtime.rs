//! Running plans: a runtime reads them, an engine is one that was read, a context runs one of its profiles.

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

/// Reads plans.
pub struct TensorRtRuntime {
    inner: UniquePtr<bridge::Runtime>,
}

/// What a plan's header says of running it on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validity {
    /// The library cannot tell by the header.
    Unknown,
    /// It should run.
    Valid,
    /// It should run, but not as fast as it could.
    Suboptimal,
    /// It does not run here: why, in words.
    Invalid(Vec<&'static str>),
}

impl TensorRtLibrary {
    /// A runtime; the monitor hears what TensorRT says about it and all that is made with it.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words.
    pub fn runtime(&self, monitor: Arc<dyn Monitor>) -> Result<TensorRtRuntime> {
        Ok(TensorRtRuntime { inner: self.inner().runtime(Box::new(Observer(monitor))).map_err(refused)? })
    }
}

impl TensorRtRuntime {
    /// Looks at the plan's header. Without a GPU a plan that is well formed is invalid for no reason named.
    pub fn validity(&self, plan: &[u8]) -> Validity {
        let bridge::Validity { checked, valid, suboptimal, reasons } = self.inner.validity(plan);
        match (checked, valid, suboptimal) {
            (false, ..) => Validity::Unknown,
            (true, true, false) => Validity::Valid,
            (true, true, true) => Validity::Suboptimal,
            (true, false, _) => Validity::Invalid(reasons_in_words(reasons)),
        }
    }

    /// Reads a plan, whole and unchanged: TensorRT checks its frame, not its content, so a caller compares its digest
    /// first ([`crate::engine::Package::read`] does).
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words.
    pub fn deserialize(&self, plan: &[u8]) -> Result<CudaEngine> {
        Ok(CudaEngine { inner: self.inner.deserialize(plan).map_err(refused)? })
    }
}

impl fmt::Debug for TensorRtRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TensorRtRuntime")
    }
}

/// TensorRT's `EngineInvalidityDiagnostics`.
fn reasons_in_words(reasons: u64) -> Vec<&'static str> {
    let known = [
        "another version of TensorRT for RTX compiled it",
        "it was not compiled for this GPU",
        "the NVIDIA driver is older than it needs",
        "the CUDA runtime is older than it needs",
        "the GPU has too little memory for its weights",
        "it is not a plan, or damaged",
        "CUDA does not work here: no NVIDIA driver, or not one that fits",
    ];
    known.into_iter().enumerate().filter(|(bit, _)| reasons >> bit & 1 == 1).map(|(_, words)| words).collect()
}

/// An input or output of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineTensor {
    /// Its name.
    pub name: String,
    /// Whether it is read.
    pub is_input: bool,
    /// Its element type: `"bf16"`.
    pub dtype: String,
    /// Its sizes, -1 where a profile decides.
    pub dims: Vec<i64>,
    /// Whether it is in the GPU's memory.
    pub on_device: bool,
    /// The input whose memory an output must have.
    pub alias: Option<String>,
}

/// A plan that was read.
pub struct CudaEngine {
    inner: UniquePtr<bridge::Engine>,
}

impl fmt::Debug for CudaEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaEngine({} profiles)", self.profiles())
    }
}

impl CudaEngine {
    /// Its inputs and outputs.
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

    /// The largest sizes of an input in a profile.
    pub fn largest(&self, input: &str, profile: u32) -> Vec<i64> {
        self.inner.largest(input, profile)
    }

    /// Memory that a context needs between inputs and outputs, whatever its profile.
    pub fn memory_bytes(&self) -> u64 {
        self.inner.memory_bytes()
    }

    /// Starts to keep kernels that are compiled, with those of an earlier process if the library takes them.
    ///
    /// # Errors
    /// [`Error::TensorRt`] if kernels are kept already.
    pub fn keep_kernels(&mut self, earlier: &[u8]) -> Result<bool> {
        self.inner.pin_mut().load_kernels(earlier).map_err(refused)
    }

    /// The kernels compiled so far, for [`CudaEngine::keep_kernels`].
    ///
    /// # Errors
    /// [`Error::TensorRt`] if none are kept.
    pub fn kernels(&self) -> Result<Vec<u8>> {
        Ok(self.inner.kernels().map_err(refused)?.bytes().to_vec())
    }

    /// A context of a profile. `specialize` compiles kernels for the exact sizes before their first run rather than
    /// beside it: for few sizes, often used.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words.
    pub fn context(&self, profile: u32, specialize: bool, stream: &Stream) -> Result<ExecutionContext> {
        stream.device().bind()?;
        let inner = ffi::context(&self.inner, profile, specialize, stream).map_err(refused)?;
        Ok(ExecutionContext { inner, memory: None, buffers: Vec::new() })
    }
}

/// A profile of an engine, ready to run. It keeps the memory alive that it was given.
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
    /// Memory for what happens between inputs and outputs; contexts that run in one stream may share it.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words.
    pub fn set_memory(&mut self, memory: &Arc<Buffer>) -> Result<()> {
        ffi::memory(self.inner.pin_mut(), memory).map_err(refused)?;
        self.memory = Some(memory.clone());
        Ok(())
    }

    /// The sizes of an input in the next runs.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words if the profile does not allow them.
    pub fn set_shape(&mut self, input: &str, dims: &[i64]) -> Result<()> {
        self.inner.pin_mut().shape(input, dims).map_err(refused)
    }

    /// Where an input or output is: from `offset` bytes on in a buffer.
    ///
    /// # Errors
    /// [`Error::TensorRt`] if there is no such tensor, or its bytes are not in the buffer or not aligned.
    pub fn set_address(&mut self, tensor: &str, buffer: &Arc<Buffer>, offset: u64, bytes: u64) -> Result<()> {
        ffi::address(self.inner.pin_mut(), tensor, buffer, offset, bytes)?.map_err(refused)?;
        if !self.buffers.iter().any(|kept| Arc::ptr_eq(kept, buffer)) {
            self.buffers.push(buffer.clone());
        }
        Ok(())
    }

    /// Puts a run into the stream.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words, [`Error::Gpu`] if the GPU has failed.
    pub fn enqueue(&mut self, stream: &Stream) -> Result<()> {
        stream.device().bind()?;
        ffi::enqueue(self.inner.pin_mut(), stream).map_err(refused)
    }

    /// Records a run, to be replayed with the sizes and addresses of now. A run of these sizes must have gone before,
    /// in which TensorRT sets up what cannot be recorded.
    ///
    /// # Errors
    /// [`Error::TensorRt`] or [`Error::Gpu`] if it cannot be recorded; it can still be run.
    pub(super) fn record(&mut self, stream: &Stream) -> Result<CudaGraph> {
        if !ffi::capturable(&self.inner, stream) {
            return Err(Error::TensorRt("it says that this plan cannot be recorded".into()));
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
        assert_eq!(words, ["another version of TensorRT for RTX compiled it", "it is not a plan, or damaged"]);
        assert_eq!(reasons_in_words(u64::MAX).len(), 7);
    }
}
