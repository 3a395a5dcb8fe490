//! Safe wrapper of a strongly typed TensorRT network: operand types determine the type of every tensor.

use std::fmt;
use std::pin::Pin;

use cxx::UniquePtr;

use super::device::Device;
use super::ffi::bridge::{self, Element};
use super::{
    AttentionMask, BuildOptions, ConstantBytes, Layer, Layers, NetworkTensor, OptimizationProfile, ShapeRange,
    TensorRtLibrary,
};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A network under construction. Layers are added through [`Layers`]; a layer that TensorRT rejects is an
/// [`Error::TensorRt`] with its message.
pub struct Network {
    inner: UniquePtr<bridge::Network>,
    library: TensorRtLibrary,
    /// The GPU that was current when the network was created, and is to be when it is built.
    device: Option<Device>,
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
    pub(super) fn new(inner: UniquePtr<bridge::Network>, library: TensorRtLibrary, device: Option<Device>) -> Network {
        Network { inner, library, device }
    }

    fn pin(&mut self) -> Pin<&mut bridge::Network> {
        self.inner.pin_mut()
    }

    fn value(added: std::result::Result<u32, cxx::Exception>) -> Result<NetworkTensor> {
        added.map(NetworkTensor).map_err(refused)
    }

    /// Number of layers.
    pub fn layer_count(&self) -> usize {
        self.inner.layers() as usize
    }

    /// The layers, as TensorRT reports them.
    pub fn layers(&self) -> Result<Vec<Layer>> {
        (0..self.inner.layers())
            .map(|index| {
                let bridge::LayerInfo { name, kind, inputs, outputs } = self.inner.layer(index).map_err(refused)?;
                Ok(Layer { name, kind, inputs, outputs })
            })
            .collect()
    }

    /// Allows every attention so far to be compiled to several kernels where TensorRT has no fused one, which is slower
    /// and takes scratch memory for the scores. Returns how many there are.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message.
    pub fn decompose_attention(&mut self) -> Result<usize> {
        self.pin().decompose_attention().map(|count| count as usize).map_err(refused)
    }

    /// Compiles the network.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message; [`Error::Cancelled`] if the monitor cancelled the build;
    /// [`Error::Gpu`] if the GPU to build on has failed.
    pub fn build(&mut self, options: &BuildOptions) -> Result<SerializedPlan> {
        let ranges = |profile: &OptimizationProfile| {
            let range = |range: &ShapeRange| {
                let ShapeRange { input, min, opt, max } = range.clone();
                bridge::Range { input, min, opt, max }
            };
            bridge::Profile { ranges: profile.ranges.iter().map(range).collect() }
        };
        let options = bridge::BuildOptions {
            compute_capability: options.compute_capability.map_or(0, i32::from),
            optimization_level: options.optimization_level.map_or(-1, i32::from),
            tiling_optimization_level: options.tiling_optimization_level.map_or(-1, i32::from),
            timings: options.timings.clone(),
            list_kernels: options.list_kernels,
            profiles: options.profiles.iter().map(ranges).collect(),
        };
        // Between the network's creation and now, this thread may have used another GPU.
        self.device.iter().try_for_each(Device::bind)?;
        match self.pin().build(&options) {
            Ok(inner) => Ok(SerializedPlan { inner }),
            Err(_) if self.inner.cancelled() => Err(Error::Cancelled),
            Err(error) => Err(self.library.refused(&error)),
        }
    }
}

impl Network {
    /// The timings of kernels that the last build used or made, to be given to the next one; empty with TensorRT for RTX,
    /// which selects kernels when a plan first runs, and before a build has succeeded.
    pub fn timings(&self) -> &[u8] {
        self.inner.timings()
    }
}

/// Returns true if TensorRT refused a network because it has no fused kernel for an attention, in the words of either
/// library.
fn lacks_fused_attention(error: &Error) -> bool {
    let words = error.to_string().to_ascii_lowercase();
    words.contains("attention") || words.contains("decompos")
}

impl Network {
    /// Compiles the network; if TensorRT has no fused kernel for its attention, with attention in parts. Returns the
    /// plan and, if attention was taken apart, why.
    ///
    /// # Errors
    /// As [`Network::build`].
    pub fn build_or_decompose(&mut self, options: &BuildOptions) -> Result<(SerializedPlan, Option<String>)> {
        match self.build(options) {
            Ok(plan) => Ok((plan, None)),
            Err(error) if lacks_fused_attention(&error) && self.decompose_attention()? > 0 => {
                Ok((self.build(options)?, Some(error.to_string())))
            }
            Err(error) => Err(error),
        }
    }
}

impl Layers for Network {
    fn scope(&mut self, name: &str) {
        self.pin().scope(name);
    }

    fn input(&mut self, name: &str, dtype: DType, dims: &[i64]) -> Result<NetworkTensor> {
        Network::value(self.pin().input(name, element(dtype), dims))
    }

    fn output(&mut self, tensor: NetworkTensor, name: &str) -> Result<()> {
        self.pin().output(tensor.0, name).map_err(refused)
    }

