//! Tests of the real executable, each in a fresh folder.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use aotron::backend::tensorrt::{LibraryKind, TensorRtLibrary};
use aotron::compile::Precision;
use aotron::isa::Isa;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::packages::build_package;
use crate::skips::skip;

const CHAT: &str = "tests/data/tiny-chat";
const ODD: &str = "tests/data/shapes/odd";

/// A chat model's package, and one without a tokenizer; built once and never modified.
static PACKAGES: LazyLock<(TempDir, PathBuf, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let (chat, odd) = (folder.path().join("chat"), folder.path().join("odd"));
    build_package(Path::new(CHAT), Precision::F32, &chat);
    build_package(Path::new(ODD), Precision::F32, &odd);
    (folder, chat, odd)
});

fn chat() -> &'static str {
    PACKAGES.1.to_str().unwrap()
}

fn odd() -> &'static str {
    PACKAGES.2.to_str().unwrap()
}

/// Outcome of a command.
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}{}", self.out, self.err))
    }

    /// Asserts that the command succeeded.
    pub fn ok(self) -> Ran {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self
    }

    /// Asserts that the command failed with this exit code and these words on standard error, and printed nothing on
    /// standard output.
    pub fn fails(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        assert_eq!(self.out, "");
        assert!(self.err.lines().any(|line| line.starts_with("error: ")), "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "no `{word}` in: {}", self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
    }
}

pub fn aotron(args: &[&str]) -> Ran {
    aotron_with(args, b"")
}

pub fn aotron_with(args: &[&str], input: &[u8]) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_aotron"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that fails early does not read its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    Ran { code: status.code(), out: String::from_utf8(stdout).unwrap(), err: String::from_utf8(stderr).unwrap() }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn a_dry_run_says_what_a_build_takes_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let dry = ["build", CHAT, "--recipe", "cpu:int8", "--dry-run", "-o", text(&output)];
    let ran = aotron(&dry).ok();
    for line in ["reads 6.29 MiB of weights", "weights/cpu-int8.safetensors", "disk ", "memory "] {
        assert!(ran.err.contains(line), "{line}: {}", ran.err);
    }
    assert_eq!(ran.out, "");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    // An existing output is refused before anything is read.
    aotron(&["build", CHAT, "-o", text(&output)]).ok();
    aotron(&dry).fails(1, &["--force"]);
}

#[test]
fn inspect_describes_a_nemo() {
    let ran = aotron(&["inspect", "tests/data/nemo/zarr-tp2.nemo"]).ok();
    for line in [
        "a nemo checkpoint",
        "a distributed checkpoint, zarr",
        "tensor parallel 2",
        "<extra_id_1> 5",
        "generation   ended by id 3, id 5",
    ] {
        assert!(ran.out.contains(line), "{line}: {}", ran.out);
    }
    assert!(ran.err.contains("differs from the model card: hidden_size is 16; the model card has 4096"), "{}", ran.err);
    let json = aotron(&["inspect", "tests/data/nemo/zarr-tp2.nemo", "--format", "json"]).ok().json();
    assert_eq!((&json["format"], &json["ends"]), (&json!("nemo"), &json!([3, 5])));
    assert_eq!(json["tokenizer"]["special_ids"]["<extra_id_1>"], 5);
    assert!(json["differences_from_model_card"].as_array().unwrap().len() > 5, "{json}");
    // The checkpoint's tokenizer can be inspected too.
    let ids = aotron(&["tokenize", "tests/data/nemo/zarr-tp2.nemo", "--text", "Hi"]).ok();
    assert!(ids.out.contains("<extra_id_1>"), "{}", ids.out);
}

#[test]
fn build_makes_a_package_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let build = ["build", CHAT, "--precision", "bf16", "--slots", "3", "--max-sequence-tokens", "100", "-v", "-o"];
    let with = |more: &[&str]| aotron(&[&build[..], &[text(&output)], more].concat());
    let ran = with(&[]).ok();
    assert!(ran.out.contains("3 sequences of 100 tokens"), "{}", ran.out);
    assert!(ran.out.contains(&format!("aotron chat {}", text(&output))), "{}", ran.out);
    assert!(ran.err.contains("packing: ") && ran.err.contains("fuse-linears: "), "{}", ran.err);
    aotron(&["run", text(&output), "--prompt", "hi", "-n", "3", "--verify"]).ok();

    with(&[]).fails(1, &["--force"]);
    with(&["--force"]).ok();
    let recipe = aotron(&["inspect", text(&output), "--format", "json"]).ok().json()["manifest"]["plans"][0]["recipe"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(recipe.contains("# On the command line: slots = 3"), "{recipe}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside the package");
}

