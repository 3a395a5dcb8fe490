//! Prometheus metrics.

use std::fmt::Write;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::runtime::{Completion, EngineStatus, FinishReason};

/// Bounds of durations in seconds: from a fast step to a long answer.
const SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];
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
struct CacheLabels {
    model_name: String,
    block_size: String,
    num_gpu_blocks: String,
}

/// All metrics of a server.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
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

fn tokens() -> Histogram {
    Histogram::new(TOKENS)
}

impl Metrics {
    pub fn new() -> Metrics {
        let histogram = |new: fn() -> Histogram| Family::<ModelLabels, Histogram>::new_with_constructor(new);
        let mut metrics = Metrics {
            registry: Registry::default(),
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
            token_seconds: histogram(seconds),
            request_seconds: histogram(seconds),
            request_prompt_tokens: histogram(tokens),
            request_generated_tokens: histogram(tokens),
            in_flight: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("vllm:num_requests_waiting", "Requests that wait for a slot", self.queued.clone());
        r.register("vllm:num_requests_running", "Requests that hold a slot", self.running.clone());
        r.register("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", self.cache_usage.clone());
        r.register("vllm:cache_config_info", "The KV cache: tokens per block, blocks", self.cache_config.clone());
        r.register("aotron_model_ready", "1 once the model answers", self.ready.clone());
        r.register("aotron_prompt_tokens", "Prompt tokens of finished requests", self.prompt_tokens.clone());
        r.register("aotron_cached_prompt_tokens", "Those of them found in the KV cache", self.cached_tokens.clone());
        r.register("aotron_generated_tokens", "Generated tokens of finished requests", self.generated_tokens.clone());
        r.register("aotron_requests", "Requests by the reason of their end", self.requests.clone());
        r.register("aotron_requests_refused", "Requests refused because the queue was full", self.refused.clone());
        r.register("aotron_requests_in_flight", "Requests submitted and not over", self.in_flight.clone());
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
        if let Some((slots, tokens)) = kv_capacity {
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

    /// The metrics in the text form.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            let _ = write!(text, "# the metrics cannot be written");
        }
        text
    }
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
