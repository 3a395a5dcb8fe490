//! The way from a checkpoint to a package: everything is planned, then weights are read once for all plans.

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::calibration::{self, Calibration};
use super::gpu::{Engines, GpuPlan, Means};
use super::prediction::{Prediction, available_memory_bytes, free_bytes};
use super::{
    BuildRequest, BuildSummary, CheckpointText, PlanSummary, Precision, Progress, Recipe, Report, add_engines,
    optimized_graph, plan_info,
};
use crate::backend::Limits;
use crate::backend::cpu;
use crate::backend::packing::{self, PackItem};
use crate::backend::tensorrt::lower::{Constants, Weight};
use crate::backend::tensorrt::pack as gpu_pack;
use crate::checkpoint::{Checkpoint, ModelConfig, OpenOptions};
use crate::engine::{CheckpointInfo, GenerationSettings, Manifest, PackageFile, PackageWriter, TokenizerInfo};
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;
use crate::text::{ChatFormat, Tokenizer};

/// The program itself, its tables and its threads.
const PROGRAM_BYTES: u64 = 64 << 20;
/// What TensorRT takes to compile a plan of the 8B's size without weights in it.
const COMPILER_BYTES: u64 = 480 << 20;
/// A plan without weights in it, for each layer.
const PLAN_BYTES_PER_LAYER: u64 = 3 << 19;
/// How many times its bytes a plan with weights takes while it is compiled.
const WEIGHTS_IN_COMPILER: u64 = 3;

/// A plan on its way to the package.
struct Planned {
    recipe: Recipe,
    limits: Limits,
    lowered: LoweredPlan,
    /// The file of its weights; plans whose weights are stored alike share one.
    weights: String,
}

enum LoweredPlan {
    Cpu { lowered: Box<cpu::lower::LoweredProgram>, reports: Vec<Report> },
    Gpu(Box<GpuPlan>),
}

impl LoweredPlan {
    /// By a recipe. `means` is there for a GPU.
    fn new(
        config: &ModelConfig,
        recipe: &Recipe,
        limits: &Limits,
        means: Option<Means>,
        calibration: Option<&Calibration>,
    ) -> Result<LoweredPlan> {
        match means {
            None => {
                let (graph, reports) =
                    optimized_graph(config, recipe.precision, limits.max_sequence_tokens, calibration)?;
                Ok(LoweredPlan::Cpu {
                    lowered: Box::new(cpu::lower::lower(&graph, limits, recipe.cpu_target())?),
                    reports,
                })
            }
            Some(means) => Ok(LoweredPlan::Gpu(Box::new(GpuPlan::new(config, recipe, limits, means, calibration)?))),
        }
    }

    fn packed_bytes(&self) -> u64 {
        match self {
            LoweredPlan::Cpu { lowered, .. } => cpu::pack::packed_bytes(&lowered.program.weights),
            LoweredPlan::Gpu(plan) => gpu_pack::packed_bytes(&plan.weights),
        }
    }

    fn items(&self) -> Result<Vec<PackItem<'_>>> {
        match self {
            LoweredPlan::Cpu { lowered, .. } => Ok(cpu::pack::items(lowered)),
            LoweredPlan::Gpu(plan) => gpu_pack::items(&plan.weights),
        }
    }

    fn means(&self) -> Option<Means> {
        match self {
            LoweredPlan::Cpu { .. } => None,
            LoweredPlan::Gpu(plan) => Some(plan.means()),
        }
    }

    /// Bytes of the weights that become part of a compiled plan.
    fn bytes_in_plan(&self) -> u64 {
        match self {
            LoweredPlan::Cpu { .. } => 0,
            LoweredPlan::Gpu(plan) => plan.weights.iter().filter(|weight| weight.in_plan).map(Weight::bytes).sum(),
        }
    }
}

/// What a calibration needs: the model in BF16 on the CPU, and what it is to read.
struct CalibrationRun {
    lowered: cpu::lower::LoweredProgram,
    prompts: Vec<Vec<u32>>,
    /// The file with its weights: a plan's own, or one made for this.
    weights: String,
    is_scratch: bool,
}

/// A build of which everything is known but the weights.
pub struct PlannedBuild {
    request: BuildRequest,
    checkpoint: Checkpoint,
    /// The checkpoint's, with the ids that its tokenizer knows.
    config: ModelConfig,
    tokenizer: Option<(Vec<u8>, Tokenizer)>,
    chat_format: ChatFormat,
    generation: GenerationSettings,
    plans: Vec<Planned>,
    calibration: Option<CalibrationRun>,
    prediction: Prediction,
}

