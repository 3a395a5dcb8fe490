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

use super::constants::{evaluate, leaves, read_rows};
use crate::checkpoint::{Checkpoint, TensorView};
use crate::engine::PackageFile;
use crate::error::Result;
use crate::graph::Const;
use crate::quantize::Scheme;
use crate::tensor_file;

/// Elements of a piece, or one unit's rows if they have more. Small enough to stay in a core's cache as FP32.
const PIECE_ELEMENTS: usize = 1 << 18;
/// Pieces that a thread makes before they are handed on.
const PIECES_PER_THREAD: usize = 4;
/// Elements of what is small: evaluated when its turn comes, whatever else reads the same tensor.
const SMALL_ELEMENTS: usize = 1 << 16;

/// Makes stored bytes of evaluated rows.
type StoreRows<'p> = Box<dyn Fn(&[f32]) -> Result<Vec<u8>> + Send + Sync + 'p>;
/// Writes what is stored, given the bytes of all rows.
type StoreAll = Box<dyn Fn(&[u8], &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> + Send + Sync>;

/// One tensor of a file.
pub struct Item<'p> {
    /// Its name in the file.
    pub name: &'p str,
    /// Its type and shape in the file.
    pub stored: (Dtype, Vec<usize>),
    /// What it holds, `[rows, columns]`.
    pub expr: &'p Const,
    /// Rows of `expr`.
    pub rows: usize,
    /// Columns of `expr`.
    pub columns: usize,
    /// `store` gets multiples of this many rows, but for the last. Scales come whole.
    pub unit: usize,
    /// The bytes of some rows of `expr`, codes as numbers: see [`Scheme::bits`](crate::quantize::Scheme::bits).
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
        let Some(base) = next_base(&queues) else { break };
        pass_over(base, &mut queues, checkpoint, &mut digests, &mut scales, follow)?;
    }
    digests.of_all(checkpoint, follow)
}

