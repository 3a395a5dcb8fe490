//! Packing of a TensorRT plan's weights in the layout its GEMMs read. At most one matrix of 8-bit codes, and a few rows
//! of anything else, is in memory at a time.

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use super::weights::{PlanWeight, WeightLayout};
use crate::backend::constants::{RowForm, RowSource, stored_dtype};
use crate::backend::packing::{PackItem, StoreAll, StoreRows};
use crate::checkpoint::EMBEDDING;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Columns transposed at a time: as many bytes as a cache line has.
const TILE: usize = 64;

/// Lists the tensors of the weights file, for [`packing`](crate::backend::packing) to write: matrices in order of use,
/// the embedding last, as in CPU plans. 4-bit codes are packed two per byte, the first in the low half.
///
/// # Errors
/// [`Error::Graph`] for a weight that is stored in no known way.
pub fn items(weights: &[PlanWeight]) -> Result<Vec<PackItem<'_>>> {
    let mut order: Vec<&PlanWeight> = weights.iter().collect();
    order.sort_by_key(|weight| is_table(weight));
    order.into_iter().map(item).collect()
}

/// Returns true for the embedding, which is the first weight of a network.
fn is_table(weight: &PlanWeight) -> bool {
    matches!(weight.content.source(), RowSource::Tensors(names) if names == &[EMBEDDING])
}

fn item(weight: &PlanWeight) -> Result<PackItem<'_>> {
    let stored = (stored_dtype(weight.dtype), stored_shape(weight)?);
    let (content, columns) = (&weight.content, weight.content.columns());
    let fits = match (weight.layout, &weight.shape[..]) {
        (WeightLayout::Rows, shape) => shape.iter().product::<usize>() == content.elements(),
        (WeightLayout::Transposed, shape) => shape == [columns, content.rows()],
        (WeightLayout::Spread { .. }, [_, rows]) => *rows == content.rows(),
        (WeightLayout::Spread { .. }, _) => false,
    };
    if !fits {
        let found = format!("weight `{}` has shape {:?} as {:?}", weight.name, weight.shape, weight.layout);
        return Err(Error::internal(found, format!("a shape for {} rows of {}", content.rows(), content.width())));
    }
    let mut finish: Option<StoreAll> = None;
    let store: StoreRows<'_> = match (content.form(), weight.layout) {
        (RowForm::Codes(scheme), WeightLayout::Transposed) => {
            let is_pairs = weight.dtype == DType::I4;
            finish = Some(Box::new(move |codes, write| match is_pairs {
                true => write_transposed(codes, columns, &mut |tile| {
                    let pairs: Vec<u8> = tile.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4).collect();
                    write(&pairs)
                }),
                false => write_transposed(codes, columns, write),
            }));
            Box::new(move |codes| Ok(codes.iter().map(|code| scheme.bits(*code)).collect()))
        }
        (RowForm::Codes(scheme), WeightLayout::Rows) if weight.dtype != DType::I4 => {
            Box::new(move |codes| Ok(codes.iter().map(|code| scheme.bits(*code)).collect()))
        }
        (RowForm::Codes(_), WeightLayout::Rows | WeightLayout::Spread { .. }) => {
            return Err(unexpected(weight, "codes are stored as a matrix, those of 4 bits as its transpose"));
        }
        (RowForm::Scales(_), WeightLayout::Rows | WeightLayout::Spread { .. }) => {
            Box::new(move |scales| stored_scales(weight, scales, content.width()))
        }
        (RowForm::Values, WeightLayout::Rows) => match weight.dtype {
            DType::F32 => Box::new(|rows| Ok(bytemuck::cast_slice(rows).to_vec())),
            DType::BF16 => Box::new(|rows| Ok(narrowed(rows, bf16::from_f32))),
            DType::F16 => Box::new(|rows| Ok(narrowed(rows, f16::from_f32))),
            DType::I32 | DType::I8 | DType::I4 | DType::F8 | DType::Bool => {
                return Err(unexpected(weight, "values are stored as f32, bf16 or f16"));
            }
        },
        (RowForm::Scales(_) | RowForm::Values, WeightLayout::Transposed)
        | (RowForm::Values, WeightLayout::Spread { .. }) => {
            return Err(unexpected(weight, "only codes are stored as a transpose, and only scales are spread"));
        }
    };
    Ok(PackItem { name: weight.name.as_str(), stored, content, unit: 1, store, finish })
}

