//! Messages as clients send them, and the messages that chat formats take.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::runtime::GenerationRequest;
use crate::serve::app::{App, OpenedModel};
use crate::serve::error::ApiError;
use crate::text::{ChatFormat, ChatTemplate, Tokenizer};

/// Most messages of a conversation: each takes at least a token.
const MAX_MESSAGES: usize = 1 << 16;

/// The fields of a request that hold a conversation.
#[derive(Debug, Clone, Copy)]
pub(in crate::serve) struct Fields {
    /// The messages.
    pub messages: &'static str,
    /// A system message in front of them, where there is one.
    pub system: Option<&'static str>,
}

impl Fields {
    /// `messages` alone.
    pub const MESSAGES: Fields = Fields { messages: "messages", system: None };

    /// The name of a message of the whole conversation.
    fn name(&self, index: usize) -> String {
        match (self.system, index) {
            (Some(system), 0) => system.to_owned(),
            (Some(_), index) => format!("{}[{}]", self.messages, index - 1),
            (None, index) => format!("{}[{index}]", self.messages),
        }
    }
}

/// Brings messages into the form of chat formats: text parts joined, `developer` as `system`, and for built-in formats
/// nothing but role and content.
///
/// # Errors
/// 400 naming the message that cannot be taken, or the total length if it cannot fit.
pub(in crate::serve) fn normalized(
    model: &OpenedModel,
    messages: Vec<Value>,
    fields: Fields,
) -> Result<Vec<Value>, ApiError> {
    let field = fields.messages;
    if messages.len() > MAX_MESSAGES {
        return Err(ApiError::of_field(field, format!("{} messages; expected at most {MAX_MESSAGES}", messages.len())));
    }
    if messages.len() == usize::from(fields.system.is_some()) {
        return Err(ApiError::of_field(field, format!("{field} is empty; a conversation ends with a user message")));
    }
    let is_jinja = matches!(model.format.template, ChatTemplate::Jinja(_));
    let mut bytes = 0;
    let mut normalized = Vec::with_capacity(messages.len());
    for (index, message) in messages.into_iter().enumerate() {
        let message = one(message, is_jinja).map_err(|words| {
            let name = fields.name(index);
            ApiError::of_field(name.clone(), format!("{name}: {words}"))
        })?;
        bytes += message.get("content").and_then(Value::as_str).map_or(0, str::len);
        normalized.push(Value::Object(message));
    }
    model.check_text(bytes)?;
    Ok(normalized)
}

fn one(message: Value, is_jinja: bool) -> Result<Map<String, Value>, String> {
    let Value::Object(mut message) = message else { return Err("a message is an object with role and content".into()) };
    let role = match message.get("role") {
        Some(Value::String(role)) => role.clone(),
        Some(_) => return Err("role is a string".into()),
        None => return Err("it has no role".into()),
    };
    let role = if role == "developer" { "system".to_owned() } else { role };
    let content = match message.remove("content") {
        Some(content) => text_of(content)?,
        None => Value::Null,
    };
    if !is_jinja {
        let calls = message.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty());
        const ROLES: [&str; 3] = ["system", "user", "assistant"];
        if calls || ["tool", "function"].contains(&role.as_str()) {
            return Err("this model's chat format has no tools, so it takes no calls of them and no results".into());
        }
        if !ROLES.contains(&role.as_str()) {
            return Err(format!("its role is {}; expected one of {}", clip(&role), ROLES.join(", ")));
        }
        if content.is_null() {
            return Err("its content is missing".into());
        }
        message.clear();
    }
    message.insert("role".into(), role.into());
    if !content.is_null() {
        message.insert("content".into(), content);
    }
    Ok(message)
}

/// The text of a content: a string, or parts of text joined. Null stays.
fn text_of(content: Value) -> Result<Value, String> {
    let parts = match content {
        Value::String(_) | Value::Null => return Ok(content),
        Value::Array(parts) => parts,
        _ => return Err("content is a string or a list of parts".into()),
    };
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
        let piece = match (part, kind) {
            (Value::String(piece), _) => Some(piece.as_str()),
            (_, "text" | "input_text" | "output_text") => part.get("text").and_then(Value::as_str),
            (_, "refusal") => part.get("refusal").and_then(Value::as_str),
            (_, kind) => return Err(format!("part {index} is of type {}; the model reads text only", clip(kind))),
        };
        text.push_str(piece.ok_or_else(|| format!("part {index} has no text"))?);
    }
    Ok(Value::String(text))
}

fn clip(text: &str) -> String {
    crate::error::clip(text)
}

