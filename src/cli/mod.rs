//! The command line, the only layer that prints: data goes to standard output, everything else to standard error.
//!
//! A command is a module with its raw flags and a `run` function, which builds the library's objects from them.

mod args;
mod bench;
mod build;
mod chat;
mod doctor;
mod editor;
mod engine;
mod inspect;
mod lost_pages;
mod prompt;
mod run;
mod score;
#[cfg(feature = "serve")]
mod serve;
mod shell;
mod term;
mod tokenize;
mod verify;
mod whole_file;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::builder::Styles;
use clap::{CommandFactory, FromArgMatches};

use args::{Args, Command};

/// Parses the arguments, runs the command and reports its error. The exit code is 1, or 2 for invalid arguments.
pub fn main() -> ExitCode {
    lost_pages::install();
    let done = parse().map_err(anyhow::Error::from).and_then(|args| {
        show_log();
        run(args.command)
    });
    // What is still buffered may meet a full disk too.
    match done.and_then(|()| Ok(term::stdout().flush()?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// Returns true if printing an argument as it is could do harm.
fn has_harmful_argument() -> bool {
    std::env::args_os().any(|argument| argument.to_string_lossy().contains(term::is_harmful))
}

fn parse() -> Result<Args, clap::Error> {
    // Clap quotes arguments as they are. Without its colours, what is escaped in its messages is the arguments' alone.
    let styles = if has_harmful_argument() { Styles::plain() } else { Styles::styled() };
    Args::from_arg_matches(&Args::command().styles(styles).try_get_matches()?)
}

/// Prints TensorRT's log to standard error at the level set by AOTRON_LOG: `info`, or `tensorrt=debug`. Off if it is
/// unset.
fn show_log() {
    let Some(filter) = std::env::var("AOTRON_LOG").ok().filter(|filter| !filter.is_empty()) else { return };
    let filter = tracing_subscriber::EnvFilter::new(filter);
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().try_init();
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Build(flags) => build::run(&flags),
        Command::Chat(flags) => chat::run(&flags),
        Command::Run(flags) => run::run(&flags),
        Command::Score(flags) => score::run(&flags),
        Command::Tokenize(flags) => tokenize::run(&flags),
        Command::Inspect(flags) => inspect::run(&flags),
        Command::Verify(flags) => verify::run(&flags),
        #[cfg(feature = "serve")]
        Command::Serve(flags) => serve::run(&flags),
        Command::Bench(flags) => bench::run(&flags),
        Command::Doctor(flags) => doctor::run(&flags),
        Command::Completions(flags) => shell::completions(&flags),
        Command::Man(flags) => shell::man(&flags),
    }
}

fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        return show_usage(usage);
    }
    // The reader of our output has closed it, as `head` does.
    let is_closed_pipe = |e: &std::io::Error| e.kind() == ErrorKind::BrokenPipe;
    if error.chain().any(|cause| cause.downcast_ref().is_some_and(is_closed_pipe)) {
        return ExitCode::SUCCESS;
    }
    term::error(message(error));
    ExitCode::FAILURE
}

/// Prints invalid arguments on standard error, or the help or version that was asked for on standard output.
fn show_usage(usage: &clap::Error) -> ExitCode {
    if !usage.use_stderr() {
        return match usage.print().map_err(anyhow::Error::from).and_then(|()| Ok(term::stdout().flush()?)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => report(&error.context("cannot write to standard output")),
        };
    }
    let _ = match has_harmful_argument() {
        true => write!(std::io::stderr(), "{}", term::escaped(usage.render().ansi())),
        false => usage.print(),
    };
    ExitCode::from(2)
}

/// The error and its causes on one line, skipping causes that are already quoted by their consequence.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    #[test]
    fn a_cause_that_is_quoted_is_not_repeated() {
        let gone = || std::io::Error::new(std::io::ErrorKind::NotFound, "gone");
        let quoted = anyhow::Error::from(aotron::Error::io("open", "a.json")(gone()));
        assert_eq!(super::message(&quoted), "cannot open a.json: gone");
        let apart = Err::<(), _>(gone()).context("list 3").unwrap_err();
        assert_eq!(super::message(&apart), "list 3: gone");
    }
}
