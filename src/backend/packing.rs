//! One pass over a checkpoint that fills files of weights, all of them at once.
//!
//! A file is a list of [`Item`]s in the order they are stored. Matrices are read in pieces of whole rows; what every file
//! makes of a piece (its numbers in another type or order, its codes) is made on all threads, while the piece before it
//! is hashed and written, each file and the checkpoint's digest by a thread of its own. So every matrix is read once,
//! whatever number of files hold it, provided that the files hold their matrices in the same order; where they do not, a
//! matrix is read again. No more than a few pieces are in memory, of a matrix that is stored transposed the whole of its
//! codes, and the scales that stand behind their codes.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};

use rayon::prelude::*;
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use super::constants::{ConstRows, RowForm, RowSource, SourceRows};
use crate::checkpoint::{Checkpoint, TensorView};
use crate::engine::PackageFile;
use crate::error::{Error, Result};
use crate::tensor_file;

/// Elements of a piece, or one unit's rows if they have more. Small enough to stay in a core's cache as FP32.
const PIECE_ELEMENTS: usize = 1 << 18;
/// Pieces that a thread makes before they are handed on.
const PIECES_PER_THREAD: usize = 4;
/// Elements of what is small: evaluated when its turn comes, whatever else reads the same tensor.
const SMALL_ELEMENTS: usize = 1 << 16;

/// Makes stored bytes of evaluated rows.
pub type StoreRows<'p> = Box<dyn Fn(&[f32]) -> Result<Vec<u8>> + Send + Sync + 'p>;
/// Writes what is stored, given the bytes of all rows.
pub type StoreAll = Box<dyn Fn(&[u8], &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> + Send + Sync>;

/// One tensor of a file.
pub struct Item<'p> {
    /// Its name in the file.
    pub name: &'p str,
    /// Its type and shape in the file.
    pub stored: (Dtype, Vec<usize>),
    /// Its content, `[rows, width]`.
    pub content: &'p ConstRows,
    /// `store` gets multiples of this many rows, but for the last. Scales come whole.
    pub unit: usize,
    /// The bytes of some rows of `content`, codes as numbers: see [`Scheme::bits`](crate::quantize::Scheme::bits).
    pub store: StoreRows<'p>,
    /// For what is not stored row by row: gets what `store` made of all rows.
    pub finish: Option<StoreAll>,
}

/// Where a file's bytes go, in order.
pub trait Sink: Send {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// Whatever keeps them from being written; nothing more is given then.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
}

impl Sink for PackageFile {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        PackageFile::write(self, bytes)
    }
}

impl<F: FnMut(&[u8]) -> Result<()> + Send> Sink for F {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self(bytes)
    }
}

/// A file of weights to be written.
pub struct File<'p> {
    /// Its tensors, in their order.
    pub items: Vec<Item<'p>>,
    /// Takes its bytes, header first.
    pub sink: &'p mut dyn Sink,
}

/// Follows a pass: gets the number of the checkpoint's bytes that were read since the last call, and may end it.
pub type Follow<'f> = dyn Fn(u64) -> Result<()> + Sync + 'f;

/// Writes the files. With `digest`, answers with the SHA-256 of every tensor of the checkpoint in its order, each over its
/// elements row-major as they are stored.
///
/// # Errors
/// [`Error::Format`](crate::Error::Format) naming tensor and position if a weight is NaN or infinite; what a sink or
/// `follow` returns.
pub fn pack(files: Vec<File<'_>>, checkpoint: &Checkpoint, digest: bool, follow: &Follow<'_>) -> Result<Vec<[u8; 32]>> {
    let mut digests = Digests { is_wanted: digest, finished: HashMap::new(), current: None };
    let mut queues = Vec::with_capacity(files.len());
    for file in files {
        let header: Vec<(&str, Dtype, Vec<usize>)> =
            file.items.iter().map(|item| (item.name, item.stored.0, item.stored.1.clone())).collect();
        file.sink.write(&tensor_file::encode_header(&header)?)?;
        queues.push(Queue { items: file.items.into_iter().collect(), sink: file.sink });
    }
    let mut scales = KeptScales::default();
    loop {
        for queue in &mut queues {
            queue.write_small(checkpoint, &mut scales, follow)?;
        }
        let Some(source) = next_source(&queues) else { break };
        pass_over(source, &mut queues, checkpoint, &mut digests, &mut scales, follow)?;
    }
    digests.of_all(checkpoint, follow)
}