/// The checkpoint has the same tokenizer in both formats, so the answers are the same with either.
#[test]
fn a_sentencepiece_model_is_a_tokenizer_too() {
    let folder = tempfile::tempdir().unwrap();
    let (checkpoint, output) = (folder.path().join("checkpoint"), folder.path().join("engine"));
    std::fs::create_dir(&checkpoint).unwrap();
    for entry in std::fs::read_dir(CHAT).unwrap().map(Result::unwrap) {
        if entry.file_name() != "tokenizer.json" {
            std::fs::copy(entry.path(), checkpoint.join(entry.file_name())).unwrap();
        }
    }
    let (checkpoint, output) = (text(&checkpoint), text(&output));
    let built = aotron(&["build", checkpoint, "--precision", "f32", "-o", output]).ok();
    assert!(!built.err.contains("tokenizer"), "{}", built.err);
    for prompt in ["What is the capital of France?", " two  spaces, é日🙂\t▁ <extra_id_1>User\n"] {
        let tokens = aotron(&["tokenize", chat(), "--text", prompt]).ok().json();
        for path in [checkpoint, output] {
            assert_eq!(aotron(&["tokenize", path, "--text", prompt]).ok().json(), tokens, "{path}");
        }
        let run = |engine: &str| aotron(&["run", engine, "--prompt", prompt, "-n", "20"]).ok().out;
        assert_eq!(run(output), run(chat()));
    }
    for package in [output, chat()] {
        assert!(Path::new(package).join("tokenizer.aotron").is_file(), "{package} keeps the tokenizer in the one form");
    }
    // `</s>` is a piece that text never encodes to; with a tokenizer.json it may be one that it does.
    let ids = aotron(&["tokenize", output, "--raw", "--text", "</s>"]).ok().json();
    assert!(ids["ids"].as_array().unwrap().len() > 1, "{ids}");
    let answer = aotron_with(&["chat", output, "-n", "20"], b"What is the capital of France?\n").ok().out;
    assert!(answer.contains("Paris"), "{answer}");
    let inspected = aotron(&["inspect", output]).ok().out;
    assert!(inspected.contains("tokenizer.model"), "{inspected}");
    let inspected = aotron(&["inspect", checkpoint]).ok().out;
    for word in ["2816 ids, in tokenizer.model", "SentencePiece bpe", "4 user-defined", "byte fallback"] {
        assert!(inspected.contains(word), "no `{word}` in: {inspected}");
    }
    let json = aotron(&["inspect", checkpoint, "--format", "json"]).ok().json();
    assert_eq!(json["tokenizer"]["sentencepiece"]["eos_id"], 3, "{}", json["tokenizer"]);
}

#[test]
fn fp8_is_calibrated_with_the_users_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (prompts, output) = (path("prompts.jsonl"), path("engine"));
    let build = |precision: &str| {
        let args = ["build", CHAT, "--precision", precision, "--calibration", &prompts, "--force", "-v", "-o", &output];
        aotron(&args)
    };
    let scales = |prompt: &str| {
        std::fs::write(&prompts, format!("{prompt}\n")).unwrap();
        let ran = build("fp8").ok();
        assert!(ran.err.contains("calibrating: ") && ran.err.contains("fake-quantize-inputs: "), "{}", ran.err);
        assert!(!Path::new(&output).join("calibration.safetensors").exists());
        let graph = aotron(&["inspect", &output, "--graph"]).ok().out;
        assert!(graph.contains("codes(model.layers.0.self_attn.o_proj.weight"), "{graph}");
        assert!(!graph.contains("codes(rows(model.layers.0.self_attn.q_proj.weight"), "kept in BF16: {graph}");
        graph.lines().filter(|line| line.contains("= fake_quantize")).map(str::to_owned).collect::<Vec<String>>()
    };
    let hello = scales(r#"{"messages": [{"role": "user", "content": "Hello!"}]}"#);
    assert!(!hello.is_empty() && hello != scales(r#"{"token_ids": [4, 306, 7, 7, 5, 276, 7]}"#));
    assert!(aotron(&["inspect", &output]).ok().out.contains("fp8, plans/cpu.json"));
    assert!(aotron(&["inspect", &output, "--program"]).ok().out.contains("= fake_quantize_f8"));
    aotron(&["run", &output, "--prompt", "hi", "-n", "3", "--verify"]).ok();

    build("int8").fails(1, &["int8 needs no calibration", "prompts.jsonl"]);
    std::fs::write(&prompts, "{\"token_ids\": [1]}\n{\"token_ids\": [99999]}\n").unwrap();
    build("fp8").fails(1, &["prompts.jsonl: line 2", "99999"]);
    std::fs::write(&prompts, r#"{"messages": [{"role": "assistant", "content": "Hello!"}]}"#).unwrap();
    build("fp8").fails(1, &["prompts.jsonl: line 1", "assistant"]);
    std::fs::remove_file(&prompts).unwrap();
    build("fp8").fails(1, &["prompts.jsonl"]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside the package");
}

#[test]
fn build_refuses_what_does_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let build = |more: &[&str]| aotron(&[&["build", ODD, "-o", text(&output)], more].concat());
    build(&["--max-sequence-tokens", "65"]).fails(1, &["max_sequence_tokens is 65", "64"]);
    build(&["--recipe", "tpu"]).fails(2, &["no such recipe", "cpu"]);
    build(&["--slots", "-1"]).fails(2, &["invalid value '-1' for '--slots"]);
    build(&["--precision", "int2"]).fails(2, &["f32, bf16, int8, int4, fp8, w8a8"]);
    build(&["--slots", "0"]).fails(2, &["0"]);
    aotron(&["build", text(folder.path()), "-o", text(&output)]).fails(1, &["config.json"]);
    assert!(!output.exists());
}

#[test]
fn a_recipe_file_is_named_in_what_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (output, recipe) = (folder.path().join("engine"), folder.path().join("mine.toml"));
    let text_of = |tokens: usize| {
        format!(
            "target = 'cpu'\nprecision = 'f32'\nslots = 2\nmax_sequence_tokens = {tokens}\nprefill_chunk_tokens = 8\n\
             logits_rows = 1\n"
        )
    };
    std::fs::write(&recipe, text_of(65)).unwrap();
    let build = |recipes: &str| aotron(&["build", ODD, "-o", text(&output), "--recipe", recipes]);
    build(text(&recipe)).fails(1, &[&format!("recipe {}: max_sequence_tokens is 65", recipe.display())]);
    std::fs::write(&recipe, text_of(64)).unwrap();
    build(&format!("cpu,{}", recipe.display())).fails(1, &["mine.toml: it is the second one for the target cpu"]);
    build(text(&recipe)).ok();
    let finish = |more: &[&str]| aotron(&[&["build", text(&output), "--finish"], more].concat());
    finish(&["--recipe", "cpu,a100"]).fails(2, &["one --recipe at a time"]);
    finish(&["--recipe", "cpu:int8"]).fails(2, &["name cpu without :int8"]);
    finish(&["--recipe", text(&recipe), "--cpu", "portable"]).ok();
    let stored = aotron(&["inspect", text(&output), "--format", "json"]).ok().json();
    let stored = stored["manifest"]["plans"][0]["recipe"].as_str().unwrap().to_owned();
    assert!(stored.starts_with(&text_of(64)) && stored.contains("CPU portable"), "{stored}");
}

#[test]
fn the_cpu_of_a_plan_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let (output, recipe) = (folder.path().join("engine"), folder.path().join("mine.toml"));
    let cpu = std::fs::read_to_string("engines/cpu.toml").unwrap();
    let cpu = cpu.replace("precision = \"bf16\"", "precision = \"int8\"\nactivations = \"int8\"");
    std::fs::write(&recipe, cpu).unwrap();
    let build = ["build", ODD, "--force", "-o", text(&output)];
    let with = |more: &[&str]| aotron(&[&build[..], more].concat()).ok().out;
    let facts = || aotron(&["inspect", text(&output), "--format", "json"]).ok().json()["cpu_plan"].clone();
    let built = with(&["--recipe", text(&recipe), "--cpu", "avx512-vnni"]);
    let inspected = aotron(&["inspect", text(&output)]).ok().out;
    for shown in [built, inspected] {
        assert!(shown.contains("packed for avx512-vnni (int8-quads-vnni, bf16-pairs), with activations"), "{shown}");
    }
    let packings = json!(["int8-quads-vnni", "bf16-pairs"]);
    assert_eq!(facts(), json!({"packed_for": "avx512-vnni", "packings": packings, "activations": "int8"}));
    let built = with(&["--precision", "f32", "--cpu", "portable"]);
    assert!(built.contains("packed for portable (f32)\n"), "{built}");
    assert_eq!(facts(), json!({"packed_for": "portable", "packings": ["f32"], "activations": "float"}));
    // A plan that cannot be read is no reason not to show the rest.
    let mut manifest = aotron(&["inspect", text(&output)]).ok().out;
    assert!(manifest.contains("  packed for portable"), "{manifest}");
    let plan = output.join("plans/cpu.json");
    let damaged = std::fs::read_to_string(&plan).unwrap().replacen("\"version\":3", "\"version\":9", 1);
    std::fs::write(&plan, damaged).unwrap();
    manifest = aotron(&["inspect", text(&output)]).ok().out;
    assert!(manifest.contains("  packed for unknown: engine package"), "{manifest}");
    assert!(facts()["error"].as_str().unwrap().contains("plans/cpu.json"), "{}", facts());
}

#[test]
fn the_variable_names_the_cpu_that_builds_and_doctor_take() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let with = |value: &[u8], args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aotron"));
        let ran = command.args(args).env("AOTRON_CPU", OsStr::from_bytes(value)).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ran { code: ran.status.code(), out: text(ran.stdout), err: text(ran.stderr) }
    };
    let build = ["build", ODD, "--force", "-o", text(&output)];
    let native = [&build[..], &["--cpu", "native"]].concat();
    for args in [&build[..], &native] {
        let ran = with(b"portable", args).ok();
        assert!(ran.out.contains("packed for portable ("), "{}", ran.out);
        for (bad, shown) in [(&b"amx"[..], "`amx`"), (b"", "``"), (b"a\xff", "`a\u{fffd}`")] {
            let ran = with(bad, args);
            assert!(ran.code != Some(0) && ran.err.contains(&format!("AOTRON_CPU is {shown}")), "{}", ran.err);
        }
    }
    let ran = with(b"portable", &["doctor"]).ok();
    assert!(ran.out.contains("portable (named by AOTRON_CPU, of portable"), "{}", ran.out);
    let json = with(b"portable", &["doctor", "--format", "json"]).ok().json();
    assert_eq!(json["instruction_set"], "portable");
    with(b"amx", &["doctor"]).fails(1, &["AOTRON_CPU is `amx`"]);
}

