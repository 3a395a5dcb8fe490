use std::time::Duration;

use serde_json::{Value, json};

use super::server::{Reply, Server, answer_of_program};

/// A tensor as a client sends it: its description and its bytes.
type Tensor = (Value, Vec<u8>);

fn binary(name: &str, datatype: &str, shape: &[usize], data: Vec<u8>) -> Tensor {
    let size = data.len();
    (json!({ "name": name, "shape": shape, "datatype": datatype, "parameters": { "binary_data_size": size } }), data)
}

fn strings(name: &str, texts: &[&str]) -> Tensor {
    let data = texts.iter().flat_map(|text| [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat());
    binary(name, "BYTES", &[texts.len(), 1], data.collect())
}

fn infer(server: &Server, model: &str, tensors: Vec<Tensor>) -> Reply {
    let (headers, data): (Vec<Value>, Vec<Vec<u8>>) = tensors.into_iter().unzip();
    let outputs = json!([{ "name": "outputs", "parameters": { "binary_data": true } }]);
    let header = json!({ "id": "0", "inputs": headers, "outputs": outputs }).to_string();
    let length = header.len().to_string();
    let body = [header.as_bytes(), &data.concat()].concat();
    let path = format!("/v2/models/{model}/infer");
    server.request("POST", &path, &[("Inference-Header-Content-Length", &length)], &body)
}

/// The strings of a reply's only output.
fn answers(reply: &Reply) -> Vec<String> {
    assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
    let length: usize = reply.header("inference-header-content-length").unwrap().parse().unwrap();
    let (header, mut data) = reply.body.split_at(length);
    let header: Value = serde_json::from_slice(header).unwrap();
    let mut texts = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<4>() {
        let (text, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        texts.push(String::from_utf8(text.to_vec()).unwrap());
        data = rest;
    }
    assert_eq!(header["outputs"][0]["shape"], json!([texts.len(), 1]));
    texts
}

/// A prompt as the model card writes it.
fn card_prompt(question: &str) -> String {
    format!("<extra_id_0>System\n\n<extra_id_1>User\n{question}\n<extra_id_1>Assistant\n")
}

/// What the card's client sends beside the prompts.
fn card_settings(rows: usize) -> Vec<Tensor> {
    let all = |bytes: &[u8]| bytes.repeat(rows);
    vec![
        binary("max_output_token", "INT64", &[rows, 1], all(&200i64.to_le_bytes())),
        binary("top_k", "INT64", &[rows, 1], all(&1i64.to_le_bytes())),
        binary("top_p", "FP32", &[rows, 1], all(&0f32.to_le_bytes())),
        binary("temperature", "FP32", &[rows, 1], all(&0.1f32.to_le_bytes())),
    ]
}

#[test]
fn the_cards_client_gets_its_answers_under_either_name() {
    let server = Server::start(&[]);
    let questions = ["What is the capital of France?", "What is 17 + 25?", "What is the capital of Japan?"];
    for model in ["Nemotron-3-8B-Chat-4K-RLHF", "nemotron-3-8b-chat-4k-rlhf", "tiny-chat"] {
        for path in ["", "/ready", "/config", "/versions/1/ready"] {
            assert_eq!(server.get(&format!("/v2/models/{model}{path}")).status, 200, "{path}");
        }
        let config = server.get(&format!("/v2/models/{model}/config")).ok();
        assert_eq!((&config["name"], config["output"][0]["data_type"].as_str()), (&json!(model), Some("TYPE_STRING")));
        let prompts: Vec<String> = questions.iter().map(|question| card_prompt(question)).collect();
        let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let mut tensors = vec![strings("prompts", &prompts)];
        tensors.extend(card_settings(3));
        let expected: Vec<String> = questions.iter().map(|question| answer_of_program(question)).collect();
        assert_eq!(answers(&infer(&server, model, tensors)), expected);
    }
    let index = server.request("POST", "/v2/repository/index", &[], b"").ok();
    let listed: Vec<&str> = index.as_array().unwrap().iter().map(|model| model["name"].as_str().unwrap()).collect();
    assert!(
        ["tiny-chat", "Nemotron-3-8B-Chat-4K-RLHF", "Nemotron-3-8B-Chat-4k-RLHF"].iter().all(|n| listed.contains(n))
    );
}

#[test]
fn later_classes_inputs_are_taken_and_what_is_asked_for_in_vain_is_named() {
    let server = Server::start(&[]);
    let question = card_prompt("What is the capital of France?");
    let flag = |name: &str, on: bool| binary(name, "BOOL", &[1, 1], vec![u8::from(on)]);
    let with = |more: Vec<Tensor>| {
        let mut tensors = vec![strings("prompts", &[&question])];
        tensors.push(binary("max_output_len", "INT64", &[1, 1], 50i64.to_le_bytes().to_vec()));
        tensors.extend(more);
        infer(&server, "x", tensors)
    };
    let plain = answers(&with(vec![flag("output_generation_logits", false), flag("output_context_logits", false)]));
    assert_eq!(plain, ["The capital of France is Paris."]);
    // A known fault of these clients: the shortest length is the longest.
    let least = binary("min_output_len", "INT64", &[1, 1], 50i64.to_le_bytes().to_vec());
    assert_eq!(answers(&with(vec![least, flag("use_greedy", true)])), plain);
    let stops = strings("stop_words_list", &[" France", "zzz", "yyy"]);
    assert_eq!(answers(&with(vec![stops])), ["The capital of"]);
    let no_repeat = binary("no_repeat_ngram_size", "FP32", &[1, 1], 0f32.to_le_bytes().to_vec());
    assert_eq!(answers(&with(vec![no_repeat])), plain);
    let messages = json!([{ "role": "user", "content": "What is the capital of France?" }]).to_string();
    let chat = vec![strings("prompts", &[&messages]), flag("apply_chat_template", true)];
    assert_eq!(answers(&infer(&server, "x", chat)), plain);
    for (more, words) in [
        (flag("output_generation_logits", true), "output_generation_logits"),
        (strings("lora_uids", &["a"]), "lora_uids"),
        (strings("bad_words_list", &["a"]), "bad_words_list"),
        (binary("top_k", "FP32", &[1, 1], vec![0; 4]), "top_k"),
        (binary("temperature", "FP32", &[1, 1], (-1f32).to_le_bytes().to_vec()), "temperature"),
    ] {
        let reply = with(vec![more]);
        let message = reply.json()["error"].as_str().unwrap().to_owned();
        assert!(reply.status == 400 && message.contains(words), "{message}");
    }
}

/// Slower than an answer that is sent whole: the head comes first, with blanks, and the client waits.
#[test]
fn a_slow_answer_is_announced_and_padded() {
    let server = Server::start(&["--slots", "1"]);
    // The only slot is taken for a while by requests that are many tokens long.
    let long = json!({ "prompt": "a", "max_tokens": 500, "ignore_eos": true, "n": 100 });
    let busy = server.begin("/v1/completions", &long);
    server.wait_for("a running request", || server.metric("vllm:num_requests_running") == 1.0);
    server.signal("STOP");
    let resume = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut tensors = vec![strings("prompts", &[&card_prompt("What is the capital of France?")])];
            tensors.extend(card_settings(1));
            infer(&server, "x", tensors)
        });
        std::thread::sleep(Duration::from_millis(100));
        server.signal("CONT");
        asked.join().unwrap()
    });
    drop(busy);
    assert_eq!(answers(&resume), ["The capital of France is Paris."]);
}

#[test]
fn triton_generate_answers_whole_and_as_a_stream() {
    let server = Server::start(&[]);
    let body = json!({ "text_input": card_prompt("What is the capital of France?"), "max_tokens": 30,
        "parameters": { "temperature": 0 } });
    let whole = server.post("/v2/models/x/generate", &body).ok();
    assert_eq!(whole["text_output"].as_str().unwrap().trim(), "The capital of France is Paris.");
    let events = server.post("/v2/models/x/generate_stream", &body).events();
    let text: String = events.iter().map(|event| event["text_output"].as_str().unwrap()).collect();
    assert_eq!(text, whole["text_output"].as_str().unwrap());
}