/// Private memory that [`pack`] takes for files of these items, at most.
pub fn memory_bytes<'i, 'p: 'i>(files: impl Iterator<Item = &'i [Item<'p>]>) -> u64 {
    let (mut held, mut scales, mut in_flight) = (0u64, 0u64, 0u64);
    let mut pieces = 0u64;
    for items in files {
        let elements = |item: &Item<'_>| item.content.elements() as u64;
        // A matrix is held as codes, and with it what is gathered of it at a time.
        held += items.iter().filter(|item| item.finish.is_some()).map(elements).max().unwrap_or(0) * 9 / 8;
        scales += 4 * items.iter().filter(|item| item.is_scales()).map(elements).sum::<u64>();
        let piece = |item: &Item<'_>| (PIECE_ELEMENTS as u64).max(item.unit as u64 * item.content.columns() as u64);
        let piece = items.iter().filter(|item| elements(item) > SMALL_ELEMENTS as u64).map(piece).max().unwrap_or(0);
        // As numbers, evaluated, quantized and stored.
        in_flight += 8 * piece;
        pieces = pieces.max(4 * piece);
    }
    let threads = rayon::current_num_threads() as u64;
    held + scales + (in_flight + pieces) * threads * PIECES_PER_THREAD as u64 * 2
}

/// What is left to be written of a file.
struct Queue<'p> {
    items: VecDeque<Item<'p>>,
    sink: &'p mut dyn Sink,
}

/// The scales of a matrix's codes, found with them for an item behind.
struct Scales<'p> {
    content: &'p ConstRows,
    /// `[rows, blocks]`
    values: Vec<f32>,
    /// How many items will want them.
    wanted: usize,
}

/// Scales that an item behind will want.
#[derive(Default)]
struct KeptScales<'p> {
    found: Vec<Scales<'p>>,
}

impl Item<'_> {
    fn is_scales(&self) -> bool {
        matches!(self.content.form(), RowForm::Scales(_))
    }
}

impl<'p> Queue<'p> {
    /// Writes the items at the front that need no pass over a matrix.
    fn write_small(&mut self, checkpoint: &Checkpoint, scales: &mut KeptScales<'_>, follow: &Follow<'_>) -> Result<()> {
        while let Some(item) = self.items.front() {
            let is_small = item.content.elements() <= SMALL_ELEMENTS && item.finish.is_none();
            let values = match (item.content.form(), item.content.source()) {
                (RowForm::Scales(_), _) => match scales.take(item.content) {
                    Some(found) => found,
                    None => evaluated(item.content, checkpoint)?,
                },
                (RowForm::Values, RowSource::RotaryTable { .. }) => evaluated(item.content, checkpoint)?,
                (RowForm::Values, RowSource::Tensors(_)) if is_small => evaluated(item.content, checkpoint)?,
                (RowForm::Values | RowForm::Codes(_), _) => return Ok(()),
            };
            follow(0)?;
            self.sink.write(&(item.store)(&values)?)?;
            self.items.pop_front();
        }
        Ok(())
    }
}

/// All rows of a constant.
fn evaluated(content: &ConstRows, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
    let mut values = vec![0f32; content.rows() * content.width()];
    let rows_at_once = (PIECE_ELEMENTS / content.columns()).max(1);
    values
        .par_chunks_mut(rows_at_once * content.width())
        .enumerate()
        .try_for_each(|(index, values)| content.evaluate(checkpoint, index * rows_at_once, values))?;
    Ok(values)
}

