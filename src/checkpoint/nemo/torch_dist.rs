//! Weights of a `.nemo` saved by `torch.distributed.checkpoint`: `.metadata` beside the files that ranks wrote, such as
//! `__0_0.distcp`, each a sequence of whole `torch.save` files with one chunk of one tensor.
//!
//! The metadata gives the location, type and shape of a chunk; the chunk's own file repeats type and shape, and both
//! must agree.

use std::collections::HashMap;

use super::container::Container;
use super::is_extra_state;
use crate::checkpoint::sharded::{Shard, ShardedTensor};
use crate::checkpoint::torch::{self, ChunkedTensor, MetadataItem, TensorChunk};
use crate::error::{Error, Result, clip};

/// File that describes a checkpoint, in its folder.
const METADATA: &str = ".metadata";

/// The tensors that `<prefix>.metadata` lists, by name, with each chunk a shard.
///
/// Transformer Engine state (`_extra_state`) and entries other than tensors are skipped.
///
/// # Errors
/// [`Error::Format`] if the metadata is missing or damaged, imports anything but its own record types, exceeds a limit
/// or does not match the files; [`Error::Unsupported`] for compressed chunks. As [`torch::read_tensor`] for a chunk.
pub(in crate::checkpoint) fn tensors(container: &Container, prefix: &str) -> Result<Vec<(String, ShardedTensor)>> {
    let name = format!("{prefix}{METADATA}");
    let bytes = container.bytes(container.get(&name)?)?;
    let path = container.member_path(&name);
    let metadata = torch::read_metadata(&path, bytes, |name| !is_extra_state(name))?;
    let items = Items::new(&metadata.items).map_err(|detail| Error::format(&path, detail))?;

    let mut tensors = Vec::new();
    let mut reader = Reader { container, prefix, items };
    for tensor in &metadata.tensors {
        let mut shards = Vec::new();
        for chunk in &tensor.chunks {
            let stored = reader.read(tensor, chunk)?;
            shards.extend(stored.shards.into_iter().map(|shard| Shard { origin: chunk.origin.clone(), ..shard }));
        }
        let whole = ShardedTensor { dtype: tensor.dtype, shape: tensor.shape.clone(), shards };
        tensors.push((tensor.name.to_owned(), whole));
    }
    Ok(tensors)
}

/// Tensor name and chunk origin.
type Key<'m> = (&'m str, Option<&'m [usize]>);

/// Locations of the chunks that have not been read yet. Each is read once, so the total work is bounded by the size of
/// the files.
struct Items<'m> {
    by_key: HashMap<Key<'m>, &'m MetadataItem<'m>>,
}

impl<'m> Items<'m> {
    /// Rejects overlapping locations, and two for one chunk.
    fn new(items: &'m [MetadataItem<'m>]) -> Result<Items<'m>, String> {
        let mut by_key = HashMap::new();
        for item in items {
            if by_key.insert((item.name, item.origin.as_deref()), item).is_some() {
                return Err(format!("`storage_data` lists {} twice", shown(item)));
            }
        }
        let mut in_order: Vec<&MetadataItem<'_>> = items.iter().collect();
        in_order.sort_by_key(|item| (item.file, item.bytes.start, item.bytes.end));
        for (before, after) in in_order.iter().zip(in_order.iter().skip(1)) {
            if before.file == after.file && before.bytes.end > after.bytes.start {
                return Err(format!(
                    "in `{}`, {} at {} overlaps {}, which ends at {}",
                    clip(after.file),
                    shown(after),
                    after.bytes.start,
                    shown(before),
                    before.bytes.end
                ));
            }
        }
        Ok(Items { by_key })
    }

    /// Takes the location of `chunk`. A tensor that was saved whole may be listed without an origin.
    fn take(&mut self, tensor: &'m ChunkedTensor<'m>, chunk: &'m TensorChunk) -> Option<&'m MetadataItem<'m>> {
        match self.by_key.remove(&(tensor.name, Some(&chunk.origin))) {
            None if chunk.shape == tensor.shape => self.by_key.remove(&(tensor.name, None)),
            item => item,
        }
    }
}

fn shown(item: &MetadataItem<'_>) -> String {
    match &item.origin {
        Some(origin) => format!("the chunk of `{}` at {origin:?}", clip(item.name)),
        None => format!("`{}`", clip(item.name)),
    }
}

struct Reader<'m> {
    container: &'m Container,
    prefix: &'m str,
    items: Items<'m>,
}

impl<'m> Reader<'m> {
    /// Reads the `chunk` of `tensor` and compares it with the metadata.
    fn read(&mut self, tensor: &'m ChunkedTensor<'m>, chunk: &'m TensorChunk) -> Result<ShardedTensor> {
        let container = self.container;
        let metadata = container.member_path(&format!("{}{METADATA}", self.prefix));
        let name = format!("tensor `{}`: chunk at {:?}", clip(tensor.name), chunk.origin);
        let Some(item) = self.items.take(tensor, chunk) else {
            let detail = format!("{name}: it is not in `storage_data`, or two chunks have this origin");
            return Err(Error::format(metadata, detail));
        };
        if let Some(transform) = item.transform {
            let detail =
                format!("{name}: it was transformed by `{}`, expected a plain torch.save file", clip(transform));
            return Err(Error::unsupported(metadata, detail));
        }
        if item.file.is_empty() || item.file.contains('/') || matches!(item.file, "." | "..") {
            let detail =
                format!("{name}: it is in `{}`, expected the name of a file beside {METADATA}", clip(item.file));
            return Err(Error::format(metadata, detail));
        }

        let member = format!("{}{}", self.prefix, item.file);
        let place = container.get(&member)?;
        let path = container.member_path(&member);
        let bytes = container.bytes(place)?;
        let at = item.bytes.start;
        let bytes = bytes.get(item.bytes.clone()).ok_or_else(|| {
            let (length, all) = (item.bytes.len(), bytes.len());
            Error::format(&path, format!("{name}: expected {length} bytes at {at}, but the file has {all}"))
        })?;
        let stored = torch::read_tensor(&path, bytes).map_err(|error| at_item(error, &name, at))?;
        if (stored.dtype, &stored.shape) != (tensor.dtype, &chunk.shape) {
            let detail = format!(
                "{name}: found {} {:?} at {at}, expected {} {:?}",
                stored.dtype, stored.shape, tensor.dtype, chunk.shape
            );
            return Err(Error::format(&path, detail));
        }
        Ok(ShardedTensor::of_torch(&stored, place.file, place.bytes.start + at))
    }
}

/// Prefixes `error` with the chunk and its offset in the file.
fn at_item(error: Error, name: &str, at: usize) -> Error {
    match error {
        Error::Format { path, detail } => Error::Format { path, detail: format!("{name}: at {at}: {detail}") },
        Error::Unsupported { path, detail } => {
            Error::Unsupported { path, detail: format!("{name}: at {at}: {detail}") }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests;
