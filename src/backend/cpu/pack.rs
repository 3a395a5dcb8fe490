//! Writes a plan's constants as the kernels read them, a few panels at a time: no weight is ever whole in memory.

use half::bf16;
use safetensors::tensor::Dtype;

use super::kernels::Element;
use super::kernels::matmul::{PANEL, Weight, pack_panel};
use super::kernels::quantized::pack_codes;
use super::lower::Lowered;
use super::program::{Layout, WeightSpec};
use crate::backend::constants::{Matrix, stored_dtype, write_rows};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::graph::Const;
use crate::tensor::DType;
use crate::tensor_file;

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
/// Whatever `write` returns; [`Error::Format`](crate::Error::Format) naming tensor and position if a weight is NaN or infinite.
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

fn pack_weight<T: bytemuck::Pod + Send>(
    spec: &WeightSpec,
    expr: &Const,
    checkpoint: &Checkpoint,
    store: fn(&WeightSpec, &Const, Vec<f32>) -> Vec<T>,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let unit = if spec.layout == Layout::Panels { PANEL } else { 1 };
    let matrix = Matrix { expr, rows: spec.rows, columns: spec.columns };
    write_rows(matrix, checkpoint, unit, &|_, rows| store(spec, expr, rows), &mut |bytes| {
        write(bytes)?;
        progress(bytes.len() as u64);
        Ok(())
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_come_first_so_they_stay_aligned() {
        let spec = |layout, dtype| WeightSpec { name: "w".into(), layout, dtype, rows: 3, columns: 5 };
        let weights =
            [spec(Layout::Table, DType::BF16), spec(Layout::Table, DType::F32), spec(Layout::Panels, DType::BF16)];
        assert_eq!(file_order(&weights), [2, 1, 0]);
        assert!(weights[2].stored_bytes().unwrap().is_multiple_of(64));
    }
}
