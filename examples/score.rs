//! The perplexity of texts, read one per line from standard input.
//!
//! ```sh
//! cargo run --release --example score -- engines/tiny-chat < texts.txt
//! ```

use std::error::Error;
use std::io::{self, BufRead, Write};

use aotron::Model;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).unwrap_or("engines/tiny-chat".into());
    run(&path, &mut io::stdin().lock(), &mut io::stdout().lock())
}

/// The program without argument parsing, so that a test can run it.
pub fn run(path: &str, input: &mut dyn BufRead, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let model = Model::open(path)?;
    let tokenizer = model.tokenizer().ok_or("this package has no tokenizer")?;
    let mut session = model.session()?;
    for text in input.lines() {
        let text = text?;
        let ids = tokenizer.encode(&text)?;
        // The first token has no context, so there is one score fewer than tokens.
        let scores = session.score(&ids, &mut |_, _| {})?;
        if scores.is_empty() {
            writeln!(out, "{text}: too short to score")?;
            continue;
        }
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        writeln!(out, "{text}: {} tokens, perplexity {:.3}", ids.len(), (-mean).exp())?;
    }
    Ok(())
}
