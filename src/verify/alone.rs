//! Cases that need no reference: the same tokens must give the same logits whichever way they are computed.
//!
//! The yardstick is a sequence decoded token by token, alone, in a slot of zeros. Every other way must give its rows:
//! prefilled at once and in chunks, beside sequences of other lengths, at every batch size, in a slot that held a longer
//! sequence or junk, and up to the last position of a full slot.

use super::compare::CaseResult;
use super::run::{Part, Runner};
use super::{VerifyOptions, sample_tokens};
use crate::backend::{ExecutorPromises, NextToken, Rows};
use crate::error::Result;

/// Tokens of the sequences that are decoded token by token.
const SHORT: usize = 40;
/// Sequences with different tokens.
const SEQUENCES: usize = 5;
/// Tokens of the first part of a sequence that is changed; each other part is as long as all before it.
const FIRST_PART: usize = 16;
/// Byte of a fill that is a large number in every float type: 784 in BF16, 785 in FP32, 4.3 in FP16.
const JUNK: u8 = 0x44;
/// Byte of a fill with NaN.
const NAN: u8 = 0xff;

/// Runs the cases on an executor.
pub(super) struct AloneCases<'r, 'e> {
    runner: &'r mut Runner<'e>,
    limit: f32,
    most_tokens: usize,
    /// Token ids of each sequence, and the logits after each token.
    sequences: Vec<(Vec<u32>, Vec<Vec<f32>>)>,
    results: Vec<CaseResult>,
}

impl<'r, 'e> AloneCases<'r, 'e> {
    /// Runs all cases.
    ///
    /// # Errors
    /// Any error of the executor.
    pub fn run(
        runner: &'r mut Runner<'e>,
        promises: ExecutorPromises,
        limit: f32,
        options: &VerifyOptions,
    ) -> Result<Vec<CaseResult>> {
        let limits = &runner.limits;
        let most_tokens = options.most_tokens.unwrap_or(usize::MAX).min(limits.max_sequence_tokens);
        let limit = if promises.same_bits { 0.0 } else { limit };
        let mut cases = AloneCases { runner, limit, most_tokens, sequences: Vec::new(), results: Vec::new() };
        cases.decode_yardsticks()?;
        cases.prefilled_at_once()?;
        cases.in_chunks()?;
        cases.beside_others()?;
        cases.each_batch_size()?;
        cases.used_slot()?;
        cases.past_the_end("junk past the end of a sequence", JUNK)?;
        if promises.ignores_unwritten {
            cases.past_the_end("NaN past the end of a sequence", NAN)?;
        }
        cases.nan_is_seen()?;
        cases.whole_slot()?;
        cases.every_part_counts()?;
        Ok(cases.results)
    }

    fn case(&self, name: &'static str) -> CaseResult {
        CaseResult::new(name, self.limit)
    }

    fn slots(&self) -> usize {
        self.runner.limits.slots
    }

    /// A slot that a case may use beside slot 0: the last.
    fn last_slot(&self) -> usize {
        self.slots() - 1
    }

    fn decode_yardsticks(&mut self) -> Result<()> {
        let short = SHORT.min(self.most_tokens);
        let sequences = SEQUENCES.min(self.slots().max(2));
        let mut finite = CaseResult::new("logits are finite", 0.0);
        for index in 0..sequences {
            let ids = sample_tokens(&self.runner.limits, index as u64, short);
            self.runner.zero(0)?;
            let rows = self.runner.decode_all(0, 0, &ids)?;
            for (position, row) in rows.iter().enumerate() {
                finite.rows += 1;
                if let Some(id) = row.iter().position(|value| !value.is_finite()) {
                    let found = row.get(id).copied().unwrap_or(f32::NAN);
                    finite.record(f32::INFINITY, Some(id as u32), found, 0.0, &|| {
                        format!("decoded alone, position {position}")
                    });
                }
            }
            self.sequences.push((ids, rows));
        }
        self.results.push(finite);
        Ok(())
    }

