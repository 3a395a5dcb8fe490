//! The executor that runs TensorRT plans on a GPU.
//!
//! Opening validates first and allocates last: that the plan is compiled, that its library and GPU are present, that
//! its bindings match the manifest and that its memory fits is all checked before a weight is copied.
//!
//! Keys and values of a layer are contiguous, `[slots, kv_heads, S, head_dim]`, the layout a plan expects for B =
//! slots; a run of one slot binds the address of that slot with B = 1. Each decode batch size has an execution context
//! of its own, whose run is captured as a CUDA graph after its first execution: the same kernels at the same addresses,
//! with one launch.
//!
//! Only the top-k logits of each row are copied to the host in every step; full rows are fetched on demand. The batch
//! size selects the kernels, so a sequence's logits may differ in their last bits depending on the rest of the batch.

mod bind;
mod check;
mod kernels;
mod mask;
mod memory;
mod schedule;
mod weights;

use std::collections::BTreeMap;
use std::sync::Arc;

use self::bind::{Binder, Buffers};
use self::kernels::KernelCache;
use self::memory::{BufferRange, MemoryBudget, MemoryLayout};
use self::schedule::{BatchingConstraints, PlanRun, RunKind, schedule};
use super::device::{Buffer, CudaGraph, Device, Pinned, Stream, devices};
use super::{
    CudaEngine, DeviceInfo, ExecutionContext, GpuEvent, GpuOptions, GpuReport, LibraryKind, TensorRtLibrary,
    TensorRtRuntime, Traced, Validity, gpu_words,
};
use crate::backend::{DeferredLogits, Executor, Logits, Step, Top};
use crate::engine::tensorrt::{Binding, BindingRole, Extent, TensorRtInfo};
use crate::engine::{Limits, Package, PlanInfo};
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;

/// The TensorRT executor.
// Fields drop in declaration order: graphs and contexts before engines, and those before the memory they use.
pub struct TensorRtExecutor {
    /// Decode contexts by batch size.
    decoders: BTreeMap<usize, Decoder>,
    prefill: Prefill,
    context_prefill: Option<Prefill>,
    engines: Vec<LoadedEngine>,
    results: StepResults,
    inputs_host: Pinned,
    buffers: Buffers,
    layout: MemoryLayout,
    constraints: BatchingConstraints,
    bindings: Vec<Binding>,
    /// Tokens in each slot after the last step that named it.
    held: Vec<usize>,
    graphs: bool,
    report: GpuReport,
    stream: Arc<Stream>,
}

/// A context for decoding at one batch size, and its run captured as a graph.
struct Decoder {
    graph: Option<CudaGraph>,
    context: ExecutionContext,
}

/// A context for prefill, and the slot it is bound to.
struct Prefill {
    context: ExecutionContext,
    slot: Option<usize>,
}

/// A deserialized engine and its kernel cache.
struct LoadedEngine {
    engine: CudaEngine,
    kernel_cache: Option<KernelCache>,
    /// Size of the kernels stored in the cache.
    cached_bytes: usize,
}

/// Results of the last step.
struct StepResults {
    /// Output row of each requested row.
    rows: Vec<usize>,
    values: Vec<f32>, // [rows, k]
    ids: Vec<u32>,    // [rows, k]
    tops_host: Pinned,
    row_host: Pinned, // one row of logits
    outputs: Arc<Buffer>,
    places: memory::OutputRanges,
    stream: Arc<Stream>,
}

/// Reads and checks one plan file of a package.
struct Opening<'a> {
    package: &'a Package,
    plan: &'a PlanInfo,
    info: &'a TensorRtInfo,
    runtime: &'a TensorRtRuntime,
    library: TensorRtLibrary,
    gpu: &'a DeviceInfo,
    report: &'a GpuReport,
}

