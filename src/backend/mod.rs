//! Backends: what turns a plan into numbers. An [`Executor`] knows nothing of text.

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
pub use select::{
    ExecutorOptions, Machine, Selection, choose, cpu_program, open, open_cpu, open_cpu_model, open_selected, select,
};
pub use step::{Chunk, NextToken, Rows, Span, Step};

pub use crate::engine::Limits;
use crate::error::Result;

/// Runs a plan. The executor owns the KV memory; the caller owns which slot holds what and how long it is, so a
/// slot is reused or cut back by naming a smaller `past_tokens`.
pub trait Executor: Send {
    /// What the plan was built for.
    fn limits(&self) -> &Limits;

    /// Runs one step: writes the new tokens' keys and values to their slots and returns the wanted logits.
    /// On the CPU a sequence's logits are bit-identical whatever else is in the step and however its tokens were chunked;
    /// on a GPU they may differ in their last bits, as other kernels run.
    ///
    /// # Errors
    /// Whatever the backend reports; the slots of the step then hold no defined content past their `past_tokens`.
    fn forward(&mut self, step: &Step) -> Result<Logits<'_>>;
}
