//! Rounds weights so that a layer's *outputs* stay close, not each weight: GPTQ (Frantar et al., 2022) in the form of
//! LDLQ (Chee et al., 2023), which needs one factorization and no inverse.
//!
//! With inputs `x`, `H = Σ xᵀx` and errors `e = w − s·c` of a row's weights, the outputs' squared error is `e H eᵀ`. With
//! `H = R Rᵀ`, `R` upper triangular, it is `Σ_i (R_ii)² (e_i + Σ_{j<i} e_j R_ji / R_ii)²`. Columns are rounded in order;
//! each code is the nearest one to `w_i + Σ_{j<i} e_j R_ji / R_ii`, which makes its term least given the earlier ones.
//!
//! Sums have one order, whatever the instruction set and the number of threads: the codes depend on weights and inputs
//! alone.

use rayon::prelude::*;

use crate::isa::{Isa, dispatch};
use crate::quantize::Scheme;

/// Columns that compensate each other's errors. A wider matrix is rounded in runs of columns as if their inputs were
/// uncorrelated: products of 16,384 inputs would take 2 GiB and sixteen times the work of a run of 4,096.
const RUN_COLUMNS: usize = 4096;
/// Columns rounded between two matrix products; whole groups of 4-bit codes.
const BLOCK_COLUMNS: usize = 128;
/// Part of the mean diagonal element of `H` that is added to all of them, which bounds what little-used inputs may
/// compensate.
const DAMPING: f64 = 0.003;
/// Times that the damping is raised tenfold if a matrix cannot be factorized.
const DAMPING_STEPS: i32 = 4;
/// Rows and columns of sums that stay in registers.
const TILE: (usize, usize) = (6, 16);
/// Columns factorized at a time.
const FACTOR_COLUMNS: usize = 64;
/// Partial sums of a dot product. (The kernels here are compiled for AVX2 at most: with AVX-512 the compiler vectorizes
/// the long loop, with gathers, in place of the sums in registers.)
const LANES: usize = 16;

/// Inputs that are collected before their products are added up: the products of wide layers are far larger than any
/// cache, so they should be gone through seldom.
const PENDING_TOKENS: usize = 2048;
/// Tokens whose products are summed in FP32; the sums are added up in FP64.
const SUMMED_TOKENS: usize = 256;

/// Products of a layer's inputs, `Σ xᵀx` over tokens, for runs of columns.
pub struct InputProducts {
    columns: usize,
    runs: Vec<Run>,
    /// Inputs that are in no product yet, `[tokens, columns]`.
    pending: Vec<f32>,
}

/// Columns that compensate each other.
struct Run {
    first: usize,
    columns: usize,
    /// `[columns, columns]`, the lower triangle.
    products: Vec<f64>,
}

/// What the columns of a run owe to earlier ones: `R_ji / R_ii`, by blocks of columns `i`.
struct Factor {
    first: usize,
    columns: usize,
    /// Of each block `[earlier columns and its own, padded width]`.
    panels: Vec<Vec<f32>>,
    /// Mean square of each input, which weights the errors that a group's scale is chosen by.
    importance: Vec<f32>,
}

/// A matrix's codes and scales.
pub struct RoundedMatrix {
    /// `[rows, columns]`, as numbers.
    pub codes: Vec<f32>,
    /// `[rows, blocks]`
    pub scales: Vec<f32>,
}

/// Factorized products, for rounding matrices with these inputs.
pub struct Compensation {
    columns: usize,
    factors: Vec<Factor>,
}

/// Bytes of memory for the products and factors of layers with these widths, all at once.
pub fn memory_bytes(widths: impl Iterator<Item = usize>) -> u64 {
    let run = |columns: usize| (columns as u64).pow(2) * 8;
    let products = |columns: usize| {
        (0..columns).step_by(RUN_COLUMNS).map(|first| run(RUN_COLUMNS.min(columns - first))).sum::<u64>()
    };
    // Inputs wait twice, by columns and by runs; one run is copied for factorization, and factors take a quarter of the
    // bytes of products.
    let widths: Vec<usize> = widths.collect();
    let largest = widths.iter().copied().map(products).max().unwrap_or(0);
    let pending = widths.iter().map(|columns| (columns * PENDING_TOKENS * 4) as u64).sum::<u64>() * 2;
    widths.into_iter().map(products).sum::<u64>() + pending + run(RUN_COLUMNS) + largest / 4
}

