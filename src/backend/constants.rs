//! What a graph's constants are: expressions over a checkpoint, evaluated a few rows at a time so that no weight is ever
//! whole in memory. Every backend packs what is read here.

use std::borrow::Cow;

use half::bf16;
use safetensors::tensor::Dtype;

use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{Error, Result};
use crate::graph::{Const, Trig};
use crate::tensor::DType;

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
            check_finite(&view, checkpoint, first, columns, out)?;
        }
        Const::AddScalar(inner, scalar) => {
            read_rows(inner, checkpoint, first, columns, out)?;
            out.iter_mut().for_each(|v| *v += scalar);
        }
        Const::Cast(inner, dtype) => {
            read_rows(inner, checkpoint, first, columns, out)?;
            round(out, *dtype);
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

fn round(values: &mut [f32], dtype: DType) {
    match dtype {
        DType::BF16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        DType::F16 => values.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
        DType::F32 | DType::I32 | DType::I8 | DType::I4 | DType::F8 => {}
    }
}

/// Refuses `values`, rows of a tensor from row `first`, if one of them is no number.
///
/// # Errors
/// [`Error::Format`] naming tensor and position.
pub(super) fn check_finite(
    view: &TensorView<'_>,
    checkpoint: &Checkpoint,
    first: usize,
    columns: usize,
    values: &[f32],
) -> Result<()> {
    // Without a branch for each element, so that it is done by vectors.
    const EXPONENT: u32 = 0x7f80_0000;
    if !values.iter().fold(false, |any, value| any | (value.to_bits() & EXPONENT == EXPONENT)) {
        return Ok(());
    }
    let Some(bad) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
    let (row, column) = (first + bad / columns, bad % columns);
    let (name, value) = (view.name, values[bad]);
    let detail = format!("tensor `{name}` has {value} at row {row}, column {column}; the checkpoint is damaged");
    Err(Error::format(checkpoint.path(), detail))
}

/// The tensors that make up a matrix, one above the other; `None` if it is not made of tensors alone.
pub(super) fn leaves<'c>(matrix: &Const, checkpoint: &'c Checkpoint) -> Result<Option<Vec<TensorView<'c>>>> {
    match matrix {
        Const::Tensor(name) => Ok(Some(vec![checkpoint.tensor(name)?])),
        Const::ConcatRows(parts) => {
            let of_part = |part: &Const| match part {
                Const::Tensor(name) => checkpoint.tensor(name).map(Some),
                _ => Ok(None),
            };
            parts.iter().map(of_part).collect()
        }
        _ => Ok(None),
    }
}

/// What `expr` makes of rows of `inner`, a part of it. Codes and scales are not made here.
pub(super) fn evaluate<'v>(expr: &Const, inner: &Const, rows: &'v [f32]) -> Cow<'v, [f32]> {
    match expr {
        _ if expr == inner => Cow::Borrowed(rows),
        Const::AddScalar(of, scalar) => {
            let mut values = evaluate(of, inner, rows).into_owned();
            values.iter_mut().for_each(|value| *value += scalar);
            Cow::Owned(values)
        }
        Const::Cast(of, dtype) => {
            let mut values = evaluate(of, inner, rows).into_owned();
            round(&mut values, *dtype);
            Cow::Owned(values)
        }
        _ => Cow::Borrowed(rows),
    }
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
