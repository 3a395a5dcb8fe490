//! `aotron inspect`: shows the contents of a package or a checkpoint.

mod checkpoint;
mod cpu_plan;
mod kernels;
mod network;
mod tensorrt;

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use aotron::backend::cpu::lower::{CpuTarget, lower};
use aotron::backend::cpu::program::Program;
use aotron::backend::{Limits, cpu_program};
use aotron::checkpoint::{Checkpoint, ModelConfig, is_checkpoint, read_config};
use aotron::compile::gpu::sm;
use aotron::compile::{Calibration, PassReport, Precision, Recipe, open_checkpoint, optimized_graph};
use aotron::engine::tensorrt::Compiled;
use aotron::engine::{GenerationSettings, Manifest, Package, is_package};
use aotron::graph::Graph;
use aotron::runtime::SamplingParams;
use aotron::text::{ChatFormat, ChatTemplate};
use serde::Serialize;
use serde_json::{Value, json};

use checkpoint::Facts;
pub use cpu_plan::CpuPlanFacts;

use super::args::{Format, PinFlags};
use super::engine::shell_word;
use super::term::{self, Stages, Style};

/// Flags of `aotron inspect`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Engine package or checkpoint
    #[arg(value_name = "ENGINE|CHECKPOINT")]
    path: PathBuf,
    /// Print the optimized graph
    #[arg(long)]
    graph: bool,
    /// Print the kernels of the CPU plan
    #[arg(long)]
    program: bool,
    /// Print what each compiler pass does, and what it skips and why
    #[arg(long)]
    passes: bool,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    tensorrt: tensorrt::PlanFlags,
    #[command(flatten)]
    pin: PinFlags,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    flags.tensorrt.check()?;
    let subject = if is_package(&flags.path) {
        Subject::Engine(Box::new(flags.pin.open(&flags.path)?))
    } else if flags.pin.expect.is_some() {
        return flags.pin.refuse_checkpoint(&flags.path);
    } else if flags.tensorrt.is_wanted() && !is_checkpoint(&flags.path) {
        Subject::Config(flags.path.clone(), Box::new(read_config(&flags.path)?))
    } else {
        Subject::Checkpoint(Box::new(open_checkpoint(&flags.path, &Stages::new())?))
    };
    let dumps = Dumps::make(flags, &subject)?;
    match flags.format {
        Format::Json => {
            let mut json = subject.json()?;
            if let Some(facts) = json.as_object_mut() {
                facts.extend(dumps.json()?);
            }
            term::print_json(&json)
        }
        Format::Text => {
            let mut out = term::stdout();
            match dumps.text() {
                Some(text) => write!(out, "{}", term::harmless(&text))?,
                None => {
                    for line in subject.lines()? {
                        writeln!(out, "{line}")?;
                    }
                }
            }
            Ok(())
        }
    }
}

enum Subject {
    Engine(Box<Package>),
    Checkpoint(Box<Checkpoint>),
    /// A checkpoint's config without its weights.
    Config(PathBuf, Box<ModelConfig>),
}

/// Compiler output for the model, as far as requested.
#[derive(Default)]
struct Dumps {
    passes: Option<Vec<PassReport>>,
    graph: Option<Graph>,
    program: Option<Program>,
    network: Option<network::Networks>,
    kernels: Option<kernels::Listing>,
}

impl Dumps {
    fn make(flags: &Flags, subject: &Subject) -> anyhow::Result<Dumps> {
        let mut dumps = Dumps::default();
        if flags.graph || flags.passes || (flags.program && !matches!(subject, Subject::Engine(_))) {
            let (config, precision, limits, calibration) = subject.compiled_as()?;
            let (graph, reports) = optimized_graph(config, precision, limits.max_sequence_tokens, Some(&calibration))?;
            dumps.passes = flags.passes.then_some(reports);
            if flags.program {
                dumps.program = Some(lower(&graph, &limits, CpuTarget::native()?)?.program);
            }
            dumps.graph = flags.graph.then_some(graph);
        }
        if let (true, Subject::Engine(package)) = (flags.program, subject) {
            dumps.program = Some(cpu_program(package)?.1);
        }
        (dumps.network, dumps.kernels) = tensorrt::dump(&flags.tensorrt, subject)?;
        Ok(dumps)
    }

