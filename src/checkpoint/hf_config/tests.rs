use proptest::prelude::*;
use serde_json::json;

use super::super::json::parse_object;
use super::super::testing::tiny_config;
use super::*;

/// A `NemotronConfig` with grouped heads as written by transformers 5.
const V5: &str = include_str!("v5.json");
/// Transformers 4's form, with the keys that NeMo's converter and transformers' own writer left in such files.
const V4: &str = include_str!("v4.json");

fn parse(text: &str) -> Result<HfConfig> {
    let path = Path::new("folder/config.json");
    read(path, parse_object(path, text.as_bytes())?)
}

/// The tiny config with `changes` merged in; a change to null removes nothing, it sets null.
fn changed(changes: Value) -> Result<HfConfig> {
    let mut config = tiny_config();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    parse(&config.to_string())
}

fn without(keys: &[&str]) -> Result<HfConfig> {
    let mut config = tiny_config();
    for key in keys {
        config.as_object_mut().unwrap().remove(*key).unwrap();
    }
    parse(&config.to_string())
}

#[test]
fn reads_transformers_5() {
    let config = parse(V5).unwrap();
    assert!(config.declares_dtype);
    let expected = ModelConfig {
        vocab_size: 96,
        hidden_size: 32,
        intermediate_size: 64,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 12,
        rotary_dim: 6,
        rope_theta: 10_000.0,
        max_position_embeddings: 64,
        norm_eps: 1e-5,
        tie_word_embeddings: false,
        dtype: DType::BF16,
        bos_token_id: None,
        eos_token_ids: vec![3],
    };
    assert_eq!(config.model, expected);
}

