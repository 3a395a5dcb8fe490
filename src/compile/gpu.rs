//! The TensorRT part of a build: selects the library that can compile a plan on this machine, and compiles it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use super::timings::KernelTimings;
use super::{Calibration, PassReport, Precision, Progress, Recipe, optimized_graph};
use crate::backend::Limits;
use crate::backend::tensorrt::lower::{Attends, Constants, LoweredNetwork, LoweringOptions, PlanWeight, lower_with};
use crate::backend::tensorrt::{
    BuildOptions, DeviceInfo, LibraryKind, Monitor, SerializedPlan, Severity, TensorRtLibrary, Traced, devices, stage,
};
use crate::checkpoint::ModelConfig;
use crate::engine::tensorrt::{AttentionInput, Binding, CapacityClass, Compiled, Sizes, TensorRtInfo, TimedOn};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::tensor_file::TensorFile;

/// SM 8.9, the lowest compute capability with FP8. Plans that cannot be compiled for their own are compiled for this
/// one as a check.
pub const CHECKED_CAPABILITY: u16 = 89;

/// The library and target with which plans are compiled on this machine.
#[derive(Debug, Clone, Copy)]
pub struct PlanCompiler {
    /// Library that compiles or checks the plan.
    library: TensorRtLibrary,
    /// Compute capability to compile for; `None` is the GPU in this machine.
    capability: Option<u16>,
    /// Index of the GPU in this machine to compile on, if it matters.
    gpu: Option<usize>,
    /// Compiles for [`CHECKED_CAPABILITY`] as a check and discards the result.
    only_checked: bool,
}

impl PlanCompiler {
    /// Selects how to compile a plan for GPUs of this compute capability: with TensorRT 11 if this machine has such a
    /// GPU; else with TensorRT for RTX if it can target them; else, with `prepare`, by only checking the graph.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with what is missing and the alternatives.
    pub fn find(target: &str, capability: u16, prepare: bool) -> Result<PlanCompiler> {
        let gpu = target.to_uppercase();
        let advice = format!(
            "Either build there; or pass --prepare to quantize and pack the weights here and check the graph, and run \
             `aotron build PACKAGE --finish` on the {gpu}."
        );
        PlanCompiler::select(target, capability, prepare, &advice)
    }

    /// As [`PlanCompiler::find`], for the plan of an existing package.
    ///
    /// # Errors
    /// As [`PlanCompiler::find`].
    pub fn find_to_finish(target: &str, capability: u16) -> Result<PlanCompiler> {
        let gpu = target.to_uppercase();
        let advice = format!("Copy the package to a machine with an {gpu} and run the same command there.");
        PlanCompiler::select(target, capability, false, &advice)
    }

    fn select(target: &str, capability: u16, prepare: bool, advice: &str) -> Result<PlanCompiler> {
        let (sm, gpu) = (sm(capability), target.to_uppercase());
        // Without a working driver there are no usable GPUs, whatever the reason.
        let here = devices().unwrap_or_default();
        let device = here.into_iter().find(|device| device.compute_capability == capability);
        let checked = |library: TensorRtLibrary| library.check_driver().map(|()| library);
        let enterprise = device.as_ref().map(|_| TensorRtLibrary::find(LibraryKind::TensorRt).and_then(checked));
        if let (Some(Ok(library)), Some(device)) = (&enterprise, &device) {
            let (library, gpu) = (*library, Some(device.index));
            return Ok(PlanCompiler { library, capability: None, gpu, only_checked: false });
        }
        let rtx = match TensorRtLibrary::find(LibraryKind::Rtx) {
            Ok(library) => library,
            Err(missing) => {
                let on_gpu = enterprise.and_then(Result::err).map(|error| format!("; {}", words(&error)));
                let on_gpu = on_gpu.unwrap_or_default();
                return Err(Error::TensorRt(format!("cannot build for {target} here: {}{on_gpu}", words(&missing))));
            }
        };
        match rtx.compiles_for(Some(capability)) {
            Ok(()) => Ok(PlanCompiler { library: rtx, capability: Some(capability), gpu: None, only_checked: false }),
            Err(_) if prepare => {
                Ok(PlanCompiler { library: rtx, capability: Some(CHECKED_CAPABILITY), gpu: None, only_checked: true })
            }
            Err(_) => {
                let why = match enterprise {
                    Some(Err(missing)) => words(&missing),
                    _ => format!("this machine has no {gpu}"),
                };
                Err(Error::TensorRt(format!(
                    "cannot build for {target} here: only TensorRT 11 on an {gpu} compiles for SM {sm}, and {why}. \
                     {advice}"
                )))
            }
        }
    }

