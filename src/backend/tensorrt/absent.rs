//! Stand-ins for TensorRT and the GPU driver in builds without the feature `tensorrt`. These types are uninhabited, so
//! only the errors are reachable.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    AttentionMask, BuildOptions, ConstantBytes, DeviceInfo, DriverVersion, GpuOptions, Layer, Layers, LibraryKind,
    Monitor, NetworkTensor, Version,
};
use crate::backend::{Executor, Limits, Logits, Step};
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, Result};
use crate::tensor::DType;

const WORDS: &str =
    "this aotron was built without TensorRT; build it with the feature `tensorrt`, which is on by default";

/// Lists the GPUs visible to this process.
///
/// # Errors
/// Always [`Error::Gpu`]: without the feature `tensorrt` there is no driver to ask.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    Err(Error::Gpu(WORDS.into()))
}

/// Version of the driver.
///
/// # Errors
/// Always [`Error::Gpu`]: without the feature `tensorrt` there is no driver to ask.
pub fn driver_version() -> Result<DriverVersion> {
    Err(Error::Gpu(WORDS.into()))
}

impl LibraryKind {
    /// Version of the headers this program was compiled against; `None` without the feature `tensorrt`.
    pub fn header_version(self) -> Option<Version> {
        None
    }
}

/// An open library; uninhabited in this build.
#[derive(Debug, Clone, Copy)]
pub enum TensorRtLibrary {}

impl TensorRtLibrary {
    /// Finds a library.
    ///
    /// # Errors
    /// [`Error::TensorRt`], always.
    pub fn find(_kind: LibraryKind) -> Result<TensorRtLibrary> {
        Err(Error::TensorRt(WORDS.into()))
    }

    /// Opens a library by its path.
    ///
    /// # Safety
    /// None is needed: nothing is opened.
    ///
    /// # Errors
    /// [`Error::TensorRt`], always.
    #[allow(unsafe_code)]
    pub unsafe fn open(kind: LibraryKind, _path: &Path) -> Result<TensorRtLibrary> {
        TensorRtLibrary::find(kind)
    }

    /// The kind of library.
    pub fn kind(&self) -> LibraryKind {
        match *self {}
    }

    /// The library's version.
    pub fn version(&self) -> Version {
        match *self {}
    }

    /// Path of the file the library was opened from.
    pub fn path(&self) -> PathBuf {
        match *self {}
    }

    /// Checks that the machine's driver is new enough.
    ///
    /// # Errors
    /// None: there is no library to ask.
    pub fn check_driver(&self) -> Result<()> {
        match *self {}
    }

    /// Checks that the library can compile for a GPU of this machine.
    ///
    /// # Errors
    /// None: there is no library to ask.
    pub fn compiles_on(&self, _gpu: usize) -> Result<()> {
        match *self {}
    }

    /// An empty network, built on one of this machine's GPUs.
    ///
    /// # Errors
    /// None: there is no library to ask.
    pub fn network_on(&self, _gpu: Option<usize>, _monitor: Arc<dyn Monitor>) -> Result<Network> {
        match *self {}
    }

    /// Checks that the library can compile for a GPU.
    ///
    /// # Errors
    /// None: there is no library to ask.
    pub fn compiles_for(&self, _compute_capability: Option<u16>) -> Result<()> {
        match *self {}
    }

    /// An empty network.
    ///
    /// # Errors
    /// None: there is no library to ask.
    pub fn network(&self, _monitor: Arc<dyn Monitor>) -> Result<Network> {
        match *self {}
    }
}

/// A network under construction; uninhabited in this build.
#[derive(Debug)]
pub enum Network {}

impl Network {
    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        match *self {}
    }

    /// The layers.
    ///
    /// # Errors
    /// None: there is no network.
    pub fn layers(&self) -> Result<Vec<Layer>> {
        match *self {}
    }

    /// Compiles the network, with attention in several kernels if there is no fused one.
    ///
    /// # Errors
    /// None: there is no network.
    pub fn build_or_decompose(&mut self, _options: &BuildOptions) -> Result<(SerializedPlan, Option<String>)> {
        match *self {}
    }

    /// Timings of kernels from the last build.
    pub fn timings(&self) -> &[u8] {
        match *self {}
    }

    /// Allows attention to be compiled to several kernels.
    ///
    /// # Errors
    /// None: there is no network.
    pub fn decompose_attention(&mut self) -> Result<usize> {
        match *self {}
    }

    /// Compiles the network.
    ///
    /// # Errors
    /// None: there is no network.
    pub fn build(&mut self, _options: &BuildOptions) -> Result<SerializedPlan> {
        match *self {}
    }
}

