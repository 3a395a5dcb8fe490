//! Extracts the tensors of a pickled state dict, or a pickled tensor, and checks them against the storages in the file.

use std::collections::HashSet;
use std::ops::Range;

use super::globals::Global;
use super::pickle::{Id, Object, Pickle};
use super::{ElementType, TorchTensor};
use crate::error::clip;

/// The key under which training frameworks nest the state dict.
const NESTED: &str = "state_dict";
/// Maximum number of tensors in a file; the 8B model's has some 200.
const MAX_TENSORS: usize = 1 << 14;
/// Maximum number of axes of a tensor; a weight has up to 3.
const MAX_AXES: usize = 8;

/// Finds the byte range of a storage in the file by its key.
pub(super) type FindStorage<'f> = dyn Fn(&str) -> Option<Range<usize>> + 'f;

/// The tensors of a state dict, and name and kind of its other entries.
type StateDictEntries = (Vec<TorchTensor>, Vec<(String, &'static str)>);

/// The entries of the state dict that is the root of `pickle`, or is under its key `state_dict`, in order.
pub(super) fn extract(pickle: &Pickle<'_>, storage: &FindStorage<'_>) -> Result<StateDictEntries, String> {
    let Object::Dict(entries) = pickle.root() else {
        return Err(format!("found {}, expected a dict of tensors", pickle.root().kind()));
    };
    let nested = entries.iter().find(|(key, _)| matches!(pickle.get(*key), Object::Str(NESTED)));
    let entries = match nested.map(|(_, value)| pickle.get(*value)) {
        None => entries,
        Some(Object::Dict(entries)) => entries,
        Some(other) => return Err(format!("the key `{NESTED}` is {}, expected a dict of tensors", other.kind())),
    };
    let mut tensors = Vec::new();
    let mut others = Vec::new();
    let mut seen = HashSet::new();
    for (key, value) in entries {
        let Object::Str(name) = pickle.get(*key) else {
            return Err(format!("a key of the state dict is {}, expected a string", pickle.get(*key).kind()));
        };
        if !seen.insert(*name) {
            return Err(format!("duplicate key `{}` in the state dict", clip(name)));
        }
        match pickle.get(*value) {
            Object::Tensor(arguments) => {
                if tensors.len() == MAX_TENSORS {
                    return Err(format!("more than {MAX_TENSORS} tensors"));
                }
                let tensor = tensor(pickle, name, *arguments, storage);
                tensors.push(tensor.map_err(|detail| format!("tensor `{}`: {detail}", clip(name)))?);
            }
            other => others.push(((*name).to_owned(), other.kind())),
        }
    }
    Ok((tensors, others))
}

/// The tensor that is the root of `pickle`. It has no name.
pub(super) fn root(pickle: &Pickle<'_>, storage: &FindStorage<'_>) -> Result<TorchTensor, String> {
    match pickle.root() {
        Object::Tensor(arguments) => tensor(pickle, "", *arguments, storage),
        other => Err(format!("found {}, expected a tensor", other.kind())),
    }
}

/// The tensor that `_rebuild_tensor_v2` would make of a storage, offset, size and stride; further arguments
/// (requires_grad, hooks, metadata) are ignored.
fn tensor(
    pickle: &Pickle<'_>,
    name: &str,
    arguments: Id,
    find_storage: &FindStorage<'_>,
) -> Result<TorchTensor, String> {
    let Object::Tuple(arguments) = pickle.get(arguments) else {
        return Err("the arguments of `_rebuild_tensor_v2` are not a tuple".to_owned());
    };
    let [storage, offset, size, stride, ..] = arguments.as_slice() else {
        return Err(format!("`_rebuild_tensor_v2` has {} arguments, expected at least 4", arguments.len()));
    };
    let Object::Persistent(storage) = pickle.get(*storage) else {
        return Err(format!("its storage is {}, expected a persistent id", pickle.get(*storage).kind()));
    };
    let (dtype, storage) = locate(pickle, *storage, find_storage)?;
    let offset = count(pickle, *offset).map_err(|found| format!("its offset is {found}"))?;
    let shape = counts(pickle, *size).map_err(|found| format!("its size is {found}"))?;
    let strides = counts(pickle, *stride).map_err(|found| format!("its stride is {found}"))?;
    if shape.len() != strides.len() {
        return Err(format!("it has {} sizes and {} strides", shape.len(), strides.len()));
    }
    check_bytes(&shape, dtype)?;
    let stored = storage.len() / dtype.bytes();
    let end = if shape.contains(&0) {
        Some(offset)
    } else {
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |at, (size, stride)| at.checked_add((size - 1).checked_mul(*stride)?));
        last.and_then(|last| last.checked_add(1))
    };
    if end.is_none_or(|end| end > stored) {
        return Err(format!(
            "offset {offset}, shape {shape:?} and strides {strides:?} exceed its storage of {stored} elements"
        ));
    }
    Ok(TorchTensor { name: name.to_owned(), dtype, shape, strides, offset, storage })
}

/// Resolves the storage with the persistent id `('storage', class, key, location, count)`.
fn locate(
    pickle: &Pickle<'_>,
    description: Id,
    find_storage: &FindStorage<'_>,
) -> Result<(ElementType, Range<usize>), String> {
    let items = match pickle.get(description) {
        Object::Tuple(items) => items.as_slice(),
        other => return Err(format!("its storage's persistent id is {}, expected a tuple", other.kind())),
    };
    let [kind, class, key, _location, elements] = items else {
        return Err(format!("its storage's persistent id has {} values, expected 5", items.len()));
    };
    if !matches!(pickle.get(*kind), Object::Str("storage")) {
        return Err("its storage's persistent id does not start with `storage`".to_owned());
    }
    let dtype = match pickle.get(*class) {
        Object::Global(Global::Storage(dtype)) => *dtype,
        Object::Global(Global::UntypedStorage) => {
            return Err("its storage is untyped, expected a class such as torch.BFloat16Storage".to_owned());
        }
        other => {
            return Err(format!(
                "the class of its storage is {}, expected one such as torch.BFloat16Storage",
                other.kind()
            ));
        }
    };
    let Object::Str(key) = pickle.get(*key) else {
        return Err(format!("the key of its storage is {}, expected a string", pickle.get(*key).kind()));
    };
    let elements = count(pickle, *elements).map_err(|found| format!("the size of its storage is {found}"))?;
    let place =
        find_storage(key).ok_or_else(|| format!("the member `data/{}` with its storage is missing", clip(key)))?;
    if elements.checked_mul(dtype.bytes()) != Some(place.len()) {
        return Err(format!(
            "its storage `data/{}` has {} bytes, expected {elements} elements of {dtype}",
            clip(key),
            place.len()
        ));
    }
    Ok((dtype, place))
}

/// Rejects a tensor whose bytes do not fit an `isize`, with sizes of 0 counted as 1.
pub(super) fn check_bytes(shape: &[usize], dtype: ElementType) -> Result<(), String> {
    let bytes = shape.iter().try_fold(dtype.bytes(), |product, size| product.checked_mul((*size).max(1)));
    match bytes {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(format!("its shape {shape:?} exceeds the address space")),
    }
}

/// A whole number of at least 0; the error describes what was found instead.
pub(super) fn count(pickle: &Pickle<'_>, id: Id) -> Result<usize, String> {
    match pickle.get(id) {
        Object::Int(value) => {
            usize::try_from(*value).map_err(|_| format!("{value}, expected a whole number of at least 0"))
        }
        other => Err(format!("{}, expected a whole number", other.kind())),
    }
}

/// A tuple of such numbers, one per axis.
pub(super) fn counts(pickle: &Pickle<'_>, id: Id) -> Result<Vec<usize>, String> {
    match pickle.get(id) {
        Object::Tuple(items) if items.len() > MAX_AXES => {
            Err(format!("a tuple of {} axes, more than the limit of {MAX_AXES}", items.len()))
        }
        Object::Tuple(items) => items.iter().map(|id| count(pickle, *id)).collect(),
        other => Err(format!("{}, expected a tuple", other.kind())),
    }
}
