//! A checkpoint's text side: its tokenizer, chat format and generation defaults, resolved the same way for every
//! command.

use std::collections::BTreeMap;

use super::Progress;
use crate::checkpoint::{ChatFiles, Checkpoint, GenerationConfig, TokenizerFile};
use crate::engine::GenerationSettings;
use crate::error::{Error, Result, clip, list_some};
use crate::text::{ChatFormat, ChatTemplate, FormatProblems, JinjaTemplate, NemotronMarkers, Tokenizer};

/// Largest tokenizer file that is read; the 8B model's has about 20 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Common names of the end-of-text token, for a tokenizer.json without a config.
const ENDS_OF_TEXT: [&str; 6] = ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>"];

/// The text side of a checkpoint.
#[derive(Debug)]
pub struct CheckpointText {
    /// The tokenizer, with the content of its file.
    pub tokenizer: Option<(Vec<u8>, Tokenizer)>,
    /// BOS token id.
    pub bos_token_id: Option<u32>,
    /// Chat template and stops.
    pub format: ChatFormat,
    /// Generation defaults.
    pub generation: GenerationSettings,
    /// Choices made on the user's behalf, one per line.
    pub notes: Vec<String>,
    /// Likely mistakes, one per line.
    pub warnings: Vec<String>,
    /// Reasons not to build a package unless `--chat-format` names another format.
    pub refusals: Vec<String>,
}

impl CheckpointText {
    /// Reads it. `choice`, as accepted by [`ChatTemplate::choose`], overrides the checkpoint's own format.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] or [`Error::Unsupported`] naming the file, also where it does not fit the model;
    /// those of [`ChatTemplate::choose`].
    pub fn of(checkpoint: &Checkpoint, choice: Option<&str>) -> Result<CheckpointText> {
        let (files, config) = (checkpoint.chat_files()?, checkpoint.generation_config()?);
        let mut text = CheckpointText {
            tokenizer: None,
            bos_token_id: checkpoint.config().bos_token_id,
            format: ChatFormat::raw(&[]),
            generation: GenerationSettings::default(),
            notes: Vec::new(),
            warnings: Vec::new(),
            refusals: Vec::new(),
        };
        let mut eos = checkpoint.config().eos_token_ids.clone();
        eos.extend(&config.eos_token_ids);
        let Some(file) = checkpoint.tokenizer_file(MAX_TOKENIZER_BYTES)? else {
            text.format = ChatFormat::raw(&distinct(eos));
            text.set_defaults(config, false);
            return Ok(text);
        };
        let template = text.template(checkpoint, &files, choice)?;
        let (tokenizer, special_tokens) = read_tokenizer(&file, &files)?;
        let rows = checkpoint.config().vocab_size;
        if tokenizer.vocab_size() > rows {
            let ids = tokenizer.vocab_size();
            return Err(Error::format(&file.path, format!("it has {ids} ids, but the model's vocab_size is {rows}")));
        }
        text.add_end_of_text(&mut eos, &tokenizer, &special_tokens);
        let eos = distinct(eos);
        let eos: Vec<u32> =
            eos.into_iter().filter(|id| text.can_be_sampled(*id, &tokenizer, choice.is_some())).collect();

        let mut format = ChatFormat::raw(&eos);
        format.special_tokens = special_tokens;
        format.stop_strings.clone_from(&config.stop_strings);
        format.named_templates = files.templates.into_iter().map(|file| (file.name, file.source)).collect();
        format.template = template.clone();
        let (tokenizer, whole) = format.prepare_and_list(tokenizer)?;
        if !whole.is_empty() {
            let whole: Vec<String> = whole.iter().map(|piece| format!("`{}`", clip(piece))).collect();
            text.notes.push(format!("{}: encoded whole wherever a text has it", list_some(&whole)));
        }
        text.format = format.with_template(template, &tokenizer);
        text.format
            .validate(tokenizer.vocab_size())
            .map_err(|detail| Error::unsupported(checkpoint.path(), format!("its chat format: {detail}")))?;
        let FormatProblems { warnings, refusals } = text.format.problems(&tokenizer);
        text.warnings.extend(warnings);
        text.refusals.extend(refusals);
        text.set_defaults(config, true);
        text.tokenizer = Some((file.bytes, tokenizer));
        Ok(text)
    }