    fn text(&self) -> Option<String> {
        let reports = self.passes.iter().flatten().map(|report| format!("{report}\n")).collect();
        let graph = self.graph.as_ref().map(Graph::to_string);
        let program = self.program.as_ref().map(Program::to_string);
        let network = self.network.as_ref().map(network::Networks::to_string);
        let kernels = self.kernels.as_ref().map(kernels::Listing::to_string);
        let passes = self.passes.as_ref().map(|_| reports);
        let parts: Vec<String> = [passes, graph, program, network, kernels].into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join("\n"))
    }

    fn json(self) -> anyhow::Result<serde_json::Map<String, Value>> {
        let mut map = serde_json::Map::new();
        if let Some(reports) = self.passes {
            let pass = |r: &PassReport| {
                let left: Vec<Value> = r.left.iter().map(|(at, reason)| json!({"at": at, "reason": reason})).collect();
                json!({"pass": r.pass, "applied": r.applied, "left": left})
            };
            map.insert("passes".into(), reports.iter().map(pass).collect());
        }
        map.extend(self.graph.map(|graph| ("graph".into(), json!(graph.to_string()))));
        map.extend(self.program.map(|program| ("program".into(), json!(program.to_string()))));
        if let Some(network) = self.network {
            map.insert("network".into(), network.json());
        }
        if let Some(kernels) = self.kernels {
            map.insert("kernels".into(), serde_json::to_value(kernels)?);
        }
        Ok(map)
    }
}

impl Subject {
    /// The model and its compilation settings: the package's own, or for a checkpoint those of the CPU recipe.
    fn compiled_as(&self) -> anyhow::Result<(&ModelConfig, Precision, Limits, Calibration)> {
        match self {
            Subject::Engine(package) => {
                let (plan, program) = cpu_program(package)?;
                let precision = serde_json::from_value(json!(plan.precision))
                    .with_context(|| format!("precision `{}` of the {} plan", plan.precision, plan.target))?;
                let calibration = Calibration::of_program(&program);
                Ok((&package.manifest().model, precision, plan.limits.clone(), calibration))
            }
            Subject::Checkpoint(_) | Subject::Config(..) => {
                let recipe = Recipe::load("cpu")?;
                let config = self.config();
                Ok((config, recipe.precision, recipe.limits(config)?, Calibration::default()))
            }
        }
    }

    fn config(&self) -> &ModelConfig {
        match self {
            Subject::Engine(package) => &package.manifest().model,
            Subject::Checkpoint(checkpoint) => checkpoint.config(),
            Subject::Config(_, config) => config,
        }
    }

    fn json(&self) -> anyhow::Result<Value> {
        match self {
            Subject::Engine(package) => Ok(json!({
                "kind": "engine",
                "path": package.path(),
                "parameters": package.manifest().model.parameters(),
                "cpu_plan": CpuPlanFacts::of(package).map(|facts| match facts {
                    Ok(facts) => json!(facts),
                    Err(error) => json!({"error": error.to_string()}),
                }),
                "manifest": package.manifest(),
            })),
            Subject::Checkpoint(checkpoint) => {
                let facts = Facts::of(checkpoint)?;
                let details = checkpoint.details().iter().map(|(name, text)| ((*name).to_owned(), json!(text)));
                Ok(json!({
                    "kind": "checkpoint",
                    "path": checkpoint.path(),
                    "format": checkpoint.format(),
                    "model": checkpoint.config(),
                    "parameters": checkpoint.config().parameters(),
                    "weight_bytes": checkpoint.weight_bytes(),
                    "details": details.collect::<serde_json::Map<String, Value>>(),
                    "tokenizer": facts.tokenizer_json(),
                    "ends": facts.text.format.stop_ids(),
                    "chat_format": facts.has_format.then_some(&facts.text.format),
                    "chat_templates": facts.templates,
                    "generation": facts.text.generation,
                    "notes": facts.text.notes,
                    "warnings": facts.text.warnings,
                    "refusals": facts.text.refusals,
                    "differences_from_model_card": facts.differences,
                    "tensors": tensor_groups(checkpoint),
                }))
            }
            Subject::Config(path, config) => Ok(json!({
                "kind": "config",
                "path": path,
                "model": config,
                "parameters": config.parameters(),
            })),
        }
    }

    fn lines(&self) -> anyhow::Result<Vec<String>> {
        let mut lines = FactLines { style: term::on_stdout(), lines: Vec::new() };
        match self {
            Subject::Engine(package) => lines.engine(package),
            Subject::Checkpoint(checkpoint) => lines.checkpoint(checkpoint)?,
            Subject::Config(path, config) => {
                lines.title(format!("{}, a config", path.display()));
                lines.model(config);
            }
        }
        Ok(lines.lines)
    }
}

/// A package's chat format and generation defaults, as labelled texts.
pub fn text_facts(manifest: &Manifest) -> Vec<(&'static str, String)> {
    let (format, settings) = (&manifest.chat_format, &manifest.generation);
    let mut facts = vec![("chat", chat(format)), ("generation", generation(format, settings))];
    if !settings.unused.is_empty() {
        facts.push(("not used", format!("{}, of generation_config.json", settings.unused.join(", "))));
    }
    facts
}