impl Opening<'_> {
    fn refuse(&self, detail: &str) -> Error {
        refuse(self.package, self.plan, detail, Remedy::Compile)
    }

    fn engine(&self, file: &str, is_context_plan: bool) -> Result<LoadedEngine> {
        let bytes = self.package.read(file)?;
        let name = self.library.kind().name();
        match self.runtime.validity(&bytes) {
            Validity::Unknown | Validity::Valid => {}
            Validity::Suboptimal => {
                let finish = format!("`aotron build {} --finish`", self.package.path().display());
                self.report
                    .fact(&format!("{name} runs {file} slower than it could on this machine; {finish} recompiles it"));
            }
            Validity::Invalid(reasons) if reasons.is_empty() => {
                return Err(self.refuse(&format!("{name} cannot run {file} and gives no reason")));
            }
            Validity::Invalid(reasons) => {
                return Err(self.refuse(&format!("{name} cannot run {file}: {}", reasons.join(", "))));
            }
        }
        let mut engine = self.runtime.deserialize(&bytes)?;
        let largest = |input: &str, profile: u32| engine.largest(input, profile);
        check::bindings(&self.info.bindings, &engine.tensors(), is_context_plan)
            .and_then(|()| {
                check::profiles(&self.info.bindings, &self.info.sizes, engine.profiles(), is_context_plan, &largest)
            })
            .map_err(|detail| self.refuse(&format!("{file} is not the plan that the manifest describes: {detail}")))?;
        if self.library.kind() != LibraryKind::Rtx {
            return Ok(LoadedEngine { engine, kernel_cache: None, cached_bytes: 0 });
        }
        let kernel_cache = KernelCache::new(self.package, file, &self.gpu.name, &self.library.version().to_string());
        let earlier = kernel_cache.read().unwrap_or_default();
        let cached_bytes = if engine.keep_kernels(&earlier)? { earlier.len() } else { 0 };
        Ok(LoadedEngine { engine, kernel_cache: Some(kernel_cache), cached_bytes })
    }
}

/// Remedy for a plan that cannot run, for the error message.
enum Remedy {
    Compile,
    AnotherGpu,
    Nothing,
}

fn refuse(package: &Package, plan: &PlanInfo, detail: &str, remedy: Remedy) -> Error {
    let path = package.path().display();
    let remedy = match remedy {
        Remedy::Compile => format!("; `aotron build {path} --finish` on this machine recompiles it"),
        Remedy::AnotherGpu => "; build a package with a recipe for this GPU".into(),
        Remedy::Nothing => String::new(),
    };
    Error::package(package.path(), format!("plan {} ({}): {detail}{remedy}", plan.target, plan.precision))
}

