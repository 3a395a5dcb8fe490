use proptest::prelude::*;

use super::super::placement::{Region, RowCopy, Spot};
use super::*;
use crate::backend::{Chunk, NextToken, Rows};

const CAPACITY: usize = 12;
const VOCAB: usize = 50;

/// Executes copies and schedules on a cache of token ids, and tracks what the runtime believes to be in it.
struct World {
    constraints: BatchingConstraints,
    placement: Placement,
    /// The region, one id for each token.
    cache: Vec<i32>,
    spare: [Vec<i32>; 2],
    believed: Vec<Vec<i32>>,
}

impl World {
    fn new(constraints: BatchingConstraints, region: Region) -> World {
        World {
            believed: vec![Vec::new(); constraints.limits.slots],
            cache: vec![-1; region.tokens],
            spare: [vec![-1; CAPACITY], vec![-1; CAPACITY]],
            placement: Placement::new(region),
            constraints,
        }
    }

    fn copy(&mut self, copies: &[RowCopy]) {
        for RowCopy { from, to, tokens } in copies {
            let range = |spot: &Spot| match spot {
                Spot::Region { offset, capacity } => {
                    assert!(tokens <= capacity);
                    Some(*offset..*offset + capacity)
                }
                Spot::Spare(_) => None,
            };
            if let (Some(from), Some(to)) = (range(from), range(to)) {
                assert!(from.end <= to.start || to.end <= from.start, "{from:?} and {to:?} overlap");
            }
            let data = match from {
                Spot::Region { offset, .. } => self.cache[*offset..offset + tokens].to_vec(),
                Spot::Spare(index) => self.spare[*index][..*tokens].to_vec(),
            };
            match to {
                Spot::Region { offset, .. } => self.cache[*offset..offset + tokens].copy_from_slice(&data),
                Spot::Spare(index) => self.spare[*index][..*tokens].copy_from_slice(&data),
            }
        }
    }

    /// Runs a step; returns, for each requested row, the tokens it attends to.
    fn run(&mut self, step: &Step) -> Result<Vec<Vec<i32>>, String> {
        let before = self.placement.clone();
        let copies = self.placement.prepare(step.spans()).inspect_err(|_| assert_eq!(self.placement, before))?;
        self.copy(&copies);
        let schedule = schedule(step, &self.placement, &self.constraints).unwrap();
        let all_rows = self.constraints.decode_rows() + self.constraints.prefill_rows();
        let mut outputs: Vec<Option<Vec<i32>>> = vec![None; all_rows];
        for run in &schedule.runs {
            let ClassConstraints { sizes, has_context_plan } = &self.constraints.classes[run.first.class];
            let (most_sequences, most_tokens, most_rows) = match run.kind {
                RunKind::Decode => (sizes.decode_sequences, 1, sizes.decode_sequences),
                _ => (sizes.prefill_sequences, sizes.prefill_tokens, sizes.prefill_logits_rows),
            };
            assert!((1..=most_sequences).contains(&run.sequences));
            assert!((1..=most_tokens).contains(&run.tokens));
            assert!((1..=most_rows).contains(&run.logits_rows.len()));
            assert!(run.output_row.is_multiple_of(self.constraints.row_align));
            assert_eq!(run.token_ids.len(), run.sequences * run.tokens);
            assert_eq!(run.positions.len(), run.sequences * run.tokens);
            assert_eq!(run.past_tokens.len(), run.sequences);
            assert_eq!(run.total_tokens.len(), run.sequences);
            if run.kind == RunKind::Decode {
                assert_eq!(bucket(run.sequences, sizes.decode_sequences), run.sequences);
                assert!(run.output_row + run.sequences <= self.constraints.decode_rows());
            }
            let capacity = sizes.max_sequence_tokens;
            let rows = self.placement.rows(run.first.class).len();
            assert!(run.first.row + run.sequences <= rows, "a run writes to rows of its own class alone");
            let start = |b: usize| self.placement.offset(ClassRow { row: run.first.row + b, ..run.first });
            for b in 0..run.sequences {
                let past = run.past_tokens[b] as usize;
                assert!(past + run.tokens <= capacity, "writes past the cache are undefined");
                assert!(run.kind != RunKind::ContextPrefill || past == 0 && *has_context_plan);
                for t in 0..run.tokens {
                    assert_eq!(run.positions[b * run.tokens + t] as usize, past + t);
                    self.cache[start(b) + past + t] = run.token_ids[b * run.tokens + t];
                }
            }
            for (r, row) in run.logits_rows.iter().enumerate() {
                let (b, t) = (*row as usize / run.tokens, *row as usize % run.tokens);
                // The last query attends to all `total` keys, the one before it to one fewer.
                let keys = run.total_tokens[b] as usize - (run.tokens - 1 - t);
                let context = self.cache[start(b)..start(b) + keys].to_vec();
                let output = &mut outputs[run.output_row + r];
                let spare = run.output_row + r >= all_rows - self.constraints.row_align;
                assert!(output.is_none() || spare, "two rows share an output row");
                *output = Some(context);
            }
        }
        Ok(schedule.rows.iter().map(|row| outputs[*row].clone().expect("a row that was computed")).collect())
    }

