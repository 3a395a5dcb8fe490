//! An operation of the document, and what operations have in common.

use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;

use super::schemas::{AnthropicErrorReply, KserveErrorReply, OpenAiError};

/// Schemas by name.
pub(super) type Schemas = Vec<(String, RefOr<Schema>)>;

/// A group of operations, and the form of its errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    OpenAi,
    Anthropic,
    Tokens,
    Kserve,
    Server,
}

impl Api {
    /// In the order in which they are shown.
    pub const ALL: [Api; 5] = [Api::OpenAi, Api::Anthropic, Api::Tokens, Api::Kserve, Api::Server];

    pub fn name(self) -> &'static str {
        match self {
            Api::OpenAi => "OpenAI",
            Api::Anthropic => "Anthropic",
            Api::Tokens => "Tokens",
            Api::Kserve => "KServe",
            Api::Server => "Server",
        }
    }

    pub fn description(self) -> &'static str {
        match self {
            Api::OpenAi => "OpenAI's API, with the sampling settings of vLLM. The base URL of its clients ends in /v1.",
            Api::Anthropic => "Anthropic's API, text only.",
            Api::Tokens => "The model's tokenizer, in the forms of vLLM and llama.cpp.",
            Api::Kserve => {
                "KServe's inference protocol v2 with Triton's binary tensors, which NeMo's clients speak, and Triton's \
                 generate. Where one model is served, it answers to any name."
            }
            Api::Server => "The state of the server.",
        }
    }

    fn error(self, schemas: &mut Schemas) -> Value {
        match self {
            Api::Anthropic => reference::<AnthropicErrorReply>(schemas),
            Api::Kserve => reference::<KserveErrorReply>(schemas),
            Api::OpenAi | Api::Tokens | Api::Server => reference::<OpenAiError>(schemas),
        }
    }
}

/// A reference to the schema of `T`, which is added with those that it refers to.
fn reference<T: ToSchema>(schemas: &mut Schemas) -> Value {
    schemas.push((T::name().into(), T::schema()));
    T::schemas(schemas);
    json!({ "$ref": format!("#/components/schemas/{}", T::name()) })
}

/// An operation: a method of a path.
pub(super) struct Operation {
    pub method: &'static str,
    /// As OpenAPI writes it.
    pub path: String,
    api: Api,
    summary: &'static str,
    description: &'static str,
    body: Option<Value>,
    /// Contents of a success, by type; none for an empty body.
    contents: Map<String, Value>,
    errors: Vec<u16>,
    pub schemas: Schemas,
}

/// Errors of a request with a body.
const BODY_ERRORS: [u16; 3] = [400, 408, 413];
/// Errors of a request to a model.
const MODEL_ERRORS: [u16; 5] = [404, 429, 500, 503, 504];

impl Operation {
    fn new(method: &'static str, path: impl Into<String>, api: Api, summary: &'static str) -> Operation {
        let (body, contents, schemas) = (None, Map::new(), Vec::new());
        let (path, description, errors) = (path.into(), "", Vec::new());
        Operation { method, path, api, summary, description, body, contents, errors, schemas }
    }

    pub fn get(path: impl Into<String>, api: Api, summary: &'static str) -> Operation {
        Operation::new("get", path, api, summary)
    }

    pub fn post(path: impl Into<String>, api: Api, summary: &'static str) -> Operation {
        Operation::new("post", path, api, summary)
    }

    pub fn describe(self, description: &'static str) -> Operation {
        Operation { description, ..self }
    }

    /// A JSON body, with an example.
    pub fn takes<T: ToSchema>(mut self, example: Value) -> Operation {
        let schema = reference::<T>(&mut self.schemas);
        let content = json!({ "application/json": { "schema": schema, "example": example } });
        self.body = Some(json!({ "required": true, "content": content }));
        self.fails(&BODY_ERRORS)
    }

    /// A body of JSON with bytes after it, too.
    pub fn takes_binary(mut self) -> Operation {
        if let Some(body) = &mut self.body {
            body["content"]["application/octet-stream"] = binary();
        }
        self.returns_binary()
    }

    fn returns_binary(mut self) -> Operation {
        self.contents.insert("application/octet-stream".into(), binary());
        self
    }

    pub fn returns<T: ToSchema>(mut self) -> Operation {
        let schema = reference::<T>(&mut self.schemas);
        self.contents.insert("application/json".into(), json!({ "schema": schema }));
        self
    }

    pub fn returns_list<T: ToSchema>(mut self) -> Operation {
        let schema = json!({ "type": "array", "items": reference::<T>(&mut self.schemas) });
        self.contents.insert("application/json".into(), json!({ "schema": schema }));
        self
    }

    pub fn returns_as(mut self, content_type: &str, schema: Value) -> Operation {
        self.contents.insert(content_type.into(), json!({ "schema": schema }));
        self
    }

    /// Server-sent events whose data are JSON of `T`.
    pub fn streams<T: ToSchema>(mut self, description: &'static str) -> Operation {
        let content = reference::<T>(&mut self.schemas);
        self.sends_events(json_text(content), description)
    }

