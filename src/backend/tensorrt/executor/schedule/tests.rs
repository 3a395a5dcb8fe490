use proptest::prelude::*;

use super::*;
use crate::backend::{Chunk, NextToken, Rows};

const CAPACITY: usize = 12;
const VOCAB: usize = 50;

/// Executes schedules on a cache of token ids, and tracks what the runtime believes to be in it.
struct World {
    constraints: BatchingConstraints,
    /// `[slots][S]`
    cache: Vec<Vec<i32>>,
    believed: Vec<Vec<i32>>,
    held: Vec<usize>,
}

impl World {
    fn new(constraints: BatchingConstraints) -> World {
        let slots = constraints.limits.slots;
        World {
            constraints,
            cache: vec![vec![-1; CAPACITY]; slots],
            believed: vec![Vec::new(); slots],
            held: vec![0; slots],
        }
    }

    /// Runs a step; returns, for each requested row, the tokens it attends to.
    fn run(&mut self, step: &Step) -> Vec<Vec<i32>> {
        for span in step.spans() {
            self.held[span.slot] = span.past_tokens + span.len;
        }
        let schedule = schedule(step, &self.held, &self.constraints).unwrap();
        let sizes = &self.constraints.sizes;
        let all_rows = self.constraints.decode_rows() + self.constraints.prefill_rows();
        let mut outputs: Vec<Option<Vec<i32>>> = vec![None; all_rows];
        for run in &schedule.runs {
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
                assert!(buckets(self.constraints.limits.slots).contains(&run.sequences));
            }
            for b in 0..run.sequences {
                let past = run.past_tokens[b] as usize;
                assert!(past + run.tokens <= CAPACITY, "writes past the cache are undefined");
                assert!(run.kind != RunKind::ContextPrefill || past == 0);
                for t in 0..run.tokens {
                    assert_eq!(run.positions[b * run.tokens + t] as usize, past + t);
                    self.cache[run.first_slot + b][past + t] = run.token_ids[b * run.tokens + t];
                }
            }
            for (r, row) in run.logits_rows.iter().enumerate() {
                let (b, t) = (*row as usize / run.tokens, *row as usize % run.tokens);
                // The last query attends to all `total` keys, the one before it to one fewer.
                let keys = run.total_tokens[b] as usize - (run.tokens - 1 - t);
                let context = self.cache[run.first_slot + b][..keys].to_vec();
                let output = &mut outputs[run.output_row + r];
                let spare = run.output_row + r >= all_rows - self.constraints.row_align;
                assert!(output.is_none() || spare, "two rows share an output row");
                *output = Some(context);
            }
        }
        schedule.rows.iter().map(|row| outputs[*row].clone().expect("a row that was computed")).collect()
    }

    /// Asserts that the cache holds what the runtime believes, except for the last entry of a full slot, which nothing
    /// reads.
    fn check(&self) {
        for (believed, cache) in self.believed.iter().zip(&self.cache) {
            let safe = believed.len().min(CAPACITY - 1);
            assert_eq!(believed[..safe], cache[..safe]);
        }
    }
}

/// Change of a slot: length it is truncated to, tokens to append, and kind of rows requested.
type Change = (usize, Vec<u32>, u8);

fn constraints() -> impl Strategy<Value = BatchingConstraints> {
    (1..=11usize, 1..=5usize, 1..=4usize, any::<bool>(), 1..=3usize).prop_map(
        |(slots, prefill_tokens, prefill_logits_rows, has_context_plan, row_align)| BatchingConstraints {
            limits: Limits {
                slots,
                max_sequence_tokens: CAPACITY,
                max_step_tokens: 40,
                max_logits_rows: 30,
                vocab_size: VOCAB,
            },
            sizes: Sizes {
                max_sequence_tokens: CAPACITY,
                decode_sequences: slots,
                prefill_sequences: 1,
                prefill_tokens,
                prefill_logits_rows,
                top_tokens: 4,
            },
            has_context_plan,
            row_align,
        },
    )
}

fn changes() -> impl Strategy<Value = Vec<(usize, Change)>> {
    let change = (0..=CAPACITY, prop::collection::vec(0..VOCAB as u32, 1..=7), 0..3u8);
    prop::collection::vec((0..11usize, change), 1..=6)
}

proptest! {
    /// For any series of steps, every token is written to its position, every row attends to exactly its sequence, and
    /// no slot loses entries that the runtime may still read.
    #[test]
    fn steps_do_what_they_say(constraints in constraints(), steps in prop::collection::vec(changes(), 1..=8)) {
        let mut world = World::new(constraints);
        for changes in steps {
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
            prop_assert_eq!(world.run(&step), expected);
            world.check();
        }
    }
}

#[test]
fn buckets_end_at_the_slots() {
    assert_eq!(buckets(1), [1]);
    assert_eq!(buckets(3), [1, 2, 3]);
    assert_eq!(buckets(8), [1, 2, 4, 8]);
    assert_eq!(buckets(28), [1, 2, 4, 8, 16, 24, 28]);
}

#[test]
fn a_step_of_other_limits_is_refused() {
    let limits =
        |slots| Limits { slots, max_sequence_tokens: 8, max_step_tokens: 8, max_logits_rows: 8, vocab_size: 10 };
    let sizes = Sizes {
        max_sequence_tokens: 8,
        decode_sequences: 2,
        prefill_sequences: 1,
        prefill_tokens: 8,
        prefill_logits_rows: 8,
        top_tokens: 4,
    };
    let constraints = BatchingConstraints { limits: limits(2), sizes, has_context_plan: false, row_align: 1 };
    let step = Step::decode(&limits(4), &[NextToken { slot: 3, past_tokens: 0, token: 1 }]).unwrap();
    let error = schedule(&step, &[0, 0], &constraints).unwrap_err().to_string();
    assert!(error.contains("another engine's limits"), "{error}");
}
