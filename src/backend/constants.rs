//! What a graph's constants are: expressions over a checkpoint, evaluated a few rows at a time so that no weight is ever
//! whole in memory. Every backend packs what is read here.

use half::bf16;
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::{Const, Trig};
use crate::tensor::DType;

/// FP32 elements that one task evaluates at a time.
const TASK_ELEMENTS: usize = 1 << 20;

/// Evaluates rows of a constant from row `first` until `out`, `[rows, columns]`, is full. Codes come as numbers, not as
/// their bits: see [`Scheme::bits`](crate::quantize::Scheme::bits).
///
/// # Errors
/// [`Error::Format`] naming tensor and position if a weight is NaN or infinite.
pub fn read_rows(expr: &Const, checkpoint: &Checkpoint, first: usize, columns: usize, out: &mut [f32]) -> Result<()> {
    match expr {
        Const::Tensor(name) => {
            let view = checkpoint.tensor(name)?;
            view.read_f32(first * columns, out);
            if let Some(bad) = out.iter().position(|v| !v.is_finite()) {
                let (row, column) = (first + bad / columns, bad % columns);
                let detail = format!(
                    "tensor `{name}` has {} at row {row}, column {column}; the checkpoint is damaged",
                    out[bad]
                );
                return Err(Error::format(checkpoint.path(), detail));
            }
        }
        Const::AddScalar(inner, scalar) => {
            read_rows(inner, checkpoint, first, columns, out)?;
            out.iter_mut().for_each(|v| *v += scalar);
        }
        Const::Cast(inner, dtype) => {
            read_rows(inner, checkpoint, first, columns, out)?;
            match dtype {
                DType::BF16 => out.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
                DType::F16 => out.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
                DType::F32 | DType::I32 | DType::I8 | DType::I4 | DType::F8 => {}
            }
        }
        Const::Codes(matrix, scheme) => {
            read_rows(matrix, checkpoint, first, columns, out)?;
            let mut scales = vec![0f32; out.len() / columns * scheme.blocks(columns)];
            scheme.quantize(columns, out, &mut scales);
        }
        Const::Scales { matrix, scheme, columns: matrix_columns } => {
            let mut row = vec![0f32; *matrix_columns];
            for (i, scales) in out.chunks_exact_mut(columns).enumerate() {
                read_rows(matrix, checkpoint, first + i, *matrix_columns, &mut row)?;
                scheme.scales(&row, scales);
            }
        }
        Const::ConcatRows(parts) => {
            let mut part_first = 0;
            let mut done = 0;
            for part in parts {
                let part_rows = rows_of(part, checkpoint, columns)?;
                let from = first + done / columns;
                if from < part_first + part_rows && done < out.len() {
                    let end = out.len().min(done + (part_first + part_rows - from) * columns);
                    read_rows(part, checkpoint, from - part_first, columns, &mut out[done..end])?;
                    done = end;
                }
                part_first += part_rows;
            }
        }
        Const::RotaryTable { trig, theta, rotary_dim, .. } => {
            for (i, row) in out.chunks_exact_mut(columns).enumerate() {
                rotary_row(*trig, *theta, *rotary_dim, first + i, row);
            }
        }
    }
    Ok(())
}

/// A constant's rows, all of which are to be written.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'c> {
    /// What it is.
    pub expr: &'c Const,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub columns: usize,
}

/// Evaluates a constant's rows on all threads, a few at a time, and writes what `store` makes of them in order.
/// `store` gets the index of its first row, a multiple of `unit`, and whole rows; but for the last, multiples of `unit`.
///
/// # Errors
/// As [`read_rows`], and whatever `write` returns.
pub fn write_rows<T: bytemuck::Pod + Send>(
    matrix: Matrix<'_>,
    checkpoint: &Checkpoint,
    unit: usize,
    store: &(dyn Fn(usize, Vec<f32>) -> Vec<T> + Sync),
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let Matrix { expr, rows, columns } = matrix;
    let read_columns = match expr {
        Const::Scales { columns, .. } => *columns,
        _ => columns,
    };
    let rows_per_task = (TASK_ELEMENTS / read_columns.max(1)).next_multiple_of(unit).max(unit);
    let rows_per_batch = rows_per_task * rayon::current_num_threads();
    for batch in (0..rows).step_by(rows_per_batch) {
        let end = rows.min(batch + rows_per_batch);
        let pieces: Vec<Vec<T>> = (batch..end)
            .into_par_iter()
            .step_by(rows_per_task)
            .map(|first| {
                let count = end.min(first + rows_per_task) - first;
                let mut values = vec![0f32; count * columns];
                read_rows(expr, checkpoint, first, columns, &mut values)?;
                Ok(store(first, values))
            })
            .collect::<Result<_>>()?;
        for piece in pieces {
            write(bytemuck::cast_slice(&piece))?;
        }
    }
    Ok(())
}

/// How a file of tensors calls elements of a type: it has no 4-bit integers, so pairs of them are bytes there.
pub fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::I8 => Dtype::I8,
        DType::I4 => Dtype::U8,
        DType::F8 => Dtype::F8_E4M3,
    }
}

fn rows_of(expr: &Const, checkpoint: &Checkpoint, columns: usize) -> Result<usize> {
    Ok(match expr {
        Const::Tensor(name) => checkpoint.tensor(name)?.elements() / columns,
        Const::AddScalar(inner, _) | Const::Cast(inner, _) | Const::Codes(inner, _) => {
            rows_of(inner, checkpoint, columns)?
        }
        Const::Scales { matrix, columns, .. } => rows_of(matrix, checkpoint, *columns)?,
        Const::ConcatRows(parts) => parts.iter().map(|p| rows_of(p, checkpoint, columns)).sum::<Result<usize>>()?,
        Const::RotaryTable { positions, .. } => *positions,
    })
}

/// Cosine or sine of `position · theta^(−2i / rotary_dim)`: frequency and angle rounded to FP32 as transformers does,
/// the function itself evaluated in double precision.
fn rotary_row(trig: Trig, theta: f64, rotary_dim: usize, position: usize, out: &mut [f32]) {
    for (i, value) in out.iter_mut().enumerate() {
        let exponent = (2 * i) as f32 / rotary_dim as f32;
        let frequency = 1.0 / theta.powf(f64::from(exponent)) as f32;
        let angle = f64::from(position as f32 * frequency);
        *value = match trig {
            Trig::Cos => angle.cos(),
            Trig::Sin => angle.sin(),
        } as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotary_angles_follow_the_formula() {
        let (mut cos, mut sin) = ([0f32; 2], [0f32; 2]);
        rotary_row(Trig::Cos, 10000.0, 4, 3, &mut cos);
        rotary_row(Trig::Sin, 10000.0, 4, 3, &mut sin);
        assert_eq!(cos, [3f64.cos() as f32, 0.03f32.cos()]);
        assert_eq!(sin[0], 3f64.sin() as f32);
        assert!((sin[1] - 0.029_995_5).abs() < 1e-7);
    }
}
