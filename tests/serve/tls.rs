use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::server::{PATIENCE, Reply, Server, package};

/// Writes a new certificate and its key to `cert.pem` and `key.pem` of a folder.
fn certificate(folder: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

/// A server with a certificate, and what a client has to trust.
fn serve(flags: &[&str]) -> (Server, Arc<ClientConfig>, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let trusted = certificate(folder.path());
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (cert, key) = (file("cert.pem"), file("key.pem"));
    let flags = [&["--tls-cert", &cert, "--tls-key", &key], flags].concat();
    let server = Server::start_unready(&flags);
    let mut roots = RootCertStore::empty();
    roots.add(trusted).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    (server, Arc::new(config), folder)
}

/// Sends a request and reads the reply to its end.
fn request(server: &Server, config: &Arc<ClientConfig>, head: &str, body: &str) -> Reply {
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(config.clone(), name).unwrap();
    let mut stream = StreamOwned::new(connection, server.connect());
    let length = body.len();
    write!(stream, "{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    Reply::parse(&reply)
}

fn wait_until_ready(server: &Server, config: &Arc<ClientConfig>) {
    server.wait_for("readiness", || request(server, config, "GET /ready", "").status == 200);
}

#[test]
fn answers_are_encrypted_for_whoever_trusts_the_certificate() {
    let (server, config, _folder) = serve(&[]);
    assert!(server.log().contains("listening on https://"), "{}", server.log());
    wait_until_ready(&server, &config);
    let body = json!({ "messages": [{ "role": "user", "content": "What is 17 + 25?" }], "stream": true });
    let whole = json!({ "messages": body["messages"] });
    let reply = request(&server, &config, "POST /v1/chat/completions", &whole.to_string()).ok();
    assert_eq!(reply["choices"][0]["message"]["content"], "17 + 25 = 42.");
    let events = request(&server, &config, "POST /v1/chat/completions", &body.to_string()).events();
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "17 + 25 = 42.");

    // Plain HTTP gets no reply, and a client that trusts another certificate sends no request.
    let plain = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(!plain.starts_with(b"HTTP"), "{:?}", String::from_utf8_lossy(&plain));
    let other = tempfile::tempdir().unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate(other.path())).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config.with_no_client_auth()), name).unwrap();
    let error = StreamOwned::new(connection, server.connect()).write_all(b"GET").unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
}

#[test]
fn clients_that_do_not_shake_hands_hold_up_nobody() {
    let (server, config, _folder) = serve(&["--client-timeout", "1"]);
    let mut silent: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
    wait_until_ready(&server, &config);
    // They are disconnected after the time that clients have.
    for stream in &mut silent {
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    }
    assert_eq!(request(&server, &config, "GET /health", "").status, 200);
}

#[test]
fn a_handshake_does_not_hold_up_the_end_of_the_server() {
    let (server, config, _folder) = serve(&["--client-timeout", "600", "--drain-timeout", "600"]);
    wait_until_ready(&server, &config);
    let _silent = server.connect();
    // The server has taken it once it answers one that came later.
    assert_eq!(request(&server, &config, "GET /health", "").status, 200);
    server.signal("TERM");
    let started = Instant::now();
    assert!(server.wait().success());
    assert!(started.elapsed() < PATIENCE.min(Duration::from_secs(60)), "{:?}", started.elapsed());
}

#[test]
fn files_that_cannot_be_used_are_named_before_the_server_listens() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificate(folder.path());
    certificate(other.path());
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("text.pem", "hello");
    write("empty.pem", "");
    write("cut.pem", "-----BEGIN CERTIFICATE-----\nMIIB\n");
    write("junk.pem", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n");
    write("encrypted.pem", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n");
    write("large.pem", &"x".repeat((1 << 20) + 1));
    let others = other.path().join("key.pem").to_str().unwrap().to_owned();
    for (cert, key, words) in [
        ("none.pem", "key.pem", &["cannot read", "none.pem", "No such file"][..]),
        ("cert.pem", "none.pem", &["cannot read", "none.pem"]),
        ("text.pem", "key.pem", &["text.pem has no certificate"]),
        ("empty.pem", "key.pem", &["empty.pem has no certificate"]),
        ("key.pem", "key.pem", &["key.pem has no certificate"]),
        ("cut.pem", "key.pem", &["cut.pem is not valid PEM"]),
        ("junk.pem", "key.pem", &["junk.pem", "not valid"]),
        ("large.pem", "key.pem", &["large.pem has more than"]),
        ("cert.pem", "cert.pem", &["cert.pem has no private key"]),
        ("cert.pem", "encrypted.pem", &["encrypted.pem has no private key", "decrypted"]),
        ("cert.pem", &others, &["is not the key of the first certificate in", "cert.pem"]),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_aotron"))
            .args(["serve", package(), "--port", "0", "--tls-cert", cert, "--tls-key", key])
            .current_dir(folder.path())
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && !error.contains("listening"), "{cert}, {key}: {error}");
        for word in words {
            assert!(error.contains(word), "{cert}, {key}: {error}");
        }
    }
    let output = Command::new(env!("CARGO_BIN_EXE_aotron"))
        .args(["serve", package(), "--tls-cert", "cert.pem"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--tls-key"));
}
