//! The input line for messages: editing, history and completion of commands.

use std::borrow::Cow;
use std::cell::Cell;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use rustyline::completion::Completer;
use rustyline::config::Configurer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{ColorMode, CompletionType, Config, Context, Editor, Helper};

use super::term::Style;

/// Maximum number of messages in the history.
const HISTORY_SIZE: usize = 1000;

/// Result of reading a line.
pub enum Typed {
    /// A message or a command. A line that ends in a backslash continues on the next one.
    Line(String),
    /// Ctrl-C on a non-empty line, which is discarded.
    Discarded,
    /// Ctrl-D, or Ctrl-C on an empty line.
    End,
}

/// Reads lines from a terminal.
pub struct LineEditor {
    editor: Editor<Assistant, DefaultHistory>,
    history: Option<PathBuf>,
    prompt: (&'static str, String),
}

impl LineEditor {
    /// Creates an editor that completes `commands`, each with its argument: `/save FILE`.
    pub fn new(commands: &'static [(&'static str, &'static str)], style: Style) -> anyhow::Result<LineEditor> {
        let config = Config::builder().max_history_size(HISTORY_SIZE)?.history_ignore_dups(true)?;
        let colours = if style.has_colours() { ColorMode::Enabled } else { ColorMode::Disabled };
        let config = config.completion_type(CompletionType::List).color_mode(colours).build();
        let mut editor = Editor::with_config(config)?;
        editor.set_helper(Some(Assistant { commands, style, line_is_empty: Cell::new(true) }));
        let history = history_file();
        if let Some(path) = &history {
            // A missing or unreadable history only means an empty one.
            let _ = editor.load_history(path);
        }
        editor.set_auto_add_history(false);
        Ok(LineEditor { editor, history, prompt: ("> ", style.bold_cyan("> ")) })
    }

    /// Reads the next input.
    pub fn read(&mut self) -> anyhow::Result<Typed> {
        if let Some(assistant) = self.editor.helper() {
            assistant.line_is_empty.set(true);
        }
        let (raw, styled) = (self.prompt.0, self.prompt.1.as_str());
        match self.editor.readline(&(raw, styled)) {
            Ok(line) => {
                if !line.trim().is_empty() {
                    self.remember(&line);
                }
                Ok(Typed::Line(line.replace("\\\n", "\n")))
            }
            Err(ReadlineError::Eof) => Ok(Typed::End),
            Err(ReadlineError::Interrupted) => {
                let was_empty = self.editor.helper().is_none_or(|assistant| assistant.line_is_empty.get());
                Ok(if was_empty { Typed::End } else { Typed::Discarded })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn remember(&mut self, line: &str) {
        // A history that cannot be written should not stop a conversation.
        let added = self.editor.add_history_entry(line).unwrap_or(false);
        if let (true, Some(path)) = (added, &self.history) {
            let _ = self.editor.append_history(path);
        }
    }
}

/// `aotron/history` in the user's state folder, which is created if necessary.
fn history_file() -> Option<PathBuf> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let state = env::var_os("XDG_STATE_HOME").map(PathBuf::from).and_then(absolute);
    let state = state.or_else(|| Some(absolute(PathBuf::from(env::var_os("HOME")?))?.join(".local/state")))?;
    let folder = Path::new(&state).join("aotron");
    fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

/// Completes commands, hints at their arguments, and tracks whether the line is empty.
struct Assistant {
    commands: &'static [(&'static str, &'static str)],
    style: Style,
    line_is_empty: Cell<bool>,
}

impl Helper for Assistant {}

impl Completer for Assistant {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = line.get(..pos).unwrap_or(line);
        let matching = self.commands.iter().filter(|(name, _)| typed.starts_with('/') && name.starts_with(typed));
        let spaced = |(name, rest): &(&str, &str)| format!("{name}{}", if rest.is_empty() { "" } else { " " });
        Ok((0, matching.map(spaced).collect()))
    }
}

impl Hinter for Assistant {
    type Hint = String;

    fn hint(&self, line: &str, pos: usize, _: &Context<'_>) -> Option<String> {
        self.line_is_empty.set(line.is_empty());
        // Without colours, a hint would look like typed text.
        if pos < line.len() || line.len() < 2 || !line.starts_with('/') || !self.style.has_colours() {
            return None;
        }
        let whole = |(name, rest): &(&str, &str)| format!("{name} {rest}").trim_end().to_owned();
        self.commands.iter().map(whole).find_map(|whole| whole.strip_prefix(line).map(str::to_owned))
    }
}

impl Highlighter for Assistant {
    fn highlight_hint<'h>(&self, hint: &'h str) -> Cow<'h, str> {
        self.style.dim(hint).into()
    }
}

impl Validator for Assistant {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(match context.input().ends_with('\\') {
            true => ValidationResult::Incomplete,
            false => ValidationResult::Valid(None),
        })
    }
}
