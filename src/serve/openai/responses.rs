//! `POST /v1/responses`, text only. Nothing is stored, so a response cannot be continued by its id.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::logprobs::of_chat;
use super::messages::{Fields, conversation};
use super::settings::{check_limit, check_tools, check_top_logprobs};
use super::{Chunks, Gone, now, stream};
use crate::runtime::{Completion, Event, FinishReason, SamplingParams, TokenReport, TokenReports};
use crate::serve::access::RequestContext;
use crate::serve::answer::{Answer, log_failure};
use crate::serve::app::{App, OpenedModel};
use crate::serve::body::{Accepted, ParsedBody, name_ignored, object_or_null, read_json};
use crate::serve::error::ApiError;
use crate::serve::grammar::{AnswerForm, NamedSchema, ResponseFormat};

/// The item of `include` that asks for log-probabilities.
const INCLUDED_LOGPROBS: &str = "message.output_text.logprobs";

/// A text or a conversation.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of messages")]
pub(in crate::serve) enum Input {
    Text(String),
    #[schema(value_type = Vec<crate::serve::openapi::schemas::InputMessage>)]
    Items(Vec<Value>),
}

/// `text`: the form of the answer.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub(in crate::serve) struct TextOptions {
    #[serde(default, deserialize_with = "object_or_null")]
    format: Option<TextFormat>,
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    verbosity: Option<Accepted>,
}

/// As `response_format`, but for the place of the schema.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::serve) enum TextFormat {
    Text,
    JsonObject,
    JsonSchema(NamedSchema),
}

/// A conversation to answer.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::serve) struct ResponsesRequest {
    /// Name of the model; the first one without.
    #[serde(default)]
    model: Option<String>,
    /// A text of the user, or messages.
    input: Input,
    /// A system message in front of the input.
    #[serde(default)]
    instructions: Option<String>,
    /// Limit on the answer's tokens. Default and bound: the room that the prompt leaves.
    #[serde(default)]
    max_output_tokens: Option<usize>,
    /// 0 is greedy. Without any setting that samples, the model's own, usually greedy.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f32>,
    /// Sample from the most likely tokens that together have this probability.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Send the answer as it is computed.
    #[serde(default)]
    #[schema(default = false)]
    stream: Option<bool>,
    /// The form of the answer.
    #[serde(default, deserialize_with = "object_or_null")]
    text: Option<TextOptions>,
    /// Must be absent: nothing is stored.
    #[serde(default)]
    previous_response_id: Option<String>,
    /// Must be empty, or `tool_choice` `none`: the model's chat format has no tools.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    /// `none`, or anything where there are no tools.
    #[serde(default)]
    #[schema(value_type = Value)]
    tool_choice: Option<Value>,
    /// Must not be true: the answer is in the reply.
    #[serde(default)]
    background: Option<bool>,
    /// Returned as it is.
    #[serde(default)]
    #[schema(value_type = Value)]
    metadata: Option<Value>,
    /// Accepted; nothing is stored.
    #[serde(default)]
    #[schema(value_type = Option<bool>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    store: Option<Accepted>,
    /// With `message.output_text.logprobs`, the log-probabilities of the answer's tokens are returned. Others are not there.
    #[serde(default)]
    include: Option<Vec<String>>,
    /// Number of alternatives to each token, where log-probabilities are returned.
    #[serde(default)]
    #[schema(default = 0, maximum = 20)]
    top_logprobs: Option<usize>,
    /// Accepted; the model does not reason apart.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    reasoning: Option<Accepted>,
    /// Accepted; prompts are never cut.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    truncation: Option<Accepted>,
    /// Accepted; it has no effect.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    user: Option<Accepted>,
    /// Accepted; there are no tools.
    #[serde(default)]
    #[schema(value_type = Option<bool>)]
    #[allow(dead_code, reason = "accepted and ignored")]
    parallel_tool_calls: Option<Accepted>,
}

