//! Invariants of the SentencePiece model reader; see [`crate::fuzzing`].

use std::path::Path;
use std::sync::Arc;

use super::{StreamDecoder, Tokenizer};
use crate::fuzzing::check_refusal;

/// Separates the model from the text in an input.
const END_OF_MODEL: &[u8] = &[0xFF; 4];
/// Text that every model that loads must encode.
const TEXT: &str = "  The <s> ▁▁quick\u{a0}ﬁ bröwn 狐 🦊 jumps\n over\t\0 1,234\u{e9}e\u{301} <0x41></s> ";

/// Input: a SentencePiece model, optionally followed by [`END_OF_MODEL`] and a text. Whatever the model, every id of an
/// encoded text has a piece, and decoding ids all at once or one by one gives the same text.
pub fn sentencepiece(bytes: &[u8]) {
    let end = bytes.windows(END_OF_MODEL.len()).rposition(|four| four == END_OF_MODEL);
    let (model, text) = end.map_or((bytes, &[][..]), |end| (&bytes[..end], &bytes[end + END_OF_MODEL.len()..]));
    let tokenizer = match Tokenizer::from_sentencepiece(Path::new("tokenizer.model"), model) {
        Ok(tokenizer) => Arc::new(tokenizer),
        Err(error) => return check_refusal(&error),
    };
    let facts = tokenizer.sentencepiece().unwrap();
    assert_eq!(facts.pieces, tokenizer.vocab_size());
    let special = [Some(facts.unk_id), facts.bos_id, facts.eos_id, facts.pad_id];
    assert!(special.iter().flatten().all(|id| (*id as usize) < facts.pieces));

    for text in [TEXT, &String::from_utf8_lossy(text)] {
        match tokenizer.encode(text) {
            Ok(ids) => check_decoding(&tokenizer, &ids),
            Err(error) => check_refusal(&error),
        }
    }
    let ids: Vec<u32> = (0..tokenizer.vocab_size() as u32).collect();
    check_decoding(&tokenizer, &ids);
    for id in ids {
        // Where two pieces share a name, lookup finds the reserved one.
        let piece = tokenizer.piece(id).unwrap();
        assert_eq!(tokenizer.piece(tokenizer.id(&piece).unwrap()), Some(piece));
    }
    let past_the_end = tokenizer.vocab_size() as u32;
    check_refusal(&tokenizer.decode(&[past_the_end]).unwrap_err());
}

fn check_decoding(tokenizer: &Arc<Tokenizer>, ids: &[u32]) {
    assert!(ids.iter().all(|id| tokenizer.piece(*id).is_some()));
    let mut streamed = String::new();
    let mut stream = StreamDecoder::new(tokenizer.clone());
    ids.iter().for_each(|id| stream.push(*id, &mut streamed).unwrap());
    stream.flush(&mut streamed);
    assert_eq!(tokenizer.decode(ids).unwrap(), streamed);
    tokenizer.decode_continuation(ids).unwrap();
}
