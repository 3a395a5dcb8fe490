use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::server::Server;

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("p{n}")).collect()
}

fn map(count: usize) -> Value {
    names(count).into_iter().map(|name| (name, json!({}))).collect::<Map<_, _>>().into()
}

/// The message of a refusal with 400, if it is of this field.
fn refused(server: &Server, path: &str, base: &Value, fields: &Value, param: &Value) -> String {
    let mut body = base.clone();
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let reply = server.post(path, &body);
    let message = reply.refused(400);
    assert_eq!(&reply.json()["error"]["param"], param, "{path} {fields}: {message}");
    for word in ["struct", "enum", "usize", "u32", "i64", "f32", "sequence", "NoExtension", "non-verbose"] {
        let words = message.replace("structured_outputs", "");
        assert!(!words.contains(word), "{path} {fields}: {message}");
    }
    message
}

#[test]
fn refusals_name_the_field_that_was_sent() {
    let server = Server::start(&[]);
    let base = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    let schema =
        |schema: Value| json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": schema } } });
    for (fields, param, words) in [
        (json!({ "stop": ["a", ""] }), "stop", "stop[1] is empty"),
        (json!({ "stop": ["a", "b".repeat(2000)] }), "stop", "stop[1] has 2000 bytes"),
        (json!({ "stop": names(100) }), "stop", "stop strings"),
        (json!({ "stop": 3 }), "stop", "a string or a list of strings"),
        (json!({ "stop_token_ids": [1, 99_999_999] }), "stop_token_ids", "99999999"),
        (json!({ "stop_token_ids": vec![1; 300] }), "stop_token_ids", "stop ids; expected at most"),
        (json!({ "stop_token_ids": [-1] }), "stop_token_ids[0]", "a whole number from 0"),
        (json!({ "messages": [] }), "messages", "messages is empty"),
        (json!({ "messages": [3] }), "messages[0]", "an object"),
        (json!({ "messages": {} }), "messages", "expected a list"),
        (json!({ "max_tokens": 0 }), "max_tokens", "max_tokens is 0"),
        (json!({ "max_completion_tokens": 0 }), "max_completion_tokens", "max_completion_tokens is 0"),
        (json!({ "max_tokens": -1 }), "max_tokens", "a whole number that is not negative"),
        (
            json!({ "max_tokens": 3, "min_tokens": 4 }),
            "min_tokens",
            "min_tokens is 4, which is more than max_tokens, which is 3",
        ),
        (json!({ "top_logprobs": 21 }), "top_logprobs", "top_logprobs is 21; expected 0 to 20"),
        (json!({ "temperature": "hot" }), "temperature", "expected a number"),
        (json!({ "cache_salt": "s".repeat(2000) }), "cache_salt", "cache_salt has 2000 bytes"),
        (json!({ "logit_bias": { "5": 200 } }), "logit_bias", "expected -100 to 100"),
        (json!({ "stream": true, "stream_options": [true] }), "stream_options", "expected an object"),
        (json!({ "response_format": ["json_object"] }), "response_format", "expected an object"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": [{}] } }),
            "response_format",
            "expected an object",
        ),
        (json!({ "structured_outputs": ["{}"] }), "structured_outputs", "expected an object"),
        (
            json!({ "response_format": { "type": "json_object" }, "structured_outputs": { "regex": "a" } }),
            "structured_outputs",
            "one form",
        ),
        (json!({ "structured_outputs": { "regex": "(" } }), "structured_outputs", "the form of the answer"),
        (schema(json!({ "properties": map(2500) })), "response_format", "2500 entries in properties"),
        (schema(json!({ "required": names(5000) })), "response_format", "5000 entries in required"),
        (schema(json!({ "const": "x".repeat(70_000) })), "response_format", "at most 65536"),
    ] {
        let started = Instant::now();
        let message = refused(&server, "/v1/chat/completions", &base, &fields, &json!(param));
        assert!(message.contains(words), "{fields}: {message}");
        assert!(started.elapsed() < Duration::from_secs(10), "{fields}: {:?}", started.elapsed());
    }
    for (path, base, fields, param, words) in [
        ("/v1/completions", json!({}), json!({ "prompt": "" }), "prompt", "prompt is empty"),
        ("/v1/completions", json!({}), json!({ "prompt": [] }), "prompt", "no prompt"),
        ("/v1/completions", json!({}), json!({ "prompt": [[]] }), "prompt", "prompt is empty"),
        ("/v1/completions", json!({}), json!({ "prompt": ["a", ""] }), "prompt[1]", "prompt[1] is empty"),
        ("/v1/completions", json!({}), json!({ "prompt": [99_999_999] }), "prompt", "99999999"),
        ("/v1/completions", json!({}), json!({ "prompt": { "a": 1 } }), "prompt", "a list of token ids"),
        (
            "/v1/completions",
            json!({ "prompt": "a" }),
            json!({ "min_tokens": 17 }),
            "min_tokens",
            "max_tokens, which is 16",
        ),
        ("/v1/responses", json!({}), json!({ "input": [] }), "input", "input is empty"),
        ("/v1/responses", json!({}), json!({ "input": 3 }), "input", "a string or a list of messages"),
        ("/v1/responses", json!({ "instructions": "Be brief." }), json!({ "input": [] }), "input", "input is empty"),
        (
            "/v1/responses",
            json!({ "instructions": "Be brief." }),
            json!({ "input": [{ "role": "user" }] }),
            "input[0]",
            "content",
        ),
        ("/v1/responses", json!({}), json!({ "input": "word ".repeat(2000) }), "input", "maximum context length"),
        (
            "/v1/responses",
            json!({ "input": "a" }),
            json!({ "text": { "format": { "type": "json_schema", "schema": { "$ref": "x" } } } }),
            "text.format",
            "the form",
        ),
        ("/v1/responses", json!({ "input": "a" }), json!({ "text": [] }), "text", "expected an object"),
        ("/tokenize", json!({}), json!({ "messages": [{}] }), "messages[0]", "no role"),
    ] {
        let message = refused(&server, path, &base, &fields, &json!(param));
        assert!(message.contains(words), "{path} {fields}: {message}");
    }
    for body in [&b"[[]]"[..], b"[{\"role\": \"user\", \"content\": \"Hi\"}]", b"3"] {
        let message = server.request("POST", "/v1/chat/completions", &[], body).refused(400);
        assert!(message.contains("expected an object") && !message.contains("struct"), "{message}");
    }
    let base = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    for (fields, words) in [
        (json!({}), "max_tokens is missing"),
        (json!({ "max_tokens": 0 }), "max_tokens is 0"),
        (json!({ "max_tokens": 9, "stop_sequences": ["a", ""] }), "stop_sequences[1] is empty"),
        (
            json!({ "max_tokens": 9, "system": "Be brief.", "messages": [{ "role": "user" }] }),
            "messages[0]: its content",
        ),
        (json!({ "max_tokens": 9, "system": 3 }), "system: content is"),
        (json!({ "max_tokens": 9, "output_config": [] }), "output_config: invalid type: list, expected an object"),
    ] {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let message = server.post("/v1/messages", &body).refused(400);
        assert!(message.contains(words), "{fields}: {message}");
    }
}

