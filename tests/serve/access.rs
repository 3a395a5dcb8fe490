use serde_json::json;

use super::server::Server;

#[test]
fn every_route_but_those_of_liveness_the_pages_and_the_document_needs_a_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, "# two keys\nalpha\n\nbeta\n").unwrap();
    let server = Server::start(&["--api-key-file", file.to_str().unwrap(), "--api-key", "gamma"]);
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "max_tokens": 1 }).to_string();
    let chat = |headers: &[(&str, &str)]| server.request("POST", "/v1/chat/completions", headers, body.as_bytes());
    for key in ["alpha", "beta", "gamma"] {
        assert_eq!(chat(&[("Authorization", &format!("Bearer {key}"))]).status, 200);
        assert_eq!(chat(&[("x-api-key", key)]).status, 200);
        // Gateways send both, of which one may be their own.
        assert_eq!(chat(&[("Authorization", "Bearer other"), ("x-api-key", key)]).status, 200);
        assert_eq!(chat(&[("Authorization", &format!("Bearer {key}")), ("x-api-key", "other")]).status, 200);
    }
    for wrong in [
        &[][..],
        &[("Authorization", "Bearer alph")],
        &[("Authorization", "Bearer alphaa")],
        &[("Authorization", "Basic alpha")],
        &[("x-api-key", "")],
        &[("Authorization", "Bearer ")],
        &[("Authorization", "Bearer other"), ("x-api-key", "another")],
    ] {
        let reply = chat(wrong);
        assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
        assert_eq!((reply.status, reply.header("www-authenticate")), (401, Some("Bearer")));
    }
    for open in [
        "/",
        "/docs",
        "/openapi.json",
        "/page/docs.js",
        "/page/page.js",
        "/health",
        "/ready",
        "/v2/health/ready",
        "/v2/models/x/ready",
    ] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
    for closed in ["/metrics", "/v1/models", "/v2/models/x/config", "/nothing", "/v1/../metrics", "//metrics"] {
        assert_eq!(server.get(closed).status, 401, "{closed}");
    }
    assert!(server.post("/v2/models/x/infer", &json!({})).json()["error"].is_string());
    assert_eq!(server.post("/v1/messages", &json!({})).json()["type"], "error");
    assert!(!server.log().contains("alpha"), "no key is logged");
}

#[test]
fn names_are_matched_as_people_write_them() {
    let server =
        Server::start(&["--served-model-name", "nvidia/Nemotron-3-8B-Chat-4k-RLHF", "--served-model-name", "n"]);
    let ask = |model: &str| {
        let body = json!({ "model": model, "prompt": "a", "max_tokens": 1 });
        server.post("/v1/completions", &body)
    };
    for name in ["nvidia/Nemotron-3-8B-Chat-4k-RLHF", "nemotron-3-8b-chat-4K-rlhf", "N", "tiny-chat", ""] {
        assert_eq!(ask(name).ok()["model"], "nvidia/Nemotron-3-8B-Chat-4k-RLHF", "{name}");
    }
    let reply = ask("other");
    assert_eq!(reply.json()["error"]["code"], "model_not_found");
    assert!(reply.refused(404).contains("nvidia/Nemotron-3-8B-Chat-4k-RLHF"));
    let listed = server.get("/v1/models").ok();
    assert_eq!(
        (&listed["data"][0]["id"], &listed["data"][0]["max_model_len"]),
        (&json!("nvidia/Nemotron-3-8B-Chat-4k-RLHF"), &json!(512))
    );
    assert_eq!(server.get("/v1/models/nvidia/Nemotron-3-8B-Chat-4k-RLHF").ok()["object"], "model");
    assert_eq!(server.get("/v1/models/none").status, 404);
    assert_eq!(server.get("/nothing").status, 404);
    assert_eq!(server.request("DELETE", "/v1/completions", &[], b"").status, 405);
}

#[test]
fn unknown_fields_are_named_or_refused_and_ids_go_through() {
    let body = json!({ "prompt": "a", "max_tokens": 1, "temprature": 1, "user": "u" });
    let server = Server::start(&["--log-format", "json"]);
    let reply = server.request("POST", "/v1/completions", &[("X-Request-Id", "abc-1")], body.to_string().as_bytes());
    assert_eq!(
        (reply.status, reply.header("x-aotron-ignored"), reply.header("x-request-id")),
        (200, Some("temprature"), Some("abc-1"))
    );
    let long = "x".repeat(1000);
    for odd in ["", "a b", &long] {
        let reply = server.request("GET", "/health", &[("X-Request-Id", odd)], b"");
        assert_eq!(reply.header("x-request-id").unwrap().len(), 36, "one of our own");
    }
    server.wait_for("a line of the log", || server.log().contains("\"request_id\":\"abc-1\""));
    let log = server.log();
    let line = log.lines().find(|line| line.contains("abc-1")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(
        (&line["status"], &line["route"], &line["completion_tokens"]),
        (&json!(200), &json!("/v1/completions"), &json!(1))
    );
    let strict = Server::start(&["--unknown-fields", "reject"]);
    assert!(strict.post("/v1/completions", &body).refused(400).contains("temprature"));
}

#[test]
fn pages_of_named_origins_may_ask() {
    let server = Server::start(&["--cors-origin", "https://a.example"]);
    let preflight = |origin: &str| {
        let headers = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            ("Access-Control-Request-Headers", "authorization,x-stainless-os"),
        ];
        server.request("OPTIONS", "/v1/chat/completions", &headers, b"")
    };
    let allowed = preflight("https://a.example");
    assert_eq!(allowed.header("access-control-allow-origin"), Some("https://a.example"));
    assert!(allowed.header("access-control-allow-headers").unwrap().contains("x-stainless-os"));
    assert_eq!(preflight("https://b.example").header("access-control-allow-origin"), None);
}

#[test]
fn metrics_have_gateways_names_unless_told_otherwise_and_count_responses() {
    let server = Server::start(&[]);
    server.post("/v1/completions", &json!({ "prompt": "a", "max_tokens": 1 })).ok();
    server.post("/v1/completions", &json!({ "prompt": 1.5 })).refused(400);
    server.get("/nothing/of/the/kind").refused(404);
    let all = server.get("/metrics").text();
    let own = server.get("/metrics?names=aotron").text();
    assert!(all.contains("\nvllm:num_requests_running{") && !own.contains("vllm:"), "{all}");
    for line in [
        "aotron_http_responses_total{route=\"/v1/completions\",status=\"200\"} 1",
        "aotron_http_responses_total{route=\"/v1/completions\",status=\"400\"} 1",
        // What a client makes up is one route.
        "aotron_http_responses_total{route=\"-\",status=\"404\"} 1",
        "# TYPE aotron_generated_tokens_total counter",
    ] {
        assert!(own.lines().any(|found| found == line), "{line}: {own}");
    }
}

#[test]
fn the_document_is_served_with_and_without_its_page() {
    let server = Server::start_unready(&["--no-ui"]);
    let document = server.get("/openapi.json");
    assert_eq!(document.header("content-type"), Some("application/json"));
    assert!(document.ok()["paths"]["/v1/chat/completions"]["post"].is_object());
    assert!(server.get("/docs").refused(404).contains("/openapi.json"));
    // A path that is not text.
    assert!(server.get("/v1/models/%ff").refused(400).contains("UTF-8"));
}
