//! Terminal output: colours, human-readable sizes, progress.

use std::fmt::Display;
use std::io::{IsTerminal, StdoutLock, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anstream::stream::RawStream;
use anstream::{AutoStream, ColorChoice};
use anstyle::AnsiColor;
use aotron::compile::Progress;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;

/// Interval of progress lines for long stages when there is no terminal to draw a bar on.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

const DIM: anstyle::Style = anstyle::Style::new().dimmed();
const BOLD: anstyle::Style = anstyle::Style::new().bold();
const BOLD_CYAN: anstyle::Style = AnsiColor::Cyan.on_default().bold();
const BOLD_RED: anstyle::Style = AnsiColor::Red.on_default().bold();
const YELLOW: anstyle::Style = AnsiColor::Yellow.on_default();

/// Colours, if the stream's reader can see them.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colours: bool,
}

/// The style of standard output.
pub fn on_stdout() -> Style {
    Style::on(&std::io::stdout())
}

/// The style of standard error.
pub fn on_stderr() -> Style {
    Style::on(&std::io::stderr())
}

impl Style {
    /// Colours on a terminal that supports them, unless NO_COLOR or CLICOLOR=0 disables them.
    fn on(stream: &impl RawStream) -> Style {
        // Require a terminal, even with CLICOLOR_FORCE: this also decides whether to draw progress bars.
        Style { colours: stream.is_terminal() && AutoStream::choice(stream) != ColorChoice::Never }
    }

    /// Returns true if colours are visible.
    pub fn has_colours(self) -> bool {
        self.colours
    }

    fn paint(self, style: anstyle::Style, text: impl Display) -> String {
        if self.colours { format!("{style}{text}{style:#}") } else { text.to_string() }
    }

    pub fn dim(self, text: impl Display) -> String {
        self.paint(DIM, text)
    }

    pub fn bold(self, text: impl Display) -> String {
        self.paint(BOLD, text)
    }

    pub fn bold_cyan(self, text: impl Display) -> String {
        self.paint(BOLD_CYAN, text)
    }

    pub fn bold_red(self, text: impl Display) -> String {
        self.paint(BOLD_RED, text)
    }

    fn yellow(self, text: impl Display) -> String {
        self.paint(YELLOW, text)
    }
}

/// Prints a note on standard error, safe for a terminal whatever files and arguments the message quotes.
pub fn note(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "{} {}", on_stderr().dim("note:"), escaped(message));
}

/// Prints a warning on standard error, as safe as a note.
pub fn warn(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "{} {}", on_stderr().yellow("warning:"), escaped(message));
}

/// Prints an error on standard error, as safe as a note.
pub fn error(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "{} {}", on_stderr().bold_red("error:"), escaped(message));
}

/// Standard output, whose errors name it.
pub struct Stdout(StdoutLock<'static>);

/// Locks standard output.
pub fn stdout() -> Stdout {
    Stdout(std::io::stdout().lock())
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes).map_err(of_stdout)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush().map_err(of_stdout)
    }
}

fn of_stdout(error: std::io::Error) -> std::io::Error {
    std::io::Error::new(error.kind(), format!("cannot write to standard output: {error}"))
}

/// Prints a value as indented JSON.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(writeln!(stdout(), "{text}")?)
}

/// A human-readable size in the format of the progress bars: `7.86 MiB`.
pub fn bytes(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

/// A human-readable duration: `85 ms`, `3.2 s`, `2 min 5 s`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 0.9995 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 99.95 {
        format!("{seconds:.1} s")
    } else {
        let whole = seconds.round() as u64;
        format!("{} min {} s", whole / 60, whole % 60)
    }
}

/// `1 token`, `2 tokens`.
pub fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Text from a model or a file, made safe for a terminal: control characters and those that reorder a line are shown as
/// U+FFFD.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if is_harmful(c) { '\u{fffd}' } else { c }).collect()
}

/// A message that may quote a path or a file, made safe for a terminal: what [`harmless`] hides is escaped, so that it can
/// be told which character it was.
pub fn escaped(message: impl Display) -> String {
    let mut text = String::new();
    for c in message.to_string().chars() {
        match is_harmful(c) {
            true => text.extend(c.escape_default()),
            false => text.push(c),
        }
    }
    text
}

/// Returns true for control characters other than line breaks and tabs, and for bidirectional embeddings, overrides and
/// isolates, which make a line read other than it is.
pub fn is_harmful(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A progress bar over `total` items, drawn on standard error if that is a terminal.
pub fn bar(name: &str, total: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(total).with_prefix(name.to_owned());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("━╸ ")),
        Err(_) => bar,
    }
}

/// Template of a progress bar over bytes.
pub const BYTES: &str = "{prefix:>10} {bar:32} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left";
/// Template of a progress bar over tokens.
pub const TOKENS: &str = "{prefix:>10} {bar:32} {pos}/{len} tokens {per_sec} {eta} left";

