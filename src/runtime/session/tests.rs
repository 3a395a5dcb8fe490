use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::scripted::{Scripted, ScriptedRow, hashed};
use super::super::{Chat, FinishReason, SamplingParams, Turn};
use super::*;
use crate::text::fixture::{EOS, byte_id, tokenizer};

fn limits(max_sequence_tokens: usize, max_step_tokens: usize) -> Limits {
    Limits { slots: 1, max_sequence_tokens, max_step_tokens, max_logits_rows: 3, vocab_size: 420 }
}

fn quiet(_: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn request(prompt: &[u32], max_tokens: usize) -> GenerationRequest {
    GenerationRequest { max_tokens, ..GenerationRequest::new(prompt.to_vec()) }
}

/// A session that answers any prompt of this length with these ids.
fn saying(prompt_tokens: usize, ids: Vec<u32>) -> Session {
    let script = move |_: usize, sequence: &[u32]| match ids.get(sequence.len() - prompt_tokens) {
        Some(id) => ScriptedRow::Id(*id),
        None => ScriptedRow::Hash,
    };
    Session::new(Box::new(Scripted::new(&limits(200, 64), script)), Some(tokenizer()))
}

/// Runs a request and checks that the streamed pieces add up to the text.
fn streamed(session: &mut Session, request: &GenerationRequest) -> (Completion, Vec<String>) {
    let mut pieces = Vec::new();
    let mut take = |text: &str| {
        pieces.push(text.to_string());
        ControlFlow::Continue(())
    };
    let completion = session.generate(request, &mut take).unwrap();
    assert_eq!(pieces.concat(), completion.text);
    (completion, pieces)
}

#[test]
fn greedy_ids_are_the_largest_logits_of_the_whole_sequence() {
    let mut session = Session::new(Box::new(Scripted::hashing(&limits(40, 4))), None);
    let completion = session.generate(&request(&[5, 6, 7, 8, 9, 10], 5), &mut quiet).unwrap();
    let mut sequence = vec![5, 6, 7, 8, 9, 10];
    for id in &completion.token_ids {
        let row = hashed(&sequence, 420);
        let best = row.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(row[*id as usize], best);
        sequence.push(*id);
    }
    assert_eq!(completion.finish_reason, FinishReason::Length);
    assert_eq!((completion.prompt_tokens, completion.reused_tokens, completion.completion_tokens), (6, 0, 5));
    assert_eq!((completion.timings.prefill_tokens, completion.timings.decode_tokens), (6, 4));
    assert_eq!(completion.text, "");
}

#[test]
fn only_what_is_new_is_computed() {
    let executor = Scripted::hashing(&limits(40, 4));
    let log = executor.log();
    let mut session = Session::new(Box::new(executor), None);
    let first = session.generate(&request(&[5, 6, 7], 3), &mut quiet).unwrap();
    let mut prompt = vec![5, 6, 7];
    prompt.extend(&first.token_ids);
    prompt.extend([11, 12, 13, 14, 15]);
    log.lock().unwrap().clear();
    let second = session.generate(&request(&prompt, 1), &mut quiet).unwrap();
    // The last sampled id was never computed, so 5 of 11 are cached; 6 go in chunks of 4.
    assert_eq!((second.reused_tokens, second.timings.prefill_tokens), (5, 6));
    let spans: Vec<(usize, usize)> =
        log.lock().unwrap().iter().map(|step| (step[0].past_tokens, step[0].len)).collect();
    assert_eq!(spans, [(5, 4), (9, 2)]);
    let again = session.generate(&request(&prompt, 1), &mut quiet).unwrap();
    assert_eq!((again.reused_tokens, again.token_ids == second.token_ids), (10, true), "the last token is computed");
    let shorter = session.generate(&request(&[5, 6], 1), &mut quiet).unwrap();
    assert_eq!(shorter.reused_tokens, 1);
    session.reset();
    assert_eq!(session.generate(&request(&[5, 6], 1), &mut quiet).unwrap().reused_tokens, 0);
}

#[test]
fn what_does_not_fit_is_refused_in_tokens() {
    let mut session = Session::new(Box::new(Scripted::hashing(&limits(8, 4))), None);
    let mut refused = |request: &GenerationRequest| session.generate(request, &mut quiet).unwrap_err().to_string();
    assert!(refused(&request(&[], 1)).contains("the prompt is empty"));
    assert!(refused(&request(&[1; 8], 1)).contains("the prompt has 8 tokens, but this engine holds 8"));
    assert!(refused(&request(&[1, 420], 1)).contains("token 1 of the prompt has id 420; expected 0 to 419"));
    assert!(refused(&GenerationRequest { stop_ids: vec![420], ..request(&[1], 1) }).contains("stop id 420"));
    assert!(refused(&GenerationRequest { stop_strings: vec!["a".into()], ..request(&[1], 1) }).contains("tokenizer"));
    let completion = session.generate(&request(&[1; 7], usize::MAX), &mut quiet).unwrap();
    assert_eq!((completion.completion_tokens, completion.finish_reason), (1, FinishReason::Length));
    let completion = session.generate(&request(&[1; 3], usize::MAX), &mut quiet).unwrap();
    assert_eq!((completion.completion_tokens, completion.finish_reason), (5, FinishReason::Length));
    let nothing = session.generate(&request(&[1], 0), &mut quiet).unwrap();
    assert_eq!((nothing.completion_tokens, nothing.finish_reason), (0, FinishReason::Length));
    let none = Limits { max_step_tokens: 0, ..limits(8, 1) };
    let mut session = Session::new(Box::new(Scripted::hashing(&none)), None);
    assert!(session.generate(&request(&[1], 1), &mut quiet).unwrap_err().to_string().contains("cannot run anything"));
}

#[test]
fn stop_ids_and_strings_end_the_text_unseen() {
    let t = tokenizer();
    let hello = t.id("▁Hello").unwrap();
    let marker = t.id("<extra_id_1>").unwrap();
    let (newline, angle) = (byte_id(b'\n'), t.id("<").unwrap());
    let eos = GenerationRequest { stop_ids: vec![EOS], ..request(&[1, 2], 50) };
    let (completion, _) = streamed(&mut saying(2, vec![hello, EOS, hello]), &eos);
    assert_eq!((completion.text.as_str(), completion.finish_reason), (" Hello", FinishReason::Stop));
    assert_eq!(completion.token_ids, [hello, EOS]);

    let chat = GenerationRequest { trim: true, stop_strings: vec!["<extra_id_1>".into()], ..eos.clone() };
    let (completion, pieces) = streamed(&mut saying(2, vec![hello, newline, marker]), &chat);
    assert_eq!((completion.text.as_str(), completion.finish_reason), ("Hello", FinishReason::Stop));
    assert_eq!(pieces, ["Hello", "", ""]);
    // The marker spelled in other pieces stops as well.
    let spelled = t.encode("<extra").unwrap().into_iter().chain(bytes("_id_1> more")).collect::<Vec<_>>();
    let (completion, _) = streamed(&mut saying(2, [vec![hello], spelled].concat()), &chat);
    assert_eq!((completion.text.as_str(), completion.finish_reason), ("Hello", FinishReason::Stop));
    // A partial match is shown when the text ends, by length or by id.
    let (completion, pieces) =
        streamed(&mut saying(2, vec![hello, newline, angle]), &GenerationRequest { max_tokens: 3, ..chat.clone() });
    assert_eq!((completion.text.as_str(), completion.finish_reason), ("Hello\n<", FinishReason::Length));
    assert_eq!(pieces, ["Hello", "", "\n<"]);
    let (completion, _) = streamed(&mut saying(2, vec![angle, byte_id(0xF0), EOS]), &chat);
    assert_eq!((completion.text.as_str(), completion.finish_reason), ("<\u{FFFD}", FinishReason::Stop));
}

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(byte_id).collect()
}

