//! `POST /v1/completions`

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::logprobs::of_completion;
use super::settings::{MAX_CHOICES, check_lengths, check_top_logprobs, for_choice, text_request};
use super::{Chunks, Gone, Usage, finish_reason, now, stop_reason, stream};
use crate::runtime::{Completion, Event, GenerationRequest, TokenReport, TokenReports};
use crate::serve::access::RequestContext;
use crate::serve::answer::{Answer, MergedAnswers, log_failure};
use crate::serve::app::{App, OpenedModel};
use crate::serve::body::{ParsedBody, name_ignored, read_json};
use crate::serve::error::ApiError;

/// OpenAI's default for the length of a completion.
const DEFAULT_MAX_TOKENS: usize = 16;

/// One prompt or several, as text or as token ids.
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
#[serde(untagged, expecting = "expected a string, a list of strings, a list of token ids, or a list of such lists")]
pub(in crate::serve) enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

text_request! {
    /// Texts to continue.
    CompletionRequest {
        /// A text, several, token ids, or several lists of them.
        prompt: Prompts,
        /// Limit on the tokens of each answer. Default: 16. With `echo`, 0 returns the prompt alone.
        #[serde(default)]
        #[schema(default = 16)]
        max_tokens: Option<usize>,
        /// Return the prompt in front of the answer.
        #[serde(default)]
        #[schema(default = false)]
        echo: Option<bool>,
        /// Return log-probabilities, and those of this many alternatives.
        #[serde(default)]
        #[schema(maximum = 20)]
        logprobs: Option<usize>,
        /// Must be 1 or `n`: of several answers, all are returned.
        #[serde(default)]
        best_of: Option<usize>,
        /// Must be empty: the model does not fill in the middle.
        #[serde(default)]
        suffix: Option<String>,
        /// Add the tokens that the tokenizer puts in front of a text.
        #[serde(default)]
        #[schema(default = false)]
        add_special_tokens: Option<bool>,
    }
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct CompletionChoice {
    index: usize,
    text: String,
    #[schema(value_type = Option<crate::serve::openapi::schemas::CompletionLogprobs>)]
    logprobs: Option<Value>,
    /// Null in a chunk that is not the last of its answer.
    #[schema(value_type = Option<crate::serve::openapi::schemas::FinishReason>)]
    finish_reason: Option<&'static str>,
    /// The stop string or id that ended the answer, unless it was the model's own end.
    #[schema(value_type = Option<crate::serve::openapi::schemas::StopReason>)]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// Continuations of texts, or a piece of one of them.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct CompletionResponse<'a> {
    id: &'a str,
    /// `text_completion`
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    usage: Option<Option<Usage>>,
}

/// A request that is ready to be submitted.
struct Prepared {
    model: Arc<OpenedModel>,
    /// One for each prompt.
    requests: Vec<GenerationRequest>,
    /// Answers to each prompt.
    choices: usize,
    echo: bool,
    logprobs: bool,
    token_ids: bool,
    usage: bool,
    continuous_usage: bool,
    context: RequestContext,
    id: String,
    created: u64,
}

pub(in crate::serve) async fn create(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let ParsedBody { value: body, ignored } = read_json::<CompletionRequest>(&app, request).await?;
    let is_stream = body.stream.unwrap_or(false);
    let prepared = prepare(&app, context, body).await?;
    let of_prompt = |request| (0..prepared.choices).map(move |choice| for_choice(request, choice));
    let answers: Vec<Answer> = prepared
        .requests
        .iter()
        .flat_map(of_prompt)
        .map(|request| prepared.model.submit(request))
        .collect::<Result<_, _>>()
        .map_err(|error: ApiError| error.naming_prompt("prompt"))?;
    let mut response = match is_stream {
        true => stream(move |chunks| async move { send(&chunks, &prepared, answers).await }),
        false => whole(&prepared, answers).await?,
    };
    name_ignored(&mut response, &ignored);
    Ok(response)
}

async fn prepare(app: &App, context: RequestContext, mut body: CompletionRequest) -> Result<Prepared, ApiError> {
    let model = app.model(body.model.as_deref())?;
    if body.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix", "suffix is not supported: the model does not fill in the middle"));
    }
    let logprobs = body.logprobs;
    check_top_logprobs("logprobs", logprobs.unwrap_or(0))?;
    let is_stream = body.stream.unwrap_or(false);
    if body.stream_options.is_some() && !is_stream {
        return Err(ApiError::of_field("stream_options", "stream_options needs stream to be true"));
    }
    let options = body.stream_options.take().unwrap_or_default();
    let echo = body.echo.unwrap_or(false);
    let token_ids = body.return_token_ids.unwrap_or(false);
    let settings = body.settings()?;
    let choices = settings.choices;
    if let Some(best_of) = body.best_of.filter(|best_of| *best_of != choices) {
        return Err(ApiError::unsupported("best_of", format!("best_of is {best_of}; expected n, which is {choices}")));
    }
    let max_tokens = body.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    check_lengths(("min_tokens", settings.min_tokens), ("max_tokens", Some(max_tokens)))?;
    let adds = body.add_special_tokens.unwrap_or(false);
    let prompts: Vec<Prompt> = match body.prompt {
        Prompts::Text(text) => vec![Prompt::Text(text)],
        Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
        Prompts::Ids(ids) => vec![Prompt::Ids(ids)],
        Prompts::IdLists(lists) => lists.into_iter().map(Prompt::Ids).collect(),
    };
    if prompts.is_empty() {
        return Err(ApiError::of_field("prompt", "there is no prompt"));
    }
    if choices == 0 || prompts.len().saturating_mul(choices) > MAX_CHOICES {
        let message = format!("{} prompts of {choices} answers; expected 1 to {MAX_CHOICES} in all", prompts.len());
        return Err(ApiError::of_field("n", message));
    }
    let prompts = {
        let model = model.clone();
        app.encode(move || prompts.into_iter().map(|prompt| prompt.encode(&model, adds)).collect::<Result<Vec<_>, _>>())
            .await
            .map_err(|error| error.naming_prompt("prompt"))?
    };
    if let Some(index) = prompts.iter().position(Vec::is_empty) {
        let place = if prompts.len() == 1 { "prompt".to_owned() } else { format!("prompt[{index}]") };
        return Err(ApiError::of_field(place.clone(), format!("{place} is empty; it needs at least one token")));
    }
    let reports = match (logprobs, token_ids || echo || options.wants_continuous_usage()) {
        (Some(top), _) => TokenReports::Logprobs(top),
        (None, true) => TokenReports::Ids,
        (None, false) => TokenReports::None,
    };
    let format = &model.format;
    let request = GenerationRequest::new(Vec::new())
        .stop_ids(format.stop_ids())
        .stop_strings(&format.stop_strings)
        .max_tokens(max_tokens)
        .reports(reports)
        .prompt_reports(if echo { reports } else { TokenReports::None });
    let request = settings.apply(app, &model, &context, request).await?;
    let requests = prompts.into_iter().map(|ids| GenerationRequest { prompt: ids, ..request.clone() }).collect();
    Ok(Prepared {
        requests,
        choices,
        echo,
        logprobs: logprobs.is_some(),
        token_ids,
        usage: options.wants_usage(),
        continuous_usage: options.wants_continuous_usage(),
        context,
        id: format!("cmpl-{}", Uuid::new_v4().simple()),
        created: now(),
        model,
    })
}

enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Prompt {
    fn encode(self, model: &OpenedModel, adds: bool) -> Result<Vec<u32>, ApiError> {
        match self {
            Prompt::Ids(ids) => Ok(ids),
            Prompt::Text(text) => {
                model.check_text(text.len())?;
                let tokenizer = model.tokenizer()?;
                let mut ids = if adds { tokenizer.prefix()? } else { Vec::new() };
                ids.extend(tokenizer.encode(&text)?);
                Ok(ids)
            }
        }
    }
}

impl Prepared {
    /// The prompt's text, where it is returned.
    fn echoed(&self, index: usize) -> String {
        let ids = self.requests.get(index / self.choices).map_or(&[][..], |request| &request.prompt);
        self.model.model.tokenizer().filter(|_| self.echo).and_then(|t| t.decode(ids).ok()).unwrap_or_default()
    }

    fn logprobs(&self, reports: &[TokenReport], offset: &mut usize) -> Option<Value> {
        let tokenizer = self.model.model.tokenizer().map(AsRef::as_ref);
        self.logprobs.then(|| of_completion(tokenizer, reports, offset))
    }

    fn ids(&self, reports: &[TokenReport]) -> Option<Vec<u32>> {
        self.token_ids.then(|| reports.iter().map(|report| report.id).collect())
    }

