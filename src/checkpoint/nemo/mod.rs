//! Reads a `.nemo`, the checkpoint of NeMo's training framework, as an archive or as the folder it unpacks to.
//!
//! Opening one locates every weight, whatever the layout: torch files (one, or one per tensor- and pipeline-parallel
//! rank) or a distributed checkpoint (zarr, torch_dist). Nothing is copied or unpacked, unless the archive is
//! compressed.

use std::path::Path;

use serde_json::Value;

use super::json::parse_object;
use super::schema::MAX_CONFIG_BYTES;
use super::sharded::ShardedTensor;
use super::{Checkpoint, OpenOptions, TokenizerSource};
use crate::error::{Error, Result, clip};
use crate::mmap::MappedFile;

mod artifacts;
mod config;
pub(super) mod container;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod gzip;
mod names;
mod ranks;
mod torch_dist;
mod weights;
mod zarr;

use artifacts::TokenizerArtifact;
use config::NemoConfig;
use container::Container;
use ranks::Ranks;
use weights::Parts;

const CONFIG: &str = "model_config.yaml";
/// The folder of a distributed checkpoint, and its metadata file.
const DISTRIBUTED: &str = "model_weights/";
const METADATA: &str = "model_weights/metadata.json";

/// Returns true if `path` looks like a `.nemo` or an unpacked one, judging only by file names.
pub(super) fn looks_like_one(path: &Path) -> bool {
    if path.is_dir() {
        return path.join(CONFIG).is_file();
    }
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("nemo"));
    named && path.is_file()
}

/// Opens the archive or folder at `path`.
pub(super) fn open(path: &Path, options: &OpenOptions<'_>) -> Result<Checkpoint> {
    of_container(path, open_container(path, options)?)
}

/// Opens the checkpoint in `container`, the archive or folder `path`.
fn of_container(path: &Path, container: Container) -> Result<Checkpoint> {
    let yaml = container.get(CONFIG)?;
    let config_path = container.member_path(CONFIG);
    let config = config::read(&config_path, container.bytes(yaml)?)?;

    let layout = NemoLayout::find(&container)?;
    if let (NemoLayout::Ranks(_), Some(2..)) = (&layout, config.virtual_pipeline) {
        let detail = "virtual_pipeline_model_parallel_size is set, and torch files of interleaved stages are not supported; \
                      save the model without it, or as a distributed checkpoint";
        return Err(Error::unsupported(&config_path, detail));
    }
    let tensors = layout.tensors(&container, config.num_layers)?;
    let in_file = |detail: String| Error::format(path, detail);
    let parts = Parts::sort(tensors).map_err(in_file)?;
    let (vocab_size, element_type) = parts.embedding().map_err(in_file)?;
    let tokenizer = tokenizer(&container, &config)?;
    let details = details(&config, &layout);
    let prompt_tokens = config.chat_prompt_tokens.clone();
    let mut model = config.with_vocabulary(vocab_size, None, Vec::new())?;
    // The stored type wins; the config gives the training precision.
    if let Some(dtype) = element_type.weight() {
        model.dtype = dtype;
    }
    let files = container.into_files();
    let weights = parts.into_weights(&model, &files).map_err(in_file)?;
    let mut checkpoint = Checkpoint::new(path, "nemo", model, files, weights, tokenizer, details);
    checkpoint.nemo_prompt_tokens = prompt_tokens;
    Ok(checkpoint)
}

fn open_container(path: &Path, options: &OpenOptions<'_>) -> Result<Container> {
    if std::fs::metadata(path).map_err(Error::io("open", path))?.is_dir() {
        return Container::of_folder(path);
    }
    // SAFETY: `Checkpoint` requires its caller not to modify its files while it is open.
    #[allow(unsafe_code)]
    let file = unsafe { MappedFile::open(path)? };
    let file = if gzip::is_gzip(file.bytes()) { gzip::unpack(path, options)? } else { file };
    Container::of_archive(path, file)
}

/// Storage format of the weights.
#[derive(Debug)]
enum NemoLayout {
    Ranks(Ranks),
    Zarr,
    TorchDist,
}

