//! Ahead of time: a checkpoint becomes an engine package.

mod calibration;
mod finish;
pub mod gpu;
pub mod passes;
mod quantize;
mod recipe;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use calibration::Calibration;
pub use finish::{FinishRequest, finish};
use gpu::{Engines, GpuPlan, Means};
pub use passes::{Precision, Report};
pub use recipe::{Recipe, Target, TensorRtOptions};

use crate::backend::Limits;
use crate::backend::cpu;
use crate::backend::tensorrt::lower::{Constants, Weight};
use crate::backend::tensorrt::pack as gpu_pack;
use crate::checkpoint::Checkpoint;
use crate::engine::tensorrt::TensorRtInfo;
use crate::engine::{CheckpointInfo, GenerationSettings, Manifest, PackageWriter, PlanInfo, TokenizerInfo};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::model;
use crate::tensor_file::TensorFile;
use crate::text::Tokenizer;
use crate::text::template::TURN_MARKER;

/// New tokens of a generation whose request does not say: the model card's example.
const DEFAULT_MAX_TOKENS: usize = 200;
/// A tokenizer file is refused unread past this size; the 8B model's has about 20 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// Follows a build.
pub trait Progress: Send + Sync {
    /// A stage begins; `bytes` is how much it will go through.
    fn stage(&self, name: &str, bytes: u64);
    /// A stage begins whose steps are not known in advance.
    fn work(&self, name: &str) {
        self.stage(name, 0);
    }
    /// That many bytes, or steps, of the stage are done.
    fn advance(&self, amount: u64);
    /// Something the user should know.
    fn warn(&self, message: &str);
    /// Whether the build is to end, with [`Error::Cancelled`] and nothing left behind.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// What to build, from what, to where.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// What to build: one plan each, for different targets.
    pub recipes: Vec<Recipe>,
    /// The package's folder.
    pub output: PathBuf,
    /// Replace a package that is there.
    pub replace: bool,
    /// Where a plan cannot be compiled on this machine, do everything else: [`finish()`] does the rest.
    pub prepare: bool,
    /// For a precision that [needs a calibration](Precision::needs_calibration): its prompts, as lines of JSON,
    /// `{"messages": [{"role", "content"}, …]}` that end with a user's, or `{"token_ids": […]}`. `None` takes built-in
    /// ones.
    pub calibration: Option<PathBuf>,
}

/// What was built.
#[derive(Debug, Clone)]
pub struct BuildSummary {
    /// The package's folder.
    pub package: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Its plans.
    pub plans: Vec<PlanSummary>,
}

/// What was built for one target.
#[derive(Debug, Clone)]
pub struct PlanSummary {
    /// What it runs on.
    pub target: String,
    /// How it computes.
    pub precision: String,
    /// The plan's limits.
    pub limits: Limits,
    /// Bytes of KV cache per token of one sequence.
    pub kv_bytes_per_token: usize,
    /// Of a GPU's plan: what compiled it, or checked it.
    pub compiler: Option<String>,
    /// It was only checked, and has to be finished on its GPU.
    pub only_prepared: bool,
    /// What the passes did.
    pub reports: Vec<Report>,
}

/// The optimized graph of a checkpoint's model, and what the passes did. `calibration` is read by a precision that
/// needs one.
///
/// # Errors
/// [`Error::Graph`] if the config's sizes do not fit together.
pub fn optimized_graph(
    config: &crate::checkpoint::ModelConfig,
    precision: Precision,
    max_sequence_tokens: usize,
    calibration: Option<&Calibration>,
) -> Result<(Graph, Vec<Report>)> {
    passes::run(model::build_graph(config)?, precision, max_sequence_tokens, calibration)
}

/// A plan between its lowering and the package.
enum Pending {
    Cpu { lowered: Box<cpu::lower::Lowered>, reports: Vec<Report> },
    Gpu(Box<GpuPlan>),
}

impl Pending {
    fn packed_bytes(&self) -> u64 {
        match self {
            Pending::Cpu { lowered, .. } => cpu::pack::packed_bytes(&lowered.program.weights),
            Pending::Gpu(plan) => gpu_pack::packed_bytes(&plan.weights),
        }
    }
}

