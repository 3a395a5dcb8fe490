//! Weights of a checkpoint as matrices, whose elements may be spread over files and strides.

use std::borrow::Cow;
use std::ops::Range;

use super::sharded::{Shard, ShardedTensor};
use crate::mmap::MappedFile;
use crate::tensor::DType;

/// Maximum number of blocks of a weight. One of 32 layers, split over 8 ranks, has a few hundred.
const MAX_BLOCKS: usize = 1 << 16;

/// A validated weight: every element lies inside the checkpoint's files and is stored exactly once.
///
/// It is a matrix (a vector is one row), divided into bands of whole rows, and each band into blocks of columns.
#[derive(Debug)]
pub(super) struct Weight {
    /// Hugging Face's name.
    pub name: String,
    pub dtype: DType,
    /// `[rows, columns]`, or `[columns]`.
    pub shape: Vec<usize>,
    /// From the first row to the last.
    bands: Vec<Band>,
    blocks: Vec<ColumnBlock>,
}

#[derive(Debug)]
struct Band {
    rows: Range<usize>,
    /// Its range in [`Weight::blocks`], left to right.
    blocks: Range<usize>,
}

#[derive(Debug)]
struct ColumnBlock {
    columns: usize,
    file: usize,
    /// Offset in the file, in bytes, of the element in the band's first row and the block's first column.
    start: usize,
    /// Bytes from one row to the next, and from one column to the next.
    row_stride: usize,
    column_stride: usize,
}

/// A shard as rows and columns.
struct Rectangle<'s> {
    rows: Range<usize>,
    columns: Range<usize>,
    shard: &'s Shard,
}

impl Weight {
    /// Makes the weight `name` of `tensor`, whose shards lie in `files` and whose element type is `dtype`.
    ///
    /// # Errors
    /// If it has more than two axes, or its shards leave an element out, overlap, or end outside their file. The caller
    /// prefixes the checkpoint's name.
    pub fn new(name: String, dtype: DType, tensor: &ShardedTensor, files: &[MappedFile]) -> Result<Weight, String> {
        let refused = |detail: String| format!("`{name}`: {detail}");
        let columns = match tensor.shape[..] {
            [columns] | [_, columns] => columns,
            _ => return Err(refused(format!("{} axes, expected 1 or 2", tensor.shape.len()))),
        };
        let rows = if tensor.shape.len() == 2 { tensor.shape[0] } else { 1 };
        let rectangles = rectangles(tensor).map_err(refused)?;
        let (bands, blocks) = tile(&rectangles, rows, columns, dtype.bytes()).map_err(refused)?;
        let weight = Weight { name, dtype, shape: tensor.shape.clone(), bands, blocks };
        weight.check_places(files)?;
        Ok(weight)
    }

