//! What an engine was built for, in tokens, rows and sequences.

use serde::{Deserialize, Serialize};

/// What an engine was built for. Taken from the package's manifest; every [`crate::backend::Step`] is checked against it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Sequences that can be in the KV cache at once.
    pub slots: usize,
    /// KV capacity of one slot in tokens, prompt and answer together.
    pub max_sequence_tokens: usize,
    /// Most new tokens in one step, over all its sequences.
    pub max_step_tokens: usize,
    /// Most rows of logits one step may ask for.
    pub max_logits_rows: usize,
    /// Columns of the logits: the model's vocabulary, padding included.
    pub vocab_size: usize,
}
