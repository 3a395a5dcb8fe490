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
mod prompt;
mod run;
mod score;
mod shell;
mod term;
mod tokenize;
mod whole_file;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};

/// Parses the arguments, runs the command and reports its error. The exit code is 1, or 2 for invalid arguments.
pub fn main() -> ExitCode {
    let command = Args::parse().command;
    show_log();
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
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
        Command::Bench(flags) => bench::run(&flags),
        Command::Doctor(flags) => doctor::run(&flags),
        Command::Completions(flags) => shell::completions(&flags),
        Command::Man(flags) => shell::man(&flags),
    }
}

fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        let _ = usage.print();
        return ExitCode::from(2);
    }
    // The reader of our output has closed it, as `head` does.
    let is_closed_pipe = |e: &std::io::Error| e.kind() == ErrorKind::BrokenPipe;
    if error.chain().any(|cause| cause.downcast_ref().is_some_and(is_closed_pipe)) {
        return ExitCode::SUCCESS;
    }
    let _ = writeln!(std::io::stderr(), "{} {}", term::on_stderr().bold_red("error:"), message(error));
    ExitCode::FAILURE
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
