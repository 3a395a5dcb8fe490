//! Command-line arguments, and groups of flags shared by several commands.

use std::path::{Path, PathBuf};

use aotron::engine::Package;
use aotron::isa::Isa;
use aotron::runtime::SamplingParams;
use aotron::text::{ChatFormat, ChatTemplate, Tokenizer};
use clap::error::ErrorKind;
use clap::{Parser, Subcommand, ValueEnum};

#[cfg(feature = "serve")]
use super::serve;
use super::{bench, build, chat, doctor, inspect, run, score, shell, term, tokenize, verify};

/// Compiles Nemotron chat models ahead of time and runs them.
#[derive(Debug, Parser)]
#[command(name = "aotron", version, arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compile a checkpoint into an engine package
    Build(build::Flags),
    /// Talk with a model
    Chat(chat::Flags),
    /// Answer one prompt
    Run(run::Flags),
    /// Serve engines over HTTP, to clients of OpenAI's API
    #[cfg(feature = "serve")]
    Serve(serve::Flags),
    /// Compute the probabilities of given token ids, and their logits
    Score(score::Flags),
    /// Show the token ids of a text or a conversation
    Tokenize(tokenize::Flags),
    /// Show the contents of an engine package or a checkpoint
    Inspect(inspect::Flags),
    /// Compare a plan's answers with each other and with the CPU's
    Verify(verify::Flags),
    /// Measure prefill and decode speed
    Bench(bench::Flags),
    /// Report what this machine can build and run
    Doctor(doctor::Flags),
    /// Print shell completions
    Completions(shell::CompletionFlags),
    /// Print the manual page
    Man(shell::ManFlags),
}

/// Output format of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// Flags that select an engine and configure its execution.
#[derive(Debug, clap::Args)]
pub struct EngineFlags {
    /// Engine package, a folder written by `aotron build`
    pub engine: PathBuf,
    #[command(flatten)]
    pub pin: PinFlags,
    /// CPU threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = count(1024), allow_negative_numbers = true)]
    pub threads: Option<usize>,
    /// Instruction set of the CPU kernels
    #[arg(long, value_name = "NAME", hide = true, value_parser = isa)]
    pub isa: Option<Isa>,
    /// Target whose plan to run: cpu, a100, h100 [default: that of a GPU in this machine, otherwise cpu]
    #[arg(long, value_name = "NAME")]
    pub target: Option<String>,
    /// Index of the GPU to run on [default: the first one that a plan was compiled for]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub device: Option<usize>,
    /// Read the weights of a CPU plan into memory instead of mapping their file, which may then be changed or removed
    #[arg(long)]
    pub copy_weights: bool,
    /// Run a GPU plan that has not been verified on this card, driver and library
    #[arg(long)]
    pub accept_unverified: bool,
    /// Start at once, and compile the GPU's kernels when they are first needed
    #[arg(long)]
    pub lazy_kernels: bool,
    /// Launch the GPU's kernels one by one rather than as CUDA graphs
    #[arg(long, hide = true)]
    pub no_cuda_graphs: bool,
}

/// Flags that pin an engine package.
#[derive(Debug, Default, clap::Args)]
pub struct PinFlags {
    /// Refuse the package unless its manifest has this SHA-256, which `aotron inspect` shows
    #[arg(long, value_name = "SHA256", value_parser = sha256)]
    pub expect: Option<String>,
}

impl PinFlags {
    /// Opens a package and checks that it is the one expected, if any is.
    pub fn open(&self, path: &Path) -> aotron::Result<Package> {
        let package = Package::open(path)?;
        self.expect.iter().try_for_each(|sha256| package.expect(sha256))?;
        Ok(package)
    }

    /// Refuses to pin a checkpoint.
    pub fn refuse_checkpoint(&self, path: &Path) -> anyhow::Result<()> {
        match self.expect {
            Some(_) => Err(usage(format!("--expect is for engine packages, and {} is none", path.display()))),
            None => Ok(()),
        }
    }
}

/// Flags for the chat format.
#[derive(Debug, clap::Args)]
pub struct ChatFlags {
    #[arg(long, value_name = "NAME|FILE.jinja", help = chat_format_help("the package's"))]
    pub chat_format: Option<String>,
    /// Encode markers and special tokens in messages as plain text
    #[arg(long)]
    pub escape_markers: bool,
}

/// Help of `--chat-format`, which replaces the format `of` a package or checkpoint.
pub fn chat_format_help(of: &str) -> String {
    let names = ChatTemplate::built_in_names().join(", ");
    format!(
        "Chat format instead of {of}: {names}, the name of one of the checkpoint's templates, or a template file; raw \
         is no template"
    )
}

