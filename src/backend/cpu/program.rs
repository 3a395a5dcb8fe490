//! The CPU's plan: kernel calls in order over one arena, and the weights they read. Stored as JSON in the engine
//! package, so it is checked in full before it runs.

mod kernel;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::kernel::{CacheKind, CacheUse, Indices, Kernel, Operands, Table, View, WeightRule};
use super::kernels::attention::{LANES, MAX_HEAD_DIM};
pub use super::kernels::linear::Epilogue;
use super::kernels::linear::{self, Operand, Packing};
use crate::backend::Limits;
use crate::error::clip;
use crate::isa::CpuFeatures;
use crate::tensor::DType;

/// Version of this format; a package of another version is refused.
pub const PROGRAM_VERSION: u32 = 2;
/// Alignment of buffers in the arena and of weights in their file, in bytes.
pub const ALIGN: usize = 64;

/// A scheduled program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// [`PROGRAM_VERSION`].
    pub version: u32,
    /// The CPU that the packings of its weights were chosen for. It runs on others too.
    pub cpu: CpuFeatures,
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

/// How a weight is stored in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// `[rows, columns]`, row-major.
    RowMajor,
    /// As an operand of a linear kernel.
    Packed {
        /// The kernel.
        packing: Packing,
        /// Which of its operands this is.
        operand: Operand,
    },
}

/// A weight of the package: logical shape `[rows, columns]`, stored as `storage` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightSpec {
    /// Name in the weights file.
    pub name: String,
    /// Storage.
    pub storage: Storage,
    /// Element type.
    pub dtype: DType,
    /// Rows; outputs of a linear layer.
    pub rows: usize,
    /// Columns; inputs of a linear layer, or groups of them that share a scale.
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

    /// Rows that are stored together: storing starts at multiples of it.
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
    /// F32, BF16 or, quantized, I8.
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

impl fmt::Display for Program {
    /// One line a kernel, for people: `out = name attributes (reads; weights)`.
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
    /// A sentence for a user whose CPU has better packings than those that the program was built with.
    pub fn repacking_note(&self, features: CpuFeatures) -> Option<String> {
        let is_better = |kernel: &Kernel| {
            let Kernel::Linear { x, weight, .. } = kernel else { return false };
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
