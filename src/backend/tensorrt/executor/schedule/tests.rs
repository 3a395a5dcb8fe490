use proptest::prelude::*;

use super::super::placement::{DecodeBytes, Region, RowCopy, Spot};
use super::*;
use crate::backend::{Chunk, NextToken, Rows};

const CAPACITY: usize = 12;
const VOCAB: usize = 50;

/// What padding leaves in the cache here, unlike any token.
const PADDING: i32 = -7;

/// The tokens of each run that are not padding; every token of the step is in one run.
fn own_tokens(step: &Step, placement: &Placement, schedule: &Schedule) -> Vec<usize> {
    let mut own = vec![1; schedule.runs.len()];
    for span in step.spans().iter().filter(|span| span.len > 1) {
        let of_span = |run: &PlanRun| run.kind != RunKind::Decode && Some(run.first) == placement.place(span.slot);
        let runs: Vec<usize> = (0..own.len()).filter(|index| of_span(&schedule.runs[*index])).collect();
        let mut done = span.past_tokens;
        for (number, index) in runs.iter().enumerate() {
            let run = &schedule.runs[*index];
            assert_eq!(run.past_tokens[0] as usize, done, "runs follow each other");
            let next = runs.get(number + 1).map(|next| schedule.runs[*next].past_tokens[0] as usize);
            let next = next.unwrap_or(span.past_tokens + span.len);
            own[*index] = next - done;
            assert!((1..=run.tokens).contains(&own[*index]));
            let ids = &step.tokens()[span.first + done - span.past_tokens..][..own[*index]];
            assert!(run.token_ids.iter().zip(ids).all(|(of_run, of_step)| *of_run == *of_step as i32));
            done = next;
        }
        assert_eq!(done, span.past_tokens + span.len, "all tokens are computed");
    }
    own
}

/// Executes copies and schedules on a cache of token ids, and tracks what the runtime believes to be in it.
struct World {
    constraints: BatchingConstraints,
    placement: Placement,
    /// The region, one id for each token.
    cache: Vec<i32>,
    spare: [Vec<i32>; 2],
    believed: Vec<Vec<i32>>,
    /// Sequences may be in a larger class than they need.
    merges: bool,
}

