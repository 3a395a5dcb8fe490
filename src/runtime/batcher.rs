//! Continuous batching: many requests over the slots of one executor.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::generation::{Generation, OutputVocabulary};
use super::prefix_cache::{PrefixCache, PrefixCacheStatus};
use super::report::TokenReport;
use super::request::{Completion, GenerationRequest};
use super::slots::Slots;
use crate::backend::{Chunk, Executor, Limits, Rows, Step};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

use self::prefix::Filling;

mod prefix;
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
    /// The prompt's tokens, where the request wants them reported: once, before anything else.
    Prompt(Vec<TokenReport>),
    /// A token of the answer, where the request wants them reported: before the text that it makes certain.
    Token(TokenReport),
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
/// the most tokens that the next one may reach; those that have a slot never wait for memory. A step decodes a token of
/// every request that has its prompt in the KV cache, and the rest of its `max_step_tokens` goes to prompts, so a long
/// prompt, computed piece by piece, slows those who decode but stops nobody.
///
/// A request begins with what the KV cache holds of its prompt: a slot that was released keeps its contents, and where
/// the executor can, what another slot holds, though it is in use, is copied. With [`Batcher::prefix_cache_bytes`], what
/// has to leave its slot is kept in blocks outside of the slots, from which it is copied back.
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
    /// Blocks outside of the slots; `None` if there are none.
    prefix_cache: Option<PrefixCache>,
    /// What requests have reused so far.
    reuse: PrefixCacheStatus,
    /// Blocks that may still be copied before the next step.
    copies_left: usize,
}

/// A request with a slot.
struct Active {
    id: RequestId,
    slot: usize,
    generation: Generation,
    /// What is copied to its slot before it runs; `None` once that is over.
    filling: Option<Filling>,
    /// Number of reports that events have told.
    reported: usize,
    prompt_is_reported: bool,
    outcome: Option<Result<(), Arc<Error>>>,
}

impl Active {
    /// Adds the events that report tokens.
    fn report(&mut self, events: &mut Vec<(RequestId, Event)>) {
        if let (false, Some(reports)) = (self.prompt_is_reported, self.generation.prompt_reports()) {
            events.push((self.id, Event::Prompt(reports.to_vec())));
            self.prompt_is_reported = true;
        }
        for report in self.generation.reports_from(self.reported) {
            events.push((self.id, Event::Token(report.clone())));
            self.reported += 1;
        }
    }
}

/// One request's share of a step.
struct StepPart {
    /// Index into [`Batcher::active`].
    index: usize,
    /// Tokens of the request in the KV cache.
    past_tokens: usize,
    /// The tokens to compute.
    tokens: Vec<u32>,
    /// The rows of logits that the step returns for it.
    rows: Rows,
    /// Continues the answer rather than the prompt.
    decodes: bool,
}

