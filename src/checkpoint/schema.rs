//! Which tensors a checkpoint must hold, by name and shape, and the check that it holds exactly those.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::ModelConfig;
use crate::error::clip;
use crate::tensor::DType;

/// The longest config.json, generation_config.json or metadata.json that is read. Real ones have about 1 KB.
pub(super) const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The embedding's name, `[vocab_size, hidden_size]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head's name, `[vocab_size, hidden_size]`; absent when tied to the embedding.
pub(super) const HEAD: &str = "lm_head.weight";

/// How many problems a message lists before it counts the rest.
const LISTED: usize = 5;

/// One tensor a model of some config consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Expected {
    /// Hugging Face's name.
    pub name: String,
    /// Row-major shape; matrices are `[out features, in features]`.
    pub shape: Vec<usize>,
}

/// Every tensor of the model in the order they are used: embedding, layers, final norm, head unless tied.
/// `None` if `config`'s sizes overflow, which [`ModelConfig::validate`] rules out.
pub(super) fn expected(config: &ModelConfig) -> Option<Vec<Expected>> {
    let hidden = config.hidden_size;
    let ffn = config.intermediate_size;
    let query = config.num_heads.checked_mul(config.head_dim)?;
    let kv = config.num_kv_heads.checked_mul(config.head_dim)?;

    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| tensors.push(Expected { name, shape: shape.to_vec() });
    add(EMBEDDING.to_owned(), &[config.vocab_size, hidden]);
    for layer in 0..config.num_layers {
        let mut add = |part: &str, shape: &[usize]| add(format!("model.layers.{layer}.{part}"), shape);
        add("input_layernorm.weight", &[hidden]);
        add("input_layernorm.bias", &[hidden]);
        add("self_attn.q_proj.weight", &[query, hidden]);
        add("self_attn.k_proj.weight", &[kv, hidden]);
        add("self_attn.v_proj.weight", &[kv, hidden]);
        add("self_attn.o_proj.weight", &[hidden, query]);
        add("post_attention_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.bias", &[hidden]);
        add("mlp.up_proj.weight", &[ffn, hidden]);
        add("mlp.down_proj.weight", &[hidden, ffn]);
    }
    add("model.norm.weight".to_owned(), &[hidden]);
    add("model.norm.bias".to_owned(), &[hidden]);
    if !config.tie_word_embeddings {
        add(HEAD.to_owned(), &[config.vocab_size, hidden]);
    }
    Some(tensors)
}

/// Whether `name` is a buffer that older writers stored and that is computed from the config instead.
pub(super) fn is_computed_buffer(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// The element type of weights stored as `dtype`, if weights may be stored so.
pub(super) fn weight_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Checks that `found` (name to dtype and shape) is `expected`, no tensor less or more. The head of a tied model and
/// computed buffers may be there too.
///
/// # Errors
/// The first five differences and the number of the others, for the caller to put the checkpoint's name before.
pub(super) fn check(expected: &[Expected], found: &BTreeMap<&str, (Dtype, &[usize])>) -> Result<(), String> {
    let mut problems = Problems::default();
    let mut known = 0;
    for Expected { name, shape } in expected {
        let Some((dtype, found_shape)) = found.get(name.as_str()) else {
            problems.add(|| format!("`{name}` {shape:?} is missing"));
            continue;
        };
        known += 1;
        if found_shape != shape {
            let found_shape = clip(format_args!("{found_shape:?}"));
            problems.add(|| format!("`{name}` has shape {found_shape}, expected {shape:?}"));
        }
        if weight_dtype(*dtype).is_none() {
            problems.add(|| format!("`{name}` is stored as {dtype:?}, expected F32, F16 or BF16"));
        }
    }
    let surplus = found.len() - known;
    if surplus > 0 {
        let expected: std::collections::HashSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
        for (name, (dtype, shape)) in found {
            if !expected.contains(name) && *name != HEAD && !is_computed_buffer(name) {
                let shape = clip(format_args!("{shape:?}"));
                problems.add(|| format!("`{}` ({dtype:?} {shape}) is no part of this model", clip(name)));
            }
        }
    }
    problems.finish("config.json")
}

/// Collects differences without keeping more than a message shows.
#[derive(Debug, Default)]
pub(super) struct Problems {
    listed: Vec<String>,
    count: usize,
}

impl Problems {
    /// Adds a difference, in words.
    pub fn add(&mut self, problem: impl FnOnce() -> String) {
        if self.count < LISTED {
            self.listed.push(problem());
        }
        self.count += 1;
    }

    /// The first five differences from `config` and the number of the others, if there are any.
    pub fn finish(self, config: &str) -> Result<(), String> {
        if self.count == 0 {
            return Ok(());
        }
        let rest = match self.count - self.listed.len() {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        Err(format!("the weights do not fit {config}: {}{rest}", self.listed.join("; ")))
    }
}
