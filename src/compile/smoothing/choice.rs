//! Chooses a layer's factors, and the scale of its divided inputs, by an estimate of the outputs' squared error.
//!
//! Factors are `f_j = a_j^strength / w_j^(1 − strength)`, with the largest magnitudes of channel `j` of the inputs, `a_j`,
//! and of the weights, `w_j`; the more, the more of the inputs' range goes into the weights. Inputs `x` become
//! `y = x / f`, rounded by one scale, and weights `v = w · f`, rounded by one scale for each output. If errors of rounding
//! are uncorrelated, the outputs' error over the tokens is
//! `Σ_j |v_j|² Σ_t (y_tj − round(y_tj))² + Σ_j |y_j|² Σ_o step_o² / 12`: the inputs' part is computed on a sample of
//! tokens, for each strength and scale tried, and the weights' part takes their errors to be uniform in a step.
//!
//! The largest magnitudes are those of every second token, and the sample is of the others: factors that fit the very
//! tokens they are measured on would promise that nothing else exceeds them.

use half::bf16;
use rayon::prelude::*;

use crate::error::Result;
use crate::isa::{Isa, dispatch};
use crate::quantize::round_i8;

/// Strengths tried, beside leaving the inputs as they are.
pub const STRENGTHS: [f32; 4] = [0.35, 0.5, 0.65, 0.8];
/// Tokens whose inputs are kept, evenly spread over all.
const SAMPLED_TOKENS: usize = 1024;
/// Scales are tried from this many times the one that represents the largest input seen.
const LARGEST_SCALE: f32 = 2.0;
/// Each scale tried is smaller by this factor, the eighth root of one half.
const SCALE_STEP: f32 = 0.917_004;
/// Number of scales tried; the smallest represents a quarter of the largest input.
const SCALES: i32 = 25;
/// An error this much larger than the smallest is accepted for a larger scale, which saturates later.
const ACCEPTED_ERROR: f64 = 1.01;
/// Channels of inputs or weights count as at least this part of the largest one.
const SMALLEST_PART: f32 = 1e-5;
/// Partial sums of an error.
const LANES: usize = 16;

/// Inputs of a layer on calibration prompts: the largest of each column of some tokens, and a sample of others.
pub struct LayerInputs {
    columns: usize,
    /// Bits of the largest magnitudes, which compare as those do.
    largest: Vec<u32>,
    /// `[sampled, columns]`; the inputs of layers are BF16 already.
    sample: Vec<bf16>,
    /// Tokens so far.
    seen: usize,
    /// Tokens from one of the sample to the next, an even number.
    stride: usize,
    is_finite: bool,
}

/// The choice for a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Smoothing {
    /// A factor for each channel, around one.
    pub factors: Vec<f32>,
    /// The strength they come from; `None`: all are one.
    pub strength: Option<f32>,
    /// Scale of the inputs' codes, after the division.
    pub scale: f32,
}

/// Passes the rows of a weight, `[some rows, columns]` at a time, to a function.
pub type VisitRows<'v> = dyn FnMut(&mut dyn FnMut(&[f32])) -> Result<()> + 'v;

/// Memory for the inputs of a layer with so many columns, while they are collected and used.
pub fn memory_bytes(columns: usize) -> u64 {
    (columns * (2 * SAMPLED_TOKENS + 64)) as u64
}

impl LayerInputs {
    /// None yet; `tokens` are to come, of `columns` inputs each.
    pub fn new(columns: usize, tokens: usize) -> LayerInputs {
        let stride = tokens.div_ceil(SAMPLED_TOKENS).next_multiple_of(2).max(2);
        LayerInputs { columns, largest: vec![0; columns], sample: Vec::new(), seen: 0, stride, is_finite: true }
    }