    /// Returns true if the plan is not compiled and only its graph is checked.
    pub fn only_checks(&self) -> bool {
        self.only_checked
    }

    /// Index of the GPU that plans are compiled on, if it matters.
    pub(super) fn gpu(&self) -> Option<usize> {
        self.gpu
    }

    /// The GPU that plans are compiled on.
    pub(super) fn timed_on(&self) -> Option<TimedOn> {
        let DeviceInfo { name, memory_bytes, .. } = devices().ok()?.into_iter().nth(self.gpu?)?;
        Some(TimedOn { name, memory_bytes })
    }

    /// Library and target as text.
    pub fn describe(&self) -> String {
        let library = format!("{} {}", self.library.kind().name(), self.library.version());
        match (self.capability, self.gpu) {
            (Some(capability), _) => format!("{library} for SM {}", sm(capability)),
            (None, Some(gpu)) => format!("{library} on GPU {gpu}"),
            (None, None) => format!("{library} for the GPU in this machine"),
        }
    }
}

/// Formats a compute capability: 80 as "8.0".
pub fn sm(capability: u16) -> String {
    format!("{}.{}", capability / 10, capability % 10)
}

/// Text of a TensorRT or GPU error without its prefix.
fn words(error: &Error) -> String {
    match error {
        Error::TensorRt(words) | Error::Gpu(words) => words.clone(),
        other => other.to_string(),
    }
}

/// A lowered plan that is to be packed and compiled.
pub struct GpuPlan {
    means: PlanCompiler,
    /// Sizes of the capacity classes, ascending.
    classes: Vec<Sizes>,
    graph: Graph,
    /// Reports of the graph passes.
    pub reports: Vec<PassReport>,
    /// Weights to pack.
    pub weights: Vec<PlanWeight>,
    bindings: Vec<Binding>,
    kv_cache_gib: BTreeMap<u32, u32>,
    activation_scales: BTreeMap<String, f32>,
    compute_capability: u16,
    context_plan: bool,
    attention: AttentionInput,
    lowering: LoweringOptions,
    optimization_level: usize,
    tiling_optimization_level: usize,
}

/// The compiled plans of a capacity class.
pub struct CompiledPlans {
    /// Cache capacity per sequence.
    pub capacity_tokens: usize,
    /// The plan that reads the cache, with profiles for prefill and decode.
    pub plan: SerializedPlan,
    /// The context plan, for prefill of sequences without a past.
    pub context_plan: Option<SerializedPlan>,
}

