//! Options of an engine.

/// Options of an [`Engine`](super::Engine).
#[derive(Debug, Clone)]
pub struct EngineOptions {
    pub(super) max_queued: usize,
    pub(super) prefix_cache_bytes: Option<usize>,
    pub(super) max_running_per_client: usize,
}

impl EngineOptions {
    /// Sets the limit on queued requests; more are refused. The default is 64.
    #[must_use]
    pub fn max_queued(mut self, max_queued: usize) -> EngineOptions {
        self.max_queued = max_queued;
        self
    }

    /// Sets the limit on keys and values that are kept of sequences that have lost their slot, in bytes, as
    /// [`Batcher::prefix_cache_bytes`](super::Batcher::prefix_cache_bytes) does. The default is as much as the KV cache
    /// itself, but at most a quarter of the memory that is left once that is in use; 0 keeps none.
    #[must_use]
    pub fn prefix_cache_bytes(mut self, limit_bytes: usize) -> EngineOptions {
        self.prefix_cache_bytes = Some(limit_bytes);
        self
    }

    /// Sets the limit on the slots that the requests of one [client](super::GenerationRequest::client) hold at a time, at
    /// least 1; its other requests wait, even beside free slots. By default there is none. Every sequence makes a step
    /// longer, so this bounds what one client can take from the others.
    #[must_use]
    pub fn max_running_per_client(mut self, max_running: usize) -> EngineOptions {
        self.max_running_per_client = max_running.max(1);
        self
    }
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { max_queued: 64, max_running_per_client: usize::MAX, prefix_cache_bytes: None }
    }
}
