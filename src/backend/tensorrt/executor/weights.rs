//! Upload of weights from the mapped file to the GPU.

use rayon::prelude::*;

use super::memory::{MemoryLayout, PlacedWeight};
use crate::backend::constants::stored_dtype;
use crate::backend::tensorrt::device::{Buffer, Device, Stream};
use crate::engine::tensorrt::{Binding, Extent};
use crate::error::{Error, Result};
use crate::tensor::DType;
use crate::tensor_file::TensorFile;

/// Size of each of two staging buffers: one is filled while the other is copied. Large enough for a copy to take
/// milliseconds, which amortizes its launch.
const STAGING_BYTES: usize = 64 << 20;
/// Unit of work per thread: several threads fault in the file's pages in parallel.
const PIECE_BYTES: usize = 4 << 20;

/// Looks up the bytes of every weight of the layout. The file may contain other tensors.
///
/// # Errors
/// [`Error::Package`] naming the weight that is missing or has the wrong type or shape.
pub(super) fn find<'f>(file: &'f TensorFile, bindings: &[Binding], layout: &MemoryLayout) -> Result<Vec<&'f [u8]>> {
    let one = |PlacedWeight { binding, part }: &PlacedWeight| {
        let binding = &bindings[*binding];
        let refuse = |detail: String| Error::package(file.path(), format!("{detail}; build the package again"));
        let Some((stored, data)) = file.tensor(&binding.name) else {
            return Err(refuse(format!("weight `{}` is missing", binding.name)));
        };
        let shape = stored.shape.iter().map(|n| Extent::Fixed(*n));
        // Packed pairs of 4-bit codes have another shape than the binding, so their size in bytes is compared instead.
        let same_shape = binding.dtype == DType::I4 || shape.eq(binding.shape.iter().copied());
        if stored.dtype != stored_dtype(binding.dtype) || !same_shape || data.len() as u64 != part.bytes {
            let (dtype, shape) = (stored.dtype, &stored.shape);
            return Err(refuse(format!(
                "its weight `{}` is {dtype:?}{shape:?}, but the plan expects {binding}",
                binding.name
            )));
        }
        Ok(data)
    };
    layout.weights.iter().map(one).collect()
}

/// Copies `data`, the bytes of every weight of the layout, to its range in `to`. `progress` receives the bytes copied.
///
/// # Errors
/// [`Error::Gpu`] if the GPU refuses.
pub(super) fn upload(
    data: &[&[u8]],
    layout: &MemoryLayout,
    to: &Buffer,
    stream: &Stream,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let device: &Device = stream.device();
    let largest = data.iter().map(|bytes| bytes.len()).max().unwrap_or(0).min(STAGING_BYTES);
    let mut staging = [device.pinned(largest, "loading weights")?, device.pinned(largest, "loading weights")?];
    let mut done = 0;
    let mut turn = 0;
    for (PlacedWeight { part, .. }, bytes) in layout.weights.iter().zip(data) {
        let mut offset = part.offset;
        for piece in bytes.chunks(largest.max(1)) {
            let buffer = &mut staging[turn];
            turn = 1 - turn;
            // Waits for the previous copy from this buffer; the one from the other buffer may still be running.
            let host = &mut buffer.bytes()?[..piece.len()];
            host.par_chunks_mut(PIECE_BYTES)
                .zip(piece.par_chunks(PIECE_BYTES))
                .for_each(|(to, from)| to.copy_from_slice(from));
            buffer.upload(0..piece.len(), to, offset, stream)?;
            offset += piece.len() as u64;
            done += piece.len() as u64;
            progress(done);
        }
    }
    stream.wait()
}
