//! Values, layers and build options of a TensorRT network.

use std::fmt;
use std::ops;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tensor::DType;
use crate::tensor_file::TensorFile;

/// A tensor of a network, by index; only meaningful for the network that returned it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetworkTensor(pub u32);

/// Bytes of a constant. TensorRT reads them in place, so the owner is kept alive until the network is dropped.
pub struct ConstantBytes {
    owner: Owner,
    range: ops::Range<usize>,
}

enum Owner {
    File(Arc<TensorFile>),
    Memory(Arc<[u8]>),
}

impl ConstantBytes {
    /// Borrows a range of a mapped file.
    ///
    /// # Errors
    /// [`Error::Internal`] if the range is out of bounds.
    pub fn of_file(file: Arc<TensorFile>, range: ops::Range<usize>) -> Result<ConstantBytes> {
        ConstantBytes { owner: Owner::File(file), range }.checked()
    }

    /// Borrows a range of a buffer in memory.
    ///
    /// # Errors
    /// As [`ConstantBytes::of_file`].
    pub fn of_memory(bytes: Arc<[u8]>, range: ops::Range<usize>) -> Result<ConstantBytes> {
        ConstantBytes { owner: Owner::Memory(bytes), range }.checked()
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.all()[self.range.clone()]
    }

    fn all(&self) -> &[u8] {
        match &self.owner {
            Owner::File(file) => file.mapped(),
            Owner::Memory(bytes) => bytes,
        }
    }

    fn checked(self) -> Result<ConstantBytes> {
        match self.all().get(self.range.clone()) {
            Some(_) => Ok(self),
            None => {
                let found = format!("a constant is bytes {:?} of {}", self.range, self.all().len());
                Err(Error::internal(found, "a range inside its file"))
            }
        }
    }
}

/// The keys that each query of an attention attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionMask {
    /// Causal, aligned to the lower right: the last query attends to all S keys, each query before it to one fewer.
    Causal,
    /// Causal likewise, over the first `lengths[b]` keys of each sequence, `i32[B]`.
    Lengths(NetworkTensor),
    /// The keys for which `mask[b, 0, t, s]`, `bool[B, 1, T, S]`, is true; at least one for each query.
    Explicit(NetworkTensor),
}

/// The network-building interface that the lowering targets: a TensorRT network, or another implementation such as an
/// evaluator that computes each layer as it is added. Typing is strong: operand types determine the result type.
/// Methods that add a layer return its result, or an error that names the current scope ([`Layers::scope`]).
pub trait Layers {
    /// Sets the name prefix of the layers that follow: `name/0.cast`, `name/1.sum`.
    fn scope(&mut self, name: &str);

    /// Adds an input. Dimensions of -1 are dynamic, bounded by a profile ([`OptimizationProfile`]).
    ///
    /// # Errors
    /// [`crate::Error::TensorRt`] with the scope and the reason, as for all methods below.
    fn input(&mut self, name: &str, dtype: DType, dims: &[i64]) -> Result<NetworkTensor>;

    /// Names a tensor and marks it as an output of the network.
    fn output(&mut self, tensor: NetworkTensor, name: &str) -> Result<()>;

    /// Scalar constant of shape `f32[1, 1, …]` with `rank` dimensions.
    fn scalar(&mut self, value: f32, rank: u32) -> Result<NetworkTensor>;

    /// Constant `i64[n]`, for shape arithmetic.
    fn integers(&mut self, values: &[i64]) -> Result<NetworkTensor>;

