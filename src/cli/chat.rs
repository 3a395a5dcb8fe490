//! `aotron chat`: an interactive or piped conversation.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::bail;
use aotron::Error;
use aotron::engine::PlanInfo;
use aotron::runtime::{Chat, Completion, FinishReason, SamplingParams};

use super::args::{ChatFlags, EngineFlags, SamplingFlags};
use super::editor::{LineEditor, Typed};
use super::prompt::{next_line, without_byte_order_mark};
use super::run::{AnswerPrinter, per_second, why_cut};
use super::term::{self, Style};
use super::whole_file::WholeFile;

/// Slash commands of the conversation: name and argument.
const COMMANDS: &[(&str, &str)] =
    &[("/system", "TEXT"), ("/reset", ""), ("/save", "FILE"), ("/stats", ""), ("/help", ""), ("/quit", "")];

const HELP: &str = "\
/system TEXT   set the system message; without TEXT, remove it
/reset         forget the conversation, but not the system message
/save FILE     write the conversation to a file, as JSON
/stats         tokens, speed and memory
/help          this
/quit          leave; Ctrl-D does too
A line that ends in \\ goes on in the next one. Ctrl-C ends an answer.";

/// Flags of `aotron chat`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    engine: EngineFlags,
    /// System message
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    #[command(flatten)]
    chat: ChatFlags,
    /// Maximum tokens per answer [default: the engine's, usually 200]
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<usize>,
    #[command(flatten)]
    sampling: SamplingFlags,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let engine = flags.engine.open_chat(&flags.chat)?;
    let (plan, settings) = (engine.plan()?, engine.package.manifest().generation.clone());
    let defaults = SamplingParams::from(&settings);
    let Some(tokenizer) = &engine.tokenizer else {
        let path = engine.package.path().display();
        bail!("{path} has no tokenizer, so it cannot chat; `aotron run` takes --token-ids");
    };
    let sampling = flags.sampling.params(&defaults, tokenizer.vocab_size())?;
    if let Some(idle) = flags.sampling.without_effect(&defaults) {
        term::warn(idle);
    }
    let format = Arc::new(engine.format.clone());
    let name = engine.package.path().display().to_string();
    let mut chat = Chat::new(engine.into_session(), format)?;
    let max_tokens = flags.max_tokens.unwrap_or(settings.max_tokens);
    chat.set_sampling(sampling);
    chat.set_max_tokens(max_tokens);
    chat.set_system(flags.system.as_deref().unwrap_or_default());
    let mut conversation =
        Conversation { chat, plan, max_tokens, totals: Totals::default(), last: None, style: term::on_stdout() };
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        conversation.typed(&name)
    } else {
        conversation.piped()
    }
}

