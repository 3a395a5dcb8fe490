//! Ahead of time: a checkpoint becomes an engine package.

mod calibration;
pub mod passes;
mod quantize;
mod recipe;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use calibration::Calibration;
pub use passes::{Precision, Report};
pub use recipe::{Recipe, Target, TensorRtOptions};

use crate::backend::Limits;
use crate::backend::cpu;
use crate::checkpoint::Checkpoint;
use crate::engine::{CheckpointInfo, GenerationSettings, Manifest, PackageWriter, PlanInfo, TokenizerInfo};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::model;
use crate::text::Tokenizer;
use crate::text::template::TURN_MARKER;

/// New tokens of a generation whose request does not say: the model card's example.
const DEFAULT_MAX_TOKENS: usize = 200;
/// A tokenizer file is refused unread past this size; the 8B model's has about 20 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// The package's file for its tokenizer.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// Follows a build.
pub trait Progress: Sync {
    /// A stage begins; `bytes` is how much it will go through.
    fn stage(&self, name: &str, bytes: u64);
    /// That many bytes of the stage are done.
    fn advance(&self, bytes: u64);
    /// Something the user should know.
    fn warn(&self, message: &str);
}

/// What to build, from what, to where.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// What to build.
    pub recipe: Recipe,
    /// The package's folder.
    pub output: PathBuf,
    /// Replace a package that is there.
    pub replace: bool,
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
    /// The plan's limits.
    pub limits: Limits,
    /// Bytes of KV cache per token of one sequence.
    pub kv_bytes_per_token: usize,
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