    /// Adds the inputs of some tokens, `[tokens, columns]`.
    pub fn add(&mut self, inputs: &[f32]) {
        for row in inputs.chunks_exact(self.columns) {
            if self.seen.is_multiple_of(2) {
                for (largest, x) in self.largest.iter_mut().zip(row) {
                    *largest = (*largest).max(x.to_bits() & 0x7fff_ffff);
                }
            } else if self.seen % self.stride == 1 {
                self.sample.extend(row.iter().map(|x| bf16::from_f32(*x)));
            }
            self.is_finite &= row.iter().all(|x| x.is_finite());
            self.seen += 1;
        }
    }

    /// Chooses among `strengths` and no factors at all. `channels` has the channel of each column. `None` if an input is
    /// not finite.
    ///
    /// # Errors
    /// Those of `weights`.
    pub fn choose(
        &self,
        channels: &[usize],
        strengths: &[f32],
        weights: &mut VisitRows<'_>,
    ) -> Result<Option<Smoothing>> {
        let columns = self.columns;
        let largest: Vec<f32> = self.largest.iter().map(|bits| f32::from_bits(*bits)).collect();
        let channel_count = channels.iter().max().map_or(0, |most| most + 1);
        if !self.is_finite {
            return Ok(None);
        }
        let (mut of_columns, mut squares) = (vec![0f32; columns], vec![0f64; columns]);
        weights(&mut |rows| {
            for row in rows.chunks_exact(columns) {
                for ((most, square), w) in of_columns.iter_mut().zip(&mut squares).zip(row) {
                    *most = most.max(w.abs());
                    *square += f64::from(*w) * f64::from(*w);
                }
            }
        })?;
        let of_channels = |of_columns: &[f32]| {
            let mut most = vec![0f32; channel_count];
            channels.iter().zip(of_columns).for_each(|(channel, x)| most[*channel] = most[*channel].max(*x));
            let floor = most.iter().fold(f32::MIN_POSITIVE, |a, b| a.max(*b)) * SMALLEST_PART;
            most.iter().map(|x| x.max(floor.max(f32::MIN_POSITIVE))).collect::<Vec<f32>>()
        };
        let (of_inputs, of_weights) = (of_channels(&largest), of_channels(&of_columns));
        let mut tried: Vec<Smoothing> =
            vec![Smoothing { factors: vec![1.0; channel_count], strength: None, scale: 1.0 }];
        tried.extend(strengths.iter().map(|strength| {
            let factors = factors(&of_inputs, &of_weights, *strength);
            Smoothing { factors, strength: Some(*strength), scale: 1.0 }
        }));

        let spread: Vec<Vec<f32>> =
            tried.iter().map(|tried| channels.iter().map(|channel| tried.factors[*channel]).collect()).collect();
        let mut steps = vec![0f64; tried.len()];
        weights(&mut |rows| {
            for (squares, factors) in steps.iter_mut().zip(&spread) {
                for row in rows.chunks_exact(columns) {
                    let most = row.iter().zip(factors).fold(0f32, |most, (w, f)| most.max((w * f).abs()));
                    *squares += (f64::from(most) / 127.0).powi(2);
                }
            }
        })?;
        let powers = self.powers();
        let (mut best, mut least) = (None, f64::MAX);
        for ((mut tried, factors), steps) in tried.into_iter().zip(&spread).zip(steps) {
            let (scale, of_inputs) = self.scale(&largest, factors, &squares);
            let of_weights: f64 = powers.iter().zip(factors).map(|(x, f)| x / f64::from(*f).powi(2)).sum();
            let error = of_inputs + of_weights * steps / 12.0;
            if error < least || best.is_none() {
                tried.scale = scale;
                (best, least) = (Some(tried), error);
            }
        }
        Ok(best)
    }

