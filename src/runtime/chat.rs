//! A conversation: messages on top of a session.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::request::{Completion, GenerationRequest};
use super::sampling::SamplingParams;
use super::session::Session;
use super::stream::TextStream;
use crate::error::{Error, Result};
use crate::text::{ChatFormat, Message, Role, Tokenizer};

/// A user message, and settings for its answer that override those of the conversation.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Turn {
    /// The message text.
    pub content: String,
    /// Overrides [`Chat::set_sampling`].
    pub sampling: Option<SamplingParams>,
    /// Overrides [`Chat::set_max_tokens`].
    pub max_tokens: Option<usize>,
    /// Strings that end this answer, in addition to those of the chat format; neither they nor anything after them is
    /// shown.
    pub stop_strings: Vec<String>,
}

impl Turn {
    /// A message to be answered with the conversation's settings.
    pub fn new(content: impl Into<String>) -> Turn {
        Turn { content: content.into(), sampling: None, max_tokens: None, stop_strings: Vec::new() }
    }

    /// Overrides the sampling settings for this answer.
    #[must_use]
    pub fn sampling(mut self, sampling: SamplingParams) -> Turn {
        self.sampling = Some(sampling);
        self
    }

    /// Limits the tokens of this answer.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> Turn {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// Adds a string that ends this answer.
    #[must_use]
    pub fn stop_string(mut self, text: impl Into<String>) -> Turn {
        self.stop_strings.push(text.into());
        self
    }
}

impl From<&str> for Turn {
    fn from(content: &str) -> Turn {
        Turn::new(content)
    }
}

impl From<&String> for Turn {
    fn from(content: &String) -> Turn {
        Turn::new(content)
    }
}

impl From<String> for Turn {
    fn from(content: String) -> Turn {
        Turn::new(content)
    }
}

/// Keeps the messages of a conversation and generates each answer on a session. Every prompt is the whole conversation;
/// the session computes only the part that is new.
///
/// ```no_run
/// use std::io::Write;
///
/// use aotron::{Model, SamplingParams, Turn};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut chat = Model::open("engines/tiny-chat")?.chat()?;
/// for piece in chat.send("My name is Felix.")? {
///     print!("{}", piece?);
///     std::io::stdout().flush()?;
/// }
/// let mut answer = chat.send(Turn::new("What is my name?").max_tokens(20).sampling(SamplingParams::sampled(0.5)))?;
/// for piece in answer.by_ref() {
///     print!("{}", piece?);
/// }
/// println!("{:?}", answer.finish()?.finish_reason);
/// # Ok(())
/// # }
/// ```
pub struct Chat {
    session: Session,
    tokenizer: Arc<Tokenizer>,
    format: Arc<ChatFormat>,
    messages: Vec<Message>,
    sampling: SamplingParams,
    max_tokens: usize,
    last: Option<Completion>,
}

impl Chat {
    /// Creates an empty conversation in the given chat format, with greedy sampling and answers as long as there is
    /// room for.
    ///
    /// # Errors
    /// [`Error::Request`] if the session has no tokenizer.
    pub fn new(session: Session, format: Arc<ChatFormat>) -> Result<Chat> {
        let Some(tokenizer) = session.tokenizer().cloned() else {
            return Err(Error::Request("a chat needs a tokenizer, and this session has none".into()));
        };
        Ok(Chat {
            session,
            tokenizer,
            format,
            messages: Vec::new(),
            sampling: SamplingParams::greedy(),
            max_tokens: usize::MAX,
            last: None,
        })
    }

    /// Sets the sampling settings for answers whose turn does not override them.
    pub fn set_sampling(&mut self, sampling: SamplingParams) {
        self.sampling = sampling;
    }

    /// Sets the token limit for answers whose turn does not override it.
    pub fn set_max_tokens(&mut self, max_tokens: usize) {
        self.max_tokens = max_tokens;
    }

    /// The conversation so far: an optional system message, then user and assistant in turn.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Replaces the conversation, for example by a saved one; it is validated when the next message is sent.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    /// Sets the system message from here on; an empty one, which the model card recommends, removes it. The rest of the
    /// conversation is kept.
    pub fn set_system(&mut self, content: &str) {
        self.messages.retain(|message| message.role != Role::System);
        if !content.is_empty() {
            self.messages.insert(0, Message::system(content));
        }
    }

