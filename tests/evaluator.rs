//! An evaluator of networks: it implements the layers TensorRT offers and computes each as it is added, following
//! TensorRT's documentation. It is as strict as a strongly typed network: there are no implicit casts, and only
//! dimensions of 1 broadcast. Where the documentation leaves a choice (docs/tensorrt.md, "Known limits"), it makes the
//! choice the lowering assumes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use aotron::Error;
use aotron::backend::tensorrt::{AttentionMask, ConstantBytes, Layers, NetworkTensor};
use aotron::quantize::{f8_value, round_f8, round_i8};
use aotron::tensor::DType;
use half::{bf16, f16};

type Result<T> = aotron::Result<T>;

/// Element type of a network tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    Stored(DType),
    /// Sizes, for shape tensors.
    I64,
}

impl Element {
    fn is_float(self) -> bool {
        matches!(self, Element::Stored(dtype) if dtype.is_float())
    }

    fn is_index(self) -> bool {
        matches!(self, Element::I64 | Element::Stored(DType::I32))
    }

    fn round(self, value: f32) -> f32 {
        match self {
            Element::Stored(DType::BF16) => bf16::from_f32(value).to_f32(),
            Element::Stored(DType::F16) => f16::from_f32(value).to_f32(),
            Element::Stored(DType::F8) => round_f8(value),
            Element::Stored(DType::F32 | DType::I32 | DType::I8 | DType::I4 | DType::Bool) | Element::I64 => value,
        }
    }
}

/// A network tensor. Elements of every type are stored as FP32, which represents them exactly: indices and sizes are
/// below 2²⁴.
#[derive(Debug, Clone)]
pub struct Array {
    pub element: Element,
    pub dims: Vec<usize>,
    pub values: Arc<[f32]>, // row-major
}

impl Array {
    /// An array of values that are already representable in the type.
    fn of(element: Element, dims: &[usize], values: impl IntoIterator<Item = f32>) -> Array {
        let values: Arc<[f32]> = values.into_iter().collect();
        assert_eq!(values.len(), dims.iter().product::<usize>(), "{dims:?}");
        Array { element, dims: dims.to_vec(), values }
    }

    /// An array of values rounded to the type.
    pub fn new(dtype: DType, dims: &[usize], values: impl IntoIterator<Item = f32>) -> Array {
        let element = Element::Stored(dtype);
        Array::of(element, dims, values.into_iter().map(|value| element.round(value)))
    }

    /// Decodes little-endian, row-major bytes; two I4 per byte, the first in the low half. `None` if the length is
    /// wrong.
    pub fn of_bytes(dtype: DType, dims: &[usize], bytes: &[u8]) -> Option<Array> {
        let values: Vec<f32> = match dtype {
            DType::F32 => bytes.as_chunks().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect(),
            DType::F16 => bytes.as_chunks().0.iter().map(|raw| f16::from_le_bytes(*raw).to_f32()).collect(),
            DType::BF16 => bytes.as_chunks().0.iter().map(|raw| bf16::from_le_bytes(*raw).to_f32()).collect(),
            DType::I32 => bytes.as_chunks().0.iter().map(|raw| i32::from_le_bytes(*raw) as f32).collect(),
            DType::I8 => bytes.iter().map(|byte| f32::from(*byte as i8)).collect(),
            DType::Bool => bytes.iter().map(|byte| f32::from(*byte)).collect(),
            DType::I4 => {
                bytes.iter().flat_map(|byte| [byte << 4, *byte]).map(|half| f32::from(half as i8 >> 4)).collect()
            }
            DType::F8 => bytes.iter().map(|byte| f8_value(*byte)).collect(),
        };
        let bits = if dtype == DType::I4 { 4 } else { 8 * dtype.bytes() };
        let whole = values.len() == dims.iter().product::<usize>() && bytes.len() * 8 == values.len() * bits;
        whole.then(|| Array::new(dtype, dims, values))
    }

    fn rank(&self) -> usize {
        self.dims.len()
    }

    /// The elements as sizes, indices or positions.
    fn sizes(&self) -> Vec<usize> {
        self.values.iter().map(|value| *value as usize).collect()
    }

