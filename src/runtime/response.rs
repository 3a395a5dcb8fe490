//! The answer to one request of an engine, on the thread that asked for it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

use super::batcher::Event;
use super::engine::{EngineHandle, Ticket};
use super::request::Completion;
use crate::error::{Error, Result};

/// The answer to a request, as it is computed: an iterator over pieces of text, none of them empty, which together are
/// the completion's text. An error is its last item. Dropping it before its end cancels the request and frees its place.
///
/// A slow reader slows nobody else down: what it has not read yet is kept, which is at most one short piece for each of
/// the request's `max_tokens`.
#[derive(Debug)]
pub struct ResponseStream {
    /// None once the request is over.
    ticket: Option<Ticket>,
    handle: EngineHandle,
    events: Receiver<Event>,
    completion: Option<Completion>,
}

impl ResponseStream {
    pub(super) fn open(
        accept: impl FnOnce(Box<dyn FnMut(Event) -> bool + Send>) -> Result<Ticket>,
    ) -> Result<ResponseStream> {
        let (sender, events) = channel();
        let ticket = accept(Box::new(move |event| sender.send(event).is_ok()))?;
        Ok(ResponseStream { handle: ticket.engine().clone(), ticket: Some(ticket), events, completion: None })
    }

    /// Waits for the next event; `None` after the last.
    pub fn recv(&mut self) -> Option<Event> {
        self.ticket.as_ref()?;
        let received = self.events.recv();
        Some(self.seen(received.unwrap_or_else(|_| self.lost())))
    }

    /// Waits for the next event, but no longer than `timeout`: `None` if there is none by then, or after the last, which
    /// [`ResponseStream::is_over`] tells apart.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Option<Event> {
        self.ticket.as_ref()?;
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(self.seen(event)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.seen(self.lost())),
        }
    }

    /// The next event if it is there already.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.ticket.as_ref()?;
        match self.events.try_recv() {
            Ok(event) => Some(self.seen(event)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(self.seen(self.lost())),
        }
    }

    /// Whether the last event was received.
    pub fn is_over(&self) -> bool {
        self.ticket.is_none()
    }

    /// Waits for the end and returns the completion, text and all. Pieces that were not read are only in there.
    ///
    /// # Errors
    /// The request's: [`Error::Numerics`], what the executor reported, [`Error::EngineStopped`]. [`Error::Request`] if
    /// that was received before.
    pub fn wait(mut self) -> Result<Completion> {
        while let Some(event) = self.recv() {
            if let Event::Failed(error) = event {
                return Err(unshared(error));
            }
        }
        let failed = || Error::Request("the request has failed; its error was received before".into());
        self.completion.take().ok_or_else(failed)
    }

    /// The completion, once the request is over and has not failed.
    pub fn completion(&self) -> Option<&Completion> {
        self.completion.as_ref()
    }

    /// Takes note of an event's being the last.
    fn seen(&mut self, event: Event) -> Event {
        match &event {
            Event::Text(_) => return event,
            Event::Done(completion) => self.completion = Some(completion.clone()),
            Event::Failed(_) => {}
        }
        self.ticket = None;
        event
    }

    /// The event for an engine that is gone without a word.
    fn lost(&self) -> Event {
        Event::Failed(Arc::new(self.handle.stop_error()))
    }
}

impl Iterator for ResponseStream {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        match self.recv()? {
            Event::Text(text) => Some(Ok(text)),
            Event::Done(_) => None,
            Event::Failed(error) => Some(Err(unshared(error))),
        }
    }
}

/// An error that is no one else's, or a share of one.
fn unshared(error: Arc<Error>) -> Error {
    Arc::try_unwrap(error).unwrap_or_else(Error::Shared)
}
