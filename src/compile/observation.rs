//! Runs a checkpoint over calibration prompts in BF16 on the CPU, and derives from the inputs of its linear layers the
//! scales of 8-bit activations, the factors that even out their channels, and the rounding of weights.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use rayon::prelude::*;

use super::Progress;
use super::calibration::{Calibrations, base_name};
use super::rounding::{self, InputProducts};
use super::smoothing::Site;
use super::smoothing::choice::{self, LayerInputs};
use crate::backend::constants::{ConstRows, RowForm, RowSource, stored_dtype};
use crate::backend::cpu::lower::LoweredProgram;
use crate::backend::cpu::program::ProgramKernel;
use crate::backend::cpu::{CpuExecutor, CpuOptions, InputObserver};
use crate::checkpoint::{Checkpoint, RoundedWeights, codes_name, scales_name};
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::quantize::{F8_MAX, Scheme, round_f8};
use crate::tensor_file::{self, TensorFile};

/// Scales are tried from this many times the one that saturates nothing, which leaves room for inputs beyond all that
/// were seen.
const LARGEST_SCALE: f32 = 2.0;
/// Each scale tried is smaller by this factor, the fourth root of one half.
const SCALE_STEP: f32 = 0.840_896_4;
/// Number of scales tried; the smallest represents a sixteenth of the largest input.
const SCALES: i32 = 21;
/// An error this much larger than the smallest is accepted for a larger scale, which saturates later.
const ACCEPTED_ERROR: f64 = 1.01;
/// Rows of a matrix that are evaluated at a time.
const EVALUATED_ROWS: usize = 1024;

/// Counts of magnitudes by their BF16 bits: the inputs of layers are BF16, so these are exact.
struct Magnitudes {
    counts: Vec<u64>,
}

/// Matrices to round, by the weight of the BF16 program that holds the same one.
#[derive(Default)]
pub(super) struct RoundingJob {
    /// Weight, tensors it is stacked from, and scheme, in the order in which a program uses the weights.
    matrices: Vec<(usize, Vec<String>, Scheme)>,
}

/// Collects what is wanted of the layers of a pass, and uses it at the pass's end.
struct Calibrating<'a> {
    lowered: &'a LoweredProgram,
    checkpoint: &'a Checkpoint,
    progress: &'a dyn Progress,
    /// Of each weight: its layer's inputs are counted for a scale of E4M3 codes.
    is_counted: Vec<bool>,
    /// Of each weight: its layer's inputs are sampled for factors and a scale of 8-bit integers.
    is_sampled: Vec<bool>,
    strengths: &'a [f32],
    sites: &'a [Site],
    /// Tokens of all prompts.
    tokens: usize,
    job: &'a RoundingJob,
    magnitudes: Vec<Option<Magnitudes>>,
    samples: Vec<Option<LayerInputs>>,
    products: Vec<Option<InputProducts>>,
    found: Calibrations,
    /// Receives rounded matrices.
    out: Option<BufWriter<File>>,
    path: &'a Path,
}

/// Inputs of [`calibrate`].
pub(super) struct CalibrationInputs<'a> {
    /// The BF16 model.
    pub lowered: &'a LoweredProgram,
    /// The file of its weights.
    pub weights: &'a Path,
    /// Token ids of the prompts.
    pub prompts: &'a [Vec<u32>],
    /// The weights to round.
    pub checkpoint: &'a Checkpoint,
    /// Derive scales of E4M3 activations.
    pub e4m3: bool,
    /// Derive scales of 8-bit integers, and factors of layers that can take them.
    pub int8: bool,
    /// The strengths that factors are chosen from, beside none.
    pub strengths: &'a [f32],
    /// The layers that can take factors.
    pub sites: &'a [Site],
    /// Matrices to round.
    pub job: &'a RoundingJob,
    /// Where to write them; the file is removed once it is mapped.
    pub rounded: &'a Path,
}

