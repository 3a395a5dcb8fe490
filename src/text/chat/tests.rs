use std::time::{Duration, Instant};

use super::*;
use crate::text::fixture::{EOS, tokenizer};

/// Reference prompts by transformers, for several templates and tiny-chat's tokenizer.
fn golden() -> Value {
    serde_json::from_str(include_str!("../../../tests/data/chat_templates.json")).unwrap()
}

/// tiny-chat's tokenizer with the special tokens of its config, as in transformers.
fn tiny_chat() -> Tokenizer {
    let path = Path::new("tests/data/tiny-chat/tokenizer.json");
    let special = ["<pad>", "<unk>", "<s>", "</s>"].map(str::to_owned);
    Tokenizer::from_json(path, &std::fs::read(path).unwrap()).unwrap().with_whole(&special).unwrap().0
}

fn jinja(source: &str) -> ChatFormat {
    let template = ChatTemplate::Jinja(JinjaTemplate { name: "test".into(), source: source.into() });
    ChatFormat { template, ..ChatFormat::raw(&[]) }
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn prompts_are_those_of_transformers() {
    let (golden, tokenizer) = (golden(), tiny_chat());
    let now = golden["now"].as_str().unwrap().parse().unwrap();
    let mut prompts = 0;
    for template in golden["templates"].as_array().unwrap() {
        let name = template["name"].as_str().unwrap();
        let special_tokens = serde_json::from_value(golden["special_tokens"].clone()).unwrap();
        let format = ChatFormat { special_tokens, ..jinja(template["source"].as_str().unwrap()) };
        for case in template["cases"].as_array().unwrap() {
            let messages = case["messages"].as_array().unwrap();
            let rendered = format.render_at(messages, now);
            let Some(text) = case["text"].as_str() else {
                let (words, error) = (case["error"].as_str().unwrap(), rendered.unwrap_err().to_string());
                assert!(messages.is_empty() || error.contains(words), "{name}: {error}");
                continue;
            };
            assert_eq!(rendered.unwrap(), text, "{name}");
            assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["ids"]), "{name}: {text}");
            let mut marked = messages.clone();
            // transformers does not escape a token that is neither special nor written by the template.
            let mut markers = format.markers(&tokenizer);
            let source = template["source"].as_str().unwrap();
            markers.retain(|marker| !marker.starts_with("<extra_id") || source.contains(marker.as_str()));
            marked.iter_mut().for_each(|message| marks::mark(message, &markers));
            let text = format.render_at(&marked, now).unwrap();
            let escaped = tokenizer.encode_parts(&marks::parts(&text, &markers)).unwrap();
            // The template `kitchen` upper-cases contents, which leaves none of the tokenizer's markers in them.
            assert_eq!(escaped, ids(&case["escaped"]), "{name}: {text}");
            prompts += 1;
        }
    }
    assert!(prompts > 30, "{prompts}");
}

#[test]
fn the_cards_template_as_jinja_is_the_cards() {
    let (golden, tokenizer) = (golden(), tiny_chat());
    let nemotron = ChatFormat::nemotron(NemotronMarkers::default(), &[3], &tokenizer);
    let template = golden["templates"].as_array().unwrap().iter().find(|t| t["name"] == "nemotron").unwrap();
    let mut same = 0;
    for case in template["cases"].as_array().unwrap() {
        if let Ok(prompt) = nemotron.prompt_of_json(&tokenizer, case["messages"].as_array().unwrap()) {
            assert_eq!(prompt, ids(&case["ids"]));
            same += 1;
        }
    }
    assert_eq!(same, 5, "conversations in the card's order");
}

