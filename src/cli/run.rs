//! `aotron run`: one prompt, one answer.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;

use anyhow::bail;
use aotron::engine::Manifest;
use aotron::runtime::{Completion, FinishReason, GenerationRequest};
use aotron::text::{ChatFormat, ChatTemplate, Message, Tokenizer};
use serde_json::{Value, json};

use super::args::{ChatFlags, EngineFlags, Format, SamplingFlags, usage};
use super::engine::note_ids_only;
use super::prompt::{Prompt, PromptFlags};
use super::term;

/// Flags of `aotron run`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    engine: EngineFlags,
    #[command(flatten)]
    prompt: PromptFlags,
    /// Continue the text itself, without the chat template
    #[arg(long, conflicts_with_all = ["system", "chat_format", "escape_markers"])]
    raw: bool,
    /// With --raw or the chat format raw: start with the begin-of-text id, as the tokenizer would
    #[arg(long)]
    bos: bool,
    #[command(flatten)]
    chat: ChatFlags,
    /// System message of the chat template
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Maximum tokens of the answer [default: the engine's, usually 200]
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    max_tokens: Option<usize>,
    /// Also end the answer before TEXT; can be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Print the answer once it is complete instead of streaming it
    #[arg(long)]
    no_stream: bool,
    /// First verify the digests of all files in the engine package
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    sampling: SamplingFlags,
}

impl Flags {
    fn request(
        &self,
        prompt: Prompt,
        tokenizer: Option<&Tokenizer>,
        format: &ChatFormat,
        manifest: &Manifest,
    ) -> anyhow::Result<GenerationRequest> {
        let settings = &manifest.generation;
        let without_template = |ids: Vec<u32>| {
            let stop_strings = tokenizer.map_or(&[][..], |_| &manifest.chat_format.stop_strings);
            GenerationRequest::new(ids).stop_ids(manifest.chat_format.stop_ids()).stop_strings(stop_strings)
        };
        let request = match (prompt, tokenizer) {
            (Prompt::TokenIds(ids), _) => without_template(ids),
            (Prompt::Text(_), None) => bail!(
                "{} has no tokenizer, so it cannot take text: pass --token-ids, or build it from a checkpoint with a \
                 tokenizer.json or a tokenizer.model",
                self.engine.engine.display()
            ),
            (Prompt::Text(text), _) if text.trim().is_empty() && !self.bos => {
                return Err(usage("the prompt is empty; there is nothing to answer"));
            }
            (Prompt::Text(text), Some(tokenizer)) if self.raw => {
                without_template(self.with_bos(tokenizer.encode(&text)?, tokenizer, manifest)?)
            }
            (Prompt::Text(text), Some(tokenizer)) => {
                let system = self.system.iter().map(Message::system);
                let messages: Vec<Message> = system.chain([Message::user(text)]).collect();
                let mut request = GenerationRequest::chat(tokenizer, format, &messages)?;
                match &format.template {
                    ChatTemplate::Raw => request.prompt = self.with_bos(request.prompt, tokenizer, manifest)?,
                    _ if self.bos => {
                        let template = format.template.describe();
                        return Err(usage(format!("--bos is for --raw and the chat format raw, not for {template}")));
                    }
                    _ => {}
                }
                request
            }
        };
        let max_tokens = self.max_tokens.unwrap_or(settings.max_tokens);
        let vocab_size = tokenizer.map_or(manifest.model.vocab_size, Tokenizer::vocab_size);
        let sampling = self.sampling.params(&settings.into(), vocab_size)?;
        Ok(request.sampling(sampling).max_tokens(max_tokens).stop_strings(&self.stop))
    }

