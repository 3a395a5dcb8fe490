//! Runs that are made while a plan opens, on KV memory that nobody has yet, so that no request waits for them: TensorRT for
//! RTX compiles the kernels of a shape when it first runs (TensorRT 11 has them in the plan), and decode runs are captured as
//! CUDA graphs.
//!
//! | runs | for the 8B on an A100, prefill chunks of 512 tokens, 384 sequences / one |
//! | --- | --- |
//! | every bucket of sequences of every class, decoded | 66 / 5 |
//! | the context plans, every bucket of tokens that a prompt of the class begins with | 20 / 20 |
//! | prefill of later chunks, every power of two of tokens | 32 / 32 |
//!
//! Kernels that an earlier process left in the kernel cache are not compiled again, and only decode runs are made then, for
//! their graphs. Other shapes (later chunks between two powers of two) are compiled in the background when they first run,
//! while slower kernels compute them.

use super::TensorRtExecutor;
use super::placement::{ClassRow, Placement, Region};
use super::schedule::{BatchingConstraints, LEAST_PREFILL_TOKENS, PlanRun, RunKind, RunShape, bucket, prefill_bucket};
use crate::backend::tensorrt::{GpuEvent, KernelCompilation};
use crate::error::Result;

/// Most runs at opening; with more classes than recipes have by default, the last ones are left to their first use.
const MOST_WARM_UPS: usize = 160;

/// The shapes to run at opening, in this order: decode, context prefill, prefill of later chunks.
pub(super) fn warm_ups(constraints: &BatchingConstraints, region: &Region) -> Vec<RunShape> {
    let mut found = Vec::new();
    let classes = || constraints.classes.iter().enumerate();
    for (class, of) in classes() {
        let capacity = of.sizes.max_sequence_tokens;
        let most = of.sizes.decode_sequences;
        // A sequence gets the first free row, so no row past the number of slots is ever in use.
        let sizes = (1..=constraints.limits.slots).map(|rows| bucket(rows, most));
        let fits = |size: &usize| size * capacity <= region.tokens && *size <= constraints.rows;
        let sizes = sizes.filter(fits).map(|size| RunShape { class, kind: RunKind::Decode, size });
        found.extend(sizes);
    }
    // Prompts below this length begin in a smaller class.
    let mut least = 1;
    for (class, of) in classes() {
        let (capacity, most) = (of.sizes.max_sequence_tokens, of.sizes.prefill_tokens);
        let kind = if of.has_context_plan { RunKind::ContextPrefill } else { RunKind::CachedPrefill };
        let sizes = (least..=capacity).map(|tokens| prefill_bucket(tokens.min(most), most));
        found.extend(sizes.filter(|size| *size <= capacity).map(|size| RunShape { class, kind, size }));
        least = capacity;
    }
    for (class, of) in classes() {
        let (capacity, most) = (of.sizes.max_sequence_tokens, of.sizes.prefill_tokens);
        let doubling = std::iter::successors(Some(LEAST_PREFILL_TOKENS), |size| size.checked_mul(2));
        let sizes = doubling.take_while(|size| *size < most).chain([most]).filter(|size| *size < capacity);
        found.extend(sizes.map(|size| RunShape { class, kind: RunKind::CachedPrefill, size }));
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|shape| seen.insert(*shape));
    found.truncate(MOST_WARM_UPS);
    found
}

/// A run of a shape for sequences without a past, of token 0.
fn run_of(shape: RunShape, output_row: usize) -> PlanRun {
    let (sequences, tokens) = if shape.kind == RunKind::Decode { (shape.size, 1) } else { (1, shape.size) };
    let positions = (0..sequences).flat_map(|_| 0..tokens as i32).collect();
    PlanRun {
        kind: shape.kind,
        first: ClassRow { class: shape.class, row: 0 },
        sequences,
        tokens,
        token_ids: vec![0; sequences * tokens],
        positions,
        past_tokens: vec![0; sequences],
        total_tokens: vec![tokens as i32; sequences],
        logits_rows: if shape.kind == RunKind::Decode { (0..sequences as i32).collect() } else { vec![0] },
        output_row,
    }
}

/// Output row that a step's first decode run of a class has, if each class is decoded in one run.
fn first_output_row(class: usize, placement: &Placement, row_align: usize) -> usize {
    let rows = (0..class).map(|class| placement.rows(class).len());
    rows.fold(0, |row, rows| (row + rows).next_multiple_of(row_align))
}

impl TensorRtExecutor {
    /// Makes the runs of [`warm_ups`] that need it. Nothing may be in the KV cache.
    ///
    /// # Errors
    /// The error of a run.
    pub(super) fn warm_up(&mut self) -> Result<()> {
        if self.compilation != KernelCompilation::AtOpening {
            return Ok(());
        }
        let compiles = |shape: &RunShape| self.has_kernel_cache && !self.ready.contains(shape);
        let mut runs = warm_ups(&self.constraints, &self.layout.region);
        runs.retain(|shape| shape.kind == RunKind::Decode || compiles(shape));
        let to_compile = runs.iter().filter(|shape| compiles(shape)).count();
        if to_compile > 0 {
            let words = format!("compiling the kernels of {to_compile} step sizes, which later starts find in a cache");
            self.report.fact(&words);
        }
        let total = runs.len();
        self.report.event(&GpuEvent::Compiling { done: 0, total });
        for (index, shape) in runs.into_iter().enumerate() {
            self.ready.insert(shape);
            self.warm_up_with(shape)?;
            self.report.event(&GpuEvent::Compiling { done: index + 1, total });
        }
        self.stream.wait()?;
        self.keep_kernels();
        self.has_new_kernels = false;
        Ok(())
    }

