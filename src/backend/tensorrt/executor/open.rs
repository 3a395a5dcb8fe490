//! Opening of a plan: everything is checked first and allocated last.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::bind::Buffers;
use super::kernels::{KernelCache, KernelWriter};
use super::memory::MemoryBudget;
use super::placement::Placement;
use super::results::StepResults;
use super::schedule::{BatchingConstraints, ClassConstraints, RunKind, RunShape};
use super::{ClassEngines, LoadedEngine, TensorRtExecutor, check, mask, memory, weights};
use crate::backend::tensorrt::device::{Device, devices};
use crate::backend::tensorrt::{
    DeviceInfo, GpuEvent, GpuOptions, GpuReport, KernelCompilation, LibraryKind, TensorRtLibrary, TensorRtRuntime,
    Traced, Validity, gpu_words,
};
use crate::engine::tensorrt::{BindingRole, Compiled, Extent, TensorRtInfo};
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;

/// Upper bound on the batch size, above what any GPU has memory for.
const MOST_SEQUENCES: usize = 4096;
/// Upper bound on the number of capacity classes: each has plans of its own.
const MOST_CLASSES: usize = 16;

/// Upper bound on the decode profiles of a plan.
const MOST_PROFILES: usize = 16;

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

    fn decode_batches(&self) -> &[usize] {
        self.info.compiled.as_ref().map_or(&[], |compiled| &compiled.decode_batches)
    }

    fn engine(&self, file: &str, class: &ClassConstraints, is_context_plan: bool) -> Result<LoadedEngine> {
        let plan = self.package.mapped(file)?;
        let bytes = plan.bytes();
        let name = self.library.kind().name();
        match self.runtime.validity(bytes) {
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
        let mut engine = self.runtime.deserialize(bytes).map_err(|error| match error {
            Error::TensorRt(words) => {
                let compiled = self.info.compiled.as_ref().map_or("", |compiled| &compiled.version);
                let here = self.library.version();
                self.refuse(&format!("{name} {here} cannot read {file}, which {name} {compiled} compiled: {words}"))
            }
            other => other,
        })?;
        let largest = |input: &str, profile: u32| engine.largest(input, profile);
        let bindings = self.info.bindings_at(class.sizes.max_sequence_tokens);
        let (count, batches) = (engine.profiles(), self.decode_batches());
        check::bindings(&bindings, &engine.tensors(), is_context_plan)
            .and_then(|()| check::profiles(&bindings, &class.sizes, batches, count, is_context_plan, &largest))
            .map_err(|detail| self.refuse(&format!("{file} is not the plan that the manifest describes: {detail}")))?;
        if self.library.kind() != LibraryKind::Rtx {
            return Ok(LoadedEngine { engine, kernel_cache: None, cached_bytes: 0, cached_shapes: BTreeSet::new() });
        }
        let kernel_cache = KernelCache::new(self.package, file, &self.gpu.name, &self.library.version().to_string());
        let earlier = kernel_cache.read().unwrap_or_default();
        let is_taken = engine.keep_kernels(&earlier.kernels)?;
        let (cached_bytes, cached_shapes) =
            if is_taken { (earlier.kernels.len(), earlier.shapes) } else { (0, BTreeSet::new()) };
        Ok(LoadedEngine { engine, kernel_cache: Some(kernel_cache), cached_bytes, cached_shapes })
    }
}

