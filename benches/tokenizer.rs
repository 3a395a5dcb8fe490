//! Encodes and decodes lines with a tokenizer on one thread and reports the time taken, for the comparison with
//! SentencePiece in tools/compare_tokenizer.py.
//!
//! ```text
//! cargo bench --bench tokenizer -- TOKENIZER LINES.jsonl RUNS
//! ```
//!
//! LINES.jsonl has one JSON string per line. Standard output is JSON: the ids and decoded text of every line, the
//! seconds of every run over all of them, and the seconds it took to load the tokenizer.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use aotron::text::Tokenizer;
use serde_json::json;

fn main() -> anyhow::Result<()> {
    // Cargo passes `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [tokenizer, lines, runs] = arguments.as_slice() else {
        bail!("usage: tokenizer TOKENIZER LINES.jsonl RUNS");
    };
    let bytes = std::fs::read(tokenizer).with_context(|| format!("cannot read {tokenizer}"))?;
    let started = Instant::now();
    let tokenizer = Tokenizer::from_bytes(Path::new(tokenizer), &bytes)?;
    let load_seconds = started.elapsed().as_secs_f64();
    let lines = std::fs::read_to_string(lines).with_context(|| format!("cannot read {lines}"))?;
    let lines: Vec<String> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let (mut encode_seconds, mut decode_seconds) = (Vec::new(), Vec::new());
    let (mut ids, mut texts) = (Vec::new(), Vec::new());
    for _ in 0..runs.parse().context("RUNS must be a number")? {
        let started = Instant::now();
        ids = lines.iter().map(|line| tokenizer.encode(line)).collect::<Result<Vec<_>, _>>()?;
        encode_seconds.push(started.elapsed().as_secs_f64());
        let started = Instant::now();
        texts = ids.iter().map(|ids| tokenizer.decode(ids)).collect::<Result<Vec<_>, _>>()?;
        decode_seconds.push(started.elapsed().as_secs_f64());
    }
    let report = json!({
        "ids": ids, "texts": texts, "load_seconds": load_seconds,
        "encode_seconds": encode_seconds, "decode_seconds": decode_seconds,
    });
    println!("{report}");
    Ok(())
}