#[test]
fn markers_in_contents_count_unless_they_are_escaped() {
    for tokenizer in [tiny_chat(), sentencepiece(Vec::new())] {
        let mut format = ChatFormat::nemotron(NemotronMarkers::default(), &[], &tokenizer);
        let marker = tokenizer.id("<extra_id_1>").unwrap();
        let message = [Message::user("say <extra_id_1> é <extra_id_0>\u{f0000}!")];
        let count = |ids: &[u32]| ids.iter().filter(|id| **id == marker).count();
        let plain = format.prompt(&tokenizer, &message).unwrap();
        assert_eq!(count(&plain), 3, "two are the template's");
        format.escape_markers = true;
        let escaped = format.prompt(&tokenizer, &message).unwrap();
        assert_eq!(count(&escaped), 2);
        let text = "<extra_id_0>System\n\n<extra_id_1>User\nsay <extra_id_1> é <extra_id_0>!\n<extra_id_1>Assistant\n";
        assert_eq!(tokenizer.decode(&escaped).unwrap(), text);
        // A message without markers has the same ids either way.
        let message = [Message::user(" Hello  wörld ")];
        let escaped = format.prompt(&tokenizer, &message).unwrap();
        format.escape_markers = false;
        assert_eq!(escaped, format.prompt(&tokenizer, &message).unwrap());
    }
}

#[test]
fn the_end_of_an_answer_is_what_the_template_writes_after_it() {
    let golden = golden();
    let tokenizer = tiny_chat();
    for template in golden["templates"].as_array().unwrap() {
        let special_tokens = serde_json::from_value(golden["special_tokens"].clone()).unwrap();
        let format = ChatFormat { special_tokens, ..jinja(template["source"].as_str().unwrap()) };
        let format = format.with_template(format.template.clone(), &tokenizer);
        let end = format.end_of_turn.map(|end| (end.text, end.id));
        let end = end.as_ref().map(|(text, id)| (text.as_str(), *id));
        let expected = match template["name"].as_str().unwrap() {
            "chatml" => Some(("<|im_end|>", None)),
            "mini" | "nemotron" => Some(("<extra_id_1>", Some(5))),
            "llama" => Some(("</s>", Some(3))),
            _ => Some(("<user|3>", None)),
        };
        assert_eq!(end, expected, "{}", template["name"]);
    }
    assert_eq!(jinja("{{ raise_exception('no') }}").find_end_of_turn(&tokenizer), None);
    assert_eq!(ChatFormat::raw(&[3]).find_end_of_turn(&tokenizer), None);
}

/// What fuel does not see: fields of `str.format`, and values that are turned into text outside the output.
#[test]
fn texts_made_outside_the_output_are_bounded() {
    let double = |start: &str| {
        format!(
            "{{% set ns = namespace(x={start}) %}}{{% for i in range(18) %}}{{% set ns.x = ns.x + ns.x %}}{{% endfor %}}"
        )
    };
    let list = "{% set ns = namespace(x=[1, 2]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    let refused = |source: String| jinja(&source).render(&[Message::user("u")]).unwrap_err().to_string();
    let many = refused(format!("{}{{{{ ns.x.format(1)|length }}}}", double("'{0:10000}'")));
    assert!(many.contains("str.format may make up to 16777216 bytes"), "{many}");
    let wide = refused(format!("{}{{{{ ns.x.format('a' * 100000)|length }}}}", double("'{0}'")));
    assert!(wide.contains("str.format may make up to"), "{wide}");
    for call in ["raise_exception(ns.x)", "1|tojson(separators=[ns.x, ns.x])", "'{}'.format(ns.x)"] {
        let error = refused(format!("{list}{{{{ {call} }}}}"));
        assert!(error.contains("a value has more than"), "{call}: {error}");
    }
    assert_eq!(jinja("{{ '{:>5}|{}'.format('ab', 3) }}").render(&[Message::user("u")]).unwrap(), "   ab|3");
}

#[test]
fn floats_are_pythons() {
    let source =
        "{{ [1e-05, 1e16, 0.1, 1e15, 123456789.5, 0.0001, 5e-324, 2.0, 1e22] | tojson }} {{ 1e-7 }} {{ 3.0 }} {{ 7 }}";
    let expected = "[1e-05, 1e+16, 0.1, 1000000000000000.0, 123456789.5, 0.0001, 5e-324, 2.0, 1e+22] 1e-07 3.0 7";
    assert_eq!(jinja(source).render(&[Message::user("u")]).unwrap(), expected);
}