    /// Constant embedded in the plan. Its row-major bytes are read in place.
    fn constant(&mut self, bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> Result<NetworkTensor>;

    /// Shape of `x` as `i64[rank]`.
    fn shape(&mut self, x: NetworkTensor) -> Result<NetworkTensor>;

    /// Concatenation along the first dimension.
    fn concat(&mut self, parts: &[NetworkTensor]) -> Result<NetworkTensor>;

    /// Rows of `table` along its first dimension.
    fn gather(&mut self, table: NetworkTensor, indices: NetworkTensor) -> Result<NetworkTensor>;

    /// Conversion to another element type, rounding if needed.
    fn cast(&mut self, x: NetworkTensor, dtype: DType) -> Result<NetworkTensor>;

    /// Reshape; one dimension may be -1 and is inferred.
    fn reshape(&mut self, x: NetworkTensor, dims: &[i64]) -> Result<NetworkTensor>;

    /// Reshape to a shape that the network computes.
    fn reshape_to(&mut self, x: NetworkTensor, shape: NetworkTensor) -> Result<NetworkTensor>;

    /// Dimension `i` of the result is dimension `order[i]` of `x`.
    fn transpose(&mut self, x: NetworkTensor, order: &[i32]) -> Result<NetworkTensor>;

    /// Slice from `start` of the extents in `size`, an `i64[rank]`.
    fn slice(&mut self, x: NetworkTensor, start: &[i64], size: NetworkTensor) -> Result<NetworkTensor>;

    /// Elementwise `x + y`; dimensions of 1 broadcast.
    fn sum(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor>;

    /// Elementwise `x · y`; dimensions of 1 broadcast.
    fn product(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor>;

    /// `max(x, 0)`.
    fn relu(&mut self, x: NetworkTensor) -> Result<NetworkTensor>;

    /// Linear layer `x · weightᵀ` for `x [n, in]` and `weight [out, in]` of the same type, which the result has too.
    fn linear(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor>;

    /// GEMM `x · weight` for `x [n, in]` and `weight [in, out]` of the same type, which the result has too.
    fn matmul(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor>;

    /// Quantizes `x / scale` to codes of type `dtype`; `scale` is per tensor.
    fn quantize(&mut self, x: NetworkTensor, scale: NetworkTensor, dtype: DType) -> Result<NetworkTensor>;

    /// Dequantizes to `codes · scale` in type `dtype`. `scale` is per tensor; or per channel along `axis`; or, with the
    /// rank of `codes` and no `axis`, per block.
    fn dequantize(
        &mut self,
        codes: NetworkTensor,
        scale: NetworkTensor,
        axis: Option<u8>,
        dtype: DType,
    ) -> Result<NetworkTensor>;

    /// Layer normalization of each row of `x [n, width]`, with `scale` and `bias` of shape `[1, width]`.
    fn layer_norm(
        &mut self,
        x: NetworkTensor,
        scale: NetworkTensor,
        bias: NetworkTensor,
        eps: f32,
    ) -> Result<NetworkTensor>;

    /// Rotary embedding of `x [B, heads, T, head_dim]` by `cos` and `sin`, each `[B, T, rotary_dims / 2]`: dims
    /// `(j, j + rotary_dims / 2)` form a pair.
    fn rotary(
        &mut self,
        x: NetworkTensor,
        cos: NetworkTensor,
        sin: NetworkTensor,
        rotary_dims: u32,
    ) -> Result<NetworkTensor>;

    /// Writes `update [B, heads, T, head_dim]` into `cache [B, heads, S, head_dim]` from position `indices[b]` on
    /// (`i32[B]`). The result must be an output of the network that aliases the memory of the cache.
    fn cache_update(
        &mut self,
        cache: NetworkTensor,
        update: NetworkTensor,
        indices: NetworkTensor,
    ) -> Result<NetworkTensor>;

    /// Attention `softmax(q · keysᵀ) · values`, unscaled, for `q [B, heads, T, head_dim]` and `keys`, `values`
    /// `[B, kv_heads, S, head_dim]`.
    fn attention(
        &mut self,
        q: NetworkTensor,
        keys: NetworkTensor,
        values: NetworkTensor,
        mask: AttentionMask,
    ) -> Result<NetworkTensor>;

    /// The `k` largest elements of each row of `x [n, width]` in descending order, `[n, k]`, and their columns,
    /// `i32[n, k]`.
    fn top_k(&mut self, x: NetworkTensor, k: u32) -> Result<(NetworkTensor, NetworkTensor)>;

    /// The sum along the last dimension, which the result does not have.
    fn last_sums(&mut self, x: NetworkTensor) -> Result<NetworkTensor>;
}

/// A layer as TensorRT reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Scope ([`Layers::scope`]), number and operation: `scope/0.cast`.
    pub name: String,
    /// TensorRT's layer type.
    pub kind: String,
    /// Inputs as `name: dtype[dims]`; dynamic dimensions are -1.
    pub inputs: Vec<String>,
    /// Outputs in the same format.
    pub outputs: Vec<String>,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({}) -> {}", self.name, self.kind, self.inputs.join(", "), self.outputs.join(", "))
    }
}

/// The shapes one input may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeRange {
    /// The input's name.
    pub input: String,
    /// Smallest shape.
    pub min: Vec<i64>,
    /// Shape that kernels are tuned for.
    pub opt: Vec<i64>,
    /// Largest shape.
    pub max: Vec<i64>,
}

/// An optimization profile: the shapes of one kind of step, as a range for every input with dynamic dimensions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OptimizationProfile {
    /// One per dynamic input, in any order.
    pub ranges: Vec<ShapeRange>,
}

/// Options for compiling a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildOptions {
    /// Target compute capability, 80 for SM 8.0; `None` targets the GPU in this machine. Only TensorRT for RTX
    /// cross-compiles.
    pub compute_capability: Option<u16>,
    /// TensorRT 11's effort in kernel selection, 0 to 5; `None` is its default. TensorRT for RTX ignores it, because it
    /// selects kernels when a plan first runs.
    pub optimization_level: Option<u8>,
    /// TensorRT 11's tiling optimization level, 0 to 3; `None` is its default. TensorRT for RTX ignores it.
    pub tiling_optimization_level: Option<u8>,
    /// TensorRT 11's timings of kernels from earlier builds on the same GPU model, empty if there are none
    /// ([`Network::timings`](super::Network::timings)). TensorRT ignores those of another version or GPU, and TensorRT
    /// for RTX all.
    pub timings: Vec<u8>,
    /// Logs the plan's kernels at [`super::Severity::Verbose`].
    pub list_kernels: bool,
    /// Profiles; required if any input is dynamic. A run selects one of them.
    pub profiles: Vec<OptimizationProfile>,
}
