//! Facts about a checkpoint other than its model: format, tokenizer, and differences from the model card.

use aotron::checkpoint::card::{SYSTEM_MARK as SYSTEM_MARKER, TURN_MARK as TURN_MARKER};
use aotron::checkpoint::{Checkpoint, card};
use aotron::compile::CheckpointText;
use aotron::text::{Message, SentencePieceFacts, Tokenizer};
use serde_json::{Value, json};

/// Sample message that shows the tokens of the template.
const EXAMPLE: &str = "Hi";

/// Facts found in a checkpoint's files.
pub struct Facts {
    /// Tokenizer, template and stops, as a build would use them.
    pub text: CheckpointText,
    /// Names of its chat templates.
    pub templates: Vec<String>,
    /// False if a build needs `--chat-format` since none of them is called default; `text` then has no template.
    pub has_format: bool,
    /// Token ids of the template applied to [`EXAMPLE`], and their pieces.
    pub template: Option<(Vec<u32>, Vec<String>)>,
    /// Differences of a `.nemo` file from the model card.
    pub differences: Vec<String>,
}

impl Facts {
    pub fn of(checkpoint: &Checkpoint) -> aotron::Result<Facts> {
        let templates: Vec<String> = checkpoint.chat_files()?.templates.into_iter().map(|file| file.name).collect();
        let has_format = templates.is_empty() || templates.iter().any(|name| name == "default");
        let mut text = CheckpointText::of(checkpoint, if has_format { None } else { Some("raw") })?;
        if !has_format {
            text.refusals.push(format!(
                "none of its chat templates is called default: `aotron build` needs --chat-format, one of {} or another",
                templates.join(", ")
            ));
        }
        let tokenizer = text.tokenizer.as_ref().map(|(_, tokenizer)| tokenizer);
        // A template may reject a lone message; the warnings report it.
        let ids = tokenizer
            .filter(|_| has_format)
            .and_then(|tokenizer| text.format.prompt(tokenizer, &[Message::user(EXAMPLE)]).ok());
        let template = tokenizer.zip(ids).map(|(tokenizer, ids)| {
            let piece = |id: &u32| tokenizer.piece(*id).unwrap_or_else(|| format!("#{id}"));
            let pieces = ids.iter().map(piece).collect();
            (ids, pieces)
        });
        let differences = match checkpoint.format() {
            "nemo" => card::differences(checkpoint.config(), tokenizer.and_then(card_pieces).as_ref()),
            _ => Vec::new(),
        };
        Ok(Facts { text, templates, has_format, template, differences })
    }

    fn tokenizer(&self) -> Option<&Tokenizer> {
        self.text.tokenizer.as_ref().map(|(_, tokenizer)| tokenizer)
    }

    pub fn tokenizer_json(&self) -> Value {
        let Some(tokenizer) = self.tokenizer() else { return Value::Null };
        let special: serde_json::Map<String, Value> =
            [SYSTEM_MARKER, TURN_MARKER].into_iter().map(|mark| (mark.to_owned(), json!(tokenizer.id(mark)))).collect();
        json!({
            "file": tokenizer.file_name(),
            "vocab_size": tokenizer.vocab_size(),
            "sentencepiece": tokenizer.sentencepiece(),
            "special_ids": special,
            "template": self.template.as_ref().map(|(ids, pieces)| json!({
                "message": EXAMPLE, "token_ids": ids, "pieces": pieces,
            })),
        })
    }

    /// Labels and texts of the lines about the tokenizer, in order.
    pub fn tokenizer_lines(&self) -> Vec<(&'static str, String)> {
        let Some(tokenizer) = self.tokenizer() else { return vec![("tokenizer", "none".to_owned())] };
        let mut lines = vec![("tokenizer", format!("{} ids, in {}", tokenizer.vocab_size(), tokenizer.file_name()))];
        if let Some(facts) = tokenizer.sentencepiece() {
            lines.extend(sentencepiece_lines(facts));
        }
        let id = |mark: &str| tokenizer.id(mark).map_or("none".to_owned(), |id| id.to_string());
        let special = [SYSTEM_MARKER, TURN_MARKER].map(|mark| format!("{mark} {}", id(mark)));
        lines.push(("  special", special.join(", ")));
        if let Some((ids, pieces)) = &self.template {
            let tokens: Vec<String> = ids.iter().zip(pieces).map(|(id, piece)| format!("{piece:?} {id}")).collect();
            lines.push((
                "  template",
                format!("the message {EXAMPLE:?} is {} tokens: {}", ids.len(), tokens.join(", ")),
            ));
        }
        lines
    }
}

/// The pieces that the card's prompts rely on; `None` for a tokenizer other than SentencePiece.
fn card_pieces(tokenizer: &Tokenizer) -> Option<card::Pieces> {
    let facts = tokenizer.sentencepiece()?;
    // A user-defined piece is matched as a whole anywhere in a text.
    let matches_whole = |mark: &str| {
        let id = tokenizer.id(mark)?;
        tokenizer.encode(&format!("a{mark}b")).ok().map(|ids| ids.contains(&id))
    };
    Some(card::Pieces {
        count: tokenizer.vocab_size(),
        bos_id: facts.bos_id,
        eos_id: facts.eos_id,
        has_system_mark: matches_whole(SYSTEM_MARKER).unwrap_or(false),
        has_turn_mark: matches_whole(TURN_MARKER).unwrap_or(false),
    })
}

fn sentencepiece_lines(facts: &SentencePieceFacts) -> [(&'static str, String); 2] {
    let id = |id: Option<u32>| id.map_or("none".into(), |id| id.to_string());
    let pieces = format!(
        "SentencePiece {}, {} user-defined, {} control; unk {}, bos {}, eos {}, pad {}",
        facts.model_type,
        facts.user_defined_pieces,
        facts.control_pieces,
        facts.unk_id,
        id(facts.bos_id),
        id(facts.eos_id),
        id(facts.pad_id)
    );
    let flags = [
        ("byte fallback", facts.byte_fallback),
        ("character rules", facts.has_character_rules),
        ("adds a leading space", facts.add_dummy_prefix && !facts.treat_whitespace_as_suffix),
        ("adds a trailing space", facts.add_dummy_prefix && facts.treat_whitespace_as_suffix),
        ("removes extra spaces", facts.remove_extra_whitespaces),
    ];
    let on: Vec<&str> = flags.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect();
    let on = if on.is_empty() { String::new() } else { format!(": {}", on.join(", ")) };
    [("  pieces", pieces), ("  text", format!("normalizer {:?}{on}", facts.normalizer))]
}