/// The check of a template's output takes time in proportion to it.
#[test]
fn checks_of_large_prompts_end() {
    let started = Instant::now();
    let tokenizer = tiny_chat();
    for source in [
        "{{ '<' * 3000000 }}{{ messages[0].content }}",
        "<aa{{ range(100000)|join('><aa') }}>{{ messages[0].content }}",
    ] {
        let warnings = jinja(source).problems(&tokenizer).warnings;
        assert!(warnings.iter().all(|warning| warning.len() < 500), "{}", warnings.len());
    }
    let words = jinja("<aa{{ range(100)|join('><aa') }}>{{ messages[0].content }}").problems(&tokenizer).warnings;
    assert!(words[0].contains("<aa0>, <aa1>") && words[0].contains(" and 92 more"), "{words:?}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn only_what_looks_like_a_marker_ends_an_answer() {
    let path = Path::new("tests/data/tiny-chat/tokenizer.json");
    let plain = Tokenizer::from_json(path, &std::fs::read(path).unwrap()).unwrap();
    let (tokenizer, whole) = plain.with_whole(&["e".to_owned(), "e".to_owned(), "none of it".to_owned()]).unwrap();
    assert_eq!(whole, ["e"]);
    let source = "{% for m in messages %}{{ m.content }} e\n\n{% endfor %}";
    assert_eq!(jinja(source).find_end_of_turn(&tokenizer), None);
}

#[test]
fn each_marker_of_nemotron_is_one_token() {
    let tokenizer = tiny_chat();
    let problems = |system: &str, turn: &str, end_of_turn: &str, end_of_name: &str| {
        let markers = NemotronMarkers {
            system_turn_start: system.into(),
            turn_start: turn.into(),
            end_of_turn: end_of_turn.into(),
            end_of_name: end_of_name.into(),
        };
        ChatFormat::nemotron(markers, &[EOS], &tokenizer).problems(&tokenizer).refusals
    };
    let [zero, one, two] = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"];
    assert_eq!(problems(zero, one, "\n", "\n"), [""; 0]);
    assert_eq!(problems(one, one, "\n", "\n"), [""; 0], "one marker for all turns");
    assert_eq!(problems(zero, one, one, "\n"), [""; 0], "closed as opened");
    assert_eq!(problems(zero, one, &format!("{two}\n"), ": "), [""; 0]);
    for (markers, name) in [
        ([zero, one, "<|im_end|>\n", "\n"], "\"<|im_end|>\", the end_of_turn"),
        ([zero, one, "\n", "<|name|>"], "\"<|name|>\", the end_of_name"),
        (["<|im_start|>", one, "\n", "\n"], "\"<|im_start|>\", the system_turn_start"),
        ([zero, "<|im_start|>", "\n", "\n"], "\"<|im_start|>\", the turn_start"),
    ] {
        let [system, turn, end_of_turn, end_of_name] = markers;
        let refusals = problems(system, turn, end_of_turn, end_of_name);
        assert!(matches!(&refusals[..], [refusal] if refusal.contains(name)), "{refusals:?}");
    }
}

#[test]
fn formats_are_found_by_name_and_by_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.jinja");
    std::fs::write(&path, "{{ messages[0].content }}").unwrap();
    let named = BTreeMap::from([("rag".to_owned(), "R".to_owned()), ("raw".to_owned(), "W".to_owned())]);
    let choose = |choice: &str| ChatTemplate::choose(choice, &named).map(|template| template.describe());
    assert_eq!(choose("nemotron").unwrap(), "nemotron");
    assert_eq!(choose("raw").unwrap(), "raw: no template");
    assert_eq!(choose("chatml").unwrap(), "jinja template `chatml`");
    assert_eq!(choose("rag").unwrap(), "jinja template `rag`");
    assert_eq!(choose(path.to_str().unwrap()).unwrap(), "jinja template `own.jinja`");
    let error = choose("llama").unwrap_err().to_string();
    let names = built_in::names().join(", ");
    assert!(error.contains(&format!("unknown chat format `llama`: name one of {names}, rag, raw")), "{error}");
    std::fs::write(&path, "{% if %}").unwrap();
    let error = choose(path.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("own.jinja: not a chat template: line 1: "), "{error}");
    assert!(choose("gone.jinja").unwrap_err().to_string().contains("gone.jinja"));
}

