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

    /// Reserves KV memory for a sequence of up to `tokens` tokens in a slot, so that no later step of it fails for lack
    /// of memory. Returns false if there is none at present: then wait until another slot is released. With every other
    /// slot released, it succeeds. Without a reservation a step takes the memory it needs, if there is any. An executor
    /// that has memory for every slot, as on the CPU, has nothing to reserve.
    fn reserve(&mut self, _slot: usize, _tokens: usize) -> bool {
        true
    }

    /// Ends the use of a slot and its reservation. What it holds can be built on until its memory is needed for another
    /// slot ([`Executor::retained_tokens`]).
    fn release(&mut self, _slot: usize) {}

    /// Tokens of a slot that later steps may build on: at most those after the last step that named it.
    fn retained_tokens(&self, _slot: usize) -> usize {
        self.limits().max_sequence_tokens
    }
}
