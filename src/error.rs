//! The library's error type: one enum whose messages name what is wrong and what to do about it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

mod refusal;

pub use refusal::{PlanRefusal, PlanRefusals, RefusalReason};

/// The result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The reason why an operation failed. Every message stands alone: it names the file, tensor, op or limit concerned,
/// what was expected, what was found and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an action on a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The attempted action, as a verb: "open", "write".
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file is damaged, truncated or hostile: its content contradicts itself or its format.
    #[error("{}: {detail}", path.display())]
    Format {
        /// The file concerned.
        path: PathBuf,
        /// The defect, with names and offsets, and what was expected.
        detail: String,
    },
    /// A file is well-formed but requires a feature that this version lacks.
    #[error("{}: unsupported: {detail}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key and value, and what is supported.
        detail: String,
    },
    /// A graph does not type-check, or a pass or a lowering cannot handle something in it.
    #[error("graph: op {op} ({name}): {detail}")]
    Graph {
        /// The op's kind.
        op: String,
        /// The value it defines.
        name: String,
        /// Shapes and dtypes, found and expected.
        detail: String,
    },
    /// There is no folder at the path of an engine package.
    #[error("engine package {}: the folder does not exist; create it with `aotron build`", path.display())]
    NoSuchPackage {
        /// The path.
        path: PathBuf,
    },
    /// A folder is not an engine package: it has no manifest.
    #[error("engine package {}: not an engine package, it has no engine.json; create one with `aotron build`", path.display())]
    NotAPackage {
        /// The folder.
        path: PathBuf,
    },
    /// None of an engine package's plans can run on this machine.
    #[error("engine package {}: {refusals}", path.display())]
    NoPlan {
        /// The package folder.
        path: PathBuf,
        /// Every plan that was considered, and what it is missing.
        refusals: PlanRefusals,
    },
    /// An engine package cannot be used as it is.
    #[error("engine package {}: {detail}", path.display())]
    Package {
        /// The package folder.
        path: PathBuf,
        /// The file or field, what was found and expected, and the command that fixes it.
        detail: String,
    },
    /// A plan gives wrong answers on this machine, so it is not used.
    #[error("engine package {}: {detail}", path.display())]
    Unproven {
        /// The package folder.
        path: PathBuf,
        /// The plan, the cases that failed with the worst logit of each, and what to do.
        detail: String,
    },
    /// A recipe has an invalid key or value.
    #[error("recipe {name}: {detail}")]
    Recipe {
        /// The recipe's name or file.
        name: String,
        /// The key, its value and what is accepted.
        detail: String,
    },
    /// A step exceeds the limits that the engine was built with.
    #[error("step refused: {0}")]
    Step(String),
    /// The prompt leaves no room for an answer.
    #[error(
        "the prompt has {prompt_tokens} tokens, but this engine holds {max_sequence_tokens} tokens per sequence, \
         prompt and answer together; shorten the prompt to at most {} tokens", max_sequence_tokens.saturating_sub(1)
    )]
    PromptTooLong {
        /// Tokens of the prompt, template included.
        prompt_tokens: usize,
        /// Tokens per sequence that the engine holds.
        max_sequence_tokens: usize,
    },
    /// A conversation has outgrown the engine: its turns leave no room for an answer.
    #[error(
        "the conversation is full: with the new message it has {conversation_tokens} tokens, but this engine holds \
         {max_sequence_tokens} tokens per sequence, prompt and answer together; start a new conversation, or remove \
                 earlier turns from it"
    )]
    ConversationFull {
        /// Tokens of the conversation, the new message and the template included.
        conversation_tokens: usize,
        /// Tokens per sequence that the engine holds.
        max_sequence_tokens: usize,
    },
    /// The model produced NaN or infinite numbers.
    #[error("numerics: {0}")]
    Numerics(String),
    /// A request has a value out of range.
    #[error("invalid request: {0}")]
    Request(String),
    /// The queue is full; a later request may succeed.
    #[error("all {slots} slots are busy and the queue is full with {queued} requests; try again later")]
    QueueFull {
        /// Sequences that run at once.
        slots: usize,
        /// Requests in the queue.
        queued: usize,
    },
    /// The engine has stopped, or is about to, and did not serve the request.
    #[error("the engine has stopped{reason}")]
    EngineStopped {
        /// Empty if the engine was told to stop, otherwise a colon and the reason.
        reason: String,
    },
    /// The server cannot start or has failed.
    #[error("{0}")]
    Serve(String),
    /// A request's deadline has passed.
    #[error("the request's deadline has passed before its answer was complete")]
    DeadlineExceeded,
    /// One failure shared by several requests: all of them were part of the same step.
    #[error("{0}")]
    Shared(Arc<Error>),
    /// The tokenizer refused its file or a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// TensorRT is missing or reported an error; its own message is quoted.
    #[error("TensorRT: {0}")]
    TensorRt(String),
    /// The GPU or its driver is missing, refused an operation, or failed.
    #[error("GPU: {0}")]
    Gpu(String),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The code reached a state that should be impossible. No file and no request can cause it: it is a bug in this
    /// crate.
    #[error("internal error: {found}, expected {expected}; this is a bug in aotron, please report it")]
    Internal {
        /// The state found, and where.
        found: String,
        /// The state that earlier code guarantees.
        expected: String,
    },
}

impl Error {
    /// Returns a closure for `map_err` that makes an [`Error::Io`].
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { action, path, source }
    }

    /// An [`Error::Format`].
    pub fn format(path: impl AsRef<Path>, detail: impl Into<String>) -> Error {
        Error::Format { path: path.as_ref().to_path_buf(), detail: detail.into() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(path: impl AsRef<Path>, detail: impl Into<String>) -> Error {
        Error::Unsupported { path: path.as_ref().to_path_buf(), detail: detail.into() }
    }

    /// The underlying error, if this one is [shared](Error::Shared) between requests.
    pub fn root(&self) -> &Error {
        match self {
            Error::Shared(error) => error.root(),
            error => error,
        }
    }

    /// An [`Error::Package`].
    pub fn package(path: impl AsRef<Path>, detail: impl Into<String>) -> Error {
        Error::Package { path: path.as_ref().to_path_buf(), detail: detail.into() }
    }

    /// An [`Error::Internal`], returned instead of a silent default where an earlier check rules a state out.
    pub(crate) fn internal(found: impl Into<String>, expected: impl Into<String>) -> Error {
        Error::Internal { found: found.into(), expected: expected.into() }
    }
}

/// The first few of `words`, and how many more there are.
pub(crate) fn list_some<S: AsRef<str>>(words: &[S]) -> String {
    const MOST: usize = 8;
    let listed: Vec<&str> = words.iter().take(MOST).map(AsRef::as_ref).collect();
    match words.len() - listed.len() {
        0 => listed.join(", "),
        more => format!("{} and {more} more", listed.join(", ")),
    }
}

/// Text from a file, made fit for one line of a message: control characters escaped, truncated to 200 characters.
pub(crate) fn clip(text: impl std::fmt::Display) -> String {
    const LONGEST: usize = 200;
    let text = text.to_string();
    let mut clipped = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == LONGEST {
            clipped.push('…');
            break;
        }
        if character.is_control() {
            clipped.extend(character.escape_default());
        } else {
            clipped.push(character);
        }
    }
    clipped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_internal_error_asks_for_a_report() {
        let error = Error::internal("op `layers.0.mlp.up` is a relu2", "a linear op");
        let expected = "internal error: op `layers.0.mlp.up` is a relu2, expected a linear op; \
                        this is a bug in aotron, please report it";
        assert_eq!(error.to_string(), expected);
    }
}
