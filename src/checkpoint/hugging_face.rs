//! A Hugging Face folder: config.json beside model.safetensors, or beside shards and their index.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use super::json::{kind, read_object, shown};
use super::schema::MAX_CONFIG_BYTES;
use super::{Checkpoint, ModelConfig, TokenizerSource, Weight, hf_config, schema};
use crate::error::{Error, Result, clip};
use crate::mmap::MappedFile;
use crate::tensor_file::{StoredTensor, TensorFile};

/// Size limit of model.safetensors.index.json. The 8B model's has about 30 KB.
const MAX_INDEX_BYTES: u64 = 16 << 20;

/// [`Checkpoint::format`] of such a folder.
pub(super) const FORMAT: &str = "hugging-face";

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

pub(super) fn looks_like_one(path: &Path) -> bool {
    path.join(CONFIG).is_file() && (path.join(SINGLE).is_file() || path.join(INDEX).is_file())
}

/// Reads config.json and no other file.
pub(super) fn config(path: &Path) -> Result<ModelConfig> {
    let path = path.join(CONFIG);
    Ok(hf_config::read(&path, read_object(&path, MAX_CONFIG_BYTES)?)?.model)
}

pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let kind = std::fs::metadata(path).map_err(Error::io("open", path))?;
    if !kind.is_dir() {
        let detail = "neither a folder nor a .nemo file; a checkpoint is a .nemo file, or a folder with config.json \
                      and model.safetensors or its shards";
        return Err(Error::unsupported(path, detail));
    }
    let config_path = path.join(CONFIG);
    let mut config = hf_config::read(&config_path, read_object(&config_path, MAX_CONFIG_BYTES)?)?;
    let inconsistent = |detail: String| Error::format(path, detail);

    let (files, stored) = open_weights(path)?;
    // Across shards, `open_shards` has checked that names are unique.
    let by_name: BTreeMap<&str, &(usize, StoredTensor)> =
        stored.iter().map(|placed| (placed.1.name.as_str(), placed)).collect();
    let found = by_name.iter().map(|(name, (_, tensor))| (*name, (tensor.dtype, tensor.shape.as_slice()))).collect();
    let expected = schema::expected(&config.model).ok_or_else(|| inconsistent("the sizes overflow".to_owned()))?;
    schema::check(&expected, &found).map_err(inconsistent)?;

    let mut weights = Vec::with_capacity(expected.len());
    for schema::Expected { name, shape } in expected {
        // `check` has found every expected tensor, in a dtype that weights may have.
        let placed = by_name.get(name.as_str()).and_then(|(file, tensor)| {
            let dtype = schema::weight_dtype(tensor.dtype)?;
            Some((dtype, *file, tensor.bytes.start))
        });
        let (dtype, file, start) = placed
            .ok_or_else(|| Error::internal(format!("tensor `{name}` was not found"), "a tensor that `check` found"))?;
        weights.push(Weight::contiguous(name, dtype, shape, file, start));
    }
    if !config.declares_dtype
        && let Some(embedding) = weights.first()
    {
        config.model.dtype = embedding.dtype;
    }
    if config.model.tie_word_embeddings
        && let (Some(head), Some(embedding)) = (by_name.get(schema::HEAD), by_name.get(schema::EMBEDDING))
        && !same(&files, head, embedding)
    {
        let detail = format!(
            "config.json ties `{}` to `{}`, but both are stored and differ; set tie_word_embeddings to false to use \
             both, or remove the head",
            schema::HEAD,
            schema::EMBEDDING
        );
        return Err(inconsistent(detail));
    }

    Ok(Checkpoint::new(path, FORMAT, config.model, files, weights, tokenizer(path), Vec::new()))
}

fn tokenizer(folder: &Path) -> Option<TokenizerSource> {
    let source = |path, is_json| TokenizerSource { path, place: None, is_json };
    let json = existing(folder, "tokenizer.json").map(|path| source(path, true));
    json.or_else(|| existing(folder, "tokenizer.model").map(|path| source(path, false)))
}

/// Path of the file `name` in `folder`, if it exists.
pub(super) fn existing(folder: &Path, name: &str) -> Option<PathBuf> {
    Some(folder.join(name)).filter(|path| is_there(path))
}

