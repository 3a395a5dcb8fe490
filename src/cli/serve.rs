//! `aotron serve`: the HTTP server.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use aotron::backend::select;
use aotron::memory::total_memory_bytes;
use aotron::runtime::Model;
use aotron::serve::{LogFormat, ModelSource, ServeEvent, ServeOptions, Server, StopSignal, TlsFiles, UnknownFields};
use clap::ValueEnum;
use tokio::signal::unix::{SignalKind, signal};

use super::args::{EngineFlags, chat_format_help, count, size, usage};
use super::engine::shell_word;
use super::term;

/// Largest file of API keys.
const MAX_KEY_FILE_BYTES: u64 = 1 << 20;

/// Flags of `aotron serve`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Engine packages, folders written by `aotron build`
    #[arg(required = true, value_name = "ENGINE")]
    engines: Vec<PathBuf>,
    /// Address or host name to listen on; 0.0.0.0 is every IPv4 address of this machine
    #[arg(long, default_value = "127.0.0.1", value_parser = host)]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name that clients call the model by; can be repeated for more names of the same model [default: the folder's name]
    #[arg(long, value_name = "NAME", value_parser = model_name)]
    served_model_name: Vec<String>,
    /// Require this API key; can be repeated. Other users of this machine can see it; prefer --api-key-file
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// Require one of the API keys in this file, one per line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Serve HTTPS with the certificate in this file, followed by those of its issuers; PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate; PEM, not encrypted
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Requests that may wait for a slot; more are refused
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count(1_000_000))]
    max_queue: usize,
    /// Memory, for each model, for keys and values of conversations that have lost their slot, such as 512MiB or 8GiB; 0 for
    /// none, and none on a GPU [default: as much as the KV cache, at most a quarter of the memory left beside that]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    prefix_cache: Option<usize>,
    /// Slots that the requests of one client may hold at a time, a client being its key or else its address; by default all
    #[arg(long, value_name = "N", value_parser = count(1_000_000))]
    max_running_per_client: Option<usize>,
    /// Largest body of a request, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 8, value_parser = count(1024))]
    max_body: usize,
    /// Open connections; more wait
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = count(1_000_000))]
    max_connections: usize,
    /// Seconds after which a request is given up, whether it waits or runs
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = count(1_000_000))]
    request_timeout: usize,
    /// Seconds that running requests have to finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = count(1_000_000))]
    drain_timeout: usize,
    /// Seconds that a client has to send a request, and to take each piece of a reply
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = count(1_000_000))]
    client_timeout: usize,
    /// Origin whose pages may use the server, such as https://example.org, or *; can be repeated
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    cors_origin: Vec<String>,
    /// What becomes of request fields that are not known
    #[arg(long, value_enum, default_value_t)]
    unknown_fields: Unknown,
    /// Form of the access log on standard error
    #[arg(long, value_enum, default_value_t)]
    log_format: Log,
    /// Do not serve the page to talk to the model
    #[arg(long)]
    no_ui: bool,
    /// Let special tokens spelled in messages act as such, as the model card's code does
    #[arg(long)]
    card_compatible: bool,
    /// Sequences at once [default: the plan's]
    #[arg(long, value_name = "N", value_parser = count(4096))]
    slots: Option<usize>,
    #[arg(long, value_name = "NAME|FILE.jinja", help = chat_format_help("the package's"))]
    chat_format: Option<String>,
    /// CPU threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = count(1024))]
    threads: Option<usize>,
    /// Target whose plan to run: cpu, a100, h100 [default: that of a GPU in this machine, otherwise cpu]
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Index of the GPU to run on [default: the first one that a plan was compiled for]
    #[arg(long, value_name = "N")]
    device: Option<usize>,
    /// Read the weights of a CPU plan into memory instead of mapping their files, which may then be changed or removed
    #[arg(long)]
    copy_weights: bool,
    /// Run a GPU plan that has not been verified on this card, driver and library
    #[arg(long)]
    accept_unverified: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Unknown {
    /// They are ignored, and named in the reply's header x-aotron-ignored
    #[default]
    Warn,
    /// The request is refused
    Reject,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Log {
    #[default]
    Text,
    Json,
    Off,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    if flags.engines.len() > 1 && !flags.served_model_name.is_empty() {
        return Err(usage(
            "--served-model-name is for a single engine; several are called by the names of their folders",
        ));
    }
    let mut sources = Vec::new();
    for path in &flags.engines {
        // What is wrong with a package should be said before anything listens.
        flags.check(path)?;
        sources.push(flags.source(path));
    }
    let server = Server::bind(sources, flags.options()?, Arc::new(announce))?;
    let scheme = if flags.tls_cert.is_some() { "https" } else { "http" };
    for address in server.addresses() {
        let url = format!("{scheme}://{address}");
        term::note(format!("listening on {url}"));
        println_hint(&server, &url, !flags.api_key.is_empty() || flags.api_key_file.is_some());
    }
    let stop = stop_signals()?;
    match server.run(stop)? {
        true => Ok(()),
        false => bail!("some requests were not finished within --drain-timeout {}", flags.drain_timeout),
    }
}

/// An address or a host name; an IPv6 address may have the brackets that it has in a URL.
fn host(text: &str) -> Result<String, String> {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    match inner.unwrap_or(text) {
        "" => {
            Err("an address or a host name is needed; 0.0.0.0 is every IPv4 address of this machine, :: every one"
                .into())
        }
        host => Ok(host.to_owned()),
    }
}

fn model_name(text: &str) -> Result<String, String> {
    match text.trim().is_empty() || text.contains(char::is_control) {
        true => Err("a name has at least one character, and no control characters".into()),
        false => Ok(text.to_owned()),
    }
}

/// An origin as browsers send it in a header.
fn origin(text: &str) -> Result<String, String> {
    let is_part = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_graphic() && !"/?#@".contains(c));
    match text.split_once("://") {
        Some((scheme, host)) if is_part(scheme) && is_part(host) => Ok(text.to_ascii_lowercase()),
        _ if text == "*" => Ok(text.to_owned()),
        _ => Err(
            "an origin is a scheme, a host and perhaps a port, as in https://example.org or http://localhost:3000; \
                  without a path or a slash at its end"
                .into(),
        ),
    }
}

