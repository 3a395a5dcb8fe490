//! Recipes: targets and settings of a build. The built-in ones are `engines/*.toml`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use super::passes::Precision;
use crate::backend::Limits;
use crate::backend::cpu::lower::CpuTarget;
use crate::checkpoint::ModelConfig;
use crate::engine::tensorrt::{AttentionInput, Fp8Weights, Sizes};
use crate::error::{Error, Result};
use crate::isa::CpuFeatures;

/// Largest accepted recipe.
const MAX_RECIPE_BYTES: u64 = 1 << 20;
/// The built-in recipes, by name.
const BUILT_IN: &[(&str, &str)] = &[
    ("cpu", include_str!("../../engines/cpu.toml")),
    ("cpu-fast", include_str!("../../engines/cpu-fast.toml")),
    ("cpu-small", include_str!("../../engines/cpu-small.toml")),
    ("a100", include_str!("../../engines/a100.toml")),
    ("h100", include_str!("../../engines/h100.toml")),
];
/// Upper bound on k of TensorRT's TopK layer.
const MOST_TOP_TOKENS: usize = 3840;

/// Settings of a plan to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Name of a built-in recipe, or the path of a file.
    pub name: String,
    /// Target that the plan runs on.
    pub target: Target,
    /// Precision that it computes in.
    pub precision: Precision,
    /// Number of concurrent sequences.
    pub slots: usize,
    /// Tokens per sequence; `None` uses the model's maximum.
    pub max_sequence_tokens: Option<usize>,
    /// New tokens per step.
    pub prefill_chunk_tokens: usize,
    /// Rows of logits per step.
    pub logits_rows: usize,
    /// CPU that a CPU plan is packed for; `None` uses this machine's.
    pub cpu: Option<CpuFeatures>,
    /// For a CPU plan in [`Precision::Int8`] or [`Precision::Int4`]: quantizes activations to 8 bits too, with per-row scales. `None` means no
    /// or, when repacking, as in the existing plan.
    pub quantize_activations: Option<bool>,
    /// For a plan in [`Precision::Int4`] or [`Precision::Fp8`]: rounding of weights.
    pub weight_rounding: WeightRounding,
    /// For a plan that quantizes inputs: linear layers that stay in BF16. `None`: those of [`Recipe::kept_in_bf16`].
    pub keep_bf16: Option<Vec<LinearKind>>,
    /// For a plan in [`Precision::W8a8`]: evens out the channels of inputs first, by SmoothQuant.
    pub smooth_inputs: bool,
    /// Options of a GPU plan.
    pub tensorrt: Option<TensorRtOptions>,
    /// The recipe's source text.
    pub text: String,
}

/// Rounding of quantized weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightRounding {
    /// Each weight to the nearest code.
    Nearest,
    /// GPTQ: weights compensate each other's errors, so that outputs on calibration prompts stay close.
    #[default]
    Gptq,
}

/// The linear layers of a transformer layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearKind {
    /// Queries, keys and values, which are one layer.
    QkvProj,
    /// Attention's output.
    OProj,
    /// The MLP's first.
    UpProj,
    /// The MLP's second.
    DownProj,
}

impl LinearKind {
    /// Returns true if the weight of this name is of such a layer.
    pub(super) fn is_of(self, weight: &str) -> bool {
        let module = weight.strip_suffix(".weight").unwrap_or(weight);
        let ends: &[&str] = match self {
            LinearKind::QkvProj => &[".qkv", ".q_proj", ".k_proj", ".v_proj"],
            LinearKind::OProj => &[".o_proj"],
            LinearKind::UpProj => &[".up_proj"],
            LinearKind::DownProj => &[".down_proj"],
        };
        ends.iter().any(|end| module.ends_with(end))
    }
}

