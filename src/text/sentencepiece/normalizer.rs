//! Normalizes a text into the bytes that are split into pieces: SentencePiece's `Normalizer::Normalize`.

use super::proto::{NormalizerSpec, TrainerSpec};
use super::trie::Trie;
use super::{SPACE, character_len};

/// Limit on a rule's replacement, which bounds how much a text can grow. NFKC's longest has 33 bytes.
const MAX_REPLACEMENT_BYTES: usize = 256;
/// Limit on the bytes matched against the rules, because the trie of a damaged file may contain cycles. Real rules
/// cover a few characters at most.
const MAX_SEQUENCE_BYTES: usize = 1024;

/// Normalization steps, in this order: character rules, removal of extra spaces, one added space in front or at the
/// end, spaces as `▁`.
#[derive(Debug)]
pub(super) struct Normalizer {
    rules: Option<CharacterRules>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
    treat_whitespace_as_suffix: bool,
    unchanged: Unchanged,
}

impl Normalizer {
    /// # Errors
    /// The defect of the character rules.
    pub(super) fn new(spec: &NormalizerSpec, trainer: &TrainerSpec, user_defined: &Trie) -> Result<Normalizer, String> {
        let charsmap = spec.precompiled_charsmap.as_deref().unwrap_or_default();
        let rules = (!charsmap.is_empty()).then(|| CharacterRules::new(charsmap)).transpose()?;
        Ok(Normalizer {
            unchanged: Unchanged::new(rules.as_ref(), user_defined),
            rules,
            add_dummy_prefix: spec.add_dummy_prefix.unwrap_or(true),
            remove_extra_whitespaces: spec.remove_extra_whitespaces.unwrap_or(true),
            escape_whitespaces: spec.escape_whitespaces.unwrap_or(true),
            treat_whitespace_as_suffix: trainer.treat_whitespace_as_suffix.unwrap_or(false),
        })
    }

    /// Disables the shortcuts, so that every character is looked up in the rules.
    #[cfg(test)]
    pub(super) fn look_everything_up(&mut self) {
        self.unchanged.by_first.fill(Stays::Unknown);
    }

    /// Normalizes a text. Occurrences of `user_defined` pieces stay as they are except for their spaces.
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
            let (unchanged, more) = rest.split_at(self.unchanged.len_without_spaces(rest, self.rules.as_ref()));
            if !unchanged.is_empty() {
                normalized.extend_from_slice(unchanged);
                after_space = false;
                rest = more;
                continue;
            }
            if rest[0] == b' ' && self.unchanged.has_space(rest) {
                if !after_space {
                    normalized.extend_from_slice(space);
                }
                after_space = self.remove_extra_whitespaces;
                rest = &rest[1..];
                continue;
            }
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

    /// Replacement of the start of a text, and the number of bytes it replaces; both are empty for an empty text.
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
            // A rule of a damaged file may have consumed part of a character.
            Err(_) => ("\u{FFFD}".as_bytes(), 1),
        }
    }
}

/// `precompiled_charsmap`: a double-array trie in the layout of darts-clone, which maps a byte sequence to an offset
/// into a blob of NUL-terminated texts.
#[derive(Debug)]
struct CharacterRules {
    units: Vec<u32>,
    texts: Vec<u8>,
}