impl Opening<'_> {
    /// The engines of every capacity class, ascending.
    fn classes(&self, file: &str, compiled: &Compiled, constraints: &BatchingConstraints) -> Result<Vec<ClassEngines>> {
        let smaller =
            self.info.smaller_classes.iter().map(|class| (class.plan.as_deref(), class.context_plan.as_ref()));
        let files = smaller.chain([(Some(file), compiled.context_plan.as_ref())]);
        constraints
            .classes
            .iter()
            .zip(files)
            .map(|(class, (plan, context_plan))| {
                let capacity = class.sizes.max_sequence_tokens;
                let plan = plan.ok_or_else(|| self.refuse(&format!("it has no plan for {capacity} tokens")))?;
                Ok(ClassEngines {
                    cached: self.engine(plan, class, false)?,
                    context: context_plan.map(|file| self.engine(file, class, true)).transpose()?,
                    bindings: self.info.bindings_at(capacity),
                    decode_profiles: class.sizes.decode_profiles(self.decode_batches()),
                })
            })
            .collect()
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
        library.check_driver()?;
        check::version(compiled, library.version())
            .map_err(|detail| refuse(package, plan, &detail, Remedy::Compile))?;
        let gpu = pick(info.compute_capability, &devices()?, options.device)?;
        check::device(info.compute_capability, &gpu)
            .map_err(|detail| refuse(package, plan, &detail, Remedy::AnotherGpu))?;
        if let Some(words) = check::timed_on(compiled, &gpu) {
            let path = package.path().display();
            options.report.fact(&format!("{words}; `aotron build {path} --finish` compiles it for this GPU"));
        }
        let most = plan.limits.slots;
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
        let mut constraints = constraints(plan, info).map_err(|detail| opening.refuse(&detail))?;
        let classes = opening.classes(file, compiled, &constraints)?;

        let engines = || classes.iter().flat_map(|class| std::iter::once(&class.cached).chain(&class.context));
        let scratch_bytes = engines().map(|kept| kept.engine.memory_bytes()).max().unwrap_or(0);
        let machine = MemoryBudget {
            device_bytes: gpu.memory_bytes,
            free_bytes: device.free_bytes()?,
            kv_cache_gib: &info.kv_cache_gib,
            asked: options.slots,
        };
        let (layout, words) = memory::fit(info, &mut constraints, scratch_bytes, &machine)
            .map_err(|detail| refuse(package, plan, &detail, Remedy::Nothing))?;
        options.report.fact(&format!("GPU {} ({}): {words}", gpu.index, gpu.name));
        let has_kernel_cache = engines().any(|kept| kept.kernel_cache.is_some());
        let is_lazy = options.kernels != KernelCompilation::AtOpening;
        if is_lazy && engines().any(|kept| kept.kernel_cache.is_some() && kept.cached_bytes == 0) {
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
            mask::write_triangle(host.bytes()?, triangle.bytes.isqrt() as usize);
            host.upload(0..triangle.bytes as usize, &buffers.inputs, triangle.offset, &stream)?;
        }

        let last_top = layout.outputs.tops[5];
        let results = StepResults {
            rows: Vec::new(),
            values: Vec::new(),
            ids: Vec::new(),
            sums: Vec::new(),
            tops_host: device.pinned((last_top.offset + last_top.bytes) as usize, "the largest logits")?,
            row_host: device.pinned(4 * layout.outputs.vocab_size, "a row of logits")?,
            outputs: buffers.outputs.clone(),
            places: layout.outputs,
            stream: stream.clone(),
        };
        let mut executor = TensorRtExecutor {
            ready: cached_shapes(&classes),
            compilation: options.kernels,
            has_kernel_cache,
            has_new_kernels: false,
            writer: KernelWriter::new(&options.report),
            decoders: BTreeMap::new(),
            prefills: BTreeMap::new(),
            classes,
            results,
            inputs_host: device.pinned(layout.inputs.host_bytes as usize, "a step's inputs")?,
            placement: Placement::new(layout.region.clone()),
            free_bytes: None,
            graphs: !options.no_graphs,
            report: options.report.clone(),
            buffers,
            layout,
            constraints,
            stream: stream.clone(),
        };
        executor.warm_up()?;
        Ok(executor)
    }
}

