//! Content that spells a marker: told apart from the template's own markers, so that it can be encoded as plain text.
//!
//! A template is a program, so where a content goes in its output is not known. But marks that are put around a
//! marker within a content go through the template with it, and are found again in the output. They are characters for
//! private use, taken out of contents first so that nobody can forge them; transformers uses the same ones.

use serde_json::Value;

const START: char = '\u{f0000}';
const END: char = '\u{f0001}';

/// A part of a rendered prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PromptPart<'a> {
    /// As the template wrote it: markers are tokens.
    Text(&'a str),
    /// A marker that a content spells: plain text.
    Spelled(&'a str),
}

/// Marks every one of `markers` in the texts of `value`, whatever keys they are under. Of two that start at the same place
/// the longer one counts.
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

/// The parts of a prompt rendered from marked messages. A mark that the template tore from its marker still parts the
/// text on its sides, so that they make no marker together.
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

/// A text without marks, for people.
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
