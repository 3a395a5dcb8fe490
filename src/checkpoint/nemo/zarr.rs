//! Weights of a `.nemo` stored as zarr arrays: one folder per tensor, in which `.zarray` describes a regular grid of
//! chunks and each chunk is a file, named by its grid index.
//!
//! Reads format 2 as Megatron writes it: uncompressed, unfiltered, row-major, little-endian chunks, with `bfloat16` as
//! the name of a type that zarr itself lacks. A chunk at the end of an axis is stored in full; its shard covers only
//! the part inside the tensor. To zarr a missing chunk is one full of `fill_value`; here it is an error.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::container::{Container, MemberLocation};
use super::is_extra_state;
use crate::checkpoint::json;
use crate::checkpoint::sharded::{Shard, ShardedTensor};
use crate::checkpoint::torch::ElementType;
use crate::error::{Error, Result, clip};

/// Metadata file of an array, and its optional attributes.
const DESCRIPTION: &str = ".zarray";
const ATTRIBUTES: &str = ".zattrs";
/// Size limit of a `.zarray`; one has some 300 bytes.
const MAX_DESCRIPTION_BYTES: usize = 1 << 16;
/// Maximum number of arrays in a checkpoint. The 8B model has a dozen, since layers are stacked.
const MAX_ARRAYS: usize = 1 << 14;
/// Maximum number of axes of an array; a stacked weight has up to 3.
const MAX_AXES: usize = 8;
/// Maximum number of chunks of an array. There is one per layer and rank.
const MAX_CHUNKS: usize = 1 << 16;

/// The arrays `<prefix><name>/.zarray` of `container`, by name, with each chunk a shard.
///
/// Transformer Engine state (`_extra_state`) and files outside arrays are skipped.
///
/// # Errors
/// [`Error::Unsupported`] for features that Megatron does not use: another format, order or type, compression, filters;
/// [`Error::Format`] for an invalid `.zarray`, an exceeded limit, a chunk that is missing or has the wrong size, and a
/// file that is not a chunk.
pub(in crate::checkpoint) fn tensors(container: &Container, prefix: &str) -> Result<Vec<(String, ShardedTensor)>> {
    let mut tensors = Vec::new();
    for (member, place) in container.below(prefix) {
        let Some(name) = member.strip_suffix(DESCRIPTION).and_then(|folder| folder.strip_suffix('/')) else { continue };
        if is_extra_state(name) {
            continue;
        }
        if tensors.len() == MAX_ARRAYS {
            return Err(Error::format(container.member_path(prefix), format!("more than {MAX_ARRAYS} arrays")));
        }
        let array = Array::read(container, format!("{prefix}{name}/"), place)?;
        tensors.push((name.to_owned(), array.tensor()?));
    }
    Ok(tensors)
}

/// An array as described by its `.zarray`. Lists have one entry per axis.
struct Array<'c> {
    container: &'c Container,
    /// Its folder, with the `/`.
    folder: String,
    dtype: ElementType,
    shape: Vec<usize>,
    /// Shape of a chunk, no size 0; their product in bytes fits a `usize`.
    chunk: Vec<usize>,
    /// Bytes of a chunk.
    chunk_bytes: usize,
    /// Number of chunks along each axis; at most [`MAX_CHUNKS`] in all.
    grid: Vec<usize>,
    /// Separator between the indices in a chunk's name.
    separator: &'static str,
}

