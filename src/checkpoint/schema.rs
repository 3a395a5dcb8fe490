//! The tensors of the architecture, defined once: shape, name in every kind of checkpoint, and the graph value that
//! reads it. Readers, graph and parameter count derive from this list.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::ModelConfig;
use crate::error::clip;
use crate::tensor::DType;

/// Size limit of config.json, generation_config.json and metadata.json. Real ones have about 1 KB.
pub(super) const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The embedding's name, `[vocab_size, hidden_size]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head's name, `[vocab_size, hidden_size]`; absent when tied to the embedding.
pub(super) const HEAD: &str = "lm_head.weight";

/// Role of a tensor in the architecture; most occur once per layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorRole {
    /// Token embedding.
    Embedding,
    /// Scales of the norm before attention, minus one (LayerNorm1P).
    InputNormWeight,
    /// Offsets of the norm before attention.
    InputNormBias,
    /// Projection to queries.
    Query,
    /// Projection to keys.
    Key,
    /// Projection to values.
    Value,
    /// Output projection of attention.
    AttentionOutput,
    /// Scales of the norm before the MLP, minus one.
    PostNormWeight,
    /// Offsets of the norm before the MLP.
    PostNormBias,
    /// First projection of the MLP.
    Up,
    /// Second projection of the MLP.
    Down,
    /// Scales of the final norm, minus one.
    FinalNormWeight,
    /// Offsets of the final norm.
    FinalNormBias,
    /// Projection to logits; absent if tied to the embedding.
    Head,
}

/// Tensors that occur once, or once per layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorScope {
    Model,
    Layer,
}

/// One dimension of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorSize {
    Vocab,
    Hidden,
    /// Width inside the MLP.
    Intermediate,
    /// All query heads.
    Queries,
    /// All key heads, or all value heads.
    KeyValues,
}

/// A tensor's names in a `.nemo`, and how tensor parallelism splits it. Tensors of equal names are stored fused: for
/// each head group, the rows of the first, then of the next.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NemoNames {
    /// In NeMo's own GPT, after `language_model.`, or after `language_model.encoder.layers.3.` in a layer.
    pub legacy: &'static [&'static str],
    /// In Megatron-Core, after `decoder.layers.3.` in a layer; the first is that of Transformer Engine's fused modules.
    pub core: &'static [&'static str],
    /// The axis along which tensor parallelism splits it; `None` if it is replicated.
    pub split_axis: Option<usize>,
}

/// One row of [`SCHEMA`].
#[derive(Debug)]
pub(super) struct TensorSpec {
    pub role: TensorRole,
    pub scope: TensorScope,
    /// Row-major; matrices are `[out features, in features]`.
    shape: &'static [TensorSize],
    /// Hugging Face's name; in a layer, after `model.layers.3.`.
    hugging_face: &'static str,
    /// The graph value computed with it; in a layer, after `layers.3.`.
    module: &'static str,
    pub nemo: NemoNames,
}

const QKV: NemoNames = NemoNames {
    legacy: &["self_attention.query_key_value.weight"],
    core: &["self_attention.linear_qkv.weight"],
    split_axis: Some(0),
};

