//! What a form may cost to compile. A compilation cannot be stopped, so what would take long is refused before it begins:
//! each bound is where its kind of form takes some tenth of a second at most, measured alone on one core.

use serde_json::Value;

use super::AnswerForm;

/// Largest source of a form.
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Most entries of the lists and maps of a schema that cost more than in proportion to their length.
const MAX_ENTRIES: [(&str, usize); 7] = [
    ("properties", 400),
    ("required", 400),
    ("anyOf", 250),
    ("oneOf", 250),
    ("allOf", 50),
    ("patternProperties", 32),
    ("prefixItems", 1000),
];
/// Most entries of all these together.
const MAX_ALL_ENTRIES: usize = 2000;
/// Largest sum of the numbers of `multipleOf`, without their decimal points: each is a state machine with as many states.
const MAX_MULTIPLES: f64 = 10_000.0;
/// Most classes of characters, such as `\w` or `\p{L}`, in all regular expressions together.
const MAX_CLASSES: usize = 500;
/// Most operators `?`, `*`, `+`, `{` and `|` in a regular expression or grammar, and in all patterns of a schema: the time
/// grows with their square.
const MAX_OPERATORS: usize = 2500;
/// Most patterns of a schema that may have to hold for one text: the time doubles with each.
const MAX_COMBINED_PATTERNS: usize = 10;
/// Keywords beside which a pattern is combined with those of other schemas.
const COMBINING: [&str; 6] = ["$ref", "allOf", "anyOf", "oneOf", "not", "if"];
/// Most `&` and `~` in a grammar: intersections and complements of regular expressions.
const MAX_INTERSECTIONS: usize = 16;
/// Most `:` in a grammar, each of which begins a rule or a terminal: an error at the end of a chain of them is put into words
/// at each, so the time grows with the square.
const MAX_DEFINITIONS: usize = 256;
/// Most terminals, which may be made of each other: a step of the lexer, which nothing can stop, takes time that grows with
/// how deep they are.
const MAX_TERMINALS: usize = 64;

/// Refuses a form that would take long to compile, in words.
pub(super) fn check(form: &AnswerForm) -> Result<(), String> {
    let mut cost = Cost::default();
    let bytes = match form {
        AnswerForm::Schema(schema) => {
            cost.schema(schema)?;
            cost.bytes
        }
        AnswerForm::Regex(text) => cost.expression(text),
        AnswerForm::Grammar(text) => {
            let count = text.bytes().filter(|byte| b"&~".contains(byte)).count();
            within(count, MAX_INTERSECTIONS, "operators & and ~")?;
            let definitions = text.bytes().filter(|byte| *byte == b':').count();
            within(definitions, MAX_DEFINITIONS, "colons, for rules and terminals")?;
            within(text.lines().filter(|line| is_terminal(line)).count(), MAX_TERMINALS, "terminals")?;
            if let Some(directive) = ["%json", "%regex", "%lark"].into_iter().find(|name| text.contains(name)) {
                return Err(format!("it has {directive}, which is not supported; a form of its own kind is"));
            }
            cost.expression(text)
        }
    };
    within(bytes, MAX_SOURCE_BYTES, "bytes")?;
    within(cost.entries, MAX_ALL_ENTRIES, "properties, alternatives and other entries in all")?;
    within(cost.operators, MAX_OPERATORS, "operators such as * and | in its regular expressions")?;
    if cost.combines {
        within(cost.patterns, MAX_COMBINED_PATTERNS, "patterns beside allOf, $ref and the like")?;
    }
    within(cost.classes, MAX_CLASSES, "classes such as \\w in its regular expressions")?;
    match cost.multiples <= MAX_MULTIPLES {
        true => Ok(()),
        false => {
            Err(format!("the values of its multipleOf sum up to {}; expected at most {MAX_MULTIPLES}", cost.multiples))
        }
    }
}

/// Returns true if a line of a grammar begins the definition of a terminal, whose names are in capitals.
fn is_terminal(line: &str) -> bool {
    line.trim_start().trim_start_matches(['_', '?', '!']).starts_with(|c: char| c.is_ascii_uppercase())
}

fn operators(text: &str) -> usize {
    text.bytes().filter(|byte| b"?*+{|".contains(byte)).count()
}

/// The digits of a number as an integer: 12.5 is 125.
fn without_point(value: &Value) -> f64 {
    let text = value.to_string();
    let (digits, exponent) = text.split_once(['e', 'E']).unwrap_or((&text, "0"));
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.trim_end_matches('0').len() as i32);
    let exponent: i32 = exponent.parse().unwrap_or(i32::MAX);
    let scaled = value.as_f64().unwrap_or(0.0).abs() * 10f64.powi(decimals.saturating_sub(exponent).clamp(0, 400));
    if scaled.is_nan() { f64::INFINITY } else { scaled }
}

fn within(count: usize, most: usize, what: &str) -> Result<(), String> {
    if count <= most { Ok(()) } else { Err(format!("it has {count} {what}; expected at most {most}")) }
}

