//! Sampling from a row's largest logits gives the same result as sampling from the whole row.

use proptest::prelude::*;

use super::super::scripted::largest;
use super::*;

/// Settings that sample from the whole distribution.
fn sampling() -> Settings {
    Settings { top_k: 0, top_p: 1.0, seed: Some(7), ..Settings::default() }
}

/// Draws several times over `rows` in turn, from the `k` largest logits first; `stop_ids` are `[1, 3]`. Returns how
/// often those were enough.
fn decided(params: &Settings, vocab_size: usize, prompt: &[u32], rows: &[Vec<f32>], k: usize) -> usize {
    let mut of_top = Sampler::with_settings(params, vocab_size, &[1, 3], prompt).unwrap();
    let mut of_row = Sampler::with_settings(params, vocab_size, &[1, 3], prompt).unwrap();
    let mut decided = 0;
    for row in rows {
        let expected = of_row.sample(row);
        let before = (of_top.generated, of_top.seen.clone());
        let (values, ids) = largest(row, k);
        match of_top.sample_top(Top { values: &values, ids: &ids, sum: row.iter().sum() }) {
            Ok(Some(id)) => {
                decided += 1;
                assert_eq!(id, expected.unwrap(), "{params:?}");
            }
            Ok(None) => {
                assert_eq!((of_top.generated, of_top.seen.clone()), before, "nothing is counted");
                assert!(k < row.len(), "the whole row decides");
                let id = of_top.sample(row);
                assert_eq!(format!("{id:?}"), format!("{expected:?}"));
            }
            Err(error) => {
                assert_eq!((of_top.generated, of_top.seen.clone()), before, "nothing is counted");
                assert!(matches!(error, Error::Numerics(_)), "{error}");
                assert!(matches!(expected, Err(Error::Numerics(_))), "{expected:?} but {error}");
            }
        }
        assert_eq!((of_top.generated, &of_top.seen), (of_row.generated, &of_row.seen));
    }
    decided
}

/// Returns true if the `k` largest logits decide one row.
fn decides(params: &Settings, row: &[f32], k: usize) -> bool {
    decided(params, row.len(), &[], &[row.to_vec()], k) == 1
}

/// Rows whose logits decay like a model's, all different.
fn sloping(vocab_size: usize, rows: usize) -> Vec<Vec<f32>> {
    let logit = |id: usize, row: usize| {
        let place = (id * 7919 + row * 104_729) % vocab_size;
        20.0 - 3.0 * (1.0 + place as f32).ln()
    };
    (0..rows).map(|row| (0..vocab_size).map(|id| logit(id, row)).collect()).collect()
}

#[test]
fn the_common_settings_are_decided_by_64() {
    let rows = sloping(5000, 40);
    let k_and_p = Settings { top_k: 40, top_p: 0.9, ..sampling() };
    for params in [
        Settings::default(),
        Settings { temperature: 0.0, ..sampling() },
        Settings { top_k: 40, ..sampling() },
        Settings { top_k: 50, temperature: 0.7, ..sampling() },
        k_and_p.clone(),
        Settings { temperature: 0.7, ..k_and_p.clone() },
        Settings { min_p: 0.05, ..k_and_p.clone() },
        Settings { min_p: 0.05, ..sampling() },
        Settings { min_p: 0.05, top_k: 1000, temperature: 1.5, ..sampling() },
        Settings { repetition_penalty: 1.1, ..Settings::default() },
        Settings { repetition_penalty: 1.1, presence_penalty: 0.5, frequency_penalty: 0.2, ..k_and_p.clone() },
        Settings { logit_bias: vec![(7, -100.0), (9, 0.5)], ..k_and_p.clone() },
        Settings { min_tokens: 20, ..k_and_p },
    ] {
        assert_eq!(decided(&params, 4900, &[1, 2, 3, 4, 5], &rows, 64), 40, "{params:?}");
    }
    // The normalizing sum needs the whole row.
    for params in [
        sampling(),
        Settings { top_p: 0.5, ..sampling() },
        Settings { top_p: 0.5, min_p: 0.2, ..sampling() },
        Settings { top_k: 65, ..sampling() },
        Settings { top_k: 65, top_p: 0.5, min_p: 0.2, ..sampling() },
        Settings { min_p: 1e-6, ..sampling() },
    ] {
        assert_eq!(decided(&params, 4900, &[], &rows, 64), 0, "{params:?}");
        assert_eq!(decided(&params, 4900, &[], &rows, 5000), 40, "{params:?}");
    }
}

