//! Names of a `.nemo`'s tensors, and their roles.
//!
//! Two generations of code wrote them: NeMo's own GPT (`model.language_model.encoder.layers.3.…`) and Megatron-Core
//! (`model.decoder.layers.3.…`), the latter with or without Transformer Engine's layers, which fuse a norm with the
//! linear layer after it. Distributed checkpoints drop the layer number and stack the layers along a new first axis.

use super::is_extra_state;
use crate::checkpoint::ModelConfig;
use crate::checkpoint::schema::{NemoNames, SCHEMA, TensorRole, TensorScope, TensorSpec};

/// A tensor as a `.nemo` stores it: one of the model, or several fused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NemoTensor {
    /// The first of the model's tensors in it.
    first: TensorRole,
}

impl NemoTensor {
    /// All of them, in the order of use.
    pub fn all() -> impl Iterator<Item = NemoTensor> {
        SCHEMA.chunk_by(|one, next| one.nemo == next.nemo).map(|fused| NemoTensor { first: fused[0].role })
    }

    pub const EMBEDDING: NemoTensor = NemoTensor { first: TensorRole::Embedding };

    /// The model's tensors in it, in order.
    pub fn specs(self) -> impl Iterator<Item = &'static TensorSpec> {
        SCHEMA.iter().filter(move |spec| spec.nemo == self.first.spec().nemo)
    }

    pub fn is_in_layers(self) -> bool {
        self.first.spec().scope == TensorScope::Layer
    }

    pub fn is_in(self, config: &ModelConfig) -> bool {
        self.specs().all(|spec| spec.is_in(config))
    }

    /// The axis along which tensor parallelism splits it; `None` if it is replicated.
    pub fn split_axis(self) -> Option<usize> {
        self.first.spec().nemo.split_axis
    }

    /// Row-major shape, with fused tensors stacked by rows; `None` if `config`'s sizes overflow.
    pub fn shape(self, config: &ModelConfig) -> Option<Vec<usize>> {
        let mut whole = self.first.shape(config)?;
        for spec in self.specs().skip(1) {
            let (rows, more) = (whole.first_mut()?, *spec.role.shape(config)?.first()?);
            *rows = rows.checked_add(more)?;
        }
        Some(whole)
    }

    /// Description for the message that it is missing.
    pub fn described(self, layer: Option<usize>) -> String {
        let NemoNames { legacy, core, .. } = &self.first.spec().nemo;
        let (legacy, core) = (legacy[0], core[0]);
        if self.is_in_layers() {
            let layer = layer.map_or_else(String::new, |layer| format!("{layer}."));
            return format!("`….layers.{layer}{core}` (or `{legacy}`)");
        }
        // Without the enclosing module, which differs between the two schemes.
        let name = format!(
            "`….{}`",
            core.split_once('.').map_or(core, |(_, inner)| if inner.contains('.') { inner } else { core })
        );
        match self.first {
            TensorRole::Embedding => format!("the embedding ({name})"),
            TensorRole::Head => format!("the head ({name})"),
            _ => name,
        }
    }
}

