//! `generation_config.json`: how a checkpoint's authors sample from it.

use std::path::Path;

use serde_json::{Map, Value};

use super::keys::{Keys, token_ids};
use crate::error::{Error, Result};

/// Sampling defaults a checkpoint brings along. `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a generation; empty if none are named.
    pub eos_token_ids: Vec<u32>,
    /// Sample (`true`) or take the likeliest token.
    pub do_sample: Option<bool>,
    /// Divides the logits; finite, at least 0.
    pub temperature: Option<f64>,
    /// Keep this many of the likeliest tokens.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens up to this probability mass, 0 to 1.
    pub top_p: Option<f64>,
    /// Weakens tokens already seen; finite, above 0.
    pub repetition_penalty: Option<f64>,
    /// Keys that carry a value and are none of the above, for whoever wants to say that they do nothing.
    pub ignored: Vec<String>,
}

/// Keys that set no rule of sampling.
const NEUTRAL: &[&str] = &[
    "_from_model_config",
    "bos_token_id",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
];

/// Reads the `object` that is the content of `path`; ids must be below `vocab_size`.
pub(super) fn read(path: &Path, object: Map<String, Value>, vocab_size: usize) -> Result<GenerationConfig> {
    let mut keys = Keys::new(path, object);
    let mut config = GenerationConfig {
        eos_token_ids: token_ids(&mut keys, "eos_token_id")?,
        do_sample: keys.flag("do_sample")?,
        temperature: keys.number("temperature")?,
        top_k: keys.count("top_k")?,
        top_p: keys.number("top_p")?,
        repetition_penalty: keys.number("repetition_penalty")?,
        ignored: Vec::new(),
    };
    config.ignored = keys.rest(NEUTRAL);

    if let Some(id) = config.eos_token_ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(Error::format(path, format!("eos_token_id {id} is outside the vocabulary of {vocab_size}")));
    }
    let in_range = |key: &str, value: Option<f64>, expected: &str, fits: fn(f64) -> bool| match value {
        Some(value) if !fits(value) => Err(Error::format(path, format!("{key} is {value}, expected {expected}"))),
        _ => Ok(()),
    };
    in_range("temperature", config.temperature, "at least 0", |value| value >= 0.0)?;
    in_range("top_p", config.top_p, "0 to 1", |value| (0.0..=1.0).contains(&value))?;
    in_range("repetition_penalty", config.repetition_penalty, "above 0", |value| value > 0.0)?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::super::json::parse_object;
    use super::*;

    fn parse(text: &str) -> Result<GenerationConfig> {
        let path = Path::new("generation_config.json");
        read(path, parse_object(path, text.as_bytes())?, 100)
    }

    #[test]
    fn reads_what_transformers_writes() {
        let text =
            r#"{"_from_model_config": true, "bos_token_id": 2, "eos_token_id": 3, "transformers_version": "5.0"}"#;
        assert_eq!(parse(text).unwrap(), GenerationConfig { eos_token_ids: vec![3], ..Default::default() });
        let text = r#"{"eos_token_id": [3, 7], "do_sample": true, "temperature": 1, "top_k": 50, "top_p": 0.9,
                       "repetition_penalty": 1.1, "min_p": 0.1, "pad_token_id": null}"#;
        let config = parse(text).unwrap();
        assert_eq!(config.eos_token_ids, [3, 7]);
        assert_eq!((config.do_sample, config.temperature, config.top_k), (Some(true), Some(1.0), Some(50)));
        assert_eq!((config.top_p, config.repetition_penalty), (Some(0.9), Some(1.1)));
        assert_eq!(config.ignored, ["min_p"]);
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn refuses_values_out_of_range() {
        for (text, reason) in [
            (r#"{"eos_token_id": 100}"#, "eos_token_id 100 is outside the vocabulary of 100"),
            (r#"{"eos_token_id": "3"}"#, "expected token ids"),
            (r#"{"temperature": -0.5}"#, "temperature is -0.5, expected at least 0"),
            (r#"{"top_p": 1.5}"#, "top_p is 1.5"),
            (r#"{"top_k": -1}"#, "top_k is -1 (a number), expected a whole number"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty is 0, expected above 0"),
            (r#"{"do_sample": 1}"#, "do_sample is 1 (a number), expected true or false"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("generation_config.json: ") && error.contains(reason), "{text}: {error}");
        }
    }
}