#[test]
fn every_built_in_format_answers_and_ends() {
    for name in built_in::names() {
        let (format, tokenizer) = ChatFormat::raw(&[EOS]).with_choice(name, tiny_chat()).unwrap();
        let prompt = format.prompt(&tokenizer, &[Message::user("Hello")]).unwrap();
        assert!(!prompt.is_empty(), "{name}");
        assert_eq!(format.end_of_turn.is_some(), name != "raw", "{name}");
        let kept: ChatFormat = serde_json::from_str(&serde_json::to_string(&format).unwrap()).unwrap();
        assert_eq!(kept, format);
    }
    let chatml = ChatFormat::raw(&[]).with_choice("chatml", tiny_chat()).unwrap().0;
    assert_eq!(
        chatml.render(&[Message::system("s"), Message::user("u")]).unwrap(),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn a_raise_in_a_template_is_the_error() {
    let refused = |source: &str| jinja(source).render(&[Message::user("u")]).unwrap_err().to_string();
    assert_eq!(
        refused("{% macro m() %}{{ raise_exception('no system \u{7}here') }}{% endmacro %}{{ m() }}"),
        "invalid request: the chat template `test` says: no system \\u{7}here"
    );
    assert!(refused("\n{{ messages.gone.gone }}").contains("the chat template `test` failed: line 2: "));
    assert!(refused("{{ 1 | nothing }}").contains("line 1: "));
    let tool = serde_json::json!({"role": "tool", "content": null, "tool_calls": [1]});
    assert_eq!(jinja("{{ messages[0].tool_calls | tojson }}").render_json(std::slice::from_ref(&tool)).unwrap(), "[1]");
    let nemotron = ChatFormat::nemotron(NemotronMarkers::default(), &[], &tokenizer());
    assert!(nemotron.render_json(&[tool]).unwrap_err().to_string().contains("message 1: unknown variant `tool`"));
}

/// A hostile template fails quickly, in bounded memory.
#[test]
fn hostile_templates_end() {
    let started = Instant::now();
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 1000000000000 }}",
        "{{ ('x' * 1000000) * 1000000 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(x='x') %}{% for i in range(100) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='x') %}{% for i in range(100) %}{% set ns.x = ns.x | tojson %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ range(100000) | list | tojson(indent=100000) * 10000 }}",
    ] {
        let error = jinja(source).render(&[Message::user("u")]).unwrap_err();
        assert!(matches!(error, Error::Request(_)), "{source}: {error}");
    }
    let deep = "[".repeat(100_000);
    assert!(JinjaTemplate { name: "deep".into(), source: format!("{{{{ {deep} }}}}") }.check().is_err());
    let long = JinjaTemplate { name: "long".into(), source: " ".repeat(crate::checkpoint::MAX_TEMPLATE_BYTES + 1) };
    assert!(long.check().unwrap_err().contains("at most 1048576"));
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

