//! Log-probabilities in the two shapes of OpenAI's API.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::runtime::TokenReport;
use crate::text::Tokenizer;

/// Log-probability of text that has probability zero: JSON has no infinity.
const LEAST: f64 = -9999.0;

/// A token's text: what it adds to a text, with U+FFFD for bytes that are not whole characters; the spelling of tokens
/// that add nothing, such as end-of-text. Without a tokenizer, the id.
pub(super) fn token_text(tokenizer: Option<&Tokenizer>, id: u32) -> String {
    // As vLLM names tokens where their texts are not wanted.
    let Some(tokenizer) = tokenizer else { return format!("token_id:{id}") };
    match tokenizer.token_bytes(id) {
        Some(bytes) if !bytes.is_empty() => String::from_utf8_lossy(bytes).into_owned(),
        _ => tokenizer.piece(id).unwrap_or_default(),
    }
}

fn token_bytes(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    tokenizer.token_bytes(id).unwrap_or_default().to_vec()
}

fn finite(logprob: f64) -> f64 {
    logprob.max(LEAST)
}

/// A token of `logprobs.content`.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct ChatLogprob {
    token: String,
    logprob: f64,
    /// Of its text in UTF-8.
    #[schema(value_type = Vec<u8>)]
    bytes: Vec<u8>,
    top_logprobs: Vec<TopLogprob>,
}

/// An alternative to a token.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub(in crate::serve) struct TopLogprob {
    token: String,
    logprob: f64,
    /// Of its text in UTF-8.
    #[schema(value_type = Vec<u8>)]
    bytes: Vec<u8>,
}

/// `logprobs.content` of some tokens, as far as they have log-probabilities. One that ends the answer has no text, so it is
/// left out.
pub(super) fn of_chat(tokenizer: &Tokenizer, reports: &[TokenReport], stop_ids: &[u32]) -> Vec<ChatLogprob> {
    let is_shown = |report: &&TokenReport| !stop_ids.contains(&report.id);
    reports.iter().filter(is_shown).filter_map(|report| entry(tokenizer, report)).collect()
}

/// The entry of a token in `logprobs.content`.
fn entry(tokenizer: &Tokenizer, report: &TokenReport) -> Option<ChatLogprob> {
    let logprobs = report.logprobs.as_ref()?;
    let alternative = |(id, logprob): &(u32, f64)| TopLogprob {
        token: token_text(Some(tokenizer), *id),
        logprob: finite(*logprob),
        bytes: token_bytes(tokenizer, *id),
    };
    Some(ChatLogprob {
        token: token_text(Some(tokenizer), report.id),
        logprob: finite(logprobs.logprob),
        bytes: token_bytes(tokenizer, report.id),
        top_logprobs: logprobs.top.iter().map(alternative).collect(),
    })
}

/// The `logprobs` of `/v1/completions`. `offset` is that of the first token in the text, in characters, and is advanced.
pub(super) fn of_completion(tokenizer: Option<&Tokenizer>, reports: &[TokenReport], offset: &mut usize) -> Value {
    let (mut tokens, mut token_logprobs, mut top_logprobs, mut offsets) = (vec![], vec![], vec![], vec![]);
    for report in reports {
        let text = token_text(tokenizer, report.id);
        offsets.push(*offset);
        let bytes = tokenizer.and_then(|tokenizer| tokenizer.token_bytes(report.id));
        *offset += bytes.map_or(0, |bytes| String::from_utf8_lossy(bytes).chars().count());
        match &report.logprobs {
            None => {
                token_logprobs.push(Value::Null);
                top_logprobs.push(Value::Null);
            }
            Some(logprobs) => {
                token_logprobs.push(json!(finite(logprobs.logprob)));
                let mut top = Map::new();
                for (id, logprob) in logprobs.top.iter().chain([&(report.id, logprobs.logprob)]) {
                    // Of several tokens with the same text, the most likely, which comes first.
                    top.entry(token_text(tokenizer, *id)).or_insert_with(|| json!(finite(*logprob)));
                }
                top_logprobs.push(Value::Object(top));
            }
        }
        tokens.push(text);
    }
    json!({
        "tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": top_logprobs, "text_offset": offsets,
    })
}
