//! Continuous batching: many requests over the slots of one executor.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use super::generation::{Generation, OutputVocabulary};
use super::request::{Completion, GenerationRequest};
use super::slots::Slots;
use crate::backend::{Chunk, Executor, Limits, NextToken, Rows, Step};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

#[cfg(test)]
mod tests;

/// Identifies a request within one batcher. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Progress of a request. [`Event::Done`] or [`Event::Failed`] is the last one.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// More text, never empty.
    Text(String),
    /// The request is finished.
    Done(Completion),
    /// The request failed. Shared, because a failed step fails every request in it.
    Failed(Arc<Error>),
}

/// Serves requests together, one forward step at a time. The result of a request does not depend on the others.
///
/// Requests take slots in the order they arrived, and wait while none is free or while the executor has no KV memory for
/// the most tokens that the next one may reach; those that have a slot never wait for memory. Steps alternate between prefill and
/// decode while there is work of both kinds, so a long prompt, computed `max_step_tokens` at a time, at most halves the
/// speed of requests that are decoding.
///
/// A request whose logits are not finite fails alone. If the executor itself reports an error, all requests that hold a
/// slot fail, the queued ones stay, and the batcher goes on with empty slots.
pub struct Batcher {
    executor: Box<dyn Executor>,
    vocabulary: OutputVocabulary,
    slots: Slots,
    /// Requests that hold a slot, oldest first, except that those decoded by the last step move to the end.
    active: Vec<Active>,
    queue: VecDeque<(RequestId, Generation)>,
    max_queued: usize,
    next_id: u64,
    last_was_prefill: bool,
}

/// A request with a slot.
struct Active {
    id: RequestId,
    slot: usize,
    generation: Generation,
    outcome: Option<Result<(), Arc<Error>>>,
}

/// One request's share of a step.
struct StepPart {
    /// Index into [`Batcher::active`].
    index: usize,
    /// The tokens to compute.
    tokens: Vec<u32>,
    /// True if the step returns a row of logits for it.
    has_row: bool,
}

impl Batcher {
    /// Creates a batcher over an executor that it owns, with at most `max_queued` requests waiting for a slot.
    /// `tokenizer` is as in [`Session::new`](super::Session::new).
    pub fn new(executor: Box<dyn Executor>, tokenizer: Option<Arc<Tokenizer>>, max_queued: usize) -> Batcher {
        let vocabulary = OutputVocabulary::new(executor.limits(), tokenizer);
        let slots = Slots::new(executor.limits().slots);
        Batcher {
            executor,
            vocabulary,
            slots,
            active: Vec::new(),
            queue: VecDeque::new(),
            max_queued,
            next_id: 0,
            last_was_prefill: false,
        }
    }

    /// The limits that the engine was built with.
    pub fn limits(&self) -> &Limits {
        self.executor.limits()
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.vocabulary.tokenizer()
    }

    /// Number of requests that hold a slot.
    pub fn active(&self) -> usize {
        self.active.len()
    }

