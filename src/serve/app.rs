//! The served models and their state, and the routes.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde_json::json;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::answer::Answer;
use super::error::ApiError;
use super::grammar::{AnswerForm, Grammars};
use super::metrics::{Metrics, ModelMetrics};
use super::options::ServeOptions;
use super::routes::Routes;
use super::{HearServer, ModelSource, ServeEvent, access, anthropic, body, kserve, openai, openapi, page};
use crate::error::{Error, Result};
use crate::runtime::{DrainMode, Engine, EngineHandle, EngineOptions, GenerationRequest, Model};
use crate::text::{ChatFormat, Tokenizer};

/// Prompts that are rendered and encoded at once.
const CONCURRENT_ENCODINGS: usize = 4;
/// Forms that are compiled at once. They wait for each other, and nobody else does.
const CONCURRENT_COMPILATIONS: usize = 2;
/// Longest wait for the compilation of a form, and for its turn. It cannot be stopped, so one that takes longer keeps others
/// from being compiled until it ends.
const COMPILATION_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest request id taken from a client.
pub(super) const MAX_REQUEST_ID: usize = 128;

/// State of the server.
pub(super) struct App {
    options: ServeOptions,
    models: Vec<ServedModel>,
    metrics: Metrics,
    hear: HearServer,
    encodings: Arc<Semaphore>,
    /// Threads for requests with large bodies, if they are not to be answered on those that serve connections.
    aside: Option<Handle>,
    compilations: Arc<Semaphore>,
    is_draining: AtomicBool,
    log: access::AccessLog,
    /// Requests whose responses are not over.
    in_flight: AtomicUsize,
}

