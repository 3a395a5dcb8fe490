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
use crate::error::{Error, Result};

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

    /// Returns true once no step can succeed any more, as after the loss of a GPU.
    fn is_lost(&self) -> bool {
        false
    }

    /// Copies the keys and values of the first `tokens` tokens of slot `from` to slot `to`, whose sequence they become.
    /// Returns false, having done nothing, if the executor cannot.
    ///
    /// # Errors
    /// [`Error::Step`](crate::Error::Step) if there is no such slot or it has no room; any error of the backend.
    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool> {
        let _ = (from, to, tokens);
        Ok(false)
    }

    /// The blocks in which a slot's keys and values can be copied out of the executor and back into it, or `None` if they
    /// cannot: then nothing is kept of a sequence beyond its slot. A GPU's executor has none, since the copies would
    /// cross the bus to the host.
    fn kv_block(&self) -> Option<KvBlock> {
        None
    }

    /// Copies block `index` of a slot, the keys and values of the tokens from `index * tokens` on, to `into`, of as many
    /// bytes as a block has. They are the last that were written there, even if the slot's sequence is shorter by now.
    ///
    /// # Errors
    /// [`Error::Step`](crate::Error::Step) if there are no blocks, no such slot or block, or `into` has another length.
    fn read_kv_block(&self, slot: usize, index: usize, into: &mut [u8]) -> Result<()> {
        let _ = (slot, index, into);
        Err(Error::Step("this executor has no blocks of keys and values to read".into()))
    }

    /// Writes to block `index` of a slot what [`Executor::read_kv_block`] has read from a block with this index of any
    /// slot. With the blocks before it, it becomes the slot's sequence.
    ///
    /// # Errors
    /// As [`Executor::read_kv_block`]; the block's contents are then undefined.
    fn write_kv_block(&mut self, slot: usize, index: usize, from: &[u8]) -> Result<()> {
        let _ = (slot, index, from);
        Err(Error::Step("this executor has no blocks of keys and values to write".into()))
    }

    /// Guarantees beyond the above, which verification holds the executor to.
    fn promises(&self) -> ExecutorPromises {
        ExecutorPromises::default()
    }

    /// Sets every byte of a slot's keys and values, those past the end of its sequence included: 0 for zeros, 0xff for
    /// NaN, 0x44 for large numbers, in any float type. Returns false, having done nothing, if the executor has no such
    /// access to its KV memory.
    ///
    /// # Errors
    /// [`Error::Step`](crate::Error::Step) if there is no such slot; any error of the backend.
    fn fill_slot(&mut self, slot: usize, byte: u8) -> Result<bool> {
        let _ = (slot, byte);
        Ok(false)
    }

    /// Makes a slot fit for another sequence after one whose logits were not finite. The runtime calls it; an executor
    /// whose attention reads past the end of a sequence zeroes the slot, as this does.
    ///
    /// # Errors
    /// As [`Executor::fill_slot`].
    fn mend_slot(&mut self, slot: usize) -> Result<()> {
        self.fill_slot(slot, 0).map(drop)
    }
}

/// Size of the blocks in which keys and values are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvBlock {
    /// Tokens of a block, at least one.
    pub tokens: usize,
    /// Bytes of their keys and values in all layers.
    pub bytes: usize,
}

/// Guarantees of an executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExecutorPromises {
    /// A sequence's logits have the same bits whatever else is in its steps and however it was chunked.
    pub same_bits: bool,
    /// Keys and values at or past the end of a sequence are never read, so they may be NaN.
    pub ignores_unwritten: bool,
}
