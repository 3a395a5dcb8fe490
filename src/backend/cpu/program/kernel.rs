//! The kernels of a program, each with one description of its operands. [`ProgramKernel::operands`] determines a
//! kernel's reads and writes, its listing, and the checks made before it runs. A new kernel takes a variant, its
//! description, and its call in [`super::super::run`].

use serde::{Deserialize, Serialize};

use super::super::kernels::linear::{Epilogue, LinearShape, Operand};
use super::{BufferSpec, Program, RowCount, Storage};
use crate::tensor::DType;

/// Columns of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Index in [`Program::buffers`].
    pub buffer: usize,
    /// First column.
    pub column: usize,
    /// Number of columns.
    pub width: usize,
}

/// The indices of a gather.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Indices {
    /// The step's token ids, below the vocabulary.
    TokenIds,
    /// The tokens' positions, below `max_sequence_tokens`.
    Positions,
    /// Rows of the step whose logits are requested, below its tokens.
    LogitsRows,
}

/// The table of a gather.
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
pub enum KeysOrValues {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// One kernel call. The views it reads and the buffers it writes never overlap. `out` is a buffer index; `weight`,
/// `scales`, `gamma` and `beta` are weight indices.
#[allow(missing_docs)] // the fields are the operands that each variant's line names
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ProgramKernel {
    /// Gathers rows of a table into `out` (F32).
    Gather { indices: Indices, table: Table, out: usize },
    /// LayerNorm of `x` (F32).
    LayerNorm { x: View, gamma: usize, beta: usize, eps: f32, out: usize },
    /// `x · weightᵀ` by the kernel that the weight is packed for. `scales` belong to the weight's codes, with group
    /// size `group`; `x_scales`, `[rows, 1]`, belong to an `x` of 8-bit integers.
    Linear {
        x: View,
        x_scales: Option<View>,
        weight: usize,
        scales: Option<usize>,
        group: usize,
        epilogue: Epilogue,
        out: usize,
    },
    /// Quantizes `x` to 8-bit integers in `out`, with per-row scales in `scales`: `scale` for every row, or the one that
    /// each row's largest magnitude needs.
    Quantize { x: View, scale: Option<f32>, out: usize, scales: usize },
    /// Quantizes to E4M3 and back: `scale` times the E4M3 float nearest to `x / scale`, saturating.
    FakeQuantizeF8 { x: View, scale: f32, out: usize },
    /// Rotates the heads of `x` (F32) by `cos` and `sin`.
    Rotary { x: View, cos: View, sin: View, head_dim: usize, out: usize },
    /// Appends `x` to the cache, after each sequence's past tokens.
    Store { x: View, layer: usize, kind: KeysOrValues },
    /// Attention of `q` (F32) over the layer's cache.
    Attention { q: View, layer: usize, scale: f32, out: usize },
    /// Converts to the dtype of `out`.
    Convert { x: View, out: usize },
    /// `max(x, 0)²`
    Relu2 { x: View, out: usize },
    /// `x + scalar`
    AddScalar { x: View, scalar: f32, out: usize },
    /// `x + y` (F32)
    Add { x: View, y: View, out: usize },
}

const F32: &[DType] = &[DType::F32];
const FLOATS: &[DType] = &[DType::F32, DType::BF16];
const BYTES: &[DType] = &[DType::I8];

impl ProgramKernel {
    /// Describes its operands.
    pub fn operands(&self) -> Operands {
        match *self {
            ProgramKernel::Gather { indices, table, out } => {
                let of_logits = indices == Indices::LogitsRows;
                let rows = if of_logits { RowCount::LogitsRows } else { RowCount::Tokens };
                let gather = Operands::new("gather").attribute(format!("{indices:?}"));
                match table {
                    Table::Weight(w) => gather
                        .weight(w, WeightRule::Table(indices))
                        .require(!of_logits, || "rows of the step are no rows of a weight".into())
                        .write(out, Width::ColumnsOf(w), F32, Some(rows)),
                    Table::View(v) => gather
                        .read(v, Width::Any, F32, RowRule::Exactly(RowCount::Tokens))
                        .require(of_logits, || format!("a buffer cannot be gathered from by {indices:?}"))
                        .write(out, Width::Exactly(v.width), F32, Some(rows)),
                }
            }
            ProgramKernel::LayerNorm { x, gamma, beta, eps, out } => Operands::new("layer_norm")
                .read(x, Width::Any, F32, RowRule::AsWritten)
                .weight(gamma, WeightRule::Vector(x.width))
                .weight(beta, WeightRule::Vector(x.width))
                .require(eps.is_finite() && eps > 0.0, || format!("eps is {eps}"))
                .write(out, Width::Exactly(x.width), FLOATS, None),
            ProgramKernel::Linear { x, x_scales, weight, scales, group, epilogue, out } => {
                let dtypes = if x_scales.is_some() { BYTES } else { FLOATS };
                let mut linear = Operands::new("linear")
                    .attribute(format!("{epilogue:?}"))
                    .read(x, Width::ColumnsOf(weight), dtypes, RowRule::AsWritten)
                    .weight(weight, WeightRule::Linear { x: x.buffer, scales, group });
                if let Some(x_scales) = x_scales {
                    linear = linear.read(x_scales, Width::Exactly(1), F32, RowRule::AsWritten);
                }
                if let Some(scales) = scales {
                    linear = linear.weight(scales, WeightRule::ScalesOf { weight, group });
                }
                match epilogue {
                    Epilogue::Accumulate => linear.update(out, Width::RowsOf(weight), F32),
                    Epilogue::Store | Epilogue::Relu2 => linear.write(out, Width::RowsOf(weight), FLOATS, None),
                }
            }
            ProgramKernel::Quantize { x, scale, out, scales } => Operands::new("quantize")
                .attribute(scale.map_or("per row".into(), |scale| scale.to_string()))
                .read(x, Width::Any, FLOATS, RowRule::AsWritten)
                .require(scale.is_none_or(|scale| scale.is_finite() && scale > 0.0), || format!("scale is {scale:?}"))
                .write(out, Width::Exactly(x.width), BYTES, None)
                .write(scales, Width::Exactly(1), F32, None),
            ProgramKernel::FakeQuantizeF8 { x, scale, out } => Operands::new("fake_quantize_f8")
                .attribute(scale.to_string())
                .read(x, Width::Any, FLOATS, RowRule::AsWritten)
                .require(scale.is_finite() && scale > 0.0, || format!("scale is {scale}"))
                .write(out, Width::Exactly(x.width), F32, None),
            ProgramKernel::Rotary { x, cos, sin, head_dim, out } => Operands::new("rotary")
                .read(x, Width::Any, F32, RowRule::AsWritten)
                .read(cos, Width::Any, F32, RowRule::AsWritten)
                .read(sin, Width::Exactly(cos.width), F32, RowRule::AsWritten)
                .require(head_dim > 0 && x.width.is_multiple_of(head_dim) && cos.width <= head_dim / 2, || {
                    format!("heads of {head_dim} do not fit {} columns", x.width)
                })
                .write(out, Width::Exactly(x.width), F32, None),
            ProgramKernel::Store { x, layer, kind } => Operands::new("store")
                .read(x, Width::CacheRow, FLOATS, RowRule::Exactly(RowCount::Tokens))
                .cache(CacheUse { layer, written: Some(kind) }),
            ProgramKernel::Attention { q, layer, scale, out } => Operands::new("attention")
                .read(q, Width::MultipleOfCacheRow, F32, RowRule::AsWritten)
                .require(scale.is_finite(), || format!("scale is {scale}"))
                .cache(CacheUse { layer, written: None })
                .write(out, Width::Exactly(q.width), FLOATS, Some(RowCount::Tokens)),
            ProgramKernel::Convert { x, out } => {
                Operands::unary("convert", x).write(out, Width::Exactly(x.width), FLOATS, None)
            }
            ProgramKernel::Relu2 { x, out } => {
                Operands::unary("relu2", x).write(out, Width::Exactly(x.width), FLOATS, None)
            }
            ProgramKernel::AddScalar { x, scalar, out } => Operands::unary("add_scalar", x)
                .attribute(scalar.to_string())
                .write(out, Width::Exactly(x.width), FLOATS, None),
            ProgramKernel::Add { x, y, out } => Operands::new("add")
                .read(x, Width::Any, F32, RowRule::AsWritten)
                .read(y, Width::Exactly(x.width), F32, RowRule::AsWritten)
                .write(out, Width::Exactly(x.width), F32, None),
        }
    }