/// A request whose response is not over.
pub(super) struct InFlight(Arc<App>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A model by its names, and what was made of it once it is open.
pub(super) struct ServedModel {
    /// The first is the one shown.
    names: Vec<String>,
    created: u64,
    metrics: Arc<ModelMetrics>,
    opened: OnceLock<Result<Arc<OpenedModel>, String>>,
    /// Kept to be shut down.
    engine: OnceLock<Engine>,
}

/// A model that answers.
pub(super) struct OpenedModel {
    pub name: String,
    pub model: Model,
    pub engine: EngineHandle,
    pub metrics: Arc<ModelMetrics>,
    /// The format of conversations, with special tokens in contents escaped unless the server is as the card.
    pub format: ChatFormat,
    /// Compiles the forms of answers; none without a tokenizer.
    pub grammars: Option<Arc<Grammars>>,
    /// Identifies the weights and the plan: OpenAI's `system_fingerprint`.
    pub fingerprint: String,
}

impl App {
    /// # Errors
    /// [`Error::Serve`] if there is no model or two have the same name.
    pub fn new(sources: &[ModelSource], options: ServeOptions, hear: HearServer, aside: Option<Handle>) -> Result<App> {
        let metrics = Metrics::new();
        let mut models: Vec<ServedModel> = Vec::new();
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        for source in sources {
            let mut names = source.names.clone();
            names.push(folder_name(&source.path));
            if let Some(twin) = names.iter().find(|name| models.iter().any(|model| model.answers_to(name))) {
                let message = format!(
                    "two models are named {twin}, after their folders; rename one of the folders, or link to it by another name"
                );
                return Err(Error::Serve(message));
            }
            let name = names.first().cloned().unwrap_or_default();
            let metrics = Arc::new(metrics.of_model(&name));
            models.push(ServedModel { names, created, metrics, opened: OnceLock::new(), engine: OnceLock::new() });
        }
        match models.is_empty() {
            true => Err(Error::Serve("there is no model to serve".into())),
            false => {
                let encodings = Arc::new(Semaphore::new(CONCURRENT_ENCODINGS));
                let compilations = Arc::new(Semaphore::new(CONCURRENT_COMPILATIONS));
                let (is_draining, in_flight) = (AtomicBool::new(false), AtomicUsize::new(0));
                Ok(App {
                    options,
                    models,
                    metrics,
                    hear,
                    encodings,
                    aside,
                    compilations,
                    is_draining,
                    log: access::AccessLog::start(),
                    in_flight,
                })
            }
        }
    }

    /// Opens a model; returns whether it answers.
    pub fn open(&self, index: usize, source: ModelSource) -> bool {
        let Some(served) = self.models.get(index) else { return false };
        let (started, path) = (Instant::now(), source.path.display().to_string());
        let opened = self.open_model(served, source);
        let event = match &opened {
            Ok(_) => ServeEvent::Ready { model: served.name().into(), seconds: started.elapsed().as_secs() },
            Err(error) => ServeEvent::Failed { model: served.name().into(), reason: error.to_string() },
        };
        let is_open = opened.is_ok();
        // Clients are not told where files lie.
        let failed = |error: Error| error.to_string().replace(&path, served.name());
        let _ = served.opened.set(opened.map(Arc::new).map_err(failed));
        self.tell(event);
        is_open
    }

    fn open_model(&self, served: &ServedModel, source: ModelSource) -> Result<OpenedModel> {
        let model = (source.open)()?;
        let mut options = EngineOptions::default().max_queued(self.options.max_queue);
        if let Some(limit_bytes) = self.options.prefix_cache_bytes {
            options = options.prefix_cache_bytes(limit_bytes);
        }
        if let Some(max_running) = self.options.max_running_per_client {
            options = options.max_running_per_client(max_running);
        }
        let engine = model.engine_with(options)?;
        let handle = engine.handle();
        // One step reads every weight, so that no request waits for the disk, and shows that the model computes.
        let first = model.package().manifest().model.bos_token_id.unwrap_or(0);
        handle.submit(GenerationRequest::new(vec![first]).max_tokens(1))?.wait()?;
        let _ = served.engine.set(engine);
        let mut format = (**model.chat_format()).clone();
        format.escape_markers = !self.options.card_compatible;
        let grammars = model.tokenizer().map(|tokenizer| Grammars::new(tokenizer.clone(), format.stop_ids()));
        let grammars = grammars.map(Arc::new);
        let digest = &model.package().manifest().sha256;
        let fingerprint = format!("b{}-{}-{}", digest.get(..12).unwrap_or(digest), model.target(), model.precision());
        let (name, metrics) = (served.name().to_owned(), served.metrics.clone());
        Ok(OpenedModel { name, model, engine: handle, metrics, format, grammars, fingerprint })
    }

    pub fn log(&self) -> &access::AccessLog {
        &self.log
    }

    /// Tells people of an event, without waiting for them.
    fn tell(&self, event: ServeEvent) {
        let hear = self.hear.clone();
        std::thread::spawn(move || hear(&event));
    }

    pub fn options(&self) -> &ServeOptions {
        &self.options
    }

    pub fn models(&self) -> &[ServedModel] {
        &self.models
    }

    /// The model that a request names; without a name, the first that has not failed to open.
    ///
    /// # Errors
    /// 404 for an unknown name, 503 while it is not open or if it never will be.
    pub fn model(&self, name: Option<&str>) -> Result<Arc<OpenedModel>, ApiError> {
        if self.is_draining() {
            return Err(ApiError::unavailable("the server is stopping", 5));
        }
        let served = match name.filter(|name| !name.is_empty()) {
            None => self.models.iter().find(|model| model.failure().is_none()).or(self.models.first()),
            Some(name) => self.models.iter().find(|model| model.answers_to(name)),
        };
        let known = || self.models.iter().map(|model| model.name().to_owned()).collect::<Vec<_>>();
        let served = served.ok_or_else(|| ApiError::no_such_model(name.unwrap_or_default(), &known()))?;
        match served.opened.get() {
            Some(Ok(opened)) => Ok(opened.clone()),
            Some(Err(reason)) => Err(ApiError::failed_model(served.name(), reason)),
            None => Err(ApiError::unavailable("the model is loading", 1)),
        }
    }

    /// Runs work on a text, such as rendering and encoding a prompt, on a blocking thread.
    ///
    /// # Errors
    /// Those of the work; 504 if that takes as long as a request may.
    pub async fn encode<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let encoded = App::on_blocking_thread(&self.encodings, work);
        tokio::time::timeout(self.options.request_timeout, encoded).await.unwrap_or_else(|_| Err(ApiError::timed_out()))
    }

    /// Runs work once there is a permit for it, which it holds to its end even if nobody waits for it any more.
    async fn on_blocking_thread<T: Send + 'static>(
        permits: &Arc<Semaphore>,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = permits.clone().acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        done.await.unwrap_or_else(|_| Err(ApiError::internal()))
    }

    /// Gives a request the form that one of its fields asks for, if it does.
    ///
    /// # Errors
    /// 400 naming the field; 503 if it takes too long, or those before it do.
    pub async fn give_form(
        &self,
        model: &OpenedModel,
        request: &mut GenerationRequest,
        form: Option<(AnswerForm, &'static str)>,
    ) -> Result<(), ApiError> {
        let Some((form, field)) = form else { return Ok(()) };
        let no_tokenizer = || ApiError::of_field(field, "this model has no tokenizer, so its answers have no form");
        let grammars = model.grammars.clone().ok_or_else(no_tokenizer)?;
        let compiled = App::on_blocking_thread(&self.compilations, move || grammars.compile(form, field));
        let compiled = tokio::time::timeout(COMPILATION_TIMEOUT, compiled).await.unwrap_or_else(|_| {
            let words = "the form of the answer cannot be compiled in time, or others take long; try a simpler one";
            Err(ApiError::unavailable(words, 5).or_of_field(field))
        });
        request.grammar = Some(compiled?);
        // Spaces around it may belong to the form.
        request.trim = false;
        Ok(())
    }

    /// When a request that has just arrived has to be answered.
    pub fn deadline(&self) -> Option<Instant> {
        Instant::now().checked_add(self.options.request_timeout)
    }

    /// The threads for requests with large bodies.
    pub fn aside(&self) -> Option<&Handle> {
        self.aside.as_ref()
    }

    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    /// Accepts no more requests.
    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::Release);
        self.tell(ServeEvent::Draining { requests: self.in_flight() });
    }

    /// Requests whose responses are not over.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Counts a request until the returned value is dropped.
    pub fn count(self: &Arc<App>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        InFlight(self.clone())
    }

    /// Ends all requests that still run.
    pub fn shut_down(&self) {
        for opened in self.models.iter().filter_map(ServedModel::opened) {
            opened.engine.close(DrainMode::Nothing);
        }
    }

    /// Returns true if every model answers and the server takes requests.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.models.iter().all(|model| model.opened().is_some_and(|o| o.engine.status().is_open))
    }

    /// Counts a response.
    pub fn responded(&self, route: &str, status: u16) {
        self.metrics.responded(route, status);
    }

    /// The reason of an engine that has stopped without being told to.
    pub fn stopped_engine(&self) -> Option<String> {
        let opened = self.models.iter().filter_map(ServedModel::opened);
        let stopped = opened.filter(|opened| !self.is_draining() && !opened.engine.status().is_open);
        stopped.map(|opened| format!("{}: {}", opened.name, opened.engine.stop_error())).next()
    }

    fn metrics_text(&self, for_gateways: bool) -> String {
        for model in &self.models {
            let opened = model.opened();
            let limits = opened.map(|opened| opened.engine.limits());
            let capacity = limits.map(|limits| (limits.slots, limits.max_sequence_tokens));
            self.metrics.observe(model.name(), opened.map(|opened| opened.engine.status()), capacity);
        }
        self.metrics.text(for_gateways)
    }
}

