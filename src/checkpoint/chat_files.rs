//! The chat-related parts of a checkpoint: templates, special tokens and added tokens, from the files that transformers
//! reads; and the markers of NeMo's chat fine-tuning.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::hugging_face::existing;
use super::json::{kind, read_object};
use crate::error::{Error, Result, clip};
use crate::mmap::open_regular;

/// Size limit of a file. With many added tokens and templates one has a few hundred KB.
const MAX_BYTES: u64 = 16 << 20;
/// Size limit of a template, in bytes. The longest known ones, with tool use, have tens of KB.
pub(crate) const MAX_TEMPLATE_BYTES: usize = 1 << 20;
const CONFIG: &str = "tokenizer_config.json";

/// A token added to the pieces of a tokenizer's model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// It absorbs the spaces before it.
    pub lstrip: bool,
    /// It absorbs the spaces after it.
    pub rstrip: bool,
}

/// A chat template and where it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateFile {
    /// The checkpoint's name for it; `default` if it has none.
    pub name: String,
    /// The template.
    pub source: String,
    /// The file.
    pub path: PathBuf,
}

/// The markers of NeMo's chat fine-tuning, `data.chat_prompt_tokens`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NemoPromptTokens {
    /// Opens the system turn.
    pub system_turn_start: String,
    /// Opens every later turn.
    pub turn_start: String,
    /// Follows the content of a turn.
    pub end_of_turn: String,
    /// Follows the name of the speaker.
    pub end_of_name: String,
}

/// The chat-related parts of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatFiles {
    /// Its templates; the one used by default is called `default`.
    pub templates: Vec<TemplateFile>,
    /// Special tokens by their variable names in templates: `bos_token`, `eos_token`.
    pub special_tokens: BTreeMap<String, String>,
    /// Tokens added to a SentencePiece model.
    pub added_tokens: Vec<AddedToken>,
    /// The markers of a `.nemo`.
    pub nemo_prompt_tokens: Option<NemoPromptTokens>,
}

/// Reads the files of a Hugging Face folder.
pub(super) fn read(folder: &Path) -> Result<ChatFiles> {
    let mut files = ChatFiles::default();
    let object = |name: &str| -> Result<Option<(PathBuf, Map<String, Value>)>> {
        let Some(path) = existing(folder, name) else { return Ok(None) };
        let object = read_object(&path, MAX_BYTES)?;
        Ok(Some((path, object)))
    };
    if let Some((_, object)) = object("special_tokens_map.json")? {
        files.special_tokens = special_tokens(&object);
    }
    let mut added: BTreeMap<u32, AddedToken> = BTreeMap::new();
    if let Some((path, object)) = object("added_tokens.json")? {
        for (content, id) in object {
            let token = AddedToken { id: token_id(&path, &content, &id)?, content, lstrip: false, rstrip: false };
            added.insert(token.id, token);
        }
    }
    if let Some((path, mut object)) = object(CONFIG)? {
        files.special_tokens.extend(special_tokens(&object));
        files.templates = config_templates(&path, object.swap_remove("chat_template"))?;
        if let Some(Value::Object(tokens)) = object.swap_remove("added_tokens_decoder") {
            for (id, token) in tokens {
                let token = added_token(&path, &id, &token)?;
                added.insert(token.id, token);
            }
        }
    }
    files.added_tokens = added.into_values().collect();
    let own = template_files(folder)?;
    if !own.is_empty() {
        files.templates = own;
    }
    Ok(files)
}

/// The special tokens of an object: the keys called `…_token`, with a string or an object with `content`.
fn special_tokens(object: &Map<String, Value>) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => token.get("content").and_then(Value::as_str).map(str::to_owned),
        _ => None,
    };
    let named = object.iter().filter(|(key, _)| key.ends_with("_token") && !key.starts_with("add_"));
    named.filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect()
}

/// `chat_template` of a tokenizer_config.json: a string, or a list of named templates.
fn config_templates(path: &Path, value: Option<Value>) -> Result<Vec<TemplateFile>> {
    let template = |name: &str, source: &str| TemplateFile {
        name: name.to_owned(),
        source: source.to_owned(),
        path: path.to_path_buf(),
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![template("default", &source)]),
        Some(Value::Array(list)) => {
            // As in transformers, the last template of a name is the one.
            let mut templates: Vec<TemplateFile> = Vec::new();
            for entry in &list {
                let text = |key: &str| entry.get(key).and_then(Value::as_str);
                let (Some(name), Some(source)) = (text("name"), text("template")) else {
                    return Err(Error::format(path, "chat_template: an entry of the list lacks name or template"));
                };
                templates.retain(|earlier| earlier.name != name);
                templates.push(template(name, source));
            }
            Ok(templates)
        }
        Some(other) => {
            let detail = format!("chat_template is {}, expected a string or a list of named templates", kind(&other));
            Err(Error::format(path, detail))
        }
    }
}