#[test]
fn run_gives_the_same_answer_in_every_form() {
    let args = ["run", chat(), "--prompt", "What is 3 + 4?", "-n", "20"];
    let with = |more: &[&str]| aotron(&[&args[..], more].concat()).ok();
    let json = with(&["--format", "json"]).json();
    let answer = json["text"].as_str().unwrap();
    assert_eq!(answer, answer.trim());
    assert_eq!(json["completion_tokens"].as_u64().unwrap() as usize, ids(&json["token_ids"]).len());
    assert!(json["finish_reason"] == "stop" || json["completion_tokens"] == 20);
    assert!(json["seed"].is_u64() && json["timings"]["load_seconds"].is_f64());
    assert_eq!(with(&[]).out, format!("{answer}\n"));
    assert_eq!(with(&["--no-stream", "--threads", "1"]).out, format!("{answer}\n"));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "What is 3 + 4?\n").unwrap();
    let from_file = aotron(&["run", chat(), "--prompt-file", text(&file), "-n", "20"]).ok();
    let piped = aotron_with(&["run", chat(), "-n", "20"], b"What is 3 + 4?\r\n").ok();
    assert_eq!([from_file.out, piped.out], [format!("{answer}\n"), format!("{answer}\n")]);
}

#[test]
fn run_applies_the_template_unless_told_not_to() {
    let prompt_tokens = |more: &[&str]| {
        let args = ["run", chat(), "--prompt", "hi", "-n", "1", "--format", "json"];
        aotron(&[&args[..], more].concat()).ok().json()["prompt_tokens"].as_u64().unwrap()
    };
    let tokens_of = |more: &[&str]| {
        let json = aotron(&[&["tokenize", chat(), "--text", "hi"], more].concat()).ok().json();
        assert_eq!(json["pieces"].as_array().unwrap().len(), ids(&json["ids"]).len());
        ids(&json["ids"]).len() as u64
    };
    assert_eq!(prompt_tokens(&[]), tokens_of(&[]));
    assert_eq!(prompt_tokens(&["--raw"]), tokens_of(&["--raw"]));
    assert!(tokens_of(&[]) > tokens_of(&["--raw"]));
    assert!(prompt_tokens(&["--system", "Be brief."]) > prompt_tokens(&[]));
}

