//! Chat formats and generation defaults of checkpoints as published, from building with the program to the answers.
//! Each case is tiny-chat with some of its files replaced.

use std::path::{Path, PathBuf};

use aotron::text::ChatTemplate;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::{Ran, aotron, aotron_with};

const TINY_CHAT: &str = "tests/data/tiny-chat";
const QUESTION: &str = "What is the capital of France?";

/// A copy of tiny-chat with some files replaced, and the path of its package.
struct Case {
    folder: TempDir,
}

impl Case {
    fn new(files: &[(&str, &str)]) -> Case {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = folder.path().join("checkpoint");
        std::fs::create_dir(&checkpoint).unwrap();
        for name in
            ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        {
            std::fs::copy(Path::new(TINY_CHAT).join(name), checkpoint.join(name)).unwrap();
        }
        let case = Case { folder };
        files.iter().for_each(|(name, text)| case.write(name, text));
        case
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.checkpoint().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn checkpoint(&self) -> PathBuf {
        self.folder.path().join("checkpoint")
    }

    fn engine(&self) -> String {
        self.folder.path().join("engine").to_str().unwrap().to_owned()
    }

    fn build(&self, more: &[&str]) -> Ran {
        build(&self.checkpoint(), &self.engine(), more)
    }

    fn run(&self, more: &[&str]) -> Ran {
        aotron(&[&["run", &self.engine(), "--prompt", QUESTION], more].concat())
    }

    /// The ids of a conversation.
    fn ids(&self, messages: &Value, more: &[&str]) -> Vec<u32> {
        let file = self.folder.path().join("messages.json");
        std::fs::write(&file, messages.to_string()).unwrap();
        let engine = self.engine();
        let arguments = [&["tokenize", &engine, "--messages", file.to_str().unwrap()], more].concat();
        serde_json::from_value(aotron(&arguments).ok().json()["ids"].clone()).unwrap()
    }
}

fn build(checkpoint: &Path, engine: &str, more: &[&str]) -> Ran {
    aotron(&[&["build", checkpoint.to_str().unwrap(), "-o", engine, "--force"], more].concat())
}

fn golden(template: &str) -> (String, Vec<(Value, Vec<u32>)>) {
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string("tests/data/chat_templates.json").unwrap()).unwrap();
    let found = golden["templates"].as_array().unwrap().iter().find(|t| t["name"] == template).unwrap();
    let cases = found["cases"].as_array().unwrap().iter().filter(|case| !case["ids"].is_null());
    let cases = cases.map(|case| (case["messages"].clone(), serde_json::from_value(case["ids"].clone()).unwrap()));
    (found["source"].as_str().unwrap().to_owned(), cases.collect())
}

fn config(chat_template: Value) -> String {
    json!({"chat_template": chat_template, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
           "pad_token": "<pad>"})
    .to_string()
}

#[test]
fn a_checkpoints_own_template_is_rendered_as_transformers_does() {
    for name in ["mini", "chatml", "nemotron"] {
        let (source, cases) = golden(name);
        let case = Case::new(&[("tokenizer_config.json", &config(json!(source)))]);
        let built = case.build(&[]).ok();
        assert!(
            built.err.contains("chat template of ") && built.out.contains("jinja template `default`"),
            "{}",
            built.err
        );
        assert_eq!(built.err.contains("<|im_start|>, <|im_end|>, no token of this tokenizer"), name == "chatml");
        for (messages, ids) in &cases {
            assert_eq!(&case.ids(messages, &[]), ids, "{name}: {messages}");
        }
        let stop = if name == "chatml" { "<|im_end|>" } else { "<extra_id_1>" };
        assert!(built.out.contains(&format!("{stop:?}")), "{}", built.out);
    }
}

