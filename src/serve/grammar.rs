//! The form of an answer: JSON of a schema, a regular expression, one of several texts, or a grammar.

mod cost;
mod watch;

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};

use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar};
use llguidance::earley::lexerspec::LexerSpec;
use llguidance::{JsonCompileOptions, Matcher, ParserFactory, panic_utils};
use serde::Deserialize;
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

use self::watch::{Budget, Watch};
use super::body::object;
use super::error::ApiError;
use crate::error::{Error, Result, clip};
use crate::runtime::{Grammar, TokenConstraint, TokenMask};
use crate::text::Tokenizer;

/// Most texts to choose from.
const MAX_CHOICES: usize = 1024;
/// Space between the tokens of JSON: one, since a model that may choose spends tokens on indentation.
const SPACE: &str = " ";
/// Work to compile a form, in nodes of its regular expressions and symbols of its rules.
const COMPILE_LEXER_FUEL: u64 = 50_000;
const MAX_GRAMMAR_SYMBOLS: usize = 50_000;
/// The same for the first bytes of an answer.
const BEGINNING_LEXER_FUEL: u64 = 50_000;
/// Work for the mask of one token, in steps of the lexer (some 14,000 take a millisecond) and items of the parser. `watch`
/// bounds its time.
const STEP_LEXER_FUEL: u64 = 100_000;
const STEP_MAX_ITEMS: usize = 25_000;
/// Memory of one answer's lexer, 1 to 2 kB each.
const MAX_LEXER_STATES: usize = 20_000;

/// `response_format`
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ResponseFormat {
    /// Any text.
    Text,
    /// Any JSON object, or JSON of a schema, where llama.cpp's clients put it.
    JsonObject {
        #[serde(default)]
        #[schema(value_type = Option<Object>)]
        schema: Option<Value>,
    },
    /// JSON of a schema.
    JsonSchema {
        #[serde(deserialize_with = "object")]
        json_schema: NamedSchema,
    },
}

impl ResponseFormat {
    /// JSON of a schema.
    pub fn of_schema(schema: Value) -> ResponseFormat {
        ResponseFormat::JsonObject { schema: Some(schema) }
    }
}

/// A schema with OpenAI's name for it.
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
pub(super) struct NamedSchema {
    #[serde(default)]
    #[allow(dead_code, reason = "accepted and ignored")]
    name: Option<String>,
    #[serde(default)]
    #[allow(dead_code, reason = "accepted and ignored")]
    description: Option<String>,
    #[serde(default)]
    #[allow(dead_code, reason = "an answer always keeps to the schema")]
    strict: Option<bool>,
    /// The JSON schema.
    #[schema(value_type = Object)]
    schema: Value,
}

/// `structured_outputs`, as vLLM has it: one of these.
#[derive(Debug, Clone, Default, Deserialize, utoipa::ToSchema)]
pub(super) struct StructuredOutputs {
    /// A JSON schema, as JSON or as a string.
    #[serde(default)]
    #[schema(value_type = Value)]
    json: Option<Value>,
    /// Any JSON object.
    #[serde(default)]
    json_object: Option<bool>,
    /// A regular expression that matches the whole answer.
    #[serde(default)]
    regex: Option<String>,
    /// The texts to choose from.
    #[serde(default)]
    choice: Option<Vec<String>>,
    /// A grammar in Lark's form.
    #[serde(default)]
    grammar: Option<String>,
}

/// The form of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum AnswerForm {
    Schema(Value),
    Regex(String),
    Grammar(String),
}

