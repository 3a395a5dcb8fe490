//! Manifest entry of a TensorRT plan: the library that compiled it, its GPU, sizes and bindings. The builder writes the
//! entry and the executor binds memory by it, so the two cannot disagree on a name or a shape.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tensor::DType;

/// The TensorRT part of a plan's manifest entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRtInfo {
    /// Compute capability of the GPUs it runs on: 80 is SM 8.0.
    pub compute_capability: u16,
    /// Compiler and files; `None` if the package was only prepared.
    pub compiled: Option<Compiled>,
    /// Sizes it was built for; with smaller classes, those of the largest.
    pub sizes: Sizes,
    /// Plans for shorter sequences, ascending; they share weights and KV memory with the plan of these sizes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub smaller_classes: Vec<CapacityClass>,
    /// Inputs and outputs: weights first, in the order of the weights file.
    pub bindings: Vec<Binding>,
    /// GiB of KV cache to use on a GPU, by the GPU's memory in GB.
    pub kv_cache_gib: BTreeMap<u32, u32>,
    /// Activation scales of the linear layers' inputs, by weight name; empty except for FP8 and W8A8.
    pub activation_scales: BTreeMap<String, f32>,
}

/// A capacity class below the largest: plans for a smaller cache per sequence, of which a step reads less.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapacityClass {
    /// Cache capacity per sequence, S.
    pub capacity_tokens: usize,
    /// Maximum sequences in a decode step.
    pub decode_sequences: usize,
    /// File of the plan that decodes and prefills; `None` if the package was only prepared.
    pub plan: Option<String>,
    /// File of the context plan. Without it, the other plan prefills sequences without a past too.
    pub context_plan: Option<String>,
}

impl TensorRtInfo {
    /// Sizes of every capacity class, ascending; the last are [`TensorRtInfo::sizes`].
    pub fn class_sizes(&self) -> Vec<Sizes> {
        let at = |class: &CapacityClass| self.sizes.at_capacity(class.capacity_tokens, class.decode_sequences);
        let smaller = self.smaller_classes.iter().map(at);
        smaller.chain([self.sizes.clone()]).collect()
    }

    /// The bindings of a plan for a cache of `capacity` tokens.
    pub fn bindings_at(&self, capacity: usize) -> Vec<Binding> {
        let at = |binding: &Binding| {
            let mut binding = binding.clone();
            if let Some(dim) = binding.role.capacity_dim()
                && let Some(extent) = binding.shape.get_mut(dim)
            {
                *extent = Extent::Fixed(capacity);
            }
            binding
        };
        self.bindings.iter().map(at).collect()
    }

    /// The input by which its plans learn which keys of the cache to attend to.
    pub fn attention(&self) -> AttentionInput {
        match self.bindings.iter().any(|binding| binding.role == BindingRole::TotalTokens) {
            true => AttentionInput::Lengths,
            false => AttentionInput::Mask,
        }
    }

    /// The way that a plan in FP8 holds its codes: as constants if no input is a weight in E4M3.
    pub fn fp8_weights(&self) -> Fp8Weights {
        let is_code = |binding: &Binding| binding.role == BindingRole::Weight && binding.dtype == DType::F8;
        match self.bindings.iter().any(is_code) {
            true => Fp8Weights::Inputs,
            false => Fp8Weights::Constants,
        }
    }

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

/// The library that compiled a plan, and the plan files in addition to [`PlanInfo::plan`](super::PlanInfo::plan), which
/// decodes and prefills.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compiled {
    /// Library that compiled it. The two libraries cannot read each other's plans.
    pub library: LibraryKind,
    /// Version of the library.
    pub version: String,
    /// The GPU it was compiled and timed on; `None` if it was compiled for a compute capability, on any machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<TimedOn>,
    /// File of the context plan, which prefills sequences without a past. Without it, the main plan prefills them too.
    pub context_plan: Option<String>,
    /// Largest batches of the decode profiles of every class, ascending: a class has those below its largest batch, and
    /// one up to that ([`Sizes::decode_profiles`]). Profile 0 of a plan that reads the cache is for prefill, these
    /// follow. Empty: one decode profile.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub decode_batches: Vec<usize>,
}

/// The GPU that a plan was compiled on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimedOn {
    /// NVIDIA's product name, such as "NVIDIA H100 PCIe".
    pub name: String,
    /// Total device memory.
    pub memory_bytes: u64,
}

/// TensorRT's two libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LibraryKind {
    /// TensorRT, for data-centre GPUs; compiles for the GPU in the machine.
    #[serde(rename = "tensorrt")]
    TensorRt,
    /// TensorRT for RTX; cross-compiles for a given compute capability on any machine.
    #[serde(rename = "tensorrt-rtx")]
    Rtx,
}

/// The input by which a plan that reads the cache learns which keys a query attends to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionInput {
    /// [`BindingRole::AttentionMask`]: nothing is left to the library's notion of a sequence's length.
    #[default]
    Mask,
    /// [`BindingRole::TotalTokens`], with a causal mask aligned to each sequence's own end. Some releases of TensorRT
    /// attend past that end on some GPUs, without an error.
    Lengths,
}

