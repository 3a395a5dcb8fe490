//! The format of the tokenizer in a package, whichever file it came from: a folder's tokenizer.json, its
//! tokenizer.model, or the model in a `.nemo`.
//!
//! ```text
//! {"format":"aotron-tokenizer","version":1,"rules":"sentencepiece","bytes":40960}
//! the tokenizer's content, exactly that many bytes
//! ```
//!
//! The first line names the rules by which text is encoded, so that no reader has to guess them from the content. The
//! rest is in those rules' own format. The formats are not converted into each other: neither can express everything
//! the other can ([`super::sentencepiece`] has a list), and a single differing id is a wrong answer. A SentencePiece
//! model is reduced to the fields that affect ids or text, without the paths and settings of its training, so that
//! equal tokenizers give equal files. A tokenizer.json is kept byte for byte, because rewriting its numbers could
//! change them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Tokenizer, sentencepiece};
use crate::error::{Error, Result, clip};

/// The value of `format`.
const FORMAT: &str = "aotron-tokenizer";
const VERSION: u32 = 1;
/// Longer first lines are refused.
const MAX_HEADER_BYTES: usize = 1 << 10;

/// The first line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenizerHeader {
    format: String,
    version: u32,
    rules: RuleKind,
    /// Length of the content that follows.
    bytes: usize,
}

/// The rules by which text is encoded.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RuleKind {
    /// A tokenizer.json, encoded by the reference implementation.
    TokenizerJson,
    /// A SentencePiece model file.
    Sentencepiece,
    /// A SentencePiece model with tokens added to it: one line of JSON with those tokens, then the model file.
    SentencepieceWithAddedTokens,
}

impl Tokenizer {
    /// File name of the tokenizer in a package.
    pub const PACKAGE_FILE: &str = "tokenizer.aotron";

    /// The package form of this tokenizer, which was read from `source`, the content of the file `name`. It does not
    /// depend on the chat format: the special tokens that a format writes are taken from the format when it is opened.
    ///
    /// # Errors
    /// As [`Tokenizer::from_bytes`], if `source` is not the file that this tokenizer was read from.
    pub fn to_package(&self, name: &Path, source: &[u8]) -> Result<Vec<u8>> {
        let unwritten = |source| Error::format(name, format!("the tokenizer cannot be written: {source}"));
        let source = match self.sentencepiece() {
            Some(_) => sentencepiece::essential(name, source)?.into(),
            None => std::borrow::Cow::Borrowed(source),
        };
        let (rules, content) = match (self.sentencepiece().is_some(), self.added_tokens()) {
            (true, []) => (RuleKind::Sentencepiece, source),
            (false, _) => (RuleKind::TokenizerJson, source),
            (true, added) => {
                let mut content = serde_json::to_vec(added).map_err(unwritten)?;
                content.push(b'\n');
                content.extend_from_slice(&source);
                (RuleKind::SentencepieceWithAddedTokens, content.into())
            }
        };
        let header = TokenizerHeader { format: FORMAT.into(), version: VERSION, rules, bytes: content.len() };
        let mut bytes = serde_json::to_vec(&header).map_err(unwritten)?;
        bytes.push(b'\n');
        bytes.extend_from_slice(&content);
        Ok(bytes)
    }

    /// Reads a package's tokenizer. `name` is the file named in errors.
    ///
    /// # Errors
    /// [`Error::Format`] if the file is not in the form that [`Tokenizer::to_package`] writes; otherwise as
    /// [`Tokenizer::from_bytes`].
    pub fn from_package(name: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        let refused = |detail: String| Error::format(name, format!("not a package's tokenizer: {detail}"));
        let start = &bytes[..bytes.len().min(MAX_HEADER_BYTES)];
        let Some(end) = start.iter().position(|byte| *byte == b'\n') else {
            return Err(refused(format!("no line ends within its first {} bytes", start.len())));
        };
        // Only these two fields are known to exist in later versions.
        #[derive(Deserialize)]
        struct HeaderVersion {
            format: String,
            version: u64,
        }
        let line = &bytes[..end];
        let head: HeaderVersion =
            serde_json::from_slice(line).map_err(|source| refused(format!("its first line: {source}")))?;
        if head.format != FORMAT {
            return Err(refused(format!("its format is \"{}\", expected \"{FORMAT}\"", clip(&head.format))));
        }
        if head.version != u64::from(VERSION) {
            let found = head.version;
            let detail =
                format!("tokenizer version {found}; this aotron reads version {VERSION}. Build the package again");
            return Err(Error::unsupported(name, detail));
        }
        let header: TokenizerHeader =
            serde_json::from_slice(line).map_err(|source| refused(format!("its first line: {source}")))?;
        let content = &bytes[end + 1..];
        if content.len() != header.bytes {
            let (stated, found) = (header.bytes, content.len());
            return Err(refused(format!("{stated} bytes should follow its first line, {found} do")));
        }
        match header.rules {
            RuleKind::TokenizerJson => Tokenizer::from_json(name, content),
            RuleKind::Sentencepiece => Tokenizer::from_sentencepiece(name, content),
            RuleKind::SentencepieceWithAddedTokens => {
                let end = content.iter().position(|byte| *byte == b'\n').unwrap_or(content.len());
                let (line, file) = content.split_at(end);
                let added =
                    serde_json::from_slice(line).map_err(|source| refused(format!("added tokens: {source}")))?;
                Tokenizer::from_sentencepiece_and(name, file.get(1..).unwrap_or_default(), added)
            }
        }
    }
}
