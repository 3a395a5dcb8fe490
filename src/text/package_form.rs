//! The form in which a package keeps a tokenizer, whichever file it came from: a folder's tokenizer.json, its
//! tokenizer.model, or the model in a `.nemo`.
//!
//! ```text
//! {"format":"aotron-tokenizer","version":1,"rules":"sentencepiece","bytes":40960}
//! what the rules are made of, so many bytes
//! ```
//!
//! The first line says by whose rules a text is encoded, so that no reader guesses it from the content. The rest is in
//! the words of those rules, and one kind is not turned into the other: neither can say all of the other
//! ([`super::sentencepiece`] has a list), and an id that differs is a wrong answer. What is kept is what decides about
//! ids and texts: of a SentencePiece model, which also has the folders and settings of its training, only the
//! fields that are read, so that equal tokenizers are equal files. A tokenizer.json is kept to the byte, for writing
//! its numbers anew could change them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Tokenizer, sentencepiece};
use crate::error::{Error, Result, clip};

/// What `format` says.
const FORMAT: &str = "aotron-tokenizer";
const VERSION: u32 = 1;
/// The first line is refused past this size.
const MAX_HEADER_BYTES: usize = 1 << 10;

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    version: u32,
    rules: RuleKind,
    /// Of what follows.
    bytes: usize,
}

/// By whose rules a text is encoded.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RuleKind {
    /// Those of a tokenizer.json, by the reference implementation.
    TokenizerJson,
    /// SentencePiece's: a model's file.
    Sentencepiece,
    /// Those of a tokenizer.json, with more special tokens than it lists: a line of JSON with these, and the file.
    TokenizerJsonWithAddedTokens,
    /// SentencePiece's, between tokens added to its model: a line of JSON with these, and the model's file.
    SentencepieceWithAddedTokens,
}

impl Tokenizer {
    /// The name of a package's tokenizer.
    pub const PACKAGE_FILE: &str = "tokenizer.aotron";

    /// What a package keeps of this tokenizer, which was read from `source`, the content of a file of that name.
    ///
    /// # Errors
    /// Those of [`Tokenizer::from_bytes`], where it was not read from that.
    pub fn to_package(&self, name: &Path, source: &[u8]) -> Result<Vec<u8>> {
        let unwritten = |source| Error::format(name, format!("the tokenizer cannot be kept: {source}"));
        let source = match self.sentencepiece() {
            Some(_) => sentencepiece::essential(name, source)?.into(),
            None => std::borrow::Cow::Borrowed(source),
        };
        let (rules, content) = match (self.sentencepiece().is_some(), self.added_tokens()) {
            (true, []) => (RuleKind::Sentencepiece, source),
            (false, []) => (RuleKind::TokenizerJson, source),
            (is_sentencepiece, added) => {
                let mut content = serde_json::to_vec(added).map_err(unwritten)?;
                content.push(b'\n');
                content.extend_from_slice(&source);
                match is_sentencepiece {
                    true => (RuleKind::SentencepieceWithAddedTokens, content.into()),
                    false => (RuleKind::TokenizerJsonWithAddedTokens, content.into()),
                }
            }
        };
        let header = Header { format: FORMAT.into(), version: VERSION, rules, bytes: content.len() };
        let mut bytes = serde_json::to_vec(&header).map_err(unwritten)?;
        bytes.push(b'\n');
        bytes.extend_from_slice(&content);
        Ok(bytes)
    }

    /// Reads a package's tokenizer. `name` is the file named in errors.
    ///
    /// # Errors
    /// [`Error::Format`] where it is not what [`Tokenizer::to_package`] writes; those of [`Tokenizer::from_bytes`].
    pub fn from_package(name: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        let refused = |detail: String| Error::format(name, format!("not a package's tokenizer: {detail}"));
        let start = &bytes[..bytes.len().min(MAX_HEADER_BYTES)];
        let Some(end) = start.iter().position(|byte| *byte == b'\n') else {
            return Err(refused(format!("no line ends within its first {} bytes", start.len())));
        };
        // Of a later version nothing but these is known.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u64,
        }
        let line = &bytes[..end];
        let head: Head = serde_json::from_slice(line).map_err(|source| refused(format!("its first line: {source}")))?;
        if head.format != FORMAT {
            return Err(refused(format!("its format is \"{}\", expected \"{FORMAT}\"", clip(&head.format))));
        }
        if head.version != u64::from(VERSION) {
            let found = head.version;
            let detail = format!("tokenizer version {found}; version {VERSION} is read. Build the package again");
            return Err(Error::unsupported(name, detail));
        }
        let header: Header =
            serde_json::from_slice(line).map_err(|source| refused(format!("its first line: {source}")))?;
        let content = &bytes[end + 1..];
        if content.len() != header.bytes {
            let (stated, found) = (header.bytes, content.len());
            return Err(refused(format!("{stated} bytes should follow its first line, {found} do")));
        }
        match header.rules {
            RuleKind::TokenizerJson => Tokenizer::from_json(name, content),
            RuleKind::Sentencepiece => Tokenizer::from_sentencepiece(name, content),
            with_added => {
                let end = content.iter().position(|byte| *byte == b'\n').unwrap_or(content.len());
                let (line, file) = content.split_at(end);
                let added =
                    serde_json::from_slice(line).map_err(|source| refused(format!("added tokens: {source}")))?;
                let file = file.get(1..).unwrap_or_default();
                match with_added {
                    RuleKind::TokenizerJsonWithAddedTokens => Tokenizer::from_json_and(name, file, added),
                    _ => Tokenizer::from_sentencepiece_and(name, file, added),
                }
            }
        }
    }
}