/// Returns true if `path` exists, even as a broken link: opening it then gives a better message than calling it
/// missing.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Returns true if two stored tensors are equal byte for byte.
fn same(files: &[MappedFile], one: &(usize, StoredTensor), other: &(usize, StoredTensor)) -> bool {
    let data = |(file, tensor): &(usize, StoredTensor)| &files[*file].bytes()[tensor.bytes.clone()];
    (one.1.dtype, &one.1.shape) == (other.1.dtype, &other.1.shape) && data(one) == data(other)
}

/// A folder's mapped weight files, and every tensor in them with the index of its file.
type Stored = (Vec<MappedFile>, Vec<(usize, StoredTensor)>);

/// Opens model.safetensors or, without one, the shards that the index names: transformers' order of precedence.
fn open_weights(folder: &Path) -> Result<Stored> {
    let index_path = folder.join(INDEX);
    if is_there(&folder.join(SINGLE)) {
        let (file, tensors) = TensorFile::open(&folder.join(SINGLE))?.into_parts();
        Ok((vec![file], tensors.into_iter().map(|tensor| (0, tensor)).collect()))
    } else if is_there(&index_path) {
        open_shards(folder, &index_path)
    } else {
        let other = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
        let hint = match other.iter().any(|name| folder.join(name).exists()) {
            true => "; load its pytorch_model.bin with transformers and convert it with save_pretrained",
            false => "",
        };
        Err(Error::format(folder, format!("found neither {SINGLE} nor {INDEX}{hint}")))
    }
}

/// Opens every shard named in the index, and checks that each contains exactly the tensors that the index assigns to
/// it.
fn open_shards(folder: &Path, index_path: &Path) -> Result<Stored> {
    let shard_of = shards(index_path, read_object(index_path, MAX_INDEX_BYTES)?)?;
    let mut shards: BTreeMap<&str, usize> = BTreeMap::new();
    for shard in shard_of.values() {
        *shards.entry(shard).or_default() += 1;
    }

    let (mut files, mut stored) = (Vec::new(), Vec::new());
    for (shard, listed) in shards {
        let (file, tensors) = TensorFile::open(&folder.join(shard))?.into_parts();
        let mut here = 0;
        for tensor in &tensors {
            match shard_of.get(&tensor.name) {
                Some(named) if named == shard => here += 1,
                Some(named) => {
                    let (name, named) = (clip(&tensor.name), clip(named));
                    let detail = format!("contains tensor `{name}`, which {INDEX} assigns to `{named}`");
                    return Err(Error::format(file.path(), detail));
                }
                None if schema::is_computed_buffer(&tensor.name) => {}
                None => {
                    let detail = format!("contains tensor `{}`, which {INDEX} does not list", clip(&tensor.name));
                    return Err(Error::format(file.path(), detail));
                }
            }
        }
        if here != listed {
            let holds = |name: &str| tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).is_ok();
            let missing = shard_of.iter().filter(|(name, named)| *named == shard && !holds(name)).map(|(name, _)| name);
            let (first, count) = (missing.clone().next().map(clip).unwrap_or_default(), missing.count());
            let detail = format!("lacks {count} tensor(s) that {INDEX} assigns to it, such as `{first}`");
            return Err(Error::format(file.path(), detail));
        }
        stored.extend(tensors.into_iter().map(|tensor| (files.len(), tensor)));
        files.push(file);
    }
    Ok((files, stored))
}

/// Parses the map from tensor to shard of the index `object`, the contents of `path`. Every shard is a bare file name.
pub(super) fn shards(path: &Path, mut object: Map<String, Value>) -> Result<HashMap<String, String>> {
    let Some(Value::Object(weight_map)) = object.swap_remove("weight_map") else {
        return Err(Error::format(path, "the key weight_map is missing or not an object"));
    };
    let mut shard_of = HashMap::with_capacity(weight_map.len());
    for (name, shard) in weight_map {
        let Value::String(shard) = shard else {
            let detail =
                format!("tensor `{}`: {} is {}, expected a file name", clip(name), shown(&shard), kind(&shard));
            return Err(Error::format(path, detail));
        };
        let mut parts = Path::new(&shard).components();
        let bare =
            matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == shard.as_str());
        if !bare || !shard.ends_with(".safetensors") {
            let (name, shard) = (clip(name), clip(shard));
            let detail =
                format!("tensor `{name}`: `{shard}` is not the name of a .safetensors file in the same folder");
            return Err(Error::format(path, detail));
        }
        shard_of.insert(name, shard);
    }
    Ok(shard_of)
}