/// Implements the methods of [`Layers`], none of which can be called.
macro_rules! unreachable_layers {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        impl Layers for Network {
            fn scope(&mut self, _name: &str) {
                match *self {}
            }
            $(fn $name(&mut self, $($argument: $type),*) -> Result<$result> {
                let _ = ($($argument,)*);
                match *self {}
            })*
        }
    };
}

unreachable_layers! {
    fn input(name: &str, dtype: DType, dims: &[i64]) -> NetworkTensor;
    fn output(tensor: NetworkTensor, name: &str) -> ();
    fn scalar(value: f32, rank: u32) -> NetworkTensor;
    fn integers(values: &[i64]) -> NetworkTensor;
    fn constant(bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> NetworkTensor;
    fn shape(x: NetworkTensor) -> NetworkTensor;
    fn concat(parts: &[NetworkTensor]) -> NetworkTensor;
    fn gather(table: NetworkTensor, indices: NetworkTensor) -> NetworkTensor;
    fn cast(x: NetworkTensor, dtype: DType) -> NetworkTensor;
    fn reshape(x: NetworkTensor, dims: &[i64]) -> NetworkTensor;
    fn reshape_to(x: NetworkTensor, shape: NetworkTensor) -> NetworkTensor;
    fn transpose(x: NetworkTensor, order: &[i32]) -> NetworkTensor;
    fn slice(x: NetworkTensor, start: &[i64], size: NetworkTensor) -> NetworkTensor;
    fn sum(x: NetworkTensor, y: NetworkTensor) -> NetworkTensor;
    fn product(x: NetworkTensor, y: NetworkTensor) -> NetworkTensor;
    fn relu(x: NetworkTensor) -> NetworkTensor;
    fn linear(x: NetworkTensor, weight: NetworkTensor) -> NetworkTensor;
    fn matmul(x: NetworkTensor, weight: NetworkTensor) -> NetworkTensor;
    fn quantize(x: NetworkTensor, scale: NetworkTensor, dtype: DType) -> NetworkTensor;
    fn dequantize(codes: NetworkTensor, scale: NetworkTensor, axis: Option<u8>, dtype: DType) -> NetworkTensor;
    fn layer_norm(x: NetworkTensor, scale: NetworkTensor, bias: NetworkTensor, eps: f32) -> NetworkTensor;
    fn rotary(x: NetworkTensor, cos: NetworkTensor, sin: NetworkTensor, rotary_dims: u32) -> NetworkTensor;
    fn cache_update(cache: NetworkTensor, update: NetworkTensor, indices: NetworkTensor) -> NetworkTensor;
    fn attention(
        q: NetworkTensor, keys: NetworkTensor, values: NetworkTensor, mask: AttentionMask
    ) -> NetworkTensor;
    fn top_k(x: NetworkTensor, k: u32) -> (NetworkTensor, NetworkTensor);
    fn last_sums(x: NetworkTensor) -> NetworkTensor;
}

/// A compiled network; uninhabited in this build.
#[derive(Debug)]
pub enum SerializedPlan {}

impl SerializedPlan {
    /// The bytes to write to a file.
    pub fn bytes(&self) -> &[u8] {
        match *self {}
    }
}

/// The TensorRT executor; uninhabited in this build.
#[derive(Debug)]
pub enum TensorRtExecutor {}

impl TensorRtExecutor {
    /// Opens a plan.
    ///
    /// # Errors
    /// [`Error::TensorRt`], always.
    pub fn open(_package: &Package, _plan: &PlanInfo, _options: &GpuOptions) -> Result<TensorRtExecutor> {
        Err(Error::TensorRt(WORDS.into()))
    }
}

impl Executor for TensorRtExecutor {
    fn limits(&self) -> &Limits {
        match *self {}
    }

    fn forward(&mut self, _step: &Step) -> Result<Logits<'_>> {
        match *self {}
    }
}
