//! Anthropic's API: `POST /v1/messages`, text only.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::access::RequestContext;
use super::answer::{Answer, log_failure};
use super::app::{App, OpenedModel};
use super::body::{Accepted, ParsedBody, name_ignored, object_or_null, read_json};
use super::error::ApiError;
use super::grammar::{AnswerForm, ResponseFormat};
use super::openai::{
    Chunks, Fields, Gone, check_limit, check_stops, check_tools, conversation, ends_with_answer, stream,
};
use crate::runtime::{Completion, Event, FinishReason, GenerationRequest, SamplingParams, StopMatch};

/// An error in this API's form.
#[derive(Debug)]
pub(super) struct AnthropicError(ApiError);

impl From<ApiError> for AnthropicError {
    fn from(error: ApiError) -> AnthropicError {
        AnthropicError(error)
    }
}

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        respond(&self.0)
    }
}

/// An error in this API's form.
pub(super) fn respond(error: &ApiError) -> Response {
    error.respond(body_of(error))
}

fn body_of(error: &ApiError) -> Value {
    let kind = match error.status.as_u16() {
        401 => "authentication_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        504 => "timeout_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": error.message } })
}

/// `output_config`
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub(super) struct OutputConfig {
    /// The form of the answer.
    #[serde(default, deserialize_with = "object_or_null")]
    format: Option<OutputFormat>,
    /// Accepted; it has no effect.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    effort: Option<Accepted>,
}

/// `output_config.format`
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum OutputFormat {
    /// JSON of a schema.
    JsonSchema {
        #[schema(value_type = Object)]
        schema: Value,
    },
}

/// A conversation to answer.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct MessagesRequest {
    /// Name of the model; the first one without.
    #[serde(default)]
    model: Option<String>,
    /// The conversation: objects with `role` and `content`, a string or blocks of text.
    #[schema(value_type = Vec<crate::serve::openapi::schemas::InputMessage>, min_items = 1)]
    messages: Vec<Value>,
    /// Limit on the answer's tokens; needed for an answer. Bound: the room that the prompt leaves.
    #[serde(default)]
    #[schema(minimum = 1)]
    max_tokens: Option<usize>,
    /// The system message, a string or blocks of text.
    #[serde(default)]
    #[schema(value_type = Option<crate::serve::openapi::schemas::Content>)]
    system: Option<Value>,
    /// Strings that end the answer.
    #[serde(default)]
    stop_sequences: Option<Vec<String>>,
    /// Send the answer as it is computed.
    #[serde(default)]
    #[schema(default = false)]
    stream: Option<bool>,
    /// 0 is greedy. Without any setting that samples, the model's own, usually greedy.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f32>,
    /// Sample from the most likely tokens that together have this probability.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Sample from this many of the most likely tokens; 0 is off.
    #[serde(default)]
    top_k: Option<u32>,
    /// Must be empty, or `tool_choice` of type `none`: the model's chat format has no tools.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    /// An object with `type`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    tool_choice: Option<Value>,
    /// Accepted; it has no effect.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    metadata: Option<Accepted>,
    /// Accepted; it has no effect.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    service_tier: Option<Accepted>,
    /// Accepted; the model does not reason apart, which keeps to any budget.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    thinking: Option<Accepted>,
    /// The form of the answer.
    #[serde(default, deserialize_with = "object_or_null")]
    output_config: Option<OutputConfig>,
}

impl MessagesRequest {
    /// The conversation with its system message, and the request for an answer without its settings.
    async fn conversation(&mut self, app: &App, model: &Arc<OpenedModel>) -> Result<GenerationRequest, ApiError> {
        let no_tools =
            self.tool_choice.as_ref().and_then(|choice| choice.get("type")).is_some_and(|kind| kind == "none");
        check_tools(self.tools.as_deref(), no_tools)?;
        let system = self.system.take().filter(|system| !system.is_null() && system != "");
        let fields = Fields { messages: "messages", system: system.as_ref().map(|_| "system") };
        let system = system.into_iter().map(|system| json!({ "role": "system", "content": system }));
        // As in Anthropic's API, an answer goes on from a last message of the assistant.
        let continues = ends_with_answer(&self.messages);
        let messages = system.chain(std::mem::take(&mut self.messages)).collect();
        conversation(app, model, messages, fields, continues).await
    }
}

