//! The optimization profiles of a lowered network.

use super::super::{OptimizationProfile, ShapeRange};
use super::{Attends, Binding, Extent, NetworkLowering, StepSize};
use crate::error::{Error, Result};

/// The steps of a profile, of up to `tokens` tokens a sequence.
struct Steps {
    /// Fewest sequences.
    fewest: usize,
    /// Sequences that kernels are tuned for.
    tuned: usize,
    /// Most sequences.
    sequences: usize,
    /// Most tokens per sequence, which kernels are tuned for.
    tokens: usize,
    /// Most rows of logits.
    rows: usize,
}

impl<N> NetworkLowering<'_, N> {
    /// A profile for prefill, and one or more for decoding. Decoding has its own because TensorRT has kernels for T = 1
    /// that read the cache in place. Several serve a library that selects kernels when it compiles: the first is tuned for
    /// one sequence, the others for their largest batch. One serves a library that specializes kernels when the plan runs.
    pub(super) fn profiles(&self) -> Result<Vec<OptimizationProfile>> {
        let s = self.sizes;
        let (sequences, tokens, rows) = (s.prefill_sequences, s.prefill_tokens, s.prefill_logits_rows);
        let mut profiles = vec![self.profile(&Steps { fewest: 1, tuned: 1, sequences, tokens, rows })?];
        if matches!(self.attends, Attends::Chunk) {
            return Ok(profiles);
        }
        let mut fewest = 1;
        for most in s.decode_profiles(&self.options.decode_batches) {
            let tuned = if fewest == 1 { 1 } else { most };
            profiles.push(self.profile(&Steps { fewest, tuned, sequences: most, tokens: 1, rows: most })?);
            fewest = most + 1;
        }
        Ok(profiles)
    }

    /// The profile of some steps: a decode step has a row of logits for each sequence, and a prefill profile begins, and is
    /// tuned, at one of each.
    fn profile(&self, steps: &Steps) -> Result<OptimizationProfile> {
        let Steps { fewest, tuned, sequences, tokens, rows } = *steps;
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
                min: dims(&binding.shape, [fewest, 1, fewest])?,
                opt: dims(&binding.shape, [tuned, tokens, tuned])?,
                max: dims(&binding.shape, [sequences, tokens, rows])?,
            })
        };
        Ok(OptimizationProfile { ranges: inputs.map(range).collect::<Result<_>>()? })
    }
}