    /// Compares rows of sequence `sequence` from position `first` on.
    fn compare(
        &self,
        case: &mut CaseResult,
        sequence: usize,
        first: usize,
        rows: &[Vec<f32>],
        way: &dyn Fn() -> String,
    ) {
        let (_, expected) = &self.sequences[sequence];
        for (offset, row) in rows.iter().enumerate() {
            let position = first + offset;
            if let Some(expected) = expected.get(position) {
                case.compare(row, expected, &|| format!("{}, position {position}", way()));
            }
        }
    }

    fn prefilled_at_once(&mut self) -> Result<()> {
        let mut case = self.case("prefilled at once");
        let (ids, _) = self.sequences[0].clone();
        let lengths = [2, 3, 5, 8, 13, 16, 17, 33, SHORT];
        let most = ids.len().min(self.runner.limits.max_step_tokens);
        for length in lengths.into_iter().filter(|length| *length <= most) {
            let ids = &ids[..length];
            for slot in [0, self.last_slot()] {
                self.runner.zero(slot)?;
                let last = self.runner.prefill(&[Part { slot, past_tokens: 0, tokens: ids, rows: Rows::Last }])?;
                self.compare(&mut case, 0, length - 1, &last, &|| format!("{length} tokens, slot {slot}"));
            }
            if length <= self.runner.most_rows() {
                let all = self.runner.prefill(&[Part { slot: 0, past_tokens: 0, tokens: ids, rows: Rows::All }])?;
                self.compare(&mut case, 0, 0, &all, &|| format!("{length} tokens, all rows"));
            }
        }
        self.results.push(case);
        Ok(())
    }

    fn in_chunks(&mut self) -> Result<()> {
        let mut case = self.case("prefilled in chunks");
        let (ids, _) = self.sequences[0].clone();
        let most = self.runner.limits.max_step_tokens;
        for sizes in [&[5usize, 3][..], &[2, 7, 1, 11], &[16], &[13, 1, 1]] {
            self.runner.zero(0)?;
            let mut past_tokens = 0;
            for size in sizes.iter().cycle() {
                let tokens = &ids[past_tokens..ids.len().min(past_tokens + size.min(&most))];
                let all = tokens.len() <= self.runner.most_rows();
                let rows = if all { Rows::All } else { Rows::Last };
                let found = self.runner.prefill(&[Part { slot: 0, past_tokens, tokens, rows }])?;
                let first = if all { past_tokens } else { past_tokens + tokens.len() - 1 };
                self.compare(&mut case, 0, first, &found, &|| format!("chunks of {sizes:?}"));
                past_tokens += tokens.len();
                if past_tokens == ids.len() {
                    break;
                }
            }
            // Decoding from a chunked prefill reads what all chunks wrote.
        }
        let cut = ids.len() / 2;
        self.runner.zero(0)?;
        self.runner.fill_with(0, 0, &ids[..cut])?;
        let rows = self.runner.decode_all(0, cut, &ids[cut..])?;
        self.compare(&mut case, 0, cut, &rows, &|| format!("decoded after {cut} prefilled tokens"));
        self.results.push(case);
        Ok(())
    }

    /// The sequence that a slot runs, and its tokens before the first decode step.
    fn load_of(&self, slot: usize) -> (usize, usize) {
        let sequence = slot % self.sequences.len();
        let length = self.sequences[sequence].0.len();
        (sequence, 1 + slot * 7 % length.saturating_sub(10).max(1))
    }