/// The naming scheme of one generation of code.
struct Naming {
    /// Prefix of names outside the layers.
    root: &'static str,
    /// Prefix of a layer number.
    layers: &'static str,
    names: fn(&'static NemoNames) -> &'static [&'static str],
}

const NAMINGS: [Naming; 2] = [
    Naming { root: "language_model.", layers: "language_model.encoder.layers.", names: |names| names.legacy },
    Naming { root: "", layers: "decoder.layers.", names: |names| names.core },
];

impl Naming {
    /// The tensor called `name`, after the root or the layer number.
    fn find(&self, scope: TensorScope, name: &str) -> Option<NemoTensor> {
        let named = |spec: &&'static TensorSpec| spec.scope == scope && (self.names)(&spec.nemo).contains(&name);
        SCHEMA.iter().find(named).map(|spec| NemoTensor { first: spec.role })
    }
}

/// Meaning of a tensor's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A tensor of the architecture. A layer's tensor without `layer` is the stack of all layers.
    Weight {
        tensor: NemoTensor,
        layer: Option<usize>,
    },
    /// Not used in inference: derived from the config, or a library's state.
    Ignored,
    /// The copy of the embedding on the last pipeline stage, for a tied head.
    TiedCopy,
    Unknown,
}

/// Identifies the tensor called `name`.
pub(super) fn meaning(name: &str) -> Meaning {
    let mut name = name.replace("._orig_mod", "");
    // Wrappers: always `model.`, and `module.` around a model in half precision.
    while let Some(rest) = name.strip_prefix("model.").or_else(|| name.strip_prefix("module.")) {
        name = rest.to_owned();
    }
    if is_extra_state(&name) || name.ends_with("rotary_pos_emb.inv_freq") {
        return Meaning::Ignored;
    }
    if name == "word_embeddings.weight" {
        return Meaning::TiedCopy;
    }
    for naming in &NAMINGS {
        if let Some(rest) = name.strip_prefix(naming.layers) {
            let (layer, rest) = match rest.split_once('.') {
                Some((number, rest)) if number.bytes().all(|byte| byte.is_ascii_digit()) => match number.parse() {
                    Ok(layer) => (Some(layer), rest),
                    Err(_) => return Meaning::Unknown,
                },
                _ => (None, rest),
            };
            let tensor = naming.find(TensorScope::Layer, rest);
            return tensor.map_or(Meaning::Unknown, |tensor| Meaning::Weight { tensor, layer });
        }
        let rest = name.strip_prefix(naming.root);
        if let Some(tensor) = rest.and_then(|rest| naming.find(TensorScope::Model, rest)) {
            return Meaning::Weight { tensor, layer: None };
        }
    }
    Meaning::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_every_generation_of_names() {
        let weight = |first, layer| Meaning::Weight { tensor: NemoTensor { first }, layer };
        let qkv = |layer| weight(TensorRole::Query, layer);
        let post = |layer| weight(TensorRole::PostNormBias, layer);
        for (name, expected) in [
            ("model.language_model.encoder.layers.31.self_attention.query_key_value.weight", qkv(Some(31))),
            ("model.module.language_model.encoder.layers.0.self_attention.query_key_value.weight", qkv(Some(0))),
            ("model.decoder.layers.7.self_attention.linear_qkv.weight", qkv(Some(7))),
            ("model._orig_mod.decoder.layers.7.self_attention.linear_qkv.weight", qkv(Some(7))),
            ("model.decoder.layers.self_attention.linear_qkv.weight", qkv(None)),
            ("model.decoder.layers.2.mlp.linear_fc1.layer_norm_bias", post(Some(2))),
            ("model.decoder.layers.2.pre_mlp_layernorm.bias", post(Some(2))),
            ("model.decoder.layers.2.post_self_attn_layernorm.bias", post(Some(2))),
            ("model.decoder.layers.pre_mlp_layernorm.bias", post(None)),
            ("model.embedding.word_embeddings.weight", weight(TensorRole::Embedding, None)),
            ("model.output_layer.weight", weight(TensorRole::Head, None)),
            ("model.word_embeddings.weight", Meaning::TiedCopy),
            ("model.decoder.layers.0.self_attention.linear_qkv._extra_state", Meaning::Ignored),
            ("model.decoder.layers.self_attention.core_attention._extra_state/shard_0_32", Meaning::Ignored),
            ("model.rotary_pos_emb.inv_freq", Meaning::Ignored),
            ("model.decoder.layers.0.self_attention.linear_qkv.bias", Meaning::Unknown),
            ("model.decoder.layers.99999999999999999999999.mlp.linear_fc1.weight", Meaning::Unknown),
            ("model.decoder.layers.0.self_attention.query_key_value.weight", Meaning::Unknown),
            ("model.rm_head.weight", Meaning::Unknown),
            ("", Meaning::Unknown),
        ] {
            assert_eq!(meaning(name), expected, "{name}");
        }
    }
    #[test]
    fn every_tensor_is_found_under_every_name_it_has() {
        for spec in &SCHEMA {
            let tensor = NemoTensor::all().find(|tensor| tensor.specs().any(|other| other.role == spec.role)).unwrap();
            for naming in &NAMINGS {
                let names = (naming.names)(&spec.nemo);
                assert!(!names.is_empty(), "{:?}", spec.role);
                for name in names {
                    let (full, layer) = match spec.scope {
                        TensorScope::Model => (format!("model.{}{name}", naming.root), None),
                        TensorScope::Layer => (format!("model.{}7.{name}", naming.layers), Some(7)),
                    };
                    assert_eq!(meaning(&full), Meaning::Weight { tensor, layer }, "{full}");
                }
            }
        }
    }

    #[test]
    fn a_missing_tensor_is_described_by_the_names_it_could_have() {
        let described = |first, layer| NemoTensor { first }.described(layer);
        assert_eq!(described(TensorRole::Embedding, None), "the embedding (`….word_embeddings.weight`)");
        assert_eq!(described(TensorRole::Head, None), "the head (`….output_layer.weight`)");
        assert_eq!(described(TensorRole::FinalNormBias, None), "`….final_layernorm.bias`");
        assert_eq!(
            described(TensorRole::Query, Some(3)),
            "`….layers.3.self_attention.linear_qkv.weight` (or `self_attention.query_key_value.weight`)"
        );
    }
}