impl KeptScales<'_> {
    fn take(&mut self, content: &ConstRows) -> Option<Vec<f32>> {
        let index = self.found.iter().position(|scales| scales.content == content)?;
        let scales = &mut self.found[index];
        scales.wanted -= 1;
        if scales.wanted > 0 { Some(scales.values.clone()) } else { Some(self.found.swap_remove(index).values) }
    }
}

/// The matrix to read next: one at the front of a file that no other file has farther back, if there is one.
fn next_source<'p>(queues: &[Queue<'p>]) -> Option<&'p RowSource> {
    let fronts = || queues.iter().filter_map(|queue| queue.items.front()).map(|item| item.content.source());
    let is_behind = |of: &RowSource| {
        queues.iter().any(|queue| {
            // Scales are kept for when their turn comes.
            let items = queue.items.iter().filter(|item| !item.is_scales());
            let mut sources = items.map(|item| item.content.source()).skip_while(|other| *other == of);
            sources.any(|other| other == of)
        })
    };
    fronts().find(|of| !is_behind(of)).or_else(|| fronts().next())
}

/// A file's part in a pass.
struct Part<'q, 'p> {
    item: Item<'p>,
    sink: &'q mut &'p mut dyn Sink,
    /// Bytes of the rows so far, if the item is not stored row by row.
    held: Vec<u8>,
}

/// What became of some rows of the source.
struct Piece<'c> {
    /// The rows as they are stored in the checkpoint, tensor by tensor.
    raw: Vec<(TensorView<'c>, Cow<'c, [u8]>)>,
    /// For each part.
    bytes: Vec<Vec<u8>>,
    /// For each of the scales that are kept.
    scales: Vec<Vec<f32>>,
}

