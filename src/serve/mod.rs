//! The HTTP server over [`Engine`](crate::runtime::Engine): the APIs that existing clients speak.
//!
//! ```text
//!  connection ──► access ──► body ──► openai, … ──► answer ──► engine handle
//!  (sockets,      (request    (JSON,   (one file     (events of  (its own thread,
//!   time limits)   id, key,    limits)  per API)      a request)  one per model)
//!                  log)
//! ```
//!
//! | module | contents |
//! | --- | --- |
//! | `tls` | HTTPS |
//! | `connection` | connections: limits on their number, time limits on headers and writes, draining |
//! | `socket` | the socket of a client, and whether the client is still there |
//! | `access` | request ids, API keys, CORS, the access log |
//! | `app`, `routes` | the served models and their state; routes |
//! | `body` | JSON bodies with their limits, unknown fields |
//! | `answer` | a request to an engine and its events |
//! | `error` | errors in the forms that clients read |
//! | `openai` | OpenAI's API |
//! | `anthropic` | Anthropic's API |
//! | `kserve` | KServe's protocol, which NeMo's clients speak |
//! | `grammar` | the form of an answer, as masks over tokens |
//! | `openapi` | the OpenAPI document |
//! | `page` | the page to talk to the model, and the one that shows the document |
//! | `metrics` | Prometheus metrics |
//!
//! A request is rendered and encoded on a blocking thread, of which there is a bounded number, and validated before it is
//! queued; the engine's thread only runs steps. Dropping a response cancels its request, which frees its slot within one
//! step; a connection, and with it the handler, is dropped once its client has left.

mod access;
mod answer;
mod anthropic;
mod app;
mod body;
mod connection;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod grammar;
mod kserve;
mod metrics;
mod openai;
mod openapi;
mod options;
mod page;
mod routes;
mod socket;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "tls_absent.rs"]
mod tls;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Notify;

pub use self::options::{LogFormat, ServeOptions, TlsFiles, UnknownFields};
use crate::error::{Error, Result};
use crate::runtime::Model;

/// Interval at which the engines are looked at.
const WATCH: Duration = Duration::from_millis(250);

/// A model to serve.
pub struct ModelSource {
    /// The engine package.
    pub path: PathBuf,
    /// Names that clients may call it by, besides those that derive from the path; the first is the one shown.
    pub names: Vec<String>,
    /// Opens it. Called once, on a thread of its own, after the server has begun to listen.
    pub open: Box<dyn FnOnce() -> Result<Model> + Send>,
}

/// Progress of a server, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServeEvent {
    /// A model answers from now on.
    Ready {
        /// Its name.
        model: String,
        /// Seconds that it took to open.
        seconds: u64,
    },
    /// A model cannot be opened.
    Failed {
        /// Its name.
        model: String,
        /// The reason.
        reason: String,
    },
    /// The server accepts no more requests and waits for those that run.
    Draining {
        /// Requests that run or wait.
        requests: usize,
    },
}

/// Receives the events.
pub type HearServer = Arc<dyn Fn(&ServeEvent) + Send + Sync>;

/// Tells a server to stop, from any thread.
#[derive(Debug, Clone, Default)]
pub struct StopSignal {
    is_sent: Arc<AtomicBool>,
    notify: Arc<Notify>,
}

impl StopSignal {
    /// Sends the signal; returns false if it was sent before.
    pub fn send(&self) -> bool {
        let is_first = !self.is_sent.swap(true, Ordering::AcqRel);
        self.notify.notify_one();
        is_first
    }

    async fn wait(&self) {
        self.notify.notified().await;
    }
}

/// A server that listens.
pub struct Server {
    runtime: tokio::runtime::Runtime,
    /// For requests with large bodies.
    aside: tokio::runtime::Runtime,
    listeners: Vec<TcpListener>,
    tls: Option<tls::Tls>,
    app: Arc<app::App>,
    sources: Vec<ModelSource>,
}

/// Stack of a thread, of which only what is used takes memory. Compiling a form recurses once for each rule, definition or
/// piece of a regular expression that leads to the next: 2 to 8 KiB each, and its source is bounded (`grammar::cost`).
const STACK_BYTES: usize = 256 << 20;
/// Threads for requests with large bodies, which may take a second each.
const LARGE_BODY_THREADS: usize = 2;