impl InputProducts {
    /// No inputs yet, of `columns` numbers each.
    pub fn new(columns: usize) -> InputProducts {
        let run = |first: usize| {
            let width = RUN_COLUMNS.min(columns - first);
            Run { first, columns: width, products: vec![0.0; width * width] }
        };
        InputProducts { columns, runs: (0..columns).step_by(RUN_COLUMNS).map(run).collect(), pending: Vec::new() }
    }

    /// Adds the inputs of some tokens, `[tokens, columns]`.
    pub fn add(&mut self, inputs: &[f32]) {
        for some in inputs.chunks(PENDING_TOKENS * self.columns) {
            if self.pending.len() + some.len() > PENDING_TOKENS * self.columns {
                self.add_pending();
            }
            self.pending.extend_from_slice(some);
        }
    }

    fn add_pending(&mut self) {
        let (rows, cols) = TILE;
        let isa = Isa::detect();
        let inputs = std::mem::take(&mut self.pending);
        for Run { first, columns, products } in &mut self.runs {
            let columns = *columns;
            let padded = columns.next_multiple_of(rows * cols);
            let mut x = vec![0f32; inputs.len() / self.columns * padded];
            for (x, inputs) in x.chunks_exact_mut(padded).zip(inputs.chunks_exact(self.columns)) {
                x[..columns].copy_from_slice(&inputs[*first..*first + columns]);
            }
            products.par_chunks_mut(rows * columns).enumerate().for_each(|(index, products)| {
                let top = index * rows;
                for x in x.chunks(SUMMED_TOKENS * padded) {
                    for left in (0..(top + rows).min(columns)).step_by(cols) {
                        let mut sums = [[0f32; TILE.1]; TILE.0];
                        add_products(isa, x.len() / padded, &x[top..], padded, &x[left..], padded, &mut sums);
                        for (row, sums) in products.chunks_mut(columns).zip(&sums) {
                            row[left..].iter_mut().zip(sums).for_each(|(product, sum)| *product += f64::from(*sum));
                        }
                    }
                }
            });
        }
        self.pending = inputs;
        self.pending.clear();
    }

    /// The outputs' squared error over the tokens, `Σ_rows e H eᵀ`, for errors `[rows, columns]` of weights; of the
    /// weights themselves it is the outputs' square. Inputs of different runs count as uncorrelated.
    pub fn output_error(&mut self, errors: &[f32]) -> f64 {
        self.add_pending();
        let of_row = |row: &[f32]| -> f64 {
            let of_run = |run: &Run| -> f64 {
                let e = &row[run.first..run.first + run.columns];
                let term = |(i, products): (usize, &[f64])| {
                    let below: f64 = products[..i].iter().zip(e).map(|(p, e)| p * f64::from(*e)).sum();
                    f64::from(e[i]) * (2.0 * below + products[i] * f64::from(e[i]))
                };
                run.products.chunks_exact(run.columns).enumerate().map(term).sum()
            };
            self.runs.iter().map(of_run).sum()
        };
        let of_rows: Vec<f64> = errors.par_chunks_exact(self.columns).map(of_row).collect();
        of_rows.iter().sum()
    }

    /// Factorizes the products. `None` if they are not those of finite inputs.
    pub fn factorize(mut self) -> Option<Compensation> {
        self.add_pending();
        self.pending = Vec::new();
        let columns = self.columns;
        let factors = self.runs.into_iter().map(Run::factorize).collect::<Option<_>>()?;
        Some(Compensation { columns, factors })
    }
}

