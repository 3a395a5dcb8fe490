//! A request to an engine, and its events on the server's side.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc::{Receiver, UnboundedReceiver, channel, unbounded_channel};
use tokio::task::JoinSet;

use super::error::ApiError;
use super::metrics::ModelMetrics;
use crate::error::Error;
use crate::runtime::{Completion, EngineHandle, Event, GenerationRequest, Ticket};

/// The answer to one request of an engine. Dropping it cancels the request.
pub(super) struct Answer {
    /// At most a few events per token of the request's `max_tokens`, so their number is bounded.
    events: UnboundedReceiver<Event>,
    _ticket: Ticket,
    metrics: Arc<ModelMetrics>,
    /// Until the last event.
    submitted: Option<Instant>,
}

impl Answer {
    /// Submits a request.
    pub fn submit(
        engine: &EngineHandle,
        metrics: &Arc<ModelMetrics>,
        request: GenerationRequest,
    ) -> Result<Answer, ApiError> {
        let (sender, events) = unbounded_channel();
        let ticket = engine.submit_to(request, move |event| sender.send(event).is_ok()).inspect_err(|error| {
            if matches!(error, Error::QueueFull { .. }) {
                metrics.refused();
            }
        })?;
        metrics.started();
        Ok(Answer { events, _ticket: ticket, metrics: metrics.clone(), submitted: Some(Instant::now()) })
    }

    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Option<Event> {
        self.submitted?;
        let lost = || Event::Failed(Arc::new(Error::EngineStopped { reason: String::new() }));
        let event = self.events.recv().await.unwrap_or_else(lost);
        if let Event::Done(_) | Event::Failed(_) = event {
            let seconds = self.submitted.take().map_or(0.0, |at| at.elapsed().as_secs_f64());
            match &event {
                Event::Done(completion) => self.metrics.finished(completion, seconds),
                _ => self.metrics.failed(),
            }
        }
        Some(event)
    }

    /// Waits for the whole answer.
    pub async fn completion(mut self) -> Result<Completion, ApiError> {
        loop {
            match self.next().await {
                Some(Event::Done(completion)) => return Ok(completion),
                Some(Event::Failed(error)) => {
                    log_failure(&error);
                    return Err(ApiError::from(&*error));
                }
                Some(_) => {}
                None => return Err(ApiError::internal()),
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.submitted.is_some() {
            self.metrics.cancelled();
        }
    }
}

/// The events of several answers as they come, each with its answer's index. Dropping it cancels those that are not over.
pub(super) struct MergedAnswers {
    events: Receiver<(usize, Event)>,
    _forwarders: JoinSet<()>,
}

impl MergedAnswers {
    pub fn new(answers: Vec<Answer>) -> MergedAnswers {
        let (sender, events) = channel(answers.len().max(1));
        let mut forwarders = JoinSet::new();
        for (index, mut answer) in answers.into_iter().enumerate() {
            let sender = sender.clone();
            forwarders.spawn(async move {
                while let Some(event) = answer.next().await {
                    if sender.send((index, event)).await.is_err() {
                        return;
                    }
                }
            });
        }
        MergedAnswers { events, _forwarders: forwarders }
    }

    /// The next event; `None` after the last of all answers.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        self.events.recv().await
    }
}

/// Logs a failure that is not the client's.
pub(super) fn log_failure(error: &Error) {
    if ApiError::from(error).status.is_server_error() {
        tracing::error!(target: "aotron::serve", "a request failed: {error}");
    }
}
