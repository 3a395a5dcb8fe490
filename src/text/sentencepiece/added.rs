//! Tokens added to a SentencePiece model after its training, listed in separate files.
//!
//! The rule is that of Hugging Face's tokenizers without a tokenizer.json, and of NeMo with its special tokens: a text
//! is split at its added tokens, the earliest and then the longest match winning, and the model encodes each piece of
//! text in between separately.

use std::collections::HashMap;
use std::path::Path;

use super::SentencePieceModel;
use super::trie::Trie;
use crate::checkpoint::AddedToken;
use crate::error::{Error, Result, clip};

/// Longer lists mean a damaged file; no known tokenizer has a hundredth of this.
const MAX_TOKENS: usize = 1 << 16;
/// Limit on ids past the model's pieces, holes included.
const MAX_BEYOND: usize = 1 << 16;

/// The added tokens of a model.
#[derive(Debug)]
pub(in crate::text) struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// Maps a token's text to its index in `tokens`.
    trie: Trie,
    ids: HashMap<u32, usize>,
    vocab_size: usize,
}

impl AddedTokens {
    /// Checks the tokens against the model. `name` is the model's file, named in errors.
    pub(in crate::text) fn new(
        name: &Path,
        model: &SentencePieceModel,
        tokens: Vec<AddedToken>,
    ) -> Result<AddedTokens> {
        let pieces = model.facts().pieces;
        if tokens.len() > MAX_TOKENS {
            let count = tokens.len();
            return Err(Error::format(name, format!("{count} added tokens; at most {MAX_TOKENS} are accepted")));
        }
        let (mut ids, mut places) = (HashMap::new(), HashMap::new());
        for (place, AddedToken { id, content, .. }) in tokens.iter().enumerate() {
            let refused = |detail: String| Err(Error::format(name, format!("added token {id}: {detail}")));
            if content.is_empty() {
                return refused("it is empty".into());
            }
            if *id as usize >= pieces + MAX_BEYOND {
                return refused(format!("the model has {pieces} pieces, and at most {MAX_BEYOND} ids follow them"));
            }
            if let Some(piece) = model.piece(*id).filter(|piece| piece != content) {
                let detail =
                    format!("it is `{}`, but the model's piece of that id is `{}`", clip(content), clip(piece));
                return refused(detail);
            }
            if ids.insert(*id, place).is_some() || places.insert(content.as_str(), place).is_some() {
                return refused(format!("`{}` or its id is added twice", clip(content)));
            }
        }
        let trie = Trie::new(places.into_iter().map(|(text, place)| (text.as_bytes(), place as u32)));
        let last = ids.keys().max().map_or(0, |id| *id as usize + 1);
        Ok(AddedTokens { trie, ids, vocab_size: pieces.max(last), tokens })
    }

    pub(in crate::text) fn tokens(&self) -> &[AddedToken] {
        &self.tokens
    }

    pub(in crate::text) fn piece(&self, id: u32) -> Option<&str> {
        self.ids.get(&id).and_then(|place| self.tokens.get(*place)).map(|token| token.content.as_str())
    }

    pub(in crate::text) fn id(&self, piece: &str) -> Option<u32> {
        self.tokens.iter().find(|token| token.content == piece).map(|token| token.id)
    }

    /// The model's pieces plus the ids that follow them.
    pub(in crate::text) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Encodes a text.
    pub(in crate::text) fn encode(&self, model: &SentencePieceModel, text: &str) -> Result<Vec<u32>> {
        if self.tokens.is_empty() {
            return model.encode(text);
        }
        let (mut ids, mut start, mut at) = (Vec::new(), 0, 0);
        let mut eats_spaces = false;
        let flush = |part: &str, eats_spaces: bool, before: Option<&AddedToken>, ids: &mut Vec<u32>| {
            let part = if eats_spaces { part.trim_start() } else { part };
            let part = if before.is_some_and(|token| token.lstrip) { part.trim_end() } else { part };
            if !part.is_empty() {
                ids.extend(model.encode(part)?);
            }
            Ok::<(), Error>(())
        };
        while at < text.len() {
            let mut found = None;
            self.trie.prefixes(&text.as_bytes()[at..], |len, place| found = Some((len, place)));
            let token = found.and_then(|(len, place)| Some((len, self.tokens.get(place as usize)?)));
            match token {
                Some((len, token)) => {
                    flush(&text[start..at], eats_spaces, Some(token), &mut ids)?;
                    ids.push(token.id);
                    eats_spaces = token.rstrip;
                    at += len;
                    start = at;
                }
                // May land within a character, where no token matches, because tokens are whole characters.
                None => at += 1,
            }
        }
        flush(&text[start..], eats_spaces, None, &mut ids)?;
        Ok(ids)
    }
}