    /// A row-major weight at byte `start` of `file`. The caller has checked that it ends inside the file.
    pub fn contiguous(name: String, dtype: DType, shape: Vec<usize>, file: usize, start: usize) -> Weight {
        let columns = shape.last().copied().unwrap_or(1);
        let rows = if shape.len() > 1 { shape[0] } else { 1 };
        let (column_stride, row_stride) = (dtype.bytes(), columns * dtype.bytes());
        let block = ColumnBlock { columns, file, start, row_stride, column_stride };
        Weight { name, dtype, shape, bands: vec![Band { rows: 0..rows, blocks: 0..1 }], blocks: vec![block] }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Checks that every block ends inside its file.
    fn check_places(&self, files: &[MappedFile]) -> Result<(), String> {
        for band in &self.bands {
            for block in &self.blocks[band.blocks.clone()] {
                let bytes = files.get(block.file).map_or(0, |file| file.bytes().len());
                let last = (band.rows.len() - 1).checked_mul(block.row_stride).and_then(|rows| {
                    let columns = (block.columns - 1).checked_mul(block.column_stride)?;
                    block.start.checked_add(rows)?.checked_add(columns)?.checked_add(self.dtype.bytes())
                });
                if last.is_none_or(|end| end > bytes) {
                    let (name, rows) = (&self.name, &band.rows);
                    return Err(format!("`{name}`: rows {rows:?} lie outside their file of {bytes} bytes"));
                }
            }
        }
        Ok(())
    }

    /// Calls `visit` for each evenly strided run of the elements in `range` (row-major), in order, with the bytes from
    /// the run's first element on, the stride in bytes, and the number of elements.
    fn runs<'a>(&self, files: &'a [MappedFile], range: Range<usize>, visit: &mut dyn FnMut(&'a [u8], usize, usize)) {
        let (columns, width) = (self.columns(), self.dtype.bytes());
        let mut at = range.start;
        while at < range.end {
            let (row, column) = (at / columns, at % columns);
            let band = &self.bands[self.bands.partition_point(|band| band.rows.end <= row)];
            let mut left = column;
            for block in &self.blocks[band.blocks.clone()] {
                if left >= block.columns {
                    left -= block.columns;
                    continue;
                }
                let start = block.start + (row - band.rows.start) * block.row_stride + left * block.column_stride;
                let dense = block.columns == columns
                    && block.column_stride == width
                    && (block.row_stride == columns * width || band.rows.len() == 1);
                let to_end = if dense { (band.rows.end - row) * columns - left } else { block.columns - left };
                let count = to_end.min(range.end - at);
                let bytes = files[block.file].bytes();
                visit(&bytes[start..start + (count - 1) * block.column_stride + width], block.column_stride, count);
                at += count;
                left = 0;
                if at == range.end || dense {
                    break;
                }
            }
        }
    }
}

/// The shards of a tensor of one or two axes as rows and columns, without the empty ones.
fn rectangles(tensor: &ShardedTensor) -> Result<Vec<Rectangle<'_>>, String> {
    let mut rectangles = Vec::with_capacity(tensor.shards.len());
    for shard in &tensor.shards {
        let range = |axis: usize| {
            let (origin, size, all) = (*shard.origin.get(axis)?, *shard.shape.get(axis)?, *tensor.shape.get(axis)?);
            let end = origin.checked_add(size).filter(|end| *end <= all)?;
            shard.strides.get(axis).map(|_| origin..end)
        };
        let (rows, columns) = if tensor.shape.len() == 2 { (range(0), range(1)) } else { (Some(0..1), range(0)) };
        let (Some(rows), Some(columns)) = (rows, columns) else {
            let (origin, shape) = (&shard.origin, &shard.shape);
            return Err(format!(
                "a shard of shape {shape:?} at {origin:?} lies outside the tensor's shape {:?}",
                tensor.shape
            ));
        };
        let stride = |axis: usize| if axis < shard.strides.len() { shard.strides[axis] } else { 0 };
        let (row_stride, column_stride) = if tensor.shape.len() == 2 { (stride(0), stride(1)) } else { (0, stride(0)) };
        // Strides that repeat elements would let a small file claim a huge weight.
        let places = || {
            let rows = (rows.len() - 1).checked_mul(row_stride)?;
            rows.checked_add((columns.len() - 1).checked_mul(column_stride)?)?.checked_add(1)
        };
        if !rows.is_empty() && !columns.is_empty() {
            if places().is_none_or(|places| places < rows.len().saturating_mul(columns.len())) {
                return Err(format!("its strides {:?} repeat elements or overflow", shard.strides));
            }
            rectangles.push(Rectangle { rows, columns, shard });
        }
    }
    rectangles.sort_by_key(|rectangle| rectangle.rows.start);
    Ok(rectangles)
}

