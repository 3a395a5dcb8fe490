//! An executor without a model, for tests. Its logits are a hash of the ids in the slot, so any mistake in slots,
//! lengths or chunks changes the answer. A script can override them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::backend::{DeferredLogits, Executor, KvBlock, Limits, Logits, Span, Step, Top};
use crate::error::{Error, Result};

/// The executor's output for one row.
pub(super) enum ScriptedRow {
    /// Logits between -4 and 4 that depend on every id of the sequence.
    Hash,
    /// Logits with this id far ahead.
    Id(u32),
    /// The hash, with this value at this index.
    Spoiled(usize, f32),
    /// The hash, but none of the step's rows can be fetched.
    Lost,
    /// An error of the whole step.
    Fail,
}

/// Chooses the output from the step's index and the sequence so far.
type Script = Box<dyn FnMut(usize, &[u32]) -> ScriptedRow + Send>;

/// The spans of every step, in order.
pub(super) type Log = Arc<Mutex<Vec<Vec<Span>>>>;

/// The memory of a slot. As on the CPU, what is past the end of its sequence stays until it is overwritten.
#[derive(Clone)]
struct ScriptedSlot {
    ids: Vec<u32>, // [max_sequence_tokens]
    /// Tokens of the sequence.
    len: usize,
}

pub(super) struct Scripted {
    limits: Limits,
    slots: Vec<ScriptedSlot>,
    script: Script,
    logits: Vec<f32>,
    log: Log,
    /// Number of a row's largest logits that are available at once; `None` for whole rows.
    top_tokens: Option<usize>,
    /// `[rows, top_tokens]` each.
    top: (Vec<f32>, Vec<u32>),
    is_lost: bool,
    fetches: Arc<AtomicUsize>,
    mended: Arc<Mutex<Vec<usize>>>,
    /// Copies between slots.
    copies: bool,
    /// Tokens of a block that can be copied out and in.
    block_tokens: Option<usize>,
    /// Blocks copied since the last step, and the most between two steps.
    block_copies: (AtomicUsize, Arc<AtomicUsize>),
    /// Whether a failed step is the end, and there was one.
    lost: (bool, bool),
}

impl Scripted {
    /// Creates an executor that answers with hashes.
    pub(super) fn hashing(limits: &Limits) -> Scripted {
        Scripted::new(limits, |_, _| ScriptedRow::Hash)
    }

    pub(super) fn new(limits: &Limits, script: impl FnMut(usize, &[u32]) -> ScriptedRow + Send + 'static) -> Scripted {
        Scripted {
            limits: limits.clone(),
            slots: vec![ScriptedSlot { ids: vec![u32::MAX; limits.max_sequence_tokens], len: 0 }; limits.slots],
            script: Box::new(script),
            logits: Vec::new(),
            log: Log::default(),
            top_tokens: None,
            top: Default::default(),
            is_lost: false,
            fetches: Arc::default(),
            mended: Arc::default(),
            copies: false,
            block_tokens: None,
            block_copies: Default::default(),
            lost: (false, false),
        }
    }

    /// Makes a failed step the end.
    pub(super) fn lost_after_failure(mut self) -> Scripted {
        self.lost.0 = true;
        self
    }

    /// Lets prefixes be copied from slot to slot.
    pub(super) fn copying(mut self) -> Scripted {
        self.copies = true;
        self
    }

    /// Lets blocks of so many tokens be copied out and in. A block's bytes are its ids.
    pub(super) fn in_blocks(mut self, tokens: usize) -> Scripted {
        self.block_tokens = Some(tokens);
        self
    }

    /// The most blocks that were copied between two steps.
    pub(super) fn most_block_copies(&self) -> Arc<AtomicUsize> {
        self.block_copies.1.clone()
    }

    fn count_block_copy(&self) {
        let copies = self.block_copies.0.fetch_add(1, Ordering::Relaxed) + 1;
        self.block_copies.1.fetch_max(copies, Ordering::Relaxed);
    }

    /// Makes the `top_tokens` largest logits of a row available at once, and the row itself only on request.
    pub(super) fn deferred(mut self, top_tokens: Option<usize>) -> Scripted {
        self.top_tokens = top_tokens.map(|k| k.min(self.limits.vocab_size));
        self
    }

    /// Counter of the rows that were fetched.
    pub(super) fn fetches(&self) -> Arc<AtomicUsize> {
        self.fetches.clone()
    }

    /// The slots that were mended, in order.
    pub(super) fn mended(&self) -> Arc<Mutex<Vec<usize>>> {
        self.mended.clone()
    }

    pub(super) fn log(&self) -> Log {
        self.log.clone()
    }
}