    /// All slots at once: prefill in shared steps, decode with and without idle slots in between, a step that does both.
    fn beside_others(&mut self) -> Result<()> {
        let mut case = self.case("beside sequences of other lengths");
        let slots = self.slots();
        let (most_tokens, most_rows) = (self.runner.limits.max_step_tokens, self.runner.most_rows());
        let mut held = vec![0usize; slots];
        let mut next = 0;
        while next < slots {
            let (mut group, mut tokens) = (Vec::new(), 0);
            while next < slots && group.len() < most_rows {
                let (sequence, length) = self.load_of(next);
                let length = length.min(most_tokens);
                if tokens + length > most_tokens {
                    break;
                }
                tokens += length;
                group.push((next, sequence, length));
                next += 1;
            }
            let ids: Vec<Vec<u32>> =
                group.iter().map(|(_, s, length)| self.sequences[*s].0[..*length].to_vec()).collect();
            let parts: Vec<Part<'_>> = group
                .iter()
                .zip(&ids)
                .map(|((slot, ..), tokens)| Part { slot: *slot, past_tokens: 0, tokens, rows: Rows::Last })
                .collect();
            let rows = self.runner.prefill(&parts)?;
            for ((slot, sequence, length), row) in group.into_iter().zip(rows) {
                self.compare(&mut case, sequence, length - 1, &[row], &|| format!("prefilled together, slot {slot}"));
                held[slot] = length;
            }
        }
        for round in 0..6 {
            // Round 0 and 5 name every slot; the others leave out a third of them, others each time.
            let named: Vec<usize> = (0..slots)
                .filter(|slot| round % 5 == 0 || (slot + round) % 3 != 0)
                .filter(|s| self.room(*s, held[*s]))
                .collect();
            self.decode_round(&mut case, &named, &mut held, &|| format!("decoded together, round {round}"))?;
        }
        // One step with chunks of one token and of more.
        let (mut parts, mut total) = (Vec::new(), 0);
        for slot in 0..slots.min(most_rows) {
            let (sequence, _) = self.load_of(slot);
            let count = 1 + slot % 3;
            let ids = &self.sequences[sequence].0;
            if held[slot] + count <= ids.len() && total + count <= most_tokens {
                total += count;
                parts.push((slot, sequence, ids[held[slot]..held[slot] + count].to_vec()));
            }
        }
        if !parts.is_empty() {
            let step: Vec<Part<'_>> = parts
                .iter()
                .map(|(slot, _, tokens)| Part { slot: *slot, past_tokens: held[*slot], tokens, rows: Rows::Last })
                .collect();
            let rows = self.runner.prefill(&step)?;
            for ((slot, sequence, tokens), row) in parts.iter().zip(rows) {
                held[*slot] += tokens.len();
                self.compare(&mut case, *sequence, held[*slot] - 1, &[row], &|| format!("mixed step, slot {slot}"));
            }
        }
        self.results.push(case);
        Ok(())
    }

    /// Returns true if the slot's sequence has a token after its first `held`.
    fn room(&self, slot: usize, held: usize) -> bool {
        held < self.sequences[self.load_of(slot).0].0.len()
    }

    /// Decodes the next token of each of the named slots in one step.
    fn decode_round(
        &mut self,
        case: &mut CaseResult,
        named: &[usize],
        held: &mut [usize],
        way: &dyn Fn() -> String,
    ) -> Result<()> {
        let next: Vec<NextToken> = named
            .iter()
            .map(|slot| NextToken {
                slot: *slot,
                past_tokens: held[*slot],
                token: self.sequences[self.load_of(*slot).0].0[held[*slot]],
            })
            .collect();
        let rows = self.runner.decode(&next)?;
        for (slot, row) in named.iter().zip(rows) {
            let position = held[*slot];
            self.compare(case, self.load_of(*slot).0, position, &[row], &|| format!("{}, slot {slot}", way()));
            held[*slot] += 1;
        }
        Ok(())
    }

    /// One sequence at a time in ever higher slots, and all up to it: every batch size that kernels may depend on.
    fn each_batch_size(&mut self) -> Result<()> {
        let mut case = self.case("every batch size");
        let slots = self.slots();
        let wanted = |slot: &usize| {
            let size = slot + 1;
            size <= 4 || size == slots || size.is_multiple_of(8) || size % 8 == 1
        };
        let mut held: Vec<usize> = Vec::with_capacity(slots);
        for slot in 0..slots {
            // Two tokens of its sequence: what came before is overwritten or past the end.
            let (sequence, _) = self.load_of(slot);
            let start = 2.min(self.sequences[sequence].0.len());
            let ids = self.sequences[sequence].0[..start].to_vec();
            self.runner.fill_with(slot, 0, &ids)?;
            held.push(start);
        }
        for slot in (0..slots).filter(wanted) {
            if self.room(slot, held[slot]) {
                self.decode_round(&mut case, &[slot], &mut held, &|| format!("alone in a batch of {}", slot + 1))?;
            }
            let all: Vec<usize> = (0..=slot).filter(|s| self.room(*s, held[*s])).collect();
            self.decode_round(&mut case, &all, &mut held, &|| format!("a batch of {}", slot + 1))?;
        }
        self.results.push(case);
        Ok(())
    }