    fn scalar(&mut self, value: f32, rank: u32) -> Result<NetworkTensor> {
        Network::value(self.pin().constant_f32(value, rank))
    }

    fn integers(&mut self, values: &[i64]) -> Result<NetworkTensor> {
        Network::value(self.pin().constant_i64(values))
    }

    fn constant(&mut self, bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> Result<NetworkTensor> {
        Network::value(self.pin().constant_of(Box::new(bytes), element(dtype), dims))
    }

    fn shape(&mut self, x: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().shape(x.0))
    }

    fn concat(&mut self, parts: &[NetworkTensor]) -> Result<NetworkTensor> {
        let parts: Vec<u32> = parts.iter().map(|part| part.0).collect();
        Network::value(self.pin().concat(&parts))
    }

    fn gather(&mut self, table: NetworkTensor, indices: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().gather(table.0, indices.0))
    }

    fn cast(&mut self, x: NetworkTensor, dtype: DType) -> Result<NetworkTensor> {
        Network::value(self.pin().cast(x.0, element(dtype)))
    }

    fn reshape(&mut self, x: NetworkTensor, dims: &[i64]) -> Result<NetworkTensor> {
        Network::value(self.pin().reshape(x.0, dims))
    }

    fn reshape_to(&mut self, x: NetworkTensor, shape: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().reshape_to(x.0, shape.0))
    }

    fn transpose(&mut self, x: NetworkTensor, order: &[i32]) -> Result<NetworkTensor> {
        Network::value(self.pin().transpose(x.0, order))
    }

    fn slice(&mut self, x: NetworkTensor, start: &[i64], size: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().slice(x.0, start, size.0))
    }

    fn sum(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().sum(x.0, y.0))
    }

    fn product(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().product(x.0, y.0))
    }

    fn relu(&mut self, x: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().relu(x.0))
    }

    fn linear(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().linear(x.0, weight.0))
    }

    fn matmul(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().matmul(x.0, weight.0))
    }

    fn quantize(&mut self, x: NetworkTensor, scale: NetworkTensor, dtype: DType) -> Result<NetworkTensor> {
        Network::value(self.pin().quantize(x.0, scale.0, element(dtype)))
    }

    fn dequantize(
        &mut self,
        codes: NetworkTensor,
        scale: NetworkTensor,
        axis: Option<u8>,
        dtype: DType,
    ) -> Result<NetworkTensor> {
        let axis = axis.map_or(-1, i32::from);
        Network::value(self.pin().dequantize(codes.0, scale.0, axis, element(dtype)))
    }

    fn layer_norm(
        &mut self,
        x: NetworkTensor,
        scale: NetworkTensor,
        bias: NetworkTensor,
        eps: f32,
    ) -> Result<NetworkTensor> {
        Network::value(self.pin().layer_norm(x.0, scale.0, bias.0, eps))
    }

    fn rotary(
        &mut self,
        x: NetworkTensor,
        cos: NetworkTensor,
        sin: NetworkTensor,
        rotary_dims: u32,
    ) -> Result<NetworkTensor> {
        Network::value(self.pin().rotary(x.0, cos.0, sin.0, rotary_dims))
    }

    fn cache_update(
        &mut self,
        cache: NetworkTensor,
        update: NetworkTensor,
        indices: NetworkTensor,
    ) -> Result<NetworkTensor> {
        Network::value(self.pin().cache_update(cache.0, update.0, indices.0))
    }

    fn attention(
        &mut self,
        q: NetworkTensor,
        keys: NetworkTensor,
        values: NetworkTensor,
        mask: AttentionMask,
    ) -> Result<NetworkTensor> {
        Network::value(match mask {
            AttentionMask::Causal => self.pin().attention(q.0, keys.0, values.0),
            AttentionMask::Lengths(lengths) => self.pin().attention_with_lengths(q.0, keys.0, values.0, lengths.0),
            AttentionMask::Explicit(mask) => self.pin().attention_with_mask(q.0, keys.0, values.0, mask.0),
        })
    }

    fn top_k(&mut self, x: NetworkTensor, k: u32) -> Result<(NetworkTensor, NetworkTensor)> {
        let top = self.pin().top_k(x.0, k).map_err(refused)?;
        Ok((NetworkTensor(top.values), NetworkTensor(top.indices)))
    }

    fn last_sums(&mut self, x: NetworkTensor) -> Result<NetworkTensor> {
        Network::value(self.pin().last_sums(x.0))
    }
}

/// A compiled, serialized network (TensorRT's "plan").
pub struct SerializedPlan {
    inner: UniquePtr<bridge::Plan>,
}

impl SerializedPlan {
    /// The bytes to write to a file.
    pub fn bytes(&self) -> &[u8] {
        self.inner.bytes()
    }
}

impl fmt::Debug for SerializedPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SerializedPlan({} bytes)", self.bytes().len())
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
        DType::Bool => Element::Bool,
    }
}
