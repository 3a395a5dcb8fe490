//! Measures the quality and size of each precision on tiny-chat, and writes docs/quantization.md:
//!
//! ```sh
//! cargo bench --bench quantization             # all of it, some minutes
//! cargo bench --bench quantization -- layers   # prints the table of random layers alone
//! cargo bench --bench quantization -- w8a8     # prints the rows of precisions that begin so
//! ```

use std::collections::HashMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use aotron::backend::{ExecutorOptions, open};
use aotron::compile::rounding::InputProducts;
use aotron::compile::smoothing::choice::{LayerInputs, STRENGTHS};
use aotron::compile::{BuildRequest, LinearKind, Precision, Progress, Recipe, WeightRounding, build};
use aotron::engine::Package;
use aotron::quantize::{F8_MAX, Scheme, round_f8, round_i8};
use aotron::runtime::{Chat, Session, Turn};
use serde_json::Value;

const CHECKPOINT: &str = "tests/data/tiny-chat";
/// Dialogues of the kind that the model was trained for, none of them held out.
const SIMILAR: &str = "tests/data/tiny-chat/calibration.jsonl";
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
| `int4` with `activations = \"int8\"` (CPU) | as `int4` | 8-bit integers, one scale per token | BF16 |
| `fp8` | E4M3 floats, per-channel FP32 scales; `qkv_proj` BF16 | E4M3 floats, one calibrated scale per layer | BF16 |
| `w8a8` | as `int8`, after SmoothQuant; `down_proj` BF16 | 8-bit integers, -128 to 127, one calibrated scale per layer, after SmoothQuant | BF16 |

Accumulators, norms, softmax and the residual stream are FP32 in all of them. Each scale of weights is chosen from several
candidates to minimize the sum of squared errors (`src/quantize.rs`); the LM head stays in BF16. In `int4` and `fp8` weights
are then rounded by GPTQ (`src/compile/rounding.rs`): each code makes up for the errors of those before it, as far as the
products of the layer's inputs on calibration prompts tell. The scale of E4M3 inputs is the largest of 21 candidates whose
squared error over the prompts is within 1 % of the smallest; what exceeds it saturates.

SmoothQuant (`src/compile/smoothing.rs`) divides each channel of a layer's inputs by a factor and multiplies the weight's column
by it; the division is folded into the norm, the values or the MLP's first layer, so it costs nothing. Factors and the scale
of inputs are chosen for each layer among four strengths and none, by an estimate of the outputs' error on tokens other than
those whose largest inputs the factors come from: otherwise factors fit squared ReLUs so closely that other tokens saturate.

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

/// Text above the table of layers.
const LAYERS: &str = "
Relative error in percent, ‖y' − y‖ / ‖y‖, of the outputs of random layers as wide as the 8B's, on inputs other than those
that weights were rounded by. The inputs share 64 directions; after LayerNorm, one channel of 512 is 20 times as large.

| inputs | int8 | int4, nearest | int4, gptq | E4M3 weights, nearest | E4M3 weights, gptq | E4M3 inputs | both, gptq | \
W8A8 | W8A8, SmoothQuant | and gptq |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
";

/// The page's end.
const FINDINGS: &str = "
- **FP8 is limited by its inputs' significant bits, not by their scale.** E4M3 keeps four of them, an error of 2.6 % for any
  scale that neither saturates nor leaves much among the subnormal numbers, and those limits are fourteen binades apart. It
  was expected that clipping would matter; what matters is which layers have such inputs. On tiny-chat `qkv_proj` comes first:
  with it in BF16 the divergence of all tokens is about half of that with E4M3 and the nearest codes in all layers. `up_proj` does
  about as well for a third more bytes, `down_proj` less. So `keep_bf16 = [\"qkv_proj\"]` is the default of `h100` and `cpu`:
  12.2 GB of weights for the 8B where E4M3 in all layers takes 10.6, 15 % more to read for a token.