impl ChatFlags {
    /// The chosen format, or else the package's, and the tokenizer for it. A format that this tokenizer cannot express is
    /// refused.
    pub fn open(&self, package: &Package) -> aotron::Result<(ChatFormat, Option<Tokenizer>)> {
        let (format, tokenizer) = self.open_unchecked(package)?;
        if let (Some(tokenizer), Some(_)) = (&tokenizer, &self.chat_format) {
            let problems = format.problems(tokenizer);
            problems.warnings.iter().for_each(term::warn);
            problems.refuse()?;
        }
        Ok((format, tokenizer))
    }

    /// As [`ChatFlags::open`], for showing what a format does to a text.
    pub fn open_unchecked(&self, package: &Package) -> aotron::Result<(ChatFormat, Option<Tokenizer>)> {
        let (mut format, tokenizer) = package.text(self.chat_format.as_deref())?;
        format.escape_markers = self.escape_markers;
        Ok((format, tokenizer))
    }
}

/// Sampling flags. Without any, the package's defaults apply, which are greedy unless its checkpoint samples.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling (default: the package's settings, usually greedy)")]
pub struct SamplingFlags {
    /// Divide the logits by X; below 1 is more predictable, 0 is greedy
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample from the K most likely tokens; 1 is greedy, 0 is off
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<u32>,
    /// Sample from the most likely tokens that together have probability P; 1 is off
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Sample from tokens at least P times as likely as the most likely one
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Penalize tokens in the prompt or the answer by factor X; 1 is off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtract X from the logits of tokens in the answer
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtract X from a token's logit for each time it is in the answer
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Add BIAS to the logit of token ID; can be repeated
    #[arg(long, value_name = "ID=BIAS", value_parser = bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Choose no id that ends the answer before it has N tokens; stop strings still end it
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub min_tokens: Option<usize>,
    /// Seed of the random choices, to make them repeatable
    #[arg(long, value_name = "SEED", allow_negative_numbers = true)]
    pub seed: Option<u64>,
}

impl SamplingFlags {
    /// The resulting settings, without those that have no effect. Flags not given are taken from the package's
    /// `default`; `vocab_size` is the number of ids that can be chosen.
    pub fn params(&self, default: &SamplingParams, vocab_size: usize) -> anyhow::Result<SamplingParams> {
        let params = self.over(default).effective();
        params.validate(vocab_size).map_err(|error| match error {
            aotron::Error::Request(detail) => usage(detail),
            other => other.into(),
        })?;
        Ok(params)
    }

    fn over(&self, default: &SamplingParams) -> SamplingParams {
        let mut params = default.clone();
        params.temperature = self.temperature.or(default.temperature);
        params.top_k = self.top_k.or(default.top_k);
        params.top_p = self.top_p.or(default.top_p);
        params.min_p = self.min_p.or(default.min_p);
        params.repetition_penalty = self.repetition_penalty.or(default.repetition_penalty);
        params.presence_penalty = self.presence_penalty.or(default.presence_penalty);
        params.frequency_penalty = self.frequency_penalty.or(default.frequency_penalty);
        params.logit_bias = self.logit_bias.clone();
        params.min_tokens = self.min_tokens.or(default.min_tokens);
        params.seed = self.seed;
        params
    }

    /// A sentence that names flags that were given but have no effect.
    pub fn without_effect(&self, default: &SamplingParams) -> Option<String> {
        let given = [
            ("temperature", self.temperature.is_some()),
            ("top_k", self.top_k.is_some()),
            ("top_p", self.top_p.is_some()),
            ("min_p", self.min_p.is_some()),
            ("seed", self.seed.is_some()),
        ];
        let idle = self.over(default).without_effect();
        let idle = given.iter().filter(|(name, given)| *given && idle.contains(name));
        let idle: Vec<String> = idle.map(|(name, _)| format!("--{}", name.replace('_', "-"))).collect();
        (!idle.is_empty()).then(|| {
            let verb = if idle.len() == 1 { "has" } else { "have" };
            format!("{} {verb} no effect: the most likely token is always taken", idle.join(", "))
        })
    }
}

/// Returns a parser for numbers from 1 to `most`.
pub fn count(most: u64) -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser;
    clap::value_parser!(u64).range(1..=most).map(|n| usize::try_from(n).unwrap_or(usize::MAX))
}

/// Parses a number of bytes: `0`, `1048576`, `512MiB`, `1.5GiB`.
#[cfg(feature = "serve")]
pub fn size(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..).unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "b" => Some(1u64),
        "kib" => Some(1 << 10),
        "mib" => Some(1 << 20),
        "gib" => Some(1 << 30),
        "tib" => Some(1 << 40),
        _ => None,
    };
    let number = digits.parse::<f64>().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit() || b == b'.'));
    match (number, unit) {
        (Some(number), Some(unit)) => Ok((number * unit as f64) as usize),
        _ => Err("expected a size such as 512MiB or 8GiB, or 0".into()),
    }
}

