//! What a network is made of.

use std::fmt;
use std::ops;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tensor::DType;
use crate::tensor_file::TensorFile;

/// A value of a network, by its number; only meaningful with the network that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NetworkTensor(pub u32);

/// Bytes of a constant, which TensorRT reads where they lie: their owner lives until the network is gone.
pub struct ConstantBytes {
    owner: Owner,
    range: ops::Range<usize>,
}

enum Owner {
    File(Arc<TensorFile>),
    Memory(Arc<[u8]>),
}

impl ConstantBytes {
    /// Bytes of a mapped file.
    ///
    /// # Errors
    /// [`Error::Internal`] if the range is outside.
    pub fn of_file(file: Arc<TensorFile>, range: ops::Range<usize>) -> Result<ConstantBytes> {
        ConstantBytes { owner: Owner::File(file), range }.checked()
    }

    /// Bytes in memory.
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

/// A network under construction, as the lowering sees it: a network of TensorRT, or whatever else takes the same
/// layers, such as an evaluator that computes each of them when it is added. Every value has the type that its operands
/// give it. Every method that adds a layer gives its value, or an error that names the place ([`Layers::scope`]).
pub trait Layers {
    /// Names the layers that are added from here on: `name/0.cast`, `name/1.sum`.
    fn scope(&mut self, name: &str);

    /// A value supplied at run time; -1 is a dimension that a [`OptimizationProfile`] bounds.
    ///
    /// # Errors
    /// Here and in all that follow, [`crate::Error::TensorRt`] with the place and the reason.
    fn input(&mut self, name: &str, dtype: DType, dims: &[i64]) -> Result<NetworkTensor>;

    /// Gives a value a name and makes it a result.
    fn output(&mut self, tensor: NetworkTensor, name: &str) -> Result<()>;

    /// `f32[1, 1, …]` of that rank.
    fn scalar(&mut self, value: f32, rank: u32) -> Result<NetworkTensor>;

    /// `i64[n]`, for arithmetic with shapes.
    fn integers(&mut self, values: &[i64]) -> Result<NetworkTensor>;

