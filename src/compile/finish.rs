//! Compiles the plans of an existing package from its own weights: on the GPU that a package was prepared for, for
//! another TensorRT version, another GPU, or another CPU.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use super::gpu::{CompiledPlans, GpuPlan, PlanCompiler, precision_of};
use super::reference::ask_program;
use super::repack::repack;
use super::{
    BuildSummary, Calibration, PlanSummary, Precision, Progress, Recipe, Target, add_engines, fastest, plan_info,
};
use crate::backend::cpu::program::Program;
use crate::backend::tensorrt::lower::Constants;
use crate::backend::tensorrt::pack;
use crate::backend::{Limits, cpu_program, packing};
use crate::engine::tensorrt::TensorRtInfo;
use crate::engine::{Manifest, Package, PackageWriter, PlanInfo};
use crate::error::{Error, Result};
use crate::tensor_file::TensorFile;
use crate::verify::Reference;

/// Temporary file of transposed weights.
const STAGED: &str = "constants.safetensors";

/// Package to finish, and optionally a recipe.
#[derive(Debug, Clone)]
pub struct FinishRequest {
    /// The package; the finished one replaces it.
    pub package: PathBuf,
    /// For a GPU: adds a plan by this recipe, from the package's TensorRT weights, instead of compiling its existing
    /// plans. For a CPU: repacks the CPU plan's weights for the recipe's CPU; of a built-in recipe nothing else is taken.
    /// Precision and sequence length are those of the weights: a recipe file that names others is refused.
    pub recipe: Option<Recipe>,
}

/// Compiles plans on this machine: those that were only prepared or, if there are none, all TensorRT plans; or one by
/// another recipe. Where a recipe leaves open how FP8 weights are held, both ways are compiled, verified and timed, and the
/// faster is kept. The checkpoint is not needed. The package is replaced atomically.
///
/// # Errors
/// [`Error::Package`] if there is nothing to compile or the weights do not match the plan; [`Error::TensorRt`] if this
/// machine cannot compile it; any I/O error.
pub fn finish(request: &FinishRequest, progress: &Arc<dyn Progress>) -> Result<BuildSummary> {
    packing::start_threads()?;
    let package = Package::open(&request.package)?;
    let mut manifest = package.manifest().clone();
    if let Some(recipe) = request.recipe.as_ref().filter(|recipe| recipe.target == Target::Cpu) {
        let mut writer = PackageWriter::create(&request.package, true)?;
        let (info, summary) = repack(&package, recipe, &mut writer, &**progress)?;
        let mut written: Vec<String> = info.files().cloned().collect();
        if let Some(reference) = Reference::of_package(&package)? {
            let reference = after_repacking(reference, &package, &info, &writer, &**progress)?;
            written.extend(add_reference(reference, &mut writer, &mut manifest)?);
        }
        replace_plan(&mut manifest, info);
        return publish(&package, writer, manifest, &written, vec![summary]);
    }
    let work = plans_to_compile(&package, request.recipe.as_ref())?;
    // Fail on anything that cannot be compiled here before any work.
    let means: Vec<PlanCompiler> = work
        .iter()
        .map(|(recipe, plan)| {
            let capability = recipe.target.compute_capability().ok_or_else(|| not_for_gpus(&package, plan))?;
            PlanCompiler::find_to_finish(recipe.target.name(), capability)
        })
        .collect::<Result<_>>()?;

    let mut writer = PackageWriter::create(&request.package, true)?;
    let mut reference = Reference::of_package(&package)?;
    let mut plans = Vec::with_capacity(work.len());
    let mut added: Vec<String> = Vec::new();
    for ((recipe, old), means) in work.into_iter().zip(means) {
        if let Some(reference) = &mut reference {
            // A plan of the same weights must give the same answers.
            reference.expect_alike(recipe.target.name(), Some(&old.target));
        }
        let job = FinishJob { package: &package, old: &old, means, progress };
        let (info, summary) = match recipe.fp8_kinds() {
            kinds @ [_, _, ..] => fastest::choose(&job, &recipe, kinds, &mut writer, (&manifest, reference.as_ref()))?,
            _ => job.compile(&recipe, &old.limits, recipe.target.name(), &mut writer)?,
        };
        plans.push(summary);
        added.extend(info.files().filter(|file| **file != info.weights).cloned());
        replace_plan(&mut manifest, info);
    }
    if let Some(reference) = reference {
        added.extend(add_reference(reference, &mut writer, &mut manifest)?);
    }
    publish(&package, writer, manifest, &added, plans)
}

/// A plan of a package that is compiled from the package's weights.
pub(super) struct FinishJob<'a> {
    pub package: &'a Package,
    /// The plan whose weights are used.
    pub old: &'a PlanInfo,
    pub means: PlanCompiler,
    pub progress: &'a Arc<dyn Progress>,
}

