//! Plans the calibration of a build: which prompts run through which model, and what they decide.

use super::{Planned, recipe_names};
use crate::backend::{Limits, cpu};
use crate::checkpoint::ModelConfig;
use crate::compile::observation::RoundingJob;
use crate::compile::smoothing::choice::STRENGTHS;
use crate::compile::smoothing::{self, Site};
use crate::compile::{BuildRequest, Precision, Progress, calibration, optimized_graph, passes};
use crate::error::{Error, Result};
use crate::model;
use crate::text::{ChatFormat, Tokenizer};

/// Input of a calibration: the model in BF16 on the CPU, and the prompts to run.
pub(super) struct CalibrationRun {
    pub lowered: cpu::lower::LoweredProgram,
    pub prompts: Vec<Vec<u32>>,
    /// File of its weights: an existing plan's, or a temporary one.
    pub weights: String,
    pub is_scratch: bool,
    /// Matrices to round before they are packed.
    pub job: RoundingJob,
    /// Factors that even out the inputs of linear layers become part of the weights.
    pub smooths: bool,
    /// The strengths that factors are chosen from.
    pub strengths: &'static [f32],
    /// The layers that can take factors.
    pub sites: Vec<Site>,
}

/// The calibration that some plan needs, if any.
pub(super) fn plan_calibration(
    request: &BuildRequest,
    config: &ModelConfig,
    plans: &[Planned],
    text: Option<(&Tokenizer, &ChatFormat)>,
    progress: &dyn Progress,
) -> Result<Option<CalibrationRun>> {
    // Arbitrary ids say little of what a layer's inputs are like: not enough to round its weights by.
    let compensates = |plan: &Planned| plan.recipe.compensates() && (text.is_some() || request.calibration.is_some());
    let is_calibrated = |plan: &&Planned| plan.recipe.precision.needs_calibration() || compensates(plan);
    let Some(calibrated) = plans.iter().find(is_calibrated) else {
        let Some(path) = &request.calibration else { return Ok(None) };
        let names: Vec<String> = plans.iter().map(|plan| plan.recipe.precision.to_string()).collect();
        let (name, path) = (recipe_names(&request.recipes), path.display());
        let detail = format!("precision {} needs no calibration, but {path} was given for one", names.join(", "));
        return Err(Error::Recipe { name, detail });
    };
    // The CPU's own BF16 plan is used if there is one: its weights are in the package anyway.
    let own = plans.iter().find(|plan| plan.lowered.means().is_none() && plan.recipe.precision == Precision::Bf16);
    let limits = Limits { slots: 1, ..own.unwrap_or(calibrated).limits.clone() };
    let built_in_tokens = match plans.iter().any(compensates) {
        true => calibration::ROUNDING_TOKENS,
        false => calibration::SCALE_TOKENS,
    };
    let prompts = calibration::prompts(request.calibration.as_ref(), text, built_in_tokens, &limits, progress)?;
    let mut smoothed = plans.iter().map(|plan| &plan.recipe).filter(|recipe| recipe.precision.smooths());
    let smooths = smoothed.clone().next().is_some();
    let strengths = if smoothed.clone().any(|recipe| recipe.smooth_inputs) { &STRENGTHS[..] } else { &[] };
    if let (false, Some(other)) = (strengths.is_empty(), smoothed.find(|recipe| !recipe.smooth_inputs)) {
        let detail = "all plans in w8a8 of a package have one calibration: smooth_inputs differs";
        return Err(other.refusal(detail));
    }
    let sites = smoothing::sites(&passes::fused(&model::build_graph(config)?)?);
    let (graph, _) = optimized_graph(config, Precision::Bf16, limits.max_sequence_tokens, None)?;
    let lowered = cpu::lower::lower(&graph, &limits, own.unwrap_or(calibrated).recipe.cpu_target()?)?;
    let weights = own.map_or_else(|| "calibration.safetensors".to_owned(), |plan| plan.weights.clone());
    let rounded = plans.iter().filter(|plan| compensates(plan));
    let mut schemes: Vec<_> = Vec::new();
    for plan in rounded.clone() {
        let of_plan = (plan.recipe.precision, plan.recipe.weight_rounding);
        if plans.iter().any(|other| (other.recipe.precision == of_plan.0) && !compensates(other)) {
            let detail = format!("all plans in {} of a package are rounded alike: weight_rounding differs", of_plan.0);
            return Err(Error::Recipe { name: plan.recipe.target.name().into(), detail });
        }
        schemes.push(plan.recipe.precision.to_string());
    }
    let job = RoundingJob::new(&lowered, rounded.flat_map(|plan| plan.lowered.contents()));
    if !job.is_empty() {
        let tokens: usize = prompts.iter().map(Vec::len).sum();
        progress.note(&format!(
            "{} weights are rounded by the inputs that their layers have on {tokens} tokens of calibration prompts; \
             weight_rounding = \"nearest\" in the recipe builds faster",
            schemes.join(" and ")
        ));
    }
    Ok(Some(CalibrationRun { lowered, prompts, weights, is_scratch: own.is_none(), job, smooths, strengths, sites }))
}
