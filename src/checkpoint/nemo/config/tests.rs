use proptest::prelude::*;

use super::*;

/// The config of an 8B `.nemo` after alignment: the keys of NeMo's pre-training, of its fine-tuning and of
/// NeMo-Aligner's PPO, as written by OmegaConf.
const ALIGNED_8B: &str = include_str!("8b.yaml");

/// The least that makes a model.
const LEAST: &str = "\
num_layers: 2
hidden_size: 12
num_attention_heads: 3
max_position_embeddings: 32
normalization: layernorm1p
activation: squared-relu
bias: false
position_embedding_type: rope
";

fn parse(text: &str) -> Result<NemoConfig> {
    read(Path::new("x.nemo: model_config.yaml"), text.as_bytes())
}

/// The least config, with `lines` in the place of its own of the same keys.
fn changed(lines: &str) -> Result<NemoConfig> {
    let key = |line: &str| line.split(':').next().map(str::to_owned);
    let replaced: Vec<_> = lines.lines().map(key).collect();
    let kept = LEAST.lines().filter(|line| !replaced.contains(&key(line)));
    parse(&(kept.collect::<Vec<_>>().join("\n") + "\n" + lines))
}

fn refused(lines: &str) -> Error {
    let error = changed(lines).unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("x.nemo: model_config.yaml: ") && message.len() < 500, "{message}");
    error
}

#[test]
fn reads_the_8b() {
    let config = parse(ALIGNED_8B).unwrap();
    assert_eq!((config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline), (4, 1, None));
    assert_eq!((config.make_vocab_size_divisible_by, config.override_vocab_size), (128, None));
    assert!(config.mcore_gpt && config.megatron_amp_o2);
    assert_eq!(config.dtype, Some(DType::BF16));
    assert_eq!(config.nemo_version.as_deref(), Some("1.22.0"));
    let target = "nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor.MegatronGPTActorModel";
    assert_eq!(config.target.as_deref(), Some(target));
    let tokenizer = NemoTokenizer {
        library: "sentencepiece".into(),
        model: Some("nemo:2053796188904e679f7e2754a2a1f280_tokenizer.model".into()),
        kind: None,
        vocab_file: None,
        sentencepiece_legacy: false,
    };
    assert_eq!(config.tokenizer, Some(tokenizer));
    let expected = ModelConfig {
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
    };
    let model = config.with_vocabulary(256_000, Some(2), vec![3]).unwrap();
    assert_eq!(model.parameters(), Some(8_540_135_424));
    assert_eq!(model, expected);
}

#[test]
fn absent_keys_mean_what_nemo_makes_of_them() {
    let config = parse(LEAST).unwrap();
    assert_eq!((config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline), (1, 1, None));
    assert_eq!((config.make_vocab_size_divisible_by, config.mcore_gpt, config.megatron_amp_o2), (128, false, false));
    assert_eq!((config.dtype, config.tokenizer.clone(), config.target.clone()), (None, None, None));
    let model = config.with_vocabulary(100, None, vec![]).unwrap();
    let expected = ModelConfig {
        vocab_size: 100,
        hidden_size: 12,
        intermediate_size: 48,
        num_layers: 2,
        num_heads: 3,
        num_kv_heads: 3,
        head_dim: 4,
        rotary_dim: 4,
        rope_theta: 10_000.0,
        max_position_embeddings: 32,
        norm_eps: 1e-5,
        tie_word_embeddings: true,
        dtype: DType::F32,
        bos_token_id: None,
        eos_token_ids: vec![],
    };
    assert_eq!(model, expected);
}

#[test]
fn reads_every_spelling() {
    let read = |lines: &str| changed(lines).unwrap();
    let config = read("kv_channels: 8\nrotary_percentage: 0.5\nrotary_base: 500000\nlayernorm_epsilon: 1e-6");
    assert_eq!((config.head_dim, config.rotary_dim, config.rope_theta, config.norm_eps), (8, 4, 500_000.0, 1e-6));
    let config = read("kv_channels: null\nnum_query_groups: 1\nffn_hidden_size: 20\nnum_layers: 3");
    assert_eq!((config.head_dim, config.num_kv_heads, config.intermediate_size, config.num_layers), (4, 1, 20, 3));
    // int(13 * 0.5) is 6.
    assert_eq!(read("kv_channels: 13\nrotary_percentage: 0.5").rotary_dim, 6);
    assert_eq!(read("max_position_embeddings: null\nencoder_seq_length: 64").max_position_embeddings, 64);
    assert_eq!(read("max_position_embeddings: 16\nencoder_seq_length: 64").max_position_embeddings, 16);
    assert_eq!(read("virtual_pipeline_model_parallel_size: 2").virtual_pipeline, Some(2));
    for (spelling, dtype) in [
        ("bf16", Some(DType::BF16)),
        ("bf16-mixed", Some(DType::BF16)),
        ("bf16-true", Some(DType::BF16)),
        ("16", Some(DType::F16)),
        ("'16'", Some(DType::F16)),
        ("16-mixed", Some(DType::F16)),
        ("fp16", Some(DType::F16)),
        ("32", Some(DType::F32)),
        ("32-true", Some(DType::F32)),
        ("null", None),
    ] {
        assert_eq!(read(&format!("precision: {spelling}")).dtype, dtype, "{spelling}");
    }
    // Off is off, in Python's spelling too, and so is an adapter that is none.
    for lines in [
        "headscale: False\nseq_len_interpolation_factor: ~\nmcore_customization_config: {}\nwindow_size: null",
        "name: te_gpt",
        "name: ''",
        "peft: null",
        "peft: {peft_scheme: null, lora_tuning: {adapter_dim: 32}}",
        "peft: {peft_scheme: none}",
        "target: nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model.MegatronGPTSFTModel",
    ] {
        read(lines);
    }
}

