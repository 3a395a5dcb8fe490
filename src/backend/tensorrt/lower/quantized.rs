//! Linear layers with quantized weights, and constants of the plan.

use super::super::{ConstantBytes, Layers, NetworkTensor};
use super::{Constants, LoweredValue, NetworkLowering, PlanWeight, WeightLayout, fail, plain_form, size};
use crate::engine::tensorrt::Fp8Weights;
use crate::error::{Error, Result};
use crate::graph::{Node, Op, Value};
use crate::tensor::DType;

/// Element type that codes are dequantized to, and that their GEMM computes in.
pub(super) const QUANTIZED_PRODUCTS: DType = DType::BF16;

impl<N: Layers> NetworkLowering<'_, N> {
    /// Dequantizes the weight right before the GEMM, which TensorRT fuses into one kernel.
    ///
    /// E4M3 codes as constants are `[out, in]`, multiplied as a transpose: the only layout of FP8 that Hopper's tensor
    /// cores read. TensorRT documents scales per output channel for constants only.
    pub(super) fn quantized_linear(
        &mut self,
        node: &Node,
        block: Option<usize>,
        [x, codes, scales]: [Value; 3],
    ) -> Result<NetworkTensor> {
        let graph = self.graph;
        let (codes, scales) = (graph.node(codes), graph.node(scales));
        let (Op::Const(codes_expr), Op::Const(scales_expr)) = (&codes.op, &scales.op) else {
            return Err(fail(node, "its codes and scales are not constants"));
        };
        let &[rows, columns] = &codes.ty.shape[..] else {
            return Err(fail(node, "its codes are not a matrix"));
        };
        let (Some(rows), Some(columns)) = (rows.as_fixed(), columns.as_fixed()) else {
            return Err(fail(node, "the sizes of its codes must be known"));
        };
        let from = graph.node(x).ty.dtype;
        let x = match self.place(x) {
            LoweredValue::Codes { codes, scale } => self.network.dequantize(codes, scale, None, QUANTIZED_PRODUCTS)?,
            _ => {
                let x = self.plain(x)?;
                self.typed(x, from, QUANTIZED_PRODUCTS)?
            }
        };
        let codes_content = plain_form(codes, codes_expr, &codes.ty)?;
        let scales_content = plain_form(scales, scales_expr, &scales.ty)?;
        let codes = PlanWeight::rows(&codes.name, codes.ty.dtype, vec![columns, rows], codes_content);
        let codes = PlanWeight { layout: WeightLayout::Transposed, ..codes };
        let scales = PlanWeight::rows(&scales.name, scales.ty.dtype, vec![rows], scales_content);
        let are_constants = codes.dtype == DType::F8 && self.options.fp8_weights == Fp8Weights::Constants;
        let product = if let Some(block) = block {
            let unit = common_divisor(block, columns);
            let codes = self.weight(PlanWeight { in_plan: true, ..codes })?;
            // TensorRT accepts only BF16 scales here, so quantize.rs chooses scales that BF16 represents exactly.
            let (shape, layout) = (vec![columns / unit, rows], WeightLayout::Spread { block, unit });
            let scales = PlanWeight { dtype: QUANTIZED_PRODUCTS, shape, layout, in_plan: true, ..scales };
            let scales = self.weight(scales)?;
            let weight = self.network.dequantize(codes, scales, None, QUANTIZED_PRODUCTS)?;
            self.network.matmul(x, weight)?
        } else if are_constants {
            let codes = self.weight(PlanWeight { in_plan: true, ..codes })?;
            let scales = self.weight(PlanWeight { in_plan: true, ..scales })?;
            let weight = self.network.dequantize(codes, scales, Some(0), QUANTIZED_PRODUCTS)?;
            self.network.linear(x, weight)?
        } else {
            let (codes, scales) = (self.weight(codes)?, self.weight(scales)?);
            let weight = self.network.dequantize(codes, scales, Some(1), QUANTIZED_PRODUCTS)?;
            self.network.matmul(x, weight)?
        };
        self.typed(product, QUANTIZED_PRODUCTS, node.ty.dtype)
    }

    /// Columns of the result of a layer whose E4M3 codes are constants, to be split into heads before they are sliced.
    /// Sliced first, TensorRT for RTX 1.7 makes three GEMMs of the layer, for which it dequantizes the weights in every step.
    pub(super) fn columns_of_constants(&self, x: Value, start: usize, width: usize) -> Result<Option<LoweredValue>> {
        let node = self.graph.node(x);
        let codes = node.operands.get(1).map(|codes| self.graph.node(*codes).ty.dtype);
        let are_constants = codes == Some(DType::F8) && self.options.fp8_weights == Fp8Weights::Constants;
        if !matches!(node.op, Op::QuantizedLinear { .. }) || !are_constants {
            return Ok(None);
        }
        let (LoweredValue::Plain(of), Some(all)) = (self.place(x), node.ty.width()) else { return Ok(None) };
        Ok(Some(LoweredValue::Columns { of, all, start, width }))
    }

    /// Columns `[start, start + width)` of `[B·T, all]` as `[B, heads, T, head_dim]`, and the number of heads.
    pub(super) fn heads_of_columns(
        &mut self,
        user: &Node,
        of: NetworkTensor,
        [all, start, width]: [usize; 3],
        head_dim: usize,
    ) -> Result<(NetworkTensor, usize)> {
        let of_heads = |columns: usize| match head_dim > 0 && columns.is_multiple_of(head_dim) {
            true => Ok((columns / head_dim, size(Some(columns / head_dim), user)?)),
            false => Err(fail(user, &format!("an operand is not of heads of {head_dim}"))),
        };
        let ((_, all), (_, first), (heads, count)) = (of_heads(all)?, of_heads(start)?, of_heads(width)?);
        let head_dim = size(Some(head_dim), user)?;
        let step = self.step_shape.ok_or_else(|| fail(user, "the graph has no token ids before it"))?;
        let tensor = self.split(user, of, &[all, head_dim])?;
        let tensor = self.network.transpose(tensor, &[0, 2, 1, 3])?;
        let (b, t) = (self.network.integers(&[0])?, self.network.integers(&[1])?);
        let (b, t) = (self.network.gather(step, b)?, self.network.gather(step, t)?);
        let (count, head_dim) = (self.network.integers(&[count])?, self.network.integers(&[head_dim])?);
        let sizes = self.network.concat(&[b, count, t, head_dim])?;
        Ok((self.network.slice(tensor, &[0, first, 0, 0], sizes)?, heads))
    }

    /// The bytes of a weight that is embedded in the plan.
    pub(super) fn constant(&mut self, weight: &PlanWeight) -> Result<ConstantBytes> {
        match self.constants {
            Constants::File(file) => {
                let (stored, _) = file.tensor(&weight.name).ok_or_else(|| {
                    Error::format(file.path(), format!("there is no tensor {}: build the package again", weight.name))
                })?;
                // The transpose has as many bytes, so only the shape tells it.
                if weight.is_staged() && stored.shape != weight.shape_in_plan() {
                    let found = format!("{} is {:?} as a constant of a plan", weight.name, stored.shape);
                    return Err(Error::internal(found, format!("{:?}", weight.shape_in_plan())));
                }
                ConstantBytes::of_file(file.clone(), stored.bytes.clone())
            }
            Constants::Arbitrary => {
                let length = usize::try_from(weight.bytes())
                    .map_err(|_| Error::TensorRt(format!("weight {} is too large", weight.name)))?;
                if self.arbitrary.len() < length {
                    // 0x3c3c3c3c is 0.0115 in FP32: TensorRT rejects scales of zero.
                    self.arbitrary = vec![0x3c; length].into();
                }
                ConstantBytes::of_memory(self.arbitrary.clone(), 0..length)
            }
        }
    }
}

pub(super) fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}
