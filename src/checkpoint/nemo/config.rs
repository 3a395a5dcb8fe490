//! Reads the `model_config.yaml` of a `.nemo`, as written by NeMo 1 and NeMo-Aligner.
//!
//! As in a Hugging Face config, every key is read, known to be neutral, required to be off, or an error. An absent key
//! has NeMo's default, which for most of the architecture is not supported here: a config without `activation` is a
//! GELU model. The file holds the whole configuration of a training run, so most keys are neutral, and an unknown key
//! is ignored if its value is `null`, `false` or empty.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::json::shown;
use crate::checkpoint::keys::{Keys, is_off};
use crate::checkpoint::yaml;
use crate::checkpoint::{ModelConfig, NemoPromptTokens};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Size limit. The config of a training run with many data sets has tens of KB.
const MAX_BYTES: usize = 1 << 20;

/// NeMo's defaults.
mod default {
    pub const LAYERNORM_EPSILON: f64 = 1e-5;
    pub const ROTARY_BASE: f64 = 10_000.0;
    pub const ROTARY_PERCENTAGE: f64 = 1.0;
    pub const MAKE_VOCAB_SIZE_DIVISIBLE_BY: usize = 128;
    /// `ffn_hidden_size` in `hidden_size`s.
    pub const FFN_WIDENING: usize = 4;
}

/// Keys that select a part of the architecture: (key, NeMo's default, the supported value).
const CHOICES: &[(&str, &str, &str)] = &[
    ("activation", "gelu", "squared-relu"),
    ("attention_type", "multihead", "multihead"),
    ("normalization", "layernorm", "layernorm1p"),
    ("position_embedding_type", "learned_absolute", "rope"),
    ("transformer_block_type", "pre_ln", "pre_ln"),
];

/// Flags that change the math: (key, NeMo's default, the supported value).
const FLAGS: &[(&str, bool, bool)] = &[("bias", true, false), ("normalize_attention_scores", true, true)];

/// Keys that turn on unsupported features: only `null`, `false`, `{}` and `[]` are allowed. Some are NeMo's, the others
/// fields of Megatron-Core's configuration, which NeMo passes on by name.
const MUST_BE_OFF: &[&str] = &[
    "add_qkv_bias",
    "apply_embedding_scaling",
    "apply_residual_connection_post_layernorm",
    "gated_linear_unit",
    "headscale",
    "heterogeneous_block_specs",
    "hyena",
    "mcore_customization_config",
    "megatron_legacy",
    "multi_latent_attention",
    "num_moe_experts",
    "qk_layernorm",
    "qkv_bias",
    "rotary_interleaved",
    "scale_positional_embedding",
    "seq_len_interpolation_factor",
    "softmax_scale",
    "use_emha",
    "window_size",
];

/// Values of `name`, which selects the blocks' implementation, that compute the same as an absent one.
const BLOCKS: &[&str] = &["", "ammo", "megatron_gpt_full_te_layer_autocast", "modelopt", "te_gpt"];

