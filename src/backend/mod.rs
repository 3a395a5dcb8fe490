//! Backends: executors that run a plan. An [`Executor`] knows nothing about text.

pub mod constants;
pub mod cpu;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod logits;
pub mod packing;
mod select;
mod step;
pub mod tensorrt;

pub use logits::{DeferredLogits, Logits, Top};
pub(crate) use select::open_noted_cpu_model;
pub use select::{
    ExecutorOptions, HostProbe, Selection, choose, cpu_program, open, open_cpu, open_cpu_model, open_selected, select,
};
pub use step::{Chunk, NextToken, Rows, Span, Step};

pub use crate::engine::Limits;
use crate::error::Result;

/// Runs a plan. The executor owns the KV memory; the caller decides which sequence occupies which slot and how long it
/// is, so a slot is reused or truncated by passing a smaller `past_tokens`.
pub trait Executor: Send {
    /// The limits that the plan was built for.
    fn limits(&self) -> &Limits;

    /// Runs one step: writes the new tokens' keys and values to their slots and returns the requested logits. On the
    /// CPU, a sequence's logits are bit-identical whatever else is in the step and however its tokens were chunked; on
    /// a GPU the last bits may differ, since the batch shape selects different kernels.
    ///
    /// # Errors
    /// Any error of the backend; the contents of the step's slots past their `past_tokens` are then undefined.
    fn forward(&mut self, step: &Step) -> Result<Logits<'_>>;
}
