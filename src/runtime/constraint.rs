//! Constraints on an answer's tokens, such as a grammar, which the sampler applies before it chooses.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};

/// Follows one answer and tells which ids may come next.
pub trait TokenConstraint: Send {
    /// Fills `allowed`, which is empty, with the ids that may come next. Ids that end an answer are allowed where the
    /// answer may end.
    ///
    /// # Errors
    /// Fails the request, and no other.
    fn allow(&mut self, allowed: &mut TokenMask) -> Result<()>;

    /// Advances by a chosen id, which was allowed.
    ///
    /// # Errors
    /// Fails the request, and no other.
    fn push(&mut self, id: u32) -> Result<()>;
}

/// A constraint for any number of answers, each of which starts anew.
#[derive(Clone)]
pub struct Grammar(Arc<StartConstraint>);

type StartConstraint = dyn Fn() -> Result<Box<dyn TokenConstraint>> + Send + Sync;

impl Grammar {
    /// A grammar whose constraints `start` makes.
    pub fn new(start: impl Fn() -> Result<Box<dyn TokenConstraint>> + Send + Sync + 'static) -> Grammar {
        Grammar(Arc::new(start))
    }

    pub(crate) fn start(&self) -> Result<Box<dyn TokenConstraint>> {
        (self.0)()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Grammar) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A set of token ids below a fixed number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// An empty set of ids below `ids`.
    pub fn new(ids: usize) -> TokenMask {
        TokenMask { words: vec![0; ids.div_ceil(32)] }
    }

    /// Removes all ids.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds an id; one out of range is ignored.
    pub fn insert(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }

    /// Adds the ids whose bits are set in `words`, 32 in each, the least significant first.
    pub fn insert_words(&mut self, words: &[u32]) {
        for (word, more) in self.words.iter_mut().zip(words) {
            *word |= more;
        }
    }

    /// Returns true if the id is in the set.
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Number of ids in the set.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Returns true if no id is.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }
}

/// A constraint that is in use, with its set of allowed ids.
pub(super) struct ActiveConstraint {
    constraint: Box<dyn TokenConstraint>,
    allowed: TokenMask,
}

impl ActiveConstraint {
    /// Starts a constraint over the ids below `ids`.
    pub(super) fn new(constraint: Box<dyn TokenConstraint>, ids: usize) -> ActiveConstraint {
        ActiveConstraint { constraint, allowed: TokenMask::new(ids) }
    }

    /// The ids that may come next.
    pub(super) fn allowed(&mut self) -> Result<&TokenMask> {
        self.allowed.clear();
        self.constraint.allow(&mut self.allowed)?;
        if self.allowed.is_empty() {
            return Err(Error::Request("the grammar allows no token here that the tokenizer has".into()));
        }
        Ok(&self.allowed)
    }

    pub(super) fn push(&mut self, id: u32) -> Result<()> {
        self.constraint.push(id)
    }
}

impl fmt::Debug for ActiveConstraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ActiveConstraint")
    }
}