#[test]
fn a_form_that_ends_nowhere_or_takes_long_is_refused_alone() {
    let server = Server::start(&["--slots", "2"]);
    let ambiguous: Vec<String> = (2..60).map(|times| vec!["s"; times].join(" ")).collect();
    let ambiguous = format!("start: s\ns: {} | \"a\"\n", ambiguous.join(" | "));
    for grammar in [ambiguous, "start: T\nT: /a/ & /b/\n".to_owned()] {
        let body = json!({ "prompt": "a", "max_tokens": 200, "structured_outputs": { "grammar": grammar } });
        let slow = server.begin("/v1/completions", &body);
        let plain = server.post("/v1/completions", &json!({ "prompt": "What is", "max_tokens": 4 })).ok();
        assert_eq!(plain["choices"][0]["text"], " larger.\n");
        let message = server.post("/v1/completions", &body).refused(400);
        assert!(message.contains("the form of the answer"), "{message}");
        assert!(!message.contains("NoExtension"), "{message}");
        drop(slow);
    }
}

/// Each of these once compiled without an end, or told of a panic.
#[test]
fn forms_that_are_endless_to_compile_are_refused_at_once_and_in_words() {
    let server = Server::start(&[]);
    let multiples: Vec<Value> = [97, 89, 83, 79].map(|n| json!({ "type": "integer", "multipleOf": n })).to_vec();
    let schema = |schema: &Value| json!({ "response_format": { "type": "json_object", "schema": schema } });
    let grammar = |text: String| json!({ "structured_outputs": { "grammar": text } });
    let loops = |lengths: &[u32]| {
        let loops: Vec<String> = lengths.iter().map(|n| format!("/(.{{{n}}})*/")).collect();
        grammar(format!("start: A\nA: {}", loops.join(" & ")))
    };
    let chain: Vec<String> = (0..5000).map(|n| format!("a{n:x}: a{:x}", n + 1)).collect();
    for fields in [
        schema(&json!({ "allOf": multiples })),
        schema(&json!({ "type": "object", "properties": { "x": { "allOf": &multiples[..3] } }, "required": ["x"] })),
        loops(&[2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]),
        loops(&[97, 89, 83]),
        grammar(format!("start: a0\n{}", chain.join("\n"))),
        grammar(format!("start: a0\n{}", chain[..200].join("\n"))),
        grammar(format!(
            "start: A0\n{}\nA60: \"x\"",
            (0..60).map(|n| format!("A{n}: (A{} \"y\")*", n + 1)).collect::<Vec<_>>().join("\n")
        )),
        grammar(format!("start: A\nA: {}\"x\"{}", "(".repeat(400), " \"y\")*".repeat(400))),
        grammar("start: p::0\np::_ : [p::incr(_)] \"a\" %if lt(_,1000)\n".into()),
    ] {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 3 });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let asked = Instant::now();
        let reply = server.post("/v1/chat/completions", &body);
        let took = asked.elapsed();
        // An answer to the second, whose numbers may be found one by one, is no less right.
        assert!([200, 400].contains(&reply.status), "{} {}: {fields}", reply.status, reply.text());
        assert!(!reply.text().contains("backtrace") && !reply.text().contains("panic"), "{}", reply.text());
        assert!(took < Duration::from_secs(3), "{took:?}: {fields}");
        let asked = Instant::now();
        server.post("/v1/completions", &json!({ "prompt": "What is", "max_tokens": 2 })).ok();
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}: {fields}", asked.elapsed());
    }
}

