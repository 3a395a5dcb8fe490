//! The fields that requests for text share.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::runtime::{GenerationRequest, MAX_TOP_LOGPROBS, SamplingParams};
use crate::serve::access::RequestContext;
use crate::serve::app::{App, OpenedModel};
use crate::serve::body::Accepted;
use crate::serve::error::ApiError;
use crate::serve::grammar::AnswerForm;
use crate::text::MAX_STOP_BYTES;

/// Longest salt: each of a request's answers has a copy.
const MAX_SALT_BYTES: usize = 1024;
/// Most answers of one request, all prompts together.
pub(super) const MAX_CHOICES: usize = 128;

/// One string or several.
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(in crate::serve) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

/// Options of a stream.
#[derive(Debug, Clone, Default, Deserialize, utoipa::ToSchema)]
pub(in crate::serve) struct StreamOptions {
    /// A last chunk tells the usage.
    #[serde(default)]
    pub include_usage: Option<bool>,
    /// Every chunk tells the usage so far.
    #[serde(default)]
    pub continuous_usage_stats: Option<bool>,
    /// Accepted: pieces are not padded.
    #[allow(dead_code, reason = "accepted and ignored")]
    #[serde(default)]
    #[schema(value_type = Option<bool>)]
    pub include_obfuscation: Option<Accepted>,
}

impl StreamOptions {
    /// The usage is told at the end.
    pub fn wants_usage(&self) -> bool {
        self.include_usage.unwrap_or(false)
    }

    /// It is told in every chunk: only where it is told at all, as in vLLM.
    pub fn wants_continuous_usage(&self) -> bool {
        self.wants_usage() && self.continuous_usage_stats.unwrap_or(false)
    }
}

