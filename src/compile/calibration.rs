//! Calibration: the prompts it uses, and its result for 8-bit activations, one scale for each linear layer's inputs.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::recipe::LinearKind;
use super::{Precision, Progress};
use crate::backend::Limits;
use crate::backend::cpu::program::{Program, ProgramKernel};
use crate::error::{Error, Result, clip};
use crate::tensor::DType;
use crate::text::{ChatFormat, Message, Tokenizer};

/// Diverse built-in conversations, used if the user names no prompts; `tools/make_calibration.py` writes them.
const BUILT_IN: &str = include_str!("calibration.jsonl");
/// Size limit of a prompt file.
const MAX_PROMPTS_BYTES: u64 = 64 << 20;
/// Tokens of built-in conversations, at most, to round weights by; by most tokenizers all of them are fewer. They bound the
/// time of a build, which runs them all through the model.
pub(super) const ROUNDING_TOKENS: usize = 64 << 10;
/// The same for the scales of activations alone, which fewer tokens settle.
pub(super) const SCALE_TOKENS: usize = 8 << 10;
/// Tokens of one of them at most.
const BUILT_IN_PROMPT_TOKENS: usize = 512;
/// Without a tokenizer: the number and the length of arbitrary token sequences.
const ARBITRARY: (usize, usize) = (8, 64);

/// The input scale of each linear layer, by the name of its weight, and the factors that its inputs were divided by.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Calibration {
    scales: BTreeMap<String, f32>,
    /// A factor for each channel that a layer's inputs come from; see [`super::smoothing`].
    factors: BTreeMap<String, Arc<[f32]>>,
    /// Scale of layers not in the map.
    otherwise: Option<f32>,
    /// Layers that have no scale, because they stay in BF16.
    kept: Vec<LinearKind>,
}

impl Calibration {
    /// The input scale of the layer with this weight; a suffix that names the stored form is ignored.
    pub fn scale(&self, weight: &str) -> Option<f32> {
        let name = base_name(weight);
        let otherwise = self.otherwise.filter(|_| !self.kept.iter().any(|kind| kind.is_of(name)));
        self.scales.get(name).copied().or(otherwise)
    }

    /// The factors of the layer with this weight, one for each of its `channels`.
    pub fn factors(&self, weight: &str, channels: usize) -> Option<Arc<[f32]>> {
        let known = self.factors.get(base_name(weight)).cloned();
        known.or_else(|| self.otherwise.map(|_| vec![1.0; channels].into()))
    }

    /// The same without scales for layers of these kinds, so that they stay in BF16. Their factors remain: weights do not
    /// depend on which layers are quantized.
    pub fn without(&self, kinds: &[LinearKind]) -> Calibration {
        let mut left = self.clone();
        left.scales.retain(|name, _| !kinds.iter().any(|kind| kind.is_of(name)));
        left.kept.extend_from_slice(kinds);
        left
    }

    /// One scale for every layer, and factors of one, for plans that are inspected but not run.
    pub fn uniform(scale: f32) -> Calibration {
        Calibration { otherwise: Some(scale), ..Calibration::default() }
    }

    /// Creates it from scales by name, as stored in a manifest. Factors are part of a package's weights.
    pub fn from_scales(scales: BTreeMap<String, f32>) -> Calibration {
        Calibration { scales, ..Calibration::default() }
    }

    /// The scales, by the names of the layers' weights.
    pub fn scales(&self) -> &BTreeMap<String, f32> {
        &self.scales
    }

    /// Recovers the scales that a program was built with. Factors are part of its weights.
    pub fn of_program(program: &Program) -> Calibration {
        let mut calibration = Calibration::default();
        let mut rounded = HashMap::new(); // buffer -> scale of its contents
        for kernel in &program.kernels {
            match *kernel {
                ProgramKernel::FakeQuantizeF8 { scale, out, .. }
                | ProgramKernel::Quantize { scale: Some(scale), out, .. } => {
                    rounded.insert(out, scale);
                }
                ProgramKernel::Linear { x, weight, .. } => {
                    if let (Some(scale), Some(weight)) = (rounded.get(&x.buffer), program.weights.get(weight)) {
                        calibration.scales.insert(base_name(&weight.name).into(), *scale);
                    }
                }
                _ => {}
            }
        }
        calibration
    }
}

