//! Tensors in parts: what a distributed or strided checkpoint holds, put together without copying.
//!
//! A [`ShardedTensor`] is a shape and the [`Shard`]s that make it up, each a rectangle of the tensor whose elements lie
//! in one file at fixed strides. Merging ranks, taking a layer off a stack and cutting rows out of a fused matrix are
//! arithmetic on these places; no element is read.

use super::torch::{self, ElementType};

/// A rectangular part of a tensor, in one file. Every list has an entry for each axis of the tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shard {
    /// Index in the tensor of its first element.
    pub origin: Vec<usize>,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// From one index to the next, in elements.
    pub strides: Vec<usize>,
    /// Index of the file it lies in, in the list its reader keeps.
    pub file: usize,
    /// Byte of that file at which its first element starts. Whoever makes a shard has checked that its last element ends
    /// inside the file, with checked arithmetic.
    pub start: usize,
}

/// A tensor as files hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ShardedTensor {
    /// Any that torch stores.
    pub dtype: ElementType,
    /// Row-major shape; its product in bytes fits an `isize`.
    pub shape: Vec<usize>,
    /// In no order. That they cover the tensor, none twice, is checked where it becomes a weight.
    pub shards: Vec<Shard>,
}

impl ShardedTensor {
    /// A tensor of a torch file whose slice starts at byte `base` of `file`.
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

    /// Tensors of ranks, joined along `axis` in their order.
    ///
    /// # Errors
    /// The shapes or types that do not go together, for the caller to put the tensor's name before.
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
                    "rank {} holds {} {:?}, which does not continue {} {:?} along axis {axis}",
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
            _ => Err(format!("its shape {:?} takes more bytes than a machine can address", whole.shape)),
        }
    }

    /// The tensor at `index` of the first axis, which goes.
    ///
    /// # Errors
    /// That there is no such index.
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

    /// Indices `rows` of the first axis.
    ///
    /// # Errors
    /// That it has fewer.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Result<ShardedTensor, String> {
        match self.shape.first() {
            Some(all) if rows.start <= rows.end && rows.end <= *all => {}
            _ => return Err(format!("its shape is {:?}, without indices {rows:?} of the first axis", self.shape)),
        }
        let width = self.dtype.bytes();
        let cut = |shard: &Shard| {
            // Every shard of a tensor with axes has as many.
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