/// Runs the prompts; returns the scales of activations and the rounded matrices, where they are wanted.
///
/// # Errors
/// [`Error::Numerics`] naming the layer whose inputs are not finite; [`Error::Io`] if rounded weights cannot be written;
/// [`Error::Cancelled`].
pub(super) fn calibrate(
    inputs: &CalibrationInputs<'_>,
    progress: &dyn Progress,
) -> Result<(Calibrations, Option<RoundedWeights>)> {
    let CalibrationInputs { lowered, job, rounded, .. } = *inputs;
    let program = &lowered.program;
    let mut is_quantized = vec![false; program.weights.len()];
    for kernel in &program.kernels {
        if let ProgramKernel::Linear { weight, out, .. } = kernel {
            is_quantized[*weight] = *out != program.logits;
        }
    }
    let mut observer = Calibrating {
        lowered,
        checkpoint: inputs.checkpoint,
        progress,
        magnitudes: is_quantized.iter().map(|_| None).collect(),
        samples: is_quantized.iter().map(|_| None).collect(),
        products: is_quantized.iter().map(|_| None).collect(),
        is_counted: is_quantized.iter().map(|quantized| *quantized && inputs.e4m3).collect(),
        is_sampled: is_quantized.iter().map(|quantized| *quantized && inputs.int8).collect(),
        strengths: inputs.strengths,
        sites: inputs.sites,
        tokens: inputs.prompts.iter().map(Vec::len).sum(),
        job,
        found: Calibrations::default(),
        out: None,
        path: rounded,
    };
    if !job.matrices.is_empty() {
        let header = job.header(lowered);
        let names: Vec<_> = header.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, shape.clone())).collect();
        let file = File::create(rounded).map_err(Error::io("create", rounded))?;
        observer.out = Some(BufWriter::with_capacity(1 << 20, file));
        observer.write(&tensor_file::encode_header(&names)?)?;
    }
    // Kernels of other instruction sets round differently; this one is everywhere, so a package does not depend on the
    // machine that it is built on.
    let options = CpuOptions { isa: Isa::by_name("avx2"), ..CpuOptions::default() };
    let weights = TensorFile::open(inputs.weights)?;
    let mut executor = CpuExecutor::new(program.clone(), inputs.weights, weights, &options)?;
    progress.steps("calibrating", executor.observed_passes(&observer) as u64, "blocks");
    executor.observe(inputs.prompts, &mut observer)?;
    let Calibrating { found, out, .. } = observer;
    let Some(out) = out else { return Ok((found, None)) };
    out.into_inner().map_err(|e| Error::io("write", rounded)(e.into_error()))?;
    let file = RoundedWeights::open(rounded)?;
    std::fs::remove_file(rounded).map_err(Error::io("remove", rounded))?;
    Ok((found, Some(file)))
}

impl RoundingJob {
    /// Matrices of `lowered`, the BF16 program, whose codes some plan holds among `contents`, in these schemes.
    pub fn new<'c>(lowered: &LoweredProgram, contents: impl Iterator<Item = &'c ConstRows>) -> RoundingJob {
        let mut wanted: Vec<(&RowSource, Scheme)> = Vec::new();
        for content in contents {
            if let RowForm::Codes(scheme) = content.form()
                && !wanted.contains(&(content.source(), scheme))
            {
                wanted.push((content.source(), scheme));
            }
        }
        let mut job = RoundingJob::default();
        for kernel in &lowered.program.kernels {
            let ProgramKernel::Linear { weight, .. } = *kernel else { continue };
            let RowSource::Tensors(tensors) = lowered.constants[weight].source() else { continue };
            for (_, scheme) in wanted.iter().filter(|(source, _)| *source == lowered.constants[weight].source()) {
                let matrix = (weight, tensors.clone(), *scheme);
                if !job.matrices.contains(&matrix) {
                    job.matrices.push(matrix);
                }
            }
        }
        job
    }

    /// Returns true if there is nothing to round.
    pub fn is_empty(&self) -> bool {
        self.matrices.is_empty()
    }

    /// Names, element types and shapes of the file's tensors, in order.
    fn header(&self, lowered: &LoweredProgram) -> Vec<(String, safetensors::Dtype, Vec<usize>)> {
        let mut header = Vec::with_capacity(2 * self.matrices.len());
        for (weight, tensors, scheme) in &self.matrices {
            let (rows, columns) = (lowered.constants[*weight].rows(), lowered.constants[*weight].columns());
            let dtype = match stored_dtype(scheme.dtype()) {
                safetensors::Dtype::U8 => safetensors::Dtype::I8, // a byte for each 4-bit code
                dtype => dtype,
            };
            header.push((codes_name(tensors, *scheme), dtype, vec![rows, columns]));
            let scales = vec![rows, scheme.blocks(columns)];
            header.push((scales_name(tensors, *scheme), safetensors::Dtype::F32, scales));
        }
        header
    }

    /// Bytes of the file of rounded matrices.
    pub fn file_bytes(&self, lowered: &LoweredProgram) -> u64 {
        let bytes = |(_, dtype, shape): &(String, safetensors::Dtype, Vec<usize>)| {
            shape.iter().map(|n| *n as u64).product::<u64>() * dtype.bitsize() as u64 / 8 + 256
        };
        self.header(lowered).iter().map(bytes).sum()
    }

    /// Upper bound on the memory for rounding, beside the executor's.
    pub fn memory_bytes(&self, lowered: &LoweredProgram) -> u64 {
        let columns = |weight: &usize| lowered.constants[*weight].columns();
        let mut weights: Vec<usize> = self.matrices.iter().map(|(weight, ..)| *weight).collect();
        weights.dedup();
        // A pass ends at each layer that adds to the residual stream: every second one.
        let pairs = weights.chunks(2).map(|pair| rounding::memory_bytes(pair.iter().map(columns)));
        let slab = weights.iter().map(columns).max().unwrap_or(0) * EVALUATED_ROWS * 12;
        pairs.max().unwrap_or(0) + slab as u64
    }
}

