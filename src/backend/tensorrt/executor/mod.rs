//! The executor that runs TensorRT plans on a GPU.
//!
//! Opening validates first and allocates last: that the plan is compiled, that its library and GPU are present, that
//! its bindings match the manifest and that its memory fits is all checked before a weight is copied.
//!
//! A plan reads every position of the caches that it is given, up to its capacity, so there are plans for several
//! capacities over the same weights, and every sequence is in the smallest class that holds it ([`placement`]). A decode
//! step makes one run for each class that it decodes sequences of. Each class and decode batch size has an execution
//! context of its own, whose run is captured as a CUDA graph after its first execution: the same kernels at the same
//! addresses, with one launch. It is bound and captured anew when the class's rows were moved. Runs are made once while the
//! plan opens, which compiles their kernels ([`warm`]).
//!
//! Only the top-k logits of each row are copied to the host in every step; full rows are fetched on demand. The batch
//! size selects the kernels, so a sequence's logits may differ in their last bits depending on the rest of the batch.

mod bind;
mod check;
mod kernels;
mod mask;
mod memory;
mod open;
mod placement;
mod results;
mod schedule;
mod warm;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use self::bind::{Binder, Buffers};
use self::kernels::{KernelCache, KernelWriter, StoredKernels};
use self::memory::MemoryLayout;
use self::placement::{Placement, RowCopy, Spot};
use self::results::StepResults;
use self::schedule::{BatchingConstraints, PlanRun, RunKind, RunShape, schedule};
use super::device::{ByteGrid, CudaGraph, Pinned, Stream};
use super::{CudaEngine, DeviceInfo, ExecutionContext, GpuReport, KernelCompilation};
use crate::backend::{Executor, Logits, Step};
use crate::engine::Limits;
use crate::engine::tensorrt::Binding;
use crate::error::{Error, Result};

/// The TensorRT executor.
// Fields drop in declaration order: graphs and contexts before engines, and those before the memory they use.
pub struct TensorRtExecutor {
    /// Decode contexts by class and batch size.
    decoders: BTreeMap<(usize, usize), Decoder>,
    /// Prefill contexts by class, whether they are the context plan's, and whether they compile kernels before they run
    /// rather than in the background.
    prefills: BTreeMap<(usize, bool, bool), Prefill>,
    classes: Vec<ClassEngines>,
    results: StepResults,
    inputs_host: Pinned,
    buffers: Buffers,
    layout: MemoryLayout,
    constraints: BatchingConstraints,
    placement: Placement,
    /// The byte of all memory of the cache that no slot has, if it was filled since the last step.
    free_bytes: Option<u8>,
    graphs: bool,
    compilation: KernelCompilation,
    /// Returns true if the library compiles kernels here: TensorRT for RTX.
    has_kernel_cache: bool,
    /// Shapes whose kernels are compiled.
    ready: BTreeSet<RunShape>,
    /// Kernels were compiled that were not handed to the writer.
    has_new_kernels: bool,
    writer: KernelWriter,
    report: GpuReport,
    stream: Arc<Stream>,
}

/// A context for decoding at one batch size, and its run captured as a graph.
struct Decoder {
    graph: Option<CudaGraph>,
    context: ExecutionContext,
    /// Offset of the first row in the region, and output row, that it is bound to; `None` while that is unknown.
    bound: Option<(usize, usize)>,
}

/// A context for prefill, and the offset of the row that it is bound to.
struct Prefill {
    context: ExecutionContext,
    bound: Option<usize>,
}

/// The plans of a capacity class.
struct ClassEngines {
    /// Decodes, and prefills sequences with a past.
    cached: LoadedEngine,
    /// Prefills sequences without a past.
    context: Option<LoadedEngine>,
    bindings: Vec<Binding>,
    /// Largest batch of each decode profile of `cached`, ascending; they follow profile 0, which prefills.
    decode_profiles: Vec<usize>,
}

