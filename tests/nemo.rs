//! Packages from `.nemo` files: the same as from a Hugging Face folder with the same weights.

use std::path::Path;

use aotron::compile::Precision;
use aotron::engine::Package;
use aotron::text::{Message, template};
use serde_json::Value;

use crate::archives::tiny_chat_nemo;
use crate::packages::build_package;

/// Digests of a package's weights and plans, by name.
fn digests(package: &Package) -> Vec<(String, String)> {
    let files = package.manifest().files.iter().filter(|file| !file.path.starts_with("tokenizer"));
    files.map(|file| (file.path.clone(), file.sha256.clone())).collect()
}

#[test]
fn files_of_the_real_writers_become_the_same_package() {
    let folder = tempfile::tempdir().unwrap();
    for precision in [Precision::Bf16, Precision::Int8, Precision::Int4, Precision::F32] {
        let reference =
            build_package(Path::new("tests/data/nemo/hf"), precision, &folder.path().join(precision.to_string()));
        let mut compared = 0;
        for entry in std::fs::read_dir("tests/data/nemo").unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if !name.ends_with(".nemo") || name.contains("padded") {
                continue;
            }
            let package = build_package(&path, precision, &folder.path().join(format!("{precision}-{name}")));
            assert_eq!(digests(&package), digests(&reference), "{name} in {precision}");
            assert_eq!(package.manifest().model, reference.manifest().model, "{name}");
            assert_eq!(package.manifest().generation, reference.manifest().generation, "{name}");
            compared += 1;
        }
        assert!(compared >= 16, "{compared}");
    }
}

/// Rows that only pad the vocabulary hold large random numbers in these files: chosen once, they would show.
#[test]
fn padding_of_the_vocabulary_is_never_sampled() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["ckpt-tp4-padded.nemo", "zarr-tp4-padded.nemo"] {
        let output = folder.path().join(name);
        let package = build_package(&Path::new("tests/data/nemo").join(name), Precision::F32, &output);
        let (rows, ids) = (package.manifest().model.vocab_size, package.tokenizer().unwrap().unwrap().vocab_size());
        assert_eq!((rows, ids), (128, 112));
        for seed in 0..20 {
            let ran = std::process::Command::new(env!("CARGO_BIN_EXE_aotron"))
                .args([
                    "run",
                    output.to_str().unwrap(),
                    "--token-ids",
                    "7,8,9",
                    "--max-tokens",
                    "40",
                    "--format",
                    "json",
                ])
                .args(["--temperature", "5", "--min-tokens", "40", "--seed", &seed.to_string()])
                .output()
                .unwrap();
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
            let answer: Value = serde_json::from_slice(&ran.stdout).unwrap();
            let sampled = answer["token_ids"].as_array().unwrap();
            assert!(sampled.iter().all(|id| id.as_u64().unwrap() < 112), "{answer}");
        }
    }
}

/// Weights and plan are those of the Hugging Face folder, and every prompt of the 500 conversations has the same ids, so
/// every answer is the same.
#[test]
fn tiny_chat_as_a_nemo_is_tiny_chat() {
    let folder = tempfile::tempdir().unwrap();
    let reference = build_package(Path::new("tests/data/tiny-chat"), Precision::Bf16, &folder.path().join("hf"));
    for ranks in [1, 2] {
        let path = folder.path().join(format!("tp{ranks}.nemo"));
        std::fs::write(&path, tiny_chat_nemo(ranks)).unwrap();
        let package = build_package(&path, Precision::Bf16, &folder.path().join(format!("engine-{ranks}")));
        assert_eq!(digests(&package), digests(&reference), "{ranks} ranks");
        let generation = &package.manifest().generation;
        assert_eq!(generation.stop_token_ids, reference.manifest().generation.stop_token_ids);
        assert_eq!(generation.stop_strings, reference.manifest().generation.stop_strings);
        let tokenizer = package.tokenizer().unwrap().unwrap();
        let lines = |file: &str| -> Vec<Value> {
            let text = std::fs::read_to_string(Path::new("tests/data/tiny-chat").join(file)).unwrap();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        };
        let mut prompts = 0;
        for (asked, answered) in lines("conversations.jsonl").iter().zip(&lines("answers.jsonl")) {
            let mut messages = vec![Message::system(asked["system"].as_str().unwrap())];
            for (asked, answered) in
                asked["turns"].as_array().unwrap().iter().zip(answered["turns"].as_array().unwrap())
            {
                messages.push(Message::user(asked["user"].as_str().unwrap()));
                let ids = tokenizer.encode(&template::render(&messages).unwrap()).unwrap();
                assert_eq!(serde_json::json!(ids), answered["prompt_ids"], "{messages:?}");
                messages.push(Message::assistant(answered["text"].as_str().unwrap()));
                prompts += 1;
            }
        }
        assert!(prompts > 700, "{prompts}");
    }
}
