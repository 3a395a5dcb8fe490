//! Sampling settings and the one rule that interprets them, for the command line, the library and servers.

use serde::{Deserialize, Serialize};

use super::sampler::{MIN_TEMPERATURE, Settings};
use crate::error::{Error, Result};

/// Settings for choosing the next token: greedily, or sampled from the model's distribution.
///
/// With nothing set the choice is greedy, like the model card's `top_k=1, top_p=0.0`. As soon as one of `temperature`,
/// `top_k`, `top_p` and `min_p` is set, tokens are sampled and the unset ones are off, so each has an effect by itself.
/// Sampling is still greedy if a setting leaves a single token: a temperature below 0.001, `top_k` 1, or `top_p` 0
/// without `top_k`. These rules and meanings are those of TensorRT-LLM.
///
/// A request is refused if it sets something that has no effect, such as a temperature beside `top_k` 1:
/// [`SamplingParams::without_effect`] lists such settings and [`SamplingParams::effective`] drops them.
///
/// ```
/// use aotron::SamplingParams;
///
/// assert!(SamplingParams::greedy().is_greedy());
/// let params = SamplingParams::sampled(0.7).top_p(0.9).seed(1);
/// assert!(!params.is_greedy());
/// assert_eq!(params.clone().top_k(1).without_effect(), ["temperature", "top_p", "seed"]);
/// ```
///
/// The settings apply in this order: logit bias, temperature, repetition penalty, presence and frequency penalty, the
/// ban on stop ids before `min_tokens`, top-k, top-p, min-p. Ids outside the tokenizer's vocabulary are never chosen.
/// Ties go to the lowest id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SamplingParams {
    /// Divides the logits; 0 to 100. Below 0.001 sampling is greedy. 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Sample from this many of the largest logits; 1 is greedy, 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Sample from the most probable ids that together reach this probability; 0 to 1. 1 is off; 0 is off if `top_k` is
    /// set, and greedy otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Sample from ids at least this fraction as probable as the most probable one; 0 to 1, 0 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// Divides the logits of ids in the prompt or the output, or multiplies them if negative; 0.01 to 100. 1 is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of ids in the output; -100 to 100. As in OpenAI's API, the prompt does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// Subtracted once per occurrence of an id in the output; -100 to 100. The prompt does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of single ids; -100 to 100 each. The biases of an id listed twice add up.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Stop ids are not chosen before the output has this many tokens. Stop strings can still end it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_tokens: Option<usize>,
    /// Seed of the random draws; draw i depends on the seed and on i only. `None` takes one from the operating system,
    /// which the completion reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// Defines builder methods that set one field each.