impl GpuPlan {
    /// Lowers a model for the recipe's GPU. `calibration` is used by precisions that need it.
    ///
    /// # Errors
    /// [`Error::Recipe`] if the recipe is not for a GPU; [`Error::Graph`] or [`Error::TensorRt`] if the model cannot be
    /// lowered.
    pub fn new(
        config: &ModelConfig,
        recipe: &Recipe,
        limits: &Limits,
        means: PlanCompiler,
        calibration: Option<&Calibration>,
    ) -> Result<GpuPlan> {
        let (Some(options), Some(compute_capability)) = (&recipe.tensorrt, recipe.target.compute_capability()) else {
            let detail = "it is not for a GPU".into();
            return Err(Error::Recipe { name: recipe.name.clone(), detail });
        };
        let classes = recipe.tensorrt_classes(options, limits, config);
        let sizes = classes.last().ok_or_else(|| Error::internal("a plan without sizes", "a capacity class"))?;
        let (graph, reports) = optimized_graph(config, recipe.precision, limits.max_sequence_tokens, calibration)?;
        let network = means.library.network_on(means.gpu, Arc::new(Traced))?;
        let fp8_weights = recipe.fp8_kinds().first().copied().unwrap_or_default();
        // TensorRT for RTX specializes kernels for the batch when a plan runs.
        let decode_batches = match means.library.kind() {
            LibraryKind::TensorRt => options.decode_batches.clone(),
            LibraryKind::Rtx => Vec::new(),
        };
        let lowering = LoweringOptions { fp8_weights, decode_batches };
        let LoweredNetwork { weights, bindings, .. } =
            lower_with(&graph, network, Attends::Cache(options.attention), sizes, &Constants::Arbitrary, &lowering)?;
        let holds_weights = weights.iter().any(|weight| weight.in_plan);
        let scales = calibration.filter(|_| recipe.precision.needs_calibration()).map(Calibration::scales);
        Ok(GpuPlan {
            means,
            classes,
            graph,
            reports,
            weights,
            bindings,
            kv_cache_gib: options.kv_cache_gib.clone(),
            activation_scales: scales.cloned().unwrap_or_default(),
            compute_capability,
            context_plan: options.context_plan.unwrap_or(!holds_weights),
            attention: options.attention,
            lowering,
            optimization_level: options.optimization_level,
            tiling_optimization_level: options.tiling_optimization_level,
        })
    }

    /// Returns true if the weights that are embedded in the plan are not as the weights file has them, so that
    /// [`GpuPlan::stage`] has to be called.
    pub fn stages_weights(&self) -> bool {
        self.weights.iter().any(PlanWeight::is_staged)
    }

    /// Writes the weights that are embedded in the plan to the temporary file `path`, in the layout of the plan's
    /// constants. The caller removes the file.
    ///
    /// # Errors
    /// [`Error::Format`] if they are not in `packed`; [`Error::Io`] if the file cannot be written; [`Error::Cancelled`].
    pub fn stage(&self, packed: &TensorFile, path: &Path, progress: &dyn Progress) -> Result<()> {
        let embedded = self.weights.iter().filter(|weight| weight.in_plan);
        progress.stage("transposing", embedded.map(PlanWeight::bytes).sum());
        let file = File::create_new(path).map_err(Error::io("create", path))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        stage::write(&self.weights, packed, &mut |piece| {
            progress.advance(piece.len() as u64);
            match progress.is_cancelled() {
                true => Err(Error::Cancelled),
                false => out.write_all(piece).map_err(Error::io("write", path)),
            }
        })?;
        out.flush().map_err(Error::io("write", path))
    }

    /// The compiler that was selected.
    pub fn means(&self) -> PlanCompiler {
        self.means
    }

    /// Returns true if weights are embedded in the plan, so that they must be packed before it is compiled.
    pub fn holds_weights(&self) -> bool {
        self.weights.iter().any(|weight| weight.in_plan)
    }

    /// Number of plans to compile.
    pub fn compiled_plans(&self) -> u64 {
        (0..self.classes.len()).map(|class| 1 + u64::from(self.has_context_plan(class))).sum()
    }

    /// Returns true if a class has a context plan: a sequence is in the smallest class that holds it, so a prompt's first
    /// chunk is in one of those below or just above its length.
    fn has_context_plan(&self, class: usize) -> bool {
        let Some(below) = class.checked_sub(1).and_then(|below| self.classes.get(below)) else {
            return self.context_plan;
        };
        self.context_plan && below.max_sequence_tokens <= longest_chunk(&self.classes)
    }