impl<'c> Array<'c> {
    /// Parses the `.zarray` at `place`.
    fn read(container: &'c Container, folder: String, place: &MemberLocation) -> Result<Array<'c>> {
        let path = container.member_path(&format!("{folder}{DESCRIPTION}"));
        let damaged = |detail: String| Error::format(&path, detail);
        let bytes = container.bytes(place)?;
        if bytes.len() > MAX_DESCRIPTION_BYTES {
            let detail = format!("{} bytes, more than the limit of {MAX_DESCRIPTION_BYTES}", bytes.len());
            return Err(damaged(detail));
        }
        let object = json::parse_object(&path, bytes)?;
        let is = |key: &str, expected: Value, meaning: &str| match required(&object, key).map_err(damaged)? {
            value if *value == expected => Ok(()),
            value => {
                let value = json::shown(value);
                Err(Error::unsupported(&path, format!("`{key}` is {value}, expected {expected} ({meaning})")))
            }
        };
        is("zarr_format", 2.into(), "zarr format 2")?;
        is("compressor", Value::Null, "uncompressed chunks")?;
        is("order", "C".into(), "row-major chunks")?;
        if object.contains_key("filters") {
            is("filters", Value::Null, "unfiltered chunks")?;
        }
        let separator = match object.get("dimension_separator").map(|value| (value, value.as_str())) {
            None | Some((_, Some("."))) => ".",
            Some((_, Some("/"))) => "/",
            Some((value, _)) => {
                let detail = format!("`dimension_separator` is {}, expected \".\" or \"/\"", json::shown(value));
                return Err(Error::unsupported(&path, detail));
            }
        };
        let dtype = required(&object, "dtype").map_err(damaged)?;
        let dtype = dtype.as_str().and_then(element_type).ok_or_else(|| {
            let dtype = json::shown(dtype);
            let detail = format!("`dtype` is {dtype}, expected \"bfloat16\" or a little-endian type such as \"<f4\"");
            Error::unsupported(&path, detail)
        })?;

        let shape = sizes(&object, "shape", 0).map_err(damaged)?;
        let chunk = sizes(&object, "chunks", 1).map_err(damaged)?;
        if shape.len() != chunk.len() {
            return Err(damaged(format!("`shape` {shape:?} and `chunks` {chunk:?} differ in their number of axes")));
        }
        if bytes_of(&shape, dtype).is_none() {
            return Err(damaged(format!("`shape` {shape:?} exceeds the address space")));
        }
        let chunk_bytes =
            bytes_of(&chunk, dtype).ok_or_else(|| damaged(format!("`chunks` {chunk:?} exceeds the address space")))?;
        let grid: Vec<usize> = shape.iter().zip(&chunk).map(|(size, chunk)| size.div_ceil(*chunk)).collect();
        if count(&grid).is_none_or(|chunks| chunks > MAX_CHUNKS) {
            let detail = format!("a grid of {grid:?} chunks, more than the limit of {MAX_CHUNKS} in all");
            return Err(damaged(detail));
        }
        Ok(Array { container, folder, dtype, shape, chunk, chunk_bytes, grid, separator })
    }

    /// The tensor, whose shards are the chunks in grid order.
    fn tensor(self) -> Result<ShardedTensor> {
        let strides = row_major(&self.chunk);
        let (mut shards, mut chunks) = (Vec::new(), HashSet::new());
        let mut index = Some(vec![0; self.grid.len()]).filter(|_| !self.grid.contains(&0));
        while let Some(at) = index {
            let name = self.chunk_name(&at);
            let place = self.chunk_place(&name)?;
            // A grid index times the chunk's size lies inside the shape.
            let origin: Vec<usize> = at.iter().zip(&self.chunk).map(|(at, size)| at * size).collect();
            let inside = self.shape.iter().zip(&origin).map(|(size, origin)| size - origin);
            let shape = inside.zip(&self.chunk).map(|(left, size)| left.min(*size)).collect();
            let (file, start) = (place.file, place.bytes.start);
            shards.push(Shard { origin, shape, strides: strides.clone(), file, start });
            chunks.insert(name);
            index = following(at, &self.grid);
        }
        for (name, _) in self.container.below(&self.folder) {
            if name != DESCRIPTION && name != ATTRIBUTES && !chunks.contains(name) {
                return Err(self.stray(name));
            }
        }
        Ok(ShardedTensor { dtype: self.dtype, shape: self.shape, shards })
    }

    /// File name of the chunk at `index` of the grid.
    fn chunk_name(&self, index: &[usize]) -> String {
        // A scalar has no index; its only chunk is called 0.
        if index.is_empty() {
            return "0".to_owned();
        }
        let parts: Vec<String> = index.iter().map(usize::to_string).collect();
        parts.join(self.separator)
    }

    fn chunk_place(&self, name: &str) -> Result<&'c MemberLocation> {
        let member = format!("{}{name}", self.folder);
        let place = self.container.find(&member).ok_or_else(|| {
            let path = self.container.member_path(&format!("{}{DESCRIPTION}", self.folder));
            let detail =
                format!("chunk `{name}` is missing; expected one file for each chunk of the grid {:?}", self.grid);
            Error::format(path, detail)
        })?;
        if place.bytes.len() != self.chunk_bytes {
            let detail = format!(
                "the chunk has {} bytes, expected {} for {:?} of {}",
                place.bytes.len(),
                self.chunk_bytes,
                self.chunk,
                self.dtype
            );
            return Err(Error::format(self.container.member_path(&member), detail));
        }
        Ok(place)
    }