impl World {
    fn new(constraints: BatchingConstraints, region: Region) -> World {
        World {
            believed: vec![Vec::new(); constraints.limits.slots],
            merges: region.decode_bytes != DecodeBytes::default(),
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
        let own_tokens = own_tokens(step, &self.placement, &schedule);
        for (run, own) in schedule.runs.iter().zip(own_tokens) {
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
            if run.kind != RunKind::Decode {
                let most = sizes.prefill_tokens;
                let filled = filled_bucket(run.tokens, most) == run.tokens;
                assert!(filled && (own == run.tokens || prefill_bucket(own, most) == run.tokens), "{own} of {run:?}");
                assert!(run.logits_rows.iter().all(|row| (*row as usize) < own), "padding has no row");
            }
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
                    let token = run.token_ids[b * run.tokens + t];
                    assert!(t < own || token == 0);
                    self.cache[start(b) + past + t] = if t < own { token } else { PADDING };
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
            let smallest = smallest.unwrap_or(capacities.len() - 1);
            assert!(place.class == smallest || self.merges && place.class > smallest);
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
    (classes, 1..=11usize, 1..=11usize, 1..=4usize, any::<bool>(), 1..=3usize, 0..=100usize).prop_map(
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
                decode_bytes: DecodeBytes::default(),
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
        weights in prop::option::of(1..200u64),
        steps in prop::collection::vec((changes(), 0..11usize), 1..=8),
    ) {
        // With weights, sequences that reserve room are decoded in larger classes where that reads less.
        let decode_bytes = weights.map_or(DecodeBytes::default(), |weights| DecodeBytes { weights, token: 1 });
        let mut world = World::new(constraints, Region { decode_bytes, ..region });
        let mut reserved = vec![0; world.constraints.limits.slots];
        for (changes, released) in steps {
            let released = released % world.constraints.limits.slots;
            world.placement.release(released);
            reserved[released] = 0;
            for slot in (0..reserved.len()).filter(|_| world.merges) {
                let wanted = [CAPACITY, 5, 8][(slot + released) % 3];
                if world.placement.reserve(slot, wanted) {
                    reserved[slot] = wanted;
                }
                world.believed[slot].truncate(world.placement.held(slot));
            }
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
                    reserved[slot] = 0;
                }
                let alone: usize = named.iter().map(|(_, past, tokens, _)| {
                    let fits = |capacity: &&usize| past + tokens.len() < **capacity;
                    world.capacities().iter().find(fits).copied().unwrap_or(CAPACITY)
                }).sum();
                let repeated = world.placement.clone().prepare(step.spans());
                if world.merges {
                    let lacks_room = |(slot, past, tokens, _): &(usize, usize, Vec<u32>, Rows)| {
                        reserved[*slot] < past + tokens.len()
                    };
                    prop_assert!(named.iter().any(lacks_room), "what is reserved is there");
                    continue;
                }
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
fn buckets_of_tokens_are_few_and_pad_little() {
    let all = |most: usize| {
        let mut sizes: Vec<usize> = (1..=most).map(|tokens| prefill_bucket(tokens, most)).collect();
        sizes.dedup();
        sizes
    };
    assert_eq!(all(5), [5]);
    assert_eq!(all(128), [8, 16, 32, 64, 80, 96, 112, 128]);
    assert_eq!(all(500).last_chunk(), Some(&[448, 500]));
    assert_eq!(all(1024).len(), 20);
    for tokens in 1..=1024 {
        let size = prefill_bucket(tokens, 1024);
        assert!(size >= tokens && prefill_bucket(size, 1024) == size && filled_bucket(size, 1024) == size);
        assert!(tokens <= 64 || 4 * (size - tokens) <= tokens, "{tokens} in {size}");
        let filled = filled_bucket(tokens, 1024);
        assert!(filled <= tokens && (filled < 8 || prefill_bucket(filled, 1024) == filled));
    }
    assert_eq!([1, 2, 3, 7, 8, 15, 100].map(|tokens| filled_bucket(tokens, 1024)), [1, 2, 2, 4, 8, 8, 96]);
}

/// At the end of a row there is no room for padding.
#[test]
fn tokens_at_the_end_of_a_row_are_split() {
    let sizes = Sizes {
        max_sequence_tokens: 256,
        position_tokens: 256,
        decode_sequences: 1,
        prefill_sequences: 1,
        prefill_tokens: 128,
        prefill_logits_rows: 2,
        top_tokens: 4,
    };
    let limits =
        Limits { slots: 1, max_sequence_tokens: 256, max_step_tokens: 256, max_logits_rows: 8, vocab_size: VOCAB };
    let classes = vec![ClassConstraints { sizes, has_context_plan: true }];
    let constraints = BatchingConstraints { limits: limits.clone(), classes, rows: 1, row_align: 1 };
    let region = Region {
        capacities: vec![256],
        most_rows: vec![1],
        tokens: 256,
        most_rows_in_all: 1,
        slots: 1,
        decode_bytes: DecodeBytes::default(),
    };
    let runs = |past_tokens: usize, tokens: usize, rows| {
        let mut placement = Placement::new(region.clone());
        let ids = vec![1; past_tokens + tokens];
        if past_tokens > 0 {
            let all = Chunk { slot: 0, past_tokens: 0, tokens: &ids[..past_tokens], rows: Rows::None };
            placement.prepare(Step::prefill(&limits, &[all]).unwrap().spans()).unwrap();
        }
        let step =
            Step::prefill(&limits, &[Chunk { slot: 0, past_tokens, tokens: &ids[past_tokens..], rows }]).unwrap();
        placement.prepare(step.spans()).unwrap();
        let schedule = schedule(&step, &placement, &constraints).unwrap();
        let shape = |run: &PlanRun| (run.past_tokens[0], run.tokens, run.logits_rows.clone());
        schedule.runs.iter().map(shape).collect::<Vec<_>>()
    };
    assert_eq!(runs(0, 100, Rows::Last), [(0, 112, vec![99])]);
    assert_eq!(runs(0, 256, Rows::Last), [(0, 128, vec![0]), (128, 128, vec![127])]);
    assert_eq!(runs(100, 100, Rows::Last), [(100, 112, vec![99])]);
    assert_eq!(runs(152, 100, Rows::Last), [(152, 96, vec![0]), (248, 8, vec![3])]);
    assert_eq!(runs(249, 7, Rows::Last), [(249, 4, vec![0]), (253, 2, vec![0]), (255, 1, vec![0])]);
    // Two rows to a run, which is padded all the same.
    assert_eq!(runs(0, 5, Rows::All), [(0, 8, vec![0, 1]), (2, 8, vec![0, 1]), (4, 8, vec![0])]);
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