/// Flag of a unit that holds a value.
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
                    return refused(format!("unit {index} of its trie points outside it: damaged"));
                };
                if text.len() > MAX_REPLACEMENT_BYTES {
                    let most = MAX_REPLACEMENT_BYTES;
                    return refused(format!("unit {index} of its trie points to a text of over {most} bytes"));
                }
            }
        }
        Ok(rules)
    }

    /// The replacement of the longest prefix of `text` that has one, and the length of that prefix.
    fn longest(&self, text: &[u8]) -> Option<(&[u8], usize)> {
        let mut found = None;
        let mut node = self.root()?;
        for (index, byte) in text.iter().enumerate().take(MAX_SEQUENCE_BYTES) {
            let Some(next) = self.child(node, *byte) else { break };
            node = next;
            if node.has_value {
                found = self.units.get(node.at).map(|value| ((value & !IS_VALUE) as usize, index + 1));
            }
        }
        let (start, len) = found?;
        Some((self.text(start)?, len))
    }

    /// The replacement that starts at `start`. One over the limit is returned one byte too long, enough to detect it.
    fn text(&self, start: usize) -> Option<&[u8]> {
        let tail = self.texts.get(start..).filter(|tail| !tail.is_empty())?;
        let tail = &tail[..tail.len().min(MAX_REPLACEMENT_BYTES + 1)];
        Some(tail.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    fn root(&self) -> Option<RuleNode> {
        Some(RuleNode { at: offset(*self.units.first()?), has_value: false })
    }

    fn child(&self, node: RuleNode, byte: u8) -> Option<RuleNode> {
        let at = node.at ^ usize::from(byte);
        let unit = self.units.get(at).copied()?;
        let is_child = unit & (IS_VALUE | 0xFF) == u32::from(byte);
        is_child.then(|| RuleNode { at: at ^ offset(unit), has_value: has_value(unit) })
    }
}

/// A node of the trie, reached by a sequence of bytes.
#[derive(Clone, Copy)]
struct RuleNode {
    /// Index of its value if it has one; child `byte` is at `at ^ byte`.
    at: usize,
    has_value: bool,
}

fn has_value(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

/// Fast path: most characters are known from their first byte, or from a bitmap, to be left unchanged, without a lookup
/// in the rules.
#[derive(Debug)]
struct Unchanged {
    /// `[256]`, indexed by the first byte of a character.
    by_first: Vec<Stays>,
    /// `[0x10000 / 64]`, for [`Stays::IfNotListed`]: one bit per character that starts a rule.
    listed: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stays {
    /// A character of this many bytes, always left unchanged.
    Always(u8),
    /// An ASCII character that starts rules, all of which need a non-ASCII mark after it.
    BeforeAsciiOrNothing,
    /// A character of two or three bytes: unchanged if not listed, otherwise if no rule matches.
    IfNotListed,
    IfNoRule,
    /// A user-defined piece may start here, or this is not the first byte of a character.
    Unknown,
}

impl Unchanged {
    fn new(rules: Option<&CharacterRules>, user_defined: &Trie) -> Unchanged {
        let mut listed = vec![0; 0x10000 / 64];
        let by_first = (0..=255u8).map(|first| {
            if user_defined.has_first(first) || matches!(first, 0x80..=0xBF) {
                return Stays::Unknown;
            }
            let stays = Stays::Always(character_len(&[first; 4]) as u8);
            let Some(rules) = rules else { return stays };
            let Some(node) = rules.root().and_then(|root| rules.child(root, first)) else { return stays };
            let next = |node: RuleNode| (0x80..=0xBF).map(move |byte| rules.child(node, byte));
            match first {
                // A rule of a damaged file may end within a character.
                _ if node.has_value => Stays::IfNoRule,
                0..=0x7F if (0..=0x7F).any(|byte| rules.child(node, byte).is_some()) => Stays::IfNoRule,
                0..=0x7F => Stays::BeforeAsciiOrNothing,
                0xC0..=0xDF => {
                    let word = usize::from(first & 0x1F);
                    listed[word] = bits(next(node).map(|node| node.is_some()));
                    Stays::IfNotListed
                }
                0xE0..=0xEF => {
                    for (second, node) in next(node).enumerate() {
                        let Some(node) = node else { continue };
                        let word = usize::from(first & 0x0F) << 6 | second;
                        listed[word] = bits(next(node).map(|third| node.has_value || third.is_some()));
                    }
                    Stays::IfNotListed
                }
                _ => Stays::IfNoRule,
            }
        });
        Unchanged { by_first: by_first.collect(), listed }
    }

    /// Length of the prefix of `text`, in whole characters other than spaces, that is sure to stay unchanged.
    fn len_without_spaces(&self, text: &[u8], rules: Option<&CharacterRules>) -> usize {
        let mut len = 0;
        while let Some(first) = text.get(len)
            && *first != b' '
        {
            let stays = match self.by_first[usize::from(*first)] {
                Stays::Always(bytes) => {
                    len += usize::from(bytes);
                    continue;
                }
                Stays::BeforeAsciiOrNothing => text.get(len + 1).is_none_or(u8::is_ascii),
                Stays::IfNotListed => !self.is_listed(&text[len..]),
                Stays::IfNoRule => false,
                Stays::Unknown => break,
            };
            let rest = &text[len..];
            if !stays && rules.is_none_or(|rules| rules.longest(rest).is_some()) {
                break;
            }
            len += character_len(rest);
        }
        len.min(text.len())
    }

    /// Returns true if a space at the start of `text` is sure to stay unchanged.
    fn has_space(&self, text: &[u8]) -> bool {
        match self.by_first[usize::from(b' ')] {
            Stays::Always(_) => true,
            Stays::BeforeAsciiOrNothing => text.get(1).is_none_or(u8::is_ascii),
            _ => false,
        }
    }

    #[inline]
    fn is_listed(&self, text: &[u8]) -> bool {
        let (word, bit) = match text {
            [first @ 0xC0..=0xDF, last, ..] => (usize::from(first & 0x1F), last),
            [first, second, last, ..] => (usize::from(first & 0x0F) << 6 | usize::from(second & 0x3F), last),
            _ => return true,
        };
        self.listed[word] >> (bit & 0x3F) & 1 == 1
    }
}

/// Packs flags into an integer, lowest bit first.
fn bits(flags: impl Iterator<Item = bool>) -> u64 {
    flags.enumerate().fold(0, |bits, (index, flag)| bits | u64::from(flag) << index)
}
