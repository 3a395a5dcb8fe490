use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::server::{Reply, Server};

fn chat(text: &str, settings: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": text }] });
    body.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    body
}

/// The reply without what differs from request to request.
fn answer(reply: &Reply) -> Value {
    let mut json = reply.ok();
    for field in ["id", "created"] {
        json.as_object_mut().unwrap().remove(field);
    }
    json["usage"].as_object_mut().unwrap().remove("prompt_tokens_details");
    json
}

#[test]
fn the_same_request_has_the_same_answer_alone_and_among_fifty() {
    let server = Server::start(&[]);
    let request = |number: usize| {
        let question = ["What is the capital of France?", "What is 17 + 25?", "Tell me a story."][number % 3];
        let sampling = match number % 4 {
            0 => json!({ "logprobs": true, "top_logprobs": 2 }),
            1 => json!({ "temperature": 1.5, "seed": number, "max_tokens": 40 }),
            2 => json!({ "temperature": 2.0, "top_p": 0.9, "seed": number, "n": 2, "max_tokens": 30 }),
            _ => json!({ "structured_outputs": { "regex": "[a-z ]{5,20}" } }),
        };
        chat(question, sampling)
    };
    let alone: Vec<Value> =
        (0..12).map(|number| answer(&server.post("/v1/chat/completions", &request(number)))).collect();
    std::thread::scope(|scope| {
        for number in 0..50 {
            let (server, alone, request) = (&server, &alone, &request);
            scope.spawn(move || {
                let number = number % 12;
                let reply = server.post("/v1/chat/completions", &request(number));
                assert_eq!(answer(&reply), alone[number], "request {number}");
            });
        }
    });
    assert_eq!(server.metric("aotron_requests_in_flight"), 0.0);
}

/// Long enough to be found running.
fn endless(stream: bool) -> Value {
    chat("a", json!({ "ignore_eos": true, "stream": stream, "n": 4 }))
}