/// What has been counted so far.
#[derive(Debug, Default)]
struct Cost {
    /// Of a schema's texts and numbers, roughly as it would be written.
    bytes: usize,
    entries: usize,
    multiples: f64,
    classes: usize,
    operators: usize,
    patterns: usize,
    /// Some of the patterns may have to hold for one text.
    combines: bool,
}

impl Cost {
    /// Counts in a text that is regular expressions alone; returns its length.
    fn expression(&mut self, text: &str) -> usize {
        self.operators += operators(text);
        self.text(text);
        text.len()
    }

    /// Counts in a schema and everything in it. serde_json bounds its depth.
    fn schema(&mut self, value: &Value) -> Result<(), String> {
        self.bytes += value.as_str().map_or(1, str::len);
        within(self.bytes, MAX_SOURCE_BYTES, "bytes")?;
        match value {
            Value::Array(items) => items.iter().try_for_each(|item| self.schema(item)),
            Value::Object(fields) => {
                let combines = COMBINING.iter().any(|keyword| fields.contains_key(*keyword));
                self.combines |= fields.contains_key("allOf") || (combines && fields.contains_key("pattern"));
                fields.iter().try_for_each(|(name, value)| self.field(name, value))
            }
            Value::String(text) => {
                self.text(text);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Counts in a field of an object of a schema.
    fn field(&mut self, name: &str, value: &Value) -> Result<(), String> {
        let entries = value.as_array().map(Vec::len).or_else(|| value.as_object().map(serde_json::Map::len));
        let bound = MAX_ENTRIES.iter().find(|(known, _)| *known == name);
        if let (Some((_, most)), Some(entries)) = (bound, entries) {
            within(entries, *most, &format!("entries in {name}"))?;
            self.entries += entries;
        }
        match (name, value) {
            ("multipleOf", number) => self.multiples += without_point(number),
            ("pattern", Value::String(pattern)) => self.pattern(pattern),
            ("patternProperties", Value::Object(patterns)) => {
                patterns.keys().for_each(|pattern| self.pattern(pattern));
            }
            _ => {}
        }
        self.bytes += name.len();
        self.text(name);
        self.schema(value)
    }

    fn pattern(&mut self, pattern: &str) {
        self.patterns += 1;
        self.operators += operators(pattern);
    }

    /// Counts in a text that may be a regular expression.
    fn text(&mut self, text: &str) {
        let mut bytes = text.bytes();
        while let Some(byte) = bytes.next() {
            if byte == b'\\' && bytes.next().is_some_and(|class| b"pPwWdDsS".contains(&class)) {
                self.classes += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn forms_are_refused_by_what_they_would_cost() {
        let names = |count: usize| (0..count).map(|n| n.to_string()).collect::<Vec<_>>();
        let map = |count| Value::Object(names(count).into_iter().map(|name| (name, json!({}))).collect());
        let schema = |schema: Value| check(&AnswerForm::Schema(schema));
        let nested = json!({ "properties": { "a": { "properties": map(400), "required": names(400) } } });
        assert_eq!(schema(nested.clone()), Ok(()));
        assert_eq!(schema(json!({ "enum": names(5000) })), Ok(()));
        let multiples: Vec<Value> = (1..40).map(|n| json!({ "multipleOf": n * 100 })).collect();
        let classes = "\\p{L}|[^a]|\\\\p".repeat(MAX_CLASSES);
        assert_eq!(check(&AnswerForm::Regex(classes.clone())), Ok(()));
        for (found, words) in [
            (schema(json!({ "items": { "properties": map(401) } })), "401 entries in properties; expected at most 400"),
            (schema(json!({ "required": names(401) })), "401 entries in required"),
            (schema(json!({ "anyOf": names(251) })), "251 entries in anyOf"),
            (schema(json!({ "patternProperties": map(33) })), "33 entries in patternProperties"),
            (schema(json!({ "prefixItems": [nested.clone(), nested.clone(), nested] })), "entries in all"),
            (schema(json!({ "prefixItems": multiples })), "multipleOf sum up to"),
            (schema(json!({ "multipleOf": 1000.25 })), "multipleOf sum up to 100025"),
            (schema(json!({ "allOf": vec![json!({ "pattern": "a" }); 11] })), "11 patterns beside allOf"),
            (schema(json!({ "pattern": "a?".repeat(3000) })), "3000 operators"),
            (check(&AnswerForm::Regex("(a|b)?".repeat(10_000))), "operators"),
            (check(&AnswerForm::Grammar("start: %json {\"multipleOf\": 9999991}".into())), "%json"),
            (schema(json!({ "pattern": format!("{classes}\\w") })), "501 classes"),
            (schema(json!({ "const": "x".repeat(MAX_SOURCE_BYTES) })), "bytes; expected at most 65536"),
            (check(&AnswerForm::Regex(format!("{classes}\\S"))), "501 classes"),
            (check(&AnswerForm::Grammar(format!("start: T\nT: /a/{}", " & /b/".repeat(17)))), "17 operators"),
            (check(&AnswerForm::Grammar("a: b\n".repeat(257))), "257 colons"),
            (check(&AnswerForm::Grammar("  A1: /b/\n_B: \"c\"\n".repeat(33))), "66 terminals"),
        ] {
            let found = found.unwrap_err();
            assert!(found.contains(words), "{found}");
        }
    }
}
