//! Reads `torch.save` files in place: the `.ckpt` members of a `.nemo`, and the chunks of a distributed checkpoint.
//!
//! A file of `torch.save` is an uncompressed zip archive. `<prefix>/data.pkl` is a pickle of the saved object, in which
//! each tensor is a call that names a storage, an offset, a shape and strides; the storages are the members
//! `<prefix>/data/<key>`, and several tensors may share one. [`read_state_dict`] works on a byte slice (a mapped file,
//! or a tar member in one) and returns locations in it; no element is read. Nothing in the pickle is ever executed.

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

/// Element type of a stored tensor, by torch's name.
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
    /// The element type of the storage class `torch.NAME`.
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

    /// The element type of the dtype `torch.NAME`.
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

    /// The element type if weights may have it: F32, F16 or BF16.
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

/// Location and layout of a tensor of a [`StateDict`]. Every element is inside `storage`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorchTensor {
    /// Its key in the state dict.
    pub name: String,
    /// Any type that torch stores; only those with an [`ElementType::weight`] can be read.
    pub dtype: ElementType,
    /// The product of the sizes, in bytes, fits an `isize`. Empty for a scalar.
    pub shape: Vec<usize>,
    /// Stride of each axis, in elements; as many as there are sizes.
    pub strides: Vec<usize>,
    /// Offset of the first element in the storage, in elements.
    pub offset: usize,
    /// Byte range of the storage in the slice that was read. Tensors may share it.
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
    /// Name and kind of the entries that are not tensors.
    others: Vec<(String, &'static str)>,
}

/// Reads the state dict in `bytes`, a whole `torch.save` file: a dict of tensors, or a dict with such a dict under the
/// key `state_dict`. `path` names the file in messages.
///
/// # Errors
/// [`Error::Format`] if the file is damaged, its pickle imports anything but tensors and containers, or it exceeds a
/// limit; [`Error::Unsupported`] for the format of torch before 1.6, TorchScript and big-endian files.
pub fn read_state_dict(path: &Path, bytes: &[u8]) -> Result<StateDict> {
    let (tensors, others) = read_saved(path, bytes, state_dict::extract)?;
    let by_name = tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
    Ok(StateDict { tensors, by_name, others })
}

/// Reads the tensor in `bytes`, a whole `torch.save` file; it has no name. `path` names the file in messages.
///
/// # Errors
/// As [`read_state_dict`].
pub fn read_tensor(path: &Path, bytes: &[u8]) -> Result<TorchTensor> {
    read_saved(path, bytes, state_dict::root)
}

/// Reads a `torch.save` file; `extract` finds the tensors in its pickle, given the locations of its storages.
fn read_saved<T>(
    path: &Path,
    bytes: &[u8],
    extract: impl Fn(&Pickle<'_>, &FindStorage<'_>) -> Result<T, String>,
) -> Result<T> {
    let damaged = |detail: String| Error::format(path, detail);
    if bytes.starts_with(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19") {
        let detail = "saved in the format of torch before 1.6; load it and save it again with a newer torch";
        return Err(Error::unsupported(path, detail));
    }
    if !zip::looks_like_one(bytes) {
        return Err(damaged(format!(
            "not a torch.save file: its {} bytes do not start like a zip archive",
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
        return Err(Error::unsupported(path, "a TorchScript archive; expected a state dict saved with torch.save"));
    }
    if let Some((name, range)) = member("byteorder")
        && bytes[range.clone()] != *b"little"
    {
        let order = String::from_utf8_lossy(&bytes[range.start..range.end.min(range.start + 100)]);
        return Err(Error::unsupported(path, format!("`{}` is `{}`, expected `little`", clip(name), clip(order))));
    }
    let (name, range) = member("data.pkl").ok_or_else(|| damaged("data.pkl is missing".to_owned()))?;
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
        (None, _) => Err("not a torch.save file: a zip archive without a member `<name>/data.pkl`".to_owned()),
        (Some(one), Some(other)) => {
            // Members are unordered; the message must be deterministic.
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

    /// Name and kind of the entries that are not tensors, such as Transformer Engine's `_extra_state`.
    pub fn others(&self) -> &[(String, &'static str)] {
        &self.others
    }
}

#[cfg(test)]
mod tests;
