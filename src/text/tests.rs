use std::path::Path;
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use serde_json::json;

use super::fixture::{byte_id, sentencepiece_decoder, tokenizer, tokenizer_json, tokenizer_with};
use super::{Message, NemotronMarkers};
use super::{StreamDecoder, Tokenizer};

fn shared() -> Arc<Tokenizer> {
    static SHARED: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    SHARED.get_or_init(tokenizer).clone()
}

fn bytes_as_ids(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|byte| byte_id(*byte)).collect()
}

fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Vec<String> {
    let mut decoder = StreamDecoder::new(tokenizer.clone());
    let mut pieces = Vec::new();
    for id in ids {
        let mut text = String::new();
        decoder.push(*id, &mut text).unwrap();
        pieces.push(text);
    }
    let mut rest = String::new();
    decoder.flush(&mut rest);
    pieces.push(rest);
    pieces
}

#[test]
fn text_survives_the_round_trip_whole() {
    let tokenizer = shared();
    for text in ["Hello world", "the\nUser", "é日", "🙂 مرحبا 你好 \u{0}", " two  spaces ", "a▁b", ""] {
        let ids = tokenizer.encode(text).unwrap();
        // The fixture adds no space in front, so the text is decoded as a continuation; a space is spelled `▁`.
        assert_eq!(tokenizer.decode_continuation(&ids).unwrap(), text.replace('▁', " "), "{ids:?}");
    }
    let hello = tokenizer.id("▁Hello").unwrap();
    assert_eq!(tokenizer.decode(&[hello, hello]).unwrap(), "Hello Hello");
    assert_eq!(tokenizer.decode_continuation(&[hello, hello]).unwrap(), " Hello Hello");
    assert!(tokenizer.encode(&"x".repeat(1000)).unwrap().len() == 1000, "the file's truncation to 4 is off");
}

#[test]
fn special_pieces_are_one_id_each_and_none_are_added() {
    let tokenizer = shared();
    let text = NemotronMarkers::default().render(&[Message::user("Hello")]).unwrap();
    let ids = tokenizer.encode(&text).unwrap();
    let marker = tokenizer.id(&NemotronMarkers::default().turn_start).unwrap();
    assert_eq!(ids[0], tokenizer.id(&NemotronMarkers::default().system_turn_start).unwrap());
    assert_eq!(ids.iter().filter(|id| **id == marker).count(), 2);
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(tokenizer.vocab_size() as u32, marker + 1);
    assert_eq!(tokenizer.piece(marker).as_deref(), Some("<extra_id_1>"));
    assert_eq!((tokenizer.piece(marker + 1), tokenizer.id("nothing like it")), (None, None));
    assert_eq!(tokenizer.decode(&[3]).unwrap(), "</s>", "control ids show; the stop logic removes them");
    let error = tokenizer.decode(&[marker + 1]).unwrap_err().to_string();
    assert!(error.contains(&format!("ids 0 to {marker}")), "{error}");
}

#[test]
fn a_character_shows_when_its_last_byte_comes() {
    let tokenizer = shared();
    assert_eq!(stream(&tokenizer, &bytes_as_ids("🙂".as_bytes())), ["", "", "", "🙂", ""]);
    assert_eq!(stream(&tokenizer, &bytes_as_ids(&[0xE4, 0xBD])), ["", "", "\u{FFFD}\u{FFFD}"]);
    // An answer that ends inside of a character has one for it, streamed or not.
    let cut = bytes_as_ids(&[b'a', 0xF0, 0x9F, 0x99]);
    assert_eq!(tokenizer.decode(&cut).unwrap(), "a\u{FFFD}\u{FFFD}\u{FFFD}");
    assert_eq!(tokenizer.decode_continuation(&cut).unwrap(), "a\u{FFFD}");
    let (mut decoder, mut answer) = (StreamDecoder::continuing(tokenizer.clone()), String::new());
    cut.iter().for_each(|id| decoder.push(*id, &mut answer).unwrap());
    decoder.flush(&mut answer);
    assert_eq!(answer, "a\u{FFFD}");
    assert_eq!(stream(&tokenizer, &bytes_as_ids(&[0xFF, b'a', 0xC3, b'b'])), ["\u{FFFD}", "a", "", "\u{FFFD}b", ""]);
    // A surrogate and an overlong form are malformed at their second byte.
    assert_eq!(stream(&tokenizer, &bytes_as_ids(&[0xED, 0xA0, 0x80])).concat(), "\u{FFFD}".repeat(3));
    let hello = tokenizer.id("▁Hello").unwrap();
    assert_eq!(stream(&tokenizer, &[byte_id(0xF0), byte_id(0x9F), hello]), ["", "", "\u{FFFD}\u{FFFD} Hello", ""]);
}

