//! The architecture of a checkpoint, in one form for every kind of checkpoint.

use serde::{Deserialize, Serialize};

use super::schema;
use crate::tensor::DType;

/// Everything about the model that its weights do not determine. All values come from the checkpoint's own config.
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

/// Maximum number of blocks: far above any real model, low enough to list all tensors.
const MAX_LAYERS: usize = 4096;

impl ModelConfig {
    /// Checks that the values describe a valid model, so that sizes derived from them cannot overflow: every size is 1
    /// to 2^31 - 1 (ids and positions are 32-bit), and the weights' bytes fit an `isize`.
    ///
    /// # Errors
    /// The problem, in a sentence with the values; the caller prefixes the file's name.
    pub fn validate(&self) -> Result<(), String> {
        for (name, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("rotary_dim", self.rotary_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if size == 0 || size > i32::MAX as usize {
                return Err(format!("{name} is {size}, expected 1 to {}", i32::MAX));
            }
        }
        let ModelConfig { num_layers, num_heads, num_kv_heads, head_dim, rotary_dim, vocab_size, .. } = *self;
        if num_layers > MAX_LAYERS {
            return Err(format!("num_layers is {num_layers}, expected at most {MAX_LAYERS}"));
        }
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(format!("{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads"));
        }
        if rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            return Err(format!("rotary_dim is {rotary_dim}, expected an even number up to head_dim {head_dim}"));
        }
        for (name, value) in [("norm_eps", self.norm_eps), ("rope_theta", self.rope_theta)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(format!("{name} is {value}, expected a finite number above 0"));
            }
        }
        for id in self.bos_token_id.iter().chain(&self.eos_token_ids) {
            if *id as usize >= vocab_size {
                return Err(format!("token id {id} is outside the vocabulary of {vocab_size}"));
            }
        }
        let bytes = self.parameters().and_then(|count| count.checked_mul(DType::F32.bytes()));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err("a model of these sizes exceeds the address space".to_owned());
        }
        Ok(())
    }

    /// Number of weights, norms included; `None` if it does not fit a `usize`.
    pub fn parameters(&self) -> Option<usize> {
        schema::parameters(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nemotron_8b() -> ModelConfig {
        ModelConfig {
            vocab_size: 256_000,
            hidden_size: 4096,
            intermediate_size: 16384,
            num_layers: 32,
            num_heads: 32,
            num_kv_heads: 32,
            head_dim: 128,
            rotary_dim: 64,
            rope_theta: 10_000.0,
            max_position_embeddings: 4096,
            norm_eps: 1e-5,
            tie_word_embeddings: false,
            dtype: DType::BF16,
            bos_token_id: Some(2),
            eos_token_ids: vec![3],
        }
    }

    #[test]
    fn counts_the_8b_models_parameters() {
        assert_eq!(nemotron_8b().parameters(), Some(8_540_135_424));
        assert_eq!(nemotron_8b().validate(), Ok(()));
    }

    #[test]
    fn refuses_values_that_make_no_model() {
        type Change = fn(&mut ModelConfig);
        let cases: &[(Change, &str)] = &[
            (|c| c.hidden_size = 0, "hidden_size is 0"),
            (|c| c.vocab_size = 1 << 31, "vocab_size is 2147483648, expected 1 to 2147483647"),
            (|c| c.num_layers = 4097, "num_layers is 4097"),
            (|c| c.num_kv_heads = 12, "32 query heads are not a multiple of 12"),
            (|c| c.rotary_dim = 0, "rotary_dim is 0"),
            (|c| c.rotary_dim = 63, "rotary_dim is 63, expected an even number"),
            (|c| c.rotary_dim = 130, "up to head_dim 128"),
            (|c| c.norm_eps = 0.0, "norm_eps is 0"),
            (|c| c.norm_eps = f64::NAN, "norm_eps is NaN"),
            (|c| c.rope_theta = f64::INFINITY, "rope_theta is inf"),
            (|c| c.rope_theta = -1.0, "rope_theta is -1"),
            (|c| c.bos_token_id = Some(256_000), "token id 256000 is outside the vocabulary"),
            (|c| c.eos_token_ids = vec![3, 300_000], "token id 300000"),
            (|c| (c.hidden_size, c.intermediate_size) = (1 << 30, 1 << 30), "exceeds the address space"),
            (|c| (c.num_heads, c.head_dim, c.hidden_size) = (1 << 25, 1 << 30, 1 << 30), "exceeds the address space"),
        ];
        for (change, expected) in cases {
            let mut config = nemotron_8b();
            change(&mut config);
            let error = config.validate().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