#[test]
fn padding_past_the_tokenizer_is_never_sampled() {
    let t = tokenizer();
    assert!(t.vocab_size() < 419);
    let (completion, _) = streamed(&mut saying(1, vec![419; 5]), &request(&[1], 5));
    assert!(completion.token_ids.iter().all(|id| (*id as usize) < t.vocab_size()));
}

#[test]
fn a_cancelled_generation_returns_what_it_has_and_the_session_goes_on() {
    let fresh = |request: &GenerationRequest| {
        let mut session = Session::new(Box::new(Scripted::hashing(&limits(60, 4))), Some(tokenizer()));
        session.generate(request, &mut quiet).unwrap()
    };
    for stop_after in 1..8usize {
        let mut session = Session::new(Box::new(Scripted::hashing(&limits(60, 4))), Some(tokenizer()));
        let prompt: Vec<u32> = (10..20).collect();
        let mut calls = 0;
        let mut shown = String::new();
        let cancelled = session
            .generate(&request(&prompt, 30), &mut |text| {
                shown.push_str(text);
                calls += 1;
                if calls == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        assert_eq!(cancelled.finish_reason, FinishReason::Cancelled);
        assert_eq!(cancelled.text, shown);
        // The first two of three prefill steps give no id.
        assert_eq!(cancelled.completion_tokens, stop_after.saturating_sub(2));
        let after = session.generate(&request(&prompt, 30), &mut quiet).unwrap();
        assert_eq!(after.token_ids, fresh(&request(&prompt, 30)).token_ids);
    }
}

#[test]
fn after_an_error_the_session_starts_from_nothing() {
    let script = |step: usize, _: &[u32]| match step {
        1 => ScriptedRow::Spoiled(42, f32::NAN),
        4 => ScriptedRow::Fail,
        _ => ScriptedRow::Hash,
    };
    let executor = Scripted::new(&limits(60, 8), script);
    let mended = executor.mended();
    let mut session = Session::new(Box::new(executor), None);
    let error = session.generate(&request(&[1, 2], 9), &mut quiet).unwrap_err();
    assert!(matches!(&error, Error::Numerics(detail) if detail.contains("index 42")), "{error}");
    assert_eq!(mended.lock().unwrap().len(), 1);
    let error = session.generate(&request(&[1, 2], 9), &mut quiet).unwrap_err();
    assert!(error.to_string().contains("the device is gone"), "{error}");
    let completion = session.generate(&request(&[1, 2], 9), &mut quiet).unwrap();
    assert_eq!(completion.reused_tokens, 0);
    let mut fresh = Session::new(Box::new(Scripted::hashing(&limits(60, 8))), None);
    assert_eq!(completion.token_ids, fresh.generate(&request(&[1, 2], 9), &mut quiet).unwrap().token_ids);
}

#[test]
fn rows_are_fetched_only_where_their_largest_logits_do_not_decide() {
    let base = SamplingParams::greedy().seed(5);
    let top_k_and_p = base.clone().top_k(40).top_p(0.9).temperature(0.7);
    let repeated = top_k_and_p.clone().repetition_penalty(1.2).presence_penalty(0.5);
    let top_p = base.clone().top_p(0.9);
    for (sampling, expected) in [(base, 0), (top_k_and_p, 0), (repeated, 0), (top_p, 20)] {
        let request = GenerationRequest { sampling, ..request(&[5, 6, 7], 20) };
        let mut whole = Session::new(Box::new(Scripted::hashing(&limits(60, 4))), Some(tokenizer()));
        let executor = Scripted::hashing(&limits(60, 4)).deferred(Some(64));
        let fetches = executor.fetches();
        let mut deferred = Session::new(Box::new(executor), Some(tokenizer()));
        let completion = deferred.generate(&request, &mut quiet).unwrap();
        let same = whole.generate(&request, &mut quiet).unwrap();
        assert_eq!((&completion.token_ids, &completion.text), (&same.token_ids, &same.text));
        assert_eq!(completion.completion_tokens, 20);
        assert_eq!(fetches.load(Ordering::Relaxed), expected, "{request:?}");
    }
    let ids = [3, 1, 4];
    let mut whole = Session::new(Box::new(Scripted::hashing(&limits(8, 5))), None);
    let mut deferred = Session::new(Box::new(Scripted::hashing(&limits(8, 5)).deferred(Some(4))), None);
    assert_eq!(whole.score(&ids, &mut |_, _| {}).unwrap(), deferred.score(&ids, &mut |_, _| {}).unwrap());
}

#[test]
fn an_error_of_deferred_logits_empties_the_slot() {
    let script = |step: usize, _: &[u32]| match step {
        1 => ScriptedRow::Spoiled(42, f32::NAN),
        3 => ScriptedRow::Lost,
        _ => ScriptedRow::Hash,
    };
    let executor = Scripted::new(&limits(60, 8), script).deferred(Some(8));
    let mut session = Session::new(Box::new(executor), None);
    let sampling = SamplingParams::greedy().top_k(20).top_p(0.0).seed(3);
    let request = GenerationRequest { sampling, ..request(&[1, 2], 9) };
    let error = session.generate(&request, &mut quiet).unwrap_err();
    assert!(matches!(&error, Error::Numerics(detail) if detail.contains("index 42 is NaN")), "{error}");
    let error = session.generate(&request, &mut quiet).unwrap_err();
    assert!(error.to_string().contains("the device is gone"), "{error}");
    let completion = session.generate(&request, &mut quiet).unwrap();
    let mut fresh = Session::new(Box::new(Scripted::hashing(&limits(60, 8))), None);
    assert_eq!(completion.token_ids, fresh.generate(&request, &mut quiet).unwrap().token_ids);
    assert_eq!(completion.reused_tokens, 0);
}

#[test]
fn scores_are_log_probabilities_of_the_next_ids() {
    let mut session = Session::new(Box::new(Scripted::hashing(&limits(8, 5))), None);
    let ids = [3, 1, 4, 1, 5, 9, 2, 6];
    let mut rows = Vec::new();
    let scores = session.score(&ids, &mut |index, row| rows.push((index, row.to_vec()))).unwrap();
    assert_eq!((scores.len(), rows.len()), (7, 8));
    for (index, row) in &rows {
        assert_eq!(*row, hashed(&ids[..=*index], 420));
        if *index < 7 {
            assert_eq!(scores[*index], log_probability(row, ids[index + 1]).unwrap());
        }
    }
    assert_eq!(session.generate(&request(&ids[..6], 1), &mut quiet).unwrap().reused_tokens, 5);
    assert!(session.score(&[], &mut |_, _| {}).is_err());
    assert!(session.score(&[1; 9], &mut |_, _| {}).unwrap_err().to_string().contains("expected 1 to 8"));
    assert!(session.score(&[420], &mut |_, _| {}).is_err());
}

#[test]
fn a_chat_keeps_its_messages_and_reuses_the_cache() {
    let t = tokenizer();
    let marker = t.id("<extra_id_1>").unwrap();
    let (hello, newline) = (t.id("Hello").unwrap(), t.id("\n").unwrap());
    // Answers "Hello\n" and the marker after each "Assistant\n", like the model.
    let assistant = t.encode("<extra_id_1>Assistant\n").unwrap();
    let script = move |_: usize, sequence: &[u32]| {
        let said = sequence.len() - sequence.windows(assistant.len()).rposition(|w| w == assistant).unwrap();
        ScriptedRow::Id([hello, newline, marker][said - assistant.len()])
    };
    let executor = Scripted::new(&limits(120, 64), script);
    let format = Arc::new(ChatFormat::nemotron(NemotronMarkers::default(), &[EOS], &t));
    let mut chat = Chat::new(Session::new(Box::new(executor), Some(t)), format.clone()).unwrap();
    chat.set_max_tokens(20);
    chat.set_system("System");
    let first = chat.send_with("User", &mut quiet).unwrap();
    assert_eq!((first.text.as_str(), first.finish_reason), ("Hello", FinishReason::Stop));
    let second = chat.send_with("Hello", &mut quiet).unwrap();
    assert_eq!(second.reused_tokens, first.prompt_tokens + 2, "prompt, Hello and the newline");
    let roles: Vec<String> = chat.messages().iter().map(|m| format!("{}:{}", m.role, m.content)).collect();
    assert_eq!(roles, ["system:System", "user:User", "assistant:Hello", "user:Hello", "assistant:Hello"]);
    let before = chat.messages().to_vec();
    let error = chat.send("x".repeat(200)).unwrap_err();
    assert!(matches!(error, Error::ConversationFull { max_sequence_tokens: 120, .. }), "{error}");
    assert_eq!(chat.messages(), before);
    chat.reset();
    assert_eq!(chat.messages(), [Message::system("System")]);
    let error = chat.send("x".repeat(200)).unwrap_err();
    assert!(matches!(error, Error::PromptTooLong { .. }), "a first message that is too long is no full conversation");
    chat.set_system("");
    assert!(chat.messages().is_empty());
    assert!(Chat::new(Session::new(Box::new(Scripted::hashing(&limits(8, 8))), None), format).is_err());
}

use crate::text::{ChatFormat, Message, NemotronMarkers};

proptest! {
    #[test]
    fn a_session_gives_what_a_fresh_one_would(
        prompts in prop::collection::vec((prop::collection::vec(0u32..3, 1..20), 0usize..12, any::<u64>()), 1..6),
        step_tokens in 1usize..9,
    ) {
        let mut session = Session::new(Box::new(Scripted::hashing(&limits(24, step_tokens))), None);
        for (prompt, max_tokens, seed) in prompts {
            let sampling = SamplingParams::sampled(1.5).top_k(5).seed(seed);
            let request = GenerationRequest { sampling, ..request(&prompt, max_tokens) };
            let mut fresh = Session::new(Box::new(Scripted::hashing(&limits(24, 24))), None);
            let expected = fresh.generate(&request, &mut quiet).unwrap();
            let found = session.generate(&request, &mut quiet).unwrap();
            prop_assert_eq!(found.token_ids, expected.token_ids);
            prop_assert_eq!(found.seed, seed);
        }
    }
}

/// A conversation whose answers are "Hello, Hello" and so on until they are cut off.
fn endless_chat() -> Chat {
    let t = tokenizer();
    let (hello, comma) = (t.id("Hello").unwrap(), byte_id(b','));
    let script = move |_: usize, sequence: &[u32]| match sequence.last() == Some(&hello) {
        true => ScriptedRow::Id(comma),
        false => ScriptedRow::Id(hello),
    };
    let format = Arc::new(ChatFormat::nemotron(NemotronMarkers::default(), &[EOS], &t));
    let executor = Scripted::new(&limits(200, 64), script);
    let mut chat = Chat::new(Session::new(Box::new(executor), Some(t)), format).unwrap();
    chat.set_max_tokens(5);
    chat
}

#[test]
fn an_answer_is_an_iterator_and_joins_the_conversation_as_far_as_it_has_come() {
    let mut chat = endless_chat();
    let pieces: Vec<String> = chat.send("Say it").unwrap().map(Result::unwrap).collect();
    assert_eq!(pieces.concat(), "Hello,Hello,Hello");
    assert!(pieces.len() > 1 && pieces.iter().all(|piece| !piece.is_empty()));
    assert_eq!(chat.last_completion().unwrap().text, "Hello,Hello,Hello");
    assert_eq!(chat.messages()[1], Message::assistant("Hello,Hello,Hello"));

    let mut answer = chat.send("Again").unwrap();
    assert_eq!(answer.next().unwrap().unwrap(), "Hello");
    drop(answer);
    assert_eq!(chat.last_completion().unwrap().finish_reason, FinishReason::Cancelled);
    assert_eq!(chat.messages()[3], Message::assistant("Hello"));

    let mut answer = chat.send("Once more").unwrap();
    assert_eq!(answer.by_ref().count(), 5);
    let completion = answer.finish().unwrap();
    assert_eq!((completion.finish_reason, completion.completion_tokens), (FinishReason::Length, 5));
}

#[test]
fn a_turn_has_settings_of_its_own() {
    let mut chat = endless_chat();
    let stopped = chat.send_with(Turn::new("a").stop_string(",H"), &mut quiet).unwrap();
    assert_eq!((stopped.text.as_str(), stopped.finish_reason), ("Hello", FinishReason::Stop));
    assert_eq!(chat.send_with(Turn::new("b").max_tokens(2), &mut quiet).unwrap().text, "Hello,");
    let sampled = chat.send_with(Turn::new("c").sampling(SamplingParams::sampled(0.5).seed(9)), &mut quiet).unwrap();
    assert_eq!((sampled.seed, sampled.text.as_str()), (9, "Hello,Hello,Hello"));
    assert_eq!(chat.send_with("d", &mut quiet).unwrap().completion_tokens, 5);
    assert!(chat.send(Turn::new("e").sampling(SamplingParams::sampled(0.7).top_k(1))).is_err());
    assert_eq!(chat.messages().len(), 8);
}

#[test]
fn an_answer_that_fails_leaves_the_conversation_as_it_was() {
    let script = |step: usize, _: &[u32]| if step == 2 { ScriptedRow::Fail } else { ScriptedRow::Hash };
    let t = tokenizer();
    let format = Arc::new(ChatFormat::nemotron(NemotronMarkers::default(), &[EOS], &t));
    let executor = Scripted::new(&limits(200, 64), script);
    let mut chat = Chat::new(Session::new(Box::new(executor), Some(t)), format).unwrap();
    let mut answer = chat.send("a").unwrap();
    let last = answer.by_ref().last().unwrap();
    assert!(last.unwrap_err().to_string().contains("the device is gone"));
    assert!(answer.next().is_none());
    assert!(answer.finish().unwrap_err().to_string().contains("has failed"));
    assert!(chat.messages().is_empty());
    assert!(chat.send_with(Turn::new("b").max_tokens(3), &mut quiet).is_ok());
}

#[test]
fn the_caller_can_choose_the_tokens() {
    let mut session = Session::new(Box::new(Scripted::hashing(&limits(60, 8))), None);
    let mut stream = session.stream(request(&[1, 2, 3], 6)).unwrap().choosing(|row, so_far| {
        assert_eq!(row.len(), 420);
        let mut ids: Vec<u32> = (0..row.len() as u32).collect();
        ids.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        Ok(ids[so_far.len() % 2])
    });
    assert!(stream.next().is_none(), "there is no tokenizer, so there is no text");
    let chosen = stream.finish().unwrap().token_ids;
    let mut sequence = vec![1, 2, 3];
    for (index, id) in chosen.iter().enumerate() {
        let row = hashed(&sequence, 420);
        let larger = row.iter().filter(|logit| **logit > row[*id as usize]).count();
        assert_eq!(larger, index % 2);
        sequence.push(*id);
    }
    assert_eq!(chosen.len(), 6);
    let mut stream = session.stream(request(&[1], 6)).unwrap().choosing(|_, _| Ok(420));
    let error = stream.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("id 420 was chosen as the next token; expected 0 to 419"), "{error}");
}