/// Defines a request with its own fields and those that all requests for text share.
macro_rules! text_request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize, utoipa::ToSchema)]
        pub(in crate::serve) struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            /// Name of the model; the first one without.
            #[serde(default)]
            pub model: Option<String>,
            /// 0 is greedy. Without any setting that samples, the model's own, usually greedy.
            #[serde(default)]
            #[schema(minimum = 0, maximum = 100)]
            pub temperature: Option<f32>,
            /// Sample from the most likely tokens that together have this probability.
            #[serde(default)]
            #[schema(minimum = 0, maximum = 1)]
            pub top_p: Option<f32>,
            /// Sample from this many of the most likely tokens; 0 or -1 is off.
            #[serde(default)]
            pub top_k: Option<i64>,
            /// Sample from tokens at least this times as likely as the most likely one.
            #[serde(default)]
            #[schema(minimum = 0, maximum = 1)]
            pub min_p: Option<f32>,
            /// Seed of the random choices. Choice i of `n` uses the seed plus i.
            #[serde(default)]
            pub seed: Option<i64>,
            /// Strings that end an answer.
            #[serde(default)]
            pub stop: Option<$crate::serve::openai::settings::OneOrMany>,
            /// Token ids that end an answer.
            #[serde(default)]
            pub stop_token_ids: Option<Vec<u32>>,
            /// Tokens of an answer before it may end.
            #[serde(default)]
            pub min_tokens: Option<usize>,
            /// The model's own end does not end an answer.
            #[serde(default)]
            #[schema(default = false)]
            pub ignore_eos: Option<bool>,
            /// Numbers from -100 to 100 that are added to the logits of tokens, by id.
            #[serde(default)]
            pub logit_bias: Option<std::collections::HashMap<String, f32>>,
            /// Subtracted from the logits of tokens that the text has.
            #[serde(default)]
            #[schema(default = 0, minimum = -100, maximum = 100)]
            pub presence_penalty: Option<f32>,
            /// Subtracted from the logits of tokens once for each time that the text has them.
            #[serde(default)]
            #[schema(default = 0, minimum = -100, maximum = 100)]
            pub frequency_penalty: Option<f32>,
            /// Divides the positive logits of tokens that the text has, and multiplies the negative ones.
            #[serde(default)]
            #[schema(default = 1, minimum = 0.01, maximum = 100)]
            pub repetition_penalty: Option<f32>,
            /// Number of answers.
            #[serde(default)]
            #[schema(default = 1, minimum = 1, maximum = 128)]
            pub n: Option<usize>,
            /// Send the answer as it is computed.
            #[serde(default)]
            #[schema(default = false)]
            pub stream: Option<bool>,
            /// Needs `stream`.
            #[serde(default, deserialize_with = "crate::serve::body::object_or_null")]
            pub stream_options: Option<$crate::serve::openai::settings::StreamOptions>,
            /// Requests with a lower number get a slot first.
            #[serde(default)]
            #[schema(default = 0)]
            pub priority: Option<i32>,
            /// Keys and values are reused among requests with the same salt only.
            #[serde(default)]
            pub cache_salt: Option<String>,
            /// Return the ids of the prompt and the answer.
            #[serde(default)]
            #[schema(default = false)]
            pub return_token_ids: Option<bool>,
            /// The form of the answer.
            #[serde(default, deserialize_with = "crate::serve::body::object_or_null")]
            pub response_format: Option<$crate::serve::grammar::ResponseFormat>,
            /// The form of the answer, as vLLM has it.
            #[serde(default, deserialize_with = "crate::serve::body::object_or_null")]
            pub structured_outputs: Option<$crate::serve::grammar::StructuredOutputs>,
            /// Accepted; it has no effect.
            #[allow(dead_code, reason = "accepted and ignored")]
            #[serde(default)]
            #[schema(value_type = Option<String>)]
            pub user: Option<$crate::serve::body::Accepted>,
        }

        impl $name {
            /// The fields that requests for text share.
            fn settings(&mut self) -> Result<$crate::serve::openai::settings::Settings, $crate::serve::error::ApiError> {
                use $crate::serve::grammar::AnswerForm;
                use $crate::serve::openai::settings::{Settings, sampling_number};
                let (response_format, structured_outputs) =
                    (self.response_format.take(), self.structured_outputs.take());
                Ok(Settings {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k.map(|k| sampling_number("top_k", k.max(0))).transpose()?,
                    min_p: self.min_p,
                    seed: self.seed.map(|seed| seed as u64),
                    stop: self.stop.take().map_or_else(Vec::new, |stop| stop.into_vec()),
                    stop_token_ids: self.stop_token_ids.take().unwrap_or_default(),
                    min_tokens: self.min_tokens,
                    ignore_eos: self.ignore_eos.unwrap_or(false),
                    logit_bias: self.logit_bias.take().unwrap_or_default(),
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    repetition_penalty: self.repetition_penalty,
                    choices: self.n.unwrap_or(1),
                    priority: self.priority.unwrap_or(0),
                    cache_salt: self.cache_salt.take(),
                    form: AnswerForm::of_request(response_format, "response_format", structured_outputs)?,
                })
            }
        }
    };
}
pub(super) use text_request;

/// A number of a request as the sampler takes it.
pub(super) fn sampling_number(field: &str, number: i64) -> Result<u32, ApiError> {
    u32::try_from(number)
        .map_err(|_| ApiError::of_field(field, format!("{field} is {number}; expected up to {}", u32::MAX)))
}

