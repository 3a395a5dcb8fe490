//! Placement of sequences in the KV cache, whose memory all capacity classes share.
//!
//! A plan reads and writes the caches of its batch as one block, `[B, kv_heads, S, head_dim]`, and writes to every row of
//! it. So each class has a contiguous range of rows of its own, in the order of the classes:
//!
//! ```text
//! | class 256: rows 0, 1, 2, …        | class 512: rows …      | …   | class 4096: rows …    | free |
//! ```
//!
//! A sequence is in the smallest class that holds it, or, while that spares a run, in a larger one that it is counted with
//! (`merge.rs`). It moves up when it outgrows its class. Where its new class
//! has no free row, the ranges are laid out anew (`repack`): the rows in use are moved together, in their order, and what
//! remains is shared out, half of it to the class that asked. All layers have the same layout, so one list of copies
//! serves each of them.
//!
//! **No deadlock.** A reservation is for the most tokens a sequence may reach, and counts with the row of that size.
//! Reservations are granted while their rows, and those that sequences without a reservation occupy, fit the region
//! together. A sequence never occupies more than it is counted with, so when the ranges are laid out anew there is room
//! for all of them: a sequence that moves waits for nobody. The data that moves is set aside in a spare row meanwhile.
//!
//! **Released slots** keep their contents, for a later prompt that begins alike, until their rows are needed: those
//! released first go first.
//!
//! **The last entry of a class** but the largest stays unused: decode runs write an entry to the rows between those that
//! they decode, at the end of what such a row holds. A sequence of 256 tokens fits class 256 nevertheless, since the last
//! token of an answer is never computed.

mod merge;

use std::ops::Range;

pub(super) use self::merge::DecodeBytes;
use self::merge::{Decoding, merge};
use super::schedule::bucket;
use crate::backend::Span;

/// A row of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClassRow {
    pub class: usize,
    pub row: usize,
}

/// An end of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spot {
    /// The row of `capacity` tokens at this offset of the region, in tokens.
    Region { offset: usize, capacity: usize },
    /// One of the two spare rows.
    Spare(usize),
}

/// A copy of the first tokens of a row, to be made in every layer, keys and values, in the order of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowCopy {
    pub from: Spot,
    pub to: Spot,
    pub tokens: usize,
}

/// The rows of a class.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ClassRange {
    /// Offset in the region, in tokens.
    base: usize,
    /// The slot in each row.
    rows: Vec<Option<usize>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct SlotState {
    place: Option<ClassRow>,
    /// Tokens in the slot after the last step that named it.
    held: usize,
    /// Tokens it may reach.
    reserved: Option<usize>,
    /// Order of release; `None` while it is in use.
    released: Option<u64>,
}

/// The classes and the memory that they share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    /// Tokens per row, ascending.
    pub capacities: Vec<usize>,
    /// Most rows of each class, the plans' largest batch.
    pub most_rows: Vec<usize>,
    /// Tokens in all.
    pub tokens: usize,
    /// Most rows of all classes together, at least the number of slots.
    pub most_rows_in_all: usize,
    /// Number of slots.
    pub slots: usize,
    /// What a decode run reads.
    pub decode_bytes: DecodeBytes,
}

/// Which slot is in which row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placement {
    region: Region,
    ranges: Vec<ClassRange>,
    slots: Vec<SlotState>,
    releases: u64,
}

impl Placement {
    pub(super) fn new(region: Region) -> Placement {
        let ranges = vec![ClassRange::default(); region.capacities.len()];
        let slots = vec![SlotState::default(); region.slots];
        let mut placement = Placement { region, ranges, slots, releases: 0 };
        // As if a short sequence had come and gone, so that the first ones find rows where runs were captured. Nothing is
        // to be copied, and where there is no room, later layouts say so.
        let _ = placement.repack(0, &mut Vec::new());
        placement
    }

    /// The smallest class that holds a sequence of so many tokens.
    fn class_of(&self, tokens: usize) -> usize {
        let capacities = &self.region.capacities;
        capacities.iter().position(|capacity| tokens < *capacity).unwrap_or(capacities.len() - 1)
    }

    /// Tokens of the region that a slot is counted with: at least those that it has.
    fn counted(&self, slot: &SlotState) -> usize {
        let tokens = slot.reserved.unwrap_or(0).max(slot.held);
        let own = slot.place.map_or(0, |place| place.class);
        match slot.released.is_some() || tokens == 0 {
            true => 0,
            false => self.region.capacities[self.class_of(tokens).max(own)],
        }
    }

