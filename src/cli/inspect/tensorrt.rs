//! `--network` and `--kernels`: lowers and compiles the model's TensorRT plans for inspection.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use aotron::backend::tensorrt::analysis::{Fp8Products, StepKernels, Traffic};
use aotron::backend::tensorrt::kernels::KernelLog;
use aotron::backend::tensorrt::lower::{Attends, Constants, LoweredNetwork, LoweringOptions, lower_with};
use aotron::backend::tensorrt::{BuildOptions, LibraryKind, Monitor, TensorRtLibrary};
use aotron::checkpoint::ModelConfig;
use aotron::compile::{Calibration, Precision, Recipe, optimized_graph};
use aotron::engine::tensorrt::{AttentionInput, Fp8Weights, Sizes};
use aotron::engine::{PlanInfo, tensorrt::TensorRtInfo};
use aotron::graph::Graph;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::super::args::usage;
use super::super::build::{precision, recipe_name};
use super::kernels::{Listing, StepListing};
use super::network::Networks;
use super::{Subject, term};

/// Flags that select a TensorRT listing and the plan to list.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "TensorRT (needs its library, but no GPU and no weights)")]
pub struct PlanFlags {
    /// Print the network passed to TensorRT, as TensorRT reports it; repeated layers once, or `all`
    #[arg(long, value_name = "all", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = detail)]
    network: Option<ListingDetail>,
    /// Compile, and print the kernels of each step, the copies they make and the decoding speed that memory bandwidth
    /// allows; repeated layers once, or `all`
    #[arg(long, value_name = "all", num_args = 0..=1, require_equals = true, default_missing_value = "", value_parser = detail)]
    kernels: Option<ListingDetail>,
    /// Recipe of the plan [default: the recipe of the package's plan, or a100]
    #[arg(long, value_name = "NAME|FILE", value_parser = recipe_name)]
    recipe: Option<String>,
    /// Number format of weights [default: the plan's]
    #[arg(long, value_parser = precision, value_name = "bf16|int8|int4|fp8|w8a8")]
    precision: Option<Precision>,
    /// Capacity class to list, in tokens per sequence [default: the largest]
    #[arg(long, value_name = "TOKENS")]
    capacity: Option<usize>,
}

/// Amount of detail to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListingDetail {
    /// Repeated layers once.
    Once,
    /// Everything.
    All,
}

fn detail(text: &str) -> Result<ListingDetail, String> {
    match text {
        "" => Ok(ListingDetail::Once),
        "all" => Ok(ListingDetail::All),
        _ => Err("expected nothing or `all`".into()),
    }
}

impl PlanFlags {
    /// Returns true if a TensorRT listing was requested.
    pub fn is_wanted(&self) -> bool {
        self.network.is_some() || self.kernels.is_some()
    }

    /// Rejects flags that would have no effect.
    pub fn check(&self) -> anyhow::Result<()> {
        let idle = [
            ("--recipe", self.recipe.is_some()),
            ("--precision", self.precision.is_some()),
            ("--capacity", self.capacity.is_some()),
        ];
        match idle.iter().find(|(_, given)| *given) {
            Some((name, _)) if !self.is_wanted() => Err(usage(format!("{name} is for --network and --kernels"))),
            _ => Ok(()),
        }
    }
}

/// SM 8.9, the lowest with FP8, stands in for SM 9.0, which TensorRT for RTX cannot compile for.
const STAND_IN: (u16, u16) = (90, 89);

/// The plans to list.
struct Plans<'a> {
    config: &'a ModelConfig,
    target: &'static str,
    precision: Precision,
    calibration: Calibration,
    /// Sizes of the class to list.
    sizes: Sizes,
    /// Sizes of all capacity classes, ascending.
    classes: Vec<Sizes>,
    compute_capability: u16,
    attention: AttentionInput,
    /// The way that codes of FP8 are held.
    fp8_weights: Fp8Weights,
    /// `None` means yes unless weights are embedded in the plan.
    has_context_plan: Option<bool>,
}

