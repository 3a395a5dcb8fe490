//! A small SentencePiece-style tokenizer for tests: byte fallback, a few words, the card's markers.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::Tokenizer;

/// `</s>`, which ends every generation.
pub(crate) const EOS: u32 = 3;

const WORDS: [&str; 12] =
    ["▁Hello", "▁world", "▁the", "▁User", "▁Assistant", "Hello", "User", "Assistant", "System", "é", "日", "\n"];

/// The decoder of a converted SentencePiece model whose texts start with an added space.
pub(crate) fn sentencepiece_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]})
}

/// A tokenizer.json with this decoder.
pub(crate) fn tokenizer_json(decoder: &Value) -> Value {
    let mut vocab = serde_json::Map::new();
    let mut merges: Vec<Value> = Vec::new();
    let mut add = |piece: &str| {
        let next = vocab.len();
        vocab.entry(piece.to_string()).or_insert(json!(next));
    };
    for piece in ["<pad>", "<unk>", "<s>", "</s>"] {
        add(piece);
    }
    for byte in 0..=255u8 {
        add(&format!("<0x{byte:02X}>"));
    }
    add("▁");
    for c in (b'!'..=b'~').map(char::from) {
        add(&c.to_string());
    }
    for word in WORDS {
        let mut left = String::new();
        for c in word.chars() {
            add(&c.to_string());
            if !left.is_empty() {
                let merge = json!([left, c.to_string()]);
                if !merges.contains(&merge) {
                    merges.push(merge);
                }
            }
            left.push(c);
            add(&left);
        }
    }
    let first_added = vocab.len();
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [special(2, "<s>"), special(3, "</s>"), special(first_added, "<extra_id_0>"),
                         special(first_added + 1, "<extra_id_1>")],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": merges},
    })
}

/// A tokenizer with this decoder.
pub(crate) fn tokenizer_with(decoder: &Value) -> Tokenizer {
    let json = tokenizer_json(decoder).to_string();
    Tokenizer::from_bytes(Path::new("tokenizer.json"), json.as_bytes()).expect("the fixture is valid")
}

/// The SentencePiece-style tokenizer.
pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(tokenizer_with(&sentencepiece_decoder()))
}

/// The id of a byte's fallback piece.
pub(crate) fn byte_id(byte: u8) -> u32 {
    4 + u32::from(byte)
}