#[test]
fn ties_at_the_edge_are_not_decided() {
    let greedy = Settings::default();
    let row = [1.0, 5.0, 5.0, 5.0, 0.0];
    // `largest` lists the highest of equal ids first.
    assert!(!decides(&greedy, &row, 1) && !decides(&greedy, &row, 3), "an equal one may be missing");
    assert!(decides(&greedy, &row, 4));
    let two = Settings { top_k: 2, ..sampling() };
    let row = [1.0, 5.0, 4.0, 4.0, 0.0];
    assert!(!decides(&two, &row, 2) && !decides(&two, &row, 3));
    assert!(decides(&two, &row, 4), "the lower of the equal ids is chosen from");
    assert!(decides(&Settings { top_k: 1, ..two.clone() }, &row, 2));
    // Division can make unequal logits equal.
    let near: Vec<f32> = (0..9).map(|step| f32::from_bits(1.9f32.to_bits() + step)).collect();
    let low = near.into_iter().find(|logit| logit / 1.8 == logit.next_up() / 1.8).unwrap();
    let row = [low, 3.0, low.next_up(), -1.0];
    assert!(decides(&two, &row, 3));
    assert!(!decides(&Settings { temperature: 1.8, ..two }, &row, 3));
}

#[test]
fn adjustments_count_for_ids_on_either_side() {
    let greedy = Settings::default();
    let row = [1.0, 3.0, 2.0, 0.5, -1.0];
    let biased = |id, bias| Settings { logit_bias: vec![(id, bias)], ..greedy.clone() };
    assert!(decides(&biased(1, -0.5), &row, 2));
    assert!(!decides(&biased(1, -2.5), &row, 2), "both are then at most as large as the rest may be");
    assert!(decides(&biased(4, 0.5), &row, 2));
    assert!(!decides(&biased(4, 1.5), &row, 2), "its logit is not known, and may be 2");
    assert!(decides(&biased(4, 1.5), &row, 3), "its logit is at most 1");
    assert!(decides(&biased(1, 50.0), &row, 2) && decides(&biased(2, 50.0), &row, 2));
    let twice = Settings { logit_bias: vec![(4, 90.0), (3, 0.1), (4, -90.0)], ..greedy.clone() };
    assert!(decides(&twice, &row, 2));

    let rows = [vec![1.0, 3.0, 2.0, 0.5, -1.0]];
    let repeats = Settings { repetition_penalty: 0.5, ..greedy.clone() };
    assert_eq!(decided(&repeats, 5, &[4], &rows, 2), 0, "the prompt's id 4 may be raised to 4");
    assert_eq!(decided(&repeats, 5, &[1], &rows, 2), 1);
    let mut sampler =
        Sampler::with_settings(&Settings { presence_penalty: -3.0, ..greedy.clone() }, 5, &[], &[]).unwrap();
    let mut draw = |values: &[f32], ids: &[u32]| sampler.sample_top(Top { values, ids, sum: 0.0 }).unwrap();
    assert_eq!(draw(&[3.0, 2.0], &[1, 2]), Some(1));
    assert_eq!(draw(&[9.0, 8.0], &[3, 2]), None, "id 1 may have 8 + 3");
    assert_eq!(draw(&[9.0, 5.0], &[3, 2]), Some(3));
    assert_eq!(draw(&[9.0, 8.5], &[2, 1]), None, "id 1 has 8.5 + 3, and so may id 3");
    assert_eq!(draw(&[9.0, 8.5, 8.0], &[2, 1, 0]), Some(1), "id 3 has at most 8 + 3");
}

