//! Prometheus metrics, in its text format.
//!
//! Gateways read four metrics by the names that vLLM gave them. Their colon is allowed, but by convention it is for
//! recording rules, and `promtool check metrics` reports it. So each of them is here twice, and `?names=aotron` leaves
//! the gateways' names out: who scrapes for people takes that, and a gateway needs no setting.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::runtime::{Completion, EngineStatus, FinishReason, PrefixCacheStatus};

/// Bounds of durations in seconds: from a fast prefill to a long answer.
const SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];
/// Bounds of the time per token in seconds, close where models of this size decode: 5 to 200 ms.
const TOKEN_SECONDS: [f64; 18] =
    [0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 5.0];
/// Bounds of numbers of tokens.
const TOKENS: [f64; 13] = [1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabels {
    model_name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    model_name: String,
    finished_reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReuseLabels {
    model_name: String,
    source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabels {
    model_name: String,
    block_size: String,
    num_gpu_blocks: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResponseLabels {
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
}

/// Metrics of the prefix caches.
#[derive(Debug, Default)]
struct PrefixCacheMetrics {
    bytes: Family<ModelLabels, Gauge>,
    limit_bytes: Family<ModelLabels, Gauge>,
    blocks: Family<ModelLabels, Gauge>,
    stored_blocks: Family<ModelLabels, Counter>,
    evicted_blocks: Family<ModelLabels, Counter>,
    hits: Family<ReuseLabels, Counter>,
    reused_tokens: Family<ReuseLabels, Counter>,
}

impl PrefixCacheMetrics {
    fn register(&self, r: &mut Registry) {
        r.register("aotron_prefix_cache_bytes", "Memory of blocks outside of the slots", self.bytes.clone());
        r.register("aotron_prefix_cache_limit_bytes", "Limit on that memory", self.limit_bytes.clone());
        r.register("aotron_prefix_cache_blocks", "Blocks outside of the slots", self.blocks.clone());
        r.register("aotron_prefix_cache_stored_blocks", "Blocks stored", self.stored_blocks.clone());
        r.register("aotron_prefix_cache_evicted_blocks", "Blocks that gave way to others", self.evicted_blocks.clone());
        r.register("aotron_prefix_cache_hits", "Requests that reused tokens, by their source", self.hits.clone());
        let tokens = self.reused_tokens.clone();
        r.register(
            "aotron_prefix_cache_reused_tokens",
            "Prompt tokens that were not computed, by their source",
            tokens,
        );
    }

    fn observe(&self, labels: &ModelLabels, status: &PrefixCacheStatus) {
        self.bytes.get_or_create(labels).set(status.bytes as i64);
        self.limit_bytes.get_or_create(labels).set(status.limit_bytes as i64);
        self.blocks.get_or_create(labels).set(status.blocks as i64);
        // The engine counts; what is here only follows.
        let follow = |counter: &Counter, count: u64| {
            counter.inner().fetch_max(count, Ordering::Relaxed);
        };
        follow(&self.stored_blocks.get_or_create(labels), status.stored_blocks);
        follow(&self.evicted_blocks.get_or_create(labels), status.evicted_blocks);
        let sources =
            [("slot", status.from_slot), ("other_slot", status.from_other_slot), ("blocks", status.from_blocks)];
        for (source, reuse) in sources {
            let labels = ReuseLabels { model_name: labels.model_name.clone(), source };
            follow(&self.hits.get_or_create(&labels), reuse.requests);
            follow(&self.reused_tokens.get_or_create(&labels), reuse.tokens);
        }
    }
}

/// All metrics of a server.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    /// The names that gateways read.
    gateway_registry: Registry,
    build: Family<BuildLabels, Gauge>,
    resident_bytes: Gauge,
    open_files: Gauge,
    started: Gauge<f64, AtomicU64>,
    responses: Family<ResponseLabels, Counter>,
    slots: Family<ModelLabels, Gauge>,
    queued: Family<ModelLabels, Gauge>,
    running: Family<ModelLabels, Gauge>,
    cache_usage: Family<ModelLabels, Gauge<f64, AtomicU64>>,
    cache_config: Family<CacheLabels, Gauge>,
    ready: Family<ModelLabels, Gauge>,
    prompt_tokens: Family<ModelLabels, Counter>,
    cached_tokens: Family<ModelLabels, Counter>,
    generated_tokens: Family<ModelLabels, Counter>,
    requests: Family<FinishLabels, Counter>,
    refused: Family<ModelLabels, Counter>,
    queue_seconds: Family<ModelLabels, Histogram>,
    first_token_seconds: Family<ModelLabels, Histogram>,
    token_seconds: Family<ModelLabels, Histogram>,
    request_seconds: Family<ModelLabels, Histogram>,
    request_prompt_tokens: Family<ModelLabels, Histogram>,
    request_generated_tokens: Family<ModelLabels, Histogram>,
    in_flight: Family<ModelLabels, Gauge>,
    prefix_cache: PrefixCacheMetrics,
}

/// The metrics of one model.
#[derive(Debug)]
pub(super) struct ModelMetrics {
    model: String,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    generated_tokens: Counter,
    requests: Family<FinishLabels, Counter>,
    refused: Counter,
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    token_seconds: Histogram,
    request_seconds: Histogram,
    request_prompt_tokens: Histogram,
    request_generated_tokens: Histogram,
    in_flight: Gauge,
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

fn token_seconds() -> Histogram {
    Histogram::new(TOKEN_SECONDS)
}

fn tokens() -> Histogram {
    Histogram::new(TOKENS)
}

impl Metrics {
    pub fn new() -> Metrics {
        let histogram = |new: fn() -> Histogram| Family::<ModelLabels, Histogram>::new_with_constructor(new);
        let mut metrics = Metrics {
            registry: Registry::default(),
            gateway_registry: Registry::default(),
            build: Family::default(),
            resident_bytes: Gauge::default(),
            open_files: Gauge::default(),
            started: Gauge::default(),
            responses: Family::default(),
            slots: Family::default(),
            queued: Family::default(),
            running: Family::default(),
            cache_usage: Family::default(),
            cache_config: Family::default(),
            ready: Family::default(),
            prompt_tokens: Family::default(),
            cached_tokens: Family::default(),
            generated_tokens: Family::default(),
            requests: Family::default(),
            refused: Family::default(),
            queue_seconds: histogram(seconds),
            first_token_seconds: histogram(seconds),
            token_seconds: histogram(token_seconds),
            request_seconds: histogram(seconds),
            request_prompt_tokens: histogram(tokens),
            request_generated_tokens: histogram(tokens),
            in_flight: Family::default(),
            prefix_cache: PrefixCacheMetrics::default(),
        };
        metrics.register();
        metrics.build.get_or_create(&BuildLabels { version: env!("CARGO_PKG_VERSION") }).set(1);
        metrics.started.set(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()));
        metrics
    }

    fn register(&mut self) {
        let g = &mut self.gateway_registry;
        g.register("vllm:num_requests_waiting", "Requests that wait for a slot", self.queued.clone());
        g.register("vllm:num_requests_running", "Requests that hold a slot", self.running.clone());
        g.register("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", self.cache_usage.clone());
        g.register("vllm:cache_config_info", "The KV cache: tokens per block, blocks", self.cache_config.clone());
        let r = &mut self.registry;
        r.register("aotron_build_info", "1, with the version", self.build.clone());
        r.register("process_resident_memory_bytes", "Resident memory", self.resident_bytes.clone());
        r.register("process_open_fds", "Open file descriptors", self.open_files.clone());
        r.register("process_start_time_seconds", "When the server started, since 1970", self.started.clone());
        r.register(
            "aotron_http_responses",
            "Responses by route and status; 499: the client left",
            self.responses.clone(),
        );
        r.register("aotron_requests_waiting", "Requests that wait for a slot", self.queued.clone());
        r.register("aotron_requests_running", "Requests that hold a slot", self.running.clone());
        r.register("aotron_slots", "Requests that can run at once", self.slots.clone());
        r.register("aotron_kv_cache_usage_ratio", "Share of the KV cache in use", self.cache_usage.clone());
        r.register("aotron_model_ready", "1 once the model answers", self.ready.clone());
        r.register("aotron_prompt_tokens", "Prompt tokens of finished requests", self.prompt_tokens.clone());
        r.register("aotron_cached_prompt_tokens", "Those of them found in the KV cache", self.cached_tokens.clone());
        r.register("aotron_generated_tokens", "Generated tokens of finished requests", self.generated_tokens.clone());
        r.register("aotron_requests", "Requests by the reason of their end", self.requests.clone());
        r.register("aotron_requests_refused", "Requests refused because the queue was full", self.refused.clone());
        r.register("aotron_requests_in_flight", "Requests submitted and not over", self.in_flight.clone());
        self.prefix_cache.register(r);
        let unit = || Unit::Seconds;
        r.register_with_unit("aotron_queue", "Time in the queue", unit(), self.queue_seconds.clone());
        let first = self.first_token_seconds.clone();
        r.register_with_unit(
            "aotron_time_to_first_token",
            "Time to the first token, the queue's included",
            unit(),
            first,
        );
        r.register_with_unit("aotron_inter_token", "Mean time per further token", unit(), self.token_seconds.clone());
        r.register_with_unit("aotron_request", "Time of a whole request", unit(), self.request_seconds.clone());
        let prompt = self.request_prompt_tokens.clone();
        r.register("aotron_request_prompt_tokens", "Prompt tokens of a request", prompt);
        let generated = self.request_generated_tokens.clone();
        r.register("aotron_request_generated_tokens", "Generated tokens of a request", generated);
    }

    /// The metrics of a model.
    pub fn of_model(&self, name: &str) -> ModelMetrics {
        let labels = ModelLabels { model_name: name.to_owned() };
        ModelMetrics {
            model: name.to_owned(),
            prompt_tokens: self.prompt_tokens.get_or_create(&labels).clone(),
            cached_tokens: self.cached_tokens.get_or_create(&labels).clone(),
            generated_tokens: self.generated_tokens.get_or_create(&labels).clone(),
            requests: self.requests.clone(),
            refused: self.refused.get_or_create(&labels).clone(),
            queue_seconds: self.queue_seconds.get_or_create(&labels).clone(),
            first_token_seconds: self.first_token_seconds.get_or_create(&labels).clone(),
            token_seconds: self.token_seconds.get_or_create(&labels).clone(),
            request_seconds: self.request_seconds.get_or_create(&labels).clone(),
            request_prompt_tokens: self.request_prompt_tokens.get_or_create(&labels).clone(),
            request_generated_tokens: self.request_generated_tokens.get_or_create(&labels).clone(),
            in_flight: self.in_flight.get_or_create(&labels).clone(),
        }
    }

    /// Sets the gauges of a model from its engine's load; `kv_capacity` is in slots and tokens per slot.
    pub fn observe(&self, name: &str, status: Option<EngineStatus>, kv_capacity: Option<(usize, usize)>) {
        let labels = ModelLabels { model_name: name.to_owned() };
        let (running, queued, kv_tokens) = status.map_or((0, 0, 0), |s| (s.running, s.queued, s.kv_tokens));
        self.running.get_or_create(&labels).set(running as i64);
        self.queued.get_or_create(&labels).set(queued as i64);
        self.ready.get_or_create(&labels).set(i64::from(status.is_some_and(|status| status.is_open)));
        if let Some(status) = &status {
            self.prefix_cache.observe(&labels, &status.prefix_cache);
        }
        if let Some((slots, tokens)) = kv_capacity {
            self.slots.get_or_create(&labels).set(slots as i64);
            let usage = kv_tokens as f64 / (slots * tokens).max(1) as f64;
            self.cache_usage.get_or_create(&labels).set(usage);
            let labels = CacheLabels {
                model_name: name.to_owned(),
                block_size: tokens.to_string(),
                num_gpu_blocks: slots.to_string(),
            };
            self.cache_config.get_or_create(&labels).set(1);
        }
    }

    /// Counts a response. `route` is one of the router's, so that clients cannot make up more.
    pub fn responded(&self, route: &str, status: u16) {
        self.responses.get_or_create(&ResponseLabels { route: route.to_owned(), status }).inc();
    }

    /// The metrics in version 0.0.4 of the text format; with the names that gateways read, if `for_gateways`.
    pub fn text(&self, for_gateways: bool) -> String {
        // Where the system does not tell, they stay 0.
        self.resident_bytes.set(resident_bytes().unwrap_or(0));
        self.open_files.set(std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as i64));
        let mut text = String::new();
        let mut encoded = encode_registry(&mut text, &self.registry);
        if for_gateways {
            encoded = encoded.and_then(|()| encode_registry(&mut text, &self.gateway_registry));
        }
        match encoded {
            Ok(()) => prometheus_text(&text),
            Err(_) => "# the metrics cannot be written\n".into(),
        }
    }
}

/// Resident memory of this process.
fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Turns OpenMetrics, which describes a counter without its `_total`, into Prometheus' own format, which describes each
/// series by its name and has no units.
fn prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 256);
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, words)) = help.take() {
                let _ = writeln!(text, "# HELP {name}{suffix} {words}");
            }
            let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with('#') {
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

impl ModelMetrics {
    fn ended(&self, reason: &'static str) {
        self.in_flight.dec();
        let labels = FinishLabels { model_name: self.model.clone(), finished_reason: reason };
        self.requests.get_or_create(&labels).inc();
    }

    pub fn started(&self) {
        self.in_flight.inc();
    }

    pub fn refused(&self) {
        self.refused.inc();
    }

    pub fn failed(&self) {
        self.ended("error");
    }

    pub fn cancelled(&self) {
        self.ended("abort");
    }

    pub fn finished(&self, completion: &Completion, seconds: f64) {
        self.ended(match completion.finish_reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
        });
        let Completion { prompt_tokens, reused_tokens, completion_tokens, timings, .. } = completion;
        self.prompt_tokens.inc_by(*prompt_tokens as u64);
        self.cached_tokens.inc_by(*reused_tokens as u64);
        self.generated_tokens.inc_by(*completion_tokens as u64);
        self.queue_seconds.observe(timings.queue_seconds);
        self.first_token_seconds.observe(timings.queue_seconds + timings.prefill_seconds);
        if timings.decode_tokens > 0 {
            self.token_seconds.observe(timings.decode_seconds / timings.decode_tokens as f64);
        }
        self.request_seconds.observe(seconds);
        self.request_prompt_tokens.observe(*prompt_tokens as f64);
        self.request_generated_tokens.observe(*completion_tokens as f64);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_series_is_described_by_its_name_and_gateways_names_can_be_left_out() {
        let metrics = Metrics::new();
        let model = metrics.of_model("m");
        model.started();
        model.failed();
        metrics.responded("/v1/completions", 500);
        metrics.observe("m", None, Some((8, 512)));
        let text = metrics.text(true);
        let described = |word: &str| -> HashSet<&str> {
            let lines = text.lines().filter_map(|line| line.strip_prefix("# ")?.strip_prefix(word)?.strip_prefix(' '));
            lines.filter_map(|line| line.split(' ').next()).collect()
        };
        let (helps, types) = (described("HELP"), described("TYPE"));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let family = of_histogram.filter(|family| types.contains(family)).unwrap_or(name);
            assert!(helps.contains(family) && types.contains(family), "{line}");
        }
        for line in [
            "aotron_http_responses_total{route=\"/v1/completions\",status=\"500\"} 1",
            "aotron_requests_total{model_name=\"m\",finished_reason=\"error\"} 1",
            "aotron_slots{model_name=\"m\"} 8",
            "vllm:cache_config_info{model_name=\"m\",block_size=\"512\",num_gpu_blocks=\"8\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(metrics.resident_bytes.get() > 1 << 20 && metrics.open_files.get() > 2, "{text}");
        let own = metrics.text(false);
        assert!(!own.contains("vllm:") && text.starts_with(own.split("process_resident").next().unwrap()));
    }
}
