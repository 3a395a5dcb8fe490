//! Reads the model file: the few fields of SentencePiece's `ModelProto` (sentencepiece_model.proto) that affect
//! encoding and decoding. All others are skipped.
//!
//! Pieces are counted and decoded one at a time, so that a small file cannot claim much memory and an error can name
//! the piece.

use std::path::Path;

use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use crate::error::{Error, Result};

/// Larger files are refused; a model of 256,000 pieces has about 5 MB.
const MAX_FILE_BYTES: usize = 256 << 20;
/// Models with more pieces are refused.
const MAX_PIECES: usize = 1 << 20;

/// The values of `ModelProto.SentencePiece.Type`.
pub(super) mod kind {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

/// The supported values of `TrainerSpec.ModelType`.
pub(super) mod model_type {
    pub const UNIGRAM: i32 = 1;
    pub const BPE: i32 = 2;
}

/// `ModelProto.SentencePiece`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SentencePiece {
    #[prost(string, tag = "1")]
    pub piece: String,
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    /// One of [`kind`]; [`kind::NORMAL`] if absent.
    #[prost(int32, optional, tag = "3")]
    pub kind: Option<i32>,
}

/// `TrainerSpec`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct TrainerSpec {
    /// One of [`model_type`]; unigram if absent.
    #[prost(int32, optional, tag = "3")]
    pub model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    pub treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    pub byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    pub unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    pub bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    pub eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pub pad_id: Option<i32>,
    #[prost(string, optional, tag = "44")]
    pub unk_surface: Option<String>,
    #[prost(string, optional, tag = "45")]
    pub unk_piece: Option<String>,
    #[prost(string, optional, tag = "46")]
    pub bos_piece: Option<String>,
    #[prost(string, optional, tag = "47")]
    pub eos_piece: Option<String>,
    #[prost(string, optional, tag = "48")]
    pub pad_piece: Option<String>,
}

/// `NormalizerSpec`. Absent flags are on.
#[derive(Clone, PartialEq, Message)]
pub(super) struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    pub add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub escape_whitespaces: Option<bool>,
}

/// `ModelProto`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<SentencePiece>,
    #[prost(message, optional, tag = "2")]
    pub trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    pub normalizer_spec: Option<NormalizerSpec>,
    #[prost(message, optional, tag = "5")]
    pub denormalizer_spec: Option<NormalizerSpec>,
}

/// Reads a model, enforcing the limits. `name` is the file named in errors.
pub(super) fn read(name: &Path, bytes: &[u8]) -> Result<ModelProto> {
    if bytes.len() > MAX_FILE_BYTES {
        let detail = format!("{} bytes; a SentencePiece model may have at most {MAX_FILE_BYTES}", bytes.len());
        return Err(Error::format(name, detail));
    }
    let mut model = ModelProto::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        let offset = bytes.len() - rest.len();
        let refused =
            |what: String| Error::format(name, format!("not a SentencePiece model: at byte {offset}, {what}"));
        let (field, wire_type) = decode_key(&mut rest).map_err(|source| refused(format!("a field: {source}")))?;
        let what = match field {
            1 => "piece",
            2 => "trainer_spec",
            3 => "normalizer_spec",
            5 => "denormalizer_spec",
            _ => {
                skip_field(wire_type, field, &mut rest, DecodeContext::default())
                    .map_err(|source| refused(format!("field {field}: {source}")))?;
                continue;
            }
        };
        let number = if field == 1 { Some(model.pieces.len()) } else { None };
        let refused = |source: String| {
            refused(match number {
                Some(number) => format!("{what} {number}: {source}"),
                None => format!("{what}: {source}"),
            })
        };
        if wire_type != WireType::LengthDelimited {
            return Err(refused(format!("a message was expected, not a value of wire type {wire_type:?}")));
        }
        let len = decode_varint(&mut rest).map_err(|source| refused(source.to_string()))?;
        let split = usize::try_from(len).ok().and_then(|len| rest.split_at_checked(len));
        let Some((message, after)) = split else {
            return Err(refused(format!("it has {len} bytes, but the file ends after {}", rest.len())));
        };
        rest = after;
        let merged = match field {
            1 if model.pieces.len() == MAX_PIECES => {
                return Err(refused(format!("a model has at most {MAX_PIECES} pieces")));
            }
            1 => SentencePiece::decode(message).map(|piece| model.pieces.push(piece)),
            2 => model.trainer_spec.get_or_insert_default().merge(message),
            3 => model.normalizer_spec.get_or_insert_default().merge(message),
            _ => model.denormalizer_spec.get_or_insert_default().merge(message),
        };
        merged.map_err(|source| refused(source.to_string()))?;
    }
    Ok(model)
}
