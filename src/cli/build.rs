//! `aotron build`: compiles a checkpoint into an engine package.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use aotron::backend::tensorrt::{LibraryKind, TensorRtLibrary};
use aotron::checkpoint::is_checkpoint;
use aotron::compile::gpu::precision_of;
use aotron::compile::{
    self, BuildRequest, BuildSummary, FinishRequest, Fp8Trials, PlanSummary, PlannedBuild, Precision, Prediction,
    Progress, Recipe, StepTimes, Target,
};
use aotron::engine::{Package, is_package};
use aotron::isa::{CpuFeatures, Isa};

use super::args::{PinFlags, chat_format_help, count, usage};
use super::engine::{refuse_checkpoint, shell_word};
use super::inspect::{CpuPlanFacts, text_facts};
use super::term::{self, Stages};
use super::verify::verify_compiled;

/// Flags of `aotron build`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Checkpoint, a .nemo file or Hugging Face folder; with --finish, an engine package
    #[arg(value_name = "CHECKPOINT|ENGINE")]
    source: PathBuf,
    /// Targets to build for, comma-separated: recipe names (cpu, cpu-fast, cpu-small, a100, h100) or recipe files, each optionally followed
    /// by a precision: cpu,a100:int8 [default: cpu]
    #[arg(long, value_name = "NAME|FILE[,…]", value_delimiter = ',', value_parser = recipe_and_precision)]
    recipe: Vec<(String, Option<Precision>)>,
    /// Number format of the weights, and of the KV cache except with 8- and 4-bit weights, where it stays bf16
    /// [default: the recipe's]
    #[arg(long, value_parser = precision, value_name = "f32|bf16|int8|int4|fp8|w8a8")]
    precision: Option<Precision>,
    /// CPU to pack the CPU plan's weights for: native (this machine's, or what AOTRON_CPU names), avx512-bf16, avx512-vnni, avx512, avx2,
    /// portable. The plan runs on other CPUs too, though another packing may be faster there [default: native]
    #[arg(long, value_name = "NAME", value_parser = cpu)]
    cpu: Option<CpuFeatures>,
    /// Maximum sequence length, prompt and answer together [default: the model's]
    #[arg(long, value_name = "N", value_parser = count(1 << 20), allow_negative_numbers = true)]
    max_sequence_tokens: Option<usize>,
    /// Maximum number of concurrent sequences [default: the recipe's]
    #[arg(long, value_name = "N", value_parser = count(1024), allow_negative_numbers = true)]
    slots: Option<usize>,
    /// Prompts to calibrate int4, fp8 and w8a8 with, as lines of JSON: {"messages": [{"role", "content"}, …]} or
    /// {"token_ids": […]} [default: built-in conversations]
    #[arg(long, value_name = "FILE.jsonl")]
    calibration: Option<PathBuf>,
    #[arg(long, value_name = "NAME|FILE.jinja", help = chat_format_help("the checkpoint's own"))]
    chat_format: Option<String>,
    /// Store no reference answers. A plan for a GPU can then be compared with itself only, not with the CPU's answers,
    /// before it is used
    #[arg(long)]
    no_reference: bool,
    /// If a plan cannot be compiled on this machine, do everything else; --finish compiles it later on its GPU
    #[arg(long)]
    prepare: bool,
    /// Compile the plans of an engine package that were only prepared, or recompile all GPU plans if there are none,
    /// from the package's own weights; with --recipe, add a plan for that GPU, or with --recipe cpu, repack the CPU
    /// plan for this CPU or --cpu. Precision and sequence length stay those of the weights
    #[arg(long, conflicts_with_all = ["precision", "max_sequence_tokens", "slots", "calibration", "chat_format", "no_reference", "prepare", "output", "force"])]
    finish: bool,
    #[command(flatten)]
    pin: PinFlags,
    /// Output folder of the engine package [default: engines/ and the checkpoint's name]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace an existing engine package
    #[arg(long)]
    force: bool,
    /// Print the resources that the build will need, without building
    #[arg(long, conflicts_with = "finish")]
    dry_run: bool,
    /// Print a report of each compiler pass
    #[arg(short, long)]
    verbose: bool,
}