    /// A value that becomes part of the plan. Its bytes, row-major, are read where they lie.
    fn constant(&mut self, bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> Result<NetworkTensor>;

    /// `i64[rank]`: the sizes of `x`.
    fn shape(&mut self, x: NetworkTensor) -> Result<NetworkTensor>;

    /// One after the other, along the first dimension.
    fn concat(&mut self, parts: &[NetworkTensor]) -> Result<NetworkTensor>;

    /// Rows of `table` along its first dimension.
    fn gather(&mut self, table: NetworkTensor, indices: NetworkTensor) -> Result<NetworkTensor>;

    /// Rounded to another element type.
    fn cast(&mut self, x: NetworkTensor, dtype: DType) -> Result<NetworkTensor>;

    /// The same elements in order; one dimension may be -1, which takes what is left.
    fn reshape(&mut self, x: NetworkTensor, dims: &[i64]) -> Result<NetworkTensor>;

    /// As [`Layers::reshape`], to sizes that the network computes.
    fn reshape_to(&mut self, x: NetworkTensor, shape: NetworkTensor) -> Result<NetworkTensor>;

    /// Dimension `i` of the result is dimension `order[i]` of `x`.
    fn transpose(&mut self, x: NetworkTensor, order: &[i32]) -> Result<NetworkTensor>;

    /// From `start` as many as `size`, an `i64[rank]`, says.
    fn slice(&mut self, x: NetworkTensor, start: &[i64], size: NetworkTensor) -> Result<NetworkTensor>;

    /// `x + y`; a dimension of 1 is repeated.
    fn sum(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor>;

    /// `x · y`; a dimension of 1 is repeated.
    fn product(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor>;

    /// `max(x, 0)`.
    fn relu(&mut self, x: NetworkTensor) -> Result<NetworkTensor>;

    /// `(x [n, in], weight [out, in])`: `x · weightᵀ`, in the type of both.
    fn linear(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor>;

    /// `(x [n, in], weight [in, out])`: `x · weight`, in the type of both.
    fn matmul(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor>;

    /// `x / scale` as codes of that type; `scale` is one number.
    fn quantize(&mut self, x: NetworkTensor, scale: NetworkTensor, dtype: DType) -> Result<NetworkTensor>;

    /// `codes · scale` as floats of that type. `scale` is one number; or one for each index of dimension `axis`; or,
    /// with as many dimensions as `codes` and no `axis`, one for each block.
    fn dequantize(
        &mut self,
        codes: NetworkTensor,
        scale: NetworkTensor,
        axis: Option<u8>,
        dtype: DType,
    ) -> Result<NetworkTensor>;

    /// `(x [n, width], scale [1, width], bias [1, width])`: layer normalization of each row.
    fn layer_norm(
        &mut self,
        x: NetworkTensor,
        scale: NetworkTensor,
        bias: NetworkTensor,
        eps: f32,
    ) -> Result<NetworkTensor>;

    /// `(x [B, heads, T, head_dim], cos, sin [B, T, rotary_dims / 2])`: dims `(j, j + rotary_dims / 2)` rotate.
    fn rotary(
        &mut self,
        x: NetworkTensor,
        cos: NetworkTensor,
        sin: NetworkTensor,
        rotary_dims: u32,
    ) -> Result<NetworkTensor>;

    /// `(cache [B, heads, S, head_dim], update [B, heads, T, head_dim], indices i32[B])`: the cache with the update
    /// written from position `indices[b]` on. The result must be an output, bound to the memory of the cache.
    fn cache_update(
        &mut self,
        cache: NetworkTensor,
        update: NetworkTensor,
        indices: NetworkTensor,
    ) -> Result<NetworkTensor>;

    /// `(q [B, heads, T, head_dim], keys, values [B, kv_heads, S, head_dim])`: `softmax(q · keysᵀ) · values`, unscaled
    /// and causal such that the last query reads all keys: of the first `lengths[b]`, an `i32[B]`, or of all S.
    fn attention(
        &mut self,
        q: NetworkTensor,
        keys: NetworkTensor,
        values: NetworkTensor,
        lengths: Option<NetworkTensor>,
    ) -> Result<NetworkTensor>;

    /// The `k` largest of each row of `x [n, width]`, largest first, and their columns: `[n, k]` and `i32[n, k]`.
    fn top_k(&mut self, x: NetworkTensor, k: u32) -> Result<(NetworkTensor, NetworkTensor)>;
}

/// A layer as TensorRT reads it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// [`Layers::scope`], a number and an operation.
    pub name: String,
    /// TensorRT's kind of layer.
    pub kind: String,
    /// `name: dtype[sizes]`; -1 where a profile decides.
    pub inputs: Vec<String>,
    /// Likewise.
    pub outputs: Vec<String>,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({}) -> {}", self.name, self.kind, self.inputs.join(", "), self.outputs.join(", "))
    }
}

/// The sizes one input may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeRange {
    /// The input's name.
    pub input: String,
    /// The smallest.
    pub min: Vec<i64>,
    /// Those that kernels are chosen for.
    pub opt: Vec<i64>,
    /// The largest.
    pub max: Vec<i64>,
}

/// The sizes of one kind of step: a range for every input that has a -1.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OptimizationProfile {
    /// In any order.
    pub ranges: Vec<ShapeRange>,
}

/// How to compile a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildOptions {
    /// 80 for SM 8.0; `None` is the GPU at hand. TensorRT for RTX alone takes another.
    pub compute_capability: Option<u16>,
    /// How long TensorRT 11 looks for the fastest kernels, 0 to 5; `None` is its own default. TensorRT for RTX has no
    /// such choice: it looks when a plan first runs.
    pub optimization_level: Option<u8>,
    /// Log the plan's kernels, at [`super::Severity::Verbose`].
    pub list_kernels: bool,
    /// At least one if any input has a -1; a step runs in one of them.
    pub profiles: Vec<OptimizationProfile>,
}