impl AnswerForm {
    /// The form that a request asks for, if any, and the field that does; `format_field` is the name of that of `format`.
    ///
    /// # Errors
    /// 400 naming the field if it asks for two, or for one that is too much work.
    pub fn of_request(
        format: Option<ResponseFormat>,
        format_field: &'static str,
        outputs: Option<StructuredOutputs>,
    ) -> Result<Option<(AnswerForm, &'static str)>, ApiError> {
        let field = if outputs.is_some() { "structured_outputs" } else { format_field };
        let mut forms = Vec::new();
        match format {
            None | Some(ResponseFormat::Text) => {}
            Some(ResponseFormat::JsonObject { schema }) => {
                forms.push(AnswerForm::Schema(schema.unwrap_or_else(|| json!({ "type": "object" }))));
            }
            Some(ResponseFormat::JsonSchema { json_schema }) => forms.push(AnswerForm::Schema(json_schema.schema)),
        }
        if let Some(outputs) = outputs {
            if outputs.json_object == Some(true) {
                forms.push(AnswerForm::Schema(json!({ "type": "object" })));
            }
            match outputs.json {
                Some(Value::String(text)) => {
                    let schema = serde_json::from_str(&text).map_err(|error| {
                        ApiError::of_field("structured_outputs.json", format!("the schema is not JSON: {error}"))
                    })?;
                    forms.push(AnswerForm::Schema(schema));
                }
                Some(schema) => forms.push(AnswerForm::Schema(schema)),
                None => {}
            }
            forms.extend(outputs.regex.map(AnswerForm::Regex));
            if let Some(choice) = outputs.choice {
                if !(1..=MAX_CHOICES).contains(&choice.len()) {
                    let message = format!("choice has {} texts; expected 1 to {MAX_CHOICES}", choice.len());
                    return Err(ApiError::of_field("structured_outputs.choice", message));
                }
                let choices: Vec<String> = choice.iter().map(|text| escaped(text)).collect();
                forms.push(AnswerForm::Regex(choices.join("|")));
            }
            forms.extend(outputs.grammar.map(AnswerForm::Grammar));
        }
        if forms.len() > 1 {
            let message = "an answer has one form; response_format and structured_outputs name several together";
            return Err(ApiError::of_field(field, message));
        }
        let form = forms.pop();
        if let Some(form) = &form {
            cost::check(form).map_err(|words| refusal(field, &words))?;
        }
        Ok(form.map(|form| (form, field)))
    }
}

/// A form that cannot be used.
fn refusal(field: &str, words: &str) -> ApiError {
    ApiError::of_field(field, format!("the form of the answer: {}", clip(words)))
}

/// A schema whose JSON has single spaces at most: a model may go on with spaces for ever.
fn with_bounded_space(schema: Value) -> Value {
    let mut schema = if schema == Value::Bool(true) { json!({}) } else { schema };
    if let Some(fields) = schema.as_object_mut() {
        // The compiler's own options, which are not the client's to choose.
        fields.remove("x-guidance");
        let options = JsonCompileOptions { whitespace_pattern: Some(SPACE.into()), ..JsonCompileOptions::default() };
        options.apply_to(&mut schema);
    }
    schema
}

/// A text as a regular expression that matches it alone.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if "\\.+*?()|[]{}^$#&-~/".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Compiles grammars for one tokenizer.
pub(super) struct Grammars {
    tokenizer: Arc<Tokenizer>,
    /// Ids that end an answer.
    stop_ids: Vec<u32>,
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
    watch: Arc<Watch>,
}

impl Grammars {
    pub fn new(tokenizer: Arc<Tokenizer>, stop_ids: Vec<u32>) -> Grammars {
        Grammars { tokenizer, stop_ids, factory: OnceLock::new(), watch: Arc::default() }
    }

    /// Compiles a form, which `field` of the request asks for. Takes milliseconds, and once per model, at the first, as long
    /// as its vocabulary needs.
    ///
    /// # Errors
    /// 400 with the field and the reason for a form that does not compile or is too much work.
    pub fn compile(&self, form: AnswerForm, field: &str) -> Result<Grammar, ApiError> {
        let factory = self.factory.get_or_init(|| self.factory().map(Arc::new)).clone();
        let factory = factory.map_err(|words| {
            ApiError::of_field(field, format!("this model's tokenizer cannot be used with grammars: {words}"))
        })?;
        // The others are known by their names, and this one has many dialects.
        let kind = if matches!(form, AnswerForm::Grammar(_)) { " (grammars are in Lark's form)" } else { "" };
        let grammar = match form {
            AnswerForm::Schema(schema) => TopLevelGrammar::from_json_schema(with_bounded_space(schema)),
            AnswerForm::Regex(regex) => TopLevelGrammar::from_regex(&regex),
            AnswerForm::Grammar(lark) => TopLevelGrammar::from_lark(lark),
        };
        let refuse = |words: &dyn std::fmt::Display| refusal(field, &format!("{}{kind}", in_words(&words)));
        let (limits, env) = (factory.limits().clone(), factory.tok_env().clone());
        // As llguidance contains its own panics, which here are those of a client's form.
        let read = panic_utils::catch_unwind(AssertUnwindSafe(|| {
            let (grammar, lexer) = GrammarInit::Serialized(grammar).to_internal(Some(env), limits.clone())?;
            let beginning = check_beginning(&lexer, limits);
            Ok((GrammarInit::Internal(grammar, lexer), beginning))
        }));
        let (init, beginning) = read.map_err(|error| refuse(&error))?;
        beginning.map_err(|words| refuse(&words))?;
        let parser = factory.create_parser_from_init_default(init).map_err(|error| refuse(&error))?;
        let matcher = Matcher::new(Ok(parser)).into_cancellable();
        if let Some(words) = matcher.get_error() {
            return Err(refusal(field, &in_words(&words)));
        }
        let stop_ids: Arc<[u32]> = self.stop_ids.as_slice().into();
        let watch = self.watch.clone();
        Ok(Grammar::new(move || {
            let matcher = matcher.deep_clone();
            let budget = Budget::new(&watch, matcher.cancellation_handle());
            Ok(Box::new(Following { matcher, stop_ids: stop_ids.clone(), budget }))
        }))
    }