/// Every tensor of the architecture in the order of use, each at the index of its role.
pub(super) static SCHEMA: [TensorSpec; 14] = {
    use TensorRole as Role;
    use TensorScope::{Layer, Model};
    use TensorSize::{Hidden, Intermediate, KeyValues, Queries, Vocab};
    [
        TensorSpec {
            role: Role::Embedding,
            scope: Model,
            shape: &[Vocab, Hidden],
            hugging_face: EMBEDDING,
            module: "embedding",
            nemo: NemoNames {
                legacy: &["embedding.word_embeddings.weight"],
                core: &["embedding.word_embeddings.weight"],
                split_axis: Some(0),
            },
        },
        TensorSpec {
            role: Role::InputNormWeight,
            scope: Layer,
            shape: &[Hidden],
            hugging_face: "input_layernorm.weight",
            module: "attention.norm",
            nemo: NemoNames {
                legacy: &["input_layernorm.weight"],
                core: &["self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"],
                split_axis: None,
            },
        },
        TensorSpec {
            role: Role::InputNormBias,
            scope: Layer,
            shape: &[Hidden],
            hugging_face: "input_layernorm.bias",
            module: "attention.norm",
            nemo: NemoNames {
                legacy: &["input_layernorm.bias"],
                core: &["self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias"],
                split_axis: None,
            },
        },
        TensorSpec {
            role: Role::Query,
            scope: Layer,
            shape: &[Queries, Hidden],
            hugging_face: "self_attn.q_proj.weight",
            module: "attention.q",
            nemo: QKV,
        },
        TensorSpec {
            role: Role::Key,
            scope: Layer,
            shape: &[KeyValues, Hidden],
            hugging_face: "self_attn.k_proj.weight",
            module: "attention.k",
            nemo: QKV,
        },
        TensorSpec {
            role: Role::Value,
            scope: Layer,
            shape: &[KeyValues, Hidden],
            hugging_face: "self_attn.v_proj.weight",
            module: "attention.v",
            nemo: QKV,
        },
        TensorSpec {
            role: Role::AttentionOutput,
            scope: Layer,
            shape: &[Hidden, Queries],
            hugging_face: "self_attn.o_proj.weight",
            module: "attention.o",
            nemo: NemoNames {
                legacy: &["self_attention.dense.weight"],
                core: &["self_attention.linear_proj.weight"],
                split_axis: Some(1),
            },
        },
        TensorSpec {
            role: Role::PostNormWeight,
            scope: Layer,
            shape: &[Hidden],
            hugging_face: "post_attention_layernorm.weight",
            module: "mlp.norm",
            nemo: NemoNames {
                legacy: &["post_attention_layernorm.weight"],
                core: &[
                    "mlp.linear_fc1.layer_norm_weight",
                    "pre_mlp_layernorm.weight",
                    "post_self_attn_layernorm.weight",
                ],
                split_axis: None,
            },
        },
        TensorSpec {
            role: Role::PostNormBias,
            scope: Layer,
            shape: &[Hidden],
            hugging_face: "post_attention_layernorm.bias",
            module: "mlp.norm",
            nemo: NemoNames {
                legacy: &["post_attention_layernorm.bias"],
                core: &["mlp.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias", "post_self_attn_layernorm.bias"],
                split_axis: None,
            },
        },
        TensorSpec {
            role: Role::Up,
            scope: Layer,
            shape: &[Intermediate, Hidden],
            hugging_face: "mlp.up_proj.weight",
            module: "mlp.up",
            nemo: NemoNames {
                legacy: &["mlp.dense_h_to_4h.weight"],
                core: &["mlp.linear_fc1.weight"],
                split_axis: Some(0),
            },
        },
        TensorSpec {
            role: Role::Down,
            scope: Layer,
            shape: &[Hidden, Intermediate],
            hugging_face: "mlp.down_proj.weight",
            module: "mlp.down",
            nemo: NemoNames {
                legacy: &["mlp.dense_4h_to_h.weight"],
                core: &["mlp.linear_fc2.weight"],
                split_axis: Some(1),
            },
        },
        TensorSpec {
            role: Role::FinalNormWeight,
            scope: Model,
            shape: &[Hidden],
            hugging_face: "model.norm.weight",
            module: "norm",
            nemo: NemoNames {
                legacy: &["encoder.final_layernorm.weight"],
                core: &["decoder.final_layernorm.weight"],
                split_axis: None,
            },
        },
        TensorSpec {
            role: Role::FinalNormBias,
            scope: Model,
            shape: &[Hidden],
            hugging_face: "model.norm.bias",
            module: "norm",
            nemo: NemoNames {
                legacy: &["encoder.final_layernorm.bias"],
                core: &["decoder.final_layernorm.bias"],
                split_axis: None,
            },
        },
        TensorSpec {
            role: Role::Head,
            scope: Model,
            shape: &[Vocab, Hidden],
            hugging_face: HEAD,
            module: "logits",
            nemo: NemoNames { legacy: &["output_layer.weight"], core: &["output_layer.weight"], split_axis: Some(0) },
        },
    ]
};

impl TensorRole {
    /// Hugging Face's name. `layer` is ignored for tensors outside the layers.
    pub fn name(self, layer: usize) -> String {
        match self.spec() {
            TensorSpec { scope: TensorScope::Model, hugging_face, .. } => (*hugging_face).to_owned(),
            TensorSpec { scope: TensorScope::Layer, hugging_face, .. } => {
                format!("model.layers.{layer}.{hugging_face}")
            }
        }
    }

    /// Name of the graph value computed with it.
    pub fn module(self, layer: usize) -> String {
        match self.spec() {
            TensorSpec { scope: TensorScope::Model, module, .. } => (*module).to_owned(),
            TensorSpec { scope: TensorScope::Layer, module, .. } => format!("layers.{layer}.{module}"),
        }
    }

