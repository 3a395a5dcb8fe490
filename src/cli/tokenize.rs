//! `aotron tokenize`: the ids of a text.

use std::io::Write;
use std::path::PathBuf;

use anyhow::bail;
use aotron::compile::{checkpoint_tokenizer, open_checkpoint};
use aotron::engine::{Package, is_package};
use aotron::text::{Message, NemotronMarkers};

use super::term::Stages;

/// Which text, and whose tokens.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Engine package or checkpoint
    #[arg(value_name = "ENGINE|CHECKPOINT")]
    path: PathBuf,
    /// The text
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: String,
    /// Encode the text as it is, not as a user's message in the chat template
    #[arg(long)]
    raw: bool,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let tokenizer = if is_package(&flags.path) {
        Package::open(&flags.path)?.tokenizer()?
    } else {
        checkpoint_tokenizer(&open_checkpoint(&flags.path, &Stages::new())?)?.map(|(_, tokenizer)| tokenizer)
    };
    let Some(tokenizer) = tokenizer else {
        bail!("{} has no tokenizer", flags.path.display());
    };
    let text = if flags.raw {
        flags.text.clone()
    } else {
        NemotronMarkers::default().render(&[Message::user(&flags.text)])?
    };
    let ids = tokenizer.encode(&text)?;
    let pieces: Vec<Option<String>> = ids.iter().map(|id| tokenizer.piece(*id)).collect();
    let json = serde_json::json!({"ids": ids, "pieces": pieces});
    Ok(writeln!(std::io::stdout().lock(), "{json}")?)
}