#[test]
fn token_ids_are_what_the_text_would_be() {
    let tokens = aotron(&["tokenize", CHAT, "--text", "What is 3 + 4?"]).ok().json();
    let list = tokens["ids"].to_string();
    let by_ids = aotron(&["run", "--token-ids", &list, chat(), "-n", "9", "--format", "json"]).ok().json();
    let by_text = aotron(&["run", chat(), "-p", "What is 3 + 4?", "-n", "9", "--format", "json"]).ok().json();
    assert_eq!(by_ids["token_ids"], by_text["token_ids"]);
    assert_eq!(by_ids["prompt_tokens"], by_text["prompt_tokens"]);
}

#[test]
fn without_a_tokenizer_there_are_ids() {
    let ran = aotron(&["run", odd(), "--token-ids", "1,2,3", "-n", "4"]).ok();
    assert!(ran.err.contains("no tokenizer"), "{}", ran.err);
    let json = aotron(&["run", odd(), "--token-ids", "1,2,3", "-n", "4", "--format", "json"]).ok().json();
    assert!(json["text"].is_null());
    let list: Vec<String> = ids(&json["token_ids"]).iter().map(u64::to_string).collect();
    assert_eq!(ran.out, list.join(",") + "\n");
    aotron(&["run", odd(), "--prompt", "hi"]).fails(1, &["no tokenizer", "--token-ids"]);
    aotron(&["chat", odd()]).fails(1, &["no tokenizer"]);
    aotron(&["tokenize", odd(), "--text", "hi"]).fails(1, &["no tokenizer"]);
}

#[test]
fn sampling_flags_do_what_they_say() {
    let run = |more: &[&str]| {
        let args = ["run", chat(), "--raw", "--prompt", "The", "-n", "16", "--format", "json"];
        aotron(&[&args[..], more].concat()).ok()
    };
    let greedy = run(&[]).json();
    let sampled = run(&["--temperature", "5", "--seed", "7"]);
    assert_eq!(sampled.err, "");
    assert_eq!(sampled.json()["seed"], 7);
    assert_ne!(sampled.json()["token_ids"], greedy["token_ids"]);
    assert_eq!(sampled.json()["token_ids"], run(&["--temperature", "5", "--seed", "7"]).json()["token_ids"]);
    let first = ids(&greedy["token_ids"])[0];
    let biased = run(&["--logit-bias", &format!("{first}=-100")]).json();
    assert_ne!(ids(&biased["token_ids"])[0], first);
    let idle = run(&["--seed", "7"]);
    assert!(idle.err.contains("--seed has no effect"), "{}", idle.err);
    assert_eq!(idle.json()["token_ids"], greedy["token_ids"]);
    let long = run(&["--min-tokens", "16"]).json();
    assert_eq!((&long["finish_reason"], ids(&long["token_ids"]).len()), (&Value::from("length"), 16));
    let shown = long["text"].as_str().unwrap();
    let stop: String = shown.chars().skip(3).take(2).collect();
    let stopped = run(&["--min-tokens", "16", "--stop", &stop]).json();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"], shown.split(&stop).next().unwrap());
}

