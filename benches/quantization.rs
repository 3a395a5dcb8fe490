//! Measures the quality and size of each precision on tiny-chat, and writes docs/quantization.md:
//!
//! ```sh
//! cargo bench --bench quantization
//! ```

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use aotron::backend::{ExecutorOptions, open};
use aotron::compile::{BuildRequest, Precision, Progress, Recipe, build};
use aotron::engine::Package;
use aotron::runtime::{Chat, Session, Turn};
use serde_json::Value;

const CHECKPOINT: &str = "tests/data/tiny-chat";
const PAGE: &str = "docs/quantization.md";
/// Limit on tokens, longer than any answer.
const MAX_TOKENS: usize = 200;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Text above the table.
const HEAD: &str = "\
# Quantization

The number formats of `aotron build --precision` and their effect on quality, measured on tiny-chat with the CPU executor.
`cargo bench --bench quantization` repeats the measurement and writes this page.

| precision | weights of linear layers | their inputs | embedding, head, KV cache |
| --- | --- | --- | --- |
| `f32` | FP32 | FP32 | FP32 |
| `bf16` | BF16 | BF16 | BF16 |
| `int8` | 8-bit integers, -127 to 127, per-channel FP32 scales | BF16 | BF16 |
| `int8` with `activations = \"int8\"` in the recipe (CPU) | as `int8` | 8-bit integers, one scale per token | BF16 |
| `int4` | 4-bit integers, -8 to 7, FP32 scales with group size 128 | BF16 | BF16 |
| `fp8` | E4M3 floats, per-channel FP32 scales | E4M3 floats, one calibrated scale per layer | BF16 |

Accumulators, norms, softmax and the residual stream are FP32 in all of them. Each scale is chosen from several candidates
to minimize the sum of squared errors of its weights (`src/quantize.rs`); the LM head stays in BF16.

";

/// Text below the table.
const LEGEND: &str = "
- **exact**: conversations, of the 500 held-out ones, in which every answer is the expected one. Decoding is greedy, and the
  model's own answers are the history of later turns.
- **same answers**: conversations in which every answer equals FP32's, token for token.
- **same token**: tokens of FP32's answers that are also the most probable ones here, given the prompt and FP32's answer up
  to that token.
- **KL**: mean Kullback-Leibler divergence of the next-token distribution from FP32's, in nats, over the tokens of
  the answers, and over all tokens of prompts and answers.
- **weights**: the weights file. tiny-chat's embedding and head, 2 · 2816 · 192 elements of BF16, are a third of its
  parameters; in the 8B model they are a quarter.
";

