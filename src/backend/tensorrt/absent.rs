//! Stands in for TensorRT and the GPU's driver where the crate is built without the feature `tensorrt`. None of these
//! types has a value, so nothing here can be reached but the errors.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{BuildOptions, ConstantBytes, DeviceInfo, GpuOptions, Kind, Layer, Layers, Monitor, Tensor, Version};
use crate::backend::{Executor, Limits, Logits, Step};
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, Result};
use crate::tensor::DType;

const WORDS: &str =
    "this aotron was built without TensorRT; build it with the feature `tensorrt`, which is on by default";

/// The GPUs that this process may use.
///
/// # Errors
/// [`Error::Gpu`], always: without the feature `tensorrt` there is nothing to ask.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    Err(Error::Gpu(WORDS.into()))
}

impl Kind {
    /// The version whose headers this program was compiled against; none without the feature `tensorrt`.
    pub fn header_version(self) -> Option<Version> {
        None
    }
}

/// A library that is open; never here.
#[derive(Debug, Clone, Copy)]
pub enum Library {}

impl Library {
    /// Finds a library.
    ///
    /// # Errors
    /// [`Error::TensorRt`], always.
    pub fn find(_kind: Kind) -> Result<Library> {
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
    pub unsafe fn open(kind: Kind, _path: &Path) -> Result<Library> {
        Library::find(kind)
    }

    /// Which it is.
    pub fn kind(&self) -> Kind {
        match *self {}
    }

    /// Its version.
    pub fn version(&self) -> Version {
        match *self {}
    }

    /// The file it was opened from.
    pub fn path(&self) -> PathBuf {
        match *self {}
    }

    /// Whether it compiles for a GPU.
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

/// A network under construction; never here.
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

    /// Compiles the network.
    ///
    /// # Errors
    /// None: there is no network.
    pub fn build(&mut self, _options: &BuildOptions) -> Result<Plan> {
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
    fn input(name: &str, dtype: DType, dims: &[i64]) -> Tensor;
    fn output(tensor: Tensor, name: &str) -> ();
    fn scalar(value: f32, rank: u32) -> Tensor;
    fn integers(values: &[i64]) -> Tensor;
    fn constant(bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> Tensor;
    fn shape(x: Tensor) -> Tensor;
    fn concat(parts: &[Tensor]) -> Tensor;
    fn gather(table: Tensor, indices: Tensor) -> Tensor;
    fn cast(x: Tensor, dtype: DType) -> Tensor;
    fn reshape(x: Tensor, dims: &[i64]) -> Tensor;
    fn reshape_to(x: Tensor, shape: Tensor) -> Tensor;
    fn transpose(x: Tensor, order: &[i32]) -> Tensor;
    fn slice(x: Tensor, start: &[i64], size: Tensor) -> Tensor;
    fn sum(x: Tensor, y: Tensor) -> Tensor;
    fn product(x: Tensor, y: Tensor) -> Tensor;
    fn relu(x: Tensor) -> Tensor;
    fn linear(x: Tensor, weight: Tensor) -> Tensor;
    fn matmul(x: Tensor, weight: Tensor) -> Tensor;
    fn quantize(x: Tensor, scale: Tensor, dtype: DType) -> Tensor;
    fn dequantize(codes: Tensor, scale: Tensor, axis: Option<u8>, dtype: DType) -> Tensor;
    fn layer_norm(x: Tensor, scale: Tensor, bias: Tensor, eps: f32) -> Tensor;
    fn rotary(x: Tensor, cos: Tensor, sin: Tensor, rotary_dims: u32) -> Tensor;
    fn cache_update(cache: Tensor, update: Tensor, indices: Tensor) -> Tensor;
    fn attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Option<Tensor>) -> Tensor;
    fn top_k(x: Tensor, k: u32) -> (Tensor, Tensor);
}

/// A compiled network; never here.
#[derive(Debug)]
pub enum Plan {}

impl Plan {
    /// The bytes to write to a file.
    pub fn bytes(&self) -> &[u8] {
        match *self {}
    }
}

/// The TensorRT executor; never here.
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
