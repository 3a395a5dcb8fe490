//! Options of the server.

use std::path::PathBuf;
use std::time::Duration;

/// What becomes of request fields that are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownFields {
    /// They are ignored, and named in the header `x-aotron-ignored` of the reply and in the log.
    #[default]
    Warn,
    /// The request is refused.
    Reject,
}

/// Form of the access log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// A line of text for each request.
    #[default]
    Text,
    /// A line of JSON for each request.
    Json,
    /// None.
    Off,
}

/// A certificate and its key, for HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and then those that lead from it to one that clients trust; in PEM.
    pub certificate: PathBuf,
    /// The private key of the first certificate; in PEM, not encrypted.
    pub key: PathBuf,
}

/// Options of a [`Server`](super::Server).
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Host name or address to listen on.
    pub host: String,
    /// Port; 0 takes a free one.
    pub port: u16,
    /// Speaks HTTPS instead of HTTP. The files are read once. Needs the crate's feature `tls`.
    pub tls: Option<TlsFiles>,
    /// Keys of which a request must have one, unless there are none.
    pub api_keys: Vec<String>,
    /// Requests of a model that may wait for a slot.
    pub max_queue: usize,
    /// Bytes of keys and values that a model keeps of sequences that have lost their slot; `None` is the engine's default
    /// ([`EngineOptions::prefix_cache_bytes`](crate::runtime::EngineOptions::prefix_cache_bytes)), 0 keeps none.
    pub prefix_cache_bytes: Option<usize>,
    /// Slots of a model that the requests of one client (its key, or else its address) may hold at a time; `None` is all.
    pub max_running_per_client: Option<usize>,
    /// Bytes of a request's body.
    pub max_body_bytes: usize,
    /// Open connections.
    pub max_connections: usize,
    /// Time for a whole request, from its arrival.
    pub request_timeout: Duration,
    /// Time for running requests once the server is told to stop.
    pub drain_timeout: Duration,
    /// Time for a client to shake hands, to send the headers or the body of a request, and to take each piece of a reply.
    pub client_timeout: Duration,
    /// Origins whose pages may use the server; `*` is any.
    pub cors_origins: Vec<String>,
    /// What becomes of unknown fields.
    pub unknown_fields: UnknownFields,
    /// Form of the access log, on standard error.
    pub log: LogFormat,
    /// Serves the page to talk to the model.
    pub has_page: bool,
    /// Special tokens spelled in message contents act as such, as in the model card's code. By default they are plain
    /// text, so that a user's message cannot forge a turn.
    pub card_compatible: bool,
    /// Threads for connections; answers are computed on others.
    pub io_threads: usize,
}

impl Default for ServeOptions {
    fn default() -> ServeOptions {
        ServeOptions {
            host: "127.0.0.1".into(),
            port: 8000,
            tls: None,
            api_keys: Vec::new(),
            max_queue: 256,
            prefix_cache_bytes: None,
            max_running_per_client: None,
            max_body_bytes: 8 << 20,
            max_connections: 2048,
            request_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(60),
            client_timeout: Duration::from_secs(30),
            cors_origins: Vec::new(),
            unknown_fields: UnknownFields::default(),
            log: LogFormat::default(),
            has_page: true,
            card_compatible: false,
            io_threads: 2,
        }
    }
}