- **GPTQ leaves a third of 4-bit weights' divergence** over all tokens, with prompts of any kind. For the answers, prompts of
  their own kind are worth more: `similar prompts` above are dialogues like those that tiny-chat was trained for,
  none of them held out (`--calibration tests/data/tiny-chat/calibration.jsonl`). The divergence of answers rests on few
  undecided tokens, so differences of a third are chance there, as are two or three conversations.
- **Wide layers.** The products of 16,384 inputs would take 2 GiB in FP64, so `down_proj` is rounded in four runs of 4,096
  columns that do not make up for each other. A run needs more tokens than it has columns: with as many, as in the table
  above, nearly uncorrelated inputs leave GPTQ nothing to gain with E4M3, and a quarter of the error with 4 bits.
- **W8A8 needs SmoothQuant where LayerNorm leaves large channels**: with one scale for all inputs the error falls to about a
  third, and is then that of E4M3 on both sides. A squared ReLU without such channels is left as it is. On tiny-chat
  `down_proj` comes first: its inputs are squares, mostly small, and one step fits them badly, so it stays in BF16. Weights of `w8a8` are rounded to the nearest codes; the last column is what GPTQ would add.
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
    if std::env::args().any(|argument| argument == "layers") {
        print!("{}", layers());
        return Ok(());
    }
    let (asked, answered) = (json_lines("conversations.jsonl")?, json_lines("answers.jsonl")?);
    let folder = tempfile::tempdir()?;
    let quiet: Arc<dyn Progress> = Arc::new(Quiet);
    let mut packages = HashMap::new();
    let mut variants = variants()?;
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    if let Some(only) = &only {
        variants.retain(|variant| variant.name == "f32" || variant.name.starts_with(only));
    }
    for Variant { name, recipe, calibration } in &variants {
        let output = folder.path().join(name);
        let request = BuildRequest {
            checkpoint: CHECKPOINT.into(),
            recipes: vec![recipe.clone()],
            output: output.clone(),
            replace: false,
            prepare: false,
            calibration: calibration.map(Into::into),
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
    for Variant { name: precision, .. } in &variants {
        let package = &packages[precision];
        let mut measured = Measured { weight_bytes: weight_bytes(package), ..Measured::default() };
        hold_conversations(package, &asked, &answered, &mut measured)?;
        compare(reference, package, &answered, &mut measured)?;
        let row = measured.row(precision, asked.len());
        eprint!("{row}");
        page.push_str(&row);
    }
    if only.is_some() {
        return Ok(());
    }
    page.push_str(LEGEND);
    page.push_str(&layers());
    page.push_str(FINDINGS);
    fs::create_dir_all("docs")?;
    fs::write(PAGE, page)?;
    Ok(())
}

/// A recipe to measure.
struct Variant {
    /// Name of its row.
    name: String,
    recipe: Recipe,
    /// Calibration prompts other than the built-in ones.
    calibration: Option<&'static str>,
}

fn variants() -> Outcome<Vec<Variant>> {
    let cpu = Recipe::load("cpu")?;
    let of = |precision: Precision| Recipe { precision, ..cpu.clone() };
    let nearest = |precision: Precision| Recipe { weight_rounding: WeightRounding::Nearest, ..of(precision) };
    let keeping = |kinds: &[LinearKind]| Recipe { keep_bf16: Some(kinds.to_vec()), ..of(Precision::Fp8) };
    let row = |name: &str, recipe: Recipe| Variant { name: name.into(), recipe, calibration: None };
    let similar = |name: &str, recipe: Recipe| Variant { calibration: Some(SIMILAR), ..row(name, recipe) };
    let all_nearest = Recipe { keep_bf16: Some(Vec::new()), ..nearest(Precision::Fp8) };
    let (up, down) = (LinearKind::UpProj, LinearKind::DownProj);
    Ok(vec![
        row("f32", of(Precision::F32)),
        row("bf16", of(Precision::Bf16)),
        row("int8", of(Precision::Int8)),
        row("int8, int8 activations", Recipe { quantize_activations: Some(true), ..of(Precision::Int8) }),
        row("int4", of(Precision::Int4)),
        row("int4, int8 activations", Recipe { quantize_activations: Some(true), ..of(Precision::Int4) }),
        similar("int4, similar prompts", of(Precision::Int4)),
        row("int4, nearest", nearest(Precision::Int4)),
        row("fp8", of(Precision::Fp8)),
        similar("fp8, similar prompts", of(Precision::Fp8)),
        row("fp8, keep_bf16 = []", keeping(&[])),
        row("fp8, keep_bf16 = [], nearest", all_nearest),
        row("fp8, keep_bf16 = [down_proj]", keeping(&[down])),
        row("fp8, keep_bf16 = [up_proj]", keeping(&[up])),
        row("w8a8", of(Precision::W8a8)),
        row("w8a8, keep_bf16 = []", Recipe { keep_bf16: Some(Vec::new()), ..of(Precision::W8a8) }),
        row("w8a8, smooth_inputs = false", Recipe { smooth_inputs: false, ..of(Precision::W8a8) }),
        similar("w8a8, similar prompts", of(Precision::W8a8)),
    ])
}

/// Numbers close to normal, by a linear congruential generator.
struct Normal(u32);

impl Normal {
    fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.0 >> 8) as f32 / (1 << 24) as f32
        };
        (0..12).map(|_| uniform()).sum::<f32>() - 6.0
    }

    fn matrix(&mut self, elements: usize) -> Vec<f32> {
        (0..elements).map(|_| self.next()).collect()
    }
}