/// The chat template, and the names of the checkpoint's others.
fn chat(format: &ChatFormat) -> String {
    let is_other = |name: &&str| !matches!(&format.template, ChatTemplate::Jinja(jinja) if jinja.name == **name);
    let others: Vec<&str> = format.named_templates.keys().map(String::as_str).filter(is_other).collect();
    let also = if others.is_empty() { String::new() } else { format!(", also {}", others.join(", ")) };
    format!("{}{also}", format.template.describe())
}

/// A summary of stops and generation defaults.
fn generation(format: &ChatFormat, settings: &GenerationSettings) -> String {
    let stops = format.stop_ids().into_iter().map(|id| format!("id {id}"));
    let stops: Vec<String> = stops.chain(format.chat_stop_strings().iter().map(|s| format!("{s:?}"))).collect();
    let stops = if stops.is_empty() { "nothing".into() } else { stops.join(", ") };
    let mut how = Vec::new();
    let params = SamplingParams::from(settings);
    if params.is_greedy() {
        how.push("greedy".to_owned());
    }
    how.extend(params.temperature.map(|temperature| format!("temperature {temperature}")));
    how.extend(params.top_k.filter(|k| *k > 0).map(|top_k| format!("top-k {top_k}")));
    how.extend(params.top_p.filter(|p| *p < 1.0).map(|top_p| format!("top-p {top_p}")));
    how.extend(params.min_p.filter(|p| *p > 0.0).map(|min_p| format!("min-p {min_p}")));
    how.extend(params.repetition_penalty.filter(|p| *p != 1.0).map(|p| format!("repetition penalty {p}")));
    format!("ended by {stops}, or after {} tokens by default; {}", settings.max_tokens, how.join(", "))
}

struct FactLines {
    style: Style,
    lines: Vec<String>,
}

impl FactLines {
    fn fact(&mut self, name: &str, text: impl std::fmt::Display) {
        let text = term::harmless(&text.to_string().replace('\n', " "));
        self.lines.push(format!("{} {text}", self.style.dim(format!("{:<12}", term::harmless(name)))));
    }

    fn title(&mut self, text: impl AsRef<str>) {
        self.lines.push(self.style.bold(term::harmless(text.as_ref())));
    }

    fn engine(&mut self, package: &Package) {
        let manifest = package.manifest();
        self.title(format!("{}, an engine package", package.path().display()));
        self.fact("built by", format!("{}, format {}", manifest.tool, manifest.format_version));
        self.fact("sha256", format!("{}, of the manifest (--expect)", manifest.sha256));
        self.fact("from", format!("{} checkpoint {}", manifest.checkpoint.format, manifest.checkpoint.digest));
        self.model(&manifest.model);
        match &manifest.tokenizer {
            Some(tokenizer) => {
                self.fact("tokenizer", format!("{} ids, from a {}", tokenizer.vocab_size, tokenizer.source))
            }
            None => self.fact("tokenizer", "none: token ids only"),
        }
        for (name, text) in text_facts(manifest) {
            self.fact(name, text);
        }
        for plan in &manifest.plans {
            let limits = &plan.limits;
            self.fact(
                &format!("{} plan", plan.target),
                format!("{}, {}", plan.precision, plan.plan.as_deref().unwrap_or("only prepared")),
            );
            let compiled = plan.tensorrt.as_ref().map(|info| (&info.compiled, sm(info.compute_capability)));
            match compiled {
                Some((Some(Compiled { library, version, gpu, .. }), sm)) => {
                    let on = gpu.as_ref().map(|gpu| format!(" on {}", gpu.name)).unwrap_or_default();
                    self.fact("  compiled", format!("by {} {version}{on}, for SM {sm}", library.name()));
                }
                Some((None, sm)) => {
                    let engine = shell_word(package.path());
                    self.fact("  next", format!("on a GPU of SM {sm}: aotron build {engine} --finish"));
                }
                None => {}
            }
            if let ("cpu", Some(facts)) = (plan.target.as_str(), CpuPlanFacts::of(package)) {
                self.fact("  packed for", facts.map_or_else(|error| format!("unknown: {error}"), |it| it.to_string()));
            }
            let longest = plan.longest_sequences();
            let longest = match longest < limits.slots {
                true => format!(" ({longest} of them that long)"),
                false => String::new(),
            };
            self.fact(
                "  limits",
                format!(
                    "{} of up to {} tokens{longest}; a step takes up to {} new tokens and returns up to {} rows of logits",
                    term::plural(limits.slots, "sequence"),
                    limits.max_sequence_tokens,
                    limits.max_step_tokens,
                    limits.max_logits_rows
                ),
            );
            let per_token = plan.kv_bytes_per_token as u64;
            let per_sequence = per_token.saturating_mul(limits.max_sequence_tokens as u64);
            let all = per_sequence.saturating_mul(plan.longest_sequences() as u64);
            self.fact(
                "  KV memory",
                format!(
                    "{per_token} bytes per token, {} per sequence, {} for all",
                    term::bytes(per_sequence),
                    term::bytes(all)
                ),
            );
        }
        for file in &manifest.files {
            self.fact("file", format!("{:>10}  {}  {}", term::bytes(file.bytes), file.path, short(&file.sha256)));
        }
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        let title = format!("{}, a {} checkpoint", checkpoint.path().display(), checkpoint.format());
        self.title(title);
        let config = checkpoint.config();
        self.model(config);
        self.fact("weights", term::bytes(checkpoint.weight_bytes()));
        for (name, text) in checkpoint.details() {
            self.fact(name, text);
        }
        let facts = Facts::of(checkpoint)?;
        for (name, text) in facts.tokenizer_lines() {
            self.fact(name, text);
        }
        let kv_values = 2 * config.num_layers * config.num_kv_heads * config.head_dim;
        self.fact("KV memory", format!("{} bytes per token in bf16, {} in f32", 2 * kv_values, 4 * kv_values));
        match facts.has_format {
            true => self.fact("chat", chat(&facts.text.format)),
            false => self.fact("chat", format!("none called default, but {}", facts.templates.join(", "))),
        }
        self.fact("generation", generation(&facts.text.format, &facts.text.generation));
        for note in &facts.text.notes {
            self.fact("", note);
        }
        let groups = tensor_groups(checkpoint);
        let width = groups.iter().map(|group| group.name.chars().count()).max().unwrap_or(0);
        for TensorGroup { name, count, dtype, shape, bytes } in groups {
            let times = if count == 1 { String::new() } else { format!("{count} × ") };
            let line = format!("{name:<width$} {times:>6}{dtype} {shape:?}");
            self.fact("tensor", format!("{line:<70} {:>10}", term::bytes(bytes)));
        }
        for warning in facts.text.warnings.iter().chain(&facts.text.refusals) {
            term::warn(warning);
        }
        for difference in facts.differences {
            term::warn(format!("differs from the model card: {difference}"));
        }
        Ok(())
    }