    fn warm_up_with(&mut self, shape: RunShape) -> Result<()> {
        let row_align = self.constraints.row_align;
        let output_row = match shape.kind {
            RunKind::Decode => {
                let row = first_output_row(shape.class, &self.placement, row_align);
                if row + shape.size <= self.constraints.decode_rows() { row } else { 0 }
            }
            _ => self.constraints.spare_row(),
        };
        let run = run_of(shape, output_row);
        // Where the class's first rows are, so that the graph holds until rows are laid out anew; else anywhere.
        let own = self.placement.offset(run.first);
        let region = &self.layout.region;
        let tokens = run.sequences * region.capacities[shape.class];
        let offset = if own + tokens <= region.tokens { own } else { 0 };
        self.run_at(&run, offset).map_err(|error| self.stream.wait().err().unwrap_or(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tensorrt::executor::placement::DecodeBytes;
    use crate::backend::tensorrt::executor::schedule::ClassConstraints;
    use crate::engine::Limits;
    use crate::engine::tensorrt::Sizes;

    /// The 8B in so much KV memory, as its recipes have it by default.
    fn of_recipe(slots: usize, long: usize, prefill_tokens: usize, has_context_plan: bool) -> Vec<RunShape> {
        let capacities = vec![256, 512, 1024, 2048, 4096];
        let tokens = 4096 * long;
        let sizes = Sizes {
            max_sequence_tokens: 4096,
            position_tokens: 4096,
            decode_sequences: slots,
            prefill_sequences: 1,
            prefill_tokens,
            prefill_logits_rows: 32,
            top_tokens: 64,
        };
        let class = |capacity: &usize| ClassConstraints {
            sizes: sizes.at_capacity(*capacity, slots.min(tokens / capacity)),
            has_context_plan,
        };
        let classes: Vec<ClassConstraints> = capacities.iter().map(class).collect();
        let region = Region {
            most_rows: classes.iter().map(|class| class.sizes.decode_sequences).collect(),
            capacities,
            tokens,
            most_rows_in_all: 2 * slots,
            slots,
            decode_bytes: DecodeBytes::default(),
        };
        let limits = Limits {
            slots,
            max_sequence_tokens: 4096,
            max_step_tokens: prefill_tokens,
            max_logits_rows: 32,
            vocab_size: 256_000,
        };
        let constraints = BatchingConstraints { limits, classes, rows: 2 * slots, row_align: 1 };
        warm_ups(&constraints, &region)
    }

    #[test]
    fn runs_at_opening_are_few() {
        let counts = |shapes: &[RunShape]| {
            [RunKind::Decode, RunKind::ContextPrefill, RunKind::CachedPrefill]
                .map(|kind| shapes.iter().filter(|shape| shape.kind == kind).count())
        };
        assert_eq!(counts(&of_recipe(384, 24, 512, true)), [66, 20, 32]);
        assert_eq!(counts(&of_recipe(1, 1, 512, true)), [5, 20, 32]);
        assert_eq!(counts(&of_recipe(1, 1, 512, false)), [5, 0, 43]);
        let many = of_recipe(448, 80, 1024, true);
        assert!(many.len() <= MOST_WARM_UPS, "{}", many.len());
        let sizes = |class: usize, kind: RunKind| -> Vec<usize> {
            let of = of_recipe(384, 24, 512, true);
            of.iter().filter(|shape| (shape.class, shape.kind) == (class, kind)).map(|shape| shape.size).collect()
        };
        assert_eq!(sizes(4, RunKind::Decode), [1, 2, 4, 8, 16, 24]);
        assert_eq!(sizes(0, RunKind::ContextPrefill), [8, 16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256]);
        assert_eq!(sizes(1, RunKind::ContextPrefill), [256, 320, 384, 448, 512]);
        assert_eq!(sizes(4, RunKind::ContextPrefill), [512]);
        assert_eq!(sizes(0, RunKind::CachedPrefill), [8, 16, 32, 64, 128]);
    }

    #[test]
    fn inputs_have_the_shape() {
        let decode = run_of(RunShape { class: 1, kind: RunKind::Decode, size: 3 }, 7);
        assert_eq!((decode.sequences, decode.tokens, decode.positions), (3, 1, vec![0; 3]));
        assert_eq!((decode.total_tokens, decode.logits_rows, decode.output_row), (vec![1; 3], vec![0, 1, 2], 7));
        let shape = RunShape { class: 0, kind: RunKind::CachedPrefill, size: 4 };
        let prefill = run_of(shape, 0);
        assert_eq!((prefill.positions.as_slice(), prefill.total_tokens.as_slice()), (&[0, 1, 2, 3][..], &[4][..]));
        assert_eq!(prefill.shape(), shape);
    }
}
