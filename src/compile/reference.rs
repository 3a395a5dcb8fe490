//! The reference of a build: what the CPU answers to a few short prompts, in the precision of each plan.
//!
//! A CPU plan is asked itself. For a plan that only a GPU runs, the same graph is lowered to the CPU, and all prompts are
//! one step, so that each weight is read once. Weights that are stored as they are, or rounded, are evaluated from the
//! checkpoint, kernel by kernel. Quantized ones would take another search for the best scales, which takes longer than all
//! else; they are packed for the CPU too, in the same pass as for the GPU, into a file that is removed afterwards.

use std::path::Path;

use super::build::Numbers;
use super::calibration::Calibrations;
use super::{Calibration, LinearKind, Precision, Progress, optimized_graph};
use crate::backend::constants::RowForm;
use crate::backend::cpu::lower::{CpuTarget, LoweredProgram, lower};
use crate::backend::cpu::program::{Program, ProgramKernel};
use crate::backend::cpu::streamed::run_streamed;
use crate::backend::cpu::{CpuExecutor, CpuOptions};
use crate::backend::{Chunk, Limits, Rows, Step};
use crate::checkpoint::{Checkpoint, ModelConfig};
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;
use crate::verify::Reference;

/// Name of the stage.
const STAGE: &str = "asking the CPU";

/// Asks a program whose weights are in the file `path` for the answers that the plan for `target` must give.
///
/// # Errors
/// [`Error::Numerics`] if a logit is not finite; errors of opening the plan.
pub(super) fn ask_program(
    reference: &mut Reference,
    (target, precision): (&str, &str),
    program: &Program,
    path: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    progress.steps(STAGE, reference.tokens() as u64, "tokens");
    let slots = program.limits.slots.min(reference.prompts.len()).max(1);
    let options = CpuOptions { slots: Some(slots), ..CpuOptions::default() };
    let mut executor = CpuExecutor::new(program.clone(), path, TensorFile::open(path)?, &options)?;
    let answers = reference.ask(&mut executor, &|tokens| follow(progress, tokens))?;
    reference.add(target, precision, executor.arithmetic(), answers);
    Ok(())
}

/// The model in the precision of a GPU plan with quantized weights, to be packed for the CPU.
pub(super) struct Stand {
    precision: Precision,
    keep_bf16: Vec<LinearKind>,
    pub lowered: LoweredProgram,
    /// Temporary file of its weights.
    pub weights: String,
}

impl Stand {
    /// One for each of `wanted` that quantizes weights.
    ///
    /// # Errors
    /// As [`lower_for_prompts`].
    pub fn plan(reference: &Reference, config: &ModelConfig, wanted: &[Numbers<'_>]) -> Result<Vec<Stand>> {
        let mut stands: Vec<Stand> = Vec::new();
        for numbers @ (precision, kept) in wanted.iter().copied() {
            // Which weights there are does not depend on calibration, so any scale will do.
            let uncalibrated = Calibration::uniform(0.5).without(kept);
            let lowered = lower_for_prompts(reference, config, precision, Some(&uncalibrated))?;
            let has_codes = lowered.constants.iter().any(|constant| matches!(constant.form(), RowForm::Codes(_)));
            if has_codes && stands.iter().all(|stand| !stand.is_of(numbers)) {
                let weights = format!("reference-{}-{precision}.safetensors", stands.len());
                stands.push(Stand { precision, keep_bf16: kept.to_vec(), lowered, weights });
            }
        }
        Ok(stands)
    }
}

impl Stand {
    /// Lowers it again with what a calibration found, since weights may depend on it.
    ///
    /// # Errors
    /// As [`lower_for_prompts`].
    pub fn calibrate(&mut self, reference: &Reference, config: &ModelConfig, found: &Calibrations) -> Result<()> {
        if let Some(found) = found.of(self.precision) {
            let found = found.without(&self.keep_bf16);
            self.lowered = lower_for_prompts(reference, config, self.precision, Some(&found))?;
        }
        Ok(())
    }

