//! One step of a program without its weights file: each weight is evaluated from the checkpoint when its kernel runs, a
//! few rows at a time, and forgotten. A build uses it to compute what a plan for a GPU must answer; memory holds the
//! step's activations and pieces of one weight.

use std::ops::Range;

use rayon::prelude::*;

use super::executor::Memory;
use super::kernels::FloatElement;
use super::kernels::linear::{Activations, Epilogue, LinearShape, PackedWeight, linear};
use super::kernels::rowwise::RowsMut;
use super::lower::LoweredProgram;
use super::program::{ProgramKernel, Storage};
use super::run::{StepRun, WeightSource};
use crate::backend::Step;
use crate::backend::constants::SourceRows;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::isa::Isa;

/// Values that a thread evaluates at a time. As FP32 they must stay in a core's cache. Tests cut small weights too.
const PIECE_ELEMENTS: usize = if cfg!(test) { 1 << 11 } else { 1 << 18 };
/// Pieces per thread that are evaluated before they are multiplied.
const PIECES_PER_THREAD: usize = 4;

/// Weights of a program, evaluated from a checkpoint.
pub(super) struct EvaluatedWeights<'c> {
    lowered: &'c LoweredProgram,
    checkpoint: &'c Checkpoint,
}

/// The packed operands of some rows of a weight. Stored as 64-bit words, so that they are aligned for every element type.
struct PackedRows {
    weight: (Vec<u64>, usize),
    scales: (Vec<u64>, usize),
}

/// A linear layer of a program: the indices of its weight and scales, and the columns that share a scale.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinearWeight {
    pub weight: usize,
    pub scales: Option<usize>,
    pub group: usize,
}

impl EvaluatedWeights<'_> {
    /// Rows of a weight that is stored as a table, `[rows.len(), columns]`.
    pub fn rows(&self, index: usize, rows: &[u32]) -> Result<Vec<f32>> {
        let (content, spec) = (&self.lowered.constants[index], &self.lowered.program.weights[index]);
        let mut values = vec![0f32; rows.len() * spec.columns];
        values.par_chunks_mut(spec.columns.max(1)).zip(rows).try_for_each(|(out, row)| {
            let row = *row as usize;
            if row >= content.rows() {
                return Err(Error::internal(format!("row {row} of `{}`", spec.name), "a row of the table"));
            }
            content.evaluate(self.checkpoint, row, out)
        })?;
        Ok(values)
    }

    /// `x · weightᵀ`, some rows of the weight at a time.
    pub fn linear<O: FloatElement>(
        &self,
        isa: Isa,
        x: Activations<'_>,
        of: LinearWeight,
        epilogue: Epilogue,
        out: RowsMut<'_, O>,
    ) -> Result<()> {
        let spec = &self.lowered.program.weights[of.weight];
        let Storage::Packed { packing, .. } = spec.storage else {
            return Err(Error::internal(format!("`{}` is stored by rows", spec.name), "a packed weight"));
        };
        let RowsMut { data, stride, rows } = out;
        let piece = (PIECE_ELEMENTS / spec.columns.max(1)).next_multiple_of(spec.unit_rows()).max(spec.unit_rows());
        let block = piece * PIECES_PER_THREAD * rayon::current_num_threads();
        for first in (0..spec.rows).step_by(block) {
            let range = first..spec.rows.min(first + block);
            let packed = self.packed(of, range.clone(), piece)?;
            let shape = LinearShape { outputs: range.len(), inputs: spec.columns, group: of.group };
            let [weight, scales] = [&packed.weight, &packed.scales]
                .map(|(words, bytes)| bytemuck::cast_slice::<u64, u8>(words).get(..*bytes).unwrap_or_default());
            let weight = PackedWeight::new(packing, weight, scales, shape)?;
            let columns = data.get_mut(first..).unwrap_or_default();
            linear(isa, x, weight, epilogue, RowsMut { data: columns, stride, rows })?;
        }
        Ok(())
    }

    /// Evaluates and packs rows of a weight and of its scales, `piece` rows per task. Codes and scales share the search
    /// for the best scale.
    fn packed(&self, of: LinearWeight, rows: Range<usize>, piece: usize) -> Result<PackedRows> {
        let LoweredProgram { program, constants } = self.lowered;
        let content = &constants[of.weight];
        let firsts: Vec<usize> = rows.clone().step_by(piece).collect();
        let pieces = firsts.into_par_iter().map(|first| {
            let rows = first..rows.end.min(first + piece);
            let mut source = SourceRows::read(content.source(), self.checkpoint, rows, content.columns())?;
            let mut pack = |index: usize| {
                let spec = &program.weights[index];
                let Storage::Packed { packing, operand } = spec.storage else {
                    return Err(Error::internal(format!("`{}` is stored by rows", spec.name), "a packed operand"));
                };
                Ok(packing.pack(operand, &source.evaluate(&constants[index]), spec.columns))
            };
            let weight = pack(of.weight)?;
            Ok((weight, of.scales.map(&mut pack).transpose()?.unwrap_or_default()))
        });
        let (weights, scales): (Vec<Vec<u8>>, Vec<Vec<u8>>) = pieces.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        Ok(PackedRows { weight: words(&weights), scales: words(&scales) })
    }
}

