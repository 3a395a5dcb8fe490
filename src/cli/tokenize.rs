//! `aotron tokenize`: the token ids of a text or a conversation.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use aotron::compile::{CheckpointText, open_checkpoint};
use aotron::engine::{Package, is_package};
use aotron::text::{ChatFormat, Message, Tokenizer};
use serde_json::Value;

use super::args::ChatFlags;
use super::prompt::read_file;
use super::term::{self, Stages};

/// Flags of `aotron tokenize`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    /// Engine package or checkpoint
    #[arg(value_name = "ENGINE|CHECKPOINT")]
    path: PathBuf,
    /// Text to encode
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, required_unless_present = "messages")]
    text: Option<String>,
    /// Conversation to encode: a JSON file with a list of {"role", "content"}, `-` for standard input
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["text", "raw"])]
    messages: Option<PathBuf>,
    /// Encode the text itself, not as a user message in the chat template
    #[arg(long, conflicts_with_all = ["chat_format", "escape_markers"])]
    raw: bool,
    #[command(flatten)]
    chat: ChatFlags,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let (tokenizer, format) = open(flags)?;
    let ids = match (&flags.messages, &flags.text) {
        (Some(path), _) => {
            let messages = messages(path)?;
            flags.chat.apply(&format, &tokenizer)?.prompt_of_json(&tokenizer, &messages)?
        }
        (None, Some(text)) if flags.raw => tokenizer.encode(text)?,
        (None, text) => {
            let message = Message::user(text.as_deref().unwrap_or_default());
            flags.chat.apply(&format, &tokenizer)?.prompt(&tokenizer, &[message])?
        }
    };
    let pieces: Vec<Option<String>> = ids.iter().map(|id| tokenizer.piece(*id)).collect();
    let json = serde_json::json!({"ids": ids, "pieces": pieces});
    Ok(writeln!(std::io::stdout().lock(), "{json}")?)
}

fn open(flags: &Flags) -> anyhow::Result<(Tokenizer, ChatFormat)> {
    let (tokenizer, format) = if is_package(&flags.path) {
        let package = Package::open(&flags.path)?;
        (package.tokenizer()?, package.manifest().chat_format.clone())
    } else {
        let checkpoint = open_checkpoint(&flags.path, &Stages::new())?;
        // The chosen format affects what the tokenizer treats as a marker.
        let text = CheckpointText::of(&checkpoint, flags.chat.chat_format.as_deref())?;
        text.refusals.iter().for_each(|reason| term::warn(term::harmless(reason)));
        (text.tokenizer.map(|(_, tokenizer)| tokenizer), text.format)
    };
    let Some(tokenizer) = tokenizer else {
        bail!("{} has no tokenizer", flags.path.display());
    };
    Ok((tokenizer, format))
}

/// A list of messages, at the top level or under the key `messages`.
fn messages(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = read_file(path)?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    let list = match json {
        Value::Object(mut object) => object.swap_remove("messages"),
        other => Some(other),
    };
    match list {
        Some(Value::Array(messages)) if messages.iter().all(Value::is_object) => Ok(messages),
        _ => bail!("{} is not a list of messages such as {{\"role\": \"user\", \"content\": \"Hi\"}}", path.display()),
    }
}