/// Reads a matrix once and gives it to all files at whose front it is.
fn pass_over<'p>(
    source: &'p RowSource,
    queues: &mut [Queue<'p>],
    checkpoint: &Checkpoint,
    digests: &mut Digests,
    scales: &mut KeptScales<'p>,
    follow: &Follow<'_>,
) -> Result<()> {
    let mut kept: Vec<Scales<'p>> = Vec::new();
    for item in queues.iter().flat_map(|queue| &queue.items) {
        if !item.is_scales() || item.content.source() != source {
            continue;
        }
        match kept.iter_mut().find(|scales| scales.content == item.content) {
            Some(scales) => scales.wanted += 1,
            None => kept.push(Scales { content: item.content, values: Vec::new(), wanted: 1 }),
        }
    }
    let wanted: Vec<&ConstRows> = kept.iter().map(|scales| scales.content).collect();
    let mut parts: Vec<Part<'_, 'p>> = Vec::new();
    for Queue { items, sink } in queues.iter_mut() {
        if items.front().is_some_and(|item| item.content.source() == source)
            && let Some(item) = items.pop_front()
        {
            parts.push(Part { item, sink, held: Vec::new() });
        }
    }
    let mut shapes = parts.iter().map(|part| (part.item.content.rows(), part.item.content.columns()));
    let (rows, columns) = match shapes.next() {
        Some(shape) if shapes.all(|other| other == shape) => shape,
        Some((rows, columns)) => {
            let found = format!("{source:?} is read as {rows} rows of {columns} and in another shape");
            return Err(Error::internal(found, "one shape for a matrix"));
        }
        None => return Err(Error::internal(format!("no file reads {source:?} next"), "one of them to")),
    };
    let unit = parts.iter().map(|part| part.item.unit).max().unwrap_or(1);
    let rows_per_piece = (PIECE_ELEMENTS / columns).next_multiple_of(unit).max(unit);
    let rows_per_batch = rows_per_piece * rayon::current_num_threads() * PIECES_PER_THREAD;
    let make = |parts: &[&Item<'p>], first: usize| -> Result<Vec<Piece<'_>>> {
        let end = rows.min(first + rows_per_batch);
        (first..end)
            .into_par_iter()
            .step_by(rows_per_piece)
            .map(|first| {
                let mut block = SourceRows::read(source, checkpoint, first..end.min(first + rows_per_piece), columns)?;
                let bytes =
                    parts.iter().map(|item| (item.store)(&block.evaluate(item.content))).collect::<Result<_>>()?;
                let scales = wanted.iter().map(|content| block.evaluate(content).into_owned()).collect();
                Ok(Piece { raw: block.into_stored(), bytes, scales })
            })
            .collect()
    };
    let mut ready: Vec<Piece<'_>> = Vec::new();
    let mut first = 0;
    while first < rows || !ready.is_empty() {
        let pieces = std::mem::take(&mut ready);
        let (items, sinks): (Vec<&Item<'p>>, Vec<_>) =
            parts.iter_mut().map(|Part { item, sink, held }| (&*item, (item.finish.is_some(), sink, held))).unzip();
        let hand_on = || -> Result<()> {
            let written = || {
                sinks.into_par_iter().enumerate().try_for_each(|(index, (is_held, sink, held))| {
                    for piece in &pieces {
                        match is_held {
                            true => held.extend_from_slice(&piece.bytes[index]),
                            false => sink.write(&piece.bytes[index])?,
                        }
                    }
                    Ok(())
                })
            };
            let digested = || pieces.iter().for_each(|piece| digests.add(piece));
            let (written, ()) = rayon::join(written, digested);
            for piece in &pieces {
                follow(piece.raw.iter().map(|(_, bytes)| bytes.len() as u64).sum())?;
                for (scales, of_piece) in kept.iter_mut().zip(&piece.scales) {
                    scales.values.extend_from_slice(of_piece);
                }
            }
            written
        };
        let (handed_on, made) =
            rayon::join(hand_on, || if first < rows { make(&items, first) } else { Ok(Vec::new()) });
        handed_on?;
        ready = made?;
        first = rows.min(first + rows_per_batch);
    }
    for Part { item, sink, held } in parts {
        if let Some(finish) = &item.finish {
            finish(&held, &mut |bytes| sink.write(bytes))?;
        }
    }
    scales.found.append(&mut kept);
    Ok(())
}

/// The digests of tensors, each read in order.
struct Digests {
    is_wanted: bool,
    finished: HashMap<String, [u8; 32]>,
    /// The tensor that is being read, the elements so far as bytes, and their digest.
    current: Option<(String, u64, Sha256)>,
}

impl Digests {
    fn add(&mut self, piece: &Piece<'_>) {
        if !self.is_wanted {
            return;
        }
        for (view, bytes) in &piece.raw {
            if self.finished.contains_key(view.name) {
                continue;
            }
            let (mut so_far, mut digest) = match self.current.take() {
                Some((name, so_far, digest)) if name == view.name => (so_far, digest),
                _ => (0, Sha256::new()),
            };
            digest.update(bytes);
            so_far += bytes.len() as u64;
            if so_far == view.bytes() {
                self.finished.insert(view.name.to_owned(), digest.finalize().into());
            } else {
                self.current = Some((view.name.to_owned(), so_far, digest));
            }
        }
    }

    /// All tensors' digests in the checkpoint's order. Those that no pass went over (vectors) are read now.
    fn of_all(self, checkpoint: &Checkpoint, follow: &Follow<'_>) -> Result<Vec<[u8; 32]>> {
        if !self.is_wanted {
            return Ok(Vec::new());
        }
        let views: Vec<TensorView<'_>> = checkpoint.tensors().collect();
        views
            .par_iter()
            .map(|view| match self.finished.get(view.name) {
                Some(digest) => Ok(*digest),
                None => {
                    let mut digest = Sha256::new();
                    for first in (0..view.elements()).step_by(PIECE_ELEMENTS) {
                        let bytes = view.raw(first..view.elements().min(first + PIECE_ELEMENTS));
                        digest.update(&bytes);
                        follow(bytes.len() as u64)?;
                    }
                    Ok(digest.finalize().into())
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