    /// Row-major strides, in elements.
    fn strides(&self) -> Vec<usize> {
        (0..self.rank()).map(|dim| self.dims[dim + 1..].iter().product()).collect()
    }

    /// A strided view from `start`, copied to an array of shape `dims`.
    fn strided(&self, start: usize, dims: &[usize], strides: &[usize]) -> Array {
        let total = dims.iter().product::<usize>();
        let value = |index: usize| {
            let (mut rest, mut at) = (index, start);
            for (size, stride) in dims.iter().zip(strides).rev() {
                at += rest % size * stride;
                rest /= size;
            }
            self.values[at]
        };
        Array::of(self.element, dims, (0..total).map(value))
    }

    fn row(&self, index: usize, width: usize) -> &[f32] {
        &self.values[index * width..][..width]
    }
}

/// Values that are rounded to their type in the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// The values that CPU plans round: results of casts, except that queries are read unrounded. With the same
    /// rounding, a remaining difference means a wrong layer.
    AsCpu,
    /// Every layer's result, and the probabilities inside attention, which a fused kernel multiplies in that type.
    Results,
    /// Attention scores as well, as if separate layers computed them: the documentation does not say.
    Scores,
}

/// A network under evaluation, and the inputs of a step.
pub struct Evaluator<'w> {
    inputs: HashMap<String, Array>,
    /// With `None`, missing inputs are ones (zeros for indices) of the smallest shape, which serves to discover a
    /// network's inputs.
    weights: Option<&'w HashMap<String, Array>>,
    rounding: Rounding,
    scope: String,
    arrays: Vec<Array>,
    /// Names in use.
    named: HashSet<String>,
    /// Tensors that are inputs.
    given: HashSet<NetworkTensor>,
    /// Caches after an update.
    updated: HashSet<NetworkTensor>,
    /// Operand of each cast, by result.
    casts: HashMap<NetworkTensor, NetworkTensor>,
    outputs: Vec<(String, NetworkTensor)>,
}

