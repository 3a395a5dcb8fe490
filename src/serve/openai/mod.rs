//! OpenAI's API.

pub(super) mod chat;
pub(super) mod completions;
mod logprobs;
mod messages;
pub(super) mod responses;
mod settings;
pub(super) mod tokens;

pub(super) use messages::{Fields, conversation, ends_with_answer, normalized, prompt};
pub(super) use settings::{OneOrMany, check_lengths, check_limit, check_stops, check_tools};

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::app::{App, ServedModel};
use super::error::ApiError;
use crate::runtime::{Completion, FinishReason, StopMatch};

/// Interval of keep-alive comments where a stream has nothing else to send.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Chunks that are computed ahead of a client that reads slowly.
const CHUNKS_AHEAD: usize = 64;

/// `GET /v1/models`
pub(super) async fn models(State(app): State<Arc<App>>) -> Response {
    let data: Vec<Value> = app.models().iter().map(describe).collect();
    Json(json!({ "object": "list", "data": data })).into_response()
}

/// `GET /v1/models/{name}`
pub(super) async fn model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::bad_request(error.body_text()))?;
    let known: Vec<String> = app.models().iter().map(|model| model.name().to_owned()).collect();
    let found = app.models().iter().find(|model| model.answers_to(&name));
    let found = found.ok_or_else(|| ApiError::no_such_model(&name, &known))?;
    Ok(Json(describe(found)).into_response())
}

fn describe(model: &ServedModel) -> Value {
    let mut value = json!({ "id": model.name(), "object": "model", "created": model.created(), "owned_by": "aotron" });
    if let Some(opened) = model.opened() {
        value["max_model_len"] = opened.engine.limits().max_sequence_tokens.into();
    }
    if let Some(reason) = model.failure() {
        value["status"] = json!({ "value": "failed", "reason": reason });
    }
    value
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Tokens of a request: its prompt is counted once, however many answers it has.
#[derive(Debug, Clone, Copy, Default, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Clone, Copy, Default, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct PromptTokensDetails {
    /// Prompt tokens whose keys and values were in the KV cache.
    cached_tokens: usize,
}

impl Usage {
    /// Adds an answer; `is_first` if no other one has the same prompt.
    fn add(&mut self, completion: &Completion, is_first: bool) {
        if is_first {
            self.prompt_tokens += completion.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += completion.reused_tokens;
        }
        self.completion_tokens += completion.completion_tokens;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

fn finish_reason(completion: &Completion) -> &'static str {
    match completion.finish_reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "abort",
    }
}

/// The stop that ended an answer, unless it was one of the format's own.
fn stop_reason(completion: &Completion, own_ids: &[u32], own_strings: &[String]) -> Option<Value> {
    match completion.stop.as_ref()? {
        StopMatch::Id(id) => (!own_ids.contains(id)).then(|| (*id).into()),
        StopMatch::Text(text) => (!own_strings.contains(text)).then(|| text.clone().into()),
    }
}

/// Sends chunks of a stream; a client that has left ends whoever sends.
pub(super) struct Chunks(mpsc::Sender<Result<Event, Infallible>>);

/// The client has left.
pub(super) struct Gone;

impl Chunks {
    pub async fn send(&self, value: &impl Serialize) -> Result<(), Gone> {
        let event = Event::default().json_data(value).map_err(|_| Gone)?;
        self.0.send(Ok(event)).await.map_err(|_| Gone)
    }

    /// Sends an event with a name.
    pub async fn send_named(&self, name: &str, value: &impl Serialize) -> Result<(), Gone> {
        let event = Event::default().event(name).json_data(value).map_err(|_| Gone)?;
        self.0.send(Ok(event)).await.map_err(|_| Gone)
    }

    /// The end of a stream.
    async fn done(&self) -> Result<(), Gone> {
        self.0.send(Ok(Event::default().data("[DONE]"))).await.map_err(|_| Gone)
    }
}

/// A response that streams what `produce` sends. It runs as a task of its own, ahead of the client by a bounded number of
/// chunks, and ends when the client leaves.
pub(super) fn stream<F>(produce: impl FnOnce(Chunks) -> F) -> Response
where
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
    let closed = sender.clone();
    let producing = produce(Chunks(sender));
    tokio::spawn(async move {
        // Even while there is nothing to send, a client that leaves ends the work for it.
        tokio::select! {
            _ = producing => {}
            () = closed.closed() => {}
        }
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
    let mut response = Sse::new(ReceiverStream::new(receiver)).keep_alive(keep_alive).into_response();
    // nginx would hold pieces back.
    response.headers_mut().insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}
