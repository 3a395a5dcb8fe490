use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use prost::Message as _;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::normalizer::Normalizer;
use super::proto::{ModelProto, NormalizerSpec, SentencePiece, TrainerSpec, kind, model_type};
use super::trie::Trie;
use super::unigram::Unigram;
use super::vocabulary::Vocabulary;
use crate::text::{Message, NemotronMarkers, StreamDecoder, Tokenizer};

const MODELS: [&str; 3] = ["byte_bpe", "nmt_bpe", "unigram"];

fn data(file: &str) -> PathBuf {
    Path::new("tests/data/tokenizers").join(file)
}

fn proto(model: &str) -> ModelProto {
    let bytes = std::fs::read(data(&format!("{model}.model"))).unwrap();
    super::proto::read(Path::new("t"), &bytes).unwrap()
}

fn load(proto: &ModelProto) -> Tokenizer {
    try_load(proto).unwrap()
}

fn try_load(proto: &ModelProto) -> crate::Result<Tokenizer> {
    Tokenizer::from_sentencepiece(Path::new("dir/tokenizer.model"), &proto.encode_to_vec())
}

fn rows<T: for<'a> Deserialize<'a>>(file: &str) -> Vec<T> {
    let text = std::fs::read_to_string(data(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> String {
    let mut decoder = StreamDecoder::new(tokenizer.clone());
    let mut text = String::new();
    for id in ids {
        decoder.push(*id, &mut text).unwrap();
    }
    decoder.flush(&mut text);
    text
}

/// Reference output of SentencePiece for a text, or for ids alone.
#[derive(Deserialize)]
struct Golden {
    ids: Vec<u32>,
    text: Option<String>,
}

#[test]
fn ids_and_texts_are_sentencepieces_own() {
    let lines: Vec<String> = rows("lines.jsonl");
    assert_eq!(lines.len(), 3000);
    for model in MODELS {
        let bytes = std::fs::read(data(&format!("{model}.model"))).unwrap();
        // The content identifies the format, and the reduced model in a package gives the same result.
        let tokenizer = Tokenizer::from_bytes(Path::new("t"), &bytes).unwrap();
        let kept = tokenizer.to_package(Path::new("t"), &bytes).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_package(Path::new("t"), &kept).unwrap());
        for (index, golden) in rows::<Golden>(&format!("{model}.jsonl")).iter().enumerate() {
            let line = lines.get(index);
            if let Some(line) = line {
                assert_eq!(tokenizer.encode(line).unwrap(), golden.ids, "{model}, line {index}: {line:?}");
            }
            let expected = golden.text.as_ref().or(line).unwrap();
            assert_eq!(&tokenizer.decode(&golden.ids).unwrap(), expected, "{model} {:?}", golden.ids);
            assert_eq!(&stream(&tokenizer, &golden.ids), expected, "{model} {:?}", golden.ids);
        }
    }
}

/// A model edited as by tools/make_tokenizers.py.
#[derive(Deserialize)]
struct Variant {
    model: String,
    edits: Map<String, Value>,
    /// Index of a line of lines.jsonl, its ids, and their text.
    encoded: Vec<(usize, Vec<u32>, String)>,
    decoded: Vec<(Vec<u32>, String)>,
}

impl Variant {
    fn proto(&self) -> ModelProto {
        let mut proto = proto(&self.model);
        for (key, value) in &self.edits {
            let normalizer = proto.normalizer_spec.as_mut().unwrap();
            let trainer = proto.trainer_spec.as_mut().unwrap();
            let normal = proto.pieces.iter_mut().enumerate();
            let normal = normal.filter(|(_, piece)| piece.kind.unwrap_or(kind::NORMAL) == kind::NORMAL);
            match key.as_str() {
                "add_dummy_prefix" => normalizer.add_dummy_prefix = value.as_bool(),
                "remove_extra_whitespaces" => normalizer.remove_extra_whitespaces = value.as_bool(),
                "escape_whitespaces" => normalizer.escape_whitespaces = value.as_bool(),
                "treat_whitespace_as_suffix" => trainer.treat_whitespace_as_suffix = value.as_bool(),
                "unk_surface" => trainer.unk_surface = value.as_str().map(str::to_string),
                "unused_every" => {
                    let every = value.as_u64().unwrap() as usize;
                    for (_, piece) in normal.filter(|(id, _)| id % every == 0) {
                        piece.kind = Some(kind::UNUSED);
                    }
                }
                "equal_scores" => {
                    for (_, piece) in normal {
                        piece.score = value.as_f64().map(|score| score as f32);
                    }
                }
                "user_defined" => {
                    for text in value.as_array().unwrap() {
                        proto.pieces.push(piece(text.as_str().unwrap(), kind::USER_DEFINED));
                    }
                }
                other => panic!("{other}"),
            }
        }
        proto
    }
}

#[test]
fn every_flag_means_what_it_means_to_sentencepiece() {
    let lines: Vec<String> = rows("lines.jsonl");
    for variant in rows::<Variant>("variants.jsonl") {
        let tokenizer = Arc::new(load(&variant.proto()));
        let name = format!("{} {:?}", variant.model, variant.edits);
        for (line, ids, text) in &variant.encoded {
            assert_eq!(&tokenizer.encode(&lines[*line]).unwrap(), ids, "{name}, line {line}: {:?}", lines[*line]);
            assert_eq!(&tokenizer.decode(ids).unwrap(), text, "{name}, line {line}: {:?}", lines[*line]);
        }
        for (ids, text) in &variant.decoded {
            assert_eq!(&tokenizer.decode(ids).unwrap(), text, "{name} {ids:?}");
            assert_eq!(&stream(&tokenizer, ids), text, "{name} {ids:?}");
        }
    }
}

#[test]
fn a_conversation_is_encoded_with_its_markers_whole() {
    let tokenizer = load(&proto("byte_bpe"));
    let text = NemotronMarkers::default().render(&[Message::user("Hello </s> 🙂")]).unwrap();
    let ids = tokenizer.encode(&text).unwrap();
    let marker = tokenizer.id(&NemotronMarkers::default().turn_start).unwrap();
    assert_eq!(Some(ids[0]), tokenizer.id(&NemotronMarkers::default().system_turn_start));
    assert_eq!(ids.iter().filter(|id| **id == marker).count(), 2);
    assert!(!ids.contains(&tokenizer.id("</s>").unwrap()), "a control piece in a text is plain characters");
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(tokenizer.piece(marker).as_deref(), Some("<extra_id_1>"));
    assert_eq!((tokenizer.vocab_size(), tokenizer.piece(1500)), (1500, None));
    assert!(tokenizer.decode(&[1500]).unwrap_err().to_string().contains("ids 0 to 1499"));
    // Continuations keep their leading space; a text loses the one that encoding adds.
    let tokenizer = load(&proto("nmt_bpe"));
    let ids = tokenizer.encode("the cat").unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "the cat");
    assert_eq!(tokenizer.decode_continuation(&ids).unwrap(), " the cat");
}

#[test]
fn facts_are_the_models() {
    let tokenizer = load(&proto("byte_bpe"));
    let facts = tokenizer.sentencepiece().unwrap();
    assert_eq!((facts.model_type, facts.pieces, facts.normalizer.as_str()), ("bpe", 1500, "identity"));
    assert_eq!((facts.user_defined_pieces, facts.control_pieces, facts.unused_pieces), (3, 3, 0));
    assert!(facts.byte_fallback && facts.escape_whitespaces && !facts.has_character_rules);
    assert!(!facts.add_dummy_prefix && !facts.remove_extra_whitespaces && !facts.treat_whitespace_as_suffix);
    assert_eq!((facts.unk_id, facts.bos_id, facts.eos_id, facts.pad_id), (1, Some(2), Some(3), Some(0)));
    let tokenizer = load(&proto("unigram"));
    let facts = tokenizer.sentencepiece().unwrap();
    assert_eq!((facts.model_type, facts.byte_fallback, facts.has_character_rules), ("unigram", false, true));
    assert_eq!((facts.unk_id, facts.bos_id, facts.eos_id, facts.pad_id), (0, Some(1), Some(2), Some(3)));
}

proptest! {
    /// The byte_bpe model has an identity normalizer and byte fallback, so decoding gives the text back, with spaces
    /// for `▁`.
    #[test]
    fn an_identity_normalizer_gives_the_text_back(
        text in prop::collection::vec(prop_oneof![
            any::<String>(), "[a-z ▁\n]{0,12}", Just("<extra_id_1>".into()), Just("</s>".into()),
        ], 0..6),
    ) {
        let text = text.concat().replace('\0', "");
        let tokenizer = Arc::new(load(&proto("byte_bpe")));
        let ids = tokenizer.encode(&text).unwrap();
        let expected = text.replace('▁', " ");
        prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), &expected);
        prop_assert_eq!(&stream(&tokenizer, &ids), &expected);
        prop_assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
    }

    #[test]
    fn a_stream_is_the_text_for_every_sequence(ids in prop::collection::vec(0u32..1500, 0..20), dummy: bool, extra: bool) {
        let mut proto = proto("byte_bpe");
        let spec = proto.normalizer_spec.as_mut().unwrap();
        (spec.add_dummy_prefix, spec.remove_extra_whitespaces) = (Some(dummy), Some(extra));
        let tokenizer = Arc::new(load(&proto));
        prop_assert_eq!(stream(&tokenizer, &ids), tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn a_damaged_file_is_an_error_or_a_tokenizer(
        model in 0usize..3,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0usize..40), 1..4),
    ) {
        let mut bytes = std::fs::read(data(&format!("{}.model", MODELS[model]))).unwrap();
        for (to, from, len) in edits {
            let (to, from) = (to.index(bytes.len()), from.index(bytes.len()));
            let copied = bytes[from..bytes.len().min(from + len)].to_vec();
            bytes.splice(to..bytes.len().min(to + len / 2), copied);
        }
        if let Ok(tokenizer) = Tokenizer::from_sentencepiece(Path::new("t"), &bytes)
            && let Ok(ids) = tokenizer.encode("Hello the 🙂 <extra_id_1>\n ｶﾞ ﬁ Ａ x")
        {
            tokenizer.decode(&ids).unwrap();
        }
    }

    /// The rules for characters alone, damaged anywhere.
    #[test]
    fn damaged_character_rules_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30), text: String,
    ) {
        let mut proto = proto("nmt_bpe");
        let rules = proto.normalizer_spec.as_mut().unwrap().precompiled_charsmap.as_mut().unwrap();
        for (at, byte) in edits {
            let at = at.index(rules.len());
            rules[at] = byte;
        }
        if let Ok(tokenizer) = try_load(&proto) {
            for text in [text.as_str(), "ﬁ Ａ ｶﾞ \u{a0}\u{3000}x e\u{301}"] {
                let ids = tokenizer.encode(text).unwrap();
                tokenizer.decode(&ids).unwrap();
            }
        }
    }

    /// Characters on the fast path are left unchanged by the full lookup too, even with damaged rules.
    #[test]
    fn what_is_not_looked_up_would_not_change(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        text in prop::collection::vec(prop_oneof![
            any::<String>(), "[a-z \n]{0,9}", "[A-Za-z \u{300}\u{301}\u{308}ﬁＡｶﾞがàά각]{0,9}", "[𝔘🙂한か\u{3099}]{0,4}",
            Just("<sep>".into()), Just("  ".into()),
        ], 0..8),
    ) {
        let mut proto = proto("nmt_bpe");
        let mut spec = proto.normalizer_spec.take().unwrap();
        let rules = spec.precompiled_charsmap.as_mut().unwrap();
        for (at, byte) in edits {
            let at = at.index(rules.len());
            rules[at] = byte;
        }
        let vocabulary = Vocabulary::new(Path::new("m"), proto.pieces, false).unwrap();
        let trainer = proto.trainer_spec.unwrap();
        if let Ok(mut normalizer) = Normalizer::new(&spec, &trainer, &vocabulary.user_defined) {
            let text = text.concat();
            let normalized = normalizer.normalize(&text, &vocabulary.user_defined);
            normalizer.look_everything_up();
            prop_assert_eq!(normalizer.normalize(&text, &vocabulary.user_defined), normalized);
        }
    }

    /// Splitting the text and queueing pairs change nothing compared with a naive implementation of the rule.
    #[test]
    fn merging_is_what_the_rule_says(
        pieces in prop::collection::btree_map("[abé▁]{1,5}", (0i32..6, 0usize..8), 0..40), text in "[abcé▁]{0,90}",
    ) {
        let mut proto = small(vec![piece("<unk>", kind::UNKNOWN)]);
        for (text, (score, kind)) in &pieces {
            let kind = if *kind == 0 { kind::USER_DEFINED } else { kind::NORMAL };
            proto.pieces.push(SentencePiece { score: Some(*score as f32 - 3.0), ..piece(text, kind) });
        }
        let id = |text: &str| proto.pieces.iter().position(|piece| piece.piece == text);
        let is_user_defined = |text: &str| pieces.get(text).is_some_and(|(_, kind)| *kind == 0);
        let mut symbols: Vec<&str> = Vec::new();
        let mut rest = text.as_str();
        while let Some(first) = rest.chars().next() {
            let ends = (1..=rest.len()).rev().filter(|end| rest.is_char_boundary(*end));
            let len = ends.map(|end| &rest[..end]).find(|start| is_user_defined(start)).map_or(first.len_utf8(), str::len);
            symbols.push(&rest[..len]);
            rest = &rest[len..];
        }
        let start = |symbol: &str| symbol.as_ptr() as usize - text.as_ptr() as usize;
        loop {
            let mut best: Option<(f32, usize, &str)> = None;
            for (index, both) in symbols.windows(2).enumerate() {
                let merged = &text[start(both[0])..start(both[1]) + both[1].len()];
                let frozen = [both[0], both[1]].map(&is_user_defined);
                let score = id(merged).and_then(|id| proto.pieces[id].score);
                if let Some(score) = score && frozen == [false, false] && best.is_none_or(|(least, ..)| score > least) {
                    best = Some((score, index, merged));
                }
            }
            let Some((_, index, merged)) = best else { break };
            symbols.splice(index..index + 2, [merged]);
        }
        let mut expected: Vec<u32> = symbols.iter().map(|symbol| id(symbol).unwrap_or(0) as u32).collect();
        expected.dedup_by(|a, b| (*a, *b) == (0, 0));
        prop_assert_eq!(load(&proto).encode(&text).unwrap(), expected);
    }

    #[test]
    fn a_trie_finds_every_prefix(keys in prop::collection::btree_set("[abc]{1,4}", 0..20), text in "[abcd]{0,8}") {
        let keys: Vec<String> = keys.into_iter().collect();
        let trie = Trie::new(keys.iter().enumerate().map(|(id, key)| (key.as_bytes(), id as u32)));
        let mut expected: Vec<(usize, u32)> = keys.iter().enumerate()
            .filter(|(_, key)| text.starts_with(key.as_str()))
            .map(|(id, key)| (key.len(), id as u32)).collect();
        expected.sort_unstable();
        let mut found = Vec::new();
        trie.prefixes(text.as_bytes(), |len, id| found.push((len, id)));
        prop_assert_eq!(trie.longest(text.as_bytes()), expected.last().map(|(len, _)| *len));
        prop_assert_eq!(found, expected);
    }
}