impl TensorRtExecutor {
    /// Opens a plan of a package.
    ///
    /// # Errors
    /// [`Error::Package`] if the plan is not compiled, not for this machine's library or GPU, or does not match the
    /// manifest; [`Error::TensorRt`] and [`Error::Gpu`] in the words of the library and the driver, or if memory runs
    /// out.
    pub fn open(package: &Package, plan: &PlanInfo, options: &GpuOptions) -> Result<TensorRtExecutor> {
        let Some(info) = &plan.tensorrt else {
            return Err(refuse(package, plan, "it is not a TensorRT plan", Remedy::Nothing));
        };
        let (Some(compiled), Some(file)) = (&info.compiled, &plan.plan) else {
            let detail = format!("it was prepared only, not compiled for {}", gpu_words(info.compute_capability));
            return Err(refuse(package, plan, &detail, Remedy::Compile));
        };
        let library = TensorRtLibrary::find(compiled.library)?;
        check::version(compiled, library.version())
            .map_err(|detail| refuse(package, plan, &detail, Remedy::Compile))?;
        let gpu = pick(info.compute_capability, &devices()?, options.device)?;
        check::device(info.compute_capability, &gpu)
            .map_err(|detail| refuse(package, plan, &detail, Remedy::AnotherGpu))?;
        let most = info.sizes.decode_sequences.min(plan.limits.slots);
        if let Some(asked) = options.slots
            && !(1..=most).contains(&asked)
        {
            return Err(Error::Request(format!("{asked} slots, but this plan was built for 1 to {most}")));
        }

        // The GPU's context is current on this thread from here on, as TensorRT requires.
        let stream = Arc::new(Device::open(gpu.index)?.stream()?);
        let device = stream.device();
        let runtime = library.runtime(Arc::new(Traced))?;
        let opening = Opening { package, plan, info, runtime: &runtime, library, gpu: &gpu, report: &options.report };
        let mut engines = vec![opening.engine(file, false)?];
        if let Some(first) = &compiled.context_plan {
            engines.push(opening.engine(first, true)?);
        }

        let scratch_bytes = engines.iter().map(|kept| kept.engine.memory_bytes()).max().unwrap_or(0);
        let mut constraints = constraints(plan, info, engines.len() > 1).map_err(|detail| opening.refuse(&detail))?;
        let machine = MemoryBudget {
            device_bytes: gpu.memory_bytes,
            free_bytes: device.free_bytes()?,
            kv_cache_gib: &info.kv_cache_gib,
            asked: options.slots,
        };
        let (layout, words) = memory::fit(info, &mut constraints, scratch_bytes, &machine)
            .map_err(|detail| refuse(package, plan, &detail, Remedy::Nothing))?;
        options.report.fact(&format!("GPU {} ({}): {words}", gpu.index, gpu.name));
        if engines.iter().any(|kept| kept.kernel_cache.is_some() && kept.cached_bytes == 0) {
            options.report.fact("kernels are compiled on first use and cached for the next start");
        }

        let allocate = |bytes: u64, what: &str| device.allocate(bytes, what).map(Arc::new);
        let buffers = Buffers {
            weights: allocate(layout.weights_bytes, "weights")?,
            cache: allocate(layout.cache_bytes, "the KV cache")?,
            inputs: allocate(layout.inputs_bytes, "a step's inputs")?,
            outputs: allocate(layout.outputs_bytes, "logits")?,
            scratch: allocate(layout.scratch_bytes, "TensorRT's scratch memory")?,
        };
        // Attention multiplies values past a sequence's end by zero, so they must never be NaN. Runs only write
        // numbers.
        stream.zero(&buffers.cache)?;
        let weights_file = TensorFile::open(&package.file_path(&plan.weights))?;
        let data = weights::find(&weights_file, &info.bindings, &layout)?;
        weights::upload(&data, &layout, &buffers.weights, &stream, &|done_bytes| {
            options.report.event(&GpuEvent::Loading { done_bytes, total_bytes: layout.weights_bytes });
        })?;

        let triangle = layout.inputs.triangle;
        if triangle.bytes > 0 {
            let mut host = device.pinned(triangle.bytes as usize, "the attention mask")?;
            mask::write_triangle(host.bytes()?, info.sizes.prefill_tokens);
            host.upload(0..triangle.bytes as usize, &buffers.inputs, triangle.offset, &stream)?;
        }

        let binder = Binder { bindings: &info.bindings, layout: &layout, buffers: &buffers };
        let prefill = |kept: &LoadedEngine, is_context_plan: bool| -> Result<Prefill> {
            let mut context = kept.engine.context(0, false, &stream)?;
            binder.fixed(&mut context, is_context_plan)?;
            Ok(Prefill { context, slot: None })
        };
        let prefill_context = prefill(&engines[0], false)?;
        let context_prefill = engines.get(1).map(|kept| prefill(kept, true)).transpose()?;
        let last_top = layout.outputs.tops[3];
        let results = StepResults {
            rows: Vec::new(),
            values: Vec::new(),
            ids: Vec::new(),
            tops_host: device.pinned((last_top.offset + last_top.bytes) as usize, "the largest logits")?,
            row_host: device.pinned(4 * layout.outputs.vocab_size, "a row of logits")?,
            outputs: buffers.outputs.clone(),
            places: layout.outputs,
            stream: stream.clone(),
        };
        Ok(TensorRtExecutor {
            decoders: BTreeMap::new(),
            prefill: prefill_context,
            context_prefill,
            engines,
            results,
            inputs_host: device.pinned(layout.inputs.host_bytes as usize, "a step's inputs")?,
            held: vec![0; layout.slots],
            bindings: info.bindings.clone(),
            graphs: !options.no_graphs,
            report: options.report.clone(),
            buffers,
            layout,
            constraints,
            stream: stream.clone(),
        })
    }

