//! The programs in `examples/`, run on tiny-chat, and the library as they use it: with any features, or none.

mod packages;

use std::ops::ControlFlow;
use std::path::Path;

use aotron::compile::Precision;
use aotron::{DrainMode, Error, Message, Model, SamplingParams};

use packages::build_package;

#[allow(dead_code)] // its `main`
#[path = "../examples/batch.rs"]
mod batch;
#[allow(dead_code)]
#[path = "../examples/chat.rs"]
mod chat;
#[allow(dead_code)]
#[path = "../examples/custom_sampler.rs"]
mod custom_sampler;
#[allow(dead_code)]
#[path = "../examples/score.rs"]
mod score;

fn tiny_chat(folder: &Path) -> String {
    let path = folder.join("tiny-chat");
    build_package(Path::new("tests/data/tiny-chat"), Precision::F32, &path);
    path.to_str().unwrap().to_owned()
}

/// Threads of this process by their names.
fn threads_named(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|found| found.starts_with(name)).count()
}

#[test]
fn the_examples_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny_chat(folder.path());
    let text = |out: Vec<u8>| String::from_utf8(out).unwrap();

    let mut out = Vec::new();
    chat::run(&path, &mut &b"My name is Felix.\nWhat is my name?\n"[..], &mut out).unwrap();
    let said = text(out);
    assert!(said.contains("Nice to meet you, Felix!") && said.contains("Your name is Felix."), "{said}");

    let mut out = Vec::new();
    let questions = "What is 17 + 25?\nWhat is the capital of France?\n".repeat(6);
    batch::run(&path, &mut questions.as_bytes(), &mut out).unwrap();
    let answers = text(out);
    assert_eq!(answers.lines().count(), 12);
    for (index, line) in answers.lines().enumerate() {
        assert!(line.contains(["17 + 25 = 42.", "The capital of France is Paris."][index % 2]), "{line}");
    }

    let mut out = Vec::new();
    score::run(&path, &mut &b"The capital of France is Paris.\nParis is the France of of.\n"[..], &mut out).unwrap();
    let scores = text(out);
    let perplexities: Vec<f64> = scores.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert!(perplexities[0] * 2.0 < perplexities[1], "{scores}");

    let mut out = Vec::new();
    custom_sampler::run(&path, "What is the capital of France?", 0.0, &mut out).unwrap();
    assert_eq!(text(out), "The capital of France is Paris.\n", "with n = 0 it is greedy");
    let logits = [2.0, 1.9, -5.0, f32::NEG_INFINITY, -5.0];
    let chosen = |n, uniform| custom_sampler::top_n_sigma(&logits, n, uniform);
    assert_eq!([chosen(1.0, 0.0), chosen(1.0, 0.99), chosen(0.0, 0.99), chosen(9.0, 0.9999)], [0, 1, 0, 4]);
}

#[test]
fn sessions_of_a_model_share_its_threads_and_answer_alike() {
    let folder = tempfile::tempdir().unwrap();
    let path = tiny_chat(folder.path());
    let model = Model::options().threads(61).slots(3).open(&path).unwrap();
    assert_eq!((model.target(), model.precision(), model.device()), ("cpu", "f32", None));
    let question = [Message::user("What is 17 + 25?")];
    let request = model.chat_request(&question).unwrap();
    let mut sessions = [(); 3].map(|()| model.session().unwrap());
    let engine = model.engine().unwrap();
    assert_eq!(engine.handle().limits().slots, 3);
    let quiet = &mut |_: &str| ControlFlow::Continue(());
    let answers: Vec<_> = sessions.iter_mut().map(|session| session.generate(&request, quiet).unwrap()).collect();
    let of_engine = engine.handle().submit(request).unwrap().wait().unwrap();
    for answer in answers.iter().chain([&of_engine]) {
        assert_eq!((answer.text.as_str(), &answer.token_ids), ("17 + 25 = 42.", &answers[0].token_ids));
    }
    // Other tests of this process have pools too, none of which is as large. (Threads have their names once they ran.)
    assert_eq!(threads_named("aotron-cpu-60\n"), 1, "one pool for four executors");
    engine.shutdown(DrainMode::Accepted).unwrap();
}

#[test]
fn what_is_wrong_with_opening_can_be_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Model::open(folder.path().join("missing")).unwrap_err();
    assert!(matches!(missing, Error::NoSuchPackage { .. }), "{missing}");
    let empty = Model::open(folder.path()).unwrap_err();
    assert!(matches!(empty, Error::NotAPackage { .. }), "{empty}");
    let path = tiny_chat(folder.path());
    match Model::options().target("h100").open(&path).unwrap_err() {
        Error::NoPlan { refusals, .. } => {
            assert_eq!((refusals.targets, refusals.plans.len()), (vec!["cpu".to_owned()], 0));
        }
        other => panic!("{other}"),
    }
    let error = Model::options().slots(1000).open(&path).unwrap().engine().unwrap_err().to_string();
    assert!(error.contains("1000 slots, but this engine was built for 1 to"), "{error}");
    let model = Model::open(&path).unwrap();
    let request = model.text_request("The").unwrap().sampling(SamplingParams::sampled(0.7).top_k(1));
    let error = model.session().unwrap().stream(request).err().unwrap().to_string();
    assert!(error.contains("temperature has no effect"), "{error}");
}

/// Without TensorRT, whoever asks for it is told so.
#[cfg(not(feature = "tensorrt"))]
#[test]
fn without_the_feature_tensorrt_says_so() {
    use packages::build_recipes;

    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Path::new("tests/data/tiny-chat");
    let built = build_recipes(checkpoint, &[("a100", Precision::Bf16)], false, &folder.path().join("package"));
    let error = built.err().unwrap().to_string();
    assert!(error.contains("cannot build for a100 here: this aotron was built without TensorRT"), "{error}");
    let error = aotron::backend::tensorrt::devices().unwrap_err().to_string();
    assert!(error.contains("built without TensorRT"), "{error}");
}
