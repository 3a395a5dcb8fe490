//! Linear layers whose inputs and weights are 8-bit integers.

use super::quantized::QUANTIZED_PRODUCTS;
use super::{Layers, NetworkLowering, NetworkTensor, PlanWeight, fail, plain_form, size};
use crate::error::Result;
use crate::graph::{Node, Op, Value};

impl<N: Layers> NetworkLowering<'_, N> {
    /// Multiplies 8-bit integers. Given a scale for each output, as an input, TensorRT would dequantize both sides to BF16
    /// before the GEMM; given a scale of one, which is a constant of the network, it multiplies the codes themselves, and the
    /// outputs' scales join what follows. Codes are stored `[out, in]`: integer tensor cores read both operands along the
    /// inputs.
    pub(super) fn integer_linear(
        &mut self,
        node: &Node,
        (x, x_scale): (NetworkTensor, NetworkTensor),
        [codes, scales]: [Value; 2],
    ) -> Result<NetworkTensor> {
        let graph = self.graph;
        let [codes, scales] = [codes, scales].map(|value| graph.node(value));
        let mut part = |part: &Node, shape: Vec<usize>| {
            let Op::Const(expr) = &part.op else { return Err(fail(node, "its codes and scales are not constants")) };
            let content = plain_form(part, expr, &part.ty)?;
            self.weight(PlanWeight::rows(&part.name, part.ty.dtype, shape, content))
        };
        let dims: Option<Vec<usize>> = codes.ty.shape.iter().map(|dim| dim.as_fixed()).collect();
        let Some([rows, columns]) = dims.as_deref() else {
            return Err(fail(node, "its codes are not a matrix of known sizes"));
        };
        let (of_codes, of_scales) = (part(codes, vec![*rows, *columns])?, part(scales, vec![*rows])?);
        let one = self.network.scalar(1.0, 0)?;
        let x = self.network.dequantize(x, x_scale, None, QUANTIZED_PRODUCTS)?;
        let weight = self.network.dequantize(of_codes, one, None, QUANTIZED_PRODUCTS)?;
        let sums = self.network.linear(x, weight)?;
        let sums = self.typed(sums, QUANTIZED_PRODUCTS, scales.ty.dtype)?;
        let of_scales = self.network.reshape(of_scales, &[1, size(Some(*rows), node)?])?;
        self.network.product(sums, of_scales)
    }
}
