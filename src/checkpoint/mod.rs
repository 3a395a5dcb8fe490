//! Readers of checkpoints: a folder or an archive becomes a config and named, validated, memory-mapped tensors.
//!
//! Opening a checkpoint reads its config and the headers of its weight files and checks that every tensor of the model
//! is there with its shape, and no other. The weights stay on disk until they are touched. Whether they are finite is
//! not checked here: that would read all of them.
//!
//! A Hugging Face folder or a `.nemo` gives the same: weights under Hugging Face's names, wherever their elements lie.

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
pub use schema::{EMBEDDING, TensorRole};
pub use weight::TensorView;
use weight::Weight;

/// An opened checkpoint. Its files must not be changed while it is; see [`MappedFile`].
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
    /// For a `.nemo`.
    nemo_prompt_tokens: Option<NemoPromptTokens>,
}

/// Where a checkpoint's tokenizer is.
#[derive(Debug)]
struct TokenizerSource {
    /// The file, or how messages call it.
    path: PathBuf,
    /// Index in [`Checkpoint::files`] and place, for a member of an archive; else `path` is read.
    place: Option<(usize, Range<usize>)>,
    is_json: bool,
}

/// A checkpoint's tokenizer.
#[derive(Debug)]
pub struct TokenizerFile {
    /// Its name in messages.
    pub path: PathBuf,
    /// Its content.
    pub bytes: Vec<u8>,
    /// A tokenizer.json; else a SentencePiece model.
    pub is_json: bool,
}

/// Options for opening a checkpoint.
#[derive(Clone)]
pub struct OpenOptions<'a> {
    /// Where a compressed archive is unpacked to, a file without a name that goes when the checkpoint is dropped. The
    /// system's temporary folder (`TMPDIR`) by default.
    pub scratch: PathBuf,
    /// Follows the unpacking: bytes read since the last call, and of how many. It may end it.
    pub unpacking: &'a dyn Fn(u64, u64) -> ControlFlow<()>,
}

impl Default for OpenOptions<'_> {
    fn default() -> Self {
        OpenOptions { scratch: std::env::temp_dir(), unpacking: &|_, _| ControlFlow::Continue(()) }
    }
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a Hugging Face folder of a `NemotronForCausalLM`, a `.nemo`, or the folder that one
    /// unpacks to.
    ///
    /// Reads the config and the headers of the weight files, and checks name, shape and dtype (F32, F16 or BF16, tensor
    /// by tensor) of everything in them; weights are mapped, not read. The exceptions are a tied head that is stored all
    /// the same, which is compared with the embedding and refused if it differs, and a compressed archive, which is
    /// unpacked.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Format`] for one that is damaged or does not fit the
    /// others, [`Error::Unsupported`] for a model that is not computed here.
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
        }
    }

    /// The path it was opened by.
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

    /// All tensors: embedding, layer after layer, final norm, and the head unless it is tied to the embedding.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.weights.iter().map(|weight| self.view(weight))
    }

    /// The tensor with Hugging Face's `name`, such as `model.layers.0.self_attn.q_proj.weight`.
    ///
    /// # Errors
    /// [`Error::Format`] if the model has no such tensor; a tied head has none of its own.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        match self.by_name.get(name) {
            Some(index) => Ok(self.view(&self.weights[*index])),
            None if name == schema::HEAD && self.config.tie_word_embeddings => {
                Err(Error::format(&self.path, format!("`{name}` is tied: use `{}`", schema::EMBEDDING)))
            }
            None => Err(Error::format(&self.path, format!("no tensor `{}`", clip(name)))),
        }
    }

    /// Bytes of all tensors as they are stored.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors().map(|tensor| tensor.bytes()).sum()
    }

    /// Further facts about the files, for the user: names and values.
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
        let too_long =
            |bytes: u64| Err(Error::format(path, format!("{bytes} bytes; a tokenizer has at most {limit_bytes}")));
        let bytes = match place {
            Some((_, range)) if range.len() as u64 > limit_bytes => return too_long(range.len() as u64),
            Some((file, range)) => {
                let bytes = self.files.get(*file).and_then(|file| file.bytes().get(range.clone()));
                let outside = || format!("the tokenizer {} is at {range:?} of file {file}", path.display());
                bytes.ok_or_else(|| Error::internal(outside(), "a place inside a mapped file"))?.to_vec()
            }
            None => {
                let bytes = std::fs::metadata(path).map_err(Error::io("look at", path))?.len();
                if bytes > limit_bytes {
                    return too_long(bytes);
                }
                std::fs::read(path).map_err(Error::io("read", path))?
            }
        };
        Ok(Some(TokenizerFile { path: path.clone(), bytes, is_json: *is_json }))
    }

    /// Contents of `generation_config.json`; empty without one.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] if the file is there but cannot be read, or a value in it is out of range.
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
    /// [`Error::Io`] or [`Error::Format`] naming the file that is there but cannot be read.
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

/// The architecture of the checkpoint at `path`. Of a folder with a config.json that is all that is read, and weights need
/// not be there; a `.nemo` does not say the size of its vocabulary but by its weights.
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