#[test]
fn knows_what_is_neutral() {
    for lines in [
        "apply_query_key_layer_scaling: true\nlayernorm_zero_centered_gamma: true\nopenai_gelu: true\nonnx_safe: true",
        "fp8: true\nfp8_hybrid: true\nfp8_wgrad: true\nmoe_router_topk: 2\nub_tp_comm_overlap: true",
        "data: {a: [.nan, {b: c}]}\noptim: {lr: .inf}\nnsys_profile: {enabled: true}\nrampup_batch_size: [1, 2, 3]",
        "dpo: {beta: 0.1}\nspin: {x: 1}\nsteerlm: {y: 2}\ninference: {greedy: true}\ngpt_model_file: /a.nemo",
        "regression: {num_attributes: 9}\nreward_model_type: binary_ranking\noutput_sequence: false",
        // Not known, but they ask for nothing.
        "whatever: null\nsome_new_thing: false\nanother: ''\nmore: {}\nlist: []",
    ] {
        assert!(changed(lines).is_ok(), "{lines}: {}", changed(lines).unwrap_err());
    }
}

#[test]
fn refuses_what_it_does_not_compute() {
    for (lines, reason) in [
        ("normalization: layernorm", "normalization is layernorm, expected layernorm1p"),
        ("normalization: rmsnorm", "normalization is rmsnorm"),
        ("normalization: null", "normalization is absent, which means layernorm, expected layernorm1p"),
        ("activation: fast-swiglu", "activation is fast-swiglu, expected squared-relu"),
        ("activation: null", "activation is absent, which means gelu, expected squared-relu"),
        ("position_embedding_type: learned_absolute", "position_embedding_type is learned_absolute, expected rope"),
        ("position_embedding_type: null", "position_embedding_type is absent, which means learned_absolute"),
        ("transformer_block_type: post_ln", "transformer_block_type is post_ln, expected pre_ln"),
        ("attention_type: multiquery", "attention_type is multiquery, expected multihead"),
        ("bias: true", "bias is true, expected false"),
        ("bias: null", "bias is absent, which means true, expected false"),
        ("normalize_attention_scores: false", "normalize_attention_scores is false, expected true"),
        ("rotary_interleaved: true", "rotary_interleaved is true, expected it to be absent or off"),
        ("seq_len_interpolation_factor: 4", "seq_len_interpolation_factor is 4"),
        ("headscale: true", "headscale is true"),
        ("megatron_legacy: true", "megatron_legacy is true"),
        ("window_size: [4096, 0]", "window_size is [4096,0]"),
        ("num_moe_experts: 8", "num_moe_experts is 8"),
        ("apply_residual_connection_post_layernorm: true", "apply_residual_connection_post_layernorm is true"),
        ("apply_embedding_scaling: true", "apply_embedding_scaling is true"),
        ("scale_positional_embedding: true", "scale_positional_embedding is true"),
        ("qkv_bias: true", "qkv_bias is true"),
        ("qk_layernorm: true", "qk_layernorm is true"),
        ("use_emha: true", "use_emha is true"),
        ("hyena: {order: 2}", "hyena is {\"order\":2}"),
        ("mcore_customization_config: {parallel_attention: true}", "mcore_customization_config is {\"parallel_"),
        ("name: megatron_falcon_gpt", "name is megatron_falcon_gpt, expected it to be absent or te_gpt"),
        ("peft: {peft_scheme: lora}", "peft.peft_scheme is lora, expected none: merge the adapters"),
        ("precision: 64", "precision is 64, expected bf16, 16 or 32"),
        ("precision: fp8", "precision is \"fp8\""),
        ("precision: ${trainer.precision}", "precision is \"${trainer.precision}\""),
        (
            "target: nemo.x.megatron_bert_model.MegatronBertModel",
            "target is MegatronBertModel, expected a GPT language",
        ),
        ("target: nemo_aligner.x.MegatronGPTRewardModel", "target is MegatronGPTRewardModel"),
        ("target: nemo_aligner.x.MegatronGPTCriticModel", "target is MegatronGPTCriticModel"),
        ("tokenizer: {library: sentencepiece, special_tokens: {a: b}}", "tokenizer.special_tokens is {\"a\":\"b\"}"),
        ("tokenizer: {library: x, additional_special_tokens: [a]}", "tokenizer.additional_special_tokens is [\"a\"]"),
        ("tokenizer: {library: x, lowercase: true}", "unknown key tokenizer.lowercase = true"),
        ("hybrid_override_pattern: M-M*", "unknown key hybrid_override_pattern = \"M-M*\" might change the math; rem"),
        ("attention_multiplier: 0.1", "unknown key attention_multiplier = 0.1"),
        ("lora_tuning: {adapter_dim: 32}", "unknown key lora_tuning = {\"adapter_dim\":32}"),
        ("\"new\\e[31mkey\": 1", "unknown key new\\u{1b}[31mkey = 1"),
    ] {
        let error = refused(lines);
        let message = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{message}");
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn refuses_values_that_make_no_model() {
    for (lines, reason) in [
        ("hidden_size: '12'", "hidden_size is \"12\" (a string), expected a whole number"),
        ("hidden_size: ${.x}", "hidden_size is \"${.x}\" (a string)"),
        ("hidden_size: 012", "hidden_size is \"012\" (a string)"),
        ("hidden_size: 12.0", "hidden_size is 12.0 (a number), expected a whole number"),
        ("hidden_size: -12", "hidden_size is -12 (a number)"),
        ("hidden_size: [12]", "hidden_size is [12] (a list)"),
        ("hidden_size: 99999999999999999999", "hidden_size is 1e+20 (a number), expected a whole number"),
        ("hidden_size: 18446744073709551615", "hidden_size is 18446744073709551615, expected 1 to 2147483647"),
        ("hidden_size: null", "the key hidden_size is missing"),
        ("hidden_size: 13", "no kv_channels, and hidden_size 13 is not a multiple of 3 heads"),
        ("num_attention_heads: 0", "no kv_channels, and hidden_size 12 is not a multiple of 0 heads"),
        ("num_attention_heads: null", "the key num_attention_heads is missing"),
        ("num_layers: null", "the key num_layers is missing"),
        ("num_layers: 0", "num_layers is 0"),
        ("num_layers: 1000000000000", "num_layers is 1000000000000"),
        ("num_layers: 5000", "num_layers is 5000, expected at most 4096"),
        ("max_position_embeddings: null", "neither max_position_embeddings nor encoder_seq_length is set"),
        ("num_query_groups: 2", "3 query heads are not a multiple of 2"),
        ("kv_channels: 0", "head_dim is 0"),
        ("ffn_hidden_size: 0", "intermediate_size is 0"),
        ("hidden_size: 2147483646\nnum_attention_heads: 1", "intermediate_size is 8589934584"),
        ("rotary_percentage: 0", "rotary_percentage is 0, expected above 0 and at most 1"),
        ("rotary_percentage: 1.5", "rotary_percentage is 1.5"),
        ("rotary_percentage: .nan", "rotary_percentage is \".nan\" (a string), expected a number"),
        ("rotary_percentage: 0.25", "rotary_dim is 1, expected an even number"),
        ("rotary_base: .inf", "rotary_base is \".inf\" (a string), expected a number"),
        ("rotary_base: -1", "rope_theta is -1"),
        ("layernorm_epsilon: .nan", "layernorm_epsilon is \".nan\" (a string)"),
        ("layernorm_epsilon: 0", "norm_eps is 0"),
        ("bias: 0", "bias is 0 (a number), expected true or false"),
        ("activation: 1", "activation is 1 (a number), expected a string"),
        ("share_embeddings_and_output_weights: maybe", "share_embeddings_and_output_weights is \"maybe\" (a string)"),
        ("tensor_model_parallel_size: 0", "tensor_model_parallel_size is 0, expected 1 to 2147483647"),
        ("pipeline_model_parallel_size: 3000000000", "pipeline_model_parallel_size is 3000000000"),
        ("make_vocab_size_divisible_by: 0", "make_vocab_size_divisible_by is 0"),
        ("override_vocab_size: 0", "vocab_size is 0"),
        ("peft: lora", "peft is \"lora\" (a string), expected an object or null"),
        ("tokenizer: {model: x}", "the key tokenizer.library is missing"),
        ("tokenizer: x", "tokenizer is \"x\" (a string), expected an object or null"),
        ("tokenizer: {library: x, model: [1]}", "tokenizer.model is [1] (a list), expected a string"),
        ("hidden_size: 12\nhidden_size: 12", "duplicate key `hidden_size`"),
        ("data: {a: 1, a: 2}", "duplicate key `a`"),
        ("data: &x {a: 1}\noptim: *x", "anchors and aliases are not supported"),
        ("data: !!python/object/apply:os.system [ls]", "unsupported tag"),
    ] {
        let error = refused(lines);
        let message = error.to_string();
        assert!(matches!(error, Error::Format { .. }), "{message}");
        assert!(message.contains(reason), "{lines}: {message}");
    }
    let deep = refused(&format!("data: {}", "[".repeat(10_000))).to_string();
    assert!(deep.contains("recursion limit exceeded"), "{deep}");
    let long = changed(&format!("data: {}", "x".repeat(2 << 20))).unwrap_err().to_string();
    assert!(long.contains("longer than 1048576 bytes"), "{long}");
    assert!(read(Path::new("x"), b"hidden_size: \xff").unwrap_err().to_string().contains("UTF-8"));
    assert!(parse("").unwrap_err().to_string().contains("expected a YAML mapping, found null"));
}

#[test]
fn the_vocabulary_must_fit() {
    let config = changed("override_vocab_size: 128").unwrap();
    assert_eq!(config.clone().with_vocabulary(128, Some(2), vec![3]).unwrap().vocab_size, 128);
    for (vocab_size, bos, eos, reason) in [
        (256, None, vec![], "override_vocab_size is 128, but the embedding has 256 rows"),
        (128, Some(128), vec![], "token id 128 is outside the vocabulary of 128"),
        (128, None, vec![3, 200], "token id 200"),
    ] {
        let message = config.clone().with_vocabulary(vocab_size, bos, eos).unwrap_err().to_string();
        assert!(message.starts_with("x.nemo: model_config.yaml: ") && message.contains(reason), "{message}");
    }
    assert!(parse(LEAST).unwrap().with_vocabulary(0, None, vec![]).is_err());
}

#[test]
fn reads_tokenizers() {
    let read = |section: &str| changed(&format!("tokenizer: {section}")).unwrap().tokenizer.unwrap();
    let tokenizer = read("{library: sentencepiece, model: null, tokenizer_model: /data/tokenizer.model}");
    assert_eq!(tokenizer.model.as_deref(), Some("/data/tokenizer.model"));
    // NeMo's default, which for this library is on.
    assert!(tokenizer.sentencepiece_legacy);
    let both = read("{library: sentencepiece, model: 'nemo:a', tokenizer_model: b, sentencepiece_legacy: false}");
    assert_eq!((both.model.as_deref(), both.sentencepiece_legacy), (Some("nemo:a"), false));
    let other = read("{library: huggingface, type: org/name, model: '', vocab_file: 'nemo:v', use_fast: true}");
    assert_eq!((other.library.as_str(), other.sentencepiece_legacy), ("huggingface", false));
    assert_eq!(
        (other.kind.as_deref(), other.model, other.vocab_file.as_deref()),
        (Some("org/name"), None, Some("nemo:v"))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn survives_damage(changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..5), cut: usize) {
        let mut bytes = ALIGNED_8B.as_bytes().to_vec();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        // Half of the damaged files are cut off too.
        bytes.truncate(cut % (2 * bytes.len()));
        match read(Path::new("x.yaml"), &bytes) {
            Ok(config) => prop_assert!(config.with_vocabulary(256, None, vec![]).is_ok()),
            Err(error) => prop_assert!(error.to_string().len() > "x.yaml: ".len()),
        }
    }

    /// Any number in any place is a valid model or an error.
    #[test]
    fn survives_any_number(key in 0usize..12, number in prop_oneof![0u64..300, any::<u64>(), Just(1u64 << 31)]) {
        let keys = ["hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups",
            "kv_channels", "max_position_embeddings", "layernorm_epsilon", "rotary_base", "rotary_percentage",
            "tensor_model_parallel_size", "override_vocab_size"];
        if let Ok(config) = changed(&format!("{}: {number}", keys[key])) {
            let vocab_size = config.override_vocab_size.unwrap_or(64);
            prop_assert!(config.with_vocabulary(vocab_size, None, vec![]).is_ok());
        }
    }

    /// No text is too strange to be refused in words.
    #[test]
    fn survives_any_text(text in "(key|hidden_size|tokenizer|[-:{}\\[\\],&*!|>'\"%@`#?<~. \n\t]|[a-z0-9]){0,60}") {
        prop_assert!(parse(&text).is_err());
        let _ = changed(&text);
    }
}