    /// The class that each sequence of a step is to be in.
    fn classes_of(&self, spans: &[Span]) -> Vec<usize> {
        let mut classes = Vec::with_capacity(spans.len());
        let (mut decoding, mut indices) = (Vec::new(), Vec::new());
        for (index, span) in spans.iter().enumerate() {
            let reached = span.past_tokens + span.len;
            let smallest = self.class_of(reached);
            classes.push(smallest);
            let state = &self.slots[span.slot];
            if let (1, Some(reserved), Some(place)) = (span.len, state.reserved, state.place) {
                let most = self.class_of(reserved.max(reached));
                let class = place.class.clamp(smallest, most);
                let remaining = reserved.saturating_sub(reached);
                decoding.push(Decoding { class, smallest, most, held: span.past_tokens, remaining });
                indices.push(index);
            } else if span.len == 1 {
                // It moves nowhere, but its run is one that others may join.
                decoding.push(Decoding { class: smallest, smallest, most: smallest, held: 0, remaining: 0 });
                indices.push(index);
            }
        }
        let free = |range: &ClassRange| range.rows.iter().filter(|row| row.is_none()).count();
        let free_rows = self.ranges.iter().map(free).collect();
        let merged = merge(&decoding, free_rows, &self.region.capacities, self.region.decode_bytes);
        indices.into_iter().zip(merged).for_each(|(index, class)| classes[index] = class);
        classes
    }

    fn counted_in_all(&self) -> usize {
        self.slots.iter().map(|slot| self.counted(slot)).sum()
    }

    /// Reserves room for a sequence of up to `tokens` tokens; returns false if there is none at present.
    pub(super) fn reserve(&mut self, slot: usize, tokens: usize) -> bool {
        let Some(state) = self.slots.get(slot).copied() else { return false };
        let wanted = SlotState { reserved: Some(tokens), released: None, ..state };
        let others = self.counted_in_all() - self.counted(&state);
        let fits = |slot: &SlotState| others + self.counted(slot) <= self.region.tokens;
        if !fits(&wanted) {
            // Perhaps without what a longer sequence left there.
            if !fits(&SlotState { held: 0, place: None, ..wanted }) {
                return false;
            }
            self.forget(slot);
        }
        (self.slots[slot].reserved, self.slots[slot].released) = (wanted.reserved, None);
        true
    }

    /// Ends a slot's use. Its contents remain until their row is needed.
    pub(super) fn release(&mut self, slot: usize) {
        self.releases += 1;
        if let Some(state) = self.slots.get_mut(slot) {
            (state.reserved, state.released) = (None, Some(self.releases));
        }
    }

    /// Counts a slot's contents as lost.
    pub(super) fn forget(&mut self, slot: usize) {
        if slot < self.slots.len() {
            self.vacate(slot);
            self.slots[slot].held = 0;
        }
    }

    /// Counts the contents of all slots as lost.
    pub(super) fn forget_all(&mut self) {
        (0..self.slots.len()).for_each(|slot| self.forget(slot));
    }

    /// Tokens in a slot.
    pub(super) fn held(&self, slot: usize) -> usize {
        self.slots.get(slot).map_or(0, |state| state.held)
    }

    /// Row of a slot.
    pub(super) fn place(&self, slot: usize) -> Option<ClassRow> {
        self.slots.get(slot)?.place
    }

    /// The slot of each row of a class.
    pub(super) fn rows(&self, class: usize) -> &[Option<usize>] {
        &self.ranges[class].rows
    }

    /// Offset of a row in the region, in tokens.
    pub(super) fn offset(&self, ClassRow { class, row }: ClassRow) -> usize {
        self.ranges[class].base + row * self.region.capacities[class]
    }

    /// The tokens of the region that a slot has.
    pub(super) fn own_tokens(&self, slot: usize) -> Option<Range<usize>> {
        let place = self.place(slot)?;
        let start = self.offset(place);
        Some(start..start + self.region.capacities[place.class])
    }

    /// The tokens of the region that a slot has, and those that nobody has.
    pub(super) fn free_tokens(&self, slot: usize) -> Vec<Range<usize>> {
        let mut free = Vec::new();
        let mut end = 0;
        for (class, range) in self.ranges.iter().enumerate() {
            for (row, holder) in range.rows.iter().enumerate() {
                let start = self.offset(ClassRow { class, row });
                end = start + self.region.capacities[class];
                if holder.is_none_or(|holder| holder == slot) {
                    free.push(start..end);
                }
            }
        }
        free.push(end..self.region.tokens);
        free
    }

