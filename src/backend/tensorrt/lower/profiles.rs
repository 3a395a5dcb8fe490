//! The optimization profiles of a lowered network.

use super::super::{OptimizationProfile, ShapeRange};
use super::{Attends, Binding, Extent, NetworkLowering, StepSize};
use crate::error::{Error, Result};

impl<N> NetworkLowering<'_, N> {
    /// One profile per kind of step. Decoding has its own because TensorRT has kernels for T = 1 that read the cache in
    /// place.
    pub(super) fn profiles(&self) -> Result<Vec<OptimizationProfile>> {
        let s = self.sizes;
        let prefill = (s.prefill_sequences, s.prefill_tokens, s.prefill_logits_rows);
        let decode = (s.decode_sequences, 1, s.decode_sequences);
        let steps = match self.attends {
            Attends::Cache(_) => vec![prefill, decode],
            Attends::Chunk => vec![prefill],
        };
        steps.into_iter().map(|(sequences, tokens, rows)| self.profile(sequences, tokens, rows)).collect()
    }

    /// A profile from one sequence, token and row up to these, tuned for one sequence of `tokens` tokens.
    fn profile(&self, sequences: usize, tokens: usize, rows: usize) -> Result<OptimizationProfile> {
        let dims = |shape: &[Extent], [b, t, r]: [usize; 3]| -> Result<Vec<i64>> {
            let dim = |extent: &Extent| {
                let n = match extent {
                    Extent::Step(StepSize::B) => b,
                    Extent::Step(StepSize::T) => t,
                    Extent::Step(StepSize::R) => r,
                    Extent::Fixed(n) => *n,
                };
                i64::try_from(n).map_err(|_| Error::TensorRt(format!("a size of {n} is too large")))
            };
            shape.iter().map(dim).collect()
        };
        let inputs = self.bindings.iter().filter(|binding| !binding.role.is_output());
        let range = |binding: &Binding| -> Result<ShapeRange> {
            Ok(ShapeRange {
                input: binding.name.clone(),
                min: dims(&binding.shape, [1, 1, 1])?,
                opt: dims(&binding.shape, [1, tokens, 1])?,
                max: dims(&binding.shape, [sequences, tokens, rows])?,
            })
        };
        Ok(OptimizationProfile { ranges: inputs.map(range).collect::<Result<_>>()? })
    }
}