impl Run {
    fn factorize(self) -> Option<Factor> {
        let Run { first, columns: n, products } = self;
        let mean = (0..n).map(|i| products[i * n + i]).sum::<f64>() / n as f64;
        // Without any input every rounding is as good as another.
        let mean = if mean > 0.0 { mean } else { 1.0 };
        let lower = (0..=DAMPING_STEPS).find_map(|step| {
            // Reversed, so that the lower factor is `R` from its last row and column on.
            let mut matrix = vec![0f64; n * n];
            matrix.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
                let i = n - 1 - i;
                for (j, value) in row.iter_mut().enumerate().take(n - i) {
                    *value = products[(n - 1 - j) * n + i];
                }
                row[n - 1 - i] += DAMPING * 10f64.powi(step) * mean;
            });
            factorize(&mut matrix, n).then_some(matrix)
        })?;
        let mut panels = Vec::with_capacity(n.div_ceil(BLOCK_COLUMNS));
        for start in (0..n).step_by(BLOCK_COLUMNS) {
            let end = n.min(start + BLOCK_COLUMNS);
            let padded = (end - start).next_multiple_of(TILE.1);
            let mut panel = vec![0f32; end * padded];
            panel.par_chunks_exact_mut(padded).enumerate().for_each(|(j, row)| {
                for (i, value) in (start..end).zip(row).filter(|(i, _)| *i > j) {
                    let (of_j, of_i) = (n - 1 - j, n - 1 - i);
                    *value = (lower[of_j * n + of_i] / lower[of_i * n + of_i]) as f32;
                }
            });
            panels.push(panel);
        }
        let importance = (0..n).map(|i| (products[i * n + i] / mean + DAMPING) as f32).collect();
        Some(Factor { first, columns: n, panels, importance })
    }
}

impl Compensation {
    /// Rounds a matrix, `[rows, columns]`. `scheme`'s groups must divide [`BLOCK_COLUMNS`] or be whole rows.
    pub fn round(&self, scheme: Scheme, weights: &[f32]) -> RoundedMatrix {
        let columns = self.columns;
        let blocks = scheme.blocks(columns);
        let rows = weights.len() / columns;
        let mut codes = vec![0f32; rows * columns];
        let mut scales = vec![0f32; rows * blocks];
        let chunks = codes.par_chunks_mut(TILE.0 * columns).zip(scales.par_chunks_mut(TILE.0 * blocks));
        chunks.zip(weights.par_chunks(TILE.0 * columns)).for_each(|((codes, scales), weights)| {
            if scheme.block().is_none() {
                for (row, scale) in weights.chunks_exact(columns).zip(scales.iter_mut()) {
                    scheme.scales(row, std::slice::from_mut(scale));
                }
            }
            for factor in &self.factors {
                factor.round(scheme, columns, weights, codes, scales);
            }
        });
        RoundedMatrix { codes, scales }
    }
}

impl Factor {
    /// Rounds this run's columns of at most [`TILE`] rows.
    fn round(&self, scheme: Scheme, columns: usize, weights: &[f32], codes: &mut [f32], scales: &mut [f32]) {
        let isa = Isa::detect();
        let blocks = scheme.blocks(columns);
        let mut errors = vec![[0f32; TILE.0]; self.columns];
        for (block, panel) in self.panels.iter().enumerate() {
            let start = block * BLOCK_COLUMNS;
            let end = self.columns.min(start + BLOCK_COLUMNS);
            let padded = panel.len() / end;
            let mut owed = [[0f32; BLOCK_COLUMNS]; TILE.0];
            for left in (0..padded).step_by(TILE.1) {
                let mut sums = [[0f32; TILE.1]; TILE.0];
                add_products(isa, start, errors.as_flattened(), TILE.0, &panel[left..], padded, &mut sums);
                for (owed, sums) in owed.iter_mut().zip(&sums) {
                    owed[left..left + TILE.1].copy_from_slice(sums);
                }
            }
            let at = self.first + start;
            for (row, (weights, codes)) in
                weights.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)).enumerate()
            {
                let (weights, codes) = (&weights[at..at + end - start], &mut codes[at..at + end - start]);
                let owed = &mut owed[row][..padded];
                let group = scheme.block().unwrap_or(columns);
                let scales = &mut scales[row * blocks..(row + 1) * blocks];
                if scheme.block().is_some() {
                    let wanted: Vec<f32> = weights.iter().zip(&*owed).map(|(w, owed)| w + owed).collect();
                    let of_groups = &mut scales[at / group..(at + end - start).div_ceil(group)];
                    scheme.weighted_scales(&wanted, &self.importance[start..end], of_groups);
                }
                let mut of_row = [0f32; BLOCK_COLUMNS];
                let block = &panel[start * padded..];
                round_in_order(isa, scheme, (&scales[at / group..], group), weights, block, owed, codes, &mut of_row);
                errors[start..end].iter_mut().zip(of_row).for_each(|(errors, error)| errors[row] = error);
            }
        }
    }
}