/// Options of a TensorRT plan.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRtOptions {
    /// Number of largest logits of each row that the plan returns beside the row.
    pub top_tokens: usize,
    /// Sequences per prefill step.
    pub prefill_sequences: usize,
    /// Builds a context plan for prefill without a past; `None` means yes unless weights are embedded in the plan.
    pub context_plan: Option<bool>,
    /// Cache capacities below the longest sequence's, each with plans of its own; ignored where weights are embedded in
    /// the plan. Those that are not below the longest sequence's are dropped.
    #[serde(default)]
    pub capacity_classes: Vec<usize>,
    /// Input by which attention learns a sequence's length.
    #[serde(default)]
    pub attention: AttentionInput,
    /// For a plan in [`Precision::Fp8`]: the way that it holds its codes.
    #[serde(default)]
    pub fp8_weights: Fp8Choice,
    /// Largest batches of the decode profiles of a plan that TensorRT 11 compiles, ascending; those from a plan's largest
    /// batch on are ignored, and the last profile ends at that. The first is tuned for one sequence, the others for their
    /// largest batch. Empty: one profile for every batch.
    #[serde(default)]
    pub decode_batches: Vec<usize>,
    /// TensorRT 11's builder optimization level, 0 to 5.
    pub optimization_level: usize,
    /// TensorRT 11's tiling optimization level, 0 to 3.
    #[serde(default)]
    pub tiling_optimization_level: usize,
    /// GiB of KV cache on a GPU, by the GPU's memory in GB.
    #[serde(deserialize_with = "numbered")]
    pub kv_cache_gib: BTreeMap<u32, u32>,
}

/// The way that a plan in FP8 is to hold its codes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fp8Choice {
    /// As [`Fp8Weights::Inputs`].
    #[default]
    Inputs,
    /// As [`Fp8Weights::Constants`].
    Constants,
    /// As whichever is faster on the GPU: [`finish()`](super::finish()) compiles and times both. Until then, as inputs.
    Fastest,
}

impl Fp8Choice {
    /// The kinds to compile, the one of a plan that is not timed first.
    pub fn kinds(self) -> &'static [Fp8Weights] {
        match self {
            Fp8Choice::Inputs => &[Fp8Weights::Inputs],
            Fp8Choice::Constants => &[Fp8Weights::Constants],
            Fp8Choice::Fastest => &[Fp8Weights::Inputs, Fp8Weights::Constants],
        }
    }
}

impl From<Fp8Weights> for Fp8Choice {
    fn from(kind: Fp8Weights) -> Fp8Choice {
        match kind {
            Fp8Weights::Inputs => Fp8Choice::Inputs,
            Fp8Weights::Constants => Fp8Choice::Constants,
        }
    }
}

/// Deserializes integer keys, which TOML keeps as strings.
fn numbered<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<BTreeMap<u32, u32>, D::Error> {
    let named = BTreeMap::<String, u32>::deserialize(deserializer)?;
    let number = |(key, gib): (String, u32)| match key.parse() {
        Ok(gb) => Ok((gb, gib)),
        Err(_) => Err(serde::de::Error::custom(format!("kv_cache_gib has the key {key}, expected a GPU's GB"))),
    };
    named.into_iter().map(number).collect()
}

/// Target of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Any CPU.
    Cpu,
    /// NVIDIA A100, SM 8.0.
    A100,
    /// NVIDIA H100 (and H200), SM 9.0.
    H100,
}

impl Target {
    /// All targets.
    pub const ALL: [Target; 3] = [Target::Cpu, Target::A100, Target::H100];

    /// The name in recipes, manifests and file names.
    pub fn name(self) -> &'static str {
        match self {
            Target::Cpu => "cpu",
            Target::A100 => "a100",
            Target::H100 => "h100",
        }
    }

    /// Compute capability of a GPU: 80 is SM 8.0.
    pub fn compute_capability(self) -> Option<u16> {
        match self {
            Target::Cpu => None,
            Target::A100 => Some(80),
            Target::H100 => Some(90),
        }
    }

    /// Precisions that it supports.
    pub fn precisions(self) -> &'static [Precision] {
        match self {
            Target::Cpu => &Precision::ALL,
            Target::A100 => &[Precision::Bf16, Precision::Int8, Precision::Int4, Precision::W8a8],
            Target::H100 => &[Precision::Bf16, Precision::Fp8, Precision::Int8, Precision::Int4],
        }
    }
}

impl Recipe {
    /// Names of the built-in recipes.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// Returns true for a built-in recipe, whose settings the user did not write.
    pub fn is_built_in(&self) -> bool {
        Recipe::built_in().any(|name| name == self.name)
    }

