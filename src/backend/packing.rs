//! Writes all weight files in a single pass over a checkpoint.
//!
//! A file is a list of [`PackItem`]s in storage order. Matrices are read in pieces of whole rows. Each piece is
//! converted for every file (dtype, layout, quantization) on all threads, while the previous piece is hashed and
//! written: one thread per file, and one for the checkpoint's digest. Each matrix is thus read once, however many files
//! store it, provided that the files order their matrices alike; otherwise a matrix is read again. Memory holds only a
//! few pieces, plus the codes of a whole matrix if it is stored transposed, plus the scales waiting to be written after
//! their codes.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::sync::OnceLock;

use rayon::prelude::*;
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use super::constants::{ConstRows, RowForm, RowSource, SourceRows};
use crate::checkpoint::{Checkpoint, TensorView};
use crate::engine::PackageFile;
use crate::error::{Error, Result};
use crate::tensor_file;

/// Elements of a piece, or one unit's rows if those are more. As FP32, a piece must stay in a core's cache.
const PIECE_ELEMENTS: usize = 1 << 18;
/// Pieces that each thread converts before the batch is handed to the writers.
const PIECES_PER_THREAD: usize = 4;
/// Items up to this size are evaluated when their turn comes, without sharing the read with other items.
const SMALL_ELEMENTS: usize = 1 << 16;

/// Rows of a piece of a matrix of `columns`, a multiple of `unit`.
pub(crate) fn rows_per_piece(columns: usize, unit: usize) -> usize {
    (PIECE_ELEMENTS / columns.max(1)).next_multiple_of(unit).max(unit)
}

/// Encodes evaluated rows as stored bytes.
pub type StoreRows<'p> = Box<dyn Fn(&[f32]) -> Result<Vec<u8>> + Send + Sync + 'p>;
/// Writes the stored form of a tensor, given the encoded bytes of all its rows.
pub type StoreAll = Box<dyn Fn(&[u8], &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> + Send + Sync>;

/// One tensor of a file.
pub struct PackItem<'p> {
    /// Name in the file.
    pub name: &'p str,
    /// Dtype and shape in the file.
    pub stored: (Dtype, Vec<usize>),
    /// Content, `[rows, width]`.
    pub content: &'p ConstRows,
    /// `store` is called with multiples of this many rows, except for the last call. Scales are passed whole.
    pub unit: usize,
    /// Encodes some rows of `content`; codes come as numbers, see [`Scheme::bits`](crate::quantize::Scheme::bits).
    pub store: StoreRows<'p>,
    /// For tensors that are not stored row by row: receives the output of `store` for all rows.
    pub finish: Option<StoreAll>,
}

/// Destination of a file's bytes, in order.
pub trait ByteSink: Send {
    /// Writes the next bytes.
    ///
    /// # Errors
    /// Whatever prevents the write; no further bytes are passed after an error.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
}

impl ByteSink for PackageFile {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        PackageFile::write(self, bytes)
    }
}

impl<F: FnMut(&[u8]) -> Result<()> + Send> ByteSink for F {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self(bytes)
    }
}

/// A weight file to write.
pub struct File<'p> {
    /// Its tensors, in order.
    pub items: Vec<PackItem<'p>>,
    /// Receives the file's bytes, header first.
    pub sink: &'p mut dyn ByteSink,
}

/// Progress callback: receives the number of checkpoint bytes read since the last call, and may abort the pass.
pub type Follow<'f> = dyn Fn(u64) -> Result<()> + Sync + 'f;

/// Writes the files. With `digest`, returns the SHA-256 of every checkpoint tensor, in order, each over its elements in
/// row-major order as stored.
///
/// # Errors
/// [`Error::Format`](crate::Error::Format) naming the tensor and position if a weight is NaN or infinite; any error of
/// a sink or of `follow`.
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

/// Starts the threads that pack weights: a machine that cannot start them is an error here rather than a panic later.
///
/// # Errors
/// [`Error::Request`] if they cannot be started.
pub fn start_threads() -> Result<()> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| match rayon::ThreadPoolBuilder::new().build_global() {
        Err(error) if std::error::Error::source(&error).is_some() => Err(error.to_string()),
        // They run already, or somebody else's do.
        Ok(()) | Err(_) => Ok(()),
    });
    started.clone().map_err(|error| Error::Request(format!("cannot start the threads that pack weights: {error}")))
}

/// Upper bound on the private memory that [`pack`] takes for files of these items.
pub fn memory_bytes<'i, 'p: 'i>(files: impl Iterator<Item = &'i [PackItem<'p>]>) -> u64 {
    let (mut held, mut scales, mut in_flight) = (0u64, 0u64, 0u64);
    let mut pieces = 0u64;
    for items in files {
        let elements = |item: &PackItem<'_>| item.content.elements() as u64;
        // A matrix that is stored as a whole is held as codes, plus the block being transposed.
        held += items.iter().filter(|item| item.finish.is_some()).map(elements).max().unwrap_or(0) * 9 / 8;
        scales += 4 * items.iter().filter(|item| item.is_scales()).map(elements).sum::<u64>();
        let piece = |item: &PackItem<'_>| (PIECE_ELEMENTS as u64).max(item.unit as u64 * item.content.columns() as u64);
        let piece = items.iter().filter(|item| elements(item) > SMALL_ELEMENTS as u64).map(piece).max().unwrap_or(0);
        // Each piece exists evaluated (FP32), quantized (FP32) and encoded.
        in_flight += 8 * piece;
        pieces = pieces.max(4 * piece);
    }
    let threads = rayon::current_num_threads() as u64;
    held + scales + (in_flight + pieces) * threads * PIECES_PER_THREAD as u64 * 2
}

