//! Recipes: what to build for a target. The ones that ship are `engines/*.toml`.

use std::path::Path;

use serde::Deserialize;

use super::passes::Precision;
use crate::backend::Limits;
use crate::checkpoint::ModelConfig;
use crate::error::{Error, Result};

/// A recipe is refused past this size.
const MAX_RECIPE_BYTES: u64 = 1 << 20;
/// The recipes inside the program, by name.
const BUILT_IN: &[(&str, &str)] = &[("cpu", include_str!("../../engines/cpu.toml"))];

/// What to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// What the plan runs on.
    pub target: Target,
    /// How it computes.
    pub precision: Precision,
    /// Sequences at once.
    pub slots: usize,
    /// Tokens per sequence; `None` takes the model's.
    pub max_sequence_tokens: Option<usize>,
    /// New tokens per step.
    pub prefill_chunk_tokens: usize,
    /// Rows of logits per step.
    pub logits_rows: usize,
    /// The text it was read from.
    pub text: String,
}

/// What a plan runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Any CPU.
    Cpu,
}

impl Target {
    /// The name in recipes, manifests and file names.
    pub fn name(self) -> &'static str {
        match self {
            Target::Cpu => "cpu",
        }
    }
}

impl Recipe {
    /// Names of the recipes inside the program.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// A recipe inside the program by its name, or else the file of that path.
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
        let bytes = std::fs::metadata(path).map_err(Error::io("look at", path))?.len();
        if bytes > MAX_RECIPE_BYTES {
            let detail = format!("the file has {bytes} bytes, a recipe has at most {MAX_RECIPE_BYTES}");
            return Err(Error::Recipe { name: name_or_path.into(), detail });
        }
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        Recipe::parse(name_or_path, &text)
    }

    /// Reads a recipe's text.
    ///
    /// # Errors
    /// [`Error::Recipe`] naming the key, what it is and what is accepted.
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
        }
        let refuse = |detail: String| Error::Recipe { name: name.into(), detail };
        let raw: Raw = toml::from_str(text).map_err(|e| refuse(e.to_string().trim_end().into()))?;
        let within = |key: &str, n: usize, most: usize| {
            let fits = (1..=most).contains(&n);
            fits.then_some(n).ok_or_else(|| refuse(format!("{key} is {n}, accepted are 1 to {most}")))
        };
        Ok(Recipe {
            target: raw.target,
            precision: raw.precision,
            slots: within("slots", raw.slots, 1024)?,
            max_sequence_tokens: match raw.max_sequence_tokens {
                Some(n) => Some(within("max_sequence_tokens", n, 1 << 20)?),
                None => None,
            },
            prefill_chunk_tokens: within("prefill_chunk_tokens", raw.prefill_chunk_tokens, 1 << 16)?,
            logits_rows: within("logits_rows", raw.logits_rows, 1 << 16)?,
            text: text.into(),
        })
    }

    /// The limits of a plan for this model.
    ///
    /// # Errors
    /// [`Error::Recipe`] if the recipe asks for longer sequences than the model's.
    pub fn limits(&self, model: &ModelConfig) -> Result<Limits> {
        let most = model.max_position_embeddings;
        let max_sequence_tokens = self.max_sequence_tokens.unwrap_or(most);
        if max_sequence_tokens > most {
            let detail = format!("max_sequence_tokens is {max_sequence_tokens}, but the model was trained for {most}");
            return Err(Error::Recipe { name: self.target.name().into(), detail });
        }
        Ok(Limits {
            slots: self.slots,
            max_sequence_tokens,
            // A decode step has one token, and one row of logits, per slot.
            max_step_tokens: self.prefill_chunk_tokens.max(self.slots),
            max_logits_rows: self.logits_rows.max(self.slots),
            vocab_size: model.vocab_size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "target = 'cpu'\nprecision = 'f32'\nslots = 2\nprefill_chunk_tokens = 16\nlogits_rows = 1\n";

    #[test]
    fn the_recipes_inside_are_good() {
        for name in Recipe::built_in() {
            Recipe::load(name).unwrap();
        }
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
        assert!(Recipe::load("nonesuch").unwrap_err().to_string().contains("the recipes are: cpu"));
    }
}