#[test]
fn whoever_leaves_frees_the_slots() {
    let server = Server::start(&["--slots", "4"]);
    for stream in [true, false] {
        let mut connection = server.begin("/v1/chat/completions", &endless(stream));
        server.wait_for("running requests", || server.metric("vllm:num_requests_running") > 0.0);
        if stream {
            connection.read_exact(&mut [0; 200]).unwrap();
        }
        drop(connection);
        let left = Instant::now();
        server.wait_for("free slots", || server.metric("vllm:num_requests_running") == 0.0);
        assert!(left.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn a_client_that_closes_its_half_gets_the_whole_answer() {
    let server = Server::start(&[]);
    let mut body = chat("Count to ten.", json!({ "ignore_eos": true, "max_tokens": 200, "temperature": 0 }));
    for (stream, version) in [(false, "1.1"), (false, "1.0"), (true, "1.1"), (true, "1.0")] {
        body["stream"] = stream.into();
        let whole = server.post("/v1/chat/completions", &body);
        let text = body.to_string();
        let head =
            format!("POST /v1/chat/completions HTTP/{version}\r\nHost: test\r\nContent-Length: {}\r\n\r\n", text.len());
        let mut connection = server.connect();
        connection.write_all((head + &text).as_bytes()).unwrap();
        connection.shutdown(std::net::Shutdown::Write).unwrap();
        let mut reply = Vec::new();
        connection.read_to_end(&mut reply).unwrap();
        assert!(
            reply.starts_with(format!("HTTP/{version} 200 OK\r\n").as_bytes()),
            "{:?}",
            String::from_utf8_lossy(&reply)
        );
        let reply = Reply::parse(&reply);
        match stream {
            true => assert_eq!(reply.events().len(), whole.events().len()),
            false => assert_eq!(reply.ok()["choices"], whole.ok()["choices"]),
        }
    }
    // One that had a reply before, or resets, is taken to be gone.
    let mut connection = server.connect();
    let text = endless(false).to_string();
    let first = "GET /health HTTP/1.1\r\nHost: test\r\n\r\n";
    connection.write_all(first.as_bytes()).unwrap();
    assert!(connection.read(&mut [0; 1000]).unwrap() > 0);
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n", text.len());
    connection.write_all((head + &text).as_bytes()).unwrap();
    server.wait_for("running requests", || server.metric("vllm:num_requests_running") > 0.0);
    drop(connection);
    let left = Instant::now();
    server.wait_for("free slots", || server.metric("vllm:num_requests_running") == 0.0);
    assert!(left.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_full_queue_is_refused_with_a_time_to_come_back() {
    let server = Server::start(&["--slots", "1", "--max-queue", "3"]);
    let busy = server.begin("/v1/chat/completions", &endless(true));
    server.wait_for("a queue", || server.metric("vllm:num_requests_waiting") == 3.0);
    let reply = server.post("/v1/chat/completions", &chat("Hi", json!({})));
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert!(reply.refused(429).contains("queue"));
    drop(busy);
    server.wait_for("an answer", || server.post("/v1/chat/completions", &chat("Hi", json!({}))).status == 200);
}

#[test]
fn a_deadline_ends_what_waits_and_what_runs() {
    let server = Server::start(&["--slots", "1", "--request-timeout", "1"]);
    let slow = json!({ "prompt": "a", "max_tokens": 500, "ignore_eos": true, "n": 128 });
    let reply = server.post("/v1/completions", &slow);
    assert!(reply.refused(504).contains("deadline"));
    server.wait_for("free slots", || server.metric("vllm:num_requests_running") == 0.0);
}

#[test]
fn a_signal_lets_running_requests_finish() {
    let server = Server::start(&["--slots", "2"]);
    let expected = answer(&server.post("/v1/chat/completions", &chat("a", json!({ "ignore_eos": true }))));
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| server.post("/v1/chat/completions", &chat("a", json!({ "ignore_eos": true })))))
            .collect();
        server.wait_for("six requests", || server.metric("aotron_requests_in_flight") == 6.0);
        server.signal("TERM");
        server.wait_for("draining", || server.log().contains("stopping"));
        for request in running {
            assert_eq!(answer(&request.join().unwrap()), expected);
        }
    });
    assert!(server.wait().success());
}

#[test]
fn a_request_that_the_drain_timeout_cuts_off_is_told_so() {
    let server = Server::start(&["--slots", "1", "--drain-timeout", "1"]);
    let long = json!({ "prompt": "a", "max_tokens": 500, "ignore_eos": true, "n": 128, "stream": true });
    let mut stream = server.begin("/v1/completions", &long);
    server.wait_for("running requests", || server.metric("vllm:num_requests_running") > 0.0);
    server.signal("TERM");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let events = Reply::parse(&bytes).events();
    let [.., error, done] = &events[..] else { panic!("{events:?}") };
    assert_eq!((&error["error"]["message"], done), (&json!("the server is stopping"), &json!("[DONE]")));
    assert_eq!(server.wait().code(), Some(1));
}

#[test]
fn a_second_signal_and_a_kill_end_it_at_once_and_it_starts_again() {
    let server = Server::start(&[]);
    let _busy = server.begin("/v1/chat/completions", &endless(true));
    server.wait_for("running requests", || server.metric("vllm:num_requests_running") > 0.0);
    server.signal("TERM");
    server.wait_for("draining", || server.log().contains("stopping"));
    let ready = server.get("/ready");
    assert_eq!((ready.status, ready.header("retry-after")), (503, Some("1")));
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(130));
    let server = Server::start(&[]);
    server.signal("KILL");
    server.wait();
    let started = Instant::now();
    assert_eq!(Server::start(&[]).get("/ready").status, 200);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

/// Nobody reads the log, and the server answers and ends all the same.
#[test]
fn a_log_that_is_not_read_stops_nothing() {
    let server = Server::start_unread(&[]);
    // Far more than a pipe holds.
    for _ in 0..3000 {
        assert_eq!(server.get("/health").status, 200);
    }
    server.signal("TERM");
    assert!(server.wait().success());
}
