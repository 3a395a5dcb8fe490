//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::logprobs::{ChatLogprob, of_chat};
use super::messages::{Fields, conversation, final_message_continues};
use super::settings::{
    MAX_CHOICES, check_lengths, check_limit, check_tools, check_top_logprobs, for_choice, text_request,
};
use super::{Chunks, Gone, Usage, finish_reason, now, stop_reason, stream};
use crate::runtime::{Completion, Event, GenerationRequest, TokenReport, TokenReports};
use crate::serve::access::RequestContext;
use crate::serve::answer::{Answer, MergedAnswers, log_failure};
use crate::serve::app::{App, OpenedModel};
use crate::serve::body::{Accepted, ParsedBody, name_ignored, read_json};
use crate::serve::error::ApiError;

text_request! {
    /// A conversation to answer.
    ChatRequest {
        /// The conversation so far: objects with `role` and `content`, a string or parts of text.
        #[schema(value_type = Vec<crate::serve::openapi::schemas::InputMessage>, min_items = 1)]
        messages: Vec<Value>,
        /// Limit on the answer's tokens. Default and bound: the room that the prompt leaves.
        #[serde(default)]
        max_completion_tokens: Option<usize>,
        /// The older name of the same.
        #[serde(default)]
        max_tokens: Option<usize>,
        /// Return log-probabilities.
        #[serde(default)]
        #[schema(default = false)]
        logprobs: Option<bool>,
        /// Number of alternatives to each token. Needs `logprobs`.
        #[serde(default)]
        #[schema(default = 0, maximum = 20)]
        top_logprobs: Option<usize>,
        /// Must be empty, or `tool_choice` `none`: the model's chat format has no tools.
        #[serde(default)]
        #[schema(value_type = Option<Vec<Object>>)]
        tools: Option<Vec<Value>>,
        /// `none`, or anything where there are no tools.
        #[serde(default)]
        #[schema(value_type = Value)]
        tool_choice: Option<Value>,
        /// The last message is the beginning of the answer, which goes on from there. It must be the assistant's.
        #[serde(default)]
        #[schema(default = false)]
        continue_final_message: Option<bool>,
        /// Must be false with `continue_final_message`, and true without.
        #[serde(default)]
        #[schema(value_type = Option<bool>)]
        add_generation_prompt: Option<bool>,
        /// Accepted; it has no effect.
        #[allow(dead_code, reason = "accepted and ignored")]
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        metadata: Option<Accepted>,
        /// Accepted; nothing is stored.
        #[allow(dead_code, reason = "accepted and ignored")]
        #[serde(default)]
        #[schema(value_type = Option<bool>)]
        store: Option<Accepted>,
        /// Accepted; it has no effect.
        #[allow(dead_code, reason = "accepted and ignored")]
        #[serde(default)]
        #[schema(value_type = Option<String>)]
        service_tier: Option<Accepted>,
        /// Accepted; there are no tools.
        #[allow(dead_code, reason = "accepted and ignored")]
        #[serde(default)]
        #[schema(value_type = Option<bool>)]
        parallel_tool_calls: Option<Accepted>,
        /// Accepted; it has no effect.
        #[allow(dead_code, reason = "accepted and ignored")]
        #[serde(default)]
        #[schema(value_type = Option<String>)]
        safety_identifier: Option<Accepted>,
        /// Accepted; prefixes are found without it.
        #[allow(dead_code, reason = "accepted and ignored")]
        #[serde(default)]
        #[schema(value_type = Option<String>)]
        prompt_cache_key: Option<Accepted>,
    }
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct ChatLogprobs {
    content: Vec<ChatLogprob>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct ChatMessage {
    /// `assistant`
    role: &'static str,
    content: String,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct ChatChoice {
    index: usize,
    message: ChatMessage,
    logprobs: Option<ChatLogprobs>,
    #[schema(value_type = crate::serve::openapi::schemas::FinishReason)]
    finish_reason: &'static str,
    /// The stop string or id that ended the answer, unless it was the model's own end.
    #[schema(value_type = Option<crate::serve::openapi::schemas::StopReason>)]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// Answers to a conversation.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct ChatResponse {
    id: String,
    /// `chat.completion`
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: Usage,
    /// Identifies the weights and the plan.
    system_fingerprint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = ChatChunkChoice)]
pub(in crate::serve) struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    /// In the last chunk of an answer.
    #[schema(value_type = Option<crate::serve::openapi::schemas::FinishReason>)]
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::serve::openapi::schemas::StopReason>)]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Default, Serialize, utoipa::ToSchema)]
#[schema(as = ChatDelta)]
pub(in crate::serve) struct Delta {
    /// In the first chunk of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// A piece of one of the answers to a conversation.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = ChatChunk)]
pub(in crate::serve) struct Chunk<'a> {
    id: &'a str,
    /// `chat.completion.chunk`
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    /// Of one answer; empty in the last chunk, which tells the usage.
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<u32>>)]
    prompt_token_ids: Option<&'a [u32]>,
}