#[test]
fn run_refuses_what_it_cannot_do() {
    let run = |more: &[&str]| aotron(&[&["run", chat()], more].concat());
    run(&[]).fails(2, &["there is no prompt"]);
    run(&["--prompt", "a", "--token-ids", "1"]).fails(2, &["cannot be used with"]);
    run(&["--prompt", "a", "--raw", "--system", "b"]).fails(2, &["cannot be used with"]);
    run(&["--token-ids", "1", "--raw"]).fails(2, &["cannot be used with"]);
    run(&["--token-ids", "1,x"]).fails(2, &["`x` is not a token id"]);
    run(&["--prompt", "a", "--logit-bias", "3"]).fails(2, &["42=-1.5"]);
    run(&["--prompt", "a", "--threads", "0"]).fails(2, &["0"]);
    run(&["--prompt", "a", "--isa", "altivec"]).fails(2, &["this machine has"]);
    run(&["--prompt", "a", "--top-p", "1.5"]).fails(2, &["top_p is 1.5", "0 to 1"]);
    run(&["--prompt", "a", "--temperature", "nan"]).fails(2, &["temperature is NaN"]);
    run(&["--prompt", "a", "--logit-bias", "99999999=1"]).fails(2, &["99999999"]);
    run(&["--prompt", "a", "-n", "-1"]).fails(2, &["invalid value '-1' for '--max-tokens"]);
    for blank in ["", " \n\t", "\u{feff}"] {
        run(&["--prompt", blank]).fails(2, &["the prompt is empty"]);
        run(&["--prompt", blank, "--raw"]).fails(2, &["the prompt is empty"]);
    }
    run(&["--token-ids", "99999999"]).fails(1, &["99999999"]);
    run(&["--prompt-file", "nowhere.txt"]).fails(1, &["cannot open nowhere.txt"]);
    aotron_with(&["run", chat()], b"ab\xff").fails(1, &["standard input is not UTF-8", "byte 2"]);
    let long = "word ".repeat(2000);
    run(&["--prompt", &long]).fails(1, &["the prompt has", "holds 512 tokens"]);
    aotron(&["run", "nowhere", "--prompt", "a"]).fails(1, &["nowhere", "aotron build"]);
    aotron(&["run", CHAT, "--prompt", "a"]).fails(1, &["not an engine package", &format!("`aotron build {CHAT}`")]);
    aotron(&["build", CHAT, "--finish"]).fails(1, &["not an engine package", &format!("`aotron build {CHAT}`")]);
    aotron(&["build", chat()]).fails(1, &["is an engine package", &format!("`aotron build {} --finish`", chat())]);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_prompt() {
    let answer = |prompt: &str| aotron(&["run", chat(), "-p", prompt, "-n", "5", "--format", "json"]).ok().json();
    assert_eq!(answer("\u{feff}hi")["prompt_tokens"], answer("hi")["prompt_tokens"]);
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    for args in [&["inspect", ODD][..], &["doctor", "--format", "json"], &["--help"], &["completions", "bash"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let ran = Command::new(env!("CARGO_BIN_EXE_aotron")).args(args).stdout(full).output().unwrap();
        let error = String::from_utf8(ran.stderr).unwrap();
        assert_eq!(ran.status.code(), Some(1), "{args:?}: {error}");
        assert!(error.contains("error: cannot write to standard output: "), "{args:?}: {error}");
        assert_eq!(error.matches("standard output").count(), 1, "{error}");
    }
}

#[test]
fn messages_do_not_control_the_terminal() {
    let bad = "no\u{1b}[31m\u{202e}where";
    let shown = r"no\u{1b}[31m\u{202e}where";
    for (code, args) in [
        (1, &["run", bad, "-p", "a"][..]),
        (1, &["inspect", bad]),
        (2, &["run", chat(), "-p", "a", "--top-k", bad]),
        (2, &["build", ODD, "--recipe", bad]),
        (2, &[bad]),
    ] {
        aotron(args).fails(code, &[shown]);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(bad);
    build_package(Path::new(ODD), Precision::F32, &path);
    let ran = aotron(&["run", text(&path), "--token-ids", "1", "-n", "1"]).ok();
    assert!(ran.err.contains(&format!("{shown} has no tokenizer")) && !ran.err.contains('\u{1b}'), "{}", ran.err);
}

#[test]
fn a_damaged_package_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("engine");
    build_package(Path::new(ODD), Precision::F32, &path);
    let weights = path.join("weights/cpu-f32.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let run = ["run", text(&path), "--token-ids", "1"];
    aotron(&[&run[..], &["--verify"]].concat()).fails(1, &["weights/cpu-f32.safetensors", "digest"]);
    std::fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    aotron(&run).fails(1, &["weights/cpu-f32.safetensors", "bytes"]);
}

#[test]
fn an_output_nobody_reads_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_aotron"))
        .args(["inspect", odd(), "--graph"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.success());
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
}

#[test]
fn score_writes_the_logits_it_scored_with() {
    let folder = tempfile::tempdir().unwrap();
    let logits = folder.path().join("logits.safetensors");
    let list = Path::new(ODD).join("ids.json");
    let args = ["score", odd(), "--ids", text(&list)];
    let json = aotron(&[&args[..], &["--logits", text(&logits), "--format", "json"]].concat()).ok().json();
    let lists: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(&list).unwrap()).unwrap();

    let bytes = std::fs::read(&logits).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), lists.len());
    let mut total = 0.0;
    for (index, ids) in lists.iter().enumerate() {
        let tensor = file.tensor(&format!("logits.{index}")).unwrap();
        let [rows, columns] = tensor.shape() else { panic!("{:?}", tensor.shape()) };
        assert_eq!(*rows, ids.len());
        let values: Vec<f64> =
            tensor.data().as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        let log_probability: f64 = values
            .chunks(*columns)
            .zip(&ids[1..])
            .map(|(row, id)| row[*id as usize] - row.iter().map(|value| value.exp()).sum::<f64>().ln())
            .sum();
        let score = &json["lists"][index];
        assert_eq!(score["tokens"], ids.len());
        let stated = score["log_probability"].as_f64().unwrap();
        assert!((stated - log_probability).abs() < 1e-3 * log_probability.abs(), "{stated} {log_probability}");
        total += stated;
    }
    assert!((json["overall"]["log_probability"].as_f64().unwrap() - total).abs() < 1e-9);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside the file");
    let table = aotron(&args).ok().out;
    assert_eq!(table.lines().count(), lists.len() + 2, "{table}");
}

#[test]
fn score_refuses_before_it_computes() {
    let folder = tempfile::tempdir().unwrap();
    let (list, logits) = (folder.path().join("ids.json"), folder.path().join("logits.safetensors"));
    let score = |json: &str| {
        std::fs::write(&list, json).unwrap();
        aotron(&["score", odd(), "--ids", text(&list), "--logits", text(&logits)])
    };
    let long = format!("[[1], {:?}]", vec![1; 65]);
    score(&long).fails(1, &["list 1 has 65 ids", "1 to 64"]);
    score("[[1], []]").fails(1, &["list 1 has 0 ids"]);
    score("[[1, 70000]]").fails(1, &["list 0 has id 70000"]);
    score("[1, 2]").fails(1, &["list of lists"]);
    score("[]").fails(1, &["no list"]);
    assert!(!logits.exists());
    let one = aotron(&["score", odd(), "--ids", text(&list), "--format", "json"]);
    one.fails(1, &["no list"]);
    std::fs::write(&list, "[[1]]").unwrap();
    let json = aotron(&["score", odd(), "--ids", text(&list), "--format", "json"]).ok().json();
    assert!(json["lists"][0]["perplexity"].is_null());
}

