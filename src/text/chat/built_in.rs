//! The built-in chat formats of `--chat-format`.
//!
//! To add one, put a Jinja template in the folder `built_in` and a line here: the end of an answer is derived from the
//! template itself.

use super::{ChatTemplate, JinjaTemplate, NemotronMarkers};

/// Formats that consist of a template only.
const TEMPLATES: &[(&str, &str)] = &[("chatml", include_str!("built_in/chatml.jinja"))];

/// Finds a built-in format by name.
pub(super) fn find(name: &str) -> Option<ChatTemplate> {
    match name {
        "nemotron" => Some(ChatTemplate::Nemotron(NemotronMarkers::default())),
        "raw" => Some(ChatTemplate::Raw),
        _ => TEMPLATES.iter().find(|(known, _)| *known == name).map(|(name, source)| {
            ChatTemplate::Jinja(JinjaTemplate { name: (*name).to_owned(), source: (*source).to_owned() })
        }),
    }
}

/// All names, for messages and `--help`.
pub(super) fn names() -> Vec<&'static str> {
    ["nemotron", "raw"].into_iter().chain(TEMPLATES.iter().map(|(name, _)| *name)).collect()
}