impl fmt::Display for AttentionInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            AttentionInput::Mask => "mask",
            AttentionInput::Lengths => "lengths",
        })
    }
}

/// The way that a plan holds E4M3 codes of weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fp8Weights {
    /// Inputs `[in, out]`: the plans of all capacity classes share one copy in the GPU's memory.
    #[default]
    Inputs,
    /// Constants `[out, in]`, which the GEMM multiplies as a transpose, with constant scales per output channel. Every
    /// plan has a copy, so there is one capacity class and no context plan unless the recipe asks for it.
    Constants,
}

impl fmt::Display for Fp8Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Fp8Weights::Inputs => "inputs",
            Fp8Weights::Constants => "constants",
        })
    }
}

/// The sizes a plan is built for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Cache capacity per sequence, S.
    pub max_sequence_tokens: usize,
    /// Rows of the rotary tables: the capacity of the largest class, since all classes share the weights.
    pub position_tokens: usize,
    /// Maximum sequences in a decode step, one token each.
    pub decode_sequences: usize,
    /// Maximum sequences in a prefill step.
    pub prefill_sequences: usize,
    /// Maximum tokens per sequence in a prefill step; all its sequences have the same number.
    pub prefill_tokens: usize,
    /// Maximum logits rows of a prefill step.
    pub prefill_logits_rows: usize,
    /// Columns of the outputs [`BindingRole::TopLogits`] and [`BindingRole::TopIds`], capped at the vocabulary size.
    pub top_tokens: usize,
}

impl Sizes {
    /// The least number of sequences that a prefill profile of so many tokens must allow. With a batch of exactly one and
    /// at most 64 tokens, TensorRT for RTX 1.7 refuses a mask that several layers share ("Graph contains more than one
    /// op named attention_mask.1_iota").
    pub fn least_prefill_sequences(prefill_tokens: usize) -> usize {
        if prefill_tokens <= 64 { 2 } else { 1 }
    }

    /// Largest batch of each decode profile, ascending, of a plan whose profiles end at these batches: those below the
    /// plan's largest batch, and that.
    pub fn decode_profiles(&self, batches: &[usize]) -> Vec<usize> {
        let below = batches.iter().copied().filter(|batch| *batch < self.decode_sequences);
        below.chain([self.decode_sequences]).collect()
    }

    /// These sizes for another capacity of the cache.
    pub fn at_capacity(&self, capacity_tokens: usize, decode_sequences: usize) -> Sizes {
        let prefill_tokens = self.prefill_tokens.min(capacity_tokens);
        Sizes {
            max_sequence_tokens: capacity_tokens,
            decode_sequences,
            prefill_sequences: self.prefill_sequences.max(Sizes::least_prefill_sequences(prefill_tokens)),
            prefill_tokens,
            ..self.clone()
        }
    }
}

/// An input or output of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// Name in the plan, and in the weights file for a weight.
    pub name: String,
    /// Role in a step.
    pub role: BindingRole,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<Extent>,
}

/// A dimension of a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Extent {
    /// The same in every step.
    Fixed(usize),
    /// Dynamic, given by the step.
    Step(StepSize),
}

/// A dynamic dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StepSize {
    /// Number of sequences.
    B,
    /// New tokens per sequence.
    T,
    /// Number of logits rows.
    R,
}

/// Role of a binding in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BindingRole {
    /// Constant input.
    Weight,
    /// Input `i32[B, T]`.
    TokenIds,
    /// Input `i32[B, T]`: each token's position in its sequence.
    Positions,
    /// Input `i32[B]`: length of each sequence before the step, the position where new entries are written.
    PastTokens,
    /// Input `i32[B]`: length of each sequence after the step. The context plan does not have it.
    TotalTokens,
    /// Input `bool[B, 1, T, S]`: the keys that each query attends to. The context plan does not have it.
    AttentionMask,
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
    /// Output `f32[R, k]`: the largest logits of each row in descending order.
    TopLogits,
    /// Output `i32[R, k]`: their token ids.
    TopIds,
    /// Output `f32[R, p]`: sums of each row's logits, `vocab / p` each, which are finite only if the logits are.
    LogitSums,
}

impl BindingRole {
    /// The dimension that is the capacity of the cache, if any.
    pub fn capacity_dim(self) -> Option<usize> {
        match self {
            BindingRole::KeyCache(_)
            | BindingRole::ValueCache(_)
            | BindingRole::UpdatedKeys(_)
            | BindingRole::UpdatedValues(_) => Some(2),
            BindingRole::AttentionMask => Some(3),
            _ => None,
        }
    }

    /// Returns true for inputs of the plan that reads the cache which the context plan does not have.
    pub fn limits_cached_keys(self) -> bool {
        matches!(self, BindingRole::TotalTokens | BindingRole::AttentionMask)
    }

    /// Returns true if the plan writes it.
    pub fn is_output(self) -> bool {
        matches!(
            self,
            BindingRole::UpdatedKeys(_)
                | BindingRole::UpdatedValues(_)
                | BindingRole::Logits
                | BindingRole::TopLogits
                | BindingRole::TopIds
                | BindingRole::LogitSums
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