    /// Number of requests that wait for a slot.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Returns true if [`Batcher::step`] has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty() && self.queue.is_empty()
    }

    /// Accepts a request. All validation happens here; results come from [`Batcher::step`].
    ///
    /// # Errors
    /// [`Error::QueueFull`] if the queue is full; [`Error::Request`] or [`Error::PromptTooLong`] for a request that
    /// this engine cannot serve.
    pub fn submit(&mut self, request: GenerationRequest) -> Result<RequestId> {
        let generation = Generation::new(request, self.executor.limits(), &self.vocabulary)?;
        let id = self.enqueue(generation);
        if self.queue.len() > self.max_queued && self.queue.back().is_some_and(|(queued, _)| *queued == id) {
            self.queue.pop_back();
            return Err(Error::QueueFull { slots: self.slots.count(), queued: self.queue.len() });
        }
        Ok(id)
    }

    /// Accepts a validated request, however long the queue is.
    pub(super) fn enqueue(&mut self, generation: Generation) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.queue.push_back((id, generation));
        self.admit();
        id
    }

    /// Ends a request and frees its slot at once, without another event. Returns the partial completion, with finish
    /// reason [`FinishReason::Cancelled`](super::FinishReason::Cancelled), or `None` if the request is already over.
    pub fn cancel(&mut self, id: RequestId) -> Option<Completion> {
        if let Some(index) = self.queue.iter().position(|(queued, _)| *queued == id) {
            return self.queue.remove(index).map(|(_, generation)| generation.complete());
        }
        let index = self.active.iter().position(|active| active.id == id)?;
        let active = self.active.remove(index);
        self.release(active.slot);
        Some(active.generation.complete())
    }

    /// Frees a slot; its contents stay reusable until the executor needs their memory.
    fn release(&mut self, slot: usize) {
        self.slots.release(slot);
        self.executor.release(slot);
    }

    /// Assigns free slots to queued requests, in order, as long as there is memory for all that they may become.
    fn admit(&mut self) {
        while self.slots.has_free()
            && let Some((_, generation)) = self.queue.front()
        {
            self.slots.retain(|slot| self.executor.retained_tokens(slot));
            let Some((slot, reused)) = self.slots.find(generation.prompt()) else { return };
            if !self.executor.reserve(slot, generation.most_tokens()) {
                return;
            }
            let Some((id, mut generation)) = self.queue.pop_front() else { return };
            // The executor may have dropped what the slot held to make the reservation.
            let reused = reused.min(self.executor.retained_tokens(slot));
            self.slots.take(slot, reused);
            generation.start(reused);
            let outcome = generation.is_finished().then_some(Ok(()));
            self.active.push(Active { id, slot, generation, outcome });
        }
    }

    /// Runs one forward step, if there is anything to compute, and returns the resulting events in order. Never fails
    /// as a whole: errors are reported per request.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        self.admit();
        let mut events = Vec::new();
        // Requests for zero tokens are finished before the first step.
        self.retire(&mut events);
        self.admit();
        self.refuse_what_never_fits(&mut events);
        let parts = self.schedule();
        if !parts.is_empty() {
            if let Err(error) = self.forward(&parts, &mut events) {
                let error = Arc::new(error);
                self.slots.forget_all();
                for active in &mut self.active {
                    // The fetch of a later row may fail after an earlier row has already finished its request; keep
                    // that outcome.
                    active.outcome.get_or_insert_with(|| Err(error.clone()));
                }
            }
            self.retire(&mut events);
            self.admit();
        }
        events
    }

    /// Fails the next request if it has no memory although it would be alone: it would wait for ever.
    fn refuse_what_never_fits(&mut self, events: &mut Vec<(RequestId, Event)>) {
        while self.active.is_empty()
            && let Some((id, generation)) = self.queue.pop_front()
        {
            let tokens = generation.most_tokens();
            let error = Error::Step(format!("the executor has no KV memory for a single sequence of {tokens} tokens"));
            events.push((id, Event::Failed(Arc::new(error))));
            self.admit();
        }
    }

    /// Plans the next step, which is either all prefill or all decode.
    fn schedule(&mut self) -> Vec<StepPart> {
        let limits = self.executor.limits();
        let (max_tokens, max_rows) = (limits.max_step_tokens, limits.max_logits_rows);
        let (mut prefill, mut decode): (Vec<StepPart>, Vec<StepPart>) = (Vec::new(), Vec::new());
        let mut tokens_left = max_tokens;
        for (index, active) in self.active.iter().enumerate() {
            if active.outcome.is_some() {
                continue;
            }
            if let Some(token) = active.generation.last() {
                if decode.len() < max_tokens.min(max_rows) {
                    decode.push(StepPart { index, tokens: vec![token], has_row: true });
                }
            } else if tokens_left > 0 && prefill.len() < max_rows {
                let rest = active.generation.prompt().get(self.slots.len(active.slot)..).unwrap_or_default();
                let tokens = rest.get(..tokens_left).unwrap_or(rest);
                tokens_left -= tokens.len();
                prefill.push(StepPart { index, tokens: tokens.to_vec(), has_row: tokens.len() == rest.len() });
            }
        }
        self.last_was_prefill = decode.is_empty() || (!prefill.is_empty() && !self.last_was_prefill);
        if self.last_was_prefill { prefill } else { decode }
    }

    /// Runs the step. Returns the executor's errors; an error of a single request goes to its outcome.
    fn forward(&mut self, parts: &[StepPart], events: &mut Vec<(RequestId, Event)>) -> Result<()> {
        let limits = self.executor.limits();
        let slot_of = |part: &StepPart| self.active.get(part.index).map_or(usize::MAX, |active| active.slot);
        let step = if self.last_was_prefill {
            let chunks: Vec<Chunk<'_>> = parts
                .iter()
                .map(|part| {
                    let slot = slot_of(part);
                    let rows = if part.has_row { Rows::Last } else { Rows::None };
                    Chunk { slot, past_tokens: self.slots.len(slot), tokens: &part.tokens, rows }
                })
                .collect();
            Step::prefill(limits, &chunks)?
        } else {
            let next: Vec<NextToken> = parts
                .iter()
                .flat_map(|part| {
                    let slot = slot_of(part);
                    let past_tokens = self.slots.len(slot);
                    part.tokens.iter().map(move |token| NextToken { slot, past_tokens, token: *token })
                })
                .collect();
            Step::decode(limits, &next)?
        };
        let mut logits = self.executor.forward(&step)?;
        let wanted = parts.iter().filter(|part| part.has_row).count();
        if logits.rows() != wanted {
            return Err(Error::Step(format!("{} rows of logits, but the step asked for {wanted}", logits.rows())));
        }
        let mut row = 0;
        for part in parts {
            let Some(active) = self.active.get_mut(part.index) else { continue };
            self.slots.extend(active.slot, &part.tokens);
            if !part.has_row {
                continue;
            }
            let mut delta = String::new();
            match active.generation.accept(&mut logits, row, &mut delta)? {
                Ok(()) => active.outcome = active.generation.is_finished().then_some(Ok(())),
                Err(error) => active.outcome = Some(Err(Arc::new(error))),
            }
            if !delta.is_empty() {
                events.push((active.id, Event::Text(delta)));
            }
            row += 1;
        }
        if !self.last_was_prefill {
            // If one step cannot take all requests, those left out come first in the next.
            let decoded = |index: &usize| parts.iter().any(|part| part.index == *index);
            let (last, first): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.active).into_iter().enumerate().partition(|(index, _)| decoded(index));
            self.active = first.into_iter().chain(last).map(|(_, active)| active).collect();
        }
        Ok(())
    }

    /// Removes finished requests and frees their slots.
    fn retire(&mut self, events: &mut Vec<(RequestId, Event)>) {
        for mut active in std::mem::take(&mut self.active) {
            let event = match active.outcome.take() {
                None => {
                    self.active.push(active);
                    continue;
                }
                Some(Ok(())) => Event::Done(active.generation.complete()),
                Some(Err(error)) => {
                    // Keys and values that led to NaN must not be reused, nor read past the end of the next sequence. If
                    // mending fails, the executor has, and the next step says so.
                    self.slots.forget(active.slot);
                    let _ = self.executor.mend_slot(active.slot);
                    Event::Failed(error)
                }
            };
            self.release(active.slot);
            events.push((active.id, event));
        }
    }
}