/// What a request wants beside the text.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    logprobs: bool,
    token_ids: bool,
    usage: bool,
    continuous_usage: bool,
}

/// A request that is ready to be submitted.
struct Prepared {
    model: Arc<OpenedModel>,
    request: GenerationRequest,
    choices: usize,
    wanted: Wanted,
    context: RequestContext,
    id: String,
    created: u64,
}

pub(in crate::serve) async fn create(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let ParsedBody { value: body, ignored } = read_json::<ChatRequest>(&app, request).await?;
    let is_stream = body.stream.unwrap_or(false);
    let asked = body.max_completion_tokens.or(body.max_tokens);
    let prepared = prepare(&app, context, body).await?;
    let room = prepared.model.engine.limits().max_sequence_tokens.saturating_sub(prepared.request.prompt.len());
    let answers = submit(&prepared)?;
    let mut response = match is_stream {
        true => stream(move |chunks| async move { send(&chunks, &prepared, answers).await }),
        false => whole(prepared, answers).await?,
    };
    if let Some(asked) = asked.filter(|asked| *asked > room) {
        // The answer cannot be as long as was asked for; the reply says how long it can be.
        tracing::debug!(target: "aotron::serve", "max_tokens {asked} is more than the {room} that fit");
        response.headers_mut().insert("x-aotron-max-tokens", HeaderValue::from(room));
    }
    name_ignored(&mut response, &ignored);
    Ok(response)
}

