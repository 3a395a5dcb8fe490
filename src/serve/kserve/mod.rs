//! KServe's inference protocol v2 over HTTP with Triton's extension for binary tensors: what NeMo's `NemoQuery` and its
//! successors speak through pytriton's client, and Triton's `generate`.
//!
//! A client that finds no model of its name polls for minutes, so one model answers to any name.

#[cfg(any(test, fuzzing))]
pub(super) mod fuzzing;
pub(super) mod generate;
mod infer;
pub(super) mod tensors;

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::app::{App, OpenedModel, ServedModel};
use super::error::ApiError;
use super::routes::Routes;

/// Prompts of one request.
const MAX_BATCH: usize = 128;

/// An error in this protocol's form.
#[derive(Debug)]
struct KserveError(ApiError);

impl From<ApiError> for KserveError {
    fn from(error: ApiError) -> KserveError {
        KserveError(error)
    }
}

impl IntoResponse for KserveError {
    fn into_response(self) -> Response {
        respond(&self.0)
    }
}

/// An error in this protocol's form: its text alone.
pub(super) fn respond(error: &ApiError) -> Response {
    error.respond(json!({ "error": error.message }))
}

/// The model of a path.
struct Named(String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = KserveError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Named, KserveError> {
        let Path(params) = Path::<Vec<(String, String)>>::from_request_parts(parts, state)
            .await
            .map_err(|error| ApiError::bad_request(error.to_string()))?;
        if let Some((_, version)) = params.iter().find(|(key, version)| key == "version" && version != "1") {
            let message = format!("there is no version {}; every model has version 1", crate::error::clip(version));
            return Err(KserveError(ApiError { message, ..ApiError::not_found() }));
        }
        let name = params.into_iter().find(|(key, _)| key == "model").map(|(_, name)| name);
        Ok(Named(name.unwrap_or_default()))
    }
}

impl Named {
    /// The model as it is served.
    fn served<'a>(&self, app: &'a App) -> Result<&'a ServedModel, ApiError> {
        let known = || app.models().iter().map(|model| model.name().to_owned()).collect::<Vec<_>>();
        match app.models() {
            [only] => Ok(only),
            models => models
                .iter()
                .find(|model| model.answers_to(&self.0))
                .ok_or_else(|| ApiError::no_such_model(&self.0, &known())),
        }
    }

    /// The model, once it answers.
    fn opened(&self, app: &App) -> Result<Arc<OpenedModel>, ApiError> {
        let name = self.served(app)?.name().to_owned();
        app.model(Some(&name))
    }
}

/// Adds the routes of the protocol.
pub(super) fn routes(routes: Routes) -> Routes {
    let mut routes = routes
        .get("/v2", server)
        .get("/v2/health/live", || async { StatusCode::OK })
        .get("/v2/health/ready", ready)
        .post("/v2/repository/index", index);
    for model in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        routes = routes
            .get(model, metadata)
            .get(&format!("{model}/ready"), model_ready)
            .get(&format!("{model}/config"), config)
            .post(&format!("{model}/infer"), infer::infer)
            .post(&format!("{model}/generate"), generate::generate)
            .post(&format!("{model}/generate_stream"), generate::generate_stream);
    }
    routes
}

async fn server() -> Response {
    let extensions = ["binary_tensor_data", "model_configuration", "model_repository", "generate"];
    let version = env!("CARGO_PKG_VERSION");
    Json(json!({ "name": "aotron", "version": version, "extensions": extensions })).into_response()
}

async fn ready(State(app): State<Arc<App>>) -> StatusCode {
    if app.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn model_ready(State(app): State<Arc<App>>, named: Named) -> Result<Response, KserveError> {
    named.opened(&app)?;
    Ok(StatusCode::OK.into_response())
}

/// Names by which a single model is listed beside its own: the card's and its page's. Clients before pytriton 0.4 look
/// for theirs in the list, letter for letter, before they ask for the model.
const CARD_NAMES: [&str; 3] =
    ["Nemotron-3-8B-Chat-4K-RLHF", "Nemotron-3-8B-Chat-4k-RLHF", "nemotron-3-8b-chat-4k-rlhf"];

/// `POST /v2/repository/index`
async fn index(State(app): State<Arc<App>>) -> Response {
    let mut listed: Vec<Value> = Vec::new();
    let is_alone = app.models().len() == 1;
    for model in app.models() {
        let (state, reason) = match (model.opened(), model.failure()) {
            (Some(_), _) => ("READY", ""),
            (None, Some(reason)) => ("UNAVAILABLE", reason),
            (None, None) => ("LOADING", ""),
        };
        let mut names: Vec<&str> = model.names().iter().map(String::as_str).collect();
        names.extend(CARD_NAMES.iter().filter(|_| is_alone));
        names.sort_unstable();
        names.dedup();
        let entry = |name: &str| json!({ "name": name, "version": "1", "state": state, "reason": reason });
        listed.extend(names.into_iter().map(entry));
    }
    Json(listed).into_response()
}

/// The inputs that are read: names, Triton's types and what they are.
const INPUTS: [(&str, &str); 10] = [
    ("prompts", "BYTES"),
    ("max_output_len", "INT64"),
    ("max_output_token", "INT64"),
    ("top_k", "INT64"),
    ("top_p", "FP32"),
    ("temperature", "FP32"),
    ("random_seed", "INT64"),
    ("stop_words_list", "BYTES"),
    ("repetition_penalty", "FP32"),
    ("apply_chat_template", "BOOL"),
];
/// The outputs: classes differ in which they read.
const OUTPUTS: [&str; 2] = ["outputs", "sentences"];

async fn metadata(State(app): State<Arc<App>>, named: Named) -> Result<Response, KserveError> {
    named.served(&app)?;
    let tensor = |name: &str, datatype: &str| json!({ "name": name, "datatype": datatype, "shape": [-1, -1] });
    let inputs: Vec<Value> = INPUTS.iter().map(|(name, datatype)| tensor(name, datatype)).collect();
    let outputs = OUTPUTS.map(|name| tensor(name, "BYTES"));
    // The name that was asked for, which the client compares.
    let body =
        json!({ "name": named.0, "versions": ["1"], "platform": "aotron", "inputs": inputs, "outputs": outputs });
    Ok(Json(body).into_response())
}

async fn config(State(app): State<Arc<App>>, named: Named) -> Result<Response, KserveError> {
    named.served(&app)?;
    let input = |(name, datatype): &(&str, &str)| {
        let datatype = if *datatype == "BYTES" { "STRING" } else { datatype };
        let optional = *name != "prompts";
        json!({ "name": name, "data_type": format!("TYPE_{datatype}"), "dims": [-1], "optional": optional })
    };
    let output = |name: &str| json!({ "name": name, "data_type": "TYPE_STRING", "dims": [-1] });
    let inputs: Vec<Value> = INPUTS.iter().map(input).collect();
    let outputs = OUTPUTS.map(output);
    let body = json!({
        "name": named.0, "platform": "", "backend": "aotron", "max_batch_size": MAX_BATCH, "input": inputs,
        "output": outputs, "model_transaction_policy": { "decoupled": false }, "parameters": {},
    });
    Ok(Json(body).into_response())
}
