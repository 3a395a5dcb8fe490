//! Reads the `config.json` of a Hugging Face folder, as written by transformers 4 and 5, into a [`ModelConfig`].
//!
//! An unknown key could change the math, and a model that ignored it would produce fluent but wrong text. So every key
//! is read, known to be neutral, required to be off, or an error. A key with the value `null` counts as absent. Two
//! keys that mean the same thing (`head_dim` and `kv_channels`, `rope_theta` here and in `rope_parameters`) must agree.
//! An absent optional key has the default of transformers' `NemotronConfig`.

use std::path::Path;

use serde_json::{Map, Value};

use super::ModelConfig;
use super::json::shown;
use super::keys::{Keys, token_id, token_ids};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// The only supported architecture.
const ARCHITECTURE: &str = "NemotronForCausalLM";
const MODEL_TYPE: &str = "nemotron";

/// `NemotronConfig`'s defaults.
mod default {
    pub const NORM_EPS: f64 = 1e-5;
    pub const ROPE_THETA: f64 = 10_000.0;
    pub const PARTIAL_ROTARY_FACTOR: f64 = 0.5;
    pub const BOS: u32 = 2;
    pub const EOS: u32 = 3;
}

/// Keys whose value cannot change a logit: bookkeeping, training-time settings, and generation defaults that older
/// transformers kept here (they are read from generation_config.json).
const NEUTRAL: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "use_bfloat16",
    "use_cache",
];

/// Keys that turn on unsupported features: only `null`, `false`, `{}` and `[]` are allowed.
const MUST_BE_OFF: &[&str] = &[
    "add_cross_attention",
    "attention_bias",
    "auto_map",
    "compression_config",
    "cross_attention_hidden_size",
    "is_encoder_decoder",
    "mlp_bias",
    "per_layer_config",
    "pruned_heads",
    "quantization_config",
    "sliding_window",
    "use_sliding_window",
];

/// Contents of config.json.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HfConfig {
    /// The architecture, [validated](ModelConfig::validate). Its `dtype` is F32 when none is declared.
    pub model: ModelConfig,
    /// True if the file has a `dtype` or `torch_dtype`.
    pub declares_dtype: bool,
}

/// Parses `object`, the contents of `path`.
///
/// # Errors
/// [`Error::Unsupported`] if a key is unknown or asks for something unsupported, [`Error::Format`] if a value is
/// missing, of the wrong kind, out of range or contradicts another; both name key and value.
pub(super) fn read(path: &Path, object: Map<String, Value>) -> Result<HfConfig> {
    let mut keys = Keys::new(path, object);
    check_architecture(&mut keys)?;
    for key in MUST_BE_OFF {
        keys.must_be_off(key)?;
    }
    match keys.text("hidden_act")?.as_deref() {
        None | Some("relu2") => {}
        Some(other) => return Err(keys.unsupported("hidden_act", other, "\"relu2\"")),
    }

    let hidden_size = keys.required_size("hidden_size")?;
    let num_heads = keys.required_size("num_attention_heads")?;
    let head_dim = match keys.agreeing([("head_dim", None), ("kv_channels", None)], Keys::size)? {
        Some(head_dim) => head_dim,
        None if num_heads != 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let detail = format!("no head_dim, and hidden_size {hidden_size} is not a multiple of {num_heads} heads");
            return Err(Error::format(path, detail));
        }
    };
    let rope = read_rope(&mut keys)?;
    let dtype = keys.agreeing([("dtype", None), ("torch_dtype", None)], Keys::dtype)?;
    let model = ModelConfig {
        vocab_size: keys.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: keys.required_size("intermediate_size")?,
        num_layers: keys.required_size("num_hidden_layers")?,
        num_heads,
        num_kv_heads: keys.size("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim,
        // As in transformers: the product in FP64, truncated.
        rotary_dim: (head_dim as f64 * rope.partial_rotary_factor) as usize,
        rope_theta: rope.theta,
        max_position_embeddings: keys.required_size("max_position_embeddings")?,
        norm_eps: keys.number("norm_eps")?.unwrap_or(default::NORM_EPS),
        tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        dtype: dtype.unwrap_or(DType::F32),
        bos_token_id: match keys.present("bos_token_id") {
            true => token_id(&mut keys, "bos_token_id")?,
            false => Some(default::BOS),
        },
        eos_token_ids: match keys.present("eos_token_id") {
            true => token_ids(&mut keys, "eos_token_id")?,
            false => vec![default::EOS],
        },
    };
    keys.refuse_rest(|key, _| NEUTRAL.contains(&key))?;
    model.validate().map_err(|detail| Error::format(path, detail))?;
    Ok(HfConfig { model, declares_dtype: dtype.is_some() })
}

fn check_architecture(keys: &mut Keys) -> Result<()> {
    let model_type = keys.text("model_type")?;
    if let Some(other) = model_type.as_deref().filter(|name| *name != MODEL_TYPE) {
        return Err(keys.unsupported("model_type", other, "\"nemotron\""));
    }
    match keys.take("architectures") {
        None if model_type.is_some() => Ok(()),
        None => {
            Err(Error::format(keys.path(), "neither model_type nor architectures is set: not a model's config.json"))
        }
        Some(Value::Array(names)) if names == [ARCHITECTURE] => Ok(()),
        Some(other) => Err(keys.unsupported("architectures", shown(&other), "[\"NemotronForCausalLM\"]")),
    }
}

/// The rotary embedding's settings, combined.
struct Rope {
    theta: f64,
    partial_rotary_factor: f64,
}

/// Reads `rope_parameters` (transformers 5), or `rope_scaling` and top-level keys (transformers 4).
fn read_rope(keys: &mut Keys) -> Result<Rope> {
    let mut nested = Vec::new();
    for within in ["rope_parameters", "rope_scaling"] {
        let Some(mut rope) = keys.object(within)? else { continue };
        for key in ["rope_type", "type"] {
            if let Some(other) = rope.text(key)?.filter(|name| name != "default") {
                return Err(rope.unsupported(key, other, "\"default\" (no scaling of positions)"));
            }
        }
        nested.push((within, rope.number("rope_theta")?, rope.number("partial_rotary_factor")?));
        rope.refuse_rest(|_, _| false)?;
    }
    let thetas = nested.iter().map(|(within, theta, _)| (*within, *theta));
    let factors = nested.iter().map(|(within, _, factor)| (*within, *factor));
    let theta = keys.agreeing([("rope_theta", None)].into_iter().chain(thetas), Keys::number)?;
    let own_factors = [("partial_rotary_factor", None), ("rope_percent", None)];
    let factor = keys.agreeing(own_factors.into_iter().chain(factors), Keys::number)?;
    let partial_rotary_factor = factor.unwrap_or(default::PARTIAL_ROTARY_FACTOR);
    if !(partial_rotary_factor > 0.0 && partial_rotary_factor <= 1.0) {
        let detail = format!("partial_rotary_factor is {partial_rotary_factor}, expected above 0 and at most 1");
        return Err(Error::format(keys.path(), detail));
    }
    Ok(Rope { theta: theta.unwrap_or(default::ROPE_THETA), partial_rotary_factor })
}

#[cfg(test)]
mod tests;
