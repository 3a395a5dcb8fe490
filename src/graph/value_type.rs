//! Types of values, and the inputs that a step supplies.

use std::fmt;

use super::dim::Dim;
use crate::tensor::DType;

/// An element type and a symbolic shape.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<Dim>,
}

impl Type {
    /// A type from anything that converts to dimensions.
    pub fn new(dtype: DType, shape: impl IntoIterator<Item = Dim>) -> Type {
        Type { dtype, shape: shape.into_iter().collect() }
    }

    /// The last dimension if it is known: the width of a row.
    pub fn width(&self) -> Option<usize> {
        self.shape.last().and_then(|d| d.as_fixed())
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(", "))
    }
}

/// An input supplied by the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Input {
    /// Token ids, `i32[B·T]`.
    TokenIds,
    /// Each token's position in its sequence, `i32[B·T]`.
    Positions,
    /// Tokens each sequence had in the cache before the step, `i32[B]`.
    PastTokens,
    /// Indices into the step's tokens whose logits are requested, `i32[R]`.
    LogitsRows,
    /// A layer's keys, `[B, kv_heads, S, head_dim]`.
    KeyCache(usize),
    /// A layer's values, `[B, kv_heads, S, head_dim]`.
    ValueCache(usize),
}

impl Input {
    /// Returns true for a layer's keys or values, which persist from step to step.
    pub fn is_cache(self) -> bool {
        match self {
            Input::KeyCache(_) | Input::ValueCache(_) => true,
            Input::TokenIds | Input::Positions | Input::PastTokens | Input::LogitsRows => false,
        }
    }
}
