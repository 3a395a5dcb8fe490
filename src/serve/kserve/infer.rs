//! `POST /v2/models/{model}/infer`: the tensors of every `NemoQuery` class, from the model card's on.
//!
//! Classes differ in the names of their inputs, not in what they mean. Inputs that are false, empty or zero ask for
//! nothing, so they are accepted whatever they are.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio_stream::wrappers::ReceiverStream;

use super::tensors::{Elements, InferRequest, OutputTensor, reply};
use super::{KserveError, MAX_BATCH, Named, OUTPUTS};
use crate::runtime::{GenerationRequest, SamplingParams};
use crate::serve::access::RequestContext;
use crate::serve::answer::Answer;
use crate::serve::app::{App, OpenedModel};
use crate::serve::body::read_bytes;
use crate::serve::error::ApiError;
use crate::serve::openai::{Fields, normalized, prompt};

/// Header with the length of a message's JSON.
const JSON_LENGTH: &str = "inference-header-content-length";
/// An answer that takes longer is announced first: its head is sent, and then blanks until it is there. A client that
/// gives up when nothing comes for a minute then waits.
const PLAIN_WITHIN: Duration = Duration::from_secs(8);
/// Time between blanks.
const BLANK_EVERY: Duration = Duration::from_secs(5);
/// Length that is announced for the JSON of such a reply; blanks fill it.
const ANNOUNCED: usize = 8192;
/// Length of an answer where none is given, as in the client's own defaults.
const DEFAULT_MAX_TOKENS: usize = 512;

/// The settings of one prompt.
#[derive(Debug, Clone, Default)]
struct Settings {
    max_tokens: Option<i64>,
    min_tokens: Option<i64>,
    sampling: SamplingParams,
    is_greedy: bool,
    adds_bos: bool,
    is_chat: bool,
    stops: Vec<String>,
}

pub(super) async fn infer(
    State(app): State<Arc<App>>,
    Extension(context): Extension<RequestContext>,
    named: Named,
    request: Request,
) -> Result<Response, KserveError> {
    let model = named.opened(&app)?;
    let header_bytes = header_length(request.headers())?;
    let body = read_bytes(&app, request).await?;
    let request = InferRequest::parse(&body, header_bytes)?;
    if let Some((unknown, _)) = request.outputs.iter().find(|(name, _)| !OUTPUTS.contains(&name.as_str())) {
        let unknown = crate::error::clip(unknown);
        let message = format!("output {unknown} is not one of this model's: {}", OUTPUTS.join(", "));
        return Err(ApiError::bad_request(message).into());
    }
    let prompts = prompts(&request)?;
    let settings: Vec<Settings> =
        (0..prompts.len()).map(|row| settings_of_row(&request, row, prompts.len())).collect::<Result<_, _>>()?;
    let requests = {
        let (model, own, context) = (model.clone(), app.clone(), context.clone());
        let encode = move || {
            let rows = prompts.into_iter().zip(settings);
            rows.map(|(prompt, settings)| settings.request(&own, &model, &context, &prompt))
                .collect::<Result<Vec<_>, _>>()
        };
        app.encode(encode).await?
    };
    let answers: Vec<Answer> =
        requests.into_iter().map(|request| model.submit(request)).collect::<Result<_, ApiError>>()?;
    // Dropped with this handler if the client leaves, which cancels the requests.
    let mut computing: Computing = Box::pin(collect(answers, context));
    tokio::select! {
        texts = &mut computing => Ok(plain(&request, &named.0, &texts?)),
        () = tokio::time::sleep(PLAIN_WITHIN) => Ok(announced(request, named.0, computing)),
    }
}

/// The texts of all rows, as they are computed.
type Computing = Pin<Box<dyn Future<Output = Result<Vec<String>, ApiError>> + Send>>;

async fn collect(answers: Vec<Answer>, context: RequestContext) -> Result<Vec<String>, ApiError> {
    let mut texts = Vec::with_capacity(answers.len());
    for answer in answers {
        let completion = answer.completion().await?;
        context.used(&completion);
        texts.push(completion.text);
    }
    Ok(texts)
}

fn header_length(headers: &HeaderMap) -> Result<Option<usize>, ApiError> {
    let Some(value) = headers.get(JSON_LENGTH) else { return Ok(None) };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    length.map(Some).ok_or_else(|| ApiError::bad_request(format!("{JSON_LENGTH} is not a number of bytes")))
}

