//! Reads files saved by torch in place: the `.ckpt` members of a `.nemo`, and the parts of a distributed checkpoint.
//!
//! A file of `torch.save` is an uncompressed zip archive. `<prefix>/data.pkl` is a pickle of the saved object, in which
//! each tensor is a call that names a storage, an offset, a shape and strides; the storages are the members
//! `<prefix>/data/<key>`, and several tensors may share one. [`read_state_dict`] works on a byte slice (a mapped file,
//! or the part of one that is a member of a tar) and answers with places in it; no element is read. Nothing in the
//! pickle is ever executed.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result, clip};
use crate::tensor::DType;

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
mod globals;
mod metadata;
mod pickle;
mod state_dict;
mod zip;

use globals::Dialect;
pub(super) use metadata::{ChunkedTensor, MetadataItem, TensorChunk, read_metadata};
use pickle::Pickle;
use state_dict::FindStorage;

/// The type of a stored tensor's elements, as torch names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ElementType {
    Bool,
    Uint8,
    Int8,
    Int16,
    Int32,
    Int64,
    Float16,
    Bfloat16,
    Float32,
    Float64,
    Complex64,
    Complex128,
}

impl ElementType {
    /// The type of the elements of `torch.NAME`, a class of storages.
    fn of_storage(name: &str) -> Option<ElementType> {
        Some(match name {
            "BoolStorage" => ElementType::Bool,
            "ByteStorage" => ElementType::Uint8,
            "CharStorage" => ElementType::Int8,
            "ShortStorage" => ElementType::Int16,
            "IntStorage" => ElementType::Int32,
            "LongStorage" => ElementType::Int64,
            "HalfStorage" => ElementType::Float16,
            "BFloat16Storage" => ElementType::Bfloat16,
            "FloatStorage" => ElementType::Float32,
            "DoubleStorage" => ElementType::Float64,
            "ComplexFloatStorage" => ElementType::Complex64,
            "ComplexDoubleStorage" => ElementType::Complex128,
            _ => return None,
        })
    }

