//! Invariants of what the server reads of its clients; see [`crate::fuzzing`].
//!
//! Requests go through the router, as from a connection, to the model tiny-chat, whose engine is stopped: a request is
//! parsed, rendered, encoded and validated, and then refused with 503 instead of being computed.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::ConnectInfo;
use axum::http::{Request, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use tower::ServiceExt;

use super::app::{App, OpenedModel, router};
use super::grammar::{AnswerForm, ResponseFormat, StructuredOutputs};
use super::kserve::fuzzing::check_tensors;
use super::{LogFormat, ModelSource, ServeOptions};
use crate::compile::{BuildRequest, Precision, Progress, Recipe, build};
use crate::fuzzing::check_message;
use crate::runtime::{Model, TokenMask};

/// Routes that take JSON; the first byte of an input chooses one.
const ROUTES: [&str; 8] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v2/models/tiny-chat/generate",
];
/// Longest message of a refusal: clients show it to people.
const MAX_REFUSAL_BYTES: usize = 4096;
/// Tokens whose masks are computed for a grammar.
const MASKS: usize = 64;

/// A server without sockets.
struct Served {
    runtime: tokio::runtime::Runtime,
    router: Router,
    model: Arc<OpenedModel>,
}

static SERVED: LazyLock<Served> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let package = folder.path().join("tiny-chat");
    let request = BuildRequest {
        checkpoint: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny-chat"),
        recipes: vec![Recipe { precision: Precision::F32, ..Recipe::load("cpu").unwrap() }],
        output: package.clone(),
        replace: false,
        prepare: false,
        calibration: None,
        chat_format: None,
        reference: false,
    };
    build(&request, &(Arc::new(Quiet) as Arc<dyn Progress>)).unwrap();
    let path = package.clone();
    let open = move || Model::options().slots(1).threads(1).open(path);
    let source = ModelSource { path: package, names: Vec::new(), open: Box::new(open) };
    let options = ServeOptions { log: LogFormat::Off, ..ServeOptions::default() };
    let app = Arc::new(App::new(std::slice::from_ref(&source), options, Arc::new(|_| {}), None).unwrap());
    // Its files are mapped, and deleted with the folder.
    assert!(app.open(0, source), "tiny-chat does not open");
    let model = app.model(None).unwrap();
    model.grammars.as_ref().unwrap().compile(AnswerForm::Regex("a".into()), "regex").unwrap();
    app.shut_down();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    Served { runtime, router: router(app), model }
});

struct Quiet;

impl Progress for Quiet {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

/// Opens the model, which takes more memory than an input may.
pub fn open_server() {
    LazyLock::force(&SERVED);
}

/// Sends a body and checks that the reply is an answer, or a refusal with a message. Returns its status.
fn send(route: &str, headers: &[(&str, String)], body: &[u8]) -> StatusCode {
    let mut request = Request::post(route).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let address: SocketAddr = ([127, 0, 0, 1], 1).into();
    let request = request.extension(ConnectInfo(address)).body(Body::from(body.to_vec())).unwrap();
    let (status, reply) = SERVED.runtime.block_on(async {
        let reply = SERVED.router.clone().oneshot(request).await.unwrap();
        (reply.status(), to_bytes(reply.into_body(), usize::MAX).await.unwrap())
    });
    let reply: Value = serde_json::from_slice(&reply).unwrap();
    if status == StatusCode::OK {
        return status;
    }
    assert!([400, 404, 503].contains(&status.as_u16()), "{status}: {reply}");
    let error = &reply["error"];
    let message = error["message"].as_str().or(error.as_str()).unwrap();
    assert!((1..=MAX_REFUSAL_BYTES).contains(&message.len()), "a message of {} bytes", message.len());
    status
}

/// Input: a byte that chooses a route, and the body of a request. Whatever it is, the reply is JSON: an answer or a
/// refusal that is the client's fault.
pub fn chat(bytes: &[u8]) {
    send_chat(bytes);
}

fn send_chat(bytes: &[u8]) -> Option<StatusCode> {
    let (route, body) = bytes.split_first()?;
    Some(send(ROUTES[usize::from(*route) % ROUTES.len()], &[], body))
}

/// Input: the length of the JSON in two bytes, and the body of KServe's `infer`, as JSON and bytes of tensors after it; with
/// the length 65,535 all is JSON.
pub fn tensors(bytes: &[u8]) {
    send_tensors(bytes);
}

fn send_tensors(bytes: &[u8]) -> Option<StatusCode> {
    let (length, body) = bytes.split_first_chunk::<2>()?;
    let length = Some(usize::from(u16::from_le_bytes(*length))).filter(|length| *length != usize::from(u16::MAX));
    check_tensors(body, length);
    let header = length.map(|length| ("inference-header-content-length", length.to_string()));
    Some(send("/v2/models/tiny-chat/infer", header.as_slice(), body))
}

/// The fields of a request that give its answer a form.
#[derive(Deserialize)]
struct Form {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
}

/// Input: the fields `response_format` and `structured_outputs` of a request. A form that is accepted allows a token at
/// each place until it ends, and takes every token that it allows, or refuses to go on with a message.
pub fn grammar(bytes: &[u8]) {
    let Ok(Form { response_format, structured_outputs }) = serde_json::from_slice(bytes) else { return };
    let (form, field) = match AnswerForm::of_request(response_format, "response_format", structured_outputs) {
        Ok(Some(form)) => form,
        Ok(None) => return,
        Err(error) => return check_message(&error.message),
    };
    let grammars = SERVED.model.grammars.as_ref().unwrap();
    let grammar = match grammars.compile(form, field) {
        Ok(grammar) => grammar,
        Err(error) => return check_message(&error.message),
    };
    let vocab_size = SERVED.model.tokenizer().unwrap().vocab_size();
    let stop_ids = SERVED.model.format.stop_ids();
    let mut constraint = grammar.start().unwrap();
    let mut mask = TokenMask::new(vocab_size);
    let mut choice = bytes.iter().fold(1u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3));
    for _ in 0..MASKS {
        mask.clear();
        if let Err(error) = constraint.allow(&mut mask) {
            return check_message(&error.to_string());
        }
        let allowed: Vec<u32> = (0..vocab_size as u32).filter(|id| mask.contains(*id)).collect();
        choice = choice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let texts: Vec<u32> = allowed.iter().copied().filter(|id| !stop_ids.contains(id)).collect();
        assert!(!allowed.is_empty(), "nothing is allowed");
        if texts.is_empty() {
            return;
        }
        let id = texts[(choice >> 33) as usize % texts.len()];
        if let Err(error) = constraint.push(id) {
            return check_message(&error.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_requests_that_reach_the_engine() {
        for (target, send) in [("chat", send_chat as fn(&[u8]) -> Option<StatusCode>), ("tensors", send_tensors)] {
            let mut sent = 0;
            for seed in std::fs::read_dir(Path::new("fuzz/seeds").join(target)).unwrap() {
                let path = seed.unwrap().path();
                let status = send(&std::fs::read(&path).unwrap()).unwrap();
                assert!([200, 503].contains(&status.as_u16()), "{}: {status}", path.display());
                sent += 1;
            }
            assert!(sent > 2, "{target} has {sent} seeds");
        }
    }
}