fn piece(text: &str, kind: i32) -> SentencePiece {
    SentencePiece { piece: text.into(), score: Some(0.0), kind: Some(kind) }
}

/// A model of a few pieces.
fn small(pieces: Vec<SentencePiece>) -> ModelProto {
    let normalizer = NormalizerSpec {
        add_dummy_prefix: Some(false),
        remove_extra_whitespaces: Some(false),
        ..NormalizerSpec::default()
    };
    ModelProto {
        pieces,
        trainer_spec: Some(TrainerSpec { model_type: Some(model_type::BPE), ..TrainerSpec::default() }),
        normalizer_spec: Some(normalizer),
        denormalizer_spec: None,
    }
}

#[test]
fn a_damaged_model_says_which_piece_or_field() {
    let refused = |proto: &ModelProto, words: &str| {
        let error = try_load(proto).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("dir/tokenizer.model: ") && error.contains(words), "{error}");
    };
    let pieces = || vec![piece("<unk>", kind::UNKNOWN), piece("a", kind::NORMAL), piece("b", kind::NORMAL)];
    let with = |extra: SentencePiece| {
        let mut pieces = pieces();
        pieces.push(extra);
        small(pieces)
    };
    assert_eq!(load(&small(pieces())).encode("abc").unwrap(), [1, 2, 0]);
    for score in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let bad = SentencePiece { score: Some(score), ..piece("ab", kind::NORMAL) };
        refused(&with(bad), "piece 3: `ab` has score");
    }
    refused(&with(piece("a", kind::NORMAL)), "piece 3: `a` is piece 1 already");
    refused(&with(piece("a", kind::UNUSED)), "piece 3: `a` is piece 1 already");
    refused(&with(piece("", kind::NORMAL)), "piece 3: it is empty");
    refused(&with(piece("x", 7)), "piece 3: `x` has type 7; types are 1 to 6");
    refused(&with(piece("x\0y", kind::NORMAL)), "piece 3: it contains a zero byte");
    refused(&with(piece(&"x".repeat(5000), kind::NORMAL)), "piece 3: 5000 bytes");
    refused(&with(piece("?", kind::UNKNOWN)), "its type is unknown, but so is that of piece 0");
    refused(&with(piece("<0x41>", kind::BYTE)), "trainer_spec.byte_fallback is off");
    refused(&small(pieces().split_off(1)), "none of its 2 pieces has type unknown");
    refused(&small(Vec::new()), "it has no pieces");
    let with_trainer = |change: fn(&mut TrainerSpec)| {
        let mut proto = small(pieces());
        change(proto.trainer_spec.as_mut().unwrap());
        proto
    };
    refused(&with_trainer(|t| t.byte_fallback = Some(true)), "there is no piece `<0x00>`");
    refused(&with_trainer(|t| t.eos_id = Some(3)), "trainer_spec.eos_id is 3; pieces are 0 to 2");
    refused(&with_trainer(|t| t.bos_id = Some(-2)), "trainer_spec.bos_id is -2");
    refused(&with_trainer(|t| t.pad_id = Some(i32::MAX)), "trainer_spec.pad_id");
    refused(&with_trainer(|t| t.unk_surface = Some("?".repeat(257))), "trainer_spec.unk_surface has 257 bytes");
    refused(&with_trainer(|t| t.model_type = Some(3)), "unsupported: trainer_spec.model_type is 3");
    let mut lowercase = with(piece("<0x4a>", kind::BYTE));
    lowercase.trainer_spec.as_mut().unwrap().byte_fallback = Some(true);
    refused(&lowercase, "`<0x4a>` has type byte");
    let with_rules = |rules: Vec<u8>| {
        let mut proto = small(pieces());
        proto.normalizer_spec.as_mut().unwrap().precompiled_charsmap = Some(rules);
        proto
    };
    refused(&with_rules(vec![1]), "normalizer_spec.precompiled_charsmap: 1 bytes");
    refused(&with_rules(vec![0xFF, 0xFF, 0xFF, 0xFF, 0, 0]), "a trie of 4294967295 bytes in 2");
    // One unit whose value is that unit itself, an offset past the texts.
    refused(&with_rules([4u32, 1 << 8].map(u32::to_le_bytes).concat().into_iter().chain([0]).collect()), "unit 0");
    // Its value is the next unit, whose text starts at 0.
    let long = [8u32, 1 << 8 | 1 << 10, 1 << 31].map(u32::to_le_bytes).concat();
    let long = |bytes: usize| with_rules([&*long, &*vec![b'x'; bytes], &[0]].concat());
    refused(&long(257), "unit 0 of its trie points to a text of over 256 bytes");
    load(&long(256));
    let mut denormalizer = small(pieces());
    denormalizer.denormalizer_spec =
        Some(NormalizerSpec { precompiled_charsmap: Some(vec![0; 9]), ..NormalizerSpec::default() });
    refused(&denormalizer, "unsupported: denormalizer_spec");
    // A control piece with the same name as a piece of the text: SentencePiece fails to encode it too.
    let error = load(&with(piece("a", kind::CONTROL))).encode("ba").unwrap_err().to_string();
    assert!(error.contains("`a`") && error.contains("piece 3"), "{error}");
}