/// Cuts rectangles, sorted by their first rows, into bands and blocks that cover all `rows` and `columns` once.
fn tile(
    rectangles: &[Rectangle<'_>],
    rows: usize,
    columns: usize,
    width: usize,
) -> Result<(Vec<Band>, Vec<ColumnBlock>), String> {
    let mut cuts: Vec<usize> = rectangles.iter().flat_map(|r| [r.rows.start, r.rows.end]).chain([0, rows]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let (mut bands, mut blocks) = (Vec::new(), Vec::new());
    let mut waiting = rectangles.iter().peekable();
    let mut open: Vec<&Rectangle<'_>> = Vec::new();
    for (first, end) in cuts.iter().zip(cuts.iter().skip(1)) {
        open.retain(|rectangle| rectangle.rows.end > *first);
        while let Some(next) = waiting.next_if(|rectangle| rectangle.rows.start == *first) {
            open.push(next);
        }
        open.sort_by_key(|rectangle| rectangle.columns.start);
        if blocks.len() + open.len() > MAX_BLOCKS {
            return Err(format!("its shards divide it into more than {MAX_BLOCKS} blocks, the limit"));
        }
        let before = blocks.len();
        let mut covered = 0;
        for Rectangle { rows, columns, shard } in open.iter().copied() {
            if columns.start < covered {
                return Err(format!("two shards contain the element at row {first}, column {}", columns.start));
            }
            if columns.start > covered {
                break;
            }
            covered = columns.end;
            let row_stride = if shard.strides.len() == 2 { shard.strides[0] } else { 0 };
            let column_stride = shard.strides.last().copied().unwrap_or(1);
            let strides = row_stride.checked_mul(width).zip(column_stride.checked_mul(width));
            let placed = strides.and_then(|(row_stride, column_stride)| {
                let start = shard.start.checked_add((first - rows.start).checked_mul(row_stride)?)?;
                Some(ColumnBlock { columns: columns.len(), file: shard.file, start, row_stride, column_stride })
            });
            blocks.push(placed.ok_or("its strides overflow")?);
        }
        if covered < columns {
            return Err(format!("no shard contains the element at row {first}, column {covered}"));
        }
        bands.push(Band { rows: *first..*end, blocks: before..blocks.len() });
    }
    Ok((bands, blocks))
}

/// A named tensor of a checkpoint. Its elements stay in the checkpoint's files until they are read.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The tensor's name in Hugging Face's scheme, whichever file it came from.
    pub name: &'a str,
    /// Element type; F32, F16 or BF16.
    pub dtype: DType,
    /// Row-major shape: `[rows, columns]`, or `[columns]`.
    pub shape: &'a [usize],
    pub(super) weight: &'a Weight,
    pub(super) files: &'a [MappedFile],
}

impl<'a> TensorView<'a> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.weight.elements()
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> u64 {
        self.elements() as u64 * self.dtype.bytes() as u64
    }

    /// Elements `range` (row-major) as stored, little-endian: borrowed if they are contiguous in one file, otherwise
    /// copied.
    ///
    /// # Panics
    /// If the range is outside the tensor; callers index by the validated shape.
    pub fn raw(&self, range: Range<usize>) -> Cow<'a, [u8]> {
        assert!(range.start <= range.end && range.end <= self.elements(), "{range:?} of {:?}", self.shape);
        let (width, count) = (self.dtype.bytes(), range.len());
        let mut whole: Option<&'a [u8]> = None;
        let mut copied = Vec::new();
        self.weight.runs(self.files, range, &mut |bytes, stride, elements| {
            if elements == count && stride == width {
                whole = Some(bytes);
                return;
            }
            copied.reserve_exact(if copied.is_empty() { count * width } else { 0 });
            if stride == width {
                copied.extend_from_slice(&bytes[..elements * width]);
            } else {
                for element in 0..elements {
                    copied.extend_from_slice(&bytes[element * stride..element * stride + width]);
                }
            }
        });
        match whole {
            Some(bytes) => Cow::Borrowed(bytes),
            None => Cow::Owned(copied),
        }
    }

    /// Copies elements `start .. start + out.len()` (row-major) to `out` as f32; exact for every stored dtype.
    ///
    /// # Panics
    /// If the range is outside the tensor; callers index by the validated shape.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        let mut rest = out;
        let width = self.dtype.bytes();
        assert!(start + rest.len() <= self.elements(), "{start} of {:?}", self.shape);
        self.weight.runs(self.files, start..start + rest.len(), &mut |bytes, stride, elements| {
            let (out, after) = std::mem::take(&mut rest).split_at_mut(elements);
            rest = after;
            if stride == width {
                self.dtype.decode(bytes, out);
            } else {
                for (element, out) in out.iter_mut().enumerate() {
                    self.dtype.decode(&bytes[element * stride..element * stride + width], std::slice::from_mut(out));
                }
            }
        });
    }
}

#[cfg(test)]
mod tests;