pub(in crate::serve) async fn create(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let ParsedBody { value: body, ignored } = read_json::<ResponsesRequest>(&app, request).await?;
    let model = app.model(body.model.as_deref())?;
    if body.previous_response_id.is_some() {
        let message = "no response is stored; send the whole conversation as input";
        return Err(ApiError::unsupported("previous_response_id", message));
    }
    if body.background == Some(true) {
        return Err(ApiError::unsupported("background", "a response is in the reply; background is not supported"));
    }
    let has_none = body.tool_choice.as_ref().is_some_and(|choice| choice == "none");
    check_tools(body.tools.as_deref(), has_none)?;
    check_limit("max_output_tokens", body.max_output_tokens)?;
    let system = body.instructions.clone().filter(|text| !text.is_empty());
    let mut messages: Vec<Value> =
        system.map(|text| json!({ "role": "system", "content": text })).into_iter().collect();
    let fields = Fields { messages: "input", system: messages.first().map(|_| "instructions") };
    match body.input {
        Input::Text(text) => messages.push(json!({ "role": "user", "content": text })),
        Input::Items(items) => {
            for (index, item) in items.into_iter().enumerate() {
                messages.push(message_of(item).map_err(|words| {
                    let place = format!("input[{index}]");
                    ApiError::of_field(place.clone(), format!("{place}: {words}"))
                })?);
            }
        }
    }
    let format = body.text.and_then(|text| text.format);
    let described = json!({ "type": match &format {
        None | Some(TextFormat::Text) => "text",
        Some(TextFormat::JsonObject) => "json_object",
        Some(TextFormat::JsonSchema(_)) => "json_schema",
    }});
    let format = format.map(|format| match format {
        TextFormat::Text => ResponseFormat::Text,
        TextFormat::JsonObject => ResponseFormat::JsonObject { schema: None },
        TextFormat::JsonSchema(json_schema) => ResponseFormat::JsonSchema { json_schema },
    });
    let mut request = conversation(&app, &model, messages, fields, false).await?;
    request.max_tokens = body.max_output_tokens.unwrap_or(usize::MAX);
    let default = SamplingParams::from(&model.model.package().manifest().generation);
    let (temperature, top_p) = (body.temperature.or(default.temperature), body.top_p.or(default.top_p));
    request.sampling = SamplingParams { temperature, top_p, ..default }.effective();
    request.client = context.client;
    request.deadline = app.deadline();
    app.give_form(&model, &mut request, AnswerForm::of_request(format, "text.format", None)?).await?;
    let reports = body.include.iter().flatten().any(|item| item == INCLUDED_LOGPROBS);
    let top = body.top_logprobs.unwrap_or(0);
    check_top_logprobs("top_logprobs", top)?;
    if reports {
        request.reports = TokenReports::Logprobs(top);
    }
    let stop_ids = request.stop_ids.clone();
    let answer = model.submit(request).map_err(|error| error.naming_prompt("input"))?;
    let described = Described {
        id: format!("resp_{}", Uuid::new_v4().simple()),
        message_id: format!("msg_{}", Uuid::new_v4().simple()),
        model: model.clone(),
        stop_ids,
        fields: json!({
            "object": "response", "created_at": now(), "model": model.name, "error": null,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": false, "previous_response_id": null, "store": false, "background": false,
            "temperature": temperature, "top_p": top_p, "tools": [], "tool_choice": "none", "truncation": "disabled",
            "text": { "format": described }, "metadata": body.metadata.unwrap_or_else(|| json!({})),
            "reasoning": { "effort": null, "summary": null }, "service_tier": "default",
        }),
    };
    let mut response = match body.stream.unwrap_or(false) {
        true => stream(move |chunks| async move { send(&chunks, &described, answer, &context).await }),
        false => {
            let completion = answer.completion().await?;
            context.used(&completion);
            Json(described.finished(&completion)).into_response()
        }
    };
    name_ignored(&mut response, &ignored);
    Ok(response)
}

/// The message of an item of the input.
fn message_of(item: Value) -> Result<Value, String> {
    match item.get("type").and_then(Value::as_str).unwrap_or("message") {
        "message" => {
            let (role, content) = (item.get("role").cloned(), item.get("content").cloned());
            Ok(json!({ "role": role.unwrap_or_default(), "content": content.unwrap_or_default() }))
        }
        kind => Err(format!("an item of type {}; this model reads messages only", crate::error::clip(kind))),
    }
}

/// What all forms of a response have in common.
struct Described {
    id: String,
    message_id: String,
    model: Arc<OpenedModel>,
    /// Ids that end the answer, which have no text.
    stop_ids: Vec<u32>,
    fields: Value,
}

impl Described {
    fn response(&self, status: &str, output: Vec<Value>, usage: Option<Value>) -> Value {
        let mut response = self.fields.clone();
        response["id"] = json!(self.id);
        response["status"] = json!(status);
        response["output"] = json!(output);
        response["incomplete_details"] = match status {
            "incomplete" => json!({ "reason": "max_output_tokens" }),
            _ => Value::Null,
        };
        response["usage"] = usage.unwrap_or_default();
        response
    }

