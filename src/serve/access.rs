//! Who may ask, and the record of who did: request ids, API keys, CORS and the access log.

use std::any::Any;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, Limited};
use serde_json::json;
use subtle::ConstantTimeEq;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use uuid::Uuid;

use super::anthropic;
use super::app::{App, InFlight, MAX_REQUEST_ID};
use super::error::ApiError;
use super::kserve;
use super::options::{LogFormat, ServeOptions};
use crate::runtime::Completion;

/// Header of a request's id, taken from the client or made here.
static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Routes that need no key: an orchestrator has none, the page asks for it, and the documentation is the same for all.
const OPEN_ROUTES: [&str; 10] = [
    "/",
    "/docs",
    "/page/{name}",
    "/openapi.json",
    "/health",
    "/ping",
    "/ready",
    "/version",
    "/v2/health/live",
    "/v2/health/ready",
];

/// Longest rest of a body that is taken from a client whose request is refused before the body is read.
const MAX_REST_BYTES: usize = 128 << 20;

/// What is known of a request, for its handler and for the log.
#[derive(Debug, Clone)]
pub(super) struct RequestContext {
    /// Tells clients apart: by their key, or else by their address.
    pub client: u64,
    usage: Arc<Usage>,
}

/// Tokens of the answers to a request, for the log.
#[derive(Debug, Default)]
struct Usage {
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    completion_tokens: AtomicU64,
}

impl RequestContext {
    /// Adds an answer's tokens to the record.
    pub fn used(&self, completion: &Completion) {
        let Completion { prompt_tokens, reused_tokens, completion_tokens, .. } = completion;
        self.usage.prompt_tokens.fetch_add(*prompt_tokens as u64, Ordering::Relaxed);
        self.usage.cached_tokens.fetch_add(*reused_tokens as u64, Ordering::Relaxed);
        self.usage.completion_tokens.fetch_add(*completion_tokens as u64, Ordering::Relaxed);
    }
}

/// Gives a request its id, and logs it once its response is over.
pub(super) async fn log(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(&REQUEST_ID).and_then(|value| value.to_str().ok());
    let given = given.filter(|id| (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()));
    let id: Arc<str> = given.map_or_else(|| Uuid::new_v4().to_string().into(), Into::into);
    let address = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0);
    let mut hasher = DefaultHasher::new();
    match app.options().api_keys.is_empty() {
        true => address.map(|address| address.ip()).hash(&mut hasher),
        false => valid_key(&app.options().api_keys, request.headers()).hash(&mut hasher),
    }
    let context = RequestContext { client: hasher.finish(), usage: Arc::default() };
    request.extensions_mut().insert(context.clone());
    // Dropped with this handler if the client leaves before there is a response.
    let mut record = Record {
        app: app.clone(),
        id,
        usage: context.usage,
        address,
        method: request.method().clone(),
        // The path as it is routed: one from a client may hold anything.
        route: request.extensions().get::<MatchedPath>().map_or("-".into(), |path| path.as_str().to_owned()),
        started: Instant::now(),
        status: 0,
        bytes: 0,
        is_whole: false,
        log: app.log().clone(),
        _in_flight: app.count(),
    };
    // What is left of a body would be taken for the next request, so hyper closes the connection: the client is told.
    let is_read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
    let flag = is_read.clone();
    // A client that waits for a word before it sends the body is not given it.
    let takes_rest = !request.headers().contains_key(header::EXPECT);
    let patience = app.options().client_timeout;
    let request = request.map(|body| Body::new(WatchedBody { body, is_read: flag, takes_rest, patience }));
    let mut response = next.run(request).await;
    if !is_read.load(Ordering::Relaxed) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    record.status = response.status().as_u16();
    if let Ok(value) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert(REQUEST_ID.clone(), value);
    }
    response.map(|body| {
        // A body that is empty, or not to be sent, is never asked for.
        record.is_whole = body.is_end_stream() || record.method == Method::HEAD;
        Body::new(RecordedBody { body, record })
    })
}

/// Returns true for a route that needs no key.
pub(super) fn is_open(route: &str) -> bool {
    OPEN_ROUTES.contains(&route) || route.ends_with("/ready")
}

/// Checks the key.
pub(super) async fn control(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.options().api_keys;
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    if keys.is_empty() || is_open(route) {
        return next.run(request).await;
    }
    let found = valid_key(keys, request.headers()).is_some();
    match found {
        true => next.run(request).await,
        false if route.starts_with("/v1/messages") => anthropic::respond(&ApiError::unauthorized()),
        false if route.starts_with("/v2") => kserve::respond(&ApiError::unauthorized()),
        false => ApiError::unauthorized().into_response(),
    }
}

/// The keys that a request shows: OpenAI's clients in `Authorization`, Anthropic's in `x-api-key`, and gateways in both,
/// of which one may be their own.
fn given_keys(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    bearer.into_iter().chain(headers.get("x-api-key").and_then(|value| value.to_str().ok()))
}

/// The key of the server's that a request shows. Every key is compared, so that the time does not tell which came close.
fn valid_key<'k>(keys: &'k [String], headers: &HeaderMap) -> Option<&'k str> {
    let mut valid = None;
    for given in given_keys(headers) {
        for key in keys {
            if bool::from(key.as_bytes().ct_eq(given.as_bytes())) {
                valid = Some(key.as_str());
            }
        }
    }
    valid
}