    /// Gives every sequence of a step a row that holds it after the step. Returns the copies to make before.
    ///
    /// # Errors
    /// A sentence, if a slot does not hold what the step builds on, or if there is no room; nothing has changed then.
    pub(super) fn prepare(&mut self, spans: &[Span]) -> Result<Vec<RowCopy>, String> {
        let mut next = self.clone();
        let mut copies = Vec::new();
        for span in spans {
            let held = next.held(span.slot);
            if span.past_tokens > held {
                let past = span.past_tokens;
                return Err(format!("slot {} holds {held} tokens, but the step builds on {past} of it", span.slot));
            }
            // What follows the tokens that the step builds on is void.
            let state = &mut next.slots[span.slot];
            (state.held, state.released) = (span.past_tokens, None);
            let reached = span.past_tokens + span.len;
            state.reserved = state.reserved.map(|reserved| reserved.max(reached));
        }
        let after = |slot: usize, state: &SlotState| match spans.iter().find(|span| span.slot == slot) {
            // Where it is going is no larger than what it is counted with.
            Some(span) => next.counted(&SlotState { held: span.past_tokens + span.len, place: None, ..*state }),
            None => next.counted(state),
        };
        let wanted: usize = next.slots.iter().enumerate().map(|(slot, state)| after(slot, state)).sum();
        if wanted > next.region.tokens {
            return Err(format!(
                "the step needs KV memory for {wanted} tokens, but there is memory for {}: sequences that are reserved, \
                 or were never released, hold the rest",
                next.region.tokens
            ));
        }
        let classes = next.classes_of(spans);
        // Those that move to a smaller class make room for those that move to a larger one.
        let grows = |(span, class): &(&Span, usize)| {
            let place = next.slots[span.slot].place;
            place.is_none_or(|place| place.class <= *class)
        };
        let (growing, shrinking): (Vec<_>, Vec<_>) = spans.iter().zip(classes).partition(grows);
        for (span, class) in shrinking.into_iter().chain(growing) {
            next.put(span.slot, span.past_tokens, class, &mut copies)?;
            next.slots[span.slot].held = span.past_tokens + span.len;
        }
        *self = next;
        Ok(copies)
    }

    /// Moves a slot, of which the first `kept` tokens matter, to a row of a class.
    fn put(&mut self, slot: usize, kept: usize, class: usize, copies: &mut Vec<RowCopy>) -> Result<(), String> {
        let old = self.slots[slot].place;
        if old.is_some_and(|old| old.class == class) {
            return Ok(());
        }
        let source = old.filter(|_| kept > 0).map(|old| self.spot(old));
        let row = match self.free_row(class, slot) {
            Some(row) => {
                let to = self.spot(ClassRow { class, row });
                copies.extend(source.map(|from| RowCopy { from, to, tokens: kept }));
                self.vacate(slot);
                row
            }
            None => {
                // Its own row is part of what is laid out anew.
                copies.extend(source.map(|from| RowCopy { from, to: Spot::Spare(0), tokens: kept }));
                self.vacate(slot);
                self.repack(class, copies)?;
                let row = self.free_row(class, slot).ok_or("the KV cache was laid out without the row it needs")?;
                let to = self.spot(ClassRow { class, row });
                copies.extend(source.map(|_| RowCopy { from: Spot::Spare(0), to, tokens: kept }));
                row
            }
        };
        self.ranges[class].rows[row] = Some(slot);
        self.slots[slot].place = Some(ClassRow { class, row });
        Ok(())
    }

    fn spot(&self, at: ClassRow) -> Spot {
        Spot::Region { offset: self.offset(at), capacity: self.region.capacities[at.class] }
    }

    fn vacate(&mut self, slot: usize) {
        if let Some(ClassRow { class, row }) = self.slots[slot].place.take() {
            self.ranges[class].rows[row] = None;
        }
    }

    /// Drops the contents of a slot.
    fn evict(&mut self, slot: usize) {
        self.vacate(slot);
        self.slots[slot] = SlotState::default();
    }

    /// The first free row of a class, or else the one of the slot that was released first.
    fn free_row(&mut self, class: usize, but: usize) -> Option<usize> {
        if let Some(row) = self.ranges[class].rows.iter().position(Option::is_none) {
            return Some(row);
        }
        let released = |slot: &usize| self.slots[*slot].released.map(|order| (order, *slot));
        let others = self.ranges[class].rows.iter().flatten().filter(|slot| **slot != but);
        let (_, slot) = others.filter_map(released).min()?;
        let row = self.slots[slot].place?.row;
        self.evict(slot);
        Some(row)
    }

