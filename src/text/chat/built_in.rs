//! The chat formats that `--chat-format` knows by name.
//!
//! Another one is a Jinja template in the folder `built_in` and a line here: what ends an answer is found from the
//! template itself.

use super::{ChatTemplate, JinjaTemplate, NemotronMarkers};

/// Formats made of a template alone.
const TEMPLATES: &[(&str, &str)] = &[("chatml", include_str!("built_in/chatml.jinja"))];

/// The format of this name.
pub(super) fn find(name: &str) -> Option<ChatTemplate> {
    match name {
        "nemotron" => Some(ChatTemplate::Nemotron(NemotronMarkers::default())),
        "raw" => Some(ChatTemplate::Raw),
        _ => TEMPLATES.iter().find(|(known, _)| *known == name).map(|(name, source)| {
            ChatTemplate::Jinja(JinjaTemplate { name: (*name).to_owned(), source: (*source).to_owned() })
        }),
    }
}

/// All names, as a user is told them.
pub(super) fn names() -> Vec<&'static str> {
    ["nemotron", "raw"].into_iter().chain(TEMPLATES.iter().map(|(name, _)| *name)).collect()
}