    /// Columns that it reads, except those that it updates in place.
    pub fn reads(&self) -> Vec<View> {
        self.operands().reads.iter().map(|read| read.view).collect()
    }

    /// Buffers that it writes.
    pub fn writes(&self) -> Vec<usize> {
        self.operands().writes.iter().map(|write| write.buffer).collect()
    }
}

/// Description of a kernel's operands: reads, writes and requirements.
#[derive(Debug)]
pub struct Operands {
    /// The kernel's name.
    pub name: &'static str,
    /// Its other arguments, formatted for the listing.
    pub attributes: Vec<String>,
    /// Columns it reads.
    pub reads: Vec<Read>,
    /// Weights it reads.
    pub weights: Vec<WeightUse>,
    /// Buffers it writes.
    pub writes: Vec<Write>,
    /// The layer whose cache it uses.
    pub cache: Option<CacheUse>,
    /// The first requirement that does not hold.
    problem: Option<String>,
}

/// Columns that are read.
#[derive(Debug)]
pub struct Read {
    /// Which.
    pub view: View,
    width: Width,
    dtypes: &'static [DType],
    rows: RowRule,
}

/// A buffer that is written.
#[derive(Debug)]
pub struct Write {
    /// Which.
    pub buffer: usize,
    /// True if it is read too (updated in place).
    pub updates: bool,
    width: Width,
    dtypes: &'static [DType],
    rows: Option<RowCount>,
}

/// A weight that is read.
#[derive(Debug)]
pub struct WeightUse {
    /// Which.
    pub index: usize,
    /// Requirement on it.
    pub rule: WeightRule,
}

/// The cache of a layer.
#[derive(Debug, Clone, Copy)]
pub struct CacheUse {
    /// Which.
    pub layer: usize,
    /// The half of it that is written, if any.
    pub written: Option<KeysOrValues>,
}

/// A number of columns.
#[derive(Debug, Clone, Copy)]
enum Width {
    Any,
    Exactly(usize),
    /// The rows of a weight: a linear layer's outputs.
    RowsOf(usize),
    /// The columns of a weight.
    ColumnsOf(usize),
    /// The keys of one token.
    CacheRow,
    MultipleOfCacheRow,
}

/// The rows of a buffer that is read.
#[derive(Debug, Clone, Copy)]
enum RowRule {
    /// As many as the output has.
    AsWritten,
    Exactly(RowCount),
}

/// Requirement on a weight.
#[derive(Debug, Clone, Copy)]
pub enum WeightRule {
    /// Row-major, with a row for each index.
    Table(Indices),
    /// Row-major, one row of this many FP32 values.
    Vector(usize),
    /// A linear kernel's weight, which takes what is in buffer `x`.
    Linear {
        /// The activations' buffer.
        x: usize,
        /// The scales' index.
        scales: Option<usize>,
        /// Quantization group size in inputs.
        group: usize,
    },
    /// The scales of a linear kernel's weight.
    ScalesOf {
        /// The weight's index.
        weight: usize,
        /// Quantization group size in inputs.
        group: usize,
    },
}

impl Operands {
    fn new(name: &'static str) -> Operands {
        let (reads, weights, writes) = (Vec::new(), Vec::new(), Vec::new());
        Operands { name, attributes: Vec::new(), reads, weights, writes, cache: None, problem: None }
    }