/// Inputs that share 64 directions, some channels 20 times as large as the others, as LayerNorm gives; or their squared
/// ReLU, as the down projection has. `[tokens, columns]`
fn layer_inputs(tokens: usize, columns: usize, is_squared: bool, seed: u32) -> Vec<f32> {
    const DIRECTIONS: usize = 64;
    let mut normal = Normal(seed);
    let (directions, amounts) = (normal.matrix(DIRECTIONS * columns), normal.matrix(tokens * DIRECTIONS));
    let mut inputs = vec![0f32; tokens * columns];
    for (x, amounts) in inputs.chunks_exact_mut(columns).zip(amounts.chunks_exact(DIRECTIONS)) {
        for (amount, direction) in amounts.iter().zip(directions.chunks_exact(columns)) {
            x.iter_mut().zip(direction).for_each(|(x, d)| *x += amount * d / 8.0);
        }
        for (column, x) in x.iter_mut().enumerate() {
            *x += 0.5 * normal.next();
            if is_squared {
                *x = x.max(0.0).powi(2);
            } else if column % 512 == 7 {
                *x *= 20.0;
            }
        }
    }
    inputs
}

/// Relative errors of the outputs of random layers as wide as the 8B's, a table.
fn layers() -> String {
    const ROWS: usize = 128;
    let mut table = LAYERS.to_owned();
    for (name, columns, is_squared) in
        [("4,096, as after LayerNorm", 4096, false), ("16,384, squared ReLU", 16_384, true)]
    {
        let tokens = 4096;
        // The inputs that are rounded by, and others of the same kind that are measured on.
        let all = layer_inputs(tokens + 256, columns, is_squared, 1);
        let (seen, fresh) = all.split_at(tokens * columns);
        let weights = Normal(2).matrix(ROWS * columns);
        let expected = product(fresh, &weights, columns);
        let error = |x: &[f32], weights: &[f32]| {
            let outputs = product(x, weights, columns);
            let off: f64 = outputs.iter().zip(&expected).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            100.0 * (off / expected.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>()).sqrt()
        };
        let rounded = |scheme: Scheme, codes: &[f32], scales: &[f32]| -> Vec<f32> {
            let (group, blocks) = (scheme.block().unwrap_or(columns), scheme.blocks(columns));
            let scale = |i: usize| scales[i / columns * blocks + i % columns / group];
            codes.iter().enumerate().map(|(i, code)| code * scale(i)).collect()
        };
        let nearest = |scheme: Scheme, weights: &[f32]| {
            let (mut codes, mut scales) = (weights.to_vec(), vec![0f32; ROWS * scheme.blocks(columns)]);
            scheme.quantize(columns, &mut codes, &mut scales);
            rounded(scheme, &codes, &scales)
        };
        let mut products = InputProducts::new(columns);
        seen.chunks(256 * columns).for_each(|some| products.add(some));
        let Some(compensation) = products.factorize() else { continue };
        let gptq = |scheme: Scheme| {
            let found = compensation.round(scheme, &weights);
            rounded(scheme, &found.codes, &found.scales)
        };
        let largest = seen.iter().fold(0f32, |most, v| most.max(v.abs()));
        let scale = 2.0 * largest / F8_MAX;
        let e4m3: Vec<f32> = fresh.iter().map(|v| round_f8(v / scale) * scale).collect();
        let layer = Layer { seen, fresh, weights: &weights, columns };
        let cells = [
            error(fresh, &nearest(Scheme::INT8, &weights)),
            error(fresh, &nearest(Scheme::INT4, &weights)),
            error(fresh, &gptq(Scheme::INT4)),
            error(fresh, &nearest(Scheme::FP8, &weights)),
            error(fresh, &gptq(Scheme::FP8)),
            error(&e4m3, &weights),
            error(&e4m3, &gptq(Scheme::FP8)),
            integers(&layer, &[], false, &error).unwrap_or(f64::NAN),
            integers(&layer, &STRENGTHS, false, &error).unwrap_or(f64::NAN),
            integers(&layer, &STRENGTHS, true, &error).unwrap_or(f64::NAN),
        ];
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:.2}")).collect();
        let _ = writeln!(table, "| {name} | {} |", cells.join(" | "));
    }
    table
}