    /// Loads a built-in recipe by name, or else the file at that path.
    ///
    /// # Errors
    /// [`Error::Recipe`] naming the key that does not fit; [`Error::Io`] if there is no such file either.
    pub fn load(name_or_path: &str) -> Result<Recipe> {
        if let Some((name, text)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_path) {
            return Recipe::parse(name, text);
        }
        let path = Path::new(name_or_path);
        if !path.exists() {
            let names: Vec<&str> = Recipe::built_in().collect();
            let detail = format!("there is no such recipe and no such file; the recipes are: {}", names.join(", "));
            return Err(Error::Recipe { name: name_or_path.into(), detail });
        }
        // A pipe is fine; a device that never ends is not.
        let file = File::open(path).map_err(Error::io("open", path))?;
        let mut bytes = Vec::new();
        file.take(MAX_RECIPE_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        let refuse = |detail: String| Error::Recipe { name: name_or_path.into(), detail };
        if bytes.len() as u64 > MAX_RECIPE_BYTES {
            return Err(refuse(format!("a recipe has at most {MAX_RECIPE_BYTES} bytes")));
        }
        let text = String::from_utf8(bytes)
            .map_err(|error| refuse(format!("not UTF-8 text: byte {} is wrong", error.utf8_error().valid_up_to())))?;
        Recipe::parse(name_or_path, &text)
    }

    /// Parses a recipe.
    ///
    /// # Errors
    /// [`Error::Recipe`] naming the key, its value and the accepted ones.
    pub fn parse(name: &str, text: &str) -> Result<Recipe> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Raw {
            target: Target,
            precision: Precision,
            slots: usize,
            max_sequence_tokens: Option<usize>,
            prefill_chunk_tokens: usize,
            logits_rows: usize,
            activations: Option<RawActivations>,
            #[serde(default)]
            weight_rounding: WeightRounding,
            keep_bf16: Option<Vec<LinearKind>>,
            smooth_inputs: Option<bool>,
            tensorrt: Option<TensorRtOptions>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum RawActivations {
            Float,
            Int8,
        }
        let refuse = |detail: String| Error::Recipe { name: name.into(), detail };
        let raw: Raw = toml::from_str(text).map_err(|e| refuse(e.to_string().trim_end().into()))?;
        let within = |key: &str, n: usize, most: usize| {
            let fits = (1..=most).contains(&n);
            fits.then_some(n).ok_or_else(|| refuse(format!("{key} is {n}, accepted are 1 to {most}")))
        };
        let target = raw.target.name();
        match (&raw.tensorrt, raw.target.compute_capability()) {
            (None, Some(_)) => return Err(refuse(format!("target {target} needs a section [tensorrt]"))),
            (Some(_), None) => return Err(refuse(format!("target {target} has no use for a section [tensorrt]"))),
            (Some(options), Some(_)) => {
                within("top_tokens", options.top_tokens, MOST_TOP_TOKENS)?;
                within("prefill_sequences", options.prefill_sequences, raw.slots)?;
                within("optimization_level", options.optimization_level + 1, 6).map_err(|_| {
                    refuse(format!("optimization_level is {}, accepted are 0 to 5", options.optimization_level))
                })?;
                within("tiling_optimization_level", options.tiling_optimization_level + 1, 4).map_err(|_| {
                    let level = options.tiling_optimization_level;
                    refuse(format!("tiling_optimization_level is {level}, accepted are 0 to 3"))
                })?;
                let batches = &options.decode_batches;
                if batches.first() == Some(&0) || !batches.is_sorted_by(|a, b| a < b) || batches.len() > 8 {
                    return Err(refuse(format!(
                        "decode_batches is {batches:?}, accepted are at most 8 numbers from 1 on, ascending"
                    )));
                }
                for capacity in &options.capacity_classes {
                    let fits = (64..=1 << 20).contains(capacity) && capacity % 64 == 0;
                    fits.then_some(()).ok_or_else(|| {
                        refuse(format!("capacity_classes has {capacity}, accepted are multiples of 64 from 64 on"))
                    })?;
                }
                if options.capacity_classes.len() > 8 {
                    let count = options.capacity_classes.len();
                    return Err(refuse(format!("capacity_classes has {count} entries, accepted are at most 8")));
                }
                if options.kv_cache_gib.is_empty() || options.kv_cache_gib.iter().any(|(gb, gib)| gb.min(gib) == &0) {
                    return Err(refuse("kv_cache_gib names at least one GPU's GB, each with at least 1 GiB".into()));
                }
            }
            (None, None) => {}
        }
        let recipe = Recipe {
            name: name.into(),
            target: raw.target,
            precision: raw.precision,
            slots: within("slots", raw.slots, 1024)?,
            max_sequence_tokens: match raw.max_sequence_tokens {
                Some(n) => Some(within("max_sequence_tokens", n, 1 << 20)?),
                None => None,
            },
            prefill_chunk_tokens: within("prefill_chunk_tokens", raw.prefill_chunk_tokens, 1 << 16)?,
            logits_rows: within("logits_rows", raw.logits_rows, 1 << 16)?,
            cpu: None,
            quantize_activations: raw.activations.map(|activations| matches!(activations, RawActivations::Int8)),
            weight_rounding: raw.weight_rounding,
            keep_bf16: raw.keep_bf16,
            smooth_inputs: raw.smooth_inputs.unwrap_or(true),
            tensorrt: raw.tensorrt,
            text: text.into(),
        };
        recipe.check()?;
        Ok(recipe)
    }

    /// Checks settings that may have been changed after parsing: the target must support the precision.
    ///
    /// # Errors
    /// [`Error::Recipe`] naming both, and the supported precisions.
    pub fn check(&self) -> Result<()> {
        let has_kernel = self.target == Target::Cpu && matches!(self.precision, Precision::Int8 | Precision::Int4);
        if self.quantize_activations == Some(true) && !has_kernel {
            let detail = format!(
                "activations = \"int8\" is for the target cpu in precision int8 or int4, not for {} in {}",
                self.target.name(),
                self.precision
            );
            return Err(self.refusal(detail));
        }
        match self.target.precisions().contains(&self.precision) {
            true => Ok(()),
            false => Err(self.refusal(self.unsupported())),
        }
    }

    /// That a setting of this recipe does not fit.
    pub(super) fn refusal(&self, detail: impl Into<String>) -> Error {
        Error::Recipe { name: self.name.clone(), detail: detail.into() }
    }

    /// Returns true if its weights are rounded by the inputs that their layers have on calibration prompts.
    pub fn compensates(&self) -> bool {
        self.weight_rounding == WeightRounding::Gptq && matches!(self.precision, Precision::Int4 | Precision::Fp8)
    }

    /// The linear layers that stay in BF16, in a precision that quantizes inputs: those that the recipe names, or else the
    /// ones that lose most (docs/quantization.md).
    pub fn kept_in_bf16(&self) -> &[LinearKind] {
        match (self.precision, &self.keep_bf16) {
            (precision, _) if !precision.needs_calibration() => &[],
            (_, Some(kept)) => kept,
            (Precision::Fp8, None) => &[LinearKind::QkvProj],
            (Precision::W8a8, None) => &[LinearKind::DownProj],
            (_, None) => &[],
        }
    }

    /// The CPU that a CPU plan is lowered for.
    ///
    /// # Errors
    /// As [`CpuTarget::native`], where the recipe names no CPU.
    pub fn cpu_target(&self) -> Result<CpuTarget> {
        let features = self.cpu.map_or_else(|| CpuTarget::native().map(|native| native.features), Ok)?;
        Ok(CpuTarget { features, quantize_activations: self.quantize_activations.unwrap_or(false) })
    }

    fn unsupported(&self) -> String {
        let names: Vec<String> = self.target.precisions().iter().map(Precision::to_string).collect();
        let (precision, target) = (self.precision, self.target.name());
        format!("precision {precision} is not for {target}, which takes {}", names.join(", "))
    }

    /// Sizes of the TensorRT plans within these limits, one for each capacity class, ascending.
    pub fn tensorrt_classes(&self, options: &TensorRtOptions, limits: &Limits, model: &ModelConfig) -> Vec<Sizes> {
        let prefill_tokens = self.prefill_chunk_tokens.min(limits.max_sequence_tokens);
        let largest = Sizes {
            max_sequence_tokens: limits.max_sequence_tokens,
            position_tokens: limits.max_sequence_tokens,
            decode_sequences: limits.slots,
            prefill_sequences: options.prefill_sequences,
            prefill_tokens,
            prefill_logits_rows: self.logits_rows.min(limits.max_step_tokens),
            top_tokens: options.top_tokens.min(limits.vocab_size),
        };
        let capacities = self.capacities(options, limits.max_sequence_tokens);
        let at = |capacity| largest.at_capacity(capacity, limits.slots.min(rows(options, model, capacity)));
        capacities.into_iter().map(at).collect()
    }

    /// The capacity classes for sequences of so many tokens, ascending, the longest last. Constants of a plan are on the
    /// GPU once for each plan, so with such weights there is one class.
    fn capacities(&self, options: &TensorRtOptions, max_sequence_tokens: usize) -> Vec<usize> {
        let are_constants = match self.precision {
            Precision::Int4 => true,
            Precision::Fp8 => options.fp8_weights == Fp8Choice::Constants,
            Precision::F32 | Precision::Bf16 | Precision::Int8 | Precision::W8a8 => false,
        };
        let is_below = |capacity: &usize| *capacity < max_sequence_tokens && !are_constants;
        let mut capacities: Vec<usize> = options.capacity_classes.iter().copied().filter(is_below).collect();
        capacities.sort_unstable();
        capacities.dedup();
        capacities.push(max_sequence_tokens);
        capacities
    }

    /// The ways to hold E4M3 codes to compile, the one of a plan that is not timed first.
    pub fn fp8_kinds(&self) -> &'static [Fp8Weights] {
        match (&self.tensorrt, self.precision) {
            (Some(options), Precision::Fp8) => options.fp8_weights.kinds(),
            _ => Fp8Choice::Inputs.kinds(),
        }
    }