/// Builds an engine package: reads the checkpoint, optimizes and lowers the graph, compiles it for GPUs, packs the
/// weights, and makes the package appear at its place whole.
///
/// # Errors
/// Whatever is wrong with the checkpoint, recipes or output; nothing is left behind then.
pub fn build(request: &BuildRequest, progress: &Arc<dyn Progress>) -> Result<BuildSummary> {
    PlannedBuild::new(request, &**progress)?.run(progress)
}

impl PlannedBuild {
    /// Opens the checkpoint, lowers the graph for every recipe, and finds what the build will take. Weights are not read,
    /// and nothing is written, but for the temporary file of a compressed checkpoint.
    ///
    /// # Errors
    /// Whatever is wrong with the checkpoint or recipes. Whether the build fits this machine is not checked here.
    pub fn new(request: &BuildRequest, progress: &dyn Progress) -> Result<PlannedBuild> {
        let recipes = &request.recipes;
        check_recipes(recipes)?;
        // What cannot be built here is refused before anything is read.
        let means = recipes.iter().map(|recipe| means_for(recipe, request.prepare)).collect::<Result<Vec<_>>>()?;
        PackageWriter::check_target(&request.output, request.replace)?;
        let checkpoint = open_checkpoint(&request.checkpoint, progress)?;
        let mut config = checkpoint.config().clone();
        let limits = recipes.iter().map(|recipe| recipe.limits(&config)).collect::<Result<Vec<_>>>()?;
        let text = CheckpointText::of(&checkpoint, request.chat_format.as_deref())?;
        check_text(&checkpoint, &text, progress)?;
        let CheckpointText { tokenizer, format: chat_format, generation, .. } = text;
        if config.eos_token_ids.is_empty() {
            // Where the config says nothing of the ids that begin and end a text, the tokenizer does.
            config.bos_token_id = config.bos_token_id.or(text.bos_token_id);
            config.eos_token_ids.clone_from(&chat_format.eos_token_ids);
        }
        let tokenizer_of = tokenizer.as_ref().map(|(_, tokenizer)| tokenizer);

        // Weights do not depend on what a calibration will find, and no scale but this one is needed to lower the graph.
        let uncalibrated = Calibration::uniform(0.5);
        let mut plans: Vec<Planned> = Vec::with_capacity(recipes.len());
        for ((recipe, limits), means) in recipes.iter().zip(limits).zip(means) {
            let lowered = LoweredPlan::new(&config, recipe, &limits, means, Some(&uncalibrated))?;
            let weights = weights_file(&plans, recipe, &lowered);
            plans.push(Planned { recipe: recipe.clone(), limits, lowered, weights });
        }
        let calibration = plan_calibration(
            request,
            &config,
            &plans,
            tokenizer_of.map(|tokenizer| (tokenizer, &chat_format)),
            progress,
        )?;
        let mut planned = PlannedBuild {
            request: request.clone(),
            checkpoint,
            config,
            tokenizer,
            chat_format,
            generation,
            plans,
            calibration,
            prediction: Prediction::default(),
        };
        planned.prediction = planned.predict()?;
        Ok(planned)
    }

    /// What the build will take.
    pub fn prediction(&self) -> &Prediction {
        &self.prediction
    }

    /// The plans that weights are packed for, one for each file.
    fn packed_plans(&self) -> impl Iterator<Item = &Planned> {
        self.plans
            .iter()
            .enumerate()
            .filter(|(index, plan)| !self.plans.iter().take(*index).any(|other| other.weights == plan.weights))
            .map(|(_, plan)| plan)
    }

    /// The items of every file of weights, by name.
    fn files(&self) -> Result<Vec<(String, Vec<PackItem<'_>>)>> {
        let mut files = Vec::new();
        for plan in self.packed_plans() {
            files.push((plan.weights.clone(), plan.lowered.items()?));
        }
        if let Some(run) = self.calibration.as_ref().filter(|run| run.is_scratch) {
            files.push((run.weights.clone(), cpu::pack::items(&run.lowered)));
        }
        Ok(files)
    }