/// Private memory that [`pack`] takes for files of these items, at most.
pub fn memory_bytes<'i, 'p: 'i>(files: impl Iterator<Item = &'i [Item<'p>]>) -> u64 {
    let (mut held, mut scales, mut in_flight) = (0u64, 0u64, 0u64);
    let mut pieces = 0u64;
    for items in files {
        let elements = |item: &Item<'_>| item.rows as u64 * item.columns as u64;
        // A matrix is held as codes, and with it what is gathered of it at a time.
        held += items.iter().filter(|item| item.finish.is_some()).map(elements).max().unwrap_or(0) * 9 / 8;
        scales += 4 * items.iter().filter(|item| matches!(item.expr, Const::Scales { .. })).map(elements).sum::<u64>();
        let piece = |item: &Item<'_>| (PIECE_ELEMENTS as u64).max(item.unit as u64 * read_columns(item) as u64);
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
    matrix: &'p Const,
    scheme: Scheme,
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

impl<'p> Queue<'p> {
    /// Writes the items at the front that need no pass over a matrix.
    fn write_small(&mut self, checkpoint: &Checkpoint, scales: &mut KeptScales<'_>, follow: &Follow<'_>) -> Result<()> {
        while let Some(item) = self.items.front() {
            let elements = item.rows.saturating_mul(item.columns);
            let values = match item.expr {
                Const::Scales { matrix, scheme, .. } => match scales.take(matrix, *scheme) {
                    Some(found) => found,
                    None => evaluated(item, checkpoint)?,
                },
                Const::RotaryTable { .. } => evaluated(item, checkpoint)?,
                Const::Codes(..) => return Ok(()),
                _ if elements <= SMALL_ELEMENTS && item.finish.is_none() => evaluated(item, checkpoint)?,
                _ => return Ok(()),
            };
            follow(0)?;
            self.sink.write(&(item.store)(&values)?)?;
            self.items.pop_front();
        }
        Ok(())
    }
}

fn evaluated(item: &Item<'_>, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
    let mut values = vec![0f32; item.rows * item.columns];
    let rows_at_once = (PIECE_ELEMENTS / read_columns(item)).max(1);
    values
        .par_chunks_mut(rows_at_once * item.columns.max(1))
        .enumerate()
        .try_for_each(|(index, values)| read_rows(item.expr, checkpoint, index * rows_at_once, item.columns, values))?;
    Ok(values)
}

/// Columns of the matrix that an item is made of.
fn read_columns(item: &Item<'_>) -> usize {
    match item.expr {
        Const::Scales { columns, .. } => (*columns).max(1),
        _ => item.columns.max(1),
    }
}

impl KeptScales<'_> {
    fn take(&mut self, matrix: &Const, scheme: Scheme) -> Option<Vec<f32>> {
        let index = self.found.iter().position(|scales| scales.matrix == matrix && scales.scheme == scheme)?;
        let scales = &mut self.found[index];
        scales.wanted -= 1;
        if scales.wanted > 0 { Some(scales.values.clone()) } else { Some(self.found.swap_remove(index).values) }
    }
}

/// What an expression's rows are made of: a tensor, or matrices one above the other.
fn base(expr: &Const) -> &Const {
    match expr {
        Const::AddScalar(inner, _) | Const::Cast(inner, _) | Const::Codes(inner, _) => base(inner),
        Const::Scales { matrix, .. } => base(matrix),
        Const::Tensor(_) | Const::ConcatRows(_) | Const::RotaryTable { .. } => expr,
    }
}

/// The matrix to read next: one at the front of a file that no other file has farther back, if there is one.
fn next_base<'p>(queues: &[Queue<'p>]) -> Option<&'p Const> {
    let fronts = || queues.iter().filter_map(|queue| queue.items.front()).map(|item| base(item.expr));
    let is_behind = |of: &Const| {
        queues.iter().any(|queue| {
            // Scales are kept for when their turn comes.
            let items = queue.items.iter().filter(|item| !matches!(item.expr, Const::Scales { .. }));
            let mut bases = items.map(|item| base(item.expr)).skip_while(|other| *other == of);
            bases.any(|other| other == of)
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

/// What became of some rows of the base.
struct Piece<'c> {
    /// The rows as they are stored in the checkpoint, tensor by tensor.
    raw: Vec<(TensorView<'c>, Cow<'c, [u8]>)>,
    /// For each part.
    bytes: Vec<Vec<u8>>,
    /// For each matrix and scheme whose scales are kept.
    scales: Vec<Vec<f32>>,
}

/// Reads a matrix once and gives it to all files at whose front it is.
fn pass_over<'p>(
    of: &'p Const,
    queues: &mut [Queue<'p>],
    checkpoint: &Checkpoint,
    digests: &mut Digests,
    scales: &mut KeptScales<'p>,
    follow: &Follow<'_>,
) -> Result<()> {
    let mut kept: Vec<Scales<'p>> = Vec::new();
    for item in queues.iter().flat_map(|queue| &queue.items) {
        let Const::Scales { matrix, scheme, .. } = item.expr else { continue };
        if base(matrix) != of {
            continue;
        }
        match kept.iter_mut().find(|scales| *scales.matrix == **matrix && scales.scheme == *scheme) {
            Some(scales) => scales.wanted += 1,
            None => kept.push(Scales { matrix, scheme: *scheme, values: Vec::new(), wanted: 1 }),
        }
    }
    let keys: Vec<(&Const, Scheme)> = kept.iter().map(|scales| (scales.matrix, scales.scheme)).collect();
    let mut parts: Vec<Part<'_, 'p>> = Vec::new();
    for Queue { items, sink } in queues.iter_mut() {
        if items.front().is_some_and(|item| base(item.expr) == of)
            && let Some(item) = items.pop_front()
        {
            parts.push(Part { item, sink, held: Vec::new() });
        }
    }
    let Some((rows, columns)) = parts.first().map(|part| (part.item.rows, part.item.columns)) else { return Ok(()) };
    let unit = parts.iter().map(|part| part.item.unit).max().unwrap_or(1);
    let rows_per_piece = (PIECE_ELEMENTS / columns.max(1)).next_multiple_of(unit).max(unit);
    let rows_per_batch = rows_per_piece * rayon::current_num_threads() * PIECES_PER_THREAD;
    let make = |parts: &[&Item<'p>], first: usize| -> Result<Vec<Piece<'_>>> {
        let end = rows.min(first + rows_per_batch);
        (first..end)
            .into_par_iter()
            .step_by(rows_per_piece)
            .map(|first| make_piece(of, parts, &keys, checkpoint, first..end.min(first + rows_per_piece), columns))
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

/// Reads rows of a matrix and makes of them what each item stores.
fn make_piece<'c>(
    of: &Const,
    items: &[&Item<'_>],
    keys: &[(&Const, Scheme)],
    checkpoint: &'c Checkpoint,
    rows: std::ops::Range<usize>,
    columns: usize,
) -> Result<Piece<'c>> {
    let mut values = vec![0f32; rows.len() * columns];
    let mut raw = Vec::new();
    match leaves(of, checkpoint)? {
        Some(leaves) => {
            let mut above = 0;
            for view in leaves {
                let own = view.elements() / columns.max(1);
                let (first, end) = (rows.start.max(above), rows.end.min(above + own));
                if first < end {
                    let bytes = view.raw((first - above) * columns..(end - above) * columns);
                    let out = &mut values[(first - rows.start) * columns..(end - rows.start) * columns];
                    view.dtype.decode(&bytes, out);
                    super::constants::check_finite(&view, checkpoint, first - above, columns, out)?;
                    raw.push((view, bytes));
                }
                above += own;
            }
        }
        None => read_rows(of, checkpoint, rows.start, columns, &mut values)?,
    }
    // Codes and scales by matrix and scheme: the same for every file.
    let mut quantized: Vec<(&Const, Scheme, Vec<f32>, Vec<f32>)> = Vec::new();
    let needed = items
        .iter()
        .filter_map(|item| match item.expr {
            Const::Codes(matrix, scheme) => Some((&**matrix, *scheme)),
            _ => None,
        })
        .chain(keys.iter().copied());
    for (matrix, scheme) in needed {
        if quantized.iter().any(|(of, by, ..)| *of == matrix && *by == scheme) {
            continue;
        }
        let mut codes = evaluate(matrix, of, &values).into_owned();
        let mut scales = vec![0f32; rows.len() * scheme.blocks(columns)];
        scheme.quantize(columns, &mut codes, &mut scales);
        quantized.push((matrix, scheme, codes, scales));
    }
    let find =
        |matrix: &Const, scheme: Scheme| quantized.iter().find(move |(of, by, ..)| *of == matrix && *by == scheme);
    let bytes = items.iter().map(|item| match item.expr {
        Const::Codes(matrix, scheme) => {
            (item.store)(find(matrix, *scheme).map_or(&[][..], |(_, _, codes, _)| codes.as_slice()))
        }
        // Numbers of a type are not changed by being rounded to it.
        Const::Cast(inner, dtype)
            if **inner == *of && raw.iter().all(|(view, _)| view.dtype == *dtype) && !raw.is_empty() =>
        {
            (item.store)(&values)
        }
        expr => (item.store)(&evaluate(expr, of, &values)),
    });
    let bytes = bytes.collect::<Result<_>>()?;
    let scales = keys
        .iter()
        .map(|(matrix, scheme)| find(matrix, *scheme).map_or_else(Vec::new, |(.., scales)| scales.clone()))
        .collect();
    Ok(Piece { raw, bytes, scales })
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