/// Templates in separate files, which take precedence over those of tokenizer_config.json.
fn template_files(folder: &Path) -> Result<Vec<TemplateFile>> {
    let mut files = Vec::new();
    if let Some(path) = existing(folder, "chat_template.jinja") {
        files.push(("default".to_owned(), path));
    }
    let more = folder.join("additional_chat_templates");
    if more.is_dir() {
        for entry in std::fs::read_dir(&more).map_err(Error::io("read", &more))? {
            let path = entry.map_err(Error::io("read", &more))?.path();
            if let (Some(name), true) = (path.file_stem(), path.extension().is_some_and(|e| e == "jinja")) {
                files.push((name.to_string_lossy().into_owned(), path.clone()));
            }
        }
    }
    files.sort();
    let read = |(name, path): (String, PathBuf)| {
        let source = read_template(&path)?;
        Ok(TemplateFile { name, source, path })
    };
    files.into_iter().map(read).collect()
}

/// Reads a template file.
///
/// # Errors
/// [`Error::Io`], and [`Error::Format`] if the file is too long or not UTF-8.
pub(crate) fn read_template(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let file = open_regular(path)?;
    file.take(MAX_TEMPLATE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() > MAX_TEMPLATE_BYTES {
        return Err(Error::format(
            path,
            format!("longer than {MAX_TEMPLATE_BYTES} bytes, the limit for a chat template"),
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        Error::format(path, format!("not UTF-8: the byte at offset {} is invalid", error.utf8_error().valid_up_to()))
    })
}

fn token_id(path: &Path, content: &str, id: &Value) -> Result<u32> {
    id.as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| Error::format(path, format!("`{}` is {}, expected a token id", clip(content), clip(id))))
}

fn added_token(path: &Path, id: &str, token: &Value) -> Result<AddedToken> {
    let refused = |detail: &str| Error::format(path, format!("added_tokens_decoder.{}: {detail}", clip(id)));
    let number = id.parse().map_err(|_| refused("the key is not a token id"))?;
    let content = token.get("content").and_then(Value::as_str).ok_or_else(|| refused("the key content is missing"))?;
    let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
    Ok(AddedToken { id: number, content: content.to_owned(), lstrip: flag("lstrip"), rstrip: flag("rstrip") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    fn names(files: &ChatFiles) -> Vec<(&str, &str)> {
        files.templates.iter().map(|t| (t.name.as_str(), t.source.as_str())).collect()
    }

    #[test]
    fn templates_are_found_where_transformers_looks() {
        assert_eq!(read(folder(&[]).path()).unwrap(), ChatFiles::default());
        let one = (CONFIG, r#"{"chat_template": "A", "bos_token": "<s>", "add_bos_token": "x", "unk_token": null}"#);
        let files = read(folder(&[one]).path()).unwrap();
        assert_eq!(names(&files), [("default", "A")]);
        assert_eq!(files.special_tokens, BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]));
        let list =
            r#"{"chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]}"#;
        assert_eq!(names(&read(folder(&[(CONFIG, list)]).path()).unwrap()), [("default", "A"), ("tool_use", "B")]);
        let own = [one, ("chat_template.jinja", "C\n"), ("additional_chat_templates/rag.jinja", "D")];
        assert_eq!(names(&read(folder(&own).path()).unwrap()), [("default", "C\n"), ("rag", "D")]);
    }

    #[test]
    fn tokens_are_found_under_either_name() {
        let files = [
            ("added_tokens.json", r#"{"<a>": 10, "<b>": 11}"#),
            ("special_tokens_map.json", r#"{"eos_token": {"content": "<b>", "lstrip": false}}"#),
            (CONFIG, r#"{"added_tokens_decoder": {"11": {"content": "<b>", "rstrip": true}}}"#),
        ];
        let files = read(folder(&files).path()).unwrap();
        let token = |id, content: &str, rstrip| AddedToken { id, content: content.into(), lstrip: false, rstrip };
        assert_eq!(files.added_tokens, [token(10, "<a>", false), token(11, "<b>", true)]);
        assert_eq!(files.special_tokens["eos_token"], "<b>");
    }

    #[test]
    fn damaged_files_are_named() {
        for (name, text, reason) in [
            (CONFIG, r#"{"chat_template": 3}"#, "chat_template is a number, expected a string or a list"),
            (CONFIG, r#"{"chat_template": [{"name": "a"}]}"#, "lacks name or template"),
            (CONFIG, r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#, "the key is not a token id"),
            (CONFIG, r#"{"added_tokens_decoder": {"3": {}}}"#, "added_tokens_decoder.3: the key content is missing"),
            ("added_tokens.json", r#"{"<a>": -1}"#, "`<a>` is -1, expected a token id"),
            ("chat_template.jinja", "\u{0}", ""),
        ] {
            let folder = folder(&[(name, text)]);
            let read = read(folder.path());
            if reason.is_empty() {
                assert!(read.is_ok());
                continue;
            }
            let error = read.unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(reason), "{error}");
        }
        let folder = folder(&[]);
        std::fs::write(folder.path().join("chat_template.jinja"), b"a\xff").unwrap();
        assert!(
            read(folder.path())
                .unwrap_err()
                .to_string()
                .contains("chat_template.jinja: not UTF-8: the byte at offset 1")
        );
    }
}