    fn predict(&self) -> Result<Prediction> {
        let mut files: Vec<(String, u64)> =
            self.packed_plans().map(|plan| (plan.weights.clone(), plan.lowered.packed_bytes())).collect();
        let mut compiling = 0;
        for plan in &self.plans {
            if let LoweredPlan::Gpu(gpu) = &plan.lowered {
                let in_plan = plan.lowered.bytes_in_plan();
                compiling = compiling.max(COMPILER_BYTES + WEIGHTS_IN_COMPILER * in_plan);
                let compiled = if gpu.means().only_checks() { 0 } else { gpu.compiled_plans() };
                let name = format!("plans/{}.engine", plan.recipe.target.name());
                let plan_bytes = PLAN_BYTES_PER_LAYER * self.config.num_layers as u64 + in_plan;
                files.extend((compiled > 0).then(|| (name, compiled * plan_bytes)));
            }
        }
        let packing = {
            let files = self.files()?;
            packing::memory_bytes(files.iter().map(|(_, items)| items.as_slice()))
        };
        let (mut scratch_bytes, mut calibrating) = (0, 0);
        if let Some(run) = &self.calibration {
            let program = &run.lowered.program;
            if run.is_scratch {
                scratch_bytes = cpu::pack::packed_bytes(&program.weights);
            }
            let cached_tokens = program.limits.slots * program.limits.max_sequence_tokens;
            calibrating = (program.arena_bytes + cached_tokens * program.cache.bytes_per_token()) as u64;
        }
        Ok(Prediction {
            read_bytes: self.checkpoint.weight_bytes(),
            files,
            scratch_bytes,
            memory_bytes: PROGRAM_BYTES + packing.max(compiling).max(calibrating),
            free_disk_bytes: free_bytes(&self.request.output),
            available_memory_bytes: available_memory_bytes(),
        })
    }

    /// Reads the weights and writes the package.
    ///
    /// # Errors
    /// Whatever is wrong with the weights or the output, or that the build does not fit this machine; nothing is left
    /// behind then.
    pub fn run(mut self, progress: &Arc<dyn Progress>) -> Result<BuildSummary> {
        self.prediction.check(&self.request.output)?;
        let mut writer = PackageWriter::create(&self.request.output, self.request.replace)?;
        // Compiling comes first where it needs no weights: what TensorRT refuses is then known within seconds.
        let mut engines: Vec<Option<Engines>> = Vec::with_capacity(self.plans.len());
        for Planned { recipe, lowered, .. } in &self.plans {
            engines.push(match lowered {
                LoweredPlan::Gpu(plan) if !plan.holds_weights() && !recipe.precision.needs_calibration() => {
                    plan.compile(recipe.target.name(), &Constants::Arbitrary, progress)?
                }
                _ => None,
            });
        }
        let digest = self.pack(&mut writer, progress)?;
        self.calibrate(&writer, &**progress)?;

        let checkpoint_info = CheckpointInfo { format: self.checkpoint.format().into(), digest };
        let mut manifest = Manifest::new(self.config, checkpoint_info, self.chat_format, self.generation);
        if let Some((bytes, tokenizer)) = &self.tokenizer {
            let (file, source) = (Tokenizer::PACKAGE_FILE, tokenizer.file_name());
            let kept = tokenizer.to_package(Path::new(source), bytes)?;
            writer.add(file, |write| write(&kept))?;
            let vocab_size = tokenizer.vocab_size();
            manifest.tokenizer = Some(TokenizerInfo { file: file.into(), source: source.into(), vocab_size });
        }
        let mut plans = Vec::with_capacity(self.plans.len());
        for (Planned { recipe, limits, lowered, weights }, engines) in self.plans.into_iter().zip(engines) {
            let target = recipe.target.name();
            let (info, means, reports) = match lowered {
                LoweredPlan::Cpu { lowered, reports } => {
                    let plan = format!("plans/{target}.json");
                    let program = serde_json::to_vec(&lowered.program).map_err(|e| {
                        Error::package(&self.request.output, format!("the plan cannot be written as JSON: {e}"))
                    })?;
                    writer.add(&plan, |write| write(&program))?;
                    let kv_bytes_per_token = lowered.program.cache.bytes_per_token();
                    (plan_info(&recipe, Some(plan), weights, limits, kv_bytes_per_token, None), None, reports)
                }
                LoweredPlan::Gpu(mut plan) => {
                    let engines = if plan.holds_weights() {
                        let file = TensorFile::open(&writer.scratch(&weights))?;
                        plan.compile(target, &Constants::File(Arc::new(file)), progress)?
                    } else if recipe.precision.needs_calibration() {
                        plan.compile(target, &Constants::Arbitrary, progress)?
                    } else {
                        engines
                    };
                    let (means, reports) = (plan.means(), std::mem::take(&mut plan.reports));
                    let (file, tensorrt) = add_engines(&mut writer, &recipe, *plan, engines)?;
                    let kv_bytes_per_token = tensorrt.kv_bytes_per_token();
                    let info = plan_info(&recipe, file, weights, limits, kv_bytes_per_token, Some(tensorrt));
                    (info, Some(means), reports)
                }
            };
            plans.push(PlanSummary::of(&info, means, reports));
            manifest.plans.push(info);
        }
        writer.finish(&mut manifest)?;
        let bytes = manifest.files.iter().map(|f| f.bytes).sum();
        Ok(BuildSummary { package: self.request.output, bytes, plans })
    }