    fn unary(name: &'static str, x: View) -> Operands {
        Operands::new(name).read(x, Width::Any, FLOATS, RowRule::AsWritten)
    }

    fn attribute(mut self, attribute: String) -> Operands {
        self.attributes.push(attribute);
        self
    }

    fn read(mut self, view: View, width: Width, dtypes: &'static [DType], rows: RowRule) -> Operands {
        self.reads.push(Read { view, width, dtypes, rows });
        self
    }

    fn weight(mut self, index: usize, rule: WeightRule) -> Operands {
        self.weights.push(WeightUse { index, rule });
        self
    }

    fn write(mut self, buffer: usize, width: Width, dtypes: &'static [DType], rows: Option<RowCount>) -> Operands {
        self.writes.push(Write { buffer, updates: false, width, dtypes, rows });
        self
    }

    fn update(mut self, buffer: usize, width: Width, dtypes: &'static [DType]) -> Operands {
        self.writes.push(Write { buffer, updates: true, width, dtypes, rows: None });
        self
    }

    fn cache(mut self, cache: CacheUse) -> Operands {
        self.cache = Some(cache);
        self
    }

    fn require(mut self, holds: bool, problem: impl FnOnce() -> String) -> Operands {
        if !holds && self.problem.is_none() {
            self.problem = Some(problem());
        }
        self
    }

