//! Triton's `generate` and `generate_stream`, with the fields of TensorRT-LLM's backend.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{KserveError, Named};
use crate::runtime::{Event, GenerationRequest, SamplingParams};
use crate::serve::access::RequestContext;
use crate::serve::answer::{Answer, log_failure};
use crate::serve::app::{App, OpenedModel};
use crate::serve::body::{NAMED_FIELDS, ParsedBody, name_ignored, object_or_null, read_json};
use crate::serve::error::ApiError;
use crate::serve::openai::{OneOrMany, check_lengths, stream};

/// Length of an answer where none is given, as TensorRT-LLM's backend has it.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A text to continue.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::serve) struct GenerateRequest {
    /// The text, with special tokens as such.
    #[schema(min_length = 1)]
    text_input: String,
    #[serde(flatten)]
    settings: GenerateSettings,
    /// Settings may be here instead.
    #[serde(default, deserialize_with = "object_or_null")]
    parameters: Option<GenerateSettings>,
}

/// Settings of an answer, in Triton's names.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub(in crate::serve) struct GenerateSettings {
    /// Limit on the answer's tokens. Bound: the room that the prompt leaves.
    #[schema(default = 16)]
    max_tokens: Option<usize>,
    /// Tokens of an answer before it may end.
    min_length: Option<usize>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f32>,
    /// Sample from this many of the most likely tokens; 0 is off.
    top_k: Option<u32>,
    /// Sample from the most likely tokens that together have this probability.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Divides the positive logits of tokens that the text has, and multiplies the negative ones.
    #[schema(default = 1, minimum = 0.01, maximum = 100)]
    repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that the text has.
    #[schema(default = 0, minimum = -100, maximum = 100)]
    presence_penalty: Option<f32>,
    /// Subtracted from the logits of tokens once for each time that the text has them.
    #[schema(default = 0, minimum = -100, maximum = 100)]
    frequency_penalty: Option<f32>,
    /// Seed of the random choices.
    random_seed: Option<u64>,
    /// Strings that end an answer.
    stop_words: Option<OneOrMany>,
    /// Must be empty.
    bad_words: Option<OneOrMany>,
    #[serde(flatten)]
    #[schema(ignore)]
    other: Map<String, Value>,
}

impl GenerateSettings {
    fn or(self, other: GenerateSettings) -> GenerateSettings {
        GenerateSettings {
            max_tokens: self.max_tokens.or(other.max_tokens),
            min_length: self.min_length.or(other.min_length),
            temperature: self.temperature.or(other.temperature),
            top_k: self.top_k.or(other.top_k),
            top_p: self.top_p.or(other.top_p),
            repetition_penalty: self.repetition_penalty.or(other.repetition_penalty),
            presence_penalty: self.presence_penalty.or(other.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(other.frequency_penalty),
            random_seed: self.random_seed.or(other.random_seed),
            stop_words: self.stop_words.or(other.stop_words),
            bad_words: self.bad_words.or(other.bad_words),
            other: self.other.into_iter().chain(other.other).collect(),
        }
    }
}

pub(super) async fn generate(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    named: Named,
    request: Request,
) -> Result<Response, KserveError> {
    let (answer, ignored) = submit(&app, &context, &named, request).await?;
    let completion = answer.completion().await?;
    context.used(&completion);
    let mut response = Json(piece(&named, &completion.text)).into_response();
    name_ignored(&mut response, &ignored);
    Ok(response)
}

pub(super) async fn generate_stream(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    named: Named,
    request: Request,
) -> Result<Response, KserveError> {
    let (mut answer, ignored) = submit(&app, &context, &named, request).await?;
    let mut response = stream(move |chunks| async move {
        while let Some(event) = answer.next().await {
            match event {
                Event::Text(text) => chunks.send(&piece(&named, &text)).await?,
                Event::Done(completion) => context.used(&completion),
                Event::Failed(error) => {
                    log_failure(&error);
                    chunks.send(&json!({ "error": ApiError::from(&*error).message })).await?;
                }
                _ => {}
            }
        }
        Ok(())
    });
    name_ignored(&mut response, &ignored);
    Ok(response)
}

fn piece(named: &Named, text: &str) -> Value {
    json!({ "model_name": named.0, "model_version": "1", "text_output": text })
}

async fn submit(
    app: &Arc<App>,
    context: &RequestContext,
    named: &Named,
    request: Request,
) -> Result<(Answer, Vec<String>), ApiError> {
    let model = named.opened(app)?;
    let ParsedBody { value: body, mut ignored } = read_json::<GenerateRequest>(app, request).await?;
    let settings = body.settings.or(body.parameters.unwrap_or_default());
    let bad_words = settings.bad_words.map_or_else(Vec::new, OneOrMany::into_vec);
    if bad_words.iter().any(|word| !word.is_empty()) {
        return Err(ApiError::unsupported("bad_words", "bad_words is not supported"));
    }
    let known = ["stream", "id", "pad_id", "end_id"];
    let others = settings.other.keys().filter(|key| !known.contains(&key.as_str()));
    ignored.extend(others.take(NAMED_FIELDS.saturating_sub(ignored.len())).map(crate::error::clip));
    let max_tokens = settings.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    check_lengths(("min_length", settings.min_length), ("max_tokens", Some(max_tokens)))?;
    let stops = settings.stop_words.map_or_else(Vec::new, OneOrMany::into_vec);
    let ids = {
        let model = model.clone();
        app.encode(move || encode(&model, &body.text_input)).await?
    };
    let sampling = SamplingParams {
        temperature: settings.temperature,
        top_k: settings.top_k,
        top_p: settings.top_p,
        repetition_penalty: settings.repetition_penalty,
        presence_penalty: settings.presence_penalty,
        frequency_penalty: settings.frequency_penalty,
        min_tokens: settings.min_length,
        seed: settings.random_seed,
        ..SamplingParams::default()
    };
    let mut request = GenerationRequest::new(ids)
        .max_tokens(max_tokens)
        .sampling(sampling.effective())
        .stop_ids(model.format.stop_ids())
        .stop_strings(model.format.chat_stop_strings())
        .stop_strings(stops.into_iter().filter(|stop| !stop.is_empty()));
    request.client = context.client;
    request.deadline = app.deadline();
    Ok((model.submit(request)?, ignored))
}

fn encode(model: &OpenedModel, text: &str) -> Result<Vec<u32>, ApiError> {
    model.check_text(text.len())?;
    Ok(model.tokenizer()?.encode(text)?)
}
