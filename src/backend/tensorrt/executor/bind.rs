//! Inputs and outputs of a context, bound to memory.

use std::sync::Arc;

use super::memory::{Layout, Part, bytes_of, cache_of};
use super::schedule::Run;
use crate::backend::tensorrt::Context;
use crate::backend::tensorrt::device::Buffer;
use crate::engine::tensorrt::{Binding, Extent, Role, StepSize};
use crate::error::{Error, Result};

/// The memory that a plan runs in.
pub(super) struct Buffers {
    pub weights: Arc<Buffer>,
    pub cache: Arc<Buffer>,
    pub inputs: Arc<Buffer>,
    pub outputs: Arc<Buffer>,
    pub scratch: Arc<Buffer>,
}

/// Binds a context's inputs and outputs to memory.
pub(super) struct Binder<'a> {
    pub bindings: &'a [Binding],
    pub layout: &'a Layout,
    pub buffers: &'a Buffers,
}

impl Binder<'_> {
    /// What is the same in every run.
    pub(super) fn fixed(&self, context: &mut Context, first_chunk: bool) -> Result<()> {
        context.set_memory(&self.buffers.scratch)?;
        for weight in &self.layout.weights {
            let name = &self.bindings[weight.binding].name;
            context.set_address(name, &self.buffers.weights, weight.part.offset, weight.part.bytes)?;
        }
        for binding in self.bindings {
            if let Some(Part { offset, bytes }) = self.input(binding.role, first_chunk) {
                context.set_address(&binding.name, &self.buffers.inputs, offset, bytes)?;
            }
        }
        Ok(())
    }

    fn input(&self, role: Role, first_chunk: bool) -> Option<Part> {
        let inputs = &self.layout.inputs;
        match role {
            Role::TokenIds => Some(inputs.token_ids),
            Role::Positions => Some(inputs.positions),
            Role::PastTokens => Some(inputs.past_tokens),
            Role::TotalTokens if !first_chunk => Some(inputs.total_tokens),
            Role::LogitsRows => Some(inputs.logits_rows),
            _ => None,
        }
    }

    /// Keys and values of the run's slots; an updated cache is the cache.
    pub(super) fn caches(&self, context: &mut Context, run: &Run) -> Result<()> {
        for binding in self.bindings {
            let Some(cache) = cache_of(binding.role) else { continue };
            let (Some(part), Some(slot_bytes)) = (self.layout.caches.get(&cache), self.layout.slot_bytes.get(&cache))
            else {
                return Err(Error::TensorRt(format!("{} updates a cache that the plan does not read", binding.name)));
            };
            if !binding.role.is_output() {
                context.set_shape(&binding.name, &dims(binding, run))?;
            }
            let offset = part.offset + run.first_slot as u64 * slot_bytes;
            context.set_address(&binding.name, &self.buffers.cache, offset, run.sequences as u64 * slot_bytes)?;
        }
        Ok(())
    }

    /// The sizes of the run's inputs, and where its outputs go.
    pub(super) fn step(&self, context: &mut Context, run: &Run, first_chunk: bool) -> Result<()> {
        let outputs = &self.layout.outputs;
        for binding in self.bindings {
            if self.input(binding.role, first_chunk).is_some() {
                context.set_shape(&binding.name, &dims(binding, run))?;
                continue;
            }
            let [values, ids] = outputs.top(run.output_row);
            let offset = match binding.role {
                Role::Logits => outputs.row(run.output_row).offset,
                Role::TopLogits => values,
                Role::TopIds => ids,
                // Bound once, or by `caches`; inputs that this plan has no use for are not bound.
                Role::Weight
                | Role::TokenIds
                | Role::Positions
                | Role::PastTokens
                | Role::TotalTokens
                | Role::LogitsRows
                | Role::KeyCache(_)
                | Role::ValueCache(_)
                | Role::UpdatedKeys(_)
                | Role::UpdatedValues(_) => continue,
            };
            let bytes = bytes_of(binding, [run.sequences, run.tokens, run.logits_rows.len()]).unwrap_or(u64::MAX);
            context.set_address(&binding.name, &self.buffers.outputs, offset, bytes)?;
        }
        Ok(())
    }
}

/// A binding's sizes in a run. All were checked to fit an `i32` or come from the plan itself.
fn dims(binding: &Binding, run: &Run) -> Vec<i64> {
    let dim = |extent: &Extent| match extent {
        Extent::Fixed(n) => *n,
        Extent::Step(StepSize::B) => run.sequences,
        Extent::Step(StepSize::T) => run.tokens,
        Extent::Step(StepSize::R) => run.logits_rows.len(),
    };
    binding.shape.iter().map(|extent| dim(extent) as i64).collect()
}
