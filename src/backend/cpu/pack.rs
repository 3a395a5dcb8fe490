//! Storage of a plan's constants in the layout that the kernels read.

use half::bf16;

use super::lower::LoweredProgram;
use super::program::{Storage, WeightSpec};
use crate::backend::constants::stored_dtype;
use crate::backend::packing::PackItem;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Order of the weights in their file: packed panels in order of use (whole cache lines, so all of them stay aligned),
/// then tables, FP32 before BF16.
pub fn file_order(weights: &[WeightSpec]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|i| match weights[*i].storage {
        Storage::Packed { .. } => (false, std::cmp::Reverse(0)),
        Storage::RowMajor => (true, std::cmp::Reverse(weights[*i].dtype.bytes())),
    });
    order
}

/// Items of the plan's safetensors file, for [`packing`](crate::backend::packing) to write.
pub fn items(lowered: &LoweredProgram) -> Vec<PackItem<'_>> {
    let item = |index: usize| {
        let (spec, content) = (&lowered.program.weights[index], &lowered.constants[index]);
        PackItem {
            name: &spec.name,
            stored: (stored_dtype(spec.dtype), spec.stored_shape()),
            content,
            unit: spec.unit_rows(),
            store: Box::new(move |rows| store(spec, rows)),
            finish: None,
        }
    };
    file_order(&lowered.program.weights).into_iter().map(item).collect()
}

/// Upper bound, close to exact, on that file's size in bytes, header included.
pub fn packed_bytes(weights: &[WeightSpec]) -> u64 {
    let data: u64 = weights.iter().filter_map(|w| w.stored_bytes()).map(|b| b as u64).sum();
    data + 128 * weights.len() as u64
}

/// Encodes rows of a weight as stored; codes come as numbers.
fn store(spec: &WeightSpec, rows: &[f32]) -> Result<Vec<u8>> {
    match (spec.storage, spec.dtype) {
        (Storage::Packed { packing, operand }, _) => Ok(packing.pack(operand, rows, spec.columns)),
        (Storage::RowMajor, DType::F32) => Ok(bytemuck::cast_slice(rows).to_vec()),
        (Storage::RowMajor, DType::BF16) => {
            let stored: Vec<bf16> = rows.iter().map(|value| bf16::from_f32(*value)).collect();
            Ok(bytemuck::cast_slice(&stored).to_vec())
        }
        (Storage::RowMajor, dtype) => {
            Err(Error::internal(format!("table `{}` of {dtype}", spec.name), "a table of f32 or bf16"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::kernels::linear::{self, Operand};
    use crate::isa::CpuFeatures;

    #[test]
    fn panels_come_first_so_they_stay_aligned() {
        let spec = |storage, dtype| WeightSpec { name: "w".into(), storage, dtype, rows: 3, columns: 5 };
        let packing = linear::choose(DType::BF16, DType::BF16, CpuFeatures::PORTABLE).unwrap();
        let packed = Storage::Packed { packing, operand: Operand::Weight };
        let weights =
            [spec(Storage::RowMajor, DType::BF16), spec(Storage::RowMajor, DType::F32), spec(packed, DType::BF16)];
        assert_eq!(file_order(&weights), [2, 1, 0]);
        assert!(weights[2].stored_bytes().unwrap().is_multiple_of(64));
    }
}