impl Plans<'_> {
    fn of<'a>(flags: &PlanFlags, subject: &'a Subject) -> anyhow::Result<Plans<'a>> {
        let packaged = match subject {
            Subject::Engine(package) => packaged(&package.manifest().plans, flags.recipe.as_deref()),
            _ => None,
        };
        let name = flags.recipe.as_deref().or(packaged.map(|(plan, _)| plan.target.as_str())).unwrap_or("a100");
        let mut recipe = Recipe::load(name)?;
        let packaged_precision = packaged.map(|(plan, _)| {
            serde_json::from_value(json!(plan.precision))
                .with_context(|| format!("precision `{}` of the {} plan", plan.precision, plan.target))
        });
        recipe.precision = match (flags.precision, packaged_precision) {
            (Some(precision), _) => precision,
            (None, Some(precision)) => precision?,
            (None, None) => recipe.precision,
        };
        recipe.check()?;
        let (Some(options), Some(compute_capability)) = (&recipe.tensorrt, recipe.target.compute_capability()) else {
            return Err(usage(format!("recipe {name} is not for a GPU, so it has no TensorRT plan")));
        };
        let config = subject.config();
        check_size(config)?;
        // The value of a scale does not affect the kernels, except for 1, which TensorRT optimizes away with the
        // rounding.
        let any_scale = Calibration::uniform(0.01).without(recipe.kept_in_bf16());
        let (classes, calibration, has_context_plan, attention) = match packaged {
            Some((_, info)) => {
                let scales = info.activation_scales.clone();
                let calibration = if scales.is_empty() { any_scale } else { Calibration::from_scales(scales) };
                let context_plan = info.compiled.as_ref().map(|compiled| compiled.context_plan.is_some());
                (info.class_sizes(), calibration, context_plan.or(options.context_plan), info.attention())
            }
            None => {
                let classes = recipe.tensorrt_classes(options, &recipe.limits(config)?, config);
                (classes, any_scale, options.context_plan, options.attention)
            }
        };
        let wanted = |sizes: &&Sizes| flags.capacity.is_none_or(|capacity| sizes.max_sequence_tokens == capacity);
        let Some(sizes) = classes.iter().rev().find(wanted).cloned() else {
            let capacities: Vec<String> = classes.iter().map(|sizes| sizes.max_sequence_tokens.to_string()).collect();
            return Err(usage(format!("--capacity is one of the plan's classes: {}", capacities.join(", "))));
        };
        Ok(Plans {
            config,
            target: recipe.target.name(),
            precision: recipe.precision,
            calibration,
            sizes,
            classes,
            compute_capability,
            attention,
            fp8_weights: match packaged {
                Some((_, info)) if recipe.precision == Precision::Fp8 => info.fp8_weights(),
                _ => recipe.fp8_kinds().first().copied().unwrap_or_default(),
            },
            has_context_plan,
        })
    }

    fn graph(&self) -> aotron::Result<Graph> {
        let tokens = self.sizes.position_tokens;
        Ok(optimized_graph(self.config, self.precision, tokens, Some(&self.calibration))?.0)
    }

    fn lowered(&self, graph: &Graph, attends: Attends, monitor: Arc<dyn Monitor>) -> aotron::Result<LoweredNetwork> {
        let library = TensorRtLibrary::find(LibraryKind::Rtx)?;
        let options = LoweringOptions { fp8_weights: self.fp8_weights, ..LoweringOptions::default() };
        lower_with(graph, library.network(monitor)?, attends, &self.sizes, &Constants::Arbitrary, &options)
    }

    fn has_context_plan(&self, lowered: &LoweredNetwork) -> bool {
        self.has_context_plan.unwrap_or(!lowered.weights.iter().any(|weight| weight.in_plan))
    }

    fn networks(&self, detail: ListingDetail) -> anyhow::Result<Networks> {
        let graph = self.graph()?;
        let cache = self.lowered(&graph, Attends::Cache(self.attention), Arc::new(()))?;
        let context_plan = match self.has_context_plan(&cache) {
            true => Some(self.lowered(&graph, Attends::Chunk, Arc::new(()))?.network.layers()?),
            false => None,
        };
        let title = format!("network for {} in {}", self.target, self.precision);
        Ok(Networks { title, bindings: cache.bindings, layers: cache.network.layers()?, context_plan, detail })
    }

    fn kernels(&self, detail: ListingDetail) -> anyhow::Result<Listing> {
        let library = TensorRtLibrary::find(LibraryKind::Rtx)?;
        let compiled_for = match self.compute_capability {
            capability if capability == STAND_IN.0 => STAND_IN.1,
            capability => capability,
        };
        let graph = self.graph()?;
        let mut in_parts = Vec::new();
        let mut compile = |attends, name: &'static str| -> aotron::Result<(LoweredNetwork, Arc<KernelLog>)> {
            let log = Arc::new(KernelLog::new(Arc::new(CompileSpinner::new(format!("compiling {name}")))));
            let mut lowered = self.lowered(&graph, attends, log.clone())?;
            let (_, reason) = lowered.network.build_or_decompose(&BuildOptions {
                compute_capability: Some(compiled_for),
                list_kernels: true,
                profiles: lowered.profiles.clone(),
                ..BuildOptions::default()
            })?;
            in_parts.extend(reason.map(|reason| (name, reason)));
            Ok((lowered, log))
        };
        let (lowered, log) = compile(Attends::Cache(self.attention), "the prefill and decode plan")?;
        let LoweredNetwork { bindings, weights, .. } = &lowered;
        let mut kernels = log.kernels();
        let step = |name, kernels: Vec<_>, bindings: &_| StepListing {
            name,
            analysis: StepKernels::of(&kernels, bindings),
            kernels,
        };
        let mut taken = |profile: usize| kernels.profiles.get_mut(profile).map(std::mem::take).unwrap_or_default();
        let (cached_prefill, decode) = (taken(0), taken(1));
        let traffic = Traffic::of(&decode, bindings, weights);
        let fp8_products = Fp8Products::of(&decode, weights);
        let mut steps = vec![step("decode", decode, bindings)];
        let mut unread = kernels.unread;
        if self.has_context_plan(&lowered) {
            let (lowered, log) = compile(Attends::Chunk, "the context plan")?;
            let mut kernels = log.kernels();
            let context_plan = kernels.profiles.first_mut().map(std::mem::take).unwrap_or_default();
            steps.push(step("context prefill", context_plan, &lowered.bindings));
            unread.extend(kernels.unread);
        }
        steps.push(step("cached prefill", cached_prefill, bindings));
        let parts = weights.iter().filter(|weight| weight.in_plan).map(|weight| weight.bytes()).sum();
        Ok(Listing {
            target: self.target,
            precision: self.precision.to_string(),
            library: format!("{} {}", library.kind().name(), library.version()),
            compute_capability: self.compute_capability,
            compiled_for,
            capacity_tokens: self.sizes.max_sequence_tokens,
            classes: self.classes.clone(),
            weight_bytes_in_plan: parts,
            attention: self.attention,
            in_parts,
            bindings: bindings.clone(),
            steps,
            traffic,
            fp8_products,
            fp8_weights: self.fp8_weights,
            unread,
            detail,
        })
    }
}