impl ClassEngines {
    /// The profile for decoding a batch. Batches are at most the class's largest, which the last profile ends at.
    fn decode_profile(&self, batch: usize) -> u32 {
        let below = self.decode_profiles.iter().filter(|most| **most < batch).count();
        1 + below.min(self.decode_profiles.len().saturating_sub(1)) as u32
    }
}

/// A deserialized engine and its kernel cache.
struct LoadedEngine {
    engine: CudaEngine,
    kernel_cache: Option<KernelCache>,
    /// Size of the kernels stored in the cache.
    cached_bytes: usize,
    /// Profile and size of the runs whose kernels are in the cache.
    cached_shapes: BTreeSet<(u32, u32)>,
}

impl TensorRtExecutor {
    /// The GPU the plan runs on.
    pub fn gpu(&self) -> &DeviceInfo {
        self.stream.device().info()
    }

    /// Capacity of the class that a slot's sequence is in; `None` if the slot is empty.
    pub fn class_tokens(&self, slot: usize) -> Option<usize> {
        let place = self.placement.place(slot)?;
        self.layout.region.capacities.get(place.class).copied()
    }

    fn run_step(&mut self, step: &Step) -> Result<()> {
        self.results.rows.clear();
        self.stream.device().bind()?;
        step.check_fits(&self.constraints.limits)?;
        self.free_bytes = None;
        let copies = self.placement.prepare(step.spans()).map_err(Error::Step)?;
        let ran = self.run_prepared(step, &copies);
        if ran.is_err() {
            // What was to be copied or computed may not have been.
            step.spans().iter().for_each(|span| self.placement.forget(span.slot));
            if !copies.is_empty() {
                self.placement.forget_all();
            }
        }
        self.results.take(ran?)
    }

    /// Runs a step whose sequences have their rows, after the copies; returns the output rows of its logits.
    fn run_prepared(&mut self, step: &Step, copies: &[RowCopy]) -> Result<Vec<usize>> {
        self.copy_rows(copies)?;
        let schedule = schedule(step, &self.placement, &self.constraints)?;
        for run in &schedule.runs {
            if let Err(error) = self.run(run) {
                // If the GPU failed, the driver's error is more specific than TensorRT's.
                return Err(self.stream.wait().err().unwrap_or(error));
            }
        }
        if std::mem::take(&mut self.has_new_kernels) {
            self.keep_kernels();
        }
        Ok(schedule.rows)
    }

    /// Enqueues copies of rows, layer by layer, since the spare rows hold one layer's keys or values.
    fn copy_rows(&self, copies: &[RowCopy]) -> Result<()> {
        for region in self.layout.caches.values() {
            for RowCopy { from, to, tokens } in copies {
                let width = *tokens as u64 * region.head_bytes;
                let grid = |spot: &Spot| {
                    let (offset, pitch) = match spot {
                        Spot::Region { offset, capacity } => (
                            region.part.offset + *offset as u64 * region.token_bytes(),
                            *capacity as u64 * region.head_bytes,
                        ),
                        Spot::Spare(index) => (self.layout.spare_rows[*index].offset, width),
                    };
                    ByteGrid { buffer: &self.buffers.cache, offset, pitch }
                };
                self.stream.copy_rows(grid(from), grid(to), width, region.kv_heads)?;
            }
        }
        Ok(())
    }

    fn run(&mut self, run: &PlanRun) -> Result<()> {
        self.run_at(run, self.placement.offset(run.first))
    }