impl Flags {
    fn recipes(&self) -> anyhow::Result<Vec<Recipe>> {
        let cpu = [("cpu".to_owned(), None)];
        let names = if self.recipe.is_empty() { &cpu } else { &self.recipe[..] };
        let recipes = names.iter().map(|(name, precision)| self.one_recipe(name, *precision));
        let recipes = recipes.collect::<aotron::Result<Vec<_>>>()?;
        if self.cpu.is_some() && recipes.iter().all(|recipe| recipe.target != Target::Cpu) {
            return Err(usage("--cpu applies to a CPU plan, but no --recipe has the target cpu"));
        }
        Ok(recipes)
    }

    fn one_recipe(&self, name: &str, of_one: Option<Precision>) -> aotron::Result<Recipe> {
        let mut recipe = Recipe::load(name)?;
        let mut overridden = Vec::new();
        if let Some(precision) = of_one.or(self.precision) {
            recipe.precision = precision;
            overridden.push(format!("precision = \"{precision}\""));
        }
        if let Some(tokens) = self.max_sequence_tokens {
            recipe.max_sequence_tokens = Some(tokens);
            overridden.push(format!("max_sequence_tokens = {tokens}"));
        }
        if let Some(slots) = self.slots {
            recipe.slots = slots;
            overridden.push(format!("slots = {slots}"));
        }
        if let (Some(features), Target::Cpu) = (self.cpu, recipe.target) {
            recipe.cpu = Some(features);
            overridden.push(format!("--cpu {features}"));
        }
        // The package stores the recipe's text, so it has to record the values that override it.
        for line in overridden {
            recipe.text.push_str(&format!("\n# On the command line: {line}\n"));
        }
        Ok(recipe)
    }

    fn output(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(|| compile::default_output(&self.source))
    }

    fn request(&self) -> anyhow::Result<BuildRequest> {
        Ok(BuildRequest {
            checkpoint: self.source.clone(),
            recipes: self.recipes()?,
            output: self.output(),
            replace: self.force,
            prepare: self.prepare,
            calibration: self.calibration.clone(),
            chat_format: self.chat_format.clone(),
            reference: !self.no_reference,
        })
    }

    fn finish_request(&self) -> anyhow::Result<FinishRequest> {
        let recipe = match &self.recipe[..] {
            [] if self.cpu.is_some() => return Err(usage("--finish packs weights for a --cpu with --recipe cpu")),
            [] => None,
            [(name, Some(precision))] => {
                return Err(usage(format!(
                    "--finish keeps the precision of the package's weights: name {name} without :{precision}"
                )));
            }
            [_] => self.recipes()?.pop(),
            _ => return Err(usage("--finish adds a plan for one --recipe at a time")),
        };
        refuse_checkpoint(&self.source)?;
        if self.pin.expect.is_some() {
            self.pin.open(&self.source)?;
        }
        Ok(FinishRequest { package: self.source.clone(), recipe })
    }
}

fn refuse_pin(flags: &Flags) -> anyhow::Result<()> {
    match flags.pin.expect {
        Some(_) => Err(usage("--expect pins an engine package, so it is for --finish")),
        None => Ok(()),
    }
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let started = Instant::now();
    let stages = Arc::new(Stages::new());
    let follower: Arc<dyn Progress> = stages.clone();
    let cancelled = stages.clone();
    // When interrupted, a build removes its partial output. Without a handler that is left to the next build.
    let _ = ctrlc::set_handler(move || cancelled.cancel());
    let summary = match flags.finish {
        true => compile::finish(&flags.finish_request()?, &follower)?,
        false => {
            refuse_pin(flags)?;
            if is_package(&flags.source) && !is_checkpoint(&flags.source) {
                let engine = flags.source.display();
                bail!(
                    "{engine} is an engine package, and a build takes a checkpoint; `aotron build {} --finish` compiles \
                     the package's plans",
                    shell_word(&flags.source)
                );
            }
            let planned = PlannedBuild::new(&flags.request()?, &*follower)?;
            stages.finish();
            print_prediction(planned.prediction());
            if flags.dry_run {
                return Ok(planned.prediction().check(&flags.output())?);
            }
            planned.run(&follower)?
        }
    };
    stages.finish();
    if flags.verbose {
        for plan in &summary.plans {
            for report in &plan.reports {
                let _ = writeln!(std::io::stderr(), "{}: {report}", plan.target);
            }
        }
    }
    let took = term::duration(started.elapsed());
    print(&summary, &took)?;
    if !flags.finish {
        return Ok(());
    }
    // A plan that was chosen among several has been verified before that.
    let compiled = summary.plans.iter().filter(|plan| plan.compiler.is_some() && !plan.only_prepared);
    let compiled = compiled.filter(|plan| plan.fp8_trials.is_none());
    let targets: Vec<&str> = compiled.map(|plan| plan.target.as_str()).collect();
    verify_compiled(&Package::open(&summary.package)?, &targets)
}

