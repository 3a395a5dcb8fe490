//! Answers many questions together: reads one per line from standard input and prints the answers in order.
//!
//! ```sh
//! cargo run --release --example batch -- engines/tiny-chat < questions.txt
//! ```

use std::error::Error;
use std::io::{self, BufRead, Write};

use aotron::{DrainMode, Message, Model};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).unwrap_or("engines/tiny-chat".into());
    run(&path, &mut io::stdin().lock(), &mut io::stdout().lock())
}

/// The program without argument parsing, so that a test can run it.
pub fn run(path: &str, input: &mut dyn BufRead, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let model = Model::open(path)?;
    let engine = model.engine()?;
    let handle = engine.handle();
    let mut answers = Vec::new();
    for question in input.lines() {
        let question = question?;
        let request = model.chat_request(&[Message::user(&question)])?;
        // Blocks while the queue is full, instead of holding all of the input's requests in memory.
        answers.push((question, handle.submit_wait(request)?));
    }
    for (question, answer) in answers {
        writeln!(out, "{question}\t{}", answer.wait()?.text)?;
    }
    engine.shutdown(DrainMode::Accepted)?;
    Ok(())
}
