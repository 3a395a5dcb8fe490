//! A generation as an iterator over its text.

use std::fmt;

use super::generation::{ChooseToken, Generation};
use super::request::Completion;
use super::session::Session;
use crate::error::{Error, Result};

/// The text of a generation on a [`Session`], in pieces as it is computed. Nothing is computed ahead: each call of
/// `next` runs forward steps until there is text to show.
///
/// Pieces are never empty, and together they are the completion's text. An error is the last item. Dropping the stream
/// ends the generation; so does [`TextStream::finish`], which returns what it has.
pub struct TextStream<'a> {
    session: &'a mut Session,
    /// `None` once it has failed.
    generation: Option<Generation>,
    delta: String,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(session: &'a mut Session, generation: Generation) -> TextStream<'a> {
        TextStream { session, generation: Some(generation), delta: String::new() }
    }

    /// Chooses each token with `choose` instead of the request's sampling settings. It receives a row of logits, one
    /// for each id that can be chosen, and the ids chosen so far; stops and limits apply as usual.
    #[must_use]
    pub fn choosing(mut self, choose: impl FnMut(&[f32], &[u32]) -> Result<u32> + Send + 'static) -> TextStream<'a> {
        if let Some(generation) = &mut self.generation {
            generation.choose_by(ChooseToken::new(choose));
        }
        self
    }

    /// Runs one forward step. Returns the text that became certain in it, which may be empty, or `None` if the
    /// generation has already ended.
    ///
    /// # Errors
    /// [`Error::Numerics`] for NaN or infinite logits; whatever the executor reports. No text follows an error.
    pub fn step(&mut self) -> Result<Option<&str>> {
        self.delta.clear();
        let Some(generation) = &mut self.generation else { return Ok(None) };
        if generation.is_finished() {
            return Ok(None);
        }
        match self.session.advance(generation, &mut self.delta) {
            Ok(()) => Ok(Some(&self.delta)),
            Err(error) => {
                self.generation = None;
                Err(error)
            }
        }
    }

    /// The ids sampled so far.
    pub fn token_ids(&self) -> &[u32] {
        self.generation.as_ref().map_or(&[], Generation::ids)
    }

    /// Ends the generation and returns its result, with finish reason
    /// [`FinishReason::Cancelled`](super::FinishReason::Cancelled) if it was not finished.
    ///
    /// # Errors
    /// [`Error::Request`] if it failed; that error was returned before.
    pub fn finish(self) -> Result<Completion> {
        let failed = || Error::Request("the generation has failed; its error was returned before".into());
        self.generation.map(Generation::complete).ok_or_else(failed)
    }
}

impl Iterator for TextStream<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        loop {
            match self.step() {
                Ok(None) => return None,
                Ok(Some("")) => {}
                Ok(Some(text)) => return Some(Ok(text.to_owned())),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl fmt::Debug for TextStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextStream").field("generation", &self.generation).finish_non_exhaustive()
    }
}
