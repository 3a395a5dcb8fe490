//! Many requests over the slots of one executor.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use super::generation::{Generation, Vocabulary};
use super::request::{Completion, GenerationRequest};
use super::slots::Slots;
use crate::backend::{Chunk, Executor, Limits, NextToken, Rows, Step};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

#[cfg(test)]
mod tests;

/// A request of one batcher. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What happened to a request. [`Event::Done`] or [`Event::Failed`] is its last.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// More of its text, never empty.
    Text(String),
    /// It is finished.
    Done(Completion),
    /// It cannot go on. Shared, because one failed step fails every request that ran.
    Failed(Arc<Error>),
}

/// Serves requests together, one forward step at a time. What a request gets does not depend on the others.
///
/// Requests take a slot in the order they came, and wait while none is free. Steps alternate between prefill and
/// decode while there is work of both kinds, so a long prompt, `max_step_tokens` at a time, at most halves the speed
/// of those that are decoding.
///
/// A request whose logits are not numbers fails alone. When the executor itself reports an error, all requests that
/// hold a slot fail, those that wait stay, and the batcher goes on with empty slots.
pub struct Batcher {
    executor: Box<dyn Executor>,
    vocabulary: Vocabulary,
    slots: Slots,
    /// Requests with a slot. In the order they came, but for decoding ones that just had their turn, which go last.
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

/// What a step computes of one request.
struct Part {
    /// Index into [`Batcher::active`].
    index: usize,
    /// The new tokens.
    tokens: Vec<u32>,
    /// Whether it returns a row of logits.
    has_row: bool,
}

impl Batcher {
    /// A batcher over an executor it owns, with at most `max_queued` requests waiting for a slot. `tokenizer` as
    /// in [`Session::new`](super::Session::new).
    pub fn new(executor: Box<dyn Executor>, tokenizer: Option<Arc<Tokenizer>>, max_queued: usize) -> Batcher {
        let vocabulary = Vocabulary::new(executor.limits(), tokenizer);
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

    /// What the engine was built for.
    pub fn limits(&self) -> &Limits {
        self.executor.limits()
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.vocabulary.tokenizer()
    }

    /// Requests that hold a slot.
    pub fn active(&self) -> usize {
        self.active.len()
    }

    /// Requests that wait for a slot.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Whether [`Batcher::step`] has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty() && self.queue.is_empty()
    }

    /// Accepts a request. It is checked whole here; what happens to it comes from [`Batcher::step`].
    ///
    /// # Errors
    /// [`Error::QueueFull`] when as many wait as may; [`Error::Request`] or [`Error::PromptTooLong`] for a request
    /// this engine cannot serve.
    pub fn submit(&mut self, request: GenerationRequest) -> Result<RequestId> {
        let generation = Generation::new(request, self.executor.limits(), &self.vocabulary)?;
        self.admit();
        if self.queue.len() >= self.max_queued && !(self.queue.is_empty() && self.slots.has_free()) {
            return Err(Error::QueueFull { slots: self.slots.count(), queued: self.queue.len() });
        }
        Ok(self.enqueue(generation))
    }

    /// Accepts a request that was checked, however many wait.
    pub(super) fn enqueue(&mut self, generation: Generation) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.queue.push_back((id, generation));
        self.admit();
        id
    }

    /// Ends a request and frees its slot at once; no event follows. Returns what it has, with finish reason
    /// [`FinishReason::Cancelled`](super::FinishReason::Cancelled), or `None` for a request that is already over.
    pub fn cancel(&mut self, id: RequestId) -> Option<Completion> {
        if let Some(index) = self.queue.iter().position(|(queued, _)| *queued == id) {
            return self.queue.remove(index).map(|(_, generation)| generation.complete());
        }
        let index = self.active.iter().position(|active| active.id == id)?;
        let active = self.active.remove(index);
        self.slots.release(active.slot);
        Some(active.generation.complete())
    }

    /// Gives free slots to those who wait, in order.
    fn admit(&mut self) {
        while self.slots.has_free()
            && let Some((id, mut generation)) = self.queue.pop_front()
        {
            // There is a free slot, so this is never `None`.
            let Some((slot, reused)) = self.slots.acquire(generation.prompt()) else { return };
            generation.start(reused);
            let outcome = generation.is_finished().then_some(Ok(()));
            self.active.push(Active { id, slot, generation, outcome });
        }
    }

    /// Runs one forward step, if there is anything to compute, and returns what happened, in the order it did. Never
    /// fails as a whole: errors are the requests'.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        self.admit();
        let mut events = Vec::new();
        // Requests for no tokens at all are over before they begin.
        self.retire(&mut events);
        self.admit();
        let parts = self.schedule();
        if !parts.is_empty() {
            if let Err(error) = self.forward(&parts, &mut events) {
                let error = Arc::new(error);
                self.slots.forget_all();
                for active in &mut self.active {
                    // A row that cannot be fetched may come after one that ended its request.
                    active.outcome.get_or_insert_with(|| Err(error.clone()));
                }
            }
            self.retire(&mut events);
            self.admit();
        }
        events
    }

    /// Chooses the parts of the next step. All are prefill or all are decode.
    fn schedule(&mut self) -> Vec<Part> {
        let limits = self.executor.limits();
        let (max_tokens, max_rows) = (limits.max_step_tokens, limits.max_logits_rows);
        let (mut prefill, mut decode): (Vec<Part>, Vec<Part>) = (Vec::new(), Vec::new());
        let mut tokens_left = max_tokens;
        for (index, active) in self.active.iter().enumerate() {
            if active.outcome.is_some() {
                continue;
            }
            if let Some(token) = active.generation.last() {
                if decode.len() < max_tokens.min(max_rows) {
                    decode.push(Part { index, tokens: vec![token], has_row: true });
                }
            } else if tokens_left > 0 && prefill.len() < max_rows {
                let rest = active.generation.prompt().get(self.slots.len(active.slot)..).unwrap_or_default();
                let tokens = rest.get(..tokens_left).unwrap_or(rest);
                tokens_left -= tokens.len();
                prefill.push(Part { index, tokens: tokens.to_vec(), has_row: tokens.len() == rest.len() });
            }
        }
        self.last_was_prefill = decode.is_empty() || (!prefill.is_empty() && !self.last_was_prefill);
        if self.last_was_prefill { prefill } else { decode }
    }

    /// Computes the parts. An error is the executor's; one request's own goes to its outcome.
    fn forward(&mut self, parts: &[Part], events: &mut Vec<(RequestId, Event)>) -> Result<()> {
        let limits = self.executor.limits();
        let slot_of = |part: &Part| self.active.get(part.index).map_or(usize::MAX, |active| active.slot);
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
            // Where one step cannot take all, those that waited come first in the next.
            let decoded = |index: &usize| parts.iter().any(|part| part.index == *index);
            let (last, first): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.active).into_iter().enumerate().partition(|(index, _)| decoded(index));
            self.active = first.into_iter().chain(last).map(|(_, active)| active).collect();
        }
        Ok(())
    }

    /// Removes requests that are over and frees their slots.
    fn retire(&mut self, events: &mut Vec<(RequestId, Event)>) {
        for mut active in std::mem::take(&mut self.active) {
            let event = match active.outcome.take() {
                None => {
                    self.active.push(active);
                    continue;
                }
                Some(Ok(())) => Event::Done(active.generation.complete()),
                Some(Err(error)) => {
                    // Keys and values that led to NaN are not to be reused.
                    self.slots.forget(active.slot);
                    Event::Failed(error)
                }
            };
            self.slots.release(active.slot);
            events.push((active.id, event));
        }
    }
}
