//! The CPU plan: a sequence of kernel calls over one arena, and the weights they read. It is stored as JSON in the
//! engine package and therefore validated in full before it runs.

mod cost;
mod kernel;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::kernel::{CacheUse, Indices, KeysOrValues, Operands, ProgramKernel, Table, View, WeightRule};
use super::kernels::attention::{LANES, MAX_HEAD_DIM};
pub use super::kernels::linear::Epilogue;
use super::kernels::linear::{self, Operand, Packing};
use crate::backend::Limits;
use crate::error::clip;
use crate::isa::CpuFeatures;
use crate::tensor::DType;

/// Version of the format; packages of other versions are refused.
pub const PROGRAM_VERSION: u32 = 3;
/// Alignment in bytes of buffers in the arena and of weights in their file.
pub const ALIGN: usize = 64;

/// A scheduled program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// [`PROGRAM_VERSION`].
    pub version: u32,
    /// CPU that the weights' packings were chosen for. The program runs on others too.
    pub cpu: CpuFeatures,
    /// Limits that the arena was planned for.
    pub limits: Limits,
    /// Shape of the KV caches.
    pub cache: CacheSpec,
    /// Weights that the kernels read from the weights file.
    pub weights: Vec<WeightSpec>,
    /// Buffers in the arena; those with disjoint lifetimes share bytes.
    pub buffers: Vec<BufferSpec>,
    /// Size of the arena in bytes.
    pub arena_bytes: usize,
    /// Kernel calls, in order.
    pub kernels: Vec<ProgramKernel>,
    /// Buffer that holds the logits at the end of a step, `f32[logits rows, vocab_size]`.
    pub logits: usize,
}

/// One KV cache per layer, `[slots, kv_heads, capacity, padded head_dim]` for keys and for values; see
/// [`super::kernels::attention`] for the layout within a head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSpec {
    /// Number of layers.
    pub layers: usize,
    /// Number of KV heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// F32 or BF16.
    pub dtype: DType,
}

impl CacheSpec {
    /// Bytes of keys and values per token of one slot.
    pub fn bytes_per_token(&self) -> usize {
        2 * self.layers * self.kv_heads * self.padded_dim() * self.dtype.bytes()
    }

    /// Width of a head in memory: zero-padded to a whole number of vectors.
    pub fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of one head of one slot's keys (or values), rounded up to whole groups of positions.
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

/// Storage layout of a weight in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// `[rows, columns]`, row-major.
    RowMajor,
    /// Operand of a linear kernel.
    Packed {
        /// The kernel.
        packing: Packing,
        /// Role of this weight in the kernel.
        operand: Operand,
    },
}

/// A weight of the package: logical shape `[rows, columns]`, laid out as `storage` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightSpec {
    /// Name in the weights file.
    pub name: String,
    /// Layout in the file.
    pub storage: Storage,
    /// Element type.
    pub dtype: DType,
    /// Rows: the outputs of a linear layer.
    pub rows: usize,
    /// Columns: the inputs of a linear layer, or the groups of a scale operand.
    pub columns: usize,
}

impl WeightSpec {
    /// Shape in the weights file.
    pub fn stored_shape(&self) -> Vec<usize> {
        match self.storage {
            Storage::RowMajor => vec![self.rows, self.columns],
            Storage::Packed { packing, operand } => packing.stored(operand, self.rows, self.columns).1,
        }
    }

    /// Granularity in rows: storing may only start at multiples of it.
    pub fn unit_rows(&self) -> usize {
        match self.storage {
            Storage::RowMajor => 1,
            Storage::Packed { packing, .. } => packing.tile_size().nr,
        }
    }

    /// Bytes in the weights file; `None` if that overflows.
    pub fn stored_bytes(&self) -> Option<usize> {
        self.stored_shape().iter().try_fold(self.dtype.bytes(), |bytes, n| bytes.checked_mul(*n))
    }

    fn check(&self) -> Result<(), String> {
        let is_stored = match self.storage {
            Storage::RowMajor => is_float(self.dtype),
            Storage::Packed { packing, operand } => {
                let known = operand == Operand::Weight || packing.has_scales();
                known && self.dtype == packing.stored(operand, self.rows, self.columns).0
            }
        };
        if self.rows == 0 || self.columns == 0 || self.stored_bytes().is_none() || !is_stored {
            let (name, rows, columns) = (&self.name, self.rows, self.columns);
            return Err(format!("weight {name} is [{rows}, {columns}] of {} stored as {:?}", self.dtype, self.storage));
        }
        Ok(())
    }
}

/// Number of rows of a buffer in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowCount {
    /// One per new token.
    Tokens,
    /// One per requested row of logits.
    LogitsRows,
}

impl RowCount {
    /// Upper bound within the limits.
    pub fn max(self, limits: &Limits) -> usize {
        match self {
            RowCount::Tokens => limits.max_step_tokens,
            RowCount::LogitsRows => limits.max_logits_rows,
        }
    }
}