/// `POST /v1/messages`
pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, AnthropicError> {
    let ParsedBody { value: mut body, ignored } = read_json::<MessagesRequest>(&app, request).await?;
    let model = app.model(body.model.as_deref())?;
    let Some(max_tokens) = body.max_tokens else {
        return Err(ApiError::of_field("max_tokens", "max_tokens is missing; expected at least 1").into());
    };
    check_limit("max_tokens", Some(max_tokens))?;
    check_stops("stop_sequences", body.stop_sequences.as_deref().unwrap_or_default())?;
    let mut request = body.conversation(&app, &model).await?.max_tokens(max_tokens);
    let default = SamplingParams::from(&model.model.package().manifest().generation);
    request.sampling = SamplingParams {
        temperature: body.temperature.or(default.temperature),
        top_p: body.top_p.or(default.top_p),
        top_k: body.top_k.or(default.top_k),
        ..default
    }
    .effective();
    let stops = body.stop_sequences.take().unwrap_or_default();
    request.stop_strings.extend(stops.iter().cloned());
    request.client = context.client;
    request.deadline = app.deadline();
    if let Some(OutputFormat::JsonSchema { schema }) = body.output_config.take().and_then(|config| config.format) {
        let format = ResponseFormat::of_schema(schema);
        let form = AnswerForm::of_request(Some(format), "output_config.format", None)?;
        app.give_form(&model, &mut request, form).await?;
    }
    let prompt_tokens = request.prompt.len();
    let answer = model.submit(request)?;
    let message = Message { id: format!("msg_{}", Uuid::new_v4().simple()), model: model.name.clone(), stops };
    let mut response = match body.stream.unwrap_or(false) {
        true => stream(move |chunks| async move { send(&chunks, &message, answer, &context, prompt_tokens).await }),
        false => {
            let completion = answer.completion().await?;
            context.used(&completion);
            Json(message.whole(&completion)).into_response()
        }
    };
    name_ignored(&mut response, &ignored);
    Ok(response)
}

/// `POST /v1/messages/count_tokens`
pub(super) async fn count_tokens(State(app): State<Arc<App>>, request: Request) -> Result<Response, AnthropicError> {
    let ParsedBody { value: mut body, ignored } = read_json::<MessagesRequest>(&app, request).await?;
    let model = app.model(body.model.as_deref())?;
    let request = body.conversation(&app, &model).await?;
    let mut response = Json(json!({ "input_tokens": request.prompt.len() })).into_response();
    name_ignored(&mut response, &ignored);
    Ok(response)
}

/// What the pieces of an answer have in common.
struct Message {
    id: String,
    model: String,
    /// The request's own stop strings.
    stops: Vec<String>,
}

fn usage(completion: &Completion) -> Value {
    json!({
        "input_tokens": completion.prompt_tokens - completion.reused_tokens,
        "cache_read_input_tokens": completion.reused_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion.completion_tokens,
    })
}

impl Message {
    fn stop(&self, completion: &Completion) -> (&'static str, Value) {
        match (&completion.stop, completion.finish_reason) {
            (Some(StopMatch::Text(text)), _) if self.stops.contains(text) => ("stop_sequence", text.clone().into()),
            (_, FinishReason::Length) => ("max_tokens", Value::Null),
            _ => ("end_turn", Value::Null),
        }
    }

    fn whole(&self, completion: &Completion) -> Value {
        let (stop_reason, stop_sequence) = self.stop(completion);
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": [{ "type": "text", "text": completion.text }],
            "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage(completion),
        })
    }
}

async fn send(
    chunks: &Chunks,
    message: &Message,
    mut answer: Answer,
    context: &RequestContext,
    prompt_tokens: usize,
) -> Result<(), Gone> {
    let start = json!({
        "type": "message_start",
        "message": {
            "id": message.id, "type": "message", "role": "assistant", "model": message.model, "content": [],
            "stop_reason": null, "stop_sequence": null,
            "usage": { "input_tokens": prompt_tokens, "output_tokens": 0 },
        },
    });
    chunks.send_named("message_start", &start).await?;
    let block = json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" } });
    chunks.send_named("content_block_start", &block).await?;
    chunks.send_named("ping", &json!({ "type": "ping" })).await?;
    while let Some(event) = answer.next().await {
        match event {
            Event::Text(text) => {
                let delta = json!({ "type": "text_delta", "text": text });
                let delta = json!({ "type": "content_block_delta", "index": 0, "delta": delta });
                chunks.send_named("content_block_delta", &delta).await?;
            }
            Event::Done(completion) => {
                context.used(&completion);
                let (stop_reason, stop_sequence) = message.stop(&completion);
                chunks.send_named("content_block_stop", &json!({ "type": "content_block_stop", "index": 0 })).await?;
                let delta = json!({ "stop_reason": stop_reason, "stop_sequence": stop_sequence });
                let delta = json!({ "type": "message_delta", "delta": delta, "usage": usage(&completion) });
                chunks.send_named("message_delta", &delta).await?;
                chunks.send_named("message_stop", &json!({ "type": "message_stop" })).await?;
            }
            Event::Failed(error) => {
                log_failure(&error);
                chunks.send_named("error", &body_of(&ApiError::from(&*error))).await?;
            }
            Event::Prompt(_) | Event::Token(_) => {}
        }
    }
    Ok(())
}
