//! `generation_config.json`: a checkpoint's generation defaults.

use std::path::Path;

use serde_json::{Map, Value};

use super::keys::{Keys, is_off, token_ids};
use crate::error::{Error, Result};

/// Generation defaults of a checkpoint; `None` for settings that it omits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Ids that end a generation; empty if none are named.
    pub eos_token_ids: Vec<u32>,
    /// Texts that end a generation; empty if none are named.
    pub stop_strings: Vec<String>,
    /// Maximum number of new tokens; at least 1.
    pub max_new_tokens: Option<usize>,
    /// Sample (`true`) or decode greedily (`false`).
    pub do_sample: Option<bool>,
    /// Divides the logits; 0 to 100.
    pub temperature: Option<f64>,
    /// Keep this many of the likeliest tokens; 0 is off. A -1 in the file, vLLM's spelling of off, is read as 0.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens up to this probability mass, 0 to 1.
    pub top_p: Option<f64>,
    /// Keep tokens at least this fraction as likely as the likeliest one, 0 to 1.
    pub min_p: Option<f64>,
    /// Penalizes tokens that already occurred; 0.01 to 100.
    pub repetition_penalty: Option<f64>,
    /// Keys that would have an effect but are not supported, for callers to report.
    pub ignored: Vec<String>,
}

/// Keys without effect on sampling.
const NEUTRAL: &[&str] = &[
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
];

