//! The serving engine: a thread that owns a batcher, and handles to it for any number of other threads.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::batcher::{Batcher, Event, RequestId};
use super::generation::{Generation, OutputVocabulary};
use super::prefix_cache::{PrefixCacheStatus, default_limit_bytes};
use super::request::GenerationRequest;
use super::response::ResponseStream;
use crate::backend::{Executor, Limits};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

pub use self::options::EngineOptions;

mod options;
#[cfg(test)]
mod tests;

/// Stack of the engine's thread, of which only what is used takes memory.
const STACK_BYTES: usize = 64 << 20;

/// The requests that an engine still serves after it was told to stop. New ones are refused in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainMode {
    /// All accepted requests, including the queued ones.
    Accepted,
    /// Requests that hold a slot; queued ones fail with [`Error::EngineStopped`].
    Running,
    /// None: all fail with [`Error::EngineStopped`] after the current step.
    Nothing,
}

/// An engine's load at one point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStatus {
    /// Requests that hold a slot, or are about to.
    pub running: usize,
    /// Requests that wait for a slot.
    pub queued: usize,
    /// Tokens in the KV cache of the running requests, as of the last step.
    pub kv_tokens: usize,
    /// The prefix cache, as of the last step.
    pub prefix_cache: PrefixCacheStatus,
    /// True if new requests are accepted, room permitting.
    pub is_open: bool,
}

/// Serves many requests together on a thread of its own, which owns a [`Batcher`].
///
/// Requests are submitted through an [`EngineHandle`], which can be cloned and used from any thread. They are validated
/// on the thread that submits them, and their text is encoded before that, so the engine's thread only runs steps. As
/// in a batcher, the tokens of a request do not depend on other requests.
///
/// Dropping the engine stops it with [`DrainMode::Nothing`].
///
/// ```no_run
/// use aotron::{DrainMode, Message, Model};
///
/// # fn main() -> aotron::Result<()> {
/// let model = Model::open("engines/tiny-chat")?;
/// let engine = model.engine()?;
/// let questions = ["What is the capital of France?", "What is 17 + 25?"];
/// std::thread::scope(|scope| {
///     for question in questions {
///         let (model, handle) = (model.clone(), engine.handle());
///         scope.spawn(move || -> aotron::Result<()> {
///             let request = model.chat_request(&[Message::user(question)])?;
///             let answer = handle.submit(request)?.wait()?;
///             println!("{question} {}", answer.text);
///             Ok(())
///         });
///     }
/// });
/// engine.shutdown(DrainMode::Accepted)
/// # }
/// ```
pub struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
}

/// A handle to an [`Engine`], for one thread or many.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<EngineShared>,
}

/// Receives a request's events on the engine's thread; returns false to end the request.
type EventSink = Box<dyn FnMut(Event) -> bool + Send>;

struct EngineShared {
    limits: Limits,
    vocabulary: OutputVocabulary,
    max_queued: usize,
    max_running_per_client: usize,
    state: Mutex<EngineState>,
    /// Signals the engine's thread that there is something to do.
    work: Condvar,
    /// Signals submitters that there may be room in the queue.
    room: Condvar,
}

#[derive(Default)]
struct EngineState {
    /// In the order of arrival.
    queue: VecDeque<Submission>,
    /// Tokens in the KV cache of the running requests.
    kv_tokens: usize,
    prefix_cache: PrefixCacheStatus,
    /// Numbers of running requests to cancel.
    cancelled: Vec<u64>,
    /// Accepted requests that are not finished, including those in the queue.
    outstanding: usize,
    next_number: u64,
    drain: Option<DrainMode>,
    /// Set once the thread has ended: the `reason` of [`Error::EngineStopped`].
    stopped: Option<String>,
}

struct Submission {
    number: u64,
    priority: i32,
    client: u64,
    generation: Generation,
    sink: EventSink,
}

impl EngineState {
    fn is_open(&self) -> bool {
        self.drain.is_none() && self.stopped.is_none()
    }

    /// Takes a request off a full queue to make room for one of a client with fewer: the newest of the client with the
    /// most, unless that is of a higher priority. So no client can keep the others out.
    fn evict_for(&mut self, client: u64, priority: i32) -> Option<Submission> {
        let mut waiting: HashMap<u64, usize> = HashMap::new();
        for submission in &self.queue {
            *waiting.entry(submission.client).or_default() += 1;
        }
        let own = waiting.get(&client).copied().unwrap_or(0);
        let (most, count) = waiting.into_iter().max_by_key(|(client, count)| (*count, *client))?;
        if count <= own + 1 {
            return None;
        }
        let newest = self.queue.iter().rposition(|s| s.client == most && s.priority >= priority)?;
        self.outstanding -= 1;
        self.queue.remove(newest)
    }