    /// Sum of squares of each column of the sample.
    fn powers(&self) -> Vec<f64> {
        let mut powers = vec![0f64; self.columns];
        for row in self.sample.chunks_exact(self.columns) {
            powers.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.to_f32()).powi(2));
        }
        powers
    }

    /// The scale of inputs divided by `factors`, and the error of the outputs that it causes: the largest of those tried
    /// whose error is close to the smallest. `squares` are those of the weights' columns.
    fn scale(&self, largest: &[f32], factors: &[f32], squares: &[f64]) -> (f32, f64) {
        let whole = largest.iter().zip(factors).fold(0f32, |most, (x, f)| most.max(x / f)) / 127.0;
        if whole < f32::MIN_POSITIVE * 16.0 {
            return (1.0, 0.0);
        }
        let importance: Vec<f64> =
            squares.iter().zip(factors).map(|(square, f)| square * f64::from(*f).powi(2)).collect();
        let most = importance.iter().fold(f64::MIN_POSITIVE, |most, part| most.max(*part));
        // As parts of the largest, so that no product over- or underflows.
        let parts: Vec<f32> = importance.iter().map(|part| (part / most) as f32).collect();
        let error = |scale: f32| {
            let inverses: Vec<f32> = factors.iter().map(|f| 1.0 / (f * scale)).collect();
            let isa = Isa::detect();
            let of_rows = self.sample.chunks_exact(self.columns);
            let sum: f64 = of_rows.map(|row| f64::from(rounding_error(isa, row, &inverses, &parts))).sum();
            sum * most * f64::from(scale).powi(2)
        };
        let tried: Vec<(f32, f64)> = (0..SCALES)
            .into_par_iter()
            .map(|step| whole * LARGEST_SCALE * SCALE_STEP.powi(step))
            .map(|scale| (scale, error(scale)))
            .collect();
        let least = tried.iter().fold(f64::MAX, |least, (_, error)| least.min(*error));
        tried.into_iter().find(|(_, error)| *error <= least * ACCEPTED_ERROR).unwrap_or((whole, f64::MAX))
    }
}

/// The factors of a strength, divided by their geometric mean.
fn factors(of_inputs: &[f32], of_weights: &[f32], strength: f32) -> Vec<f32> {
    let logarithm = |(a, w): (&f32, &f32)| f64::from(strength * a.ln() - (1.0 - strength) * w.ln());
    let logarithms: Vec<f64> = of_inputs.iter().zip(of_weights).map(logarithm).collect();
    let mean = logarithms.iter().sum::<f64>() / logarithms.len().max(1) as f64;
    logarithms.into_iter().map(|logarithm| (logarithm - mean).exp() as f32).collect()
}

dispatch! {
    /// `Σ_j parts[j] (y − round(y))²` with `y = x[j] · inverses[j]`: the error of a row, in steps.
    fn rounding_error[](x: &[bf16], inverses: &[f32], parts: &[f32]) -> f32 {
        avx512 => rounding_error_body,
        avx2 => rounding_error_body,
        portable => rounding_error_body,
    }
}