/// Upper bound on the memory for choosing factors, beside the executor's.
pub(super) fn smoothing_memory_bytes(lowered: &LoweredProgram) -> u64 {
    let linear = |kernel: &ProgramKernel| match kernel {
        ProgramKernel::Linear { weight, out, .. } if *out != lowered.program.logits => {
            Some(lowered.constants[*weight].columns())
        }
        _ => None,
    };
    let columns: Vec<usize> = lowered.program.kernels.iter().filter_map(linear).collect();
    // A pass ends at each layer that adds to the residual stream: every second one.
    let pairs = columns.chunks(2).map(|pair| pair.iter().map(|columns| choice::memory_bytes(*columns)).sum::<u64>());
    let slab = columns.iter().max().unwrap_or(&0) * EVALUATED_ROWS * 4;
    pairs.max().unwrap_or(0) + slab as u64
}

impl InputObserver for Calibrating<'_> {
    fn wants(&self, weight: usize) -> bool {
        self.is_counted[weight] || self.is_sampled[weight] || self.job.matrices.iter().any(|(of, ..)| *of == weight)
    }

    fn inputs(&mut self, weight: usize, width: usize, inputs: &[f32]) -> Result<()> {
        if self.is_counted[weight] {
            self.magnitudes[weight].get_or_insert_with(Magnitudes::new).add(inputs);
        }
        if self.is_sampled[weight] {
            self.samples[weight].get_or_insert_with(|| LayerInputs::new(width, self.tokens)).add(inputs);
        }
        if self.job.matrices.iter().any(|(of, ..)| *of == weight) {
            self.products[weight].get_or_insert_with(|| InputProducts::new(width)).add(inputs);
        }
        Ok(())
    }

    fn passed(&mut self, _: usize) -> Result<()> {
        if self.progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn finished(&mut self, weights: &[usize]) -> Result<()> {
        for weight in weights {
            let name = &self.lowered.program.weights[*weight].name;
            let infinite = || Error::Numerics(format!("calibration: inputs of the layer of `{name}` are not finite"));
            if let Some(magnitudes) = self.magnitudes[*weight].take() {
                self.found.e4m3.insert(name, magnitudes.scale().ok_or_else(infinite)?);
            }
            if let Some(sample) = self.samples[*weight].take() {
                let content = self.lowered.constants[*weight].unquantized();
                let site = self.sites.iter().find(|site| site.name == base_name(name));
                let every: Vec<usize>;
                let (channels, strengths) = match site {
                    Some(site) => (&site.channels, self.strengths),
                    None => {
                        every = (0..content.columns()).collect();
                        (&every, &[][..])
                    }
                };
                let mut weights = |visit: &mut dyn FnMut(&[f32])| {
                    visit_rows(self.checkpoint, self.progress, &content, &mut |rows| {
                        visit(rows);
                        Ok(())
                    })
                };
                let chosen = sample.choose(channels, strengths, &mut weights)?.ok_or_else(infinite)?;
                self.found.int8.insert(name, chosen.scale);
                if site.is_some() {
                    self.found.int8.insert_factors(name, chosen.factors);
                }
            }
            if let Some(products) = self.products[*weight].take() {
                let compensation = products.factorize().ok_or_else(infinite)?;
                let (job, content) = (self.job, self.lowered.constants[*weight].unquantized());
                for (_, _, scheme) in job.matrices.iter().filter(|(of, ..)| of == weight) {
                    self.round(&compensation, *scheme, &content)?;
                }
            }
        }
        self.progress.advance(1);
        Ok(())
    }
}

