//! `aotron bench`: measures an engine's speed and this machine's memory bandwidth.

use std::io::Write;
use std::time::Instant;

use anyhow::bail;
use aotron::backend::cpu::program::{Program, WeightRule};
use aotron::backend::{Chunk, Executor, Limits, NextToken, Rows, Step, cpu_program};
use aotron::checkpoint::EMBEDDING;
use aotron::engine::{Package, PlanInfo};
use aotron::isa::Isa;
use aotron::memory::available_memory_bytes;
use aotron::tensor_file::TensorFile;
use rayon::prelude::*;
use serde::Serialize;

use super::args::{EngineFlags, Format, count, usage};
use super::term;

/// Buffer size of the bandwidth probe: far larger than any cache, if there is enough memory.
const PROBE_BYTES: u64 = 1 << 30;
/// Passes over the buffer; the fastest counts.
const PROBE_PASSES: usize = 4;

/// Flags of `aotron bench`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    engine: EngineFlags,
    /// Tokens per prompt
    #[arg(long, value_name = "N", default_value = "128", value_parser = count(1 << 20), allow_negative_numbers = true)]
    prompt_tokens: usize,
    /// Tokens to decode after each prompt
    #[arg(long, value_name = "N", default_value = "32", value_parser = count(1 << 20), allow_negative_numbers = true)]
    decode_tokens: usize,
    /// Numbers of concurrent sequences, comma-separated
    #[arg(long, value_name = "N", default_value = "1", value_delimiter = ',', value_parser = count(1024), allow_negative_numbers = true)]
    batch: Vec<usize>,
    /// Repetitions of each measurement; the median is reported
    #[arg(long, value_name = "N", default_value = "5", value_parser = count(1000), allow_negative_numbers = true)]
    repeat: usize,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Flags {
    fn check(&self, limits: &Limits) -> anyhow::Result<()> {
        let tokens = self.prompt_tokens + self.decode_tokens;
        if tokens > limits.max_sequence_tokens {
            return Err(usage(format!(
                "--prompt-tokens {} and --decode-tokens {} make sequences of {tokens} tokens; this engine holds {}",
                self.prompt_tokens, self.decode_tokens, limits.max_sequence_tokens
            )));
        }
        if let Some(batch) = self.batch.iter().find(|batch| **batch > limits.slots) {
            return Err(usage(format!("--batch {batch}; this engine was built for {} sequences", limits.slots)));
        }
        Ok(())
    }
}

/// Median, minimum and maximum of several measurements.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Spread {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let middle = values.len() / 2;
        let median =
            if values.len().is_multiple_of(2) { (at(middle.saturating_sub(1)) + at(middle)) / 2.0 } else { at(middle) };
        Spread { median, min: at(0), max: at(values.len().saturating_sub(1)) }
    }
}

/// Results for one batch size, in tokens per second over all its sequences.
#[derive(Debug, Serialize)]
struct Figures {
    batch: usize,
    prefill_tokens_per_second: Spread,
    decode_tokens_per_second: Spread,
    /// Bytes of weights and, on average, of KV cache read by one decode step.
    decode_step_bytes: f64,
    /// Fraction of the memory bandwidth used by decoding at the median; CPU only.
    decode_bandwidth_fraction: Option<f64>,
}

#[derive(Debug, Serialize)]
struct BenchResults {
    /// The plan's target: "cpu", "a100", "h100".
    target: String,
    /// The reason for selecting this plan.
    selected: String,
    load_seconds: f64,
    /// CPU only.
    threads: Option<usize>,
    instructions: Option<String>,
    precision: String,
    prompt_tokens: usize,
    decode_tokens: usize,
    repeat: usize,
    /// Bytes of weights read by each decode step, whatever the batch.
    weight_bytes: u64,
    /// Read bandwidth of all threads together; CPU only.
    memory_gigabytes_per_second: Option<f64>,
    figures: Vec<Figures>,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let most = flags.batch.iter().copied().max().unwrap_or(1);
    flags.check(&flags.engine.plan(most)?.limits)?;
    let engine = flags.engine.open_to_measure(most)?;
    let (plan, load_seconds) = (engine.plan()?, engine.load_seconds);
    let is_cpu = engine.selection.device.is_none();
    let weight_bytes = match is_cpu {
        true => decode_weight_bytes(&cpu_program(&engine.package)?.1),
        false => gpu_weight_bytes(&engine.package, &plan)?,
    };
    let selected = engine.selection.reason.clone();
    let mut executor = engine.executor;
    flags.check(executor.limits())?;
    let available = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = is_cpu.then(|| flags.engine.threads.unwrap_or_else(available));