#[test]
fn a_file_that_is_no_model_says_where() {
    let refused = |bytes: &[u8], words: &str| {
        let error = Tokenizer::from_sentencepiece(Path::new("m"), bytes).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("m: ") && error.contains(words), "{error}");
    };
    refused(b"", "it has no pieces");
    refused(b"{\"version\": \"1.0\"}", "not a SentencePiece model: at byte");
    refused(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "piece 0: it has 18446744073709551615 bytes");
    refused(b"\x0a\x05\x0a\x63ab", "piece 0: ");
    refused(b"\x0a\x03\x0a\x01\xff", "piece 0: ");
    refused(b"\x08\x01", "piece 0: a message was expected");
    refused(b"\x12\xff", "trainer_spec: ");
    refused(b"\x63\x63\x63\x63", "not a SentencePiece model: at byte 0, field 12");
    let whole = std::fs::read(data("byte_bpe.model")).unwrap();
    for len in (0..whole.len()).step_by(97) {
        let error = Tokenizer::from_sentencepiece(Path::new("m"), &whole[..len]).unwrap_err().to_string();
        assert!(error.starts_with("m: "), "{error}");
    }
    // Pieces of two bytes: far over the limit on pieces in a file under the limit on size.
    let many = b"\x0a\x00".repeat((1 << 20) + 1);
    refused(&many, "piece 1048576: a model has at most 1048576 pieces");
    // The content decides; anything else is parsed as a tokenizer.json.
    for (bytes, words) in
        [(&b"\n{"[..], "not a tokenizer.json"), (b"\n\n", "not a tokenizer.json"), (&whole[..50], "piece")]
    {
        let error = Tokenizer::from_bytes(Path::new("m"), bytes).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn what_is_settled_early_is_what_the_whole_text_would_say() {
    let vocabulary = Vocabulary::new(Path::new("m"), proto("unigram").pieces, false).unwrap();
    let mut unigram = Unigram::new(&vocabulary);
    // Long enough for scores to be rebased; with unknown characters and user-defined pieces.
    let text = rows::<String>("lines.jsonl").concat().replace(' ', "▁");
    let parts = |unigram: &Unigram| -> Vec<(u32, u32)> {
        unigram.encode(&vocabulary, text.as_bytes()).iter().map(|part| (part.len, part.id)).collect()
    };
    unigram.settled_bytes = usize::MAX;
    let whole = parts(&unigram);
    assert!(whole.len() > 20_000 && whole.iter().map(|(len, _)| *len as usize).sum::<usize>() == text.len());
    for settled_bytes in [0, 1, 100, 1 << 10] {
        unigram.settled_bytes = settled_bytes;
        assert!(parts(&unigram) == whole, "{settled_bytes}");
    }
}

fn time_to_encode(tokenizer: &Tokenizer, text: &str) -> Duration {
    let started = Instant::now();
    tokenizer.encode(text).unwrap();
    started.elapsed()
}

#[test]
fn long_texts_take_time_in_proportion() {
    let letters: String = "etaoinshrdlu"
        .chars()
        .cycle()
        .scan(7u32, |state, c| {
            *state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            Some(if *state >> 31 == 1 { c } else { 'e' })
        })
        .take(1 << 20)
        .collect();
    let mut chained = small(vec![piece("<unk>", kind::UNKNOWN)]);
    for len in 1..40 {
        chained.pieces.push(SentencePiece { score: Some(len as f32), ..piece(&"a".repeat(len), kind::NORMAL) });
        chained.pieces.push(piece(&format!("{}!", "a".repeat(len)), kind::USER_DEFINED));
    }
    let protos = MODELS.iter().map(|model| proto(model)).chain([chained]);
    for (index, proto) in protos.enumerate() {
        let tokenizer = load(&proto);
        for text in ["a".repeat(1 << 20), " ".repeat(1 << 20), letters.clone(), "é".repeat(1 << 19)] {
            let short = time_to_encode(&tokenizer, &text[..1 << 16]).min(time_to_encode(&tokenizer, &text[..1 << 16]));
            let long = time_to_encode(&tokenizer, &text);
            // 16 times as long: a quadratic encoder would take 256 times the time, which is minutes. The half second allows
            // for a busy machine.
            assert!(long < short * 100 + Duration::from_millis(500), "{index} {:?}: {short:?}, {long:?}", &text[..4]);
        }
    }
}