#[test]
fn decoding_agrees_with_the_reference() {
    let json = tokenizer_json(&sentencepiece_decoder()).to_string();
    let reference = tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap();
    let ours = shared();
    for text in ["▁Hello", "  Hello", "日本語 🙂🙂 User\n<extra_id_1>", "é ê ë"] {
        let ids = ours.encode(text).unwrap();
        assert_eq!(ours.decode(&ids).unwrap(), reference.decode(&ids, false).unwrap(), "{text:?}");
    }
    for decoder in [
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": false}),
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        json!(null),
    ] {
        let json = tokenizer_json(&decoder).to_string();
        let reference = tokenizers::Tokenizer::from_bytes(json.as_bytes()).unwrap();
        let ours = tokenizer_with(&decoder);
        for id in 0..ours.vocab_size() as u32 {
            let ids = [id, 270, id];
            assert_eq!(ours.decode(&ids).unwrap(), reference.decode(&ids, false).unwrap(), "{decoder} {id}");
        }
    }
}

#[test]
fn byte_level_pieces_are_bytes() {
    let vocab = json!({"Ġ": 0, "ð": 1, "Ł": 2, "Ļ": 3, "Ĥ": 4, "a": 5, "Ċ": 6, "ł": 7, "Ń": 8});
    let json = json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": true}, "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    let text = json.to_string();
    let ours = Arc::new(Tokenizer::from_bytes(Path::new("t"), text.as_bytes()).unwrap());
    let ids = [0, 1, 2, 3, 4, 5, 6];
    assert_eq!(ours.decode(&ids).unwrap(), " 🙂a\n");
    assert_eq!(stream(&ours, &ids), [" ", "", "", "", "🙂", "a", "\n", ""]);
    let reference = tokenizers::Tokenizer::from_bytes(text.as_bytes()).unwrap();
    for ids in [[1, 2, 5, 7], [7, 8, 1, 1], [1, 2, 3, 6]] {
        assert_eq!(ours.decode(&ids).unwrap(), reference.decode(&ids, false).unwrap());
    }
}

#[test]
fn what_is_not_a_usable_tokenizer_says_why() {
    let load = |text: &str| Tokenizer::from_bytes(Path::new("dir/tokenizer.json"), text.as_bytes());
    for text in ["", "{", "[]", "{\"version\": \"1.0\"}", "\u{0}"] {
        assert!(load(text).unwrap_err().to_string().starts_with("dir/tokenizer.json: not a tokenizer.json"), "{text}");
    }
    let with = |decoder| load(&tokenizer_json(&decoder).to_string());
    let error = with(json!({"type": "WordPiece", "prefix": "##", "cleanup": true})).unwrap_err().to_string();
    assert!(error.contains("unsupported") && error.contains("WordPiece"), "{error}");
    let error = with(json!({"type": "Strip", "content": " ", "start": 0, "stop": 1})).unwrap_err().to_string();
    assert!(error.contains("stop 1"), "{error}");
    let mut huge = tokenizer_json(&json!(null));
    huge["model"]["vocab"]["far"] = json!(4_000_000_000u32);
    assert!(load(&huge.to_string()).unwrap_err().to_string().contains("4000000000"));
    let empty = json!({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}});
    assert!(load(&empty.to_string()).unwrap_err().to_string().contains("empty"));
}

#[test]
fn a_package_keeps_both_kinds_in_one_form() {
    let json = tokenizer_json(&sentencepiece_decoder()).to_string();
    let model = std::fs::read("tests/data/tokenizers/nmt_bpe.model").unwrap();
    for source in [json.as_bytes(), &model] {
        let tokenizer = Tokenizer::from_bytes(Path::new("t"), source).unwrap();
        let kept = tokenizer.to_package(Path::new("t"), source).unwrap();
        let again = Tokenizer::from_package(Path::new("t"), &kept).unwrap();
        for text in ["Hello world", " <extra_id_1> é日🙂 ﬁ\u{300}\n", ""] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(again.encode(text).unwrap(), ids);
            assert_eq!(again.decode(&ids).unwrap(), tokenizer.decode(&ids).unwrap());
        }
        assert_eq!((again.vocab_size(), again.file_name()), (tokenizer.vocab_size(), tokenizer.file_name()));
        assert_eq!(again.sentencepiece(), tokenizer.sentencepiece());
        for len in 0..kept.len().min(300) {
            assert!(Tokenizer::from_package(Path::new("t"), &kept[..len]).is_err(), "{len}");
        }
    }
    // The training paths are dropped: field 1 of trainer_spec, which is field 2.
    let trained = [model.as_slice(), b"\x12\x06\x0a\x04/tmp"].concat();
    let tokenizer = Tokenizer::from_bytes(Path::new("t"), &trained).unwrap();
    let kept = tokenizer.to_package(Path::new("t"), &trained).unwrap();
    assert_eq!(kept, tokenizer.to_package(Path::new("t"), &model).unwrap());
}