    /// Starts over, keeping only the system message.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == Role::System);
    }

    /// The session, for its limits.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, for other uses. Running something on it does not change the conversation.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The last answer, however it ended; `None` before the first.
    pub fn last_completion(&self) -> Option<&Completion> {
        self.last.as_ref()
    }

    /// Sends a message and returns the answer as an iterator over its text, computed on demand. A string is sent with
    /// the conversation's settings; a [`Turn`] can override them.
    ///
    /// The answer, as far as it was computed, joins the conversation when the iterator is dropped or
    /// [finished](Answer::finish). After an error the conversation is unchanged.
    ///
    /// # Errors
    /// As [`Session::stream`] and [`ChatFormat::prompt`]; the conversation is unchanged then.
    /// [`Error::ConversationFull`] means that it has outgrown the engine: messages are never dropped silently, so call
    /// [`Chat::reset`], or [`Chat::set_messages`] with fewer.
    pub fn send(&mut self, turn: impl Into<Turn>) -> Result<Answer<'_>> {
        let Turn { content, sampling, max_tokens, stop_strings } = turn.into();
        self.messages.push(Message::user(content));
        let request = match GenerationRequest::chat(&self.tokenizer, &self.format, &self.messages) {
            Ok(request) => request
                .sampling(sampling.unwrap_or_else(|| self.sampling.clone()))
                .max_tokens(max_tokens.unwrap_or(self.max_tokens))
                .stop_strings(stop_strings),
            Err(error) => {
                self.messages.pop();
                return Err(error);
            }
        };
        let has_earlier = self.messages.iter().filter(|message| message.role != Role::System).count() > 1;
        match self.session.stream(request) {
            Ok(stream) => Ok(Answer { stream: Some(stream), messages: &mut self.messages, last: &mut self.last }),
            Err(error) => {
                self.messages.pop();
                Err(match error {
                    Error::PromptTooLong { prompt_tokens, max_sequence_tokens } if has_earlier => {
                        Error::ConversationFull { conversation_tokens: prompt_tokens, max_sequence_tokens }
                    }
                    error => error,
                })
            }
        }
    }

    /// Sends a message and computes its answer to the end, or until `on_text` breaks; `on_text` is as in
    /// [`Session::generate`].
    ///
    /// # Errors
    /// As [`Chat::send`] and [`Session::generate`].
    pub fn send_with(
        &mut self,
        turn: impl Into<Turn>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion> {
        let mut answer = self.send(turn)?;
        while let Some(text) = answer.step()? {
            if on_text(text).is_break() {
                break;
            }
        }
        answer.finish()
    }
}

/// An answer being computed: an iterator over pieces of its text, like [`TextStream`].
#[derive(Debug)]
pub struct Answer<'a> {
    /// `None` once the answer has joined the conversation.
    stream: Option<TextStream<'a>>,
    messages: &'a mut Vec<Message>,
    last: &'a mut Option<Completion>,
}

impl Answer<'_> {
    /// Runs one forward step, as [`TextStream::step`].
    ///
    /// # Errors
    /// As [`TextStream::step`].
    pub fn step(&mut self) -> Result<Option<&str>> {
        match &mut self.stream {
            Some(stream) => stream.step(),
            None => Ok(None),
        }
    }

    /// Ends the answer, adds it to the conversation as far as it was computed, and returns it.
    ///
    /// # Errors
    /// [`Error::Request`] if it failed; that error was returned before.
    pub fn finish(mut self) -> Result<Completion> {
        match self.stream.take() {
            Some(stream) => self.join(stream),
            None => Err(Error::Request("the answer is finished".into())),
        }
    }

    fn join(&mut self, stream: TextStream<'_>) -> Result<Completion> {
        let finished = stream.finish();
        match &finished {
            Ok(completion) => {
                self.messages.push(Message::assistant(completion.text.clone()));
                *self.last = Some(completion.clone());
            }
            // Remove the unanswered question too.
            Err(_) => drop(self.messages.pop()),
        }
        finished
    }
}

impl Iterator for Answer<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        self.stream.as_mut().and_then(TextStream::next)
    }
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take() {
            // Any error was already returned by `step`.
            let _ = self.join(stream);
        }
    }
}