/// Keys whose value cannot change a logit, in addition to [`NEUTRAL_PREFIXES`]. Some names suggest otherwise:
/// `apply_query_key_layer_scaling` divides scores by the layer number and multiplies them back;
/// `layernorm_zero_centered_gamma` repeats `layernorm1p`; `openai_gelu` and `onnx_safe` concern GELU;
/// `fp32_residual_connection` and the fusions affect rounding only.
const NEUTRAL: &[&str] = &[
    // Implementation of the math.
    "apply_query_key_layer_scaling",
    "apply_rope_fusion",
    "attention_softmax_in_fp32",
    "bias_activation_fusion",
    "bias_dropout_add_fusion",
    "bias_dropout_fusion",
    "bias_gelu_fusion",
    "cross_entropy_loss_fusion",
    "fp16_lm_cross_entropy",
    "fp32_residual_connection",
    "get_attention_mask_from_fusion",
    "layernorm_zero_centered_gamma",
    "masked_softmax_fusion",
    "memory_efficient_layer_norm",
    "onnx_safe",
    "openai_gelu",
    "persist_layer_norm",
    "post_process",
    "pre_process",
    "transformer_engine",
    "use_flash_attention",
    // Initialization and dropout.
    "attention_dropout",
    "ffn_dropout",
    "hidden_dropout",
    "init_method_std",
    "seed",
    "use_cpu_initialization",
    "use_scaled_init_method",
    // Training.
    "answer_only_loss",
    "do_layer_norm_weight_decay",
    "freeze",
    "global_batch_size",
    "grad_allreduce_chunk_size_mb",
    "grad_div_ar_fusion",
    "gradient_accumulation_fusion",
    "gradient_as_bucket_view",
    "hysteresis",
    "micro_batch_size",
    "native_amp_growth_interval",
    "native_amp_init_scale",
    "num_micro_batches_with_partial_activation_checkpoints",
    "optim",
    "rampup_batch_size",
    "reduce_amax",
    "reset_lr",
    "reset_lr_steps",
    "skip_train",
    "test_ds",
    "train_ds",
    "use_loss_mask",
    "validation_drop_last",
    "validation_ds",
    // Devices and communication.
    "async_grad_allreduce",
    "batch_p2p_comm",
    "context_parallel_size",
    "defer_embedding_wgrad_compute",
    "enable_cuda_graph",
    "expert_model_parallel_size",
    "gc_interval",
    "model_parallel_size",
    "overlap_p2p_comm",
    "pipeline_model_parallel_split_rank",
    "sequence_parallel",
    "sharp",
    "sync_batch_comm",
    "tensor_model_parallel_world_size",
    "use_te_rng_tracker",
    "use_tp_pp_dp_mapping",
    "validation_param_sync_overlap",
    "wgrad_deferral_limit",
    "with_fp32_embedding_grads",
    // Files, logs and bookkeeping; `cfg` is a copy of the whole config, left by old fine-tuning scripts.
    "apex_transformer_log_level",
    "cfg",
    "deterministic_mode",
    "enable_megatron_timers",
    "gpt_model_file",
    "language_model_path",
    "megatron_timer_kwargs",
    "memory_profile",
    "nemo_path",
    "nsys_profile",
    "pretrained_checkpoint",
    "restore_from_ckpt",
    "restore_from_path",
    "restore_path",
    "resume_from_checkpoint",
    "save_nemo_on_validation_end",
    // Alignment, and the reward models for it. A reward model itself is recognized by its class and its tensors.
    "dpo",
    "force_head_dtype",
    "forward_micro_batch_size",
    "inference",
    "knowledge_distillation",
    "kto",
    "loss_clip_val",
    "offload_adam_states",
    "output_sequence",
    "overwrite_base_config",
    "ppo",
    "regression",
    "reinforce",
    "reward_model_type",
    "reward_standardization",
    "rs",
    "spin",
    "steerable_attributes",
    "steerlm",
    "steerlm2",
    "trt_llm",
    "use_avg_pool",
];

/// Prefixes of neutral keys: memory, files and communication in training; mixtures of experts, ruled out by
/// `num_moe_experts`; and FP8 training, which stores weights like any other.
const NEUTRAL_PREFIXES: &[&str] = &[
    "activations_checkpoint_",
    "cpu_offloading",
    "dist_ckpt_",
    "distributed_",
    "fp8",
    "fsdp",
    "moe_",
    "nccl_",
    "recompute_",
    "tp_comm_",
    "ub_tp_comm_",
];

/// Contents of model_config.yaml: a [`ModelConfig`] without the vocabulary, which the tokenizer and the weights
/// determine, and the references needed to find both.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::checkpoint) struct NemoConfig {
    /// Name of the file in messages.
    path: PathBuf,
    /// Number of transformer blocks.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads, which NeMo calls query groups.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Leading dimensions of a head that rotate.
    pub rotary_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of every LayerNorm1P.
    pub norm_eps: f64,
    /// The head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Element type of the training's `precision`. Weights may be stored in another.
    pub dtype: Option<DType>,
    /// Ranks that each hold a part of every layer.
    pub tensor_parallel: usize,
    /// Ranks that each hold some of the layers.
    pub pipeline_parallel: usize,
    /// Virtual pipeline stages per rank (interleaved schedule), if set.
    pub virtual_pipeline: Option<usize>,
    /// The vocabulary is padded to a multiple of this times the number of tensor-parallel ranks.
    pub make_vocab_size_divisible_by: usize,
    /// Rows of the embedding, if they are not the tokenizer's padded size.
    pub override_vocab_size: Option<usize>,
    /// The modules, and so the tensors' names, are Megatron-Core's.
    pub mcore_gpt: bool,
    /// Parameters were kept in half precision; the wrapper for that adds `module.` to the tensors' names.
    pub megatron_amp_o2: bool,
    /// The section `tokenizer`, if there is one.
    pub tokenizer: Option<NemoTokenizer>,
    /// The markers of chat fine-tuning, if there are any.
    pub chat_prompt_tokens: Option<NemoPromptTokens>,
    /// The Python class that wrote the file.
    pub target: Option<String>,
    /// The version of NeMo that wrote the file.
    pub nemo_version: Option<String>,
}

