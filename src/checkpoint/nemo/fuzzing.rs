//! Fuzz targets of the readers of a `.nemo`; see [`crate::fuzzing`].

use std::path::Path;

use super::container::Container;
use super::{config, of_container, torch_dist, zarr};
use crate::checkpoint::sharded::{Shard, ShardedTensor};
use crate::checkpoint::torch;
use crate::error::Result;
use crate::fuzzing::check_refusal;
use crate::mmap::MappedFile;

/// Number of elements read of an accepted weight.
const READ_ELEMENTS: usize = 4096;

/// A `model_config.yaml`: an accepted config describes a valid model, whatever the vocabulary.
pub fn yaml(bytes: &[u8]) {
    match config::read(Path::new("model_config.yaml"), bytes) {
        Ok(config) => {
            let rows = config.override_vocab_size.unwrap_or(1);
            config.with_vocabulary(rows, None, Vec::new()).unwrap().validate().unwrap();
        }
        Err(error) => check_refusal(&error),
    }
}

/// A tar archive of zarr arrays: every element of every chunk lies inside the tensor and inside the file.
pub fn zarr(bytes: &[u8]) {
    check_tensors(bytes, |container| zarr::tensors(container, ""));
}

/// A tar archive of a checkpoint of `torch.distributed`: as [`zarr`].
pub fn torch_dist(bytes: &[u8]) {
    check_tensors(bytes, |container| torch_dist::tensors(container, ""));
}

/// The `.metadata` of such a checkpoint: every chunk lies in its tensor, and every byte range is valid.
pub fn metadata(bytes: &[u8]) {
    let metadata = match torch::read_metadata(Path::new(".metadata"), bytes, |_| true) {
        Ok(metadata) => metadata,
        Err(error) => return check_refusal(&error),
    };
    for tensor in &metadata.tensors {
        check_sizes(&tensor.shape, tensor.dtype.bytes());
        for chunk in &tensor.chunks {
            check_inside(&tensor.shape, &chunk.origin, &chunk.shape);
        }
    }
    assert!(metadata.items.iter().all(|item| item.bytes.start <= item.bytes.end));
}

/// A whole `.nemo`: an accepted one has the weights of its config, and they can be read.
pub fn nemo(bytes: &[u8]) {
    let path = Path::new("model.nemo");
    let Ok(container) = Container::of_archive(path, MappedFile::in_memory(path, bytes)) else { return };
    let checkpoint = match of_container(path, container) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return check_refusal(&error),
    };
    checkpoint.config().validate().unwrap();
    for (_, value) in checkpoint.details() {
        assert!(!value.chars().any(char::is_control), "{value:?}");
    }
    for weight in checkpoint.tensors() {
        let count = weight.elements().min(READ_ELEMENTS);
        assert_eq!(weight.raw(0..count).len(), count * weight.dtype.bytes());
        assert_eq!(weight.raw(weight.elements() - count..weight.elements()).len(), count * weight.dtype.bytes());
    }
    if let Err(error) = checkpoint.tokenizer_file(1 << 20) {
        check_refusal(&error);
    }
}

/// A reader of the tensors in a container, by name.
type ReadTensors = fn(&Container) -> Result<Vec<(String, ShardedTensor)>>;

fn check_tensors(bytes: &[u8], read: ReadTensors) {
    let path = Path::new("model.nemo");
    let Ok(container) = Container::of_archive(path, MappedFile::in_memory(path, bytes)) else { return };
    let tensors = match read(&container) {
        Ok(tensors) => tensors,
        Err(error) => return check_refusal(&error),
    };
    let files = container.into_files();
    for (_, tensor) in &tensors {
        let width = tensor.dtype.bytes();
        check_sizes(&tensor.shape, width);
        for Shard { origin, shape, strides, file, start } in &tensor.shards {
            check_inside(&tensor.shape, origin, shape);
            assert_eq!(strides.len(), shape.len());
            if shape.contains(&0) {
                continue;
            }
            let steps = shape.iter().zip(strides).map(|(size, stride)| (*size as u128 - 1) * *stride as u128);
            let end = *start as u128 + (steps.sum::<u128>() + 1) * width as u128;
            assert!(end <= files[*file].bytes().len() as u128, "{shape:?} by {strides:?} from {start} ends at {end}");
        }
    }
}

/// The product of the sizes, in bytes, fits an `isize`.
fn check_sizes(shape: &[usize], width: usize) {
    let bytes = shape.iter().try_fold(width, |bytes, size| bytes.checked_mul(*size));
    assert!(bytes.is_some_and(|bytes| bytes <= isize::MAX as usize), "{shape:?}");
}

/// A rectangle lies in a shape.
fn check_inside(whole: &[usize], origin: &[usize], shape: &[usize]) {
    assert!(origin.len() == whole.len() && shape.len() == whole.len());
    let ends = origin.iter().zip(shape).map(|(at, size)| at.checked_add(*size).unwrap());
    assert!(ends.zip(whole).all(|(end, all)| end <= *all), "{shape:?} at {origin:?} of {whole:?}");
}