    /// Reports the choices made about tokenizer, template and stops, and rejects a format that would never stop or that
    /// the model cannot understand.
    pub(super) fn report(&self, checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<()> {
        self.notes.iter().for_each(|note| progress.note(note));
        self.warnings.iter().for_each(|warning| progress.warn(warning));
        if self.tokenizer.is_none() {
            warn_without_tokenizer(checkpoint, progress);
        }
        match &self.refusals[..] {
            [] => Ok(()),
            reasons => {
                let (reasons, others) = (reasons.join("; "), other_formats(&self.format).join(", "));
                let detail = format!(
                    "{reasons}; name another chat format with --chat-format: {others}, or a file that ends in .jinja"
                );
                Err(Error::unsupported(checkpoint.path(), detail))
            }
        }
    }

    /// Resolves the format of `choice`, or else the checkpoint's.
    fn template(&mut self, checkpoint: &Checkpoint, files: &ChatFiles, choice: Option<&str>) -> Result<ChatTemplate> {
        let own = files.templates.iter().find(|file| file.name == "default");
        if let Some(choice) = choice {
            let named: BTreeMap<String, String> =
                files.templates.iter().map(|file| (file.name.clone(), file.source.clone())).collect();
            return ChatTemplate::choose(choice, &named);
        }
        match (own, &files.nemo_prompt_tokens) {
            (Some(file), _) => {
                let jinja = JinjaTemplate { name: file.name.clone(), source: file.source.clone() };
                jinja.check().map_err(|detail| {
                    let detail = format!(
                        "its chat template `{}` cannot be read: {detail}; name another format with --chat-format",
                        clip(&file.name)
                    );
                    Error::unsupported(&file.path, detail)
                })?;
                self.notes.push(format!("chat template of {}", file.path.display()));
                Ok(ChatTemplate::Jinja(jinja))
            }
            (None, _) if !files.templates.is_empty() => {
                let names: Vec<String> = files.templates.iter().map(|file| clip(&file.name)).collect();
                Err(Error::Request(format!(
                    "{} has the chat templates {} and none called default: name one with --chat-format",
                    checkpoint.path().display(),
                    names.join(", ")
                )))
            }
            (None, Some(tokens)) => {
                let markers = NemotronMarkers::from(tokens.clone());
                if markers != NemotronMarkers::default() {
                    let NemotronMarkers { system_turn_start, turn_start, .. } = &markers;
                    self.notes.push(format!(
                        "chat format nemotron with the markers of data.chat_prompt_tokens: {system_turn_start:?} and \
                         {turn_start:?}"
                    ));
                }
                Ok(ChatTemplate::Nemotron(markers))
            }
            (None, None) => {
                if checkpoint.format() != "nemo" {
                    self.notes
                        .push("no chat template is in the checkpoint: the model card's, nemotron, is taken".into());
                }
                Ok(ChatTemplate::Nemotron(NemotronMarkers::default()))
            }
        }
    }

    /// Adds the tokenizer's end-of-text token to the ids that end a generation.
    fn add_end_of_text(&mut self, eos: &mut Vec<u32>, tokenizer: &Tokenizer, special: &BTreeMap<String, String>) {
        let mut found = special.get("eos_token").and_then(|token| tokenizer.id(token));
        if let Some(facts) = tokenizer.sentencepiece() {
            found = found.or(facts.eos_id);
            self.bos_token_id = self.bos_token_id.or(facts.bos_id);
        }
        if eos.is_empty() && found.is_none() {
            let markers = tokenizer.markers();
            found = ENDS_OF_TEXT.iter().find_map(|name| Some(markers.iter().find(|(text, _)| text == name)?.1));
        }
        if let Some(id) = found.filter(|id| !eos.contains(id)) {
            let piece = tokenizer.piece(id).unwrap_or_default();
            self.notes.push(format!("the tokenizer's end of a text, `{}`, id {id}, ends answers", clip(piece)));
            eos.push(id);
        }
    }

    /// Ids past the tokenizer's are padding that is never sampled, so they would never stop a generation.
    fn can_be_sampled(&mut self, id: u32, tokenizer: &Tokenizer, is_chosen: bool) -> bool {
        let known = tokenizer.vocab_size();
        if (id as usize) < known {
            return true;
        }
        let detail =
            format!("id {id} is to end answers, but the tokenizer has {known} ids, so it can never be sampled");
        match is_chosen {
            true => self.warnings.push(detail),
            false => self.refusals.push(detail),
        }
        false
    }

    fn set_defaults(&mut self, config: GenerationConfig, has_text: bool) {
        let do_sample = config.do_sample.unwrap_or(false);
        let float = |value: Option<f64>| value.map(|value| value as f32);
        let mut unused = config.ignored;
        if !do_sample {
            let idle = [
                ("temperature", config.temperature.is_some_and(|t| t != 1.0)),
                ("top_k", config.top_k.is_some_and(|k| k > 1)),
                ("top_p", config.top_p.is_some_and(|p| p < 1.0)),
                ("min_p", config.min_p.is_some_and(|p| p > 0.0)),
            ];
            unused.extend(idle.iter().filter(|(_, given)| *given).map(|(name, _)| format!("{name} (no do_sample)")));
        }
        if !has_text && !config.stop_strings.is_empty() {
            unused.push("stop_strings (no tokenizer)".to_owned());
        }
        if !unused.is_empty() {
            self.notes.push(format!("not used of generation_config.json: {}", unused.join(", ")));
        }
        let card = GenerationSettings::default();
        self.generation = GenerationSettings {
            max_tokens: config.max_new_tokens.unwrap_or(card.max_tokens),
            do_sample,
            temperature: float(config.temperature),
            top_k: config.top_k,
            top_p: float(config.top_p),
            min_p: float(config.min_p),
            repetition_penalty: float(config.repetition_penalty),
            unused,
        };
    }
}

/// Reads the tokenizer, and the special tokens that a template may refer to by name.
fn read_tokenizer(file: &TokenizerFile, files: &ChatFiles) -> Result<(Tokenizer, BTreeMap<String, String>)> {
    let TokenizerFile { path, bytes, is_json } = file;
    let tokenizer = match is_json {
        true => Tokenizer::from_json(path, bytes)?,
        false => Tokenizer::from_sentencepiece_and(path, bytes, files.added_tokens.clone())?,
    };
    let mut special_tokens = files.special_tokens.clone();
    if let Some(facts) = tokenizer.sentencepiece() {
        let named = [("bos_token", facts.bos_id), ("eos_token", facts.eos_id), ("pad_token", facts.pad_id)];
        for (name, piece) in named.into_iter().filter_map(|(name, id)| Some((name, tokenizer.piece(id?)?))) {
            special_tokens.entry(name.to_owned()).or_insert(piece);
        }
    }
    Ok((tokenizer, special_tokens))
}

fn distinct(mut ids: Vec<u32>) -> Vec<u32> {
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Names of the formats other than `refused` that `--chat-format` takes for its checkpoint.
fn other_formats(refused: &ChatFormat) -> Vec<String> {
    let refused_name = match &refused.template {
        ChatTemplate::Nemotron(markers) if *markers == NemotronMarkers::default() => "nemotron",
        // `--chat-format nemotron` is the one with the model card's markers.
        ChatTemplate::Nemotron(_) => "",
        ChatTemplate::Jinja(jinja) => &jinja.name,
        ChatTemplate::Raw => "raw",
    };
    let built_in = ChatTemplate::built_in_names();
    let named = refused.named_templates.keys().map(String::as_str).filter(|name| !built_in.contains(name));
    built_in.iter().copied().chain(named).filter(|name| *name != refused_name).map(clip).collect()
}

fn warn_without_tokenizer(checkpoint: &Checkpoint, progress: &dyn Progress) {
    progress.warn(&format!(
        "{} has neither tokenizer.json nor tokenizer.model: the package will take and give token ids only",
        checkpoint.path().display()
    ));
}
