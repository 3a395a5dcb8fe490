//! Decoding sequences of several capacity classes in one run.
//!
//! Each run reads all weights, so a step that decodes a few short sequences and a few long ones reads them twice. Where the
//! short ones' rows of the longer class cost less to read than the weights, they move there: 14 GiB of weights are as much as
//! the rows of 112 sequences that read 512 tokens instead of 256. They move back to the smallest class that holds all of
//! them when the longer class has no sequence of its own any more, and reading its rows costs more than copying.

/// Bytes that a decode run reads. With zeros, sequences are never merged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in super::super) struct DecodeBytes {
    /// All weights, once for each run.
    pub weights: u64,
    /// Keys and values of a token of one sequence, all layers; a run reads the whole capacity of each row.
    pub token: u64,
}

/// A sequence that a step decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decoding {
    /// Its class at present, between the two that follow.
    pub class: usize,
    /// The smallest class that holds it.
    pub smallest: usize,
    /// The class that it is counted with: moving it up to there takes nothing from others.
    pub most: usize,
    /// Tokens to copy if it moves.
    pub held: usize,
    /// Tokens that it may still decode.
    pub remaining: usize,
}

/// The class in which each sequence is to be decoded. All sequences of a class move together, since a class is spared only if
/// none is left in it. On average a sequence is expected to go on for half of what it may.
pub(super) fn merge(
    decoding: &[Decoding],
    mut free_rows: Vec<usize>,
    capacities: &[usize],
    bytes: DecodeBytes,
) -> Vec<usize> {
    let mut found: Vec<usize> = decoding.iter().map(|sequence| sequence.class).collect();
    for class in 0..capacities.len() {
        let members: Vec<usize> = (0..found.len()).filter(|index| found[*index] == class).collect();
        let of_members = |value: fn(&Decoding) -> usize| members.iter().map(move |index| value(&decoding[*index]));
        let (Some(least), Some(most)) = (of_members(|s| s.smallest).max(), of_members(|s| s.most).min()) else {
            continue;
        };
        let count = members.len() as u64;
        let steps = of_members(|s| s.remaining).sum::<usize>() as u64 / (2 * count);
        // Read and written.
        let copied = 2 * bytes.token.saturating_mul(of_members(|s| s.held).sum::<usize>() as u64);
        let rows = |a: usize, b: usize| {
            let more = capacities[a].abs_diff(capacities[b]) as u64;
            bytes.token.saturating_mul(count).saturating_mul(more)
        };
        let has_room = |class: &usize| free_rows[*class] >= members.len();
        let saves = |target: &usize| bytes.weights.saturating_sub(rows(class, *target)).saturating_mul(steps) > copied;
        let is_in_use = |class: &usize| found.contains(class);
        let up = (class + 1..=most).find(|target| is_in_use(target) && has_room(target) && saves(target));
        let down = Some(least).filter(|target| *target < class && has_room(target));
        let down = down.filter(|target| rows(class, *target).saturating_mul(steps) > copied);
        if let Some(target) = up.or(down) {
            free_rows[target] -= members.len();
            members.iter().for_each(|index| found[*index] = target);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITIES: [usize; 5] = [256, 512, 1024, 2048, 4096];
    /// The 8B in BF16.
    const BYTES: DecodeBytes = DecodeBytes { weights: 14 << 30, token: 512 << 10 };

    fn of(class: usize, smallest: usize, most: usize) -> Decoding {
        Decoding { class, smallest, most, held: 200, remaining: 400 }
    }

    fn merged(groups: &[(usize, Decoding)], free_rows: [usize; 5]) -> Vec<usize> {
        let all: Vec<Decoding> = groups.iter().flat_map(|(count, decoding)| vec![*decoding; *count]).collect();
        let found = merge(&all, free_rows.to_vec(), &CAPACITIES, BYTES);
        assert!(all.iter().zip(&found).all(|(s, class)| (s.smallest..=s.most).contains(class)));
        let mut start = 0;
        let group = |(count, _): &(usize, Decoding)| {
            let classes = &found[start..start + count];
            start += count;
            assert!(classes.iter().all(|class| *class == classes[0]));
            classes[0]
        };
        groups.iter().map(group).collect()
    }

    #[test]
    fn few_move_up_to_a_class_in_use() {
        let long = (3, of(2, 2, 2));
        assert_eq!(merged(&[(4, of(0, 0, 2)), long], [0, 0, 9, 0, 0]), [2, 2]);
        // No room, no reservation of that size, nobody there, or too many: 4 x 768 tokens of each are 1.5 GiB.
        assert_eq!(merged(&[(4, of(0, 0, 2)), long], [0, 0, 3, 0, 0]), [0, 2]);
        assert_eq!(merged(&[(4, of(0, 0, 1)), long], [9, 9, 9, 9, 9]), [0, 2]);
        assert_eq!(merged(&[(4, of(0, 0, 2))], [9; 5]), [0]);
        assert_eq!(merged(&[(38, of(0, 0, 2)), long], [0, 0, 99, 0, 0]), [0, 2]);
        assert_eq!(merged(&[(30, of(0, 0, 2)), long], [0, 0, 99, 0, 0]), [2, 2]);
        // One that cannot move keeps the run, so the others stay with it.
        assert_eq!(merged(&[(1, of(0, 0, 2)), (1, of(0, 0, 0)), long], [9; 5]), [0, 0, 2]);
        // About to end: not worth the copy.
        let ending = Decoding { remaining: 1, ..of(0, 0, 2) };
        assert_eq!(merged(&[(4, ending), long], [9; 5]), [0, 2]);
        // The nearest class that is in use.
        assert_eq!(merged(&[(2, of(0, 0, 4)), (1, of(1, 1, 1)), (1, of(4, 4, 4))], [9; 5]), [1, 1, 4]);
        assert_eq!(merged(&[(2, of(0, 0, 4)), (1, of(1, 1, 4)), (1, of(4, 4, 4))], [9; 5]), [4, 4, 4]);
    }

    #[test]
    fn those_left_alone_move_down_again() {
        // 4 sequences that read 1024 tokens instead of 256.
        assert_eq!(merged(&[(4, of(2, 0, 2))], [9; 5]), [0]);
        assert_eq!(merged(&[(3, of(2, 0, 2)), (1, of(2, 1, 2))], [9; 5]), [1, 1]);
        // With one of the class's own, in no room, or near their end, they stay.
        assert_eq!(merged(&[(3, of(2, 0, 2)), (1, of(2, 2, 2))], [9; 5]), [2, 2]);
        assert_eq!(merged(&[(4, of(2, 0, 2))], [3, 9, 9, 9, 9]), [2]);
        assert_eq!(merged(&[(4, Decoding { remaining: 1, ..of(2, 0, 2) })], [9; 5]), [2]);
    }

    #[test]
    fn what_was_decided_stays_decided() {
        let mut all = [vec![of(0, 0, 4); 5], vec![of(1, 1, 4); 3], vec![of(3, 3, 4); 2], vec![of(4, 4, 4); 1]].concat();
        for _ in 0..2 {
            let found = merge(&all, vec![20; 5], &CAPACITIES, BYTES);
            all.iter_mut().zip(&found).for_each(|(sequence, class)| sequence.class = *class);
        }
        let again = merge(&all, vec![20; 5], &CAPACITIES, BYTES);
        assert_eq!(again, all.iter().map(|sequence| sequence.class).collect::<Vec<_>>());
        let never = merge(&all, vec![20; 5], &CAPACITIES, DecodeBytes::default());
        assert_eq!(never, again, "without weights nothing moves");
    }
}