    /// Row-major shape; matrices are `[out features, in features]`. `None` if `config`'s sizes overflow, which
    /// [`ModelConfig::validate`] rules out.
    pub fn shape(self, config: &ModelConfig) -> Option<Vec<usize>> {
        self.spec().shape.iter().map(|size| size.of(config)).collect()
    }

    pub(super) fn spec(self) -> &'static TensorSpec {
        &SCHEMA[self as usize]
    }
}

impl TensorSize {
    fn of(self, config: &ModelConfig) -> Option<usize> {
        match self {
            TensorSize::Vocab => Some(config.vocab_size),
            TensorSize::Hidden => Some(config.hidden_size),
            TensorSize::Intermediate => Some(config.intermediate_size),
            TensorSize::Queries => config.num_heads.checked_mul(config.head_dim),
            TensorSize::KeyValues => config.num_kv_heads.checked_mul(config.head_dim),
        }
    }
}

impl TensorSpec {
    /// Returns false for a tied head, which is the embedding.
    pub fn is_in(&self, config: &ModelConfig) -> bool {
        self.role != TensorRole::Head || !config.tie_word_embeddings
    }
}

/// Number of elements of all tensors; `None` if it does not fit a `usize`.
pub(super) fn parameters(config: &ModelConfig) -> Option<usize> {
    SCHEMA.iter().filter(|spec| spec.is_in(config)).try_fold(0usize, |sum, spec| {
        let once = spec.role.shape(config)?.into_iter().try_fold(1usize, usize::checked_mul)?;
        let times = if spec.scope == TensorScope::Layer { config.num_layers } else { 1 };
        sum.checked_add(once.checked_mul(times)?)
    })
}

/// Number of problems that a message lists; the rest are only counted.
const LISTED: usize = 5;

/// A tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Expected {
    /// Hugging Face's name.
    pub name: String,
    /// Row-major shape; matrices are `[out features, in features]`.
    pub shape: Vec<usize>,
}

/// Every tensor of the model in the order of use: embedding, layers, final norm, head unless tied. `None` if `config`'s
/// sizes overflow, which [`ModelConfig::validate`] rules out.
pub(super) fn expected(config: &ModelConfig) -> Option<Vec<Expected>> {
    let mut tensors = Vec::new();
    for specs in SCHEMA.chunk_by(|one, next| one.scope == next.scope) {
        let times = match specs[0].scope {
            TensorScope::Model => 1,
            TensorScope::Layer => config.num_layers,
        };
        for layer in 0..times {
            for TensorSpec { role, .. } in specs.iter().filter(|spec| spec.is_in(config)) {
                tensors.push(Expected { name: role.name(layer), shape: role.shape(config)? });
            }
        }
    }
    Some(tensors)
}

/// Returns true if `name` is a buffer that older writers stored; it is computed from the config instead.
pub(super) fn is_computed_buffer(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// The element type of weights stored as `dtype`; `None` if weights cannot have it.
pub(super) fn weight_dtype(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Checks that `found` (name to dtype and shape) has exactly the `expected` tensors. A tied head and computed buffers
/// may be present too.
///
/// # Errors
/// The first five differences and the number of the others. The caller prefixes the checkpoint's name.
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
                problems.add(|| format!("`{}` ({dtype:?} {shape}) is not a tensor of this model", clip(name)));
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
        Err(format!("the weights do not match {config}: {}{rest}", self.listed.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::{model_config, tiny_config};

    #[test]
    fn each_role_has_the_row_of_its_number() {
        for (index, spec) in SCHEMA.iter().enumerate() {
            assert_eq!(spec.role as usize, index, "{:?}", spec.role);
            assert!(std::ptr::eq(spec.role.spec(), spec));
        }
    }

    #[test]
    fn parameters_are_the_elements_of_the_expected_tensors() {
        for is_tied in [false, true] {
            let mut config = model_config(&tiny_config());
            config.tie_word_embeddings = is_tied;
            let expected = expected(&config).unwrap();
            let elements = expected.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
            assert_eq!(parameters(&config), Some(elements));
            assert_eq!(expected.iter().filter(|tensor| tensor.name == HEAD).count(), usize::from(!is_tied));
            assert_eq!(expected[0].name, EMBEDDING);
            let names: std::collections::HashSet<&String> = expected.iter().map(|tensor| &tensor.name).collect();
            assert_eq!(names.len(), expected.len(), "no name is given twice");
        }
    }
}