    let bar =
        term::bar("measuring", (flags.batch.len() * flags.repeat + 1) as u64, "{prefix:>10} {bar:32} {pos}/{len}");
    let memory = threads.map(memory_bandwidth).transpose()?;
    bar.inc(1);
    let mut figures = Vec::new();
    for batch in &flags.batch {
        let runs = (0..=flags.repeat).map(|index| {
            let times = measure(&mut *executor, *batch, flags.prompt_tokens, flags.decode_tokens);
            // The first run is a warm-up, because it touches weights and memory for the first time.
            if index > 0 {
                bar.inc(1);
            }
            times
        });
        let runs = runs.collect::<aotron::Result<Vec<Times>>>()?;
        let counted = || runs.iter().skip(1);
        let tokens = |n: usize| (batch * n) as f64;
        let decode = Spread::of(counted().map(|t| tokens(flags.decode_tokens) / t.decode_seconds).collect());
        let held = flags.prompt_tokens as f64 + (flags.decode_tokens + 1) as f64 / 2.0;
        let decode_step_bytes = weight_bytes as f64 + (batch * plan.kv_bytes_per_token) as f64 * held;
        figures.push(Figures {
            batch: *batch,
            prefill_tokens_per_second: Spread::of(
                counted().map(|t| tokens(flags.prompt_tokens) / t.prefill_seconds).collect(),
            ),
            decode_tokens_per_second: decode,
            decode_step_bytes,
            decode_bandwidth_fraction: memory.map(|memory| decode_step_bytes * decode.median / *batch as f64 / memory),
        });
    }
    bar.finish_and_clear();
    let isa = flags.engine.isa.map_or_else(Isa::from_environment, Ok)?;
    let results = BenchResults {
        target: plan.target.clone(),
        selected,
        load_seconds,
        threads,
        instructions: is_cpu.then(|| isa.to_string()),
        precision: plan.precision.clone(),
        prompt_tokens: flags.prompt_tokens,
        decode_tokens: flags.decode_tokens,
        repeat: flags.repeat,
        weight_bytes,
        memory_gigabytes_per_second: memory.map(|memory| memory / 1e9),
        figures,
    };
    match flags.format {
        Format::Json => term::print_json(&results),
        Format::Text => print(&results),
    }
}

struct Times {
    prefill_seconds: f64,
    decode_seconds: f64,
}

/// Prefills `batch` prompts and decodes them together.
fn measure(
    executor: &mut dyn Executor,
    batch: usize,
    prompt_tokens: usize,
    decode_tokens: usize,
) -> aotron::Result<Times> {
    let limits = executor.limits().clone();
    let mut ids = Ids { state: 1, vocab_size: limits.vocab_size };
    let prompts: Vec<Vec<u32>> = (0..batch).map(|_| (0..prompt_tokens).map(|_| ids.next()).collect()).collect();
    let most_tokens = prompt_tokens + decode_tokens;
    for slot in 0..batch {
        if !executor.reserve(slot, most_tokens) {
            (0..slot).for_each(|slot| executor.release(slot));
            return Err(aotron::Error::Request(format!(
                "the KV memory holds {slot} sequences of {most_tokens} tokens, not {batch}; choose a smaller --batch"
            )));
        }
    }
    let started = Instant::now();
    for (slot, prompt) in prompts.iter().enumerate() {
        let mut past_tokens = 0;
        for tokens in prompt.chunks(limits.max_step_tokens.max(1)) {
            let is_last = past_tokens + tokens.len() == prompt.len();
            let rows = if is_last { Rows::Last } else { Rows::None };
            executor.forward(&Step::prefill(&limits, &[Chunk { slot, past_tokens, tokens, rows }])?)?;
            past_tokens += tokens.len();
        }
    }
    let prefill_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    for past_tokens in prompt_tokens..prompt_tokens + decode_tokens {
        let next: Vec<NextToken> = (0..batch).map(|slot| NextToken { slot, past_tokens, token: ids.next() }).collect();
        executor.forward(&Step::decode(&limits, &next)?)?;
    }
    let decode_seconds = started.elapsed().as_secs_f64();
    (0..batch).for_each(|slot| executor.release(slot));
    Ok(Times { prefill_seconds, decode_seconds })
}

/// Pseudorandom ids, the same in every run.
struct Ids {
    state: u64,
    vocab_size: usize,
}

impl Ids {
    fn next(&mut self) -> u32 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % self.vocab_size.max(1) as u64) as u32
    }
}

