//! Fuzz targets of the readers of torch's files; see [`crate::fuzzing`].

use std::cell::Cell;
use std::collections::HashMap;
use std::path::Path;

use super::globals::{Dialect, Global};
use super::pickle::{Object, Pickle};
use super::{TorchTensor, read_state_dict, state_dict, zip as archive};
use crate::checkpoint::sharded::ShardedTensor;
use crate::checkpoint::weight::{TensorView, Weight};
use crate::fuzzing::{check_message, check_refusal};
use crate::mmap::MappedFile;

/// Number of tensors of an input whose elements are read.
const READ_TENSORS: usize = 16;
/// Maximum number of elements of such a tensor.
const READ_ELEMENTS: usize = 4096;

/// A zip archive, and the state dict that it may be: members and storages lie in the file without overlap, and tensors
/// in their storages; their elements are read.
pub fn zip(bytes: &[u8]) {
    match archive::members(bytes) {
        Ok(members) => {
            let mut places: Vec<_> = members.names().map(|name| members.get(name).unwrap()).collect();
            places.sort_by_key(|place| (place.start, place.end));
            let ends = places.iter().map(|place| place.end);
            assert!(places.iter().skip(1).zip(ends).all(|(place, end)| place.start >= end), "{places:?}");
            assert!(places.iter().all(|place| place.start <= place.end && place.end <= bytes.len()), "{places:?}");
        }
        Err(message) => check_message(&message),
    }
    match read_state_dict(Path::new("model.ckpt"), bytes) {
        Ok(dict) => {
            for tensor in dict.tensors() {
                assert_eq!(dict.tensor(&tensor.name), Some(tensor));
                assert!(tensor.storage.end <= bytes.len());
                check_place(tensor);
            }
            let file = [MappedFile::in_memory(Path::new("model.ckpt"), bytes)];
            dict.tensors().iter().take(READ_TENSORS).for_each(|tensor| check_elements(tensor, &file));
        }
        Err(error) => check_refusal(&error),
    }
}

/// A pickle, given every storage that it names, in the size that it claims.
pub fn pickle(bytes: &[u8]) {
    let pickle = match Pickle::read(Dialect::Saved, bytes) {
        Ok(pickle) => pickle,
        Err(message) => return check_message(&message),
    };
    let storages = claimed_storages(&pickle);
    let end = Cell::new(0usize);
    let place = |key: &str| {
        let start = end.get();
        end.set(start.checked_add(*storages.get(key)?)?);
        Some(start..end.get())
    };
    match state_dict::extract(&pickle, &place) {
        Ok((tensors, others)) => {
            tensors.iter().for_each(check_place);
            let names: std::collections::HashSet<&str> = tensors
                .iter()
                .map(|tensor| tensor.name.as_str())
                .chain(others.iter().map(|(name, _)| &**name))
                .collect();
            assert_eq!(names.len(), tensors.len() + others.len());
        }
        Err(message) => check_message(&message),
    }
}

/// Claimed bytes of each storage, by key, from the persistent ids of the tensors in the root and in its dicts.
fn claimed_storages<'p>(pickle: &Pickle<'p>) -> HashMap<&'p str, usize> {
    let mut storages = HashMap::new();
    let Object::Dict(root) = pickle.root() else { return storages };
    let nested = root.iter().filter_map(|(_, value)| match pickle.get(*value) {
        Object::Dict(entries) => Some(entries),
        _ => None,
    });
    for (_, value) in nested.take(4).chain([root]).flatten() {
        let Object::Tensor(arguments) = pickle.get(*value) else { continue };
        let Object::Tuple(arguments) = pickle.get(*arguments) else { continue };
        let Some(Object::Persistent(storage)) = arguments.first().map(|id| pickle.get(*id)) else { continue };
        let Object::Tuple(parts) = pickle.get(*storage) else { continue };
        let [_, class, key, _, elements] = parts.as_slice() else { continue };
        if let (Object::Global(Global::Storage(dtype)), Object::Str(key), Object::Int(elements)) =
            (pickle.get(*class), pickle.get(*key), pickle.get(*elements))
            && let Some(bytes) = usize::try_from(*elements).ok().and_then(|count| count.checked_mul(dtype.bytes()))
            && bytes <= isize::MAX as usize
        {
            storages.entry(*key).or_insert(bytes);
        }
    }
    storages
}

/// Every element of `tensor` is inside its storage.
fn check_place(tensor: &TorchTensor) {
    assert_eq!(tensor.shape.len(), tensor.strides.len(), "{tensor:?}");
    let last: u128 = match tensor.shape.contains(&0) {
        true => tensor.offset as u128,
        false => {
            let steps =
                tensor.shape.iter().zip(&tensor.strides).map(|(size, stride)| (*size as u128 - 1) * *stride as u128);
            tensor.offset as u128 + steps.sum::<u128>() + 1
        }
    };
    assert!(last * tensor.dtype.bytes() as u128 <= tensor.storage.len() as u128, "{tensor:?}");
    assert!(tensor.elements().checked_mul(tensor.dtype.bytes()).is_some_and(|bytes| bytes <= isize::MAX as usize));
}

/// A matrix or vector of floats is read as a weight, element for element.
fn check_elements(tensor: &TorchTensor, file: &[MappedFile; 1]) {
    let (Some(dtype), 1..=2) = (tensor.dtype.weight(), tensor.shape.len()) else { return };
    if tensor.elements() == 0 {
        return;
    }
    let sharded = ShardedTensor::of_torch(tensor, 0, 0);
    match Weight::new("w".to_owned(), dtype, &sharded, file) {
        Ok(weight) if tensor.elements() <= READ_ELEMENTS => {
            let view = TensorView { name: "w", dtype, shape: &tensor.shape, weight: &weight, files: file };
            assert_eq!(view.raw(0..view.elements()).len() as u64, view.bytes());
        }
        Ok(_) => {}
        Err(message) => check_message(&message),
    }
}