/// Definitions, rules and terminals that lead to each other recurse in the compiler; each of these once ended the process.
#[test]
fn forms_of_long_chains_hurt_nobody() {
    let server = Server::start(&[]);
    let chain = |count: usize, link: &dyn Fn(usize) -> Value| {
        let mut definitions: Map<String, Value> = (0..count).map(|n| (format!("a{n}"), link(n + 1))).collect();
        definitions.insert(format!("a{count}"), json!({ "type": "string" }));
        let schema = json!({ "$defs": definitions, "$ref": "#/$defs/a0" });
        json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": schema } } })
    };
    let to = |n: usize| json!({ "$ref": format!("#/$defs/a{n}") });
    let lines = |first: &str, count: usize, line: &dyn Fn(usize) -> String| {
        let lines: Vec<String> = (0..count).map(line).collect();
        json!({ "structured_outputs": { "grammar": format!("start: {first}0\n{}\n{first}{count}: \"a\"", lines.join("\n")) } })
    };
    for fields in [
        chain(700, &|n| json!({ "type": "object", "properties": { "x": to(n) }, "required": ["x"] })),
        chain(1000, &|n| json!({ "type": "array", "items": to(n) })),
        chain(900, &|n| json!({ "anyOf": [to(n), { "type": "null" }] })),
        chain(1000, &|n| json!({ "allOf": [to(n)] })),
        chain(1700, &|n| to(n)),
        lines("r", 3500, &|n| format!("r{n}: r{} | \"0\"", n + 1)),
        lines("T", 3500, &|n| format!("T{n}: T{} \"a\"", n + 1)),
        json!({ "structured_outputs": { "regex": "a?".repeat(2000) } }),
        json!({ "structured_outputs": { "grammar": format!("start: {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000)) } }),
    ] {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 3 });
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let status = server.post("/v1/chat/completions", &body).status;
        assert!([200, 400, 503].contains(&status), "{status} {}", &body.to_string()[..300]);
        server.post("/v1/completions", &json!({ "prompt": "What is", "max_tokens": 2 })).ok();
    }
}
