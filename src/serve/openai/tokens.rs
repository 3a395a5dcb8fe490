//! `POST /tokenize` and `POST /detokenize`, in the forms of vLLM (`prompt`, `messages`) and llama.cpp (`content`).

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::messages::{Fields, final_message_continues, normalized, prompt};
use crate::error::Error;
use crate::serve::app::App;
use crate::serve::body::{ParsedBody, name_ignored, read_json};
use crate::serve::error::ApiError;

/// Most ids to decode at once.
const MAX_IDS: usize = 1 << 20;

/// A text or a conversation to encode.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::serve) struct TokenizeRequest {
    /// Name of the model; the first one without.
    #[serde(default)]
    model: Option<String>,
    /// A text. One of `prompt`, `content` and `messages` is needed.
    #[serde(default)]
    prompt: Option<String>,
    /// llama.cpp's name of the same.
    #[serde(default)]
    content: Option<String>,
    /// A conversation, which is encoded with the model's chat format.
    #[serde(default)]
    #[schema(value_type = Option<Vec<crate::serve::openapi::schemas::InputMessage>>)]
    messages: Option<Vec<Value>>,
    /// Add the tokens that the tokenizer puts in front of a text.
    #[serde(default)]
    #[schema(default = false)]
    add_special_tokens: Option<bool>,
    /// llama.cpp's name of the same.
    #[serde(default)]
    add_special: Option<bool>,
    /// The last message is the beginning of the answer, as in `/v1/chat/completions`.
    #[serde(default)]
    #[schema(default = false)]
    continue_final_message: Option<bool>,
    /// As in `/v1/chat/completions`.
    #[serde(default)]
    add_generation_prompt: Option<bool>,
    /// Return the tokens as objects with `id` and `piece`, as llama.cpp does.
    #[serde(default)]
    #[schema(default = false)]
    with_pieces: Option<bool>,
    /// Return the tokens' texts too.
    #[serde(default)]
    #[schema(default = false)]
    return_token_strs: Option<bool>,
}

/// Ids to decode.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::serve) struct DetokenizeRequest {
    /// Name of the model; the first one without.
    #[serde(default)]
    model: Option<String>,
    /// Token ids.
    #[schema(max_items = 1048576)]
    tokens: Vec<u32>,
}

pub(in crate::serve) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let ParsedBody { value: body, ignored } = read_json::<TokenizeRequest>(&app, request).await?;
    let model = app.model(body.model.as_deref())?;
    let opened = model.clone();
    let adds = body.add_special_tokens.or(body.add_special).unwrap_or(false);
    let strings = body.return_token_strs.unwrap_or(false);
    let pieces = body.with_pieces.unwrap_or(false);
    let encoded = app.encode(move || {
        let tokenizer = opened.tokenizer()?;
        let ids = match (body.prompt.or(body.content), body.messages) {
            (Some(text), None) => {
                opened.check_text(text.len())?;
                let mut ids = if adds { tokenizer.prefix()? } else { Vec::new() };
                ids.extend(tokenizer.encode(&text)?);
                ids
            }
            (None, Some(messages)) => {
                let continues =
                    final_message_continues(body.continue_final_message, body.add_generation_prompt, &messages)?;
                prompt(&opened.format, tokenizer, &normalized(&opened, messages, Fields::MESSAGES)?, continues)?
            }
            _ => return Err(ApiError::bad_request("expected one of prompt, content and messages")),
        };
        let texts: Option<Vec<String>> =
            (strings || pieces).then(|| ids.iter().map(|id| tokenizer.piece(*id).unwrap_or_default()).collect());
        Ok((ids, texts))
    });
    let (ids, texts) = encoded.await?;
    let most = model.engine.limits().max_sequence_tokens;
    let tokens = match texts.as_ref().filter(|_| pieces) {
        Some(texts) => ids.iter().zip(texts).map(|(id, piece)| json!({ "id": id, "piece": piece })).collect(),
        None => json!(ids),
    };
    let texts = texts.filter(|_| strings);
    let body = json!({ "count": ids.len(), "max_model_len": most, "tokens": tokens, "token_strs": texts });
    let mut response = Json(body).into_response();
    name_ignored(&mut response, &ignored);
    Ok(response)
}

pub(in crate::serve) async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let ParsedBody { value: body, ignored } = read_json::<DetokenizeRequest>(&app, request).await?;
    let model = app.model(body.model.as_deref())?;
    if body.tokens.len() > MAX_IDS {
        return Err(ApiError::of_field("tokens", format!("{} tokens; expected at most {MAX_IDS}", body.tokens.len())));
    }
    let decoded = app.encode(move || {
        let decoded = model.tokenizer()?.decode(&body.tokens);
        decoded.map_err(|error| match error.root() {
            Error::Tokenizer(words) => ApiError::of_field("tokens", format!("the ids cannot be decoded: {words}")),
            error => ApiError::from(error),
        })
    });
    let text = decoded.await?;
    // vLLM's name and llama.cpp's.
    let mut response = Json(json!({ "prompt": text, "content": text })).into_response();
    name_ignored(&mut response, &ignored);
    Ok(response)
}
