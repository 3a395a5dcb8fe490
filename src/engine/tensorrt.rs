//! What a manifest says of a TensorRT plan: what compiled it, for which GPU and which steps, and what it is to be given.
//! The builder writes it and the executor binds memory by it, so the two cannot disagree on a name or a shape.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tensor::DType;

/// A TensorRT plan's half of its entry in the manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRtInfo {
    /// Of the GPUs it runs on: 80 is SM 8.0.
    pub compute_capability: u16,
    /// What compiled it; nothing did where the package was only prepared.
    pub compiled: Option<Compiled>,
    /// The steps it was built for.
    pub sizes: Sizes,
    /// Everything that is bound to it: weights first, in the order of their file.
    pub bindings: Vec<Binding>,
    /// GiB of KV cache to use on a GPU, by the GPU's memory in GB.
    pub kv_cache_gib: BTreeMap<u32, u32>,
    /// What an E4M3 one stands for in the inputs of each linear layer, by its weight's name; empty but for FP8.
    pub activation_scales: BTreeMap<String, f32>,
}

impl TensorRtInfo {
    /// Bytes of KV cache per token of one sequence.
    pub fn kv_bytes_per_token(&self) -> usize {
        let caches =
            self.bindings.iter().filter(|b| matches!(b.role, BindingRole::KeyCache(_) | BindingRole::ValueCache(_)));
        let bytes = |binding: &Binding| match binding.shape[..] {
            [_, Extent::Fixed(heads), _, Extent::Fixed(head_dim)] => {
                heads.saturating_mul(head_dim).saturating_mul(binding.dtype.bytes())
            }
            _ => 0,
        };
        caches.map(bytes).fold(0, usize::saturating_add)
    }
}

/// What compiled a plan, and into which files beside [`PlanInfo::plan`](super::PlanInfo::plan), which decodes and
/// prefills.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compiled {
    /// Which library: a plan of one is nothing to the other.
    pub library: LibraryKind,
    /// Its version.
    pub version: String,
    /// The file of the plan for first chunks, whose sequences have no past. Without one they run as later ones do.
    pub context_plan: Option<String>,
}

/// The two libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LibraryKind {
    /// TensorRT, for data-centre GPUs; compiles for the GPU at hand.
    #[serde(rename = "tensorrt")]
    TensorRt,
    /// TensorRT for RTX; compiles for a named compute capability, on any machine.
    #[serde(rename = "tensorrt-rtx")]
    Rtx,
}

/// The sizes a plan is built for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Capacity of one sequence in the cache.
    pub max_sequence_tokens: usize,
    /// Most sequences of a step that decodes, one token each.
    pub decode_sequences: usize,
    /// Most sequences of a step that prefills.
    pub prefill_sequences: usize,
    /// Most tokens per sequence of a step that prefills; all its sequences have equally many.
    pub prefill_tokens: usize,
    /// Most rows of logits of a step that prefills.
    pub prefill_logits_rows: usize,
    /// Columns of the outputs [`BindingRole::TopLogits`] and [`BindingRole::TopIds`], or the vocabulary if that is less.
    pub top_tokens: usize,
}

/// A tensor that a plan reads or writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// Its name in the plan, and in the weights file if it is a weight.
    pub name: String,
    /// What it is.
    pub role: BindingRole,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<Extent>,
}

/// A size of a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Extent {
    /// The same in every step.
    Fixed(usize),
    /// The step's own.
    Step(StepSize),
}

/// A size that differs from step to step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StepSize {
    /// Sequences.
    B,
    /// New tokens of each sequence.
    T,
    /// Rows of logits.
    R,
}

/// What a binding is to a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BindingRole {
    /// An input that never changes.
    Weight,
    /// Input `i32[B, T]`.
    TokenIds,
    /// Input `i32[B, T]`: each token's position in its sequence.
    Positions,
    /// Input `i32[B]`: tokens of each sequence before the step, where the new ones are written.
    PastTokens,
    /// Input `i32[B]`: tokens of each sequence after the step. The plan for first chunks has none.
    TotalTokens,
    /// Input `i32[R]`: indices into the step's B · T tokens.
    LogitsRows,
    /// Input `[B, kv_heads, S, head_dim]`: a layer's keys.
    KeyCache(usize),
    /// Input: a layer's values.
    ValueCache(usize),
    /// Output: a layer's keys after the step, in the memory of [`BindingRole::KeyCache`].
    UpdatedKeys(usize),
    /// Output: a layer's values after the step, in the memory of [`BindingRole::ValueCache`].
    UpdatedValues(usize),
    /// Output `f32[R, vocab]`.
    Logits,
    /// Output `f32[R, k]`: the largest logits of each row, largest first.
    TopLogits,
    /// Output `i32[R, k]`: their token ids.
    TopIds,
}

impl BindingRole {
    /// Whether the plan writes it.
    pub fn is_output(self) -> bool {
        matches!(
            self,
            BindingRole::UpdatedKeys(_)
                | BindingRole::UpdatedValues(_)
                | BindingRole::Logits
                | BindingRole::TopLogits
                | BindingRole::TopIds
        )
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Extent::Fixed(n) => write!(f, "{n}"),
            Extent::Step(size) => write!(f, "{size:?}"),
        }
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(Extent::to_string).collect();
        write!(f, "{}: {}[{}]", self.name, self.dtype, shape.join(", "))
    }
}
