//! Checkpoint readers: a folder or an archive becomes a config and named, validated, memory-mapped tensors.
//!
//! Opening a checkpoint reads its config and the headers of its weight files, and checks that it has exactly the
//! model's tensors, in the right shapes. Weights stay on disk until they are touched. They are not checked for NaN or
//! infinity, which would read all of them.
//!
//! Hugging Face folders and `.nemo` files look the same from outside: weights under their Hugging Face names, however
//! they are stored.

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, clip};
use crate::mmap::MappedFile;

pub mod card;
mod chat_files;
mod config;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod generation;
mod hf_config;
mod hugging_face;
mod json;
mod keys;
mod nemo;
mod rounded;
mod schema;
mod sharded;
pub mod tar;
#[cfg(test)]
pub(crate) mod testing;
pub mod torch;
mod weight;
mod yaml;

pub use chat_files::{AddedToken, ChatFiles, NemoPromptTokens, TemplateFile};
pub(crate) use chat_files::{MAX_TEMPLATE_BYTES, read_template};
pub use config::ModelConfig;
pub use generation::GenerationConfig;
pub use rounded::{RoundedWeights, codes_name, scales_name};
pub use schema::{EMBEDDING, TensorRole};
pub use weight::TensorView;
use weight::Weight;

/// An open checkpoint. Its files must not be modified while it is open; see [`MappedFile`].
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    format: &'static str,
    config: ModelConfig,
    files: Vec<MappedFile>,
    /// In schema order.
    weights: Vec<Weight>,
    /// Name to index in `weights`.
    by_name: HashMap<String, usize>,
    tokenizer: Option<TokenizerSource>,
    details: Vec<(&'static str, String)>,
    /// Chat markers, for a `.nemo`.
    nemo_prompt_tokens: Option<NemoPromptTokens>,
    /// Matrices whose codes are not the nearest ones.
    rounded: Option<RoundedWeights>,
}

/// Location of a checkpoint's tokenizer.
#[derive(Debug)]
struct TokenizerSource {
    /// The file, or its name in messages.
    path: PathBuf,
    /// For an archive member, its index in [`Checkpoint::files`] and byte range; otherwise `path` is read.
    place: Option<(usize, Range<usize>)>,
    is_json: bool,
}

/// A checkpoint's tokenizer.
#[derive(Debug)]
pub struct TokenizerFile {
    /// Name in messages.
    pub path: PathBuf,
    /// Contents.
    pub bytes: Vec<u8>,
    /// True for a tokenizer.json, false for a SentencePiece model.
    pub is_json: bool,
}

/// Options for opening a checkpoint.
#[derive(Clone)]
pub struct OpenOptions<'a> {
    /// Folder in which a compressed archive is unpacked, to an unlinked file that is freed when the checkpoint is
    /// dropped. By default the system's temporary folder (`TMPDIR`).
    pub scratch: PathBuf,
    /// Called while unpacking, with the compressed bytes read since the last call and their total; may cancel it.
    pub unpacking: &'a dyn Fn(u64, u64) -> ControlFlow<()>,
}

