//! The CPU's plan: kernel calls in order over one arena, and the weights they read. Stored as JSON in the engine
//! package, so it is checked in full before it runs.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::kernels::attention::{LANES, MAX_HEAD_DIM};
use super::kernels::matmul::{PANEL, Weight, panel_elements};
use super::kernels::quantized::code_rows;
use crate::backend::Limits;
use crate::error::clip;
use crate::tensor::DType;

/// Version of this format; a package of another version is refused.
pub const PROGRAM_VERSION: u32 = 1;
/// Alignment of buffers in the arena and of weights in their file, in bytes.
pub const ALIGN: usize = 64;

/// A scheduled program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// [`PROGRAM_VERSION`].
    pub version: u32,
    /// The limits that the arena was planned for.
    pub limits: Limits,
    /// The caches.
    pub cache: CacheSpec,
    /// What the kernels read from the weights file.
    pub weights: Vec<WeightSpec>,
    /// Places in the arena; those whose lives do not overlap share bytes.
    pub buffers: Vec<BufferSpec>,
    /// Size of the arena.
    pub arena_bytes: usize,
    /// The calls, in order.
    pub kernels: Vec<Kernel>,
    /// Buffer that holds the logits at the end, `f32[logits rows, vocab_size]`.
    pub logits: usize,
}

/// One KV cache per layer, `[slots, kv_heads, capacity, padded head_dim]`, keys and values each; how a head lies in it
/// is told in [`super::kernels::attention`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSpec {
    /// Layers.
    pub layers: usize,
    /// Heads of keys and of values.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// F32 or BF16.
    pub dtype: DType,
}

impl CacheSpec {
    /// Bytes of keys and values of one token of one slot.
    pub fn bytes_per_token(&self) -> usize {
        2 * self.layers * self.kv_heads * self.padded_dim() * self.dtype.bytes()
    }

    /// Width of a head in memory: padded with zeros to whole vectors.
    pub fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of one head of one slot's keys (or values): whole groups of positions.
    pub fn head_elements(&self, limits: &Limits) -> Option<usize> {
        limits.max_sequence_tokens.checked_next_multiple_of(LANES)?.checked_mul(self.padded_dim())
    }

    /// Elements of one slot of one layer's keys (or values).
    pub fn slot_elements(&self, limits: &Limits) -> Option<usize> {
        self.kv_heads.checked_mul(self.head_elements(limits)?)
    }

    /// Bytes of all caches.
    pub fn total_bytes(&self, limits: &Limits) -> Option<usize> {
        self.slot_elements(limits)?
            .checked_mul(limits.slots)?
            .checked_mul(self.layers)?
            .checked_mul(2 * self.dtype.bytes())
    }
}

/// How a weight lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// `[rows, columns]`, row-major.
    Table,
    /// Panels of a matrix product: see [`super::kernels::matmul`], and for codes [`super::kernels::quantized`].
    Panels,
}

/// A weight of the package: logical shape `[rows, columns]`, stored as `layout` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightSpec {
    /// Name in the weights file.
    pub name: String,
    /// Storage.
    pub layout: Layout,
    /// Element type.
    pub dtype: DType,
    /// Rows; outputs of a product.
    pub rows: usize,
    /// Columns; inputs of a product.
    pub columns: usize,
}

impl WeightSpec {
    /// Shape in the weights file.
    pub fn stored_shape(&self) -> Vec<usize> {
        match (self.layout, self.dtype) {
            (Layout::Table, _) => vec![self.rows, self.columns],
            (Layout::Panels, DType::BF16) => vec![self.rows.div_ceil(PANEL), self.columns.div_ceil(2), PANEL, 2],
            (Layout::Panels, dtype) if dtype.is_code() => {
                vec![self.rows.div_ceil(PANEL), code_rows(dtype, self.columns), PANEL]
            }
            (Layout::Panels, _) => vec![self.rows.div_ceil(PANEL), self.columns, PANEL],
        }
    }

    /// Elements of one panel, padding included; pairs of I4 codes.
    pub fn panel_elements(&self) -> usize {
        match self.dtype {
            DType::BF16 => panel_elements::<half::bf16>(self.columns),
            dtype if dtype.is_code() => code_rows(dtype, self.columns) * PANEL,
            _ => panel_elements::<f32>(self.columns),
        }
    }

    /// Bytes in the weights file; `None` if that overflows.
    pub fn stored_bytes(&self) -> Option<usize> {
        self.stored_shape().iter().try_fold(self.dtype.bytes(), |bytes, n| bytes.checked_mul(*n))
    }
}