/// The headers that let pages of other origins use the server.
pub(super) fn cors(options: &ServeOptions) -> CorsLayer {
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST, Method::OPTIONS])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID.clone(), HeaderName::from_static("x-aotron-ignored")]);
    match options.cors_origins.iter().any(|origin| origin == "*") {
        true => layer.allow_origin(AllowOrigin::any()),
        false => {
            let origins = options.cors_origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
            layer.allow_origin(AllowOrigin::list(origins))
        }
    }
}

/// The response where a handler panicked.
pub(super) fn panicked(payload: Box<dyn Any + Send + 'static>) -> Response {
    tracing::error!(target: "aotron::serve", "a handler panicked: {}", crate::runtime::words_of_panic(&*payload));
    ApiError::internal().into_response()
}

/// Lines of the access log that may wait for whoever reads standard error.
const LINES_AHEAD: usize = 4096;

/// Writes lines to standard error from a thread of its own: whoever reads them may stop, and requests go on. Then lines are
/// dropped, and counted.
#[derive(Debug, Clone)]
pub(super) struct AccessLog {
    lines: SyncSender<String>,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    pub fn start() -> AccessLog {
        let (lines, received) = sync_channel::<String>(LINES_AHEAD);
        let dropped = Arc::new(AtomicU64::new(0));
        let lost = dropped.clone();
        std::thread::spawn(move || {
            for line in received {
                let count = lost.swap(0, Ordering::Relaxed);
                let note = if count > 0 { format!("{count} lines of this log were dropped\n") } else { String::new() };
                // A closed standard error is no reason to fail.
                let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), format!("{note}{line}\n").as_bytes());
            }
        });
        AccessLog { lines, dropped }
    }

    fn write(&self, line: String) {
        if self.lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The line of a request in the log, written when it is dropped, and counted in the metrics.
struct Record {
    app: Arc<App>,
    id: Arc<str>,
    usage: Arc<Usage>,
    address: Option<SocketAddr>,
    method: Method,
    route: String,
    started: Instant,
    /// 0 until there is a response.
    status: u16,
    bytes: u64,
    /// The response was sent to its end.
    is_whole: bool,
    log: AccessLog,
    _in_flight: InFlight,
}

impl Drop for Record {
    fn drop(&mut self) {
        let milliseconds = self.started.elapsed().as_secs_f64() * 1e3;
        // nginx's number for a client that left.
        let status = if self.is_whole { self.status } else { 499 };
        self.app.responded(&self.route, status);
        let [prompt, cached, completion] =
            [&self.usage.prompt_tokens, &self.usage.cached_tokens, &self.usage.completion_tokens]
                .map(|count| count.load(Ordering::Relaxed));
        let address = self.address.map_or_else(|| "-".to_owned(), |address| address.ip().to_string());
        let Record { id, method, route, bytes, .. } = &*self;
        let time = chrono::Utc::now().format("%Y-%m-%dT%H:%M:%S%.3fZ");
        let line = match self.app.options().log {
            LogFormat::Off => return,
            LogFormat::Text => format!(
                "{time} {address} {method} {route} {status} {milliseconds:.1} ms, {bytes} bytes, tokens {prompt} prompt \
                 ({cached} cached) {completion} answer, {id}"
            ),
            LogFormat::Json => json!({
                "time": time.to_string(), "client": address, "method": method.as_str(), "route": route,
                "status": status, "milliseconds": milliseconds, "bytes": bytes, "prompt_tokens": prompt,
                "cached_tokens": cached, "completion_tokens": completion, "request_id": &**id,
            })
            .to_string(),
        };
        self.log.write(line);
    }
}

/// A request's body, and whether it was read to its end.
///
/// What the handler left of it is read and dropped, within bounds: many clients send all of a body before they read a reply,
/// and see a broken connection, not the refusal, where nobody takes it from them.
struct WatchedBody {
    body: Body,
    is_read: Arc<AtomicBool>,
    takes_rest: bool,
    /// The longest that the rest may take.
    patience: Duration,
}

impl Drop for WatchedBody {
    fn drop(&mut self) {
        let is_bounded = self.body.size_hint().lower() <= MAX_REST_BYTES as u64;
        let runtime = tokio::runtime::Handle::try_current();
        if let (false, true, true, Ok(runtime)) =
            (self.is_read.load(Ordering::Relaxed), self.takes_rest, is_bounded, runtime)
        {
            let mut rest = Limited::new(std::mem::take(&mut self.body), MAX_REST_BYTES);
            let patience = self.patience;
            runtime.spawn(tokio::time::timeout(patience, async move { while let Some(Ok(_)) = rest.frame().await {} }));
        }
    }
}

impl http_body::Body for WatchedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if matches!(polled, Poll::Ready(None)) || self.body.is_end_stream() {
            self.is_read.store(true, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body, with the record that ends with it.
struct RecordedBody {
    body: Body,
    record: Record,
}

impl http_body::Body for RecordedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => self.record.bytes += frame.data_ref().map_or(0, |data| data.len() as u64),
            Poll::Ready(None) => self.record.is_whole = true,
            _ => {}
        }
        self.record.is_whole |= self.body.is_end_stream();
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
