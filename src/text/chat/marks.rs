//! Escapes message contents that spell a marker, so that they are encoded as plain text and not mistaken for the
//! template's own markers.
//!
//! A template is a program, so there is no telling where a content ends up in its output. Marks placed around a marker
//! inside a content, however, pass through the template with it and can be found again in the output. They are
//! private-use characters, removed from contents first so that nobody can forge them; transformers uses the same ones.

use serde_json::Value;

const START: char = '\u{f0000}';
const END: char = '\u{f0001}';

/// A part of a rendered prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PromptPart<'a> {
    /// Written by the template: markers are tokens.
    Text(&'a str),
    /// A marker spelled in a message content: plain text.
    Spelled(&'a str),
}

/// Marks every occurrence of `markers` in the strings of `value`, under any key. Of two that start at the same
/// character the longer one wins.
pub(super) fn mark(value: &mut Value, markers: &[String]) {
    match value {
        Value::String(text) => *text = mark_text(text, markers),
        Value::Array(items) => items.iter_mut().for_each(|item| mark(item, markers)),
        Value::Object(object) => object.values_mut().for_each(|value| mark(value, markers)),
        _ => {}
    }
}

fn mark_text(text: &str, markers: &[String]) -> String {
    let text: String = text.chars().filter(|c| !matches!(*c, START | END)).collect();
    let mut marked = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        let found = markers.iter().filter(|marker| !marker.is_empty() && rest.starts_with(marker.as_str()));
        let len = match found.map(String::len).max() {
            Some(len) => {
                marked.push(START);
                marked.push_str(&rest[..len]);
                marked.push(END);
                len
            }
            None => {
                marked.push(first);
                first.len_utf8()
            }
        };
        rest = &rest[len..];
    }
    marked
}

/// Splits a prompt rendered from marked messages into parts. A mark that the template separated from its marker still
/// splits the text there, so that the text on its two sides cannot form a marker.
pub(super) fn parts<'a>(text: &'a str, markers: &[String]) -> Vec<PromptPart<'a>> {
    let mut parts = Vec::new();
    let mut pieces = text.split_inclusive([START, END]).peekable();
    while let Some(piece) = pieces.next() {
        let opens = piece.ends_with(START);
        let plain = piece.trim_end_matches([START, END]);
        if !plain.is_empty() {
            parts.push(PromptPart::Text(plain));
        }
        if opens
            && let Some(next) = pieces.peek()
            && let Some(spelled) = next.strip_suffix(END)
            && markers.iter().any(|marker| marker == spelled)
        {
            parts.push(PromptPart::Spelled(spelled));
            pieces.next();
        }
    }
    parts
}

/// A text without marks, for messages.
pub(super) fn unmarked(text: &str) -> String {
    text.replace([START, END], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers() -> Vec<String> {
        ["<a>", "<a>b", "</s>"].map(str::to_owned).to_vec()
    }

    #[test]
    fn marked_contents_are_found_again() {
        let mut value = serde_json::json!([{"role": "user", "content": "x<a>by</s>\u{f0000}<a>"}]);
        mark(&mut value, &markers());
        let content = value[0]["content"].as_str().unwrap();
        let text = format!("<a>{content}<a>");
        use PromptPart::{Spelled, Text};
        let expected =
            [Text("<a>x"), Spelled("<a>b"), Text("y"), Spelled("</s>"), Spelled("<a>"), Text("<a>")].to_vec();
        assert_eq!(parts(&text, &markers()), expected);
        assert_eq!(unmarked(&text), "<a>x<a>by</s><a><a>");
    }

    #[test]
    fn torn_marks_part_the_text() {
        use PromptPart::Text;
        assert_eq!(parts("a\u{f0000}<a\u{f0001}>", &markers()), [Text("a"), Text("<a"), Text(">")]);
        assert_eq!(parts("\u{f0001}\u{f0000}", &markers()), []);
        assert_eq!(parts("", &markers()), []);
    }
}
