//! YAML parsed as JSON: one mapping of bounded size with unique keys. Anchors, aliases and merge keys, with which small
//! files expand to large values, and tags, which name a program's types, are errors. NeMo writes none of them.

use std::path::Path;

use serde_json::{Map, Value};
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::options::{DuplicateKeyPolicy, MergeKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Options, budget, options};

use super::json::{UniqueKeys, kind};
use crate::error::{Error, Result, clip};

/// Maximum nesting; NeMo's own configs have five levels.
const MAX_DEPTH: usize = 64;
/// Maximum number of values, nested ones included; NeMo's own configs have a few hundred.
const MAX_VALUES: usize = 50_000;

/// Parses the mapping in `bytes`, the contents of `path`, of at most `limit_bytes` bytes.
///
/// Numbers that JSON lacks, such as `.nan`, become strings, which readers that expect a number reject. So do whole
/// numbers with leading zeros, which are octal in YAML 1.1 and decimal in YAML 1.2.
///
/// # Errors
/// [`Error::Format`] if it is longer, is not UTF-8, is not a single YAML mapping, or uses a feature ruled out above.
pub(super) fn parse_object(path: &Path, bytes: &[u8], limit_bytes: usize) -> Result<Map<String, Value>> {
    if bytes.len() > limit_bytes {
        return Err(Error::format(path, format!("longer than {limit_bytes} bytes, the limit for this file")));
    }
    match serde_saphyr::from_slice_with_options::<UniqueKeys>(bytes, reading()) {
        Ok(UniqueKeys(Value::Object(object))) => Ok(object),
        Ok(UniqueKeys(other)) => Err(Error::format(path, format!("expected a YAML mapping, found {}", kind(&other)))),
        Err(error) => Err(Error::format(path, format!("invalid or unsupported YAML: {}", clip(reason(&error))))),
    }
}

/// The problem and its position.
fn reason(error: &serde_saphyr::Error) -> String {
    let serde_saphyr::Error::Budget { breach, location } = error else { return error.to_string() };
    let limit = match breach {
        BudgetBreach::Anchors { .. } | BudgetBreach::Aliases { .. } => "anchors and aliases are not supported".into(),
        BudgetBreach::Depth { .. } => format!("nested deeper than {MAX_DEPTH} levels"),
        BudgetBreach::Nodes { .. } | BudgetBreach::Events { .. } => format!("more than {MAX_VALUES} values"),
        BudgetBreach::Documents { .. } => "more than one document".into(),
        _ => return error.to_string(),
    };
    format!("{limit} (line {}, column {})", location.line(), location.column())
}

fn reading() -> Options {
    options! {
        budget: budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_VALUES,
            max_events: 3 * MAX_VALUES,
            max_documents: 1,
            max_anchors: 0,
            max_aliases: 0,
        },
        // `UniqueKeys` rejects them, naming the key.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        leading_zero_numbers_as_strings: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Map<String, Value>> {
        parse_object(Path::new("x.yaml"), text.as_bytes(), 1 << 20)
    }

    fn refused(text: &str) -> String {
        let message = parse(text).unwrap_err().to_string();
        assert!(message.starts_with("x.yaml: ") && message.len() < 300, "{message}");
        message
    }

    #[test]
    fn reads_every_kind_of_value() {
        let text = "---\na: ~\nb: [true, no, -1, 18446744073709551615, 1.5, .5, 1e-5, 1.0e-05, 1_000, +7, 0x10]\n\
                    c:\n  d: {}\n  e: []\n  f:\n1: 'x'\ng: \"null\"\nh: |\n  two\n  lines\ni: ${.x}\nj: ???\n";
        let expected = r#"{"a":null,"b":[true,false,-1,18446744073709551615,1.5,0.5,0.00001,0.00001,1000,7,16],"#
            .to_owned()
            + r#""c":{"d":{},"e":[],"f":null},"1":"x","g":"null","h":"two\nlines\n","i":"${.x}","j":"???"}"#;
        assert_eq!(serde_json::to_string(&parse(text).unwrap()).unwrap(), expected);
    }

    #[test]
    fn numbers_that_json_does_not_have_are_text() {
        let numbers = "[.nan, .NaN, .inf, -.INF, 1e999, 0644, -007]";
        let expected = r#"{"a":[".nan",".nan",".inf","-.inf",".inf","0644","-007"]}"#;
        assert_eq!(serde_json::to_string(&parse(&format!("a: {numbers}")).unwrap()).unwrap(), expected);
        // Too large for 64 bits: a number, but no whole one.
        assert!(parse("a: 99999999999999999999").unwrap()["a"].is_f64());
    }

    #[test]
    fn refuses_what_is_not_one_mapping_with_unique_keys() {
        for (text, reason) in [
            ("", "found null"),
            ("- a\n", "found a list"),
            ("a\n", "found a string"),
            ("a: 1\n---\nb: 1\n", "more than one document"),
            ("a: [1\n", "unclosed bracket"),
            ("a: b: c\n", "mapping values are not allowed"),
            ("a: 1\na: 2\n", "duplicate key `a`"),
            ("x:\n- {a: 1, b: 2, a: 3}\n", "duplicate key `a`"),
            ("~: 1\n", "null into string"),
            ("? [a]\n: 1\n", "expected string"),
        ] {
            let message = refused(text);
            assert!(message.contains(reason), "{text:?}: {message}");
        }
        let not_utf8 = parse_object(Path::new("x.yaml"), b"a: \xff\n", 100).unwrap_err().to_string();
        assert!(not_utf8.contains("UTF-8"), "{not_utf8}");
    }

    #[test]
    fn refuses_what_stands_for_more_than_it_says() {
        for (text, reason) in [
            ("a: &x 1\n", "anchors and aliases are not supported (line 1"),
            ("a: &x [1, 2]\nb: *x\n", "anchors and aliases are not supported"),
            ("a: *x\n", "unknown anchor"),
            ("<<: {a: 1}\n", "merge keys are not allowed"),
            ("a: !!python/object/apply:os.system [ls]\n", "unsupported tag `!!python/object/apply:os.system`"),
            ("a: !env HOME\n", "unsupported tag `!env`"),
        ] {
            let message = refused(text);
            assert!(message.contains(reason), "{text:?}: {message}");
        }
        // Ten levels of ten aliases each: ten billion values.
        let level = |i: usize| format!("a{i}: &a{i} [{}]\n", vec![format!("*a{}", i - 1); 10].join(", "));
        let bomb = "a0: &a0 [x]\n".to_owned() + &(1..10).map(level).collect::<String>();
        assert!(refused(&bomb).contains("anchors and aliases are not supported"));
    }

    #[test]
    fn bounds_size_depth_and_count() {
        let deep = |levels| format!("a: {}1{}", "[".repeat(levels), "]".repeat(levels));
        assert!(parse(&deep(63)).is_ok());
        assert!(refused(&deep(64)).contains("nested deeper than 64 levels"));
        for opening in ["[", "{a: ", "- ", "? "] {
            refused(&format!("a: {}", opening.repeat(10_000)));
            refused(&opening.repeat(10_000));
        }
        assert!(refused(&format!("a: [{}]", "1, ".repeat(MAX_VALUES))).contains("more than 50000 values"));
        assert!(refused(&format!("{}: 1", "k".repeat(500_000))).contains("unsupported YAML"));
        assert!(refused(&format!("a: {}", "x".repeat(1 << 20))).contains("longer than 1048576 bytes"));
    }
}
