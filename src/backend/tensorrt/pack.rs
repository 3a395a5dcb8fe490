//! Writes the weights of a TensorRT plan as its products read them. No more than one matrix of 8-bit codes is in memory
//! at a time, and of everything else a few rows.

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use super::weights::{Layout, Weight};
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
            _ => return Err(unexpected(weight, "4-bit codes come in pairs, and it has an odd number of outputs")),
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
        _ => return Err(unexpected(weight, "codes are stored as the transpose of a matrix")),
    };
    let blocks = scheme.blocks(columns);
    let mut scales = vec![0f32; rows * blocks];
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
    if weight.dtype == DType::I4 {
        write_transposed(&codes, columns, &mut |tile| {
            let pairs: Vec<u8> = tile.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4).collect();
            write(&pairs)
        })?;
    } else {
        write_transposed(&codes, columns, write)?;
    }
    Ok(scales)
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
        (Layout::Spread { block, unit }, [units, _]) => {
            let of_unit = |i: usize| scales.chunks_exact(blocks).filter_map(move |row| row.get(i * unit / block));
            (0..*units).flat_map(of_unit).copied().collect()
        }
        _ => return Err(unexpected(weight, "its scales are stored in no known way")),
    };
    match weight.dtype {
        DType::F32 => write(bytemuck::cast_slice(&spread)),
        DType::BF16 => write(bytemuck::cast_slice(&narrowed(spread, bf16::from_f32))),
        _ => Err(unexpected(weight, "scales are f32 or bf16")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::quantize::f8_value;
    use crate::tensor_file::TensorFile;

    const NAME: &str = "model.layers.0.mlp.down_proj.weight"; // [192, 768]
    const ROWS: usize = 192;
    const COLUMNS: usize = 768;

    fn checkpoint() -> Checkpoint {
        Checkpoint::open(Path::new("tests/data/tiny-chat")).unwrap()
    }

    fn packed(weights: &[Weight]) -> (tempfile::TempDir, TensorFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let mut bytes = Vec::new();
        let mut write = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        pack(weights, &checkpoint(), &mut write).unwrap();
        assert!(bytes.len() as u64 <= packed_bytes(weights));
        std::fs::write(&path, bytes).unwrap();
        let file = TensorFile::open(&path).unwrap();
        (folder, file)
    }

    fn weight(name: &str, dtype: DType, shape: &[usize], expr: Const, layout: Layout) -> Weight {
        Weight { name: name.into(), dtype, shape: shape.to_vec(), expr, layout, in_plan: false }
    }

    fn original() -> Vec<f32> {
        let mut rows = vec![0f32; ROWS * COLUMNS];
        read_rows(&Const::Tensor(NAME.into()), &checkpoint(), 0, COLUMNS, &mut rows).unwrap();
        rows
    }

    /// What the codes of a scheme stand for, row by row, whichever way they are stored.
    fn expected(scheme: Scheme) -> Vec<f32> {
        let (mut rows, mut scales) = (original(), vec![0f32; ROWS * scheme.blocks(COLUMNS)]);
        scheme.quantize(COLUMNS, &mut rows, &mut scales);
        let block = scheme.block().unwrap_or(COLUMNS);
        let scale = |i: usize| scales[i / COLUMNS * scheme.blocks(COLUMNS) + i % COLUMNS / block];
        rows.iter().enumerate().map(|(i, code)| code * scale(i)).collect()
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn codes_of_eight_bits_are_stored_by_columns() {
        let matrix = Box::new(Const::Tensor(NAME.into()));
        for scheme in [Scheme::INT8, Scheme::FP8] {
            let codes = Const::Codes(matrix.clone(), scheme);
            let scales = Const::Scales { matrix: matrix.clone(), scheme, columns: COLUMNS };
            let (_folder, file) = packed(&[
                weight("codes", scheme.dtype(), &[COLUMNS, ROWS], codes, Layout::Transposed),
                weight("scales", DType::F32, &[ROWS], scales, Layout::Rows),
            ]);
            let (codes, scales) = (file.tensor("codes").unwrap(), floats(file.tensor("scales").unwrap().1));
            assert_eq!(codes.0.shape, [COLUMNS, ROWS]);
            let number = |bits: u8| if scheme == Scheme::INT8 { f32::from(bits as i8) } else { f8_value(bits) };
            let restored = |i: usize| number(codes.1[i % COLUMNS * ROWS + i / COLUMNS]) * scales[i / COLUMNS];
            for (i, expected) in expected(scheme).into_iter().enumerate() {
                assert_eq!(restored(i), expected, "{scheme}, weight {i}");
            }
        }
    }

    #[test]
    fn codes_of_four_bits_are_pairs_with_spread_scales() {
        let scheme = Scheme::INT4;
        let matrix = Box::new(Const::Tensor(NAME.into()));
        let codes = Const::Codes(matrix.clone(), scheme);
        let scales = Const::Scales { matrix, scheme, columns: COLUMNS };
        for unit in [64, 128] {
            let layout = Layout::Spread { block: 128, unit };
            let (_folder, file) = packed(&[
                weight("codes", DType::I4, &[COLUMNS, ROWS], codes.clone(), Layout::Transposed),
                weight("scales", DType::BF16, &[COLUMNS / unit, ROWS], scales.clone(), layout),
            ]);
            let ((stored, codes), (_, scales)) = (file.tensor("codes").unwrap(), file.tensor("scales").unwrap());
            assert_eq!(stored.shape, [COLUMNS, ROWS / 2]);
            let scale = |i: usize| bf16::from_le_bytes([scales[2 * i], scales[2 * i + 1]]).to_f32();
            let code = |i: usize| f32::from((codes[i / 2] << (4 * (1 - i % 2))) as i8 >> 4);
            for (i, expected) in expected(scheme).into_iter().enumerate() {
                let (row, column) = (i / COLUMNS, i % COLUMNS);
                let restored = code(column * ROWS + row) * scale(column / unit * ROWS + row);
                assert_eq!(restored, expected, "unit {unit}, weight {i}");
            }
        }
    }

    #[test]
    fn scales_without_their_codes_are_computed() {
        let scheme = Scheme::INT8;
        let scales = Const::Scales { matrix: Box::new(Const::Tensor(NAME.into())), scheme, columns: COLUMNS };
        let (_folder, file) = packed(&[weight("scales", DType::F32, &[ROWS], scales, Layout::Rows)]);
        let (mut rows, mut scales) = (original(), vec![0f32; ROWS]);
        scheme.quantize(COLUMNS, &mut rows, &mut scales);
        assert_eq!(floats(file.tensor("scales").unwrap().1), scales);
    }

    #[test]
    fn an_odd_number_of_four_bit_codes_is_refused() {
        let codes = Const::Codes(Box::new(Const::Tensor(NAME.into())), Scheme::INT4);
        let weight = weight("codes", DType::I4, &[3, 5], codes, Layout::Transposed);
        let error = pack(&[weight], &checkpoint(), &mut |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("codes") && error.contains("pairs"), "{error}");
    }
}