/// The runs whose kernels an earlier process left in the caches.
fn cached_shapes(classes: &[ClassEngines]) -> BTreeSet<RunShape> {
    let of_class = |(class, engines): (usize, &ClassEngines)| {
        let of_engine = move |kept: &LoadedEngine, prefill: RunKind| -> Vec<RunShape> {
            let shape = |(profile, size): &(u32, u32)| {
                let kind = if *profile == 0 { prefill } else { RunKind::Decode };
                RunShape { class, kind, size: *size as usize }
            };
            kept.cached_shapes.iter().map(shape).collect()
        };
        let context = engines.context.as_ref().map(|kept| of_engine(kept, RunKind::ContextPrefill));
        [of_engine(&engines.cached, RunKind::CachedPrefill), context.unwrap_or_default()].concat()
    };
    classes.iter().enumerate().flat_map(of_class).collect()
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

/// Batching constraints of a plan, with the plan's number of slots.
fn constraints(plan: &PlanInfo, info: &TensorRtInfo) -> Result<BatchingConstraints, String> {
    let columns = |role: BindingRole| {
        let binding = info.bindings.iter().find(|binding| binding.role == role)?;
        binding.shape.last().and_then(|extent| if let Extent::Fixed(n) = extent { Some(*n) } else { None })
    };
    let Some(k) = columns(BindingRole::TopLogits) else {
        return Err("it has no output of the largest logits".into());
    };
    let Some(sums) = columns(BindingRole::LogitSums) else {
        return Err("it was compiled before plans returned sums of logits, by which a NaN is seen".into());
    };
    let limits = &plan.limits;
    let all = info.class_sizes();
    for sizes in &all {
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
            sums,
        ];
        // Then the product of two sizes fits a usize, and inputs, which are i32, hold any of them.
        let sound = positive.iter().all(|n| (1..=i32::MAX as usize).contains(n));
        if !sound || sizes.decode_sequences > MOST_SEQUENCES || limits.slots > MOST_SEQUENCES {
            return Err(format!("its sizes do not make sense: {sizes:?} and {limits:?}"));
        }
    }
    let batches = info.compiled.as_ref().map_or(&[][..], |compiled| &compiled.decode_batches);
    if batches.first() == Some(&0) || !batches.is_sorted_by(|a, b| a < b) || batches.len() > MOST_PROFILES {
        return Err(format!("its decode profiles are not in ascending order, or are too many: {batches:?}"));
    }
    let ascending = all.windows(2).all(|pair| pair[0].max_sequence_tokens < pair[1].max_sequence_tokens);
    if !ascending || all.len() > MOST_CLASSES {
        let capacities: Vec<usize> = all.iter().map(|sizes| sizes.max_sequence_tokens).collect();
        return Err(format!("its capacity classes are not in ascending order, or are too many: {capacities:?}"));
    }
    if limits.max_sequence_tokens != info.sizes.max_sequence_tokens {
        let (of_limits, of_sizes) = (limits.max_sequence_tokens, info.sizes.max_sequence_tokens);
        return Err(format!("its limits allow {of_limits} tokens per sequence, its sizes {of_sizes}"));
    }
    let context_plans = info.smaller_classes.iter().map(|class| class.context_plan.is_some());
    let context_plan = info.compiled.as_ref().is_some_and(|compiled| compiled.context_plan.is_some());
    let classes = all.into_iter().zip(context_plans.chain([context_plan]));
    let classes = classes.map(|(sizes, has_context_plan)| ClassConstraints { sizes, has_context_plan }).collect();
    let row_align = memory::row_align([limits.vocab_size, k, sums]);
    Ok(BatchingConstraints { limits: limits.clone(), classes, rows: limits.slots, row_align })
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
                reference: true,
            };
            build(&request, &(Arc::new(Quiet) as Arc<dyn Progress>)).unwrap();
            let package = Package::open(Path::new(&output)).unwrap();
            let plan = &package.manifest().plans[0];
            let info = plan.tensorrt.as_ref().unwrap();
            let mut constraints = constraints(plan, info).unwrap();
            let machine = MemoryBudget {
                device_bytes: 85_000_000_000,
                free_bytes: 84_000_000_000,
                kv_cache_gib: &info.kv_cache_gib,
                asked: None,
            };
            let (layout, words) = memory::fit(info, &mut constraints, 1 << 20, &machine).unwrap();
            assert_eq!(layout.region.slots, plan.limits.slots, "{words}");
            let token_bytes: u64 = layout.caches.values().map(memory::CacheRegion::token_bytes).sum();
            assert_eq!(token_bytes as usize, plan.kv_bytes_per_token);
            let file = TensorFile::open(&package.file_path(&plan.weights)).unwrap();
            let data = weights::find(&file, &info.bindings, &layout).unwrap();
            assert_eq!(data.len(), info.bindings.iter().filter(|b| b.role == BindingRole::Weight).count());
            assert!(!data.is_empty());
        }
    }
}