/// Deep operator chains need stack when they are parsed, and widths ask for memory: each gets an error or an answer.
#[test]
fn templates_that_are_deep_or_ask_for_memory_end() {
    for chain in ["not ".repeat(100_000), "-".repeat(500_000)] {
        let template = JinjaTemplate { name: "deep".into(), source: format!("{{{{ {chain}1 }}}}") };
        // What they come to is not the point: a stack that overflows ends the process.
        if template.check().is_ok() {
            let rendered = jinja(&template.source).render(&[Message::user("x")]);
            assert!(rendered.is_err() || rendered.is_ok_and(|text| text.len() < 100));
        }
    }
    for pattern in ["{:>10000000000000}", "{:.1000000000f}", "{:>99999999999999999999999999}"] {
        let source = format!("{{{{ '{pattern}'.format(1.5) }}}}");
        let error = jinja(&source).render(&[Message::user("x")]).unwrap_err().to_string();
        assert!(error.contains("widths and precisions up to 10000"), "{error}");
    }
    assert_eq!(jinja("{{ '{:>5}'.format(1) }}").render(&[Message::user("x")]).unwrap(), "    1");
}

/// Fuel does not see what one instruction does to a value that holds itself many times over; the deadline does.
#[test]
fn a_template_that_never_ends_is_left_behind() {
    let double = "{% set ns = namespace(x=[1, 2]) %}{% for i in range(32) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    let started = std::time::Instant::now();
    // A comparison of the value with itself: it takes time and no memory, for this thread lives on in the test.
    let source = format!("{double}{{{{ {{ns.x: 1}}|length }}}}");
    let error = jinja(&source).render(&[Message::user("x")]).unwrap_err().to_string();
    assert!(error.contains("takes more than 5 seconds"), "{error}");
    assert!(started.elapsed() < std::time::Duration::from_secs(30));
}

fn sentencepiece(added: Vec<crate::checkpoint::AddedToken>) -> Tokenizer {
    let path = Path::new("tests/data/tiny-chat/tokenizer.model");
    Tokenizer::from_sentencepiece_and(path, &std::fs::read(path).unwrap(), added).unwrap()
}

#[test]
fn added_tokens_part_a_text() {
    let token =
        |id, content: &str| crate::checkpoint::AddedToken { id, content: content.into(), lstrip: false, rstrip: false };
    let plain = sentencepiece(Vec::new());
    let pieces = plain.vocab_size() as u32;
    let mut end = token(pieces + 3, "<|im_end|>");
    (end.lstrip, end.rstrip) = (true, true);
    let tokenizer = sentencepiece(vec![token(pieces, "<|im_start|>"), end, token(3, "</s>")]);
    assert_eq!(tokenizer.vocab_size() as u32, pieces + 4);
    assert_eq!(tokenizer.id("<|im_end|>"), Some(pieces + 3));
    assert_eq!((tokenizer.piece(pieces).as_deref(), tokenizer.piece(pieces + 1)), (Some("<|im_start|>"), None));
    // Each part is encoded as a separate text.
    let mut expected = vec![pieces];
    expected.extend(plain.encode("user\nHi").unwrap());
    expected.push(pieces + 3);
    expected.extend(plain.encode("there").unwrap());
    expected.push(3);
    assert_eq!(tokenizer.encode("<|im_start|>user\nHi  <|im_end|>\n there</s>").unwrap(), expected);
    assert_eq!(tokenizer.decode(&[pieces, pieces + 1, pieces + 3]).unwrap(), "<|im_start|><|im_end|>");
    let path = Path::new("tests/data/tiny-chat/tokenizer.model");
    let source = std::fs::read(path).unwrap();
    let kept = tokenizer.to_package(Path::new("t"), &source).unwrap();
    let again = Tokenizer::from_package(Path::new("t"), &kept).unwrap();
    assert_eq!(again.encode("<|im_start|>user\nHi  <|im_end|>\n there</s>").unwrap(), expected);
    for (tokens, reason) in [
        (vec![token(2, "<|x|>")], "added token 2: it is `<|x|>`, but the model's piece of that id is `<s>`"),
        (vec![token(pieces, "")], "it is empty"),
        (vec![token(pieces, "<a>"), token(pieces, "<b>")], "added twice"),
        (vec![token(u32::MAX, "<a>")], "at most 65536 ids follow"),
    ] {
        let error = Tokenizer::from_sentencepiece_and(path, &source, tokens).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