/// The config's section `tokenizer`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) struct NemoTokenizer {
    /// The tokenizer library: `sentencepiece`, `huggingface`, `megatron`.
    pub library: String,
    /// Reference to its file: `nemo:` and a member's name, or a path on the training machine.
    pub model: Option<String>,
    /// Name for the library to look up, such as a repository on the Hugging Face Hub.
    pub kind: Option<String>,
    /// Reference to the vocabulary file, for libraries that have one.
    pub vocab_file: Option<String>,
    /// NeMo's legacy handling of special tokens is on. It changes ids only if tokens were added, which is refused;
    /// decoded text is stripped of surrounding spaces.
    pub sentencepiece_legacy: bool,
}

impl NemoConfig {
    /// The architecture, [validated](ModelConfig::validate), with `vocab_size` rows in the embedding.
    ///
    /// # Errors
    /// [`Error::Format`] if the config states another number of rows, or an id is out of range.
    pub fn with_vocabulary(
        self,
        vocab_size: usize,
        bos_token_id: Option<u32>,
        eos_token_ids: Vec<u32>,
    ) -> Result<ModelConfig> {
        if let Some(stated) = self.override_vocab_size.filter(|stated| *stated != vocab_size) {
            let detail = format!("override_vocab_size is {stated}, but the embedding has {vocab_size} rows");
            return Err(Error::format(&self.path, detail));
        }
        let model = ModelConfig {
            vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_layers,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            rotary_dim: self.rotary_dim,
            rope_theta: self.rope_theta,
            max_position_embeddings: self.max_position_embeddings,
            norm_eps: self.norm_eps,
            tie_word_embeddings: self.tie_word_embeddings,
            dtype: self.dtype.unwrap_or(DType::F32),
            bos_token_id,
            eos_token_ids,
        };
        model.validate().map_err(|detail| Error::format(&self.path, detail))?;
        Ok(model)
    }
}