#[inline(always)]
fn rounding_error_body(x: &[bf16], inverses: &[f32], parts: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    for ((x, inverses), parts) in x.chunks(LANES).zip(inverses.chunks(LANES)).zip(parts.chunks(LANES)) {
        for (((sum, x), inverse), part) in sums.iter_mut().zip(x).zip(inverses).zip(parts) {
            let y = f32::from_bits(u32::from(x.to_bits()) << 16) * inverse;
            let error = y - round_i8(y);
            *sum += part * error * error;
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: usize = 48;
    const ROWS: usize = 20;

    /// Inputs with one channel far larger than the others, and weights.
    fn layer() -> (LayerInputs, Vec<f32>, Vec<f32>) {
        let value = |i: usize| ((i * 7919 + 13) % 2003) as f32 / 1000.0 - 1.0;
        let mut inputs: Vec<f32> = (0..200 * COLUMNS).map(value).collect();
        inputs.iter_mut().skip(5).step_by(COLUMNS).for_each(|x| *x *= 60.0);
        inputs.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        let weights = (0..ROWS * COLUMNS).map(|i| value(i * 31 + 5)).collect();
        let mut layer = LayerInputs::new(COLUMNS, 200);
        layer.add(&inputs);
        (layer, inputs, weights)
    }

    /// Squared error of the outputs with rounded inputs and weights.
    fn error(inputs: &[f32], weights: &[f32], chosen: &Smoothing, channels: &[usize]) -> f64 {
        let f = |i: usize| chosen.factors[channels[i % COLUMNS]];
        let x: Vec<f32> =
            inputs.iter().enumerate().map(|(i, x)| round_i8(x / f(i) / chosen.scale) * chosen.scale * f(i)).collect();
        let mut w: Vec<f32> = weights.iter().enumerate().map(|(i, w)| w * f(i)).collect();
        let mut scales = [0f32; ROWS];
        crate::quantize::Scheme::INT8.quantize(COLUMNS, &mut w, &mut scales);
        let w: Vec<f32> = w.iter().enumerate().map(|(i, w)| w * scales[i / COLUMNS] / f(i)).collect();
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        let mut total = 0.0;
        for (exact, x) in inputs.chunks(COLUMNS).zip(x.chunks(COLUMNS)) {
            for (wanted, w) in weights.chunks(COLUMNS).zip(w.chunks(COLUMNS)) {
                total += (dot(x, w) - dot(exact, wanted)).powi(2);
            }
        }
        total
    }

    fn choose(layer: &LayerInputs, channels: &[usize], strengths: &[f32], weights: &[f32]) -> Smoothing {
        let mut visit = |f: &mut dyn FnMut(&[f32])| {
            weights.chunks(7 * COLUMNS).for_each(f);
            Ok(())
        };
        layer.choose(channels, strengths, &mut visit).unwrap().unwrap()
    }

    #[test]
    fn a_large_channel_is_evened_out() {
        let (layer, inputs, weights) = layer();
        let channels: Vec<usize> = (0..COLUMNS).collect();
        let plain = choose(&layer, &channels, &[], &weights);
        assert_eq!((plain.strength, &plain.factors), (None, &vec![1.0; COLUMNS]));
        let smooth = choose(&layer, &channels, &STRENGTHS, &weights);
        assert!(smooth.strength.is_some());
        let largest = smooth.factors.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        assert_eq!(largest.0, 5);
        let (plain, smooth) =
            (error(&inputs, &weights, &plain, &channels), error(&inputs, &weights, &smooth, &channels));
        assert!(smooth < 0.2 * plain, "{smooth} of {plain}");
    }

    #[test]
    fn columns_of_a_channel_share_its_factor() {
        let (layer, _, weights) = layer();
        let channels: Vec<usize> = (0..COLUMNS).map(|column| column / 24 * 12 + column % 12).collect();
        let smooth = choose(&layer, &channels, &STRENGTHS, &weights);
        assert_eq!(smooth.factors.len(), 24);
        let largest = smooth.factors.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        assert_eq!(largest.0, 5, "columns 5 and 17");
    }

    #[test]
    fn nothing_and_infinity_are_no_ranges() {
        let weights = vec![0.5f32; ROWS * COLUMNS];
        let channels: Vec<usize> = (0..COLUMNS).collect();
        let mut layer = LayerInputs::new(COLUMNS, 1);
        layer.add(&[0.0; COLUMNS]);
        let chosen = choose(&layer, &channels, &STRENGTHS, &weights);
        assert!(chosen.scale == 1.0 && chosen.factors.iter().all(|f| f.is_finite() && *f > 0.0), "{chosen:?}");
        layer.add(&[f32::NAN; COLUMNS]);
        let chosen = layer.choose(&channels, &STRENGTHS, &mut |_| Ok(())).unwrap();
        assert_eq!(chosen, None);
    }

    /// What is far beyond all else saturates, if it is rare.
    #[test]
    fn a_single_outlier_saturates() {
        let (_, mut inputs, weights) = layer();
        inputs.iter_mut().skip(5).step_by(COLUMNS).for_each(|x| *x /= 60.0);
        let even = |inputs: &[f32]| {
            let mut layer = LayerInputs::new(COLUMNS, 200);
            layer.add(inputs);
            choose(&layer, &(0..COLUMNS).collect::<Vec<_>>(), &[], &weights).scale
        };
        let before = even(&inputs);
        inputs[100] = 1.3;
        let after = even(&inputs);
        assert!((before * 127.0 - 1.0).abs() < 0.05 && after < 1.2 / 127.0, "{before} {after}");
    }
}
