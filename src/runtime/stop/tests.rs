use proptest::prelude::*;

use super::StopFilter;

/// The text shown for `pieces`, whether it stopped, and the text that every push showed.
fn run(stops: &[&str], trim: bool, pieces: &[&str]) -> (String, bool, Vec<String>) {
    let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
    let mut filter = StopFilter::new(&stops, trim).unwrap();
    let mut deltas = Vec::new();
    let mut stopped = false;
    for piece in pieces {
        let mut out = String::new();
        stopped = filter.push(piece, &mut out);
        deltas.push(out);
    }
    let mut out = String::new();
    filter.flush(&mut out);
    deltas.push(out);
    (deltas.concat(), stopped, deltas)
}

/// The definition, applied to the whole text: the first end of a stop string, and the longest one that ends there.
fn by_definition(stops: &[&str], trim: bool, text: &str) -> (String, bool) {
    let ends = (1..=text.len()).filter(|end| text.is_char_boundary(*end));
    let cut = ends.into_iter().find_map(|end| {
        stops.iter().filter(|s| text[..end].ends_with(*s)).map(|s| s.len()).max().map(|longest| end - longest)
    });
    let shown = &text[..cut.unwrap_or(text.len())];
    (if trim { shown.trim() } else { shown }.to_string(), cut.is_some())
}

#[test]
fn a_stop_over_several_pieces_is_never_shown() {
    let (text, stopped, deltas) = run(&["<extra_id_1>"], false, &["Hi <", "extra", "_id_", "1>User"]);
    assert_eq!((text.as_str(), stopped), ("Hi ", true));
    assert_eq!(deltas, ["Hi ", "", "", "", ""]);
    let (text, stopped, deltas) = run(&["<extra_id_1>"], false, &["a<ex", "tra<", "extra_id_", "2>"]);
    assert_eq!((text.as_str(), stopped), ("a<extra<extra_id_2>", false));
    assert_eq!(deltas, ["a", "<extra", "", "<extra_id_2>", ""]);
}

#[test]
fn the_first_complete_stop_wins_and_then_the_longest() {
    assert_eq!(run(&["abc", "b"], false, &["xabc"]).0, "xa");
    assert_eq!(run(&["bc", "abc"], false, &["xabcd"]).0, "x");
    assert_eq!(run(&["aab"], false, &["a", "a", "a", "b"]).0, "a");
    assert_eq!(run(&["。"], false, &["好。", "x"]).0, "好");
}

#[test]
fn whitespace_around_the_answer_is_never_shown() {
    let (text, _, deltas) = run(&["<end>"], true, &["\n ", " a", " \n", "b", "\n", "<end>"]);
    assert_eq!(text, "a \nb");
    assert_eq!(deltas, ["", "a", "", " \nb", "", "", ""]);
    assert_eq!(run(&[], true, &["  ", "\n"]).0, "");
    assert_eq!(run(&[], false, &["  ", "\n"]).0, "  \n");
}

#[test]
fn a_partial_stop_is_shown_when_the_text_ends() {
    assert_eq!(run(&["<end>"], true, &["a <en"]).0, "a <en");
    assert_eq!(run(&["\n\n"], true, &["a\n"]).0, "a");
}

#[test]
fn impossible_stop_strings_are_refused() {
    let refused = |stops: &[String]| StopFilter::new(stops, false).unwrap_err().to_string();
    assert!(refused(&["a".into(), String::new()]).contains("stop string 1 has 0 bytes"));
    assert!(refused(&["a".repeat(1025)]).contains("1 to 1024"));
    assert!(refused(&vec!["a".into(); 65]).contains("at most 64"));
}

proptest! {
    #[test]
    fn what_is_shown_does_not_depend_on_the_split(
        text in "[ab\n é<]{0,24}",
        stops in prop::collection::vec("[ab\n é<]{1,4}", 0..4),
        cuts in prop::collection::vec(0usize..24, 0..8),
        trim in any::<bool>(),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        let (shown, stopped, _) = run(&stops, trim, &pieces);
        let (expected, expected_stop) = by_definition(&stops, trim, &text);
        prop_assert_eq!(shown, expected);
        prop_assert_eq!(stopped, expected_stop);
    }
}