    fn capacities(&self) -> Vec<usize> {
        self.constraints.classes.iter().map(|class| class.sizes.max_sequence_tokens).collect()
    }

    /// Asserts that the cache holds what the runtime believes, except for the last entry of a full slot, which nothing
    /// reads; and that every sequence is in the smallest class that holds it.
    fn check(&mut self) {
        let capacities = self.capacities();
        for (slot, believed) in self.believed.iter_mut().enumerate() {
            believed.truncate(self.placement.held(slot));
            let Some(place) = self.placement.place(slot) else {
                assert!(believed.is_empty());
                continue;
            };
            let smallest = capacities.iter().position(|capacity| believed.len() < *capacity);
            assert_eq!(place.class, smallest.unwrap_or(capacities.len() - 1));
            let start = self.placement.offset(place);
            let safe = believed.len().min(CAPACITY - 1);
            assert_eq!(believed[..safe], self.cache[start..start + safe], "slot {slot}");
        }
    }
}

/// Change of a slot: length it is truncated to, tokens to append, and kind of rows requested.
type Change = (usize, Vec<u32>, u8);

fn constraints() -> impl Strategy<Value = (BatchingConstraints, Region)> {
    let classes = prop::sample::subsequence(vec![2usize, 3, 5, 6, 8], 0..=4);
    (classes, 1..=11usize, 1..=5usize, 1..=4usize, any::<bool>(), 1..=3usize, 0..=100usize).prop_map(
        |(mut capacities, slots, prefill_tokens, prefill_logits_rows, has_context_plan, row_align, share)| {
            capacities.push(CAPACITY);
            let tokens = CAPACITY + (slots - 1) * CAPACITY * share / 100;
            let classes: Vec<ClassConstraints> = capacities
                .iter()
                .map(|capacity| ClassConstraints {
                    sizes: Sizes {
                        max_sequence_tokens: *capacity,
                        position_tokens: CAPACITY,
                        decode_sequences: slots.min((tokens / capacity).max(1)),
                        prefill_sequences: 1,
                        prefill_tokens: prefill_tokens.min(*capacity),
                        prefill_logits_rows,
                        top_tokens: 4,
                    },
                    has_context_plan,
                })
                .collect();
            let rows = (tokens / capacities[0]).min(2 * slots).max(slots);
            let region = Region {
                most_rows: classes.iter().map(|class| class.sizes.decode_sequences).collect(),
                capacities,
                tokens,
                most_rows_in_all: rows,
                slots,
            };
            let limits = Limits {
                slots,
                max_sequence_tokens: CAPACITY,
                max_step_tokens: 40,
                max_logits_rows: 30,
                vocab_size: VOCAB,
            };
            (BatchingConstraints { limits, classes, rows, row_align }, region)
        },
    )
}

fn changes() -> impl Strategy<Value = Vec<(usize, Change)>> {
    let change = (0..=CAPACITY, prop::collection::vec(0..VOCAB as u32, 1..=7), 0..3u8);
    prop::collection::vec((0..11usize, change), 1..=6)
}