    /// The sequence's first half prefilled, the rest decoded, in a slot that is not cleared.
    fn in_slot(&mut self, case: &mut CaseResult, slot: usize, way: &str) -> Result<()> {
        let (ids, _) = self.sequences[0].clone();
        let cut = (ids.len() / 2).clamp(1, self.runner.limits.max_step_tokens);
        let last = self.runner.prefill(&[Part { slot, past_tokens: 0, tokens: &ids[..cut], rows: Rows::Last }])?;
        self.compare(case, 0, cut - 1, &last, &|| format!("prefilled in slot {slot} {way}"));
        let rows = self.runner.decode_all(slot, cut, &ids[cut..])?;
        self.compare(case, 0, cut, &rows, &|| format!("decoded in slot {slot} {way}"));
        Ok(())
    }

    fn used_slot(&mut self) -> Result<()> {
        let mut case = self.case("in a slot that held a longer sequence");
        let longer = sample_tokens(&self.runner.limits, 100, self.most_tokens.min(4 * SHORT));
        for slot in [0, self.last_slot()] {
            // Nothing but the longer sequence is in the slot, in particular not the one that follows it.
            self.runner.zero(slot)?;
            self.runner.fill_with(slot, 0, &longer)?;
            self.in_slot(&mut case, slot, "after a longer sequence")?;
        }
        self.results.push(case);
        Ok(())
    }

    fn past_the_end(&mut self, name: &'static str, byte: u8) -> Result<()> {
        let mut case = self.case(name);
        for slot in [0, self.last_slot()] {
            if !self.runner.fill(slot, byte)? {
                case.skipped = Some("this executor gives no access to its KV memory".into());
                break;
            }
            self.in_slot(&mut case, slot, "that was filled before")?;
        }
        self.results.push(case);
        for slot in [0, self.last_slot()] {
            self.runner.zero(slot)?;
        }
        Ok(())
    }

    /// NaN in one sequence must show in its row, in no other, and be gone once the slot is mended.
    fn nan_is_seen(&mut self) -> Result<()> {
        let mut case = self.case("NaN is seen and mended");
        let (ids, _) = self.sequences[0].clone();
        let (cut, slot) = ((ids.len() / 2).max(1), self.last_slot());
        if cut >= ids.len() {
            return Ok(());
        }
        self.runner.fill_with(slot, 0, &ids[..cut])?;
        if !self.runner.fill(slot, NAN)? {
            case.skipped = Some("this executor gives no access to its KV memory".into());
            self.results.push(case);
            return Ok(());
        }
        let mut next = vec![NextToken { slot, past_tokens: cut, token: ids[cut] }];
        if slot > 0 {
            self.runner.fill_with(0, 0, &ids[..cut])?;
            next.insert(0, NextToken { slot: 0, ..next[0] });
        }
        let mut rows = self.runner.decode(&next)?;
        if let Some(of_nan) = rows.pop()
            && let (false, Some(first)) = (of_nan.iter().any(|value| value.is_nan()), of_nan.first())
        {
            case.record(f32::INFINITY, Some(0), *first, f32::NAN, &|| {
                format!("slot {slot}, all of whose keys and values are NaN, position {cut}")
            });
        }
        case.rows += 1;
        self.compare(&mut case, 0, cut, &rows, &|| "slot 0, beside a sequence of NaN".into());
        self.runner.mend(slot)?;
        self.in_slot(&mut case, slot, "that was mended after NaN")?;
        self.runner.zero(slot)?;
        self.results.push(case);
        Ok(())
    }