/// How many rows a buffer has in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowCount {
    /// One per new token.
    Tokens,
    /// One per wanted row of logits.
    LogitsRows,
}

impl RowCount {
    /// The most there can be.
    pub fn max(self, limits: &Limits) -> usize {
        match self {
            RowCount::Tokens => limits.max_step_tokens,
            RowCount::LogitsRows => limits.max_logits_rows,
        }
    }
}

/// A buffer: `[rows, width]`, row-major, at `offset` bytes in the arena.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BufferSpec {
    /// The graph value it first holds.
    pub name: String,
    /// Rows in a step.
    pub rows: RowCount,
    /// Elements of a row.
    pub width: usize,
    /// F32 or BF16.
    pub dtype: DType,
    /// Bytes from the start of the arena, a multiple of [`ALIGN`].
    pub offset: usize,
}

impl BufferSpec {
    /// Bytes at the limits.
    pub fn max_bytes(&self, limits: &Limits) -> Option<usize> {
        self.rows.max(limits).checked_mul(self.width)?.checked_mul(self.dtype.bytes())
    }
}

/// Columns of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Index in [`Program::buffers`].
    pub buffer: usize,
    /// First column.
    pub column: usize,
    /// Number of columns.
    pub width: usize,
}

/// What a gather looks up with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Indices {
    /// The step's token ids, below the vocabulary.
    TokenIds,
    /// The tokens' positions, below `max_sequence_tokens`.
    Positions,
    /// Rows of the step whose logits are wanted, below its tokens.
    LogitsRows,
}

/// What a gather reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Table {
    /// A weight.
    Weight(usize),
    /// A buffer of the step.
    View(View),
}

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheKind {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// What a product does with its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Epilogue {
    /// Stores them.
    Store,
    /// Stores `max(sum, 0)²`.
    Relu2,
    /// Adds them to what is there.
    Accumulate,
}

/// One call. Views that are read and written never overlap. `out` is a buffer's index; `weight`, `gamma` and `beta`
/// are weights'.
#[allow(missing_docs)] // the fields are the operands that each variant's line names
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Kernel {
    /// Rows of a table to `out` (F32).
    Gather { indices: Indices, table: Table, out: usize },
    /// LayerNorm of `x` (F32); `gamma` and `beta` are weights.
    LayerNorm { x: View, gamma: usize, beta: usize, eps: f32, out: usize },
    /// `x · weightᵀ`; `x` has the weight's dtype.
    Linear { x: View, weight: usize, epilogue: Epilogue, out: usize },
    /// `x · weightᵀ` with `weight[o, i] = codes[o, i] · scales[o, i / block]`; `x` is F32 or BF16.
    QuantizedLinear { x: View, codes: usize, scales: usize, block: usize, epilogue: Epilogue, out: usize },
    /// `scale` times the nearest E4M3 float to `x / scale`, within its range
    RoundToF8 { x: View, scale: f32, out: usize },
    /// Rotates the heads of `x` (F32) by `cos` and `sin`.
    Rotary { x: View, cos: View, sin: View, head_dim: usize, out: usize },
    /// Writes `x` to the cache behind each sequence's past tokens.
    Store { x: View, layer: usize, kind: CacheKind },
    /// Attention of `q` (F32) over the layer's cache.
    Attention { q: View, layer: usize, scale: f32, out: usize },
    /// To the dtype of `out`.
    Convert { x: View, out: usize },
    /// `max(x, 0)²`
    Relu2 { x: View, out: usize },
    /// `x + scalar`
    AddScalar { x: View, scalar: f32, out: usize },
    /// `x + y` (F32)
    Add { x: View, y: View, out: usize },
}

impl Kernel {
    /// The buffers it reads, those that it updates in place included.
    pub fn reads(&self) -> Vec<View> {
        match *self {
            Kernel::Gather { table: Table::View(view), .. } => vec![view],
            Kernel::Gather { .. } => vec![],
            Kernel::LayerNorm { x, .. } | Kernel::Linear { x, .. } | Kernel::Store { x, .. } => vec![x],
            Kernel::QuantizedLinear { x, .. } | Kernel::RoundToF8 { x, .. } => vec![x],
            Kernel::Convert { x, .. } | Kernel::Relu2 { x, .. } | Kernel::AddScalar { x, .. } => vec![x],
            Kernel::Rotary { x, cos, sin, .. } => vec![x, cos, sin],
            Kernel::Attention { q, .. } => vec![q],
            Kernel::Add { x, y, .. } => vec![x, y],
        }
    }

