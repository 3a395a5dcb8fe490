//! Finds the files that model_config.yaml refers to. NeMo stores a file under a unique name, its own behind 32
//! hexadecimal digits and an underscore, and refers to it as `nemo:` and that name. Older versions kept the path on the
//! training machine, of which only the file name identifies the member.

use super::config::NemoTokenizer;
use super::container::Container;
use crate::error::{Error, Result, clip};

/// Prefix of a reference to a member.
const SCHEME: &str = "nemo:";
/// Number of hexadecimal digits that NeMo puts before a file's name, followed by an underscore.
const DIGITS: usize = 32;
/// File name of a Hugging Face tokenizer.
const TOKENIZER_JSON: &str = "tokenizer.json";

/// A tokenizer's file: its format and its member name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) enum TokenizerArtifact {
    /// A SentencePiece model.
    SentencePiece(String),
    /// A tokenizer.json.
    HuggingFace(String),
}

/// The member that `reference` refers to: the one it names after `nemo:`, or the one whose original file name is the
/// last part of the path.
///
/// # Errors
/// [`Error::Format`] if there is none, it is not a file, or a path matches more than one.
pub(in crate::checkpoint) fn artifact(container: &Container, reference: &str) -> Result<String> {
    if let Some(name) = reference.strip_prefix(SCHEME) {
        let name = name.strip_prefix("./").unwrap_or(name);
        return container.get(name).map(|_| name.to_owned());
    }
    let own_name = reference.rsplit('/').next().filter(|name| !name.is_empty());
    // Artifacts lie beside model_config.yaml, never in a folder.
    let names = container.members().map(|(name, _)| name).filter(|name| !name.contains('/'));
    let mut found = names.filter(|name| Some(without_digits(name)) == own_name || Some(*name) == own_name);
    match (found.next(), found.next()) {
        (Some(name), None) => Ok(name.to_owned()),
        (None, _) => Err(Error::format(
            container.path(),
            format!("model_config.yaml refers to `{}`, but no member has that file name", clip(reference)),
        )),
        (Some(one), Some(other)) => Err(Error::format(
            container.path(),
            format!(
                "model_config.yaml refers to `{}`, which matches both `{}` and `{}`",
                clip(reference),
                clip(one),
                clip(other)
            ),
        )),
    }
}

/// The member that holds the tokenizer.
///
/// # Errors
/// [`Error::Unsupported`] for a tokenizer that is neither a SentencePiece model nor a tokenizer.json, and as
/// [`artifact`].
pub(in crate::checkpoint) fn tokenizer_file(
    container: &Container,
    tokenizer: &NemoTokenizer,
) -> Result<TokenizerArtifact> {
    let config = container.member_path("model_config.yaml");
    let references = [&tokenizer.model, &tokenizer.vocab_file].into_iter().flatten();
    match (tokenizer.library.as_str(), &tokenizer.model) {
        ("sentencepiece", Some(reference)) => Ok(TokenizerArtifact::SentencePiece(artifact(container, reference)?)),
        ("sentencepiece", None) => Err(Error::format(config, "the key tokenizer.model is missing")),
        ("huggingface", _) => {
            for reference in references.filter(|reference| reference.ends_with(TOKENIZER_JSON)) {
                let name = artifact(container, reference)?;
                if without_digits(&name) == TOKENIZER_JSON {
                    return Ok(TokenizerArtifact::HuggingFace(name));
                }
            }
            let kind = tokenizer.kind.as_deref().map_or(String::new(), |kind| format!(", {}", clip(kind)));
            let detail = format!(
                "tokenizer.library is huggingface{kind}, but neither model nor vocab_file is a {TOKENIZER_JSON}"
            );
            Err(Error::unsupported(config, detail))
        }
        (library, _) => {
            let detail = format!("tokenizer.library is {}, expected sentencepiece or huggingface", clip(library));
            Err(Error::unsupported(config, detail))
        }
    }
}