impl Flags {
    /// Checks what can be known of a package and of the flags for it before it is opened.
    fn check(&self, path: &Path) -> anyhow::Result<()> {
        let engine = self.engine(path);
        let package = engine.package()?;
        if let Some(choice) = &self.chat_format {
            package.text(Some(choice))?;
        }
        if self.slots.is_none() && self.device.is_none() && self.target.is_none() {
            return Ok(());
        }
        let selection = select(&package, &engine.options(1))?;
        engine.note_device(&selection);
        let most = package.manifest().plans.get(selection.plan).map_or(0, |plan| plan.limits.slots);
        match self.slots {
            Some(slots) if slots > most => {
                let path = shell_word(path);
                bail!(
                    "--slots {slots}, but the plan of {path} was built for 1 to {most}; `aotron build --slots {slots}` builds \
                     one for more"
                )
            }
            _ => Ok(()),
        }
    }

    fn engine(&self, path: &Path) -> EngineFlags {
        EngineFlags {
            threads: self.threads,
            target: self.target.clone(),
            device: self.device,
            copy_weights: self.copy_weights,
            accept_unverified: self.accept_unverified,
            ..EngineFlags::of(path)
        }
    }

    fn source(&self, path: &Path) -> ModelSource {
        let engine = self.engine(path);
        let (slots, chat_format) = (self.slots, self.chat_format.clone());
        let open = move || {
            let mut options = Model::options().executor_options(engine.options(1));
            if let Some(slots) = slots {
                options = options.slots(slots);
            }
            if let Some(choice) = chat_format {
                options = options.chat_format(choice);
            }
            options.open_package(engine.package()?)
        };
        ModelSource { path: path.to_path_buf(), names: self.served_model_name.clone(), open: Box::new(open) }
    }

