//! Tensors of distributed or strided checkpoints, assembled from their parts without copying.
//!
//! A [`ShardedTensor`] is a shape and the [`Shard`]s that make it up, each a rectangle of the tensor whose elements lie
//! in one file at fixed strides. Merging ranks, selecting a layer of a stack and slicing rows of a fused matrix are
//! arithmetic on offsets; no element is read.

use super::torch::{self, ElementType};

/// A rectangular part of a tensor, in one file. Every list has one entry per axis of the tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shard {
    /// Index of its first element in the tensor.
    pub origin: Vec<usize>,
    /// Size along each axis.
    pub shape: Vec<usize>,
    /// Strides, in elements.
    pub strides: Vec<usize>,
    /// Index of its file in the reader's list.
    pub file: usize,
    /// Offset of its first element in that file, in bytes. Readers check, with checked arithmetic, that the last
    /// element ends inside the file.
    pub start: usize,
}

/// A tensor as stored in files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ShardedTensor {
    /// Any type that torch stores.
    pub dtype: ElementType,
    /// Row-major shape; its product in bytes fits an `isize`.
    pub shape: Vec<usize>,
    /// In no order. `Weight::new` checks that they cover the tensor without overlap.
    pub shards: Vec<Shard>,
}

impl ShardedTensor {
    /// A tensor of a torch file that starts at byte `base` of `file`.
    pub fn of_torch(tensor: &torch::TorchTensor, file: usize, base: usize) -> ShardedTensor {
        let shard = Shard {
            origin: vec![0; tensor.shape.len()],
            shape: tensor.shape.clone(),
            strides: tensor.strides.clone(),
            file,
            start: base + tensor.storage.start + tensor.offset * tensor.dtype.bytes(),
        };
        ShardedTensor { dtype: tensor.dtype, shape: tensor.shape.clone(), shards: vec![shard] }
    }

    /// Concatenates the tensors of ranks along `axis`, in order.
    ///
    /// # Errors
    /// If shapes or types do not match. The caller prefixes the tensor's name.
    pub fn concat(parts: Vec<ShardedTensor>, axis: usize) -> Result<ShardedTensor, String> {
        let mut parts = parts.into_iter();
        let Some(mut whole) = parts.next() else { return Err("no rank has it".to_owned()) };
        for (rank, part) in parts.enumerate() {
            let differs = |(at, (one, other)): (usize, (&usize, &usize))| at != axis && one != other;
            let same_shape = whole.shape.len() == part.shape.len()
                && axis < whole.shape.len()
                && !whole.shape.iter().zip(&part.shape).enumerate().any(differs);
            if !same_shape || whole.dtype != part.dtype {
                return Err(format!(
                    "rank {} has {} {:?}, which cannot be concatenated with {} {:?} along axis {axis}",
                    rank + 1,
                    part.dtype,
                    part.shape,
                    whole.dtype,
                    whole.shape
                ));
            }
            let before = whole.shape[axis];
            let joined = before.checked_add(part.shape[axis]).ok_or("its size overflows")?;
            whole.shape[axis] = joined;
            whole.shards.extend(part.shards.into_iter().map(|mut shard| {
                shard.origin[axis] += before;
                shard
            }));
        }
        let bytes =
            whole.shape.iter().try_fold(whole.dtype.bytes(), |product, size| product.checked_mul((*size).max(1)));
        match bytes {
            Some(bytes) if bytes <= isize::MAX as usize => Ok(whole),
            _ => Err(format!("its shape {:?} exceeds the address space", whole.shape)),
        }
    }

    /// The slice at `index` of the first axis, which is dropped.
    ///
    /// # Errors
    /// If the index is out of range.
    pub fn at(&self, index: usize) -> Result<ShardedTensor, String> {
        let part = self.rows(index..index.saturating_add(1))?;
        let tail = |list: &[usize]| list.get(1..).unwrap_or_default().to_vec();
        let shards = part.shards.into_iter().map(|shard| Shard {
            origin: tail(&shard.origin),
            shape: tail(&shard.shape),
            strides: tail(&shard.strides),
            ..shard
        });
        Ok(ShardedTensor { dtype: part.dtype, shape: tail(&part.shape), shards: shards.collect() })
    }

    /// The slice `rows` of the first axis.
    ///
    /// # Errors
    /// If the range exceeds the axis.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Result<ShardedTensor, String> {
        match self.shape.first() {
            Some(all) if rows.start <= rows.end && rows.end <= *all => {}
            _ => return Err(format!("its shape {:?} does not have indices {rows:?} on the first axis", self.shape)),
        }
        let width = self.dtype.bytes();
        let cut = |shard: &Shard| {
            // A shard has as many axes as its tensor.
            let (origin, size, stride) = (*shard.origin.first()?, *shard.shape.first()?, *shard.strides.first()?);
            let first = rows.start.max(origin);
            let end = rows.end.min(origin + size);
            if first >= end {
                return None;
            }
            let mut shard = shard.clone();
            shard.origin[0] = first - rows.start;
            shard.shape[0] = end - first;
            shard.start += (first - origin) * stride * width;
            Some(shard)
        };
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        Ok(ShardedTensor { dtype: self.dtype, shape, shards: self.shards.iter().filter_map(cut).collect() })
    }
}