/// Parses `bytes`, the contents of `path`.
///
/// # Errors
/// [`Error::Unsupported`] if a key is unknown or asks for something unsupported, [`Error::Format`] if the file is not
/// YAML or a value is missing, of the wrong kind or out of range; all name key and value.
pub(in crate::checkpoint) fn read(path: &Path, bytes: &[u8]) -> Result<NemoConfig> {
    let mut keys = Keys::new(path, yaml::parse_object(path, bytes, MAX_BYTES)?);
    let target = keys.text("target")?;
    check_class(&keys, target.as_deref())?;
    check_math(&mut keys)?;
    check_adapters(&mut keys)?;

    let hidden_size = keys.required_size("hidden_size")?;
    let num_heads = keys.required_size("num_attention_heads")?;
    let head_dim = match keys.size("kv_channels")? {
        Some(head_dim) => head_dim,
        None if num_heads != 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let detail =
                format!("no kv_channels, and hidden_size {hidden_size} is not a multiple of {num_heads} heads");
            return Err(Error::format(path, detail));
        }
    };
    let rotary_percentage = keys.number("rotary_percentage")?.unwrap_or(default::ROTARY_PERCENTAGE);
    if !(rotary_percentage > 0.0 && rotary_percentage <= 1.0) {
        let detail = format!("rotary_percentage is {rotary_percentage}, expected above 0 and at most 1");
        return Err(Error::format(path, detail));
    }
    // Megatron-Core has no limit besides the training sequence length.
    let sequence = keys.size("encoder_seq_length")?;
    let Some(max_position_embeddings) = keys.size("max_position_embeddings")?.or(sequence) else {
        return Err(Error::format(path, "neither max_position_embeddings nor encoder_seq_length is set"));
    };
    let config = NemoConfig {
        path: path.to_path_buf(),
        num_layers: keys.required_size("num_layers")?,
        hidden_size,
        // `validate` rejects the size if this overflows.
        intermediate_size: keys.size("ffn_hidden_size")?.unwrap_or(hidden_size.saturating_mul(default::FFN_WIDENING)),
        num_heads,
        num_kv_heads: keys.size("num_query_groups")?.unwrap_or(num_heads),
        head_dim,
        // As in NeMo: the product in FP64, truncated.
        rotary_dim: (head_dim as f64 * rotary_percentage) as usize,
        rope_theta: keys.number("rotary_base")?.unwrap_or(default::ROTARY_BASE),
        max_position_embeddings,
        norm_eps: keys.number("layernorm_epsilon")?.unwrap_or(default::LAYERNORM_EPSILON),
        tie_word_embeddings: keys.flag("share_embeddings_and_output_weights")?.unwrap_or(true),
        dtype: read_precision(&mut keys)?,
        tensor_parallel: divisor(&mut keys, "tensor_model_parallel_size")?.unwrap_or(1),
        pipeline_parallel: divisor(&mut keys, "pipeline_model_parallel_size")?.unwrap_or(1),
        virtual_pipeline: divisor(&mut keys, "virtual_pipeline_model_parallel_size")?,
        make_vocab_size_divisible_by: divisor(&mut keys, "make_vocab_size_divisible_by")?
            .unwrap_or(default::MAKE_VOCAB_SIZE_DIVISIBLE_BY),
        override_vocab_size: keys.size("override_vocab_size")?,
        mcore_gpt: keys.flag("mcore_gpt")?.unwrap_or(false),
        megatron_amp_o2: keys.flag("megatron_amp_O2")?.unwrap_or(false),
        tokenizer: read_tokenizer(&mut keys)?,
        chat_prompt_tokens: read_prompt_tokens(&mut keys)?,
        target,
        nemo_version: keys.text("nemo_version")?,
    };
    keys.refuse_rest(|key, value| {
        is_off(value)
            || value == ""
            || NEUTRAL.contains(&key)
            || NEUTRAL_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
    })?;
    // Checks the sizes before they are used to name tensors.
    config.clone().with_vocabulary(config.override_vocab_size.unwrap_or(1), None, Vec::new())?;
    Ok(config)
}

/// Rejects classes other than GPT language models, which may compute something else under the same keys.
fn check_class(keys: &Keys, target: Option<&str>) -> Result<()> {
    let class = target.and_then(|target| target.rsplit('.').next()).unwrap_or("GPT");
    match class.contains("GPT") && !class.contains("Reward") && !class.contains("Critic") {
        true => Ok(()),
        false => Err(keys.unsupported("target", class, "a GPT language model such as MegatronGPTModel")),
    }
}

/// Rejects every setting of a block that is not supported.
fn check_math(keys: &mut Keys) -> Result<()> {
    let absent = |key: &str, default: &dyn std::fmt::Display, expected: &dyn std::fmt::Display, keys: &Keys| {
        keys.unsupported(key, format_args!("absent, which means {default}"), &expected.to_string())
    };
    for (key, default, expected) in CHOICES {
        match keys.text(key)? {
            Some(value) if value == *expected => {}
            Some(value) => return Err(keys.unsupported(key, value, expected)),
            None if default == expected => {}
            None => return Err(absent(key, default, expected, keys)),
        }
    }
    for (key, default, expected) in FLAGS {
        match keys.flag(key)? {
            Some(value) if value == *expected => {}
            Some(value) => return Err(keys.unsupported(key, value, &expected.to_string())),
            None if default == expected => {}
            None => return Err(absent(key, default, expected, keys)),
        }
    }
    for key in MUST_BE_OFF {
        keys.must_be_off(key)?;
    }
    match keys.text("name")? {
        Some(name) if !BLOCKS.contains(&name.as_str()) => {
            Err(keys.unsupported("name", name, "it to be absent or te_gpt"))
        }
        _ => Ok(()),
    }
}

