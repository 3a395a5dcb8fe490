//! Readers of checkpoints: a folder becomes a config and named, validated, memory-mapped tensors.
//!
//! Opening a checkpoint reads its config and the headers of its weight files and checks that every tensor of the model
//! is there with its shape, and no other. The weights stay on disk until they are touched. Whether they are finite is
//! not checked here: that would read all of them.
//!
//! [`tar`] and [`torch`] read parts of a `.nemo`: the archive, and the files of weights in it. [`Checkpoint::open`] does
//! not use them.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, clip};
use crate::mmap::MappedFile;
use crate::tensor::{DType, TensorView};

pub mod card;
mod config;
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
mod yaml;

pub use config::ModelConfig;
pub use generation::GenerationConfig;

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
}

/// Where a validated tensor lies.
#[derive(Debug)]
struct Weight {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    /// Index in [`Checkpoint::files`].
    file: usize,
    /// In the file; `product(shape) * dtype.bytes()` bytes that lie inside it.
    bytes: Range<usize>,
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a Hugging Face folder of a `NemotronForCausalLM`.
    ///
    /// Reads the config and the headers of the weight files, and checks name, shape and dtype (F32, F16 or BF16, tensor
    /// by tensor) of everything in them; weights are mapped, not read. The exception is a tied head that is stored all
    /// the same: it is compared with the embedding, and refused if it differs.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Format`] for one that is damaged or does not fit the
    /// others, [`Error::Unsupported`] for a model that is not computed here.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        hugging_face::open(path)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind of checkpoint: `"hugging-face"`.
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
        self.weights.iter().map(|weight| weight.bytes.len() as u64).sum()
    }

    /// The folder's `tokenizer.json`, if there is one.
    pub fn tokenizer_json(&self) -> Option<PathBuf> {
        self.existing("tokenizer.json")
    }

    /// The folder's SentencePiece model, `tokenizer.model`, if there is one.
    pub fn sentencepiece_model(&self) -> Option<PathBuf> {
        self.existing("tokenizer.model")
    }

    /// What `generation_config.json` says; without one, nothing.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] if the file is there but cannot be read, or a value in it is out of range.
    pub fn generation_config(&self) -> Result<GenerationConfig> {
        match self.existing("generation_config.json") {
            Some(path) => {
                let object = json::read_object(&path, hugging_face::MAX_CONFIG_BYTES)?;
                generation::read(&path, object, self.config.vocab_size)
            }
            None => Ok(GenerationConfig::default()),
        }
    }

    fn existing(&self, name: &str) -> Option<PathBuf> {
        Some(self.path.join(name)).filter(|path| hugging_face::is_there(path))
    }

    fn view<'a>(&'a self, weight: &'a Weight) -> TensorView<'a> {
        let data = &self.files[weight.file].bytes()[weight.bytes.clone()];
        TensorView { name: &weight.name, dtype: weight.dtype, shape: &weight.shape, data }
    }
}

/// The architecture of the checkpoint at `path`, whose weights need not be there: its config.json is all that is read.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn read_config(path: &Path) -> Result<ModelConfig> {
    hugging_face::config(path)
}

/// Whether `path` looks like a checkpoint, by the names of its files alone.
pub fn is_checkpoint(path: &Path) -> bool {
    hugging_face::looks_like_one(path)
}

#[cfg(test)]
mod tests;
