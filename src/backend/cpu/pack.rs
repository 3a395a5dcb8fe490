//! How a plan's constants are stored: as the kernels read them.

use half::bf16;

use super::kernels::Element;
use super::kernels::matmul::{PANEL, Weight, pack_panel};
use super::kernels::quantized::pack_codes;
use super::lower::Lowered;
use super::program::{Layout, WeightSpec};
use crate::backend::constants::{RowForm, stored_dtype};
use crate::backend::packing::{Item, StoreRows};
use crate::error::Error;
use crate::quantize::Scheme;
use crate::tensor::DType;

/// Order of the weights in their file: panels in the order of use (whole cache lines, so all of them stay aligned), then
/// tables, FP32 before BF16.
pub fn file_order(weights: &[WeightSpec]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|i| match weights[*i].layout {
        Layout::Panels => (false, std::cmp::Reverse(0)),
        Layout::Table => (true, std::cmp::Reverse(weights[*i].dtype.bytes())),
    });
    order
}

/// The safetensors file of a plan's weights, for [`packing`](crate::backend::packing) to write.
pub fn items(lowered: &Lowered) -> Vec<Item<'_>> {
    let item = |index: usize| {
        let (spec, content) = (&lowered.program.weights[index], &lowered.constants[index]);
        let store: StoreRows<'_> = match (content.form(), spec.dtype) {
            (RowForm::Codes(scheme), _) => Box::new(move |rows| Ok(store_codes(spec, scheme, rows))),
            (_, DType::BF16) => Box::new(move |rows| Ok(store_floats::<bf16>(spec, rows))),
            (_, DType::F32) => Box::new(move |rows| Ok(store_floats::<f32>(spec, rows))),
            (form, dtype) => Box::new(move |_| {
                let found = format!("weight `{}` is {dtype} and holds {form:?}", spec.name);
                Err(Error::internal(found, "codes, or values or scales of f32 or bf16"))
            }),
        };
        Item {
            name: &spec.name,
            stored: (stored_dtype(spec.dtype), spec.stored_shape()),
            content,
            unit: if spec.layout == Layout::Panels { PANEL } else { 1 },
            store,
            finish: None,
        }
    };
    file_order(&lowered.program.weights).into_iter().map(item).collect()
}

/// Bytes of that file, header included, or a little more.
pub fn packed_bytes(weights: &[WeightSpec]) -> u64 {
    let data: u64 = weights.iter().filter_map(|w| w.stored_bytes()).map(|b| b as u64).sum();
    data + 128 * weights.len() as u64
}

/// Rows of a weight as stored: row-major or in panels.
fn store_floats<T: Weight + Element>(spec: &WeightSpec, rows: &[f32]) -> Vec<u8> {
    let stored: Vec<T> = match spec.layout {
        Layout::Table => rows.iter().map(|value| T::from_f32(*value)).collect(),
        Layout::Panels => {
            let mut packed = vec![T::zeroed(); (rows.len() / spec.columns).div_ceil(PANEL) * spec.panel_elements()];
            for (rows, panel) in rows.chunks(PANEL * spec.columns).zip(packed.chunks_mut(spec.panel_elements())) {
                pack_panel(rows, spec.columns, panel);
            }
            packed
        }
    };
    bytemuck::cast_slice(&stored).to_vec()
}

/// Rows of codes as stored, in panels.
fn store_codes(spec: &WeightSpec, scheme: Scheme, rows: &[f32]) -> Vec<u8> {
    let codes: Vec<u8> = rows.iter().map(|code| scheme.bits(*code)).collect();
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
