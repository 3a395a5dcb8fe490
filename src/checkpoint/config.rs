//! The architecture of a checkpoint, in one form whichever file it was read from.

use serde::{Deserialize, Serialize};

use crate::tensor::DType;

/// Everything about the model that its weights do not say. All values come from the checkpoint's own config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Rows of the embedding and of the head, padding included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; not necessarily `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Leading dimensions of a head that rotate: `int(head_dim * partial_rotary_factor)`, even.
    pub rotary_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of every LayerNorm1P.
    pub norm_eps: f64,
    /// The head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Element type the checkpoint declares for its weights.
    pub dtype: DType,
    /// Beginning-of-sequence id, if the checkpoint names one.
    pub bos_token_id: Option<u32>,
    /// Ids that always end a generation.
    pub eos_token_ids: Vec<u32>,
}