/// Upper estimate of the size of the weights file, header included.
pub fn packed_bytes(weights: &[PlanWeight]) -> u64 {
    weights.iter().map(|weight| weight.bytes() + 256).sum()
}

/// Element type and shape of a weight in the weights file.
pub fn stored(weight: &PlanWeight) -> Result<(Dtype, Vec<usize>)> {
    Ok((stored_dtype(weight.dtype), stored_shape(weight)?))
}

fn stored_shape(weight: &PlanWeight) -> Result<Vec<usize>> {
    let mut shape = weight.shape.clone();
    if weight.dtype == DType::I4 {
        match shape.last_mut() {
            Some(columns) if columns.is_multiple_of(2) => *columns /= 2,
            _ => {
                return Err(unexpected(weight, "4-bit codes are stored in pairs, but it has an odd number of outputs"));
            }
        }
    }
    Ok(shape)
}

fn unexpected(weight: &PlanWeight, detail: &str) -> Error {
    let (dtype, shape) = (weight.dtype, &weight.shape);
    Error::Graph { op: "const".into(), name: weight.name.clone(), detail: format!("{dtype}{shape:?}: {detail}") }
}

fn narrowed<T: bytemuck::Pod>(rows: &[f32], narrow: fn(f32) -> T) -> Vec<u8> {
    bytemuck::cast_slice(&rows.iter().map(|value| narrow(*value)).collect::<Vec<T>>()).to_vec()
}

/// Writes the transpose, `[columns, rows]`, of `[rows, columns]` codes.
pub(super) fn write_transposed(codes: &[u8], columns: usize, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let rows = codes.len() / columns;
    let mut tile = vec![0u8; TILE * rows];
    for first in (0..columns).step_by(TILE) {
        let width = TILE.min(columns - first);
        let tile = &mut tile[..width * rows];
        // Reads one byte of a cache line per row; the lines stay cached for the neighbouring columns of the tile.
        tile.par_chunks_mut(rows).enumerate().for_each(|(column, out)| {
            let column = &codes[first + column..];
            out.iter_mut().zip(column.iter().step_by(columns)).for_each(|(out, code)| *out = *code);
        });
        write(tile)?;
    }
    Ok(())
}

