//! The OpenAPI document, `GET /openapi.json`: what the page at `/docs` shows, and what clients are generated from.
//!
//! Schemas derive from the types that are read and written. The test below compares the operations with the routes.

mod operation;
pub(super) mod schemas;

use std::sync::{Arc, OnceLock};

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use self::operation::{Api, Operation, Schemas, header_components};
use self::schemas::*;
use super::access;
use super::anthropic::MessagesRequest;
use super::app::App;
use super::kserve::generate::GenerateRequest;
use super::kserve::tensors;
use super::openai::chat::{self, ChatRequest, ChatResponse};
use super::openai::completions::{CompletionRequest, CompletionResponse};
use super::openai::responses::ResponsesRequest;
use super::openai::tokens::{DetokenizeRequest, TokenizeRequest};

/// `GET /openapi.json`
pub(super) async fn document(State(app): State<Arc<App>>) -> Response {
    // With keys, and without.
    static DOCUMENTS: [OnceLock<String>; 2] = [OnceLock::new(), OnceLock::new()];
    let has_keys = !app.options().api_keys.is_empty();
    let text = DOCUMENTS[usize::from(has_keys)].get_or_init(|| build(has_keys).to_string());
    ([(header::CONTENT_TYPE, "application/json")], text.as_str()).into_response()
}

fn operations() -> Vec<Operation> {
    let done = "An event for each piece of text, of one of the answers each, and a last one with `[DONE]`.";
    let question = json!([{ "role": "user", "content": "What is the capital of France?" }]);
    let mut operations = vec![
        Operation::post("/v1/chat/completions", Api::OpenAi, "Answer a conversation")
            .takes::<ChatRequest>(json!({ "messages": question, "max_tokens": 64 }))
            .returns::<ChatResponse>()
            .streams_until_done::<chat::Chunk<'static>>(done)
            .asks_model(),
        Operation::post("/v1/completions", Api::OpenAi, "Continue texts")
            .describe("The text is encoded as it is, without the chat format.")
            .takes::<CompletionRequest>(json!({ "prompt": "Once upon a time", "max_tokens": 16 }))
            .returns::<CompletionResponse<'static>>()
            .streams_until_done::<CompletionResponse<'static>>(done)
            .asks_model(),
        Operation::post("/v1/responses", Api::OpenAi, "Answer a text or a conversation")
            .describe("Text only. Nothing is stored, so a response cannot be continued by its id.")
            .takes::<ResponsesRequest>(json!({ "input": "What is the capital of France?" }))
            .returns::<ResponsesReply>()
            .streams::<ResponsesEvent>("Named events, numbered by `sequence_number`.")
            .asks_model(),
        Operation::get("/v1/models", Api::OpenAi, "The models").returns::<ModelList>(),
        Operation::get("/v1/models/{name}", Api::OpenAi, "A model").returns::<ModelDescription>().fails(&[400, 404]),
        Operation::post("/v1/messages", Api::Anthropic, "Answer a conversation")
            .takes::<MessagesRequest>(json!({ "max_tokens": 64, "messages": question }))
            .returns::<AnthropicMessage>()
            .streams::<AnthropicEvent>("Named events.")
            .asks_model(),
        Operation::post("/v1/messages/count_tokens", Api::Anthropic, "Count the tokens of a conversation")
            .takes::<MessagesRequest>(json!({ "messages": question }))
            .returns::<TokenCount>()
            .fails(&[404, 500, 503]),
        Operation::post("/tokenize", Api::Tokens, "Encode a text or a conversation")
            .takes::<TokenizeRequest>(json!({ "prompt": "Hello!", "return_token_strs": true }))
            .returns::<TokenizeReply>()
            .fails(&[404, 500, 503]),
        Operation::post("/detokenize", Api::Tokens, "Decode token ids")
            .takes::<DetokenizeRequest>(json!({ "tokens": [5, 6, 7] }))
            .returns::<DetokenizeReply>()
            .fails(&[404, 500, 503]),
        Operation::get("/v2", Api::Kserve, "The server").returns::<KserveServer>(),
        Operation::get("/v2/health/live", Api::Kserve, "Does the process run?"),
        Operation::get("/v2/health/ready", Api::Kserve, "Do all models answer?")
            .describe("The reply has no body, with either status: 503 while a model is not open."),
        Operation::post("/v2/repository/index", Api::Kserve, "The models' names").returns_list::<RepositoryEntry>(),
        Operation::get("/health", Api::Server, "Does the process run?"),
        Operation::get("/ping", Api::Server, "Does the process run?"),
        Operation::get("/ready", Api::Server, "Do all models answer?")
            .describe("The body is the same with either status: 503 while a model is not open.")
            .returns::<Readiness>(),
        Operation::get("/version", Api::Server, "The program's version").returns::<Version>(),
        Operation::get("/metrics", Api::Server, "Metrics in Prometheus' text form")
            .returns_as("text/plain", json!({ "type": "string" })),
        Operation::get("/openapi.json", Api::Server, "This document")
            .returns_as("application/json", json!({ "type": "object" })),
    ];
    for model in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        let text = json!({ "text_input": "Once upon a time", "max_tokens": 16 });
        let prompts = json!({ "name": "prompts", "shape": [1, 1], "datatype": "BYTES", "data": ["Once upon a time"] });
        let length = json!({ "name": "max_output_len", "shape": [1, 1], "datatype": "INT64", "data": [16] });
        let named = &[400, 404];
        operations.extend([
            Operation::get(model, Api::Kserve, "The inputs and outputs of a model")
                .returns::<KserveModel>()
                .fails(named),
            Operation::get(format!("{model}/ready"), Api::Kserve, "Does a model answer?").fails(&[400, 404, 503]),
            Operation::get(format!("{model}/config"), Api::Kserve, "The model as Triton's configuration")
                .returns::<KserveConfig>()
                .fails(named),
            Operation::post(format!("{model}/infer"), Api::Kserve, "Continue texts")
                .describe(
                    "The prompts are encoded as they are, unless apply_chat_template says that they are lists of \
                     messages in JSON. An answer that takes longer than some seconds begins with blanks.",
                )
                .takes::<tensors::Header>(json!({ "inputs": [prompts, length] }))
                .returns::<InferReply>()
                .takes_binary()
                .asks_model(),
            Operation::post(format!("{model}/generate"), Api::Kserve, "Continue a text")
                .takes::<GenerateRequest>(text.clone())
                .returns::<GenerateReply>()
                .asks_model(),
            Operation::post(format!("{model}/generate_stream"), Api::Kserve, "Continue a text, as it is computed")
                .takes::<GenerateRequest>(text)
                .streams_or_fails::<GenerateReply>("An event for each piece of text.")
                .asks_model(),
        ]);
    }
    operations
}