    /// Compiles the plans of all capacity classes, ascending. Returns `None` if they were only checked.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message; [`Error::Cancelled`].
    pub fn compile(
        &self,
        target: &str,
        constants: &Constants,
        progress: &Arc<dyn Progress>,
    ) -> Result<Option<Vec<CompiledPlans>>> {
        let library = self.means.library;
        let mut timings = self.means.timed_on().map(|gpu| KernelTimings::of(&gpu.name, &library.version().to_string()));
        let verb = if self.means.only_checked { "checking" } else { "compiling" };
        let mut compile = |attends, sizes: &Sizes, steps: &str| {
            let of_class = match self.classes.len() {
                1 => String::new(),
                _ => format!(", {} tokens", sizes.max_sequence_tokens),
            };
            progress.work(&format!("{verb} {target}{of_class}{steps}"));
            let monitor = Arc::new(BuildMonitor { progress: progress.clone() });
            let network = self.means.library.network_on(self.means.gpu, monitor)?;
            let LoweredNetwork { mut network, profiles, .. } =
                lower_with(&self.graph, network, attends, sizes, constants, &self.lowering)?;
            let (plan, in_parts) = network.build_or_decompose(&BuildOptions {
                compute_capability: self.means.capability,
                optimization_level: u8::try_from(self.optimization_level).ok(),
                tiling_optimization_level: u8::try_from(self.tiling_optimization_level).ok(),
                timings: timings.as_ref().map_or(Vec::new(), |timings| timings.content().to_vec()),
                list_kernels: false,
                profiles,
            })?;
            if let Some(Err(reason)) = timings.as_mut().map(|timings| timings.update(network.timings())) {
                progress.warn(&format!("timings of kernels cannot be kept, so the next build takes longer: {reason}"));
            }
            if let Some(reason) = in_parts {
                progress.warn(&format!(
                    "{target}{of_class}{steps}: TensorRT has no fused kernel for this attention, so the plan computes it \
                     in parts: slower, and with scratch memory for the scores ({reason})"
                ));
            }
            Ok::<_, Error>(plan)
        };
        let mut compiled = Vec::with_capacity(self.classes.len());
        for (class, sizes) in self.classes.iter().enumerate() {
            let plan = compile(Attends::Cache(self.attention), sizes, "")?;
            let context_plan = match self.has_context_plan(class) {
                true => Some(compile(Attends::Chunk, sizes, ", context plan")?),
                false => None,
            };
            compiled.push(CompiledPlans { capacity_tokens: sizes.max_sequence_tokens, plan, context_plan });
        }
        Ok((!self.means.only_checked).then_some(compiled))
    }

    /// The TensorRT part of the plan's manifest entry. `files` are those of each class, ascending: the plan's, and the
    /// context plan's; none if it was only prepared.
    pub fn info(self, mut files: Vec<(String, Option<String>)>) -> Result<TensorRtInfo> {
        let library = self.means.library;
        let no_class = || Error::internal("a plan without sizes", "a capacity class");
        let (sizes, smaller) = self.classes.split_last().ok_or_else(no_class)?;
        let context_plan = files.pop().and_then(|(_, context_plan)| context_plan);
        let compiled = Compiled {
            library: library.kind(),
            version: library.version().to_string(),
            gpu: self.means.timed_on(),
            context_plan,
            decode_batches: self.lowering.decode_batches,
        };
        let mut files = files.into_iter();
        let smaller_classes = smaller.iter().map(|sizes| {
            let (plan, context_plan) = files.next().map_or((None, None), |(plan, context)| (Some(plan), context));
            CapacityClass {
                capacity_tokens: sizes.max_sequence_tokens,
                decode_sequences: sizes.decode_sequences,
                plan,
                context_plan,
            }
        });
        Ok(TensorRtInfo {
            compute_capability: self.compute_capability,
            compiled: (!self.means.only_checked).then_some(compiled),
            sizes: sizes.clone(),
            smaller_classes: smaller_classes.collect(),
            bindings: self.bindings,
            kv_cache_gib: self.kv_cache_gib,
            activation_scales: self.activation_scales,
        })
    }
}

/// The longest first chunk of a prompt.
fn longest_chunk(classes: &[Sizes]) -> usize {
    classes.iter().map(|sizes| sizes.prefill_tokens).max().unwrap_or(0)
}

/// Looks up a precision by its name in a manifest.
pub fn precision_of(name: &str) -> Option<Precision> {
    Precision::ALL.into_iter().find(|precision| precision.to_string() == name)
}

/// Reports a build's progress, and cancels it on request.
struct BuildMonitor {
    progress: Arc<dyn Progress>,
}

impl Monitor for BuildMonitor {
    fn log(&self, severity: Severity, line: &str) {
        Traced.log(severity, line);
    }

    fn step(&self, _phase: &str, _step: usize) -> ControlFlow<()> {
        self.progress.advance(1);
        if self.progress.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