    fn factory(&self) -> Result<ParserFactory, String> {
        let eos = *self.stop_ids.first().ok_or("nothing ends its answers")?;
        let ids = self.tokenizer.vocab_size();
        let special: std::collections::HashSet<u32> = self.tokenizer.markers().into_iter().map(|(_, id)| id).collect();
        let word = |id: u32| {
            let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
            // What ends an answer is no text, though a tokenizer may have `</s>` among its plain pieces: a string of JSON
            // would allow it, and the answer end inside.
            let is_end = self.stop_ids.contains(&id);
            let is_text = !bytes.is_empty() && !is_end && !special.contains(&id) && !self.tokenizer.is_control(id);
            match is_text {
                true => bytes.to_vec(),
                false => [&[TokTrie::SPECIAL_TOKEN_MARKER], format!("<{id}>").as_bytes()].concat(),
            }
        };
        let words: Vec<Vec<u8>> = (0..ids as u32).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(ids as u32, eos), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.initial_lexer_fuel = COMPILE_LEXER_FUEL;
        limits.max_grammar_size = MAX_GRAMMAR_SYMBOLS;
        limits.step_lexer_fuel = STEP_LEXER_FUEL;
        limits.step_max_items = STEP_MAX_ITEMS;
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(factory)
    }
}

/// Refuses, in words, a form of which it takes too much work to tell the bytes that an answer may begin with. llguidance tells
/// them once more, without a bound: the intersection of a few loops, or a few `multipleOf` of one number, have as many states
/// as their least common multiple.
fn check_beginning(lexer: &LexerSpec, mut limits: ParserLimits) -> Result<(), String> {
    let mut states = lexer.to_regex_vec(&mut limits).map_err(|error| error.to_string())?;
    states.set_fuel(BEGINNING_LEXER_FUEL);
    let start = states.initial_state(&lexer.all_lexemes());
    let is_bounded = (0..=u8::MAX).all(|byte| {
        states.transition(start, byte);
        !states.has_error()
    });
    if is_bounded { Ok(()) } else { Err("it takes too much work to tell how an answer may begin".into()) }
}

/// A grammar that follows one answer.
struct Following {
    matcher: Matcher,
    /// The first is the end that the matcher knows.
    stop_ids: Arc<[u32]>,
    budget: Budget,
}

