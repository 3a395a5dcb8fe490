//! Writes the weights of a TensorRT plan as its products read them. No more than one matrix of 8-bit codes is in memory
//! at a time, and of everything else a few rows.

use std::sync::Mutex;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use super::lower::{Layout, Weight};
use crate::backend::constants::{Matrix, read_rows, stored_dtype, write_rows};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::graph::Const;
use crate::quantize::Scheme;
use crate::tensor::DType;
use crate::tensor_file;

/// Codes that one task makes at a time.
const TASK_CODES: usize = 1 << 20;
/// Columns of a transposed matrix that are gathered at a time: the bytes of a cache line.
const TILE: usize = 64;

/// Writes the safetensors file of a plan's weights, in their order. 4-bit integers are stored as bytes, two in each, the
/// first in the low half.
///
/// `write` gets the file's bytes in order.
///
/// # Errors
/// Whatever `write` returns; [`Error::Format`] naming tensor and position if a weight is NaN or infinite.
pub fn pack(weights: &[Weight], checkpoint: &Checkpoint, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let header =
        weights.iter().map(|weight| Ok((weight.name.as_str(), stored_dtype(weight.dtype), stored_shape(weight)?)));
    write(&tensor_file::encode_header(&header.collect::<Result<Vec<_>>>()?)?)?;
    // The scales of the matrix whose codes were written last: found with them, and next in order.
    let mut scales: Option<(&Const, Vec<f32>)> = None;
    for weight in weights {
        match &weight.expr {
            Const::Codes(matrix, scheme) => {
                scales = Some((matrix, write_codes(weight, matrix, *scheme, checkpoint, write)?));
            }
            Const::Scales { matrix, scheme, columns } => {
                let found = match scales.take() {
                    Some((of, found)) if *of == **matrix => found,
                    _ => {
                        let blocks = scheme.blocks(*columns);
                        let rows = weight.shape.first().copied().unwrap_or_default();
                        let mut found = vec![0f32; rows * blocks];
                        read_rows(&weight.expr, checkpoint, 0, blocks, &mut found)?;
                        found
                    }
                };
                write_scales(weight, &found, scheme.blocks(*columns), write)?;
            }
            expr => {
                let (rows, columns) = matrix_of(&weight.shape);
                let matrix = Matrix { expr, rows, columns };
                match weight.dtype {
                    DType::F32 => write_rows(matrix, checkpoint, 1, &|_, rows| rows, write)?,
                    DType::BF16 => write_rows(matrix, checkpoint, 1, &|_, rows| narrowed(rows, bf16::from_f32), write)?,
                    DType::F16 => write_rows(matrix, checkpoint, 1, &|_, rows| narrowed(rows, f16::from_f32), write)?,
                    DType::I32 | DType::I8 | DType::I4 | DType::F8 => {
                        return Err(unexpected(weight, "no expression of that type is known"));
                    }
                }
            }
        }
    }
    Ok(())
}

/// Bytes that [`pack`] writes, header included, or a little more.
pub fn packed_bytes(weights: &[Weight]) -> u64 {
    weights.iter().map(|weight| weight.bytes() + 256).sum()
}

/// Shape and element type of a weight in its file.
pub fn stored(weight: &Weight) -> Result<(Dtype, Vec<usize>)> {
    Ok((stored_dtype(weight.dtype), stored_shape(weight)?))
}

fn stored_shape(weight: &Weight) -> Result<Vec<usize>> {
    let mut shape = weight.shape.clone();
    if weight.dtype == DType::I4 {
        match shape.last_mut() {
            Some(columns) if columns.is_multiple_of(2) => *columns /= 2,
            _ => return Err(unexpected(weight, "4-bit codes come in pairs, and its rows have an odd number of them")),
        }
    }
    Ok(shape)
}

fn unexpected(weight: &Weight, detail: &str) -> Error {
    let (dtype, shape) = (weight.dtype, &weight.shape);
    Error::Graph { op: "const".into(), name: weight.name.clone(), detail: format!("{dtype}{shape:?}: {detail}") }
}

/// Rows and columns; a vector is one row.
fn matrix_of(shape: &[usize]) -> (usize, usize) {
    match shape {
        [rows, columns] => (*rows, *columns),
        other => (1, other.iter().product()),
    }
}