    fn options(&self) -> anyhow::Result<ServeOptions> {
        let seconds = |n: usize| Duration::from_secs(n as u64);
        let memory = total_memory_bytes().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(usize::MAX);
        if self.prefix_cache.is_some_and(|bytes| bytes > memory) {
            let memory = memory >> 20;
            return Err(usage(format!("--prefix-cache takes memory, of which this machine has {memory} MiB")));
        }
        Ok(ServeOptions {
            host: self.host.clone(),
            port: self.port,
            tls: self
                .tls_cert
                .clone()
                .zip(self.tls_key.clone())
                .map(|(certificate, key)| TlsFiles { certificate, key }),
            api_keys: self.api_keys()?,
            max_queue: self.max_queue,
            prefix_cache_bytes: self.prefix_cache,
            max_running_per_client: self.max_running_per_client,
            max_body_bytes: self.max_body << 20,
            max_connections: self.max_connections,
            request_timeout: seconds(self.request_timeout),
            drain_timeout: seconds(self.drain_timeout),
            client_timeout: seconds(self.client_timeout),
            cors_origins: self.cors_origin.clone(),
            unknown_fields: match self.unknown_fields {
                Unknown::Warn => UnknownFields::Warn,
                Unknown::Reject => UnknownFields::Reject,
            },
            log: match self.log_format {
                Log::Text => LogFormat::Text,
                Log::Json => LogFormat::Json,
                Log::Off => LogFormat::Off,
            },
            has_page: !self.no_ui,
            card_compatible: self.card_compatible,
            ..ServeOptions::default()
        })
    }

    fn api_keys(&self) -> anyhow::Result<Vec<String>> {
        let mut keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let cannot_read = || format!("cannot read {}", path.display());
            let mut text = String::new();
            let file = std::fs::File::open(path).with_context(cannot_read)?;
            // What is no regular file has no length of its own.
            file.take(MAX_KEY_FILE_BYTES + 1).read_to_string(&mut text).with_context(cannot_read)?;
            if text.len() as u64 > MAX_KEY_FILE_BYTES {
                bail!("{} is too long; a file of API keys has at most {MAX_KEY_FILE_BYTES} bytes", path.display());
            }
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            let before = keys.len();
            keys.extend(lines.map(str::to_owned));
            if keys.len() == before {
                bail!("{} has no API key: one per line", path.display());
            }
        }
        match keys.iter().find(|key| key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic())) {
            Some(_) => Err(usage("an API key has at least one character, all of them printable ASCII and no spaces")),
            None => Ok(keys),
        }
    }
}

/// Says what to paste where.
fn println_hint(server: &Server, url: &str, has_key: bool) {
    let names = server.model_names();
    let name = names.first().map_or("", String::as_str);
    let key = if has_key { " -H \"Authorization: Bearer $KEY\"" } else { "" };
    let json = serde_json::json!({ "model": name, "messages": [{ "role": "user", "content": "Hello!" }] });
    let json = shell_word(Path::new(&json.to_string()));
    term::note(format!("OpenAI clients: base URL {url}/v1, model {name}"));
    term::note(format!("try: curl {url}/v1/chat/completions{key} -d {json}"));
}

fn announce(event: &ServeEvent) {
    match event {
        ServeEvent::Ready { model, seconds } => term::note(format!("{model} is ready ({seconds} s)")),
        ServeEvent::Failed { model, reason } => term::error(format!("{model} cannot be served: {reason}")),
        ServeEvent::Draining { requests } => {
            let requests = term::plural(*requests, "request");
            term::note(format!("stopping: {requests} to finish; a second signal ends them"));
        }
        _ => {}
    }
}

/// Tells the server to stop at the first SIGTERM, SIGINT or SIGHUP; the second ends the process.
fn stop_signals() -> anyhow::Result<StopSignal> {
    let stop = StopSignal::default();
    let sent = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot handle signals")?;
    let guard = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
    drop(guard);
    std::thread::spawn(move || {
        runtime.block_on(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                    _ = hangup.recv() => {}
                }
                if !sent.send() {
                    std::process::exit(130);
                }
            }
        });
    });
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_names_and_origins_are_checked() {
        assert_eq!(
            [host("[::1]"), host("::"), host("localhost")],
            [Ok("::1".into()), Ok("::".into()), Ok("localhost".into())]
        );
        assert!(host("").is_err() && host("[]").is_err());
        assert!(model_name("nvidia/Nemotron 3").is_ok());
        assert!(model_name("").is_err() && model_name(" ").is_err() && model_name("a\nb").is_err());
        for good in ["*", "https://example.org", "http://localhost:3000", "http://[::1]:3000", "chrome-extension://abc"]
        {
            assert_eq!(origin(good), Ok(good.to_owned()));
        }
        assert_eq!(origin("https://Example.org"), Ok("https://example.org".to_owned()), "as browsers send it");
        for bad in [
            "",
            "foo",
            "example.org",
            "https://",
            "://x",
            "https://example.org/",
            "https://a/b",
            "https://a b",
            "http://u@h",
        ] {
            assert!(origin(bad).is_err(), "{bad}");
        }
    }
}