    /// The GPU the plan runs on.
    pub fn gpu(&self) -> &DeviceInfo {
        self.stream.device().info()
    }

    fn run_step(&mut self, step: &Step) -> Result<()> {
        self.results.rows.clear();
        self.stream.device().bind()?;
        let mut held = self.held.clone();
        for span in step.spans() {
            if let Some(held) = held.get_mut(span.slot) {
                *held = span.past_tokens + span.len;
            }
        }
        let schedule = schedule(step, &held, &self.constraints)?;
        self.held = held;
        for run in &schedule.runs {
            if let Err(error) = self.run(run) {
                // If the GPU failed, the driver's error is more specific than TensorRT's.
                return Err(self.stream.wait().err().unwrap_or(error));
            }
        }
        self.results.take(schedule.rows)
    }

    fn run(&mut self, run: &PlanRun) -> Result<()> {
        let inputs = &self.layout.inputs;
        let has_mask = inputs.mask.bytes > 0;
        let is_decode = run.kind == RunKind::Decode;
        let capacity = self.constraints.sizes.max_sequence_tokens;
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
            let rows = host.get_mut(rows.clone()).ok_or_else(|| Error::Step("a mask exceeds its buffer".into()))?;
            mask::write_rows(rows, &run.total_tokens, capacity)?;
            host_bytes += rows.len();
        }
        self.inputs_host.upload(0..host_bytes, &self.buffers.inputs, 0, &self.stream)?;
        if is_decode {
            return self.decode(run);
        }
        if has_mask && run.kind == RunKind::CachedPrefill {
            let past = run.past_tokens.first().map_or(0, |past| *past as usize);
            mask::write_prefill(&self.stream, &self.buffers.inputs, inputs, (past, run.tokens), capacity)?;
        }
        let binder = Binder { bindings: &self.bindings, layout: &self.layout, buffers: &self.buffers };
        let prefill = match (&mut self.context_prefill, run.kind) {
            (Some(prefill), RunKind::ContextPrefill) => prefill,
            _ => &mut self.prefill,
        };
        let is_context_plan = run.kind == RunKind::ContextPrefill;
        if prefill.slot != Some(run.first_slot) {
            prefill.slot = None;
            binder.caches(&mut prefill.context, run)?;
            prefill.slot = Some(run.first_slot);
        }
        binder.step(&mut prefill.context, run, is_context_plan)?;
        prefill.context.enqueue(&self.stream)
    }

    fn decode(&mut self, run: &PlanRun) -> Result<()> {
        if let Some(decoder) = self.decoders.get_mut(&run.sequences) {
            return match &decoder.graph {
                Some(graph) => self.stream.replay(graph),
                None => decoder.context.enqueue(&self.stream),
            };
        }
        // The first run of this batch size: TensorRT allocates here, so it cannot be captured yet.
        let mut context = self.engines[0].engine.context(1, true, &self.stream)?;
        let binder = Binder { bindings: &self.bindings, layout: &self.layout, buffers: &self.buffers };
        binder.fixed(&mut context, false)?;
        binder.caches(&mut context, run)?;
        binder.step(&mut context, run, false)?;
        context.enqueue(&self.stream)?;
        let mut graph = None;
        if self.graphs {
            match context.record(&self.stream) {
                Ok(recorded) => graph = Some(recorded),
                Err(error) => {
                    self.graphs = false;
                    self.report.fact(&format!("decoding without CUDA graphs, which is a little slower: {error}"));
                }
            }
        }
        self.decoders.insert(run.sequences, Decoder { context, graph });
        self.keep_kernels();
        Ok(())
    }

    /// Writes the kernel caches of engines that have compiled kernels since the last write.
    fn keep_kernels(&mut self) {
        for kept in &mut self.engines {
            let Some(kernel_cache) = &kept.kernel_cache else { continue };
            let Ok(kernels) = kept.engine.kernels() else { continue };
            if kernels.len() == kept.cached_bytes {
                continue;
            }
            if let Err(reason) = kernel_cache.write(&kernels) {
                self.report.fact(&format!(
                    "compiled kernels cannot be cached, so the next start compiles them again: {reason}"
                ));
                kept.kernel_cache = None;
            }
            kept.cached_bytes = kernels.len();
        }
    }
}