impl FinishJob<'_> {
    /// Compiles the plan by a recipe, which progress calls `name`, into the package that is being written.
    ///
    /// # Errors
    /// As [`finish`].
    pub fn compile(
        &self,
        recipe: &Recipe,
        limits: &Limits,
        name: &str,
        writer: &mut PackageWriter,
    ) -> Result<(PlanInfo, PlanSummary)> {
        let FinishJob { package, old, means, progress } = *self;
        let tensorrt = old.tensorrt.as_ref().ok_or_else(|| {
            Error::internal(format!("the {} plan to compile is not TensorRT's", old.target), "one of those that are")
        })?;
        let calibration = Calibration::from_scales(tensorrt.activation_scales.clone());
        let mut plan = GpuPlan::new(&package.manifest().model, recipe, limits, means, Some(&calibration))?;
        let file = Arc::new(TensorFile::open(&package.file_path(&old.weights))?);
        check_weights(package, old, &plan, &file)?;
        if plan.holds_weights() {
            // Weights that become part of the plan lose their digest, so verify them now.
            progress.stage("verifying", file.mapped().len() as u64);
            package.verify_file(&old.weights, &|bytes| progress.advance(bytes))?;
        }
        let engines = compile_with_weights(&plan, file, name, writer, progress)?;
        let reports = std::mem::take(&mut plan.reports);
        let (file, tensorrt) = add_engines(writer, recipe, plan, engines)?;
        let kv_bytes_per_token = tensorrt.kv_bytes_per_token();
        let info = plan_info(recipe, file, old.weights.clone(), limits.clone(), kv_bytes_per_token, Some(tensorrt));
        let summary = PlanSummary::of(&info, Some(means), reports);
        Ok((info, summary))
    }
}

/// Compiles a plan with its weights in `packed`, of which those that are embedded in it are transposed to a temporary
/// file, if need be.
///
/// # Errors
/// As [`GpuPlan::stage`] and [`GpuPlan::compile`].
pub(super) fn compile_with_weights(
    plan: &GpuPlan,
    packed: Arc<TensorFile>,
    name: &str,
    writer: &PackageWriter,
    progress: &Arc<dyn Progress>,
) -> Result<Option<Vec<CompiledPlans>>> {
    if !plan.holds_weights() {
        return plan.compile(name, &Constants::Arbitrary, progress);
    }
    if !plan.stages_weights() {
        return plan.compile(name, &Constants::File(packed), progress);
    }
    let path = writer.scratch(STAGED);
    plan.stage(&packed, &path, &**progress)?;
    let staged = TensorFile::open(&path)?;
    // It stays mapped until it has been compiled.
    std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    plan.compile(name, &Constants::File(Arc::new(staged)), progress)
}

/// Adds a reference to the package, and returns its file's name.
pub(super) fn add_reference(
    reference: Reference,
    writer: &mut PackageWriter,
    manifest: &mut Manifest,
) -> Result<Option<String>> {
    manifest.reference = None;
    if reference.answers.is_empty() {
        return Ok(None);
    }
    let text = reference.to_json()?;
    writer.add(Reference::PACKAGE_FILE, |write| write(&text))?;
    manifest.reference = Some(Reference::PACKAGE_FILE.into());
    Ok(manifest.reference.clone())
}

/// The reference of a package whose CPU plan was repacked. It holds as it is, unless the plan now quantizes the inputs of
/// linear layers, or no longer does: then the repacked plan is asked again.
fn after_repacking(
    mut reference: Reference,
    package: &Package,
    info: &PlanInfo,
    writer: &PackageWriter,
    progress: &dyn Progress,
) -> Result<Reference> {
    let Some(plan) = &info.plan else { return Ok(reference) };
    let path = writer.scratch(plan);
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let program: Program = serde_json::from_slice(&text)
        .map_err(|error| Error::internal(format!("a plan that cannot be read: {error}"), "the plan just written"))?;
    let (_, old) = cpu_program(package)?;
    if old.quantizes_activations() != program.quantizes_activations() {
        ask_program(&mut reference, ("cpu", &info.precision), &program, &writer.scratch(&info.weights), progress)?;
    }
    Ok(reference)
}

/// Puts a plan into the manifest, replacing the one for its target.
pub(super) fn replace_plan(manifest: &mut Manifest, info: PlanInfo) {
    match manifest.plans.iter_mut().find(|plan| plan.target == info.target) {
        Some(plan) => *plan = info,
        None => manifest.plans.push(info),
    }
}

/// Publishes the package with the files that were `added`; everything else that the new manifest uses is carried over.
pub(super) fn publish(
    package: &Package,
    mut writer: PackageWriter,
    mut manifest: Manifest,
    added: &[String],
    plans: Vec<PlanSummary>,
) -> Result<BuildSummary> {
    let kept = manifest.plans.iter().flat_map(PlanInfo::files).chain(manifest.tokenizer.iter().map(|t| &t.file));
    let mut kept: Vec<&String> = kept.collect();
    kept.sort_unstable();
    kept.dedup();
    for name in kept {
        if let (false, Some(info)) = (added.contains(name), package.manifest().file(name)) {
            writer.add_existing(package.path(), info)?;
        }
    }
    writer.finish(&mut manifest)?;
    let bytes = manifest.files.iter().map(|f| f.bytes).sum();
    Ok(BuildSummary { package: package.path().to_path_buf(), bytes, plans })
}

