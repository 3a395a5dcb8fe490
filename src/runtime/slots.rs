//! Tracks which ids each slot of the KV cache holds, and which slots are free.

use super::prefix_cache::Salt;

/// Length of the longest common prefix.
pub(super) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Prompt tokens that need not be computed again: the longest cached prefix, but never the whole prompt, because the
/// logits of its last token are needed.
pub(super) fn reusable(cached: &[u32], prompt: &[u32]) -> usize {
    common_prefix(cached, prompt).min(prompt.len().saturating_sub(1))
}

/// The slots of one executor.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<CacheSlot>,
    /// Counts releases, to find the slot that has been free the longest.
    releases: u64,
}

#[derive(Debug, Default)]
struct CacheSlot {
    /// Ids whose keys and values the slot holds.
    ids: Vec<u32>,
    /// Salt of the request that computed them.
    salt: Salt,
    /// What it held before, where that is not stored yet.
    displaced: Option<Displaced>,
    busy: bool,
    released: u64,
}

/// The sequence that a slot held before its present one. What is past the present one's end is still there.
#[derive(Debug)]
pub(super) struct Displaced {
    /// Its ids, from its start.
    pub ids: Vec<u32>,
    /// Salt of the request that computed them.
    pub salt: Salt,
    /// Tokens that are stored, and may be overwritten.
    pub stored: usize,
}

impl CacheSlot {
    /// Tokens that a request with this salt may reuse of it.
    fn reusable(&self, salt: &Salt, reusable: impl Fn(&[u32]) -> usize) -> usize {
        if self.salt == *salt { reusable(&self.ids) } else { 0 }
    }
}

impl Slots {
    pub(super) fn new(count: usize) -> Slots {
        Slots { slots: (0..count).map(|_| CacheSlot::default()).collect(), releases: 0 }
    }

    pub(super) fn count(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn has_free(&self) -> bool {
        self.slots.iter().any(|slot| !slot.busy)
    }

    /// Finds the free slot for a request with this salt: the one that holds most of its prompt, as `reusable` counts;
    /// of equals, the one that has been free the longest. Returns its index and the tokens to reuse, or `None` if all are
    /// busy.
    pub(super) fn find(&self, salt: &Salt, reusable: impl Fn(&[u32]) -> usize) -> Option<(usize, usize)> {
        let free = self.slots.iter().enumerate().filter(|(_, slot)| !slot.busy);
        let ranked = free.map(|(index, slot)| (slot.reusable(salt, &reusable), index, slot.released));
        let (reused, index, _) =
            ranked.max_by_key(|(reused, index, released)| (*reused, std::cmp::Reverse((*released, *index))))?;
        Some((index, reused))
    }

    /// Finds the slot, busy or free, that holds most of the prompt of a request with this salt, and how much.
    pub(super) fn find_source(&self, salt: &Salt, reusable: impl Fn(&[u32]) -> usize) -> Option<(usize, usize)> {
        let ranked = self.slots.iter().enumerate().map(|(index, slot)| (slot.reusable(salt, &reusable), index));
        let (reused, index) = ranked.max_by_key(|(reused, index)| (*reused, std::cmp::Reverse(*index)))?;
        Some((index, reused))
    }

    /// Takes a slot for a request with this salt; the first `reused` tokens are kept. What else it held becomes its
    /// displaced sequence, of `displaced_tokens` at most.
    pub(super) fn take(&mut self, index: usize, reused: usize, salt: Salt, displaced_tokens: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.busy = true;
            let kept = slot.ids.get(..reused).unwrap_or(&slot.ids).to_vec();
            let (mut ids, salt) = (std::mem::replace(&mut slot.ids, kept), std::mem::replace(&mut slot.salt, salt));
            ids.truncate(displaced_tokens);
            slot.displaced = (ids.len() > reused).then_some(Displaced { ids, salt, stored: 0 });
        }
    }