/// A line of input.
enum InputLine<'a> {
    Empty,
    Message(&'a str),
    System(&'a str),
    Reset,
    Save(&'a str),
    Stats,
    Help,
    Quit,
    Unknown(&'a str),
}

impl InputLine<'_> {
    /// Parses a line: commands start with a slash; a message that starts with one needs a leading space.
    fn parse(line: &str) -> InputLine<'_> {
        let text = line.trim();
        if !line.starts_with('/') {
            return if text.is_empty() { InputLine::Empty } else { InputLine::Message(text) };
        }
        let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        match (name, rest.trim()) {
            ("/system", text) => InputLine::System(text),
            ("/save", file) => InputLine::Save(file),
            ("/reset", "") => InputLine::Reset,
            ("/stats", "") => InputLine::Stats,
            ("/help" | "/?", "") => InputLine::Help,
            ("/quit" | "/exit", "") => InputLine::Quit,
            _ => InputLine::Unknown(text),
        }
    }
}

struct Conversation {
    chat: Chat,
    plan: PlanInfo,
    max_tokens: usize,
    totals: Totals,
    last: Option<Completion>,
    style: Style,
}

#[derive(Default)]
struct Totals {
    answers: usize,
    completion_tokens: usize,
    decode_tokens: usize,
    decode_seconds: f64,
}

impl Conversation {
    /// Interactive: errors are shown and the conversation goes on.
    fn typed(&mut self, name: &str) -> anyhow::Result<()> {
        let interrupt = Interrupt::install()?;
        let mut editor = LineEditor::new(COMMANDS, self.style)?;
        let PlanInfo { target, precision, limits, .. } = &self.plan;
        let about = format!("{target}, {precision}, {} tokens per conversation", limits.max_sequence_tokens);
        self.say(&format!("{} {}", self.style.bold(name), self.style.dim(format!("({about})"))))?;
        self.say(&self.style.dim("/help lists commands, Ctrl-C ends an answer, Ctrl-D quits"))?;
        self.say("")?;
        loop {
            let line = match editor.read()? {
                Typed::Line(line) => line,
                Typed::Discarded => continue,
                Typed::End => return Ok(()),
            };
            match InputLine::parse(&line) {
                InputLine::Quit => return Ok(()),
                InputLine::Message(text) => {
                    if let Err(error) = self.answer(text, Some(&interrupt)) {
                        self.complain(error)?;
                    }
                    self.say("")?;
                }
                command => {
                    if let Err(error) = self.obey(&command) {
                        self.complain(error)?;
                    }
                }
            }
        }
    }

    /// Piped: an error ends the conversation.
    fn piped(&mut self) -> anyhow::Result<()> {
        let mut input = std::io::stdin().lock();
        let mut is_first = true;
        while let Some(line) = next_line(&mut input, "standard input")? {
            let line = if std::mem::take(&mut is_first) { without_byte_order_mark(&line) } else { &line };
            match InputLine::parse(line) {
                InputLine::Quit => break,
                InputLine::Message(text) => {
                    self.say(&format!("> {text}"))?;
                    self.answer(text, None)?;
                    self.say("")?;
                }
                InputLine::Unknown(command) => bail!("unknown command {command}"),
                command => self.obey(&command)?,
            }
        }
        Ok(())
    }

    fn say(&self, line: &str) -> anyhow::Result<()> {
        Ok(writeln!(term::stdout(), "{line}")?)
    }

    fn aside(&self, text: &str) -> anyhow::Result<()> {
        self.say(&self.style.dim(text))
    }

    /// Shows an error, or returns it if the output is gone.
    fn complain(&self, error: anyhow::Error) -> anyhow::Result<()> {
        if error.is::<std::io::Error>() {
            return Err(error);
        }
        let way_out = match error.downcast_ref() {
            Some(Error::PromptTooLong { .. } | Error::ConversationFull { .. }) => " (/reset starts a new conversation)",
            _ => "",
        };
        self.say(&format!("{} {}{way_out}", self.style.bold_red("error:"), term::escaped(error)))
    }

    fn answer(&mut self, text: &str, interrupt: Option<&Interrupt>) -> anyhow::Result<()> {
        let mut answer = AnswerPrinter::new();
        let mut waiting = Waiting::start(self.style);
        let stops = || interrupt.is_some_and(Interrupt::is_stopping);
        if let Some(interrupt) = interrupt {
            interrupt.begin();
        }
        let sent = self.chat.send_with(text, &mut |text| {
            if !text.is_empty() {
                waiting.end();
            }
            let flow = answer.show(text);
            if stops() { ControlFlow::Break(()) } else { flow }
        });
        if let Some(interrupt) = interrupt {
            interrupt.end();
        }
        waiting.end();
        answer.end_line()?;
        let completion = sent?;
        match (completion.finish_reason, interrupt) {
            (_, None) if completion.text.is_empty() => self.say("")?,
            (_, None) => {}
            (FinishReason::Cancelled, _) => self.aside("(stopped)")?,
            (FinishReason::Length, _) => self.aside(&format!("({})", why_cut(&completion, self.max_tokens)))?,
            (FinishReason::Stop, _) if completion.text.is_empty() => self.aside("(an empty answer)")?,
            _ => {}
        }
        self.totals.answers += 1;
        self.totals.completion_tokens += completion.completion_tokens;
        self.totals.decode_tokens += completion.timings.decode_tokens;
        self.totals.decode_seconds += completion.timings.decode_seconds;
        self.last = Some(completion);
        Ok(())
    }

    fn obey(&mut self, command: &InputLine<'_>) -> anyhow::Result<()> {
        match command {
            InputLine::System("") => {
                self.chat.set_system("");
                self.aside("no system message")
            }
            InputLine::System(text) => {
                self.chat.set_system(text);
                self.aside("the system message is set")
            }
            InputLine::Reset => {
                self.chat.reset();
                self.aside("a new conversation")
            }
            InputLine::Save("") => bail!("/save needs a file's name"),
            InputLine::Save(file) => {
                self.save(Path::new(file))?;
                self.aside(&format!("saved {} to {file}", term::plural(self.chat.messages().len(), "message")))
            }
            InputLine::Stats => self.print_stats(),
            InputLine::Help => self.say(HELP),
            InputLine::Unknown(name) => bail!(
                "unknown command {name}; /help lists the commands (to send this as a message, put a space in front)"
            ),
            InputLine::Empty | InputLine::Message(_) | InputLine::Quit => Ok(()),
        }
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        let mut json = serde_json::to_vec_pretty(self.chat.messages())?;
        json.push(b'\n');
        let mut file = WholeFile::create(path)?;
        file.write(&json)?;
        Ok(file.finish()?)
    }

    fn print_stats(&self) -> anyhow::Result<()> {
        let speed = |tokens, seconds| match per_second(tokens, seconds) {
            Some(speed) => format!("{speed:.1} tokens per second"),
            None => "not measured".into(),
        };
        let fact = |name: &str, text: String| self.say(&format!("{} {text}", self.style.dim(format!("{name:<12}"))));
        let Some(last) = &self.last else { return self.aside("no answer yet") };
        let (t, prompt) = (&last.timings, term::plural(last.prompt_tokens, "token"));
        fact("prompt", format!("{prompt}, {} of them already in the cache", last.reused_tokens))?;
        fact("prefill", speed(t.prefill_tokens, t.prefill_seconds))?;
        fact("answer", format!("{}, seed {}", term::plural(last.completion_tokens, "token"), last.seed))?;
        fact("decode", speed(t.decode_tokens, t.decode_seconds))?;
        let totals = &self.totals;
        let (answers, tokens) =
            (term::plural(totals.answers, "answer"), term::plural(totals.completion_tokens, "token"));
        fact("so far", format!("{answers}, {tokens}, {}", speed(totals.decode_tokens, totals.decode_seconds)))?;
        let most = self.plan.limits.max_sequence_tokens;
        let held = (last.prompt_tokens + last.timings.decode_tokens).min(most);
        let bytes = |tokens: usize| term::bytes((tokens * self.plan.kv_bytes_per_token) as u64);
        fact("KV cache", format!("{held} of {most} tokens, {} of {}", bytes(held), bytes(most)))
    }
}

/// A progress indicator while the prompt is being processed, until the first text arrives.
struct Waiting {
    is_shown: bool,
}

impl Waiting {
    fn start(style: Style) -> Waiting {
        if style.has_colours() {
            let mut out = term::stdout();
            let _ = write!(out, "{}", style.dim("…")).and_then(|()| out.flush());
        }
        Waiting { is_shown: style.has_colours() }
    }

    fn end(&mut self) {
        if std::mem::replace(&mut self.is_shown, false) {
            let mut out = term::stdout();
            let _ = write!(out, "\r\x1b[K").and_then(|()| out.flush());
        }
    }
}

/// Ctrl-C handling: ends the current answer, or the program if there is none or at the second Ctrl-C.
struct Interrupt {
    state: Arc<AtomicU8>,
}

const IDLE: u8 = 0;
const ANSWERING: u8 = 1;
const STOPPING: u8 = 2;
/// Exit code that shells report for a program ended by Ctrl-C.
const INTERRUPTED: i32 = 130;

impl Interrupt {
    fn install() -> anyhow::Result<Interrupt> {
        let state = Arc::new(AtomicU8::new(IDLE));
        let shared = state.clone();
        ctrlc::set_handler(move || {
            // No answer to stop, or a step that takes too long to notice: leave at once.
            if shared.compare_exchange(ANSWERING, STOPPING, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                std::process::exit(INTERRUPTED);
            }
        })?;
        Ok(Interrupt { state })
    }

    fn begin(&self) {
        self.state.store(ANSWERING, Ordering::SeqCst);
    }

    fn end(&self) {
        self.state.store(IDLE, Ordering::SeqCst);
    }

    fn is_stopping(&self) -> bool {
        self.state.load(Ordering::SeqCst) == STOPPING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_start_the_line() {
        assert!(matches!(InputLine::parse("  "), InputLine::Empty));
        assert!(matches!(InputLine::parse(" hi "), InputLine::Message("hi")));
        assert!(matches!(InputLine::parse(" /etc is what?"), InputLine::Message("/etc is what?")));
        assert!(matches!(InputLine::parse("/etc is what?"), InputLine::Unknown(_)));
        assert!(matches!(InputLine::parse("/system  Be brief. "), InputLine::System("Be brief.")));
        assert!(matches!(InputLine::parse("/system"), InputLine::System("")));
        assert!(matches!(InputLine::parse("/save a b.json"), InputLine::Save("a b.json")));
        assert!(matches!(InputLine::parse("/reset now"), InputLine::Unknown("/reset now")));
        assert!(matches!(InputLine::parse("/quit"), InputLine::Quit));
    }
}