/// Template of a spinner, for work of unknown length.
const WORK: &str = "{prefix:>10} {spinner} {elapsed}";

/// Progress of stages measured in bytes: a bar on a terminal, an occasional line elsewhere.
pub struct Stages {
    stage: Mutex<Option<Stage>>,
    cancelled: AtomicBool,
}

struct Stage {
    name: String,
    total: u64,
    done: u64,
    bar: ProgressBar,
    last_line: Instant,
}

impl Stages {
    pub fn new() -> Stages {
        Stages { stage: Mutex::new(None), cancelled: AtomicBool::new(false) }
    }

    /// Prints a line without garbling the bar.
    fn aside(&self, print: &dyn Fn()) {
        match self.stage.lock() {
            Ok(stage) => match stage.as_ref() {
                Some(stage) => stage.bar.suspend(print),
                None => print(),
            },
            Err(_) => print(),
        }
    }

    /// Asks the stage that reports here to stop.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Reports that this many bytes of the stage are done.
    pub fn reach(&self, bytes: u64) {
        let done = match self.stage.lock() {
            Ok(stage) => stage.as_ref().map_or(bytes, |stage| stage.done),
            Err(_) => return,
        };
        self.advance(bytes.saturating_sub(done));
    }

    fn begin(&self, name: &str, total: u64, bar: ProgressBar) {
        if let Ok(mut stage) = self.stage.lock() {
            *stage = Some(Stage { name: name.into(), total, done: 0, bar, last_line: Instant::now() });
        }
    }

    /// Removes the bar of the last stage.
    pub fn finish(&self) {
        if let Ok(mut stage) = self.stage.lock()
            && let Some(stage) = stage.take()
        {
            stage.bar.finish_and_clear();
        }
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Progress for Stages {
    fn steps(&self, name: &str, steps: u64, unit: &str) {
        self.finish();
        if !std::io::stderr().is_terminal() {
            let _ = writeln!(std::io::stderr(), "{name}: {steps} {unit}");
        }
        self.begin(name, 0, bar(name, steps, TOKENS));
    }

    fn stage(&self, name: &str, bytes: u64) {
        self.finish();
        if !std::io::stderr().is_terminal() {
            let _ = writeln!(std::io::stderr(), "{name}: {}", self::bytes(bytes));
        }
        self.begin(name, bytes, bar(name, bytes, BYTES));
    }

    fn work(&self, name: &str) {
        self.finish();
        if !std::io::stderr().is_terminal() {
            let _ = writeln!(std::io::stderr(), "{name}");
        }
        let bar = bar(name, 0, WORK);
        bar.enable_steady_tick(Duration::from_millis(100));
        self.begin(name, 0, bar);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn advance(&self, bytes: u64) {
        let Ok(mut stage) = self.stage.lock() else { return };
        let Some(stage) = stage.as_mut() else { return };
        stage.done += bytes;
        stage.bar.inc(bytes);
        if stage.last_line.elapsed() >= LINE_INTERVAL && !std::io::stderr().is_terminal() {
            stage.last_line = Instant::now();
            let _ = match stage.total {
                0 => writeln!(std::io::stderr(), "{}: step {}", stage.name, stage.done),
                total => {
                    let (done, total) = (self::bytes(stage.done), self::bytes(total));
                    writeln!(std::io::stderr(), "{}: {done} of {total}", stage.name)
                }
            };
        }
    }

    fn note(&self, message: &str) {
        self.aside(&|| note(message));
    }

    fn warn(&self, message: &str) {
        self.aside(&|| warn(message));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (size, text) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (7_487_928, "7.14 MiB")] {
            assert_eq!(bytes(size), text);
        }
        assert_eq!(bytes(u64::MAX), "16.00 EiB");
    }

    #[test]
    fn only_colours_that_are_seen_are_written() {
        assert_eq!(Style { colours: false }.bold_red("error:"), "error:");
        assert_eq!(Style { colours: true }.dim("note:"), "\u{1b}[2mnote:\u{1b}[0m");
    }

    #[test]
    fn durations_read_well() {
        for (millis, text) in [(0, "0 ms"), (85, "85 ms"), (1000, "1.0 s"), (3249, "3.2 s"), (125_000, "2 min 5 s")] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn escapes_do_not_reach_a_terminal() {
        assert_eq!(harmless("a\tb\n\u{1b}[2Jé\u{202e}"), "a\tb\n\u{fffd}[2Jé\u{fffd}");
        let once = "a\tb\n\\u{1b}[2Jé\\u{202e}\\u{2066}\\u{9b}";
        assert_eq!(escaped("a\tb\n\u{1b}[2Jé\u{202e}\u{2066}\u{9b}"), once);
        assert_eq!(escaped(once), once, "what is escaped already stays as it is");
    }
}
