//! What the tensors of a `.nemo` are called, and what they are.
//!
//! Two generations of code wrote them: NeMo's own GPT (`model.language_model.encoder.layers.3.…`) and Megatron-Core
//! (`model.decoder.layers.3.…`), the latter with Transformer Engine's layers, which fuse a norm with the product behind
//! it, or without. Distributed checkpoints drop the number of the layer and stack the layers on a new first axis.

use super::is_extra_state;

/// One tensor of the architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Part {
    Embedding,
    Head,
    FinalNormWeight,
    FinalNormBias,
    Layer(LayerPart),
}

/// One tensor of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum LayerPart {
    InputNormWeight,
    InputNormBias,
    /// Queries, keys and values, by groups of heads.
    Qkv,
    AttentionOutput,
    PostNormWeight,
    PostNormBias,
    Up,
    Down,
}

impl LayerPart {
    /// All of them, in the order of use.
    pub const ALL: [LayerPart; 8] = [
        LayerPart::InputNormWeight,
        LayerPart::InputNormBias,
        LayerPart::Qkv,
        LayerPart::AttentionOutput,
        LayerPart::PostNormWeight,
        LayerPart::PostNormBias,
        LayerPart::Up,
        LayerPart::Down,
    ];
}

impl Part {
    /// The axis along which tensor parallelism splits it; `None` if every rank has all of it.
    pub const fn tensor_parallel_axis(self) -> Option<usize> {
        match self {
            Part::Embedding | Part::Head | Part::Layer(LayerPart::Qkv | LayerPart::Up) => Some(0),
            Part::Layer(LayerPart::AttentionOutput | LayerPart::Down) => Some(1),
            Part::FinalNormWeight | Part::FinalNormBias => None,
            Part::Layer(
                LayerPart::InputNormWeight
                | LayerPart::InputNormBias
                | LayerPart::PostNormWeight
                | LayerPart::PostNormBias,
            ) => None,
        }
    }

    /// What it is called in messages about one that is missing.
    pub fn described(self, layer: Option<usize>) -> String {
        let part = match self {
            Part::Embedding => return "the embedding (`….word_embeddings.weight`)".to_owned(),
            Part::Head => return "the head (`….output_layer.weight`)".to_owned(),
            Part::FinalNormWeight => return "`….final_layernorm.weight`".to_owned(),
            Part::FinalNormBias => return "`….final_layernorm.bias`".to_owned(),
            Part::Layer(part) => part,
        };
        let (legacy, core) = match part {
            LayerPart::InputNormWeight => ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            LayerPart::InputNormBias => ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"),
            LayerPart::Qkv => ("self_attention.query_key_value.weight", "self_attention.linear_qkv.weight"),
            LayerPart::AttentionOutput => ("self_attention.dense.weight", "self_attention.linear_proj.weight"),
            LayerPart::PostNormWeight => ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            LayerPart::PostNormBias => ("post_attention_layernorm.bias", "mlp.linear_fc1.layer_norm_bias"),
            LayerPart::Up => ("mlp.dense_h_to_4h.weight", "mlp.linear_fc1.weight"),
            LayerPart::Down => ("mlp.dense_4h_to_h.weight", "mlp.linear_fc2.weight"),
        };
        let layer = layer.map_or_else(String::new, |layer| format!("{layer}."));
        format!("`….layers.{layer}{core}` (or `{legacy}`)")
    }
}

/// What a name means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A tensor of the architecture. A layer's tensor without a layer is the stack of all layers'.
    Weight {
        part: Part,
        layer: Option<usize>,
    },
    /// Nothing that the model computes with: what is derived from the config, or a library's state.
    Ignored,
    /// The embedding once more, on the last of several pipeline stages; only where the head shares its weights.
    TiedCopy,
    Unknown,
}