#[test]
fn chat_answers_piped_questions() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved.json");
    let input = format!("What is 3 + 4?\n\n/system Be brief.\nHello\n/save {}\n/stats\n/quit\nnever\n", text(&saved));
    let ran = aotron_with(&["chat", chat(), "-n", "20"], input.as_bytes()).ok();
    assert!(ran.out.starts_with("> What is 3 + 4?\n"), "{}", ran.out);
    assert!(ran.out.contains("\n> Hello\n") && !ran.out.contains("never"), "{}", ran.out);
    assert!(ran.out.contains("KV cache") && !ran.out.contains('\x1b'), "{}", ran.out);
    let messages: Vec<aotron::text::Message> = serde_json::from_slice(&std::fs::read(&saved).unwrap()).unwrap();
    let roles: Vec<String> = messages.iter().map(|message| message.role.to_string()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert!(ran.out.contains(&format!("> What is 3 + 4?\n{}", messages[2].content)), "{}", ran.out);

    let first = aotron(&["run", chat(), "--prompt", "What is 3 + 4?", "-n", "20"]).ok().out;
    assert_eq!(first.trim_end(), messages[2].content);
}

#[test]
fn chat_ends_at_an_error_in_its_input() {
    let ran = aotron_with(&["chat", chat()], b"/nonsense\nHello\n");
    ran.fails(1, &["unknown command /nonsense"]);
    aotron_with(&["chat", chat()], b"\xff\n").fails(1, &["standard input is not UTF-8"]);
    let ran = aotron_with(&["chat", chat()], "word ".repeat(2000).as_bytes());
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("the prompt has"), "{}", ran.err);
}

#[test]
fn inspect_describes_both() {
    let engine = aotron(&["inspect", chat()]).ok().out;
    let checkpoint = aotron(&["inspect", CHAT]).ok().out;
    for (text, words) in [
        (&engine, ["an engine package", "tokenizer.json", "KV memory", "weights/cpu-f32.safetensors"]),
        (&checkpoint, ["hugging-face checkpoint", "parameters", "model.layers.*.mlp.up_proj.weight", "KV memory"]),
    ] {
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    let engine = aotron(&["inspect", chat(), "--format", "json"]).ok().json();
    let checkpoint = aotron(&["inspect", CHAT, "--format", "json"]).ok().json();
    assert_eq!((&engine["kind"], &checkpoint["kind"]), (&"engine".into(), &"checkpoint".into()));
    assert_eq!(engine["parameters"], checkpoint["parameters"]);
    assert_eq!(engine["manifest"]["model"], checkpoint["model"]);

    for path in [odd(), ODD] {
        let dumps = aotron(&["inspect", path, "--graph", "--program", "--passes"]).ok().out;
        for word in ["fuse-linears: ", "%0 token_ids: ", "return %", "= attention ("] {
            assert!(dumps.contains(word), "no {word} in {dumps}");
        }
    }
    aotron(&["inspect", "nowhere"]).fails(1, &["nowhere"]);
}

#[test]
fn inspect_shows_what_tensorrt_makes_of_a_model() {
    aotron(&["inspect", CHAT, "--recipe", "a100"]).fails(2, &["--recipe is for --network and --kernels"]);
    aotron(&["inspect", CHAT, "--kernels=some"]).fails(2, &["expected nothing or `all`"]);
    aotron(&["inspect", CHAT, "--kernels", "--recipe", "cpu"]).fails(2, &["recipe cpu is not for a GPU"]);
    aotron(&["inspect", CHAT, "--network", "--precision", "fp8"]).fails(1, &["fp8 is not for a100"]);
    if let Err(error) = TensorRtLibrary::find(LibraryKind::Rtx) {
        skip("tensorrt", "inspect_shows_what_tensorrt_makes_of_a_model", error);
        aotron(&["inspect", CHAT, "--network"]).fails(1, &["TensorRT for RTX (libtensorrt_rtx.so.1) is not installed"]);
        return;
    }
    // A config suffices, and a package contains one.
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(Path::new(CHAT).join("config.json"), folder.path().join("config.json")).unwrap();
    let network = aotron(&["inspect", CHAT, "--network"]).ok().out;
    for path in [folder.path().to_str().unwrap(), chat()] {
        assert_eq!(aotron(&["inspect", path, "--network"]).ok().out, network, "{path}");
    }
    let all = aotron(&["inspect", CHAT, "--network=all"]).ok().out;
    assert!(network.contains("layers 1 to 4, all alike") && all.contains("\nlayer 4\n"), "{network}{all}");

    let kernels = aotron(&["inspect", CHAT, "--kernels"]).ok().out;
    for words in
        ["compiled for SM 8.0", "decode: 44 kernels, 8 in each of 5 layers", "context prefill: 49 kernels", "A100"]
    {
        assert!(kernels.contains(words), "no {words} in {kernels}");
    }
    let args = ["inspect", CHAT, "--kernels", "--recipe", "h100", "--format", "json"];
    let json = aotron(&args).ok().json();
    let kernels = &json["kernels"];
    assert_eq!((&kernels["compute_capability"], &kernels["compiled_for"]), (&90.into(), &89.into()));
    assert_eq!((&kernels["precision"], &kernels["unread"]), (&"fp8".into(), &Value::Array(vec![])));
    assert_eq!(kernels["steps"].as_array().unwrap().len(), 3);
    for step in kernels["steps"].as_array().unwrap() {
        assert_eq!(step["analysis"]["weight_copies"], Value::Array(vec![]), "{}", step["name"]);
    }
    // Three layers of each block are in FP8. As inputs they are widened in their GEMM's kernel, as constants they are not.
    let products = |recipe: &str| {
        let json = aotron(&["inspect", CHAT, "--kernels", "--recipe", recipe, "--format", "json"]).ok().json();
        let found = &json["kernels"]["fp8_products"];
        let widened = found["widened"].as_array().unwrap().len();
        (found["layers"].as_u64().unwrap(), found["in_fp8"].as_u64().unwrap(), widened)
    };
    assert_eq!(products("h100"), (15, 0, 15));
    let folder = tempfile::tempdir().unwrap();
    let constants = folder.path().join("constants.toml");
    let recipe =
        include_str!("../engines/h100.toml").replace("fp8_weights = \"fastest\"", "fp8_weights = \"constants\"");
    std::fs::write(&constants, recipe).unwrap();
    assert_eq!(products(text(&constants)), (15, 15, 0));
    let listed = aotron(&["inspect", CHAT, "--kernels", "--recipe", text(&constants)]).ok().out;
    for words in ["fp8 products: 15 of 15, with weights as constants", "as compiled for SM 8.9; what the target's own"]
    {
        assert!(listed.contains(words), "no {words} in {listed}");
    }
    assert!(
        aotron(&["inspect", CHAT, "--kernels", "--recipe", "h100"]).ok().out.contains("  dequantized first: model.")
    );
    let int4 = aotron(&["inspect", CHAT, "--kernels=all", "--precision", "int4"]).ok().out;
    for words in [" before the layers\n", " layer 4\n", "in the plan", "of them embedded in the plan"] {
        assert!(int4.contains(words), "no {words} in {int4}");
    }
}

#[test]
fn bench_measures_within_the_limits() {
    let args = ["bench", odd(), "--prompt-tokens", "20", "--decode-tokens", "4", "--repeat", "2", "--threads", "2"];
    let with = |more: &[&str]| aotron(&[&args[..], more].concat());
    let json = with(&["--batch", "1,3", "--format", "json"]).ok().json();
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    for (case, batch) in cases.iter().zip([1, 3]) {
        assert_eq!(case["batch"], batch);
        for speed in ["prefill_tokens_per_second", "decode_tokens_per_second"] {
            let at = |part: &str| case[speed][part].as_f64().unwrap();
            assert!(at("min") > 0.0 && at("min") <= at("median") && at("median") <= at("max"), "{case}");
        }
    }
    assert_eq!((&json["threads"], &json["repeat"], &json["target"]), (&2.into(), &2.into(), &"cpu".into()));
    let text = with(&[]).ok().out;
    assert!(text.contains("memory reads") && text.contains("GB/s") && text.contains("prompt"), "{text}");
    with(&["--batch", "9"]).fails(2, &["--batch 9", "8 sequences"]);
    let long = ["bench", odd(), "--prompt-tokens", "60", "--decode-tokens", "5"];
    aotron(&long).fails(2, &["65 tokens", "holds 64"]);
    aotron(&["bench", odd(), "--repeat", "0"]).fails(2, &["0"]);
}

#[test]
fn bench_measures_decoding_at_a_depth() {
    let args = ["bench", odd(), "--decode-tokens", "4", "--repeat", "1", "--threads", "2"];
    let with = |more: &[&str]| aotron(&[&args[..], more].concat());
    let json = with(&["--depth", "5,60", "--batch", "2", "--format", "json"]).ok().json();
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.iter().map(|case| &case["depth"]).collect::<Vec<_>>(), [&json!(5), &json!(60)]);
    for case in cases {
        assert!(case["decode_tokens_per_second"]["median"].as_f64().unwrap() > 0.0, "{case}");
        for absent in ["prompt_tokens", "prefill_tokens_per_second", "multiply_fraction", "multiply_unit"] {
            assert!(case[absent].is_null() && case.as_object().unwrap().contains_key(absent), "{absent}: {case}");
        }
    }
    let kv = |index: usize| cases[index]["kv_bytes_per_token"].as_f64().unwrap();
    assert_eq!(kv(1) / kv(0), 62.5 / 7.5);
    assert!(with(&["--depth", "5"]).ok().out.contains("depth"));
    with(&["--depth", "5,61"]).fails(2, &["--depth 61", "--decode-tokens 4", "65 tokens", "holds 64"]);
    with(&["--depth", "5", "--prompt-tokens", "9"]).fails(2, &["--depth", "--prompt-tokens"]);
}

