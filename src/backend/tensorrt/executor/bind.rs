//! Binding of an execution context's inputs and outputs to memory.

use std::sync::Arc;

use super::memory::{BufferRange, MemoryLayout, bytes_of, cache_of};
use super::schedule::PlanRun;
use crate::backend::tensorrt::ExecutionContext;
use crate::backend::tensorrt::device::Buffer;
use crate::engine::tensorrt::{Binding, BindingRole, Extent, StepSize};
use crate::error::{Error, Result};

/// Device memory of an executor, shared by all its contexts.
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
    pub layout: &'a MemoryLayout,
    pub buffers: &'a Buffers,
}

impl Binder<'_> {
    /// Binds what is the same in every run: scratch memory, weights and inputs.
    pub(super) fn fixed(&self, context: &mut ExecutionContext, is_context_plan: bool) -> Result<()> {
        context.set_memory(&self.buffers.scratch)?;
        for weight in &self.layout.weights {
            let name = &self.bindings[weight.binding].name;
            context.set_address(name, &self.buffers.weights, weight.part.offset, weight.part.bytes)?;
        }
        for binding in self.bindings {
            if let Some(BufferRange { offset, bytes }) = self.input(binding.role, is_context_plan) {
                context.set_address(&binding.name, &self.buffers.inputs, offset, bytes)?;
            }
        }
        Ok(())
    }

    fn input(&self, role: BindingRole, is_context_plan: bool) -> Option<BufferRange> {
        let inputs = &self.layout.inputs;
        match role {
            BindingRole::TokenIds => Some(inputs.token_ids),
            BindingRole::Positions => Some(inputs.positions),
            BindingRole::PastTokens => Some(inputs.past_tokens),
            BindingRole::TotalTokens if !is_context_plan => Some(inputs.total_tokens),
            BindingRole::AttentionMask if !is_context_plan => Some(inputs.mask),
            BindingRole::LogitsRows => Some(inputs.logits_rows),
            _ => None,
        }
    }

    /// Binds the keys and values of the run's rows, of which the first is `offset` tokens into the region. Updated caches
    /// alias the caches.
    pub(super) fn caches(&self, context: &mut ExecutionContext, run: &PlanRun, offset: usize) -> Result<()> {
        let capacity = self.layout.region.capacities[run.first.class];
        for binding in self.bindings {
            let Some(cache) = cache_of(binding.role) else { continue };
            let Some(region) = self.layout.caches.get(&cache) else {
                return Err(Error::TensorRt(format!("{} updates a cache that the plan does not read", binding.name)));
            };
            if !binding.role.is_output() {
                context.set_shape(&binding.name, &dims(binding, run))?;
            }
            let token_bytes = region.token_bytes();
            let bytes = (run.sequences * capacity) as u64 * token_bytes;
            let start = region.part.offset + offset as u64 * token_bytes;
            context.set_address(&binding.name, &self.buffers.cache, start, bytes)?;
        }
        Ok(())
    }

    /// Sets the run's input shapes and output addresses.
    pub(super) fn step(&self, context: &mut ExecutionContext, run: &PlanRun, is_context_plan: bool) -> Result<()> {
        let outputs = &self.layout.outputs;
        for binding in self.bindings {
            if self.input(binding.role, is_context_plan).is_some() {
                context.set_shape(&binding.name, &dims(binding, run))?;
                continue;
            }
            let [values, ids, sums] = outputs.top(run.output_row);
            let BufferRange { offset, .. } = match binding.role {
                BindingRole::Logits => outputs.row(run.output_row),
                BindingRole::TopLogits => values,
                BindingRole::TopIds => ids,
                BindingRole::LogitSums => sums,
                // Bound by `fixed` or `caches`, or an input that this plan does not have.
                BindingRole::Weight
                | BindingRole::TokenIds
                | BindingRole::Positions
                | BindingRole::PastTokens
                | BindingRole::TotalTokens
                | BindingRole::AttentionMask
                | BindingRole::LogitsRows
                | BindingRole::KeyCache(_)
                | BindingRole::ValueCache(_)
                | BindingRole::UpdatedKeys(_)
                | BindingRole::UpdatedValues(_) => continue,
            };
            let bytes = bytes_of(binding, [run.sequences, run.tokens, run.logits_rows.len()]).unwrap_or(u64::MAX);
            context.set_address(&binding.name, &self.buffers.outputs, offset, bytes)?;
        }
        Ok(())
    }
}

/// Shape of a binding in a run. No cast truncates: all sizes were checked to fit an `i32` or come from the plan itself.
fn dims(binding: &Binding, run: &PlanRun) -> Vec<i64> {
    let dim = |extent: &Extent| match extent {
        Extent::Fixed(n) => *n,
        Extent::Step(StepSize::B) => run.sequences,
        Extent::Step(StepSize::T) => run.tokens,
        Extent::Step(StepSize::R) => run.logits_rows.len(),
    };
    binding.shape.iter().map(|extent| dim(extent) as i64).collect()
}
