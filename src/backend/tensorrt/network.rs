//! A strongly typed network under construction: every value has the type its operands give it.

use std::fmt;
use std::pin::Pin;

use cxx::UniquePtr;

use super::ffi::ConstantBytes;
use super::ffi::bridge::{self, Element};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A value of a network; only meaningful with the network that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tensor(u32);

/// A network, its layers added one by one. Every method that adds one gives its value, or an [`Error::TensorRt`] with
/// the place ([`Network::scope`]) and TensorRT's own words.
pub struct Network {
    inner: UniquePtr<bridge::Network>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Network({} layers)", self.layer_count())
    }
}

fn refused(error: cxx::Exception) -> Error {
    Error::TensorRt(error.what().into())
}

impl Network {
    pub(super) fn new(inner: UniquePtr<bridge::Network>) -> Network {
        Network { inner }
    }

    fn pin(&mut self) -> Pin<&mut bridge::Network> {
        self.inner.pin_mut()
    }

    fn value(added: std::result::Result<u32, cxx::Exception>) -> Result<Tensor> {
        added.map(Tensor).map_err(refused)
    }

    /// Names the layers that are added from here on: `name/0.cast`, `name/1.sum`.
    pub fn scope(&mut self, name: &str) {
        self.pin().scope(name);
    }