    /// Checks every operand against the program's buffers, weights and cache; the error says what does not fit.
    pub(super) fn check(&self, program: &Program) -> Result<(), String> {
        if let Some(problem) = &self.problem {
            return Err(problem.clone());
        }
        if let Some(CacheUse { layer, .. }) = self.cache
            && layer >= program.cache.layers
        {
            return Err(format!("there is no cache of layer {layer}"));
        }
        for used in &self.weights {
            used.check(program)?;
        }
        let mut written_rows = None;
        for write in &self.writes {
            let buffer = program.buffer(write.buffer)?;
            write.width.check(program, buffer, buffer.width)?;
            check_dtype(buffer, write.dtypes)?;
            let rows = *written_rows.get_or_insert(buffer.rows);
            if buffer.rows != rows || write.rows.is_some_and(|rows| rows != buffer.rows) {
                return Err(format!("{} has another number of rows than what is computed", buffer.name));
            }
        }
        for Read { view, width, dtypes, rows } in &self.reads {
            let buffer = program.buffer(view.buffer)?;
            if view.width == 0 || view.column.checked_add(view.width).is_none_or(|end| end > buffer.width) {
                return Err(format!("columns {} + {} are outside {}", view.column, view.width, buffer.name));
            }
            width.check(program, buffer, view.width)?;
            check_dtype(buffer, dtypes)?;
            let expected = match rows {
                RowRule::AsWritten => written_rows,
                RowRule::Exactly(rows) => Some(*rows),
            };
            if expected.is_some_and(|rows| rows != buffer.rows) {
                return Err(format!("{} has another number of rows than what is computed", buffer.name));
            }
            let is_widened = buffer.dtype == DType::BF16 && program.cache.dtype == DType::F32;
            if self.cache.is_some_and(|cache| cache.written.is_some()) && is_widened {
                return Err(format!("{} is narrower than the cache", buffer.name));
            }
        }
        self.check_overlaps(program)
    }