/// Most layers of a model whose network is listed: the time that TensorRT takes grows with their cube, half a minute for
/// 40.
const MOST_LAYERS: usize = 64;
/// Most elements of a matrix that is listed. A matrix that is a constant of the plan is made up in memory, of half a byte
/// an element.
const MOST_ELEMENTS: usize = 1 << 32;

/// Refuses models whose listing would take hours or more memory than machines have.
fn check_size(config: &ModelConfig) -> anyhow::Result<()> {
    let layers = config.num_layers;
    if layers > MOST_LAYERS {
        bail!(
            "the model has {layers} layers, and --network and --kernels list up to {MOST_LAYERS}; since its layers are alike, \
             a copy of its config with fewer layers shows the same"
        );
    }
    let heads = config.num_heads.max(config.num_kv_heads).saturating_mul(config.head_dim).saturating_mul(3);
    let widest = config.vocab_size.max(config.intermediate_size).max(heads);
    if widest.saturating_mul(config.hidden_size) > MOST_ELEMENTS {
        bail!("its largest matrix is {widest} by {} elements, too large to list a plan for", config.hidden_size);
    }
    Ok(())
}

/// The package's first TensorRT plan, for `target` if given.
fn packaged<'a>(plans: &'a [PlanInfo], target: Option<&str>) -> Option<(&'a PlanInfo, &'a TensorRtInfo)> {
    let fits = |plan: &&PlanInfo| target.is_none_or(|target| plan.target == target);
    plans.iter().filter(fits).find_map(|plan| Some((plan, plan.tensorrt.as_ref()?)))
}