    /// The same recipe for one way to hold E4M3 codes.
    pub fn with_fp8_weights(&self, kind: Fp8Weights) -> Recipe {
        let mut recipe = self.clone();
        if let Some(options) = &mut recipe.tensorrt {
            options.fp8_weights = kind.into();
        }
        recipe
    }

    /// Limits of a plan for this model.
    ///
    /// # Errors
    /// [`Error::Recipe`] if the recipe asks for longer sequences than the model's.
    pub fn limits(&self, model: &ModelConfig) -> Result<Limits> {
        let most = model.max_position_embeddings;
        let max_sequence_tokens = self.max_sequence_tokens.unwrap_or(most);
        if max_sequence_tokens > most {
            let detail = format!("max_sequence_tokens is {max_sequence_tokens}, but the model was trained for {most}");
            return Err(self.refusal(detail));
        }
        Ok(self.step_limits(max_sequence_tokens, model))
    }

    /// Limits of a plan for sequences of this length.
    pub(super) fn step_limits(&self, max_sequence_tokens: usize, model: &ModelConfig) -> Limits {
        let smallest = |options| self.capacities(options, max_sequence_tokens).first().copied();
        let slots = match self.tensorrt.as_ref().and_then(|options| Some((options, smallest(options)?))) {
            Some((options, smallest)) => self.slots.min(rows(options, model, smallest)),
            None => self.slots,
        };
        Limits {
            slots,
            max_sequence_tokens,
            // A decode step has one token, and one row of logits, per slot.
            max_step_tokens: self.prefill_chunk_tokens.max(slots),
            max_logits_rows: self.logits_rows.max(slots),
            vocab_size: model.vocab_size,
        }
    }
}