impl Executor for TensorRtExecutor {
    fn limits(&self) -> &Limits {
        &self.constraints.limits
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        self.run_step(step)?;
        Ok(Logits::deferred(&mut self.results))
    }
}

impl Drop for TensorRtExecutor {
    fn drop(&mut self) {
        // Enqueued work uses the memory about to be freed. Prefill kernels are compiled in the background, so there may
        // be new ones to store.
        if self.stream.wait().is_ok() {
            self.keep_kernels();
        }
    }
}

/// Picks the GPU for a plan: the requested one, else the first of the plan's compute capability, else the first.
fn pick(compute_capability: u16, devices: &[DeviceInfo], asked: Option<usize>) -> Result<DeviceInfo> {
    let found = match asked {
        Some(index) => devices.get(index),
        None => devices.iter().find(|device| device.compute_capability == compute_capability).or(devices.first()),
    };
    found.cloned().ok_or_else(|| match (asked, devices.len()) {
        (_, 0) => {
            Error::Gpu("the NVIDIA driver is loaded but finds no GPU (does CUDA_VISIBLE_DEVICES hide it?)".into())
        }
        (index, count) => Error::Gpu(format!("there is no GPU {}, only 0 to {}", index.unwrap_or(0), count - 1)),
    })
}

/// Upper bound on the batch size, above what any GPU has memory for.
const MOST_SEQUENCES: usize = 4096;

/// Batching constraints of a plan, with the plan's number of slots.
fn constraints(plan: &PlanInfo, info: &TensorRtInfo, has_context_plan: bool) -> Result<BatchingConstraints, String> {
    let k = info.bindings.iter().find(|binding| binding.role == BindingRole::TopLogits).and_then(|b| b.shape.last());
    let Some(Extent::Fixed(k)) = k.copied() else {
        return Err("it has no output of the largest logits".into());
    };
    let (sizes, limits) = (&info.sizes, &plan.limits);
    let positive = [
        sizes.max_sequence_tokens,
        sizes.decode_sequences,
        sizes.prefill_sequences,
        sizes.prefill_tokens,
        sizes.prefill_logits_rows,
        limits.slots,
        limits.max_step_tokens,
        limits.max_logits_rows,
        limits.vocab_size,
        k,
    ];
    // Then the product of two sizes fits a usize, and inputs, which are i32, hold any of them.
    let sound = positive.iter().all(|n| (1..=i32::MAX as usize).contains(n));
    if !sound || sizes.decode_sequences > MOST_SEQUENCES {
        return Err(format!("its sizes do not make sense: {sizes:?} and {limits:?}"));
    }
    if limits.max_sequence_tokens != sizes.max_sequence_tokens {
        let (of_limits, of_sizes) = (limits.max_sequence_tokens, sizes.max_sequence_tokens);
        return Err(format!("its limits allow {of_limits} tokens per sequence, its sizes {of_sizes}"));
    }
    let row_align = memory::row_align(limits.vocab_size, k);
    Ok(BatchingConstraints { limits: limits.clone(), sizes: sizes.clone(), has_context_plan, row_align })
}