struct Quiet;
impl Progress for Quiet {
    fn stage(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

/// Results for one precision.
#[derive(Default)]
struct Measured {
    weight_bytes: u64,
    exact: usize,
    same_answers: usize,
    same_tokens: usize,
    answer_tokens: usize,
    answer_divergence: f64,
    divergence: f64,
    tokens: usize,
}

fn main() -> Outcome<()> {
    let (asked, answered) = (json_lines("conversations.jsonl")?, json_lines("answers.jsonl")?);
    let folder = tempfile::tempdir()?;
    let quiet: Arc<dyn Progress> = Arc::new(Quiet);
    let mut packages = HashMap::new();
    let mut rows: Vec<(String, Precision, Option<bool>)> =
        Precision::ALL.into_iter().map(|precision| (precision.to_string(), precision, None)).collect();
    rows.insert(3, ("int8, int8 activations".into(), Precision::Int8, Some(true)));
    for (name, precision, quantize_activations) in &rows {
        let mut recipe = Recipe::load("cpu")?;
        recipe.precision = *precision;
        recipe.quantize_activations = *quantize_activations;
        let output = folder.path().join(name);
        let request = BuildRequest {
            checkpoint: CHECKPOINT.into(),
            recipes: vec![recipe],
            output: output.clone(),
            replace: false,
            prepare: false,
            calibration: None,
            chat_format: None,
            reference: true,
        };
        build(&request, &quiet)?;
        packages.insert(name.clone(), Package::open(&output)?);
    }
    let reference = &packages[&Precision::F32.to_string()];
    let mut page = HEAD.to_owned();
    page.push_str(
        "| precision | exact | same answers | same token | KL of answers | KL of all | weights |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for (precision, ..) in &rows {
        let package = &packages[precision];
        let mut measured = Measured { weight_bytes: weight_bytes(package), ..Measured::default() };
        hold_conversations(package, &asked, &answered, &mut measured)?;
        compare(reference, package, &answered, &mut measured)?;
        let row = measured.row(precision, asked.len());
        eprint!("{row}");
        page.push_str(&row);
    }
    page.push_str(LEGEND);
    fs::create_dir_all("docs")?;
    fs::write(PAGE, page)?;
    Ok(())
}

impl Measured {
    fn row(&self, precision: &str, conversations: usize) -> String {
        let percent = |part: usize, whole: usize| 100.0 * part as f64 / whole as f64;
        let mut row = String::new();
        let _ = writeln!(
            row,
            "| `{precision}` | {} ({:.1} %) | {} | {:.2} % | {:.6} | {:.6} | {:.2} MB |",
            self.exact,
            percent(self.exact, conversations),
            self.same_answers,
            percent(self.same_tokens, self.answer_tokens),
            self.answer_divergence / self.answer_tokens as f64,
            self.divergence / self.tokens as f64,
            self.weight_bytes as f64 / 1e6,
        );
        row
    }
}

fn json_lines(file: &str) -> Outcome<Vec<Value>> {
    let text = fs::read_to_string(Path::new(CHECKPOINT).join(file))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

fn turns(conversation: &Value) -> &[Value] {
    conversation["turns"].as_array().map_or(&[], Vec::as_slice)
}

fn ids(value: &Value) -> Outcome<Vec<u32>> {
    Ok(serde_json::from_value(value.clone())?)
}

fn weight_bytes(package: &Package) -> u64 {
    let manifest = package.manifest();
    manifest.plans.iter().filter_map(|plan| manifest.file(&plan.weights)).map(|file| file.bytes).sum()
}

fn hold_conversations(package: &Package, asked: &[Value], answered: &[Value], measured: &mut Measured) -> Outcome<()> {
    let executor = open(package, &ExecutorOptions::default())?;
    let session = Session::new(executor, package.tokenizer()?.map(Arc::new));
    let mut chat = Chat::new(session, package.chat_format())?;
    for (asked, answered) in asked.iter().zip(answered) {
        chat.reset();
        chat.set_system(asked["system"].as_str().unwrap_or_default());
        let (mut exact, mut same) = (true, true);
        for (turn, golden) in turns(asked).iter().zip(turns(answered)) {
            let user = turn["user"].as_str().unwrap_or_default();
            let answer = chat.send_with(Turn::new(user).max_tokens(MAX_TOKENS), &mut |_| ControlFlow::Continue(()))?;
            exact &= turn["expected"].as_str() == Some(answer.text.as_str());
            same &= answer.token_ids == ids(&golden["token_ids"])?;
        }
        measured.exact += usize::from(exact);
        measured.same_answers += usize::from(same);
    }
    Ok(())
}

/// Compares the packages' next-token distributions after the same ids: every prompt, followed by FP32's answer.
fn compare(reference: &Package, package: &Package, answered: &[Value], measured: &mut Measured) -> Outcome<()> {
    let session =
        |package: &Package| -> Outcome<Session> { Ok(Session::new(open(package, &ExecutorOptions::default())?, None)) };
    let (mut exact, mut rounded) = (session(reference)?, session(package)?);
    for turn in answered.iter().flat_map(turns) {
        let (prompt, answer) = (ids(&turn["prompt_ids"])?, ids(&turn["token_ids"])?);
        let all = [prompt.as_slice(), answer.as_slice()].concat();
        let mut rows = Vec::new();
        exact.score(&all, &mut |_, row| rows.push(row.to_vec()))?;
        rounded.score(&all, &mut |index, row| {
            let divergence = divergence(&rows[index], row);
            measured.divergence += divergence;
            measured.tokens += 1;
            if let Some(token) = (index + 1).checked_sub(prompt.len()).and_then(|at| answer.get(at)) {
                measured.answer_divergence += divergence;
                measured.answer_tokens += 1;
                measured.same_tokens += usize::from(most_probable(row) == *token);
            }
        })?;
    }
    Ok(())
}

/// KL divergence `Σ p · ln(p / q)` of the softmax distributions of logits `p` and `q`.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    p.iter()
        .zip(q)
        .map(|(p, q)| {
            let (p, q) = (f64::from(*p) - p_sum, f64::from(*q) - q_sum);
            p.exp() * (p - q)
        })
        .sum()
}

/// `ln Σ exp(logit)`
fn log_sum(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    most + logits.iter().map(|l| (f64::from(*l) - most).exp()).sum::<f64>().ln()
}

fn most_probable(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    best.unwrap_or(0) as u32
}