/// Converts `[rows, blocks]` scales to the plan's type and layout, repeating them for [`WeightLayout::Spread`].
fn stored_scales(weight: &PlanWeight, scales: &[f32], blocks: usize) -> Result<Vec<u8>> {
    let spread: Vec<f32> = match (weight.layout, &weight.shape[..]) {
        (WeightLayout::Rows, _) => scales.to_vec(),
        (WeightLayout::Spread { block, unit }, [units, _]) => {
            let of_unit = |i: usize| scales.chunks_exact(blocks).filter_map(move |row| row.get(i * unit / block));
            (0..*units).flat_map(of_unit).copied().collect()
        }
        _ => return Err(unexpected(weight, "scales cannot be stored in this layout")),
    };
    match weight.dtype {
        DType::F32 => Ok(bytemuck::cast_slice(&spread).to_vec()),
        DType::BF16 => Ok(narrowed(&spread, bf16::from_f32)),
        _ => Err(unexpected(weight, "scales are f32 or bf16")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backend::constants::ConstRows;
    use crate::backend::packing;
    use crate::checkpoint::Checkpoint;
    use crate::graph::{Const, Dim, Type};
    use crate::quantize::{Scheme, f8_value};
    use crate::tensor_file::TensorFile;

    const NAME: &str = "model.layers.0.mlp.down_proj.weight"; // [192, 768]
    const ROWS: usize = 192;
    const COLUMNS: usize = 768;

    fn checkpoint() -> Checkpoint {
        Checkpoint::open(Path::new("tests/data/tiny-chat")).unwrap()
    }

    fn packed(weights: &[PlanWeight]) -> (tempfile::TempDir, TensorFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        let mut bytes = Vec::new();
        let mut sink = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        let file = packing::File { items: items(weights).unwrap(), sink: &mut sink };
        packing::pack(vec![file], &checkpoint(), false, &|_| Ok(())).unwrap();
        assert!(bytes.len() as u64 <= packed_bytes(weights));
        std::fs::write(&path, bytes).unwrap();
        let file = TensorFile::open(&path).unwrap();
        (folder, file)
    }

    fn weight(name: &str, dtype: DType, shape: &[usize], content: ConstRows, layout: WeightLayout) -> PlanWeight {
        PlanWeight { name: name.into(), dtype, shape: shape.to_vec(), content, layout, in_plan: false }
    }

    fn plain(expr: &Const, width: usize) -> ConstRows {
        ConstRows::new(expr, &Type::new(DType::F32, [Dim::fixed(ROWS), Dim::fixed(width)])).unwrap()
    }

    /// The codes and the scales of the matrix.
    fn quantized(scheme: Scheme) -> (ConstRows, ConstRows) {
        let matrix = Box::new(Const::Tensor(NAME.into()));
        let codes = Const::Codes(matrix.clone(), scheme);
        let scales = Const::Scales { matrix, scheme, columns: COLUMNS };
        (plain(&codes, COLUMNS), plain(&scales, scheme.blocks(COLUMNS)))
    }

    fn original() -> Vec<f32> {
        let mut rows = vec![0f32; ROWS * COLUMNS];
        plain(&Const::Tensor(NAME.into()), COLUMNS).evaluate(&checkpoint(), 0, &mut rows).unwrap();
        rows
    }

    /// The dequantized weights of a scheme, row-major, independent of the stored layout.
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
        for scheme in [Scheme::INT8, Scheme::FP8] {
            let (codes, scales) = quantized(scheme);
            let (_folder, file) = packed(&[
                weight("codes", scheme.dtype(), &[COLUMNS, ROWS], codes, WeightLayout::Transposed),
                weight("scales", DType::F32, &[ROWS], scales, WeightLayout::Rows),
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
        let (codes, scales) = quantized(scheme);
        for unit in [64, 128] {
            let layout = WeightLayout::Spread { block: 128, unit };
            let (_folder, file) = packed(&[
                weight("codes", DType::I4, &[COLUMNS, ROWS], codes.clone(), WeightLayout::Transposed),
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
        let (_, scales) = quantized(scheme);
        let (_folder, file) = packed(&[weight("scales", DType::F32, &[ROWS], scales, WeightLayout::Rows)]);
        let (mut rows, mut scales) = (original(), vec![0f32; ROWS]);
        scheme.quantize(COLUMNS, &mut rows, &mut scales);
        assert_eq!(floats(file.tensor("scales").unwrap().1), scales);
    }

    #[test]
    fn a_shape_that_does_not_fit_the_content_is_an_internal_error() {
        let (codes, scales) = quantized(Scheme::INT4);
        for weight in [
            weight("codes", DType::I4, &[ROWS, COLUMNS], codes, WeightLayout::Transposed),
            weight("scales", DType::F32, &[ROWS], scales.clone(), WeightLayout::Rows),
            weight("scales", DType::F32, &[12, COLUMNS], scales, WeightLayout::Spread { block: 128, unit: 64 }),
        ] {
            let error = items(std::slice::from_ref(&weight)).map(|_| ()).unwrap_err();
            assert!(matches!(error, Error::Internal { .. }) && error.to_string().contains(&weight.name), "{error}");
        }
    }

    #[test]
    fn an_odd_number_of_four_bit_codes_is_refused() {
        let (codes, _) = quantized(Scheme::INT4);
        let weight = weight("codes", DType::I4, &[3, 5], codes, WeightLayout::Transposed);
        let error = items(&[weight]).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("codes") && error.contains("pairs"), "{error}");
    }
}
