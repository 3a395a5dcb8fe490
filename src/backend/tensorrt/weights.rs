//! The weights of a plan: what they hold, how they are stored, and whether they are part of it.

use std::sync::Arc;

use crate::backend::constants::ConstRows;
use crate::tensor::DType;
use crate::tensor_file::TensorFile;

/// A weight of a plan, as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanWeight {
    /// The input's name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Its content, row by row.
    pub content: ConstRows,
    /// How its rows are stored.
    pub layout: WeightLayout,
    /// Part of the plan rather than an input of it.
    pub in_plan: bool,
}

impl PlanWeight {
    /// Stored row after row and given to the plan.
    pub(super) fn rows(name: &str, dtype: DType, shape: Vec<usize>, content: ConstRows) -> PlanWeight {
        PlanWeight { name: name.into(), dtype, shape, content, layout: WeightLayout::Rows, in_plan: false }
    }

    /// Bytes it is stored in.
    pub fn bytes(&self) -> u64 {
        let elements = self.shape.iter().map(|n| *n as u64).product::<u64>();
        if self.dtype == DType::I4 { elements.div_ceil(2) } else { elements * self.dtype.bytes() as u64 }
    }
}

/// How the rows of a weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightLayout {
    /// Row after row.
    Rows,
    /// Column after column: `[in, out]`.
    Transposed,
    /// Scales column after column, `[in / unit, out]`, each as often as the block it is for has `unit` columns: TensorRT's
    /// blocks are of one size, and where the columns are not whole blocks that is a divisor of both.
    Spread {
        /// Columns of a scale.
        block: usize,
        /// Columns of a stored scale.
        unit: usize,
    },
}

/// Where the weights come from that become part of a plan.
#[derive(Debug, Clone)]
pub enum Constants {
    /// The file that the weights are packed in.
    File(Arc<TensorFile>),
    /// Arbitrary numbers, for a plan that is looked at and not run.
    Arbitrary,
}
