//! JSON bodies: their size, the time they take to arrive, wrong values and unknown fields.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokio::task::JoinHandle;

use super::app::App;
use super::error::ApiError;
use super::options::UnknownFields;

/// Most unknown fields that are named in a reply.
const NAMED_FIELDS: usize = 16;
/// Requests with bodies larger than this, or of unknown length, are not answered on the threads that serve connections.
const LARGE_BODY_BYTES: u64 = 256 << 10;

/// A value that is accepted, whatever it is, and has no effect. It is optional, by which it is told from an unknown field.
#[derive(Debug, Clone, Copy)]
pub(super) struct Accepted;

impl<'de> Deserialize<'de> for Accepted {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Accepted, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer).map(|_| Accepted)
    }
}

/// What is deserialized from an object alone; serde's own code for a struct also takes a list of its fields' values.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object<T>, D::Error> {
        struct Visit<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Visit<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }

        deserializer.deserialize_map(Visit(PhantomData))
    }
}

/// Deserializes a field that is an object.
pub(super) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Object::deserialize(deserializer).map(|Object(value)| value)
}

/// Deserializes a field that is an object, or null.
pub(super) fn object_or_null<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    Option::<Object<T>>::deserialize(deserializer).map(|value| value.map(|Object(value)| value))
}

/// Words of serde, which are Rust's, and those of JSON.
const WORDS: [(&str, &str); 10] = [
    ("expected usize", "expected a whole number that is not negative"),
    ("expected u64", "expected a whole number that is not negative"),
    ("expected u32", "expected a whole number from 0 to 4294967295"),
    ("expected i64", "expected a whole number"),
    ("expected i32", "expected a whole number from -2147483648 to 2147483647"),
    ("expected f32", "expected a number"),
    ("expected a sequence", "expected a list"),
    ("expected a map", "expected an object"),
    ("invalid type: sequence", "invalid type: list"),
    ("invalid type: map", "invalid type: object"),
];

/// An error of serde in the words of JSON.
fn in_words(error: &serde_json::Error) -> String {
    WORDS.iter().fold(error.to_string(), |text, (theirs, ours)| text.replace(theirs, ours))
}

/// Reads a body whole.
///
/// # Errors
/// 415 if it is compressed, 413 if it is too large, 408 if it does not arrive in time, 400 if the connection breaks.
pub(super) async fn read_bytes(app: &App, request: Request) -> Result<axum::body::Bytes, ApiError> {
    let encoding = request.headers().get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| !encoding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(ApiError::encoded_body());
    }
    let body = request.into_body();
    let limit = app.options().max_body_bytes;
    // A length that is announced need not be waited for.
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::too_large(limit));
    }
    let whole = tokio::time::timeout(app.options().client_timeout, Limited::new(body, limit).collect()).await;
    match whole {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => Err(ApiError::too_large(limit)),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the body cannot be read: {error}"))),
        Err(_) => Err(ApiError::too_slow()),
    }
}

/// A parsed body, and the fields of it that mean nothing.
#[derive(Debug)]
pub(super) struct ParsedBody<T> {
    pub value: T,
    pub ignored: Vec<String>,
}

/// Answers requests with large bodies on threads of their own: to parse, to convert and even to drop what they hold may take
/// a second, in which the threads that serve connections would serve none.
pub(super) async fn large_aside(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let is_large = request.body().size_hint().upper().is_none_or(|bytes| bytes > LARGE_BODY_BYTES);
    match app.aside().filter(|_| is_large) {
        None => next.run(request).await,
        Some(aside) => {
            let mut answer = Aborting(aside.spawn(next.run(request)));
            (&mut answer.0).await.unwrap_or_else(|_| ApiError::internal().into_response())
        }
    }
}

/// A task that ends when nobody waits for it any more.
struct Aborting<T>(JoinHandle<T>);

impl<T> Drop for Aborting<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads and parses a body.
///
/// # Errors
/// As [`read_bytes`], and 400 naming the field that is wrong or, if the server is to reject them, unknown.
pub(super) async fn read_json<T: DeserializeOwned>(app: &App, request: Request) -> Result<ParsedBody<T>, ApiError> {
    let bytes = read_bytes(app, request).await?;
    parse(&bytes, app.options().unknown_fields)
}

