//! Tests that cannot run on every machine. A skipped test reports itself, is counted in the summary of `make test`, and
//! fails if AOTRON_REQUIRE names what is missing.

use std::fs::OpenOptions;
use std::io::Write;

/// Optional requirements of tests. The last two belong to tools/deny.sh.
pub const KINDS: [&str; 10] =
    ["tensorrt", "no-driver", "tar", "python3", "avx2", "avx512", "avx512-vnni", "avx512-bf16", "deny", "advisories"];

/// Skips `test`, which requires `kind`. The caller returns afterwards.
///
/// # Panics
/// If AOTRON_REQUIRE, a comma-separated list, names `kind`.
pub fn skip(kind: &str, test: &str, reason: impl std::fmt::Display) {
    assert!(KINDS.contains(&kind), "{kind} is not in the list of optional requirements");
    let reason = reason.to_string().replace(['\n', '\t'], " ");
    assert!(!required().iter().any(|name| name == kind), "AOTRON_REQUIRE names {kind}, but {reason}");
    // Written directly, because the test harness captures output.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
    if let Some(list) = std::env::var_os("AOTRON_SKIPS") {
        let line = format!("{kind}\t{test}\t{reason}\n");
        OpenOptions::new().append(true).create(true).open(list).unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// The requirements that AOTRON_REQUIRE names.
pub fn required() -> Vec<String> {
    let names = std::env::var("AOTRON_REQUIRE").unwrap_or_default();
    names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}