/// A buffer: `[rows, width]`, row-major, `offset` bytes into the arena.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BufferSpec {
    /// Graph value that it holds first.
    pub name: String,
    /// Number of rows in a step.
    pub rows: RowCount,
    /// Elements of a row.
    pub width: usize,
    /// F32, BF16 or, for quantized activations, I8.
    pub dtype: DType,
    /// Bytes from the start of the arena, a multiple of [`ALIGN`].
    pub offset: usize,
}

impl BufferSpec {
    /// Size in bytes at the limits.
    pub fn max_bytes(&self, limits: &Limits) -> Option<usize> {
        self.rows.max(limits).checked_mul(self.width)?.checked_mul(self.dtype.bytes())
    }
}

impl fmt::Display for Program {
    /// Text listing, one line per kernel: `out = name attributes (reads; weights)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let buffer = |index: usize| clip(self.buffers.get(index).map_or("?", |b| b.name.as_str()));
        let weight = |index: usize| clip(self.weights.get(index).map_or("?", |w| w.name.as_str()));
        for kernel in &self.kernels {
            let operands = kernel.operands();
            let outs: Vec<String> = operands.writes.iter().map(|write| buffer(write.buffer)).collect();
            let mut inputs: Vec<String> = operands.reads.iter().map(|read| buffer(read.view.buffer)).collect();
            inputs.extend(operands.weights.iter().map(|used| weight(used.index)));
            match operands.cache {
                Some(CacheUse { layer, written: Some(kind) }) => write!(f, "cache {layer} {kind:?} <- ")?,
                Some(CacheUse { layer, written: None }) => {
                    write!(f, "{} = ", outs.join(", "))?;
                    inputs.push(format!("cache {layer}"));
                }
                None => write!(f, "{} = ", outs.join(", "))?,
            }
            write!(f, "{}", operands.name)?;
            for attribute in &operands.attributes {
                write!(f, " {attribute}")?;
            }
            writeln!(f, " ({})", inputs.join(", "))?;
        }
        Ok(())
    }
}

impl Program {
    /// Names of the packings of its weights, each once, in the order of their first use.
    pub fn packings(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for weight in &self.weights {
            if let Storage::Packed { packing, .. } = weight.storage
                && !names.contains(&packing.name())
            {
                names.push(packing.name());
            }
        }
        names
    }

    /// Returns true if inputs of linear layers are quantized to 8 bits by scales of each row, which no GPU plan does.
    pub fn quantizes_activations(&self) -> bool {
        self.kernels.iter().any(|kernel| matches!(kernel, ProgramKernel::Quantize { scale: None, .. }))
    }

    /// A sentence for the user if this CPU supports faster packings than the program was built with.
    pub fn repacking_note(&self, features: CpuFeatures) -> Option<String> {
        let is_better = |kernel: &ProgramKernel| {
            let ProgramKernel::Linear { x, weight, .. } = kernel else { return false };
            let (Some(x), Some(weight)) = (self.buffers.get(x.buffer), self.weights.get(*weight)) else { return false };
            let Storage::Packed { packing, .. } = weight.storage else { return false };
            linear::choose(weight.dtype, x.dtype, features).is_some_and(|best| best != packing)
        };
        self.kernels.iter().any(is_better).then(|| {
            format!(
                "the CPU plan was packed for {}, and this CPU is {features}; `aotron build PACKAGE --finish --recipe cpu` \
                 packs it for this one, which is faster and changes no answer",
                self.cpu
            )
        })
    }

    /// Checks everything that running the program relies on; the error says what is inconsistent.
    pub fn validate(&self) -> Result<(), String> {
        // Names in the message come from the file, so they may be arbitrarily long or contain control characters.
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
            w.check()?;
        }
        for b in &self.buffers {
            let end = b.max_bytes(l).and_then(|bytes| b.offset.checked_add(bytes));
            let inside = end.is_some_and(|end| end <= self.arena_bytes);
            if b.width == 0
                || !(is_float(b.dtype) || b.dtype == DType::I8)
                || !b.offset.is_multiple_of(ALIGN)
                || !inside
            {
                return Err(format!("buffer {} does not lie in the arena of {} bytes", b.name, self.arena_bytes));
            }
        }
        let mut written = vec![false; self.buffers.len()];
        for (index, kernel) in self.kernels.iter().enumerate() {
            kernel.operands().check(self).map_err(|e| format!("kernel {index}: {e}"))?;
            let operands = kernel.operands();
            let updated = operands.writes.iter().filter(|write| write.updates).map(|write| write.buffer);
            let mut read = operands.reads.iter().map(|read| read.view.buffer).chain(updated);
            if let Some(early) = read.find(|buffer| !written[*buffer]) {
                return Err(format!("kernel {index}: it reads {} before it is written", self.buffers[early].name));
            }
            operands.writes.iter().for_each(|write| written[write.buffer] = true);
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
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16)
}
