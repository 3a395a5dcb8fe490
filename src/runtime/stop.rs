//! Stop strings and trimming, on text that arrives in pieces.

use crate::error::{Error, Result};
use crate::text::{MAX_STOP_BYTES, MAX_STOP_STRINGS};

#[cfg(test)]
mod tests;

/// Ends a text at the first stop string and optionally trims it, while it arrives in pieces.
///
/// The stop string that completes first wins; of several that complete at the same character, the longest. So the
/// result depends only on the text, never on how it was split. Neither the stop string nor anything after it is shown,
/// and only text that may still become part of a stop string is held back.
///
/// Trimming removes leading and trailing Unicode whitespace of the shown text; whitespace is held back until something
/// follows it.
#[derive(Debug)]
pub struct StopFilter {
    matchers: Vec<Matcher>,
    trim: bool,
    /// Text that may be the start of a stop string.
    held: String,
    /// Whitespace to show once something follows it; only used when trimming.
    spaces: String,
    shown_any: bool,
    /// The stop string that ended the text.
    matched: Option<String>,
}

/// Knuth-Morris-Pratt matcher of one stop string.
#[derive(Debug)]
struct Matcher {
    pattern: Vec<u8>,
    /// `fallback[n]`: length of the longest proper prefix of the pattern that is a suffix of its first n + 1 bytes.
    fallback: Vec<usize>,
    /// Length of the longest prefix of the pattern that is a suffix of the text.
    matched: usize,
}

impl Matcher {
    fn new(pattern: &str) -> Matcher {
        let mut matcher = Matcher { pattern: pattern.as_bytes().to_vec(), fallback: Vec::new(), matched: 0 };
        for (index, byte) in pattern.bytes().enumerate() {
            if index > 0 {
                matcher.advance(byte);
            }
            matcher.fallback.push(matcher.matched);
        }
        matcher.matched = 0;
        matcher
    }

    fn advance(&mut self, byte: u8) {
        while self.matched > 0 && self.pattern.get(self.matched) != Some(&byte) {
            self.matched = self.fallback.get(self.matched - 1).copied().unwrap_or(0);
        }
        if self.pattern.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
    }

    fn is_complete(&self) -> bool {
        self.matched == self.pattern.len()
    }
}

impl StopFilter {
    /// Creates a filter for one text.
    ///
    /// # Errors
    /// [`Error::Request`] for an empty stop string, one over 1024 bytes, or more than 64 of them.
    pub fn new(stop_strings: &[String], trim: bool) -> Result<StopFilter> {
        if stop_strings.len() > MAX_STOP_STRINGS {
            return Err(Error::Request(format!(
                "{} stop strings, but at most {MAX_STOP_STRINGS} are accepted",
                stop_strings.len()
            )));
        }
        if let Some(index) = stop_strings.iter().position(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            return Err(Error::Request(format!(
                "stop string {index} has {} bytes; expected 1 to {MAX_STOP_BYTES}",
                stop_strings.get(index).map_or(0, String::len)
            )));
        }
        Ok(StopFilter {
            matchers: stop_strings.iter().map(|s| Matcher::new(s)).collect(),
            trim,
            held: String::new(),
            spaces: String::new(),
            shown_any: false,
            matched: None,
        })
    }

    /// Takes the next piece of text and appends the text that can be shown to `out`. Returns true once a stop string is
    /// complete; anything after that is ignored.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.matched.is_some() {
            return true;
        }
        let held_bytes = self.held.len();
        self.held.push_str(text);
        for (index, byte) in text.bytes().enumerate() {
            for matcher in &mut self.matchers {
                matcher.advance(byte);
            }
            if let Some(longest) = self.matchers.iter().filter(|m| m.is_complete()).map(|m| m.pattern.len()).max() {
                let end = held_bytes + index + 1;
                let stop = self.held.get(end.saturating_sub(longest)..end).unwrap_or_default().to_owned();
                self.held.truncate(end.saturating_sub(longest));
                self.matched = Some(stop);
                self.flush(out);
                return true;
            }
        }
        let partial = self.matchers.iter().map(|m| m.matched).max().unwrap_or(0);
        let certain = self.held.len().saturating_sub(partial);
        let rest = self.held.split_off(certain);
        let shown = std::mem::replace(&mut self.held, rest);
        self.show(&shown, out);
        false
    }

    /// The stop string that ended the text.
    pub fn matched(&self) -> Option<&str> {
        self.matched.as_deref()
    }

    /// Ends the text: appends what was held back, which is not a stop string after all.
    pub fn flush(&mut self, out: &mut String) {
        let rest = std::mem::take(&mut self.held);
        self.show(&rest, out);
        self.spaces.clear();
    }

    fn show(&mut self, text: &str, out: &mut String) {
        if !self.trim {
            return out.push_str(text);
        }
        let text = if self.shown_any { text } else { text.trim_start() };
        let body = text.trim_end();
        if body.is_empty() {
            if self.shown_any {
                self.spaces.push_str(text);
            }
            return;
        }
        self.shown_any = true;
        out.push_str(&std::mem::take(&mut self.spaces));
        out.push_str(body);
        self.spaces.push_str(text.get(body.len()..).unwrap_or_default());
    }
}
