//! The answer to one request of an engine, received by the thread that submitted it.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

use super::batcher::Event;
use super::engine::{EngineHandle, Ticket};
use super::request::Completion;
use crate::error::{Error, Result};

/// The answer to a request, as it is computed: an iterator over pieces of text. No piece is empty, and together they
/// are the completion's text. An error is the last item. Dropping the stream before its end cancels the request and
/// frees its slot.
///
/// A slow reader does not slow anybody else down: unread pieces are buffered, at most one short piece per token of the
/// request's `max_tokens`.
#[derive(Debug)]
pub struct ResponseStream {
    /// `None` once the request is over.
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

    /// Waits for the next event for at most `timeout`. Returns `None` on a timeout and after the last event;
    /// [`ResponseStream::is_over`] tells the two apart.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Option<Event> {
        self.ticket.as_ref()?;
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(self.seen(event)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(self.seen(self.lost())),
        }
    }

    /// The next event, if there is one already.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.ticket.as_ref()?;
        match self.events.try_recv() {
            Ok(event) => Some(self.seen(event)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(self.seen(self.lost())),
        }
    }

    /// Returns true once the last event was received.
    pub fn is_over(&self) -> bool {
        self.ticket.is_none()
    }

    /// Waits for the end and returns the completion, whose text includes any unread pieces.
    ///
    /// # Errors
    /// The error of the request: [`Error::Numerics`], [`Error::EngineStopped`], or whatever the executor reports.
    /// [`Error::Request`] if that was received before.
    pub fn wait(mut self) -> Result<Completion> {
        while let Some(event) = self.recv() {
            if let Event::Failed(error) = event {
                return Err(unshared(error));
            }
        }
        let failed = || Error::Request("the request has failed; its error was received before".into());
        self.completion.take().ok_or_else(failed)
    }

    /// The completion, once the request has finished without an error.
    pub fn completion(&self) -> Option<&Completion> {
        self.completion.as_ref()
    }

    /// Records that the request is over if this is its last event.
    fn seen(&mut self, event: Event) -> Event {
        match &event {
            Event::Prompt(_) | Event::Token(_) | Event::Text(_) => return event,
            Event::Done(completion) => self.completion = Some(completion.clone()),
            Event::Failed(_) => {}
        }
        self.ticket = None;
        event
    }

    /// The event to report if the engine's thread is gone without sending a last one.
    fn lost(&self) -> Event {
        Event::Failed(Arc::new(self.handle.stop_error()))
    }
}

impl Iterator for ResponseStream {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        loop {
            match self.recv()? {
                Event::Prompt(_) | Event::Token(_) => {}
                Event::Text(text) => return Some(Ok(text)),
                Event::Done(_) => return None,
                Event::Failed(error) => return Some(Err(unshared(error))),
            }
        }
    }
}

/// Unwraps the error if nobody else holds it, and wraps it in [`Error::Shared`] otherwise.
fn unshared(error: Arc<Error>) -> Error {
    Arc::try_unwrap(error).unwrap_or_else(Error::Shared)
}