    /// Drops the tokens of a busy slot's sequence from `tokens` on.
    pub(super) fn truncate(&mut self, index: usize, tokens: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.ids.truncate(tokens);
        }
    }

    /// A slot's displaced sequence.
    pub(super) fn displaced(&self, index: usize) -> Option<&Displaced> {
        self.slots.get(index)?.displaced.as_ref()
    }

    /// Records that the first `tokens` tokens of a slot's displaced sequence may be overwritten; `None` stands for all.
    pub(super) fn give_up(&mut self, index: usize, tokens: Option<usize>) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        match (tokens, &mut slot.displaced) {
            (Some(tokens), Some(displaced)) => displaced.stored = tokens,
            _ => slot.displaced = None,
        }
    }

    /// Tokens that may be written to a slot, from the end of its sequence on, without overwriting a displaced sequence
    /// that is not stored.
    pub(super) fn writable(&self, index: usize) -> usize {
        self.displaced(index).map_or(usize::MAX, |displaced| displaced.stored.saturating_sub(self.len(index)))
    }

    /// The ids that a slot holds.
    pub(super) fn ids(&self, index: usize) -> &[u32] {
        self.slots.get(index).map_or(&[], |slot| &slot.ids)
    }

    /// Drops what the executor no longer holds of free slots: `retained` is the number of tokens it holds of one.
    pub(super) fn retain(&mut self, retained: impl Fn(usize) -> usize) {
        for (index, slot) in self.slots.iter_mut().enumerate().filter(|(_, slot)| !slot.busy) {
            slot.ids.truncate(retained(index));
        }
    }

    /// Frees a slot; its contents stay reusable.
    pub(super) fn release(&mut self, index: usize) {
        self.releases += 1;
        if let Some(slot) = self.slots.get_mut(index) {
            slot.busy = false;
            slot.released = self.releases;
        }
    }

    /// Records that the executor has appended `ids` to the slot.
    pub(super) fn extend(&mut self, index: usize, ids: &[u32]) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.ids.extend_from_slice(ids);
        }
    }

    /// Discards the contents of a slot whose values cannot be trusted.
    pub(super) fn forget(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.ids.clear();
            slot.displaced = None;
        }
    }

    /// Discards the contents of all slots.
    pub(super) fn forget_all(&mut self) {
        for slot in &mut self.slots {
            slot.ids.clear();
            slot.displaced = None;
        }
    }

    /// Number of tokens in a slot.
    pub(super) fn len(&self, index: usize) -> usize {
        self.slots.get(index).map_or(0, |slot| slot.ids.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_goes_where_most_of_it_is_and_else_where_nothing_was_for_longest() {
        let mut slots = Slots::new(3);
        fn acquire(slots: &mut Slots, prompt: &[u32]) -> Option<(usize, usize)> {
            let (index, reused) = slots.find(&None, |cached| reusable(cached, prompt))?;
            slots.take(index, reused, None, 0);
            Some((index, reused))
        }
        let taken: Vec<_> = (0..3).map(|n| acquire(&mut slots, &[n, 7]).unwrap()).collect();
        assert_eq!(taken, [(0, 0), (1, 0), (2, 0)]);
        assert_eq!(acquire(&mut slots, &[1]), None);
        for (slot, ids) in [(0, [0, 7]), (1, [1, 7]), (2, [2, 7])] {
            slots.extend(slot, &ids);
        }
        for slot in [1, 2, 0] {
            slots.release(slot);
        }
        assert_eq!(acquire(&mut slots, &[2, 7]), Some((2, 1)), "the last token is computed again");
        assert_eq!((slots.len(2), slots.len(0)), (1, 2));
        assert_eq!(acquire(&mut slots, &[9, 9]), Some((1, 0)));
        slots.forget_all();
        assert_eq!(acquire(&mut slots, &[0, 7]), Some((0, 0)));
        assert!(!slots.has_free() && reusable(&[], &[]) == 0);
    }

    #[test]
    fn nothing_is_reused_across_salts() {
        let mut slots = Slots::new(2);
        let prompt = [1, 2, 3];
        let [a, b] = ["a", "b"].map(|salt| Some(salt.into()));
        let find = |slots: &Slots, salt| slots.find(salt, |cached| reusable(cached, &prompt)).unwrap();
        slots.take(0, 0, a.clone(), 0);
        slots.extend(0, &prompt);
        let source = |slots: &Slots, salt| slots.find_source(salt, |cached| reusable(cached, &prompt)).unwrap();
        assert_eq!((source(&slots, &a), source(&slots, &None).1), ((0, 2), 0), "a busy slot is a source");
        slots.release(0);
        assert_eq!((find(&slots, &a), find(&slots, &None).1, find(&slots, &b).1), ((0, 2), 0, 0));
    }

    #[test]
    fn what_a_sequence_displaces_is_not_overwritten_before_it_is_stored() {
        let mut slots = Slots::new(1);
        slots.take(0, 0, Some("a".into()), 9);
        assert_eq!((slots.displaced(0).is_none(), slots.writable(0)), (true, usize::MAX), "it was empty");
        slots.extend(0, &[1, 2, 3, 4, 5, 6]);
        slots.release(0);
        slots.take(0, 2, None, 5);
        let displaced = slots.displaced(0).unwrap();
        assert_eq!((&displaced.ids[..], displaced.salt.as_deref()), (&[1, 2, 3, 4, 5][..], Some("a")));
        assert_eq!((slots.ids(0), slots.writable(0)), (&[1, 2][..], 0));
        slots.give_up(0, Some(3));
        assert_eq!(slots.writable(0), 1);
        slots.extend(0, &[9]);
        assert_eq!(slots.writable(0), 0);
        slots.give_up(0, None);
        assert_eq!(slots.writable(0), usize::MAX);
        slots.release(0);
        slots.take(0, 3, None, 3);
        assert!(slots.displaced(0).is_none(), "all of it is kept");
    }
}