fn parse<T: DeserializeOwned>(bytes: &[u8], unknown: UnknownFields) -> Result<ParsedBody<T>, ApiError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(ApiError::bad_request("the body is empty; expected a JSON object"));
    }
    let mut ignored = Vec::new();
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let mut note = |path: serde_ignored::Path<'_>| {
        // The value of a field that is known and has no effect.
        if matches!(path, serde_ignored::Path::Some { .. }) {
            return;
        }
        if ignored.len() <= NAMED_FIELDS {
            ignored.push(crate::error::clip(&path).replace(|c: char| !c.is_ascii_graphic(), "?"));
        }
    };
    let read = serde_path_to_error::deserialize(serde_ignored::Deserializer::new(&mut reader, &mut note));
    let Object(value): Object<T> = read.map_err(|error| {
        let words = in_words(error.inner());
        match error.path().to_string().as_str() {
            "." | "?" => ApiError::bad_request(format!("the body is not as expected: {words}")),
            path => ApiError::of_field(path, format!("{}: {words}", crate::error::clip(path))),
        }
    })?;
    reader.end().map_err(|error| ApiError::bad_request(format!("the body is not one JSON value: {error}")))?;
    match (unknown, ignored.first()) {
        (UnknownFields::Reject, Some(first)) => {
            let message = format!("unknown field {}; --unknown-fields warn accepts it", ignored.join(", "));
            Err(ApiError::of_field(first.clone(), message))
        }
        _ => Ok(ParsedBody { value, ignored }),
    }
}

/// Names the ignored fields in a reply.
pub(super) fn name_ignored(response: &mut Response, ignored: &[String]) {
    if let (false, Ok(value)) = (ignored.is_empty(), HeaderValue::try_from(ignored.join(", "))) {
        response.headers_mut().insert("x-aotron-ignored", value);
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Inner {
        x: u32,
    }

    #[derive(Debug, Deserialize)]
    struct Outer {
        inner: Vec<Inner>,
        #[serde(default)]
        #[allow(dead_code, reason = "accepted and ignored")]
        user: Option<serde::de::IgnoredAny>,
    }

    #[test]
    fn wrong_values_and_unknown_fields_are_named_with_their_path() {
        let read = |text: &str, unknown| parse::<Outer>(text.as_bytes(), unknown);
        let found = read(r#"{"inner": [{"x": 1, "y": 2}], "z": 3}"#, UnknownFields::Warn).unwrap();
        assert_eq!((found.value.inner[0].x, found.ignored), (1, vec!["inner.0.y".to_owned(), "z".to_owned()]));
        let error = read(r#"{"inner": [{"x": 1, "y": 2}]}"#, UnknownFields::Reject).unwrap_err();
        assert_eq!((error.param.as_deref(), error.status.as_u16()), (Some("inner.0.y"), 400));
        let error = read(r#"{"inner": [{"x": "one"}]}"#, UnknownFields::Warn).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("inner[0].x"));
        let long = format!(r#"{{"inner": [{{"x": "{}"}}]}}"#, "é".repeat(1 << 16));
        let error = read(&long, UnknownFields::Warn).unwrap_err();
        assert_eq!(error.message.chars().count(), 1001, "a value is quoted in part");
        assert!(error.message.starts_with("inner[0].x: ") && error.message.contains("expected"), "{}", error.message);
        for broken in ["", " ", "{", "[1", "{\"inner\": []} x", "\u{feff}{}", "nul"] {
            assert_eq!(read(broken, UnknownFields::Warn).unwrap_err().status.as_u16(), 400, "{broken:?}");
        }
        for (body, words) in [
            ("[[]]", "expected an object"),
            ("3", "expected an object"),
            (r#"{"inner": [{"x": -1}]}"#, "inner[0].x: invalid value: integer `-1`, expected a whole number from 0"),
            (r#"{"inner": {}}"#, "inner: invalid type: object, expected a list"),
        ] {
            let error = read(body, UnknownFields::Warn).unwrap_err();
            assert!(error.message.contains(words) && !error.message.contains("struct"), "{}", error.message);
        }
        for without_effect in ["\"u\"", "{\"a\": 1}", "null"] {
            let text = format!("{{\"inner\": [], \"user\": {without_effect}}}");
            assert!(read(&text, UnknownFields::Reject).unwrap().ignored.is_empty(), "{text}");
        }
        let deep = format!("{{\"inner\": {}", "[".repeat(100_000));
        assert_eq!(read(&deep, UnknownFields::Warn).unwrap_err().status.as_u16(), 400);
    }
}