impl ServedModel {
    /// The name that is shown.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// All its names.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// When it was first offered, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.created
    }

    pub fn opened(&self) -> Option<&Arc<OpenedModel>> {
        self.opened.get().and_then(|opened| opened.as_ref().ok())
    }

    /// Why it could not be opened, if it could not.
    pub fn failure(&self) -> Option<&str> {
        self.opened.get().and_then(|opened| opened.as_ref().err()).map(String::as_str)
    }

    /// Compares names as people write them: regardless of case, of a vendor before a slash, and of an ending `.nemo`.
    pub fn answers_to(&self, name: &str) -> bool {
        let plain = plain_name(name);
        self.names.iter().any(|own| plain_name(own) == plain)
    }
}

fn plain_name(name: &str) -> String {
    let name = name.rsplit('/').next().unwrap_or(name).to_lowercase();
    name.strip_suffix(".nemo").unwrap_or(&name).to_owned()
}

fn folder_name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    whole.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

impl OpenedModel {
    /// The tokenizer.
    ///
    /// # Errors
    /// 400 if the model has none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>, ApiError> {
        let none = || ApiError::bad_request("this model has no tokenizer, so it takes token ids only");
        self.model.tokenizer().ok_or_else(none)
    }

    /// Refuses a text that has more tokens than a sequence holds, judging by its length alone.
    ///
    /// # Errors
    /// 400 with the lengths.
    pub fn check_text(&self, bytes: usize) -> Result<(), ApiError> {
        let tokens = self.engine.limits().max_sequence_tokens;
        let most = tokens.saturating_mul(self.tokenizer()?.longest_token_bytes().max(1));
        if bytes <= most {
            return Ok(());
        }
        Err(ApiError::prompt_too_long(tokens, &format!("{bytes} bytes, which is more")))
    }

    /// Submits a request.
    ///
    /// # Errors
    /// 400 for one that the engine refuses, 429 if its queue is full.
    pub fn submit(&self, request: GenerationRequest) -> Result<Answer, ApiError> {
        Answer::submit(&self.engine, &self.metrics, request)
    }
}

