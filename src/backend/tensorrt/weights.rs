//! The weights of a plan: content, storage layout, and whether they are inputs of the plan or embedded in it.

use std::sync::Arc;

use crate::backend::constants::ConstRows;
use crate::tensor::DType;
use crate::tensor_file::TensorFile;

/// A weight of a plan, as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanWeight {
    /// Name of the network input, and of the tensor in the weights file.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Source of the content, row by row.
    pub content: ConstRows,
    /// Storage layout.
    pub layout: WeightLayout,
    /// Embedded in the plan as a constant instead of bound as an input.
    pub in_plan: bool,
}

impl PlanWeight {
    /// A row-major weight that is bound as an input.
    pub(super) fn rows(name: &str, dtype: DType, shape: Vec<usize>, content: ConstRows) -> PlanWeight {
        PlanWeight { name: name.into(), dtype, shape, content, layout: WeightLayout::Rows, in_plan: false }
    }

    /// Returns true if the constant of the plan is the transpose of what the weights file holds.
    pub fn is_staged(&self) -> bool {
        self.in_plan && self.dtype == DType::F8 && self.layout == WeightLayout::Transposed
    }

    /// Shape of the plan's input or constant: that of the weights file, except that E4M3 codes are `[out, in]` as a
    /// constant.
    pub fn shape_in_plan(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.is_staged() {
            shape.reverse();
        }
        shape
    }

    /// Size in the weights file.
    pub fn bytes(&self) -> u64 {
        let elements = self.shape.iter().map(|n| *n as u64).product::<u64>();
        if self.dtype == DType::I4 { elements.div_ceil(2) } else { elements * self.dtype.bytes() as u64 }
    }
}

/// Storage layout of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightLayout {
    /// Row-major, as the graph has it.
    Rows,
    /// Transposed to `[in, out]`.
    Transposed,
    /// Scales transposed to `[in / unit, out]`, each repeated `block / unit` times. TensorRT requires equal blocks, so
    /// where `block` does not divide the columns, `unit` is a common divisor of both.
    Spread {
        /// Columns that share a scale (the group size).
        block: usize,
        /// Columns per stored scale.
        unit: usize,
    },
}

/// Source of the weights that are embedded in a plan.
#[derive(Debug, Clone)]
pub enum Constants {
    /// The packed weights file; or, if any of them [is staged](PlanWeight::is_staged), the file that
    /// [`stage::write`](super::stage::write) made of it.
    File(Arc<TensorFile>),
    /// Arbitrary values, for a plan that is inspected but never run.
    Arbitrary,
}
