//! `engine.json`: description and contents of a package.

use std::collections::HashSet;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Limits;
use super::tensorrt::TensorRtInfo;
use crate::checkpoint::ModelConfig;
use crate::error::{Error, Result, clip};
use crate::text::ChatFormat;

/// The manifest's file name.
pub const MANIFEST_NAME: &str = "engine.json";
/// Version of the package layout and manifest. Packages of other versions are refused with both versions named.
pub const FORMAT_VERSION: u32 = 3;
/// Larger manifests are refused unread.
pub(super) const MAX_MANIFEST_BYTES: u64 = 4 << 20;
const FORMAT: &str = "aotron-engine";

/// The manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// `"aotron-engine"`.
    pub format: String,
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Name and version of the tool that built the package.
    pub tool: String,
    /// The model's dimensions.
    pub model: ModelConfig,
    /// Source of the weights.
    pub checkpoint: CheckpointInfo,
    /// The tokenizer; a package without one works on token ids only.
    pub tokenizer: Option<TokenizerInfo>,
    /// Formatting of conversations into prompts, and the stops that end an answer.
    pub chat_format: ChatFormat,
    /// Generation defaults, for settings that a request omits.
    pub generation: GenerationSettings,
    /// Plans, one per target and precision.
    pub plans: Vec<PlanInfo>,
    /// File of what the CPU executor answered when the package was built, see [`crate::verify`]; `None` if it was built
    /// without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// All other files of the package.
    pub files: Vec<FileInfo>,
    /// SHA-256 of this manifest with this field empty.
    pub sha256: String,
}

/// Checkpoint that a package was built from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointInfo {
    /// Kind of checkpoint: `"hugging-face"`.
    pub format: String,
    /// `sha256:` of the config and every tensor's name, dtype, shape and bytes.
    pub digest: String,
}

/// The package's tokenizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerInfo {
    /// Its file.
    pub file: String,
    /// File that it was made from: `"tokenizer.json"` or `"tokenizer.model"`.
    pub source: String,
    /// Largest id plus one. The model's ids from there on are padding and are never sampled.
    pub vocab_size: usize,
}

/// Generation defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationSettings {
    /// Maximum number of new tokens.
    pub max_tokens: usize,
    /// Sample with the settings below; otherwise decode greedily.
    pub do_sample: bool,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Sample from this many of the likeliest tokens; 0 is off.
    pub top_k: Option<u32>,
    /// Sample from the likeliest tokens that together reach this probability.
    pub top_p: Option<f32>,
    /// Sample from tokens at least this fraction as likely as the likeliest one.
    pub min_p: Option<f32>,
    /// Penalizes tokens that already occurred.
    pub repetition_penalty: Option<f32>,
    /// Names of the checkpoint's settings that are ignored.
    pub unused: Vec<String>,
}

impl Default for GenerationSettings {
    /// The model card's example: 200 tokens, greedy.
    fn default() -> GenerationSettings {
        GenerationSettings {
            max_tokens: 200,
            do_sample: false,
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: None,
            unused: Vec::new(),
        }
    }
}

/// A plan and its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanInfo {
    /// Target that it runs on: `"cpu"`, `"a100"`, `"h100"`.
    pub target: String,
    /// Precision that it computes in: `"f32"`, `"bf16"`, `"int8"`, `"int4"`, `"fp8"`, `"w8a8"`.
    pub precision: String,
    /// The plan's file; `None` if it was only prepared (see [`TensorRtInfo::compiled`]).
    pub plan: Option<String>,
    /// Its weights file.
    pub weights: String,
    /// Limits that it was built for.
    pub limits: Limits,
    /// Bytes of KV cache per token of one sequence.
    pub kv_bytes_per_token: usize,
    /// Source text of its recipe.
    pub recipe: String,
    /// For a TensorRT plan: its compiler and bindings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensorrt: Option<TensorRtInfo>,
}

impl PlanInfo {
    /// Sequences of the full length that its KV memory holds at most, which shorter ones share.
    pub fn longest_sequences(&self) -> usize {
        self.tensorrt.as_ref().map_or(self.limits.slots, |tensorrt| tensorrt.sizes.decode_sequences)
    }

    /// All files that it needs.
    pub fn files(&self) -> impl Iterator<Item = &String> {
        let compiled = self.tensorrt.as_ref().and_then(|t| t.compiled.as_ref());
        let context_plan = compiled.and_then(|c| c.context_plan.as_ref());
        let smaller = self.tensorrt.iter().flat_map(|tensorrt| &tensorrt.smaller_classes);
        let smaller = smaller.flat_map(|class| class.plan.iter().chain(&class.context_plan));
        self.plan.iter().chain(context_plan).chain(smaller).chain([&self.weights])
    }
}