/// Prints a build's resource estimate on standard error.
fn print_prediction(prediction: &Prediction) {
    let style = term::on_stderr();
    let line = |name: &str, text: String| {
        let _ = writeln!(std::io::stderr(), "{} {text}", style.dim(format!("{name:>10}")));
    };
    let of = |have: Option<u64>, what: &str| {
        have.map_or(String::new(), |bytes| format!(" of {} {what}", term::bytes(bytes)))
    };
    line("reads", format!("{} of weights", term::bytes(prediction.read_bytes)));
    for (file, bytes) in &prediction.files {
        line("writes", format!("{:>10}  {file}", term::bytes(*bytes)));
    }
    if prediction.scratch_bytes > 0 {
        line("writes", format!("{:>10}  while it is built", term::bytes(prediction.scratch_bytes)));
    }
    line("disk", format!("{}{}", term::bytes(prediction.disk_bytes()), of(prediction.free_disk_bytes, "free")));
    let available = of(prediction.available_memory_bytes, "available");
    line("memory", format!("{} at most{available}, mapped files aside", term::bytes(prediction.memory_bytes)));
}

fn print(summary: &BuildSummary, took: &str) -> anyhow::Result<()> {
    let BuildSummary { package: path, bytes, plans } = summary;
    let package = Package::open(path)?;
    let style = term::on_stdout();
    let mut out = term::stdout();
    let title = |plan: &PlanSummary| term::harmless(&format!("{} in {}", plan.target, plan.precision));
    let titles: Vec<String> = plans.iter().map(title).collect();
    writeln!(out, "{} for {}, in {took}", style.bold(term::harmless(&path.display().to_string())), titles.join(", "))?;
    let mut line = |name: &str, text: String| writeln!(out, "  {} {text}", style.dim(format!("{name:<10}")));
    line("size", format!("{} on disk", term::bytes(*bytes)))?;
    for plan in plans {
        let (limits, per_token) = (&plan.limits, plan.kv_bytes_per_token as u64);
        if plans.len() > 1 {
            line(&term::harmless(&plan.target), term::harmless(&plan.precision))?;
        }
        if let ("cpu", Some(facts)) = (plan.target.as_str(), CpuPlanFacts::of(&package)) {
            line("packed for", facts?.to_string())?;
        }
        if let Some(compiler) = &plan.compiler {
            let verb = if plan.only_prepared { "graph checked with" } else { "compiled with" };
            line("plan", format!("{verb} {compiler}"))?;
        }
        let sequences = term::plural(limits.slots, "sequence");
        let most = match plan.longest_sequences < limits.slots {
            true => {
                format!("up to {sequences}, or {} of {} tokens", plan.longest_sequences, limits.max_sequence_tokens)
            }
            false => format!("{sequences} of {} tokens", limits.max_sequence_tokens),
        };
        line("limits", format!("{most}, prompt and answer together"))?;
        let per_sequence = per_token * limits.max_sequence_tokens as u64;
        line(
            "KV memory",
            format!(
                "{} for a sequence of {} tokens, {} a token; {} for all {}",
                term::bytes(per_sequence),
                limits.max_sequence_tokens,
                term::bytes(per_token),
                term::bytes(per_sequence * plan.longest_sequences as u64),
                plan.longest_sequences
            ),
        )?;
    }
    for (name, text) in text_facts(package.manifest()) {
        line(name, term::harmless(&text))?;
    }
    for (plan, trials) in plans.iter().filter_map(|plan| Some((plan, plan.fp8_trials.as_ref()?))) {
        print_trials(&term::harmless(&plan.target), trials)?;
    }
    let mut line = |name: &str, text: String| writeln!(out, "  {} {text}", style.dim(format!("{name:<10}")));
    let engine = shell_word(path);
    let runs_here = package.manifest().plans.iter().any(|plan| plan.target == "cpu");
    let chat = match package.manifest().tokenizer {
        Some(_) => format!("aotron chat {engine}"),
        None => format!("aotron run {engine} --token-ids 1,2,3"),
    };
    let library = package.manifest().plans.iter().find_map(|plan| plan.tensorrt.as_ref()?.compiled.as_ref());
    if let Some(compiled) = library.filter(|_| !runs_here) {
        let kind = compiled.library;
        let found = TensorRtLibrary::find(kind).map(|library| library.path().display().to_string());
        let file = found.unwrap_or_else(|_| kind.file_name().into());
        line("copy", format!("{engine}, the program and {file} into one folder there"))?;
        if kind == LibraryKind::Rtx {
            line("", "the first start compiles kernels for the GPU, later ones find them".into())?;
        }
    }
    match plans.iter().find(|plan| plan.only_prepared) {
        Some(plan) => line("next", format!("on the {}: aotron build {engine} --finish", plan.target.to_uppercase()))?,
        None if runs_here => line("next", chat)?,
        None => line("next", format!("on such a GPU: {chat}"))?,
    }
    Ok(())
}