    /// Enqueues a run whose first row is `offset` tokens into the region.
    fn run_at(&mut self, run: &PlanRun, offset: usize) -> Result<()> {
        let inputs = &self.layout.inputs;
        let has_mask = inputs.mask.bytes > 0;
        let is_decode = run.kind == RunKind::Decode;
        let capacity = self.layout.region.capacities[run.first.class];
        let host = self.inputs_host.bytes()?;
        for (part, values) in [
            (inputs.token_ids, &run.token_ids),
            (inputs.positions, &run.positions),
            (inputs.past_tokens, &run.past_tokens),
            (inputs.total_tokens, &run.total_tokens),
            (inputs.logits_rows, &run.logits_rows),
        ] {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let place = host.get_mut(part.offset as usize..).and_then(|rest| rest.get_mut(..bytes.len()));
            let place = place.ok_or_else(|| Error::Step("a run's inputs are larger than their buffer".into()))?;
            place.copy_from_slice(bytes);
        }
        // Integers come first, so that one copy takes everything a run needs.
        let mut host_bytes = if has_mask { inputs.mask.offset as usize } else { host.len() };
        if has_mask && is_decode {
            let rows = host_bytes..host_bytes + run.sequences * capacity;
            let rows = host.get_mut(rows).ok_or_else(|| Error::Step("a mask exceeds its buffer".into()))?;
            mask::write_rows(rows, &run.total_tokens, capacity)?;
            host_bytes += rows.len();
        }
        self.inputs_host.upload(0..host_bytes, &self.buffers.inputs, 0, &self.stream)?;
        if is_decode {
            return self.decode(run, offset);
        }
        if has_mask && run.kind == RunKind::CachedPrefill {
            let past = run.past_tokens.first().map_or(0, |past| *past as usize);
            mask::write_prefill(&self.stream, &self.buffers.inputs, inputs, (past, run.tokens), capacity)?;
        }
        self.prefill(run, offset)
    }

    fn prefill(&mut self, run: &PlanRun, offset: usize) -> Result<()> {
        let is_context_plan = run.kind == RunKind::ContextPrefill;
        let class = &self.classes[run.first.class];
        let binder = Binder { bindings: &class.bindings, layout: &self.layout, buffers: &self.buffers };
        let shape = run.shape();
        let waits =
            !self.has_kernel_cache || self.compilation == KernelCompilation::BeforeUse || self.ready.contains(&shape);
        if waits {
            self.ready.insert(shape);
        }
        let key = (run.first.class, is_context_plan, waits);
        let prefill = match self.prefills.entry(key) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let engine = match (&class.context, is_context_plan) {
                    (Some(context), true) => context,
                    _ => &class.cached,
                };
                let mut context = engine.engine.context(0, waits, &self.stream)?;
                binder.fixed(&mut context, is_context_plan)?;
                entry.insert(Prefill { context, bound: None })
            }
        };
        if prefill.bound != Some(offset) {
            prefill.bound = None;
            binder.caches(&mut prefill.context, run, offset)?;
            prefill.bound = Some(offset);
        }
        binder.step(&mut prefill.context, run, is_context_plan)?;
        prefill.context.enqueue(&self.stream)
    }

    fn decode(&mut self, run: &PlanRun, offset: usize) -> Result<()> {
        let class = &self.classes[run.first.class];
        let key = (run.first.class, run.sequences);
        let wanted = Some((offset, run.output_row));
        let binder = Binder { bindings: &class.bindings, layout: &self.layout, buffers: &self.buffers };
        let mut is_new = false;
        let decoder = match self.decoders.entry(key) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                is_new = true;
                let mut context =
                    class.cached.engine.context(class.decode_profile(run.sequences), true, &self.stream)?;
                binder.fixed(&mut context, false)?;
                entry.insert(Decoder { context, graph: None, bound: None })
            }
        };
        if decoder.bound == wanted {
            return match &decoder.graph {
                Some(graph) => self.stream.replay(graph),
                None => decoder.context.enqueue(&self.stream),
            };
        }
        (decoder.bound, decoder.graph) = (None, None);
        binder.caches(&mut decoder.context, run, offset)?;
        binder.step(&mut decoder.context, run, false)?;
        decoder.bound = wanted;
        // The first run of a batch size cannot be captured: TensorRT allocates then.
        decoder.context.enqueue(&self.stream)?;
        if self.graphs {
            match decoder.context.record(&self.stream) {
                Ok(recorded) => decoder.graph = Some(recorded),
                Err(error) => {
                    self.graphs = false;
                    self.report.fact(&format!("decoding without CUDA graphs, which is a little slower: {error}"));
                }
            }
        }
        if is_new {
            self.has_new_kernels = true;
            self.ready.insert(run.shape());
        }
        Ok(())
    }

    /// Hands the kernels of engines that have compiled some since the last time to the thread that writes them.
    fn keep_kernels(&mut self) {
        let ready = &self.ready;
        for (class, engines) in self.classes.iter_mut().enumerate() {
            for (is_context_plan, kept) in
                std::iter::once((false, &mut engines.cached)).chain(engines.context.as_mut().map(|kept| (true, kept)))
            {
                let Some(kernel_cache) = &kept.kernel_cache else { continue };
                let Ok(kernels) = kept.engine.kernels() else { continue };
                let of_engine = |shape: &&RunShape| {
                    shape.class == class && (shape.kind == RunKind::ContextPrefill) == is_context_plan
                };
                let shapes: BTreeSet<(u32, u32)> = ready.iter().filter(of_engine).map(stored_shape).collect();
                if kernels.len() == kept.cached_bytes && shapes == kept.cached_shapes {
                    continue;
                }
                kept.cached_bytes = kernels.len();
                kept.cached_shapes = shapes.clone();
                self.writer.write(kernel_cache.clone(), StoredKernels { shapes, kernels });
            }
        }
    }
}