    /// The buffer it writes, and whether it also reads it.
    pub fn writes(&self) -> Option<(usize, bool)> {
        match *self {
            Kernel::Linear { epilogue, out, .. } | Kernel::QuantizedLinear { epilogue, out, .. } => {
                Some((out, epilogue == Epilogue::Accumulate))
            }
            Kernel::Gather { out, .. }
            | Kernel::LayerNorm { out, .. }
            | Kernel::Rotary { out, .. }
            | Kernel::Attention { out, .. }
            | Kernel::Convert { out, .. }
            | Kernel::Relu2 { out, .. }
            | Kernel::RoundToF8 { out, .. }
            | Kernel::AddScalar { out, .. }
            | Kernel::Add { out, .. } => Some((out, false)),
            Kernel::Store { .. } => None,
        }
    }
}

impl fmt::Display for Program {
    /// One line a kernel, for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |buffer: &usize| clip(self.buffers.get(*buffer).map_or("?", |b| b.name.as_str()));
        let weight = |index: &usize| clip(self.weights.get(*index).map_or("?", |w| w.name.as_str()));
        for kernel in &self.kernels {
            let reads: Vec<String> = kernel.reads().iter().map(|v| name(&v.buffer)).collect();
            let reads = reads.join(", ");
            match kernel {
                Kernel::Gather { indices, table: Table::Weight(w), out } => {
                    writeln!(f, "{} = gather {}[{indices:?}]", name(out), weight(w))?
                }
                Kernel::Gather { indices, out, .. } => writeln!(f, "{} = gather {reads}[{indices:?}]", name(out))?,
                Kernel::Linear { weight: w, epilogue, out, .. } => {
                    writeln!(f, "{} = linear {epilogue:?} ({reads}; {})", name(out), weight(w))?
                }
                Kernel::QuantizedLinear { codes, scales, epilogue, out, .. } => writeln!(
                    f,
                    "{} = quantized_linear {epilogue:?} ({reads}; {}, {})",
                    name(out),
                    weight(codes),
                    weight(scales)
                )?,
                Kernel::Store { layer, kind, .. } => writeln!(f, "cache {layer} {kind:?} <- {reads}")?,
                Kernel::Attention { layer, out, .. } => {
                    writeln!(f, "{} = attention ({reads}; cache {layer})", name(out))?
                }
                Kernel::LayerNorm { out, .. } => writeln!(f, "{} = layer_norm ({reads})", name(out))?,
                Kernel::Rotary { out, .. } => writeln!(f, "{} = rotary ({reads})", name(out))?,
                Kernel::Convert { out, .. } => writeln!(f, "{} = convert ({reads})", name(out))?,
                Kernel::Relu2 { out, .. } => writeln!(f, "{} = relu2 ({reads})", name(out))?,
                Kernel::RoundToF8 { scale, out, .. } => writeln!(f, "{} = round_to_f8 {scale} ({reads})", name(out))?,
                Kernel::AddScalar { out, .. } => writeln!(f, "{} = add_scalar ({reads})", name(out))?,
                Kernel::Add { out, .. } => writeln!(f, "{} = add ({reads})", name(out))?,
            }
        }
        Ok(())
    }
}

impl Program {
    /// Checks everything that running the program relies on; the error says what does not fit.
    pub fn validate(&self) -> Result<(), String> {
        // Names in the message are the file's.
        self.check_all().map_err(clip)
    }

