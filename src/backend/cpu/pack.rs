//! Evaluates a plan's constants from the checkpoint and writes them as the kernels read them, a few panels at a time:
//! no weight is ever whole in memory.

use rayon::prelude::*;

use half::bf16;
use safetensors::tensor::Dtype;

use super::kernels::Element;
use super::kernels::matmul::{PANEL, Weight, pack_panel};
use super::kernels::quantized::pack_codes;
use super::lower::Lowered;
use super::program::{Layout, WeightSpec};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::{Const, Trig};
use crate::tensor::DType;
use crate::tensor_file;

/// FP32 elements that one task evaluates at a time.
const TASK_ELEMENTS: usize = 1 << 20;

/// Order of the weights in their file: panels first (whole cache lines, so all of them stay aligned), then FP32,
/// then BF16.
pub fn file_order(weights: &[WeightSpec]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|i| (weights[*i].layout == Layout::Table, std::cmp::Reverse(weights[*i].dtype.bytes())));
    order
}

/// Writes the safetensors file of a plan's weights.
///
/// `write` gets the file's bytes in order; `progress` gets the number of bytes after each piece.
///
/// # Errors
/// Whatever `write` returns; [`Error::Format`] naming tensor and position if a weight is NaN or infinite.
pub fn pack(
    lowered: &Lowered,
    checkpoint: &Checkpoint,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let weights = &lowered.program.weights;
    let order = file_order(weights);
    let header: Vec<(&str, Dtype, Vec<usize>)> = order
        .iter()
        .map(|i| (weights[*i].name.as_str(), stored_dtype(weights[*i].dtype), weights[*i].stored_shape()))
        .collect();
    let header = tensor_file::encode_header(&header)?;
    write(&header)?;
    progress(header.len() as u64);
    for index in order {
        let (spec, expr) = (&weights[index], &lowered.constants[index]);
        match spec.dtype {
            DType::BF16 => pack_weight(spec, expr, checkpoint, store_floats::<bf16>, write, progress)?,
            dtype if dtype.is_code() => pack_weight(spec, expr, checkpoint, store_codes, write, progress)?,
            _ => pack_weight(spec, expr, checkpoint, store_floats::<f32>, write, progress)?,
        }
    }
    Ok(())
}

/// Bytes that [`pack`] writes, header included.
pub fn packed_bytes(weights: &[WeightSpec]) -> u64 {
    let data: u64 = weights.iter().filter_map(|w| w.stored_bytes()).map(|b| b as u64).sum();
    data + 128 * weights.len() as u64
}

/// How the weights file calls elements of a type: it has no 4-bit integers, so pairs of them are bytes there.
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

fn pack_weight<T: bytemuck::Pod + Send>(
    spec: &WeightSpec,
    expr: &Const,
    checkpoint: &Checkpoint,
    store: fn(&WeightSpec, &Const, Vec<f32>) -> Vec<T>,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let unit = if spec.layout == Layout::Panels { PANEL } else { 1 };
    let read_columns = match expr {
        Const::Scales { columns, .. } => *columns,
        _ => spec.columns,
    };
    let rows_per_task = (TASK_ELEMENTS / read_columns.max(1)).next_multiple_of(unit).max(unit);
    let rows_per_batch = rows_per_task * rayon::current_num_threads();
    for batch in (0..spec.rows).step_by(rows_per_batch) {
        let end = spec.rows.min(batch + rows_per_batch);
        let pieces: Vec<Vec<T>> = (batch..end)
            .into_par_iter()
            .step_by(rows_per_task)
            .map(|first| {
                let count = end.min(first + rows_per_task) - first;
                let mut rows = vec![0f32; count * spec.columns];
                read_rows(expr, checkpoint, first, spec.columns, &mut rows)?;
                Ok(store(spec, expr, rows))
            })
            .collect::<Result<_>>()?;
        for piece in pieces {
            let bytes: &[u8] = bytemuck::cast_slice(&piece);
            write(bytes)?;
            progress(bytes.len() as u64);
        }
    }
    Ok(())
}

/// Rows of a weight as stored: row-major or in panels.
fn store_floats<T: Weight + Element>(spec: &WeightSpec, _: &Const, rows: Vec<f32>) -> Vec<T> {
    match spec.layout {
        Layout::Table => rows.into_iter().map(T::from_f32).collect(),
        Layout::Panels => {
            let mut packed = vec![T::zeroed(); (rows.len() / spec.columns).div_ceil(PANEL) * spec.panel_elements()];
            for (rows, panel) in rows.chunks(PANEL * spec.columns).zip(packed.chunks_mut(spec.panel_elements())) {
                pack_panel(rows, spec.columns, panel);
            }
            packed
        }
    }
}

/// Rows of codes as stored, in panels.
fn store_codes(spec: &WeightSpec, expr: &Const, rows: Vec<f32>) -> Vec<u8> {
    let codes: Vec<u8> = match expr {
        Const::Codes(_, scheme) => rows.into_iter().map(|code| scheme.bits(code)).collect(),
        _ => Vec::new(), // no other constant has codes
    };
    let mut packed = vec![0; (codes.len() / spec.columns).div_ceil(PANEL) * spec.panel_elements()];
    for (rows, panel) in codes.chunks(PANEL * spec.columns).zip(packed.chunks_mut(spec.panel_elements())) {
        pack_codes(spec.dtype, rows, spec.columns, panel);
    }
    packed
}

/// Evaluates rows of a constant from row `first` until `out`, `[rows, columns]`, is full.
fn read_rows(expr: &Const, checkpoint: &Checkpoint, first: usize, columns: usize, out: &mut [f32]) -> Result<()> {
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
            let mut scales = vec![0f32; scheme.blocks(columns)];
            for row in out.chunks_exact_mut(columns) {
                scheme.scales(row, &mut scales);
                scheme.codes(row, &scales);
            }
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

    #[test]
    fn panels_come_first_so_they_stay_aligned() {
        let spec = |layout, dtype| WeightSpec { name: "w".into(), layout, dtype, rows: 3, columns: 5 };
        let weights =
            [spec(Layout::Table, DType::BF16), spec(Layout::Table, DType::F32), spec(Layout::Panels, DType::BF16)];
        assert_eq!(file_order(&weights), [2, 1, 0]);
        assert!(weights[2].stored_bytes().unwrap().is_multiple_of(64));
    }
}
