//! A conversation: reads messages from standard input and prints answers as they are computed.
//!
//! ```sh
//! cargo run --release --example chat -- engines/tiny-chat
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
    let mut chat = Model::open(path)?.chat()?;
    for line in input.lines() {
        let line = line?;
        for piece in chat.send(&line)? {
            write!(out, "{}", piece?)?;
            out.flush()?;
        }
        let tokens = chat.last_completion().map_or(0, |answer| answer.completion_tokens);
        writeln!(out, "\n({tokens} tokens)")?;
    }
    Ok(())
}