/// Profile and size of a shape, as the kernel cache has them.
fn stored_shape(shape: &RunShape) -> (u32, u32) {
    (u32::from(shape.kind == RunKind::Decode), u32::try_from(shape.size).unwrap_or(u32::MAX))
}

impl Executor for TensorRtExecutor {
    fn limits(&self) -> &Limits {
        &self.constraints.limits
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        self.run_step(step)?;
        Ok(Logits::deferred(&mut self.results))
    }

    fn is_lost(&self) -> bool {
        self.stream.device().is_lost()
    }

    fn reserve(&mut self, slot: usize, tokens: usize) -> bool {
        self.placement.reserve(slot, tokens.min(self.constraints.limits.max_sequence_tokens))
    }

    fn release(&mut self, slot: usize) {
        self.placement.release(slot);
    }

    fn retained_tokens(&self, slot: usize) -> usize {
        self.placement.held(slot)
    }

    /// Attention reads a row's whole capacity, so what lies past the end of a sequence must be finite. A slot without a row
    /// may get any that is free, so all of those are filled too, except with NaN, which would be read by whoever gets them.
    fn fill_slot(&mut self, slot: usize, byte: u8) -> Result<bool> {
        if slot >= self.constraints.limits.slots {
            let slots = self.constraints.limits.slots;
            return Err(Error::Step(format!("slot {slot}, but the engine has {slots} slots")));
        }
        self.stream.device().bind()?;
        let is_nan = byte == 0xff;
        let holders = match is_nan || self.free_bytes == Some(byte) {
            true => self.placement.own_tokens(slot).into_iter().collect(),
            false => self.placement.free_tokens(slot),
        };
        self.free_bytes = if is_nan { self.free_bytes } else { Some(byte) };
        for tokens in holders {
            for region in self.layout.caches.values() {
                let at = |token: usize| region.part.offset + token as u64 * region.token_bytes();
                self.stream.fill(&self.buffers.cache, at(tokens.start)..at(tokens.end), byte)?;
            }
        }
        Ok(true)
    }
}

impl Drop for TensorRtExecutor {
    fn drop(&mut self) {
        // Enqueued work uses the memory about to be freed. Prefill kernels are compiled in the background, so there may
        // be new ones to store; dropping the writer waits until they are.
        if self.stream.wait().is_ok() {
            self.keep_kernels();
        }
    }
}