/// What the tensor called `name` is.
pub(super) fn meaning(name: &str) -> Meaning {
    let mut name = name.replace("._orig_mod", "");
    // Wrappers: `model.` always, `module.` where a model in half precision was wrapped.
    while let Some(rest) = name.strip_prefix("model.").or_else(|| name.strip_prefix("module.")) {
        name = rest.to_owned();
    }
    if is_extra_state(&name) || name.ends_with("rotary_pos_emb.inv_freq") {
        return Meaning::Ignored;
    }
    let global = |part| Meaning::Weight { part, layer: None };
    match name.as_str() {
        "language_model.embedding.word_embeddings.weight" | "embedding.word_embeddings.weight" => {
            return global(Part::Embedding);
        }
        "language_model.output_layer.weight" | "output_layer.weight" => return global(Part::Head),
        "language_model.encoder.final_layernorm.weight" | "decoder.final_layernorm.weight" => {
            return global(Part::FinalNormWeight);
        }
        "language_model.encoder.final_layernorm.bias" | "decoder.final_layernorm.bias" => {
            return global(Part::FinalNormBias);
        }
        "word_embeddings.weight" => return Meaning::TiedCopy,
        _ => {}
    }
    let (rest, in_layer): (_, fn(&str) -> Option<LayerPart>) = if let Some(rest) = name.strip_prefix("decoder.layers.")
    {
        (rest, core_part)
    } else if let Some(rest) = name.strip_prefix("language_model.encoder.layers.") {
        (rest, legacy_part)
    } else {
        return Meaning::Unknown;
    };
    let (layer, rest) = match rest.split_once('.') {
        Some((number, rest)) if number.bytes().all(|byte| byte.is_ascii_digit()) => match number.parse() {
            Ok(layer) => (Some(layer), rest),
            Err(_) => return Meaning::Unknown,
        },
        _ => (None, rest),
    };
    match in_layer(rest) {
        Some(part) => Meaning::Weight { part: Part::Layer(part), layer },
        None => Meaning::Unknown,
    }
}

fn core_part(name: &str) -> Option<LayerPart> {
    Some(match name {
        "self_attention.linear_qkv.layer_norm_weight" | "input_layernorm.weight" => LayerPart::InputNormWeight,
        "self_attention.linear_qkv.layer_norm_bias" | "input_layernorm.bias" => LayerPart::InputNormBias,
        "self_attention.linear_qkv.weight" => LayerPart::Qkv,
        "self_attention.linear_proj.weight" => LayerPart::AttentionOutput,
        "mlp.linear_fc1.layer_norm_weight" | "pre_mlp_layernorm.weight" | "post_self_attn_layernorm.weight" => {
            LayerPart::PostNormWeight
        }
        "mlp.linear_fc1.layer_norm_bias" | "pre_mlp_layernorm.bias" | "post_self_attn_layernorm.bias" => {
            LayerPart::PostNormBias
        }
        "mlp.linear_fc1.weight" => LayerPart::Up,
        "mlp.linear_fc2.weight" => LayerPart::Down,
        _ => return None,
    })
}

fn legacy_part(name: &str) -> Option<LayerPart> {
    Some(match name {
        "input_layernorm.weight" => LayerPart::InputNormWeight,
        "input_layernorm.bias" => LayerPart::InputNormBias,
        "self_attention.query_key_value.weight" => LayerPart::Qkv,
        "self_attention.dense.weight" => LayerPart::AttentionOutput,
        "post_attention_layernorm.weight" => LayerPart::PostNormWeight,
        "post_attention_layernorm.bias" => LayerPart::PostNormBias,
        "mlp.dense_h_to_4h.weight" => LayerPart::Up,
        "mlp.dense_4h_to_h.weight" => LayerPart::Down,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_every_generation_of_names() {
        let qkv = |layer| Meaning::Weight { part: Part::Layer(LayerPart::Qkv), layer };
        let post = |layer| Meaning::Weight { part: Part::Layer(LayerPart::PostNormBias), layer };
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
            ("model.embedding.word_embeddings.weight", Meaning::Weight { part: Part::Embedding, layer: None }),
            ("model.output_layer.weight", Meaning::Weight { part: Part::Head, layer: None }),
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
}
