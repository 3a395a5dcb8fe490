use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::super::scripted::{Log, Scripted, ScriptedRow};
use super::super::{Completion, FinishReason, SamplingParams, Session};
use super::*;
use crate::text::fixture::{EOS, tokenizer};

/// Generous for a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

fn limits(slots: usize) -> Limits {
    Limits { slots, max_sequence_tokens: 200, max_step_tokens: 16, max_logits_rows: 8, vocab_size: 420 }
}

fn request(prompt: &[u32], max_tokens: usize) -> GenerationRequest {
    GenerationRequest::new(prompt.to_vec()).max_tokens(max_tokens)
}

fn options(max_queued: usize) -> EngineOptions {
    EngineOptions::default().max_queued(max_queued)
}

fn start(executor: Scripted, max_queued: usize) -> Engine {
    Engine::start(Box::new(executor), Some(tokenizer()), options(max_queued)).unwrap()
}

/// An engine that blocks on every row until it gets a message, and the sender of those messages.
fn gated(slots: usize, max_queued: usize) -> (Engine, Sender<()>, Log) {
    gated_with(slots, options(max_queued))
}

fn gated_with(slots: usize, options: EngineOptions) -> (Engine, Sender<()>, Log) {
    let (open, gate): (Sender<()>, Receiver<()>) = channel();
    let executor = Scripted::new(&limits(slots), move |_, _| {
        // Once the sender is dropped, all steps run.
        let _ = gate.recv();
        ScriptedRow::Hash
    });
    let log = executor.log();
    (Engine::start(Box::new(executor), Some(tokenizer()), options).unwrap(), open, log)
}

