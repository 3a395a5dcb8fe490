use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use aotron::engine::Package;
use serde_json::json;
use tempfile::TempDir;

use super::server::{Server, package};

/// A copy of the package in a folder of this name, and the path of its weights.
fn copy(name: &str) -> (TempDir, String, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::create_dir(&path).unwrap();
    let opened = Package::open(Path::new(package())).unwrap();
    for file in opened.manifest().files.iter().map(|file| file.path.as_str()).chain(["engine.json"]) {
        let target = path.join(file);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(opened.file_path(file), target).unwrap();
    }
    let weights = path.join(&opened.manifest().plans[0].weights);
    (folder, path.to_str().unwrap().to_owned(), weights)
}

fn truncate(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(0).unwrap();
}

#[test]
fn flags_and_packages_that_cannot_be_used_are_named_before_the_server_listens() {
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port().to_string();
    let (_folder, fresh, _) = copy("fresh");
    std::fs::create_dir(Path::new(&fresh).join("inner")).unwrap();
    for (arguments, words) in [
        (&[package(), "--served-model-name", ""][..], &["at least one character"][..]),
        (&[package(), "--cors-origin", "foo"], &["scheme", "https://example.org"]),
        (&[package(), "--cors-origin", "https://example.org/"], &["without a path"]),
        (&[package(), "--host", ""], &["an address or a host name is needed"]),
        (&[package(), "--slots", "4000"], &["--slots 4000", "was built for 1 to", "aotron build --slots"]),
        (&[package(), "--prefix-cache", "100TiB"], &["--prefix-cache", "this machine has"]),
        (&[package(), "--chat-format", "no-such"], &["no-such"]),
        (&[package(), "--target", "a100"], &["a100"]),
        (&[package(), package()], &["two models are named", "rename one of the folders"]),
        (&[package(), "--port", &port], &["already in use", "--port"]),
        (&[package(), "--host", "192.0.2.1"], &["192.0.2.1", "--host"]),
        (&[&format!("{fresh}/inner")], &["inside of an engine package", &fresh]),
        (&[&format!("{fresh}/engine.json")], &["inside of an engine package", &fresh]),
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_aotron")).arg("serve").args(arguments).args(["--threads", "1"]).output();
        let output = output.unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && !error.contains("listening"), "{arguments:?}: {error}");
        for word in words {
            assert!(error.contains(word), "{arguments:?}: {error}");
        }
    }
}

#[test]
fn a_bracketed_address_is_listened_on_and_a_device_without_effect_is_named() {
    // Some machines have no IPv6.
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        let server = Server::start(&["--host", "[::1]"]);
        assert!(server.address.is_ipv6());
    }
    let server = Server::start(&["--device", "3"]);
    assert!(server.log().contains("--device 3 has no effect"), "{}", server.log());
}

#[test]
fn a_model_that_cannot_be_opened_is_listed_as_failed_and_the_others_answer() {
    let (_folder, broken, weights) = copy("broken");
    // The package's check of sizes passes; the header is no JSON.
    std::fs::File::options().write(true).open(&weights).unwrap().write_all_at(b"XXXXXXXX", 8).unwrap();
    let server = Server::start_of(&[&broken, package()], &[]);
    let state = |index: usize| server.get("/ready").json()["models"][index]["state"].clone();
    server.wait_for("both models", || state(0) == "failed" && state(1) == "ready");
    assert_eq!(server.get("/ready").status, 503);
    let list = server.get("/v1/models").ok();
    let (status, fine) = (&list["data"][0]["status"], &list["data"][1]["status"]);
    assert!(status["value"] == "failed" && fine.is_null(), "{list}");
    let reason = status["reason"].as_str().unwrap();
    assert!(reason.contains("broken/") && !reason.contains(&broken), "{reason}");
    let index = server.post("/v2/repository/index", &json!({})).ok();
    let entry = |name: &str| index.as_array().unwrap().iter().find(|entry| entry["name"] == name).unwrap().clone();
    assert_eq!((&entry("broken")["state"], &entry("broken")["reason"]), (&json!("UNAVAILABLE"), &status["reason"]));
    assert_eq!(entry("tiny-chat")["state"], "READY");
    let ask = |model: Option<&str>| {
        let mut body = json!({ "prompt": "What is", "max_tokens": 4 });
        body["model"] = model.map_or(json!(null), |model| json!(model));
        server.post("/v1/completions", &body)
    };
    let reply = ask(Some("broken"));
    assert_eq!((reply.status, reply.header("retry-after")), (503, None));
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("could not be opened"));
    assert_eq!(ask(None).ok()["model"], "tiny-chat");
    assert!(server.log().contains("broken cannot be served"), "{}", server.log());
    // With no other left, the process ends.
    let server = Server::start_of(&[&broken], &[]);
    assert_eq!(server.wait().code(), Some(1));
}

#[test]
fn weights_that_are_shortened_end_the_program_in_words_unless_they_were_copied() {
    let (_folder, path, weights) = copy("shortened");
    let server = Server::start_of(&[&path], &[]);
    server.wait_for("readiness", || server.get("/ready").status == 200);
    truncate(&weights);
    let mut connection = server.begin("/v1/completions", &json!({ "prompt": "What is", "max_tokens": 4 }));
    let _ = std::io::copy(&mut connection, &mut std::io::sink());
    server.wait_for("the reason", || server.log().contains("shortened"));
    let log = server.log();
    assert!(
        log.contains(&format!("error: cannot read {}", weights.display())) && log.contains("--copy-weights"),
        "{log}"
    );
    assert_eq!(server.wait().code(), Some(1));

    let (_folder, path, weights) = copy("copied");
    let server = Server::start_of(&[&path], &["--copy-weights"]);
    server.wait_for("readiness", || server.get("/ready").status == 200);
    truncate(&weights);
    let reply = server.post("/v1/completions", &json!({ "prompt": "What is", "max_tokens": 4 })).ok();
    assert_eq!(reply["choices"][0]["text"], " larger.\n");
}