    /// The ids of a text without a template, preceded by the begin-of-text id if requested, unless the text starts with
    /// it. Otherwise notes if the tokenizer would have added one.
    fn with_bos(&self, text: Vec<u32>, tokenizer: &Tokenizer, manifest: &Manifest) -> anyhow::Result<Vec<u32>> {
        let usual = tokenizer.prefix()?;
        let pieces = |ids: &[u32]| -> String {
            ids.iter().map(|id| format!("{} ({id})", tokenizer.piece(*id).unwrap_or_default())).collect()
        };
        let mut ids = match (self.bos, &usual[..], manifest.model.bos_token_id) {
            (true, [], None) => bail!("--bos: the package has no begin-of-text id"),
            (true, [], Some(bos)) if text.first() != Some(&bos) => vec![bos],
            (true, usual, _) if !text.starts_with(usual) => usual.to_vec(),
            (true, ..) | (false, [], _) => Vec::new(),
            (false, usual, _) if text.starts_with(usual) => Vec::new(),
            (false, usual, _) => {
                term::note(format!("the tokenizer would put {} in front; --bos does", pieces(usual)));
                Vec::new()
            }
        };
        ids.extend(text);
        Ok(ids)
    }
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let prompt = flags.prompt.read(!flags.raw)?;
    if flags.verify {
        flags.engine.verify()?;
    }
    let engine = flags.engine.open_chat(&flags.chat)?;
    let load_seconds = engine.load_seconds;
    let request = flags.request(prompt, engine.tokenizer.as_deref(), &engine.format, engine.package.manifest())?;
    if let Some(idle) = flags.sampling.without_effect(&(&engine.package.manifest().generation).into()) {
        term::warn(idle);
    }
    let (max_tokens, has_text) = (request.max_tokens, engine.tokenizer.is_some());
    if !has_text {
        note_ids_only(&engine.package);
    }

    let streams = flags.format == Format::Text && !flags.no_stream && has_text;
    let mut answer = AnswerPrinter::new();
    let completion = engine.into_session().generate(&request, &mut |text| match streams {
        true => answer.show(text),
        false => ControlFlow::Continue(()),
    })?;
    match flags.format {
        Format::Json => {
            let json = as_json(&completion, has_text, load_seconds);
            writeln!(term::stdout(), "{json}")?;
        }
        Format::Text if !has_text => {
            let ids: Vec<String> = completion.token_ids.iter().map(u32::to_string).collect();
            writeln!(term::stdout(), "{}", ids.join(","))?;
        }
        Format::Text => {
            if !streams {
                let _ = answer.show(&completion.text);
            }
            answer.end_line()?;
            if completion.text.is_empty() {
                writeln!(term::stdout())?;
            }
            if completion.finish_reason == FinishReason::Length && std::io::stderr().is_terminal() {
                term::note(why_cut(&completion, max_tokens));
            }
        }
    }
    Ok(())
}

/// Streams text to standard output; ends the generation when the reader is gone.
pub struct AnswerPrinter {
    is_terminal: bool,
    ends_line: bool,
    failure: Option<std::io::Error>,
}

impl AnswerPrinter {
    pub fn new() -> AnswerPrinter {
        AnswerPrinter { is_terminal: std::io::stdout().is_terminal(), ends_line: true, failure: None }
    }

    pub fn show(&mut self, text: &str) -> ControlFlow<()> {
        let Some(last) = text.chars().last() else { return ControlFlow::Continue(()) };
        self.ends_line = last == '\n';
        let mut out = term::stdout();
        let written = match self.is_terminal {
            true => out.write_all(term::harmless(text).as_bytes()),
            false => out.write_all(text.as_bytes()),
        };
        match written.and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failure = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    /// Ends the last line, or returns the error of an earlier write.
    pub fn end_line(self) -> anyhow::Result<()> {
        match self.failure {
            Some(failure) => Err(failure.into()),
            None if self.ends_line => Ok(()),
            None => Ok(writeln!(term::stdout())?),
        }
    }
}

/// The reason why an answer was cut off.
pub fn why_cut(completion: &Completion, max_tokens: usize) -> String {
    let answer = completion.completion_tokens;
    if answer >= max_tokens {
        return format!("the answer was cut off at {}, see --max-tokens", term::plural(answer, "token"));
    }
    let all = completion.prompt_tokens + answer;
    format!("the answer was cut off: prompt and answer fill the {all} tokens that the engine holds")
}

fn as_json(completion: &Completion, has_text: bool, load_seconds: f64) -> Value {
    let timings = &completion.timings;
    json!({
        "text": has_text.then_some(&completion.text),
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "seed": completion.seed,
        "timings": {
            "load_seconds": load_seconds,
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
            "prefill_tokens_per_second": per_second(timings.prefill_tokens, timings.prefill_seconds),
            "decode_tokens_per_second": per_second(timings.decode_tokens, timings.decode_seconds),
        },
    })
}

/// Tokens per second; `None` if nothing was measured.
pub fn per_second(tokens: usize, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}