fn narrowed<T>(rows: Vec<f32>, narrow: fn(f32) -> T) -> Vec<T> {
    rows.into_iter().map(narrow).collect()
}

/// Writes a matrix's codes and returns its scales, `[rows, blocks]`.
fn write_codes(
    weight: &Weight,
    matrix: &Const,
    scheme: Scheme,
    checkpoint: &Checkpoint,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Vec<f32>> {
    let (rows, columns) = match (weight.layout, &weight.shape[..]) {
        (Layout::Transposed, [columns, rows]) => (*rows, *columns),
        (Layout::Rows, [rows, columns]) => (*rows, *columns),
        _ => return Err(unexpected(weight, "codes are rows of a matrix, or its transpose")),
    };
    let blocks = scheme.blocks(columns);
    let mut scales = vec![0f32; rows * blocks];
    if weight.layout == Layout::Transposed {
        let mut codes = vec![0u8; rows * columns];
        let rows_per_task = (TASK_CODES / columns).max(1);
        codes
            .par_chunks_mut(rows_per_task * columns)
            .zip(scales.par_chunks_mut(rows_per_task * blocks))
            .enumerate()
            .try_for_each(|(task, (codes, scales))| {
                let mut values = vec![0f32; codes.len()];
                read_rows(matrix, checkpoint, task * rows_per_task, columns, &mut values)?;
                scheme.quantize(columns, &mut values, scales);
                codes.iter_mut().zip(values).for_each(|(code, value)| *code = scheme.bits(value));
                Ok::<(), Error>(())
            })?;
        write_transposed(&codes, columns, write)?;
        return Ok(scales);
    }
    let found = Mutex::new(&mut scales);
    let store = |first: usize, mut values: Vec<f32>| {
        let mut scales = vec![0f32; values.len() / columns * blocks];
        scheme.quantize(columns, &mut values, &mut scales);
        // A thread that holds this does nothing that can fail.
        if let Ok(mut found) = found.lock() {
            found[first * blocks..][..scales.len()].copy_from_slice(&scales);
        }
        match weight.dtype {
            DType::I4 => values.chunks(2).map(|pair| pair_of_codes(scheme, pair)).collect(),
            _ => values.into_iter().map(|value| scheme.bits(value)).collect::<Vec<u8>>(),
        }
    };
    write_rows(Matrix { expr: matrix, rows, columns }, checkpoint, 1, &store, write)?;
    Ok(scales)
}

fn pair_of_codes(scheme: Scheme, pair: &[f32]) -> u8 {
    let bits = |index: usize| pair.get(index).map_or(0, |code| scheme.bits(*code));
    bits(0) | bits(1) << 4
}

/// Writes `[rows, columns]` as `[columns, rows]`.
fn write_transposed(codes: &[u8], columns: usize, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let rows = codes.len() / columns;
    let mut tile = vec![0u8; TILE * rows];
    for first in (0..columns).step_by(TILE) {
        let width = TILE.min(columns - first);
        let tile = &mut tile[..width * rows];
        // A column at a time; the cache lines it reads a byte of stay in the cache for its neighbours.
        tile.par_chunks_mut(rows).enumerate().for_each(|(column, out)| {
            let column = &codes[first + column..];
            out.iter_mut().zip(column.iter().step_by(columns)).for_each(|(out, code)| *out = *code);
        });
        write(tile)?;
    }
    Ok(())
}

/// Writes `[rows, blocks]` scales in the type and as often as the plan wants them.
fn write_scales(
    weight: &Weight,
    scales: &[f32],
    blocks: usize,
    write: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let spread: Vec<f32> = match (weight.layout, &weight.shape[..]) {
        (Layout::Rows, _) => scales.to_vec(),
        (Layout::Spread { block, unit }, [_, units]) => {
            let of_row =
                |row: &[f32]| -> Vec<f32> { (0..*units).filter_map(|i| row.get(i * unit / block)).copied().collect() };
            scales.chunks_exact(blocks).flat_map(of_row).collect()
        }
        _ => return Err(unexpected(weight, "its scales are stored in no known way")),
    };
    match weight.dtype {
        DType::F32 => write(bytemuck::cast_slice(&spread)),
        DType::BF16 => write(bytemuck::cast_slice(&narrowed(spread, bf16::from_f32))),
        _ => Err(unexpected(weight, "scales are f32 or bf16")),
    }
}
