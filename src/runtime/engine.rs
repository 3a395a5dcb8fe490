//! A thread that owns a batcher, and handles to it for any number of other threads.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::batcher::{Batcher, Event, RequestId};
use super::generation::{Generation, Vocabulary};
use super::request::GenerationRequest;
use super::response::ResponseStream;
use crate::backend::{Executor, Limits};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

#[cfg(test)]
mod tests;

/// Options of an [`Engine`].
#[derive(Debug, Clone)]
pub struct EngineOptions {
    max_queued: usize,
}

impl EngineOptions {
    /// The most requests that wait for a slot; one more is refused. The default is 64.
    #[must_use]
    pub fn max_queued(mut self, max_queued: usize) -> EngineOptions {
        self.max_queued = max_queued;
        self
    }
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { max_queued: 64 }
    }
}

/// Which requests an engine still serves when it is told to stop. It accepts no new ones in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainMode {
    /// All that it has accepted, those that wait included.
    Accepted,
    /// Those that have a slot; the ones that wait fail with [`Error::EngineStopped`].
    Running,
    /// None: all fail with [`Error::EngineStopped`] after the step that is being computed.
    Nothing,
}

/// An engine's load at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStatus {
    /// Requests that hold a slot, or are about to.
    pub running: usize,
    /// Requests that wait for one.
    pub queued: usize,
    /// Whether new requests are accepted, if there is room.
    pub is_open: bool,
}

/// Serves many requests together on a thread of its own, which owns a [`Batcher`].
///
/// Requests come through an [`EngineHandle`], which can be cloned and used from any thread. A request is checked on the
/// thread that submits it, and its text is encoded before that: the engine's thread only runs steps. As in a batcher, the
/// tokens of a request do not depend on what else runs.
///
/// Dropping the engine stops it as [`DrainMode::Nothing`] does.
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

/// A way to an [`Engine`], for one thread or many.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

/// Takes a request's events on the engine's thread; returns whether it wants more.
type Sink = Box<dyn FnMut(Event) -> bool + Send>;

struct Shared {
    limits: Limits,
    vocabulary: Vocabulary,
    max_queued: usize,
    state: Mutex<State>,
    /// There is something for the engine's thread to look at.
    work: Condvar,
    /// There may be room for another request.
    room: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Submission>,
    /// Numbers of running requests to end.
    cancelled: Vec<u64>,
    /// Requests that were accepted and are not over, those in the queue included.
    outstanding: usize,
    next_number: u64,
    drain: Option<DrainMode>,
    /// Why the thread is gone, in the words of [`Error::EngineStopped`].
    stopped: Option<String>,
}

struct Submission {
    number: u64,
    generation: Generation,
    sink: Sink,
}

impl State {
    fn is_open(&self) -> bool {
        self.drain.is_none() && self.stopped.is_none()
    }

