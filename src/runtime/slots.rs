//! Tracks which ids each slot of the KV cache holds, and which slots are free.

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
    salt: Option<String>,
    busy: bool,
    released: u64,
}

impl CacheSlot {
    /// Tokens that a request with this salt may reuse of it.
    fn reusable(&self, salt: Option<&str>, reusable: impl Fn(&[u32]) -> usize) -> usize {
        if self.salt.as_deref() == salt { reusable(&self.ids) } else { 0 }
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
    pub(super) fn find(&self, salt: Option<&str>, reusable: impl Fn(&[u32]) -> usize) -> Option<(usize, usize)> {
        let free = self.slots.iter().enumerate().filter(|(_, slot)| !slot.busy);
        let ranked = free.map(|(index, slot)| (slot.reusable(salt, &reusable), index, slot.released));
        let (reused, index, _) =
            ranked.max_by_key(|(reused, index, released)| (*reused, std::cmp::Reverse((*released, *index))))?;
        Some((index, reused))
    }

    /// Finds the slot, busy or free, that holds most of the prompt of a request with this salt, and how much.
    pub(super) fn find_source(&self, salt: Option<&str>, reusable: impl Fn(&[u32]) -> usize) -> Option<(usize, usize)> {
        let ranked = self.slots.iter().enumerate().map(|(index, slot)| (slot.reusable(salt, &reusable), index));
        let (reused, index) = ranked.max_by_key(|(reused, index)| (*reused, std::cmp::Reverse(*index)))?;
        Some((index, reused))
    }

    /// Takes a slot for a request with this salt; the first `reused` tokens are kept.
    pub(super) fn take(&mut self, index: usize, reused: usize, salt: Option<&str>) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.busy = true;
            slot.ids.truncate(reused);
            slot.salt = salt.map(str::to_owned);
        }
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
        }
    }

    /// Discards the contents of all slots.
    pub(super) fn forget_all(&mut self) {
        for slot in &mut self.slots {
            slot.ids.clear();
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
            let (index, reused) = slots.find(None, |cached| reusable(cached, prompt))?;
            slots.take(index, reused, None);
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
        let find = |slots: &Slots, salt| slots.find(salt, |cached| reusable(cached, &prompt)).unwrap();
        slots.take(0, 0, Some("a"));
        slots.extend(0, &prompt);
        let source = |slots: &Slots, salt| slots.find_source(salt, |cached| reusable(cached, &prompt)).unwrap();
        assert_eq!((source(&slots, Some("a")), source(&slots, None).1), ((0, 2), 0), "a busy slot is a source");
        slots.release(0);
        assert_eq!((find(&slots, Some("a")), find(&slots, None).1, find(&slots, Some("b")).1), ((0, 2), 0, 0));
    }
}