    /// Other tokens in any part of a sequence must change the logits at its end: a kernel that leaves out some keys every
    /// time agrees with itself.
    fn every_part_counts(&mut self) -> Result<()> {
        let mut case = CaseResult::new("every part of a sequence counts", 0.0);
        let (slot, most) = (self.last_slot(), self.runner.limits.max_step_tokens);
        let mut first = 0;
        let mut end = FIRST_PART;
        while first + 1 < self.most_tokens {
            let length = self.most_tokens.min(end + 2);
            let ids = sample_tokens(&self.runner.limits, 400, length);
            let others = sample_tokens(&self.runner.limits, 401, length);
            // All tokens from `first` to `end`, but never the last two.
            let part = first..end.min(length.saturating_sub(2)).max(first + 1).min(length - 1);
            let mut changed = ids.clone();
            changed[part.clone()].copy_from_slice(&others[part.clone()]);
            let mut rows = Vec::new();
            for ids in [&ids, &changed] {
                self.runner.zero(slot)?;
                let cut = length.saturating_sub(most.max(2)).max(usize::from(length > 2)).min(length - 2);
                self.runner.fill_with(slot, 0, &ids[..cut])?;
                let tokens = &ids[cut..length - 1];
                let mut found = self.runner.prefill(&[Part { slot, past_tokens: cut, tokens, rows: Rows::Last }])?;
                found.extend(self.runner.decode_all(slot, length - 1, &ids[length - 1..])?);
                rows.push(found);
            }
            if let [found, other] = &rows[..] {
                for ((row, other), way) in found.iter().zip(other).zip(["prefilled", "decoded"]) {
                    case.rows += 1;
                    let same = row.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits());
                    if let (true, Some(value)) = (same, row.first()) {
                        case.record(f32::INFINITY, Some(0), *value, f32::NAN, &|| {
                            format!("{way} at position {}, which tokens {part:?} do not change", length - 1)
                        });
                    }
                }
            }
            (first, end) = (end, 2 * end);
        }
        self.results.push(case);
        Ok(())
    }

    /// Two passes over a sequence that fills its slot, with different chunks, over zeros and over junk. Rows are compared
    /// around every power of two, where a plan may change to a larger capacity, and at the last position.
    fn whole_slot(&mut self) -> Result<()> {
        let mut case = self.case("up to the last position");
        let length = self.most_tokens;
        if length < self.runner.limits.max_sequence_tokens {
            let most = self.runner.limits.max_sequence_tokens;
            case.skipped = Some(format!("only {length} of {most} tokens; --thorough takes all"));
        }
        let ids = sample_tokens(&self.runner.limits, 200, length);
        // Positions whose rows are compared: around each capacity, and the last.
        let near = |position: usize| {
            let size = position + 1;
            size == length || (size >= 32 && [size - 1, size, size + 1].iter().any(|n| n.is_power_of_two()))
        };
        let (slot, most) = (self.last_slot(), self.runner.limits.max_step_tokens);
        let mut passes: [Vec<(usize, Vec<f32>)>; 2] = Default::default();
        for (pass, rows) in passes.iter_mut().enumerate() {
            self.runner.fill(slot, [0, JUNK][pass])?;
            let mut past_tokens = 0;
            while past_tokens < length {
                // The first pass decodes the positions to compare, the second prefills them at the end of a chunk, but
                // the last position of all, which both decode.
                let decodes = near(past_tokens) && (pass == 0 || past_tokens + 1 == length);
                let largest = if decodes { 1 } else { [most, most / 2 + 1][pass] };
                let end = length.min(past_tokens + largest);
                let stop = (past_tokens..end).find(|p| near(*p));
                let end = match stop {
                    Some(stop) if pass == 0 && stop > past_tokens => stop,
                    Some(stop) if pass == 1 && stop + 1 == length && stop > past_tokens => stop,
                    Some(stop) => stop + 1,
                    None => end,
                };
                let tokens = &ids[past_tokens..end];
                let found = if decodes {
                    self.runner.decode_all(slot, past_tokens, tokens)?
                } else {
                    let rows = if near(end - 1) { Rows::Last } else { Rows::None };
                    self.runner.prefill(&[Part { slot, past_tokens, tokens, rows }])?
                };
                rows.extend(found.into_iter().map(|row| (end - 1, row)));
                past_tokens = end;
            }
        }
        self.runner.zero(slot)?;
        let [first, second] = passes;
        for ((position, row), (other, expected)) in first.iter().zip(&second) {
            debug_assert_eq!(position, other);
            case.compare(row, expected, &|| format!("decoded over zeros and prefilled over junk, position {position}"));
        }
        if first.len() != second.len() {
            let (found, expected) = (first.len() as f32, second.len() as f32);
            case.record(f32::INFINITY, None, found, expected, &|| "rows compared".into());
        }
        self.results.push(case);
        Ok(())
    }
}
