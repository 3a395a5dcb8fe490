//! Builds a package from a checkpoint: everything is planned first, then the weights are read once for all plans.

mod calibration_run;

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use self::calibration_run::{CalibrationRun, plan_calibration};
use super::calibration::{Calibration, Calibrations};
use super::finish::compile_with_weights;
use super::gpu::{CompiledPlans, GpuPlan, PlanCompiler};
use super::observation::{CalibrationInputs, calibrate, smoothing_memory_bytes};
use super::prediction::{Prediction, free_bytes};
use super::reference::{Stand, ask_checkpoint, ask_program, lower_for_prompts};
use super::{
    BuildRequest, BuildSummary, CheckpointText, LinearKind, PassReport, PlanSummary, Precision, Progress, Recipe,
    add_engines, optimized_graph, plan_info,
};
use crate::backend::Limits;
use crate::backend::constants::ConstRows;
use crate::backend::cpu;
use crate::backend::packing::{self, PackItem};
use crate::backend::tensorrt::lower::{Constants, PlanWeight};
use crate::backend::tensorrt::pack as gpu_pack;
use crate::checkpoint::{Checkpoint, ModelConfig, OpenOptions};
use crate::engine::{CheckpointInfo, GenerationSettings, Manifest, PackageFile, PackageWriter, TokenizerInfo};
use crate::error::{Error, Result};
use crate::memory::available_memory_bytes;
use crate::tensor::DType;
use crate::tensor_file::TensorFile;
use crate::text::{ChatFormat, Tokenizer};
use crate::verify::{Reference, prompts};

/// Baseline: code, tables and thread stacks.
const PROGRAM_BYTES: u64 = 64 << 20;
/// Memory TensorRT takes to compile a plan of the 8B model with its weights outside the plan.
const COMPILER_BYTES: u64 = 480 << 20;
/// Size of a plan without weights, per layer.
const PLAN_BYTES_PER_LAYER: u64 = 3 << 19;
/// Memory to compile a plan that contains weights, as a multiple of their size.
const WEIGHTS_IN_COMPILER: u64 = 3;

/// A plan to be built.
struct Planned {
    recipe: Recipe,
    limits: Limits,
    lowered: LoweredPlan,
    /// File of its weights; plans that store identical weights share one.
    weights: String,
}

enum LoweredPlan {
    Cpu { lowered: Box<cpu::lower::LoweredProgram>, reports: Vec<PassReport> },
    Gpu(Box<GpuPlan>),
}

