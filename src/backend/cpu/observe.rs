//! Shows the inputs of linear layers to an observer, for calibration: prompts go through the program a few layers at a
//! time, all prompts through these before any goes on, so that an observer that keeps much for each layer keeps it for
//! few layers at once.

use std::collections::BTreeMap;
use std::ops::Range;

use super::executor::CpuExecutor;
use super::kernels::linear::Epilogue;
use super::program::{Program, ProgramKernel, RowCount};
use crate::backend::{Chunk, Rows, Step};
use crate::error::Result;

/// Receives the inputs of linear layers.
pub trait InputObserver: Send {
    /// Returns true if inputs of the layer with this weight, an index in [`Program::weights`], are wanted.
    fn wants(&self, weight: usize) -> bool;

    /// Receives the inputs of a layer for some tokens, `[tokens, width]`. All tokens of one layer come in order, those of
    /// layers that share a pass alternate.
    ///
    /// # Errors
    /// Any; it ends the run.
    fn inputs(&mut self, weight: usize, width: usize, inputs: &[f32]) -> Result<()>;

    /// Some tokens have gone through the layers of a pass.
    ///
    /// # Errors
    /// Any; it ends the run.
    fn passed(&mut self, tokens: usize) -> Result<()>;

    /// All tokens have gone through these layers; no more inputs come for them.
    ///
    /// # Errors
    /// Any; it ends the run.
    fn finished(&mut self, weights: &[usize]) -> Result<()>;
}

impl CpuExecutor {
    /// Runs prompts through the layers that `observer` wants. Memory holds the residual stream of all tokens beside what
    /// the observer keeps.
    ///
    /// # Errors
    /// [`Error::Step`](crate::Error::Step) for a prompt that is longer than the program's sequences; any error of
    /// `observer`.
    pub fn observe(&mut self, prompts: &[Vec<u32>], observer: &mut dyn InputObserver) -> Result<()> {
        let program = self.program.clone();
        let limits = self.limits.clone();
        let mut steps = Vec::new();
        for prompt in prompts {
            let mut past_tokens = 0;
            for tokens in prompt.chunks(limits.max_step_tokens) {
                steps.push(Step::prefill(&limits, &[Chunk { slot: 0, past_tokens, tokens, rows: Rows::None }])?);
                past_tokens += tokens.len();
            }
        }
        let mut carried: Vec<Vec<u8>> = vec![Vec::new(); steps.len()];
        let mut carries: Vec<usize> = Vec::new();
        for pass in passes(&program, observer) {
            let carries_on = live_buffers(&program, pass.end);
            for (step, carried) in steps.iter().zip(&mut carried) {
                let tokens = step.tokens().len();
                self.restore(&carries, tokens, carried);
                self.run_kernels(step, pass.clone(), Some(&mut *observer))?;
                self.save(&carries_on, tokens, carried);
                observer.passed(tokens)?;
            }
            carries = carries_on;
            observer.finished(&observed(&program, pass, observer))?;
        }
        Ok(())
    }

    /// Number of passes that [`CpuExecutor::observe`] makes.
    pub fn observed_passes(&self, observer: &dyn InputObserver) -> usize {
        passes(&self.program, observer).len()
    }

    fn live_range(&self, buffer: usize, tokens: usize) -> Range<usize> {
        let spec = &self.program.buffers[buffer];
        let rows = if spec.rows == RowCount::Tokens { tokens } else { 0 };
        spec.offset..spec.offset + rows * spec.width * spec.dtype.bytes()
    }

    fn save(&self, buffers: &[usize], tokens: usize, into: &mut Vec<u8>) {
        into.clear();
        for buffer in buffers {
            into.extend_from_slice(&self.arena.bytes()[self.live_range(*buffer, tokens)]);
        }
    }

    fn restore(&mut self, buffers: &[usize], tokens: usize, from: &[u8]) {
        let mut from = from;
        for buffer in buffers {
            let range = self.live_range(*buffer, tokens);
            let (here, rest) = from.split_at(range.len());
            self.arena.bytes_mut()[range].copy_from_slice(here);
            from = rest;
        }
    }
}

/// The kernels of each pass. A pass ends behind a linear layer that adds to the residual stream, where little besides
/// that stream is alive. Kernels behind the last layer that is wanted are in none.
fn passes(program: &Program, observer: &dyn InputObserver) -> Vec<Range<usize>> {
    let (mut passes, mut start) = (Vec::new(), 0);
    let mut pending = false;
    for (index, kernel) in program.kernels.iter().enumerate() {
        let ProgramKernel::Linear { weight, epilogue, .. } = kernel else { continue };
        pending |= observer.wants(*weight);
        if pending && *epilogue == Epilogue::Accumulate {
            passes.push(start..index + 1);
            (start, pending) = (index + 1, false);
        }
    }
    if pending {
        passes.push(start..program.kernels.len());
    }
    passes
}

/// Weights of the wanted layers among these kernels, each once.
fn observed(program: &Program, kernels: Range<usize>, observer: &dyn InputObserver) -> Vec<usize> {
    let mut weights = Vec::new();
    for kernel in &program.kernels[kernels] {
        if let ProgramKernel::Linear { weight, .. } = kernel
            && observer.wants(*weight)
            && !weights.contains(weight)
        {
            weights.push(*weight);
        }
    }
    weights
}

/// Buffers that are written before kernel `at` and read from it on.
fn live_buffers(program: &Program, at: usize) -> Vec<usize> {
    let mut lives: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    for (time, kernel) in program.kernels.iter().enumerate() {
        for write in kernel.operands().writes {
            let life = lives.entry(write.buffer).or_insert((time, time));
            if write.updates {
                life.1 = time;
            }
        }
        for read in kernel.reads() {
            lives.entry(read.buffer).and_modify(|life| life.1 = time);
        }
    }
    lives.into_iter().filter(|(_, (first, last))| *first < at && *last >= at).map(|(buffer, _)| buffer).collect()
}