/// Items of a file still to be written.
struct Queue<'p> {
    items: VecDeque<PackItem<'p>>,
    sink: &'p mut dyn ByteSink,
}

/// Scales computed together with their codes, kept for a later item.
struct Scales<'p> {
    content: &'p ConstRows,
    /// `[rows, blocks]`
    values: Vec<f32>,
    /// Number of items still to use them.
    wanted: usize,
}

/// Scales kept for later items.
#[derive(Default)]
struct KeptScales<'p> {
    found: Vec<Scales<'p>>,
}

impl PackItem<'_> {
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

/// Evaluates all rows of a constant.
fn evaluated(content: &ConstRows, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
    let mut values = vec![0f32; content.rows() * content.width()];
    let rows_at_once = rows_per_piece(content.columns(), 1);
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

/// The matrix to read next: one at the front of a file that no other file has farther back, if any.
fn next_source<'p>(queues: &[Queue<'p>]) -> Option<&'p RowSource> {
    let fronts = || queues.iter().filter_map(|queue| queue.items.front()).map(|item| item.content.source());
    let is_behind = |of: &RowSource| {
        queues.iter().any(|queue| {
            // Scales do not count: they are kept until their turn comes.
            let items = queue.items.iter().filter(|item| !item.is_scales());
            let mut sources = items.map(|item| item.content.source()).skip_while(|other| *other == of);
            sources.any(|other| other == of)
        })
    };
    fronts().find(|of| !is_behind(of)).or_else(|| fronts().next())
}

/// One file's item during a pass over its matrix.
struct ItemProgress<'q, 'p> {
    item: PackItem<'p>,
    sink: &'q mut &'p mut dyn ByteSink,
    /// Encoded rows so far, for an item that is not stored row by row.
    held: Vec<u8>,
}

/// A piece of the source, as encoded for every file.
struct PackedPiece<'c> {
    /// The rows as stored in the checkpoint, one entry per tensor.
    raw: Vec<(TensorView<'c>, Cow<'c, [u8]>)>,
    /// One entry per item in progress.
    bytes: Vec<Vec<u8>>,
    /// One entry per set of scales to keep.
    scales: Vec<Vec<f32>>,
}

/// Reads a matrix once and feeds it to all files that have it at the front.
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
    let mut parts: Vec<ItemProgress<'_, 'p>> = Vec::new();
    for Queue { items, sink } in queues.iter_mut() {
        if items.front().is_some_and(|item| item.content.source() == source)
            && let Some(item) = items.pop_front()
        {
            parts.push(ItemProgress { item, sink, held: Vec::new() });
        }
    }
    let mut shapes = parts.iter().map(|part| (part.item.content.rows(), part.item.content.columns()));
    let (rows, columns) = match shapes.next() {
        Some(shape) if shapes.all(|other| other == shape) => shape,
        Some((rows, columns)) => {
            let found = format!("{source:?} is read both as {rows} rows of {columns} and in another shape");
            return Err(Error::internal(found, "one shape for a matrix"));
        }
        None => return Err(Error::internal(format!("no file reads {source:?} next"), "one of them to")),
    };
    let unit = parts.iter().map(|part| part.item.unit).max().unwrap_or(1);
    let rows_per_piece = rows_per_piece(columns, unit);
    let rows_per_batch = rows_per_piece * rayon::current_num_threads() * PIECES_PER_THREAD;
    let make = |parts: &[&PackItem<'p>], first: usize| -> Result<Vec<PackedPiece<'_>>> {
        let end = rows.min(first + rows_per_batch);
        (first..end)
            .into_par_iter()
            .step_by(rows_per_piece)
            .map(|first| {
                let mut block = SourceRows::read(source, checkpoint, first..end.min(first + rows_per_piece), columns)?;
                let bytes =
                    parts.iter().map(|item| (item.store)(&block.evaluate(item.content))).collect::<Result<_>>()?;
                let scales = wanted.iter().map(|content| block.evaluate(content).into_owned()).collect();
                Ok(PackedPiece { raw: block.into_stored(), bytes, scales })
            })
            .collect()
    };
    let mut ready: Vec<PackedPiece<'_>> = Vec::new();
    let mut first = 0;
    while first < rows || !ready.is_empty() {
        let pieces = std::mem::take(&mut ready);
        let (items, sinks): (Vec<&PackItem<'p>>, Vec<_>) = parts
            .iter_mut()
            .map(|ItemProgress { item, sink, held }| (&*item, (item.finish.is_some(), sink, held)))
            .unzip();
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
    for ItemProgress { item, sink, held } in parts {
        if let Some(finish) = &item.finish {
            finish(&held, &mut |bytes| sink.write(bytes))?;
        }
    }
    scales.found.append(&mut kept);
    Ok(())
}

/// SHA-256 digests of tensors, each read in order.
struct Digests {
    is_wanted: bool,
    finished: HashMap<String, [u8; 32]>,
    /// The tensor being read, its bytes so far, and their digest.
    current: Option<(String, u64, Sha256)>,
}

impl Digests {
    fn add(&mut self, piece: &PackedPiece<'_>) {
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

    /// Digests of all tensors in the checkpoint's order. Tensors that no pass covered (vectors) are read now.
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