/// A member's original file name, without NeMo's digits.
fn without_digits(name: &str) -> &str {
    match name.split_once('_') {
        Some((digits, own)) if digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => own,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "2053796188904e679f7e2754a2a1f280";
    const OTHER: &str = "a204ac876ae34feeb4a88e6bbe2df0fa";

    fn holding(names: &[&str]) -> (tempfile::TempDir, Container) {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        }
        let container = Container::of_folder(folder.path()).unwrap();
        (folder, container)
    }

    fn tokenizer(library: &str, model: Option<&str>, vocab_file: Option<&str>) -> NemoTokenizer {
        NemoTokenizer {
            library: library.into(),
            model: model.map(str::to_owned),
            kind: Some("org/name".into()),
            vocab_file: vocab_file.map(str::to_owned),
            sentencepiece_legacy: false,
        }
    }

    #[test]
    fn finds_artifacts() {
        let (hashed, plain) = (format!("{ONE}_tokenizer.model"), "merges_v2.txt");
        let below = format!("model_weights/{OTHER}_tokenizer.model");
        let (_folder, container) = holding(&["model_config.yaml", &hashed, plain, &below]);
        for (reference, name) in [
            (format!("nemo:{hashed}"), hashed.as_str()),
            (format!("nemo:./{hashed}"), hashed.as_str()),
            ("nemo:merges_v2.txt".into(), plain),
            ("/artifacts/tokenizer.model".into(), hashed.as_str()),
            ("tokenizer.model".into(), hashed.as_str()),
            (hashed.clone(), hashed.as_str()),
            ("/data/merges_v2.txt".into(), plain),
        ] {
            assert_eq!(artifact(&container, &reference).unwrap(), name, "{reference}");
        }
    }

    #[test]
    fn refuses_references_to_none_or_many() {
        let (one, other) = (format!("{ONE}_a.model"), format!("{OTHER}_a.model"));
        let (folder, container) = holding(&[&one, &other, "b.model", &format!("{ONE}_b.model"), "0123_c.model"]);
        for (reference, reason) in [
            ("nemo:gone.model", "`gone.model` is missing".to_owned()),
            ("nemo:a.model", "`a.model` is missing".to_owned()),
            ("nemo:../a.model", "`../a.model` is missing".to_owned()),
            ("nemo:", "`` is missing".to_owned()),
            ("/x/a.model", format!("refers to `/x/a.model`, which matches both `{one}` and `{other}`")),
            ("b.model", format!("matches both `{ONE}_b.model` and `b.model`")),
            ("/x/gone.model", "refers to `/x/gone.model`, but no member has that file name".to_owned()),
            ("c.model", "no member has that file name".to_owned()),
            ("/x/", "no member has that file name".to_owned()),
            ("", "no member has that file name".to_owned()),
        ] {
            let message = artifact(&container, reference).unwrap_err().to_string();
            assert!(message.starts_with(&folder.path().display().to_string()), "{message}");
            assert!(message.contains(&reason), "{reference}: {message}");
        }
    }

    #[test]
    fn finds_the_tokenizers_file() {
        let (model, json) = (format!("{ONE}_tokenizer.model"), format!("{OTHER}_tokenizer.json"));
        let (_folder, container) = holding(&[&model, &json]);
        let nemo = |name: &str| format!("nemo:{name}");
        let found = |library, model: Option<&str>, vocab: Option<&str>| {
            tokenizer_file(&container, &tokenizer(library, model, vocab))
        };
        let expected = TokenizerArtifact::SentencePiece(model.clone());
        assert_eq!(found("sentencepiece", Some(&nemo(&model)), None).unwrap(), expected);
        let expected = TokenizerArtifact::HuggingFace(json.clone());
        assert_eq!(found("huggingface", Some(&nemo(&json)), None).unwrap(), expected);
        assert_eq!(found("huggingface", None, Some("/x/tokenizer.json")).unwrap(), expected);
        for (error, reason) in [
            (found("sentencepiece", None, None), "model_config.yaml: the key tokenizer.model is missing"),
            (found("sentencepiece", Some("nemo:gone"), None), "`gone` is missing"),
            (found("huggingface", None, None), "unsupported: tokenizer.library is huggingface, org/name, but neither"),
            (found("huggingface", Some("nemo:gone/tokenizer.json"), None), "`gone/tokenizer.json` is missing"),
            (found("megatron", Some("x"), None), "unsupported: tokenizer.library is megatron, expected sentencepiece"),
        ] {
            let message = error.unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
        }
    }
}