#[test]
fn named_templates_are_chosen_by_name_and_files_go_first() {
    let list = json!([{"name": "default", "template": golden("mini").0}, {"name": "chatml-like", "template": golden("chatml").0}]);
    let case = Case::new(&[("tokenizer_config.json", &config(list))]);
    case.build(&[]).ok();
    let (_, mini) = golden("mini");
    let (_, chatml) = golden("chatml");
    assert_eq!(case.ids(&mini[1].0, &[]), mini[1].1);
    assert_eq!(case.ids(&mini[1].0, &["--chat-format", "chatml-like"]), chatml[1].1);
    assert_eq!(case.ids(&mini[1].0, &["--chat-format", "chatml"]), chatml[1].1, "the built-in one");
    case.build(&["--chat-format", "chatml-like"]).ok();
    assert_eq!(case.ids(&mini[1].0, &[]), chatml[1].1);
    case.write("chat_template.jinja", golden("mini").0);
    case.build(&[]).ok();
    assert_eq!(case.ids(&mini[1].0, &[]), mini[1].1);
    let names = format!("{}, default", ChatTemplate::built_in_names().join(", "));
    case.build(&["--chat-format", "nope"]).fails(1, &["unknown chat format `nope`", &names]);
    let only_named = Case::new(&[("tokenizer_config.json", &config(json!([{"name": "rag", "template": "x"}])))]);
    only_named.build(&[]).fails(1, &["the chat templates rag and none called default", "--chat-format"]);
    // Inspect lists them all the same.
    let two = json!([{"name": "tool_use", "template": golden("mini").0}, {"name": "rag", "template": "x"}]);
    let only_named = Case::new(&[("tokenizer_config.json", &config(two))]);
    let path = only_named.checkpoint();
    let inspected = aotron(&["inspect", path.to_str().unwrap()]).ok();
    assert!(inspected.out.contains("chat         none called default, but tool_use, rag"), "{}", inspected.out);
    assert!(inspected.err.contains("needs --chat-format, one of tool_use, rag"), "{}", inspected.err);
    let inspected = aotron(&["inspect", path.to_str().unwrap(), "--format", "json"]).ok().json();
    assert_eq!(inspected["chat_templates"], json!(["tool_use", "rag"]));
    assert!(inspected["chat_format"].is_null() && inspected["tokenizer"]["template"].is_null(), "{inspected}");
    let built = only_named.build(&["--chat-format", "tool_use"]).ok();
    let inspected = aotron(&["inspect", &only_named.engine()]).ok();
    for shown in [built.out, inspected.out] {
        assert!(shown.contains("jinja template `tool_use`, also rag"), "{shown}");
    }
    let broken = Case::new(&[("chat_template.jinja", "a\n{% for %}")]);
    broken.build(&[]).fails(1, &["chat_template.jinja: unsupported: its chat template", "line 2", "--chat-format"]);
    broken.build(&["--chat-format", "nemotron"]).ok();
}

/// The ids of a conversation are those of the checkpoint and the format: the format that the package was built with
/// leaves no trace.
#[test]
fn ids_do_not_depend_on_where_the_format_was_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, source: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, source).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // The special tokens of tokenizer_config.json are in no list of tokenizer.json: plain text writes them in letters.
    let eos = file("eos.jinja", "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}");
    let ask = file("messages.json", r#"[{"role": "user", "content": "a</s>b"}]"#);
    let ids = |path: &str, more: &[&str]| -> Vec<u32> {
        let ran = aotron(&[&["tokenize", path, "--messages", &ask], more].concat()).ok();
        serde_json::from_value(ran.json()["ids"].clone()).unwrap()
    };
    let with_model = || {
        let case = Case::new(&[]);
        std::fs::remove_file(case.checkpoint().join("tokenizer.json")).unwrap();
        let model = std::fs::read("tests/data/tiny-chat/tokenizer.model").unwrap();
        case.write("tokenizer.model", model);
        case
    };
    for (case, is_json) in [(Case::new(&[]), true), (with_model(), false)] {
        let formats = ["nemotron", "chatml", "raw", &eos];
        let checkpoint = case.checkpoint();
        let expected: Vec<_> =
            formats.map(|format| ids(checkpoint.to_str().unwrap(), &["--chat-format", format])).to_vec();
        assert_eq!((expected[3][0], expected[3].last().copied()), (2, Some(3)), "{:?}", expected[3]);
        if is_json {
            assert_eq!(expected[3].iter().filter(|id| **id == 3).count(), 2, "{:?}", expected[3]);
        }
        assert!(!expected[0].contains(&3), "{:?}", expected[0]);
        let mut tokenizers = Vec::new();
        for built_with in formats {
            case.build(&["--chat-format", built_with]).ok();
            tokenizers.push(std::fs::read(Path::new(&case.engine()).join("tokenizer.aotron")).unwrap());
            let own = formats.iter().position(|format| *format == built_with).unwrap();
            assert_eq!(ids(&case.engine(), &[]), expected[own], "{built_with}");
            for (format, expected) in formats.iter().zip(&expected) {
                assert_eq!(&ids(&case.engine(), &["--chat-format", format]), expected, "{built_with}, then {format}");
            }
        }
        assert!(tokenizers.iter().all(|tokenizer| *tokenizer == tokenizers[0]), "one tokenizer for every format");
    }
}

