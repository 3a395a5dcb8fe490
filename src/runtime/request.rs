//! What a generation is asked for and what it gives back.

use serde::{Deserialize, Serialize};

use super::sampling::SamplingParams;
use crate::error::Result;
use crate::text::{ChatFormat, Message, Tokenizer};

/// One generation: a prompt, and settings that builder methods change.
///
/// ```
/// use aotron::{GenerationRequest, SamplingParams};
///
/// let request = GenerationRequest::new(vec![1, 2, 3])
///     .max_tokens(200)
///     .sampling(SamplingParams::sampled(0.7).seed(1))
///     .stop_string("\n\n");
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GenerationRequest {
    /// The prompt's ids, at least one.
    pub prompt: Vec<u32>,
    /// How ids are chosen.
    pub sampling: SamplingParams,
    /// Most ids to sample, the one that ends the generation included. What the engine holds per sequence bounds it
    /// too, so `usize::MAX` asks for all there is room for. With 0 nothing is computed: the completion is empty and
    /// its finish reason [`FinishReason::Length`].
    pub max_tokens: usize,
    /// Texts that end the generation; neither they nor anything after them is shown. They need a tokenizer.
    pub stop_strings: Vec<String>,
    /// Ids that end the generation and are not shown, EOS among them: none is built in.
    pub stop_ids: Vec<u32>,
    /// Whether whitespace around the answer is removed, as the model card's code does for chat.
    pub trim: bool,
}

impl GenerationRequest {
    /// A greedy generation of as many ids as there is room for, without stops or trimming.
    pub fn new(prompt: Vec<u32>) -> GenerationRequest {
        GenerationRequest {
            prompt,
            sampling: SamplingParams::default(),
            max_tokens: usize::MAX,
            stop_strings: Vec::new(),
            stop_ids: Vec::new(),
            trim: false,
        }
    }

    /// Sets the sampling settings.
    #[must_use]
    pub fn sampling(mut self, sampling: SamplingParams) -> GenerationRequest {
        self.sampling = sampling;
        self
    }

    /// Sets the most ids to sample.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> GenerationRequest {
        self.max_tokens = max_tokens;
        self
    }

    /// Adds a text that ends the generation.
    #[must_use]
    pub fn stop_string(mut self, text: impl Into<String>) -> GenerationRequest {
        self.stop_strings.push(text.into());
        self
    }

    /// Adds texts that end the generation.
    #[must_use]
    pub fn stop_strings(mut self, texts: impl IntoIterator<Item = impl Into<String>>) -> GenerationRequest {
        self.stop_strings.extend(texts.into_iter().map(Into::into));
        self
    }

    /// Adds ids that end the generation.
    #[must_use]
    pub fn stop_ids(mut self, ids: impl IntoIterator<Item = u32>) -> GenerationRequest {
        self.stop_ids.extend(ids);
        self
    }

    /// Sets whether whitespace around the answer is removed.
    #[must_use]
    pub fn trim(mut self, trim: bool) -> GenerationRequest {
        self.trim = trim;
        self
    }

    /// The assistant's next turn in a conversation: rendered, encoded, ended and trimmed as `format` says.
    ///
    /// # Errors
    /// As [`ChatFormat::prompt`].
    pub fn chat(tokenizer: &Tokenizer, format: &ChatFormat, messages: &[Message]) -> Result<GenerationRequest> {
        Ok(GenerationRequest {
            stop_strings: format.chat_stop_strings(),
            stop_ids: format.stop_ids(),
            trim: format.trims(),
            ..GenerationRequest::new(format.prompt(tokenizer, messages)?)
        })
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens`, or the sequence is as long as the engine holds.
    Length,
    /// The caller ended it; only the caller who did sees this.
    Cancelled,
}

/// Where the time of a generation went.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Timings {
    /// Wall time from the start of the generation to its first id, in seconds.
    pub prefill_seconds: f64,
    /// Wall time from the first id to the last, in seconds.
    pub decode_seconds: f64,
    /// Prompt tokens computed in that time: those not already in the KV cache.
    pub prefill_tokens: usize,
    /// Tokens computed one at a time: the sampled ones but the last.
    pub decode_tokens: usize,
}

/// What a generation gave.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Completion {
    /// The text shown, equal to all the pieces that were streamed; empty without a tokenizer.
    pub text: String,
    /// Every sampled id, the one that ended the generation included.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were already in the KV cache.
    pub reused_tokens: usize,
    /// Length of `token_ids`.
    pub completion_tokens: usize,
    /// The seed of the random draws, whether the request named one or not.
    pub seed: u64,
    /// Where the time went.
    pub timings: Timings,
}
