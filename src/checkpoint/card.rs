//! Nemotron-3-8B-Chat-4k-RLHF as described by its model card, to report how an opened `.nemo` differs from it. Any
//! model of the architecture runs, but a user who expects this one should learn that the file is another.

use std::fmt::Display;

use super::ModelConfig;
use crate::tensor::DType;

/// Starts the system turn.
pub const SYSTEM_MARK: &str = "<extra_id_0>";
/// Starts every other turn, and so ends an answer.
pub const TURN_MARK: &str = "<extra_id_1>";

const PIECES: usize = 256_000;
const BOS: u32 = 2;
const EOS: u32 = 3;

/// Properties of a SentencePiece model that the card's prompts rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pieces {
    /// Pieces of all kinds.
    pub count: usize,
    /// Id of the beginning-of-sequence control piece, if any.
    pub bos_id: Option<u32>,
    /// Id of the end-of-sequence control piece, if any.
    pub eos_id: Option<u32>,
    /// [`SYSTEM_MARK`] is a user-defined piece, which always matches whole.
    pub has_system_mark: bool,
    /// [`TURN_MARK`] is a user-defined piece.
    pub has_turn_mark: bool,
}

/// Differences from the model card, one per line; empty if there are none. `pieces` describes the tokenizer, if it is a
/// SentencePiece model.
pub fn differences(config: &ModelConfig, pieces: Option<&Pieces>) -> Vec<String> {
    let card = config_of_card();
    let mut lines = CardLines(Vec::new());
    lines.compare("hidden_size", config.hidden_size, card.hidden_size);
    lines.compare("intermediate_size", config.intermediate_size, card.intermediate_size);
    lines.compare("num_layers", config.num_layers, card.num_layers);
    lines.compare("num_heads", config.num_heads, card.num_heads);
    lines.compare("num_kv_heads", config.num_kv_heads, card.num_kv_heads);
    lines.compare("head_dim", config.head_dim, card.head_dim);
    lines.compare("rotary_dim", config.rotary_dim, card.rotary_dim);
    lines.compare("rope_theta", config.rope_theta, card.rope_theta);
    lines.compare("max_position_embeddings", config.max_position_embeddings, card.max_position_embeddings);
    lines.compare("norm_eps", config.norm_eps, card.norm_eps);
    lines.compare("tie_word_embeddings", config.tie_word_embeddings, card.tie_word_embeddings);
    lines.compare("dtype", config.dtype, card.dtype);
    // More ranks in training pad the vocabulary further; the ids are the tokenizer's.
    if config.vocab_size < card.vocab_size {
        lines.compare("vocab_size", config.vocab_size, card.vocab_size);
    }
    let Some(pieces) = pieces else {
        lines.0.push("it has no SentencePiece tokenizer; the model card has one".to_owned());
        return lines.0;
    };
    let id = |id: Option<u32>| id.map_or("none".to_owned(), |id| id.to_string());
    lines.compare("tokenizer pieces", pieces.count, PIECES);
    lines.compare("tokenizer bos id", id(pieces.bos_id), id(card.bos_token_id));
    lines.compare("tokenizer eos id", id(pieces.eos_id), EOS.to_string());
    for (mark, there) in [(SYSTEM_MARK, pieces.has_system_mark), (TURN_MARK, pieces.has_turn_mark)] {
        if !there {
            lines.0.push(format!(
                "`{mark}` is not a user-defined piece of the tokenizer; the model card's prompts need it"
            ));
        }
    }
    lines.0
}

struct CardLines(Vec<String>);

impl CardLines {
    fn compare<T: PartialEq + Display>(&mut self, name: &str, found: T, card: T) {
        if found != card {
            self.0.push(format!("{name} is {found}; the model card has {card}"));
        }
    }
}

fn config_of_card() -> ModelConfig {
    ModelConfig {
        vocab_size: PIECES,
        hidden_size: 4096,
        intermediate_size: 16384,
        num_layers: 32,
        num_heads: 32,
        num_kv_heads: 32,
        head_dim: 128,
        rotary_dim: 64,
        rope_theta: 10_000.0,
        max_position_embeddings: 4096,
        norm_eps: 1e-5,
        tie_word_embeddings: false,
        dtype: DType::BF16,
        bos_token_id: Some(BOS),
        eos_token_ids: vec![EOS],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARD: Pieces =
        Pieces { count: 256_000, bos_id: Some(2), eos_id: Some(3), has_system_mark: true, has_turn_mark: true };

    #[test]
    fn the_cards_model_differs_in_nothing() {
        assert_eq!(config_of_card().validate(), Ok(()));
        assert_eq!(config_of_card().parameters(), Some(8_540_135_424));
        assert_eq!(differences(&config_of_card(), Some(&CARD)), Vec::<String>::new());
        let padded = ModelConfig { vocab_size: 256_128, ..config_of_card() };
        assert_eq!(differences(&padded, Some(&CARD)), Vec::<String>::new());
    }

    #[test]
    fn names_every_difference() {
        let config = ModelConfig {
            vocab_size: 512,
            hidden_size: 192,
            intermediate_size: 768,
            num_layers: 4,
            num_heads: 6,
            num_kv_heads: 2,
            head_dim: 32,
            rotary_dim: 16,
            rope_theta: 500.0,
            max_position_embeddings: 256,
            norm_eps: 1e-6,
            tie_word_embeddings: true,
            dtype: DType::F32,
            bos_token_id: None,
            eos_token_ids: vec![],
        };
        let pieces = Pieces { count: 500, bos_id: None, eos_id: Some(1), has_system_mark: true, has_turn_mark: false };
        let expected = [
            "hidden_size is 192; the model card has 4096",
            "intermediate_size is 768; the model card has 16384",
            "num_layers is 4; the model card has 32",
            "num_heads is 6; the model card has 32",
            "num_kv_heads is 2; the model card has 32",
            "head_dim is 32; the model card has 128",
            "rotary_dim is 16; the model card has 64",
            "rope_theta is 500; the model card has 10000",
            "max_position_embeddings is 256; the model card has 4096",
            "norm_eps is 0.000001; the model card has 0.00001",
            "tie_word_embeddings is true; the model card has false",
            "dtype is f32; the model card has bf16",
            "vocab_size is 512; the model card has 256000",
            "tokenizer pieces is 500; the model card has 256000",
            "tokenizer bos id is none; the model card has 2",
            "tokenizer eos id is 1; the model card has 3",
            "`<extra_id_1>` is not a user-defined piece of the tokenizer; the model card's prompts need it",
        ];
        assert_eq!(differences(&config, Some(&pieces)), expected);
        let lines = differences(&config_of_card(), None);
        assert_eq!(lines, ["it has no SentencePiece tokenizer; the model card has one"]);
    }
}