/// Bytes of weights that every decode step reads in full: all except tables that it looks up single rows in.
fn decode_weight_bytes(program: &Program) -> u64 {
    let mut read = vec![false; program.weights.len()];
    let used = program.kernels.iter().flat_map(|kernel| kernel.operands().weights);
    for weight in used.filter(|weight| !matches!(weight.rule, WeightRule::Table(_))) {
        if let Some(read) = read.get_mut(weight.index) {
            *read = true;
        }
    }
    let bytes = program.weights.iter().zip(read).filter(|(_, read)| *read).filter_map(|(w, _)| w.stored_bytes());
    bytes.sum::<usize>() as u64
}

/// The same for a GPU plan, whose kernels the package does not list: its weights file without the tables.
fn gpu_weight_bytes(package: &Package, plan: &PlanInfo) -> anyhow::Result<u64> {
    let file = TensorFile::open(&package.file_path(&plan.weights))?;
    let is_tied = package.manifest().model.tie_word_embeddings;
    let is_table = |name: &str| name.ends_with(".table") || (name.starts_with(EMBEDDING) && !is_tied);
    let read = file.tensors().iter().filter(|tensor| !is_table(&tensor.name));
    Ok(read.map(|tensor| tensor.bytes.len() as u64).sum())
}

/// Measures the bytes per second that `threads` threads read from memory, by summing a large buffer.
fn memory_bandwidth(threads: usize) -> anyhow::Result<f64> {
    let bytes = PROBE_BYTES.min(available_memory_bytes().unwrap_or(PROBE_BYTES) / 4).max(1 << 20);
    let elements = (bytes / 8) as usize;
    let mut buffer: Vec<u64> = Vec::new();
    if buffer.try_reserve_exact(elements).is_err() {
        bail!("cannot reserve {} to measure the memory bandwidth", term::bytes(bytes));
    }
    buffer.resize(elements, 1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let mut best = f64::INFINITY;
    for _ in 0..PROBE_PASSES {
        let started = Instant::now();
        let part = elements.div_ceil(threads.max(1)).max(1);
        let sum: u64 = pool.install(|| buffer.par_chunks(part).map(sum).sum());
        std::hint::black_box(sum);
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok((elements * 8) as f64 / best)
}

/// Eight independent sums, which the compiler keeps in vector registers.
fn sum(values: &[u64]) -> u64 {
    let mut sums = [0u64; 8];
    for group in values.as_chunks::<8>().0 {
        for (sum, value) in sums.iter_mut().zip(group) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

fn print(results: &BenchResults) -> anyhow::Result<()> {
    let style = term::on_stdout();
    let mut out = term::stdout();
    let BenchResults { target, threads, instructions, precision, prompt_tokens, decode_tokens, repeat, .. } = results;
    let on = match (threads, instructions) {
        (Some(threads), Some(instructions)) => format!("{}, {instructions}", term::plural(*threads, "thread")),
        _ => target.to_uppercase(),
    };
    writeln!(out, "{precision}, {on}; {prompt_tokens} prompt and {decode_tokens} decoded tokens")?;
    let weights = term::bytes(results.weight_bytes);
    let memory = results.memory_gigabytes_per_second.map(|memory| format!("memory reads {memory:.1} GB/s; "));
    writeln!(out, "{}a decode step reads {weights} of weights", memory.unwrap_or_default())?;
    writeln!(out, "tokens per second, median of {repeat} (minimum to maximum):")?;
    let part = if threads.is_some() { "decode's share of the bandwidth" } else { "decode reads" };
    let header = format!("{:>6}  {:<28}  {:<28}  {part}", "batch", "prefill", "decode");
    writeln!(out, "{}", style.dim(header))?;
    for f in &results.figures {
        let spread = |s: Spread| format!("{:.1} ({:.1} to {:.1})", s.median, s.min, s.max);
        let (prefill, decode) = (spread(f.prefill_tokens_per_second), spread(f.decode_tokens_per_second));
        let part = match f.decode_bandwidth_fraction {
            Some(fraction) if fraction > 1.0 => format!("{:.0}% (from the CPU's caches)", 100.0 * fraction),
            Some(fraction) => format!("{:.0}%", 100.0 * fraction),
            None => {
                let steps = f.decode_tokens_per_second.median / f.batch as f64;
                format!("{:.0} GB/s", f.decode_step_bytes * steps / 1e9)
            }
        };
        writeln!(out, "{:>6}  {prefill:<28}  {decode:<28}  {part}", f.batch)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 3.0));
        assert_eq!(Spread::of(vec![4.0, 1.0]).median, 2.5);
    }

    #[test]
    fn ids_are_in_the_vocabulary_and_repeatable() {
        let ids = || {
            let mut ids = Ids { state: 1, vocab_size: 7 };
            (0..100).map(move |_| ids.next()).collect::<Vec<u32>>()
        };
        assert!(ids().iter().all(|id| *id < 7));
        assert_eq!(ids(), ids());
    }
}