/// Creates the listings that the flags request.
pub fn dump(flags: &PlanFlags, subject: &Subject) -> anyhow::Result<(Option<Networks>, Option<Listing>)> {
    if !flags.is_wanted() {
        return Ok((None, None));
    }
    let plans = Plans::of(flags, subject)?;
    let network = flags.network.map(|detail| plans.networks(detail)).transpose()?;
    let kernels = flags.kernels.map(|detail| plans.kernels(detail)).transpose()?;
    Ok((network, kernels))
}

/// Interval of progress lines when standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Shows on standard error that a compilation is running. TensorRT does not report how far along it is.
struct CompileSpinner {
    name: String,
    started: Instant,
    bar: ProgressBar,
    last_line: Mutex<Instant>,
}

impl CompileSpinner {
    fn new(name: String) -> CompileSpinner {
        let bar = ProgressBar::new_spinner().with_message(name.clone());
        let bar = match ProgressStyle::with_template("{spinner} {msg}, {elapsed}") {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        bar.enable_steady_tick(Duration::from_millis(100));
        CompileSpinner { name, started: Instant::now(), bar, last_line: Mutex::new(Instant::now()) }
    }
}

impl Monitor for CompileSpinner {
    fn step(&self, _phase: &str, _step: usize) -> ControlFlow<()> {
        if let Ok(mut last) = self.last_line.lock()
            && last.elapsed() >= LINE_INTERVAL
            && !std::io::stderr().is_terminal()
        {
            *last = Instant::now();
            let _ = writeln!(std::io::stderr(), "{}, {}", self.name, term::duration(self.started.elapsed()));
        }
        ControlFlow::Continue(())
    }
}

impl Drop for CompileSpinner {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aotron::backend::Limits;

    #[test]
    fn a_package_is_looked_at_by_its_own_plan() {
        let sizes = Sizes {
            max_sequence_tokens: 64,
            position_tokens: 64,
            decode_sequences: 2,
            prefill_sequences: 1,
            prefill_tokens: 16,
            prefill_logits_rows: 2,
            top_tokens: 4,
        };
        let limits =
            Limits { slots: 2, max_sequence_tokens: 64, max_step_tokens: 16, max_logits_rows: 2, vocab_size: 100 };
        let plan = |target: &str, tensorrt| PlanInfo {
            target: target.into(),
            precision: "bf16".into(),
            plan: None,
            weights: "weights".into(),
            limits: limits.clone(),
            kv_bytes_per_token: 1,
            recipe: String::new(),
            tensorrt,
        };
        let info = TensorRtInfo {
            compute_capability: 90,
            compiled: None,
            sizes,
            smaller_classes: Vec::new(),
            bindings: Vec::new(),
            kv_cache_gib: Default::default(),
            activation_scales: Default::default(),
        };
        let plans = [plan("cpu", None), plan("h100", Some(info.clone())), plan("a100", Some(info))];
        let chosen = |target| packaged(&plans, target).map(|(plan, _)| plan.target.as_str());
        assert_eq!(chosen(None), Some("h100"));
        assert_eq!(chosen(Some("a100")), Some("a100"));
        assert_eq!((chosen(Some("cpu")), chosen(Some("my.toml"))), (None, None));
    }
}
