//! The work of a program's steps: bytes of weights read, and operations.

use super::{Program, ProgramKernel, RowCount, WeightRule};
use crate::tensor::DType;

impl Program {
    /// Bytes of weights that a decode step reads, whatever its number of sequences: all weights except the tables that it
    /// looks up rows in.
    pub fn decode_weight_bytes(&self) -> u64 {
        let mut read = vec![false; self.weights.len()];
        let used = self.kernels.iter().flat_map(|kernel| kernel.operands().weights);
        for weight in used.filter(|weight| !matches!(weight.rule, WeightRule::Table(_))) {
            if let Some(read) = read.get_mut(weight.index) {
                *read = true;
            }
        }
        let bytes = self.weights.iter().zip(read).filter(|(_, read)| *read).filter_map(|(w, _)| w.stored_bytes());
        bytes.sum::<usize>() as u64
    }

    /// Operations of the prefill of a sequence of `tokens`, of which one row of logits is requested: two for each
    /// parameter of a linear layer and row that it computes, and four for each column of the queries, token and position
    /// that it attends to.
    pub fn prefill_flops(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let linear = self.linear_layers().map(|(parameters, rows, _)| match rows {
            RowCount::Tokens => 2.0 * parameters * tokens,
            RowCount::LogitsRows => 2.0 * parameters,
        });
        let widths = self.kernels.iter().map(|kernel| match kernel {
            ProgramKernel::Attention { q, .. } => q.width as f64,
            _ => 0.0,
        });
        linear.sum::<f64>() + 4.0 * widths.sum::<f64>() * tokens * (tokens + 1.0) / 2.0
    }

    /// Element type of the activations of most multiplications of a prefill.
    pub fn multiplied_dtype(&self) -> Option<DType> {
        let of_type = |wanted| {
            let layers = self.linear_layers().filter(|(_, rows, _)| *rows == RowCount::Tokens);
            layers.filter(|(_, _, dtype)| *dtype == wanted).map(|(parameters, ..)| parameters).sum::<f64>()
        };
        let most = [DType::F32, DType::BF16, DType::I8].map(|dtype| (of_type(dtype), dtype));
        most.into_iter().filter(|(parameters, _)| *parameters > 0.0).max_by(|a, b| a.0.total_cmp(&b.0)).map(|m| m.1)
    }

    /// Parameters, rows and type of activations of every linear layer.
    fn linear_layers(&self) -> impl Iterator<Item = (f64, RowCount, DType)> {
        self.kernels.iter().filter_map(|kernel| {
            let ProgramKernel::Linear { x, weight, out, .. } = *kernel else { return None };
            let weight = self.weights.get(weight)?;
            let parameters = weight.rows as f64 * weight.columns as f64;
            Some((parameters, self.buffers.get(out)?.rows, self.buffers.get(x.buffer)?.dtype))
        })
    }
}