    /// The error for the file `name` in the array's folder, which is not a chunk of the grid.
    fn stray(&self, name: &str) -> Error {
        let is_index = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let parts = name.split(self.separator);
        let detail = match parts.clone().all(is_index) && parts.count() == self.grid.len() {
            true => format!("chunk `{}` is outside the grid {:?}", clip(name), self.grid),
            false => {
                let example = self.chunk_name(&vec![0; self.grid.len()]);
                format!("not a chunk of the array; expected file names such as `{example}`")
            }
        };
        Error::format(self.container.member_path(&format!("{}{name}", self.folder)), detail)
    }
}

/// The little-endian type that NumPy (or, for `bfloat16`, Megatron) calls `name`.
fn element_type(name: &str) -> Option<ElementType> {
    Some(match name {
        "|b1" => ElementType::Bool,
        "|u1" => ElementType::Uint8,
        "|i1" => ElementType::Int8,
        "<i2" => ElementType::Int16,
        "<i4" => ElementType::Int32,
        "<i8" => ElementType::Int64,
        "<f2" => ElementType::Float16,
        "bfloat16" => ElementType::Bfloat16,
        "<f4" => ElementType::Float32,
        "<f8" => ElementType::Float64,
        "<c8" => ElementType::Complex64,
        "<c16" => ElementType::Complex128,
        _ => return None,
    })
}

fn required<'o>(object: &'o Map<String, Value>, key: &str) -> Result<&'o Value, String> {
    object.get(key).ok_or_else(|| format!("`{key}` is missing"))
}

/// The list of sizes under `key`, one per axis, each at least `least`.
fn sizes(object: &Map<String, Value>, key: &str, least: usize) -> Result<Vec<usize>, String> {
    let list = match required(object, key)? {
        Value::Array(list) => list,
        other => return Err(format!("`{key}` is {}, expected a list of sizes", json::kind(other))),
    };
    if list.len() > MAX_AXES {
        return Err(format!("`{key}` has {} axes, more than the limit of {MAX_AXES}", list.len()));
    }
    let size = |value: &Value| {
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| *size >= least);
        size.ok_or_else(|| {
            format!("`{key}` contains {}, expected whole numbers of at least {least}", json::shown(value))
        })
    };
    list.iter().map(size).collect()
}

/// Product of `sizes`.
fn count(sizes: &[usize]) -> Option<usize> {
    sizes.iter().try_fold(1, |product: usize, size| product.checked_mul(*size))
}

/// Bytes of a tensor if they fit an `isize`, no matter in which order the sizes are multiplied: a size of 0 counts as 1.
fn bytes_of(sizes: &[usize], dtype: ElementType) -> Option<usize> {
    let bytes = sizes.iter().try_fold(dtype.bytes(), |product, size| product.checked_mul((*size).max(1)));
    bytes.filter(|bytes| isize::try_from(*bytes).is_ok())
}

/// Row-major strides of `sizes`, whose product is known to fit.
fn row_major(sizes: &[usize]) -> Vec<usize> {
    let mut next = 1;
    let outward = sizes.iter().rev().map(|size| {
        let stride = next;
        next *= size;
        stride
    });
    let mut strides: Vec<usize> = outward.collect();
    strides.reverse();
    strides
}

/// Successor of `index` in row-major order over `sizes`; `None` after the last.
fn following(mut index: Vec<usize>, sizes: &[usize]) -> Option<Vec<usize>> {
    for (at, size) in index.iter_mut().zip(sizes).rev() {
        *at += 1;
        if *at < *size {
            return Some(index);
        }
        *at = 0;
    }
    None
}

#[cfg(test)]
mod tests;