/// A format chosen when a package runs is checked as when it is built.
#[test]
fn a_format_that_the_tokenizer_breaks_is_refused_when_it_runs_too() {
    let case = Case::new(&[]);
    let path = case.checkpoint().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    case.write("tokenizer.json", text.replace("<extra_id_", "<other_id_"));
    let reason = "no piece for \"<extra_id_1>\", the turn_start of the chat format nemotron";
    case.build(&[]).fails(1, &[reason, "--chat-format"]);
    let built = case.build(&["--chat-format", "chatml"]).ok();
    let letters = "the chat template writes <|im_start|>, <|im_end|>, no token of this tokenizer";
    assert!(built.err.contains(letters), "{}", built.err);
    case.run(&["--chat-format", "nemotron"]).fails(1, &[reason, "choose another chat format"]);
    let chat = aotron_with(&["chat", &case.engine(), "--chat-format", "nemotron"], b"Hi\n");
    chat.fails(1, &[reason]);
    let ran = case.run(&["--chat-format", "chatml", "-n", "2"]).ok();
    assert!(ran.err.contains(letters), "{}", ran.err);
    let shown = aotron(&["tokenize", &case.engine(), "--text", "Hi", "--chat-format", "nemotron"]).ok();
    assert!(shown.err.contains(reason), "{}", shown.err);
}

#[test]
fn a_refused_format_is_not_offered_again() {
    let tokenizer = std::fs::read_to_string("tests/data/tiny-chat/tokenizer.json").unwrap();
    let case = Case::new(&[
        ("tokenizer.json", &tokenizer.replace("<extra_id_1>", "<other_id_1>")),
        ("tokenizer_config.json", &config(Value::Null)),
    ]);
    let advice = "with --chat-format: raw, chatml, or a file that ends in .jinja";
    case.build(&[]).fails(1, &["the turn_start of the chat format nemotron", advice]);
}

#[test]
fn bos_goes_in_front_of_a_raw_prompt_once() {
    let case = Case::new(&[]);
    let first = |more: &[&str], text: &str| {
        let shown = ["run", &case.engine(), "-n", "1", "--format", "json", "-p", text];
        aotron(&[&shown[..], more].concat())
    };
    let tokens = |more: &[&str], text: &str| first(more, text).ok().json()["prompt_tokens"].as_u64().unwrap();
    for format in ["nemotron", "raw"] {
        case.build(&["--chat-format", format]).ok();
        for raw in [&["--raw"][..], &["--chat-format", "raw"]] {
            assert_eq!(tokens(&[raw, &["--bos"]].concat(), "Hi"), tokens(raw, "Hi") + 1, "{format}: {raw:?}");
        }
    }
    assert_eq!(tokens(&["--bos"], "Hi"), tokens(&[], "Hi") + 1, "a raw package");
    first(&["--chat-format", "nemotron", "--bos"], "Hi").fails(2, &["--bos is for --raw and the chat format raw"]);
    aotron(&["run", &case.engine(), "--token-ids", "1", "--bos"]).fails(2, &["cannot be used with"]);
    // With a Jinja template the text of a special token is that token.
    case.write("tokenizer_config.json", config(json!(golden("mini").0)));
    case.build(&[]).ok();
    assert_eq!(tokens(&["--raw"], "<s>Hi"), tokens(&["--raw"], "Hi") + 1);
    assert_eq!(tokens(&["--raw", "--bos"], "<s>Hi"), tokens(&["--raw"], "<s>Hi"));
}