#[test]
fn banned_and_padding_ids_are_passed_over() {
    let params = Settings { min_tokens: 1, ..Settings::default() };
    let row = vec![0.0, 7.0, 5.0, 6.0, 1.0, 9.0, 8.0];
    // 5 and 6 are padding, 1 and 3 are stop ids.
    assert_eq!(decided(&params, 5, &[], &[row.clone(), row.clone()], 6), 2);
    assert_eq!(decided(&params, 5, &[], &[row.clone(), row.clone()], 4), 1, "only the second may stop");
    assert_eq!(decided(&params, 5, &[], &[row.clone(), row], 2), 0, "all padding");
}

#[test]
fn a_rest_of_negative_infinity_is_no_rest() {
    let low = f32::NEG_INFINITY;
    let row = [low, 1.0, low, 2.0, low, low];
    for params in [sampling(), Settings { top_p: 0.9, ..sampling() }, Settings { top_k: 5, ..sampling() }] {
        assert!(decides(&params, &row, 3) && !decides(&params, &row, 2), "{params:?}");
    }
    let raised = Settings { logit_bias: vec![(0, 100.0)], presence_penalty: -5.0, ..sampling() };
    assert!(decides(&raised, &row, 3));
    let mut sampler = Sampler::with_settings(&sampling(), 6, &[], &[]).unwrap();
    let error = sampler.sample_top(Top { values: &[low; 2], ids: &[0, 1], sum: low }).unwrap_err();
    assert_eq!(error.to_string(), sampler.sample(&[low; 6]).unwrap_err().to_string());
}

#[test]
fn what_is_wrong_with_the_largest_logits_is_named() {
    let mut sampler = Sampler::with_settings(&Settings { top_k: 2, ..sampling() }, 10, &[], &[]).unwrap();
    let mut error = |values: &[f32], ids: &[u32]| sampler.sample_top(Top { values, ids, sum: 0.0 }).unwrap_err();
    let wrong = error(&[f32::NAN, f32::NAN, 1.0], &[8, 4, 2]);
    assert!(matches!(&wrong, Error::Numerics(detail) if detail.contains("index 4 is NaN")), "{wrong}");
    let wrong = error(&[f32::INFINITY, 1.0], &[12, 2]);
    assert!(matches!(&wrong, Error::Numerics(detail) if detail.contains("index 12 is inf")), "padding too: {wrong}");
    assert!(matches!(error(&[2.0, 1.0], &[3]), Error::Step(_)));
    assert!(
        matches!(error(&[2.0, 1.0, 0.0], &[3, 5, 3]), Error::Step(detail) if detail.contains("id 3 is listed twice"))
    );
    assert_eq!(sampler.sample_top(Top { values: &[], ids: &[], sum: 0.0 }).unwrap(), None);
    // Among the largest or not: the sum tells.
    for sum in [f32::NAN, f32::INFINITY] {
        let wrong = sampler.sample_top(Top { values: &[2.0, 1.0, 0.0], ids: &[3, 5, 6], sum }).unwrap_err();
        assert!(matches!(&wrong, Error::Numerics(detail) if detail.contains("none of the 3 largest is")), "{wrong}");
    }
    assert_eq!(sampler.generated, 0);
    let hot = Settings { temperature: 0.001, ..sampling() };
    let mut sampler = Sampler::with_settings(&hot, 3, &[], &[]).unwrap();
    let wrong = sampler.sample_top(Top { values: &[3e38, 1.0], ids: &[1, 0], sum: 3e38 }).unwrap_err();
    assert!(wrong.to_string().contains("index 1 overflows"), "{wrong}");
}