    fn stop_error(&self) -> Error {
        Error::EngineStopped { reason: self.stopped.clone().unwrap_or_default() }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and what it guards is whole between any two lines.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// Starts an engine over an executor it owns. `tokenizer` as in [`Session::new`](super::Session::new).
    ///
    /// # Errors
    /// [`Error::Request`] if a thread cannot be started.
    pub fn start(
        executor: Box<dyn Executor>,
        tokenizer: Option<Arc<Tokenizer>>,
        options: EngineOptions,
    ) -> Result<Engine> {
        let limits = executor.limits().clone();
        let vocabulary = Vocabulary::new(&limits, tokenizer.clone());
        let shared = Arc::new(Shared {
            limits,
            vocabulary,
            max_queued: options.max_queued,
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        // The batcher never queues: requests wait here, and go to it when there is a slot.
        let worker =
            Worker { shared: shared.clone(), batcher: Batcher::new(executor, tokenizer, 0), running: HashMap::new() };
        let thread = std::thread::Builder::new()
            .name("aotron-engine".into())
            .spawn(move || worker.live())
            .map_err(|error| Error::Request(format!("cannot start the engine's thread: {error}")))?;
        Ok(Engine { handle: EngineHandle { shared }, thread: Some(thread) })
    }

    /// A handle, to submit requests with.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Stops the engine: waits until it has served what `mode` says and its thread has ended.
    ///
    /// # Errors
    /// [`Error::EngineStopped`] if it had stopped on its own before, with the reason.
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
            // A panic was caught there and is told as the reason.
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
    /// Submits a request. Its answer comes through the returned stream; dropping that cancels it.
    ///
    /// # Errors
    /// [`Error::QueueFull`] when as many wait as may; [`Error::EngineStopped`] when the engine was told to stop or has
    /// failed; [`Error::Request`] or [`Error::PromptTooLong`] for a request that it cannot serve.
    pub fn submit(&self, request: GenerationRequest) -> Result<ResponseStream> {
        ResponseStream::open(|sink| self.accept(request, sink, false))
    }

    /// As [`EngineHandle::submit`], but waits while the queue is full.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`], without [`Error::QueueFull`].
    pub fn submit_wait(&self, request: GenerationRequest) -> Result<ResponseStream> {
        ResponseStream::open(|sink| self.accept(request, sink, true))
    }

    /// As [`EngineHandle::submit`], but hands the request's events to `on_event`, which says whether it wants more. This
    /// is the way to an asynchronous runtime's channel. It is called on the engine's thread, so it must neither block
    /// nor panic. The request ends when the returned ticket is dropped.
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

    fn accept(&self, request: GenerationRequest, sink: Sink, waits: bool) -> Result<Ticket> {
        let shared = &self.shared;
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
            if !waits {
                return Err(Error::QueueFull { slots, queued: state.outstanding.saturating_sub(slots) });
            }
            state = shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let number = state.next_number;
        state.next_number += 1;
        state.outstanding += 1;
        state.queue.push_back(Submission { number, generation, sink });
        shared.work.notify_one();
        Ok(Ticket { handle: self.clone(), number })
    }

    /// Tells the engine to stop, and returns at once. A later call can only ask for less to be served.
    pub fn close(&self, mode: DrainMode) {
        let mut state = self.shared.lock();
        state.drain = state.drain.max(Some(mode));
        self.shared.work.notify_one();
        self.shared.room.notify_all();
    }

    /// The engine's load.
    pub fn status(&self) -> EngineStatus {
        let state = self.shared.lock();
        // A request in the queue has a slot waiting for it if there are fewer requests than slots.
        let running = state.outstanding.min(self.shared.limits.slots);
        EngineStatus { running, queued: state.outstanding - running, is_open: state.is_open() }
    }

    /// The limits of the executor; its slots are the requests that run at once.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.shared.vocabulary.tokenizer()
    }

    pub(super) fn stop_error(&self) -> Error {
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
        // Its sink is the caller's code, which is not run under the lock.
        drop(removed);
    }
}

/// A request of an engine, which is cancelled when this is dropped, if it is not over.
pub struct Ticket {
    handle: EngineHandle,
    number: u64,
}

impl Ticket {
    /// The engine that serves it.
    pub fn engine(&self) -> &EngineHandle {
        &self.handle
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.handle.cancel(self.number);
    }
}

/// The engine's thread.
struct Worker {
    shared: Arc<Shared>,
    batcher: Batcher,
    running: HashMap<RequestId, Running>,
}

struct Running {
    number: u64,
    sink: Sink,
}

/// Work for one turn of the engine's thread.
struct Work {
    admitted: Vec<Submission>,
    cancelled: Vec<u64>,
    /// Requests that are not served any more.
    refused: Vec<Submission>,
    ends: bool,
}

impl Worker {
    /// Runs until the engine is told to stop. Whatever happens, every request hears of its end.
    fn live(mut self) {
        let panicked = catch_unwind(AssertUnwindSafe(|| self.serve())).err();
        let reason = panicked.map(|payload| format!(": its thread panicked: {}", words_of(&*payload)));
        let mut state = self.shared.lock();
        state.stopped = Some(reason.unwrap_or_default());
        let queued: Vec<Sink> = state.queue.drain(..).map(|waiting| waiting.sink).collect();
        state.outstanding = 0;
        let error = Arc::new(state.stop_error());
        drop(state);
        self.shared.room.notify_all();
        for mut sink in self.running.drain().map(|(_, running)| running.sink).chain(queued) {
            // One of these may be what panicked.
            let _ = catch_unwind(AssertUnwindSafe(|| sink(Event::Failed(error.clone()))));
        }
    }

    fn serve(&mut self) {
        loop {
            let Work { admitted, cancelled, refused, ends } = self.wait();
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
            if ends {
                return;
            }
            for Submission { number, generation, sink } in admitted {
                let id = self.batcher.enqueue(generation);
                self.running.insert(id, Running { number, sink });
            }
            for (id, event) in self.batcher.step() {
                self.deliver(id, event);
            }
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Work {
        let mut state = self.shared.lock();
        loop {
            let mut refused = Vec::new();
            if state.drain >= Some(DrainMode::Running) {
                refused.extend(state.queue.drain(..));
            }
            let free = self.shared.limits.slots.saturating_sub(self.running.len()).min(state.queue.len());
            let admitted: Vec<Submission> = state.queue.drain(..free).collect();
            let cancelled = std::mem::take(&mut state.cancelled);
            let is_done = admitted.is_empty() && self.running.is_empty() && state.queue.is_empty();
            let ends = state.drain == Some(DrainMode::Nothing) || (state.drain.is_some() && is_done);
            if ends || !is_done || !refused.is_empty() {
                return Work { admitted, cancelled, refused, ends };
            }
            state = self.shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn deliver(&mut self, id: RequestId, event: Event) {
        let Some(running) = self.running.get_mut(&id) else { return };
        let is_last = matches!(event, Event::Done(_) | Event::Failed(_));
        if is_last {
            // Room first: who hears of the end may submit the next request at once.
            let sink = self.end(id);
            if let Some(mut sink) = sink {
                sink(event);
            }
        } else if !(running.sink)(event) {
            self.batcher.cancel(id);
            self.end(id);
        }
    }

    /// Forgets a running request, which makes room for another.
    fn end(&mut self, id: RequestId) -> Option<Sink> {
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

/// The message of a panic.
fn words_of(payload: &(dyn Any + Send)) -> &str {
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