#[test]
fn what_is_no_packages_tokenizer_says_why() {
    let json = tokenizer_json(&json!(null)).to_string();
    let kept = shared().to_package(Path::new("t"), json.as_bytes()).unwrap();
    let header = r#"{"format":"aotron-tokenizer","version":1,"rules":"tokenizer-json","bytes":"#;
    assert!(kept.starts_with(format!("{header}{}}}\n{json}", json.len()).as_bytes()));
    let refused = |bytes: &[u8], words: &str| {
        let error = Tokenizer::from_package(Path::new("dir/tokenizer.aotron"), bytes).unwrap_err().to_string();
        assert!(error.starts_with("dir/tokenizer.aotron: ") && error.contains(words), "{error}");
    };
    refused(b"", "no line ends within its first 0 bytes");
    refused(&b" ".repeat(5000), "no line ends within its first 1024 bytes");
    refused(json.as_bytes(), "no line ends");
    refused(b"{}\n", "its first line: missing field `format`");
    refused(&kept[..kept.len() - 1], "bytes should follow its first line");
    refused(&[kept.as_slice(), b" "].concat(), "bytes should follow its first line");
    let with = |from: &str, to: &str| String::from_utf8(kept.clone()).unwrap().replacen(from, to, 1).into_bytes();
    refused(&with("aotron-tokenizer", "other"), "its format is \"other\"");
    refused(&with("\"version\":1", "\"version\":2"), "unsupported: tokenizer version 2; this aotron reads version 1");
    refused(&with("tokenizer-json", "word-piece"), "unknown variant `word-piece`");
    refused(&with("tokenizer-json", "sentencepiece"), "not a SentencePiece model");
    refused(&with("\"bytes\"", "\"pad\":0,\"bytes\""), "unknown field `pad`");
}

proptest! {
    #[test]
    fn a_stream_is_the_text_for_every_sequence(ids in prop::collection::vec(0u32..420, 0..40)) {
        let tokenizer = shared();
        let ids: Vec<u32> = ids.into_iter().filter(|id| (*id as usize) < tokenizer.vocab_size()).collect();
        prop_assert_eq!(stream(&tokenizer, &ids).concat(), tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn bytes_of_any_text_come_back(text in any::<String>(), junk in prop::collection::vec(any::<u8>(), 0..6)) {
        let tokenizer = shared();
        let all = stream(&tokenizer, &bytes_as_ids(text.as_bytes())).concat();
        prop_assert_eq!(&all, text.strip_prefix(' ').unwrap_or(&text));
        // Text that was shown stays as it is, whatever follows.
        let bytes = [b"x", text.as_bytes(), &junk].concat();
        let with_junk = stream(&tokenizer, &bytes_as_ids(&bytes)).concat();
        let shown = format!("x{text}");
        prop_assert!(with_junk.starts_with(&shown));
    }
}

#[test]
fn the_template_is_the_cards() {
    let card = "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem\n<extra_id_1>Assistant\n";
    assert_eq!(NemotronMarkers::default().render(&[Message::user("Write a poem")]).unwrap(), card);
    assert_eq!(NemotronMarkers::default().render(&[Message::system(""), Message::user("Write a poem")]).unwrap(), card);
    let turns = [Message::system("Be brief."), Message::user(" a "), Message::assistant("b\n"), Message::user("c")];
    assert_eq!(
        NemotronMarkers::default().render(&turns).unwrap(),
        "<extra_id_0>System\nBe brief.\n<extra_id_1>User\n a \n<extra_id_1>Assistant\nb\n\n<extra_id_1>User\nc\n\
         <extra_id_1>Assistant\n"
    );
}

#[test]
fn a_conversation_out_of_order_is_refused() {
    let refused = |messages: &[Message]| NemotronMarkers::default().render(messages).unwrap_err().to_string();
    let (system, user, assistant) = (Message::system("s"), Message::user("u"), Message::assistant("a"));
    assert!(refused(&[]).ends_with("for the assistant to answer, but it has none"));
    assert!(refused(std::slice::from_ref(&system)).ends_with("for the assistant to answer, but it has none"));
    assert!(refused(&[user.clone(), assistant.clone()]).contains("the last message is the assistant's"));
    assert!(refused(&[user.clone(), user.clone()]).contains("message 2 has role user, but assistant is next"));
    assert!(refused(&[system.clone(), assistant.clone()]).contains("message 2 has role assistant, but user"));
    assert!(refused(&[user, system, assistant]).contains("message 2 has role system"));
    let json = r#"{"role": "user", "content": "x"}"#;
    assert_eq!(serde_json::from_str::<Message>(json).unwrap(), Message::user("x"));
    assert!(serde_json::from_str::<Message>(r#"{"role": "tool", "content": ""}"#).is_err());
}

proptest! {
    #[test]
    fn a_damaged_file_is_an_error_or_a_tokenizer(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0usize..40), 1..4),
    ) {
        let mut bytes = tokenizer_json(&sentencepiece_decoder()).to_string().into_bytes();
        for (to, from, len) in edits {
            let (to, from) = (to.index(bytes.len()), from.index(bytes.len()));
            let copied = bytes[from..bytes.len().min(from + len)].to_vec();
            bytes.splice(to..bytes.len().min(to + len / 2), copied);
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(Path::new("t"), &bytes)
            && let Ok(ids) = tokenizer.encode("Hello the 🙂 <extra_id_1>\n")
        {
            tokenizer.decode(&ids).unwrap();
        }
    }
}
