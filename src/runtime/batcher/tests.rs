use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::scripted::{Scripted, ScriptedRow};
use super::super::slots::common_prefix;
use super::super::{FinishReason, Grammar, SamplingParams, Session, TokenConstraint, TokenMask, TokenReports};
use super::*;
use crate::backend::{KvBlock, Logits};
use crate::text::fixture::{EOS, tokenizer};

fn limits(slots: usize, max_step_tokens: usize) -> Limits {
    Limits { slots, max_sequence_tokens: 40, max_step_tokens, max_logits_rows: 3, vocab_size: 420 }
}

fn request(prompt: &[u32], max_tokens: usize) -> GenerationRequest {
    GenerationRequest { max_tokens, ..GenerationRequest::new(prompt.to_vec()) }
}

/// The completion of a dedicated session.
fn alone(request: &GenerationRequest, tokenizer: Option<Arc<Tokenizer>>) -> Completion {
    let mut session = Session::new(Box::new(Scripted::hashing(&limits(1, 40))), tokenizer);
    session.generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The last event of each request and all its text.
#[derive(Default)]
struct Outcomes {
    text: HashMap<RequestId, String>,
    tokens: HashMap<RequestId, Vec<TokenReport>>,
    prompts: HashMap<RequestId, Vec<TokenReport>>,
    done: HashMap<RequestId, Completion>,
    failed: HashMap<RequestId, String>,
}

impl Outcomes {
    fn take(&mut self, events: Vec<(RequestId, Event)>) {
        for (id, event) in events {
            assert!(!self.done.contains_key(&id) && !self.failed.contains_key(&id), "{id} was over");
            match event {
                Event::Prompt(reports) => assert!(self.prompts.insert(id, reports).is_none(), "{id} is told once"),
                Event::Token(report) => self.tokens.entry(id).or_default().push(report),
                Event::Text(text) => self.text.entry(id).or_default().push_str(&text),
                Event::Done(completion) => {
                    assert_eq!(self.text.get(&id).map_or("", String::as_str), completion.text);
                    assert_eq!(self.tokens.get(&id).map_or(&[][..], Vec::as_slice), completion.reports);
                    assert_eq!(self.prompts.get(&id).map_or(&[][..], Vec::as_slice), completion.prompt_reports);
                    self.done.insert(id, completion);
                }
                Event::Failed(error) => {
                    self.failed.insert(id, error.to_string());
                }
            }
        }
    }

    fn run(&mut self, batcher: &mut Batcher) {
        let mut steps = 0;
        while !batcher.is_idle() {
            self.take(batcher.step());
            steps += 1;
            assert!(steps < 10_000, "the batcher makes no progress");
        }
    }
}

#[test]
fn requests_beyond_the_slots_wait_and_beyond_the_queue_are_refused() {
    let mut batcher = Batcher::new(Box::new(Scripted::hashing(&limits(2, 8))), None, 1);
    let ids: Vec<RequestId> = (1..4).map(|n| batcher.submit(request(&[n, 2], 4)).unwrap()).collect();
    assert_eq!((batcher.active(), batcher.queued()), (2, 1));
    let error = batcher.submit(request(&[4], 4)).unwrap_err();
    assert!(matches!(error, Error::QueueFull { slots: 2, queued: 1 }), "{error}");
    assert!(matches!(batcher.submit(request(&[1; 40], 4)).unwrap_err(), Error::PromptTooLong { .. }));
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    for (n, id) in (1..4).zip(ids) {
        assert_eq!(outcomes.done[&id].token_ids, alone(&request(&[n, 2], 4), None).token_ids);
    }
    assert!(batcher.step().is_empty());
    let mut batcher = Batcher::new(Box::new(Scripted::hashing(&limits(1, 8))), None, 0);
    batcher.submit(request(&[1], 1)).unwrap();
    assert!(batcher.submit(request(&[1], 1)).is_err());
}

#[test]
fn a_long_prompt_does_not_stall_those_who_decode() {
    let executor = Scripted::hashing(&limits(2, 2));
    let log = executor.log();
    let mut batcher = Batcher::new(Box::new(executor), None, 0);
    batcher.submit(request(&[1, 2], 30)).unwrap();
    batcher.step();
    batcher.submit(request(&[3; 20], 2)).unwrap();
    for _ in 0..20 {
        batcher.step();
    }
    let log = log.lock().unwrap();
    let steps = log.iter().skip(1).take(18).map(|spans| spans.iter().map(|span| (span.slot, span.len)).collect());
    assert_eq!(steps.collect::<Vec<Vec<_>>>(), vec![[(0, 1), (1, 1)]; 18], "a step has a token of both");
}

#[test]
fn all_who_decode_have_their_turn_when_a_step_cannot_take_all() {
    let executor = Scripted::hashing(&limits(5, 8));
    let log = executor.log();
    let mut batcher = Batcher::new(Box::new(executor), None, 0);
    for n in 0..5 {
        batcher.submit(request(&[n], 20)).unwrap();
    }
    for _ in 0..22 {
        batcher.step();
    }
    let log = log.lock().unwrap();
    let turns = |slot| log.iter().flatten().filter(|span| span.slot == slot).count();
    let counts: Vec<usize> = (0..5).map(turns).collect();
    assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
}

#[test]
fn one_bad_request_fails_alone() {
    let script = |_: usize, sequence: &[u32]| {
        if sequence[0] == 9 && sequence.len() > 3 { ScriptedRow::Spoiled(17, f32::NAN) } else { ScriptedRow::Hash }
    };
    let executor = Scripted::new(&limits(3, 8), script);
    let mended = executor.mended();
    let mut batcher = Batcher::new(Box::new(executor), None, 4);
    let good = [request(&[1, 2], 6), request(&[4], 6), request(&[8, 9], 2)];
    let mut outcomes = Outcomes::default();
    let first = batcher.submit(good[0].clone()).unwrap();
    let bad = batcher.submit(request(&[9, 2], 6)).unwrap();
    let second = batcher.submit(good[1].clone()).unwrap();
    let third = batcher.submit(good[2].clone()).unwrap();
    outcomes.run(&mut batcher);
    assert!(outcomes.failed[&bad].contains("index 17"), "{}", outcomes.failed[&bad]);
    assert_eq!(*mended.lock().unwrap(), [1], "its slot, and no other");
    for (id, request) in [first, second, third].iter().zip(&good) {
        assert_eq!(outcomes.done[id].token_ids, alone(request, None).token_ids);
    }
    // A cache that led to NaN is not reused.
    let bad = batcher.submit(request(&[9, 2], 6)).unwrap();
    outcomes.run(&mut batcher);
    assert!(outcomes.failed.contains_key(&bad));
    let after = batcher.submit(request(&[9, 2], 1)).unwrap();
    outcomes.run(&mut batcher);
    assert_eq!(outcomes.done[&after].reused_tokens, 0);
}

#[test]
fn when_the_executor_fails_the_batcher_stays_usable() {
    let script = |step: usize, _: &[u32]| if step == 2 { ScriptedRow::Fail } else { ScriptedRow::Hash };
    let mut batcher = Batcher::new(Box::new(Scripted::new(&limits(2, 8), script)), None, 4);
    let ids: Vec<RequestId> = (0..3).map(|n| batcher.submit(request(&[n, 7], 5)).unwrap()).collect();
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    assert!(outcomes.failed[&ids[0]].contains("the device is gone") && outcomes.failed[&ids[1]].contains("gone"));
    let waited = &outcomes.done[&ids[2]];
    assert_eq!((&waited.token_ids, waited.reused_tokens), (&alone(&request(&[2, 7], 5), None).token_ids, 0));
}

#[test]
fn a_row_that_cannot_be_fetched_fails_who_needs_it_and_who_comes_after() {
    let script = |step: usize, _: &[u32]| if step == 1 { ScriptedRow::Lost } else { ScriptedRow::Hash };
    let executor = Scripted::new(&limits(3, 8), script).deferred(Some(8));
    let mut batcher = Batcher::new(Box::new(executor), None, 4);
    let needs_the_row = SamplingParams::sampled(1.0).seed(1);
    let ends = batcher.submit(request(&[1, 7], 2)).unwrap();
    let fails = batcher.submit(GenerationRequest { sampling: needs_the_row.clone(), ..request(&[2, 7], 5) }).unwrap();
    let follows = batcher.submit(request(&[3, 7], 5)).unwrap();
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    assert_eq!(outcomes.done[&ends].token_ids, alone(&request(&[1, 7], 2), None).token_ids);
    assert!(outcomes.failed[&fails].contains("the device is gone"));
    assert!(outcomes.failed[&follows].contains("the device is gone"), "its step was the executor's error");
    let again = GenerationRequest { sampling: needs_the_row, ..request(&[2, 7], 5) };
    let id = batcher.submit(again.clone()).unwrap();
    outcomes.run(&mut batcher);
    assert_eq!((&outcomes.done[&id].token_ids, outcomes.done[&id].reused_tokens), (&alone(&again, None).token_ids, 0));
}

#[test]
fn greedy_requests_fetch_no_rows() {
    let executor = Scripted::hashing(&limits(3, 8)).deferred(Some(8));
    let fetches = executor.fetches();
    let mut batcher = Batcher::new(Box::new(executor), None, 9);
    let ids: Vec<RequestId> = (0..6).map(|n| batcher.submit(request(&[n, 2], 9)).unwrap()).collect();
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    for (n, id) in (0..6).zip(ids) {
        assert_eq!(outcomes.done[&id].token_ids, alone(&request(&[n, 2], 9), None).token_ids);
    }
    assert_eq!(fetches.load(Ordering::Relaxed), 0);
}

#[test]
fn cancelling_frees_the_slot_at_once() {
    let mut batcher = Batcher::new(Box::new(Scripted::hashing(&limits(1, 4))), None, 2);
    let running = batcher.submit(request(&[1, 2, 3, 4, 5, 6], 20)).unwrap();
    let waiting = batcher.submit(request(&[1, 2, 3, 4, 5, 7], 3)).unwrap();
    let unlucky = batcher.submit(request(&[1], 3)).unwrap();
    for _ in 0..4 {
        batcher.step();
    }
    let cancelled = batcher.cancel(running).unwrap();
    assert_eq!((cancelled.finish_reason, cancelled.completion_tokens), (FinishReason::Cancelled, 3));
    assert_eq!(batcher.active(), 0);
    assert_eq!(batcher.cancel(unlucky).unwrap().completion_tokens, 0);
    assert!(batcher.cancel(running).is_none());
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    let completion = &outcomes.done[&waiting];
    assert_eq!(completion.reused_tokens, 5, "the cancelled request's prompt is still there");
    assert_eq!(completion.token_ids, alone(&request(&[1, 2, 3, 4, 5, 7], 3), None).token_ids);
}

#[test]
fn a_request_for_nothing_is_done_without_a_step() {
    let executor = Scripted::hashing(&limits(1, 4));
    let log = executor.log();
    let mut batcher = Batcher::new(Box::new(executor), None, 3);
    let ids = [(); 3].map(|()| batcher.submit(request(&[1], 0)).unwrap());
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    for id in ids {
        assert_eq!((outcomes.done[&id].completion_tokens, outcomes.done[&id].finish_reason), (0, FinishReason::Length));
    }
    assert!(log.lock().unwrap().is_empty());
}

#[test]
fn sessions_and_batchers_can_move_to_a_thread() {
    fn is_send<T: Send>() {}
    is_send::<Session>();
    is_send::<Batcher>();
    is_send::<super::super::Chat>();
    is_send::<Event>();
}

/// A request with arbitrary text, stops and settings.
fn any_request() -> impl Strategy<Value = GenerationRequest> {
    let sampling = (0u32..4, any::<u64>(), any::<bool>(), 0usize..4).prop_map(|(top_k, seed, penalty, min_tokens)| {
        let repetition_penalty = if penalty { 1.3 } else { 1.0 };
        let params = SamplingParams::sampled(3.0).top_k(top_k).top_p(0.9).repetition_penalty(repetition_penalty);
        params.min_tokens(min_tokens).seed(seed).effective()
    });
    let prompt = prop::collection::vec(0u32..4, 1..30);
    let reports = || {
        prop_oneof![
            3 => Just(TokenReports::None),
            1 => Just(TokenReports::Ids),
            1 => (0usize..4).prop_map(TokenReports::Logprobs),
        ]
    };
    let options = (any::<bool>(), "[a-zA-Z]{1,2}", reports(), reports(), prop::option::of("[ab]"), any::<bool>());
    (prompt, sampling, 0usize..25, options).prop_map(|(prompt, sampling, max_tokens, options)| {
        let (trim, stop, reports, prompt_reports, cache_salt, is_constrained) = options;
        GenerationRequest {
            sampling,
            trim,
            stop_strings: vec![stop],
            stop_ids: (EOS..60).collect(),
            reports,
            prompt_reports,
            cache_salt,
            grammar: is_constrained.then(alternating),
            ..request(&prompt, max_tokens)
        }
    })
}

/// A grammar of ids that are even and odd in turns.
fn alternating() -> Grammar {
    struct Alternating(u32);
    impl TokenConstraint for Alternating {
        fn allow(&mut self, allowed: &mut TokenMask) -> Result<()> {
            (0..420).filter(|id| id % 2 == self.0).for_each(|id| allowed.insert(id));
            Ok(())
        }

        fn push(&mut self, id: u32) -> Result<()> {
            assert_eq!(id % 2, self.0, "only what is allowed is chosen");
            self.0 = 1 - self.0;
            Ok(())
        }
    }
    Grammar::new(|| Ok(Box::new(Alternating(0))))
}

#[test]
fn a_prompt_is_scored_without_an_answer_or_with_one() {
    let prompt: Vec<u32> = (0..17).map(|n| n % 5).collect();
    for (max_tokens, top) in [(0, 0), (1, 3)] {
        let mut batcher = Batcher::new(Box::new(Scripted::hashing(&limits(1, 8))), None, 1);
        // The second finds the whole prompt in the slot.
        for round in 0..2 {
            let reports = TokenReports::Logprobs(top);
            let request = request(&prompt, max_tokens).reports(reports).prompt_reports(reports);
            let id = batcher.submit(request).unwrap();
            let mut outcomes = Outcomes::default();
            outcomes.run(&mut batcher);
            let done = &outcomes.done[&id];
            assert_eq!((done.completion_tokens, done.reports.len()), (max_tokens, max_tokens), "round {round}");
            assert_eq!(done.prompt_reports.iter().map(|report| report.id).collect::<Vec<_>>(), prompt);
            let executor = Box::new(Scripted::hashing(&limits(1, 8)));
            let scores = Session::new(executor, None).score(&prompt, &mut |_, _| {}).unwrap();
            let (first, rest) = done.prompt_reports.split_first().unwrap();
            assert_eq!(first.logprobs, None);
            for (report, score) in rest.iter().zip(scores) {
                let logprobs = report.logprobs.as_ref().unwrap();
                assert_eq!((logprobs.logprob.to_bits(), logprobs.top.len()), (score.to_bits(), top));
            }
        }
    }
}

#[test]
fn what_another_slot_holds_is_copied_though_it_is_in_use() {
    let executor = Scripted::hashing(&limits(2, 8)).copying();
    let log = executor.log();
    let mut batcher = Batcher::new(Box::new(executor), None, 0);
    let shared: Vec<u32> = (0..16).collect();
    let with = |last: u32| request(&[&shared[..], &[last]].concat(), 5);
    let first = batcher.submit(with(100)).unwrap();
    let mut outcomes = Outcomes::default();
    (0..3).for_each(|_| outcomes.take(batcher.step()));
    let salted = GenerationRequest { cache_salt: Some("other".into()), ..with(101) };
    let second = batcher.submit(with(102)).unwrap();
    outcomes.run(&mut batcher);
    let third = batcher.submit(salted.clone()).unwrap();
    outcomes.run(&mut batcher);
    for (id, request, reused) in [(first, with(100), 0), (second, with(102), 16), (third, salted, 0)] {
        assert_eq!(outcomes.done[&id].token_ids, alone(&request, None).token_ids);
        assert_eq!(outcomes.done[&id].reused_tokens, reused);
    }
    let of_second: usize = log.lock().unwrap().iter().flatten().filter(|span| span.slot == 1).map(|s| s.len).sum();
    assert_eq!(of_second, 1 + 4, "its last prompt token, and what it decodes");
}

/// A conversation's next prompt: its ids so far, and one that no other has.
fn turn(conversation: u32, turn: u32) -> Vec<u32> {
    (0..12).map(|n| if n < 4 { n } else { conversation }).chain((0..=turn).map(|n| 100 + n)).collect()
}

/// A batcher on one slot with room for some blocks of 2 tokens.
fn with_blocks(executor: Scripted, room: usize) -> Batcher {
    Batcher::new(Box::new(executor.in_blocks(2)), None, 99).prefix_cache_bytes(room * (2 * 8 + 256))
}

#[test]
fn what_lost_its_slot_comes_back_from_the_blocks() {
    for (room, reused) in [(0, 4), (100, 14)] {
        let mut batcher = with_blocks(Scripted::hashing(&limits(1, 8)), room);
        let mut outcomes = Outcomes::default();
        let mut ids = Vec::new();
        for (conversation, number) in [(50, 0), (60, 0), (50, 1), (60, 1)] {
            let request = request(&turn(conversation, number), 3);
            let id = batcher.submit(request.clone()).unwrap();
            outcomes.run(&mut batcher);
            assert_eq!(outcomes.done[&id].token_ids, alone(&request, None).token_ids);
            ids.push(id);
        }
        // Of 13 tokens of the prompt and 2 of the answer, 14 are in whole blocks, and 13 of those are in the next prompt.
        let found: Vec<usize> = ids.iter().map(|id| outcomes.done[id].reused_tokens).collect();
        let of_conversation = if room == 0 { reused } else { 12 };
        assert_eq!(found, [0, 4, of_conversation, of_conversation], "with room for {room} blocks");
        let status = batcher.prefix_cache_status();
        let (slot, blocks) = (status.from_slot, status.from_blocks);
        match room {
            0 => assert_eq!((slot.requests, slot.tokens, blocks.tokens, status.bytes), (3, 12, 0, 0)),
            _ => assert_eq!((slot.requests, slot.tokens, blocks.requests, blocks.tokens), (3, 12, 2, 16)),
        }
    }
}

#[test]
fn requests_with_another_salt_find_nothing_in_the_blocks() {
    let mut batcher = with_blocks(Scripted::hashing(&limits(1, 8)), 100);
    let mut outcomes = Outcomes::default();
    for (salt, conversation, reused) in [("a", 50, 0), ("a", 60, 4), ("b", 50, 0), ("a", 50, 12), ("b", 60, 4)] {
        let request = GenerationRequest { cache_salt: Some(salt.into()), ..request(&turn(conversation, 0), 3) };
        let id = batcher.submit(request.clone()).unwrap();
        outcomes.run(&mut batcher);
        assert_eq!(outcomes.done[&id].token_ids, alone(&request, None).token_ids);
        // All prompts begin with the same 4 tokens.
        assert_eq!(outcomes.done[&id].reused_tokens, reused, "{conversation} under {salt}");
    }
}

/// An executor whose blocks are so large that one is copied between two steps.
struct LargeBlocks(Scripted);

impl Executor for LargeBlocks {
    fn limits(&self) -> &Limits {
        self.0.limits()
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        self.0.forward(step)
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool> {
        self.0.copy_prefix(from, to, tokens)
    }

    fn kv_block(&self) -> Option<KvBlock> {
        let block = self.0.kv_block();
        block.map(|block| KvBlock { bytes: 100 << 20, ..block })
    }

    fn read_kv_block(&self, slot: usize, index: usize, into: &mut [u8]) -> Result<()> {
        let tokens = self.0.kv_block().map_or(0, |block| block.tokens);
        self.0.read_kv_block(slot, index, into.get_mut(..4 * tokens).unwrap_or_default())
    }

    fn write_kv_block(&mut self, slot: usize, index: usize, from: &[u8]) -> Result<()> {
        let tokens = self.0.kv_block().map_or(0, |block| block.tokens);
        self.0.write_kv_block(slot, index, from.get(..4 * tokens).unwrap_or_default())
    }
}

#[test]
fn copies_are_bounded_and_those_who_decode_go_on() {
    let executor = Scripted::hashing(&limits(2, 40)).copying().in_blocks(2);
    let (log, most) = (executor.log(), executor.most_block_copies());
    let mut batcher = Batcher::new(Box::new(LargeBlocks(executor)), None, 9).prefix_cache_bytes(8 << 30);
    let mut outcomes = Outcomes::default();
    let decodes = batcher.submit(request(&[200], 39)).unwrap();
    outcomes.take(batcher.step());
    // A conversation, another in its slot, and the first again: 6 blocks are stored and 6 come back.
    let requests = [(50, 0), (60, 0), (50, 1)].map(|(conversation, number)| request(&turn(conversation, number), 1));
    let ids: Vec<RequestId> = requests.iter().map(|request| batcher.submit(request.clone()).unwrap()).collect();
    outcomes.run(&mut batcher);
    for (id, request) in ids.iter().zip(&requests) {
        assert_eq!(outcomes.done[id].token_ids, alone(request, None).token_ids);
    }
    assert_eq!(ids.iter().map(|id| outcomes.done[id].reused_tokens).collect::<Vec<_>>(), [0, 4, 12]);
    assert_eq!(outcomes.done[&decodes].token_ids, alone(&request(&[200], 39), None).token_ids);
    assert_eq!(most.load(Ordering::Relaxed), 1, "one block between two steps");
    let log = log.lock().unwrap();
    let decoding = log.iter().take(39).filter(|spans| spans.iter().any(|span| span.slot == 0));
    assert_eq!(decoding.count(), 39, "every step has a token of the first");
}

#[test]
fn what_led_to_nan_is_not_found_in_the_blocks() {
    // The conversation's second turn fails, though its beginning was fine before.
    let script = |_: usize, sequence: &[u32]| {
        if sequence.contains(&50) && sequence.contains(&101) {
            ScriptedRow::Spoiled(1, f32::NAN)
        } else {
            ScriptedRow::Hash
        }
    };
    let mut batcher = with_blocks(Scripted::new(&limits(1, 8), script), 100);
    let mut outcomes = Outcomes::default();
    for (conversation, number, reused) in
        [(50, 0, Some(0)), (60, 0, Some(4)), (50, 1, None), (50, 0, Some(0)), (60, 0, Some(4))]
    {
        let id = batcher.submit(request(&turn(conversation, number), 3)).unwrap();
        outcomes.run(&mut batcher);
        assert_eq!(outcomes.done.get(&id).map(|done| done.reused_tokens), reused, "{conversation}, turn {number}");
        assert_eq!(outcomes.failed.contains_key(&id), reused.is_none());
    }
}

#[test]
fn a_deadline_ends_a_request_and_no_other() {
    let mut batcher = Batcher::new(Box::new(Scripted::hashing(&limits(2, 8))), None, 0);
    let late = batcher.submit(GenerationRequest { deadline: Some(Instant::now()), ..request(&[1], 5) }).unwrap();
    let other = batcher.submit(request(&[2], 5)).unwrap();
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    assert!(outcomes.failed[&late].contains("deadline"), "{}", outcomes.failed[&late]);
    assert_eq!(outcomes.done[&other].token_ids, alone(&request(&[2], 5), None).token_ids);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn same_request_same_tokens_whatever_else_runs(
        requests in prop::collection::vec((any_request(), 0usize..6, prop::option::weighted(0.15, 0usize..20)), 1..10),
        slots in 1usize..5,
        step_tokens in 1usize..12,
        top_tokens in prop::option::of(1usize..6),
        copies in any::<bool>(),
        blocks in prop::option::weighted(0.8, (1usize..6, 0usize..20)),
    ) {
        let tokenizer = Some(tokenizer());
        let executor = Scripted::hashing(&limits(slots, step_tokens)).deferred(top_tokens);
        let executor = if copies { executor.copying() } else { executor };
        let executor = match blocks {
            Some((block_tokens, _)) => executor.in_blocks(block_tokens),
            None => executor,
        };
        // Room for some of what the requests leave behind, or none.
        let limit = blocks.map_or(0, |(block_tokens, room)| room * (8 * block_tokens + 300));
        let mut batcher = Batcher::new(Box::new(executor), tokenizer.clone(), 99).prefix_cache_bytes(limit);
        let mut outcomes = Outcomes::default();
        let mut submitted = Vec::new();
        let mut cancels: Vec<(usize, RequestId)> = Vec::new();
        let mut time = 0;
        let mut step = |batcher: &mut Batcher, cancels: &[(usize, RequestId)], outcomes: &mut Outcomes| {
            time += 1;
            for (_, id) in cancels.iter().filter(|(at, _)| *at == time) {
                batcher.cancel(*id);
            }
            outcomes.take(batcher.step());
            time
        };
        let mut now = 0;
        for (request, wait, cancel_after) in requests {
            for _ in 0..wait {
                now = step(&mut batcher, &cancels, &mut outcomes);
            }
            let id = batcher.submit(request.clone()).unwrap();
            cancels.extend(cancel_after.map(|after| (now + after + 1, id)));
            submitted.push((id, request));
        }
        while !batcher.is_idle() {
            step(&mut batcher, &cancels, &mut outcomes);
        }
        prop_assert!(outcomes.failed.is_empty());
        for (id, request) in submitted.clone() {
            let Some(found) = outcomes.done.get(&id) else {
                prop_assert!(cancels.iter().any(|(_, cancelled)| *cancelled == id));
                continue;
            };
            let expected = alone(&request, tokenizer.clone());
            prop_assert_eq!(&found.token_ids, &expected.token_ids);
            prop_assert_eq!(&found.text, &expected.text);
            prop_assert_eq!(found.finish_reason, expected.finish_reason);
            prop_assert_eq!((&found.reports, &found.prompt_reports), (&expected.reports, &expected.prompt_reports));
            // Nothing is reused but what a request with the same salt has computed.
            let most = submitted.iter().filter(|(other, request_of)| other != &id && request_of.cache_salt == request.cache_salt);
            let most = most.map(|(other, request_of)| {
                let answer = outcomes.done.get(other).map(|done| &done.token_ids[..]);
                let whole = alone(request_of, tokenizer.clone()).token_ids;
                common_prefix(&[&request_of.prompt[..], answer.unwrap_or(&whole)].concat(), &request.prompt)
            });
            prop_assert!(found.reused_tokens <= most.max().unwrap_or(0));
        }
    }
}

/// An executor with memory for so many tokens, which drops the contents of released slots at once.
struct Rationed {
    inner: Scripted,
    tokens: usize,
    reserved: Vec<usize>,
    held: Vec<usize>,
}

impl Executor for Rationed {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        for span in step.spans() {
            assert!(span.past_tokens <= self.held[span.slot], "{span:?} builds on what was dropped");
            self.held[span.slot] = span.past_tokens + span.len;
            assert!(self.held[span.slot] <= self.reserved[span.slot], "{span:?} is past its reservation");
        }
        self.inner.forward(step)
    }

    fn reserve(&mut self, slot: usize, tokens: usize) -> bool {
        let others: usize = self.reserved.iter().sum::<usize>() - self.reserved[slot];
        let fits = others + tokens <= self.tokens;
        if fits {
            self.reserved[slot] = tokens;
        }
        fits
    }

    fn release(&mut self, slot: usize) {
        (self.reserved[slot], self.held[slot]) = (0, 0);
    }

    fn retained_tokens(&self, slot: usize) -> usize {
        self.held[slot]
    }
}

fn rationed(tokens: usize) -> Box<Rationed> {
    let inner = Scripted::hashing(&limits(4, 8));
    Box::new(Rationed { inner, tokens, reserved: vec![0; 4], held: vec![0; 4] })
}

#[test]
fn requests_wait_for_memory_and_never_for_each_other() {
    let mut batcher = Batcher::new(rationed(40), None, 8);
    let requests: Vec<GenerationRequest> = [(3, 30), (20, 12), (5, 5), (5, 40), (2, 1), (30, 9)]
        .map(|(n, most)| request(&vec![n; n as usize], most))
        .into();
    let ids: Vec<RequestId> = requests.iter().map(|request| batcher.submit(request.clone()).unwrap()).collect();
    // 3 + 30 - 1 tokens leave no room for 20 + 12 - 1; and those behind wait their turn.
    assert_eq!((batcher.active(), batcher.queued()), (1, 5));
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    for (request, id) in requests.iter().zip(&ids) {
        assert_eq!(outcomes.done[id].token_ids, alone(request, None).token_ids);
    }
    // Beyond the queue, a request that must wait for memory is refused like one that must wait for a slot.
    let mut batcher = Batcher::new(rationed(40), None, 0);
    let first = batcher.submit(request(&[1; 20], 20)).unwrap();
    assert!(matches!(batcher.submit(request(&[1], 10)).unwrap_err(), Error::QueueFull { .. }));
    assert!(batcher.submit(request(&[1], 1)).is_ok());
    batcher.cancel(first).unwrap();
    assert!(batcher.submit(request(&[1; 20], 10)).is_ok(), "what is cancelled gives its memory back");
}

#[test]
fn what_never_fits_fails_instead_of_waiting_for_ever() {
    let mut batcher = Batcher::new(rationed(10), None, 8);
    let ids = [(4, 4), (8, 8), (3, 3)].map(|(n, most)| batcher.submit(request(&vec![1; n], most)).unwrap());
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batcher);
    assert!(outcomes.failed[&ids[1]].contains("no KV memory for a single sequence of 15 tokens"));
    assert!(outcomes.done.contains_key(&ids[0]) && outcomes.done.contains_key(&ids[2]));
}