/// A file of the package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileInfo {
    /// Path inside the package, with `/`.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Digest, hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// A manifest of this format and tool; [`super::PackageWriter`] fills in `files` and `sha256`.
    pub fn new(
        model: ModelConfig,
        checkpoint: CheckpointInfo,
        chat_format: ChatFormat,
        generation: GenerationSettings,
    ) -> Manifest {
        Manifest {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            tool: concat!("aotron ", env!("CARGO_PKG_VERSION")).into(),
            model,
            checkpoint,
            tokenizer: None,
            chat_format,
            generation,
            plans: Vec::new(),
            reference: None,
            files: Vec::new(),
            sha256: String::new(),
        }
    }

    /// The manifest's text, with its digest filled in.
    pub(super) fn seal(&mut self) -> Result<String> {
        self.sha256.clear();
        self.sha256 = hex(&Sha256::digest(self.json()?));
        self.json()
    }

    fn json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::package(MANIFEST_NAME, format!("cannot be written as JSON: {e}")))?;
        text.push('\n');
        Ok(text)
    }

    /// Parses and checks a manifest; errors name `folder`.
    pub(super) fn parse(folder: &Path, text: &[u8]) -> Result<Manifest> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            format_version: u64,
        }
        let refuse = |detail: String| Error::package(folder, format!("{MANIFEST_NAME}: {detail}"));
        let head: Head = serde_json::from_slice(text).map_err(|e| refuse(format!("not a manifest: {}", clip(e))))?;
        if head.format != FORMAT {
            return Err(refuse(format!("the format is \"{}\", expected \"{FORMAT}\"", clip(head.format))));
        }
        if head.format_version != u64::from(FORMAT_VERSION) {
            let way_out = if head.format_version > u64::from(FORMAT_VERSION) {
                "use a newer aotron, or build the package again with this one"
            } else {
                "build the package again"
            };
            let found = head.format_version;
            return Err(refuse(format!(
                "format version {found}, this aotron reads version {FORMAT_VERSION}; {way_out}"
            )));
        }
        let mut manifest: Manifest = serde_json::from_slice(text).map_err(|e| refuse(clip(e)))?;
        let stated = std::mem::take(&mut manifest.sha256);
        if hex(&Sha256::digest(manifest.json()?)) != stated {
            return Err(refuse(
                "its content does not match its own digest: it was changed or damaged; build the package again".into(),
            ));
        }
        manifest.sha256 = stated;
        manifest.model.validate().map_err(|detail| refuse(format!("model: {detail}")))?;
        let rows = manifest.model.vocab_size;
        if let Some(tokenizer) = manifest.tokenizer.as_ref().filter(|tokenizer| tokenizer.vocab_size > rows) {
            let ids = tokenizer.vocab_size;
            return Err(refuse(format!("the tokenizer has {ids} ids, but the model's vocab_size is {rows}")));
        }
        let mut targets = HashSet::new();
        if let Some(plan) = manifest.plans.iter().find(|plan| !targets.insert(&plan.target)) {
            return Err(refuse(format!("there are two plans for the target {}", clip(&plan.target))));
        }
        let vocab_size = manifest.tokenizer.as_ref().map_or(manifest.model.vocab_size, |t| t.vocab_size);
        manifest.chat_format.validate(vocab_size).map_err(|detail| refuse(format!("chat_format: {detail}")))?;
        let mut listed = HashSet::new();
        for FileInfo { path, .. } in &manifest.files {
            let plain = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
            if !plain || path.is_empty() {
                return Err(refuse(format!("\"{}\" is not a path inside the package", clip(path))));
            }
            if !listed.insert(path) {
                return Err(refuse(format!("\"{}\" is listed in files twice", clip(path))));
            }
        }
        let referenced = manifest.plans.iter().flat_map(PlanInfo::files);
        for path in referenced.chain(manifest.tokenizer.as_ref().map(|t| &t.file)).chain(&manifest.reference) {
            if !listed.contains(path) {
                return Err(refuse(format!("\"{}\" is used but not listed in files", clip(path))));
            }
        }
        Ok(manifest)
    }

    /// The entry of a file.
    pub fn file(&self, path: &str) -> Option<&FileInfo> {
        self.files.iter().find(|f| f.path == path)
    }
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}