/// Builds an engine package: reads the checkpoint, optimizes and lowers the graph, compiles it for GPUs, packs the
/// weights, and makes the package appear at its place whole.
///
/// # Errors
/// Whatever is wrong with the checkpoint, recipes or output; nothing is left behind then.
pub fn build(request: &BuildRequest, progress: &Arc<dyn Progress>) -> Result<BuildSummary> {
    let recipes = &request.recipes;
    check_recipes(recipes)?;
    // What cannot be built here is refused before anything is read.
    let means = recipes.iter().map(|recipe| means_for(recipe, request.prepare)).collect::<Result<Vec<_>>>()?;
    let checkpoint = Checkpoint::open(&request.checkpoint)?;
    let config = checkpoint.config();
    let limits = recipes.iter().map(|recipe| recipe.limits(config)).collect::<Result<Vec<_>>>()?;
    let tokenizer = checkpoint_tokenizer(&checkpoint)?;
    if tokenizer.is_none() {
        warn_without_tokenizer(&checkpoint, &**progress);
    }
    let generation = generation_settings(&checkpoint, tokenizer.as_ref().map(|(_, t)| t), &**progress)?;

    let mut writer = PackageWriter::create(&request.output, request.replace)?;
    let calibrated = recipes.iter().zip(&limits).find(|(recipe, _)| recipe.precision.needs_calibration());
    let calibration = match (calibrated, &request.calibration) {
        (Some((_, limits)), file) => {
            let tokenizer = tokenizer.as_ref().map(|(_, t)| t);
            let prompts = calibration::prompts(file.as_ref(), tokenizer, limits, &**progress)?;
            let scratch = writer.scratch("calibration.safetensors");
            let narrow = checkpoint.tensors().map(|t| 2 * t.elements() as u64).sum();
            check_space(&writer, &request.output, "the calibration", narrow)?;
            Some(calibration::calibrate(&checkpoint, limits, &prompts, &scratch, &**progress)?)
        }
        (None, Some(path)) => {
            let names: Vec<String> = recipes.iter().map(|recipe| recipe.precision.to_string()).collect();
            let (name, path) = (recipe_names(recipes), path.display());
            let detail = format!("precision {} needs no calibration, but {path} was given for one", names.join(", "));
            return Err(Error::Recipe { name, detail });
        }
        (None, None) => None,
    };
    let mut pending = Vec::with_capacity(recipes.len());
    for ((recipe, limits), means) in recipes.iter().zip(&limits).zip(means) {
        pending.push(match means {
            None => {
                let (graph, reports) =
                    optimized_graph(config, recipe.precision, limits.max_sequence_tokens, calibration.as_ref())?;
                Pending::Cpu { lowered: Box::new(cpu::lower::lower(&graph, limits)?), reports }
            }
            Some(means) => Pending::Gpu(Box::new(GpuPlan::new(config, recipe, limits, means, calibration.as_ref())?)),
        });
    }
    check_space(&writer, &request.output, "the package", pending.iter().map(Pending::packed_bytes).sum())?;

    // Compiling comes first where it needs no weights: what TensorRT refuses is then known within seconds.
    let mut engines = Vec::with_capacity(recipes.len());
    for (recipe, plan) in recipes.iter().zip(&pending) {
        engines.push(match plan {
            Pending::Gpu(plan) if !plan.holds_weights() => {
                plan.compile(recipe.target.name(), &Constants::Arbitrary, progress)?
            }
            _ => None,
        });
    }
    progress.stage("reading", checkpoint.weight_bytes());
    let digest = checkpoint_digest(&checkpoint, &**progress)?;

    let checkpoint_info = CheckpointInfo { format: checkpoint.format().into(), digest };
    let mut manifest = Manifest::new(config.clone(), checkpoint_info, generation);
    if let Some((bytes, tokenizer)) = &tokenizer {
        let (file, source) = (Tokenizer::PACKAGE_FILE, tokenizer.file_name());
        let kept = tokenizer.to_package(Path::new(source), bytes)?;
        writer.add(file, |write| write(&kept))?;
        let vocab_size = tokenizer.vocab_size();
        manifest.tokenizer = Some(TokenizerInfo { file: file.into(), source: source.into(), vocab_size });
    }
    let mut plans = Vec::with_capacity(recipes.len());
    // Plans of one packing share its file.
    let mut packed: Vec<(Vec<Weight>, String)> = Vec::new();
    for (((recipe, limits), pending), engines) in recipes.iter().zip(limits).zip(pending).zip(engines) {
        let (target, precision) = (recipe.target.name(), recipe.precision);
        let bytes = pending.packed_bytes();
        let (info, summary) = match pending {
            Pending::Cpu { lowered, reports } => {
                let weights = format!("weights/{target}-{precision}.safetensors");
                progress.stage("packing", bytes);
                writer.add(&weights, |write| {
                    cpu::pack::pack(&lowered, &checkpoint, &mut cancellable(write, progress), &|n| progress.advance(n))
                })?;
                let plan = format!("plans/{target}.json");
                let program = serde_json::to_vec(&lowered.program)
                    .map_err(|e| Error::package(&request.output, format!("the plan cannot be written as JSON: {e}")))?;
                writer.add(&plan, |write| write(&program))?;
                let cache = &lowered.program.cache;
                let kv_bytes_per_token = 2 * cache.layers * cache.kv_heads * cache.padded_dim() * cache.dtype.bytes();
                let info = plan_info(recipe, Some(plan), weights, limits, kv_bytes_per_token, None);
                (info, (None, reports))
            }
            Pending::Gpu(mut plan) => {
                let weights = match packed.iter().find(|(weights, _)| *weights == plan.weights) {
                    Some((_, file)) => file.clone(),
                    None => {
                        let is_taken = packed.iter().any(|(_, file)| file.contains(&format!("tensorrt-{precision}")));
                        let packing = if is_taken { target } else { "tensorrt" };
                        let file = format!("weights/{packing}-{precision}.safetensors");
                        progress.stage("packing", bytes);
                        writer.add(&file, |write| {
                            let mut write = cancellable(write, progress);
                            gpu_pack::pack(&plan.weights, &checkpoint, &mut |bytes| {
                                progress.advance(bytes.len() as u64);
                                write(bytes)
                            })
                        })?;
                        packed.push((plan.weights.clone(), file.clone()));
                        file
                    }
                };
                let engines = if plan.holds_weights() {
                    let file = TensorFile::open(&writer.scratch(&weights))?;
                    plan.compile(target, &Constants::File(Arc::new(file)), progress)?
                } else {
                    engines
                };
                let means = plan.means();
                let reports = std::mem::take(&mut plan.reports);
                let (file, tensorrt) = add_engines(&mut writer, recipe, *plan, engines)?;
                let kv_bytes_per_token = tensorrt.kv_bytes_per_token();
                let info = plan_info(recipe, file, weights, limits, kv_bytes_per_token, Some(tensorrt));
                (info, (Some(means), reports))
            }
        };
        plans.push(PlanSummary::of(&info, summary.0, summary.1));
        manifest.plans.push(info);
    }
    writer.finish(&mut manifest)?;
    let bytes = manifest.files.iter().map(|f| f.bytes).sum();
    Ok(BuildSummary { package: request.output.clone(), bytes, plans })
}