    fn check_all(&self) -> Result<(), String> {
        if self.version != PROGRAM_VERSION {
            return Err(format!("program version {}, this aotron runs version {PROGRAM_VERSION}", self.version));
        }
        let l = &self.limits;
        for (what, n) in [
            ("slots", l.slots),
            ("max_sequence_tokens", l.max_sequence_tokens),
            ("max_step_tokens", l.max_step_tokens),
            ("max_logits_rows", l.max_logits_rows),
            ("vocab_size", l.vocab_size),
            ("kv_heads", self.cache.kv_heads),
            ("head_dim", self.cache.head_dim),
        ] {
            if n == 0 || n > u32::MAX as usize {
                return Err(format!("{what} is {n}"));
            }
        }
        if self.cache.head_dim > MAX_HEAD_DIM {
            return Err(format!("head_dim is {}, at most {MAX_HEAD_DIM} is supported", self.cache.head_dim));
        }
        if !is_float(self.cache.dtype) || self.cache.total_bytes(l).is_none() {
            return Err("the KV cache cannot be laid out".into());
        }
        for w in &self.weights {
            let stored = is_float(w.dtype) || (w.dtype.is_code() && w.layout == Layout::Panels);
            if w.rows == 0 || w.columns == 0 || w.stored_bytes().is_none() || !stored {
                return Err(format!("weight {} has shape [{}, {}] of {}", w.name, w.rows, w.columns, w.dtype));
            }
        }
        for b in &self.buffers {
            let end = b.max_bytes(l).and_then(|bytes| b.offset.checked_add(bytes));
            let inside = end.is_some_and(|end| end <= self.arena_bytes);
            if b.width == 0 || !is_float(b.dtype) || !b.offset.is_multiple_of(ALIGN) || !inside {
                return Err(format!("buffer {} does not lie in the arena of {} bytes", b.name, self.arena_bytes));
            }
        }
        let mut written = vec![false; self.buffers.len()];
        for (index, kernel) in self.kernels.iter().enumerate() {
            self.check(kernel).map_err(|e| format!("kernel {index}: {e}"))?;
            let updated = kernel.writes().and_then(|(out, reads)| reads.then_some(out));
            if let Some(early) = kernel.reads().iter().map(|v| v.buffer).chain(updated).find(|b| !written[*b]) {
                return Err(format!("kernel {index}: it reads {} before it is written", self.buffers[early].name));
            }
            if let Some((out, _)) = kernel.writes() {
                written[out] = true;
            }
        }
        let logits = self.buffer(self.logits)?;
        if logits.width != l.vocab_size || logits.dtype != DType::F32 || logits.rows != RowCount::LogitsRows {
            return Err(format!("the logits are in {}, which is not f32[logits rows, {}]", logits.name, l.vocab_size));
        }
        Ok(())
    }

    fn buffer(&self, index: usize) -> Result<&BufferSpec, String> {
        self.buffers.get(index).ok_or_else(|| format!("there is no buffer {index}"))
    }

    fn weight(&self, index: usize) -> Result<&WeightSpec, String> {
        self.weights.get(index).ok_or_else(|| format!("there is no weight {index}"))
    }

