//! Prompts of the reference: the first tokens of a sentence in each script that the tokenizer knows, of a conversation
//! and of calibration prompts, or lists of ids where there is no tokenizer.

use super::reference::ReferencePrompt;
use super::sample_tokens;
use crate::backend::Limits;
use crate::text::{ChatFormat, Message, Tokenizer};

/// Tokens of a prompt.
pub const PROMPT_TOKENS: usize = 12;
/// Tokens of the conversation, so that it gets past the template's first marker.
const CHAT_TOKENS: usize = 24;
/// Tokens of the longest prompt, so that attention spans several blocks of keys.
const LONG_TOKENS: usize = 96;
/// Prompts without a tokenizer.
const ARBITRARY: usize = 8;
/// Calibration prompts to include.
const CALIBRATED: usize = 4;

/// A sentence in each script.
const SENTENCES: [(&str, &str); 14] = [
    ("Latin", "All human beings are born free and equal in dignity and rights."),
    ("Latin with diacritics", "Każdy człowiek ma prawo do życia, wolności; où naît l'été, à l'œuvre, größer."),
    ("Greek", "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια."),
    ("Cyrillic", "Все люди рождаются свободными и равными в своём достоинстве и правах."),
    ("Armenian", "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։"),
    ("Hebrew", "כל בני האדם נולדו בני חורין ושווים בערכם."),
    ("Arabic", "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق."),
    ("Devanagari", "सभी मनुष्यों को गौरव और अधिकारों के मामले में स्वतंत्रता प्राप्त है।"),
    ("Thai", "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน"),
    ("Han", "人人生而自由,在尊严和权利上一律平等。"),
    ("Kana and Han", "すべての人間は、生まれながらにして自由である。"),
    ("Hangul", "모든 인간은 태어날 때부터 자유로우며 평등하다."),
    ("digits and signs", "3.14159 * 2 - 17 = -10.71682; [x^2 + y^2] <= 100% @ #42 & more!"),
    ("code", "fn main() {\n    let total: u64 = (1..=10).map(|n| n * n).sum();\n    println!(\"{total}\");\n}"),
];

/// The prompts. `calibration` are those that a precision was calibrated with, the engine's own kind of input.
pub fn prompts(
    text: Option<(&Tokenizer, &ChatFormat)>,
    calibration: &[Vec<u32>],
    limits: &Limits,
) -> Vec<ReferencePrompt> {
    let mut prompts = Vec::new();
    let mut add = |name: String, ids: &[u32], most: usize| {
        let ids: Vec<u32> = ids.iter().copied().take(most.min(limits.max_sequence_tokens)).collect();
        let is_new = prompts.iter().all(|known: &ReferencePrompt| known.token_ids != ids);
        if !ids.is_empty() && is_new && ids.iter().all(|id| (*id as usize) < limits.vocab_size) {
            prompts.push(ReferencePrompt { name, token_ids: ids });
        }
    };
    if let Some((tokenizer, format)) = text {
        let mut all = Vec::new();
        for (script, sentence) in SENTENCES {
            if let Some(ids) = known(tokenizer, sentence) {
                add(script.into(), &ids, PROMPT_TOKENS);
                all.extend(ids);
            }
        }
        add("all scripts".into(), &all, LONG_TOKENS);
        let conversation = [Message::user("What is the capital of France, and why?")];
        if let Ok(ids) = format.prompt(tokenizer, &conversation) {
            add("conversation".into(), &ids, CHAT_TOKENS);
        }
    }
    for (index, ids) in calibration.iter().take(CALIBRATED).enumerate() {
        add(format!("calibration prompt {}", index + 1), ids, PROMPT_TOKENS);
    }
    if text.is_none() {
        for index in 0..ARBITRARY {
            add(format!("ids {}", index + 1), &sample_tokens(limits, 300 + index as u64, PROMPT_TOKENS), PROMPT_TOKENS);
        }
        add("many ids".into(), &sample_tokens(limits, 350, LONG_TOKENS), LONG_TOKENS);
    }
    prompts
}

/// The sentence's ids, if the tokenizer knows its script: the text survives, in fewer tokens than it has bytes.
fn known(tokenizer: &Tokenizer, sentence: &str) -> Option<Vec<u32>> {
    let ids = tokenizer.encode(sentence).ok()?;
    let survives = tokenizer.decode(&ids).ok()?.trim() == sentence;
    (survives && ids.len() < sentence.len()).then_some(ids)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn limits() -> Limits {
        Limits { slots: 1, max_sequence_tokens: 64, max_step_tokens: 64, max_logits_rows: 1, vocab_size: 2816 }
    }

    #[test]
    fn scripts_that_a_tokenizer_knows_are_prompts() {
        let path = Path::new("tests/data/tiny-chat/tokenizer.json");
        let tokenizer = Tokenizer::from_bytes(path, &std::fs::read(path).unwrap()).unwrap();
        let format = ChatFormat::raw(&[]);
        let found = prompts(Some((&tokenizer, &format)), &[vec![5; 30], vec![5; 40], vec![6]], &limits());
        let names: Vec<&str> = found.iter().map(|prompt| prompt.name.as_str()).collect();
        assert!(names.contains(&"Latin") && names.contains(&"code"), "{names:?}");
        assert!(names.contains(&"calibration prompt 1") && names.contains(&"calibration prompt 3"), "{names:?}");
        assert!(!names.contains(&"calibration prompt 2"), "the same ids as 1: {names:?}");
        assert!(found.iter().all(|prompt| (1..=LONG_TOKENS).contains(&prompt.token_ids.len())));
    }

    #[test]
    fn without_a_tokenizer_ids_are_prompts() {
        let found = prompts(None, &[], &Limits { max_sequence_tokens: 5, vocab_size: 7, ..limits() });
        assert!(found.len() > 4);
        assert!(found.iter().all(|prompt| prompt.token_ids.len() == 5 && prompt.token_ids.iter().all(|id| *id < 7)));
    }
}