/// Sequences of a capacity that the largest KV cache of the recipe holds.
fn rows(options: &TensorRtOptions, model: &ModelConfig, capacity: usize) -> usize {
    // Keys and values of every layer, in BF16.
    let token_bytes = 4 * model.num_layers as u64 * model.num_kv_heads as u64 * model.head_dim as u64;
    let bytes = u64::from(options.kv_cache_gib.values().max().copied().unwrap_or(1)) << 30;
    let row = token_bytes.saturating_mul(capacity as u64).max(1);
    usize::try_from(bytes / row).unwrap_or(usize::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    const GOOD: &str = "target = 'cpu'\nprecision = 'f32'\nslots = 2\nprefill_chunk_tokens = 16\nlogits_rows = 1\n";

    #[test]
    fn the_recipes_inside_are_good() {
        for name in Recipe::built_in() {
            Recipe::load(name).unwrap();
        }
    }

    #[test]
    fn a_recipe_file_is_named_by_its_path() {
        let of_file = Recipe::parse("my.toml", GOOD).unwrap();
        assert!(!of_file.is_built_in() && Recipe::load("cpu").unwrap().is_built_in());
        let int8 = Recipe { quantize_activations: Some(true), ..of_file };
        assert!(int8.check().unwrap_err().to_string().starts_with("recipe my.toml: activations = \"int8\" is for"));
    }

    #[test]
    fn layers_are_known_by_their_weights() {
        let kinds = [LinearKind::QkvProj, LinearKind::OProj, LinearKind::UpProj, LinearKind::DownProj];
        let of = |name: &str| kinds.into_iter().filter(|kind| kind.is_of(name)).collect::<Vec<_>>();
        assert_eq!(of("layers.0.attention.qkv.weight"), [LinearKind::QkvProj]);
        assert_eq!(of("model.layers.3.self_attn.o_proj.weight"), [LinearKind::OProj]);
        assert_eq!(of("model.layers.3.mlp.up_proj.weight"), [LinearKind::UpProj]);
        assert_eq!(of("model.layers.31.mlp.down_proj.weight"), [LinearKind::DownProj]);
        assert_eq!(of("lm_head.weight"), []);
    }

    #[test]
    fn constants_have_one_class() {
        let model = Checkpoint::open(Path::new("tests/data/tiny-chat")).unwrap().config().clone();
        let mut recipe = Recipe::load("h100").unwrap();
        assert_eq!(recipe.fp8_kinds(), [Fp8Weights::Inputs, Fp8Weights::Constants]);
        let classes = |recipe: &Recipe| {
            let options = recipe.tensorrt.as_ref().unwrap();
            recipe.tensorrt_classes(options, &recipe.limits(&model).unwrap(), &model).len()
        };
        recipe.tensorrt.as_mut().unwrap().capacity_classes = vec![64, 128];
        assert_eq!(classes(&recipe.with_fp8_weights(Fp8Weights::Inputs)), 3);
        assert_eq!(classes(&recipe), 3, "until it is timed, as inputs");
        assert_eq!(classes(&recipe.with_fp8_weights(Fp8Weights::Constants)), 1);
        recipe.precision = Precision::Bf16;
        assert_eq!(classes(&recipe.with_fp8_weights(Fp8Weights::Constants)), 3, "only codes of fp8 are constants");
        assert_eq!(recipe.fp8_kinds(), [Fp8Weights::Inputs]);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(Recipe::parse("r", GOOD).is_ok());
        let refused = |text: String| Recipe::parse("r", &text).unwrap_err().to_string();
        assert!(refused(GOOD.replace("slots = 2", "slots = 0")).contains("slots is 0, accepted are 1 to"));
        assert!(refused(GOOD.replace("'f32'", "'fp64'")).contains("fp64"));
        assert!(refused(GOOD.replace("'cpu'", "'tpu'")).contains("tpu"));
        assert!(refused(format!("{GOOD}speed = 9\n")).contains("speed"));
        assert!(refused(GOOD.replace("slots = 2\n", "")).contains("slots"));
        assert!(refused(format!("{GOOD}weight_rounding = 'up'\n")).contains("expected `nearest` or `gptq`"));
        assert!(refused(format!("{GOOD}keep_bf16 = ['gate_proj']\n")).contains("gate_proj"));
        let a100 = Recipe::load("a100").unwrap().text;
        let refused_gpu = |from: &str, to: &str| refused(a100.replace(from, to));
        assert!(
            refused_gpu("precision = \"bf16\"", "precision = \"fp8\"")
                .contains("fp8 is not for a100, which takes bf16")
        );
        assert!(refused_gpu("optimization_level = 4", "optimization_level = 6").contains("6, accepted are 0 to 5"));
        assert!(refused_gpu("[tensorrt]", "[tensorrt]\nfp8_weights = 'some'").contains("expected one of `inputs`"));
        let error = refused_gpu("tiling_optimization_level = 0", "tiling_optimization_level = 4");
        assert!(error.contains("tiling_optimization_level is 4, accepted are 0 to 3"), "{error}");
        for wrong in ["[0, 8]", "[8, 8]", "[2, 3, 4, 5, 6, 7, 8, 9, 10]"] {
            let error = refused_gpu("decode_batches = [2, 8, 32, 128]", &format!("decode_batches = {wrong}"));
            assert!(error.contains(&format!("decode_batches is {wrong}, accepted are")), "{error}");
        }
        assert!(refused_gpu("top_tokens = 64", "top_tokens = 4000").contains("top_tokens is 4000"));
        assert!(refused_gpu("40 = 16", "big = 16").contains("big"));
        assert!(refused_gpu("40 = 16", "40 = 0").contains("kv_cache_gib"));
        assert!(refused(GOOD.replace("'cpu'", "'a100'").replace("f32", "bf16")).contains("needs a section [tensorrt]"));
        assert!(
            Recipe::load("nonesuch")
                .unwrap_err()
                .to_string()
                .contains("the recipes are: cpu, cpu-fast, cpu-small, a100, h100")
        );
    }
}
