//! `aotron bench`: measures an engine's speed, and beside each measurement what limits it on this machine.
//!
//! A CPU's memory bandwidth and clock change from minute to minute where other work shares the machine. So every
//! repetition is probe, prefill, probe, decode, probe, and each figure is a fraction of the mean of the probes next to it:
//! prefill of the multiply units' rate, decoding of the rate at which memory is read.

use std::io::Write;
use std::time::Instant;

use aotron::backend::cpu::probe::{MultiplyRate, Probe};
use aotron::backend::cpu::program::Program;
use aotron::backend::{Chunk, Executor, Limits, NextToken, Rows, Step, cpu_program};
use aotron::checkpoint::EMBEDDING;
use aotron::engine::{Package, PlanInfo};
use aotron::isa::Isa;
use aotron::tensor::DType;
use aotron::tensor_file::TensorFile;
use indicatif::ProgressBar;
use serde::Serialize;

use super::args::{EngineFlags, Format, count, usage};
use super::{doctor, term};

/// Untimed decode steps before a case's first repetition, at most: the first ones touch the mapping's pages.
const WARM_UP_STEPS: usize = 6;
/// Warming up ends when a step takes as long as the one before, within this fraction.
const STEADY: f64 = 0.1;
/// Tokens of the untimed prefill before those steps.
const WARM_UP_TOKENS: usize = 16;

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
    /// Time decoding alone, after sequences of so many tokens that are computed untimed; comma-separated
    #[arg(long, value_name = "N", value_delimiter = ',', conflicts_with = "prompt_tokens", value_parser = count(1 << 20), allow_negative_numbers = true)]
    depth: Vec<usize>,
    /// Repetitions of each measurement; the median is reported
    #[arg(long, value_name = "N", default_value = "5", value_parser = count(1000), allow_negative_numbers = true)]
    repeat: usize,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Flags {
    fn check(&self, limits: &Limits) -> anyhow::Result<()> {
        for (flag, held) in self.held() {
            let tokens = held + self.decode_tokens;
            if tokens > limits.max_sequence_tokens {
                return Err(usage(format!(
                    "{flag} {held} and --decode-tokens {} make sequences of {tokens} tokens; this engine holds {}",
                    self.decode_tokens, limits.max_sequence_tokens
                )));
            }
        }
        if let Some(batch) = self.batch.iter().find(|batch| **batch > limits.slots) {
            return Err(usage(format!("--batch {batch}; this engine was built for {} sequences", limits.slots)));
        }
        Ok(())
    }

    /// Tokens that sequences hold before decoding, with the flag that says so.
    fn held(&self) -> Vec<(&'static str, usize)> {
        match &self.depth[..] {
            [] => vec![("--prompt-tokens", self.prompt_tokens)],
            depths => depths.iter().map(|depth| ("--depth", *depth)).collect(),
        }
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

/// Figures of one batch size at one depth. Rates are of all sequences together.
#[derive(Debug, Serialize)]
struct Case {
    precision: String,
    /// Tokens of the prompts, whose prefill was timed; `None` at a given depth.
    prompt_tokens: Option<usize>,
    decode_tokens: usize,
    batch: usize,
    /// Tokens that sequences held before decoding, without a timed prefill.
    depth: Option<usize>,
    prefill_tokens_per_second: Option<Spread>,
    decode_tokens_per_second: Spread,
    /// Bytes of weights read for a decoded token: those of a step, which reads them once for all sequences, over `batch`.
    weight_bytes_per_token: f64,
    /// Bytes of KV cache read for a decoded token, the mean over the steps.
    kv_bytes_per_token: f64,
    /// Both, at the median speed.
    read_bytes_per_second: f64,
    /// Bytes per second that the threads read from memory beside the measurements; CPU only, as what follows.
    probe_read_bytes_per_second: Option<f64>,
    bandwidth_fraction: Option<f64>,
    /// Operations of linear layers and attention, two for a multiply-add, at the median speed of prefill.
    prefill_flops_per_second: Option<f64>,
    /// Operations per second of the instruction `multiply_unit` beside the measurements; `None` without vectors.
    probe_multiply_flops_per_second: Option<f64>,
    multiply_unit: Option<&'static str>,
    multiply_fraction: Option<f64>,
}

#[derive(Debug, Serialize)]
struct BenchResults {
    /// The plan's target: "cpu", "a100", "h100".
    target: String,
    /// The reason for selecting this plan.
    selected: String,
    load_seconds: f64,
    /// CPU only, as the next two.
    threads: Option<usize>,
    instructions: Option<String>,
    /// The processor's name, where the system tells.
    cpu: Option<String>,
    repeat: usize,
    cases: Vec<Case>,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let most = flags.batch.iter().copied().max().unwrap_or(1);
    flags.check(&flags.engine.plan(most)?.limits)?;
    let engine = flags.engine.open_to_measure(most)?;
    let (plan, load_seconds) = (engine.plan()?, engine.load_seconds);
    let program = match engine.selection.device {
        None => Some(cpu_program(&engine.package)?.1),
        Some(_) => None,
    };
    let weight_bytes = match &program {
        Some(program) => program.decode_weight_bytes(),
        None => gpu_weight_bytes(&engine.package, &plan)?,
    };
    let selected = engine.selection.reason.clone();
    let mut executor = engine.executor;
    flags.check(executor.limits())?;

    let cpu = program.map(|program| Cpu::new(flags, program)).transpose()?;
    let mut cases = Vec::new();
    let held = flags.held();
    let total = flags.batch.len() * held.len() * flags.repeat;
    let bar = term::bar("measuring", total as u64, "{prefix:>10} {bar:32} {pos}/{len}");
    for (batch, (_, held)) in flags.batch.iter().flat_map(|batch| held.iter().map(move |held| (*batch, *held))) {
        let times_prefill = flags.depth.is_empty();
        let workload = Workload { batch, held, decode_tokens: flags.decode_tokens, times_prefill };
        let repetitions = measure(&mut *executor, &workload, flags.repeat, cpu.as_ref(), &bar)?;
        cases.push(Case::of(&plan, weight_bytes, &workload, &repetitions, cpu.as_ref()));
    }
    bar.finish_and_clear();
    let results = BenchResults {
        target: plan.target.clone(),
        selected,
        load_seconds,
        threads: cpu.as_ref().map(|cpu| cpu.threads),
        instructions: cpu.as_ref().map(|cpu| cpu.isa.to_string()),
        cpu: cpu.and_then(|_| doctor::cpu_name()),
        repeat: flags.repeat,
        cases,
    };
    match flags.format {
        Format::Json => term::print_json(&results),
        Format::Text => print(&results, weight_bytes),
    }
}

/// What measurements on a CPU are compared with.
struct Cpu {
    program: Program,
    threads: usize,
    isa: Isa,
    probe: Probe,
    /// Type of the activations that are multiplied most.
    activations: Option<DType>,
}

impl Cpu {
    fn new(flags: &Flags, program: Program) -> anyhow::Result<Cpu> {
        let available = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = flags.engine.threads.unwrap_or_else(available);
        let isa = flags.engine.isa.map_or_else(Isa::from_environment, Ok)?;
        let activations = program.multiplied_dtype();
        Ok(Cpu { program, threads, isa, probe: Probe::new(threads, isa)?, activations })
    }

    fn multiply_rate(&self) -> Option<MultiplyRate> {
        self.probe.multiply_rate(self.activations?)
    }
}

/// What is timed.
struct Workload {
    batch: usize,
    /// Tokens of each sequence before decoding.
    held: usize,
    decode_tokens: usize,
    /// True if these are prefilled in every repetition, which is timed; false if once, before the first.
    times_prefill: bool,
}

/// One repetition: seconds, and the means of the probes next to them.
struct Repetition {
    prefill_seconds: Option<f64>,
    multiply: Option<MultiplyRate>,
    decode_seconds: f64,
    read_bytes_per_second: Option<f64>,
}

impl Case {
    fn of(
        plan: &PlanInfo,
        weight_bytes: u64,
        workload: &Workload,
        repetitions: &[Repetition],
        cpu: Option<&Cpu>,
    ) -> Case {
        let Workload { batch, held, decode_tokens, times_prefill } = *workload;
        let median = |of: &dyn Fn(&Repetition) -> Option<f64>| {
            let values: Option<Vec<f64>> = repetitions.iter().map(of).collect();
            values.map(|values| Spread::of(values).median)
        };
        let decode_rate = |r: &Repetition| (batch * decode_tokens) as f64 / r.decode_seconds;
        let prefill_rate = |r: &Repetition| Some((batch * held) as f64 / r.prefill_seconds?);
        let decode = Spread::of(repetitions.iter().map(decode_rate).collect());
        let prefill: Option<Vec<f64>> = repetitions.iter().map(prefill_rate).collect();
        let prefill = prefill.map(Spread::of);

        let weight_bytes_per_token = weight_bytes as f64 / batch as f64;
        let mean_context = held as f64 + (decode_tokens + 1) as f64 / 2.0;
        let kv_bytes_per_token = plan.kv_bytes_per_token as f64 * mean_context;
        let bytes_per_token = weight_bytes_per_token + kv_bytes_per_token;
        let flops_per_token = cpu.map(|cpu| cpu.program.prefill_flops(held) / held as f64);
        Case {
            precision: plan.precision.clone(),
            prompt_tokens: times_prefill.then_some(held),
            decode_tokens,
            batch,
            depth: (!times_prefill).then_some(held),
            prefill_tokens_per_second: prefill,
            decode_tokens_per_second: decode,
            weight_bytes_per_token,
            kv_bytes_per_token,
            read_bytes_per_second: bytes_per_token * decode.median,
            probe_read_bytes_per_second: median(&|r| r.read_bytes_per_second),
            bandwidth_fraction: median(&|r| Some(bytes_per_token * decode_rate(r) / r.read_bytes_per_second?)),
            prefill_flops_per_second: prefill.zip(flops_per_token).map(|(prefill, flops)| flops * prefill.median),
            probe_multiply_flops_per_second: median(&|r| Some(r.multiply?.flops_per_second)),
            multiply_unit: repetitions.iter().find_map(|r| r.multiply).map(|rate| rate.unit),
            multiply_fraction: median(&|r| Some(flops_per_token? * prefill_rate(r)? / r.multiply?.flops_per_second)),
        }
    }
}

/// Warms up and runs `repeat` repetitions.
fn measure(
    executor: &mut dyn Executor,
    workload: &Workload,
    repeat: usize,
    cpu: Option<&Cpu>,
    bar: &ProgressBar,
) -> aotron::Result<Vec<Repetition>> {
    let Workload { batch, held, decode_tokens, times_prefill } = *workload;
    let limits = executor.limits().clone();
    let mut ids = Ids { state: 1, vocab_size: limits.vocab_size };
    let most_tokens = held + decode_tokens;
    for slot in 0..batch {
        if !executor.reserve(slot, most_tokens) {
            (0..slot).for_each(|slot| executor.release(slot));
            return Err(aotron::Error::Request(format!(
                "the KV memory holds {slot} sequences of {most_tokens} tokens, not {batch}; choose a smaller --batch"
            )));
        }
    }
    let prompts: Vec<Vec<u32>> = (0..batch).map(|_| (0..held).map(|_| ids.next()).collect()).collect();
    let decode = |executor: &mut dyn Executor, ids: &mut Ids, past_tokens: usize| {
        let next: Vec<NextToken> = (0..batch).map(|slot| NextToken { slot, past_tokens, token: ids.next() }).collect();
        executor.forward(&Step::decode(&limits, &next)?).map(drop)
    };

    // A sequence is cut back to what a step says it has, so what was held before is decoded after again and again.
    let warm_tokens = if times_prefill { held.min(WARM_UP_TOKENS) } else { held };
    for (slot, prompt) in prompts.iter().enumerate() {
        let is_copied = !times_prefill && slot > 0 && executor.copy_prefix(0, slot, held)?;
        if !is_copied {
            prefill(executor, slot, prompt.get(..warm_tokens).unwrap_or(prompt))?;
        }
    }
    let mut last = f64::INFINITY;
    for _ in 0..WARM_UP_STEPS {
        let started = Instant::now();
        decode(executor, &mut ids, warm_tokens)?;
        let seconds = started.elapsed().as_secs_f64();
        if (seconds - last).abs() <= STEADY * last {
            break;
        }
        last = seconds;
    }

    let mut repetitions = Vec::new();
    for _ in 0..repeat {
        let (mut prefill_seconds, mut multiply) = (None, None);
        if times_prefill {
            let before = cpu.and_then(Cpu::multiply_rate);
            let started = Instant::now();
            for (slot, prompt) in prompts.iter().enumerate() {
                prefill(executor, slot, prompt)?;
            }
            prefill_seconds = Some(started.elapsed().as_secs_f64());
            let after = cpu.and_then(Cpu::multiply_rate);
            multiply = before.zip(after).map(|(before, after)| MultiplyRate {
                flops_per_second: (before.flops_per_second + after.flops_per_second) / 2.0,
                ..before
            });
        }
        let before = cpu.map(|cpu| cpu.probe.read_bytes_per_second());
        let started = Instant::now();
        for past_tokens in held..most_tokens {
            decode(executor, &mut ids, past_tokens)?;
        }
        let decode_seconds = started.elapsed().as_secs_f64();
        let after = cpu.map(|cpu| cpu.probe.read_bytes_per_second());
        let read_bytes_per_second = before.zip(after).map(|(before, after)| (before + after) / 2.0);
        repetitions.push(Repetition { prefill_seconds, multiply, decode_seconds, read_bytes_per_second });
        bar.inc(1);
    }
    (0..batch).for_each(|slot| executor.release(slot));
    Ok(repetitions)
}

/// Computes a prompt in a slot, in steps as long as the plan allows, and the logits of its last token.
fn prefill(executor: &mut dyn Executor, slot: usize, prompt: &[u32]) -> aotron::Result<()> {
    let limits = executor.limits().clone();
    let mut past_tokens = 0;
    for tokens in prompt.chunks(limits.max_step_tokens.max(1)) {
        let is_last = past_tokens + tokens.len() == prompt.len();
        let rows = if is_last { Rows::Last } else { Rows::None };
        executor.forward(&Step::prefill(&limits, &[Chunk { slot, past_tokens, tokens, rows }])?)?;
        past_tokens += tokens.len();
    }
    Ok(())
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

/// Bytes of weights that a decode step of a GPU plan reads. The package does not list its kernels, so these are its weights
/// file without the tables.
fn gpu_weight_bytes(package: &Package, plan: &PlanInfo) -> anyhow::Result<u64> {
    let file = TensorFile::open(&package.file_path(&plan.weights))?;
    let is_tied = package.manifest().model.tie_word_embeddings;
    let is_table = |name: &str| name.ends_with(".table") || (name.starts_with(EMBEDDING) && !is_tied);
    let read = file.tensors().iter().filter(|tensor| !is_table(&tensor.name));
    Ok(read.map(|tensor| tensor.bytes.len() as u64).sum())
}

fn print(results: &BenchResults, weight_bytes: u64) -> anyhow::Result<()> {
    let style = term::on_stdout();
    let mut out = term::stdout();
    let BenchResults { target, threads, instructions, cpu, repeat, cases, .. } = results;
    let Some(first) = cases.first() else { return Ok(()) };
    let on = match (threads, instructions) {
        (Some(threads), Some(instructions)) => {
            let cpu = cpu.as_ref().map(|cpu| format!("{cpu}, ")).unwrap_or_default();
            format!("{cpu}{}, {instructions}", term::plural(*threads, "thread"))
        }
        _ => target.to_uppercase(),
    };
    writeln!(out, "{} on {on}; {} decoded", first.precision, term::plural(first.decode_tokens, "token"))?;
    let mut limits = vec![format!("a decode step reads {} of weights", term::bytes(weight_bytes))];
    let probes = |of: &dyn Fn(&Case) -> Option<f64>| {
        let values: Option<Vec<f64>> = cases.iter().map(of).collect();
        values.map(|values| Spread::of(values).median / 1e9)
    };
    if let Some(read) = probes(&|case| case.probe_read_bytes_per_second) {
        limits.push(format!("memory reads {read:.1} GB/s"));
    }
    if let (Some(unit), Some(rate)) = (first.multiply_unit, probes(&|case| case.probe_multiply_flops_per_second)) {
        limits.push(format!("{unit} does {rate:.0} G operations/s"));
    }
    writeln!(out, "{}", limits.join("; "))?;
    writeln!(out, "tokens per second, median of {repeat} (minimum to maximum):")?;

    let unit = first.multiply_unit.map(|unit| format!("of {unit}"));
    let is_cpu = threads.is_some();
    let held = if first.depth.is_some() { "depth" } else { "prompt" };
    let read = if is_cpu { "of reads" } else { "reads" };
    let mut header = format!("{:>6}  {held:>6}  ", "batch");
    if first.prefill_tokens_per_second.is_some() {
        header += &format!("{:<28}  ", "prefill");
        header += &unit.as_ref().map(|unit| format!("{unit:<14}  ")).unwrap_or_default();
    }
    writeln!(out, "{}", style.dim(format!("{header}{:<28}  {read}", "decode")))?;
    let percent = |fraction: f64| format!("{:.0}%", 100.0 * fraction);
    let spread = |s: Spread| format!("{:.1} ({:.1} to {:.1})", s.median, s.min, s.max);
    for case in cases {
        let held = case.depth.or(case.prompt_tokens).unwrap_or_default();
        let mut line = format!("{:>6}  {held:>6}  ", case.batch);
        if let Some(prefill) = case.prefill_tokens_per_second {
            line += &format!("{:<28}  ", spread(prefill));
            line += &case.multiply_fraction.map(|f| format!("{:<14}  ", percent(f))).unwrap_or_default();
        }
        let read = match case.bandwidth_fraction {
            Some(fraction) if fraction > 1.0 => format!("{} (from the CPU's caches)", percent(fraction)),
            Some(fraction) => percent(fraction),
            None => format!("{:.0} GB/s", case.read_bytes_per_second / 1e9),
        };
        writeln!(out, "{line}{:<28}  {read}", spread(case.decode_tokens_per_second))?;
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
