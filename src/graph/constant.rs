//! Values known at build time, as expressions over a checkpoint.

use std::fmt;
use std::sync::Arc;

use crate::quantize::Scheme;
use crate::tensor::DType;

/// A value known at build time: an expression over the checkpoint's tensors, evaluated by the packer.
#[derive(Debug, Clone, PartialEq)]
pub enum Const {
    /// A tensor of the checkpoint, by its Hugging Face name.
    Tensor(String),
    /// `inner + scalar`, added in FP32.
    AddScalar(Box<Const>, f32),
    /// Matrices of equal width, one above the other.
    ConcatRows(Vec<Const>),
    /// `inner` with each column or row multiplied by a factor, in FP32. A vector is one row.
    Scaled(Box<Const>, Factors),
    /// `f32[positions, rotary_dim / 2]`: see [`Trig`].
    RotaryTable {
        /// Cosine or sine.
        trig: Trig,
        /// Base of the frequencies.
        theta: f64,
        /// Rotating dimensions of a head.
        rotary_dim: usize,
        /// Rows: positions 0 .. positions.
        positions: usize,
    },
    /// `inner` rounded to another element type, ties to even.
    Cast(Box<Const>, DType),
    /// The codes of a matrix, `[rows, columns]` of the scheme's dtype: see [`crate::quantize`].
    Codes(Box<Const>, Scheme),
    /// The scales of a matrix's codes, `f32[rows, blocks]`.
    Scales {
        /// The matrix.
        matrix: Box<Const>,
        /// Quantization of its rows.
        scheme: Scheme,
        /// Number of its columns.
        columns: usize,
    },
}

impl Const {
    /// The checkpoint tensors the expression reads.
    pub fn tensors<'a>(&'a self, names: &mut Vec<&'a str>) {
        match self {
            Const::Tensor(name) => names.push(name),
            Const::AddScalar(inner, _) | Const::Scaled(inner, _) | Const::Cast(inner, _) | Const::Codes(inner, _) => {
                inner.tensors(names)
            }
            Const::Scales { matrix, .. } => matrix.tensors(names),
            Const::ConcatRows(parts) => parts.iter().for_each(|p| p.tensors(names)),
            Const::RotaryTable { .. } => {}
        }
    }
}

impl fmt::Display for Const {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Const::Tensor(name) => f.write_str(name),
            Const::AddScalar(inner, scalar) => write!(f, "({inner} + {scalar})"),
            Const::ConcatRows(parts) => {
                let parts: Vec<String> = parts.iter().map(Const::to_string).collect();
                write!(f, "rows({})", parts.join("; "))
            }
            Const::Scaled(inner, Factors::OfColumns(_)) => write!(f, "({inner} · factors of columns)"),
            Const::Scaled(inner, Factors::OfRows(_)) => write!(f, "({inner} · factors of rows)"),
            Const::RotaryTable { trig, theta, rotary_dim, positions } => {
                write!(f, "rotary_{trig}(theta {theta}, dims {rotary_dim}, positions {positions})")
            }
            Const::Cast(inner, dtype) => write!(f, "{dtype}({inner})"),
            Const::Codes(inner, scheme) => write!(f, "codes({inner}; {scheme})"),
            Const::Scales { matrix, scheme, .. } => write!(f, "scales({matrix}; {scheme})"),
        }
    }
}

/// Factors of a matrix, positive numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Factors {
    /// One for each column.
    OfColumns(Arc<[f32]>),
    /// One for each row.
    OfRows(Arc<[f32]>),
}

impl Factors {
    /// Multiplies rows of a matrix with `columns` columns; `first` is the index of the first of them.
    pub fn apply(&self, first: usize, columns: usize, rows: &mut [f32]) {
        match self {
            Factors::OfColumns(factors) => {
                for row in rows.chunks_exact_mut(columns) {
                    row.iter_mut().zip(&**factors).for_each(|(value, factor)| *value *= factor);
                }
            }
            Factors::OfRows(factors) => {
                for (row, factor) in rows.chunks_exact_mut(columns).zip(factors.iter().skip(first)) {
                    row.iter_mut().for_each(|value| *value *= factor);
                }
            }
        }
    }

    /// Returns true if there is one for each column, or row, of a matrix of this shape.
    pub fn fit(&self, rows: usize, columns: usize) -> bool {
        match self {
            Factors::OfColumns(factors) => factors.len() == columns,
            Factors::OfRows(factors) => factors.len() == rows,
        }
    }
}

/// Function of the rotary angle `position · theta^(−2i / rotary_dim)`, `i < rotary_dim / 2` (Su et al., "RoFormer";
/// frequencies and angles are rounded to FP32 as in transformers).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trig {
    /// Cosine.
    Cos,
    /// Sine.
    Sin,
}

impl fmt::Display for Trig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trig::Cos => "cos",
            Trig::Sin => "sin",
        })
    }
}