/// The document of a server that has API keys or not.
fn build(has_keys: bool) -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for mut operation in operations() {
        schemas.append(&mut operation.schemas);
        let mut security = vec![json!({ "bearer": [] }), json!({ "x-api-key": [] })];
        match (access::is_open(&operation.path), has_keys) {
            (true, _) => security.clear(),
            // No key is needed, and one does no harm.
            (false, false) => security.insert(0, json!({})),
            (false, true) => {}
        }
        let mut described = operation.to_json(security.into(), &mut schemas);
        if operation.path == "/ready" || operation.path == "/v2/health/ready" {
            let mut unready = described["responses"]["200"].clone();
            unready["description"] = "A model is not open, or the server is stopping.".into();
            described["responses"]["503"] = unready;
        }
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = described;
    }
    // Nested types come once for each place that they are in.
    schemas.sort_by(|a, b| a.0.cmp(&b.0));
    schemas.dedup_by(|a, b| a.0 == b.0);
    let schemas: Map<String, Value> =
        schemas.into_iter().map(|(name, schema)| (name, serde_json::to_value(schema).unwrap_or_default())).collect();
    let tags = Api::ALL.map(|api| json!({ "name": api.name(), "description": api.description() }));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "aotron", "version": env!("CARGO_PKG_VERSION"),
            "description": "Bodies are JSON. A reply has its request's id in the header x-request-id. Fields of a request \
                            that are not known are named in the reply's header x-aotron-ignored, or refused with \
                            --unknown-fields reject. A null field is an absent one.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": header_components(),
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer", "description": "An API key of the server." },
                "x-api-key": {
                    "type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same, in Anthropic's form.",
                },
            },
        },
    })
}

#[cfg(test)]
mod tests;
