//! `aotron score`: the probabilities of given token ids.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use aotron::backend::Limits;
use aotron::tensor_file::encode_header;
use safetensors::Dtype;
use serde::Serialize;

use super::args::{EngineFlags, Format};
use super::term;
use super::whole_file::WholeFile;

/// Limit on the size of a file of ids.
const MAX_IDS_BYTES: u64 = 256 << 20;

/// Flags of `aotron score`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    engine: EngineFlags,
    /// JSON file with a list of lists of token ids
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,
    /// Also write the logits of every token: tensors logits.0, logits.1, … of F32 [tokens, vocabulary]
    #[arg(long, value_name = "FILE.safetensors")]
    logits: Option<PathBuf>,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Score of lists of ids: every id of a list except the first is scored, given the ids before it.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Score {
    /// Number of ids, including the first of each list.
    tokens: usize,
    /// Natural logarithm.
    log_probability: f64,
    /// Mean log-probability per scored id; `None` if there are none.
    mean: Option<f64>,
    /// `exp(-mean)`
    perplexity: Option<f64>,
    #[serde(skip)]
    scored: usize,
}

impl Score {
    fn new(tokens: usize, scored: usize, log_probability: f64) -> Score {
        let mean = (scored > 0).then(|| log_probability / scored as f64);
        Score { tokens, scored, log_probability, mean, perplexity: mean.map(|mean| (-mean).exp()) }
    }
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let lists = read_ids(&flags.ids)?;
    let engine = flags.engine.open()?;
    let limits = engine.executor.limits().clone();
    check(&lists, &limits).with_context(|| flags.ids.display().to_string())?;
    let mut logits = match &flags.logits {
        Some(path) => Some(start_logits(path, &lists, &limits)?),
        None => None,
    };

    let tokens: usize = lists.iter().map(Vec::len).sum();
    let bar = term::bar("scoring", tokens as u64, term::TOKENS);
    let mut session = engine.into_session();
    let mut scores = Vec::with_capacity(lists.len());
    let mut row_bytes = Vec::new();
    for (index, ids) in lists.iter().enumerate() {
        let mut written = Ok(());
        let log_probabilities = session
            .score(ids, &mut |_, row| {
                bar.inc(1);
                if let (Some(file), Ok(())) = (&mut logits, &written) {
                    row_bytes.clear();
                    row_bytes.extend(row.iter().flat_map(|value| value.to_le_bytes()));
                    written = file.write(&row_bytes);
                }
            })
            .with_context(|| format!("list {index}"))?;
        written?;
        scores.push(Score::new(ids.len(), log_probabilities.len(), log_probabilities.iter().sum()));
    }
    bar.finish_and_clear();
    if let Some(file) = logits {
        file.finish()?;
    }
    let scored = scores.iter().map(|s| s.scored).sum();
    let overall = Score::new(tokens, scored, scores.iter().map(|s| s.log_probability).sum());
    match flags.format {
        Format::Json => term::print_json(&serde_json::json!({"lists": scores, "overall": overall})),
        Format::Text => print_table(&scores, &overall),
    }
}

fn read_ids(path: &Path) -> anyhow::Result<Vec<Vec<u32>>> {
    let file = fs::File::open(path).map_err(aotron::Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(MAX_IDS_BYTES + 1).read_to_end(&mut bytes).map_err(aotron::Error::io("read", path))?;
    if bytes.len() as u64 > MAX_IDS_BYTES {
        bail!("{} has more than {MAX_IDS_BYTES} bytes, the limit for a file of ids", path.display());
    }
    let lists: Vec<Vec<u32>> = serde_json::from_slice(&bytes)
        .with_context(|| format!("{}: expected a JSON list of lists of token ids", path.display()))?;
    if lists.is_empty() {
        bail!("{}: it contains no list of ids", path.display());
    }
    Ok(lists)
}

/// Detects input that the engine would refuse before spending hours on what precedes it.
fn check(lists: &[Vec<u32>], limits: &Limits) -> anyhow::Result<()> {
    for (index, ids) in lists.iter().enumerate() {
        let most = limits.max_sequence_tokens;
        if ids.is_empty() || ids.len() > most {
            bail!("list {index} has {} ids; this engine takes 1 to {most}", ids.len());
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= limits.vocab_size) {
            bail!("list {index} has id {id}, but the vocabulary has ids 0 to {}", limits.vocab_size.saturating_sub(1));
        }
    }
    Ok(())
}

fn start_logits(path: &Path, lists: &[Vec<u32>], limits: &Limits) -> aotron::Result<WholeFile> {
    let names: Vec<String> = (0..lists.len()).map(|index| format!("logits.{index}")).collect();
    let shapes = lists.iter().map(|ids| vec![ids.len(), limits.vocab_size]);
    let tensors: Vec<_> = names.iter().zip(shapes).map(|(name, shape)| (name.as_str(), Dtype::F32, shape)).collect();
    let mut file = WholeFile::create(path)?;
    file.write(&encode_header(&tensors)?)?;
    Ok(file)
}

fn print_table(scores: &[Score], overall: &Score) -> anyhow::Result<()> {
    let style = term::on_stdout();
    let mut out = term::stdout();
    let header = format!("{:>6} {:>8} {:>16} {:>10} {:>12}", "list", "tokens", "log-probability", "mean", "perplexity");
    writeln!(out, "{}", style.dim(header))?;
    let rows = scores.iter().enumerate().map(|(index, score)| (index.to_string(), score));
    for (name, score) in rows.chain([("all".to_owned(), overall)]) {
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.4}"));
        let Score { tokens, log_probability, mean, perplexity, .. } = score;
        let (mean, perplexity) = (number(*mean), number(*perplexity));
        writeln!(out, "{name:>6} {tokens:>8} {log_probability:>16.4} {mean:>10} {perplexity:>12}")?;
    }
    Ok(())
}