#[test]
fn a_template_may_refuse_a_conversation() {
    let case = Case::new(&[("chat_template.jinja", &golden("llama").0)]);
    case.build(&[]).ok();
    let file = case.folder.path().join("m.json");
    std::fs::write(&file, r#"[{"role": "assistant", "content": "a"}]"#).unwrap();
    let tokenize = ["tokenize", &case.engine(), "--messages", file.to_str().unwrap()];
    aotron(&tokenize).fails(1, &["Conversation roles must alternate user/assistant/user/assistant/..."]);
    std::fs::write(&file, r#"{"role": "user"}"#).unwrap();
    aotron(&tokenize).fails(1, &["is not a list of messages"]);
    let piped = aotron_with(&["tokenize", &case.engine(), "--messages", "-"], b"{}");
    piped.fails(1, &["standard input is not a list of messages"]);
    // Other roles are passed on to the template.
    std::fs::write(&file, r#"{"messages": [{"role": "tool", "content": "found", "name": "f"}]}"#).unwrap();
    let own = case.folder.path().join("own.jinja");
    std::fs::write(&own, "{{ messages[0].role + '/' + messages[0].name }}").unwrap();
    let asked = aotron(&[&tokenize[..], &["--chat-format", own.to_str().unwrap()]].concat()).ok().json();
    let plain = aotron(&["tokenize", &case.engine(), "--raw", "--text", "tool/f"]).ok().json();
    assert_eq!(asked["ids"], plain["ids"]);
}

#[test]
fn generation_config_gives_the_defaults() {
    let case = Case::new(&[("generation_config.json", r#"{"eos_token_id": [3, 5], "max_new_tokens": 3}"#)]);
    case.build(&[]).ok();
    assert_eq!(case.run(&["--format", "json"]).ok().json()["completion_tokens"], 3);
    assert_ne!(case.run(&["-n", "9", "--format", "json"]).ok().json()["completion_tokens"], 3);

    case.write("generation_config.json", r#"{"eos_token_id": [3, 5], "stop_strings": ["Paris"]}"#);
    case.build(&[]).ok();
    assert_eq!(case.run(&[]).ok().out, "The capital of France is\n");
    let chat = aotron_with(&["chat", &case.engine()], format!("{QUESTION}\n").as_bytes()).ok();
    assert!(chat.out.contains("The capital of France is\n") && !chat.out.contains("Paris"), "{}", chat.out);

    case.write(
        "generation_config.json",
        r#"{"eos_token_id": [3, 5], "top_k": -1, "temperature": 0.7, "num_beams": 4,
        "do_sample": true, "bad_words_ids": [[1]], "repetition_penalty": 1.0}"#,
    );
    let built = case.build(&[]).ok();
    assert!(built.err.contains("not used of generation_config.json: bad_words_ids, num_beams"), "{}", built.err);
    assert!(built.out.contains("temperature 0.7") && !built.out.contains("top-k"), "{}", built.out);
    let manifest = aotron(&["inspect", &case.engine(), "--format", "json"]).ok().json();
    assert_eq!(manifest["manifest"]["generation"]["unused"], json!(["bad_words_ids", "num_beams"]));
    let inspected = aotron(&["inspect", case.checkpoint().to_str().unwrap()]).ok();
    assert!(inspected.out.contains("bad_words_ids, num_beams"), "{}", inspected.out);
    // Sampled by default, so seeds matter. A flag makes it greedy.
    let answer = |more: &[&str]| case.run(&[&["--format", "json"], more].concat()).ok().json()["token_ids"].clone();
    let hot = |seed: &str| answer(&["--temperature", "20", "--min-tokens", "20", "-n", "20", "--seed", seed]);
    assert_ne!(hot("1"), hot("2"));
    assert_eq!(answer(&["--temperature", "0"]), answer(&["--temperature", "0", "--repetition-penalty", "1"]));
}

#[test]
fn markers_of_nemo_are_honoured_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let engine = folder.path().join("engine").to_str().unwrap().to_owned();
    let other = Path::new("tests/data/reports/10-nemo-chat-prompt-tokens.nemo");
    build(other, &engine, &[]).fails(1, &["\"\\u{11}\", the turn_start of the chat format nemotron", "--chat-format"]);
    let inspected = aotron(&["inspect", other.to_str().unwrap()]).ok();
    assert!(inspected.out.contains("nemotron with the markers \"\\0\" and \"\\u{11}\""), "{}", inspected.out);
    build(other, &engine, &["--chat-format", "nemotron"]).ok();
    build(other, &engine, &["--chat-format", "raw"]).ok();

    // Control pieces that the template uses are encoded as such.
    let control = Path::new("tests/data/reports/21-extra-control.nemo");
    let built = build(control, &engine, &[]).ok();
    assert!(built.err.contains("`<extra_id_0>`, `<extra_id_1>`: encoded whole"), "{}", built.err);
    for path in [control.to_str().unwrap(), &engine] {
        let ids = aotron(&["tokenize", path, "--text", "Hi"]).ok().json()["ids"].clone();
        assert_eq!(ids, json!([4, 26, 46, 38, 6, 6, 5, 27, 8, 6, 98, 70, 6, 5, 23, 62, 10, 66, 7, 66, 6]));
    }
}

/// tiny-chat with only its SentencePiece model, and two tokens added to it.
fn with_added_tokens(rows: usize) -> Case {
    let case = Case::new(&[
        ("added_tokens.json", r#"{"<|im_start|>": 2816, "<|im_end|>": 2817}"#),
        ("generation_config.json", r#"{"eos_token_id": 2817}"#),
        ("tokenizer_config.json", r#"{"eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizer"}"#),
    ]);
    std::fs::remove_file(case.checkpoint().join("tokenizer.json")).unwrap();
    std::fs::copy(Path::new(TINY_CHAT).join("tokenizer.model"), case.checkpoint().join("tokenizer.model")).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(case.checkpoint().join("config.json")).unwrap()).unwrap();
    (config["vocab_size"], config["eos_token_id"]) = (json!(rows), json!(2817));
    case.write("config.json", config.to_string());
    let weights = std::fs::read(case.checkpoint().join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let longer: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let (mut shape, mut bytes) = (view.shape().to_vec(), view.data().to_vec());
            if shape[0] == 2816 {
                bytes.resize(bytes.len() / 2816 * rows, 0);
                shape[0] = rows;
            }
            (name, view.dtype(), shape, bytes)
        })
        .collect();
    let views = longer.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    case.write("model.safetensors", safetensors::serialize(views, None).unwrap());
    case
}

#[test]
fn tokens_added_to_a_sentencepiece_model_are_whole_and_end_answers() {
    let case = with_added_tokens(2880);
    let built = case.build(&["--chat-format", "chatml"]).ok();
    assert!(built.out.contains("ended by id 2817, \"<|im_end|>\""), "{}", built.out);
    let ids = case.ids(&json!([{"role": "user", "content": "Hi"}]), &[]);
    assert_eq!((ids[0], ids.iter().filter(|id| **id >= 2816).count()), (2816, 3), "{ids:?}");
    // The token can be sampled and ends the answer.
    let ran = case.run(&["--logit-bias", "2817=100", "--format", "json"]).ok().json();
    assert_eq!((&ran["token_ids"], &ran["finish_reason"]), (&json!([2817]), &json!("stop")));
    // Without the file the id cannot be sampled, so no answer would end there.
    std::fs::remove_file(case.checkpoint().join("added_tokens.json")).unwrap();
    case.build(&[]).fails(1, &["id 2817 is to end answers, but the tokenizer has 2816 ids", "--chat-format"]);
    let chosen = case.build(&["--chat-format", "nemotron"]).ok();
    assert!(chosen.err.contains("id 2817 is to end answers"), "{}", chosen.err);
}

#[test]
fn prompts_come_as_they_are_but_for_a_byte_order_mark() {
    let case = Case::new(&[]);
    case.build(&[]).ok();
    let engine = case.engine();
    let file = case.folder.path().join("prompt.txt");
    let from_file = |text: &[u8], more: &[&str]| {
        std::fs::write(&file, text).unwrap();
        aotron(&[&["run", &engine, "-f", file.to_str().unwrap(), "--format", "json", "-n", "2"], more].concat())
    };
    let tokens = |text: &str| from_file(text.as_bytes(), &[]).ok().json()["prompt_tokens"].clone();
    assert_eq!(tokens("\u{feff}Hi there"), tokens("Hi there"));
    assert_ne!(tokens("a\r\nb"), tokens("a\nb"), "line breaks inside stay");
    for empty in ["", "\n", "\u{feff}\r\n"] {
        from_file(empty.as_bytes(), &[]).fails(2, &["the prompt is empty"]);
    }
    aotron(&["run", &engine, "--prompt", ""]).fails(2, &["the prompt is empty"]);
    let chat = aotron_with(&["chat", &engine], format!("\u{feff}{QUESTION}\n").as_bytes()).ok();
    assert!(chat.out.starts_with("> What"), "{}", chat.out);
    let piped = aotron_with(&["run", &engine, "--format", "json", "-n", "2"], "\u{feff}Hi there".as_bytes()).ok();
    assert_eq!(piped.json()["prompt_tokens"], tokens("Hi there"));

    let plain = from_file(b"Hi there", &["--raw"]).ok().json()["prompt_tokens"].as_u64().unwrap();
    let with_bos = from_file(b"Hi there", &["--raw", "--bos"]).ok().json()["prompt_tokens"].as_u64().unwrap();
    assert_eq!(with_bos, plain + 1);
}

#[test]
fn a_tokenizer_that_would_add_bos_is_named() {
    let case = Case::new(&[]);
    let path = case.checkpoint().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    });
    case.write("tokenizer.json", tokenizer.to_string());
    case.build(&[]).ok();
    let raw = case.run(&["--raw", "-n", "1", "--format", "json"]).ok();
    assert!(raw.err.contains("the tokenizer would put <s> (2) in front; --bos does"), "{}", raw.err);
    let bos = case.run(&["--raw", "--bos", "-n", "1", "--format", "json"]).ok();
    assert!(!bos.err.contains("--bos"), "{}", bos.err);
    let count = |ran: &Ran| ran.json()["prompt_tokens"].as_u64().unwrap();
    assert_eq!(count(&bos), count(&raw) + 1);
}

#[test]
fn a_tokenizers_own_end_of_a_text_ends_answers() {
    let case = Case::new(&[("generation_config.json", "{}")]);
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(case.checkpoint().join("config.json")).unwrap()).unwrap();
    config["eos_token_id"] = Value::Null;
    case.write("config.json", config.to_string());
    let built = case.build(&[]).ok();
    assert!(built.err.contains("the tokenizer's end of a text, `</s>`, id 3, ends answers"), "{}", built.err);
    assert!(built.out.contains("ended by id 3, id 5"), "{}", built.out);
}

#[test]
fn formats_and_markers_can_be_chosen_for_one_answer() {
    let case = Case::new(&[]);
    case.build(&[]).ok();
    let spelled = json!([{"role": "user", "content": "say <extra_id_1>"}]);
    let count = |more: &[&str]| case.ids(&spelled, more).iter().filter(|id| **id == 5).count();
    assert_eq!((count(&[]), count(&["--escape-markers"])), (3, 2));
    let raw = case.run(&["--chat-format", "raw", "-n", "4", "--format", "json"]).ok().json();
    let same = case.run(&["--raw", "-n", "4", "--format", "json"]).ok().json();
    assert_eq!(raw["token_ids"], same["token_ids"]);
    let input = format!("{QUESTION}\n");
    let chat =
        aotron_with(&["chat", &case.engine(), "--chat-format", "nemotron", "--escape-markers"], input.as_bytes());
    assert!(chat.ok().out.contains("Paris"));
    aotron(&["chat", &case.engine(), "--chat-format", "gone.jinja"]).fails(1, &["gone.jinja"]);
    // A tokenizer without the markers.
    let path = case.checkpoint().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("<extra_id_1>", "<other_id_1>");
    case.write("tokenizer.json", text);
    case.build(&[]).fails(1, &["no piece for \"<extra_id_1>\", the turn_start", "--chat-format"]);
    case.build(&["--chat-format", "raw"]).ok();
}
