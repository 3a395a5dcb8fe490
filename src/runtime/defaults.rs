//! Converts a package's generation defaults to sampling settings.

use super::sampling::SamplingParams;
use crate::engine::GenerationSettings;

impl From<&GenerationSettings> for SamplingParams {
    /// Greedy unless the checkpoint enables sampling; then settings that it does not name are off.
    fn from(settings: &GenerationSettings) -> SamplingParams {
        let mut params = SamplingParams::greedy();
        params.repetition_penalty = settings.repetition_penalty;
        if settings.do_sample {
            params.temperature = Some(settings.temperature.unwrap_or(1.0));
            params.top_k = settings.top_k;
            params.top_p = settings.top_p;
            params.min_p = settings.min_p;
        }
        params
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_checkpoint_names_is_taken_and_the_rest_is_off() {
        let silent = GenerationSettings::default();
        assert_eq!(SamplingParams::from(&silent), SamplingParams::default());
        let settings = GenerationSettings { temperature: Some(0.6), repetition_penalty: Some(1.1), ..silent };
        let greedy = SamplingParams::from(&settings);
        assert!(greedy.is_greedy() && greedy.repetition_penalty == Some(1.1), "{greedy:?}");
        let sampled = SamplingParams::from(&GenerationSettings { do_sample: true, ..settings });
        assert!(!sampled.is_greedy());
        assert_eq!(sampled, SamplingParams::sampled(0.6).repetition_penalty(1.1));
        sampled.validate(10).unwrap();
    }
}