    /// Checks that an output shares no byte with any other operand.
    fn check_overlaps(&self, program: &Program) -> Result<(), String> {
        let bytes = |b: &BufferSpec| b.offset..b.offset + b.max_bytes(&program.limits).unwrap_or(0);
        for (index, write) in self.writes.iter().enumerate() {
            let out = program.buffer(write.buffer)?;
            let written = bytes(out);
            let others = self.writes[..index].iter().map(|other| other.buffer);
            for other in others.chain(self.reads.iter().map(|read| read.view.buffer)) {
                let other = bytes(program.buffer(other)?);
                if other.start < written.end && written.start < other.end {
                    return Err(format!("it reads and writes the bytes of {}", out.name));
                }
            }
        }
        Ok(())
    }
}

impl Width {
    fn check(self, program: &Program, buffer: &BufferSpec, width: usize) -> Result<(), String> {
        let cache_row = || program.cache.kv_heads.checked_mul(program.cache.head_dim).filter(|row| *row > 0);
        let (fits, expected) = match self {
            Width::Any => return Ok(()),
            Width::Exactly(expected) => (width == expected, Some(expected)),
            Width::RowsOf(weight) => (width == program.weight(weight)?.rows, Some(program.weight(weight)?.rows)),
            Width::ColumnsOf(weight) => {
                (width == program.weight(weight)?.columns, Some(program.weight(weight)?.columns))
            }
            Width::CacheRow => (Some(width) == cache_row(), cache_row()),
            Width::MultipleOfCacheRow => (cache_row().is_some_and(|row| width.is_multiple_of(row)), cache_row()),
        };
        match (fits, expected) {
            (true, _) => Ok(()),
            (false, Some(expected)) => Err(format!("{} has {width} columns, expected {expected}", buffer.name)),
            (false, None) => Err(format!("{} has {width} columns, which do not fit the cache", buffer.name)),
        }
    }
}

fn check_dtype(buffer: &BufferSpec, dtypes: &[DType]) -> Result<(), String> {
    match dtypes.contains(&buffer.dtype) {
        true => Ok(()),
        false => {
            let names: Vec<String> = dtypes.iter().map(DType::to_string).collect();
            Err(format!("{} is {}, expected {}", buffer.name, buffer.dtype, names.join(" or ")))
        }
    }
}

impl WeightUse {
    fn check(&self, program: &Program) -> Result<(), String> {
        let weight = program.weight(self.index)?;
        let refuse = |expected: String| Err(format!("weight {} is not {expected}", weight.name));
        match self.rule {
            WeightRule::Table(indices) => {
                let rows = match indices {
                    Indices::TokenIds => program.limits.vocab_size,
                    Indices::Positions => program.limits.max_sequence_tokens,
                    Indices::LogitsRows => program.limits.max_step_tokens,
                };
                let is_table = weight.storage == Storage::RowMajor && weight.rows >= rows;
                if is_table { Ok(()) } else { refuse(format!("a table of {rows} rows")) }
            }
            WeightRule::Vector(columns) => {
                let is_vector = weight.storage == Storage::RowMajor && (weight.rows, weight.columns) == (1, columns);
                if is_vector && weight.dtype == DType::F32 { Ok(()) } else { refuse(format!("f32[{columns}]")) }
            }
            WeightRule::Linear { x, scales, group } => {
                let Storage::Packed { packing, operand: Operand::Weight } = weight.storage else {
                    return refuse("packed for a linear kernel".into());
                };
                if packing.has_scales() != scales.is_some() {
                    return refuse("with the scales that its packing has".into());
                }
                let x = program.buffer(x)?;
                if !packing.activation_dtypes().contains(&x.dtype) {
                    return refuse(format!("packed for {} in {}", x.name, x.dtype));
                }
                packing.check(LinearShape { outputs: weight.rows, inputs: weight.columns, group })
            }
            WeightRule::ScalesOf { weight: of, group } => {
                let of = program.weight(of)?;
                let Storage::Packed { packing, .. } = of.storage else {
                    return refuse("of a packed weight".into());
                };
                let groups = of.columns.div_ceil(group.max(1));
                let fits = weight.storage == Storage::Packed { packing, operand: Operand::Scales }
                    && (weight.rows, weight.columns) == (of.rows, groups);
                if fits { Ok(()) } else { refuse(format!("[{}, {groups}] scales of {}", of.rows, of.name)) }
            }
        }
    }
}
