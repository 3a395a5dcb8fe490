//! From a text to the bytes that are cut into pieces: SentencePiece's `Normalizer::Normalize`.

use super::proto::{NormalizerSpec, TrainerSpec};
use super::trie::Trie;
use super::{SPACE, character_len};

/// The longest replacement of a rule. NFKC's longest has 33 bytes; what a text grows by is bounded by this.
const MAX_REPLACEMENT_BYTES: usize = 256;
/// How far a text is compared with rules: the trie of a damaged file may go round in circles. No real rule is for more
/// than a few characters.
const MAX_SEQUENCE_BYTES: usize = 1024;

/// What a normalizer does to a text, in this order: rules for characters, spaces at the ends and in runs, one space in
/// front or at the end, spaces as `▁`.
#[derive(Debug)]
pub(super) struct Normalizer {
    rules: Option<CharacterRules>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
    treat_whitespace_as_suffix: bool,
}

impl Normalizer {
    /// # Errors
    /// What is wrong with the rules for characters.
    pub(super) fn new(spec: &NormalizerSpec, trainer: &TrainerSpec) -> Result<Normalizer, String> {
        let charsmap = spec.precompiled_charsmap.as_deref().unwrap_or_default();
        Ok(Normalizer {
            rules: (!charsmap.is_empty()).then(|| CharacterRules::new(charsmap)).transpose()?,
            add_dummy_prefix: spec.add_dummy_prefix.unwrap_or(true),
            remove_extra_whitespaces: spec.remove_extra_whitespaces.unwrap_or(true),
            escape_whitespaces: spec.escape_whitespaces.unwrap_or(true),
            treat_whitespace_as_suffix: trainer.treat_whitespace_as_suffix.unwrap_or(false),
        })
    }

    /// The normalized text. Pieces of `user_defined` stay as they are, but for their spaces.
    pub(super) fn normalize(&self, text: &str, user_defined: &Trie) -> Vec<u8> {
        let mut rest = text.as_bytes();
        if self.remove_extra_whitespaces {
            while let (b" ", consumed) = self.prefix(rest, user_defined) {
                rest = &rest[consumed..];
            }
        }
        if rest.is_empty() {
            return Vec::new();
        }
        let space = if self.escape_whitespaces { SPACE.as_bytes() } else { b" " };
        let mut normalized = Vec::with_capacity(rest.len() + rest.len() / 2 + SPACE.len());
        if self.add_dummy_prefix && !self.treat_whitespace_as_suffix {
            normalized.extend_from_slice(space);
        }
        let mut after_space = self.remove_extra_whitespaces;
        while !rest.is_empty() {
            let (mut part, consumed) = self.prefix(rest, user_defined);
            while after_space && let [b' ', more @ ..] = part {
                part = more;
            }
            for byte in part {
                match byte {
                    b' ' => normalized.extend_from_slice(space),
                    byte => normalized.push(*byte),
                }
            }
            if let Some(last) = part.last() {
                after_space = self.remove_extra_whitespaces && *last == b' ';
            }
            rest = &rest[consumed..];
        }
        if self.remove_extra_whitespaces {
            while normalized.ends_with(space) {
                normalized.truncate(normalized.len() - space.len());
            }
        }
        if self.add_dummy_prefix && self.treat_whitespace_as_suffix {
            normalized.extend_from_slice(space);
        }
        normalized
    }

    /// What the start of a text becomes, and how many bytes of it that is; nothing of nothing.
    fn prefix<'a>(&'a self, text: &'a [u8], user_defined: &Trie) -> (&'a [u8], usize) {
        if let Some(len) = user_defined.longest(text) {
            return (&text[..len], len);
        }
        if let Some((replacement, len)) = self.rules.as_ref().and_then(|rules| rules.longest(text)) {
            return (replacement, len);
        }
        let len = character_len(text);
        match std::str::from_utf8(&text[..len]) {
            Ok(_) => (&text[..len], len),
            // A rule of a damaged file may have consumed a part of a character.
            Err(_) => ("\u{FFFD}".as_bytes(), 1),
        }
    }
}

/// `precompiled_charsmap`: a double array in the layout of darts-clone, which maps a sequence of bytes to a place in
/// a blob of texts that end with a zero byte.
#[derive(Debug)]
struct CharacterRules {
    units: Vec<u32>,
    texts: Vec<u8>,
}

/// Marks a unit that holds a value.
const IS_VALUE: u32 = 1 << 31;

impl CharacterRules {
    fn new(charsmap: &[u8]) -> Result<CharacterRules, String> {
        let refused = |detail: String| Err(format!("normalizer_spec.precompiled_charsmap: {detail}"));
        let Some((len, blob)) = charsmap.split_first_chunk() else {
            return refused(format!("{} bytes are too few for its length field", charsmap.len()));
        };
        let len = u32::from_le_bytes(*len) as usize;
        if len >= blob.len() || !len.is_multiple_of(4) {
            return refused(format!("a trie of {len} bytes in {} bytes: damaged", blob.len()));
        }
        let (trie, texts) = blob.split_at(len);
        let (units, _) = trie.as_chunks();
        let rules =
            CharacterRules { units: units.iter().map(|unit| u32::from_le_bytes(*unit)).collect(), texts: texts.into() };
        for (index, unit) in rules.units.iter().enumerate() {
            if unit & IS_VALUE == 0 && has_value(*unit) {
                let value = rules.units.get(index ^ offset(*unit)).map(|value| (value & !IS_VALUE) as usize);
                let Some(text) = value.and_then(|value| rules.text(value)) else {
                    return refused(format!("unit {index} of its trie leads outside: damaged"));
                };
                if text.len() > MAX_REPLACEMENT_BYTES {
                    let most = MAX_REPLACEMENT_BYTES;
                    return refused(format!("unit {index} of its trie leads to a text of over {most} bytes"));
                }
            }
        }
        Ok(rules)
    }

    /// The replacement of the longest sequence `text` starts with that has one, and its length.
    fn longest(&self, text: &[u8]) -> Option<(&[u8], usize)> {
        let mut found = None;
        let mut at = offset(*self.units.first()?);
        for (index, byte) in text.iter().enumerate().take(MAX_SEQUENCE_BYTES) {
            at ^= usize::from(*byte);
            let Some(unit) = self.units.get(at).copied() else { break };
            if unit & (IS_VALUE | 0xFF) != u32::from(*byte) {
                break;
            }
            at ^= offset(unit);
            if has_value(unit) {
                found = self.units.get(at).map(|value| ((value & !IS_VALUE) as usize, index + 1));
            }
        }
        let (start, len) = found?;
        Some((self.text(start)?, len))
    }

    /// The replacement that starts at `start`; of a longer one than there may be, no more than shows that.
    fn text(&self, start: usize) -> Option<&[u8]> {
        let tail = self.texts.get(start..).filter(|tail| !tail.is_empty())?;
        let tail = &tail[..tail.len().min(MAX_REPLACEMENT_BYTES + 1)];
        Some(tail.split(|byte| *byte == 0).next().unwrap_or_default())
    }
}

fn has_value(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}