    /// A value supplied at run time; -1 is a dimension that a [`Profile`] bounds.
    ///
    /// # Errors
    /// [`Error::TensorRt`], here and in all that follow.
    pub fn input(&mut self, name: &str, dtype: DType, dims: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().input(name, element(dtype), dims))
    }

    /// Gives a value a name and makes it a result.
    pub fn output(&mut self, tensor: Tensor, name: &str) -> Result<()> {
        self.pin().output(tensor.0, name).map_err(refused)
    }

    /// `f32[1, 1, …]` of that rank.
    pub fn scalar(&mut self, value: f32, rank: u32) -> Result<Tensor> {
        Network::value(self.pin().constant_f32(value, rank))
    }

    /// `i64[n]`, for arithmetic with shapes.
    pub fn integers(&mut self, values: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().constant_i64(values))
    }

    /// A value that becomes part of the plan. Its bytes, row-major, are read where they lie.
    pub fn constant(&mut self, bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().constant_of(Box::new(bytes), element(dtype), dims))
    }

    /// `i64[rank]`: the sizes of `x`.
    pub fn shape(&mut self, x: Tensor) -> Result<Tensor> {
        Network::value(self.pin().shape(x.0))
    }

    /// One after the other, along the first dimension.
    pub fn concat(&mut self, parts: &[Tensor]) -> Result<Tensor> {
        let parts: Vec<u32> = parts.iter().map(|part| part.0).collect();
        Network::value(self.pin().concat(&parts))
    }

    /// Rows of `table` along its first dimension.
    pub fn gather(&mut self, table: Tensor, indices: Tensor) -> Result<Tensor> {
        Network::value(self.pin().gather(table.0, indices.0))
    }

    /// Rounded to another element type.
    pub fn cast(&mut self, x: Tensor, dtype: DType) -> Result<Tensor> {
        Network::value(self.pin().cast(x.0, element(dtype)))
    }

    /// The same elements in order; one dimension may be -1, which takes what is left.
    pub fn reshape(&mut self, x: Tensor, dims: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().reshape(x.0, dims))
    }

    /// As [`Network::reshape`], to sizes that the network computes.
    pub fn reshape_to(&mut self, x: Tensor, shape: Tensor) -> Result<Tensor> {
        Network::value(self.pin().reshape_to(x.0, shape.0))
    }

    /// Dimension `i` of the result is dimension `order[i]` of `x`.
    pub fn transpose(&mut self, x: Tensor, order: &[i32]) -> Result<Tensor> {
        Network::value(self.pin().transpose(x.0, order))
    }

    /// From `start` as many as `size`, an `i64[rank]`, says.
    pub fn slice(&mut self, x: Tensor, start: &[i64], size: Tensor) -> Result<Tensor> {
        Network::value(self.pin().slice(x.0, start, size.0))
    }

    /// `x + y`; a dimension of 1 is repeated.
    pub fn sum(&mut self, x: Tensor, y: Tensor) -> Result<Tensor> {
        Network::value(self.pin().sum(x.0, y.0))
    }

    /// `x · y`; a dimension of 1 is repeated.
    pub fn product(&mut self, x: Tensor, y: Tensor) -> Result<Tensor> {
        Network::value(self.pin().product(x.0, y.0))
    }

    /// `max(x, 0)`.
    pub fn relu(&mut self, x: Tensor) -> Result<Tensor> {
        Network::value(self.pin().relu(x.0))
    }

    /// `(x [n, in], weight [out, in])`: `x · weightᵀ`, in the type of both.
    pub fn linear(&mut self, x: Tensor, weight: Tensor) -> Result<Tensor> {
        Network::value(self.pin().linear(x.0, weight.0))
    }

    /// `(x [n, in], weight [in, out])`: `x · weight`, in the type of both.
    pub fn matmul(&mut self, x: Tensor, weight: Tensor) -> Result<Tensor> {
        Network::value(self.pin().matmul(x.0, weight.0))
    }

    /// `x / scale` as codes of that type; `scale` is one number.
    pub fn quantize(&mut self, x: Tensor, scale: Tensor, dtype: DType) -> Result<Tensor> {
        Network::value(self.pin().quantize(x.0, scale.0, element(dtype)))
    }

    /// `codes · scale` as floats of that type. `scale` is one number; or one for each index of dimension `axis`; or,
    /// with as many dimensions as `codes` and no `axis`, one for each block.
    pub fn dequantize(&mut self, codes: Tensor, scale: Tensor, axis: Option<u8>, dtype: DType) -> Result<Tensor> {
        let axis = axis.map_or(-1, i32::from);
        Network::value(self.pin().dequantize(codes.0, scale.0, axis, element(dtype)))
    }

    /// `(x [n, width], scale [1, width], bias [1, width])`: layer normalization of each row.
    pub fn layer_norm(&mut self, x: Tensor, scale: Tensor, bias: Tensor, eps: f32) -> Result<Tensor> {
        Network::value(self.pin().layer_norm(x.0, scale.0, bias.0, eps))
    }

    /// `(x [B, heads, T, head_dim], cos, sin [B, T, rotary_dims / 2])`: dims `(j, j + rotary_dims / 2)` rotate.
    pub fn rotary(&mut self, x: Tensor, cos: Tensor, sin: Tensor, rotary_dims: u32) -> Result<Tensor> {
        Network::value(self.pin().rotary(x.0, cos.0, sin.0, rotary_dims))
    }

    /// `(cache [B, heads, S, head_dim], update [B, heads, T, head_dim], indices i32[B])`: the cache with the update
    /// written from position `indices[b]` on. The result must be an output, bound to the memory of the cache.
    pub fn cache_update(&mut self, cache: Tensor, update: Tensor, indices: Tensor) -> Result<Tensor> {
        Network::value(self.pin().cache_update(cache.0, update.0, indices.0))
    }

    /// `(q [B, heads, T, head_dim], keys, values [B, kv_heads, S, head_dim])`: `softmax(q · keysᵀ) · values`, unscaled
    /// and causal such that the last query reads all keys: of the first `lengths[b]`, an `i32[B]`, or of all S.
    pub fn attention(&mut self, q: Tensor, keys: Tensor, values: Tensor, lengths: Option<Tensor>) -> Result<Tensor> {
        Network::value(match lengths {
            Some(lengths) => self.pin().attention_with_lengths(q.0, keys.0, values.0, lengths.0),
            None => self.pin().attention(q.0, keys.0, values.0),
        })
    }

    /// The `k` largest of each row of `x [n, width]`, largest first, and their columns: `[n, k]` and `i32[n, k]`.
    pub fn top_k(&mut self, x: Tensor, k: u32) -> Result<(Tensor, Tensor)> {
        let top = self.pin().top_k(x.0, k).map_err(refused)?;
        Ok((Tensor(top.values), Tensor(top.indices)))
    }

    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.inner.layers() as usize
    }

    /// The layers, as TensorRT reads them back.
    pub fn layers(&self) -> Result<Vec<Layer>> {
        (0..self.inner.layers())
            .map(|index| {
                let bridge::LayerInfo { name, kind, inputs, outputs } = self.inner.layer(index).map_err(refused)?;
                Ok(Layer { name, kind, inputs, outputs })
            })
            .collect()
    }

    /// Compiles the network.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words; [`Error::Cancelled`] if the monitor broke off.
    pub fn build(&mut self, options: &BuildOptions) -> Result<Plan> {
        let ranges = |profile: &Profile| {
            let range = |range: &Range| {
                let Range { input, min, opt, max } = range.clone();
                bridge::Range { input, min, opt, max }
            };
            bridge::Profile { ranges: profile.ranges.iter().map(range).collect() }
        };
        let options = bridge::BuildOptions {
            compute_capability: options.compute_capability.map_or(0, i32::from),
            optimization_level: options.optimization_level.map_or(-1, i32::from),
            list_kernels: options.list_kernels,
            profiles: options.profiles.iter().map(ranges).collect(),
        };
        match self.pin().build(&options) {
            Ok(inner) => Ok(Plan { inner }),
            Err(_) if self.inner.cancelled() => Err(Error::Cancelled),
            Err(error) => Err(refused(error)),
        }
    }
}

/// A layer as TensorRT reads it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// [`Network::scope`], a number and an operation.
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
pub struct Range {
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
pub struct Profile {
    /// In any order.
    pub ranges: Vec<Range>,
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
    pub profiles: Vec<Profile>,
}

/// A compiled network, serialized.
pub struct Plan {
    inner: UniquePtr<bridge::Plan>,
}

impl Plan {
    /// What to write to a file.
    pub fn bytes(&self) -> &[u8] {
        self.inner.bytes()
    }
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Plan({} bytes)", self.bytes().len())
    }
}

fn element(dtype: DType) -> Element {
    match dtype {
        DType::F32 => Element::F32,
        DType::F16 => Element::F16,
        DType::BF16 => Element::BF16,
        DType::I32 => Element::I32,
        DType::I8 => Element::I8,
        DType::I4 => Element::I4,
        DType::F8 => Element::F8,
    }
}