#[test]
fn bench_compares_with_probes_on_every_instruction_set() {
    let plan = &aotron(&["inspect", chat(), "--format", "json"]).ok().json()["manifest"]["plans"][0];
    let kv_bytes = plan["kv_bytes_per_token"].as_f64().unwrap();
    // tiny-chat: 5 layers of width 192, 6 heads of 32, an MLP of 768, 2,816 tokens.
    let (width, layers, vocab) = (192.0, 5.0, 2816.0);
    let layer = width * (3.0 * width + width + 2.0 * 768.0);
    let norms = (2.0 * layers + 1.0) * 2.0 * width;
    let (prompt, decoded, batch) = (48.0, 8.0, 2.0);
    let flops = 2.0 * (layers * layer * prompt + vocab * width) + 4.0 * width * layers * prompt * (prompt + 1.0) / 2.0;
    for isa in Isa::available() {
        let isa = isa.to_string();
        let args = ["bench", chat(), "--prompt-tokens", "48", "--decode-tokens", "8", "--batch", "2", "--repeat", "1"];
        let json = aotron(&[&args[..], &["--isa", &isa, "--format", "json"]].concat()).ok().json();
        assert_eq!(json["instructions"], isa.as_str());
        let case = &json["cases"][0];
        let number = |key: &str| {
            case[key].as_f64().filter(|n| n.is_finite() && *n > 0.0).unwrap_or_else(|| panic!("{key}: {case}"))
        };
        let near =
            |value: f64, expected: f64| assert!((value / expected - 1.0).abs() < 1e-9, "{value}, {expected}: {case}");
        near(number("weight_bytes_per_token"), 4.0 * (layers * layer + vocab * width + norms) / batch);
        near(number("kv_bytes_per_token"), kv_bytes * (prompt + (decoded + 1.0) / 2.0));
        let speed = |key: &str| case[key]["median"].as_f64().unwrap();
        let bytes = number("weight_bytes_per_token") + number("kv_bytes_per_token");
        near(number("read_bytes_per_second"), bytes * speed("decode_tokens_per_second"));
        near(number("bandwidth_fraction"), number("read_bytes_per_second") / number("probe_read_bytes_per_second"));
        near(number("prefill_flops_per_second"), flops / prompt * speed("prefill_tokens_per_second"));
        if isa == "portable" {
            for absent in ["probe_multiply_flops_per_second", "multiply_unit", "multiply_fraction"] {
                assert!(case[absent].is_null(), "{absent}: {case}");
            }
        } else {
            assert_eq!(case["multiply_unit"], "vfmadd231ps");
            let rate = number("probe_multiply_flops_per_second");
            near(number("multiply_fraction"), number("prefill_flops_per_second") / rate);
        }
    }
}