/// Error with 8-bit integers on both sides, one scale for all inputs and one for each output, with factors of one of these
/// strengths, or without any.
fn integers(layer: &Layer<'_>, strengths: &[f32], is_gptq: bool, error: &dyn Fn(&[f32], &[f32]) -> f64) -> Option<f64> {
    let Layer { seen, fresh, weights, columns } = *layer;
    let mut inputs = LayerInputs::new(columns, seen.len() / columns);
    inputs.add(seen);
    let channels: Vec<usize> = (0..columns).collect();
    let mut rows = |visit: &mut dyn FnMut(&[f32])| {
        visit(weights);
        Ok(())
    };
    let chosen = inputs.choose(&channels, strengths, &mut rows).ok().flatten()?;
    let scaled = |rows: &[f32], power: i32| -> Vec<f32> {
        rows.iter().enumerate().map(|(i, v)| v * chosen.factors[i % columns].powi(power)).collect()
    };
    let (mut codes, mut scales) = (scaled(weights, 1), vec![0f32; weights.len() / columns]);
    if is_gptq {
        let mut products = InputProducts::new(columns);
        seen.chunks(256 * columns).for_each(|some| products.add(&scaled(some, -1)));
        let found = products.factorize()?.round(Scheme::INT8, &codes);
        (codes, scales) = (found.codes, found.scales);
    } else {
        Scheme::INT8.quantize(columns, &mut codes, &mut scales);
    }
    let rounded: Vec<f32> = codes.iter().enumerate().map(|(i, code)| code * scales[i / columns]).collect();
    let mut inputs = scaled(fresh, -1);
    inputs.iter_mut().for_each(|v| *v = round_i8(*v / chosen.scale) * chosen.scale);
    Some(error(&scaled(&inputs, 1), &scaled(&rounded, -1)))
}

/// A random layer: inputs to calibrate by, inputs to measure on, and weights.
struct Layer<'l> {
    seen: &'l [f32],
    fresh: &'l [f32],
    weights: &'l [f32],
    columns: usize,
}

/// `x · weightsᵀ`
fn product(x: &[f32], weights: &[f32], columns: usize) -> Vec<f32> {
    let row = |x: &[f32]| -> Vec<f32> {
        let dot = |w: &[f32]| {
            let mut sums = [0f32; 16];
            for (x, w) in x.as_chunks::<16>().0.iter().zip(w.as_chunks::<16>().0) {
                sums.iter_mut().zip(x.iter().zip(w)).for_each(|(sum, (x, w))| *sum += x * w);
            }
            sums.iter().sum()
        };
        weights.chunks_exact(columns).map(dot).collect()
    };
    x.chunks_exact(columns).flat_map(row).collect()
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