    /// Returns true if it computes with these number formats.
    pub fn is_of(&self, (precision, kept): Numbers<'_>) -> bool {
        self.precision == precision && self.keep_bf16 == kept
    }
}

/// The model in a precision, lowered to this CPU for one step over all prompts.
///
/// # Errors
/// [`Error::Graph`] if the model cannot be lowered.
pub(super) fn lower_for_prompts(
    reference: &Reference,
    config: &ModelConfig,
    precision: Precision,
    calibration: Option<&Calibration>,
) -> Result<LoweredProgram> {
    let tokens = reference.tokens().max(1);
    let limits = Limits {
        slots: reference.prompts.len().max(1),
        max_sequence_tokens: reference.prompts.iter().map(|prompt| prompt.token_ids.len()).max().unwrap_or(1),
        max_step_tokens: tokens,
        max_logits_rows: tokens,
        vocab_size: config.vocab_size,
    };
    let (graph, _) = optimized_graph(config, precision, limits.max_sequence_tokens, calibration)?;
    lower(&graph, &limits, CpuTarget::native()?)
}

/// Asks a lowered model for the answers that the plan for `target` must give.
///
/// # Errors
/// [`Error::Numerics`] if a logit is not finite; [`Error::Format`] for a weight that is not.
pub(super) fn ask_checkpoint(
    reference: &mut Reference,
    (target, precision): (&str, Precision),
    lowered: &LoweredProgram,
    checkpoint: &Checkpoint,
    progress: &dyn Progress,
) -> Result<()> {
    let program = &lowered.program;
    let bytes = |index: usize| program.weights.get(index).and_then(|weight| weight.stored_bytes()).unwrap_or(0) as u64;
    let linear = |kernel: &ProgramKernel| match kernel {
        ProgramKernel::Linear { weight, .. } => bytes(*weight),
        _ => 0,
    };
    progress.stage(STAGE, program.kernels.iter().map(linear).sum());
    let chunks: Vec<Chunk<'_>> = reference
        .prompts
        .iter()
        .enumerate()
        .map(|(slot, prompt)| Chunk { slot, past_tokens: 0, tokens: &prompt.token_ids, rows: Rows::All })
        .collect();
    let step = Step::prefill(&program.limits, &chunks)?;
    let logits = run_streamed(lowered, checkpoint, &step, &|kernel| follow(progress, linear(kernel)))?;
    let answers = reference.keep(|row| logits.row(row))?;
    reference.add(target, &precision.to_string(), "the checkpoint, on the CPU".into(), answers);
    Ok(())
}

fn follow(progress: &dyn Progress, amount: u64) -> Result<()> {
    progress.advance(amount);
    if progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::pack::items;
    use crate::backend::packing;
    use crate::verify::prompts;

    struct Quiet;
    impl Progress for Quiet {
        fn stage(&self, _: &str, _: u64) {}
        fn advance(&self, _: u64) {}
        fn warn(&self, _: &str) {}
    }

    /// Weights evaluated a few rows at a time give the bits that the packed file gives.
    #[test]
    fn a_checkpoint_answers_as_its_plan_does() {
        for folder in
            ["tests/data/tiny-chat", "tests/data/shapes/odd", "tests/data/shapes/gqa", "tests/data/shapes/wide"]
        {
            let checkpoint = Checkpoint::open(Path::new(folder)).unwrap();
            let config = checkpoint.config();
            let limits = Limits {
                slots: 1,
                max_sequence_tokens: 40,
                max_step_tokens: 40,
                max_logits_rows: 40,
                vocab_size: config.vocab_size,
            };
            let mut reference = Reference::new(prompts(None, &[], &limits));
            for precision in Precision::ALL {
                let calibration = Calibration::uniform(0.1);
                let lowered = lower_for_prompts(&reference, config, precision, Some(&calibration)).unwrap();
                let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
                let mut bytes = Vec::new();
                let mut sink = |piece: &[u8]| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                };
                let file = packing::File { items: items(&lowered), sink: &mut sink };
                packing::pack(vec![file], &checkpoint, false, &|_| Ok(())).unwrap();
                std::fs::write(&path, bytes).unwrap();
                ask_program(&mut reference, ("cpu", &precision.to_string()), &lowered.program, &path, &Quiet).unwrap();
                let of_plan = reference.answers_for("cpu").unwrap().rows.clone();
                ask_checkpoint(&mut reference, ("cpu", precision), &lowered, &checkpoint, &Quiet).unwrap();
                assert_eq!(reference.answers_for("cpu").unwrap().rows, of_plan, "{folder} {precision}");
            }
        }
    }
}