dispatch! {
    /// `sums[r][c] += Σ_k a[k, r] · b[k, c]`, in the order of `k`; rows of `a` and `b` are `a_stride` and `b_stride` apart.
    fn add_products[](
        count: usize, a: &[f32], a_stride: usize, b: &[f32], b_stride: usize, sums: &mut [[f32; TILE.1]; TILE.0]
    ) {
        avx2 => add_products_body,
        portable => add_products_body,
    }
}

#[inline(always)]
fn add_products_body(
    count: usize,
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    b_stride: usize,
    sums: &mut [[f32; TILE.1]; TILE.0],
) {
    let mut kept = *sums;
    for (a, b) in a.chunks(a_stride).zip(b.chunks(b_stride)).take(count) {
        let (Some(a), Some(b)) = (a.first_chunk::<{ TILE.0 }>(), b.first_chunk::<{ TILE.1 }>()) else { return };
        for (sums, a) in kept.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
    }
    *sums = kept;
}

dispatch! {
    /// Rounds a row's weights of one block from left to right; each one's error is owed by those to its right. `panel` is
    /// `[weights, owed.len()]`, `scales` are those of `group` weights each.
    fn round_in_order[](
        scheme: Scheme, scales: (&[f32], usize), weights: &[f32], panel: &[f32], owed: &mut [f32], codes: &mut [f32],
        errors: &mut [f32]
    ) {
        avx2 => round_in_order_body,
        portable => round_in_order_body,
    }
}

#[inline(always)]
fn round_in_order_body(
    scheme: Scheme,
    (scales, group): (&[f32], usize),
    weights: &[f32],
    panel: &[f32],
    owed: &mut [f32],
    codes: &mut [f32],
    errors: &mut [f32],
) {
    let padded = owed.len();
    for (i, weight) in weights.iter().enumerate() {
        let scale = scales[i / group];
        let code = scheme.nearest(weight + owed[i], scale);
        let error = weight - code * scale;
        (codes[i], errors[i]) = (code, error);
        // Zero up to the weight itself; whole rows are quicker than ragged ones.
        for (owed, part) in owed.iter_mut().zip(&panel[i * padded..(i + 1) * padded]) {
            *owed += error * part;
        }
    }
}

/// Factorizes `A = L Lᵀ` in place: the lower triangle of `matrix`, `[n, n]`, becomes `L`. Returns false if `A` is not
/// positive definite.
fn factorize(matrix: &mut [f64], n: usize) -> bool {
    let isa = Isa::detect();
    for start in (0..n).step_by(FACTOR_COLUMNS) {
        let end = n.min(start + FACTOR_COLUMNS);
        let (above, below) = matrix.split_at_mut(end * n);
        let diagonal = &mut above[start * n..];
        // Columns to the left are done: their part is taken off, then the block is factorized by itself.
        let done: Vec<f64> = diagonal.chunks_exact(n).flat_map(|row| &row[..start]).copied().collect();
        diagonal.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
            let (left, rest) = row.split_at_mut(start);
            for (j, value) in rest[..=i].iter_mut().enumerate() {
                *value -= dot(isa, left, &done[j * start..(j + 1) * start]);
            }
        });
        for i in 0..end - start {
            for j in 0..=i {
                let sum: f64 = (0..j).map(|p| diagonal[i * n + start + p] * diagonal[j * n + start + p]).sum();
                let value = diagonal[i * n + start + j] - sum;
                diagonal[i * n + start + j] = if i > j {
                    value / diagonal[j * n + start + j]
                } else if value.is_finite() && value > 0.0 {
                    value.sqrt()
                } else {
                    return false;
                };
            }
        }
        let diagonal = &*diagonal;
        below.par_chunks_exact_mut(n).for_each(|row| {
            let (left, rest) = row.split_at_mut(start);
            for j in 0..end - start {
                let of_left = dot(isa, left, &done[j * start..(j + 1) * start]);
                let of_block: f64 = (0..j).map(|p| rest[p] * diagonal[j * n + start + p]).sum();
                rest[j] = (rest[j] - of_left - of_block) / diagonal[j * n + start + j];
            }
        });
    }
    true
}

dispatch! {
    /// Dot product of vectors of equal length.
    fn dot[](a: &[f64], b: &[f64]) -> f64 {
        avx2 => dot_body,
        portable => dot_body,
    }
}

#[inline(always)]
fn dot_body(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0f64; LANES];
    let (a_groups, a_rest) = a.as_chunks::<LANES>();
    let (b_groups, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_groups.iter().zip(b_groups) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests;
