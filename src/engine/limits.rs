//! Limits of an engine, in tokens, rows and sequences.

use serde::{Deserialize, Serialize};

/// Limits that an engine was built for. They come from the package's manifest; every [`crate::backend::Step`] is
/// checked against them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Maximum number of sequences in the KV cache.
    pub slots: usize,
    /// KV capacity of one slot in tokens, prompt and answer together.
    pub max_sequence_tokens: usize,
    /// Maximum number of new tokens in one step, over all its sequences.
    pub max_step_tokens: usize,
    /// Maximum number of rows of logits in one step.
    pub max_logits_rows: usize,
    /// Columns of the logits: the vocabulary size, padding included.
    pub vocab_size: usize,
}