/// Rejects adapters, whose weights are separate from the model's.
fn check_adapters(keys: &mut Keys) -> Result<()> {
    // The rest of the section configures the training of adapters.
    let Some(mut peft) = keys.object("peft")? else { return Ok(()) };
    match peft.text("peft_scheme")? {
        Some(scheme) if !matches!(scheme.as_str(), "" | "none") => {
            Err(peft.unsupported("peft_scheme", scheme, "none: merge the adapters into the model and save it again"))
        }
        _ => Ok(()),
    }
}

/// `precision` of the training: a number of bits, or one of Lightning's names.
fn read_precision(keys: &mut Keys) -> Result<Option<DType>> {
    let Some(value) = keys.take("precision") else { return Ok(None) };
    let name = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match name.as_str() {
        "bf16" | "bf16-mixed" | "bf16-true" => Ok(Some(DType::BF16)),
        "16" | "16-mixed" | "16-true" | "fp16" => Ok(Some(DType::F16)),
        "32" | "32-true" | "fp32" => Ok(Some(DType::F32)),
        _ => Err(keys.unsupported("precision", shown(&value), "bf16, 16 or 32, or one of them with -mixed or -true")),
    }
}

/// A whole number of at least 1.
fn divisor(keys: &mut Keys, key: &str) -> Result<Option<usize>> {
    match keys.size(key)? {
        Some(size) if size == 0 || size > i32::MAX as usize => {
            Err(Error::format(keys.path(), format!("{key} is {size}, expected 1 to {}", i32::MAX)))
        }
        size => Ok(size),
    }
}

/// `data.chat_prompt_tokens`, which NeMo's chat fine-tuning puts into every conversation. The rest of the section
/// describes the training data.
fn read_prompt_tokens(keys: &mut Keys) -> Result<Option<NemoPromptTokens>> {
    let Some(Value::Object(data)) = keys.take("data") else { return Ok(None) };
    let mut data = Keys::new(keys.path(), data);
    if data.take("chat") == Some(Value::Bool(false)) {
        return Ok(None);
    }
    let Some(mut tokens) = data.object("chat_prompt_tokens")? else { return Ok(None) };
    let mut text = |key: &str| {
        let missing = || Error::format(data.path(), format!("the key data.chat_prompt_tokens.{key} is missing"));
        tokens.text(key)?.filter(|token| !token.is_empty()).ok_or_else(missing)
    };
    Ok(Some(NemoPromptTokens {
        system_turn_start: text("system_turn_start")?,
        turn_start: text("turn_start")?,
        end_of_turn: text("end_of_turn")?,
        end_of_name: text("end_of_name")?,
    }))
}

fn read_tokenizer(keys: &mut Keys) -> Result<Option<NemoTokenizer>> {
    let Some(mut keys) = keys.object("tokenizer")? else { return Ok(None) };
    let Some(library) = keys.text("library")? else {
        return Err(Error::format(keys.path(), "the key tokenizer.library is missing"));
    };
    // Added tokens would have ids outside the file's vocabulary.
    for key in ["special_tokens", "additional_special_tokens"] {
        keys.must_be_off(key)?;
    }
    // NeMo reads `model`; some of its tools write `tokenizer_model`.
    let (model, other) = (keys.text("model")?, keys.text("tokenizer_model")?);
    let filled = |reference: Option<String>| reference.filter(|reference| !reference.is_empty());
    let tokenizer = NemoTokenizer {
        model: filled(model).or(filled(other)),
        kind: filled(keys.text("type")?),
        vocab_file: filled(keys.text("vocab_file")?),
        sentencepiece_legacy: keys.flag("sentencepiece_legacy")?.unwrap_or(library == "sentencepiece"),
        library,
    };
    const NEUTRAL: &[&str] =
        &["chat_template", "delimiter", "merge_file", "trust_remote_code", "use_fast", "vocab_size"];
    keys.refuse_rest(|key, value| is_off(value) || value == "" || NEUTRAL.contains(&key))?;
    Ok(Some(tokenizer))
}

#[cfg(test)]
mod tests;
