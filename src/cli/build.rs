//! `aotron build`: a checkpoint becomes an engine package.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use aotron::compile::{self, BuildRequest, BuildSummary, Precision, Recipe};
use aotron::engine::Package;

use super::args::count;
use super::term::{self, Stages};

/// What to build, from what, to where.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Checkpoint: the folder that was downloaded
    checkpoint: PathBuf,
    /// What to build for: the name of a recipe, or a file with one
    #[arg(long, value_name = "NAME|FILE", default_value = "cpu")]
    recipe: String,
    /// Number format of weights; of the KV cache too, which the 8- and 4-bit ones keep in bf16 [default: the recipe's]
    #[arg(long, value_parser = precision, value_name = "f32|bf16|int8|int4|fp8")]
    precision: Option<Precision>,
    /// Longest sequence, prompt and answer together [default: the model's]
    #[arg(long, value_name = "N", value_parser = count(1 << 20))]
    max_sequence_tokens: Option<usize>,
    /// Sequences at once [default: the recipe's]
    #[arg(long, value_name = "N", value_parser = count(1024))]
    slots: Option<usize>,
    /// Prompts that fp8 takes the ranges of activations from: lines of JSON, {"messages": [{"role", "content"}, …]} or
    /// {"token_ids": […]} [default: built-in conversations]
    #[arg(long, value_name = "FILE.jsonl")]
    calibration: Option<PathBuf>,
    /// Where the engine package goes [default: engines/ and the checkpoint's name]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace the engine package that is there
    #[arg(long)]
    force: bool,
    /// Print what each pass of the compiler did
    #[arg(short, long)]
    verbose: bool,
}

impl Flags {
    fn request(&self) -> aotron::Result<BuildRequest> {
        let mut recipe = Recipe::load(&self.recipe)?;
        let mut overridden = Vec::new();
        if let Some(precision) = self.precision {
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
        // The package keeps the recipe's text, so it has to say what was not taken from there.
        for line in overridden {
            recipe.text.push_str(&format!("\n# On the command line: {line}\n"));
        }
        let output = self.output.clone().unwrap_or_else(|| compile::default_output(&self.checkpoint));
        let calibration = self.calibration.clone();
        Ok(BuildRequest { checkpoint: self.checkpoint.clone(), recipe, output, replace: self.force, calibration })
    }
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let started = Instant::now();
    let request = flags.request()?;
    let stages = Stages::new();
    let summary = compile::build(&request, &stages)?;
    stages.finish();
    if flags.verbose {
        for report in &summary.reports {
            let _ = writeln!(std::io::stderr(), "{report}");
        }
    }
    let took = term::duration(started.elapsed());
    print(&summary, &request.recipe, &took)
}

fn print(summary: &BuildSummary, recipe: &Recipe, took: &str) -> anyhow::Result<()> {
    let BuildSummary { package: path, bytes, limits, kv_bytes_per_token, .. } = summary;
    let package = Package::open(path)?;
    let per_token = *kv_bytes_per_token as u64;
    let per_sequence = per_token * limits.max_sequence_tokens as u64;
    let next = match package.manifest().tokenizer {
        Some(_) => format!("aotron chat {}", shell_word(path)),
        None => format!("aotron run {} --token-ids 1,2,3", shell_word(path)),
    };
    let style = term::on_stdout();
    let mut out = std::io::stdout().lock();
    let (target, precision) = (recipe.target.name(), recipe.precision);
    writeln!(out, "{} for {target} in {precision}, in {took}", style.bold(path.display()))?;
    let mut line = |name: &str, text: String| writeln!(out, "  {} {text}", style.dim(format!("{name:<10}")));
    line("size", format!("{} on disk", term::bytes(*bytes)))?;
    let sequences = term::plural(limits.slots, "sequence");
    line("limits", format!("{sequences} of {} tokens, prompt and answer together", limits.max_sequence_tokens))?;
    line(
        "KV memory",
        format!(
            "{} for a sequence of {} tokens, {per_token} bytes a token; {} for all {}",
            term::bytes(per_sequence),
            limits.max_sequence_tokens,
            term::bytes(per_sequence * limits.slots as u64),
            limits.slots
        ),
    )?;
    line("next", next)?;
    Ok(())
}

/// A path to paste into a shell.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) && !text.starts_with('-') {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A precision by its name.
pub fn precision(name: &str) -> Result<Precision, String> {
    Precision::ALL.into_iter().find(|precision| precision.to_string() == name).ok_or_else(|| {
        let names: Vec<String> = Precision::ALL.iter().map(Precision::to_string).collect();
        format!("expected one of {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_a_shell() {
        assert_eq!(shell_word(Path::new("engines/tiny-chat")), "engines/tiny-chat");
        assert_eq!(shell_word(Path::new("my engine's")), r"'my engine'\''s'");
    }
}