impl Calibrating<'_> {
    /// Rounds a matrix and writes its codes and scales.
    fn round(&mut self, compensation: &rounding::Compensation, scheme: Scheme, content: &ConstRows) -> Result<()> {
        let mut scales = Vec::with_capacity(content.rows() * scheme.blocks(content.columns()));
        visit_rows(self.checkpoint, self.progress, content, &mut |weights| {
            let rounded = compensation.round(scheme, weights);
            let is_float = scheme == Scheme::FP8;
            let codes: Vec<u8> =
                rounded.codes.iter().map(|c| if is_float { scheme.bits(*c) } else { *c as i8 as u8 }).collect();
            scales.extend_from_slice(&rounded.scales);
            self.write(&codes)
        })?;
        let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        self.write(&scales)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.out {
            Some(out) => out.write_all(bytes).map_err(Error::io("write", self.path)),
            None => Err(Error::internal("weights are rounded", "a file for them")),
        }
    }
}

/// Evaluates a matrix and passes it on, [`EVALUATED_ROWS`] rows at a time.
fn visit_rows(
    checkpoint: &Checkpoint,
    progress: &dyn Progress,
    content: &ConstRows,
    visit: &mut dyn FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let columns = content.columns();
    for first in (0..content.rows()).step_by(EVALUATED_ROWS) {
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let rows = EVALUATED_ROWS.min(content.rows() - first);
        let mut weights = vec![0f32; rows * columns];
        let pieces = weights.par_chunks_mut(16 * columns).enumerate();
        pieces.try_for_each(|(index, out)| content.evaluate(checkpoint, first + 16 * index, out))?;
        visit(&weights)?;
    }
    Ok(())
}

impl Magnitudes {
    fn new() -> Magnitudes {
        Magnitudes { counts: vec![0; 1 << 15] }
    }

    fn add(&mut self, values: &[f32]) {
        values.iter().for_each(|value| self.counts[(value.to_bits() >> 16) as usize & 0x7fff] += 1);
    }

    /// The scale for E4M3 codes of these values: the largest of those tried whose squared error is close to the
    /// smallest. Values beyond 448 times the scale saturate. `None` if a value is not finite.
    fn scale(&self) -> Option<f32> {
        let seen: Vec<(f32, f64)> = (0u32..)
            .zip(&self.counts)
            .filter(|(_, count)| **count > 0)
            .map(|(bits, count)| (f32::from_bits(bits << 16), *count as f64))
            .collect();
        let largest = seen.last().map_or(0.0, |(value, _)| *value);
        if !largest.is_finite() {
            return None;
        }
        let whole = largest / F8_MAX;
        if whole < f32::MIN_POSITIVE * 16.0 {
            return Some(1.0);
        }
        let error = |scale: f32| {
            let of_value = |(value, count): &(f32, f64)| {
                let error = f64::from(round_f8(value / scale)) * f64::from(scale) - f64::from(*value);
                error * error * count
            };
            seen.iter().map(of_value).sum::<f64>()
        };
        let tried: Vec<(f32, f64)> = (0..SCALES)
            .map(|step| whole * LARGEST_SCALE * SCALE_STEP.powi(step))
            .map(|scale| (scale, error(scale)))
            .collect();
        let least = tried.iter().map(|(_, error)| *error).fold(f64::MAX, f64::min);
        tried.iter().find(|(_, error)| *error <= least * ACCEPTED_ERROR).map(|(scale, _)| *scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale_of(values: &[f32]) -> Option<f32> {
        let mut magnitudes = Magnitudes::new();
        magnitudes.add(values);
        magnitudes.scale()
    }

    #[test]
    fn scales_leave_room_where_it_costs_nothing_and_saturate_what_is_rare() {
        // E4M3 has the same relative error over fourteen binades, so room for larger inputs is nearly free.
        let ordinary: Vec<f32> = (1..1000).map(|i| i as f32 / 8.0).collect();
        let room = scale_of(&ordinary).unwrap() * F8_MAX / 124.875;
        assert!((1.5..=2.0).contains(&room), "{room}");
        // So many inputs lie where a scale for the largest one has no code but zero that it had better saturate.
        let mut magnitudes = Magnitudes::new();
        magnitudes.add(&[1.0]);
        magnitudes.counts[(2e-6f32.to_bits() >> 16) as usize] = 10_000_000_000_000;
        let room = magnitudes.scale().unwrap() * F8_MAX;
        assert!(room < 0.6, "{room}");
        assert_eq!(scale_of(&[0.0; 4]), Some(1.0));
        assert_eq!(scale_of(&[1.0, f32::NAN]), None);
        assert_eq!(scale_of(&[f32::INFINITY]), None);
    }
}
