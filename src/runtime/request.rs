//! The request for a generation and its result.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::constraint::Grammar;
use super::report::{TokenReport, TokenReports};
use super::sampling::SamplingParams;
use crate::error::Result;
use crate::text::{ChatFormat, Message, Tokenizer};

/// One generation: a prompt, and settings changed by builder methods.
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
    /// The ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Sampling settings.
    pub sampling: SamplingParams,
    /// Limit on ids to sample, including the one that ends the generation. The room in the sequence is a limit too, so
    /// `usize::MAX` asks for as many as fit. With 0 nothing is computed: the completion is empty and its finish reason
    /// is [`FinishReason::Length`].
    pub max_tokens: usize,
    /// Strings that end the generation; neither they nor anything after them is shown. They require a tokenizer.
    pub stop_strings: Vec<String>,
    /// Ids that end the generation and are not shown. EOS has to be among them: none is built in.
    pub stop_ids: Vec<u32>,
    /// Trims whitespace around the answer, as the model card's code does for chat.
    pub trim: bool,
    /// What to report of each token of the answer.
    pub reports: TokenReports,
    /// What to report of each token of the prompt. With log-probabilities the whole prompt is computed, whatever of it is
    /// in the KV cache; with `max_tokens` 0 nothing else is.
    pub prompt_reports: TokenReports,
    /// Allows only answers of a grammar.
    pub grammar: Option<Grammar>,
    /// Keys and values of earlier requests are reused only among requests with the same salt: who does not know it cannot
    /// find out from timings what others asked.
    pub cache_salt: Option<String>,
    /// An engine gives slots to requests with a lower number first.
    pub priority: i32,
    /// Who sent it: of equal priorities, an engine gives a slot to the client with the fewest running requests.
    pub client: u64,
    /// When to give up, whether it waits or runs.
    pub deadline: Option<Instant>,
}

impl GenerationRequest {
    /// Greedy generation of as many ids as there is room for, without stops or trimming.
    pub fn new(prompt: Vec<u32>) -> GenerationRequest {
        GenerationRequest {
            prompt,
            sampling: SamplingParams::default(),
            max_tokens: usize::MAX,
            stop_strings: Vec::new(),
            stop_ids: Vec::new(),
            trim: false,
            reports: TokenReports::None,
            prompt_reports: TokenReports::None,
            grammar: None,
            cache_salt: None,
            priority: 0,
            client: 0,
            deadline: None,
        }
    }

    /// Sets the sampling settings.
    #[must_use]
    pub fn sampling(mut self, sampling: SamplingParams) -> GenerationRequest {
        self.sampling = sampling;
        self
    }

    /// Limits the number of ids to sample.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> GenerationRequest {
        self.max_tokens = max_tokens;
        self
    }

    /// Adds a string that ends the generation.
    #[must_use]
    pub fn stop_string(mut self, text: impl Into<String>) -> GenerationRequest {
        self.stop_strings.push(text.into());
        self
    }

    /// Adds strings that end the generation.
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

    /// Turns trimming of whitespace around the answer on or off.
    #[must_use]
    pub fn trim(mut self, trim: bool) -> GenerationRequest {
        self.trim = trim;
        self
    }

    /// Selects what to report of each token of the answer.
    #[must_use]
    pub fn reports(mut self, reports: TokenReports) -> GenerationRequest {
        self.reports = reports;
        self
    }

    /// Selects what to report of each token of the prompt.
    #[must_use]
    pub fn prompt_reports(mut self, reports: TokenReports) -> GenerationRequest {
        self.prompt_reports = reports;
        self
    }

    /// Allows only answers of a grammar.
    #[must_use]
    pub fn grammar(mut self, grammar: Grammar) -> GenerationRequest {
        self.grammar = Some(grammar);
        self
    }

    /// The assistant's next turn in a conversation, with the rendering, stops and trimming of `format`.
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

/// The reason why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop id or a stop string was sampled.
    Stop,
    /// `max_tokens` was reached, or the sequence is full.
    Length,
    /// The caller cancelled the generation; nobody else gets to see this.
    Cancelled,
}

/// The stop that ended a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum StopMatch {
    /// A stop id.
    Id(u32),
    /// A stop string.
    Text(String),
}

/// Time spent in a generation, by phase.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Timings {
    /// Wall time from the request to the start of its generation, in seconds.
    pub queue_seconds: f64,
    /// Wall time from the start of the generation to its first id, in seconds.
    pub prefill_seconds: f64,
    /// Wall time from the first id to the last, in seconds.
    pub decode_seconds: f64,
    /// Prompt tokens computed in that time, not counting those already in the KV cache.
    pub prefill_tokens: usize,
    /// Tokens computed one at a time: all sampled ones except the last.
    pub decode_tokens: usize,
}

/// The result of a generation.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Completion {
    /// The text shown, equal to all streamed pieces together; empty without a tokenizer.
    pub text: String,
    /// Every sampled id, including the one that ended the generation.
    pub token_ids: Vec<u32>,
    /// The reason why it ended.
    pub finish_reason: FinishReason,
    /// What ended it, if it was a stop.
    pub stop: Option<StopMatch>,
    /// Number of tokens in the prompt.
    pub prompt_tokens: usize,
    /// Number of prompt tokens that were already in the KV cache.
    pub reused_tokens: usize,
    /// Length of `token_ids`.
    pub completion_tokens: usize,
    /// The seed of the random draws, whether or not the request specified one.
    pub seed: u64,
    /// Time spent, by phase.
    pub timings: Timings,
    /// The tokens of the answer, as the request wants them reported.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reports: Vec<TokenReport>,
    /// The tokens of the prompt, likewise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompt_reports: Vec<TokenReport>,
}
