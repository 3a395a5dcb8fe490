//! Ahead-of-time compilation: turns a checkpoint into an engine package.

mod build;
mod calibration;
mod fastest;
mod finish;
pub mod gpu;
mod observation;
pub mod passes;
mod prediction;
mod quantize;
mod recipe;
mod reference;
mod repack;
pub mod rounding;
pub mod smoothing;
mod text;
mod timings;

use std::path::{Path, PathBuf};

pub use build::{PlannedBuild, build, open_checkpoint};
pub use calibration::Calibration;
pub use fastest::{Fp8Trial, Fp8Trials, StepTimes};
pub use finish::{FinishRequest, finish};
use gpu::{CompiledPlans, GpuPlan, PlanCompiler};
pub use passes::{PassReport, Precision};
pub use prediction::{Prediction, free_bytes};
pub use recipe::{Fp8Choice, LinearKind, Recipe, Target, TensorRtOptions, WeightRounding};
pub use text::CheckpointText;

use crate::backend::Limits;
use crate::engine::tensorrt::TensorRtInfo;
use crate::engine::{PackageWriter, PlanInfo};
use crate::error::Result;
use crate::graph::Graph;
use crate::model;

/// Progress callbacks of a build.
pub trait Progress: Send + Sync {
    /// A stage begins that will process `bytes` bytes.
    fn stage(&self, name: &str, bytes: u64);
    /// A stage begins; `steps` of what `unit` names are to do.
    fn steps(&self, name: &str, steps: u64, unit: &str) {
        let _ = unit;
        self.stage(name, steps);
    }
    /// A stage begins whose length is not known in advance.
    fn work(&self, name: &str) {
        self.stage(name, 0);
    }
    /// That many bytes, or steps, of the stage are done.
    fn advance(&self, amount: u64);
    /// A choice made on the user's behalf.
    fn note(&self, message: &str) {
        let _ = message;
    }
    /// Something the user should know.
    fn warn(&self, message: &str);
    /// Returns true to abort the build with [`Error::Cancelled`](crate::Error::Cancelled), leaving nothing behind.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Inputs and output of a build.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// One recipe per plan, each for a different target.
    pub recipes: Vec<Recipe>,
    /// The package's folder.
    pub output: PathBuf,
    /// Replace an existing package.
    pub replace: bool,
    /// If a plan cannot be compiled on this machine, do everything else; [`finish()`] completes it on another.
    pub prepare: bool,
    /// Calibration prompts for a precision that [needs them](Precision::needs_calibration) or a recipe that
    /// [rounds weights by them](Recipe::compensates), as lines of JSON:
    /// `{"messages": [{"role", "content"}, …]}` ending with a user message, or `{"token_ids": […]}`. `None` uses the
    /// built-in ones.
    pub calibration: Option<PathBuf>,
    /// The chat format, as accepted by [`ChatTemplate::choose`](crate::text::ChatTemplate::choose). `None` uses the
    /// checkpoint's own.
    pub chat_format: Option<String>,
    /// Stores the CPU's answers to a few prompts, which plans for GPUs are [held to](crate::verify).
    pub reference: bool,
}

/// Result of a build.
#[derive(Debug, Clone)]
pub struct BuildSummary {
    /// The package's folder.
    pub package: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Its plans.
    pub plans: Vec<PlanSummary>,
}

/// Result of a build for one target.
#[derive(Debug, Clone)]
pub struct PlanSummary {
    /// Target that it runs on.
    pub target: String,
    /// Precision that it computes in.
    pub precision: String,
    /// The plan's limits.
    pub limits: Limits,
    /// Sequences of the full length that its KV memory holds at most, which shorter ones share.
    pub longest_sequences: usize,
    /// Bytes of KV cache per token of one sequence.
    pub kv_bytes_per_token: usize,
    /// For a GPU plan: the compiler, or the library that checked it.
    pub compiler: Option<String>,
    /// True if it was only checked and must be finished on its GPU.
    pub only_prepared: bool,
    /// Reports of the passes.
    pub reports: Vec<PassReport>,
    /// For an FP8 plan whose recipe leaves open how weights are held: both ways, as they were timed here.
    pub fp8_trials: Option<Fp8Trials>,
    /// The calibration that it was built with, if its precision needs one.
    pub calibration: Option<Calibration>,
}

