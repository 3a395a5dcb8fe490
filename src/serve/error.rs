//! Errors as clients read them.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{anthropic, kserve};
use crate::error::Error;

/// Beginnings and other parts of the engine's refusals, and OpenAI's names of the fields that they are about.
const FIELDS: [(&str, &str); 13] = [
    ("temperature ", "temperature"),
    ("top_k ", "top_k"),
    ("top_p ", "top_p"),
    ("min_p ", "min_p"),
    ("logit_bias ", "logit_bias"),
    ("repetition_penalty ", "repetition_penalty"),
    ("presence_penalty ", "presence_penalty"),
    ("frequency_penalty ", "frequency_penalty"),
    ("min_tokens ", "min_tokens"),
    ("stop string", "stop"),
    ("stop id", "stop_token_ids"),
    ("the prompt ", "prompt"),
    ("token ", "prompt"),
];

/// An error of a request. As a response it has the nested form of OpenAI's API, which every SDK reads.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    pub message: String,
    /// The field concerned.
    pub param: Option<String>,
    /// OpenAI's `code`.
    pub code: Option<&'static str>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

/// Longest message and name of a field, in characters.
const LONGEST: usize = 1000;

/// A text without its middle if it is too long: errors of JSON quote what the client sent, and end in what was expected.
fn shortened(text: String) -> String {
    let count = text.chars().count();
    if count <= LONGEST {
        return text;
    }
    let half = LONGEST / 2;
    let (head, tail) = (text.chars().take(half), text.chars().skip(count - half));
    head.chain(['…']).chain(tail).collect()
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        let message = shortened(message.into());
        ApiError { status, kind, message, param: None, code: None, retry_after: None }
    }

    /// A request that cannot be served as it is.
    pub fn bad_request(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A field with a wrong value.
    pub fn of_field(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError { param: Some(shortened(param.into())), ..ApiError::bad_request(message) }
    }

    /// A feature that the server or the model lacks.
    pub fn unsupported(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { code: Some("unsupported_parameter"), ..ApiError::of_field(param, message) }
    }

    pub fn no_such_model(name: &str, known: &[String]) -> ApiError {
        let known = known.join(", ");
        let message = format!("the model `{}` does not exist; this server has: {known}", crate::error::clip(name));
        let error = ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        ApiError { param: Some("model".into()), code: Some("model_not_found"), ..error }
    }

    pub fn unauthorized() -> ApiError {
        let message = "a valid API key is needed, as `Authorization: Bearer KEY` or `x-api-key: KEY`";
        let error = ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        ApiError { code: Some("invalid_api_key"), ..error }
    }

    /// A prompt that leaves no room for an answer. Clients look for the first words of this, as OpenAI's server has them.
    pub fn prompt_too_long(max_sequence_tokens: usize, prompt: &str) -> ApiError {
        let message = format!(
            "This model's maximum context length is {max_sequence_tokens} tokens, prompt and answer together, but the \
             prompt has {prompt}; shorten it to at most {} tokens",
            max_sequence_tokens.saturating_sub(1)
        );
        ApiError { code: Some("context_length_exceeded"), ..ApiError::bad_request(message) }
    }

    /// This error, of a field unless it has one.
    pub fn or_of_field(self, param: &str) -> ApiError {
        ApiError { param: self.param.or_else(|| Some(param.to_owned())), ..self }
    }

    /// This error, of the field that holds the prompt if it is about the prompt.
    pub fn naming_prompt(self, param: &str) -> ApiError {
        match self.param.as_deref() {
            None if self.code == Some("context_length_exceeded") => ApiError { param: Some(param.to_owned()), ..self },
            Some("prompt") => ApiError { param: Some(param.to_owned()), ..self },
            _ => self,
        }
    }

    /// A request that may succeed later.
    pub fn unavailable(message: impl Into<String>, retry_after: u64) -> ApiError {
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message);
        ApiError { retry_after: Some(retry_after), ..error }
    }

    /// A model that will not answer until the server is started again.
    pub fn failed_model(name: &str, reason: &str) -> ApiError {
        let message = format!("the model {name} could not be opened: {reason}");
        ApiError {
            code: Some("model_failed"),
            ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
        }
    }

    pub fn not_found() -> ApiError {
        ApiError::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            "there is nothing here; /openapi.json lists the routes",
        )
    }

    pub fn method_not_allowed() -> ApiError {
        let message = "this route does not take that method; /openapi.json lists the routes";
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    pub fn too_large(limit: usize) -> ApiError {
        let message = format!("the body is larger than {limit} bytes, which is this server's limit");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// A compressed body, which could be of any size.
    pub fn encoded_body() -> ApiError {
        let message = "the body is compressed, which this server does not read; send it as it is";
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    pub fn too_slow() -> ApiError {
        let message = "the body did not arrive in time";
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message)
    }

    /// A request that has taken as long as the server allows.
    pub fn timed_out() -> ApiError {
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", Error::DeadlineExceeded.to_string())
    }

    /// A failure of the server. Its details belong into the log, not to the client.
    pub fn internal() -> ApiError {
        let message = "the server failed to answer; its log has the reason under this request id";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The body in OpenAI's form, also for an error in the middle of a stream.
    pub fn body(&self) -> Value {
        let ApiError { kind, message, param, code, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }

    /// A response in the form of the API that a route belongs to.
    pub fn respond_as(&self, route: &str) -> Response {
        match () {
            () if route.starts_with("/v1/messages") => anthropic::respond(self),
            () if route.starts_with("/v2") => kserve::respond(self),
            () => self.respond(self.body()),
        }
    }

    /// A response of this error with another body.
    pub fn respond(&self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(self.body())
    }
}

impl From<&Error> for ApiError {
    fn from(error: &Error) -> ApiError {
        match error.root() {
            Error::Request(words) => {
                // Some begin with how many there are.
                let start = words.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
                let field = FIELDS.iter().find(|(beginning, _)| start.starts_with(beginning));
                ApiError { param: field.map(|(_, field)| (*field).to_owned()), ..ApiError::bad_request(words.clone()) }
            }
            Error::Tokenizer(words) => ApiError::bad_request(format!("the text cannot be encoded: {words}")),
            Error::PromptTooLong { prompt_tokens, max_sequence_tokens } => {
                ApiError::prompt_too_long(*max_sequence_tokens, &format!("{prompt_tokens} tokens"))
            }
            error @ Error::QueueFull { .. } => ApiError {
                code: Some("queue_full"),
                retry_after: Some(1),
                ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", error.to_string())
            },
            Error::EngineStopped { .. } => ApiError::unavailable("the server is stopping", 5),
            Error::DeadlineExceeded => ApiError::timed_out(),
            Error::Numerics(_) => {
                let message = "the model computed numbers that are not finite for this request";
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
            }
            _ => ApiError::internal(),
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        ApiError::from(&error)
    }
}