    /// Writes the files of weights in one pass over the checkpoint, and answers with its digest.
    fn pack(&self, writer: &mut PackageWriter, progress: &Arc<dyn Progress>) -> Result<String> {
        progress.stage("packing", self.checkpoint.weight_bytes());
        let files = self.files()?;
        let mut open = Vec::with_capacity(files.len());
        for (name, _) in &files {
            open.push(writer.create_file(name)?);
        }
        let packed = files.into_iter().zip(&mut open).map(|((_, items), file)| packing::File { items, sink: file });
        let follow = |bytes| {
            progress.advance(bytes);
            if progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
        };
        let digests = packing::pack(packed.collect(), &self.checkpoint, true, &follow)?;
        progress.work("flushing");
        let infos = open.into_par_iter().map(PackageFile::finish).collect::<Result<Vec<_>>>()?;
        let scratch = self.calibration.as_ref().filter(|run| run.is_scratch).map(|run| &run.weights);
        infos.into_iter().filter(|info| Some(&info.path) != scratch).for_each(|info| writer.push(info));
        Ok(self.digest(&digests))
    }

    /// SHA-256 over the config and, tensor by tensor, name, dtype, shape and the SHA-256 of its elements.
    fn digest(&self, digests: &[[u8; 32]]) -> String {
        let mut all = Sha256::new();
        all.update(format!("{:?}", self.checkpoint.config()));
        for (view, digest) in self.checkpoint.tensors().zip(digests) {
            all.update(format!("\n{} {} {:?} ", view.name, view.dtype, view.shape));
            all.update(digest);
        }
        let hex: String = all.finalize().iter().map(|b| format!("{b:02x}")).collect();
        format!("sha256:{hex}")
    }

