//! Reader of safetensors files: the header is validated against the file before any data is trusted.
//!
//! Layout: 8 bytes of little-endian header length, that many bytes of JSON (`{"name": {"dtype", "shape",
//! "data_offsets"}, …, "__metadata__": {…}}`, padded with spaces), then the data. Offsets count from the end of the
//! header. The tensors must cover the data exactly: no overlaps, no holes, no trailing data.
//!
//! The header is not parsed by `safetensors::SafeTensors::read_metadata`, only its types are used. That function
//! collects the tensors in a map, so of two with one name the last silently wins; it reads up to 100 MB of JSON and
//! ignores unknown keys of a tensor; and its errors do not give the expected file size and rarely name the tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{Error, Result, clip};
use crate::mmap::MappedFile;

/// Size limit of a header, in bytes. The 8B model's has about 40 KB.
pub const MAX_HEADER_BYTES: u64 = 16 << 20;

const LENGTH_BYTES: usize = size_of::<u64>();

/// A mapped safetensors file whose header has been checked against its size.
#[derive(Debug)]
pub struct TensorFile {
    file: MappedFile,
    /// Sorted by name.
    tensors: Vec<StoredTensor>,
    metadata: BTreeMap<String, String>,
}

/// One tensor of a [`TensorFile`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// The name in the header.
    pub name: String,
    /// Element type; any that the format defines.
    pub dtype: Dtype,
    /// Row-major shape; its product times the element size is `bytes.len()`.
    pub shape: Vec<usize>,
    /// Range of the data in bytes from the start of the file; lies inside the file.
    pub bytes: Range<usize>,
}

impl TensorFile {
    /// Maps `path` and validates its header. No tensor data is read. The file must not be modified in place while the
    /// value is alive: see [`MappedFile`].
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be mapped, [`Error::Format`] if the header is too long, not JSON of the expected
    /// form, names a tensor twice, or does not describe the data after it exactly.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<TensorFile> {
        // SAFETY: the documentation requires the caller not to modify the file.
        TensorFile::of(unsafe { MappedFile::open(path)? })
    }

    /// Reads the whole of `path` into memory and validates its header. The file may be modified afterwards.
    ///
    /// # Errors
    /// As [`TensorFile::open`], and [`Error::Io`] if it cannot be read or there is not enough memory.
    pub fn copy(path: &Path) -> Result<TensorFile> {
        TensorFile::of(MappedFile::copy(path)?)
    }

    fn of(file: MappedFile) -> Result<TensorFile> {
        let (tensors, metadata) = parse(file.bytes()).map_err(|detail| Error::format(file.path(), detail))?;
        Ok(TensorFile { file, tensors, metadata })
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The whole file; [`StoredTensor::bytes`] are ranges of it.
    pub fn mapped(&self) -> &[u8] {
        self.file.bytes()
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// The tensor called `name`, and its data.
    pub fn tensor(&self, name: &str) -> Option<(&StoredTensor, &[u8])> {
        let index = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        let tensor = &self.tensors[index];
        Some((tensor, &self.file.bytes()[tensor.bytes.clone()]))
    }

    /// The header's free-form `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The mapping and the tensors, for a reader that joins several files.
    pub fn into_parts(self) -> (MappedFile, Vec<StoredTensor>) {
        (self.file, self.tensors)
    }
}

/// Encodes the start of a safetensors file with these tensors, stored in this order without holes: length and header,
/// padded so that the data starts at a multiple of 64 bytes.
///
/// # Errors
/// [`Error::Format`] if the header would be longer than readers accept.
pub fn encode_header(tensors: &[(&str, Dtype, Vec<usize>)]) -> Result<Vec<u8>> {
    let mut header = serde_json::Map::new();
    let mut offset = 0u64;
    for (name, dtype, shape) in tensors {
        let bytes = shape.iter().map(|n| *n as u64).product::<u64>() * dtype.bitsize() as u64 / 8;
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bytes]});
        header.insert((*name).to_owned(), info);
        offset += bytes;
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize((json.len() + LENGTH_BYTES).next_multiple_of(64) - LENGTH_BYTES, b' ');
    if json.len() as u64 > MAX_HEADER_BYTES {
        let detail = format!(
            "the header for {} tensors has {} bytes, more than the limit of {MAX_HEADER_BYTES}",
            tensors.len(),
            json.len()
        );
        return Err(Error::format("safetensors", detail));
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

/// Parses and validates the whole file `bytes`.
fn parse(bytes: &[u8]) -> Result<(Vec<StoredTensor>, BTreeMap<String, String>), String> {
    let file_bytes = bytes.len();
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!(
            "not a safetensors file: it has {file_bytes} bytes, fewer than the 8 of the header's length"
        ));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(format!(
            "the first 8 bytes claim a header of {header_bytes} bytes, more than the limit of {MAX_HEADER_BYTES} \
                 (is this a safetensors file?)"
        ));
    }
    let Some((header, data)) = usize::try_from(header_bytes).ok().and_then(|count| rest.split_at_checked(count)) else {
        return Err(format!(
            "truncated: the header claims bytes 8..{}, but the file ends at {file_bytes}",
            header_bytes + LENGTH_BYTES as u64
        ));
    };
    if header.first() != Some(&b'{') {
        return Err("the header does not start with '{': this is not a safetensors file".to_owned());
    }
    let header: Header = serde_json::from_slice(header).map_err(|error| format!("invalid header: {}", clip(error)))?;
    let data_start = file_bytes - data.len();
    let tensors = place(header.tensors, data_start, data.len())?;
    Ok((tensors, header.metadata))
}

