//! A custom sampler: top-nσ, which keeps the tokens whose logits are within n standard deviations of the largest
//! (<https://arxiv.org/abs/2411.07641>), and samples among them.
//!
//! ```sh
//! cargo run --release --example custom_sampler -- engines/tiny-chat "What is the capital of France?"
//! ```

use std::error::Error;
use std::io::{self, Write};

use aotron::{Message, Model};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().unwrap_or("engines/tiny-chat".into());
    let question = arguments.next().unwrap_or("What is the capital of France?".into());
    run(&path, &question, 1.0, &mut io::stdout().lock())
}

/// The program without argument parsing, so that a test can run it.
pub fn run(path: &str, question: &str, n: f32, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let model = Model::open(path)?;
    let request = model.chat_request(&[Message::user(question)])?;
    let mut session = model.session()?;
    let mut random = Xorshift(0x9E37_79B9_7F4A_7C15);
    let answer = session.stream(request)?.choosing(move |logits, _so_far| Ok(top_n_sigma(logits, n, random.next())));
    for piece in answer {
        write!(out, "{}", piece?)?;
        out.flush()?;
    }
    writeln!(out)?;
    Ok(())
}

/// Samples an id; `uniform` is in [0, 1). The caller has checked that the logits are finite.
pub fn top_n_sigma(logits: &[f32], n: f32, uniform: f64) -> u32 {
    let finite = || logits.iter().filter(|logit| logit.is_finite()).map(|logit| f64::from(*logit));
    let count = finite().count().max(1) as f64;
    let mean = finite().sum::<f64>() / count;
    let sigma = (finite().map(|logit| (logit - mean).powi(2)).sum::<f64>() / count).sqrt();
    let largest = finite().fold(f64::NEG_INFINITY, f64::max);
    let least = largest - f64::from(n) * sigma;
    let weight = |logit: f32| if f64::from(logit) < least { 0.0 } else { (f64::from(logit) - largest).exp() };
    let mut left = uniform * logits.iter().map(|logit| weight(*logit)).sum::<f64>();
    let mut chosen = 0;
    for (id, logit) in logits.iter().enumerate().filter(|(_, logit)| weight(**logit) > 0.0) {
        chosen = id as u32;
        left -= weight(*logit);
        if left < 0.0 {
            break;
        }
    }
    chosen
}

/// A small random number generator with 53 bits per draw.
struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}