/// The optimized graph of a checkpoint's model, and the passes' reports. `calibration` is used by precisions that need
/// one.
///
/// # Errors
/// [`Error::Graph`](crate::Error::Graph) if the config's sizes do not fit together.
pub fn optimized_graph(
    config: &crate::checkpoint::ModelConfig,
    precision: Precision,
    max_sequence_tokens: usize,
    calibration: Option<&Calibration>,
) -> Result<(Graph, Vec<PassReport>)> {
    passes::run(model::build_graph(config)?, precision, max_sequence_tokens, calibration)
}

impl PlanSummary {
    fn of(info: &PlanInfo, means: Option<PlanCompiler>, reports: Vec<PassReport>) -> PlanSummary {
        PlanSummary {
            target: info.target.clone(),
            precision: info.precision.clone(),
            limits: info.limits.clone(),
            longest_sequences: info.longest_sequences(),
            kv_bytes_per_token: info.kv_bytes_per_token,
            compiler: means.map(|means| means.describe()),
            only_prepared: info.plan.is_none(),
            reports,
            fp8_trials: None,
            calibration: None,
        }
    }
}

fn plan_info(
    recipe: &Recipe,
    plan: Option<String>,
    weights: String,
    limits: Limits,
    kv_bytes_per_token: usize,
    tensorrt: Option<TensorRtInfo>,
) -> PlanInfo {
    let (target, precision) = (recipe.target.name().into(), recipe.precision.to_string());
    PlanInfo { target, precision, plan, weights, limits, kv_bytes_per_token, recipe: recipe.text.clone(), tensorrt }
}

/// Adds compiled plans to a package; returns the names of their files.
fn add_engines(
    writer: &mut PackageWriter,
    recipe: &Recipe,
    plan: GpuPlan,
    engines: Option<Vec<CompiledPlans>>,
) -> Result<(Option<String>, TensorRtInfo)> {
    let Some(engines) = engines else { return Ok((None, plan.info(Vec::new())?)) };
    let target = recipe.target.name();
    let largest = engines.len().saturating_sub(1);
    let mut files = Vec::with_capacity(engines.len());
    for (index, CompiledPlans { capacity_tokens, plan, context_plan }) in engines.into_iter().enumerate() {
        let name = match index == largest {
            true => format!("plans/{target}"),
            false => format!("plans/{target}-{capacity_tokens}"),
        };
        let file = format!("{name}.engine");
        writer.add(&file, |write| write(plan.bytes()))?;
        let context_plan = match context_plan {
            Some(engine) => {
                let file = format!("{name}-context.engine");
                writer.add(&file, |write| write(engine.bytes()))?;
                Some(file)
            }
            None => None,
        };
        files.push((file, context_plan));
    }
    let file = files.last().map(|(file, _)| file.clone());
    Ok((file, plan.info(files)?))
}

/// Default output folder: `engines/<checkpoint's name>`, without the extension for a `.nemo`.
pub fn default_output(checkpoint: &Path) -> PathBuf {
    let absolute = checkpoint.canonicalize().unwrap_or_else(|_| checkpoint.to_path_buf());
    let is_nemo = absolute.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("nemo"));
    let name = if is_nemo { absolute.file_stem() } else { absolute.file_name() };
    Path::new("engines").join(name.unwrap_or("engine".as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_called_as_their_checkpoints() {
        for (checkpoint, package) in [
            ("models/chat", "engines/chat"),
            ("models/Nemotron-3-8B.v1.nemo", "engines/Nemotron-3-8B.v1"),
            ("models/X.NEMO", "engines/X"),
            ("/", "engines/engine"),
        ] {
            assert_eq!(default_output(Path::new(checkpoint)), Path::new(package), "{checkpoint}");
        }
    }
}
