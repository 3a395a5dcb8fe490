//! A strongly typed network under construction: every value has the type its operands give it.

use std::fmt;
use std::pin::Pin;

use cxx::UniquePtr;

use super::ffi::bridge::{self, Element};
use super::{BuildOptions, ConstantBytes, Layer, Layers, Profile, Range, Tensor};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A network, its layers added one by one through [`Layers`]. What cannot be added is an [`Error::TensorRt`] with
/// TensorRT's own words.
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

impl Layers for Network {
    fn scope(&mut self, name: &str) {
        self.pin().scope(name);
    }

    fn input(&mut self, name: &str, dtype: DType, dims: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().input(name, element(dtype), dims))
    }

    fn output(&mut self, tensor: Tensor, name: &str) -> Result<()> {
        self.pin().output(tensor.0, name).map_err(refused)
    }

    fn scalar(&mut self, value: f32, rank: u32) -> Result<Tensor> {
        Network::value(self.pin().constant_f32(value, rank))
    }

    fn integers(&mut self, values: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().constant_i64(values))
    }

    fn constant(&mut self, bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().constant_of(Box::new(bytes), element(dtype), dims))
    }

    fn shape(&mut self, x: Tensor) -> Result<Tensor> {
        Network::value(self.pin().shape(x.0))
    }

    fn concat(&mut self, parts: &[Tensor]) -> Result<Tensor> {
        let parts: Vec<u32> = parts.iter().map(|part| part.0).collect();
        Network::value(self.pin().concat(&parts))
    }

    fn gather(&mut self, table: Tensor, indices: Tensor) -> Result<Tensor> {
        Network::value(self.pin().gather(table.0, indices.0))
    }

    fn cast(&mut self, x: Tensor, dtype: DType) -> Result<Tensor> {
        Network::value(self.pin().cast(x.0, element(dtype)))
    }

    fn reshape(&mut self, x: Tensor, dims: &[i64]) -> Result<Tensor> {
        Network::value(self.pin().reshape(x.0, dims))
    }

    fn reshape_to(&mut self, x: Tensor, shape: Tensor) -> Result<Tensor> {
        Network::value(self.pin().reshape_to(x.0, shape.0))
    }

    fn transpose(&mut self, x: Tensor, order: &[i32]) -> Result<Tensor> {
        Network::value(self.pin().transpose(x.0, order))
    }

    fn slice(&mut self, x: Tensor, start: &[i64], size: Tensor) -> Result<Tensor> {
        Network::value(self.pin().slice(x.0, start, size.0))
    }

    fn sum(&mut self, x: Tensor, y: Tensor) -> Result<Tensor> {
        Network::value(self.pin().sum(x.0, y.0))
    }

    fn product(&mut self, x: Tensor, y: Tensor) -> Result<Tensor> {
        Network::value(self.pin().product(x.0, y.0))
    }

    fn relu(&mut self, x: Tensor) -> Result<Tensor> {
        Network::value(self.pin().relu(x.0))
    }

    fn linear(&mut self, x: Tensor, weight: Tensor) -> Result<Tensor> {
        Network::value(self.pin().linear(x.0, weight.0))
    }

    fn matmul(&mut self, x: Tensor, weight: Tensor) -> Result<Tensor> {
        Network::value(self.pin().matmul(x.0, weight.0))
    }

    fn quantize(&mut self, x: Tensor, scale: Tensor, dtype: DType) -> Result<Tensor> {
        Network::value(self.pin().quantize(x.0, scale.0, element(dtype)))
    }

    fn dequantize(&mut self, codes: Tensor, scale: Tensor, axis: Option<u8>, dtype: DType) -> Result<Tensor> {
        let axis = axis.map_or(-1, i32::from);
        Network::value(self.pin().dequantize(codes.0, scale.0, axis, element(dtype)))
    }

    fn layer_norm(&mut self, x: Tensor, scale: Tensor, bias: Tensor, eps: f32) -> Result<Tensor> {
        Network::value(self.pin().layer_norm(x.0, scale.0, bias.0, eps))
    }

    fn rotary(&mut self, x: Tensor, cos: Tensor, sin: Tensor, rotary_dims: u32) -> Result<Tensor> {
        Network::value(self.pin().rotary(x.0, cos.0, sin.0, rotary_dims))
    }

    fn cache_update(&mut self, cache: Tensor, update: Tensor, indices: Tensor) -> Result<Tensor> {
        Network::value(self.pin().cache_update(cache.0, update.0, indices.0))
    }

    fn attention(&mut self, q: Tensor, keys: Tensor, values: Tensor, lengths: Option<Tensor>) -> Result<Tensor> {
        Network::value(match lengths {
            Some(lengths) => self.pin().attention_with_lengths(q.0, keys.0, values.0, lengths.0),
            None => self.pin().attention(q.0, keys.0, values.0),
        })
    }

    fn top_k(&mut self, x: Tensor, k: u32) -> Result<(Tensor, Tensor)> {
        let top = self.pin().top_k(x.0, k).map_err(refused)?;
        Ok((Tensor(top.values), Tensor(top.indices)))
    }
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