impl StepResults {
    /// Copies the top-k logits of the rows to the host in one transfer, and waits for it.
    fn take(&mut self, rows: Vec<usize>) -> Result<()> {
        self.values.clear();
        self.ids.clear();
        if rows.is_empty() {
            return Ok(());
        }
        let is_decode = |row: &usize| *row < self.places.decode_rows;
        let (decode, prefill) = (rows.iter().any(is_decode), !rows.iter().all(is_decode));
        let range = self.places.written(decode, prefill);
        let offset = range.start as u64;
        self.tops_host.download(range, &self.outputs, offset, &self.stream)?;
        let host = self.tops_host.bytes()?;
        let row_bytes = 4 * self.places.k;
        for row in &rows {
            let [values, ids] = self.places.top(*row).map(|offset| offset as usize..offset as usize + row_bytes);
            let (Some(values), Some(ids)) = (host.get(values), host.get(ids)) else {
                return Err(Error::Step(format!("output row {row} is out of range")));
            };
            self.values.extend(values.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            self.ids.extend(ids.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
        }
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= self.places.vocab_size) {
            let most = self.places.vocab_size - 1;
            return Err(Error::Numerics(format!("the plan returned token id {id}, but the last id is {most}")));
        }
        self.rows = rows;
        Ok(())
    }
}

impl DeferredLogits for StepResults {
    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn top(&self, row: usize) -> Top<'_> {
        let range = row * self.places.k..(row + 1) * self.places.k;
        Top { values: &self.values[range.clone()], ids: &self.ids[range] }
    }

    fn fetch(&mut self, row: usize) -> Result<&[f32]> {
        let BufferRange { offset, bytes } = self.places.row(self.rows[row]);
        self.row_host.download(0..bytes as usize, &self.outputs, offset, &self.stream)?;
        let bytes = self.row_host.bytes()?;
        bytemuck::try_cast_slice(bytes).map_err(|error| Error::Gpu(format!("pinned memory is not aligned: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::compile::{BuildRequest, Precision, Progress, Recipe, build};

    struct Quiet;
    impl Progress for Quiet {
        fn stage(&self, _: &str, _: u64) {}
        fn advance(&self, _: u64) {}
        fn warn(&self, _: &str) {}
    }

    /// The executor accepts the sizes, bindings and weights that the builder writes.
    #[test]
    fn packages_of_the_builder_can_be_laid_out() {
        if let Err(missing) = TensorRtLibrary::find(LibraryKind::Rtx) {
            crate::skips::skip("tensorrt", "packages_of_the_builder_can_be_laid_out", missing);
            return;
        }
        for (target, precision) in [("a100", Precision::Bf16), ("a100", Precision::Int8), ("h100", Precision::Fp8)] {
            let folder = tempfile::tempdir().unwrap();
            let output = folder.path().join("package");
            let request = BuildRequest {
                checkpoint: "tests/data/tiny-chat".into(),
                recipes: vec![Recipe { precision, ..Recipe::load(target).unwrap() }],
                output: output.clone(),
                replace: false,
                prepare: true,
                calibration: None,
                chat_format: None,
            };
            build(&request, &(Arc::new(Quiet) as Arc<dyn Progress>)).unwrap();
            let package = Package::open(Path::new(&output)).unwrap();
            let plan = &package.manifest().plans[0];
            let info = plan.tensorrt.as_ref().unwrap();
            let mut constraints = constraints(plan, info, true).unwrap();
            let machine = MemoryBudget {
                device_bytes: 85_000_000_000,
                free_bytes: 84_000_000_000,
                kv_cache_gib: &info.kv_cache_gib,
                asked: None,
            };
            let (layout, words) = memory::fit(info, &mut constraints, 1 << 20, &machine).unwrap();
            assert_eq!(layout.slots, plan.limits.slots, "{words}");
            assert_eq!(
                layout.slot_bytes.values().sum::<u64>() as usize,
                plan.kv_bytes_per_token * plan.limits.max_sequence_tokens
            );
            let file = TensorFile::open(&package.file_path(&plan.weights)).unwrap();
            let data = weights::find(&file, &info.bindings, &layout).unwrap();
            assert_eq!(data.len(), info.bindings.iter().filter(|b| b.role == BindingRole::Weight).count());
            assert!(!data.is_empty());
        }
    }
}