/// Prints the ways to hold FP8 weights that were tried, with their times, and the one that was kept.
fn print_trials(target: &str, found: &Fp8Trials) -> anyhow::Result<()> {
    let style = term::on_stdout();
    let mut out = term::stdout();
    let [single, batch, prefill] = StepTimes::SHARES.map(|share| format!("{:.0} %", 100.0 * share));
    let gpu = term::harmless(&found.gpu);
    writeln!(out, "FP8 weights of {target}, timed on {gpu} (medians of {}); kept as {}", Fp8Trials::RUNS, found.kept)?;
    let header = format!(
        "  {:<10} {:>9} {:>9} {:>12} {:>24} {:>22} {:>9}",
        "weights", "compiled", "verified", "decode 1", "decode as many as fit", "prefill", "relative"
    );
    writeln!(out, "{}", style.dim(header))?;
    let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
    for trial in &found.trials {
        let compiled = format!("{:.1} s", trial.compile_seconds);
        match &trial.outcome {
            Ok((rows, times)) => {
                let batch = format!("{} for {}", ms(times.batch_seconds), times.batch);
                let prefill = format!("{} for {}", ms(times.prefill_seconds), times.chunk_tokens);
                let relative = found.relative(trial).map_or(String::new(), |relative| format!("{relative:.2}"));
                let (kind, single) = (trial.kind, ms(times.single_seconds));
                writeln!(
                    out,
                    "  {kind:<10} {compiled:>9} {rows:>9} {single:>12} {batch:>24} {prefill:>22} {relative:>9}"
                )?;
            }
            Err(reason) => writeln!(out, "  {:<10} {compiled:>9} not used: {}", trial.kind, term::harmless(reason))?,
        }
    }
    writeln!(
        out,
        "  relative: geometric mean, weighted {single} by a step that decodes one sequence, {batch} by one that decodes as \
         many as fit, for each of them, and {prefill} by prefill"
    )?;
    Ok(())
}

/// Parses a recipe's name or file, optionally followed by a colon and a precision.
fn recipe_and_precision(text: &str) -> Result<(String, Option<Precision>), String> {
    // File names may contain a colon too.
    let of_one = text.rsplit_once(':').and_then(|(name, after)| Some((name, precision(after).ok()?)));
    let (name, of_one) = of_one.map_or((text, None), |(name, precision)| (name, Some(precision)));
    Ok((recipe_name(name)?, of_one))
}

/// Parses a recipe's name or file, which has to be there.
pub fn recipe_name(name: &str) -> Result<String, String> {
    match Recipe::load(name) {
        Err(aotron::Error::Recipe { detail, .. }) if !Path::new(name).exists() => Err(detail),
        _ => Ok(name.to_owned()),
    }
}

/// Parses the name of a CPU, or `native`.
fn cpu(name: &str) -> Result<CpuFeatures, String> {
    match name {
        "native" => Isa::from_environment().map(Isa::features).map_err(|error| error.to_string()),
        name => CpuFeatures::by_name(name).ok_or_else(|| {
            let names: Vec<&str> = CpuFeatures::names().collect();
            format!("expected native or one of {}", names.join(", "))
        }),
    }
}

/// Parses the name of a precision.
pub fn precision(name: &str) -> Result<Precision, String> {
    precision_of(name).ok_or_else(|| {
        let names: Vec<String> = Precision::ALL.iter().map(Precision::to_string).collect();
        format!("expected one of {}", names.join(", "))
    })
}
