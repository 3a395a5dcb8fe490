use super::*;

/// An H100's 56 GiB at 512 KiB a token.
fn h100() -> Placement {
    let capacities = vec![256, 512, 1024, 2048, 4096];
    let tokens = 28 * 4096;
    Placement::new(Region {
        most_rows: capacities.iter().map(|capacity| tokens / capacity).collect(),
        capacities,
        tokens,
        most_rows_in_all: 448,
        slots: 448,
        decode_bytes: DecodeBytes { weights: 14 << 30, token: 512 << 10 },
    })
}

fn span(slot: usize, past_tokens: usize, len: usize) -> Span {
    Span { slot, past_tokens, first: 0, len }
}

#[test]
fn one_budget_holds_many_short_or_few_long_sequences() {
    let mut placement = h100();
    // A sequence of 256 tokens, prompt and answer, has 255 entries: its last token is never computed.
    assert!((0..448).all(|slot| placement.reserve(slot, 255)));
    for slot in 0..448 {
        placement.prepare(&[span(slot, 0, 255)]).unwrap();
    }
    assert_eq!(placement.rows(0).iter().flatten().count(), 448);
    assert!(!placement.reserve(0, 256), "one that may outgrow its class finds no room");
    (0..448).for_each(|slot| placement.release(slot));
    assert!((0..28).all(|slot| placement.reserve(slot, 4096)));
    assert!(!placement.reserve(28, 10));
    // All of them grow from the smallest class to the largest, in turn.
    for reached in [200, 255, 256, 511, 700, 1024, 3000, 4096] {
        for slot in 0..28 {
            let past = placement.held(slot) * usize::from(reached != 200);
            placement.prepare(&[span(slot, past, reached - past)]).unwrap();
            assert_eq!(placement.held(slot), reached);
        }
    }
    assert_eq!(placement.rows(4).iter().flatten().count(), 28);
    placement.release(5);
    assert!(placement.reserve(28, 10));
    let error = placement.prepare(&[span(5, 0, 4000)]).unwrap_err();
    assert!(error.contains("needs KV memory for") && error.contains("114688"), "{error}");
}

#[test]
fn a_sequence_moves_up_by_one_copy() {
    let mut placement = h100();
    assert_eq!(placement.prepare(&[span(3, 0, 200)]).unwrap(), []);
    assert_eq!(placement.prepare(&[span(3, 200, 55)]).unwrap(), []);
    let place = placement.place(3).unwrap();
    assert_eq!(place, ClassRow { class: 0, row: 0 });
    let copies = placement.prepare(&[span(3, 255, 1)]).unwrap();
    let [copy] = &copies[..] else { panic!("{copies:?}") };
    assert_eq!((copy.from, copy.tokens), (Spot::Region { offset: 0, capacity: 256 }, 255));
    assert!(matches!(copy.to, Spot::Region { capacity: 512, .. }), "{copy:?}");
    assert_eq!(placement.place(3).unwrap().class, 1);
    // Cut short, it goes where it fits, with what is left of it.
    let copies = placement.prepare(&[span(3, 100, 2)]).unwrap();
    assert!(copies.len() == 1 && copies[0].tokens == 100, "{copies:?}");
    assert_eq!((placement.place(3).unwrap().class, placement.held(3)), (0, 102));
    let error = placement.prepare(&[span(3, 103, 1)]).unwrap_err();
    assert_eq!(error, "slot 3 holds 102 tokens, but the step builds on 103 of it");
}

/// Short sequences join the run of a long one while it is decoded, within what they have reserved.
#[test]
fn sequences_are_decoded_in_one_run_where_that_reads_less() {
    let mut placement = h100();
    for (slot, tokens) in [(0, 900), (1, 900), (2, 1500), (3, 200)] {
        assert!(placement.reserve(slot, tokens));
    }
    let classes = |placement: &Placement| [0, 1, 2, 3].map(|slot| placement.place(slot).map(|place| place.class));
    for (slot, tokens) in [(0, 100), (1, 120), (2, 600), (3, 50)] {
        placement.prepare(&[span(slot, 0, tokens)]).unwrap();
    }
    assert_eq!(classes(&placement), [Some(0), Some(0), Some(2), Some(0)]);
    // Slot 3 has not reserved as much, so its class is decoded in any case, and the others stay with it.
    let copies = placement.prepare(&[span(0, 100, 1), span(1, 120, 1), span(2, 600, 1), span(3, 50, 1)]).unwrap();
    assert_eq!((copies.len(), classes(&placement)), (0, [Some(0), Some(0), Some(2), Some(0)]));
    // Without it they move, once.
    let copies = placement.prepare(&[span(0, 101, 1), span(1, 121, 1), span(2, 601, 1)]).unwrap();
    assert_eq!(copies.iter().map(|copy| copy.tokens).collect::<Vec<_>>(), [101, 121]);
    assert_eq!(classes(&placement), [Some(2), Some(2), Some(2), Some(0)]);
    let copies = placement.prepare(&[span(0, 102, 1), span(1, 122, 1), span(2, 602, 1)]).unwrap();
    assert_eq!((copies.len(), classes(&placement)), (0, [Some(2), Some(2), Some(2), Some(0)]));
    // They are counted with what they have, also if less is reserved, and return when the long one has ended.
    assert_eq!(placement.counted_in_all(), 1024 + 1024 + 2048 + 256);
    placement.release(2);
    assert!(placement.reserve(1, 300));
    assert_eq!(placement.counted_in_all(), 1024 + 1024 + 256);
    let copies = placement.prepare(&[span(0, 103, 1), span(1, 123, 1)]).unwrap();
    assert_eq!((copies.len(), classes(&placement)), (2, [Some(0), Some(0), Some(2), Some(0)]));
    assert_eq!(placement.counted_in_all(), 1024 + 512 + 256);
}

#[test]
fn released_slots_keep_what_they_hold_until_it_is_in_the_way() {
    let mut placement = h100();
    for slot in 0..28 {
        placement.prepare(&[span(slot, 0, 4096)]).unwrap();
    }
    placement.release(9);
    placement.release(4);
    assert_eq!((placement.held(9), placement.held(4)), (4096, 4096));
    assert!(placement.reserve(30, 300));
    placement.prepare(&[span(30, 0, 300)]).unwrap();
    assert_eq!((placement.held(9), placement.held(4)), (0, 4096), "what was released first goes first");
    // A released slot is reserved again with its contents, if they fit, or without them.
    assert!(placement.reserve(4, 4000) && placement.held(4) == 4096);
    placement.release(4);
    for slot in 31..39 {
        assert!(placement.reserve(slot, 511));
    }
    assert!(placement.reserve(4, 200));
    assert_eq!(placement.held(4), 0);
}
