use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::server::{Reply, Server};

fn completion() -> Value {
    json!({ "prompt": "What is", "max_tokens": 4 })
}

/// The server still answers, as before.
fn is_well(server: &Server) {
    let reply = server.post("/v1/completions", &completion()).ok();
    assert_eq!(reply["choices"][0]["text"], " larger.\n", "{reply}");
}

#[test]
fn requests_that_make_no_sense_get_a_status_and_hurt_nobody() {
    let server = Server::start(&["--max-body", "1", "--client-timeout", "2"]);
    let post = |body: &[u8]| server.request("POST", "/v1/completions", &[], body).status;
    let deep = format!("{{\"prompt\": {}", "[".repeat(200_000));
    let nested = format!("{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    for body in [
        &b""[..],
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": \"a\"} x",
        b"{\"prompt\": \"a\", \"prompt\": \"b\"}",
        b"{\"prompt\": \"a\", \"max_tokens\": 1e400}",
        deep.as_bytes(),
        nested.as_bytes(),
        b"{\"prompt\": \"a\", \"n\": -1}",
        b"{\"prompt\": \"a\", \"n\": 18446744073709551616}",
    ] {
        assert_eq!(post(body), 400, "{:?}", String::from_utf8_lossy(&body[..body.len().min(60)]));
    }
    assert_eq!(post(&vec![b' '; (1 << 20) + 1]), 413);
    // A length that is announced and not sent, or sent and not announced.
    let huge = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n{";
    assert_eq!(Reply::parse(&server.raw(huge)).status, 413);
    let slow = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{";
    assert_eq!(Reply::parse(&server.raw(slow)).status, 408);
    let headers: String = (0..10_000).map(|n| format!("h{n}: x\r\n")).collect();
    let many = format!("GET /health HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    let reply = server.raw(many.as_bytes());
    assert!(reply.is_empty() || Reply::parse(&reply).status == 431);
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(1 << 20));
    let reply = server.raw(long.as_bytes());
    assert!(reply.is_empty() || [414, 431].contains(&Reply::parse(&reply).status));
    for nonsense in [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], b"GET\r\n\r\n", b"\0\0\0\0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nfffffffffffffffff\r\n"]
    {
        let reply = server.raw(nonsense);
        assert!(reply.is_empty() || (400..=408).contains(&Reply::parse(&reply).status), "{nonsense:?}");
    }
    is_well(&server);
}

#[test]
fn requests_one_after_another_on_a_connection_are_answered_in_order() {
    let server = Server::start(&[]);
    let body = completion().to_string();
    let one = format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let last = "GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let reply = server.raw((one.repeat(5) + last).as_bytes());
    let text = String::from_utf8(reply).unwrap();
    assert_eq!((text.matches("text_completion").count(), text.matches("\"version\"").count()), (5, 1));
    assert!(text.rfind("text_completion") < text.find("\"version\""));
}

#[test]
fn prompts_beyond_all_bounds_are_refused_at_once() {
    let server = Server::start(&["--max-body", "64"]);
    let started = Instant::now();
    for text in ["\n", "a", "é", "<extra_id_1>"] {
        let text = text.repeat((8 << 20) / text.len());
        for (path, body) in [
            ("/v1/completions", json!({ "prompt": text })),
            ("/v1/chat/completions", json!({ "messages": [{ "role": "user", "content": text }] })),
            ("/tokenize", json!({ "prompt": text })),
        ] {
            let reply = server.post(path, &body);
            assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
            assert!(reply.refused(400).contains("bytes"));
        }
    }
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    assert!(server.resident_bytes() < 1 << 30);
    let ids = vec![5; 600];
    let reply = server.post("/v1/completions", &json!({ "prompt": ids }));
    assert!(
        reply.refused(400).contains(
            "maximum context length is 512 tokens, prompt and answer together, but the prompt has 600 tokens"
        )
    );
    let many: Vec<Value> = vec![json!({ "role": "user", "content": "" }); 70_000];
    assert!(server.post("/v1/chat/completions", &json!({ "messages": many })).refused(400).contains("messages"));
    is_well(&server);
}

#[test]
fn lists_beyond_all_bounds_are_refused() {
    let server = Server::start(&[]);
    let biases: serde_json::Map<String, Value> = (0..50_000).map(|id| (id.to_string(), json!(1))).collect();
    let stops: Vec<String> = (0..10_000).map(|n| n.to_string()).collect();
    for (field, value) in
        [("logit_bias", json!(biases)), ("stop", json!(stops)), ("stop_token_ids", json!(vec![1; 100_000]))]
    {
        let mut body = completion();
        body[field] = value;
        server.post("/v1/completions", &body).refused(400);
    }
    let choices: Vec<String> = (0..5000).map(|n| n.to_string()).collect();
    let mut body = completion();
    body["structured_outputs"] = json!({ "choice": choices });
    server.post("/v1/completions", &body).refused(400);
    let prompts = vec!["a"; 1000];
    server.post("/v1/completions", &json!({ "prompt": prompts })).refused(400);
    is_well(&server);
}

#[test]
fn a_client_that_stops_reading_is_left_and_its_slots_are_freed() {
    let server = Server::start(&["--client-timeout", "1"]);
    // Enough that it does not fit what the sockets hold.
    let body = json!({ "prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": true, "logprobs": 20, "n": 60 });
    let stuck = server.begin("/v1/completions", &body);
    server.wait_for("running requests", || server.metric("vllm:num_requests_running") > 0.0);
    server.wait_for("free slots", || server.metric("aotron_requests_in_flight") == 0.0);
    drop(stuck);
    is_well(&server);
}

#[test]
fn honest_clients_are_answered_beside_many_that_are_not() {
    let server = Server::start(&["--client-timeout", "5"]);
    let expected = server.post("/v1/completions", &completion()).ok()["choices"].clone();
    // Connections that say nothing, say half of something, or say it slowly.
    let mut idle: Vec<_> = (0..300).map(|_| server.connect()).collect();
    for (index, stream) in idle.iter_mut().enumerate() {
        let half =
            [&b""[..], b"POST /v1/completions HTT", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 10\r\n\r\n{"];
        stream.write_all(half[index % 3]).unwrap();
    }
    for _ in 0..5 {
        assert_eq!(server.post("/v1/completions", &completion()).ok()["choices"], expected);
    }
    // They are all let go in time.
    for stream in &mut idle {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    is_well(&server);
}

/// Clients that send all of a body before they read the reply are told why it is refused, not cut off; and what is large is
/// not worked on by the threads that serve everybody else.
#[test]
fn large_bodies_are_refused_in_words_and_hold_up_nobody() {
    let server = Server::start(&[]);
    let head = |length: usize| format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    let length = 30 << 20;
    let mut stream = server.connect();
    stream.write_all(head(length).as_bytes()).unwrap();
    for _ in 0..30 {
        stream.write_all(&vec![b' '; 1 << 20]).unwrap();
    }
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    assert_eq!(Reply::parse(&reply).status, 413);
    let entries = |name: &str| -> serde_json::Map<String, Value> {
        (0..400_000).map(|n| (format!("{name}{n}"), json!(1))).collect()
    };
    let bodies = [
        ("/v1/completions", json!({ "prompt": "a", "logit_bias": entries("") })),
        ("/v1/responses", json!({ "input": "a", "max_output_tokens": 2, "metadata": entries("k") })),
        ("/v1/completions", json!({ "prompt": vec![[1]; 1_000_000] })),
        ("/v2/models/m/infer", json!({ "inputs": vec![json!({ "name": "x", "shape": [1], "data": [1] }); 100_000] })),
    ];
    std::thread::scope(|scope| {
        let senders: Vec<_> =
            bodies.iter().map(|(path, body)| scope.spawn(|| server.post(path, body).status)).collect();
        while senders.iter().any(|sender| !sender.is_finished()) {
            let started = Instant::now();
            is_well(&server);
            assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
        }
        for sender in senders {
            let status = sender.join().unwrap();
            assert!([200, 400, 413].contains(&status), "{status}");
        }
    });
}