impl Executor for Scripted {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn is_lost(&self) -> bool {
        self.lost == (true, true)
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool> {
        if self.copies {
            let source = self.slots[from].clone();
            assert!(tokens <= source.len, "slot {from} holds {} tokens", source.len);
            self.slots[to].ids[..tokens].copy_from_slice(&source.ids[..tokens]);
            self.slots[to].len = tokens;
        }
        Ok(self.copies)
    }

    fn kv_block(&self) -> Option<KvBlock> {
        self.block_tokens.map(|tokens| KvBlock { tokens, bytes: 4 * tokens })
    }

    fn read_kv_block(&self, slot: usize, index: usize, into: &mut [u8]) -> Result<()> {
        self.count_block_copy();
        let tokens = self.block_tokens.unwrap();
        let ids = &self.slots[slot].ids[index * tokens..][..tokens];
        into.copy_from_slice(bytemuck::cast_slice(ids));
        Ok(())
    }

    fn write_kv_block(&mut self, slot: usize, index: usize, from: &[u8]) -> Result<()> {
        self.count_block_copy();
        let tokens = self.block_tokens.unwrap();
        let slot = &mut self.slots[slot];
        assert!(index * tokens <= slot.len, "the slot holds {} tokens before block {index}", slot.len);
        slot.ids[index * tokens..][..tokens].copy_from_slice(bytemuck::pod_collect_to_vec::<u8, u32>(from).as_slice());
        slot.len = (index + 1) * tokens;
        Ok(())
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        self.block_copies.0.store(0, Ordering::Relaxed);
        let number = self.log.lock().unwrap().len();
        self.log.lock().unwrap().push(step.spans().to_vec());
        self.logits.clear();
        self.is_lost = false;
        let mut failed = false;
        for span in step.spans() {
            let slot = &mut self.slots[span.slot];
            assert!(span.past_tokens <= slot.len, "slot {} holds {} tokens: {span:?}", span.slot, slot.len);
            slot.len = span.past_tokens;
            for index in span.first..span.first + span.len {
                slot.ids[slot.len] = step.tokens()[index];
                slot.len += 1;
                let slot = &slot.ids[..slot.len];
                if !step.logits_rows().contains(&(index as u32)) {
                    continue;
                }
                let start = self.logits.len();
                self.logits.extend(hashed(slot, self.limits.vocab_size));
                match (self.script)(number, slot) {
                    ScriptedRow::Hash => {}
                    ScriptedRow::Id(id) => self.logits[start + id as usize] = 100.0,
                    ScriptedRow::Spoiled(at, value) => self.logits[start + at] = value,
                    ScriptedRow::Lost => self.is_lost = true,
                    ScriptedRow::Fail => failed = true,
                }
            }
        }
        if failed {
            self.lost.1 = true;
            for span in step.spans() {
                self.slots[span.slot].len = span.past_tokens;
            }
            return Err(Error::Step("the device is gone".into()));
        }
        let Some(k) = self.top_tokens else { return Logits::new(&self.logits, self.limits.vocab_size) };
        self.top.0.clear();
        self.top.1.clear();
        for row in self.logits.chunks_exact(self.limits.vocab_size) {
            let (values, ids) = largest(row, k);
            self.top.0.extend(values);
            self.top.1.extend(ids);
        }
        Ok(Logits::deferred(self))
    }

    fn mend_slot(&mut self, slot: usize) -> Result<()> {
        self.mended.lock().unwrap().push(slot);
        Ok(())
    }
}

impl DeferredLogits for Scripted {
    fn rows(&self) -> usize {
        self.logits.len() / self.limits.vocab_size
    }

    fn top(&self, row: usize) -> Top<'_> {
        let k = self.top_tokens.unwrap();
        let width = self.limits.vocab_size;
        let sum = self.logits[row * width..][..width].iter().sum();
        Top { values: &self.top.0[row * k..][..k], ids: &self.top.1[row * k..][..k], sum }
    }

    fn fetch(&mut self, row: usize) -> Result<&[f32]> {
        self.fetches.fetch_add(1, Ordering::Relaxed);
        if self.is_lost {
            return Err(Error::Step("the device is gone".into()));
        }
        Ok(&self.logits[row * self.limits.vocab_size..][..self.limits.vocab_size])
    }
}

/// The `k` largest logits of a row with their ids: NaN first, and the highest id first among equals, the reverse of the
/// sampler's order.
pub(super) fn largest(row: &[f32], k: usize) -> (Vec<f32>, Vec<u32>) {
    let mut ids: Vec<u32> = (0..row.len() as u32).rev().collect();
    let key = |id: &u32| row[*id as usize];
    ids.sort_by(|a, b| (key(b).is_nan().cmp(&key(a).is_nan())).then(key(b).total_cmp(&key(a))));
    ids.truncate(k);
    (ids.iter().map(key).collect(), ids)
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
