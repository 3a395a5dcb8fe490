//! The TensorRT half of a build: which library compiles a plan here, and compiling it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::{Calibration, PassReport, Precision, Progress, Recipe, optimized_graph};
use crate::backend::Limits;
use crate::backend::tensorrt::lower::{Attends, Constants, Lowered, Weight, lower};
use crate::backend::tensorrt::{BuildOptions, Kind, Library, Monitor, Plan, Severity, Traced, devices};
use crate::checkpoint::ModelConfig;
use crate::engine::tensorrt::{Binding, Compiled, Sizes, TensorRtInfo};
use crate::error::{Error, Result};
use crate::graph::Graph;

/// SM 8.9, the compute capability that a plan is compiled for as a check where its own cannot be: the lowest with FP8.
pub const CHECKED_CAPABILITY: u16 = 89;

/// What becomes of a plan on this machine.
#[derive(Debug, Clone, Copy)]
pub struct Means {
    /// What compiles it, or checks it.
    library: Library,
    /// What it is compiled for; `None` is the GPU at hand.
    capability: Option<u16>,
    /// It is compiled for [`CHECKED_CAPABILITY`] and the result thrown away.
    only_checked: bool,
}

impl Means {
    /// How a plan for GPUs of this compute capability can be compiled here: with TensorRT 11 on such a GPU, else with
    /// TensorRT for RTX if it compiles for them; else, with `prepare`, not, but its graph is checked.
    ///
    /// # Errors
    /// [`Error::TensorRt`] saying what is missing and the ways out.
    pub fn find(target: &str, capability: u16, prepare: bool) -> Result<Means> {
        let (sm, gpu) = (sm(capability), target.to_uppercase());
        // A machine without a driver has no GPUs, whatever the reason.
        let here = devices().unwrap_or_default();
        let is_here = here.iter().any(|device| device.compute_capability == capability);
        let enterprise = is_here.then(|| Library::find(Kind::TensorRt));
        if let Some(Ok(library)) = enterprise {
            return Ok(Means { library, capability: None, only_checked: false });
        }
        let rtx = match Library::find(Kind::Rtx) {
            Ok(library) => library,
            Err(missing) => {
                let on_gpu = enterprise.and_then(Result::err).map(|error| format!("; {}", words(&error)));
                let on_gpu = on_gpu.unwrap_or_default();
                return Err(Error::TensorRt(format!("cannot build for {target} here: {}{on_gpu}", words(&missing))));
            }
        };
        match rtx.compiles_for(Some(capability)) {
            Ok(()) => Ok(Means { library: rtx, capability: Some(capability), only_checked: false }),
            Err(_) if prepare => Ok(Means { library: rtx, capability: Some(CHECKED_CAPABILITY), only_checked: true }),
            Err(_) => {
                let why = match enterprise {
                    Some(Err(missing)) => words(&missing),
                    _ => format!("this machine has no {gpu}"),
                };
                Err(Error::TensorRt(format!(
                    "cannot build for {target} here: its SM {sm} is compiled for by TensorRT 11 on an {gpu} alone, and \
                     {why}. Either build there; or pass --prepare to quantize and pack the weights here and check the \
                     graph, and run `aotron build PACKAGE --finish` on the {gpu}."
                )))
            }
        }
    }

    /// Whether the plan is not compiled, only its graph checked.
    pub fn only_checks(&self) -> bool {
        self.only_checked
    }

    /// What compiles it and for what, in words.
    pub fn describe(&self) -> String {
        let library = format!("{} {}", self.library.kind().name(), self.library.version());
        match self.capability {
            Some(capability) => format!("{library} for SM {}", sm(capability)),
            None => format!("{library} for the GPU at hand"),
        }
    }
}

/// 80 as "8.0".
pub fn sm(capability: u16) -> String {
    format!("{}.{}", capability / 10, capability % 10)
}

/// An error of TensorRT without its name.
fn words(error: &Error) -> String {
    match error {
        Error::TensorRt(words) | Error::Gpu(words) => words.clone(),
        other => other.to_string(),
    }
}

/// A plan on its way.
pub struct GpuPlan {
    means: Means,
    sizes: Sizes,
    graph: Graph,
    /// What the passes did.
    pub reports: Vec<PassReport>,
    /// What is to be packed.
    pub weights: Vec<Weight>,
    bindings: Vec<Binding>,
    kv_cache_gib: BTreeMap<u32, u32>,
    activation_scales: BTreeMap<String, f32>,
    compute_capability: u16,
    has_first_chunk_plan: bool,
    optimization_level: usize,
}