/// A message of llguidance, less what is for its developers.
fn in_words(error: &impl std::fmt::Display) -> String {
    let words = error.to_string();
    match () {
        () if words.contains("NoExtension") => "no text keeps to it from here on".into(),
        // With a backtrace, which is no client's business.
        () if words.contains("panic: ") => "it cannot be compiled by this server".into(),
        () => words.replace("<non-verbose/>", "").trim().to_owned(),
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Request(format!("the form of the answer: {}", clip(in_words(&error))))
}

fn too_slow() -> Error {
    failed(
        "it takes too long to tell which tokens it allows; a form with fewer alternatives, or less ambiguous, is needed",
    )
}

impl TokenConstraint for Following {
    fn allow(&mut self, allowed: &mut TokenMask) -> Result<()> {
        self.budget.add_token();
        let mask = self.budget.spend(|| self.matcher.compute_mask_or_eos()).ok_or_else(too_slow)?;
        let mask = mask.map_err(|error| if self.matcher.is_cancelled() { too_slow() } else { failed(error) })?;
        allowed.insert_words(mask.as_slice());
        if self.stop_ids.first().is_some_and(|eos| allowed.contains(*eos)) {
            self.stop_ids.iter().for_each(|id| allowed.insert(*id));
        }
        Ok(())
    }

    fn push(&mut self, id: u32) -> Result<()> {
        // The end of the answer is the end of the grammar, and nothing follows.
        if self.stop_ids.contains(&id) {
            return Ok(());
        }
        let pushed = self.budget.spend(|| self.matcher.consume_token(id)).ok_or_else(too_slow)?;
        pushed.map_err(|error| if self.matcher.is_cancelled() { too_slow() } else { failed(error) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::fixture::{EOS, tokenizer};

    fn grammars() -> Grammars {
        Grammars::new(tokenizer(), vec![EOS])
    }

    /// The longest text that the grammar allows, choosing the first allowed id each time.
    fn walk(form: AnswerForm, most: usize) -> (String, bool) {
        let grammars = grammars();
        let mut constraint = grammars.compile(form, "f").unwrap().start().unwrap();
        let (mut text, mut mask) = (Vec::new(), TokenMask::new(tokenizer().vocab_size()));
        for _ in 0..most {
            mask.clear();
            constraint.allow(&mut mask).unwrap();
            if mask.contains(EOS) {
                return (String::from_utf8(text).unwrap(), true);
            }
            let id = (0..tokenizer().vocab_size() as u32).find(|id| mask.contains(*id)).unwrap();
            constraint.push(id).unwrap();
            text.extend(tokenizer().token_bytes(id).unwrap());
        }
        (String::from_utf8_lossy(&text).into_owned(), false)
    }

    #[test]
    fn a_choice_is_one_of_its_texts_and_metacharacters_are_plain() {
        let choice = vec!["a.b|c".to_owned()];
        let outputs = StructuredOutputs { choice: Some(choice), ..StructuredOutputs::default() };
        let (form, _) = AnswerForm::of_request(None, "", Some(outputs)).unwrap().unwrap();
        assert_eq!(walk(form, 20), ("a.b|c".to_owned(), true));
    }

    #[test]
    fn a_schema_gives_json_of_its_shape() {
        let schema = json!({ "type": "object", "properties": { "x": { "const": 7 } }, "required": ["x"],
            "additionalProperties": false });
        let (text, ended) = walk(AnswerForm::Schema(schema), 60);
        assert!(ended, "{text}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), json!({ "x": 7 }));
    }

    #[test]
    fn forms_that_are_wrong_or_too_much_are_refused() {
        let grammars = grammars();
        for form in [
            AnswerForm::Regex("(".into()),
            AnswerForm::Grammar("start: nothing".into()),
            AnswerForm::Schema(json!({ "type": "nonsense" })),
            AnswerForm::Schema(json!({ "$ref": "https://example.org/x" })),
        ] {
            let error = grammars.compile(form.clone(), "f").err().unwrap_or_else(|| panic!("{form:?} compiles"));
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some("f")), "{form:?}");
        }
        // What compiles but is much work at each token ends the answer, and soon.
        let ambiguous: Vec<String> = (2..60).map(|times| vec!["s"; times].join(" ")).collect();
        let ambiguous = format!("start: s\ns: {} | \"a\"\n", ambiguous.join(" | "));
        for (form, is_endless) in
            [(AnswerForm::Regex("[ab]*a[ab]{900}".repeat(40)), false), (AnswerForm::Grammar(ambiguous), true)]
        {
            let mut constraint = grammars.compile(form, "f").unwrap().start().unwrap();
            let started = std::time::Instant::now();
            let mut mask = TokenMask::new(tokenizer().vocab_size());
            let ended = (0..200).find_map(|_| {
                mask.clear();
                constraint.allow(&mut mask).err().or_else(|| {
                    let mut ids = (0..tokenizer().vocab_size() as u32).filter(|id| *id != EOS);
                    ids.find(|id| mask.contains(*id)).and_then(|id| constraint.push(id).err())
                })
            });
            assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
            assert!(!is_endless || ended.is_some(), "nothing ends it");
        }
        let both = StructuredOutputs { regex: Some("a".into()), grammar: Some("b".into()), ..Default::default() };
        assert!(AnswerForm::of_request(None, "", Some(both)).is_err());
    }
}