#[test]
fn doctor_says_what_there_is() {
    let text = aotron(&["doctor"]).ok().out;
    assert!(text.contains("cpu plans     builds and runs here"), "{text}");
    for paragraph in ["TensorRT for RTX (libtensorrt_rtx.so.1) is not installed", "Run `make tensorrt`"] {
        assert!(text.matches(paragraph).count() <= 1, "once is enough: {text}");
    }
    let json = aotron(&["doctor", "--format", "json"]).ok().json();
    assert!(json["cores"].as_u64().unwrap() > 0);
    assert!(json["instruction_sets"].as_array().unwrap().contains(&"portable".into()));
    let libraries: Vec<&Value> = json["tensorrt"].as_array().unwrap().iter().map(|found| &found["file"]).collect();
    assert_eq!(libraries, ["libtensorrt_rtx.so.1", "libnvinfer.so.11"]);
}

#[test]
fn doctor_says_what_is_wrong_with_a_library() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libtensorrt_rtx.so.1"), "truncated").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_aotron"))
        .arg("doctor")
        .env("AOTRON_TENSORRT_DIR", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.contains("libtensorrt_rtx.so.1 as TensorRT for RTX: "), "{text}");
    assert!(text.contains("file too short") || text.contains("invalid ELF header"), "{text}");
}

#[test]
fn a_package_is_pinned_by_its_digest() {
    let sha256 = aotron(&["inspect", odd(), "--format", "json"]).ok().json()["manifest"]["sha256"].clone();
    let sha256 = sha256.as_str().unwrap();
    assert!(aotron(&["inspect", odd()]).ok().out.contains(sha256));
    let other = sha256.replace(&sha256[..1], if sha256.starts_with('0') { "1" } else { "0" });
    let run: &[&str] = &["run", odd(), "--token-ids", "1,2", "--max-tokens", "1"];
    let commands = [
        run,
        &["inspect", odd()],
        &["bench", odd()],
        &["build", odd(), "--finish"],
        &["tokenize", odd(), "--text", "a"],
    ];
    for command in commands {
        let with = |digest: &str| aotron(&[command, &["--expect", digest]].concat());
        with(&other).fails(1, &[sha256, &other, "another package"]);
        with("12").fails(2, &["64 hexadecimal digits"]);
    }
    let pinned = |digest: &str| aotron(&[run, &["--expect", digest]].concat());
    assert_eq!(pinned(sha256).ok().out, aotron(run).ok().out);
    pinned(&format!("sha256:{}", sha256.to_uppercase())).ok();
    aotron(&["inspect", "tests/data/tiny-chat", "--expect", sha256]).fails(2, &["--expect is for engine packages"]);
    aotron(&["build", "tests/data/tiny-chat", "--expect", sha256]).fails(2, &["--finish"]);
}

#[test]
fn a_model_that_would_take_hours_to_list_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string("tests/data/tiny-chat/config.json").unwrap()).unwrap();
    let path = folder.path().join("config.json");
    for (key, value, words) in
        [("num_hidden_layers", 65, "65 layers"), ("intermediate_size", 1 << 30, "1073741824 by 192 elements")]
    {
        let before = std::mem::replace(&mut config[key], value.into());
        std::fs::write(&path, config.to_string()).unwrap();
        aotron(&["inspect", text(folder.path()), "--network", "--precision", "int4"]).fails(1, &[words]);
        config[key] = before;
    }
}

/// A library is code: one that lies in the folder that a command happens to be started in is never opened.
#[test]
fn libraries_in_the_current_folder_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    for place in ["here", "here/.tensorrt", "here/tensorrt", "here/lib"] {
        std::fs::create_dir_all(folder.path().join(place)).unwrap();
        for library in ["libtensorrt_rtx.so.1", "libnvinfer.so.11"] {
            std::fs::write(folder.path().join(place).join(library), "not the user's").unwrap();
        }
    }
    let run = |program: &Path| {
        let mut command = Command::new(program);
        command.args(["doctor", "--format", "json"]).current_dir(folder.path().join("here"));
        for variable in ["AOTRON_TENSORRT_DIR", "XDG_DATA_HOME", "HOME", "VIRTUAL_ENV", "CONDA_PREFIX"] {
            command.env_remove(variable);
        }
        let output = command.env("XDG_DATA_HOME", ".").output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(Path::new(env!("CARGO_BIN_EXE_aotron")));
    assert!(!text.contains("file too short") && !text.contains("invalid ELF header"), "{text}");
    assert!(text.contains("(libnvinfer.so.11) is not installed"), "{text}");

    // Beside the program, it is the user's own.
    let program = folder.path().join("bin/aotron");
    std::fs::create_dir(folder.path().join("bin")).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_aotron"), &program).unwrap();
    std::fs::write(folder.path().join("bin/libtensorrt_rtx.so.1"), "truncated").unwrap();
    let text = run(&program);
    assert!(text.contains("bin/libtensorrt_rtx.so.1 as TensorRT for RTX: "), "{text}");
}

#[test]
fn help_and_mistakes_go_where_they_belong() {
    let help = aotron(&["--help"]).ok();
    assert!(help.out.contains("build") && help.err.is_empty());
    let ran = aotron(&["fly"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""));
    assert!(aotron(&["--version"]).ok().out.starts_with("aotron "));
}