/// Builds an engine package: reads the checkpoint, optimizes and lowers the graph, packs the weights, and makes the
/// package appear at its place whole.
///
/// # Errors
/// Whatever is wrong with the checkpoint, recipe or output; nothing is left behind then.
pub fn build(request: &BuildRequest, progress: &dyn Progress) -> Result<BuildSummary> {
    let recipe = &request.recipe;
    if recipe.target != Target::Cpu {
        let name = recipe.target.name();
        return Err(Error::Recipe { name: name.into(), detail: "this version builds plans for CPUs only".into() });
    }
    let checkpoint = Checkpoint::open(&request.checkpoint)?;
    let config = checkpoint.config();
    let limits = recipe.limits(config)?;
    let tokenizer = checkpoint_tokenizer(&checkpoint)?;
    if tokenizer.is_none() {
        warn_without_tokenizer(&checkpoint, progress);
    }
    let generation = generation_settings(&checkpoint, tokenizer.as_ref().map(|(_, t)| t), progress)?;

    if let (Some(path), false) = (&request.calibration, recipe.precision.needs_calibration()) {
        let (name, path) = (recipe.target.name().into(), path.display());
        let detail = format!("precision {} needs no calibration, but {path} was given for one", recipe.precision);
        return Err(Error::Recipe { name, detail });
    }

    let mut writer = PackageWriter::create(&request.output, request.replace)?;
    let calibration = match recipe.precision.needs_calibration() {
        true => {
            let tokenizer = tokenizer.as_ref().map(|(_, t)| t);
            let prompts = calibration::prompts(request.calibration.as_ref(), tokenizer, &limits, progress)?;
            let scratch = writer.scratch("calibration.safetensors");
            let narrow = checkpoint.tensors().map(|t| 2 * t.elements() as u64).sum();
            check_space(&writer, &request.output, "the calibration", narrow)?;
            Some(calibration::calibrate(&checkpoint, &limits, &prompts, &scratch, progress)?)
        }
        false => None,
    };
    let (graph, reports) = optimized_graph(config, recipe.precision, limits.max_sequence_tokens, calibration.as_ref())?;
    let lowered = cpu::lower::lower(&graph, &limits)?;
    let weight_bytes = cpu::pack::packed_bytes(&lowered.program.weights);
    check_space(&writer, &request.output, "the package", weight_bytes)?;

    progress.stage("reading", checkpoint.weight_bytes());
    let digest = checkpoint_digest(&checkpoint, progress);

    progress.stage("packing", weight_bytes);
    let target = recipe.target.name();
    let plan = format!("plans/{target}.json");
    let weights = format!("weights/{target}-{}.safetensors", recipe.precision);
    writer.add(&weights, |write| cpu::pack::pack(&lowered, &checkpoint, write, &|bytes| progress.advance(bytes)))?;
    let program = serde_json::to_vec(&lowered.program)
        .map_err(|e| Error::package(&request.output, format!("the plan cannot be written as JSON: {e}")))?;
    writer.add(&plan, |write| write(&program))?;

    let checkpoint_info = CheckpointInfo { format: checkpoint.format().into(), digest };
    let mut manifest = Manifest::new(config.clone(), checkpoint_info, generation);
    if let Some((bytes, tokenizer)) = &tokenizer {
        writer.add(TOKENIZER_FILE, |write| write(bytes))?;
        manifest.tokenizer = Some(TokenizerInfo { file: TOKENIZER_FILE.into(), vocab_size: tokenizer.vocab_size() });
    }
    let cache = &lowered.program.cache;
    let kv_bytes_per_token = 2 * cache.layers * cache.kv_heads * cache.padded_dim() * cache.dtype.bytes();
    manifest.plans.push(PlanInfo {
        target: target.into(),
        precision: recipe.precision.to_string(),
        plan: Some(plan),
        weights,
        limits: limits.clone(),
        kv_bytes_per_token,
        recipe: recipe.text.clone(),
        tensorrt: None,
    });
    writer.finish(&mut manifest)?;
    let bytes = manifest.files.iter().map(|f| f.bytes).sum();
    Ok(BuildSummary { package: request.output.clone(), bytes, limits, kv_bytes_per_token, reports })
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

/// The checkpoint's tokenizer, with its file's content, if it has one that can be read.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] or [`Error::Unsupported`] naming the file, also where it does not fit the model.
pub fn checkpoint_tokenizer(checkpoint: &Checkpoint) -> Result<Option<(Vec<u8>, Tokenizer)>> {
    let Some(path) = checkpoint.tokenizer_json() else { return Ok(None) };
    let bytes = std::fs::metadata(&path).map_err(Error::io("look at", &path))?.len();
    if bytes > MAX_TOKENIZER_BYTES {
        return Err(Error::format(&path, format!("{bytes} bytes; a tokenizer has at most {MAX_TOKENIZER_BYTES}")));
    }
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let tokenizer = Tokenizer::from_bytes(&path, &bytes)?;
    let rows = checkpoint.config().vocab_size;
    if tokenizer.vocab_size() > rows {
        let ids = tokenizer.vocab_size();
        return Err(Error::format(&path, format!("it has {ids} ids, but the model's vocab_size is {rows}")));
    }
    Ok(Some((bytes, tokenizer)))
}

fn warn_without_tokenizer(checkpoint: &Checkpoint, progress: &dyn Progress) {
    let hint = match checkpoint.sentencepiece_model() {
        Some(_) => " (its tokenizer.model is not read yet: convert it to a tokenizer.json)",
        None => "",
    };
    progress.warn(&format!(
        "{} has no tokenizer.json{hint}: the package will take and give token ids only",
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
fn checkpoint_digest(checkpoint: &Checkpoint, progress: &dyn Progress) -> String {
    let views: Vec<_> = checkpoint.tensors().collect();
    let digests: Vec<_> = views
        .par_iter()
        .map(|view| {
            let mut digest = Sha256::new();
            for piece in view.data.chunks(1 << 22) {
                digest.update(piece);
                progress.advance(piece.len() as u64);
            }
            digest.finalize()
        })
        .collect();
    let mut all = Sha256::new();
    all.update(format!("{:?}", checkpoint.config()));
    for (view, digest) in views.iter().zip(digests) {
        all.update(format!("\n{} {} {:?} ", view.name, view.dtype, view.shape));
        all.update(digest);
    }
    let hex: String = all.finalize().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// Where a package goes if the user does not say: `engines/<checkpoint's name>`.
pub fn default_output(checkpoint: &Path) -> PathBuf {
    let absolute = checkpoint.canonicalize().unwrap_or_else(|_| checkpoint.to_path_buf());
    Path::new("engines").join(absolute.file_name().unwrap_or("engine".as_ref()))
}
