//! Sources of the prompt of `aotron run`.

use std::io::{BufRead, IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};

use super::args::usage;

/// Limit on the size of a prompt: more would not fit any model.
const MAX_PROMPT_BYTES: u64 = 16 << 20;

/// Name of standard input in messages.
const STDIN: &str = "standard input";

/// Prompt flags: exactly one of them, or piped standard input.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub struct PromptFlags {
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Read the prompt from FILE, `-` for standard input [default: standard input, unless it is a terminal]
    #[arg(short = 'f', long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// The prompt's token ids, comma-separated; nothing is added to them
    #[arg(long, value_name = "IDS", value_parser = token_ids, conflicts_with_all = ["raw", "bos", "system"])]
    token_ids: Option<TokenIds>,
}

/// A list of ids as a single argument.
#[derive(Debug, Clone)]
struct TokenIds(Vec<u32>);

/// A prompt.
#[derive(Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    TokenIds(Vec<u32>),
}

impl PromptFlags {
    /// Reads the prompt. A byte order mark at its start is dropped and, with `as_message`, so is the line break at the end
    /// of a file.
    pub fn read(&self, as_message: bool) -> anyhow::Result<Prompt> {
        if let Some(text) = &self.prompt {
            return Ok(Prompt::Text(without_byte_order_mark(text).to_owned()));
        }
        if let Some(ids) = &self.token_ids {
            return Ok(Prompt::TokenIds(ids.0.clone()));
        }
        let mut text = match &self.prompt_file {
            Some(path) => read_file(path)?,
            None => {
                let stdin = std::io::stdin().lock();
                let text = if stdin.is_terminal() { String::new() } else { text_of(stdin, STDIN)? };
                if text.is_empty() {
                    let message = "there is no prompt: pass --prompt, --prompt-file or --token-ids, or pipe one in";
                    return Err(usage(message));
                }
                text
            }
        };
        if as_message && text.ends_with('\n') {
            text.pop();
            if text.ends_with('\r') {
                text.pop();
            }
        }
        Ok(Prompt::Text(text))
    }
}

/// The name in messages of what [`read_file`] reads.
pub fn input_name(path: &Path) -> String {
    if path == Path::new("-") { STDIN.to_owned() } else { path.display().to_string() }
}

/// Reads a text file, `-` for standard input.
pub fn read_file(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        return text_of(std::io::stdin().lock(), STDIN);
    }
    let file = std::fs::File::open(path).map_err(aotron::Error::io("open", path))?;
    text_of(file, &input_name(path))
}

/// Strips the byte order mark that some editors put at the start of a file.
pub fn without_byte_order_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Parses `1,2,3`; spaces and brackets are allowed.
fn token_ids(text: &str) -> Result<TokenIds, String> {
    let text = text.trim();
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let id = |part: &str| part.trim().parse().map_err(|_| format!("`{}` is not a token id", part.trim()));
    inner.split(',').map(id).collect::<Result<_, _>>().map(TokenIds)
}

/// Reads the next line without its line break; `None` at the end of the input.
pub fn next_line(reader: &mut impl BufRead, name: &str) -> anyhow::Result<Option<String>> {
    let mut bytes = Vec::new();
    let read = reader.take(MAX_PROMPT_BYTES + 1).read_until(b'\n', &mut bytes);
    if read.with_context(|| format!("cannot read {name}"))? == 0 {
        return Ok(None);
    }
    let line = as_text(bytes, name)?;
    Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned()))
}

fn text_of(reader: impl Read, name: &str) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    reader.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
    as_text(bytes, name).map(|text| without_byte_order_mark(&text).to_owned())
}

fn as_text(bytes: Vec<u8>, name: &str) -> anyhow::Result<String> {
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        bail!("{name} has more than {MAX_PROMPT_BYTES} bytes, the limit for a prompt");
    }
    String::from_utf8(bytes)
        .map_err(|error| anyhow!("{name} is not UTF-8 text: byte {} is wrong", error.utf8_error().valid_up_to()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_without_their_ends() {
        let mut text = &b"one\r\n\nthree"[..];
        let mut next = || next_line(&mut text, "f").unwrap();
        assert_eq!(
            [next(), next(), next(), next()].map(|line| line.unwrap_or("end".into())),
            ["one", "", "three", "end"]
        );
    }

    #[test]
    fn ids_may_look_like_json() {
        for text in ["1,20", " 1, 20 ", "[1, 20]"] {
            assert_eq!(token_ids(text).unwrap().0, [1, 20], "{text}");
        }
        assert_eq!(token_ids("1,,2").unwrap_err(), "`` is not a token id");
        assert_eq!(token_ids("1,-2").unwrap_err(), "`-2` is not a token id");
    }

    #[test]
    fn what_is_not_text_is_refused() {
        assert_eq!(text_of(&b"a\xc3\xa9"[..], "f").unwrap(), "aé");
        assert_eq!(
            text_of(&b"\xef\xbb\xbfa\r\nb\xef\xbb\xbf"[..], "f").unwrap(),
            "a\r\nb\u{feff}",
            "a byte order mark"
        );
        let error = text_of(&b"ab\xff"[..], "f").unwrap_err().to_string();
        assert_eq!(error, "f is not UTF-8 text: byte 2 is wrong");
        let error = text_of(std::io::repeat(b'a'), "f").unwrap_err().to_string();
        assert!(error.contains("f has more than 16777216 bytes"), "{error}");
    }
}