/// Checks names, shapes and offsets against the `data_bytes` bytes that start at `data_start`.
fn place(
    mut infos: Vec<(String, TensorInfo)>,
    data_start: usize,
    data_bytes: usize,
) -> Result<Vec<StoredTensor>, String> {
    infos.sort_by(|(left, _), (right, _)| left.cmp(right));
    if let Some((second, _)) = infos.iter().skip(1).zip(&infos).map(|(b, a)| (&b.0, &a.0)).find(|(b, a)| a == b) {
        return Err(format!("duplicate tensor `{}` in the header", clip(second)));
    }

    let mut by_offset: Vec<&(String, TensorInfo)> = infos.iter().collect();
    by_offset.sort_by_key(|(_, info)| info.data_offsets);
    let mut covered = 0;
    for (name, info) in by_offset {
        let (start, end) = info.data_offsets;
        let at = || format!("tensor `{}` at data offsets {start}..{end}", clip(name));
        if start > end || end > data_bytes {
            return Err(format!("{}: the file has {data_bytes} bytes of data (truncated or damaged)", at()));
        }
        if start != covered {
            let what = if start < covered { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(format!("{} {what}, which ends at {covered}", at()));
        }
        covered = end;
        let expected = stored_bytes(info);
        if expected != Some(end - start) {
            let expected = expected.map_or("more than any file holds".to_owned(), |bytes| format!("{bytes} bytes"));
            let shape = clip(format_args!("{:?}", info.shape));
            return Err(format!("{} has {} bytes, but {:?} {shape} takes {expected}", at(), end - start, info.dtype));
        }
    }
    if covered != data_bytes {
        return Err(format!("the file has {data_bytes} bytes of data, but the tensors cover only the first {covered}"));
    }

    let place = |(name, info): (String, TensorInfo)| {
        let (start, end) = info.data_offsets;
        StoredTensor { name, dtype: info.dtype, shape: info.shape, bytes: data_start + start..data_start + end }
    };
    Ok(infos.into_iter().map(place).collect())
}

/// Bytes that `info`'s shape and dtype take; `None` if they do not fit a `usize` or end inside a byte.
fn stored_bytes(info: &TensorInfo) -> Option<usize> {
    let elements = info.shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// A tensor in the header: the three keys that the format defines.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The header as written: in file order, with any duplicates.
struct Header {
    tensors: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if metadata.replace(map.next_value::<Option<BTreeMap<String, String>>>()?).is_some() {
                            return Err(A::Error::custom("duplicate key `__metadata__`"));
                        }
                        continue;
                    }
                    let Entry { dtype, shape, data_offsets } = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format_args!("tensor `{}`: {error}", clip(&name))))?;
                    tensors.push((name, TensorInfo { dtype, shape, data_offsets }));
                }
                Ok(Header { tensors, metadata: metadata.flatten().unwrap_or_default() })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod tests;