    /// Server-sent events whose data are JSON of `T`, or of an error.
    pub fn streams_or_fails<T: ToSchema>(mut self, description: &'static str) -> Operation {
        let content = json!({ "anyOf": [reference::<T>(&mut self.schemas), self.api.error(&mut self.schemas)] });
        self.sends_events(json_text(content), description)
    }

    /// The same, and a last event with the data `[DONE]`.
    pub fn streams_until_done<T: ToSchema>(mut self, description: &'static str) -> Operation {
        let content = json!({ "anyOf": [reference::<T>(&mut self.schemas), self.api.error(&mut self.schemas)] });
        self.sends_events(json!({ "anyOf": [json_text(content), { "const": "[DONE]" }] }), description)
    }

    /// Server-sent events; the schema is that of one event.
    fn sends_events(mut self, data: Value, description: &'static str) -> Operation {
        let properties = json!({ "event": { "type": "string" }, "data": data });
        let schema = json!({
            "type": "object", "description": description, "required": ["data"], "properties": properties,
        });
        self.contents.insert("text/event-stream".into(), json!({ "schema": schema }));
        self
    }

    /// Asks a model.
    pub fn asks_model(self) -> Operation {
        self.fails(&MODEL_ERRORS)
    }

    pub fn fails(mut self, statuses: &[u16]) -> Operation {
        self.errors.extend(statuses);
        self
    }

    /// The operation in the document; `security` is empty for one that is open to all.
    pub fn to_json(&self, security: Value, schemas: &mut Schemas) -> Value {
        let mut operation = json!({
            "tags": [self.api.name()], "operationId": self.id(), "summary": self.summary, "security": security,
        });
        if !self.description.is_empty() {
            operation["description"] = self.description.into();
        }
        let parameters = self.parameters();
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        let mut success = json!({ "description": "Success", "headers": headers(&["x-request-id"]) });
        if !self.contents.is_empty() {
            success["content"] = self.contents.clone().into();
        }
        if let Some(body) = &self.body {
            operation["requestBody"] = body.clone();
            success["headers"] = headers(&["x-request-id", "x-aotron-ignored"]);
        }
        let mut responses = Map::from_iter([("200".to_owned(), success)]);
        let mut errors = self.errors.clone();
        if security.as_array().is_some_and(|security| !security.is_empty()) {
            errors.push(401);
        }
        errors.sort_unstable();
        for status in errors {
            let mut error = json!({ "description": meaning(status), "headers": headers(headers_of(status)) });
            error["content"] = json!({ "application/json": { "schema": self.api.error(schemas) } });
            responses.insert(status.to_string(), error);
        }
        operation["responses"] = responses.into();
        operation
    }

    /// A name for generated clients.
    fn id(&self) -> String {
        let words = self.path.split(['/', '{', '}', '.']).filter(|word| !word.is_empty());
        words.fold(self.method.to_owned(), |id, word| id + "_" + word)
    }

    fn parameters(&self) -> Vec<Value> {
        let names = self.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let of_name = |name: &str| {
            let description = match name {
                "version" => "Any; a model has one version.",
                "model" => "Name of the model; where one is served, any.",
                _ => "Name of the model. It may contain slashes.",
            };
            let schema = json!({ "type": "string" });
            json!({ "name": name, "in": "path", "required": true, "description": description, "schema": schema })
        };
        names.map(of_name).collect()
    }
}

/// A string that is JSON.
fn json_text(content: Value) -> Value {
    json!({ "type": "string", "contentMediaType": "application/json", "contentSchema": content })
}

fn binary() -> Value {
    let description = "JSON of the length in the header Inference-Header-Content-Length, then the bytes of tensors in \
                       the order of the JSON. BYTES are strings, each preceded by its length as a 32-bit little-endian \
                       number.";
    json!({ "schema": { "type": "string", "format": "binary", "description": description } })
}

fn headers(names: &[&str]) -> Value {
    let header = |name: &&str| ((*name).to_owned(), json!({ "$ref": format!("#/components/headers/{name}") }));
    names.iter().map(header).collect::<Map<_, _>>().into()
}

/// The headers that replies name.
pub(super) fn header_components() -> Value {
    let header = |kind: &str, description: &str| json!({ "description": description, "schema": { "type": kind } });
    json!({
        "x-request-id": header("string", "The id of the request: the client's, or one of the server's own."),
        "x-aotron-ignored": header("string", "Fields of the request that are not known, separated by commas."),
        "retry-after": header("integer", "Seconds after which to try again."),
        "www-authenticate": header("string", "Bearer"),
    })
}

fn headers_of(status: u16) -> &'static [&'static str] {
    match status {
        401 => &["x-request-id", "www-authenticate"],
        429 | 503 => &["x-request-id", "retry-after"],
        _ => &["x-request-id"],
    }
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "The request cannot be served as it is; the message says why.",
        401 => "An API key is missing or wrong.",
        404 => "There is no model of this name.",
        408 => "The body did not arrive in time.",
        413 => "The body is larger than the server takes.",
        429 => "Too many requests wait.",
        503 => "The model is not open yet, or the server is stopping.",
        504 => "The answer took longer than the server allows.",
        _ => "The server failed; its log says why.",
    }
}