    /// Lays out the ranges anew, with a free row for `class`.
    fn repack(&mut self, class: usize, copies: &mut Vec<RowCopy>) -> Result<(), String> {
        let rows = self.needed_rows(class)?;
        let rows = self.shared_out(class, rows);
        let before = std::mem::take(&mut self.ranges);
        let mut base = 0;
        // (from, to, capacity, slot), ascending in both offsets.
        let mut moves = Vec::new();
        for (class, (old, count)) in before.iter().zip(&rows).enumerate() {
            let capacity = self.region.capacities[class];
            let mut range = ClassRange { base, rows: vec![None; *count] };
            let occupied = old.rows.iter().enumerate().filter_map(|(row, slot)| Some((row, (*slot)?)));
            for (row, (old_row, slot)) in occupied.enumerate() {
                range.rows[row] = Some(slot);
                self.slots[slot].place = Some(ClassRow { class, row });
                moves.push((old.base + old_row * capacity, base + row * capacity, capacity, slot));
            }
            base += count * capacity;
            self.ranges.push(range);
        }
        // Those that move down from the first on, those that move up from the last on: none then overwrites another
        // that is still to move, because their order stays the same.
        let down = moves.iter().filter(|(from, to, ..)| to < from);
        let up = moves.iter().rev().filter(|(from, to, ..)| to > from);
        for (from, to, capacity, slot) in down.chain(up).copied() {
            let tokens = self.slots[slot].held.min(capacity);
            if tokens == 0 {
                continue;
            }
            let [from_spot, to_spot] = [from, to].map(|offset| Spot::Region { offset, capacity });
            if from.abs_diff(to) < capacity {
                let spare = Spot::Spare(1);
                copies.push(RowCopy { from: from_spot, to: spare, tokens });
                copies.push(RowCopy { from: spare, to: to_spot, tokens });
            } else {
                copies.push(RowCopy { from: from_spot, to: to_spot, tokens });
            }
        }
        Ok(())
    }

    /// Rows that each class needs, with one more for `class`, after dropping released slots for which there is no room.
    fn needed_rows(&mut self, class: usize) -> Result<Vec<usize>, String> {
        loop {
            let mut rows: Vec<usize> = self.ranges.iter().map(|range| range.rows.iter().flatten().count()).collect();
            rows[class] += 1;
            let fits = rows.iter().zip(&self.region.most_rows).all(|(rows, most)| rows <= most);
            if fits && self.tokens_of(&rows) <= self.region.tokens {
                return Ok(rows);
            }
            let released = |(slot, state): (usize, &SlotState)| {
                let order = state.released?;
                state.place.map(|_| (order, slot))
            };
            let oldest = self.slots.iter().enumerate().filter_map(released).min();
            let (_, slot) = oldest.ok_or_else(|| {
                let (tokens, capacity) = (self.region.tokens, self.region.capacities[class]);
                format!("there is no row of {capacity} tokens left in a KV cache of {tokens} tokens")
            })?;
            self.evict(slot);
        }
    }

    fn tokens_of(&self, rows: &[usize]) -> usize {
        rows.iter().zip(&self.region.capacities).map(|(rows, capacity)| rows * capacity).sum()
    }

    /// Shares out what is left: first up to whole batches, then half to `class` and the rest to the others in equal
    /// parts.
    fn shared_out(&self, class: usize, mut rows: Vec<usize>) -> Vec<usize> {
        let Region { capacities, most_rows, tokens, most_rows_in_all, .. } = &self.region;
        let grow = |rows: &mut Vec<usize>, index: usize, count: usize| {
            let in_all = rows.iter().sum::<usize>() - rows[index] + count;
            let after = self.tokens_of(rows) + (count.max(rows[index]) - rows[index]) * capacities[index];
            if count > rows[index] && count <= most_rows[index] && in_all <= *most_rows_in_all && after <= *tokens {
                rows[index] = count;
            }
        };
        for index in 0..rows.len() {
            let count = rows[index];
            if count > 0 {
                grow(&mut rows, index, bucket(count, most_rows[index]));
            }
        }
        let left = tokens - self.tokens_of(&rows);
        let free_rows = most_rows_in_all.saturating_sub(rows.iter().sum());
        let others = rows.len() - 1;
        for index in 0..rows.len() {
            let parts = match (index == class, others) {
                (true, 0) => 1,
                (true, _) => 2,
                (false, n) => 2 * n,
            };
            let most = rows[index] + (left / parts / capacities[index]).min(free_rows / parts);
            let most = most.min(most_rows[index]);
            // Down to a whole batch.
            let count = (0..=most).rev().find(|count| bucket(*count, most_rows[index]) == *count);
            grow(&mut rows, index, count.unwrap_or(0));
        }
        rows
    }
}

#[cfg(test)]
mod tests;