impl LoweredPlan {
    /// Lowers by a recipe. `means` is present for a GPU.
    fn new(
        config: &ModelConfig,
        recipe: &Recipe,
        limits: &Limits,
        means: Option<PlanCompiler>,
        calibration: Option<&Calibration>,
    ) -> Result<LoweredPlan> {
        match means {
            None => {
                let (graph, reports) =
                    optimized_graph(config, recipe.precision, limits.max_sequence_tokens, calibration)?;
                Ok(LoweredPlan::Cpu {
                    lowered: Box::new(cpu::lower::lower(&graph, limits, recipe.cpu_target()?)?),
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

    /// The constants that it stores.
    fn contents(&self) -> Box<dyn Iterator<Item = &ConstRows> + '_> {
        match self {
            LoweredPlan::Cpu { lowered, .. } => Box::new(lowered.constants.iter()),
            LoweredPlan::Gpu(plan) => Box::new(plan.weights.iter().map(|weight| &weight.content)),
        }
    }

    fn means(&self) -> Option<PlanCompiler> {
        match self {
            LoweredPlan::Cpu { .. } => None,
            LoweredPlan::Gpu(plan) => Some(plan.means()),
        }
    }

    /// Returns true if the weights that become part of a compiled plan are transposed to a temporary file.
    fn stages_weights(&self) -> bool {
        matches!(self, LoweredPlan::Gpu(plan) if plan.stages_weights())
    }

    /// Bytes of the weights that become part of a compiled plan.
    fn bytes_in_plan(&self) -> u64 {
        match self {
            LoweredPlan::Cpu { .. } => 0,
            LoweredPlan::Gpu(plan) => plan.weights.iter().filter(|weight| weight.in_plan).map(PlanWeight::bytes).sum(),
        }
    }
}

/// Temporary file of rounded matrices.
const ROUNDED: &str = "rounded.safetensors";

/// A build that is fully planned, with the weights still unread.
pub struct PlannedBuild {
    request: BuildRequest,
    checkpoint: Checkpoint,
    /// The checkpoint's config, completed with the ids that its tokenizer knows.
    config: ModelConfig,
    tokenizer: Option<(Vec<u8>, Tokenizer)>,
    chat_format: ChatFormat,
    generation: GenerationSettings,
    plans: Vec<Planned>,
    calibration: Option<CalibrationRun>,
    /// Prompts for the reference, without answers yet; `None` if it is not wanted.
    reference: Option<Reference>,
    stands: Vec<Stand>,
    prediction: Prediction,
}

/// Builds an engine package: reads the checkpoint, optimizes and lowers the graph, compiles it for GPUs, packs the
/// weights, and publishes the package atomically.
///
/// # Errors
/// Any problem with the checkpoint, recipes or output; nothing is left behind then.
pub fn build(request: &BuildRequest, progress: &Arc<dyn Progress>) -> Result<BuildSummary> {
    PlannedBuild::new(request, &**progress)?.run(progress)
}

impl PlannedBuild {
    /// Opens the checkpoint, lowers the graph for every recipe, and predicts the resources needed. Weights are not
    /// read, and nothing is written except the temporary file of a compressed checkpoint.
    ///
    /// # Errors
    /// Any problem with the checkpoint or recipes. This does not check that the build fits this machine.
    pub fn new(request: &BuildRequest, progress: &dyn Progress) -> Result<PlannedBuild> {
        let recipes = &request.recipes;
        check_recipes(recipes)?;
        packing::start_threads()?;
        // Fail on anything that cannot be built here before reading the checkpoint.
        let means = recipes.iter().map(|recipe| means_for(recipe, request.prepare)).collect::<Result<Vec<_>>>()?;
        PackageWriter::check_target(&request.output, request.replace)?;
        let checkpoint = open_checkpoint(&request.checkpoint, progress)?;
        let mut config = checkpoint.config().clone();
        let limits = recipes.iter().map(|recipe| recipe.limits(&config)).collect::<Result<Vec<_>>>()?;
        let text = CheckpointText::of(&checkpoint, request.chat_format.as_deref())?;
        text.report(&checkpoint, progress)?;
        let CheckpointText { tokenizer, format: chat_format, generation, .. } = text;
        if config.eos_token_ids.is_empty() {
            // The tokenizer supplies the BOS and EOS ids that the config omits.
            config.bos_token_id = config.bos_token_id.or(text.bos_token_id);
            config.eos_token_ids.clone_from(&chat_format.eos_token_ids);
        }
        let tokenizer_of = tokenizer.as_ref().map(|(_, tokenizer)| tokenizer);

        // Weights do not depend on calibration results, so any scale will do for lowering the graph.
        let uncalibrated = Calibration::uniform(0.5);
        let mut plans: Vec<Planned> = Vec::with_capacity(recipes.len());
        for ((recipe, limits), means) in recipes.iter().zip(limits).zip(means) {
            let scales = uncalibrated.without(recipe.kept_in_bf16());
            let lowered = LoweredPlan::new(&config, recipe, &limits, means, Some(&scales))?;
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
        let reference = request.reference.then(|| {
            let shortest = plans.iter().map(|plan| plan.limits.max_sequence_tokens).min().unwrap_or(0);
            let limits = Limits { max_sequence_tokens: shortest, ..plans[0].limits.clone() };
            let calibrated = calibration.as_ref().map_or(&[][..], |run| &run.prompts);
            Reference::new(prompts(tokenizer_of.map(|tokenizer| (tokenizer, &chat_format)), calibrated, &limits))
        });
        if reference.is_none() {
            progress.warn(
                "without reference answers (--no-reference) a plan for a GPU is compared with itself only, not with the \
                 CPU, before it answers",
            );
        }
        let mut planned = PlannedBuild {
            request: request.clone(),
            checkpoint,
            config,
            tokenizer,
            chat_format,
            generation,
            plans,
            calibration,
            reference,
            stands: Vec::new(),
            prediction: Prediction::default(),
        };
        planned.stands = planned.plan_stands()?;
        planned.prediction = planned.predict()?;
        Ok(planned)
    }

    /// Resources that the build needs.
    pub fn prediction(&self) -> &Prediction {
        &self.prediction
    }

    /// The plans to pack weights for, one per file.
    fn packed_plans(&self) -> impl Iterator<Item = &Planned> {
        self.plans
            .iter()
            .enumerate()
            .filter(|(index, plan)| !self.plans.iter().take(*index).any(|other| other.weights == plan.weights))
            .map(|(_, plan)| plan)
    }

    /// The items of every weights file, by name.
    fn files(&self) -> Result<Vec<(String, Vec<PackItem<'_>>)>> {
        let mut files = Vec::new();
        for plan in self.packed_plans() {
            files.push((plan.weights.clone(), plan.lowered.items()?));
        }
        if let Some(run) = self.calibration.as_ref().filter(|run| run.is_scratch) {
            files.push((run.weights.clone(), cpu::pack::items(&run.lowered)));
        }
        files.extend(self.stands.iter().map(|stand| (stand.weights.clone(), cpu::pack::items(&stand.lowered))));
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
            scratch_bytes += run.job.file_bytes(&run.lowered);
            let cached_tokens = program.limits.slots * program.limits.max_sequence_tokens;
            let tokens: usize = run.prompts.iter().map(Vec::len).sum();
            // The residual stream, and the cosines and sines of positions, in FP32.
            let carried = tokens * (self.config.hidden_size + self.config.rotary_dim) * 4;
            calibrating = (program.arena_bytes + cached_tokens * program.cache.bytes_per_token() + carried) as u64;
            calibrating += run.job.memory_bytes(&run.lowered);
            if run.smooths {
                calibrating += smoothing_memory_bytes(&run.lowered);
            }
        }
        // Removed before the plan is compiled, but not free until then.
        let staged = self.plans.iter().filter(|plan| plan.lowered.stages_weights());
        scratch_bytes += staged.map(|plan| plan.lowered.bytes_in_plan()).sum::<u64>();
        scratch_bytes +=
            self.stands.iter().map(|stand| cpu::pack::packed_bytes(&stand.lowered.program.weights)).sum::<u64>();
        let mut asking = 0;
        if let Some(reference) = &self.reference {
            for plan in &self.plans {
                let program = match &plan.lowered {
                    LoweredPlan::Cpu { lowered, .. } => lowered.program.clone(),
                    LoweredPlan::Gpu(_) => {
                        let (precision, kept) = numbers(&plan.recipe);
                        let uncalibrated = Calibration::uniform(0.5).without(kept);
                        lower_for_prompts(reference, &self.config, precision, Some(&uncalibrated))?.program
                    }
                };
                let cached_tokens = reference.tokens() * program.cache.bytes_per_token();
                asking = asking.max((program.arena_bytes + cached_tokens) as u64);
            }
        }
        Ok(Prediction {
            read_bytes: self.checkpoint.weight_bytes(),
            files,
            scratch_bytes,
            memory_bytes: PROGRAM_BYTES + packing.max(compiling).max(calibrating).max(asking),
            free_disk_bytes: free_bytes(&self.request.output),
            available_memory_bytes: available_memory_bytes(),
        })
    }

    /// Reads the weights and writes the package.
    ///
    /// # Errors
    /// Any problem with the weights or the output, or a build that does not fit this machine; nothing is left behind
    /// then.
    pub fn run(mut self, progress: &Arc<dyn Progress>) -> Result<BuildSummary> {
        self.prediction.check(&self.request.output)?;
        let mut writer = PackageWriter::create(&self.request.output, self.request.replace)?;
        // Plans that need no weights are compiled first, so that TensorRT's rejections surface within seconds.
        let mut engines: Vec<Option<Vec<CompiledPlans>>> = Vec::with_capacity(self.plans.len());
        for Planned { recipe, lowered, .. } in &self.plans {
            engines.push(match lowered {
                LoweredPlan::Gpu(plan) if !plan.holds_weights() && !recipe.precision.needs_calibration() => {
                    plan.compile(recipe.target.name(), &Constants::Arbitrary, progress)?
                }
                _ => None,
            });
        }
        let (digest, calibration) = self.pack_and_calibrate(&mut writer, progress)?;
        let reference = self.ask(&writer, calibration.as_ref(), &**progress)?;

        let checkpoint_info = CheckpointInfo { format: self.checkpoint.format().into(), digest };
        let mut manifest = Manifest::new(self.config, checkpoint_info, self.chat_format, self.generation);
        if let Some((bytes, tokenizer)) = &self.tokenizer {
            let (file, source) = (Tokenizer::PACKAGE_FILE, tokenizer.file_name());
            let kept = tokenizer.to_package(Path::new(source), bytes)?;
            writer.add(file, |write| write(&kept))?;
            let vocab_size = tokenizer.vocab_size();
            manifest.tokenizer = Some(TokenizerInfo { file: file.into(), source: source.into(), vocab_size });
        }
        if let Some(reference) = reference {
            let text = reference.to_json()?;
            writer.add(Reference::PACKAGE_FILE, |write| write(&text))?;
            manifest.reference = Some(Reference::PACKAGE_FILE.into());
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
                        compile_with_weights(&plan, Arc::new(file), target, &writer, progress)?
                    } else if recipe.precision.needs_calibration() {
                        plan.compile(target, &Constants::Arbitrary, progress)?
                    } else {
                        engines
                    };
                    if engines.is_some() && recipe.fp8_kinds().len() > 1 {
                        progress.note(&format!(
                            "plan {target} takes its FP8 weights as inputs; `aotron build {} --finish` compiles it with \
                             constants too, times both and keeps the faster",
                            self.request.output.display()
                        ));
                    }
                    let (means, reports) = (plan.means(), std::mem::take(&mut plan.reports));
                    let (file, tensorrt) = add_engines(&mut writer, &recipe, *plan, engines)?;
                    let kv_bytes_per_token = tensorrt.kv_bytes_per_token();
                    let info = plan_info(&recipe, file, weights, limits, kv_bytes_per_token, Some(tensorrt));
                    (info, Some(means), reports)
                }
            };
            let calibration = calibration.as_ref().and_then(|found| found.of(recipe.precision)).cloned();
            plans.push(PlanSummary { calibration, ..PlanSummary::of(&info, means, reports) });
            manifest.plans.push(info);
        }
        writer.finish(&mut manifest)?;
        let bytes = manifest.files.iter().map(|f| f.bytes).sum();
        Ok(BuildSummary { package: self.request.output, bytes, plans })
    }

    /// Writes all weights files and runs the calibration, if any. One pass over the checkpoint suffices unless weights
    /// depend on their layers' inputs: then those inputs are computed first. Returns the checkpoint's digest.
    fn pack_and_calibrate(
        &mut self,
        writer: &mut PackageWriter,
        progress: &Arc<dyn Progress>,
    ) -> Result<(String, Option<Calibrations>)> {
        let is_first = |run: &&CalibrationRun| run.smooths || !run.job.is_empty();
        let first = self.calibration.as_ref().filter(is_first).map(|run| run.weights.clone());
        let Some(first) = first else {
            let digest = self.pack(writer, progress, &|_| true)?;
            return Ok((digest, self.calibrate(writer, &**progress)?));
        };
        let digest = self.pack(writer, progress, &|file| file == first)?;
        let calibration = self.calibrate(writer, &**progress)?;
        self.pack(writer, progress, &|file| file != first)?;
        Ok((digest, calibration))
    }

    /// Writes the weights files that `is_wanted` in one pass over the checkpoint, and returns its digest.
    fn pack(
        &self,
        writer: &mut PackageWriter,
        progress: &Arc<dyn Progress>,
        is_wanted: &dyn Fn(&str) -> bool,
    ) -> Result<String> {
        progress.stage("packing", self.checkpoint.weight_bytes());
        let mut files = self.files()?;
        files.retain(|(name, _)| is_wanted(name));
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
        let calibration = self.calibration.iter().filter(|run| run.is_scratch).map(|run| &run.weights);
        let scratch: Vec<&String> = calibration.chain(self.stands.iter().map(|stand| &stand.weights)).collect();
        infos.into_iter().filter(|info| !scratch.contains(&&info.path)).for_each(|info| writer.push(info));
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

    /// Runs the calibration, if any, and lowers again the plans that depend on it.
    fn calibrate(&mut self, writer: &PackageWriter, progress: &dyn Progress) -> Result<Option<Calibrations>> {
        let Some(run) = self.calibration.take() else { return Ok(None) };
        let path = writer.scratch(&run.weights);
        let inputs = CalibrationInputs {
            lowered: &run.lowered,
            weights: &path,
            prompts: &run.prompts,
            checkpoint: &self.checkpoint,
            e4m3: self.plans.iter().any(|plan| plan.recipe.precision.input_code() == Some(DType::F8)),
            int8: run.smooths,
            strengths: run.strengths,
            sites: &run.sites,
            job: &run.job,
            rounded: &writer.scratch(ROUNDED),
        };
        let found = calibrate(&inputs, progress);
        if run.is_scratch {
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        let (found, rounded) = found?;
        if let Some(rounded) = rounded {
            self.checkpoint.use_rounded(rounded);
        }
        for plan in &mut self.plans {
            if let Some(found) = found.of(plan.recipe.precision) {
                let found = found.without(plan.recipe.kept_in_bf16());
                plan.lowered =
                    LoweredPlan::new(&self.config, &plan.recipe, &plan.limits, plan.lowered.means(), Some(&found))?;
            }
        }
        if let Some(reference) = &self.reference {
            self.stands.iter_mut().try_for_each(|stand| stand.calibrate(reference, &self.config, &found))?;
        }
        Ok(Some(found))
    }

    /// The models to pack for the CPU, for the reference of GPU plans with quantized weights. None is needed where a CPU
    /// plan computes the same.
    fn plan_stands(&self) -> Result<Vec<Stand>> {
        let Some(reference) = &self.reference else { return Ok(Vec::new()) };
        let (mut of_cpu, mut of_gpu) = (Vec::new(), Vec::new());
        for plan in &self.plans {
            match &plan.lowered {
                LoweredPlan::Cpu { lowered, .. } if lowered.program.quantizes_activations() => {}
                LoweredPlan::Cpu { .. } => of_cpu.push(numbers(&plan.recipe)),
                LoweredPlan::Gpu(_) => of_gpu.push(numbers(&plan.recipe)),
            }
        }
        of_gpu.retain(|numbers| !of_cpu.contains(numbers));
        Stand::plan(reference, &self.config, &of_gpu)
    }

    /// Computes the answers that the plans must give, if they are wanted. Plans that compute alike share them.
    fn ask(
        &self,
        writer: &PackageWriter,
        calibration: Option<&Calibrations>,
        progress: &dyn Progress,
    ) -> Result<Option<Reference>> {
        let Some(mut reference) = self.reference.clone() else { return Ok(None) };
        let mut answered: Vec<(&str, Numbers)> = Vec::new();
        let is_gpu = |plan: &&Planned| plan.lowered.means().is_some();
        for plan in &self.plans {
            let LoweredPlan::Cpu { lowered, .. } = &plan.lowered else { continue };
            let precision = plan.recipe.precision;
            let path = writer.scratch(&plan.weights);
            ask_program(&mut reference, ("cpu", &precision.to_string()), &lowered.program, &path, progress)?;
            if !lowered.program.quantizes_activations() {
                answered.push((plan.recipe.target.name(), numbers(&plan.recipe)));
            }
        }
        for plan in self.plans.iter().filter(is_gpu) {
            let (target, precision) = (plan.recipe.target.name(), plan.recipe.precision);
            let numbers = numbers(&plan.recipe);
            if let Some((other, _)) = answered.iter().find(|(_, of_other)| *of_other == numbers) {
                reference.expect_alike(target, Some(other));
                continue;
            }
            let calibration = calibration.and_then(|found| found.of(precision)).map(|found| found.without(numbers.1));
            let lowered = lower_for_prompts(&reference, &self.config, precision, calibration.as_ref())?;
            match self.stands.iter().find(|stand| stand.is_of(numbers)) {
                Some(stand) => {
                    let (path, name) = (writer.scratch(&stand.weights), precision.to_string());
                    let asked = ask_program(&mut reference, (target, &name), &lowered.program, &path, progress);
                    std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
                    asked?;
                }
                None => ask_checkpoint(&mut reference, (target, precision), &lowered, &self.checkpoint, progress)?,
            }
            answered.push((target, numbers));
        }
        Ok(Some(reference))
    }
}

/// The number formats of a plan's linear layers: those of equal ones give the same answers.
pub(super) type Numbers<'r> = (Precision, &'r [LinearKind]);

fn numbers(recipe: &Recipe) -> Numbers<'_> {
    (recipe.precision, recipe.kept_in_bf16())
}

/// Opens the checkpoint at `path`, reporting to `progress` while it is unpacked.
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

/// File for a plan's weights: another plan's file if the weights are identical.
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

/// Rejects combinations of recipes that cannot share a package.
fn check_recipes(recipes: &[Recipe]) -> Result<()> {
    for (index, recipe) in recipes.iter().enumerate() {
        recipe.check()?;
        let target = recipe.target.name();
        if recipes.iter().take(index).any(|other| other.target == recipe.target) {
            let detail = format!("it is the second one for the target {target}; a package has one plan for a target");
            return Err(recipe.refusal(detail));
        }
    }
    match recipes.is_empty() {
        true => Err(Error::Recipe { name: String::new(), detail: "no recipe was named".into() }),
        false => Ok(()),
    }
}

fn recipe_names(recipes: &[Recipe]) -> String {
    let names: Vec<&str> = recipes.iter().map(|recipe| recipe.name.as_str()).collect();
    names.join(", ")
}

/// The way to compile a recipe's plan on this machine; `None` for the CPU, which needs no compiler.
fn means_for(recipe: &Recipe, prepare: bool) -> Result<Option<PlanCompiler>> {
    let capability = recipe.target.compute_capability();
    capability.map(|capability| PlanCompiler::find(recipe.target.name(), capability, prepare)).transpose()
}