impl PlanSummary {
    fn of(info: &PlanInfo, means: Option<Means>, reports: Vec<Report>) -> PlanSummary {
        PlanSummary {
            target: info.target.clone(),
            precision: info.precision.clone(),
            limits: info.limits.clone(),
            kv_bytes_per_token: info.kv_bytes_per_token,
            compiler: means.map(|means| means.describe()),
            only_prepared: info.plan.is_none(),
            reports,
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

/// Adds compiled plans to a package; their files are named in what is returned.
fn add_engines(
    writer: &mut PackageWriter,
    recipe: &Recipe,
    plan: GpuPlan,
    engines: Option<Engines>,
) -> Result<(Option<String>, TensorRtInfo)> {
    let Some(engines) = engines else { return Ok((None, plan.info(None))) };
    let target = recipe.target.name();
    let file = format!("plans/{target}.engine");
    writer.add(&file, |write| write(engines.plan.bytes()))?;
    let first_chunk = match engines.first_chunk {
        Some(engine) => {
            let file = format!("plans/{target}-first-chunk.engine");
            writer.add(&file, |write| write(engine.bytes()))?;
            Some(file)
        }
        None => None,
    };
    Ok((Some(file), plan.info(first_chunk)))
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

/// Ends the writing of a file when the build is cancelled.
fn cancellable<'a>(
    write: &'a mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &'a Arc<dyn Progress>,
) -> impl FnMut(&[u8]) -> Result<()> + 'a {
    move |bytes| if progress.is_cancelled() { Err(Error::Cancelled) } else { write(bytes) }
}

/// Refuses what the output's disk has no room for.
fn check_space(writer: &PackageWriter, output: &Path, what: &str, bytes: u64) -> Result<()> {
    match writer.free_bytes() {
        Some(free) if free < bytes => {
            let detail =
                format!("{what} takes {bytes} bytes, but its disk has {free} free; free some or choose another output");
            Err(Error::package(output, detail))
        }
        _ => Ok(()),
    }
}

/// The checkpoint's tokenizer, with its file's content, if it has one: its tokenizer.json, else its SentencePiece
/// model.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] or [`Error::Unsupported`] naming the file, also where it does not fit the model.
pub fn checkpoint_tokenizer(checkpoint: &Checkpoint) -> Result<Option<(Vec<u8>, Tokenizer)>> {
    let json = checkpoint.tokenizer_json();
    let is_json = json.is_some();
    let Some(path) = json.or_else(|| checkpoint.sentencepiece_model()) else { return Ok(None) };
    let bytes = std::fs::metadata(&path).map_err(Error::io("look at", &path))?.len();
    if bytes > MAX_TOKENIZER_BYTES {
        return Err(Error::format(&path, format!("{bytes} bytes; a tokenizer has at most {MAX_TOKENIZER_BYTES}")));
    }
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let read = if is_json { Tokenizer::from_json } else { Tokenizer::from_sentencepiece };
    let tokenizer = read(&path, &bytes)?;
    let rows = checkpoint.config().vocab_size;
    if tokenizer.vocab_size() > rows {
        let ids = tokenizer.vocab_size();
        return Err(Error::format(&path, format!("it has {ids} ids, but the model's vocab_size is {rows}")));
    }
    Ok(Some((bytes, tokenizer)))
}

fn warn_without_tokenizer(checkpoint: &Checkpoint, progress: &dyn Progress) {
    progress.warn(&format!(
        "{} has neither tokenizer.json nor tokenizer.model: the package will take and give token ids only",
        checkpoint.path().display()
    ));
}

/// What ends a generation: the checkpoint's end-of-sequence ids, and the marker of the next turn.
fn generation_settings(
    checkpoint: &Checkpoint,
    tokenizer: Option<&Tokenizer>,
    progress: &dyn Progress,
) -> Result<GenerationSettings> {
    let mut stop_token_ids = checkpoint.config().eos_token_ids.clone();
    let config = checkpoint.generation_config()?;
    stop_token_ids.extend(config.eos_token_ids);
    let mut stop_strings = Vec::new();
    if let Some(tokenizer) = tokenizer {
        stop_strings.push(TURN_MARKER.to_string());
        match tokenizer.id(TURN_MARKER) {
            Some(id) => stop_token_ids.push(id),
            None => progress.warn(&format!(
                "the tokenizer has no piece {TURN_MARKER}: this may not be a chat model of this family"
            )),
        }
    }
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    if stop_token_ids.is_empty() {
        progress.warn("the checkpoint names no end-of-sequence id: generations end at their token limit");
    }
    Ok(GenerationSettings { stop_token_ids, stop_strings, max_tokens: DEFAULT_MAX_TOKENS })
}

/// SHA-256 over the config and, tensor by tensor, name, dtype, shape and the SHA-256 of the bytes.
fn checkpoint_digest(checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<String> {
    let views: Vec<_> = checkpoint.tensors().collect();
    let digests: Vec<_> = views
        .par_iter()
        .map(|view| {
            let mut digest = Sha256::new();
            for start in (0..view.elements()).step_by(1 << 21) {
                let piece = view.raw(start..view.elements().min(start + (1 << 21)));
                if progress.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                digest.update(&piece);
                progress.advance(piece.len() as u64);
            }
            Ok(digest.finalize())
        })
        .collect::<Result<_>>()?;
    let mut all = Sha256::new();
    all.update(format!("{:?}", checkpoint.config()));
    for (view, digest) in views.iter().zip(digests) {
        all.update(format!("\n{} {} {:?} ", view.name, view.dtype, view.shape));
        all.update(digest);
    }
    let hex: String = all.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}

/// Where a package goes if the user does not say: `engines/<checkpoint's name>`.
pub fn default_output(checkpoint: &Path) -> PathBuf {
    let absolute = checkpoint.canonicalize().unwrap_or_else(|_| checkpoint.to_path_buf());
    Path::new("engines").join(absolute.file_name().unwrap_or("engine".as_ref()))
}