    fn check(&self, kernel: &Kernel) -> Result<(), String> {
        for view in kernel.reads() {
            let buffer = self.buffer(view.buffer)?;
            if view.width == 0 || view.column.checked_add(view.width).is_none_or(|end| end > buffer.width) {
                return Err(format!("columns {} + {} are outside {}", view.column, view.width, buffer.name));
            }
        }
        let mut out_rows = None;
        if let Some((out, _)) = kernel.writes() {
            let out = self.buffer(out)?;
            out_rows = Some(out.rows);
            let bytes = |b: &BufferSpec| b.offset..b.offset + b.max_bytes(&self.limits).unwrap_or(0);
            let written = bytes(out);
            for view in kernel.reads() {
                let read = bytes(self.buffer(view.buffer)?);
                if read.start < written.end && written.start < read.end {
                    return Err(format!("it reads and writes the bytes of {}", out.name));
                }
            }
        }
        let view = |v: View, width: usize, dtype: DType| -> Result<(), String> {
            let b = self.buffer(v.buffer)?;
            let rows_fit = out_rows.is_none_or(|rows| rows == b.rows);
            (v.width == width && b.dtype == dtype && rows_fit)
                .then_some(())
                .ok_or_else(|| format!("{} is {}[{}], expected {dtype}[{width}]", b.name, b.dtype, v.width))
        };
        let writes = |out: usize, width: usize, dtypes: &[DType]| -> Result<(), String> {
            let b = self.buffer(out)?;
            (b.width == width && dtypes.contains(&b.dtype))
                .then_some(())
                .ok_or_else(|| format!("{} is {}[{}], expected width {width}", b.name, b.dtype, b.width))
        };
        const F32: &[DType] = &[DType::F32];
        const FLOATS: &[DType] = &[DType::F32, DType::BF16];
        match *kernel {
            Kernel::Gather { indices, table, out } => {
                let (rows, of_tokens) = match indices {
                    Indices::TokenIds => (self.limits.vocab_size, true),
                    Indices::Positions => (self.limits.max_sequence_tokens, true),
                    Indices::LogitsRows => (self.limits.max_step_tokens, false),
                };
                if (out_rows == Some(RowCount::Tokens)) != of_tokens {
                    return Err(format!("{indices:?} do not match the rows of the output"));
                }
                match table {
                    Table::Weight(w) => {
                        let w = self.weight(w)?;
                        if w.layout != Layout::Table || w.rows < rows || indices == Indices::LogitsRows {
                            return Err(format!("{} is no table of {rows} rows", w.name));
                        }
                        writes(out, w.columns, F32)
                    }
                    Table::View(v) => {
                        let b = self.buffer(v.buffer)?;
                        if indices != Indices::LogitsRows || b.rows != RowCount::Tokens || b.dtype != DType::F32 {
                            return Err(format!("{} cannot be gathered from by {indices:?}", b.name));
                        }
                        writes(out, v.width, F32)
                    }
                }
            }
            Kernel::LayerNorm { x, gamma, beta, eps, out } => {
                view(x, x.width, DType::F32)?;
                for w in [self.weight(gamma)?, self.weight(beta)?] {
                    let fits =
                        w.layout == Layout::Table && w.dtype == DType::F32 && (w.rows, w.columns) == (1, x.width);
                    if !fits {
                        return Err(format!("{} is not f32[{}]", w.name, x.width));
                    }
                }
                if !(eps.is_finite() && eps > 0.0) {
                    return Err(format!("eps is {eps}"));
                }
                writes(out, x.width, FLOATS)
            }
            Kernel::Linear { x, weight, epilogue, out } => {
                let w = self.weight(weight)?;
                if w.layout != Layout::Panels {
                    return Err(format!("{} is not packed in panels", w.name));
                }
                view(x, w.columns, w.dtype)?;
                writes(out, w.rows, if epilogue == Epilogue::Accumulate { F32 } else { FLOATS })
            }
            Kernel::QuantizedLinear { x, codes, scales, block, epilogue, out } => {
                let (w, s) = (self.weight(codes)?, self.weight(scales)?);
                if w.layout != Layout::Panels || !w.dtype.is_code() {
                    return Err(format!("{} is not codes packed in panels", w.name));
                }
                let whole_pairs = w.dtype != DType::I4 || block.is_multiple_of(2) || block >= w.columns;
                if block == 0 || !whole_pairs {
                    return Err(format!("{} cannot be in blocks of {block}", w.name));
                }
                let blocks = w.columns.div_ceil(block);
                if s.layout != Layout::Panels || s.dtype != DType::F32 || (s.rows, s.columns) != (w.rows, blocks) {
                    return Err(format!("{} is not f32[{}, {blocks}] in panels", s.name, w.rows));
                }
                view(x, w.columns, self.buffer(x.buffer)?.dtype)?;
                writes(out, w.rows, if epilogue == Epilogue::Accumulate { F32 } else { FLOATS })
            }
            Kernel::Rotary { x, cos, sin, head_dim, out } => {
                view(x, x.width, DType::F32)?;
                view(cos, cos.width, DType::F32)?;
                view(sin, cos.width, DType::F32)?;
                if head_dim == 0 || !x.width.is_multiple_of(head_dim) || cos.width > head_dim / 2 {
                    return Err(format!("heads of {head_dim} do not fit {} columns", x.width));
                }
                writes(out, x.width, F32)
            }
            Kernel::Store { x, layer, .. } => {
                let b = self.buffer(x.buffer)?;
                let width = self.cache.kv_heads.checked_mul(self.cache.head_dim);
                let fits = layer < self.cache.layers && Some(x.width) == width && b.rows == RowCount::Tokens;
                let narrow_to_wide = b.dtype == DType::BF16 && self.cache.dtype == DType::F32;
                (fits && !narrow_to_wide)
                    .then_some(())
                    .ok_or_else(|| format!("{} does not fit the cache of layer {layer}", b.name))
            }
            Kernel::Attention { q, layer, scale, out } => {
                view(q, q.width, DType::F32)?;
                let kv_width = self.cache.kv_heads.checked_mul(self.cache.head_dim);
                let fits = kv_width.is_some_and(|w| q.width.is_multiple_of(w)) && layer < self.cache.layers;
                if !fits || !scale.is_finite() || out_rows != Some(RowCount::Tokens) {
                    return Err(format!("{} query columns do not fit the cache of layer {layer}", q.width));
                }
                writes(out, q.width, FLOATS)
            }
            Kernel::Convert { x, out } | Kernel::Relu2 { x, out } | Kernel::AddScalar { x, out, .. } => {
                view(x, x.width, self.buffer(x.buffer)?.dtype)?;
                writes(out, x.width, FLOATS)
            }
            Kernel::RoundToF8 { x, scale, out } => {
                view(x, x.width, self.buffer(x.buffer)?.dtype)?;
                if !(scale.is_finite() && scale > 0.0) {
                    return Err(format!("scale is {scale}"));
                }
                writes(out, x.width, F32)
            }
            Kernel::Add { x, y, out } => {
                view(x, x.width, DType::F32)?;
                view(y, x.width, DType::F32)?;
                writes(out, x.width, F32)
            }
        }
    }
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16)
}

// The packers and kernels agree on what a group is.
const _: () = assert!(<f32 as Weight>::GROUP == 1 && <half::bf16 as Weight>::GROUP == 2);
