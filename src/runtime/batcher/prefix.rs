//! Copies of keys and values between slots and the blocks outside of them.
//!
//! What a request displaces from its slot stays there until it is overwritten, so it is stored just ahead of that, as a
//! rule: a prompt's chunk ends where the stored part does. Copies of one step are bounded, whether into a slot or out of
//! it, so requests that decode are held up for a bounded time; a request whose slot is not ready waits for the next step.

use super::{Active, Batcher};
use crate::runtime::prefix_cache::{PrefixCache, Salt};

/// Bytes of blocks that are copied before a step, or one block if that is larger. A step of a model whose sequences have so
/// many reads its weights, a hundred times as much.
const COPY_BYTES: usize = 64 << 20;

/// Progress in filling a request's slot.
#[derive(Debug, Default)]
pub(super) struct Filling {
    /// Tokens copied from another slot.
    from_other_slot: usize,
    /// Tokens copied from blocks.
    from_blocks: usize,
}

impl Batcher {
    /// Sets the limit on blocks outside of the slots.
    pub(super) fn set_prefix_cache(&mut self, limit_bytes: usize) {
        let block = self.executor.kv_block().filter(|block| block.tokens > 0 && block.bytes > 0);
        let cache = block.map(|block| PrefixCache::new(block, limit_bytes));
        self.prefix_cache = cache.filter(|_| limit_bytes > 0);
        self.renew_copies();
    }

    /// Does what copies are due before a step.
    pub(super) fn copy_before_step(&mut self) {
        self.renew_copies();
        self.fill();
        // What is left is for the rest of what was displaced, though nothing overwrites it yet: its slot may be taken
        // once more.
        for slot in 0..self.slots.count() {
            self.store_displaced(slot, usize::MAX);
        }
    }

    fn renew_copies(&mut self) {
        let block = self.executor.kv_block().map_or(1, |block| block.bytes.max(1));
        self.copies_left = (COPY_BYTES / block).max(1);
    }

    /// Stores what the next step of the running requests would overwrite, and fills the slots of those that have not begun.
    pub(super) fn fill(&mut self) {
        for active in 0..self.active.len() {
            let Some(Active { slot, filling: None, .. }) = self.active.get(active) else { continue };
            let slot = *slot;
            let end = self.slots.len(slot).saturating_add(self.executor.limits().max_step_tokens);
            self.store_displaced(slot, end);
        }
        for index in 0..self.active.len() {
            let Some(active) = self.active.get_mut(index) else { continue };
            let (slot, is_over) = (active.slot, active.outcome.is_some());
            let Some(mut filling) = active.filling.take().filter(|_| !is_over) else { continue };
            let is_full = self.fill_slot(index, &mut filling);
            let len = self.slots.len(slot);
            let Some(active) = self.active.get_mut(index) else { continue };
            if is_full {
                active.generation.reuse(len);
                let Filling { from_other_slot, from_blocks } = filling;
                self.reuse.from_slot.count(len.saturating_sub(from_other_slot + from_blocks));
                self.reuse.from_other_slot.count(from_other_slot);
                self.reuse.from_blocks.count(from_blocks);
            } else {
                active.filling = Some(filling);
            }
        }
    }

    /// Copies to the slot of a request what another slot or the blocks hold of its prompt, whichever is more. Returns
    /// false if some of it has to wait for the next step. What cannot be copied is computed.
    fn fill_slot(&mut self, index: usize, filling: &mut Filling) -> bool {
        let Some(Active { slot, generation, .. }) = self.active.get(index) else { return true };
        let (slot, salt) = (*slot, generation.cache_salt());
        let held = self.slots.len(slot);
        let source = self.slots.find_source(salt, |cached| generation.reusable(cached));
        let source = source.filter(|(from, tokens)| *from != slot && *tokens > held);
        let prompt = generation.prompt();
        let wanted = prompt.get(..generation.reusable(prompt)).unwrap_or(prompt);
        if let Some(cache) = &mut self.prefix_cache {
            let block_tokens = cache.block_tokens();
            let chain = cache.find(salt, wanted);
            let cached = chain.len() * block_tokens;
            if cached > source.map_or(held, |(_, tokens)| tokens) {
                let (salt, ids) = (salt.clone(), wanted.get(..cached).unwrap_or(wanted).to_vec());
                let first = held / block_tokens;
                self.slots.truncate(slot, first * block_tokens);
                self.store_displaced(slot, cached);
                return self.restore(slot, &salt, &ids, first, filling);
            }
        }
        let Some((from, tokens)) = source else { return true };
        self.store_displaced(slot, tokens);
        if self.slots.writable(slot) < tokens - held {
            return false;
        }
        if self.executor.copy_prefix(from, slot, tokens).is_ok_and(|copied| copied) {
            let ids = self.slots.ids(from).get(held..tokens).unwrap_or_default().to_vec();
            filling.from_other_slot += ids.len();
            self.slots.extend(slot, &ids);
        }
        true
    }

    /// Copies blocks `first` and following of the sequence `ids` to a slot. Returns false if some have to wait.
    fn restore(&mut self, slot: usize, salt: &Salt, ids: &[u32], first: usize, filling: &mut Filling) -> bool {
        let Some(cache) = &mut self.prefix_cache else { return true };
        let block_tokens = cache.block_tokens();
        // Those that the displaced sequence's blocks have pushed out are computed.
        let chain = cache.find(salt, ids);
        for (index, block) in chain.iter().enumerate().skip(first) {
            if self.copies_left == 0 || self.slots.writable(slot) < block_tokens {
                return false;
            }
            self.copies_left -= 1;
            let Some(data) = cache.data(*block) else { return true };
            if self.executor.write_kv_block(slot, index, data).is_err() {
                return true;
            }
            let written = ids.get(index * block_tokens..(index + 1) * block_tokens).unwrap_or_default();
            self.slots.extend(slot, written);
            filling.from_blocks += written.len();
        }
        true
    }

    /// Stores the displaced sequence of a slot up to `tokens` tokens, as far as this step's copies suffice.
    fn store_displaced(&mut self, slot: usize, tokens: usize) {
        let (Some(cache), Some(displaced)) = (&mut self.prefix_cache, self.slots.displaced(slot)) else { return };
        let block_tokens = cache.block_tokens();
        let all = displaced.ids.len() / block_tokens;
        let end = tokens.div_ceil(block_tokens).min(all);
        let first = displaced.stored / block_tokens;
        let executor = &self.executor;
        let read = |index: usize, into: &mut [u8]| executor.read_kv_block(slot, index, into);
        let next = match first < end {
            true => cache.store(&displaced.salt, &displaced.ids, (first, end), &mut self.copies_left, read),
            false => first,
        };
        // What follows the last whole block is not kept.
        self.slots.give_up(slot, (next < all).then_some(next * block_tokens));
    }
}