/// The calibrations of a build, one for each type of codes that inputs are quantized to.
#[derive(Debug, Clone, Default)]
pub(super) struct Calibrations {
    /// For E4M3 inputs.
    pub e4m3: Calibration,
    /// For 8-bit integers.
    pub int8: Calibration,
}

impl Calibrations {
    /// That of a precision, if it needs one.
    pub fn of(&self, precision: Precision) -> Option<&Calibration> {
        match precision.input_code() {
            Some(DType::F8) => Some(&self.e4m3),
            Some(_) => Some(&self.int8),
            None => None,
        }
    }
}

/// A weight's name without the suffix of its stored form.
pub(super) fn base_name(weight: &str) -> &str {
    [".panels", ".bf16", ".f8", ".i8"]
        .into_iter()
        .fold(weight, |name, suffix| name.strip_suffix(suffix).unwrap_or(name))
}

/// Prompts as token ids: those of `file`, else the first `built_in_tokens` of the built-in conversations, else (without a
/// tokenizer) arbitrary ids.
///
/// # Errors
/// [`Error::Format`] naming the line of `file` that is not a prompt, [`Error::Io`] if it cannot be read.
pub(super) fn prompts(
    file: Option<&PathBuf>,
    text: Option<(&Tokenizer, &ChatFormat)>,
    built_in_tokens: usize,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    match (file, text) {
        (Some(path), of_text) => {
            let mut text = String::new();
            let reader = File::open(path).map_err(Error::io("open", path))?;
            reader.take(MAX_PROMPTS_BYTES + 1).read_to_string(&mut text).map_err(Error::io("read", path))?;
            if text.len() as u64 > MAX_PROMPTS_BYTES {
                return Err(Error::format(
                    path,
                    format!("longer than {MAX_PROMPTS_BYTES} bytes, the limit for prompts"),
                ));
            }
            parse(path, &text, of_text, limits)
        }
        (None, Some(of_text)) => {
            let all = Limits { max_sequence_tokens: usize::MAX, ..limits.clone() };
            let (mut prompts, mut refusal) = (Vec::new(), None);
            // A checkpoint's own template may reject system messages, for example: the others suffice.
            for line in BUILT_IN.lines().filter(|line| !line.trim().is_empty()) {
                match parse(Path::new("the built-in prompts"), line, Some(of_text), &all) {
                    Ok(prompt) => prompts.extend(prompt),
                    Err(error) => refusal = Some(error),
                }
            }
            if let (true, Some(error)) = (prompts.is_empty(), refusal) {
                return Err(error);
            }
            // The beginnings suffice.
            prompts.iter_mut().for_each(|ids| ids.truncate(limits.max_sequence_tokens.min(BUILT_IN_PROMPT_TOKENS)));
            let mut tokens = 0;
            let mut within = |ids: &[u32]| {
                tokens += ids.len();
                tokens <= built_in_tokens
            };
            let fitting = prompts.iter().take_while(|ids| within(ids)).count();
            prompts.truncate(fitting.max(1));
            Ok(prompts)
        }
        (None, None) => {
            progress.warn(
                "without a tokenizer, activation ranges are calibrated on arbitrary token ids; give real ones with \
                 --calibration",
            );
            let (lists, tokens) = ARBITRARY;
            let id = |i: usize| (i.wrapping_mul(2_654_435_761) >> 8) % limits.vocab_size;
            let list =
                |l: usize| (0..tokens.min(limits.max_sequence_tokens)).map(|i| id(l * tokens + i) as u32).collect();
            Ok((0..lists).map(list).collect())
        }
    }
}