/// The recipes to compile by, each with the plan whose weights it uses.
fn plans_to_compile(package: &Package, recipe: Option<&Recipe>) -> Result<Vec<(Recipe, PlanInfo)>> {
    let of_tensorrt: Vec<&PlanInfo> = package.manifest().plans.iter().filter(|p| p.tensorrt.is_some()).collect();
    let Some(first) = of_tensorrt.first() else {
        let detail = "it has no plan for a GPU, and no weights to compile one with; build it from the checkpoint with \
                      --recipe a100 or h100";
        return Err(Error::package(package.path(), detail));
    };
    if let Some(recipe) = recipe {
        let mut recipe = recipe.clone();
        let wanted = recipe.target.name();
        let source = of_tensorrt.iter().find(|plan| plan.target == wanted).unwrap_or(first);
        take_weights_settings(package, source, &mut recipe)?;
        recipe.check()?;
        if recipe.is_built_in() {
            // The package stores the recipe's text, so it has to record the values that override it.
            let (precision, tokens) = (recipe.precision, source.limits.max_sequence_tokens);
            let line = format!("precision = \"{precision}\", max_sequence_tokens = {tokens}");
            recipe.text = format!("{}\n\n# From the package's weights: {line}\n", recipe.text.trim_end());
        }
        let mut plan = (*source).clone();
        plan.limits = recipe.step_limits(source.limits.max_sequence_tokens, &package.manifest().model);
        return Ok(vec![(recipe, plan)]);
    }
    let prepared: Vec<&&PlanInfo> = of_tensorrt.iter().filter(|plan| plan.plan.is_none()).collect();
    let chosen = if prepared.is_empty() { of_tensorrt.iter().collect() } else { prepared };
    chosen
        .into_iter()
        .map(|plan| {
            let mut recipe = Recipe::parse(&format!("of the {} plan", plan.target), &plan.recipe)?;
            recipe.precision = precision_of_plan(package, plan)?;
            let tokens = plan.limits.max_sequence_tokens;
            recipe.max_sequence_tokens = Some(tokens);
            // The plan's own slots, unless they are what memory leaves of the recipe's: another way to hold weights may
            // leave more.
            let held = plan.tensorrt.as_ref().map(TensorRtInfo::fp8_weights).unwrap_or_default();
            let as_held = if recipe.fp8_kinds().len() > 1 { recipe.with_fp8_weights(held) } else { recipe.clone() };
            if as_held.step_limits(tokens, &package.manifest().model).slots != plan.limits.slots {
                recipe.slots = plan.limits.slots;
            }
            Ok((recipe, (*plan).clone()))
        })
        .collect()
}

/// Rejects weights that differ from the ones the plan expects.
fn check_weights(package: &Package, old: &PlanInfo, plan: &GpuPlan, file: &TensorFile) -> Result<()> {
    for weight in &plan.weights {
        let (dtype, shape) = pack::stored(weight)?;
        match file.tensor(&weight.name) {
            Some((found, _)) if found.dtype == dtype && found.shape == shape => {}
            found => {
                let found =
                    found.map_or("it is not there".into(), |(t, _)| format!("it is {:?}{:?}", t.dtype, t.shape));
                let detail = format!(
                    "{}: the plan needs tensor {} as {dtype:?}{shape:?}, but {found}; build the package from the \
                     checkpoint again",
                    old.weights, weight.name
                );
                return Err(Error::package(package.path(), detail));
            }
        }
    }
    Ok(())
}

fn not_for_gpus(package: &Package, plan: &PlanInfo) -> Error {
    Error::package(package.path(), format!("its plan for {} is not for a GPU that this aotron knows", plan.target))
}

fn precision_of_plan(package: &Package, plan: &PlanInfo) -> Result<Precision> {
    precision_of(&plan.precision).ok_or_else(|| {
        let detail =
            format!("its {} plan has precision {}, which this aotron does not know", plan.target, plan.precision);
        Error::package(package.path(), detail)
    })
}

/// Sets a recipe's precision to that of the weights of `plan`, which cannot change. Refuses a recipe file that names
/// another precision or sequence length; a built-in recipe is named for its target.
pub(super) fn take_weights_settings(package: &Package, plan: &PlanInfo, recipe: &mut Recipe) -> Result<()> {
    let (precision, tokens) = (precision_of_plan(package, plan)?, plan.limits.max_sequence_tokens);
    if !recipe.is_built_in() {
        let refuse = |key: &str, named: &dyn Display, kept: &dyn Display| {
            let path = package.path().display();
            let detail = format!(
                "{key} is {named}, but the weights of {path} were made for {kept}, which --finish keeps; name that, or \
                 build from the checkpoint"
            );
            Err(recipe.refusal(detail))
        };
        if recipe.precision != precision {
            return refuse("precision", &recipe.precision, &precision);
        }
        if let Some(named) = recipe.max_sequence_tokens.filter(|named| *named != tokens) {
            return refuse("max_sequence_tokens", &named, &tokens);
        }
    }
    recipe.precision = precision;
    Ok(())
}