/// Compiled plans.
pub struct Engines {
    /// Prefills and decodes.
    pub plan: Plan,
    /// For first chunks.
    pub first_chunk: Option<Plan>,
}

impl GpuPlan {
    /// Lowers a model by a recipe for a GPU. `calibration` is read by a precision that needs one.
    ///
    /// # Errors
    /// [`Error::Recipe`] if it is no recipe for a GPU; [`Error::Graph`] or [`Error::TensorRt`] if the model cannot be
    /// lowered.
    pub fn new(
        config: &ModelConfig,
        recipe: &Recipe,
        limits: &Limits,
        means: Means,
        calibration: Option<&Calibration>,
    ) -> Result<GpuPlan> {
        let (Some(options), Some(compute_capability)) = (&recipe.tensorrt, recipe.target.compute_capability()) else {
            let detail = "it is not for a GPU".into();
            return Err(Error::Recipe { name: recipe.target.name().into(), detail });
        };
        let sizes = recipe.tensorrt_sizes(options, limits);
        let (graph, reports) = optimized_graph(config, recipe.precision, limits.max_sequence_tokens, calibration)?;
        let network = means.library.network(Arc::new(Traced))?;
        let Lowered { weights, bindings, .. } = lower(&graph, network, Attends::Cache, &sizes, &Constants::Arbitrary)?;
        let holds_weights = weights.iter().any(|weight| weight.in_plan);
        let scales = calibration.filter(|_| recipe.precision.needs_calibration()).map(Calibration::scales);
        Ok(GpuPlan {
            means,
            sizes,
            graph,
            reports,
            weights,
            bindings,
            kv_cache_gib: options.kv_cache_gib.clone(),
            activation_scales: scales.cloned().unwrap_or_default(),
            compute_capability,
            has_first_chunk_plan: options.first_chunk_plan.unwrap_or(!holds_weights),
            optimization_level: options.optimization_level,
        })
    }

    /// How it is compiled.
    pub fn means(&self) -> Means {
        self.means
    }

    /// Whether some weights become part of the plan, so that they have to be packed before it can be compiled.
    pub fn holds_weights(&self) -> bool {
        self.weights.iter().any(|weight| weight.in_plan)
    }

    /// How many plans are compiled.
    pub fn compiled_plans(&self) -> u64 {
        1 + u64::from(self.has_first_chunk_plan)
    }

    /// Compiles the plans. `None` where they were only checked.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's own words; [`Error::Cancelled`].
    pub fn compile(
        &self,
        target: &str,
        constants: &Constants,
        progress: &Arc<dyn Progress>,
    ) -> Result<Option<Engines>> {
        let verb = if self.means.only_checked { "checking" } else { "compiling" };
        let compile = |attends, steps: &str| {
            progress.work(&format!("{verb} {target}{steps}"));
            let monitor = Arc::new(Follower { progress: progress.clone() });
            let network = self.means.library.network(monitor)?;
            let Lowered { mut network, profiles, .. } = lower(&self.graph, network, attends, &self.sizes, constants)?;
            network.build(&BuildOptions {
                compute_capability: self.means.capability,
                optimization_level: u8::try_from(self.optimization_level).ok(),
                list_kernels: false,
                profiles,
            })
        };
        let plan = compile(Attends::Cache, "")?;
        let first_chunk =
            if self.has_first_chunk_plan { Some(compile(Attends::Chunk, ", first chunks")?) } else { None };
        Ok((!self.means.only_checked).then_some(Engines { plan, first_chunk }))
    }

    /// The plan's part of the manifest. `first_chunk_plan` is that plan's file.
    pub fn info(self, first_chunk_plan: Option<String>) -> TensorRtInfo {
        let library = self.means.library;
        let compiled = Compiled { library: library.kind(), version: library.version().to_string(), first_chunk_plan };
        TensorRtInfo {
            compute_capability: self.compute_capability,
            compiled: (!self.means.only_checked).then_some(compiled),
            sizes: self.sizes,
            bindings: self.bindings,
            kv_cache_gib: self.kv_cache_gib,
            activation_scales: self.activation_scales,
        }
    }
}

/// A precision by its name in a manifest.
pub fn precision_of(name: &str) -> Option<Precision> {
    Precision::ALL.into_iter().find(|precision| precision.to_string() == name)
}

/// Shows a build's steps, and ends it when asked.
struct Follower {
    progress: Arc<dyn Progress>,
}

impl Monitor for Follower {
    fn log(&self, severity: Severity, line: &str) {
        Traced.log(severity, line);
    }

    fn step(&self, _phase: &str, _step: usize) -> ControlFlow<()> {
        self.progress.advance(1);
        if self.progress.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