/// The fields that requests for text share.
#[derive(Debug, Clone)]
pub(in crate::serve) struct Settings {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub seed: Option<u64>,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub min_tokens: Option<usize>,
    pub ignore_eos: bool,
    pub logit_bias: HashMap<String, f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub choices: usize,
    pub priority: i32,
    pub cache_salt: Option<String>,
    /// The form of the answer, and the field that asks for it.
    pub form: Option<(AnswerForm, &'static str)>,
}

impl Settings {
    /// Applies the settings to a request that has the model's defaults.
    ///
    /// # Errors
    /// 400 naming the field.
    pub async fn apply(
        self,
        app: &App,
        model: &Arc<OpenedModel>,
        context: &RequestContext,
        mut request: GenerationRequest,
    ) -> Result<GenerationRequest, ApiError> {
        let default = SamplingParams::from(&model.model.package().manifest().generation);
        let mut logit_bias = Vec::with_capacity(self.logit_bias.len());
        for (id, bias) in &self.logit_bias {
            let id: u32 = id.parse().map_err(|_| {
                let id = crate::error::clip(id);
                ApiError::of_field("logit_bias", format!("logit_bias has the key `{id}`; expected token ids"))
            })?;
            logit_bias.push((id, *bias));
        }
        // A map has no order of its own, and floats are added in order.
        logit_bias.sort_by_key(|(id, _)| *id);
        request.sampling = SamplingParams {
            temperature: self.temperature.or(default.temperature),
            top_k: self.top_k.or(default.top_k),
            top_p: self.top_p.or(default.top_p),
            min_p: self.min_p.or(default.min_p),
            repetition_penalty: self.repetition_penalty.or(default.repetition_penalty),
            presence_penalty: self.presence_penalty.or(default.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(default.frequency_penalty),
            logit_bias,
            min_tokens: self.min_tokens.or(default.min_tokens),
            seed: self.seed,
        }
        .effective();
        if self.form.is_some() {
            app.give_form(model, &mut request, self.form).await?;
        } else if self.ignore_eos {
            request.stop_ids.clear();
            request.stop_strings.clear();
        }
        check_stops("stop", &self.stop)?;
        request.stop_ids.extend(self.stop_token_ids);
        request.stop_strings.extend(self.stop);
        request.priority = self.priority;
        if let Some(bytes) = self.cache_salt.as_ref().map(String::len).filter(|bytes| *bytes > MAX_SALT_BYTES) {
            let words = format!("cache_salt has {bytes} bytes; expected at most {MAX_SALT_BYTES}");
            return Err(ApiError::of_field("cache_salt", words));
        }
        request.cache_salt = self.cache_salt;
        request.client = context.client;
        request.deadline = app.deadline();
        Ok(request)
    }
}

/// Refuses numbers of alternatives that are too large.
///
/// # Errors
/// 400 naming the field.
pub(super) fn check_top_logprobs(field: &str, top: usize) -> Result<(), ApiError> {
    match top > MAX_TOP_LOGPROBS {
        true => Err(ApiError::of_field(field, format!("{field} is {top}; expected 0 to {MAX_TOP_LOGPROBS}"))),
        false => Ok(()),
    }
}

/// Refuses stop strings that cannot be used.
///
/// # Errors
/// 400 naming the field.
pub(in crate::serve) fn check_stops(field: &str, stops: &[String]) -> Result<(), ApiError> {
    match stops.iter().enumerate().find(|(_, stop)| !(1..=MAX_STOP_BYTES).contains(&stop.len())) {
        None => Ok(()),
        Some((index, stop)) if stop.is_empty() => {
            Err(ApiError::of_field(field, format!("{field}[{index}] is empty; it would end every answer at once")))
        }
        Some((index, stop)) => {
            let message = format!("{field}[{index}] has {} bytes; expected 1 to {MAX_STOP_BYTES}", stop.len());
            Err(ApiError::of_field(field, message))
        }
    }
}

/// Refuses tools unless they are not to be used.
///
/// # Errors
/// 400 naming the field.
pub(in crate::serve) fn check_tools(tools: Option<&[Value]>, is_unused: bool) -> Result<(), ApiError> {
    match tools.is_some_and(|tools| !tools.is_empty()) && !is_unused {
        true => Err(ApiError::unsupported("tools", "this model's chat format has no tools")),
        false => Ok(()),
    }
}

/// Refuses a limit of no tokens.
///
/// # Errors
/// 400 naming the field.
pub(in crate::serve) fn check_limit(field: &str, most: Option<usize>) -> Result<(), ApiError> {
    match most {
        Some(0) => Err(ApiError::of_field(field, format!("{field} is 0; expected at least 1"))),
        _ => Ok(()),
    }
}

/// Refuses a limit that is below the least number of tokens; each with the name of its field.
///
/// # Errors
/// 400 naming both.
pub(in crate::serve) fn check_lengths(
    (field, least): (&str, Option<usize>),
    (name, most): (&str, Option<usize>),
) -> Result<(), ApiError> {
    match (least, most) {
        (Some(least), Some(most)) if least > most => {
            Err(ApiError::of_field(field, format!("{field} is {least}, which is more than {name}, which is {most}")))
        }
        _ => Ok(()),
    }
}

/// A request with a seed of its own for choice `index`.
pub(super) fn for_choice(request: &GenerationRequest, index: usize) -> GenerationRequest {
    let mut request = request.clone();
    request.sampling.seed = request.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
    request
}