async fn prepare(app: &App, context: RequestContext, mut body: ChatRequest) -> Result<Prepared, ApiError> {
    let model = app.model(body.model.as_deref())?;
    let has_none = body.tool_choice.as_ref().is_some_and(|choice| choice == "none");
    check_tools(body.tools.as_deref(), has_none)?;
    let logprobs = body.logprobs.unwrap_or(false);
    let top = body.top_logprobs.unwrap_or(0);
    check_top_logprobs("top_logprobs", top)?;
    if top > 0 && !logprobs {
        return Err(ApiError::of_field("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    let is_stream = body.stream.unwrap_or(false);
    if body.stream_options.is_some() && !is_stream {
        return Err(ApiError::of_field("stream_options", "stream_options needs stream to be true"));
    }
    let options = body.stream_options.take().unwrap_or_default();
    let wanted = Wanted {
        logprobs,
        token_ids: body.return_token_ids.unwrap_or(false),
        usage: options.wants_usage(),
        continuous_usage: options.wants_continuous_usage(),
    };
    let settings = body.settings()?;
    let choices = settings.choices;
    if !(1..=MAX_CHOICES).contains(&choices) {
        return Err(ApiError::of_field("n", format!("n is {choices}; expected 1 to {MAX_CHOICES}")));
    }
    let max_tokens = body.max_completion_tokens.or(body.max_tokens);
    let limit = if body.max_completion_tokens.is_some() { "max_completion_tokens" } else { "max_tokens" };
    check_limit(limit, max_tokens)?;
    check_lengths(("min_tokens", settings.min_tokens), (limit, max_tokens))?;
    let continues = final_message_continues(body.continue_final_message, body.add_generation_prompt, &body.messages)?;
    let request = conversation(app, &model, body.messages, Fields::MESSAGES, continues)
        .await?
        .max_tokens(max_tokens.unwrap_or(usize::MAX))
        .reports(match (wanted.logprobs, wanted.token_ids || wanted.continuous_usage) {
            (true, _) => TokenReports::Logprobs(top),
            (false, true) => TokenReports::Ids,
            (false, false) => TokenReports::None,
        });
    let request = settings.apply(app, &model, &context, request).await?;
    let id = format!("chatcmpl-{}", Uuid::new_v4().simple());
    Ok(Prepared { model, request, choices, wanted, context, id, created: now() })
}

fn submit(prepared: &Prepared) -> Result<Vec<Answer>, ApiError> {
    let submit = |index| prepared.model.submit(for_choice(&prepared.request, index));
    (0..prepared.choices)
        .map(submit)
        .collect::<Result<_, _>>()
        .map_err(|error: ApiError| error.naming_prompt("messages"))
}

impl Prepared {
    fn stop_reason(&self, completion: &Completion) -> Option<Value> {
        stop_reason(completion, &self.model.format.stop_ids(), &self.model.format.chat_stop_strings())
    }

    /// Log-probabilities of tokens, if they are wanted.
    fn logprobs(&self, reports: &[TokenReport]) -> Option<ChatLogprobs> {
        let tokenizer = self.model.model.tokenizer().filter(|_| self.wanted.logprobs)?;
        Some(ChatLogprobs { content: of_chat(tokenizer, reports, &self.request.stop_ids) })
    }

    fn token_ids(&self, reports: &[TokenReport]) -> Option<Vec<u32>> {
        self.wanted.token_ids.then(|| reports.iter().map(|report| report.id).collect())
    }
}

async fn whole(prepared: Prepared, answers: Vec<Answer>) -> Result<Response, ApiError> {
    let mut usage = Usage::default();
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        let completion = answer.completion().await?;
        prepared.context.used(&completion);
        usage.add(&completion, index == 0);
        choices.push(ChatChoice {
            index,
            logprobs: prepared.logprobs(&completion.reports),
            finish_reason: finish_reason(&completion),
            stop_reason: prepared.stop_reason(&completion),
            token_ids: prepared.token_ids(&completion.reports),
            message: ChatMessage { role: "assistant", content: completion.text },
        });
    }
    let Prepared { model, request, wanted, id, created, .. } = prepared;
    let response = ChatResponse {
        id,
        object: "chat.completion",
        created,
        model: model.name.clone(),
        choices,
        usage,
        system_fingerprint: model.fingerprint.clone(),
        prompt_token_ids: wanted.token_ids.then_some(request.prompt),
    };
    Ok(Json(response).into_response())
}

/// Sends the chunks of a stream. All choices are computed at once, and each chunk is of one of them.
async fn send(chunks: &Chunks, prepared: &Prepared, answers: Vec<Answer>) -> Result<(), Gone> {
    let chunk = |choices: Vec<ChunkChoice>, usage: Option<Option<Usage>>| Chunk {
        id: &prepared.id,
        object: "chat.completion.chunk",
        created: prepared.created,
        model: &prepared.model.name,
        system_fingerprint: &prepared.model.fingerprint,
        choices,
        usage,
        prompt_token_ids: None,
    };
    let wants_usage = prepared.wanted.usage;
    let running = |usage: &Usage| match prepared.wanted.continuous_usage {
        true => Some(Some(*usage)),
        false => wants_usage.then_some(None),
    };
    let mut usage = Usage { prompt_tokens: prepared.request.prompt.len(), ..Usage::default() };
    usage.total_tokens = usage.prompt_tokens;
    let choice = |index, delta| ChunkChoice {
        index,
        delta,
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
    };
    for index in 0..answers.len() {
        let delta = Delta { role: Some("assistant"), content: Some(String::new()) };
        let mut first = chunk(vec![choice(index, delta)], running(&usage));
        first.prompt_token_ids = prepared.wanted.token_ids.then_some(&prepared.request.prompt[..]);
        chunks.send(&first).await?;
    }
    let mut total = Usage::default();
    let mut events = MergedAnswers::new(answers);
    // Tokens whose text is not certain yet.
    let mut held: Vec<Vec<TokenReport>> = vec![Vec::new(); prepared.choices];
    while let Some((index, event)) = events.next().await {
        let held = &mut held[index];
        match event {
            Event::Token(report) => {
                held.push(report);
                usage.completion_tokens += 1;
                usage.total_tokens += 1;
            }
            Event::Text(text) => {
                let reports = std::mem::take(held);
                let mut choice = choice(index, Delta { role: None, content: Some(text) });
                choice.logprobs = prepared.logprobs(&reports);
                choice.token_ids = prepared.token_ids(&reports);
                chunks.send(&chunk(vec![choice], running(&usage))).await?;
            }
            Event::Done(completion) => {
                prepared.context.used(&completion);
                total.add(&completion, index == 0);
                let reports = std::mem::take(held);
                let mut choice = choice(index, Delta::default());
                choice.logprobs = prepared.logprobs(&reports).filter(|logprobs| !logprobs.content.is_empty());
                choice.token_ids = prepared.token_ids(&reports).filter(|ids| !ids.is_empty());
                choice.finish_reason = Some(finish_reason(&completion));
                choice.stop_reason = prepared.stop_reason(&completion);
                chunks.send(&chunk(vec![choice], running(&usage))).await?;
            }
            Event::Failed(error) => {
                log_failure(&error);
                chunks.send(&ApiError::from(&*error).body()).await?;
                return chunks.done().await;
            }
            Event::Prompt(_) => {}
        }
    }
    if wants_usage {
        chunks.send(&chunk(Vec::new(), Some(Some(total)))).await?;
    }
    chunks.done().await
}