/// An error about the arguments that parsing alone cannot detect; exit code 2.
pub fn usage(message: impl std::fmt::Display) -> anyhow::Error {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{message}\n")).into()
}

fn isa(name: &str) -> Result<Isa, String> {
    Isa::by_name(name).ok_or_else(|| {
        let names: Vec<String> = Isa::available().iter().map(ToString::to_string).collect();
        format!("this machine has {}", names.join(", "))
    })
}

fn sha256(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    match digits.len() == 64 && digits.chars().all(|c| c.is_ascii_hexdigit()) {
        true => Ok(digits.to_ascii_lowercase()),
        false => Err("expected 64 hexadecimal digits".into()),
    }
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let expected = "expected a token id, `=` and a number, such as 42=-1.5";
    let (id, bias) = text.split_once('=').ok_or(expected)?;
    Ok((id.trim().parse().map_err(|_| expected)?, bias.trim().parse().map_err(|_| expected)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        sampling: SamplingFlags,
    }

    fn greedy() -> SamplingParams {
        SamplingParams::default()
    }

    #[cfg(feature = "serve")]
    #[test]
    fn sizes_are_numbers_with_a_unit_or_bytes() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("12b", 12), ("64KiB", 65536), ("1.5gib", 3 << 29), ("2MiB", 2 << 20)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "1 GiB", "2GB", "1e9", "inf", "..1MiB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn flags_change_the_packages_settings_one_by_one() {
        let package = SamplingParams::sampled(0.6).top_p(0.9);
        assert_eq!(flags("").params(&package, 9).unwrap(), package);
        let warmer = flags("--temperature 0.8").params(&package, 9).unwrap();
        assert_eq!((warmer.temperature, warmer.top_p), (Some(0.8), Some(0.9)));
        assert!(flags("--temperature 0").params(&package, 9).unwrap().is_greedy());
        assert_eq!(flags("--top-p 0.5").without_effect(&package), None);
    }

    fn flags(text: &str) -> SamplingFlags {
        Only::try_parse_from(format!("x {text}").split_whitespace()).unwrap().sampling
    }

    #[test]
    fn the_definition_is_sound() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn nothing_set_is_greedy_and_each_flag_alone_is_not() {
        assert_eq!(flags("").params(&greedy(), 9).unwrap(), SamplingParams::default());
        assert!(flags("").params(&greedy(), 9).unwrap().is_greedy());
        for text in ["--temperature 0.7", "--top-k 40", "--top-p 0.9", "--min-p 0.1"] {
            assert!(!flags(text).params(&greedy(), 9).unwrap().is_greedy(), "{text}");
            assert_eq!(flags(text).without_effect(&greedy()), None, "{text}");
        }
        for text in ["--temperature 0", "--top-k 1", "--top-p 0", "--repetition-penalty 1.1 --logit-bias 3=-1"] {
            assert!(flags(text).params(&greedy(), 9).unwrap().is_greedy(), "{text}");
            assert_eq!(flags(text).without_effect(&greedy()), None, "{text}");
        }
    }

    #[test]
    fn flags_without_effect_are_named() {
        let idle = |text: &str| flags(text).without_effect(&greedy()).unwrap();
        assert!(idle("--seed 1").starts_with("--seed has no effect"));
        assert!(idle("--top-k 1 --temperature 0.7").starts_with("--temperature has"));
        assert!(idle("--temperature 0 --top-p 0.9 --seed 3").starts_with("--top-p, --seed have"));
    }

    #[test]
    fn a_negative_count_is_a_wrong_value_not_a_flag() {
        for text in ["--top-k -1", "--seed -1", "--min-tokens -1", "--logit-bias -1=2"] {
            let error = Only::try_parse_from(format!("x {text}").split_whitespace()).unwrap_err().to_string();
            assert!(error.contains("invalid value '-1") && !error.contains("tip:"), "{error}");
        }
        let error = flags("--top-p 1.5").params(&greedy(), 9).unwrap_err();
        assert!(error.is::<clap::Error>() && error.to_string().contains("top_p is 1.5"), "{error}");
    }

    #[test]
    fn every_built_in_chat_format_is_in_the_help() {
        let help = chat_format_help("the package's");
        assert!(ChatTemplate::built_in_names().iter().all(|name| help.contains(name)), "{help}");
    }

    #[test]
    fn a_bias_is_an_id_and_a_number() {
        assert_eq!(flags("--logit-bias 7=-2.5 --logit-bias 8=1").logit_bias, [(7, -2.5), (8, 1.0)]);
        for text in ["7", "7=", "=1", "-1=2", "x=1"] {
            assert!(bias(text).is_err(), "{text}");
        }
    }
}