impl Default for OpenOptions<'_> {
    fn default() -> Self {
        OpenOptions { scratch: std::env::temp_dir(), unpacking: &|_, _| ControlFlow::Continue(()) }
    }
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a Hugging Face folder of a `NemotronForCausalLM`, a `.nemo`, or an unpacked
    /// `.nemo`.
    ///
    /// Reads the config and the headers of the weight files, and checks the name, shape and dtype (F32, F16 or BF16,
    /// per tensor) of every tensor. Weights are mapped, not read, with two exceptions: a tied head that is stored
    /// anyway is compared with the embedding and must be equal, and a compressed archive is unpacked.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::Format`] if one is damaged or inconsistent with the others,
    /// [`Error::Unsupported`] for another architecture or an unsupported feature.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        Checkpoint::open_with(path, &OpenOptions::default())
    }

    /// As [`Checkpoint::open`].
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and [`Error::Cancelled`].
    pub fn open_with(path: &Path, options: &OpenOptions<'_>) -> Result<Checkpoint> {
        if nemo::looks_like_one(path) { nemo::open(path, options) } else { hugging_face::open(path) }
    }

    fn new(
        path: &Path,
        format: &'static str,
        config: ModelConfig,
        files: Vec<MappedFile>,
        weights: Vec<Weight>,
        tokenizer: Option<TokenizerSource>,
        details: Vec<(&'static str, String)>,
    ) -> Checkpoint {
        let by_name = weights.iter().enumerate().map(|(index, weight)| (weight.name.clone(), index)).collect();
        Checkpoint {
            path: path.to_path_buf(),
            format,
            config,
            files,
            weights,
            by_name,
            tokenizer,
            details,
            nemo_prompt_tokens: None,
            rounded: None,
        }
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind of checkpoint: `"hugging-face"` or `"nemo"`.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// The architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// All tensors in the order of use: embedding, layers, final norm, and the head unless it is tied to the embedding.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.weights.iter().map(|weight| self.view(weight))
    }

    /// The tensor with the Hugging Face name `name`, such as `model.layers.0.self_attn.q_proj.weight`.
    ///
    /// # Errors
    /// [`Error::Format`] if the model has no such tensor; a tied head has no tensor of its own.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        match self.by_name.get(name) {
            Some(index) => Ok(self.view(&self.weights[*index])),
            None if name == schema::HEAD && self.config.tie_word_embeddings => Err(Error::format(
                &self.path,
                format!("`{name}` is tied to the embedding: use `{}`", schema::EMBEDDING),
            )),
            None => Err(Error::format(&self.path, format!("no tensor `{}`", clip(name)))),
        }
    }

    /// Total size of the tensors as stored, in bytes.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors().map(|tensor| tensor.bytes()).sum()
    }

    /// Further facts about the files to show to the user: (name, value).
    pub fn details(&self) -> &[(&'static str, String)] {
        &self.details
    }

    /// The tokenizer, if there is one: a folder's `tokenizer.json`, else its `tokenizer.model`; the SentencePiece model of
    /// a `.nemo`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Format`] if it has more than `limit_bytes` bytes.
    pub fn tokenizer_file(&self, limit_bytes: u64) -> Result<Option<TokenizerFile>> {
        let Some(TokenizerSource { path, place, is_json }) = &self.tokenizer else { return Ok(None) };
        let too_long = |bytes: u64| {
            Err(Error::format(path, format!("the tokenizer has {bytes} bytes, more than the limit of {limit_bytes}")))
        };
        let bytes = match place {
            Some((_, range)) if range.len() as u64 > limit_bytes => return too_long(range.len() as u64),
            Some((file, range)) => {
                let bytes = self.files.get(*file).and_then(|file| file.bytes().get(range.clone()));
                let outside = || format!("the tokenizer {} is at bytes {range:?} of file {file}", path.display());
                bytes.ok_or_else(|| Error::internal(outside(), "a range inside a mapped file"))?.to_vec()
            }
            None => {
                let bytes = std::fs::metadata(path).map_err(Error::io("access", path))?.len();
                if bytes > limit_bytes {
                    return too_long(bytes);
                }
                std::fs::read(path).map_err(Error::io("read", path))?
            }
        };
        Ok(Some(TokenizerFile { path: path.clone(), bytes, is_json: *is_json }))
    }

    /// Contents of `generation_config.json`; empty if there is none.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] if the file exists but cannot be read, or a value in it is out of range.
    pub fn generation_config(&self) -> Result<GenerationConfig> {
        match hugging_face::existing(&self.path, "generation_config.json") {
            Some(path) if self.format == hugging_face::FORMAT => {
                let object = json::read_object(&path, schema::MAX_CONFIG_BYTES)?;
                generation::read(&path, object, self.config.vocab_size)
            }
            _ => Ok(GenerationConfig::default()),
        }
    }

    /// The chat templates, special tokens and added tokens beside the tokenizer.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file that cannot be read.
    pub fn chat_files(&self) -> Result<ChatFiles> {
        if self.format == hugging_face::FORMAT {
            return chat_files::read(&self.path);
        }
        Ok(ChatFiles { nemo_prompt_tokens: self.nemo_prompt_tokens.clone(), ..ChatFiles::default() })
    }

    fn view<'a>(&'a self, weight: &'a Weight) -> TensorView<'a> {
        let Weight { name, dtype, shape, .. } = weight;
        TensorView { name, dtype: *dtype, shape, weight, files: &self.files }
    }
}

/// Reads the architecture of the checkpoint at `path`. For a Hugging Face folder only config.json is read, and weights
/// may be missing. A `.nemo` is opened in full, because only its embedding gives the size of the vocabulary.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn read_config(path: &Path) -> Result<ModelConfig> {
    match nemo::looks_like_one(path) {
        true => nemo::open(path, &OpenOptions::default()).map(|checkpoint| checkpoint.config),
        false => hugging_face::config(path),
    }
}

/// Returns true if `path` looks like a checkpoint, judging only by the names of its files.
pub fn is_checkpoint(path: &Path) -> bool {
    hugging_face::looks_like_one(path) || nemo::looks_like_one(path)
}

#[cfg(test)]
mod tests;