    fn model(&mut self, c: &ModelConfig) {
        let parameters = c.parameters().map_or("too many parameters".into(), |count| {
            let short = [(1e9, "billion"), (1e6, "million")].into_iter().find(|(unit, _)| count as f64 >= *unit);
            match short {
                Some((unit, name)) => format!("{:.2} {name} parameters", count as f64 / unit),
                None => format!("{count} parameters"),
            }
        });
        self.fact("model", format!("{parameters}, {} layers, hidden size {}", c.num_layers, c.hidden_size));
        self.fact("  MLP", format!("{} wide, squared ReLU", c.intermediate_size));
        let heads = match c.num_kv_heads == c.num_heads {
            true => format!("{} heads of {}", c.num_heads, c.head_dim),
            false => format!("{} heads of {}, {} key/value heads", c.num_heads, c.head_dim, c.num_kv_heads),
        };
        self.fact("  attention", format!("{heads}, {} dimensions rotate, base {}", c.rotary_dim, c.rope_theta));
        let tied = if c.tie_word_embeddings { ", the head is tied to the embedding" } else { "" };
        self.fact("  vocabulary", format!("{} ids{tied}", c.vocab_size));
        self.fact("  context", format!("{} tokens", c.max_position_embeddings));
    }
}

/// The start of a digest, enough to tell two apart.
fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

/// A group of tensors that differ only in their layer.
#[derive(Debug, Serialize)]
struct TensorGroup {
    name: String,
    count: usize,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
}

fn tensor_groups(checkpoint: &Checkpoint) -> Vec<TensorGroup> {
    let mut groups: Vec<TensorGroup> = Vec::new();
    let mut index_of: HashMap<(String, String, Vec<usize>), usize> = HashMap::new();
    for view in checkpoint.tensors() {
        let parts = view.name.split('.').map(|part| match part.parse::<usize>() {
            Ok(_) => "*",
            Err(_) => part,
        });
        let name = parts.collect::<Vec<&str>>().join(".");
        let key = (name.clone(), view.dtype.to_string(), view.shape.to_vec());
        let index = *index_of.entry(key).or_insert_with(|| {
            let (dtype, shape) = (view.dtype.to_string(), view.shape.to_vec());
            groups.push(TensorGroup { name, count: 0, dtype, shape, bytes: 0 });
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(index) {
            group.count += 1;
            group.bytes += view.bytes();
        }
    }
    groups
}
