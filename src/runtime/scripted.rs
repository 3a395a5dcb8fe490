//! An executor without a model, for tests: its logits are a hash of the ids in the slot, so any mistake in slots,
//! lengths or chunks changes the answer. A script can overrule it.

use std::sync::{Arc, Mutex};

use crate::backend::{Executor, Limits, Logits, Span, Step};
use crate::error::{Error, Result};

/// What the executor answers for one row.
pub(super) enum Answer {
    /// Logits between -4 and 4 that depend on every id of the sequence.
    Hash,
    /// This id, clearly.
    Id(u32),
    /// The hash with this value at this index.
    Spoiled(usize, f32),
    /// An error of the whole step.
    Fail,
}

/// Decides the answer from the step's number, from 0, and the sequence so far.
type Script = Box<dyn FnMut(usize, &[u32]) -> Answer + Send>;

/// The spans of every step, in order.
pub(super) type Log = Arc<Mutex<Vec<Vec<Span>>>>;

pub(super) struct Scripted {
    limits: Limits,
    slots: Vec<Vec<u32>>,
    script: Script,
    logits: Vec<f32>,
    log: Log,
}

impl Scripted {
    /// One that answers with hashes.
    pub(super) fn hashing(limits: &Limits) -> Scripted {
        Scripted::new(limits, |_, _| Answer::Hash)
    }

    pub(super) fn new(limits: &Limits, script: impl FnMut(usize, &[u32]) -> Answer + Send + 'static) -> Scripted {
        Scripted {
            limits: limits.clone(),
            slots: vec![Vec::new(); limits.slots],
            script: Box::new(script),
            logits: Vec::new(),
            log: Log::default(),
        }
    }

    pub(super) fn log(&self) -> Log {
        self.log.clone()
    }
}

impl Executor for Scripted {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        let number = self.log.lock().unwrap().len();
        self.log.lock().unwrap().push(step.spans().to_vec());
        self.logits.clear();
        let mut failed = false;
        for span in step.spans() {
            let slot = &mut self.slots[span.slot];
            assert!(span.past_tokens <= slot.len(), "slot {} holds {} tokens: {span:?}", span.slot, slot.len());
            slot.truncate(span.past_tokens);
            for index in span.first..span.first + span.len {
                slot.push(step.tokens()[index]);
                if !step.logits_rows().contains(&(index as u32)) {
                    continue;
                }
                let start = self.logits.len();
                self.logits.extend(hashed(slot, self.limits.vocab_size));
                match (self.script)(number, slot) {
                    Answer::Hash => {}
                    Answer::Id(id) => self.logits[start + id as usize] = 100.0,
                    Answer::Spoiled(at, value) => self.logits[start + at] = value,
                    Answer::Fail => failed = true,
                }
            }
        }
        if failed {
            for span in step.spans() {
                self.slots[span.slot].truncate(span.past_tokens);
            }
            return Err(Error::Step("the device is gone".into()));
        }
        Logits::new(&self.logits, self.limits.vocab_size)
    }
}

/// The logits that follow a sequence, `[vocab_size]`.
pub(super) fn hashed(sequence: &[u32], vocab_size: usize) -> Vec<f32> {
    let mix = |state: u64| {
        let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let state = sequence.iter().fold(sequence.len() as u64, |state, id| mix(state ^ u64::from(*id)));
    (0..vocab_size as u64).map(|id| (mix(state ^ (id << 32)) >> 40) as f32 / (1 << 21) as f32 - 4.0).collect()
}
