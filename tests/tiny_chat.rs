//! The 500 conversations of tiny-chat, compared with transformers' greedy answers in FP32.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use aotron::backend::cpu::CpuOptions;
use aotron::backend::{Executor, open_cpu};
use aotron::compile::Precision;
use aotron::engine::Package;
use aotron::runtime::{Batcher, Chat, Completion, Event, FinishReason, GenerationRequest, Session};
use aotron::text::{Message, Tokenizer};
use serde_json::Value;

use crate::packages::build_package;

const CHECKPOINT: &str = "tests/data/tiny-chat";
const MAX_TOKENS: usize = 200;

struct Turn {
    user: String,
    expected: String,
    prompt_ids: Vec<u32>,
    token_ids: Vec<u32>,
    text: String,
}

struct Conversation {
    system: String,
    turns: Vec<Turn>,
}

fn json_lines(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(Path::new(CHECKPOINT).join(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn conversations() -> Vec<Conversation> {
    let (asked, answered) = (json_lines("conversations.jsonl"), json_lines("answers.jsonl"));
    assert_eq!((asked.len(), answered.len()), (500, 500));
    let turn = |(asked, answered): (&Value, &Value)| Turn {
        user: asked["user"].as_str().unwrap().into(),
        expected: asked["expected"].as_str().unwrap().into(),
        prompt_ids: ids(&answered["prompt_ids"]),
        token_ids: ids(&answered["token_ids"]),
        text: answered["text"].as_str().unwrap().into(),
    };
    let conversation = |(asked, answered): (&Value, &Value)| {
        assert_eq!(asked["id"], answered["id"]);
        let (turns, answers) = (asked["turns"].as_array().unwrap(), answered["turns"].as_array().unwrap());
        assert_eq!(turns.len(), answers.len());
        let system = asked["system"].as_str().unwrap().into();
        Conversation { system, turns: turns.iter().zip(answers).map(turn).collect() }
    };
    asked.iter().zip(&answered).map(conversation).collect()
}

fn tokenizer(package: &Package) -> Arc<Tokenizer> {
    Arc::new(package.tokenizer().unwrap().unwrap())
}

fn executor(package: &Package) -> Box<dyn Executor> {
    Box::new(open_cpu(package, &CpuOptions::default()).unwrap())
}

/// Plays back every conversation, turn by turn. `check` receives each turn and its completion, and returns whether to
/// continue the conversation.
fn converse(package: &Package, mut check: impl FnMut(&Turn, &Completion, String) -> bool) {
    let session = Session::new(executor(package), Some(tokenizer(package)));
    let mut chat = Chat::new(session, package.chat_format()).unwrap();
    chat.set_max_tokens(MAX_TOKENS);
    for conversation in conversations() {
        chat.reset();
        chat.set_system(&conversation.system);
        for (index, turn) in conversation.turns.iter().enumerate() {
            let mut streamed = String::new();
            let mut on_text = |text: &str| {
                streamed.push_str(text);
                ControlFlow::Continue(())
            };
            let answer = chat.send_with(&turn.user, &mut on_text).unwrap();
            assert_eq!(answer.prompt_tokens, turn.prompt_ids.len(), "{}", turn.user);
            assert!(index == 0 || answer.reused_tokens > 0, "earlier turns were computed again: {}", turn.user);
            if !check(turn, &answer, streamed) {
                break;
            }
        }
    }
}

#[test]
fn f32_answers_are_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let package = build_package(Path::new(CHECKPOINT), Precision::F32, &folder.path().join("engine"));
    let mut turns = 0;
    converse(&package, |turn, answer, streamed| {
        assert_eq!(answer.token_ids, turn.token_ids, "{}: {:?}", turn.user, answer.text);
        assert_eq!(answer.text, turn.text);
        assert_eq!(streamed, turn.text);
        assert_eq!(answer.finish_reason, FinishReason::Stop);
        turns += 1;
        true
    });
    println!("{turns} turns equal");
}

/// BF16 may choose another token only where FP32 has no clear favourite: where the gap between its two best logits is
/// within BF16's error of the logits.
#[test]
fn bf16_answers_differ_only_where_fp32_was_undecided() {
    let folder = tempfile::tempdir().unwrap();
    let narrow = build_package(Path::new(CHECKPOINT), Precision::Bf16, &folder.path().join("bf16"));
    let wide = build_package(Path::new(CHECKPOINT), Precision::F32, &folder.path().join("f32"));
    let mut wide_session = Session::new(executor(&wide), None);
    let mut narrow_session = Session::new(executor(&narrow), None);
    let mut differing = 0;
    converse(&narrow, |turn, answer, _| {
        let Some(at) = (0..turn.token_ids.len()).find(|i| answer.token_ids.get(*i) != Some(&turn.token_ids[*i])) else {
            return true;
        };
        differing += 1;
        let context = [&turn.prompt_ids[..], &turn.token_ids[..at]].concat();
        let (exact, rounded) = (last_row(&mut wide_session, &context), last_row(&mut narrow_session, &context));
        let error = exact.iter().zip(&rounded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let mut best = exact.clone();
        best.sort_by(|a, b| b.total_cmp(a));
        let margin = best[0] - best[1];
        println!("{:?} at token {at}: margin {margin:.4}, BF16 error {error:.4}", turn.user);
        assert!(margin <= 2.0 * error, "{}: margin {margin}, BF16 error only {error}", turn.user);
        false
    });
    println!("{differing} of 500 conversations differ");
    assert!(differing <= 5, "{differing} of 500 conversations differ");
}

/// Most of FP32's answers in the 500 conversations match; a quantized precision may lose a few of those: half a percent
/// with 8 bits, two percent with 4.
#[test]
fn quantized_answers_stay_right() {
    let exact = |value: &Value| value["exact"].as_bool().unwrap();
    let reference = json_lines("answers.jsonl").iter().filter(|answer| exact(answer)).count();
    for (precision, may_lose) in
        [(Precision::Int8, 2), (Precision::Int4, 10), (Precision::Fp8, 2), (Precision::W8a8, 2)]
    {
        let folder = tempfile::tempdir().unwrap();
        let package = build_package(Path::new(CHECKPOINT), precision, &folder.path().join("engine"));
        let mut wrong = 0;
        converse(&package, |turn, answer, _| {
            let right = answer.text == turn.expected;
            wrong += usize::from(!right);
            right // one wrong answer makes the conversation wrong
        });
        println!("{precision}: {} of 500 exact, f32 {reference}", 500 - wrong);
        assert!(500 - wrong + may_lose >= reference, "{precision}: {} exact, f32 {reference}", 500 - wrong);
    }
}

fn last_row(session: &mut Session, ids: &[u32]) -> Vec<f32> {
    let mut last = Vec::new();
    session.score(ids, &mut |_, row| last = row.to_vec()).unwrap();
    last
}

/// All first turns at once, in eight slots: batching does not change any token.
#[test]
fn batched_answers_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let package = build_package(Path::new(CHECKPOINT), Precision::F32, &folder.path().join("engine"));
    let tokenizer = tokenizer(&package);
    let format = package.chat_format();
    let mut batcher = Batcher::new(executor(&package), Some(tokenizer.clone()), 500);
    let mut expected = std::collections::HashMap::new();
    for conversation in conversations() {
        let messages = [Message::system(conversation.system), Message::user(conversation.turns[0].user.clone())];
        let request = GenerationRequest::chat(&tokenizer, &format, &messages).unwrap();
        assert_eq!(request.prompt, conversation.turns[0].prompt_ids);
        let id = batcher.submit(request.max_tokens(MAX_TOKENS)).unwrap();
        expected.insert(id, conversation.turns.into_iter().next().unwrap());
    }
    let mut streamed = std::collections::HashMap::new();
    while !batcher.is_idle() {
        for (id, event) in batcher.step() {
            match event {
                Event::Text(text) => streamed.entry(id).or_insert_with(String::new).push_str(&text),
                Event::Done(answer) => {
                    let turn = expected.remove(&id).unwrap();
                    assert_eq!(answer.token_ids, turn.token_ids, "{}", turn.user);
                    assert_eq!(streamed.remove(&id).unwrap_or_default(), turn.text);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(expected.is_empty(), "{} requests were never answered", expected.len());
}