impl StepPart {
    fn row_count(&self) -> usize {
        match self.rows {
            Rows::None => 0,
            Rows::Last => 1,
            Rows::All => self.tokens.len(),
        }
    }
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
            prefix_cache: None,
            reuse: PrefixCacheStatus::default(),
            copies_left: 0,
        }
    }

    /// Keeps keys and values of sequences that lose their slot, up to `limit_bytes` of them, for later requests with the
    /// same beginning. They are allocated when they are stored. The default is 0: none are kept. It has no effect where
    /// the executor cannot copy blocks ([`Executor::kv_block`]), as on a GPU.
    #[must_use]
    pub fn prefix_cache_bytes(mut self, limit_bytes: usize) -> Batcher {
        self.set_prefix_cache(limit_bytes);
        self
    }

    /// The prefix cache's present size, and what requests have reused so far.
    pub fn prefix_cache_status(&self) -> PrefixCacheStatus {
        let mut status = self.reuse;
        if let Some(cache) = &self.prefix_cache {
            cache.observe(&mut status);
        }
        status
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

    /// Returns true once no step can succeed any more.
    pub fn is_lost(&self) -> bool {
        self.executor.is_lost()
    }

    /// Tokens in the KV cache of the requests that hold a slot.
    pub(super) fn active_tokens(&self) -> usize {
        self.active.iter().map(|active| self.slots.len(active.slot)).sum()
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
            let (salt, reusable) = (generation.cache_salt(), |cached: &[u32]| generation.reusable(cached));
            let Some((slot, reused)) = self.slots.find(salt, reusable) else { break };
            if !self.executor.reserve(slot, generation.most_tokens()) {
                break;
            }
            let Some((id, mut generation)) = self.queue.pop_front() else { break };
            // The executor may have dropped what the slot held to make the reservation.
            let retained = self.executor.retained_tokens(slot);
            let displaced = if self.prefix_cache.is_some() { retained } else { 0 };
            self.slots.take(slot, reused.min(retained), generation.cache_salt().clone(), displaced);
            generation.start();
            let outcome = generation.is_finished().then_some(Ok(()));
            let filling = Some(Filling::default());
            self.active.push(Active { id, slot, generation, filling, reported: 0, prompt_is_reported: false, outcome });
            // At once, since another request may take the slot that it is copied from.
            self.fill();
        }
    }

    /// Runs one forward step, if there is anything to compute, and returns the resulting events in order. Where copies
    /// of keys and values are all there is to do, there are no events. Never fails as a whole: errors are reported per
    /// request.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        self.copy_before_step();
        self.admit();
        let mut events = Vec::new();
        self.expire();
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

    /// Fails requests whose deadline has passed.
    fn expire(&mut self) {
        let now = Instant::now();
        let is_late = |generation: &Generation| generation.deadline().is_some_and(|deadline| deadline <= now);
        for active in self.active.iter_mut().filter(|active| is_late(&active.generation)) {
            active.outcome.get_or_insert_with(|| Err(Arc::new(Error::DeadlineExceeded)));
        }
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

    /// Plans the next step: a token of each answer, and as much of the prompts as there is room for.
    fn schedule(&mut self) -> Vec<StepPart> {
        let limits = self.executor.limits();
        let (mut tokens_left, mut rows_left) = (limits.max_step_tokens, limits.max_logits_rows);
        let mut parts: Vec<StepPart> = Vec::new();
        let mut add = |part: StepPart, left: (&mut usize, &mut usize)| {
            *left.0 -= part.tokens.len();
            *left.1 -= part.row_count();
            parts.push(part);
        };
        let waiting = |active: &&(usize, &Active)| active.1.outcome.is_none() && active.1.filling.is_none();
        let all: Vec<(usize, &Active)> = self.active.iter().enumerate().collect();
        // Prompts must go on even where answers alone would fill the step.
        let has_prompts = all.iter().filter(waiting).any(|(_, active)| active.generation.last().is_none());
        let for_prompts = usize::from(has_prompts && limits.max_step_tokens.min(limits.max_logits_rows) > 1);
        for (index, active) in all.iter().filter(waiting) {
            let Some(token) = active.generation.last() else { continue };
            if tokens_left > for_prompts && rows_left > for_prompts && self.slots.writable(active.slot) > 0 {
                let past_tokens = self.slots.len(active.slot);
                let part =
                    StepPart { index: *index, past_tokens, tokens: vec![token], rows: Rows::Last, decodes: true };
                add(part, (&mut tokens_left, &mut rows_left));
            }
        }
        for (index, active) in all.iter().filter(waiting) {
            if active.generation.last().is_some() || tokens_left == 0 {
                continue;
            }
            let past_tokens = self.slots.len(active.slot);
            let most = tokens_left.min(self.slots.writable(active.slot));
            let (tokens, rows) = active.generation.next_chunk(past_tokens, most, rows_left);
            if !tokens.is_empty() {
                let part = StepPart { index: *index, past_tokens, tokens: tokens.to_vec(), rows, decodes: false };
                add(part, (&mut tokens_left, &mut rows_left));
            }
        }
        // Output rows are in the order of the parts, whatever that is.
        parts
    }

    /// Runs the step. Returns the executor's errors; an error of a single request goes to its outcome.
    fn forward(&mut self, parts: &[StepPart], events: &mut Vec<(RequestId, Event)>) -> Result<()> {
        let slot_of = |part: &StepPart| self.active.get(part.index).map_or(usize::MAX, |active| active.slot);
        let chunks: Vec<Chunk<'_>> = parts
            .iter()
            .map(|part| {
                let StepPart { past_tokens, tokens, rows, .. } = part;
                Chunk { slot: slot_of(part), past_tokens: *past_tokens, tokens, rows: *rows }
            })
            .collect();
        let step = Step::prefill(self.executor.limits(), &chunks)?;
        let mut logits = self.executor.forward(&step)?;
        let wanted: usize = parts.iter().map(StepPart::row_count).sum();
        if logits.rows() != wanted {
            return Err(Error::Step(format!("{} rows of logits, but the step asked for {wanted}", logits.rows())));
        }
        let mut row = 0;
        for part in parts {
            let Some(active) = self.active.get_mut(part.index) else { continue };
            self.slots.extend(active.slot, &part.tokens);
            let mut delta = String::new();
            let accepted = match part.decodes {
                true => active.generation.accept(&mut logits, row, &mut delta)?,
                false => {
                    let chunk = (part.past_tokens, part.tokens.len());
                    active.generation.accept_chunk(&mut logits, row, chunk, &mut delta)?
                }
            };
            row += part.row_count();
            match accepted {
                Ok(()) => active.outcome = active.generation.is_finished().then_some(Ok(())),
                Err(error) => active.outcome = Some(Err(Arc::new(error))),
            }
            active.report(events);
            if !delta.is_empty() {
                events.push((active.id, Event::Text(delta)));
            }
        }
        // If one step cannot take all answers, those left out come first in the next.
        let decoded = |index: &usize| parts.iter().any(|part| part.index == *index && part.decodes);
        let (last, first): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.active).into_iter().enumerate().partition(|(index, _)| decoded(index));
        self.active = first.into_iter().chain(last).map(|(_, active)| active).collect();
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
                Some(Ok(())) => {
                    // A request for nothing has had no step.
                    active.report(events);
                    Event::Done(active.generation.complete())
                }
                Some(Err(error)) => {
                    // Keys and values that led to NaN must not be reused, nor read past the end of the next sequence. If
                    // mending fails, the executor has, and the next step says so.
                    if !matches!(*error, Error::DeadlineExceeded) {
                        self.slots.forget(active.slot);
                        if let Some(cache) = &mut self.prefix_cache {
                            cache.forget(active.generation.cache_salt(), active.generation.prompt());
                        }
                        let _ = self.executor.mend_slot(active.slot);
                    }
                    Event::Failed(error)
                }
            };
            self.release(active.slot);
            events.push((active.id, event));
        }
    }
}