/// Parses lines of JSON: `{"messages": [{"role", "content"}, …]}` ending with a user message, or `{"token_ids": […]}`.
fn parse(
    path: &Path,
    text: &str,
    of_text: Option<(&Tokenizer, &ChatFormat)>,
    limits: &Limits,
) -> Result<Vec<Vec<u32>>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Line {
        messages: Option<Vec<Message>>,
        token_ids: Option<Vec<u32>>,
    }
    let mut prompts = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let refuse = |detail: String| Error::format(path, format!("line {}: {detail}", index + 1));
        let line: Line = serde_json::from_str(line).map_err(|e| refuse(clip(e)))?;
        let ids = match (line.messages, line.token_ids, of_text) {
            (Some(messages), None, Some((tokenizer, format))) => {
                format.prompt(tokenizer, &messages).map_err(|e| refuse(e.to_string()))?
            }
            (Some(_), None, None) => return Err(refuse("the checkpoint has no tokenizer: use token_ids".into())),
            (None, Some(ids), _) => ids,
            _ => return Err(refuse("expected either messages or token_ids".into())),
        };
        if ids.is_empty() || ids.len() > limits.max_sequence_tokens {
            let most = limits.max_sequence_tokens;
            return Err(refuse(format!("it has {} tokens, expected 1 to {most}", ids.len())));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= limits.vocab_size) {
            return Err(refuse(format!("token id {id} is outside the vocabulary of {}", limits.vocab_size)));
        }
        prompts.push(ids);
    }
    if prompts.is_empty() {
        return Err(Error::format(path, "it contains no prompts"));
    }
    Ok(prompts)
}

impl Calibration {
    /// Adds the scale of the layer with this weight.
    pub(super) fn insert(&mut self, weight: &str, scale: f32) {
        self.scales.insert(base_name(weight).into(), scale);
    }

    /// Adds the factors of the layer with this weight.
    pub(super) fn insert_factors(&mut self, weight: &str, factors: Vec<f32>) {
        self.factors.insert(base_name(weight).into(), factors.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { slots: 1, max_sequence_tokens: 4, max_step_tokens: 4, max_logits_rows: 1, vocab_size: 10 }
    }

    #[test]
    fn lines_that_are_not_prompts_are_named() {
        let parse = |text: &str| parse(Path::new("p.jsonl"), text, None, &limits());
        assert_eq!(parse("{\"token_ids\": [1, 2]}\n\n{\"token_ids\": [3]}\n").unwrap(), [vec![1, 2], vec![3]]);
        let refused = |text: &str| parse(text).unwrap_err().to_string();
        assert!(refused("").contains("no prompt"));
        assert!(refused("{\"token_ids\": [1]}\nhello").contains("p.jsonl: line 2"));
        assert!(refused("{\"token_ids\": [1, 2, 3, 4, 5]}").contains("5 tokens, expected 1 to 4"));
        assert!(refused("{\"token_ids\": []}").contains("0 tokens"));
        assert!(refused("{\"token_ids\": [10]}").contains("id 10"));
        assert!(refused("{}").contains("either messages or token_ids"));
        assert!(refused("{\"messages\": []}").contains("no tokenizer"));
        assert!(refused("{\"tokens\": [1]}").contains("tokens"));
    }

    #[test]
    fn the_built_in_prompts_are_conversations() {
        for line in BUILT_IN.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let messages: Vec<Message> = serde_json::from_value(line["messages"].clone()).unwrap();
            crate::text::NemotronMarkers::default().render(&messages).unwrap();
        }
    }

    #[test]
    fn names_lose_what_says_how_a_weight_is_kept() {
        assert_eq!(base_name("layers.0.attention.qkv.weight.bf16.panels"), "layers.0.attention.qkv.weight");
        assert_eq!(base_name("layers.0.attention.qkv.weight.f8.panels"), "layers.0.attention.qkv.weight");
        assert_eq!(base_name("lm_head.weight"), "lm_head.weight");
    }
}