impl<'w> Evaluator<'w> {
    pub fn new(
        inputs: HashMap<String, Array>,
        weights: &'w HashMap<String, Array>,
        rounding: Rounding,
    ) -> Evaluator<'w> {
        Evaluator { weights: Some(weights), rounding, ..Evaluator::blank(inputs) }
    }

    /// An evaluator without weights.
    pub fn blank(inputs: HashMap<String, Array>) -> Evaluator<'w> {
        Evaluator {
            inputs,
            weights: None,
            rounding: Rounding::Results,
            scope: String::new(),
            arrays: Vec::new(),
            named: HashSet::new(),
            given: HashSet::new(),
            updated: HashSet::new(),
            casts: HashMap::new(),
            outputs: Vec::new(),
        }
    }

    /// The outputs, by name.
    pub fn finish(self) -> HashMap<String, Array> {
        let is_output = |tensor: &NetworkTensor| self.outputs.iter().any(|(_, output)| output == tensor);
        assert!(self.updated.iter().all(is_output), "a cache that is updated is an output");
        assert!(self.inputs.keys().all(|name| self.named.contains(name)), "the network does not take all it is given");
        self.outputs.iter().map(|(name, tensor)| (name.clone(), self.arrays[tensor.0 as usize].clone())).collect()
    }

    fn keep(&mut self, array: Array) -> Result<NetworkTensor> {
        self.arrays.push(array);
        Ok(NetworkTensor(self.arrays.len() as u32 - 1))
    }

    fn at(&self, tensor: NetworkTensor) -> Array {
        self.arrays[tensor.0 as usize].clone()
    }

    fn check(&self, holds: bool, what: &str, of: &[&Array]) -> Result<()> {
        if holds {
            return Ok(());
        }
        let of: Vec<String> = of.iter().map(|array| format!("{:?}{:?}", array.element, array.dims)).collect();
        Err(Error::TensorRt(format!("{}: {what}: {}", self.scope, of.join(", "))))
    }

    /// Stores the result of a layer.
    fn result(
        &mut self,
        element: Element,
        dims: &[usize],
        values: impl IntoIterator<Item = f32>,
    ) -> Result<NetworkTensor> {
        let rounds = self.rounding != Rounding::AsCpu;
        let values = values.into_iter().map(|value| if rounds { element.round(value) } else { value });
        self.keep(Array::of(element, dims, values))
    }

    fn name(&mut self, name: &str, array: &Array) -> Result<()> {
        let is_new = self.named.insert(name.into());
        self.check(is_new, &format!("{name} is there twice"), &[array])
    }

    fn elementwise(&mut self, x: NetworkTensor, y: NetworkTensor, op: fn(f32, f32) -> f32) -> Result<NetworkTensor> {
        let (x, y) = (self.at(x), self.at(y));
        let same = x.element.is_float() && x.element == y.element && x.rank() == y.rank();
        self.check(same, "operands are of one type and as many dimensions", &[&x, &y])?;
        let fits = x.dims.iter().zip(&y.dims).all(|(a, b)| a == b || *a == 1 || *b == 1);
        self.check(fits, "only dimensions of 1 are repeated", &[&x, &y])?;
        let dims: Vec<usize> = x.dims.iter().zip(&y.dims).map(|(a, b)| *a.max(b)).collect();
        let repeated = |array: &Array| -> Array {
            let strides =
                array.strides().into_iter().zip(&array.dims).map(|(stride, n)| if *n == 1 { 0 } else { stride });
            array.strided(0, &dims, &strides.collect::<Vec<_>>())
        };
        let (left, right) = (repeated(&x), repeated(&y));
        let values = left.values.iter().zip(&*right.values).map(|(a, b)| op(*a, *b));
        self.result(x.element, &dims, values)
    }

    fn reshaped(&mut self, x: NetworkTensor, dims: &[i64]) -> Result<NetworkTensor> {
        let x = self.at(x);
        let known: usize = dims.iter().filter(|n| **n > 0).map(|n| *n as usize).product();
        let plain = dims.iter().all(|n| *n > 0 || *n == -1) && dims.iter().filter(|n| **n == -1).count() <= 1;
        self.check(plain && known > 0, &format!("not a shape: {dims:?}"), &[&x])?;
        let left = x.values.len() / known;
        let dims: Vec<usize> = dims.iter().map(|n| if *n == -1 { left } else { *n as usize }).collect();
        let whole = dims.iter().product::<usize>() == x.values.len();
        self.check(whole, &format!("not as many elements as {dims:?}"), &[&x])?;
        self.keep(Array { dims, ..x })
    }

    /// GEMM of `x [n, in]` and an `[in, out]` matrix whose element `(i, o)` is element `o · across + i · along` of
    /// `weight`.
    fn multiply(
        &mut self,
        x: &Array,
        weight: &Array,
        out: usize,
        [across, along]: [usize; 2],
    ) -> Result<NetworkTensor> {
        let same = x.element.is_float() && x.element == weight.element;
        self.check(same, "the operands of a GEMM have the same type", &[x, weight])?;
        let (rows, width) = (x.dims[0], x.dims[1]);
        let mut values = vec![0f32; rows * out];
        for (row, values) in values.chunks_exact_mut(out).enumerate() {
            let x = x.row(row, width);
            let mut sums = vec![0f64; out];
            for (o, sum) in sums.iter_mut().enumerate() {
                let column = weight.values[o * across..].iter().step_by(along);
                *sum = x.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            }
            values.iter_mut().zip(sums).for_each(|(value, sum)| *value = sum as f32);
        }
        self.result(x.element, &[rows, out], values)
    }
}