impl NemoLayout {
    fn find(container: &Container) -> Result<NemoLayout> {
        let ranks = Ranks::find(container)?;
        let distributed = distributed(container)?;
        match (ranks, distributed) {
            (Some(ranks), None) => Ok(NemoLayout::Ranks(ranks)),
            (None, Some(layout)) => Ok(layout),
            (Some(ranks), Some(_)) => {
                let detail = format!(
                    "found both {} and a distributed checkpoint in {DISTRIBUTED}; remove one of them",
                    ranks.describe()
                );
                Err(Error::format(container.path(), detail))
            }
            (None, None) => {
                let names: Vec<String> = container.members().map(|(name, _)| clip(name)).take(5).collect();
                let detail = format!(
                    "no weights: expected model_weights.ckpt, the same in folders such as mp_rank_00 or \
                      tp_rank_00_pp_rank_000, or a distributed checkpoint in {DISTRIBUTED}; found {}",
                    names.join(", ")
                );
                Err(Error::format(container.path(), detail))
            }
        }
    }

    fn describe(&self) -> String {
        match self {
            NemoLayout::Ranks(ranks) => ranks.describe(),
            NemoLayout::Zarr => "a distributed checkpoint, zarr".to_owned(),
            NemoLayout::TorchDist => "a distributed checkpoint, torch_dist".to_owned(),
        }
    }

    fn tensors(&self, container: &Container, num_layers: usize) -> Result<Vec<(String, ShardedTensor)>> {
        match self {
            NemoLayout::Ranks(ranks) => ranks.tensors(container, num_layers),
            NemoLayout::Zarr => zarr::tensors(container, DISTRIBUTED),
            NemoLayout::TorchDist => torch_dist::tensors(container, DISTRIBUTED),
        }
    }
}

/// The kind of distributed checkpoint in the container, from its metadata.json or, without one, from its files.
fn distributed(container: &Container) -> Result<Option<NemoLayout>> {
    if container.below(DISTRIBUTED).next().is_none() {
        return Ok(None);
    }
    if let Some(place) = container.find(METADATA) {
        let path = container.member_path(METADATA);
        let bytes = container.bytes(place)?;
        if bytes.len() as u64 > MAX_CONFIG_BYTES {
            return Err(Error::format(&path, format!("longer than {MAX_CONFIG_BYTES} bytes, the limit for this file")));
        }
        return match parse_object(&path, bytes)?.get("sharded_backend") {
            Some(Value::String(backend)) if backend == "zarr" => Ok(Some(NemoLayout::Zarr)),
            Some(Value::String(backend)) if backend == "torch_dist" => Ok(Some(NemoLayout::TorchDist)),
            other => {
                let found = other.map_or_else(|| "missing".to_owned(), super::json::shown);
                Err(Error::unsupported(
                    &path,
                    format!("sharded_backend is {found}, expected \"zarr\" or \"torch_dist\""),
                ))
            }
        };
    }
    if container.below(DISTRIBUTED).any(|(name, _)| name.ends_with("/.zarray")) {
        return Ok(Some(NemoLayout::Zarr));
    }
    if container.find("model_weights/.metadata").is_some() {
        return Ok(Some(NemoLayout::TorchDist));
    }
    let detail = format!("{DISTRIBUTED} has neither metadata.json nor .metadata nor zarr arrays");
    Err(Error::format(container.path(), detail))
}

/// Locates the tokenizer file in the container.
fn tokenizer(container: &Container, config: &NemoConfig) -> Result<Option<TokenizerSource>> {
    let Some(tokenizer) = &config.tokenizer else { return Ok(None) };
    let (name, is_json) = match artifacts::tokenizer_file(container, tokenizer)? {
        TokenizerArtifact::SentencePiece(name) => (name, false),
        TokenizerArtifact::HuggingFace(name) => (name, true),
    };
    let place = container.get(&name)?;
    let path = container.member_path(&name);
    Ok(Some(TokenizerSource { path, place: Some((place.file, place.bytes.clone())), is_json }))
}

/// Returns true if `name` is Transformer Engine state, which inference does not need.
fn is_extra_state(name: &str) -> bool {
    name.contains("_extra_state")
}

/// Further facts about the file to show to the user: (name, value).
fn details(config: &NemoConfig, layout: &NemoLayout) -> Vec<(&'static str, String)> {
    let mut details = vec![("layout", layout.describe())];
    let trained = [("tensor", config.tensor_parallel), ("pipeline", config.pipeline_parallel)];
    let trained: Vec<String> = trained.iter().map(|(kind, ranks)| format!("{kind} parallel {ranks}")).collect();
    let code = if config.mcore_gpt { "Megatron-Core" } else { "NeMo's own GPT" };
    details.push(("trained as", format!("{code}, {}", trained.join(", "))));
    let named = |text: &Option<String>| text.as_deref().map(clip);
    details.extend(named(&config.target).map(|target| ("class", target)));
    details.extend(named(&config.nemo_version).map(|version| ("NeMo", version)));
    details
}

#[cfg(test)]
mod tests;