/// The routes of the APIs.
pub(super) fn routes() -> Routes {
    let routes = Routes::default()
        .get("/health", || async { StatusCode::OK })
        .get("/ping", || async { StatusCode::OK })
        .get("/ready", ready)
        .get("/version", version)
        .get("/metrics", metrics)
        .get("/openapi.json", openapi::document)
        .get("/v1/models", openai::models)
        .get("/v1/models/{*name}", openai::model)
        .post("/v1/chat/completions", openai::chat::create)
        .post("/v1/completions", openai::completions::create)
        .post("/v1/responses", openai::responses::create)
        .post("/v1/messages", anthropic::create)
        .post("/v1/messages/count_tokens", anthropic::count_tokens)
        .post("/tokenize", openai::tokens::tokenize)
        .post("/detokenize", openai::tokens::detokenize);
    kserve::routes(routes)
}

/// All routes, with what is done for each.
pub(super) fn router(app: Arc<App>) -> Router {
    let mut router = routes().into_router();
    // For clients whose base URL leaves out /v1, which llama.cpp's server answers too.
    router = router.route("/chat/completions", post(openai::chat::create)).route("/models", get(openai::models));
    if app.options.has_page {
        router = router.merge(page::routes());
    }
    router = router.fallback(|| async { ApiError::not_found() });
    router = router.method_not_allowed_fallback(|| async { ApiError::method_not_allowed() });
    router
        .layer(middleware::from_fn_with_state(app.clone(), body::large_aside))
        .layer(middleware::from_fn_with_state(app.clone(), access::control))
        .layer(access::cors(&app.options))
        .layer(middleware::from_fn_with_state(app.clone(), access::log))
        .layer(tower_http::catch_panic::CatchPanicLayer::custom(access::panicked))
        .with_state(app)
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    let model = |model: &ServedModel| {
        let state = match model.opened.get() {
            Some(Ok(_)) => "ready",
            Some(Err(_)) => "failed",
            None => "loading",
        };
        // The reason is for those who have a key: the lists of models have it.
        json!({ "name": model.name(), "state": state })
    };
    let is_ready = app.is_ready();
    let models: Vec<_> = app.models.iter().map(model).collect();
    let body = json!({ "ready": is_ready, "draining": app.is_draining(), "models": models });
    match is_ready {
        true => Json(body).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], Json(body)).into_response(),
    }
}

async fn version() -> Response {
    Json(json!({ "version": env!("CARGO_PKG_VERSION"), "name": "aotron" })).into_response()
}

/// `GET /metrics`; with `?names=aotron` without the names that gateways read.
async fn metrics(State(app): State<Arc<App>>, request: Request) -> Response {
    let is_own = |query: &str| query.split('&').any(|pair| pair == "names=aotron");
    let for_gateways = !request.uri().query().is_some_and(is_own);
    let form = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, form)], app.metrics_text(for_gateways)).into_response()
}
