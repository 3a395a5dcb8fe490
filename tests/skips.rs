//! Tests that a machine cannot run: each says so, is counted for the summary of `make test`, and is a failure where
//! AOTRON_REQUIRE names what is missing.

use std::fs::OpenOptions;
use std::io::Write;

/// Everything that a test may do without. tools/deny.sh knows the last two.
pub const KINDS: [&str; 10] =
    ["tensorrt", "no-driver", "tar", "python3", "avx2", "avx512", "avx512-vnni", "avx512-bf16", "deny", "advisories"];

/// Skips `test`, which needs `kind`. The caller returns after it.
///
/// # Panics
/// If AOTRON_REQUIRE, a list with commas, names `kind`.
pub fn skip(kind: &str, test: &str, reason: impl std::fmt::Display) {
    assert!(KINDS.contains(&kind), "{kind} is not in the list of what tests may do without");
    let reason = reason.to_string().replace(['\n', '\t'], " ");
    assert!(!required().iter().any(|name| name == kind), "AOTRON_REQUIRE asks for {kind}, but {reason}");
    // Past the capture of tests' output.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
    if let Some(list) = std::env::var_os("AOTRON_SKIPS") {
        let line = format!("{kind}\t{test}\t{reason}\n");
        OpenOptions::new().append(true).create(true).open(list).unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// What AOTRON_REQUIRE names.
pub fn required() -> Vec<String> {
    let names = std::env::var("AOTRON_REQUIRE").unwrap_or_default();
    names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}
