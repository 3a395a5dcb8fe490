//! `aotron verify`: holds a plan to the cases of [`aotron::verify`].

use std::io::Write;

use anyhow::Context;
use aotron::backend::select;
use aotron::compile::Progress;
use aotron::engine::Package;
use aotron::verify::{CaseResult, Gate, Report, VerifyOptions, open_unchecked};
use serde::Serialize;

use super::args::{EngineFlags, count, usage};
use super::term::{self, Stages};

/// Sequences at once on a CPU, where batch sizes select no kernels.
const CPU_SLOTS: usize = 4;
/// Tokens of the longest sequence on a CPU without --thorough: the 8B computes a few thousand in minutes.
const CPU_TOKENS: usize = 192;

/// Flags of `aotron verify`.
#[derive(Debug, clap::Args)]
pub struct Flags {
    #[command(flatten)]
    engine: EngineFlags,
    /// Number of concurrent sequences [default: the plan's; at most 4 on a CPU]
    #[arg(long, value_name = "N", value_parser = count(1024))]
    slots: Option<usize>,
    /// On a CPU, fill a sequence to the last position, however long that takes; on a GPU that is always done
    #[arg(long)]
    thorough: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Result as JSON.
#[derive(Debug, Serialize)]
struct Verdict<'r> {
    target: &'r str,
    precision: &'r str,
    device: Option<usize>,
    passed: bool,
    /// The CPU's answers were there to compare with.
    compared_with_cpu: bool,
    #[serde(flatten)]
    report: &'r Report,
}

pub fn run(flags: &Flags) -> anyhow::Result<()> {
    if flags.engine.accept_unverified {
        return Err(usage("--accept-unverified runs a plan without verifying it, which is all that this command does"));
    }
    flags.engine.verify()?;
    verify(&flags.engine.package()?, flags)
}

/// Verifies the plan that the flags select.
fn verify(package: &Package, flags: &Flags) -> anyhow::Result<()> {
    let mut options = flags.engine.options(1);
    let selection = select(package, &options)?;
    term::note(&selection.reason);
    let gate = Gate::new(package, &selection)?;
    let plan = gate.plan();
    let on_cpu = selection.device.is_none();
    options.cpu.slots = Some(flags.slots.unwrap_or_else(|| CPU_SLOTS.min(plan.limits.slots)));
    options.gpu.slots = flags.slots;
    let most_tokens = (on_cpu && !flags.thorough).then_some(CPU_TOKENS);
    let mut opened = open_unchecked(package, &selection, &options)?;
    let stages = Stages::new();
    stages.work(&format!("verifying {}", plan.target));
    let on_step = || {
        stages.advance(1);
        Ok(())
    };
    let report = gate.verify(&mut opened, &VerifyOptions { most_tokens, on_step: &on_step })?;
    stages.finish();
    let compared_with_cpu = gate.answers().is_some();
    if flags.json {
        let (target, precision) = (plan.target.as_str(), plan.precision.as_str());
        let (device, passed) = (selection.device, report.passes());
        term::print_json(&Verdict { target, precision, device, passed, compared_with_cpu, report: &report })?;
    } else {
        print_table(&report).context("the table cannot be printed")?;
    }
    if !compared_with_cpu {
        term::warn(format!(
            "{} holds no answers of the CPU for this plan (--no-reference, or an earlier aotron), so it was compared with \
             itself only",
            package.path().display()
        ));
    }
    if !report.passes() {
        return Err(gate.refusal(&report).into());
    }
    if let Err(reason) = gate.keep(&opened, &report, &options) {
        term::warn(format!("the verdict cannot be kept, so the next start verifies again: {reason}"));
    }
    Ok(())
}

/// Verifies the GPU plans among `targets` that this machine can run, after they were compiled on it.
pub fn verify_compiled(package: &Package, targets: &[&str]) -> anyhow::Result<()> {
    for target in targets {
        let engine = EngineFlags { target: Some((*target).to_owned()), ..EngineFlags::of(package.path()) };
        let flags = Flags { engine, slots: None, thorough: false, json: false };
        match select(package, &flags.engine.options(1)) {
            Ok(_) => verify(package, &flags)?,
            Err(aotron::Error::NoPlan { refusals, .. }) => {
                let reasons: Vec<String> = refusals.plans.iter().map(|refusal| refusal.reason.to_string()).collect();
                term::note(format!(
                    "plan {target} is not verified yet, since it does not run here: {}",
                    reasons.join("; ")
                ));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn print_table(report: &Report) -> std::io::Result<()> {
    let style = term::on_stdout();
    let mut out = term::stdout();
    let width = report.cases.iter().map(|case| case.case.chars().count()).max().unwrap_or(0).max(4);
    let header = format!("{:<width$} {:>6} {:>11} {:>9}  {}", "case", "rows", "worst error", "limit", "verdict");
    writeln!(out, "{}", style.dim(header))?;
    for case in &report.cases {
        let CaseResult { case: name, rows, worst_error, limit, worst, skipped } = case;
        let verdict = match (case.passes(), skipped) {
            (false, _) => style.bold_red("FAILED"),
            (true, None) => "passed".into(),
            (true, Some(_)) if *rows == 0 => "skipped".into(),
            (true, Some(_)) => "passed in part".into(),
        };
        let (error, limit) = (number(*worst_error), number(*limit));
        writeln!(out, "{name:<width$} {rows:>6} {error:>11} {limit:>9}  {verdict}")?;
        if let (false, Some(worst)) = (case.passes(), worst) {
            writeln!(out, "  {} {worst}", style.dim("worst:"))?;
        }
        if let Some(reason) = skipped {
            writeln!(out, "  {} {reason}", style.dim("note:"))?;
        }
    }
    let seconds = std::time::Duration::from_secs_f64(report.seconds.max(0.0));
    writeln!(out, "{} rows of logits compared in {}", report.rows(), term::duration(seconds))
}

/// An error for the table; 0 stands for the same bits.
fn number(error: f32) -> String {
    if error == 0.0 { "0".into() } else { format!("{error:.2e}") }
}