macro_rules! setters {
    ($($(#[$doc:meta])* $field:ident: $type:ty;)*) => {
        $($(#[$doc])*
        #[must_use]
        pub fn $field(mut self, $field: $type) -> SamplingParams {
            self.$field = Some($field);
            self
        })*
    };
}

impl SamplingParams {
    /// Always the most likely token. Same as the default.
    pub fn greedy() -> SamplingParams {
        SamplingParams::default()
    }

    /// Samples from the whole distribution at this temperature.
    pub fn sampled(temperature: f32) -> SamplingParams {
        SamplingParams { temperature: Some(temperature), ..SamplingParams::default() }
    }

    setters! {
        /// Sets [`SamplingParams::temperature`].
        temperature: f32;
        /// Sets [`SamplingParams::top_k`].
        top_k: u32;
        /// Sets [`SamplingParams::top_p`].
        top_p: f32;
        /// Sets [`SamplingParams::min_p`].
        min_p: f32;
        /// Sets [`SamplingParams::repetition_penalty`].
        repetition_penalty: f32;
        /// Sets [`SamplingParams::presence_penalty`].
        presence_penalty: f32;
        /// Sets [`SamplingParams::frequency_penalty`].
        frequency_penalty: f32;
        /// Sets [`SamplingParams::min_tokens`].
        min_tokens: usize;
        /// Sets [`SamplingParams::seed`].
        seed: u64;
    }

    /// Adds a bias to one id's logit.
    #[must_use]
    pub fn logit_bias(mut self, id: u32, bias: f32) -> SamplingParams {
        self.logit_bias.push((id, bias));
        self
    }

    /// Returns true if the largest logit is always chosen.
    pub fn is_greedy(&self) -> bool {
        self.settings().is_greedy()
    }

    /// Names of settings that were given but have no effect: they only matter to random choices, and there are none.
    pub fn without_effect(&self) -> Vec<&'static str> {
        if !self.is_greedy() {
            return Vec::new();
        }
        let given = [
            ("temperature", self.temperature.is_some_and(|t| t != 0.0)),
            ("top_k", self.top_k.is_some_and(|k| k > 1)),
            ("top_p", self.top_p.is_some_and(|p| p > 0.0)),
            ("min_p", self.min_p.is_some()),
            ("seed", self.seed.is_some()),
        ];
        given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect()
    }

    /// The same settings without those that have no effect, which clients tend to send anyway, such as a `top_p` beside
    /// a temperature of 0.
    #[must_use]
    pub fn effective(self) -> SamplingParams {
        if !self.is_greedy() {
            return self;
        }
        // A temperature out of range is not idle but wrong: it stays, to be refused.
        let temperature = self.temperature.filter(|temperature| *temperature < 0.0);
        SamplingParams { temperature, top_k: None, top_p: None, min_p: None, ..self }
    }

    /// Validates every setting; `vocab_size` is the number of ids that can be chosen.
    ///
    /// # Errors
    /// [`Error::Request`] with the setting, its value and the accepted range, or with the settings that have no effect.
    /// A seed never counts as one of those: a greedy choice is as repeatable as it asks for.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        self.settings().validate(vocab_size)?;
        let idle: Vec<&str> = self.without_effect().into_iter().filter(|name| *name != "seed").collect();
        if idle.is_empty() {
            return Ok(());
        }
        let (verb, them) = if idle.len() == 1 { ("has", "it") } else { ("have", "them") };
        let cause = match (self.temperature, self.top_k) {
            (_, Some(1)) => "top_k is 1".to_owned(),
            (Some(t), _) if t < MIN_TEMPERATURE => format!("temperature is {t}"),
            _ => "top_p is 0".to_owned(),
        };
        Err(Error::Request(format!(
            "{} {verb} no effect, because {cause}, which always takes the most likely token; leave out {them} or that",
            idle.join(", ")
        )))
    }

    /// Resolves the settings to numbers: the one place that implements the rules above.
    pub(super) fn settings(&self) -> Settings {
        let samples =
            self.temperature.is_some() || self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let greedy = Settings::default();
        let (top_k, top_p) = if samples { (0, 1.0) } else { (greedy.top_k, greedy.top_p) };
        Settings {
            temperature: self.temperature.unwrap_or(greedy.temperature),
            top_k: self.top_k.unwrap_or(top_k),
            top_p: self.top_p.unwrap_or(top_p),
            min_p: self.min_p.unwrap_or(greedy.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(greedy.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(greedy.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(greedy.frequency_penalty),
            logit_bias: self.logit_bias.clone(),
            min_tokens: self.min_tokens.unwrap_or(greedy.min_tokens),
            seed: self.seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_set_is_greedy_and_each_setting_alone_samples() {
        assert!(SamplingParams::default().is_greedy());
        let penalized = SamplingParams::greedy().repetition_penalty(1.1).presence_penalty(0.1).logit_bias(3, 1.0);
        assert!(penalized.seed(1).min_tokens(2).is_greedy());
        let none = SamplingParams::greedy;
        for alone in [none().temperature(5.0), none().top_p(0.9), none().top_k(0), none().top_k(40), none().min_p(0.1)]
        {
            assert!(!alone.is_greedy(), "{alone:?}");
            assert!(alone.without_effect().is_empty() && alone.validate(10).is_ok(), "{alone:?}");
        }
        let set = SamplingParams { temperature: Some(5.0), ..SamplingParams::default() };
        assert_eq!(set, SamplingParams::sampled(5.0));
        assert_eq!(set.settings(), Settings { temperature: 5.0, top_k: 0, top_p: 1.0, ..Settings::default() });
        for greedy in [SamplingParams::sampled(0.0), none().top_k(1), none().top_p(0.0)] {
            assert!(greedy.is_greedy() && greedy.validate(10).is_ok(), "{greedy:?}");
        }
        assert!(!none().top_k(5).top_p(0.0).is_greedy(), "a top_p of 0 is off beside top_k");
    }

    #[test]
    fn settings_without_effect_are_refused_by_name_and_can_be_dropped() {
        let refused = |params: &SamplingParams| params.validate(10).unwrap_err().to_string();
        let both = SamplingParams::sampled(0.7).top_k(1);
        assert!(refused(&both).contains("temperature has no effect, because top_k is 1"), "{}", refused(&both));
        let cold = SamplingParams::sampled(0.0).top_p(0.9).min_p(0.1).seed(3);
        assert_eq!(cold.without_effect(), ["top_p", "min_p", "seed"]);
        assert!(refused(&cold).contains("top_p, min_p have no effect, because temperature is 0"), "{}", refused(&cold));
        let none = SamplingParams::sampled(2.0).top_p(0.0);
        assert!(refused(&none).contains("because top_p is 0"), "{}", refused(&none));
        for params in [both, cold, none] {
            let effective = params.clone().effective();
            assert!(effective.is_greedy() && effective.validate(10).is_ok());
            assert_eq!(effective.seed, params.seed);
        }
        assert_eq!(SamplingParams::sampled(0.7).effective(), SamplingParams::sampled(0.7));
        assert!(refused(&SamplingParams::sampled(-1.0)).contains("temperature is -1; expected 0 to 100"));
    }

    #[test]
    fn as_json_only_what_is_set_is_there_and_nothing_unknown_is_taken() {
        let params = SamplingParams::sampled(0.5).logit_bias(7, -1.0);
        let json = serde_json::to_string(&params).unwrap();
        assert_eq!(json, r#"{"temperature":0.5,"logit_bias":[[7,-1.0]]}"#);
        assert_eq!(serde_json::from_str::<SamplingParams>(&json).unwrap(), params);
        assert!(!serde_json::from_str::<SamplingParams>(r#"{"temperature": 5}"#).unwrap().is_greedy());
        assert!(serde_json::from_str::<SamplingParams>(r#"{"temprature": 1}"#).is_err(), "no setting is ignored");
        assert_eq!(serde_json::from_str::<SamplingParams>("{}").unwrap(), SamplingParams::default());
    }
}
