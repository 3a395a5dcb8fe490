//! What must hold of the readers of a `.nemo`'s parts; see [`crate::fuzzing`].

use std::path::Path;

use super::container::Container;
use super::{DISTRIBUTED, config, of_container, torch_dist, zarr};
use crate::checkpoint::sharded::ShardedTensor;
use crate::checkpoint::weight::{TensorView, Weight};
use crate::error::Result;
use crate::fuzzing::{check_message, check_refusal};
use crate::mmap::MappedFile;

/// Weights of an input that are read, and the most elements of one of them.
const READ_WEIGHTS: usize = 64;
const READ_ELEMENTS: usize = 1 << 14;

/// A whole `.nemo`: every weight of a checkpoint that opens is read to its last element.
pub fn nemo(bytes: &[u8]) {
    let path = Path::new("model.nemo");
    let container = match Container::of_archive(path, MappedFile::in_memory(path, bytes)) {
        Ok(container) => container,
        Err(error) => return check_refusal(&error),
    };
    match of_container(path, container) {
        Ok(checkpoint) => {
            checkpoint.config().validate().unwrap();
            for view in checkpoint.tensors().take(READ_WEIGHTS) {
                let end = view.elements();
                let first = end.saturating_sub(READ_ELEMENTS);
                assert_eq!(view.raw(first..end).len(), (end - first) * view.dtype.bytes());
            }
            let _ = checkpoint.tokenizer_file(1 << 20).unwrap();
        }
        Err(error) => check_refusal(&error),
    }
}

/// The arrays of a distributed checkpoint in a tar archive: chunks lie in their files and make up their tensors.
pub fn zarr(bytes: &[u8]) {
    distributed(bytes, |container| zarr::tensors(container, DISTRIBUTED));
}

/// The metadata and items of a distributed checkpoint of torch in a tar archive: items lie in their files.
pub fn torch_dist(bytes: &[u8]) {
    distributed(bytes, |container| torch_dist::tensors(container, DISTRIBUTED));
}

fn distributed(bytes: &[u8], read: impl Fn(&Container) -> Result<Vec<(String, ShardedTensor)>>) {
    let path = Path::new("model.nemo");
    let container = match Container::of_archive(path, MappedFile::in_memory(path, bytes)) {
        Ok(container) => container,
        Err(error) => return check_refusal(&error),
    };
    let tensors = match read(&container) {
        Ok(tensors) => tensors,
        Err(error) => return check_refusal(&error),
    };
    let files = container.into_files();
    for (name, tensor) in tensors.iter().take(READ_WEIGHTS) {
        let (Some(dtype), 1..=2) = (tensor.dtype.weight(), tensor.shape.len()) else { continue };
        if tensor.shape.contains(&0) {
            continue;
        }
        match Weight::new(name.clone(), dtype, tensor, &files) {
            Ok(weight) => {
                let view = TensorView { name, dtype, shape: &tensor.shape, weight: &weight, files: &files };
                let end = view.elements();
                let first = end.saturating_sub(READ_ELEMENTS);
                assert_eq!(view.raw(first..end).len(), (end - first) * dtype.bytes());
            }
            Err(message) => check_message(&crate::error::clip(message)),
        }
    }
}

/// A `model_config.yaml`: a model that it describes is one that can be computed.
pub fn yaml(bytes: &[u8]) {
    match config::read(Path::new("model_config.yaml"), bytes) {
        Ok(config) => match config.with_vocabulary(1000, Some(2), vec![3]) {
            Ok(model) => model.validate().unwrap(),
            Err(error) => check_refusal(&error),
        },
        Err(error) => check_refusal(&error),
    }
}