/// The ids of a conversation, whose last message is the beginning of the answer if it `continues`. Where the format refuses
/// messages of one role in a row, they are joined.
///
/// # Errors
/// As [`ChatFormat::prompt`].
pub(in crate::serve) fn prompt(
    format: &ChatFormat,
    tokenizer: &Tokenizer,
    messages: &[Value],
    continues: bool,
) -> Result<Vec<u32>> {
    let encode = |messages: &[Value]| match continues {
        true => format.prompt_to_continue(tokenizer, messages),
        false => format.prompt_of_json(tokenizer, messages),
    };
    let refused = match encode(messages) {
        Err(Error::Request(words)) => words,
        other => return other,
    };
    let joined = joined(messages);
    match joined.len() == messages.len() {
        true => Err(Error::Request(refused)),
        false => encode(&joined),
    }
}

/// Returns true if the last of some messages is the assistant's.
pub(in crate::serve) fn ends_with_answer(messages: &[Value]) -> bool {
    messages.last().and_then(|message| message.get("role")).is_some_and(|role| role == "assistant")
}

/// Returns true if the last message is to be continued, by vLLM's two fields for it.
///
/// # Errors
/// 400 if the fields or the messages say otherwise.
pub(in crate::serve) fn final_message_continues(
    continue_final_message: Option<bool>,
    add_generation_prompt: Option<bool>,
    messages: &[Value],
) -> Result<bool, ApiError> {
    let continues = continue_final_message.unwrap_or(false);
    let refused = |field: &str, words: &str| Err(ApiError::of_field(field, words));
    match (continues, add_generation_prompt, ends_with_answer(messages)) {
        (true, Some(true), _) => {
            refused("add_generation_prompt", "add_generation_prompt must be false with continue_final_message")
        }
        (false, Some(false), _) => {
            refused("add_generation_prompt", "add_generation_prompt can be false with continue_final_message only")
        }
        (true, _, false) => {
            refused("continue_final_message", "continue_final_message needs a last message of the assistant")
        }
        (false, _, true) => refused(
            "messages",
            "the last message is the assistant's; set continue_final_message to go on with it, or end with the user's",
        ),
        _ => Ok(continues),
    }
}

/// A request for the next answer of a conversation, without settings. If it `continues`, the last message is the beginning
/// of that answer, which is returned without it and not trimmed, since a space may follow.
///
/// # Errors
/// 400 naming the message that cannot be taken.
pub(in crate::serve) async fn conversation(
    app: &App,
    model: &Arc<OpenedModel>,
    messages: Vec<Value>,
    fields: Fields,
    continues: bool,
) -> Result<GenerationRequest, ApiError> {
    let format = &model.format;
    let opened = model.clone();
    let encode = move || {
        let messages = normalized(&opened, messages, fields)?;
        Ok(prompt(&opened.format, opened.tokenizer()?, &messages, continues)?)
    };
    let ids = app.encode(encode).await.map_err(|error| error.or_of_field(fields.messages))?;
    let request = GenerationRequest::new(ids).stop_ids(format.stop_ids());
    Ok(request.stop_strings(format.chat_stop_strings()).trim(format.trims() && !continues))
}

/// Joins messages of the same role that follow each other, with an empty line between them.
fn joined(messages: &[Value]) -> Vec<Value> {
    let mut joined: Vec<Value> = Vec::with_capacity(messages.len());
    for message in messages {
        let content = message.get("content").and_then(Value::as_str);
        let plain = message.as_object().is_some_and(|message| message.len() == 2);
        match (joined.last_mut(), content) {
            (Some(last), Some(content)) if plain && last.get("role") == message.get("role") => {
                if let Some(Value::String(before)) = last.get_mut("content") {
                    before.push_str("\n\n");
                    before.push_str(content);
                    continue;
                }
                joined.push(message.clone());
            }
            _ => joined.push(message.clone()),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn contents_of_all_kinds_become_text_and_the_rest_is_named() {
        let parts = json!([{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]);
        let read = |message: Value| one(message, false);
        let found = read(json!({"role": "developer", "content": parts, "name": "x"})).unwrap();
        assert_eq!(Value::Object(found), json!({"role": "system", "content": "abc"}));
        let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]});
        assert!(read(image).unwrap_err().contains("image_url"));
        for (wrong, words) in [
            (json!("hi"), "an object"),
            (json!({"content": "x"}), "no role"),
            (json!({"role": "user"}), "content is missing"),
            (json!({"role": "user", "content": 123}), "a string or a list"),
            (json!({"role": "tool", "content": "x"}), "no tools"),
            (json!({"role": "narrator", "content": "x"}), "its role is narrator; expected one of system"),
        ] {
            let found = read(wrong).unwrap_err();
            assert!(found.contains(words), "{found}");
        }
        let tool = json!({"role": "tool", "content": "x", "tool_call_id": "1"});
        assert_eq!(Value::Object(one(tool.clone(), true).unwrap()), tool);
    }

    #[test]
    fn messages_of_one_role_in_a_row_are_joined() {
        let user = |text: &str| json!({"role": "user", "content": text});
        let answer = json!({"role": "assistant", "content": "c"});
        assert_eq!(joined(&[user("a"), user("b"), answer.clone()]), [user("a\n\nb"), answer]);
    }
}