/// The completion of a dedicated session.
fn alone(request: &GenerationRequest) -> Completion {
    let mut session = Session::new(Box::new(Scripted::hashing(&limits(1))), Some(tokenizer()));
    session.generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn same(found: &Completion, expected: &Completion) {
    assert_eq!((&found.token_ids, &found.text), (&expected.token_ids, &expected.text));
    assert_eq!(found.finish_reason, expected.finish_reason);
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn under_load_each_request_gets_what_it_gets_alone() {
    let engine = start(Scripted::hashing(&limits(3)), 2);
    std::thread::scope(|scope| {
        for thread in 0..6u32 {
            let handle = engine.handle();
            scope.spawn(move || {
                for round in 0..8u32 {
                    let prompt: Vec<u32> = (0..1 + (thread * 7 + round * 5) % 40).map(|n| n % 5).collect();
                    let sampling = match round % 3 {
                        0 => SamplingParams::greedy(),
                        _ => SamplingParams::sampled(2.0).top_k(20).seed(u64::from(thread * 100 + round)),
                    };
                    let request = request(&prompt, 20).sampling(sampling).stop_ids(EOS..40);
                    let mut stream = handle.submit_wait(request.clone()).unwrap();
                    let expected = alone(&request);
                    let text: String = stream.by_ref().map(Result::unwrap).collect();
                    assert_eq!(text, expected.text);
                    same(&stream.wait().unwrap(), &expected);
                }
            });
        }
    });
    let status = engine.handle().status();
    assert_eq!((status.running, status.queued, status.kv_tokens, status.is_open), (0, 0, 0, true));
    engine.shutdown(DrainMode::Accepted).unwrap();
}

#[test]
fn a_full_queue_refuses_and_whoever_waits_gets_in() {
    let (engine, open, _) = gated(1, 1);
    let handle = engine.handle();
    let first = handle.submit(request(&[1], 2)).unwrap();
    let second = handle.submit(request(&[2], 2)).unwrap();
    let error = handle.submit(request(&[3], 2)).unwrap_err();
    assert!(matches!(error, Error::QueueFull { slots: 1, queued: 1 }), "{error}");
    let EngineStatus { running, queued, is_open, .. } = handle.status();
    assert_eq!((running, queued, is_open), (1, 1, true));
    let waiting = {
        let handle = handle.clone();
        std::thread::spawn(move || handle.submit_wait(request(&[4], 2)).unwrap().wait().unwrap())
    };
    drop(open);
    for (stream, prompt) in [(first, 1), (second, 2)] {
        same(&stream.wait().unwrap(), &alone(&request(&[prompt], 2)));
    }
    same(&waiting.join().unwrap(), &alone(&request(&[4], 2)));
    assert!(matches!(handle.submit(request(&[], 2)), Err(Error::Request(_))), "a bad request is refused by name");
}

#[test]
fn a_dropped_stream_frees_its_place() {
    let (engine, open, log) = gated(1, 8);
    let handle = engine.handle();
    let mut long = handle.submit(request(&[1], 150)).unwrap();
    let queued = handle.submit(request(&[2], 150)).unwrap();
    let last = handle.submit(request(&[3], 2)).unwrap();
    drop(queued);
    assert_eq!(handle.status().queued, 1, "one that waits is gone at once");
    (0..20).for_each(|_| open.send(()).unwrap());
    assert!(!long.next().unwrap().unwrap().is_empty());
    drop(long);
    drop(open);
    same(&last.wait().unwrap(), &alone(&request(&[3], 2)));
    wait_for("empty", || handle.status().running == 0);
    assert!(log.lock().unwrap().len() < 100, "the long request ran on: {} steps", log.lock().unwrap().len());
}

#[test]
fn a_drain_serves_what_it_says() {
    for (mode, served) in [(DrainMode::Accepted, 2), (DrainMode::Running, 1), (DrainMode::Nothing, 0)] {
        let (engine, open, log) = gated(1, 8);
        let handle = engine.handle();
        let streams = [handle.submit(request(&[1], 3)).unwrap(), handle.submit(request(&[2], 3)).unwrap()];
        // The executor is running the first one.
        wait_for("a step", || !log.lock().unwrap().is_empty());
        handle.close(mode);
        let refused = handle.submit(request(&[3], 1)).unwrap_err();
        assert!(matches!(refused, Error::EngineStopped { .. }), "{refused}");
        drop(open);
        for (index, stream) in streams.into_iter().enumerate() {
            match stream.wait() {
                Ok(completion) => {
                    assert!(index < served, "{mode:?}");
                    same(&completion, &alone(&request(&[index as u32 + 1], 3)));
                }
                Err(error) => {
                    assert!(index >= served, "{mode:?}: {error}");
                    assert!(matches!(error.root(), Error::EngineStopped { .. }), "{error}");
                }
            }
        }
        engine.shutdown(DrainMode::Accepted).unwrap();
        assert!(matches!(handle.submit_wait(request(&[3], 1)), Err(Error::EngineStopped { .. })));
    }
}

#[test]
fn a_failed_step_fails_those_in_it_and_the_engine_goes_on() {
    let executor = Scripted::new(&limits(2), |step, _| if step == 1 { ScriptedRow::Fail } else { ScriptedRow::Hash });
    let engine = start(executor, 8);
    let handle = engine.handle();
    let error = handle.submit(request(&[1], 9)).unwrap().wait().unwrap_err();
    assert!(error.to_string().contains("the device is gone"), "{error}");
    same(&handle.submit(request(&[1], 9)).unwrap().wait().unwrap(), &alone(&request(&[1], 9)));
}

#[test]
fn a_panic_is_told_to_all() {
    let executor = Scripted::new(&limits(1), |step, _| {
        assert!(step < 2, "a bug in a kernel");
        ScriptedRow::Hash
    });
    let engine = start(executor, 8);
    let handle = engine.handle();
    let streams: Vec<_> = (0..3).map(|n| handle.submit(request(&[n], 9))).collect();
    for stream in streams {
        // A request after the panic is refused with the same reason.
        let error = stream.and_then(ResponseStream::wait).unwrap_err();
        assert!(matches!(error.root(), Error::EngineStopped { .. }), "{error}");
        assert!(error.to_string().ends_with("its thread panicked: a bug in a kernel"), "{error}");
    }
    let error = engine.shutdown(DrainMode::Accepted).unwrap_err();
    assert!(error.to_string().contains("a bug in a kernel"), "{error}");
}

#[test]
fn a_slow_reader_slows_nobody_down() {
    let engine = start(Scripted::hashing(&limits(2)), 8);
    let handle = engine.handle();
    let slow = handle.submit(request(&[1], 150)).unwrap();
    for prompt in 2..6 {
        same(&handle.submit(request(&[prompt], 20)).unwrap().wait().unwrap(), &alone(&request(&[prompt], 20)));
    }
    wait_for("the unread answer is computed", || handle.status().running == 0);
    let expected = alone(&request(&[1], 150));
    assert_eq!(slow.map(Result::unwrap).collect::<String>(), expected.text);
}

#[test]
fn events_can_be_waited_for_or_sent_elsewhere() {
    let (engine, open, _) = gated(1, 8);
    let handle = engine.handle();
    let mut stream = handle.submit(request(&[1], 3)).unwrap();
    assert!(stream.try_recv().is_none() && stream.recv_timeout(Duration::from_millis(5)).is_none());
    assert!(!stream.is_over() && stream.completion().is_none());
    let (sender, events) = channel();
    let ticket = handle.submit_to(request(&[2], 3), move |event| sender.send(event).is_ok()).unwrap();
    drop(open);
    while stream.recv_timeout(PATIENCE).is_some() {}
    assert!(stream.is_over());
    assert_eq!(stream.completion().unwrap().finish_reason, FinishReason::Length);
    let Some(Event::Done(completion)) = events.iter().last() else { panic!("no end") };
    same(&completion, &alone(&request(&[2], 3)));
    drop(ticket);
    // A sink that returns false ends its request.
    let _kept = handle.submit_to(request(&[1], 150), |_| false).unwrap();
    wait_for("ended", || handle.status().running == 0);
}

#[test]
fn dropping_the_engine_ends_its_requests() {
    let (engine, open, log) = gated(1, 8);
    let stream = engine.handle().submit(request(&[1], 150)).unwrap();
    wait_for("a step", || !log.lock().unwrap().is_empty());
    drop(open);
    drop(engine);
    match stream.wait() {
        Ok(completion) => assert_eq!(completion.completion_tokens, 150, "it was over already"),
        Err(error) => assert_eq!(error.to_string(), "the engine has stopped"),
    }
}

#[test]
fn slots_go_to_lower_numbers_first_and_then_to_clients_with_fewer() {
    let (engine, open, log) = gated(2, 8);
    let handle = engine.handle();
    let (done, order) = channel();
    let ask = |first: u32, priority: i32, client: u64, max_tokens: usize| {
        let request = GenerationRequest { priority, client, ..request(&[first], max_tokens) };
        let done = done.clone();
        let on_event = move |event| !matches!(event, Event::Done(_)) || done.send(first).is_ok();
        handle.submit_to(request, on_event).unwrap()
    };
    // Both slots are taken before the others arrive; client 1 keeps one of them.
    let _running = [ask(1, 0, 1, 100), ask(2, 0, 2, 1)];
    wait_for("a step", || !log.lock().unwrap().is_empty());
    let _queued = [ask(3, 0, 1, 1), ask(4, 0, 1, 1), ask(5, 0, 3, 1), ask(6, -1, 1, 1)];
    drop(open);
    let finished: Vec<u32> = order.iter().take(6).collect();
    assert_eq!(finished, [2, 6, 5, 3, 4, 1]);
}

#[test]
fn a_client_holds_no_more_slots_than_it_may() {
    let (engine, open, log) = gated_with(4, options(8).max_running_per_client(2));
    let handle = engine.handle();
    let ask = |first: u32, client: u64| handle.submit(GenerationRequest { client, ..request(&[first], 2) }).unwrap();
    let mut streams: Vec<ResponseStream> = (1..6).map(|first| ask(first, 1)).collect();
    wait_for("a step", || !log.lock().unwrap().is_empty());
    streams.push(ask(6, 2));
    drop(open);
    for stream in streams {
        stream.wait().unwrap();
    }
    let steps = log.lock().unwrap();
    let most_of_first = steps.iter().map(|step| step.len()).max();
    assert!(most_of_first <= Some(3), "two of one client and one of another: {steps:?}");
    assert!(steps.len() >= 6, "the five requests of one client take turns: {steps:?}");
}

#[test]
fn one_client_cannot_keep_the_others_out_of_the_queue() {
    let (engine, open, log) = gated(1, 4);
    let handle = engine.handle();
    let ask = |first: u32, client: u64| handle.submit(GenerationRequest { client, ..request(&[first], 1) });
    let running = ask(1, 1).unwrap();
    wait_for("a step", || !log.lock().unwrap().is_empty());
    let mut greedy: Vec<ResponseStream> = (2..6).map(|first| ask(first, 1).unwrap()).collect();
    assert!(matches!(ask(6, 1), Err(Error::QueueFull { slots: 1, queued: 4 })), "its own queue is full");
    let others = [ask(7, 2).unwrap(), ask(8, 3).unwrap()];
    // Two of four are the first client's now: taking one more from it would only turn the tables.
    assert!(ask(9, 2).is_err());
    drop(open);
    let evicted: Vec<bool> = greedy.drain(..).map(|stream| stream.wait().is_err()).collect();
    assert_eq!(evicted, [false, false, true, true]);
    for stream in others.into_iter().chain([running]) {
        stream.wait().unwrap();
    }
}

#[test]
fn an_engine_ends_when_its_device_is_lost() {
    let executor = Scripted::new(&limits(1), |_, _| ScriptedRow::Fail).lost_after_failure();
    let engine = start(executor, 4);
    let handle = engine.handle();
    let error = handle.submit(request(&[1], 5)).unwrap().wait().unwrap_err();
    assert!(!matches!(error, Error::EngineStopped { .. }), "the request has the reason itself: {error}");
    wait_for("the end", || !handle.status().is_open);
    let error = handle.submit(request(&[1], 5)).unwrap_err().to_string();
    assert!(error.contains("device is lost"), "{error}");
}