impl Layers for Evaluator<'_> {
    fn scope(&mut self, name: &str) {
        self.scope = name.into();
    }

    fn input(&mut self, name: &str, dtype: DType, dims: &[i64]) -> Result<NetworkTensor> {
        let given = self.inputs.get(name).or_else(|| self.weights?.get(name)).cloned();
        let given = match (given, self.weights) {
            (Some(given), _) => given,
            (None, None) => {
                let dims: Vec<usize> = dims.iter().map(|n| usize::try_from(*n).unwrap_or(1)).collect();
                let value = if dtype == DType::I32 { 0.0 } else { 1.0 };
                Array::new(dtype, &dims, vec![value; dims.iter().product()])
            }
            (None, Some(_)) => return Err(Error::TensorRt(format!("{}: there is no input {name}", self.scope))),
        };
        self.name(name, &given)?;
        let fits =
            given.rank() == dims.len() && given.dims.iter().zip(dims).all(|(n, dim)| *dim == -1 || *n as i64 == *dim);
        let what = format!("{name} is declared as {dtype}{dims:?} and given as");
        self.check(fits && given.element == Element::Stored(dtype), &what, &[&given])?;
        let tensor = self.keep(given)?;
        self.given.insert(tensor);
        Ok(tensor)
    }

    fn output(&mut self, tensor: NetworkTensor, name: &str) -> Result<()> {
        let array = self.at(tensor);
        self.name(name, &array)?;
        self.outputs.push((name.into(), tensor));
        Ok(())
    }

    fn scalar(&mut self, value: f32, rank: u32) -> Result<NetworkTensor> {
        self.keep(Array::new(DType::F32, &vec![1; rank as usize], [value]))
    }

    fn integers(&mut self, values: &[i64]) -> Result<NetworkTensor> {
        self.keep(Array::of(Element::I64, &[values.len()], values.iter().map(|n| *n as f32)))
    }

    fn constant(&mut self, bytes: ConstantBytes, dtype: DType, dims: &[i64]) -> Result<NetworkTensor> {
        let dims: Vec<usize> = dims.iter().map(|n| *n as usize).collect();
        let bytes = bytes.as_slice();
        let refuse = || Error::TensorRt(format!("{}: {} bytes are no {dtype}{dims:?}", self.scope, bytes.len()));
        let array = Array::of_bytes(dtype, &dims, bytes).ok_or_else(refuse)?;
        self.keep(array)
    }

    fn shape(&mut self, x: NetworkTensor) -> Result<NetworkTensor> {
        let dims = self.at(x).dims;
        self.keep(Array::of(Element::I64, &[dims.len()], dims.iter().map(|n| *n as f32)))
    }

    fn concat(&mut self, parts: &[NetworkTensor]) -> Result<NetworkTensor> {
        let parts: Vec<Array> = parts.iter().map(|part| self.at(*part)).collect();
        let all: Vec<&Array> = parts.iter().collect();
        let (element, rest) = (parts[0].element, parts[0].dims[1..].to_vec());
        let fits = parts.iter().all(|part| part.element == element && part.dims[1..] == rest);
        self.check(fits, "parts are of one type and differ in the first dimension only", &all)?;
        let dims: Vec<usize> = [parts.iter().map(|part| part.dims[0]).sum()].into_iter().chain(rest).collect();
        self.keep(Array::of(element, &dims, parts.iter().flat_map(|part| part.values.iter().copied())))
    }

    fn gather(&mut self, table: NetworkTensor, indices: NetworkTensor) -> Result<NetworkTensor> {
        let (table, indices) = (self.at(table), self.at(indices));
        self.check(indices.element.is_index(), "indices are integers", &[&table, &indices])?;
        let fits = indices.values.iter().all(|index| *index >= 0.0 && (*index as usize) < table.dims[0]);
        self.check(fits, &format!("indices are in the table: {:?}", indices.values), &[&table, &indices])?;
        let width: usize = table.dims[1..].iter().product();
        let dims: Vec<usize> = indices.dims.iter().chain(&table.dims[1..]).copied().collect();
        let values = indices.sizes().into_iter().flat_map(|row| table.row(row, width).iter().copied());
        self.keep(Array::of(table.element, &dims, values))
    }

    fn cast(&mut self, of: NetworkTensor, dtype: DType) -> Result<NetworkTensor> {
        let x = self.at(of);
        self.check(x.element.is_float() && dtype.is_float(), &format!("not cast to {dtype}"), &[&x])?;
        let cast = self.keep(Array::new(dtype, &x.dims, x.values.iter().copied()))?;
        self.casts.insert(cast, of);
        Ok(cast)
    }

    fn reshape(&mut self, x: NetworkTensor, dims: &[i64]) -> Result<NetworkTensor> {
        self.reshaped(x, dims)
    }

    fn reshape_to(&mut self, x: NetworkTensor, shape: NetworkTensor) -> Result<NetworkTensor> {
        let shape = self.at(shape);
        self.check(shape.element.is_index() && shape.rank() == 1, "a shape is a vector of integers", &[&shape])?;
        let dims: Vec<i64> = shape.values.iter().map(|n| *n as i64).collect();
        self.reshaped(x, &dims)
    }

    fn transpose(&mut self, x: NetworkTensor, order: &[i32]) -> Result<NetworkTensor> {
        let x = self.at(x);
        let order: Vec<usize> = order.iter().map(|dim| *dim as usize).collect();
        let distinct: HashSet<usize> = order.iter().copied().collect();
        let is_order = order.len() == x.rank() && distinct.len() == x.rank() && order.iter().all(|dim| *dim < x.rank());
        self.check(is_order, &format!("not an order of dimensions: {order:?}"), &[&x])?;
        let strides = x.strides();
        let pick = |from: &[usize]| order.iter().map(|dim| from[*dim]).collect::<Vec<usize>>();
        self.keep(x.strided(0, &pick(&x.dims), &pick(&strides)))
    }

    fn slice(&mut self, x: NetworkTensor, start: &[i64], size: NetworkTensor) -> Result<NetworkTensor> {
        let (x, size) = (self.at(x), self.at(size));
        self.check(size.element.is_index() && size.dims == [x.rank()], "a size for each dimension", &[&x, &size])?;
        let (start, size): (Vec<usize>, _) = (start.iter().map(|n| *n as usize).collect(), size.sizes());
        let fits = start.len() == x.rank() && (0..x.rank()).all(|dim| start[dim] + size[dim] <= x.dims[dim]);
        self.check(fits, &format!("{size:?} from {start:?} on are not in it"), &[&x])?;
        let strides = x.strides();
        let first = start.iter().zip(&strides).map(|(start, stride)| start * stride).sum();
        self.keep(x.strided(first, &size, &strides))
    }

    fn sum(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor> {
        self.elementwise(x, y, |x, y| x + y)
    }

    fn product(&mut self, x: NetworkTensor, y: NetworkTensor) -> Result<NetworkTensor> {
        self.elementwise(x, y, |x, y| x * y)
    }

    fn relu(&mut self, x: NetworkTensor) -> Result<NetworkTensor> {
        let x = self.at(x);
        self.check(x.element.is_float(), "not a float", &[&x])?;
        // Unlike `max`, propagates NaN.
        let values = x.values.iter().map(|value| if *value < 0.0 { 0.0 } else { *value });
        self.result(x.element, &x.dims, values)
    }

    fn linear(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor> {
        let (x, weight) = (self.at(x), self.at(weight));
        let fits = x.rank() == 2 && weight.rank() == 2 && x.dims[1] == weight.dims[1];
        self.check(fits, "not [n, in] and [out, in]", &[&x, &weight])?;
        let (out, width) = (weight.dims[0], weight.dims[1]);
        self.multiply(&x, &weight, out, [width, 1])
    }

    fn matmul(&mut self, x: NetworkTensor, weight: NetworkTensor) -> Result<NetworkTensor> {
        let (x, weight) = (self.at(x), self.at(weight));
        let fits = x.rank() == 2 && weight.rank() == 2 && x.dims[1] == weight.dims[0];
        self.check(fits, "not [n, in] and [in, out]", &[&x, &weight])?;
        let out = weight.dims[1];
        self.multiply(&x, &weight, out, [1, out])
    }

    fn quantize(&mut self, x: NetworkTensor, scale: NetworkTensor, dtype: DType) -> Result<NetworkTensor> {
        let (x, scale) = (self.at(x), self.at(scale));
        let typed = x.element.is_float() && [Element::Stored(DType::F32), x.element].contains(&scale.element);
        self.check(
            typed && [DType::F8, DType::I8].contains(&dtype),
            &format!("not quantized to {dtype}"),
            &[&x, &scale],
        )?;
        let fits = x.rank() > 0 && scale.rank() == 0 && scale.values[0] > 0.0;
        self.check(fits, "the scale of an activation is one positive number", &[&x, &scale])?;
        let values = x.values.iter().map(|value| value / scale.values[0]);
        let values = values.map(|value| if dtype == DType::I8 { round_i8(value) } else { value });
        self.keep(Array::new(dtype, &x.dims, values))
    }

    fn dequantize(
        &mut self,
        codes: NetworkTensor,
        scale: NetworkTensor,
        axis: Option<u8>,
        dtype: DType,
    ) -> Result<NetworkTensor> {
        let (codes, scale) = (self.at(codes), self.at(scale));
        let Element::Stored(code) = codes.element else {
            return Err(Error::TensorRt(format!("{}: sizes are no codes", self.scope)));
        };
        let typed =
            code.is_code() && dtype.is_float() && [DType::F32, dtype].map(Element::Stored).contains(&scale.element);
        self.check(typed, &format!("not dequantized to {dtype}"), &[&codes, &scale])?;
        self.check(scale.values.iter().all(|scale| *scale > 0.0), "scales are positive", &[&codes, &scale])?;
        // Index of an element's scale.
        let mut dims = vec![1; codes.rank()];
        match (scale.rank(), axis) {
            (0, None) => {}
            (1, Some(axis)) => {
                let axis = usize::from(axis);
                let fits = axis < codes.rank() && scale.dims[0] == codes.dims[axis];
                self.check(fits, "there is a scale for each index of the axis", &[&codes, &scale])?;
                dims[axis] = scale.dims[0];
            }
            (rank, None) if rank == codes.rank() && rank >= 2 => {
                let shorter: Vec<usize> = (0..rank).filter(|dim| scale.dims[*dim] != codes.dims[*dim]).collect();
                let blocked = matches!(shorter[..], [dim] if dim + 2 >= rank && codes.dims[dim] % scale.dims[dim] == 0);
                let fits = blocked && code != DType::I8;
                self.check(fits, "blocks of one size divide one of the last two dimensions", &[&codes, &scale])?;
                dims.clone_from(&scale.dims);
            }
            _ => self.check(false, &format!("scales for axis {axis:?}"), &[&codes, &scale])?,
        }
        let scale = Array { dims, ..scale };
        let (strides, steps) = (codes.strides(), scale.strides());
        let scale_of = |index: usize| {
            let at = |dim: usize| {
                let block = codes.dims[dim] / scale.dims[dim];
                index / strides[dim] % codes.dims[dim] / block * steps[dim]
            };
            scale.values[(0..codes.rank()).map(at).sum::<usize>()]
        };
        let values = codes.values.iter().enumerate().map(|(index, code)| code * scale_of(index));
        self.result(Element::Stored(dtype), &codes.dims, values)
    }

    fn layer_norm(
        &mut self,
        x: NetworkTensor,
        scale: NetworkTensor,
        bias: NetworkTensor,
        eps: f32,
    ) -> Result<NetworkTensor> {
        let (x, scale, bias) = (self.at(x), self.at(scale), self.at(bias));
        let typed = x.element.is_float() && scale.element == x.element && bias.element == x.element;
        self.check(typed, "operands are of one type", &[&x, &scale, &bias])?;
        let fits = x.rank() == 2 && scale.dims == [1, x.dims[1]] && bias.dims == scale.dims;
        self.check(fits, "not [n, width], [1, width] and [1, width]", &[&x, &scale, &bias])?;
        let width = x.dims[1];
        let mut values = Vec::with_capacity(x.values.len());
        for row in x.values.chunks_exact(width) {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / width as f64;
            let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / width as f64;
            let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
            values.extend(row.iter().zip(scale.values.iter().zip(&*bias.values)).map(|(v, (scale, bias))| {
                ((f64::from(*v) - mean) * inverse * f64::from(*scale) + f64::from(*bias)) as f32
            }));
        }
        self.result(x.element, &x.dims, values)
    }

    /// Not interleaved: dimension `j` of the first half of the rotated dimensions is paired with dimension `j` of the
    /// second.
    fn rotary(
        &mut self,
        x: NetworkTensor,
        cos: NetworkTensor,
        sin: NetworkTensor,
        rotary_dims: u32,
    ) -> Result<NetworkTensor> {
        let (x, cos, sin) = (self.at(x), self.at(cos), self.at(sin));
        let typed = x.element.is_float() && cos.element == x.element && sin.element == x.element;
        self.check(typed, "operands are of one type", &[&x, &cos, &sin])?;
        let half = rotary_dims as usize / 2;
        let fits = x.rank() == 4
            && rotary_dims > 0
            && rotary_dims.is_multiple_of(2)
            && 2 * half <= x.dims[3]
            && cos.dims == [x.dims[0], x.dims[2], half]
            && sin.dims == cos.dims;
        self.check(fits, "not [B, heads, T, head_dim] and [B, T, rotary_dims / 2]", &[&x, &cos, &sin])?;
        let (heads, tokens, head_dim) = (x.dims[1], x.dims[2], x.dims[3]);
        let mut values = x.values.to_vec();
        for (row, head) in values.chunks_exact_mut(head_dim).enumerate() {
            let token = row / (heads * tokens) * tokens + row % tokens;
            for j in 0..half {
                let (cos, sin) = (cos.values[token * half + j], sin.values[token * half + j]);
                let (a, b) = (head[j], head[j + half]);
                (head[j], head[j + half]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
        self.result(x.element, &x.dims, values)
    }

    fn cache_update(
        &mut self,
        cache: NetworkTensor,
        update: NetworkTensor,
        indices: NetworkTensor,
    ) -> Result<NetworkTensor> {
        let is_input = self.given.contains(&cache);
        let (cache, update, indices) = (self.at(cache), self.at(update), self.at(indices));
        self.check(is_input, "a cache is an input", &[&cache])?;
        let typed = cache.element.is_float() && update.element == cache.element && indices.element.is_index();
        self.check(typed, "a cache and its update are of one type", &[&cache, &update, &indices])?;
        let fits = cache.rank() == 4
            && update.rank() == 4
            && [0, 1, 3].iter().all(|dim| cache.dims[*dim] == update.dims[*dim])
            && indices.dims == [cache.dims[0]];
        self.check(fits, "not [B, heads, S, head_dim], [B, heads, T, head_dim] and [B]", &[&cache, &update, &indices])?;
        let (heads, positions, tokens, width) = (cache.dims[1], cache.dims[2], update.dims[2], cache.dims[3]);
        let inside = indices.values.iter().all(|index| *index >= 0.0 && *index as usize + tokens <= positions);
        self.check(inside, &format!("updates are in the cache: {:?}", indices.values), &[&cache, &update])?;
        let mut values = cache.values.to_vec();
        for (b, first) in indices.sizes().into_iter().enumerate() {
            for head in b * heads..(b + 1) * heads {
                let into = (head * positions + first) * width;
                values[into..][..tokens * width].copy_from_slice(update.row(head, tokens * width));
            }
        }
        let updated = self.keep(Array { values: values.into(), ..cache })?;
        self.updated.insert(updated);
        Ok(updated)
    }

    /// A causal mask is aligned to the lower right: the last query attends to all keys of its sequence, each query before
    /// it to one fewer. What is masked has no influence, even if it is NaN.
    fn attention(
        &mut self,
        q: NetworkTensor,
        keys: NetworkTensor,
        values: NetworkTensor,
        mask: AttentionMask,
    ) -> Result<NetworkTensor> {
        let unrounded = self.casts.get(&q).filter(|_| self.rounding == Rounding::AsCpu).map(|before| self.at(*before));
        let (q, keys, values) = (self.at(q), self.at(keys), self.at(values));
        let typed = q.element.is_float() && keys.element == q.element && values.element == q.element;
        self.check(typed, "queries, keys and values are of one type", &[&q, &keys, &values])?;
        let fits = q.rank() == 4
            && keys.rank() == 4
            && keys.dims == values.dims
            && [0, 3].iter().all(|dim| q.dims[*dim] == keys.dims[*dim])
            && q.dims[1].is_multiple_of(keys.dims[1]);
        self.check(fits, "not [B, heads, T, head_dim] and [B, kv_heads, S, head_dim]", &[&q, &keys, &values])?;
        let [sequences, heads, tokens, width] = q.dims[..] else { return Err(Error::TensorRt("rank".into())) };
        let (kv_heads, positions) = (keys.dims[1], keys.dims[2]);
        let causal = |lengths: Vec<usize>| -> Vec<Vec<usize>> {
            let of = |sequence: usize, token: usize| (0..token + lengths[sequence] - tokens + 1).collect();
            (0..sequences)
                .flat_map(|sequence| (0..tokens).map(move |token| (sequence, token)))
                .map(|(s, t)| of(s, t))
                .collect()
        };
        // The keys of each query, `[sequences, tokens]`.
        let seen: Vec<Vec<usize>> = match mask {
            AttentionMask::Explicit(mask) => {
                let mask = self.at(mask);
                let typed =
                    mask.element == Element::Stored(DType::Bool) && mask.dims == [sequences, 1, tokens, positions];
                self.check(typed, "a truth value for each query and key", &[&q, &mask])?;
                let keys = |row: &[f32]| (0..positions).filter(|key| row[*key] == 1.0).collect();
                mask.values.chunks_exact(positions).map(keys).collect()
            }
            AttentionMask::Lengths(lengths) => {
                let lengths = self.at(lengths);
                let typed = lengths.element == Element::Stored(DType::I32) && lengths.dims == [sequences];
                self.check(typed, "a length for each sequence", &[&q, &lengths])?;
                let inside = lengths.sizes().iter().all(|length| (tokens..=positions).contains(length));
                self.check(inside, "lengths hold the queries and are in the cache", &[&lengths, &keys])?;
                causal(lengths.sizes())
            }
            AttentionMask::Causal => {
                self.check(tokens <= positions, "there is a key for each query", &[&q, &keys])?;
                causal(vec![positions; sequences])
            }
        };
        self.check(seen.iter().all(|keys| !keys.is_empty()), "every query attends to a key", &[&q, &keys])?;
        let rounds = self.rounding != Rounding::AsCpu;
        let mut mixed = Vec::with_capacity(q.values.len());
        for (row, query) in unrounded.as_ref().unwrap_or(&q).values.chunks_exact(width).enumerate() {
            let (sequence, head, token) = (row / (heads * tokens), row / tokens % heads, row % tokens);
            let seen = &seen[sequence * tokens + token];
            let first = (sequence * kv_heads + head / (heads / kv_heads)) * positions;
            let mut scores: Vec<f64> = seen
                .iter()
                .map(|key| {
                    query.iter().zip(keys.row(first + key, width)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                })
                .collect();
            if self.rounding == Rounding::Scores {
                scores.iter_mut().for_each(|score| *score = q.element.round(*score as f32).into());
            }
            let largest = scores.iter().fold(f64::MIN, |most, score| most.max(*score));
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sums = vec![0f64; width];
            for (position, weight) in seen.iter().zip(weights) {
                let weight = (weight / total) as f32;
                let weight = f64::from(if rounds { values.element.round(weight) } else { weight });
                let value = values.row(first + position, width);
                sums.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight * f64::from(*value));
            }
            mixed.extend(sums.into_iter().map(|sum| sum as f32));
        }
        self.result(q.element, &q.dims, mixed)
    }

    fn top_k(&mut self, x: NetworkTensor, k: u32) -> Result<(NetworkTensor, NetworkTensor)> {
        let (x, k) = (self.at(x), k as usize);
        let fits = x.element.is_float() && x.rank() == 2 && (1..=x.dims[1]).contains(&k);
        self.check(fits, &format!("not the {k} largest of each row"), &[&x])?;
        let (mut largest, mut columns) = (Vec::new(), Vec::new());
        for row in x.values.chunks_exact(x.dims[1]) {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            largest.extend(order[..k].iter().map(|column| row[*column]));
            columns.extend(order[..k].iter().map(|column| *column as f32));
        }
        let dims = [x.dims[0], k];
        Ok((self.keep(Array::of(x.element, &dims, largest))?, self.keep(Array::new(DType::I32, &dims, columns))?))
    }

    fn last_sums(&mut self, x: NetworkTensor) -> Result<NetworkTensor> {
        let x = self.at(x);
        self.check(x.element == Element::Stored(DType::F32) && x.rank() > 0, "nothing to sum", &[&x])?;
        let (width, dims) = x.dims.split_last().expect("a last dimension");
        let sums: Vec<f32> = x.values.chunks_exact(*width).map(|row| row.iter().sum()).collect();
        self.keep(Array::new(DType::F32, dims, sums))
    }
}
