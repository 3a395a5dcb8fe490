//! A conversation: messages on top of a session.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::request::{Completion, GenerationRequest};
use super::sampling::SamplingParams;
use super::session::Session;
use crate::error::{Error, Result};
use crate::text::{ChatFormat, Message, Role, Tokenizer};

/// Keeps the messages of a conversation and asks the session for each answer. The whole conversation is the prompt
/// each time; the session computes only what is new in it.
pub struct Chat {
    session: Session,
    tokenizer: Arc<Tokenizer>,
    format: Arc<ChatFormat>,
    messages: Vec<Message>,
}

impl Chat {
    /// An empty conversation, in the format of the package.
    ///
    /// # Errors
    /// [`Error::Request`] where the session has no tokenizer.
    pub fn new(session: Session, format: Arc<ChatFormat>) -> Result<Chat> {
        let Some(tokenizer) = session.tokenizer().cloned() else {
            return Err(Error::Request("a chat needs a tokenizer, and this session has none".into()));
        };
        Ok(Chat { session, tokenizer, format, messages: Vec::new() })
    }

    /// The conversation so far: an optional system message, then user and assistant in turn.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Continues another conversation, such as a saved one; it is checked when the next message is sent.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    /// Sets the system message for what follows; an empty one, which the model card recommends, removes it. The
    /// conversation is kept.
    pub fn set_system(&mut self, content: &str) {
        self.messages.retain(|message| message.role != Role::System);
        if !content.is_empty() {
            self.messages.insert(0, Message::system(content));
        }
    }

    /// Starts over: everything but the system message is forgotten.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == Role::System);
    }

    /// The session, for its limits.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session, for what is not chat. The conversation stays as it is, whatever is run there.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Says `content` as the user and returns the answer, which joins the conversation; `on_text` as in
    /// [`Session::generate`]. The answer of a cancelled generation joins it as far as it was shown.
    ///
    /// # Errors
    /// As [`Session::generate`] and [`ChatFormat::prompt`]; the conversation is then
    /// what it was before. On [`Error::PromptTooLong`] it has outgrown the engine: nothing is dropped in silence, so
    /// the way on is [`Chat::reset`].
    pub fn send(
        &mut self,
        content: &str,
        sampling: &SamplingParams,
        max_tokens: usize,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion> {
        self.messages.push(Message::user(content));
        match self.answer(sampling, max_tokens, on_text) {
            Ok(completion) => {
                self.messages.push(Message::assistant(completion.text.clone()));
                Ok(completion)
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn answer(
        &mut self,
        sampling: &SamplingParams,
        max_tokens: usize,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion> {
        let request = GenerationRequest {
            sampling: sampling.clone(),
            max_tokens,
            ..GenerationRequest::chat(&self.tokenizer, &self.format, &self.messages)?
        };
        self.session.generate(&request, on_text)
    }
}