    fn stop_error(&self) -> Error {
        Error::EngineStopped { reason: self.stopped.clone().unwrap_or_default() }
    }
}

impl EngineShared {
    fn lock(&self) -> MutexGuard<'_, EngineState> {
        // Nothing panics while holding the lock, and the state is consistent between any two statements, so a poisoned
        // lock is safe to use.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Starts an engine over an executor that it owns. `tokenizer` is as in [`Session::new`](super::Session::new).
    ///
    /// # Errors
    /// [`Error::Request`] if the thread cannot be started.
    pub fn start(
        executor: Box<dyn Executor>,
        tokenizer: Option<Arc<Tokenizer>>,
        options: EngineOptions,
    ) -> Result<Engine> {
        let limits = executor.limits().clone();
        let vocabulary = OutputVocabulary::new(&limits, tokenizer.clone());
        let shared = Arc::new(EngineShared {
            limits,
            vocabulary,
            max_queued: options.max_queued,
            max_running_per_client: options.max_running_per_client,
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let prefix_cache_bytes = options.prefix_cache_bytes.unwrap_or_else(|| default_limit_bytes(&*executor));
        // The batcher's own queue stays unused: requests wait here until there is a slot for them.
        let batcher = Batcher::new(executor, tokenizer, 0).prefix_cache_bytes(prefix_cache_bytes);
        shared.lock().prefix_cache = batcher.prefix_cache_status();
        let worker = Worker { shared: shared.clone(), batcher, running: HashMap::new() };
        let thread = std::thread::Builder::new()
            .name("aotron-engine".into())
            // A constraint on an answer may recurse as deep as its source is long.
            .stack_size(STACK_BYTES)
            .spawn(move || worker.live())
            .map_err(|error| Error::Request(format!("cannot start the engine's thread: {error}")))?;
        Ok(Engine { handle: EngineHandle { shared }, thread: Some(thread) })
    }

    /// A handle for submitting requests.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Stops the engine and waits until it has served the requests that `mode` selects and its thread has ended.
    ///
    /// # Errors
    /// [`Error::EngineStopped`] with the reason, if it had already failed.
    pub fn shutdown(mut self, mode: DrainMode) -> Result<()> {
        self.handle.close(mode);
        self.join();
        let state = self.handle.shared.lock();
        match &state.stopped {
            Some(reason) if !reason.is_empty() => Err(state.stop_error()),
            _ => Ok(()),
        }
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic was caught on that thread and is reported as the reason.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.handle.close(DrainMode::Nothing);
        self.join();
    }
}

impl EngineHandle {
    /// Submits a request. The answer arrives through the returned stream; dropping the stream cancels the request.
    ///
    /// # Errors
    /// [`Error::QueueFull`] if the queue is full; [`Error::EngineStopped`] if the engine was told to stop or has
    /// failed; [`Error::Request`] or [`Error::PromptTooLong`] for a request that it cannot serve.
    pub fn submit(&self, request: GenerationRequest) -> Result<ResponseStream> {
        ResponseStream::open(|sink| self.accept(request, sink, false))
    }

    /// As [`EngineHandle::submit`], but blocks while the queue is full.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`], except [`Error::QueueFull`].
    pub fn submit_wait(&self, request: GenerationRequest) -> Result<ResponseStream> {
        ResponseStream::open(|sink| self.accept(request, sink, true))
    }

    /// As [`EngineHandle::submit`], but passes the request's events to `on_event`, which returns false to end the
    /// request. Use this to feed the channel of an async runtime. It is called on the engine's thread, so it must
    /// neither block nor panic. Dropping the returned ticket ends the request.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`].
    pub fn submit_to(
        &self,
        request: GenerationRequest,
        on_event: impl FnMut(Event) -> bool + Send + 'static,
    ) -> Result<Ticket> {
        self.accept(request, Box::new(on_event), false)
    }

    fn accept(&self, request: GenerationRequest, sink: EventSink, waits: bool) -> Result<Ticket> {
        let shared = &self.shared;
        let (priority, client) = (request.priority, request.client);
        let generation = Generation::new(request, &shared.limits, &shared.vocabulary)?;
        let slots = shared.limits.slots;
        let most = slots.saturating_add(shared.max_queued);
        let mut state = shared.lock();
        loop {
            if !state.is_open() {
                return Err(state.stop_error());
            }
            if state.outstanding < most {
                break;
            }
            let full = || Error::QueueFull { slots, queued: shared.max_queued };
            if let Some(evicted) = state.evict_for(client, priority) {
                // The sink is the caller's code, so it is called outside the lock.
                drop(state);
                let Submission { mut sink, .. } = evicted;
                sink(Event::Failed(Arc::new(full())));
                state = shared.lock();
                continue;
            }
            if !waits {
                return Err(full());
            }
            state = shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let number = state.next_number;
        state.next_number += 1;
        state.outstanding += 1;
        state.queue.push_back(Submission { number, priority, client, generation, sink });
        shared.work.notify_one();
        Ok(Ticket { handle: self.clone(), number })
    }

    /// Tells the engine to stop, without waiting for it. A later call can only reduce what is still served.
    pub fn close(&self, mode: DrainMode) {
        let mut state = self.shared.lock();
        state.drain = state.drain.max(Some(mode));
        self.shared.work.notify_one();
        self.shared.room.notify_all();
    }

    /// The engine's load.
    pub fn status(&self) -> EngineStatus {
        let state = self.shared.lock();
        // Queued requests count as running while there are fewer requests than slots, because they are about to get
        // one; unless there are slots that some of them may not have.
        let candidates = match self.shared.max_running_per_client {
            usize::MAX => state.outstanding,
            _ => state.outstanding.saturating_sub(state.queue.len()),
        };
        let running = candidates.min(self.shared.limits.slots);
        let (queued, kv_tokens) = (state.outstanding - running, state.kv_tokens);
        EngineStatus { running, queued, kv_tokens, prefix_cache: state.prefix_cache, is_open: state.is_open() }
    }

    /// The limits of the executor; its slots are the number of requests that run at once.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.shared.vocabulary.tokenizer()
    }

    /// The error of requests to an engine that has stopped.
    pub(crate) fn stop_error(&self) -> Error {
        self.shared.lock().stop_error()
    }

    fn cancel(&self, number: u64) {
        let mut state = self.shared.lock();
        let removed = match state.queue.iter().position(|waiting| waiting.number == number) {
            Some(index) => {
                state.outstanding -= 1;
                self.shared.room.notify_one();
                state.queue.remove(index)
            }
            None if state.stopped.is_some() => None,
            None => {
                state.cancelled.push(number);
                self.shared.work.notify_one();
                None
            }
        };
        drop(state);
        // Drop the sink, the caller's code, outside the lock.
        drop(removed);
    }
}

/// A request of an engine; dropping this cancels it, unless it is finished.
pub struct Ticket {
    handle: EngineHandle,
    number: u64,
}

impl Ticket {
    /// The engine that serves the request.
    pub fn engine(&self) -> &EngineHandle {
        &self.handle
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.handle.cancel(self.number);
    }
}

/// State of the engine's thread.
struct Worker {
    shared: Arc<EngineShared>,
    batcher: Batcher,
    running: HashMap<RequestId, Running>,
}

struct Running {
    number: u64,
    client: u64,
    sink: EventSink,
}

/// Work for one iteration of the engine's thread.
struct Work {
    admitted: Vec<Submission>,
    cancelled: Vec<u64>,
    /// Requests that will not be served any more.
    refused: Vec<Submission>,
    /// Requests whose deadline has passed.
    late: Vec<Submission>,
    ends: bool,
}

impl Worker {
    /// Runs until the engine is told to stop. Every request gets a last event, whatever happens.
    fn live(mut self) {
        let reason = catch_unwind(AssertUnwindSafe(|| self.serve()))
            .unwrap_or_else(|payload| Some(format!(": its thread panicked: {}", words_of_panic(&*payload))));
        let mut state = self.shared.lock();
        state.stopped = Some(reason.unwrap_or_default());
        let queued: Vec<EventSink> = state.queue.drain(..).map(|waiting| waiting.sink).collect();
        state.outstanding = 0;
        let error = Arc::new(state.stop_error());
        drop(state);
        self.shared.room.notify_all();
        for mut sink in self.running.drain().map(|(_, running)| running.sink).chain(queued) {
            // The panic may have come from one of these sinks.
            let _ = catch_unwind(AssertUnwindSafe(|| sink(Event::Failed(error.clone()))));
        }
    }

    /// Serves until it is told to stop. Returns the reason if it stops for another.
    fn serve(&mut self) -> Option<String> {
        loop {
            let Work { admitted, cancelled, refused, late, ends } = self.wait();
            for number in cancelled {
                let found = self.running.iter().find(|(_, running)| running.number == number).map(|(id, _)| *id);
                if let Some(id) = found {
                    self.batcher.cancel(id);
                    self.end(id);
                }
            }
            if !refused.is_empty() {
                let error = Arc::new(self.shared.lock().stop_error());
                for Submission { mut sink, .. } in refused {
                    sink(Event::Failed(error.clone()));
                    self.release();
                }
            }
            for Submission { mut sink, .. } in late {
                sink(Event::Failed(Arc::new(Error::DeadlineExceeded)));
                self.release();
            }
            if ends {
                return None;
            }
            for Submission { number, client, generation, sink, .. } in admitted {
                let id = self.batcher.enqueue(generation);
                self.running.insert(id, Running { number, client, sink });
            }
            let events = self.batcher.step();
            let (kv_tokens, prefix_cache) = (self.batcher.active_tokens(), self.batcher.prefix_cache_status());
            let mut state = self.shared.lock();
            (state.kv_tokens, state.prefix_cache) = (kv_tokens, prefix_cache);
            drop(state);
            // After that, so that whoever has its answer finds the load without it.
            for (id, event) in events {
                self.deliver(id, event);
            }
            if self.batcher.is_lost() {
                return Some(": its device is lost".into());
            }
        }
    }

    /// Blocks until there is something to do.
    fn wait(&self) -> Work {
        let mut state = self.shared.lock();
        loop {
            let mut refused = Vec::new();
            if state.drain >= Some(DrainMode::Running) {
                refused.extend(state.queue.drain(..));
            }
            let now = Instant::now();
            let is_late = |waiting: &mut Submission| waiting.generation.deadline().is_some_and(|end| end <= now);
            let late: Vec<Submission> = drain_where(&mut state.queue, is_late);
            let admitted = self.admit(&mut state.queue);
            let cancelled = std::mem::take(&mut state.cancelled);
            let is_done = admitted.is_empty() && self.running.is_empty() && state.queue.is_empty();
            let ends = state.drain == Some(DrainMode::Nothing) || (state.drain.is_some() && is_done);
            if ends || !is_done || !refused.is_empty() || !late.is_empty() {
                return Work { admitted, cancelled, refused, late, ends };
            }
            state = self.shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes requests off the queue for the free slots: those of the lowest priority number first; of equals, those of the
    /// client with the fewest running requests; of equals, those that came first. Requests of a client that has all the
    /// slots it may have are passed over.
    fn admit(&self, queue: &mut VecDeque<Submission>) -> Vec<Submission> {
        let free = self.shared.limits.slots.saturating_sub(self.running.len());
        let mut admitted: Vec<Submission> = Vec::new();
        while admitted.len() < free && !queue.is_empty() {
            let running = self.running.values().map(|running| running.client);
            let mut of_client: HashMap<u64, usize> = HashMap::new();
            for client in running.chain(admitted.iter().map(|submission| submission.client)) {
                *of_client.entry(client).or_default() += 1;
            }
            let running = |waiting: &Submission| of_client.get(&waiting.client).copied().unwrap_or(0);
            let next = queue
                .iter()
                .enumerate()
                .filter(|(_, waiting)| running(waiting) < self.shared.max_running_per_client)
                .min_by_key(|(_, waiting)| (waiting.priority, running(waiting), waiting.number))
                .map(|(index, _)| index);
            let Some(next) = next.and_then(|index| queue.remove(index)) else { break };
            admitted.push(next);
        }
        admitted
    }

    fn deliver(&mut self, id: RequestId, event: Event) {
        let Some(running) = self.running.get_mut(&id) else { return };
        let is_last = matches!(event, Event::Done(_) | Event::Failed(_));
        if is_last {
            // Make room first, because the receiver of this event may submit its next request at once.
            let sink = self.end(id);
            if let Some(mut sink) = sink {
                sink(event);
            }
        } else if !(running.sink)(event) {
            self.batcher.cancel(id);
            self.end(id);
        }
    }

    /// Removes a running request and makes room for another.
    fn end(&mut self, id: RequestId) -> Option<EventSink> {
        let running = self.running.remove(&id)?;
        self.release();
        Some(running.sink)
    }

    fn release(&self) {
        let mut state = self.shared.lock();
        state.outstanding = state.outstanding.saturating_sub(1);
        self.shared.room.notify_one();
    }
}

/// Removes the elements for which `is_wanted` holds, in order.
fn drain_where<T>(queue: &mut VecDeque<T>, mut is_wanted: impl FnMut(&mut T) -> bool) -> Vec<T> {
    let (mut taken, mut kept) = (Vec::new(), VecDeque::with_capacity(queue.len()));
    for mut element in queue.drain(..) {
        if is_wanted(&mut element) { taken.push(element) } else { kept.push_back(element) }
    }
    *queue = kept;
    taken
}

/// The message of a panic.
pub(crate) fn words_of_panic(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("status", &self.handle.status()).finish_non_exhaustive()
    }
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("number", &self.number).finish_non_exhaustive()
    }
}