#[test]
fn reads_transformers_4() {
    let config = parse(V4).unwrap();
    let expected = ModelConfig {
        vocab_size: 256_000,
        hidden_size: 4096,
        intermediate_size: 16384,
        num_layers: 32,
        num_heads: 48,
        num_kv_heads: 8,
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
    assert_eq!(config.model, expected);
}

#[test]
fn absent_keys_mean_what_transformers_makes_of_them() {
    let config =
        without(&["norm_eps", "rope_parameters", "bos_token_id", "eos_token_id", "tie_word_embeddings"]).unwrap();
    let model = config.model;
    assert_eq!((model.norm_eps, model.rope_theta, model.rotary_dim), (1e-5, 10_000.0, 2));
    assert_eq!((model.bos_token_id, model.eos_token_ids), (Some(2), vec![3]));
    assert!(!model.tie_word_embeddings);
    assert!(without(&["architectures"]).is_ok());
    assert!(without(&["model_type"]).is_ok());
    assert!(without(&["hidden_act", "attention_bias", "mlp_bias"]).is_ok());
    assert!(!without(&["dtype"]).unwrap().declares_dtype);
    assert_eq!(changed(json!({"num_key_value_heads": null})).unwrap().model.num_kv_heads, 4);
    let model = changed(json!({"head_dim": null, "hidden_size": 16})).unwrap().model;
    assert_eq!((model.head_dim, model.rotary_dim), (4, 2));
    assert_eq!(changed(json!({"head_dim": null, "kv_channels": 8})).unwrap().model.head_dim, 8);
}

#[test]
fn reads_every_spelling() {
    let read = |changes| changed(changes).unwrap().model;
    assert_eq!(read(json!({"eos_token_id": [3, 7]})).eos_token_ids, [3, 7]);
    assert!(read(json!({"eos_token_id": null, "bos_token_id": null})).eos_token_ids.is_empty());
    assert_eq!(read(json!({"bos_token_id": -1, "eos_token_id": -1})).bos_token_id, None);
    assert_eq!(read(json!({"dtype": null, "torch_dtype": "float16"})).dtype, DType::F16);
    assert_eq!(read(json!({"dtype": "torch.float32"})).dtype, DType::F32);
    assert_eq!(read(json!({"rope_parameters": null, "rope_theta": 500000})).rope_theta, 500_000.0);
    assert_eq!(read(json!({"rope_parameters": null, "rope_percent": 1.0})).rotary_dim, 4);
    assert_eq!(read(json!({"rope_parameters": null, "partial_rotary_factor": 1})).rotary_dim, 4);
    assert_eq!(read(json!({"rope_parameters": {"type": "default"}, "rope_scaling": null})).rope_theta, 10_000.0);
    assert_eq!(read(json!({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 5})).rope_theta, 5.0);
    // int(13 * 0.5) is 6.
    assert_eq!(read(json!({"head_dim": 13})).rotary_dim, 6);
}

#[test]
fn refuses_what_it_does_not_compute() {
    for (changes, reason) in [
        (json!({"model_type": "llama"}), "model_type is llama, expected \"nemotron\""),
        (json!({"model_type": "nemotron_h"}), "model_type is nemotron_h"),
        (json!({"architectures": ["NemotronModel"]}), "architectures is [\"NemotronModel\"]"),
        (json!({"architectures": []}), "architectures is []"),
        (json!({"architectures": "NemotronForCausalLM"}), "architectures is \"NemotronForCausalLM\""),
        (json!({"hidden_act": "silu"}), "hidden_act is silu, expected \"relu2\""),
        (json!({"attention_bias": true}), "attention_bias is true, expected it to be absent or off"),
        (json!({"mlp_bias": true}), "mlp_bias is true"),
        (json!({"sliding_window": 1024}), "sliding_window is 1024"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config is {\"quant_method\""),
        (json!({"auto_map": {"AutoConfig": "x.Y"}}), "auto_map is"),
        (json!({"pruned_heads": {"0": [1]}}), "pruned_heads is"),
        (json!({"dtype": "float8_e4m3fn"}), "dtype is float8_e4m3fn, expected \"float32\", \"float16\""),
        (json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_scaling.type is linear"),
        (json!({"rope_parameters": {"rope_type": "yarn"}}), "rope_parameters.rope_type is yarn"),
        (json!({"rope_parameters": {"factor": 2.0}}), "unknown key rope_parameters.factor = 2.0"),
        (json!({"attention_multiplier": 0.1}), "unknown key attention_multiplier = 0.1 might change the math"),
        (json!({"layer_norm_eps": 1e-6}), "unknown key layer_norm_eps"),
        (json!({"logit_softcapping": false}), "unknown key logit_softcapping = false"),
        (json!({"new\u{1b}[31mkey": 1}), "unknown key new\\u{1b}[31mkey = 1"),
    ] {
        let error = changed(changes).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{message}");
        assert!(message.starts_with("folder/config.json: ") && message.contains(reason), "{message}");
    }
    // Off is off, and null asks for nothing.
    let off = json!({"sliding_window": null, "pruned_heads": {}, "auto_map": null, "attention_multiplier": null});
    assert!(changed(off).is_ok());
}

#[test]
fn refuses_values_that_contradict() {
    for (changes, reason) in [
        (json!({"hidden_size": "6"}), "hidden_size is \"6\" (a string), expected a whole number"),
        (json!({"hidden_size": 6.0}), "hidden_size is 6.0 (a number), expected a whole number"),
        (json!({"hidden_size": -6}), "hidden_size is -6 (a number)"),
        (json!({"hidden_size": null}), "the key hidden_size is missing"),
        (json!({"hidden_size": 0}), "hidden_size is 0"),
        (json!({"num_attention_heads": 0}), "num_heads is 0"),
        (json!({"num_attention_heads": 0, "head_dim": null}), "no head_dim, and hidden_size 6 is not a multiple of 0"),
        (json!({"num_attention_heads": 5, "head_dim": null}), "no head_dim, and hidden_size 6 is not a multiple of 5"),
        (json!({"num_key_value_heads": 3}), "4 query heads are not a multiple of 3"),
        (json!({"num_key_value_heads": 0}), "num_kv_heads is 0"),
        (json!({"kv_channels": 8}), "head_dim is 4, but kv_channels is 8; they mean the same thing"),
        (json!({"torch_dtype": "float32"}), "dtype is BF16, but torch_dtype is F32"),
        (json!({"rope_theta": 500000.0}), "rope_theta is 500000.0, but rope_parameters is 10000.0"),
        (json!({"rope_percent": 1.0}), "rope_percent is 1.0, but rope_parameters is 0.5"),
        (
            json!({"rope_parameters": null, "partial_rotary_factor": 0.0}),
            "partial_rotary_factor is 0, expected above 0",
        ),
        (json!({"rope_parameters": null, "partial_rotary_factor": 1.5}), "partial_rotary_factor is 1.5"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.1}}), "rotary_dim is 0"),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.75}}), "rotary_dim is 3, expected an even number"),
        (json!({"rope_parameters": {"rope_theta": -1}}), "rope_theta is -1"),
        (json!({"rope_parameters": [1]}), "rope_parameters is [1] (a list), expected an object or null"),
        (json!({"norm_eps": 0}), "norm_eps is 0"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings is 1 (a number), expected true or false"),
        (json!({"eos_token_id": [3, "x"]}), "eos_token_id is \"x\" (a string), expected token ids"),
        (json!({"eos_token_id": 13}), "token id 13 is outside the vocabulary of 13"),
        (json!({"bos_token_id": -2}), "bos_token_id is -2"),
        (json!({"vocab_size": u64::MAX}), "vocab_size is 18446744073709551615, expected 1 to 2147483647"),
        (json!({"num_hidden_layers": 1_000_000}), "num_layers is 1000000, expected at most 4096"),
        (
            json!({"hidden_size": 1 << 30, "intermediate_size": 1 << 30, "num_hidden_layers": 4096}),
            "exceeds the address space",
        ),
    ] {
        let message = changed(changes).unwrap_err().to_string();
        assert!(message.starts_with("folder/config.json: ") && message.contains(reason), "{message}");
    }
    for key in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"] {
        let message = without(&[key]).unwrap_err().to_string();
        assert!(message.contains(&format!("the key {key} is missing")), "{message}");
    }
    assert!(without(&["architectures", "model_type"]).unwrap_err().to_string().contains("not a model's config.json"));
    assert!(parse(r#"{"model_type": "nemotron", "model_type": "nemotron"}"#).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn survives_damage(changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..5), v4: bool) {
        let mut bytes = if v4 { V4 } else { V5 }.as_bytes().to_vec();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        let path = Path::new("folder/config.json");
        match parse_object(path, &bytes).and_then(|object| read(path, object)) {
            Ok(config) => prop_assert_eq!(config.model.validate(), Ok(())),
            Err(error) => prop_assert!(error.to_string().len() > "folder/config.json: ".len()),
        }
    }

    /// Any number in any place is a valid model or an error.
    #[test]
    fn survives_any_number(key in 0usize..10, number in prop_oneof![0u64..300, any::<u64>(), Just(1u64 << 31)]) {
        let keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "eos_token_id", "norm_eps"];
        if let Ok(config) = changed(json!({keys[key]: number})) {
            prop_assert_eq!(config.model.validate(), Ok(()));
        }
    }
}