/// Joins pieces in memory that is aligned for 64-bit words; returns it and its length in bytes.
fn words(pieces: &[Vec<u8>]) -> (Vec<u64>, usize) {
    let bytes = pieces.iter().map(Vec::len).sum::<usize>();
    let mut joined = vec![0u64; bytes.div_ceil(8)];
    let mut rest: &mut [u8] = bytemuck::cast_slice_mut(&mut joined);
    for piece in pieces {
        let (here, behind) = rest.split_at_mut(piece.len());
        here.copy_from_slice(piece);
        rest = behind;
    }
    (joined, bytes)
}

/// Logits of a step.
pub struct EvaluatedLogits {
    arena: Memory,
    first: usize,
    rows: usize,
    width: usize,
}

impl EvaluatedLogits {
    /// Row `index`, `[vocab_size]`.
    ///
    /// # Errors
    /// [`Error::Step`] past the last row.
    pub fn row(&self, index: usize) -> Result<&[f32]> {
        let bytes = 4 * self.width;
        let start = self.first + index * bytes;
        match self.arena.bytes().get(start..start + bytes) {
            Some(row) if index < self.rows => Ok(bytemuck::cast_slice(row)),
            _ => Err(Error::Step(format!("row {index} of logits, but the step returned {}", self.rows))),
        }
    }
}

/// Runs a step of a program on this CPU, with the weights of `checkpoint`. The step was made for the program's limits;
/// its sequences have no past. `follow` is called after each kernel and may end the run.
///
/// # Errors
/// [`Error::Step`] for a step of other limits or with a past; [`Error::Request`] if the memory for activations cannot be
/// reserved; [`Error::Format`] for a weight that is not finite; the error of `follow`.
pub fn run_streamed(
    lowered: &LoweredProgram,
    checkpoint: &Checkpoint,
    step: &Step,
    follow: &dyn Fn(&ProgramKernel) -> Result<()>,
) -> Result<EvaluatedLogits> {
    let (program, limits) = (&lowered.program, &lowered.program.limits);
    program.validate().map_err(|detail| Error::internal(detail, "a program that was just lowered"))?;
    step.check_fits(limits)?;
    if step.spans().iter().any(|span| span.past_tokens > 0) {
        return Err(Error::Step("a sequence has a past, which streamed weights cannot build on".into()));
    }
    let mut arena = Memory::reserve(program.arena_bytes, "activations", limits)?;
    let cache_bytes = program.cache.total_bytes(limits).unwrap_or(usize::MAX);
    let mut cache = Memory::reserve(cache_bytes, "KV cache", limits)?;
    let (mut positions, mut slots) = (Vec::new(), Vec::new());
    for span in step.spans() {
        positions.extend(0..span.len as u32);
        slots.extend(std::iter::repeat_n(span.slot as u32, span.len));
    }
    let weights = EvaluatedWeights { lowered, checkpoint };
    let mut run = StepRun {
        step,
        positions: &positions,
        slots: &slots,
        program,
        limits,
        weights: WeightSource::Evaluated(&weights),
        arena: arena.bytes_mut(),
        cache: cache.bytes_mut(),
        isa: Isa::from_environment()?,
    };
    for kernel in &program.kernels {
        run.kernel(kernel)?;
        follow(kernel)?;
    }
    let logits = &program.buffers[program.logits];
    Ok(EvaluatedLogits { first: logits.offset, rows: step.logits_rows().len(), width: logits.width, arena })
}