#[test]
fn the_order_of_the_largest_plays_no_part() {
    let params = Settings { top_k: 3, ..sampling() };
    let draws = |values: &[f32], ids: &[u32]| -> Vec<Option<u32>> {
        let mut sampler = Sampler::with_settings(&params, 9, &[], &[]).unwrap();
        (0..20).map(|_| sampler.sample_top(Top { values, ids, sum: 0.0 }).unwrap()).collect()
    };
    let first = draws(&[4.0, 4.0, 3.0, 3.0, 1.0], &[2, 5, 0, 8, 1]);
    assert!(first.iter().all(Option::is_some));
    assert_eq!(first, draws(&[4.0, 4.0, 3.0, 3.0, 1.0], &[5, 2, 8, 0, 1]));
    assert_eq!(first, draws(&[1.0, 3.0, 4.0, 3.0, 4.0], &[1, 8, 2, 0, 5]));
}

/// Logits with many ties, with steep rows, and occasionally with NaN or infinity.
fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        60 => (-20i32..20).prop_map(|quarters| quarters as f32 / 4.0),
        20 => -30.0f32..30.0,
        8 => Just(f32::NEG_INFINITY),
        4 => Just(-0.0f32),
    ]
}

fn any_params() -> impl Strategy<Value = Settings> {
    let top_k = prop_oneof![2 => Just(0u32), 1 => Just(1), 3 => 2u32..10, 2 => 10u32..80, 1 => 80u32..2000];
    let top_p = prop_oneof![3 => Just(1.0f32), 1 => Just(0.0), 3 => 0.01f32..1.0];
    let min_p = prop_oneof![2 => Just(0.0f32), 2 => 0.0f32..1.0, 1 => 1e-7f32..1e-2, 1 => Just(1.0)];
    let temperature =
        prop_oneof![3 => Just(1.0f32), 1 => Just(0.0), 2 => 0.001f32..0.3, 3 => 0.3f32..3.0, 1 => 3.0f32..100.0];
    let repetition = prop_oneof![3 => Just(1.0f32), 2 => 1.0f32..2.0, 1 => 0.01f32..1.0];
    let penalty = prop_oneof![3 => Just(0.0f32), 2 => 0.0f32..2.0, 1 => -3.0f32..0.0];
    let biases = prop_oneof![2 => Just(0usize..1), 1 => Just(0usize..6)]
        .prop_flat_map(|count| prop::collection::vec((any::<prop::sample::Index>(), -8.0f32..8.0), count));
    let bans = prop_oneof![2 => Just(0usize), 1 => 1usize..5];
    (top_k, top_p, min_p, temperature, repetition, penalty.clone(), penalty, biases, bans, any::<u64>()).prop_map(
        |(
            top_k,
            top_p,
            min_p,
            temperature,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            biases,
            min_tokens,
            seed,
        )| {
            Settings {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty,
                frequency_penalty,
                // The test reduces the ids modulo its vocabulary.
                logit_bias: biases.into_iter().map(|(at, bias)| (at.index(1 << 20) as u32, bias)).collect(),
                min_tokens,
                seed: Some(seed),
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn the_largest_logits_give_what_the_row_gives(
        columns in prop_oneof![2 => 1usize..12, 3 => 12usize..150, 1 => 150usize..1200],
        padding in prop_oneof![2 => Just(0usize), 1 => 1usize..12],
        logits in prop::collection::vec(any_logit(), 1200),
        spoiled in prop::option::weighted(0.05, (0usize..1200, prop_oneof![Just(f32::NAN), Just(f32::INFINITY)])),
        mut params in any_params(),
        prompt in prop::collection::vec(0u32..100, 0..8),
    ) {
        let vocab_size = columns.saturating_sub(padding).max(1);
        for (id, _) in &mut params.logit_bias {
            *id %= vocab_size as u32;
        }
        // Rows that share some of their best ids, so that penalties add up.
        let mut rows: Vec<Vec<f32>> = (0..8)
            .map(|row| (0..columns).map(|id| logits[(id + row / 3 * 5) % 1200]).collect())
            .collect();
        if let Some((at, value)) = spoiled {
            rows[3][at % columns] = value;
        }
        for k in [1, 2, 8, 64, columns] {
            decided(&params, vocab_size, &prompt, &rows, k.min(columns));
        }
    }
}