proptest! {
    /// For any series of steps and releases, in memory for all or for a few, every token is written to its position, every
    /// row attends to exactly its sequence, and no slot loses entries that the runtime may still read.
    #[test]
    fn steps_do_what_they_say(
        (constraints, region) in constraints(),
        steps in prop::collection::vec((changes(), 0..11usize), 1..=8),
    ) {
        let mut world = World::new(constraints, region);
        for (changes, released) in steps {
            world.placement.release(released % world.constraints.limits.slots);
            let limits = world.constraints.limits.clone();
            let mut named: Vec<(usize, usize, Vec<u32>, Rows)> = Vec::new();
            for (slot, (cut, tokens, rows)) in changes {
                let slot = slot % limits.slots;
                let past = cut.min(world.believed[slot].len()).min(CAPACITY - 1);
                let tokens = tokens[..tokens.len().min(CAPACITY - past)].to_vec();
                let rows = [Rows::None, Rows::Last, Rows::All][rows as usize];
                if named.iter().all(|(other, ..)| *other != slot) {
                    named.push((slot, past, tokens, rows));
                }
            }
            let decodes = named.iter().all(|(_, _, tokens, _)| tokens.len() == 1);
            let step = if decodes {
                let next = |(slot, past_tokens, tokens, _): &(usize, usize, Vec<u32>, Rows)| NextToken {
                    slot: *slot, past_tokens: *past_tokens, token: tokens[0],
                };
                Step::decode(&limits, &named.iter().map(next).collect::<Vec<_>>())
            } else {
                let chunk = |(slot, past_tokens, tokens, rows): &'_ (usize, usize, Vec<u32>, Rows)| {
                    (*slot, *past_tokens, tokens.clone(), *rows)
                };
                let owned: Vec<_> = named.iter().map(chunk).collect();
                let chunks: Vec<Chunk<'_>> = owned
                    .iter()
                    .map(|(slot, past_tokens, tokens, rows)| Chunk {
                        slot: *slot, past_tokens: *past_tokens, tokens, rows: *rows,
                    })
                    .collect();
                Step::prefill(&limits, &chunks)
            };
            let Ok(step) = step else { continue };
            let Ok(found) = world.run(&step) else {
                // There is no room: others must be released first, and then there is.
                for slot in (0..limits.slots).filter(|slot| named.iter().all(|(other, ..)| other != slot)) {
                    world.placement.release(slot);
                }
                let alone: usize = named.iter().map(|(_, past, tokens, _)| {
                    let fits = |capacity: &&usize| past + tokens.len() < **capacity;
                    world.capacities().iter().find(fits).copied().unwrap_or(CAPACITY)
                }).sum();
                let repeated = world.placement.clone().prepare(step.spans());
                prop_assert_eq!(repeated.is_ok(), alone <= world.cache.len(), "{:?}", repeated);
                continue;
            };
            let mut expected = Vec::new();
            for (slot, past, tokens, rows) in &named {
                let believed = &mut world.believed[*slot];
                believed.truncate(*past);
                for (index, token) in tokens.iter().enumerate() {
                    believed.push(*token as i32);
                    let wanted = decodes || *rows == Rows::All || (*rows == Rows::Last && index + 1 == tokens.len());
                    if wanted {
                        expected.push(believed.clone());
                    }
                }
            }
            prop_assert_eq!(found, expected);
            world.check();
        }
    }
}

#[test]
fn buckets_are_few_and_end_at_the_rows() {
    let all = |most: usize| {
        let mut sizes: Vec<usize> = (1..=most).map(|rows| bucket(rows, most)).collect();
        sizes.dedup();
        sizes
    };
    assert_eq!(all(1), [1]);
    assert_eq!(all(3), [1, 2, 3]);
    assert_eq!(all(8), [1, 2, 4, 8]);
    assert_eq!(all(28), [1, 2, 4, 8, 16, 24, 28]);
    assert_eq!(all(448).len(), 22);
    for rows in 1..=448 {
        let size = bucket(rows, 448);
        assert!((rows..=448).contains(&size) && bucket(size, 448) == size);
    }
}

#[test]
fn batches_cover_the_rows() {
    assert_eq!(batches(3, 4, 28), [(0, 4)]);
    assert_eq!(batches(3, 3, 28), [(0, 2), (2, 1)]);
    assert_eq!(batches(28, 28, 28), [(0, 28)]);
    assert_eq!(batches(27, 27, 28), [(0, 24), (24, 2), (26, 1)]);
    for rows in 1..=448 {
        for needed in 1..=rows {
            let found = batches(needed, rows, 448);
            assert!(found.len() <= MOST_BATCHES);
            let end = found.iter().fold(0, |end, (first, size)| {
                assert_eq!(*first, end);
                end + size
            });
            assert!((needed..=rows).contains(&end));
        }
    }
}

#[test]
fn a_step_of_other_limits_is_refused() {
    let limits =
        |slots| Limits { slots, max_sequence_tokens: 8, max_step_tokens: 8, max_logits_rows: 8, vocab_size: 10 };
    let step = Step::decode(&limits(4), &[NextToken { slot: 3, past_tokens: 0, token: 1 }]).unwrap();
    assert!(step.check_fits(&limits(4)).is_ok());
    let error = step.check_fits(&limits(2)).unwrap_err().to_string();
    assert!(error.contains("another engine's limits"), "{error}");
}