    fn prompt_ids(&self, index: usize) -> Option<Vec<u32>> {
        self.requests.get(index / self.choices).filter(|_| self.token_ids).map(|request| request.prompt.clone())
    }

    fn stop_reason(&self, completion: &Completion) -> Option<Value> {
        stop_reason(completion, &self.model.format.stop_ids(), &self.model.format.stop_strings)
    }

    fn response(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> CompletionResponse<'_> {
        CompletionResponse {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model.name,
            system_fingerprint: &self.model.fingerprint,
            choices,
            usage,
        }
    }
}

async fn whole(prepared: &Prepared, answers: Vec<Answer>) -> Result<Response, ApiError> {
    let mut usage = Usage::default();
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        let completion = answer.completion().await?;
        prepared.context.used(&completion);
        usage.add(&completion, index % prepared.choices == 0);
        let mut reports = completion.prompt_reports.clone();
        reports.extend_from_slice(&completion.reports);
        choices.push(CompletionChoice {
            index,
            text: prepared.echoed(index) + &completion.text,
            logprobs: prepared.logprobs(&reports, &mut 0),
            finish_reason: Some(finish_reason(&completion)),
            stop_reason: prepared.stop_reason(&completion),
            token_ids: prepared.ids(&completion.reports),
            prompt_token_ids: prepared.prompt_ids(index),
        });
    }
    Ok(Json(prepared.response(choices, Some(Some(usage)))).into_response())
}

/// State of an answer that is streamed.
#[derive(Default, Clone)]
struct Streaming {
    /// Tokens whose text is not certain yet.
    held: Vec<TokenReport>,
    /// Characters sent.
    offset: usize,
}

/// Sends the chunks of a stream. All answers are computed at once, and each chunk is of one of them.
async fn send(chunks: &Chunks, prepared: &Prepared, answers: Vec<Answer>) -> Result<(), Gone> {
    let mut total = Usage::default();
    let mut so_far = Usage { prompt_tokens: prepared.requests.iter().map(|r| r.prompt.len()).sum(), ..total };
    so_far.total_tokens = so_far.prompt_tokens;
    let running = |usage: &Usage| match prepared.continuous_usage {
        true => Some(Some(*usage)),
        false => prepared.usage.then_some(None),
    };
    let mut states = vec![Streaming::default(); answers.len()];
    let mut told_prompt = vec![false; answers.len()];
    let mut events = MergedAnswers::new(answers);
    while let Some((index, event)) = events.next().await {
        let (Some(state), Some(told)) = (states.get_mut(index), told_prompt.get_mut(index)) else { continue };
        let mut piece = |text: String, state: &mut Streaming, finish: Option<&Completion>| {
            let reports = std::mem::take(&mut state.held);
            CompletionChoice {
                index,
                text,
                logprobs: prepared.logprobs(&reports, &mut state.offset).filter(|_| !reports.is_empty()),
                finish_reason: finish.map(finish_reason),
                stop_reason: finish.and_then(|completion| prepared.stop_reason(completion)),
                token_ids: prepared.ids(&reports).filter(|ids| !ids.is_empty()),
                prompt_token_ids: if std::mem::replace(told, true) { None } else { prepared.prompt_ids(index) },
            }
        };
        match event {
            Event::Prompt(reports) => {
                state.held = reports;
                let choice = piece(prepared.echoed(index), state, None);
                chunks.send(&prepared.response(vec![choice], running(&so_far))).await?;
            }
            Event::Token(report) => {
                state.held.push(report);
                so_far.completion_tokens += 1;
                so_far.total_tokens += 1;
            }
            Event::Text(text) => {
                let choice = piece(text, state, None);
                chunks.send(&prepared.response(vec![choice], running(&so_far))).await?;
            }
            Event::Done(completion) => {
                prepared.context.used(&completion);
                total.add(&completion, index % prepared.choices == 0);
                let choice = piece(String::new(), state, Some(&completion));
                chunks.send(&prepared.response(vec![choice], running(&so_far))).await?;
            }
            Event::Failed(error) => {
                log_failure(&error);
                chunks.send(&ApiError::from(&*error).body()).await?;
                return chunks.done().await;
            }
        }
    }
    if prepared.usage {
        chunks.send(&prepared.response(Vec::new(), Some(Some(total)))).await?;
    }
    chunks.done().await
}