fn json_and_bytes(request: &InferRequest, model: &str, texts: &[String]) -> (String, Vec<u8>) {
    let outputs = OUTPUTS.map(|name| OutputTensor { name, rows: texts });
    let (json, bytes) = reply(request, model, &outputs);
    (json.to_string(), bytes)
}

fn plain(request: &InferRequest, model: &str, texts: &[String]) -> Response {
    let (json, bytes) = json_and_bytes(request, model, texts);
    if bytes.is_empty() {
        return ([(header::CONTENT_TYPE, "application/json")], json).into_response();
    }
    let length = json.len().to_string();
    let body = [json.as_bytes(), &bytes].concat();
    ([(header::CONTENT_TYPE.as_str(), "application/octet-stream"), (JSON_LENGTH, &length)], body).into_response()
}

/// A reply whose head is sent before the answer is known. An error is told as NeMo's own server tells it: as the answer.
fn announced(request: InferRequest, model: String, mut computing: Computing) -> Response {
    let is_binary = request.is_binary || request.outputs.iter().any(|(_, is_binary)| *is_binary);
    let rows = request.inputs.iter().find(|input| input.name == "prompts").map_or(1, |input| match &input.elements {
        Elements::Bytes(rows) => rows.len(),
        _ => 1,
    });
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::convert::Infallible>>(4);
    tokio::spawn(async move {
        let mut blanks = 0;
        let texts = loop {
            let found = tokio::select! {
                found = &mut computing => found,
                // The client has left: the requests end with this task.
                () = sender.closed() => return,
                () = tokio::time::sleep(BLANK_EVERY) => {
                    // A blank is a part of the JSON, whose length was announced.
                    if blanks < ANNOUNCED / 2 {
                        blanks += 1;
                        let _ = sender.send(Ok(Bytes::from_static(b" "))).await;
                    }
                    continue;
                }
            };
            break match found {
                Ok(texts) => texts,
                Err(error) => vec![format!("An error occurred: {}", error.message); rows],
            };
        };
        let (json, bytes) = json_and_bytes(&request, &model, &texts);
        let padding = if is_binary { ANNOUNCED.saturating_sub(blanks + json.len()) } else { 0 };
        let rest = [" ".repeat(padding).as_bytes(), json.as_bytes(), &bytes].concat();
        let _ = sender.send(Ok(rest.into())).await;
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    let length = ANNOUNCED.to_string();
    match is_binary {
        true => ([(header::CONTENT_TYPE.as_str(), "application/octet-stream"), (JSON_LENGTH, &length)], body)
            .into_response(),
        false => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
    }
}

/// The prompts, one for each row.
fn prompts(request: &InferRequest) -> Result<Vec<String>, ApiError> {
    let found = request.inputs.iter().find(|input| input.name == "prompts");
    let found = found.ok_or_else(|| ApiError::bad_request("there is no input prompts"))?;
    let Elements::Bytes(rows) = &found.elements else {
        return Err(ApiError::bad_request("input prompts: its datatype is not BYTES"));
    };
    if !(1..=MAX_BATCH).contains(&rows.len()) {
        return Err(ApiError::bad_request(format!("{} prompts; expected 1 to {MAX_BATCH}", rows.len())));
    }
    rows.iter().map(|row| text("prompts", row)).collect()
}

fn text(name: &str, bytes: &[u8]) -> Result<String, ApiError> {
    let text = std::str::from_utf8(bytes);
    text.map(str::to_owned).map_err(|error| {
        ApiError::bad_request(format!("input {name}: not UTF-8 text: byte {} is wrong", error.valid_up_to()))
    })
}

/// The settings of a row: its own where there is one for each, otherwise the first.
fn settings_of_row(request: &InferRequest, row: usize, rows: usize) -> Result<Settings, ApiError> {
    let mut settings = Settings::default();
    let mut copied_minimum = None;
    for input in &request.inputs {
        let name = input.name.as_str();
        let wrong = |wanted: &str| ApiError::bad_request(format!("input {name}: expected {wanted}"));
        fn at<T: Copy>(all: &[T], row: usize, rows: usize) -> Option<T> {
            all.get(if all.len() == rows { row } else { 0 }).copied()
        }
        let integer = || match &input.elements {
            Elements::Integers(all) => at(all, row, rows).ok_or_else(|| wrong("an integer")),
            _ => Err(wrong("an integer")),
        };
        let float = || match &input.elements {
            Elements::Floats(all) => at(all, row, rows).map(|x| x as f32).ok_or_else(|| wrong("a number")),
            _ => Err(wrong("a number")),
        };
        let flag = || match &input.elements {
            Elements::Bools(all) => at(all, row, rows).ok_or_else(|| wrong("a truth value")),
            _ => Err(wrong("a truth value")),
        };
        let strings = || match &input.elements {
            // They are for all prompts, however many there are.
            Elements::Bytes(all) => all.iter().map(|bytes| text(name, bytes)).collect::<Result<Vec<_>, _>>(),
            _ => Err(wrong("strings")),
        };
        match name {
            "prompts" => {}
            "max_output_token" | "max_output_len" | "max_length" | "max_tokens" => {
                settings.max_tokens = Some(integer()?)
            }
            "min_output_len" => copied_minimum = Some(integer()?),
            "min_length" | "min_tokens" => settings.min_tokens = Some(integer()?),
            "top_k" => {
                let k = integer()?.max(0);
                settings.sampling.top_k = Some(u32::try_from(k).map_err(|_| wrong("a smaller integer"))?);
            }
            "top_p" => settings.sampling.top_p = Some(float()?),
            "temperature" => settings.sampling.temperature = Some(float()?),
            "repetition_penalty" => settings.sampling.repetition_penalty = Some(float()?).filter(|x| *x != 0.0),
            "random_seed" | "seed" => settings.sampling.seed = Some(integer()? as u64),
            "use_greedy" => settings.is_greedy = flag()?,
            "add_BOS" => settings.adds_bos = flag()?,
            "apply_chat_template" => settings.is_chat = flag()?,
            "stop_words_list" | "end_strings" => {
                settings.stops.extend(strings()?.into_iter().filter(|stop| !stop.is_empty()));
            }
            other => match asks_for_nothing(&input.elements) {
                true => {}
                false => {
                    let other = crate::error::clip(other);
                    return Err(ApiError::bad_request(format!("input {other} is not supported by this server")));
                }
            },
        }
    }
    // A known fault of the clients with this input: they send the longest length in it.
    let minimum = settings.min_tokens.or(copied_minimum.filter(|least| settings.max_tokens != Some(*least)));
    settings.min_tokens = minimum.map(|least| settings.max_tokens.map_or(least, |most| least.min(most)));
    Ok(settings)
}

/// Returns true for values that switch nothing on.
fn asks_for_nothing(elements: &Elements) -> bool {
    match elements {
        Elements::Bytes(all) => all.iter().all(Vec::is_empty),
        Elements::Integers(all) => all.iter().all(|n| *n == 0),
        Elements::Floats(all) => all.iter().all(|x| *x == 0.0),
        Elements::Bools(all) => all.iter().all(|flag| !flag),
    }
}

impl Settings {
    fn request(
        self,
        app: &App,
        model: &OpenedModel,
        context: &RequestContext,
        text: &str,
    ) -> Result<GenerationRequest, ApiError> {
        let tokenizer = model.tokenizer()?;
        model.check_text(text.len())?;
        let mut ids = match self.is_chat {
            true => {
                let messages: Vec<Value> = serde_json::from_str(text)
                    .map_err(|error| ApiError::bad_request(format!("the prompt is not a list of messages: {error}")))?;
                prompt(&model.format, tokenizer, &normalized(model, messages, Fields::MESSAGES)?, false)?
            }
            // The card's client writes the template itself, special tokens included.
            false => tokenizer.encode(text)?,
        };
        if self.adds_bos
            && let Some(bos) = model.model.package().manifest().model.bos_token_id
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        let tokens = |name: &str, n: i64| {
            let words = || ApiError::bad_request(format!("{name} is {n}; expected a number of tokens"));
            usize::try_from(n).map_err(|_| words())
        };
        let max_tokens = self.max_tokens.map(|n| tokens("the longest length", n)).transpose()?;
        let mut sampling = self.sampling;
        sampling.min_tokens = self.min_tokens.map(|n| tokens("the shortest length", n)).transpose()?;
        if self.is_greedy {
            sampling.top_k = Some(1);
        }
        let mut request = GenerationRequest::new(ids)
            .max_tokens(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS))
            .sampling(sampling.effective())
            .stop_ids(model.format.stop_ids())
            .stop_strings(model.format.chat_stop_strings())
            .stop_strings(self.stops)
            .trim(model.format.trims());
        request.client = context.client;
        request.deadline = app.deadline();
        Ok(request)
    }
}
