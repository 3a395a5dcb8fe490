//! `aotron tokenize`: the token ids of a text or a conversation.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use aotron::compile::{CheckpointText, open_checkpoint};
use aotron::engine::is_package;
use aotron::text::{ChatFormat, FormatProblems, Message, Tokenizer};
use serde_json::Value;

use super::args::{ChatFlags, PinFlags};
use super::prompt::{input_name, read_file};
use super::term::{self, Stages};

/// Flags of `aotron tokenize`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["text", "messages"]))]
pub struct Flags {
    /// Engine package or checkpoint
    #[arg(value_name = "ENGINE|CHECKPOINT")]
    path: PathBuf,
    /// Text to encode
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// Conversation to encode: a JSON file with a list of {"role", "content"}, `-` for standard input
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["text", "raw"])]
    messages: Option<PathBuf>,
    /// Encode the text itself, not as a user message in the chat template
    #[arg(long, conflicts_with_all = ["chat_format", "escape_markers"])]
    raw: bool,
    #[command(flatten)]
    chat: ChatFlags,
    #[command(flatten)]
    pin: PinFlags,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let (tokenizer, format) = open(flags)?;
    let ids = match (&flags.messages, &flags.text) {
        (Some(path), _) => {
            let messages = messages(path)?;
            format.prompt_of_json(&tokenizer, &messages)?
        }
        (None, Some(text)) if flags.raw => tokenizer.encode(text)?,
        (None, text) => {
            let message = Message::user(text.as_deref().unwrap_or_default());
            format.prompt(&tokenizer, &[message])?
        }
    };
    let pieces: Vec<Option<String>> = ids.iter().map(|id| tokenizer.piece(*id)).collect();
    let json = serde_json::json!({"ids": ids, "pieces": pieces});
    Ok(writeln!(term::stdout(), "{json}")?)
}

/// The chosen chat format and its tokenizer. A format that the tokenizer cannot express is shown all the same.
fn open(flags: &Flags) -> anyhow::Result<(Tokenizer, ChatFormat)> {
    let (format, tokenizer, problems) = if is_package(&flags.path) {
        let (format, tokenizer) = flags.chat.open_unchecked(&flags.pin.open(&flags.path)?)?;
        let chosen = tokenizer.as_ref().filter(|_| flags.chat.chat_format.is_some());
        let FormatProblems { warnings, refusals, .. } =
            chosen.map(|tokenizer| format.problems(tokenizer)).unwrap_or_default();
        (format, tokenizer, [warnings, refusals].concat())
    } else {
        flags.pin.refuse_checkpoint(&flags.path)?;
        let checkpoint = open_checkpoint(&flags.path, &Stages::new())?;
        let text = CheckpointText::of(&checkpoint, flags.chat.chat_format.as_deref())?;
        let format = ChatFormat { escape_markers: flags.chat.escape_markers, ..text.format };
        (format, text.tokenizer.map(|(_, tokenizer)| tokenizer), text.refusals)
    };
    problems.iter().for_each(term::warn);
    let Some(tokenizer) = tokenizer else {
        bail!("{} has no tokenizer", flags.path.display());
    };
    Ok((tokenizer, format))
}

/// A list of messages, at the top level or under the key `messages`.
fn messages(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = read_file(path)?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", input_name(path)))?;
    let list = match json {
        Value::Object(mut object) => object.swap_remove("messages"),
        other => Some(other),
    };
    match list {
        Some(Value::Array(messages)) if messages.iter().all(Value::is_object) => Ok(messages),
        _ => {
            bail!("{} is not a list of messages such as {{\"role\": \"user\", \"content\": \"Hi\"}}", input_name(path))
        }
    }
}