    fn item(&self, status: &str, content: Vec<Value>) -> Value {
        json!({ "type": "message", "id": self.message_id, "status": status, "role": "assistant", "content": content })
    }

    /// Log-probabilities of tokens, if they are reported, as in `/v1/chat/completions`.
    fn logprobs(&self, reports: &[TokenReport]) -> Value {
        let tokenizer = self.model.model.tokenizer();
        json!(tokenizer.map_or_else(Vec::new, |tokenizer| of_chat(tokenizer, reports, &self.stop_ids)))
    }

    fn status(completion: &Completion) -> &'static str {
        if completion.finish_reason == FinishReason::Length { "incomplete" } else { "completed" }
    }

    fn finished(&self, completion: &Completion) -> Value {
        let status = Described::status(completion);
        let item = self.item(status, vec![part(&completion.text, self.logprobs(&completion.reports))]);
        let usage = json!({
            "input_tokens": completion.prompt_tokens,
            "input_tokens_details": { "cached_tokens": completion.reused_tokens },
            "output_tokens": completion.completion_tokens, "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        });
        self.response(status, vec![item], Some(usage))
    }
}

fn part(text: &str, logprobs: Value) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs })
}

/// Sends numbered events.
struct Numbered<'a> {
    chunks: &'a Chunks,
    next: u64,
}

impl Numbered<'_> {
    async fn send(&mut self, kind: &str, mut event: Value) -> Result<(), Gone> {
        event["type"] = json!(kind);
        event["sequence_number"] = json!(self.next);
        self.next += 1;
        self.chunks.send_named(kind, &event).await
    }
}

async fn send(
    chunks: &Chunks,
    described: &Described,
    mut answer: Answer,
    context: &RequestContext,
) -> Result<(), Gone> {
    let mut events = Numbered { chunks, next: 0 };
    let begun = described.response("in_progress", Vec::new(), None);
    events.send("response.created", json!({ "response": begun })).await?;
    events.send("response.in_progress", json!({ "response": begun })).await?;
    let item = described.item("in_progress", Vec::new());
    events.send("response.output_item.added", json!({ "output_index": 0, "item": item })).await?;
    let place = |more: Value| {
        let mut place = json!({ "item_id": described.message_id, "output_index": 0, "content_index": 0 });
        if let (Some(place), Value::Object(more)) = (place.as_object_mut(), more) {
            place.extend(more);
        }
        place
    };
    events.send("response.content_part.added", place(json!({ "part": part("", json!([])) }))).await?;
    // Tokens whose text is not certain yet.
    let mut held = Vec::new();
    while let Some(event) = answer.next().await {
        match event {
            Event::Text(text) => {
                let logprobs = described.logprobs(&std::mem::take(&mut held));
                let delta = place(json!({ "delta": text, "logprobs": logprobs }));
                events.send("response.output_text.delta", delta).await?;
            }
            Event::Done(completion) => {
                context.used(&completion);
                // Tokens without text of their own, such as a space at the end.
                let rest = described.logprobs(&std::mem::take(&mut held));
                if rest.as_array().is_some_and(|rest| !rest.is_empty()) {
                    let delta = place(json!({ "delta": "", "logprobs": rest }));
                    events.send("response.output_text.delta", delta).await?;
                }
                let (text, logprobs) = (&completion.text, described.logprobs(&completion.reports));
                let done = place(json!({ "text": text, "logprobs": logprobs }));
                events.send("response.output_text.done", done).await?;
                let whole = part(text, logprobs);
                events.send("response.content_part.done", place(json!({ "part": whole }))).await?;
                let status = Described::status(&completion);
                let item = described.item(status, vec![whole]);
                events.send("response.output_item.done", json!({ "output_index": 0, "item": item })).await?;
                let finished = described.finished(&completion);
                events.send(&format!("response.{status}"), json!({ "response": finished })).await?;
            }
            Event::Failed(error) => {
                log_failure(&error);
                let error = ApiError::from(&*error);
                let mut failed = described.response("failed", Vec::new(), None);
                failed["error"] = json!({ "code": error.code.unwrap_or("server_error"), "message": error.message });
                events.send("response.failed", json!({ "response": failed })).await?;
            }
            Event::Token(report) => held.push(report),
            Event::Prompt(_) => {}
        }
    }
    Ok(())
}