    /// The type that the dtype `torch.NAME` is.
    fn of_dtype(name: &str) -> Option<ElementType> {
        use ElementType::*;
        let all = [Bool, Uint8, Int8, Int16, Int32, Int64, Float16, Bfloat16, Float32, Float64, Complex64, Complex128];
        all.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Its name as a torch dtype.
    const fn name(self) -> &'static str {
        match self {
            ElementType::Bool => "bool",
            ElementType::Uint8 => "uint8",
            ElementType::Int8 => "int8",
            ElementType::Int16 => "int16",
            ElementType::Int32 => "int32",
            ElementType::Int64 => "int64",
            ElementType::Float16 => "float16",
            ElementType::Bfloat16 => "bfloat16",
            ElementType::Float32 => "float32",
            ElementType::Float64 => "float64",
            ElementType::Complex64 => "complex64",
            ElementType::Complex128 => "complex128",
        }
    }

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            ElementType::Bool | ElementType::Uint8 | ElementType::Int8 => 1,
            ElementType::Int16 | ElementType::Float16 | ElementType::Bfloat16 => 2,
            ElementType::Int32 | ElementType::Float32 => 4,
            ElementType::Int64 | ElementType::Float64 | ElementType::Complex64 => 8,
            ElementType::Complex128 => 16,
        }
    }

    /// The element type of weights stored so, if weights may be: F32, F16 or BF16.
    pub const fn weight(self) -> Option<DType> {
        match self {
            ElementType::Float32 => Some(DType::F32),
            ElementType::Float16 => Some(DType::F16),
            ElementType::Bfloat16 => Some(DType::BF16),
            _ => None,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Where a tensor of a [`StateDict`] lies and how its elements are laid out. Every element is inside `storage`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorchTensor {
    /// Its key in the state dict.
    pub name: String,
    /// Any that torch stores; only those with an [`ElementType::weight`] can be read.
    pub dtype: ElementType,
    /// The product of the sizes, in bytes, fits an `isize`. Empty for a scalar.
    pub shape: Vec<usize>,
    /// From one index to the next along each axis, in elements; as many as there are sizes.
    pub strides: Vec<usize>,
    /// Where the first element lies in the storage, in elements.
    pub offset: usize,
    /// The storage, in bytes from the start of the slice that was read. Other tensors may lie in it too.
    pub storage: Range<usize>,
}

impl TorchTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The tensors of a state dict, in its order.
#[derive(Debug)]
pub struct StateDict {
    tensors: Vec<TorchTensor>,
    by_name: HashMap<String, usize>,
    /// Name and kind of what is no tensor.
    others: Vec<(String, &'static str)>,
}

/// Reads the state dict in `bytes`, all of a file that `torch.save` wrote: a dict of tensors, or a dict with such a dict
/// under the key `state_dict`. `path` names the file in messages.
///
/// # Errors
/// [`Error::Format`] for a file that is damaged, whose pickle names anything but tensors and containers, or that a
/// limit keeps from being read; [`Error::Unsupported`] for the format of torch before 1.6, TorchScript and big-endian files.
pub fn read_state_dict(path: &Path, bytes: &[u8]) -> Result<StateDict> {
    let (tensors, others) = read_saved(path, bytes, state_dict::extract)?;
    let by_name = tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
    Ok(StateDict { tensors, by_name, others })
}

/// Reads the tensor in `bytes`, all that `torch.save` wrote of it; it has no name. `path` names the file in messages.
///
/// # Errors
/// As [`read_state_dict`].
pub fn read_tensor(path: &Path, bytes: &[u8]) -> Result<TorchTensor> {
    read_saved(path, bytes, state_dict::root)
}

/// Reads what `torch.save` wrote and has `extract` find the tensors in its pickle, given the places of its storages.
fn read_saved<T>(
    path: &Path,
    bytes: &[u8],
    extract: impl Fn(&Pickle<'_>, &FindStorage<'_>) -> Result<T, String>,
) -> Result<T> {
    let damaged = |detail: String| Error::format(path, detail);
    if bytes.starts_with(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19") {
        let detail = "a file in the format of torch before 1.6, which is no zip archive; \
                      load it and save it again with a newer torch";
        return Err(Error::unsupported(path, detail));
    }
    if !zip::looks_like_one(bytes) {
        return Err(damaged(format!(
            "{} bytes that do not start as a zip archive: torch.save wrote none",
            bytes.len()
        )));
    }
    let members = zip::members(bytes).map_err(damaged)?;
    let prefix = prefix(&members).map_err(damaged)?;
    let member = |name: &str| {
        let name = format!("{prefix}/{name}");
        members.get(&name).map(|range| (name, range))
    };
    if member("constants.pkl").is_some() {
        return Err(Error::unsupported(path, "a TorchScript archive; expected tensors that torch.save wrote"));
    }
    if let Some((name, range)) = member("byteorder")
        && bytes[range.clone()] != *b"little"
    {
        let order = String::from_utf8_lossy(&bytes[range.start..range.end.min(range.start + 100)]);
        return Err(Error::unsupported(path, format!("`{}` says `{}`, expected `little`", clip(name), clip(order))));
    }
    let (name, range) = member("data.pkl").ok_or_else(|| damaged("no pickle of the saved object".to_owned()))?;
    let in_pickle = |detail: String| damaged(format!("`{}`: {detail}", clip(&name)));
    let pickle = Pickle::read(Dialect::Saved, &bytes[range]).map_err(in_pickle)?;
    let storage = |key: &str| member(&format!("data/{key}")).map(|(_, range)| range);
    extract(&pickle, &storage).map_err(in_pickle)
}

/// Common prefix of all member names: the folder of the only `data.pkl`.
fn prefix<'a>(members: &zip::Members<'a>) -> Result<&'a str, String> {
    let mut prefixes = members.names().filter_map(|name| name.strip_suffix("/data.pkl"));
    match (prefixes.next(), prefixes.next()) {
        (Some(prefix), None) => Ok(prefix),
        (None, _) => Err("a zip archive without a member `<name>/data.pkl`: torch.save did not write it".to_owned()),
        (Some(one), Some(other)) => {
            // The table of members has no order; a message has.
            let (one, other) = if one < other { (one, other) } else { (other, one) };
            Err(format!("two pickles, `{}/data.pkl` and `{}/data.pkl`; expected one", clip(one), clip(other)))
        }
    }
}

impl StateDict {
    /// All tensors, in the order of the dict.
    pub fn tensors(&self) -> &[TorchTensor] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TorchTensor> {
        self.by_name.get(name).map(|index| &self.tensors[*index])
    }

    /// Name and kind of the entries that are no tensors, such as Transformer Engine's `_extra_state`.
    pub fn others(&self) -> &[(String, &'static str)] {
        &self.others
    }
}

#[cfg(test)]
mod tests;