impl Server {
    /// Binds the addresses; nothing is answered before [`Server::run`].
    ///
    /// # Errors
    /// [`Error::Serve`] if an address cannot be bound, an option is out of range, or the certificate or its key cannot
    /// be used.
    pub fn bind(sources: Vec<ModelSource>, options: ServeOptions, hear: HearServer) -> Result<Server> {
        let serve_error = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| Error::Serve(format!("{what}: {error}"))
        };
        let tls = options.tls.as_ref().map(tls::Tls::load).transpose()?;
        let threads = |count: usize, name: &str| {
            let mut threads = tokio::runtime::Builder::new_multi_thread();
            threads.worker_threads(count).max_blocking_threads(count + 8).thread_name(name);
            let threads = threads.thread_stack_size(STACK_BYTES).enable_all().build();
            threads.map_err(serve_error("cannot start the server's threads"))
        };
        let runtime = threads(options.io_threads, "aotron-serve")?;
        let aside = threads(LARGE_BODY_THREADS, "aotron-large")?;
        let listeners = runtime.block_on(async {
            let target = (options.host.as_str(), options.port);
            let found = tokio::net::lookup_host(target).await;
            let found: Vec<SocketAddr> =
                found.map_err(serve_error(&format!("cannot find the host {}", options.host)))?.collect();
            let mut listeners = Vec::new();
            for address in found {
                let bound = TcpListener::bind(address).await;
                listeners.push(bound.map_err(|error| cannot_listen(address, &error))?);
            }
            match listeners.is_empty() {
                true => Err(Error::Serve(format!("the host {} has no address", options.host))),
                false => Ok(listeners),
            }
        })?;
        let app = Arc::new(app::App::new(&sources, options, hear, Some(aside.handle().clone()))?);
        Ok(Server { runtime, aside, listeners, tls, app, sources })
    }

    /// The addresses it listens on.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// The name under which each model is listed.
    pub fn model_names(&self) -> Vec<String> {
        self.app.models().iter().map(|model| model.name().to_owned()).collect()
    }

    /// Opens the models and serves until `stop` is done; then running requests are finished, within the drain timeout.
    /// Returns whether all of them were.
    ///
    /// # Errors
    /// [`Error::Serve`] if no model could be opened.
    pub fn run(self, stop: StopSignal) -> Result<bool> {
        let Server { runtime, aside, listeners, tls, app, sources } = self;
        let loaders: Vec<_> = sources
            .into_iter()
            .enumerate()
            .map(|(index, source)| {
                let app = app.clone();
                runtime.spawn_blocking(move || app.open(index, source))
            })
            .collect();
        let outcome = runtime.block_on(async {
            let failed = async {
                let mut opened = 0;
                for loader in loaders {
                    opened += usize::from(loader.await.unwrap_or(false));
                }
                if opened > 0 {
                    std::future::pending::<()>().await;
                }
            };
            // Whoever started the server can start it again; one that answers nothing is of no use.
            let lost = async {
                loop {
                    tokio::time::sleep(WATCH).await;
                    if let Some(reason) = app.stopped_engine() {
                        return reason;
                    }
                }
            };
            let serving = connection::serve(listeners, tls, app.clone(), stop.wait());
            tokio::select! {
                drained = serving => Ok(drained),
                reason = lost => Err(Error::Serve(reason)),
                () = failed => Err(Error::Serve("no model could be opened".into())),
            }
        });
        app.shut_down();
        runtime.shutdown_timeout(Duration::from_secs(1));
        aside.shutdown_background();
        outcome
    }
}

/// Why an address cannot be listened on, with what to do.
fn cannot_listen(address: SocketAddr, error: &std::io::Error) -> Error {
    let remedy = match error.kind() {
        ErrorKind::AddrInUse => {
            "; another program listens there: end it, or choose another port with --port (0 takes a free one)"
        }
        ErrorKind::AddrNotAvailable => "; this machine does not have that address: choose another with --host",
        ErrorKind::PermissionDenied => "; ports below 1024 are for the administrator: choose another with --port",
        _ => "",
    };
    Error::Serve(format!("cannot listen on {address}: {error}{remedy}"))
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("addresses", &self.addresses()).finish_non_exhaustive()
    }
}