    /// Runs the calibration, if there is one, and lowers the plans that wait for it again.
    fn calibrate(&mut self, writer: &PackageWriter, progress: &dyn Progress) -> Result<()> {
        let Some(run) = self.calibration.take() else { return Ok(()) };
        let path = writer.scratch(&run.weights);
        let found = calibration::calibrate(run.lowered.program, &path, &run.prompts, progress);
        if run.is_scratch {
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        let found = found?;
        for plan in self.plans.iter_mut().filter(|plan| plan.recipe.precision.needs_calibration()) {
            plan.lowered =
                LoweredPlan::new(&self.config, &plan.recipe, &plan.limits, plan.lowered.means(), Some(&found))?;
        }
        Ok(())
    }
}

/// Opens the checkpoint at `path`. If that takes unpacking it, `progress` follows.
///
/// # Errors
/// As [`Checkpoint::open`], and [`Error::Cancelled`].
pub fn open_checkpoint(path: &Path, progress: &dyn Progress) -> Result<Checkpoint> {
    let is_begun = std::sync::atomic::AtomicBool::new(false);
    let unpacking = |bytes, total| {
        if !is_begun.swap(true, std::sync::atomic::Ordering::Relaxed) {
            progress.stage("unpacking", total);
        }
        progress.advance(bytes);
        if progress.is_cancelled() { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
    };
    Checkpoint::open_with(path, &OpenOptions { unpacking: &unpacking, ..OpenOptions::default() })
}

/// The file for a plan's weights: another plan's if they are stored alike.
fn weights_file(plans: &[Planned], recipe: &Recipe, lowered: &LoweredPlan) -> String {
    let (target, precision) = (recipe.target.name(), recipe.precision);
    let LoweredPlan::Gpu(plan) = lowered else { return format!("weights/{target}-{precision}.safetensors") };
    let shared = plans.iter().find(|other| match &other.lowered {
        LoweredPlan::Gpu(other) => other.weights == plan.weights,
        LoweredPlan::Cpu { .. } => false,
    });
    if let Some(other) = shared {
        return other.weights.clone();
    }
    let common = format!("weights/tensorrt-{precision}.safetensors");
    match plans.iter().any(|other| other.weights == common) {
        true => format!("weights/{target}-{precision}.safetensors"),
        false => common,
    }
}

/// The calibration that some plan needs, if one does.
fn plan_calibration(
    request: &BuildRequest,
    config: &ModelConfig,
    plans: &[Planned],
    text: Option<(&Tokenizer, &ChatFormat)>,
    progress: &dyn Progress,
) -> Result<Option<CalibrationRun>> {
    let Some(calibrated) = plans.iter().find(|plan| plan.recipe.precision.needs_calibration()) else {
        let Some(path) = &request.calibration else { return Ok(None) };
        let names: Vec<String> = plans.iter().map(|plan| plan.recipe.precision.to_string()).collect();
        let (name, path) = (recipe_names(&request.recipes), path.display());
        let detail = format!("precision {} needs no calibration, but {path} was given for one", names.join(", "));
        return Err(Error::Recipe { name, detail });
    };
    // The CPU's own plan in BF16 serves, if there is one: its weights are in the package anyway.
    let own = plans.iter().find(|plan| plan.lowered.means().is_none() && plan.recipe.precision == Precision::Bf16);
    let limits = Limits { slots: 1, ..own.unwrap_or(calibrated).limits.clone() };
    let prompts = calibration::prompts(request.calibration.as_ref(), text, &limits, progress)?;
    let (graph, _) = optimized_graph(config, Precision::Bf16, limits.max_sequence_tokens, None)?;
    let lowered = cpu::lower::lower(&graph, &limits, own.unwrap_or(calibrated).recipe.cpu_target())?;
    let weights = own.map_or_else(|| "calibration.safetensors".to_owned(), |plan| plan.weights.clone());
    Ok(Some(CalibrationRun { lowered, prompts, weights, is_scratch: own.is_none() }))
}

/// Refuses recipes that do not go together.
fn check_recipes(recipes: &[Recipe]) -> Result<()> {
    for (index, recipe) in recipes.iter().enumerate() {
        recipe.check()?;
        let name = recipe.target.name();
        if recipes.iter().take(index).any(|other| other.target == recipe.target) {
            let detail = "it is named twice; a package has one plan for a target".into();
            return Err(Error::Recipe { name: name.into(), detail });
        }
    }
    match recipes.is_empty() {
        true => Err(Error::Recipe { name: String::new(), detail: "no recipe was named".into() }),
        false => Ok(()),
    }
}

fn recipe_names(recipes: &[Recipe]) -> String {
    let names: Vec<&str> = recipes.iter().map(|recipe| recipe.target.name()).collect();
    names.join(", ")
}

/// How a recipe's plan is compiled here; `None` for a CPU's, which needs nothing.
fn means_for(recipe: &Recipe, prepare: bool) -> Result<Option<Means>> {
    let capability = recipe.target.compute_capability();
    capability.map(|capability| Means::find(recipe.target.name(), capability, prepare)).transpose()
}

/// Says what was decided about tokenizer, template and stops, and refuses what would never end or never be understood.
fn check_text(checkpoint: &Checkpoint, text: &CheckpointText, progress: &dyn Progress) -> Result<()> {
    text.notes.iter().for_each(|note| progress.note(note));
    text.warnings.iter().for_each(|warning| progress.warn(warning));
    if text.tokenizer.is_none() {
        warn_without_tokenizer(checkpoint, progress);
    }
    match &text.refusals[..] {
        [] => Ok(()),
        reasons => {
            let detail = format!(
                "{}; name another chat format with --chat-format: nemotron, raw, or a .jinja",
                reasons.join("; ")
            );
            Err(Error::unsupported(checkpoint.path(), detail))
        }
    }
}

fn warn_without_tokenizer(checkpoint: &Checkpoint, progress: &dyn Progress) {
    progress.warn(&format!(
        "{} has neither tokenizer.json nor tokenizer.model: the package will take and give token ids only",
        checkpoint.path().display()
    ));
}