/// Unsupported settings, each with the value that turns it off.
const OFF_AT: &[(&str, f64)] = &[
    ("diversity_penalty", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("length_penalty", 1.0),
    ("min_length", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beam_groups", 1.0),
    ("num_beams", 1.0),
    ("num_return_sequences", 1.0),
    ("typical_p", 1.0),
];

/// Maximum number of stop strings, and maximum length of one: the runtime's limits, less room for the template's own.
const MAX_STOP_STRINGS: usize = 60;
const MAX_STOP_BYTES: usize = 1024;

/// Parses `object`, the contents of `path`. Ids must be below `vocab_size`.
pub(super) fn read(path: &Path, object: Map<String, Value>, vocab_size: usize) -> Result<GenerationConfig> {
    let mut keys = Keys::new(path, object);
    let mut config = GenerationConfig {
        eos_token_ids: token_ids(&mut keys, "eos_token_id")?,
        stop_strings: stop_strings(&mut keys)?,
        max_new_tokens: keys.size("max_new_tokens")?,
        do_sample: keys.flag("do_sample")?,
        temperature: keys.number("temperature")?,
        top_k: top_k(&mut keys)?,
        top_p: keys.number("top_p")?,
        min_p: keys.number("min_p")?,
        repetition_penalty: keys.number("repetition_penalty")?,
        ignored: Vec::new(),
    };
    for (key, off) in OFF_AT {
        match keys.take(key) {
            Some(value) if value.as_f64() != Some(*off) && !is_off(&value) => config.ignored.push((*key).to_owned()),
            _ => {}
        }
    }
    config.ignored.extend(keys.rest(NEUTRAL, is_off));
    config.ignored.sort();

    if let Some(id) = config.eos_token_ids.iter().find(|id| **id as usize >= vocab_size) {
        return Err(Error::format(path, format!("eos_token_id {id} is outside the vocabulary of {vocab_size}")));
    }
    if config.max_new_tokens == Some(0) {
        return Err(Error::format(path, "max_new_tokens is 0, expected at least 1"));
    }
    let in_range = |key: &str, value: Option<f64>, expected: &str, fits: fn(f64) -> bool| match value {
        Some(value) if !fits(value) => Err(Error::format(path, format!("{key} is {value}, expected {expected}"))),
        _ => Ok(()),
    };
    in_range("temperature", config.temperature, "0 to 100", |value| (0.0..=100.0).contains(&value))?;
    in_range("top_p", config.top_p, "0 to 1", |value| (0.0..=1.0).contains(&value))?;
    in_range("min_p", config.min_p, "0 to 1", |value| (0.0..=1.0).contains(&value))?;
    in_range("repetition_penalty", config.repetition_penalty, "0.01 to 100", |value| (0.01..=100.0).contains(&value))?;
    Ok(config)
}

/// A whole number, or -1 for off.
fn top_k(keys: &mut Keys) -> Result<Option<u32>> {
    if keys.peek("top_k").and_then(Value::as_i64) == Some(-1) {
        keys.take("top_k");
        return Ok(Some(0));
    }
    keys.count("top_k")
}

/// A string or a list of strings.
fn stop_strings(keys: &mut Keys) -> Result<Vec<String>> {
    const KEY: &str = "stop_strings";
    let texts = match keys.take(KEY) {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(list)) => {
            let text = |value: &Value| match value {
                Value::String(text) => Ok(text.clone()),
                other => Err(keys.wrong_kind(KEY, "strings", other)),
            };
            list.iter().map(text).collect::<Result<Vec<String>>>()?
        }
        Some(other) => return Err(keys.wrong_kind(KEY, "a string or a list of strings", &other)),
    };
    let fits = texts.len() <= MAX_STOP_STRINGS && texts.iter().all(|t| !t.is_empty() && t.len() <= MAX_STOP_BYTES);
    match fits {
        true => Ok(texts),
        false => Err(Error::format(
            keys.path(),
            format!("{KEY}: expected at most {MAX_STOP_STRINGS} strings, each of 1 to {MAX_STOP_BYTES} bytes"),
        )),
    }
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
                       "repetition_penalty": 1.1, "min_p": 0.1, "pad_token_id": null, "max_new_tokens": 7,
                       "stop_strings": ["a", "b"], "bad_words_ids": [[3]], "num_beams": 4, "length_penalty": 1,
                       "no_repeat_ngram_size": 0, "early_stopping": false, "max_length": 20}"#;
        let config = parse(text).unwrap();
        assert_eq!(config.eos_token_ids, [3, 7]);
        assert_eq!((config.do_sample, config.temperature, config.top_k), (Some(true), Some(1.0), Some(50)));
        assert_eq!((config.top_p, config.repetition_penalty), (Some(0.9), Some(1.1)));
        assert_eq!((config.min_p, config.max_new_tokens), (Some(0.1), Some(7)));
        assert_eq!(config.stop_strings, ["a", "b"]);
        assert_eq!(config.ignored, ["bad_words_ids", "max_length", "num_beams"]);
        assert_eq!(parse(r#"{"top_k": -1, "stop_strings": "x"}"#).unwrap().top_k, Some(0), "off");
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
    }

    #[test]
    fn refuses_values_out_of_range() {
        for (text, reason) in [
            (r#"{"eos_token_id": 100}"#, "eos_token_id 100 is outside the vocabulary of 100"),
            (r#"{"eos_token_id": "3"}"#, "expected token ids"),
            (r#"{"temperature": -0.5}"#, "temperature is -0.5, expected 0 to 100"),
            (r#"{"max_new_tokens": 0}"#, "max_new_tokens is 0, expected at least 1"),
            (r#"{"stop_strings": [""]}"#, "stop_strings: expected at most 60 strings, each of 1 to 1024 bytes"),
            (r#"{"stop_strings": [3]}"#, "stop_strings is 3 (a number), expected strings"),
            (r#"{"top_p": 1.5}"#, "top_p is 1.5"),
            (r#"{"top_k": -2}"#, "top_k is -2 (a number), expected a whole number of at least 0 and below 2^32"),
            (r#"{"max_new_tokens": -5}"#, "max_new_tokens is -5 (a number), expected a whole number of at least 0"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty is 0, expected 0.01 to 100"),
            (r#"{"do_sample": 1}"#, "do_sample is 1 (a number), expected true or false"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("generation_config.json: ") && error.contains(reason), "{text}: {error}");
        }
    }
}
